"""Training curves: what train.py logs after each epoch, one panel per quantity."""

import json
import math
from itertools import pairwise

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import read_text
from visualization import figures

# The panels: their titles, and the keys of a log row with their labels and line styles
PANELS = [
    ("Loss, nats per word", {"train_loss": ("training", "--"), "val_loss": ("validation", "-")}),
    ("Reward: CIDEr-D / 100 of sampled captions", {"train_reward": ("", "-")}),
    (
        "BLEU-4 of validation",
        {"bleu4": ("free-running", "-"), "teacher_forced_bleu4": ("teacher-forced", "--")},
    ),
    ("CIDEr-D of validation", {"cider_d": ("", "-")}),
    ("Learning rate", {"lr": ("", "-")}),
    ("Captions per second of training", {"captions_per_second": ("", "-")}),
]
FROM_ZERO = ("Learning rate", "Captions per second of training")  # so that heights compare
COLOUR = "#0072b2"
WIDTH, HEIGHT = 4.0, 2.5  # of a panel, inches
DPI = 120  # pixels per inch


def write_curves(log, path):
    """Draw the curves of a log_NAME.jsonl to a PNG file."""
    figures.save(draw_curves(read_phases(log)), path)


def read_phases(log):
    """
    The phases of training in a log_NAME.jsonl: for each a list of rows, dictionaries of numbers,
    whose "epoch" continues the count of the phase before. Lines that are not rows are skipped, such
    as one cut off when a run was killed.
    """
    phases, before, last = [], 0, 0  # epochs in earlier phases; the last epoch of this phase
    for line in read_text(log).splitlines():
        try:
            row = json.loads(line)
            epoch = row["epoch"]
        except (ValueError, KeyError, TypeError):
            continue
        if not phases or epoch <= last:
            phases.append([])
            before, last = before + last, 0
        last = epoch
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        phases[-1].append(numbers | {"epoch": before + last})
    return phases


@figures.default_style
def draw_curves(phases):
    """
    A matplotlib Figure with a panel for each quantity that `read_phases` found. Lines have a gap
    where a new phase begins; a thin vertical line marks it.
    """
    logged = {key for rows in phases for row in rows for key in row}
    panels = [(title, keys) for title, keys in PANELS if keys.keys() & logged]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure((columns * WIDTH, rows * HEIGHT), dpi=DPI, layout="constrained")
    for i, (title, keys) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, i)
        for before, after in pairwise(phases):
            start = (before[-1]["epoch"] + after[0]["epoch"]) / 2
            axes.axvline(start, color=COLOUR, alpha=0.6, linewidth=0.7)
        found = [key for key in keys if key in logged]
        for key in found:
            _draw_lines(axes, phases, key, *keys[key])
        if len(found) > 1:
            axes.legend(fontsize=9, framealpha=1, edgecolor="none")
        axes.set_title(title, fontsize=10, loc="left")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.tick_params(labelsize=9, length=2, color="0.6")
        axes.grid(axis="y", color="0.9", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if title in FROM_ZERO:
            axes.set_ylim(0)
        if i > len(panels) - columns:
            axes.set_xlabel("epoch", fontsize=9)
    return figure


def _draw_lines(axes, phases, key, label, style):
    """A line for each phase; markers are hollow on dashed lines, to tell single points apart."""
    for i, phase in enumerate(phases):
        axes.plot(
            [row["epoch"] for row in phase],
            [row.get(key, math.nan) for row in phase],
            style,
            label=label if i == 0 else None,
            color=COLOUR,
            marker="o",
            markersize=3 if len(phase) <= 40 else 0,
            markerfacecolor="white" if style == "--" else COLOUR,
        )
