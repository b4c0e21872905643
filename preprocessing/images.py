"""Image files of any kind -> upright RGB -> the square input of the encoder."""

import os
import sys
import warnings
from importlib.util import find_spec

import imageio.v3 as iio
import numpy as np
from imageio.core.request import InitializationError
from PIL import ExifTags, Image

from datasets import IMAGE_SIZE
from utils import UserError

# Pillow's warnings about unusual but readable files are not for the user.
warnings.filterwarnings("ignore", module=r"PIL\.")
# imageio tries to import pillow_heif for every picture. If it is not installed, record that here:
# each failed import would take a third of the time of decoding a small photograph.
if find_spec("pillow_heif") is None:
    sys.modules["pillow_heif"] = None

OPAQUE_MODES = ("RGB", "L", "CMYK", "YCbCr")  # of Pillow, with 8 bits per channel
# EXIF orientation -> quarter turns to the left that make the picture upright, and whether it must
# then be mirrored. imageio's own rotate=True mirrors grey and palette pictures the wrong way.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True),
         8: (1, False)}


def read_rgb(path):
    """
    Read any picture as upright RGB: uint8 (height, width, 3).

    EXIF rotation is applied, transparency is blended with white, 16-bit and float values are
    scaled to 8 bits, and the first frame of an animation is taken.
    Raises UserError if the file is missing, is not a readable picture or has more than 179 million
    pixels, which would take gigabytes (Pillow's limit against decompression bombs).
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not an image")
    try:
        # imageio gets the open file: it would mistake some names for web addresses or archives.
        with open(path, "rb") as file, iio.imopen(file, "r", plugin="pillow") as picture:
            info = picture.metadata(index=0)
            pixels = picture.read(index=0, mode=_target_mode(info["mode"], info),
                                  writeable_output=False)
            # Read again, since Pillow turns TIFF files upright itself when it reads them.
            info = picture.metadata(index=0, exclude_applied=False)
            return _upright_rgb(pixels, info.get("Orientation"))
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except Exception as error:  # decoders raise many kinds: EOFError, RuntimeError, struct.error
        raise UserError(f"{path} is not a readable image: {_reason(error)}") from None


def to_rgb(image):
    """As `read_rgb`, for a PIL image in memory, which is not changed."""
    mode = _target_mode(image.mode, image.info)
    pixels = np.asarray(image.convert(mode) if mode else image)
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
    """Integers from 0 to 65535, or floats from 0 to their maximum (at least 1) -> uint8"""
    is_float = pixels.dtype.kind == "f"
    if is_float and not np.isfinite(pixels).all():
        raise ValueError("it has values that are not finite")
    scaled = pixels / np.float32(pixels.max(initial=1) if is_float else 65535) * np.float32(255)
    return np.clip(np.round(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8)


def _reason(error):
    """One line on why a picture could not be read."""
    if "`pillow`" in str(error) and error.__cause__:  # imageio's message around the real reason
        error = error.__cause__
    if isinstance(error, InitializationError):
        return "it is in none of the formats that Pillow knows"
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
