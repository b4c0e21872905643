"""
Where the model looked, word by word, as a figure.

Matplotlib is used without pyplot and its windows, so figures are drawn on machines that have no
display.
"""

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from utils import atomic_write

SHAPE = 1.4  # width over height that a figure comes near to, as screens and pages have
DPI = 120  # pixels per inch
SIDE = 2.2  # inches, of a square photograph; others get the same area
NARROWEST, WIDEST = 1.3, 1.8  # inches a column that is widened for words over slim photographs
GAP, TITLE = 0.12, 0.34  # inches, between panels and for the word above each
FONT_FILE = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
FONT, SMALLEST = 12, 9  # points; a letter is about 0.65 of that wide; columns widen below SMALLEST


def attention_grid(image, words, alphas, smooth=True):
    """
    One panel per word, row by row: the photograph is lit up in its colours where the model looked
    for the word and a dark grey elsewhere. The first panel is the photograph itself.

    image: uint8 (H, W, 3), of any shape; alphas belong to its squashed square
    words: T strings; alphas: (T, P) attention on a square grid, P = side * side, row by row
    smooth: blend neighbouring cells; otherwise the cells are seen as blocks

    Returns a matplotlib Figure with T + 1 axes. Raises ValueError unless there is one alpha per
    word and P is a square.
    """
    width, height = _panel(image)
    photograph = resized(image, round(width * DPI), round(height * DPI))
    panels = [photograph, *attention_overlays(photograph, words, alphas, smooth)]
    return _grid(panels, ["<start>", *words], width, height)


def attention_overlays(photograph, words, alphas, smooth=True):
    """
    Yield the photograph once per word, lit up where the model looked for it: float32 (H, W, 3),
    from 0 to 1.

    photograph: uint8 (H, W, 3), as large as it is shown; the rest as in `attention_grid`

    Each has its own scale, from no attention to its most attended place: attention that is spread
    evenly lights up the whole photograph.
    """
    alphas = np.asarray(alphas, dtype=np.float32)
    side = math.isqrt(alphas.shape[-1]) if alphas.ndim == 2 else 0
    if len(alphas) != len(words) or alphas.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {alphas.shape}")
    rows, columns = (_blend(side, pixels, smooth) for pixels in photograph.shape[:2])
    grey = np.asarray(Image.fromarray(photograph).convert("L"))[..., None] / np.float32(255)
    photograph = photograph / np.float32(255)
    for alpha in alphas.reshape(-1, side, side):
        light = (rows @ alpha @ columns.T)[..., None]
        light /= light.max() or 1
        # What is lit has at least a brightness of 0.45, the rest at most 0.25, so that a black dog
        # that was looked at outshines the snow that was not.
        yield light * (0.45 + 0.55 * photograph) + (1 - light) * 0.25 * grey


def resized(image, width, height):
    """uint8 (H, W, 3) in another size, at least one pixel"""
    return np.asarray(Image.fromarray(image).resize((max(1, width), max(1, height))))


def _panel(image):
    """Width and height in inches at which a photograph (H, W, 3) is shown."""
    ratio = image.shape[1] / image.shape[0]
    width = SIDE * min(math.sqrt(ratio), 2, 2 * ratio)
    return width, width / ratio


def _blend(cells, pixels, smooth):
    """(pixels, cells): the share of each cell in each pixel along one edge; rows sum to 1"""
    positions = (np.arange(pixels, dtype=np.float32) + 0.5) * cells / pixels  # in cells
    if not smooth:
        return np.eye(cells, dtype=np.float32)[positions.astype(int)]
    # A standard deviation of half a cell is about what the tutorial's pyramid_expand does.
    distances = (positions[:, None] - np.arange(cells, dtype=np.float32) - 0.5) / 0.5
    weights = np.exp(-(distances**2) / 2)
    return weights / weights.sum(1, keepdims=True)


def _columns(count, ratio):
    """In how many columns `count` panels, ratio times as wide as high, come nearest to SHAPE."""
    def distance(columns):
        return abs(math.log(columns * ratio / math.ceil(count / columns) / SHAPE))
    return min(range(1, count + 1), key=distance)


def _grid(panels, titles, width, height):
    """A Figure of the panels, each width x height inches, under their titles."""
    longest = max(map(len, titles)) * 0.65 / 72  # inches per point of its font
    cell_width = GAP + max(width, NARROWEST, min(longest * SMALLEST, WIDEST))
    cell_height = TITLE + height + GAP
    columns = _columns(len(panels), cell_width / cell_height)
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
            parse_math=False,  # a dollar sign is a word like any other
            pad=6,
            y=1,  # given, matplotlib doesn't go through all the ticks to find it
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "0.92", "edgecolor": "none"},
        )
    return figure


def find_format(path):
    """The picture format of a suffix, png without one; ValueError if matplotlib has no such."""
    kind, known = Path(path).suffix[1:].lower() or "png", FigureCanvasAgg.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"Format {kind!r} is not supported, but png, jpg, pdf, svg and others are")
    return kind


def save(figure, path):
    """
    Write a figure in the format of the path's suffix; the file is there whole or not at all.

    Raises ValueError for a suffix that matplotlib does not know, OSError if it can't be written.
    """
    kind = find_format(path)
    # PNG's level 3 takes a third of the time of the usual 6 for a tenth more bytes.
    options = {"pil_kwargs": {"compress_level": 3}} if kind == "png" else {}
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=kind, **options)


def show(figure):
    """Show a figure in a window until it is closed; RuntimeError where there is no display."""
    import matplotlib.pyplot as plt

    if plt.get_backend().lower() == "agg":  # what pyplot falls back to
        raise RuntimeError("there is no display to show it on")
    figure.canvas.draw()
    window = plt.figure(figsize=figure.get_size_inches())
    axes = window.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(figure.canvas.buffer_rgba()))
    axes.set_axis_off()
    plt.show()
    plt.close(window)
