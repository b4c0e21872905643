"""Where the model looked for each word: attention over the photograph, as a figure."""

import math

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from utils import printable
from visualization.figures import default_style, font_families
from visualization.overlay import attention_overlays

ASPECT = 1.4  # the width over height that figures approximate, as that of screens and pages
DPI = 120
PANEL_SIDE = 2.8  # inches, of a square photograph; others get the same area
MIN_COLUMN, MAX_COLUMN = 1.3, 1.8  # inches; columns of narrow photographs widen for long words
GAP, TITLE = 0.12, 0.34  # inches, between panels and for the word above each
FONT, SMALLEST = 12, 9  # points; a letter's width is about 0.65 of it; columns widen below SMALLEST


@default_style
def attention_grid(image, words, alphas, smooth=True, offset=(0.0, 0.0), dpi=DPI):
    """
    One panel per word, row by row: the photograph in dim grey, and over it the word's attention as
    a heat map, on a scale of its own. The first panel is the photograph itself.

    image: uint8 (H, W, 3), of any shape; the alphas' grid covers it, resized to a square
    words: T strings; alphas: (T, P) attention on a square grid, P = side * side, row by row
    smooth: blend neighbouring locations; otherwise each is a block
    offset: `modeling.field_of_view.find_offset` of the encoder; dpi: pixels per inch

    Returns a matplotlib Figure with T + 1 axes. Raises ValueError unless there is one alpha per
    word and P is a square.
    """
    ratio = image.shape[1] / image.shape[0]
    width = PANEL_SIDE * min(math.sqrt(ratio), 2, 2 * ratio)
    height = width / ratio
    photograph = resize_image(image, round(width * dpi), round(height * dpi))
    panels = [photograph, *attention_overlays(photograph, words, alphas, smooth, offset)]
    titles = [printable(word) for word in ("<start>", *words)]

    longest = max(map(len, titles)) * 0.65 / 72  # inches per point of its font
    cell_width = GAP + max(width, MIN_COLUMN, min(longest * SMALLEST, MAX_COLUMN))
    cell_height = TITLE + height + GAP
    shapes = {  # the figure's width over height for each number of columns
        n: n * cell_width / (math.ceil(len(panels) / n) * cell_height)
        for n in range(1, len(panels) + 1)
    }
    columns = min(shapes, key=lambda n: abs(math.log(shapes[n] / ASPECT)))
    rows = math.ceil(len(panels) / columns)
    total_width, total_height = columns * cell_width + GAP, rows * cell_height + GAP
    figure = Figure(figsize=(total_width, total_height), dpi=dpi)
    FigureCanvasAgg(figure)  # becomes figure.canvas
    letters = (cell_width - GAP) * 72 / (0.65 * FONT)  # of a title that fits at full size
    style = {
        "fontfamily": font_families(titles),
        "parse_math": False,  # a dollar sign is not a formula
        "pad": 6,
        "y": 1,  # faster: matplotlib need not compute it from the ticks
        "bbox": {"boxstyle": "round,pad=0.25", "facecolor": "0.92", "edgecolor": "none"},
    }
    for i, (panel, title) in enumerate(zip(panels, titles)):
        row, column = divmod(i, columns)
        left = (GAP + column * cell_width + (cell_width - GAP - width) / 2) / total_width
        bottom = 1 - (GAP + row * cell_height + TITLE + height) / total_height
        axes = figure.add_axes((left, bottom, width / total_width, height / total_height))
        axes.imshow(panel, aspect="auto")  # the axes have the photograph's shape already
        axes.set_axis_off()
        axes.set_title(title, fontsize=FONT * min(1, letters / max(1, len(title))), **style)
    return figure


def resize_image(image, width, height):
    """uint8 (H, W, 3) -> (height, width, 3), at least one pixel each"""
    return np.asarray(Image.fromarray(image).resize((max(1, width), max(1, height))))
