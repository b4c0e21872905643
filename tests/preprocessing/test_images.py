"""Images of every kind become upright RGB."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from preprocessing.images import read_image, read_rgb
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
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"),
                                  grey([[0, 1, 4], [128, 253, 255]]))  # / 257, rounded


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


def test_floats_are_scaled_by_their_maximum_if_it_is_above_one(tmp_path):
    for values, expected in (([[0, 0.5, 1]], [[0, 128, 255]]), ([[-1, 1, 4]], [[0, 64, 255]])):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "a.tif")
        np.testing.assert_array_equal(read_rgb(tmp_path / "a.tif"), grey(expected))


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
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
          6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


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


@pytest.mark.parametrize("broken", ["missing", "folder", "empty", "text", "png", "jpg", "gif",
                                    "webp", "tif", "avif"])
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
        path.write_bytes(data[:len(data) // 2])
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
    for (y, x), colour in {(0, 0): (255, 0, 0), (0, 63): (0, 255, 0), (63, 0): (0, 0, 255),
                           (63, 63): (255, 255, 255), (28, 28): (255, 0, 0)}.items():
        assert tuple(image[:, y, x]) == colour


@pytest.mark.parametrize("side", [16_000, 30_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    """A PNG of a few hundred bytes that says it has 256 or 900 million pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99_999))) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="bomb.png is not a readable image: .*decompression bomb"):
        read_rgb(tmp_path / "bomb.png")


def test_one_pixel_fills_the_square(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "1.png")
    assert np.array_equal(read_image(tmp_path / "1.png").reshape(3, -1),
                          np.repeat([[9], [8], [7]], 256 * 256, 1))
