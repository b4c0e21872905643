"""
An evaluation and its table: a row per beam size, or one for each source of its images and one for
all, and notes that explain the columns.
"""

import re
from typing import NamedTuple

from evaluation import scores
from evaluation.captions import object_nouns
from utils import atomic_write

ATTENTION = (
    "attention: share of object words at which the most attended place lies in the "
    "object's box; then, at most 15 pixels of 256 beside it (the pointing game)"
)
EXPLAINED = {
    "CIDEr": "CIDEr: as in the paper, without stemming; neither clipped nor length-penalised",
    "CIDEr-D": 'CIDEr-D: clipped and length-penalised; coco-caption prints it as "CIDEr"',
    "vocabulary": "vocabulary: distinct words used",
    "unseen": "unseen: % of captions that are no training caption",
    "length": "length: words per caption",
}


class BeamResult(NamedTuple):
    """The captions at one beam size and their metrics: a row of the table"""

    beam_size: int
    source: str  # of the images; None for all of them
    captions: list  # an ImageCaption per image
    metrics: dict  # {name: scores.Metric}
    intervals: dict  # {name: (low, high)}; None without --bootstrap
    attention: tuple  # two texts of `attention_accuracy`; None if the data have no boxes of objects


class Evaluation(NamedTuple):
    """What eval.py prints and `report.write_report` shows"""

    title: str
    names: list  # of the metrics, as in scores.NAMES: the columns
    beams: list  # the rows, BeamResults; the last one has all images at the last beam size
    notes: list  # lines below the table


def evaluate_captions(title, by_beam, data, training, args):
    """
    Score captions. Returns an Evaluation. The metrics of a source are those of its images alone,
    also in the document frequencies of CIDEr.

    by_beam: per beam size the captions of all images, as `captions.caption_split` returns them
    data: the CaptionDataset; training: its training captions, a set of tuples of words, or None
    args: eval.py's options
    """
    systems = [[caption.words for caption in captions] for captions in by_beam]
    references = [data.entry(i)["references"] for i in range(len(data))]
    # Before the PTB tokenizer, since training captions have the data set's own words.
    novel = (
        None
        if training is None
        else [[tuple(words) not in training for words in captions] for captions in systems]
    )
    systems, references, tokens = scores.tokenize(systems, references, args.tokens)
    has_objects, rows = bool(object_nouns(data)), [[] for _ in by_beam]
    for source, images in _images_by_source(data).items():
        parts = [[captions[i] for i in images] for captions in (*systems, references, *by_beam)]
        measured, missing = scores.measure(
            parts[: len(systems)],
            parts[len(systems)],
            args.names,
            novel and [[captions[i] for i in images] for captions in novel],
        )
        for beam, beam_size, captions, metrics in zip(
            rows, args.beam_sizes, parts[len(systems) + 1 :], measured
        ):
            beam.append(
                BeamResult(
                    beam_size,
                    source,
                    captions,
                    metrics,
                    scores.intervals(metrics, args.bootstrap, args.seed)
                    if args.bootstrap
                    else None,
                    attention_accuracy(captions) if has_objects else None,
                )
            )
    if "unseen" in missing:
        missing["unseen"] = f"{args.data_folder} has no TRAIN_REFERENCES file"
    notes = [ATTENTION] if has_objects else []
    if args.metrics:
        notes += footnotes(args.names, tokens, missing)
    if args.bootstrap:
        notes += bootstrap_notes(args.names, args.bootstrap, args.seed)
    return Evaluation(title, args.names, sum(rows, []), notes)


def _images_by_source(data):
    """{source: indices of its images}, if there are several, and {None: all}, which comes last"""
    found = {}
    for i in range(len(data)):
        found.setdefault(data.entry(i).get("source"), []).append(i)
    return (found if len(found) > 1 else {}) | {None: range(len(data))}


def print_evaluation(evaluation):
    names, has_attention = evaluation.names, evaluation.beams[0].attention is not None
    width = max(max(len(beam.source), 6) + 2 if beam.source else 0 for beam in evaluation.beams)
    print(evaluation.title)
    print(
        "beam"
        + ("  source" * bool(width)).ljust(width)
        + heading(names)
        + "          attention" * has_attention
    )
    for beam in evaluation.beams:
        values = {name: metric.total for name, metric in beam.metrics.items()}
        source = f"  {beam.source or 'all'}".ljust(width) if width else ""
        print(
            f"{beam.beam_size:4d}{source}{row(names, values)}"
            + (f"{'  '.join(beam.attention):>19}" if has_attention else "")
        )
        for i, end in enumerate(("low", "high") if beam.intervals is not None else ()):
            print(
                f"{end:>4}"
                + " " * width
                + row(names, {name: ends[i] for name, ends in beam.intervals.items()})
            )
    for note in evaluation.notes:
        print(note)


def table_rows(evaluation):
    """The evaluation as rows of texts, the heading first; intervals stand in their cells."""
    sources = any(beam.source for beam in evaluation.beams)
    attention = ["attention", "attention near"] if evaluation.beams[0].attention else []
    rows = [["beam", *["source"] * sources, *evaluation.names, *attention]]
    for beam in evaluation.beams:
        cells = [
            _with_interval(name, beam.metrics.get(name), beam.intervals)
            for name in evaluation.names
        ]
        rows.append(
            [
                str(beam.beam_size),
                *[beam.source or "all"] * sources,
                *cells,
                *(beam.attention or ()),
            ]
        )
    return rows


def _with_interval(name, metric, intervals):
    if metric is None:
        return "–"
    text = cell(name, metric.total).strip()
    if not intervals or name not in intervals:
        return text
    low, high = (cell(name, end).strip() for end in intervals[name])
    return f"{text} ({low}–{high})"


def write_table(path, rows, notes):
    """
    Write rows of texts, the heading first, as a Markdown table or, to a .tex file, as a LaTeX
    tabular of the package booktabs; notes, lines that explain it, become comments there.
    """
    if str(path).lower().endswith(".tex"):
        lines = [f"% {note}" for note in ["needs \\usepackage{booktabs}", *notes]]
        lines += [f"\\begin{{tabular}}{{{'l' + 'r' * (len(rows[0]) - 1)}}}", "\\toprule"]
        for i, cells in enumerate(rows):
            lines.append(" & ".join(map(_to_latex, cells)) + r" \\")
            lines += ["\\midrule"] * (i == 0)
        lines += ["\\bottomrule", "\\end{tabular}"]
    else:
        heading, *others = [f"| {' | '.join(cells)} |" for cells in rows]
        lines = [heading, "|" + "---|" * len(rows[0]), *others, "", *(f"* {n}" for n in notes)]
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _to_latex(text):
    text = re.sub(r"([%_&#$])", r"\\\1", text).replace("–", "--")
    return re.sub(r" (\([\d.-]+\))$", r" {\\scriptsize \1}", text)


def cell(name, value, width=None):
    """A number as text of its column's width; a dash for None"""
    width = width or len(name) + 2
    if value is None:
        return f"{'–':>{width}}"
    return f"{value:{width}.0f}" if name == "vocabulary" else f"{value:{width}.2f}"


def heading(names):
    return "".join(f"  {name}" for name in names)


def row(names, values):
    """The values of {name: value}, each under its name in `heading`; dashes for missing ones"""
    return "".join(cell(name, values.get(name)) for name in names)


def attention_accuracy(captions):
    """Attention accuracy as two texts, without and with margin; dashes if no object was named"""
    total = sum(caption.object_words for caption in captions)
    hits = sum(caption.hits for caption in captions), sum(caption.near_hits for caption in captions)
    return tuple(f"{100 * hit / total:.2f} %" if total else "–" for hit in hits)


def footnotes(names, tokens, missing):
    """Lines that explain the columns."""
    notes = [f"tokens: {tokens}"]
    notes += [EXPLAINED[name] for name in names if name in EXPLAINED and name not in missing]
    return notes + [f"{name}: –, {reason}" for name, reason in missing.items()]


def bootstrap_notes(names, resamples, seed):
    """Lines that explain the intervals"""
    notes = [f"low, high: 95 % interval, {resamples} resamples of the images, seed {seed}"]
    if any(name.startswith("CIDEr") for name in names):
        notes.append("CIDEr's document frequencies are those of all images in every resample")
    return notes
