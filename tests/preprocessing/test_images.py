"""Images of every kind become upright RGB."""

import functools
import os
import struct
import subprocess
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from factories import refused
from PIL import Image, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from preprocessing import images
from preprocessing.images import find_suffixes, read_image, read_rgb, to_rgb
from utils import UserError


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def read_saved(image, path, **options):
    """What `read_rgb` gives for a picture, or an array, once it is saved in this file"""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    image.save(path, **options)
    return read_rgb(path)


def quadrants():
    """red, green / blue, white, wider than high"""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:], image[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image[16:, 24:] = 255
    return Image.fromarray(image)


def test_every_transparency_is_blended_with_white_and_rounded_to_the_nearest(tmp_path):
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    expected = np.round(colour * (alpha / 255) + 255 * (1 - alpha / 255))
    for channels in (1, 3):
        pixels = np.stack([*[colour] * channels, alpha], 2).astype(np.uint8)
        np.testing.assert_array_equal(read_saved(pixels, tmp_path / "a.png"), grey(expected))


def test_first_frames_and_palettes_are_shown_and_what_is_transparent_is_white(tmp_path):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    animated = {"save_all": True, "append_images": [blue], "duration": 50}
    for suffix in ("gif", "webp", "png"):
        got = read_saved(red, tmp_path / f"a.{suffix}", **animated).astype(int)
        assert np.abs(got - [255, 0, 0]).max() <= 3
    assert read_saved(red, tmp_path / "a.png", transparency=(255, 0, 0)).min() == 255
    got = read_saved(np.array([[False, True]]), tmp_path / "a.png")  # one bit
    np.testing.assert_array_equal(got, grey([[0, 255]]))
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    for suffix in ("png", "gif"):
        got = read_saved(image, tmp_path / f"a.{suffix}", transparency=0)
        assert got.tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_few_bits_in_many_are_neither_black_nor_clipped(tmp_path):
    for bits in (8, 10, 12, 14, 16):
        white = 2**bits - 1
        values = np.array([[0, white // 5, white // 2, white]])
        for suffix, dtype in (("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)):
            got = read_saved(values.astype(dtype), tmp_path / f"a.{suffix}").astype(int)
            assert np.abs(got - grey([[0, 51, 127, 255]])).max() <= 1
    for values, expected in [  # floats: by the value of white, not by their maximum
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0, 0.25, 0.5], [0, 64, 128]),
        ([0, 100.2, 200], [0, 100, 200]),
        ([0, 32768, 60000], [0, 128, 233]),
    ]:
        got = read_saved(np.array([values], np.float32), tmp_path / "a.tif")
        np.testing.assert_array_equal(got, grey([expected]))


def test_values_that_do_not_say_what_is_white_are_refused(tmp_path):
    for values in ([-1.0, 4.0], [0.0, 1e6], [0, np.nan], [-5, 9], [0, 70000]):
        dtype = np.float32 if isinstance(values[1], float) else np.int32
        Image.fromarray(np.array([values], dtype)).save(tmp_path / "a.tif")
        refused(tmp_path / "a.tif", "not a readable image", load=read_rgb)


def stored(upright, orientation):
    """The pixels as a camera stores them: EXIF says where its row 0 and column 0 belong."""
    if orientation > 4:  # row 0 is the left or right side
        upright = upright.swapaxes(0, 1)
    row_step = -1 if orientation in (3, 4, 6, 7) else 1  # it is the bottom or the right side
    column_step = -1 if orientation in (2, 3, 7, 8) else 1
    return np.ascontiguousarray(upright[::row_step, ::column_step])


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_a_picture_is_upright_by_its_exif_orientation_once(tmp_path, suffix):
    upright = np.asarray(quadrants())
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        got = read_saved(stored(upright, orientation), path, exif=exif, **options)
        assert got.shape == upright.shape
        assert np.abs(got.astype(int) - upright).max() < 12 * (suffix == "jpg") + 1  # JPEG's loss


def test_a_rotated_tiff_of_any_mode_is_upright(tmp_path):
    for mode in ("L", "P", "RGBA", "CMYK", "I;16"):
        upright, exif = quadrants().convert("L" if mode == "I;16" else mode), Image.Exif()
        expected = np.asarray(upright.convert("RGB"))
        if mode == "I;16":
            upright = Image.fromarray(np.asarray(upright).astype(np.uint16) * 257)
        exif[0x0112] = 6
        image = upright.transpose(Image.Transpose.ROTATE_90)
        for compression in (None, "tiff_lzw"):
            got = read_saved(image, tmp_path / "a.tif", exif=exif, compression=compression)
            np.testing.assert_array_equal(got, expected, mode)


def test_rotated_photograph_with_odd_exif_entries_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x9286] = 6, b"\xff\xfe\x00", b"\x00" * 70_000
    exif[0x829A] = 0.0  # an exposure time of 0 / 1
    image = quadrants().transpose(Image.Transpose.ROTATE_90)
    assert read_saved(image, tmp_path / "a.jpg", exif=exif.tobytes()[:60_000]).shape == (32, 48, 3)


def test_a_picture_in_memory_is_converted_and_not_changed():
    image = quadrants().transpose(Image.Transpose.ROTATE_90)
    image.getexif()[0x0112] = 6
    before = image.tobytes()
    np.testing.assert_array_equal(to_rgb(image), np.asarray(quadrants()))
    assert image.tobytes() == before and image.size == (32, 48) and image.getexif()[0x0112] == 6


def test_png_with_megabytes_of_text_and_profile_is_read_by_scripts(tmp_path, monkeypatch):
    text_limit = PngImagePlugin.MAX_TEXT_MEMORY  # as utils.set_up_process has it
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", text_limit)
    info = PngInfo()
    info.add_text("prompt", "cat " * 600_000, zip=True)
    got = read_saved(quadrants(), tmp_path / "a.png", pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(got, np.asarray(quadrants()))


def test_postscript_is_refused_without_starting_ghostscript(tmp_path, monkeypatch):
    quadrants().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    refused(tmp_path / "a.jpg", "in none of the formats", load=read_rgb)


def test_every_format_of_photographs_is_read_and_its_suffix_known(tmp_path):
    suffixes = find_suffixes()
    assert {".jpg", ".jpeg", ".png", ".gif", ".mpo", ".webp"} <= suffixes
    assert not {".eps", ".pdf", ".mpg", ".h5"} & suffixes
    for suffix in (".jfif", ".avif", ".jp2", ".tif", ".bmp", ".webp", ".ppm", ".tga", ".pcx"):
        assert suffix in suffixes
        got = read_saved(quadrants(), tmp_path / f"a{suffix}").astype(int)
        assert np.abs(got[8, 10] - [255, 0, 0]).max() < 20, suffix
    quadrants().save(tmp_path / "b.jpg", format="PNG")  # the suffix does not matter
    np.testing.assert_array_equal(read_rgb(tmp_path / "b.jpg"), np.asarray(quadrants()))


def test_web_address_is_downloaded_up_to_a_bound(tmp_path, monkeypatch):
    quadrants().save(tmp_path / "a.png")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read_rgb(f"{url}/a.png"), np.asarray(quadrants()))
        refused(f"{url}/b.png", "could not be downloaded", load=read_rgb)
        monkeypatch.setattr(images, "MAX_DOWNLOAD", 50)
        refused(f"{url}/a.png", "is larger than", load=read_rgb)
        server.shutdown()
    refused(f"{url}/a.png", "could not be downloaded", load=read_rgb)


def test_what_is_no_readable_picture_is_one_line_with_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:").mkdir()
    for path in ("x.png", "http:/b.png"):  # a folder, no web address
        refused(path, "not found", load=read_image)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, "/dev/zero", tmp_path / "pipe"):
        refused(path, "cannot be read", load=read_rgb)
    refused("the picture", "not a readable image", load=lambda _: read_rgb(bytearray(b"GIF89a")))
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for suffix in ("png", "jpg", "gif", "webp", "tif", "avif"):
        path = tmp_path / f"x.{suffix}"
        read_saved(noise, path)
        content = path.read_bytes()
        for broken in (content[: len(content) // 2], b"a cat\nsits\n" * 50, b""):
            path.write_bytes(broken)
            refused(path, "not a readable image", load=read_image)


def test_image_is_resized_to_a_square_and_averaged_not_cropped(tmp_path):
    quadrants().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 64)
    assert image.dtype == np.uint8
    corners = image[:, ::63, ::63].transpose(1, 2, 0)  # those of the quadrants
    np.testing.assert_array_equal(corners, np.asarray(quadrants())[::31, ::47])
    board = np.indices((1024, 1024)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png").astype(int)
    assert image.shape == (3, 256, 256) and np.abs(image - 127.5).max() < 3


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    """PNGs of a few hundred bytes that say they have 256 or 900 million pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    for side in (16_000, 30_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        pixels = chunk(b"IDAT", zlib.compress(bytes(99_999)))
        content = b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")
        (tmp_path / "bomb.png").write_bytes(content)
        refused(tmp_path / "bomb.png", "decompression bomb", load=read_rgb)


def test_threads_read_large_pictures_in_turns_and_others_at_once(tmp_path, monkeypatch):
    picture, together = quadrants(), threading.Barrier(2)
    picture.save(tmp_path / "x.png")

    def read(path):
        try:
            return read_rgb(path) is None
        except UserError:  # the other thread was not there within the time
            return True

    monkeypatch.setattr(images, "to_rgb", lambda _: together.wait(0.3))
    for limit, alone in ((picture.width * picture.height, False), (0, True)):
        monkeypatch.setattr(images, "LARGE", limit)
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(read, [tmp_path / "x.png"] * 2)) == [alone] * 2
        together.reset()
