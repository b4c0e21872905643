"""Figures are written completely or not at all, in fonts that have the letters of their words."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from visualization import figures
from visualization.attention import attention_grid

IMAGE = np.zeros((40, 40, 3), np.uint8)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path, figure = tmp_path / "x.png", Figure()
    path.write_text("old")
    figure.savefig = lambda file, **_: Path(file).write_text("half") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_the_suffix_says_the_format_and_unknown_ones_are_refused(tmp_path):
    starts = {"x.PNG": b"\x89PNG", "x.pdf": b"%PDF", "x.svg": b"<?xml", "x": b"\x89PNG"}
    for name, start in starts.items():
        figures.save(Figure(), tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(ValueError, match="abc"):
        figures.save(Figure(), tmp_path / "x.abc")
    assert len(list(tmp_path.iterdir())) == len(starts)


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
