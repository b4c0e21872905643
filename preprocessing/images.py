"""Pictures of any kind -> upright RGB -> the square that the encoder sees."""

import os
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from utils import UserError

# A picture that can be read is read without a word about what is odd in it.
warnings.filterwarnings("ignore", module=r"PIL\.")
ROWS = 256  # of a picture that are worked on at a time, where floats take 8 times the memory


def read_rgb(path):
    """
    Read any picture as upright RGB: uint8 (height, width, 3).

    EXIF rotation is applied, transparency laid over white, 16 bits and floats are
    brought to 8, and of an animation the first frame is taken.
    Raises UserError if the file is missing, not a readable picture or of more than 179 million
    pixels, which would take gigabytes (Pillow's limit against decompression bombs).
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except Exception as error:  # decoders raise all sorts: EOFError, RuntimeError, struct.error
        raise UserError(f"{path} is not a readable image: {_reason(error)}") from None


def to_rgb(image):
    """The same for a PIL image in memory, which stays as it is."""
    if image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info:
        return np.asarray(_upright(image).convert("RGB"))  # most photographs
    if image.mode.startswith("I") or image.mode == "F":
        # More than 8 bits, which PIL would clip to 0..255 instead of scaling.
        rgba = _to_8_bits(np.asarray(_upright(image)))
    else:
        # Through RGBA, since converting straight to RGB shows whatever colour stands
        # under a transparent pixel.
        rgba = np.asarray(_upright(image).convert("RGBA"))
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() < 255:
        rgb = rgb.copy()
        for i in range(0, len(rgb), ROWS):
            part, opaque = rgb[i:i + ROWS], alpha[i:i + ROWS] / 255
            part[:] = np.round(255 + (part / 1.0 - 255) * opaque)
    return rgb


def _upright(image):
    """As its EXIF says; a picture that says nothing is not copied."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _reason(error):
    """In one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in none of the formats that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def _to_8_bits(image):
    """(height, width) or (height, width, channels) of more than 8 bits -> RGBA uint8"""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("it has values that are not finite")
    white = image.max(initial=1) if image.dtype.kind == "f" else 65535
    grey = np.empty(image.shape, np.uint8)
    for i in range(0, len(image), ROWS):
        grey[i:i + ROWS] = np.clip(np.round(image[i:i + ROWS] / white * 255), 0, 255)
    return np.asarray(Image.fromarray(grey).convert("RGBA"))


def read_image(path, size=256):
    """
    Read a picture for the encoder: uint8 (3, size, size), squashed to a square as in the
    tutorial. PIL's bilinear filter widens as it shrinks, so nothing is aliased.
    Raises UserError as `read_rgb` does.
    """
    return resize_square(read_rgb(path), size)


def resize_square(rgb, size=256):
    """uint8 (height, width, 3) -> (3, size, size)"""
    image = Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
