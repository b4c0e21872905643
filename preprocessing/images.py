"""Image files of any kind -> upright RGB -> the square input of the encoder."""

import io
import os
import threading
import urllib.request
from contextlib import nullcontext

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from datasets import IMAGE_SIZE
from utils import UserError, check_is_file

# Pillow's formats for photographs. It reads others, for some of which it starts other programs.
FORMATS = "JPEG PNG GIF WEBP TIFF BMP DIB AVIF JPEG2000 PPM TGA ICO PCX SGI".split()
try:
    import pillow_heif
except ImportError:
    pass
else:
    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")

OPAQUE_MODES = ("RGB", "L", "CMYK", "YCbCr")  # of Pillow, with 8 bits per channel
# Possible values of white: a camera's 10, 12 or 14 bits are often stored as they are in 16 or 32.
WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))
FLOAT_WHITES = (1, 255, 65535)
LARGE = 1 << 25  # pixels of a picture that takes so much memory that threads read it in turns
_reading_large = threading.Lock()
MAX_DOWNLOAD, DOWNLOAD_SECONDS = 64 << 20, 30  # bytes; of a picture's web address


def find_suffixes():
    """The suffixes of the files that `read_rgb` can read here, in lower case."""
    Image.init()
    formats = {*FORMATS, "MPO"}  # MPO: a JPEG with several pictures
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in formats}


def is_url(source):
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def read_rgb(source):
    """
    Read any picture as upright RGB: uint8 (height, width, 3).

    source: a path, a web address (http or https), bytes, or an open binary file

    EXIF rotation is applied, transparency is blended with white, and the first frame of an
    animation is taken. Values of more than 8 bits are scaled to 8: white is the smallest of
    2^n - 1, n = 8, 10, 12, 14 or 16, that is not below the largest value, of floats 1, 255 or
    65535. UserError if there is no readable picture or it has more than 179 million pixels,
    Pillow's limit against decompression bombs.
    """
    name = source
    if not isinstance(source, (str, os.PathLike)):
        name = getattr(source, "name", "the picture")
    try:
        # Given its path, Pillow would map a TIFF into memory, and not turn it upright.
        with _open(source) as file, Image.open(file, formats=FORMATS) as image:
            with _reading_large if image.width * image.height > LARGE else nullcontext():
                return to_rgb(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} not found") from None
    except UnidentifiedImageError:
        reason = "it is empty, or in none of the formats of photographs"
    except Exception as error:  # decoders raise many types: EOFError, RuntimeError, struct.error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    reason = reason.partition("\n")[0]
    raise UserError(f"{name} is not a readable image: {reason}")


def read_source(source):
    """
    As `read_rgb`, also of a PIL image or an array uint8 (H, W), (H, W, 3) or (H, W, 4): the pixels,
    and whether they can be read again, from a path. UserError if they cannot be read
    """
    is_path = isinstance(source, (str, os.PathLike))
    if is_path or isinstance(source, (bytes, bytearray)) or hasattr(source, "read"):
        return read_rgb(source), is_path and not is_url(source)
    try:
        is_picture = isinstance(source, Image.Image)
        picture = source if is_picture else Image.fromarray(np.asarray(source))
        if 0 in picture.size:
            raise ValueError("it has no pixels")
        return to_rgb(picture), False
    except Exception as error:  # Pillow's decoders raise errors of many types
        kind = type(source).__name__
        raise UserError(f"{kind} is not a readable image, uint8 (H, W, 3): {error}") from None


def _open(source):
    """A context with an open binary file."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return nullcontext(source)  # the caller closes it
    if is_url(source):
        return io.BytesIO(_download(source))
    check_is_file(source)
    return open(source, "rb")


def _download(url):
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (captioning)"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as response:
            content = response.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} could not be downloaded: {reason}") from None
    if len(content) > MAX_DOWNLOAD:
        raise UserError(f"{url} is larger than {MAX_DOWNLOAD >> 20} MB; download it yourself")
    return content


def to_rgb(image):
    """As `read_rgb`, for a PIL image, which is not changed. Raises what Pillow raises."""
    image.load()  # a TIFF is turned upright here, and loses its orientation
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip values, not scale them
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode not in OPAQUE_MODES or "transparency" in image.info:
        # Not directly to RGB, which shows the colour stored under a transparent pixel.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    image.info = {}  # exif_transpose would rewrite what is in it, and fail for odd EXIF data
    image.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(image, in_place=True)
    return np.asarray(image)


def _to_8_bits(pixels):
    """Integers or floats from 0 to white, see `read_rgb` -> uint8; ValueError for any other"""
    is_float = pixels.dtype.kind == "f"
    if is_float and not np.isfinite(pixels).all():
        raise ValueError("it has values that are not finite")
    low, high = pixels.min(initial=0), pixels.max(initial=0)
    white = next((w for w in (FLOAT_WHITES if is_float else WHITES) if high <= w), None)
    if low < 0 or white is None:
        raise ValueError(f"its values from {low:g} to {high:g} fit no bit depth")
    return np.round(pixels / np.float32(white) * np.float32(255)).astype(np.uint8)


def read_image(path, size=IMAGE_SIZE):
    """A picture for the encoder, uint8 (3, size, size); UserError as in `read_rgb`."""
    return resize_square(read_rgb(path), size)


def resize_square(rgb, size=IMAGE_SIZE):
    """
    uint8 (height, width, 3) -> (3, size, size), without keeping the aspect ratio, as in the
    tutorial; PIL's bilinear filter is antialiased.
    """
    image = Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
