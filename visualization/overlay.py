"""
Attention drawn over a photograph: how bright a location is says how much attention it has.

A photograph has bright and dark places of its own, which would hide that. So its brightness is
first evened out at the scale of a location, which leaves edges and texture; then light falls on it
that makes the mean brightness of each location what its attention says. The overlays "light" and
"heat" have the same brightness and differ in colour: the photograph's own where there is attention,
or that of a colour map. page.js does the same in the browser.
"""

import math
from functools import cache
from typing import NamedTuple

import numpy as np

# Ways to draw attention over a photograph. The first is the default: of ten pairs, somebody who
# knew nothing of either chose it nine times.
OVERLAYS = ("heat", "light")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue: Pillow's grey
DARK, BRIGHT = 0.18, 0.72  # mean brightness of a location without attention and with the most
BLACK = 0.1  # added to brightness before ratios are taken: noise in black places is not amplified
DEEPEST, HIGHEST = 0.5, 0.3  # limits of the detail in nats; BRIGHT * exp(HIGHEST) is below 1
LEAST = 0.3  # of the photograph's colour that remains without attention
LARGEST_GAIN = 2.5  # of colours in dark places, where they are mostly noise
# Limits of the light: black spots beside bright ones, and locations hardly in the photograph
LIGHT = 0.5 * DARK, 4.0
# Where a photograph is black and white by turns, smooth light cannot give each location its mean
# brightness; it is then corrected by light with a sharper edge. Elsewhere the ratio is about 1.
CORRECTIONS, RATIOS = 3, (0.7, 2)
STEPS = 30  # of the fit; more change no location by 1/255


def check_overlay(overlay):
    """ValueError unless it is one of OVERLAYS"""
    if overlay not in OVERLAYS:
        raise ValueError(f"overlay {overlay!r} is not one of: {', '.join(OVERLAYS)}")


class Drawing(NamedTuple):
    """How attention is drawn."""

    smooth: bool = True  # blend neighbouring locations; otherwise each is shown as a block
    overlay: str = OVERLAYS[0]
    offset: tuple = (0.0, 0.0)  # `modeling.field_of_view.measure_offset` of the encoder


DEFAULT = Drawing()


def attention_overlays(photograph, words, alphas, drawing=DEFAULT):
    """
    Yield the photograph once per word, bright where the model looked for it: float32 (H, W, 3),
    from 0 to 1.

    photograph: uint8 (H, W, 3), of the size at which it is shown
    words, alphas: as in `attention.attention_grid`

    Each word has its own scale, from 0 to its most attended location: with attention that is spread
    evenly, the whole photograph is bright.
    """
    alphas = np.asarray(alphas, dtype=np.float32)
    side = math.isqrt(alphas.shape[-1]) if alphas.ndim == 2 else 0
    if len(alphas) != len(words) or alphas.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {alphas.shape}")
    check_overlay(drawing.overlay)
    if not words:
        return
    canvas = Canvas(photograph, side, drawing)
    for alpha in alphas:
        yield canvas.draw(alpha / (alpha.max() or 1))


class Canvas:
    """What depends on the photograph alone."""

    def __init__(self, photograph, side, drawing):
        rgb = photograph / np.float32(255)
        height, width = rgb.shape[:2]
        (x, y), smooth = drawing.offset, drawing.smooth
        self.side, self.heat = side, drawing.overlay == "heat"
        self.rows, self.columns = (
            spread_weights(side, height, y, smooth),
            spread_weights(side, width, x, smooth),
        )
        self.row_means, self.column_means = (
            location_means(side, height, y),
            location_means(side, width, x),
        )
        self.flat_rows, self.flat_columns = (
            spread_weights(side, height, y, smooth, trapezoid),
            spread_weights(side, width, x, smooth, trapezoid),
        )
        self.luma = rgb @ LUMA
        self.chroma = rgb - self.luma[..., None]
        around = self._spread(self._means(self.luma))
        detail = np.log((self.luma + BLACK) / (around + BLACK))
        limit = np.where(detail > 0, np.float32(HIGHEST), np.float32(DEEPEST))
        self.detail = np.exp(limit * np.tanh(detail / limit))
        # (P, P): the mean brightness that light of 1 at a location gives to each location
        by_row, by_column = (
            (means[:, None] * weights.T).reshape(side * side, -1)
            for means, weights in ((self.row_means, self.rows), (self.column_means, self.columns))
        )
        self.effect = (
            (by_row @ self.detail @ by_column.T)
            .reshape((side,) * 4)
            .swapaxes(1, 2)
            .reshape(side * side, side * side)
        )

    def _spread(self, values):
        """Values of the locations (side, side) -> (H, W)"""
        return self.rows @ values @ self.columns.T

    def _means(self, pixels):
        """(H, W) -> their means in each location (side, side)"""
        return self.row_means @ pixels @ self.column_means.T

    def draw(self, weight):
        """weight: (P,) from 0 to 1"""
        wanted = brightness_of(weight)
        light = wanted
        for _ in range(STEPS):
            light = (light * wanted / np.maximum(self.effect @ light, 1e-6)).clip(*LIGHT)
        luma = self.detail * self._spread(light.reshape(self.side, self.side))
        for _ in range(CORRECTIONS):
            ratio = wanted.reshape(self.side, self.side) / self._means(luma).clip(1e-6)
            ratio = self.flat_rows @ ratio.clip(*RATIOS) @ self.flat_columns.T
            luma = np.minimum(luma * ratio, 1)
        share = self._spread(weight.reshape(self.side, self.side)).clip(0, 1)
        if self.heat:
            colours = heat_colours()[np.rint(255 * share).astype(int)]
            brightness = colours @ LUMA
            chroma = (colours - brightness[..., None]) * (
                np.minimum(1, 2 * share) * luma / brightness
            )[..., None]
        else:
            gain = np.minimum(luma / (self.luma + BLACK / 2), LARGEST_GAIN)
            chroma = self.chroma * (gain * (LEAST + (1 - LEAST) * share))[..., None]
        return _to_rgb(luma, chroma)


def brightness_of(weight):
    """
    The mean brightness of a location, from its weight 0..1: steep at both ends, where differences
    matter. The least attended places are still told apart, and the most attended stands out.
    """
    return DARK + (BRIGHT - DARK) * (weight**0.6 + weight**2) / 2


@cache
def heat_colours():
    """(256, 3): colours of matplotlib's inferno, as bright as `Canvas` draws weights 0 to 1"""
    import matplotlib

    inferno = matplotlib.colormaps["inferno"](np.arange(256))[:, :3]
    brightness = brightness_of(np.linspace(0, 1, 256))
    at = np.interp(brightness, inferno @ LUMA, np.arange(256))
    return np.stack(
        [np.interp(at, np.arange(256), channel) for channel in inferno.T], axis=1
    ).astype(np.float32)


def _to_rgb(luma, chroma):
    """Colours that cannot be shown are paled until they can; the brightness stays."""
    luma = luma[..., None]
    highest, lowest = chroma.max(2, keepdims=True), -chroma.min(2, keepdims=True)
    tiny = np.float32(1e-6)
    scale = np.minimum((1 - luma) / np.maximum(highest, tiny), luma / np.maximum(lowest, tiny))
    return (luma + np.minimum(1, scale) * chroma).clip(0, 1)


def location_means(side, size, offset=0.0):
    """(side, size): the share of each pixel of an edge in the mean of each location"""
    overlap = _overlap(side, size, offset)
    return overlap / np.maximum(overlap.sum(1, keepdims=True), np.float32(1e-9))


def b_spline(t):
    """Cubic: close to the linear interpolation and blur of the tutorial's `pyramid_expand`"""
    return np.where(t < 1, 2 / 3 - t * t + t**3 / 2, (2 - t).clip(0) ** 3 / 6)


def trapezoid(t):
    """Flat over half of the location, as a ramp over its edges"""
    return (1.5 - 2 * t).clip(0, 1)


def spread_weights(side, size, offset=0.0, smooth=True, kernel=b_spline):
    """
    (size, side): the weight of each location in each pixel of an edge; rows sum to 1.

    smooth: by the kernel, of the distance in locations; otherwise in blocks. Beyond the first and
    the last location their values continue.
    """
    if not smooth:
        return _overlap(side, size, offset).T
    samples = math.ceil(4 * side / size)  # several in a pixel larger than a quarter of a location
    position = ((np.arange(size * samples) + 0.5) / (size * samples) - offset) * side - 0.5
    position = position.clip(-1, side)
    weights = np.zeros((len(position), side), np.float32)
    for location in range(-2, side + 2):
        weights[:, min(max(location, 0), side - 1)] += kernel(abs(position - location))
    return weights.reshape(size, samples, side).mean(1)


def _overlap(side, size, offset):
    """
    (side, size): how much of each pixel of an edge is in each location; columns sum to 1.

    offset: how far the locations are shifted, as a fraction of the edge. The first and the last
    reach to the photograph's edge; one that is beyond it has no pixels.
    """
    edges = (np.arange(side + 1) / side + offset).clip(0, 1) * size
    edges[[0, -1]] = 0, size
    pixels = np.arange(size)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return shared.clip(0).astype(np.float32)
