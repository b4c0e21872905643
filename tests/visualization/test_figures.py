"""
Figures are written completely or not at all, in fonts that have the letters of their words, and are
the same in every environment.
"""

import os
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from factories import ROOT
from matplotlib.ft2font import FT2Font

from visualization import figures
from visualization.attention import attention_grid

IMAGE, LIMIT = np.zeros((40, 40, 3), np.uint8), resource.RLIMIT_FSIZE


@pytest.mark.parametrize("kind", ["png", "jpg", "pdf", "svg"])
def test_a_disk_that_becomes_full_is_an_error_of_the_system_and_leaves_the_old_file(tmp_path, kind):
    figure, before = attention_grid(IMAGE, ["cat"], np.eye(4)[:1]), resource.getrlimit(LIMIT)
    (path := tmp_path / f"x.{kind}").write_text("old")
    resource.setrlimit(LIMIT, (4096, before[1]))  # bytes
    try:
        with pytest.raises(OSError, match="File too large"):
            figures.save(figure, path)
    finally:
        resource.setrlimit(LIMIT, before)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_pictures_are_the_same_whatever_backend_and_style_the_environment_has(tmp_path):
    """As in a notebook's `!python caption.py`, where the backend's package may be missing."""
    (tmp_path / "log").write_text('{"epoch": 1, "val_loss": 2}')
    style = "text.usetex: True\nimage.origin: lower\nsavefig.bbox: tight\nlines.linewidth: 9\n"
    (tmp_path / "matplotlibrc").write_text(style)
    code = """
import os, sys
before = dict(os.environ)
import numpy as np
from pages import captioned, page
from visualization import figures
from visualization.animation import write_animation
from visualization.attention import attention_grid
from visualization.beam_tree import Node, Tree, draw_tree
from visualization.curves import write_curves
seen, folder = captioned(), sys.argv[1]
figures.save(attention_grid(seen.image, seen.words, seen.attention), f"{folder}/x.png")
write_animation(f"{folder}/x.gif", seen.image, seen.words, seen.attention)
page.write_page(f"{folder}/x.html", [seen], "x")
write_curves("log", f"{folder}/curves.png")
draw_tree(Tree(1, [[Node("a", -1, None, "kept")]], ["a"], -1), f"{folder}/tree.png")
assert dict(os.environ) == before
import matplotlib.pyplot
print(matplotlib.pyplot.get_backend())
"""
    found = []
    for backend in ("svg", "module://missing.backend", "not a backend"):
        variables = {"MPLBACKEND": backend, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        if found:
            variables["MATPLOTLIBRC"] = "matplotlibrc"
        (folder := tmp_path / f"of {backend[:3]}").mkdir()
        options = {"cwd": tmp_path, "env": os.environ | variables, "stdout": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", code, folder], check=True, **options)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert done.stdout.decode() == f"{backend}\n" or backend == "not a backend"
    assert len(found[0]) == 5 and found[1] == found[0] and found[2] == found[0]


def test_words_that_no_font_has_are_said_once_and_warn_of_nothing(tmp_path, capsys):
    word = "\U0010fffd"  # for private use
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for _ in range(2):
            figures.save(attention_grid(IMAGE, [word, "cat"], np.eye(4)[:2]), tmp_path / "x.png")
    assert capsys.readouterr().err.count(f"no font has all letters of {word}") == 1


def test_words_are_drawn_in_a_font_that_has_their_letters():
    """As matplotlib brings them: letters of STIX that DejaVu Sans lacks"""
    stix = FT2Font(str(Path(figures.FONT_FILE).with_name("STIXNonUni.ttf")))
    letter = chr(min(stix.get_charmap().keys() - FT2Font(figures.FONT_FILE).get_charmap().keys()))
    assert figures.find_font("cat  é") == figures.FONT_FILE
    found = FT2Font(figures.find_font(letter))
    assert ord(letter) in found.get_charmap()
    assert figures.find_font("\U0010fffd") == figures.FONT_FILE  # which no font has
    assert figures.font_families(["cat", letter, "dog"]) == ["DejaVu Sans", found.family_name]
