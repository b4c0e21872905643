"""Training curves show what a log holds, and visualize.py draws them."""

import json
import sys

import numpy as np
import pytest
from matplotlib.colors import same_color

import utils
import visualize
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
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return str(path)


def read_log(folder, rows):
    return curves.read_run(write_log(folder / "log_x.jsonl", rows), "run")


def lines(axes):
    """(x, y) of each line with points in a panel; an upright line has two points of one x"""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_only_logged_quantities_have_a_panel(tmp_path):
    titles = [title for title, _ in curves.PANELS]
    assert list(panels(curves.draw_curves([read_log(tmp_path, FIRST)]))) == [
        titles[i] for i in (0, 2, 4, 5)
    ]
    assert list(panels(curves.draw_curves([read_log(tmp_path, FIRST + SECOND)]))) == titles
    assert list(panels(curves.draw_curves([read_log(tmp_path, SECOND)]))) == titles
    assert list(panels(curves.draw_curves([read_log(tmp_path, [{"epoch": 1, "lr": 1}])]))) == [
        titles[4]
    ]


def test_lines_show_the_values_of_the_log(tmp_path):
    axes = panels(curves.draw_curves([read_log(tmp_path, FIRST)]))
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
    axes = panels(curves.draw_curves([read_log(tmp_path, rows)]))
    for title, top in [("Learning rate", 4e-4), ("Captions per second of training", 200)]:
        assert axes[title].get_ylim() == pytest.approx((0, 1.1 * top))
        assert axes[title].get_yscale() == "linear"


def test_phases_follow_each_other_with_a_line_between(tmp_path):
    run = read_log(tmp_path, FIRST + SECOND)
    assert run.epochs == [1, 2, 3, 4, 5] and run.starts == [0, 3]
    for title, axes in panels(curves.draw_curves([run])).items():
        upright = [x for x, _ in lines(axes) if x[0] == x[-1]]
        assert upright == [[3.5, 3.5]], title
    bleu = [(x, y) for x, y in lines(axes.figure.axes[2]) if x[0] != x[-1]]
    assert bleu[0] == ([1, 2, 3], [11, 12, 13]) and bleu[2] == ([4, 5], [20, 20])  # not joined


def test_several_runs_are_lines_of_their_own_colours_with_a_legend(tmp_path):
    paths = [write_log(tmp_path / name / "log_x.jsonl", FIRST) for name in ("_$a_{$", "b")]
    runs = [curves.read_run(*pair) for pair in zip(paths, curves.name_runs(paths))]
    figure = curves.draw_curves(runs)
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["_$a_{$", "b"]
    for axes in figure.axes:
        colours = [line.get_color() for line in axes.get_lines()]
        assert len(set(colours)) == 2
        assert same_color(colours[0], legend.get_lines()[0].get_color())
    figure.canvas.draw()  # dollars and braces are no formula


def test_runs_are_named_by_what_distinguishes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert curves.name_runs(["a/log.jsonl", "b/log.jsonl"]) == ["a", "b"]
    assert curves.name_runs(["log_a.jsonl", "log_b.jsonl"]) == ["log_a", "log_b"]
    assert curves.name_runs(["a/x.jsonl", "b/x.jsonl", "b/y.jsonl"])[0].endswith("a/x.jsonl")


def test_a_long_list_of_long_names_stays_within_the_figure(tmp_path):
    names = [f"{'x' * 200}{i}" for i in range(12)]
    figure = curves.draw_curves([read_log(tmp_path, FIRST)._replace(name=name) for name in names])
    figure.canvas.draw()
    box, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    tops = [axes.title.get_window_extent().y1 for axes in figure.axes]
    assert box.y0 >= max(tops) - 1
    assert all(axes.get_window_extent().height > 100 for axes in figure.axes)


@pytest.fixture
def draw(monkeypatch, capsys, tmp_path):
    """visualize.py curves ARGUMENTS, in an empty folder: exit code and stderr"""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", *map(str, arguments)])
        code = 0
        try:
            utils.run_script(visualize.main)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_script_writes_the_picture(draw, tmp_path, suffix):
    log = write_log(tmp_path / "a" / "log_x.jsonl", FIRST)
    assert draw(log, log, "-o", f"c.{suffix}") == (0, f"curves: c.{suffix}\n")
    assert (tmp_path / f"c.{suffix}").stat().st_size > 5000


def test_a_truncated_line_is_skipped_and_reported(draw, tmp_path):
    log = write_log(tmp_path / "x.jsonl", FIRST, '{"epoch": 4, "lr": 0.00')
    code, err = draw(log)
    assert code == 0 and (tmp_path / "curves.png").exists()
    assert err == f"{log}: skipped as not a row of a log: line 4\ncurves: curves.png\n"
    assert curves.read_run(log, "").epochs == [1, 2, 3]


def test_values_that_are_not_numbers_leave_a_gap(tmp_path):
    rows = [
        row(1),
        row(2, bleu4=float("nan")),
        row(3, bleu4="much"),
        row(4, bleu4=True),
        row(5, bleu4=10**400),
        row(6, bleu4=None),
        row(7),
    ]
    axes = panels(curves.draw_curves([read_log(tmp_path, rows)]))["BLEU-4 of validation"]
    axes.figure.canvas.draw()
    assert np.isnan(lines(axes)[0][1]).tolist() == [False] + [True] * 5 + [False]


def test_watching_draws_again_when_a_log_has_grown_and_waits_for_its_first_row(
    tmp_path, monkeypatch, capsys
):
    log, drawn, looks = tmp_path / "log_x.jsonl", [], []
    contents = [None, [], FIRST[:1], FIRST[:1], FIRST]  # at first there is no log

    def sleep(_):
        looks.append(len(drawn))
        if len(looks) == len(contents):
            raise KeyboardInterrupt
        write_log(log, contents[len(looks)])

    monkeypatch.setattr(visualize.time, "sleep", sleep)
    monkeypatch.setattr(visualize, "draw", lambda args: drawn.append(args.logs))
    monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", str(log), "--watch"])
    with pytest.raises(KeyboardInterrupt):
        visualize.main()
    assert looks == [0, 0, 1, 1, 2]
    assert capsys.readouterr().err == f"waiting for {log}\n"
