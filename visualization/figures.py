"""
Saves Matplotlib figures to files, or shows them in a window.

Figures are made without pyplot, which would look for a display: only `show` needs one.
"""

import functools
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ft2font import FT2Font

from utils import atomic_write

FONT_FILE = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def find_fonts(texts):
    """
    Font files that together have the letters of these texts, as far as this machine has any: DejaVu
    Sans, then others where it lacks letters, such as those of Chinese, Japanese, Korean and Thai.
    If letters are left over, says so once on stderr.
    """
    missing = {c for text in texts for c in text if not c.isspace()} - _letters(FONT_FILE)
    fonts = [FONT_FILE]
    while missing:
        best = max(_other_fonts(), key=lambda path: len(missing & _letters(path)), default=None)
        if best is None or not missing & _letters(best):
            _say_missing("".join(sorted(missing)[:5]))
            break
        fonts.append(best)
        missing -= _letters(best)
    return fonts


@functools.cache
def _letters(path):
    """The letters that a font file has."""
    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # a damaged font, or one of bitmaps
        return frozenset()


@functools.cache
def _other_fonts():
    return sorted({entry.fname for entry in font_manager.fontManager.ttflist} - {FONT_FILE})


@functools.cache
def _say_missing(letters):
    print(
        f"no font on this machine has {letters}: drawn as boxes; install one, such as Debian's "
        f"fonts-noto-cjk, and remove {matplotlib.get_cachedir()}",
        file=sys.stderr,
    )


def family_names(fonts):
    """The names by which matplotlib knows these font files."""
    return [FT2Font(path).family_name for path in fonts]


def font_for(text, fonts):
    """The first of the font files that has every letter of the text, else the first of all."""
    letters = {c for c in text if not c.isspace()}
    return next((path for path in fonts if letters <= _letters(path)), fonts[0])


def find_format(path):
    """
    The picture format for a path's suffix, png if it has none. Raises ValueError if matplotlib does
    not support it.
    """
    suffix = Path(path).suffix[1:].lower() or "png"
    if suffix not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(
            f"Format {suffix!r} is not supported, but png, jpg, pdf, svg and others are"
        )
    return suffix


def save(figure, path):
    """
    Write a figure in the format of the path's suffix, with `atomic_write`.

    Raises ValueError for a suffix that matplotlib does not support, OSError if it cannot be
    written.
    """
    kind = find_format(path)
    # PNG's level 3 takes a third of the time of the default 6, for a tenth more bytes.
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
