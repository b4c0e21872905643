"""Images of every kind become upright RGB."""

import functools
import io
import os
import struct
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from factories import needs_fork
from PIL import Image, ImageOps, PngImagePlugin
from PIL.PngImagePlugin import PngInfo

from preprocessing import images
from preprocessing.images import find_suffixes, read_image, read_rgb
from preprocessing.processes import open_pool
from utils import UserError


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


def test_grey_becomes_three_equal_channels(tmp_path):
    values = np.array([[0, 64, 65], [128, 254, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey(values))


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False], [False, True]])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey([[255, 0], [0, 255]]))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 1000], [32768, 65000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read_rgb(tmp_path / "a.png"), grey([[0, 1, 4], [128, 253, 255]])
    )  # / 257, rounded


def palette_picture():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_palette_becomes_its_colours(tmp_path):
    palette_picture().save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_is_white(tmp_path, suffix):
    palette_picture().save(tmp_path / f"a.{suffix}", transparency=0)
    assert read_rgb(tmp_path / f"a.{suffix}").tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_transparency_is_blended_with_white(tmp_path):
    pixels = np.array([[[100, 200, 0, 255], [100, 200, 0, 0], [100, 200, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # 51 is a fifth: 0.2 * colour + 0.8 * 255
    assert read_rgb(tmp_path / "a.png").tolist() == [[[100, 200, 0], [255] * 3, [224, 244, 204]]]


def test_every_colour_with_every_transparency_is_rounded_to_the_nearest(tmp_path):
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    pixels = np.stack([colour, colour, colour, alpha], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.round(colour * (alpha / 255) + 255 * (1 - alpha / 255))
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey(expected))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize(
    "suffix, dtype", [("png", np.uint16), ("tif", np.uint16), ("tif", np.int32)]
)
def test_few_bits_in_many_are_neither_black_nor_clipped(tmp_path, suffix, dtype, bits):
    white = 2**bits - 1
    values = np.array([[0, white // 5, white // 2, white]])
    Image.fromarray(values.astype(dtype)).save(tmp_path / f"a.{suffix}")
    got = read_rgb(tmp_path / f"a.{suffix}").astype(int)
    assert np.abs(got - grey([[0, 51, 127, 255]])).max() <= 1


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 0.25, 0.5], [0, 64, 128]),
        ([0, 100.2, 200], [0, 100, 200]),
        ([0, 32768, 60000], [0, 128, 233]),
    ],
)
def test_floats_are_scaled_by_what_white_is_not_by_their_maximum(tmp_path, values, expected):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.tif"), grey([expected]))


@pytest.mark.parametrize(
    "values, dtype",
    [([-1, 4], np.float32), ([0, 1e6], np.float32), ([-5, 9], np.int32), ([0, 70000], np.int32)],
)
def test_values_that_do_not_say_what_is_white_are_refused(tmp_path, values, dtype):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="do not say what is white"):
        read_rgb(tmp_path / "a.tif")


def test_floats_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif is not a readable image: .* not finite"):
        read_rgb(tmp_path / "a.tif")


def test_transparent_grey_is_blended_with_white(tmp_path):
    Image.fromarray(np.array([[[100, 255], [100, 51]]], np.uint8)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tolist() == grey([[100, 224]]).tolist()


def test_cmyk_jpeg_shows_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")  # red in print
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation_is_read(tmp_path, suffix):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[blue], duration=50)
    assert np.abs(read_rgb(tmp_path / f"a.{suffix}").astype(int) - [255, 0, 0]).max() <= 3


def quadrants():
    """red, green / blue, white, wider than high"""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:], image[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image[16:, 24:] = 255
    return Image.fromarray(image)


# How a picture must be turned before it is stored, to be upright again by its EXIF tag.
T = Image.Transpose
STORED = {
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotated_jpeg_is_upright(tmp_path, orientation):
    upright, turn, exif = quadrants(), STORED[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    got = read_rgb(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(got, np.asarray(ImageOps.exif_transpose(image)))
    assert got.shape == (32, 48, 3)
    assert np.abs(got.astype(int) - np.asarray(upright)).max() < 12  # JPEG's loss


@pytest.mark.parametrize("mode", ["L", "P"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotated_picture_of_one_channel_is_upright(tmp_path, orientation, suffix, mode):
    if (suffix, mode) == ("jpg", "P"):
        return  # JPEG has no palettes
    upright, turn, exif = quadrants().convert(mode), STORED[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    got, expected = read_rgb(tmp_path / f"a.{suffix}"), np.asarray(upright.convert("RGB"))
    assert got.shape == expected.shape and np.abs(got.astype(int) - expected).max() < 12


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", STORED)
def test_rotated_tiff_of_any_mode_is_upright(tmp_path, orientation, compression, mode):
    upright = quadrants().convert("L" if mode == "I;16" else mode)
    stored = np.asarray(upright)
    if mode == "I;16":
        stored = stored.astype(np.uint16) * 257
    stored = Image.fromarray(stored, mode if mode in ("P", "CMYK") else None)
    if mode == "P":
        stored.putpalette(upright.getpalette())
    expected = np.asarray(upright.convert("RGB"))
    if STORED[orientation] is not None:
        stored = stored.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.tif", exif=exif, compression=compression)
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.tif"), expected)
    np.testing.assert_array_equal(read_rgb(str(tmp_path / "a.tif")), expected)


def test_rotated_photograph_with_odd_exif_entries_is_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x9286] = 6, b"\xff\xfe\x00", b"\x00" * 70_000
    exif[0x829A] = 0.0  # an exposure time of 0 / 1
    raw = bytearray(exif.tobytes()[:60_000])
    quadrants().transpose(STORED[6]).save(tmp_path / "a.jpg", exif=bytes(raw), quality=100)
    assert read_rgb(tmp_path / "a.jpg").shape == (32, 48, 3)


def test_png_with_megabytes_of_text_and_profile_is_read_by_scripts(tmp_path, monkeypatch):
    most = PngImagePlugin.MAX_TEXT_MEMORY  # as utils.set_up_process has it
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", most)
    info = PngInfo()
    info.add_text("prompt", "cat " * 600_000, zip=True)
    quadrants().save(tmp_path / "a.png", pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), np.asarray(quadrants()))


def test_postscript_is_refused_without_starting_ghostscript(tmp_path, monkeypatch):
    quadrants().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match="a.jpg is not a readable image: it is empty, or in none"):
        read_rgb(tmp_path / "a.jpg")


def test_every_format_of_photographs_is_read_and_its_suffix_known(tmp_path):
    suffixes = find_suffixes()
    assert {
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".webp",
        ".avif",
        ".jp2",
        ".tif",
        ".bmp",
        ".gif",
        ".mpo",
        ".ppm",
    } <= suffixes and not {".eps", ".pdf", ".mpg", ".h5"} & suffixes
    for suffix in (".jfif", ".avif", ".jp2", ".tif", ".bmp", ".webp", ".ppm", ".tga", ".pcx"):
        quadrants().save(tmp_path / f"a{suffix}")
        got = read_rgb(tmp_path / f"a{suffix}").astype(int)
        assert np.abs(got[8, 10] - [255, 0, 0]).max() < 20, suffix


def test_bytes_and_open_files_are_read_as_their_file_is(tmp_path):
    quadrants().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        for source in (content, bytearray(content), io.BytesIO(content), file):
            np.testing.assert_array_equal(read_rgb(source), np.asarray(quadrants()))
        assert not file.closed
    with pytest.raises(UserError, match="the picture is not a readable image"):
        read_rgb(b"GIF89a")


def test_web_address_is_downloaded_up_to_a_bound(tmp_path, monkeypatch):
    quadrants().save(tmp_path / "a.png")
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        np.testing.assert_array_equal(read_rgb(f"{url}/a.png"), np.asarray(quadrants()))
        with pytest.raises(UserError, match="/b.png could not be downloaded: .*[Nn]ot [Ff]ound"):
            read_rgb(f"{url}/b.png")
        monkeypatch.setattr(images, "MAX_DOWNLOAD", 50)
        with pytest.raises(UserError, match="/a.png is larger than"):
            read_rgb(f"{url}/a.png")
        server.shutdown()
    with pytest.raises(UserError, match="could not be downloaded"):
        read_rgb(f"{url}/a.png")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "pipe"])
def test_devices_and_pipes_are_refused_at_once(tmp_path, device):
    if device == "pipe":
        device = tmp_path / "pipe"
        os.mkfifo(device)
    with pytest.raises(UserError, match="cannot be read: it is not a file"):
        read_rgb(device)


@pytest.mark.parametrize("name", ["imageio:chelsea.png", "http:", "~x", "<screen>", "a.zip"])
def test_file_name_is_never_taken_for_a_url_or_an_archive(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{name}/b.png not found"):
        read_rgb(f"{name}/b.png")
    (tmp_path / name).mkdir()
    Image.new("RGB", (2, 2), "red").save(f"{tmp_path}/{name}/b.png")
    assert read_rgb(f"{name}/b.png").tolist() == [[[255, 0, 0]] * 2] * 2


def test_suffix_does_not_matter(tmp_path):
    Image.fromarray(grey([[7, 8]])).save(tmp_path / "a.jpg", format="PNG")
    (tmp_path / "a.jpg").rename(tmp_path / "b")
    Image.fromarray(grey([[7, 8]])).save(tmp_path / "a.jpg", format="PNG")
    for name in ("a.jpg", "b"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), grey([[7, 8]]))


def noise_file(path, **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize(
    "broken", ["missing", "folder", "empty", "text", "png", "jpg", "gif", "webp", "tif", "avif"]
)
def test_unreadable_picture_is_one_line_with_its_path(tmp_path, broken):
    path = tmp_path / f"x.{broken}"
    if broken == "folder":
        path.mkdir()
    elif broken == "empty":
        path.touch()
    elif broken == "text":
        path.write_text("a cat\nsits\n" * 50)
    elif broken != "missing":
        data = noise_file(path).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    for read in (read_rgb, read_image):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    expected = {"missing": "not found", "folder": "is a folder"}.get(broken, "not a readable image")
    assert expected in str(error.value)


@pytest.mark.parametrize("problem", [EOFError, RuntimeError, TypeError, MemoryError])
def test_any_error_of_a_decoder_is_a_user_error(tmp_path, monkeypatch, problem):
    def fail(*args, **kwargs):
        raise problem

    path = noise_file(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match=f"x.png is not a readable image: {problem.__name__}"):
        read_rgb(path)


def test_fine_checkerboard_shrinks_to_grey(tmp_path):
    board = np.indices((1024, 1024)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png").astype(int)
    assert image.shape == (3, 256, 256) and np.abs(image - 127.5).max() < 3


def test_image_is_resized_to_a_square_not_cropped(tmp_path):
    quadrants().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 64)
    assert image.shape == (3, 64, 64) and image.dtype == np.uint8
    for (y, x), colour in {
        (0, 0): (255, 0, 0),
        (0, 63): (0, 255, 0),
        (63, 0): (0, 0, 255),
        (63, 63): (255, 255, 255),
        (28, 28): (255, 0, 0),
    }.items():
        assert tuple(image[:, y, x]) == colour


@pytest.mark.parametrize("side", [16_000, 30_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    """A PNG of a few hundred bytes that says it has 256 or 900 million pixels."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99_999)))
        + chunk(b"IEND", b"")
    )
    with pytest.raises(UserError, match="bomb.png is not a readable image: .*decompression bomb"):
        read_rgb(tmp_path / "bomb.png")


def test_one_pixel_fills_the_square(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "1.png")
    assert np.array_equal(
        read_image(tmp_path / "1.png").reshape(3, -1), np.repeat([[9], [8], [7]], 256 * 256, 1)
    )


@pytest.mark.parametrize("large", [True, False])
def test_of_large_pictures_one_at_a_time_is_decoded_to_bound_the_memory(
    tmp_path, monkeypatch, large
):
    quadrants().save(tmp_path / "a.png")
    inside, most, together = [], [], threading.Barrier(1 if large else 4)
    original = images._upright_rgb

    def record(*args):
        inside.append(1)
        together.wait(timeout=60)  # if they may, all four are here at the same time
        most.append(len(inside))
        inside.pop()
        return original(*args)

    monkeypatch.setattr(images, "LARGE_PIXELS", 10 if large else 1 << 24)
    monkeypatch.setattr(images, "_upright_rgb", record)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read_rgb, [tmp_path / "a.png"] * 4))
    assert max(most) == (1 if large else 4)


def read_slowly(path):
    """When a picture's pixels began and ceased to be in memory"""
    times, original = [], images._upright_rgb

    def record(*args):
        times.append(time.monotonic())
        time.sleep(0.1)
        times.append(time.monotonic())
        return original(*args)

    images._upright_rgb = record
    read_rgb(path)
    images._upright_rgb = original
    return times


@needs_fork
def test_of_large_pictures_all_processes_together_decode_one_at_a_time(tmp_path, monkeypatch):
    quadrants().save(tmp_path / "a.png")
    monkeypatch.setattr(images, "LARGE_PIXELS", 10)
    with open_pool(3, images.share_lock) as pool:
        times = sorted(pool.map(read_slowly, [tmp_path / "a.png"] * 6))
    assert all(end <= start for (_, end), (start, _) in zip(times, times[1:]))
