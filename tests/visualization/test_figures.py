"""Figures are written completely or not at all, in the formats that matplotlib supports."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from visualization import figures


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path, figure = tmp_path / "x.png", Figure()
    path.write_text("old")
    figure.savefig = lambda file, **_: Path(file).write_text("half") and 1 / 0
    with pytest.raises(ZeroDivisionError):
        figures.save(figure, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name, start", [("x.PNG", b"\x89PNG"), ("x.pdf", b"%PDF"),
                                         ("x.svg", b"<?xml"), ("x", b"\x89PNG")])
def test_the_suffix_says_the_format(tmp_path, name, start):
    figures.save(Figure(), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Format 'abc' is not supported"):
        figures.save(Figure(), tmp_path / "x.abc")
    assert not list(tmp_path.iterdir())
