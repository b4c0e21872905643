"""Training curves: what train.py logs after each epoch, one panel per quantity."""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils import UserError, read_text

# The panels: their titles, and the keys of a log row with their labels and line styles.
PANELS = [
    ("Loss, nats per word", {"train_loss": ("training", "--"), "val_loss": ("validation", "-")}),
    ("Reward: CIDEr-D / 100 of drawn captions", {"train_reward": ("", "-")}),
    (
        "BLEU-4 of validation",
        {"bleu4": ("free-running", "-"), "teacher_forced_bleu4": ("teacher-forced", "--")},
    ),
    ("CIDEr-D of validation", {"cider_d": ("", "-")}),
    ("Learning rate", {"lr": ("", "-")}),
    ("Captions per second of training", {"captions_per_second": ("", "-")}),
]
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#e69f00"]
WIDTH, HEIGHT = 4.0, 2.5  # of a panel, inches
DPI = 120  # pixels per inch
MAX_NAME = 45  # letters of a name


class Run(NamedTuple):
    name: str
    epochs: list  # numbers; a later phase of training continues the count
    rows: list  # for each epoch a dictionary of numbers
    starts: list  # indices of the rows at which a phase begins


def read_run(path, name):
    """
    A Run from the JSON lines of log_NAME.jsonl. Invalid lines, such as one cut off when a run was
    killed, are skipped and reported on stderr. Raises UserError for a file without valid rows.
    """
    rows, starts, epochs, skipped = [], [], [], []
    before = last = 0  # epochs in earlier phases; the last epoch of this phase
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = _parse_row(line)
        if row is None:
            skipped += [str(number)] * bool(line.strip())
            continue
        if row["epoch"] <= last or not rows:
            starts.append(len(rows))
            before, last = before + last, 0
        last = row["epoch"]
        epochs.append(before + last)
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no row of a training log; pass a log_NAME.jsonl of train.py")
    if skipped:
        print(f"{path}: skipped as not a row of a log: line {', '.join(skipped)}", file=sys.stderr)
    return Run(name, epochs, rows, starts)


def _parse_row(line):
    """The finite numbers in a line, by key; None if there is no epoch or nothing to draw."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("epoch")) is not int or not 0 < row["epoch"] < 1e9:
        return None
    row = {
        key: value
        for key, value in row.items()
        if type(value) in (int, float) and abs(value) < 1e12
    }  # false for NaN too
    return row if any(key in row for _, keys in PANELS for key in keys) else None


def name_runs(paths):
    """A name for each log: its folder's if these differ, else the file's, else the path."""
    paths = [Path(path).absolute() for path in paths]
    for names in ([path.parent.name for path in paths], [path.stem for path in paths]):
        if len(set(names)) == len(paths):
            return names
    return [str(path) for path in paths]


def draw_curves(runs):
    """
    A matplotlib Figure with a panel for each quantity that some Run has logged. Each run has a
    line, with a gap where a new phase begins; a thin vertical line marks it.
    """
    panels = [
        (title, keys)
        for title, keys in PANELS
        if any(key in row for run in runs for row in run.rows for key in keys)
    ]
    columns = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure((columns * WIDTH, rows * HEIGHT), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i)
        keys = {
            key: style
            for key, style in keys.items()
            if any(key in row for run in runs for row in run.rows)
        }
        _draw_panel(axes, title, keys, runs)
        if i > len(panels) - columns:
            axes.set_xlabel("epoch", fontsize=9)
    if len(runs) > 1:
        names = [
            run.name if len(run.name) <= MAX_NAME else "…" + run.name[1 - MAX_NAME :]
            for run in runs
        ]
        legend_columns = max(1, int(columns * WIDTH / (0.7 + 0.085 * max(map(len, names)))))
        figure.set_figheight(rows * HEIGHT + 0.25 * math.ceil(len(runs) / legend_columns))
        _legend(
            figure,
            [Line2D([], [], color=COLOURS[i % len(COLOURS)]) for i in range(len(runs))],
            names,
            loc="outside upper left",
            ncols=legend_columns,
        )
    return figure


def _draw_panel(axes, title, keys, runs):
    for i, run in enumerate(runs):
        colour = COLOURS[i % len(COLOURS)]
        for start, end in zip(run.starts, [*run.starts[1:], len(run.rows)]):
            if start:
                axes.axvline(
                    (run.epochs[start - 1] + run.epochs[start]) / 2,
                    color=colour,
                    alpha=0.6,
                    linewidth=0.7,
                )
            for key, (_, style) in keys.items():
                values = [row.get(key, math.nan) for row in run.rows[start:end]]
                axes.plot(
                    run.epochs[start:end],
                    values,
                    style,
                    color=colour,
                    linewidth=1.4,
                    markersize=3 if len(run.rows) <= 40 else 0,
                    **_points(style),
                )
    if len(keys) > 1:
        lines = [
            Line2D([], [], color="0.3", linestyle=style, markersize=3, **_points(style))
            for _, style in keys.values()
        ]
        _legend(axes, lines, [name for name, _ in keys.values()])
    numbers = [row[key] for run in runs for row in run.rows for key in keys if key in row]
    if min(numbers) >= 0 and ("lr" in keys or "captions_per_second" in keys):
        axes.set_ylim(0, 1.1 * max(numbers) or 1)  # from zero, so that heights can be compared
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(min(run.epochs[0] for run in runs) - 0.5, max(r.epochs[-1] for r in runs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.tick_params(labelsize=9, length=2, color="0.6")
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.6")


def _points(style):
    """Hollow on dashed lines, so that the two can be told apart when there is but one epoch."""
    return {"marker": "o"} | ({"markerfacecolor": "white"} if style == "--" else {})


def _legend(parent, lines, names, **options):
    legend = parent.legend(
        lines, ["-"] * len(lines), fontsize=9, framealpha=1, edgecolor="none", **options
    )
    for text, name in zip(legend.get_texts(), names):
        text.set_parse_math(False)  # a dollar sign in a name is not a formula
        text.set_text(name)
