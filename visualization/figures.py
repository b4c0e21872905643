"""
Saves Matplotlib figures to files, or shows them in a window.

Figures are made without pyplot, which would look for a display: only `show` needs one.
"""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from utils import atomic_write

FONT_FILE = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def find_format(path):
    """
    The picture format for a path's suffix, png if it has none. Raises ValueError if matplotlib does
    not support it.
    """
    suffix = Path(path).suffix[1:].lower() or "png"
    if suffix not in FigureCanvasAgg.get_supported_filetypes():
        raise ValueError(f"Format {suffix!r} is not supported, but png, jpg, pdf, svg and others "
                         f"are")
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
