"""Figures are written completely or not at all, in the formats that matplotlib supports."""

import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from visualization import figures
from visualization.attention import attention_grid


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path, figure = tmp_path / "x.png", Figure()
    path.write_text("old")
    figure.savefig = lambda file, **_: Path(file).write_text("half") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name, start",
    [("x.PNG", b"\x89PNG"), ("x.pdf", b"%PDF"), ("x.svg", b"<?xml"), ("x", b"\x89PNG")],
)
def test_the_suffix_says_the_format(tmp_path, name, start):
    figures.save(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        figures.save(Figure(), tmp_path / "x.abc")
    assert not list(tmp_path.iterdir())


def test_words_that_no_font_has_are_said_once_and_warn_of_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "_other_fonts", lambda: [])
    figures._say_missing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        for _ in range(2):
            figure = attention_grid(np.zeros((40, 40, 3), np.uint8), ["猫", "cat"], np.eye(4)[:2])
            figures.save(figure, tmp_path / "x.png")
    err = capsys.readouterr().err
    assert err.count("no font on this machine has 猫: drawn as boxes; install one") == 1


def test_letters_are_taken_from_the_fonts_that_have_them(monkeypatch):
    folder = Path(figures.FONT_FILE).parent
    stix = str(folder / "STIXNonUni.ttf")
    letter = min(figures._letters(stix) - figures._letters(figures.FONT_FILE))
    monkeypatch.setattr(figures, "_other_fonts", lambda: [str(folder / "cmr10.ttf"), stix])
    assert figures.find_fonts(["cat"]) == [figures.FONT_FILE]
    fonts = figures.find_fonts(["cat", letter])
    assert fonts == [figures.FONT_FILE, stix]
    assert figures.font_for("cat", fonts) == figures.FONT_FILE
    assert figures.font_for(letter, fonts) == stix
    assert figures.family_names(fonts) == ["DejaVu Sans", "STIXNonUnicode"]


def test_svg_of_words_with_control_characters_is_valid(tmp_path):
    words = ["a\x00b", "\x1b[31mred", "\ud800"]
    figure = attention_grid(np.zeros((40, 40, 3), np.uint8), words, np.eye(4)[:3])
    figures.save(figure, tmp_path / "x.svg")
    ElementTree.parse(tmp_path / "x.svg")
