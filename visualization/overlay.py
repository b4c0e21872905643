"""
Attention over a photograph, in two layers: the photograph in dim grey, and a heat map whose opacity
is the square root of attention.
"""

import math
from functools import cache

import numpy as np
from PIL import Image

OPACITY = 0.8  # of the heat map at the most attended location
UPSCALE = 8  # pixels per location and side, before resizing to the photograph


def attention_overlays(photograph, words, alphas, smooth=True, offset=(0.0, 0.0)):
    """
    Yield for each word the photograph with its attention, both uint8 (H, W, 3):
    (0.1 + 0.3 grey) (1 - 0.8 o) + 0.8 o inferno(a), where a is attention over its largest value
    and o its square root. The arguments are those of `attention.attention_grid`.
    """
    grey = grey_layer(photograph).convert("RGBA")
    for heat in heat_layers(words, alphas, grey.size, smooth, offset):
        yield np.asarray(Image.alpha_composite(grey, heat.convert("RGBA")).convert("RGB"))


def grey_layer(photograph):
    """uint8 (H, W, 3) -> a PIL image in grey"""
    return Image.fromarray(photograph).convert("L").point(lambda grey: round(25.5 + 0.3 * grey))


def heat_layers(words, alphas, size, smooth=True, offset=(0.0, 0.0)):
    """Yield for each word a PIL image of this size, (width, height), with a palette of RGBA."""
    alphas = np.asarray(alphas, dtype=np.float32)
    side = math.isqrt(alphas.shape[-1]) if alphas.ndim == 2 else 0
    if alphas.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {alphas.shape}")
    for alpha in alphas:
        opacity = np.sqrt(spread(alpha.reshape(side, side), size, smooth, offset))
        heat = Image.fromarray(np.rint(255 * opacity).astype(np.uint8)).convert("P")
        heat.putpalette(_palette(), "RGBA")
        yield heat


def spread(alpha, size, smooth=True, offset=(0.0, 0.0)):
    """
    Attention (side, side) over its largest value, float32 (height, width) for a picture of this
    size, (width, height). Beyond the outermost locations, their values continue.
    """
    border = 1 + math.ceil(len(alpha) * max(map(abs, offset)))  # locations
    grid, scale, method = np.pad(alpha, border, mode="edge"), 1, Image.Resampling.BOX
    if smooth:
        from skimage.transform import pyramid_expand  # only here: it takes a while to import

        grid = pyramid_expand(grid, upscale=UPSCALE, sigma=UPSCALE / 3)
        scale, method = UPSCALE, Image.Resampling.BILINEAR
    left, top = (scale * (border - len(alpha) * shift) for shift in offset)
    box = (left, top, left + scale * len(alpha), top + scale * len(alpha))
    resized = np.asarray(Image.fromarray(grid).resize(size, method, box))
    return resized / (resized.max() or 1)


@cache
def _palette():
    """Red, green, blue and opacity for the square root of attention in 255 steps"""
    from matplotlib import colormaps

    share = np.arange(256) / 255
    colours = colormaps["inferno"](share**2, bytes=True)
    colours[:, 3] = np.rint(255 * OPACITY * share)
    return colours.tobytes()
