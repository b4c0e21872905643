"""Image files of any kind -> upright RGB -> the square input of the encoder."""

import io
import os
import threading
import urllib.error
import urllib.request
from contextlib import nullcontext

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from datasets import IMAGE_SIZE
from utils import UserError, check_is_file

try:
    import pillow_heif
except ImportError:
    pillow_heif = None
else:
    pillow_heif.register_heif_opener()

# Pillow's formats for photographs. It knows others, and for some of them starts other programs.
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "WEBP",
    "TIFF",
    "BMP",
    "DIB",
    "AVIF",
    "JPEG2000",
    "PPM",
    "TGA",
    "ICO",
    "PCX",
    "SGI",
    *["HEIF"] * bool(pillow_heif),
)
OPAQUE_MODES = ("RGB", "L", "CMYK", "YCbCr")  # of Pillow, with 8 bits per channel
# EXIF orientation -> quarter turns to the left that make the picture upright, and whether it must
# then be mirrored.
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}
# What white can be in a picture of more than 8 bits: a camera's or scanner's 10, 12 or 14 bits are
# often stored as they are in 16 or 32.
WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
FLOAT_WHITES = (1, 255, 65535)
LARGE_PIXELS = 1 << 24  # of larger pictures only one at a time is decoded
MAX_DOWNLOAD, DOWNLOAD_SECONDS = 64 << 20, 30  # bytes; of a picture's web address

_one_large_picture = threading.Lock()


def share_lock(lock):
    """Decode a large picture only while holding this lock, which processes share."""
    global _one_large_picture
    _one_large_picture = lock


def find_suffixes():
    """The suffixes of the files that `read_rgb` can read here, in lower case."""
    Image.init()
    return {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in (*FORMATS, "MPO")
    }  # a JPEG with several pictures


def is_url(source):
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def read_rgb(source):
    """
    Read any picture as upright RGB: uint8 (height, width, 3).

    source: a path, a web address (http or https), bytes, or an open binary file

    EXIF rotation is applied, transparency is blended with white, and the first frame of an
    animation is taken. Values of more than 8 bits are scaled to 8: white is the least of 2^n - 1,
    n = 8, 10, 12, 14 or 16, that is not below the largest value, of floats 1, 255 or 65535.

    Raises UserError if it is missing, is not a readable picture or has more than 179 million
    pixels, which would take gigabytes (Pillow's limit against decompression bombs).
    """
    name = source
    if not isinstance(source, (str, os.PathLike)):
        name = getattr(source, "name", "the picture")
    try:
        with _open(source) as file, Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} not found") from None
    except Exception as error:  # decoders raise many kinds: EOFError, RuntimeError, struct.error
        raise UserError(f"{name} is not a readable image: {_reason(error)}") from None


def _open(source):
    """A context with an open binary file."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return nullcontext(source)  # its owner closes it
    if is_url(source):
        return io.BytesIO(_download(source))
    if os.path.isdir(source):
        raise UserError(f"{source} is a folder, not an image")
    check_is_file(source)
    return open(source, "rb")


def _download(url):
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (captioning)"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            content = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise UserError(
            f"{url} could not be downloaded: {getattr(error, 'reason', error)}"
        ) from None
    if len(content) > MAX_DOWNLOAD:
        raise UserError(f"{url} is larger than {MAX_DOWNLOAD >> 20} MB; download it yourself")
    return content


def to_rgb(image):
    """
    As `read_rgb`, for a PIL image, which is not changed. Raises what Pillow raises if its file is
    damaged.
    """
    large = image.size[0] * image.size[1] > LARGE_PIXELS
    with _one_large_picture if large else nullcontext():
        mode = _target_mode(image.mode, image.info)
        pixels = np.asarray(image.convert(mode) if mode else image)
        # Read now, since Pillow has turned a TIFF upright itself.
        return _upright_rgb(pixels, image.getexif().get(ExifTags.Base.Orientation))


def _target_mode(mode, info):
    """The Pillow mode to convert to; None where Pillow would clip values, not scale them."""
    if mode.startswith("I") or mode == "F":
        return None
    # By way of RGBA, since converting directly to RGB shows the colour stored under a transparent
    # pixel.
    return "RGB" if mode in OPAQUE_MODES and "transparency" not in info else "RGBA"


def _upright_rgb(pixels, orientation):
    """
    pixels: (H, W) of more than 8 bits, or uint8 (H, W, 3 or 4); orientation: EXIF's number or None

    Returns uint8 (H, W, 3), without transparency and upright.
    """
    if pixels.dtype != np.uint8:
        pixels = np.repeat(_to_8_bits(pixels)[..., None], 3, axis=2)
    if pixels.shape[2] == 4:
        image = Image.fromarray(pixels)
        white = Image.new("RGBA", image.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    if orientation in TURNS:
        turns, mirrored = TURNS[orientation]
        pixels = np.rot90(pixels, turns)
        pixels = np.ascontiguousarray(np.fliplr(pixels) if mirrored else pixels)
    return pixels


def _to_8_bits(pixels):
    """Integers or floats from 0 to white, see `read_rgb` -> uint8; ValueError for any other"""
    is_float = pixels.dtype.kind == "f"
    if is_float and not np.isfinite(pixels).all():
        raise ValueError("it has values that are not finite")
    least, most = pixels.min(initial=0), pixels.max(initial=0)
    white = next((w for w in (FLOAT_WHITES if is_float else WHITES) if most <= w), None)
    if least < 0 or white is None:
        raise ValueError(f"its values from {least:g} to {most:g} do not say what is white")
    scaled = pixels / np.float32(white) * np.float32(255)
    return np.round(scaled, out=scaled).astype(np.uint8)


def _reason(error):
    """One line on why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty, or in none of the formats of photographs"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def read_image(path, size=IMAGE_SIZE):
    """
    Read a picture for the encoder: uint8 (3, size, size), resized to a square as in the tutorial,
    without keeping its aspect ratio. PIL's bilinear filter is antialiased. Raises UserError as
    `read_rgb` does.
    """
    return resize_square(read_rgb(path), size)


def resize_square(rgb, size=IMAGE_SIZE):
    """uint8 (height, width, 3) -> (3, size, size)"""
    image = Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
