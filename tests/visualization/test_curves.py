"""Training curves show what a log holds."""

import json

import numpy as np
import pytest
from PIL import Image

from visualization import curves


def row(epoch, **figures):
    return {
        "epoch": epoch,
        "lr": 4e-4,
        "train_loss": 5 / epoch,
        "train_top5": 50.0,
        "captions_per_second": 200.0,
        "val_loss": 6 / epoch,
        "teacher_forced_bleu4": 9.0,
        "bleu1": 50.0,
        "bleu4": 10.0 + epoch,
        **figures,
    }


FIRST = [row(epoch) for epoch in (1, 2, 3)]
SECOND = [
    {
        "epoch": epoch,
        "lr": 1e-4,
        "train_reward": 0.4 + epoch,
        "captions_per_second": 90.0,
        "val_loss": 4.0,
        "bleu4": 20.0,
        "cider_d": 40.0 + epoch,
    }
    for epoch in (1, 2)
]


def write_log(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return str(path)


def read_log(folder, rows):
    return curves.read_phases(write_log(folder / "log_x.jsonl", rows))


def lines(axes):
    """(x, y) of each line with points in a panel; an upright line has two points of one x"""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_only_logged_quantities_have_a_panel(tmp_path):
    titles = [title for title, _ in curves.PANELS]
    assert list(panels(curves.draw_curves(read_log(tmp_path, FIRST)))) == [
        titles[i] for i in (0, 2, 4, 5)
    ]
    assert list(panels(curves.draw_curves(read_log(tmp_path, FIRST + SECOND)))) == titles
    assert list(panels(curves.draw_curves(read_log(tmp_path, SECOND)))) == titles
    assert list(panels(curves.draw_curves(read_log(tmp_path, [{"epoch": 1, "lr": 1}])))) == [
        titles[4]
    ]


def test_lines_show_the_values_of_the_log(tmp_path):
    axes = panels(curves.draw_curves(read_log(tmp_path, FIRST)))
    loss = axes["Loss, nats per word"]
    assert lines(loss) == [([1, 2, 3], [5, 2.5, 5 / 3]), ([1, 2, 3], [6, 3, 2])]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "validation"]
    for drawn in (loss.get_lines(), loss.get_legend().get_lines()):
        assert len({line.get_linestyle() for line in drawn}) == 2
        assert [line.get_markerfacecolor() == "white" for line in drawn] == [True, False]
    assert lines(axes["BLEU-4 of validation"]) == [([1, 2, 3], [11, 12, 13]), ([1, 2, 3], [9] * 3)]
    assert lines(axes["Learning rate"]) == [([1, 2, 3], [4e-4] * 3)]
    assert lines(axes["Captions per second of training"]) == [([1, 2, 3], [200.0] * 3)]


def test_rate_axes_start_at_zero_even_if_cosine_ends_near_it(tmp_path):
    rows = [row(1), row(2, lr=2e-4, captions_per_second=190), row(3, lr=3e-10)]
    axes = panels(curves.draw_curves(read_log(tmp_path, rows)))
    for title, top in [("Learning rate", 4e-4), ("Captions per second of training", 200)]:
        assert axes[title].get_ylim() == pytest.approx((0, 1.1 * top))
        assert axes[title].get_yscale() == "linear"


def test_phases_follow_each_other_with_a_line_between(tmp_path):
    phases = read_log(tmp_path, FIRST + SECOND)
    assert [[row["epoch"] for row in rows] for rows in phases] == [[1, 2, 3], [4, 5]]
    for title, axes in panels(curves.draw_curves(phases)).items():
        upright = [x for x, _ in lines(axes) if x[0] == x[-1]]
        assert upright == [[3.5, 3.5]], title
    bleu = [(x, y) for x, y in lines(axes.figure.axes[2]) if x[0] != x[-1]]
    assert bleu[:2] == [([1, 2, 3], [11, 12, 13]), ([4, 5], [20, 20])]  # not joined


def test_the_curves_of_a_log_with_a_truncated_line_are_written(tmp_path):
    log = write_log(tmp_path / "x.jsonl", FIRST, '{"epoch": 4, "lr": 0.00')
    curves.write_curves(log, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG" and picture.width > 500
    assert [[row["epoch"] for row in rows] for rows in curves.read_phases(log)] == [[1, 2, 3]]


def test_values_that_are_not_numbers_leave_a_gap(tmp_path):
    rows = [
        row(1),
        row(2, bleu4=float("nan")),
        row(3, bleu4="much"),
        row(4, bleu4=None),
        row(5),
    ]
    axes = panels(curves.draw_curves(read_log(tmp_path, rows)))["BLEU-4 of validation"]
    axes.figure.canvas.draw()
    assert np.isnan(lines(axes)[0][1]).tolist() == [False] + [True] * 3 + [False]
