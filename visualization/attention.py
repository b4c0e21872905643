"""Where the model looked for each word: attention over the photograph, as a figure."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from skimage.transform import pyramid_expand, resize

ASPECT = 1.4  # the width over height that figures approximate, as that of screens and pages
DPI = 120  # pixels per inch
PANEL_SIDE = 2.2  # inches, of a square photograph; others get the same area
MIN_COLUMN, MAX_COLUMN = 1.3, 1.8  # inches; columns over slim photographs widen for long words
GAP, TITLE = 0.12, 0.34  # inches, between panels and for the word above each
FONT, SMALLEST = 12, 9  # points; a letter's width is about 0.65 of it; columns widen below SMALLEST
UPSCALE = 8  # pixels per location when attention is smoothed, before it is resized


def attention_grid(image, words, alphas, smooth=True):
    """
    One panel per word, row by row: the photograph in colour where the model looked for the word,
    and dark grey elsewhere. The first panel is the photograph itself.

    image: uint8 (H, W, 3), of any shape; the alphas' grid covers it, resized to a square
    words: T strings; alphas: (T, P) attention on a square grid, P = side * side, row by row
    smooth: blend neighbouring locations; otherwise each is shown as a block

    Returns a matplotlib Figure with T + 1 axes. Raises ValueError unless there is one alpha per
    word and P is a square.
    """
    width, height = _panel_size(image)
    photograph = resize_image(image, round(width * DPI), round(height * DPI))
    panels = [photograph, *attention_overlays(photograph, words, alphas, smooth)]
    return _draw_panels(panels, ["<start>", *words], width, height)


def attention_overlays(photograph, words, alphas, smooth=True):
    """
    Yield the photograph once per word, bright where the model looked for it: float32 (H, W, 3),
    from 0 to 1.

    photograph: uint8 (H, W, 3), of the size at which it is shown; the rest as in `attention_grid`

    Each word has its own scale, from 0 to its most attended location: with attention that is spread
    evenly, the whole photograph is bright.
    """
    alphas = np.asarray(alphas, dtype=np.float32)
    side = math.isqrt(alphas.shape[-1]) if alphas.ndim == 2 else 0
    if len(alphas) != len(words) or alphas.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {alphas.shape}")
    grey = np.asarray(Image.fromarray(photograph).convert("L"))[..., None] / np.float32(255)
    photograph = photograph / np.float32(255)
    for alpha in alphas.reshape(-1, side, side):
        weight = _upsample(alpha, photograph.shape[:2], smooth)[..., None]
        weight /= weight.max() or 1
        # At full weight the brightness is at least 0.45, at weight 0 at most 0.25: a black dog with
        # attention is brighter than snow without.
        yield weight * (0.45 + 0.55 * photograph) + (1 - weight) * 0.25 * grey


def resize_image(image, width, height):
    """uint8 (H, W, 3) -> (height, width, 3), at least one pixel each"""
    return np.asarray(Image.fromarray(image).resize((max(1, width), max(1, height))))


def _upsample(alpha, shape, smooth):
    """
    Attention (side, side) -> (H, W), the given shape.

    Smooth as in the tutorial: `pyramid_expand` interpolates linearly, then blurs with a standard
    deviation of a third of a location. page.js does the same.
    """
    if smooth:
        return resize(pyramid_expand(alpha, upscale=UPSCALE), shape)
    return resize(alpha, shape, order=0, anti_aliasing=False)


def _panel_size(image):
    """Width and height in inches at which a photograph (H, W, 3) is shown."""
    ratio = image.shape[1] / image.shape[0]
    width = PANEL_SIDE * min(math.sqrt(ratio), 2, 2 * ratio)
    return width, width / ratio


def _num_columns(count, ratio):
    """The number of columns with which `count` panels of this ratio come closest to ASPECT."""
    def distance(columns):
        return abs(math.log(columns * ratio / math.ceil(count / columns) / ASPECT))
    return min(range(1, count + 1), key=distance)


def _draw_panels(panels, titles, width, height):
    """A Figure of the panels, each width x height inches, with their titles above."""
    longest = max(map(len, titles)) * 0.65 / 72  # inches per point of its font
    cell_width = GAP + max(width, MIN_COLUMN, min(longest * SMALLEST, MAX_COLUMN))
    cell_height = TITLE + height + GAP
    columns = _num_columns(len(panels), cell_width / cell_height)
    rows = math.ceil(len(panels) / columns)
    total_width, total_height = columns * cell_width + GAP, rows * cell_height + GAP
    figure = Figure(figsize=(total_width, total_height), dpi=DPI)
    FigureCanvasAgg(figure)  # becomes figure.canvas
    for i, (panel, title) in enumerate(zip(panels, titles)):
        row, column = divmod(i, columns)
        left = (GAP + column * cell_width + (cell_width - GAP - width) / 2) / total_width
        bottom = 1 - (GAP + row * cell_height + TITLE + height) / total_height
        axes = figure.add_axes((left, bottom, width / total_width, height / total_height))
        axes.imshow(panel, aspect="auto")  # the axes have the photograph's shape already
        axes.set_axis_off()
        letters = (cell_width - GAP) * 72 / (0.65 * FONT)
        axes.set_title(
            title,
            fontsize=FONT * min(1, letters / max(1, len(title))),
            parse_math=False,  # a dollar sign is not a formula
            pad=6,
            y=1,  # faster: matplotlib need not compute it from the ticks
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "0.92", "edgecolor": "none"},
        )
    return figure
