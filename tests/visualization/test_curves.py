"""Training curves show what a log holds."""

import json

import numpy as np
import pytest
from PIL import Image

from visualization import curves

FIRST = [
    {"epoch": epoch, "lr": 4e-4, "train_loss": 5 / epoch, "val_loss": 6 / epoch, "bleu1": 50.0}
    | {"captions_per_second": 200.0, "teacher_forced_bleu4": 9.0, "bleu4": 10.0 + epoch}
    for epoch in (1, 2, 3)
]
SECOND = [
    {"epoch": epoch, "lr": 1e-4, "train_reward": 0.4 + epoch, "captions_per_second": 90.0}
    | {"val_loss": 4.0, "bleu4": 20.0, "cider_d": 40.0 + epoch}
    for epoch in (1, 2)
]


@pytest.fixture
def draw(tmp_path):
    """`draw(rows)`: the panels of a log by their titles"""

    def draw(rows, end=""):
        log = tmp_path / "log_x.jsonl"
        log.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
        curves.write_curves(log, tmp_path / "log_x.png")
        figure = curves.draw_curves(curves.read_phases(log))
        return {axes.get_title(loc="left"): axes for axes in figure.axes}

    return draw


def lines(axes):
    """(x, y) of each line with points in a panel; an upright line has two points of one x"""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_only_logged_quantities_have_a_panel(draw):
    titles = [title for title, _ in curves.PANELS]
    assert list(draw(FIRST)) == [titles[i] for i in (0, 2, 4, 5)]
    assert list(draw(FIRST + SECOND)) == list(draw(SECOND)) == titles
    assert list(draw([{"epoch": 1, "lr": 1}])) == [titles[4]]


def test_lines_show_the_values_of_the_log(draw, tmp_path):
    axes = draw(FIRST, '{"epoch": 4, "lr": 0.00')  # cut off when the run was killed
    loss = axes["Loss, nats per word"]
    assert lines(loss) == [([1, 2, 3], [5, 2.5, 5 / 3]), ([1, 2, 3], [6, 3, 2])]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    for drawn in (loss.get_lines(), loss.get_legend().get_lines()):
        assert len({line.get_linestyle() for line in drawn}) == 2
        assert [line.get_markerfacecolor() == "white" for line in drawn] == [True, False]
    assert lines(axes["BLEU-4 of validation"]) == [([1, 2, 3], [11, 12, 13]), ([1, 2, 3], [9] * 3)]
    assert lines(axes["Learning rate"]) == [([1, 2, 3], [4e-4] * 3)]
    assert lines(axes["Captions per second of training"]) == [([1, 2, 3], [200.0] * 3)]
    assert all(axes[title].get_ylim()[0] == 0 for title in curves.FROM_ZERO)
    with Image.open(tmp_path / "log_x.png") as picture:
        assert picture.format == "PNG" and picture.width > 500


def test_phases_follow_each_other_with_a_line_between(draw):
    panels = draw(FIRST + SECOND)
    for title, axes in panels.items():
        upright = [x for x, _ in lines(axes) if x[0] == x[-1]]
        assert upright == [[3.5, 3.5]], title
    many = draw(FIRST + SECOND + 2 * FIRST[:1])["Learning rate"]
    assert [x[0] for x, _ in lines(many) if x[0] == x[-1]][:3] == [3.5, 5.5, 6.5]
    bleu = [(x, y) for x, y in lines(panels["BLEU-4 of validation"]) if x[0] != x[-1]]
    assert bleu[:2] == [([1, 2, 3], [11, 12, 13]), ([4, 5], [20, 20])]  # not joined


def test_values_that_are_not_numbers_leave_a_gap(draw):
    rows = [FIRST[0] | {"epoch": i, "bleu4": x} for i, x in enumerate([9, np.nan, "x", None, 8])]
    [(_, values), *_] = lines(draw(rows)["BLEU-4 of validation"])
    assert np.isnan(values).tolist() == [False] + [True] * 3 + [False]
