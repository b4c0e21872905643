"""
Saves matplotlib figures or shows them in a window, and finds fonts for their words. Figures are
made without pyplot, which would look for a display: only `show` needs one.
"""

import io
import os
import sys
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager, style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ft2font import FT2Font

from utils import UserError, atomic_write

# A decorator: what is drawn is the same whatever the user's matplotlibrc says, as text.usetex.
default_style = style.context("default")
FONT_FILE = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@cache
def find_font(word):
    """
    The font file for a word: DejaVu Sans, or where that lacks letters, such as those of Chinese,
    Japanese, Korean and Thai, the font on this machine that has the most of them.
    """
    letters, path = {letter for letter in word if not letter.isspace()}, FONT_FILE
    if not letters <= _letters(path):
        fonts = font_manager.fontManager.ttflist
        # Last Resort is a font of boxes for all letters.
        files = sorted(font.fname for font in fonts if "Last Resort" not in font.name)
        path = max([path, *files], key=lambda file: len(letters & _letters(file)))
    if not letters <= _letters(path):
        advice = f"such as Debian's fonts-noto-cjk, and rm -r {matplotlib.get_cachedir()}"
        print(f"no font has all letters of {word}; install one, {advice}", file=sys.stderr)
    return path


@cache
def _letters(path):
    return frozenset(map(chr, FT2Font(path).get_charmap()))


def font_families(words):
    """The names by which matplotlib knows the fonts for these words, DejaVu Sans first."""
    files = dict.fromkeys([FONT_FILE, *map(find_font, words)])
    return [FT2Font(path).family_name for path in files]


def find_format(path):
    """The picture format of a path's suffix, png if it has none; ValueError if not supported."""
    suffix = Path(path).suffix[1:].lower() or "png"
    if suffix not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(f"{suffix!r} is not a picture format, such as png, jpg, pdf or svg")
    return suffix


@default_style
def save(figure, path, settings=None):
    """Write a figure with `atomic_write`, in `find_format`'s format; settings: of matplotlib"""
    kind = find_format(path)
    # PNG's level 3 takes a third of the time of the default 6, for a tenth more bytes.
    options = {"pil_kwargs": {"compress_level": 3}} if kind == "png" else {}
    content = io.BytesIO()  # on a full disk, some formats' writers fail in odd ways, or not at all
    with matplotlib.rc_context(settings):
        figure.savefig(content, format=kind, **options)
    with atomic_write(path) as temporary:
        Path(temporary).write_bytes(content.getvalue())


def show(figure):
    """Show a figure in a window until it is closed; UserError where that cannot be done."""
    import matplotlib.pyplot as plt

    backend, advice = os.environ.get("MPLBACKEND") or plt.get_backend(), "leave --show out"
    try:
        plt.switch_backend(backend)
    except (ImportError, ValueError) as error:
        raise UserError(f"the backend {backend} shows nothing: {error}; {advice}") from None
    if backend.lower() == "agg":  # what pyplot falls back to
        raise UserError(f"there is no display to show it on; {advice} and open the file")
    figure.canvas.draw()
    window = plt.figure(figsize=figure.get_size_inches())
    axes = window.add_axes((0, 0, 1, 1))
    axes.imshow(np.asarray(figure.canvas.buffer_rgba()))
    axes.set_axis_off()
    plt.show()
    plt.close(window)
