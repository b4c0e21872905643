"""
An evaluation and its table: a row per beam size, or one for each source of its images and one for
all, and notes that explain the columns.
"""

import re
from pathlib import Path
from typing import NamedTuple

from evaluation import scores
from evaluation.objects import COLUMNS, summarise
from utils import atomic_write

OBJECTS = (
    "attention, evidence: % of the words for objects at whose strongest location there is a box of "
    "the object; near: at most 15 pixels of 256 beside it (the pointing game)",
    "inside: % of attention in these boxes; chance: % of all locations",
    "CHAIRi: % of the objects named that are not there; CHAIRs: % of captions with such an object",
)
EXPLAINED = {
    "CIDEr": "CIDEr: as in the paper, without stemming; neither clipped nor length-penalised",
    "CIDEr-D": 'CIDEr-D: clipped and length-penalised; coco-caption prints it as "CIDEr"',
    "vocabulary": "vocabulary: distinct words used",
    "unseen": "unseen: % of captions that are not training captions",
    "repeats": "repeats: % of captions that have a content word twice",
    "length": "length: words per caption",
}


class BeamResult(NamedTuple):
    """The captions at one beam size and their metrics: a row of the table"""

    beam_size: int
    source: str  # of the images; None for all of them
    captions: list  # an ImageCaption per image
    metrics: dict  # {name: scores.Metric}
    intervals: dict  # {name: (low, high)}; None without --bootstrap
    objects: tuple  # texts of `objects.summarise`; None if the data have no boxes of objects

    def texts(self, name):
        """A metric and the ends of its interval as texts, dashes for missing ones"""
        value = self.metrics[name].total if name in self.metrics else None
        return [cell(name, x) for x in (value, *(self.intervals or {}).get(name, (None, None)))]


class Evaluation(NamedTuple):
    """What eval.py prints and `report.write_report` shows"""

    title: str
    names: list  # of the metrics, as in scores.NAMES: the columns
    beams: list  # the rows, BeamResults; the last one has all images at the last beam size
    notes: list  # lines below the table


def evaluate_captions(title, by_beam, data, training, has_objects, args):
    """
    Score captions. Returns an Evaluation. The metrics of a source are those of its images alone,
    also in the document frequencies of CIDEr.

    by_beam: as `captions.caption_split` returns it; data: the CaptionDataset; training: its
    training captions, a set of tuples of words, or None; has_objects: whether their boxes are
    known; args: eval.py's options
    """
    systems = [[caption.words for caption in captions] for captions in by_beam]
    references = [data.entry(i)["references"] for i in range(len(data))]
    # Before the PTB tokenizer, since training captions have the data set's own words.
    novel = None
    if training is not None:
        novel = [[tuple(words) not in training for words in captions] for captions in systems]
    systems, references, tokens = scores.tokenize(systems, references, args.tokens)
    sources = {}
    for i in range(len(data)):
        sources.setdefault(data.entry(i).get("source"), []).append(i)
    several, beams = len(sources) > 1, [[] for _ in by_beam]
    for source, images in ((sources if several else {}) | {None: range(len(data))}).items():
        [texts], novel_here = _select(images, [references]), novel and _select(images, novel)
        measured, missing = scores.measure(_select(images, systems), texts, args.names, novel_here)
        rows = zip(beams, args.beam_sizes, _select(images, by_beam), measured)
        for found, beam_size, captions, metrics in rows:
            intervals = None
            if args.bootstrap:
                resampled = scores.resample(metrics, args.bootstrap, args.seed)
                intervals = {name: scores.interval(values) for name, values in resampled.items()}
            named = summarise([caption.objects for caption in captions]) if has_objects else None
            found.append(BeamResult(beam_size, source, captions, metrics, intervals, named))
    if "unseen" in missing:
        missing["unseen"] = f"{args.data_folder} has no TRAIN_REFERENCES file"
    notes = [*OBJECTS] * has_objects + footnotes(args, tokens, missing)
    return Evaluation(title, args.names, sum(beams, []), notes)


def _select(images, columns):
    return [[column[i] for i in images] for column in columns]


def footnotes(args, tokens, missing):
    """Lines that explain the columns and the intervals; arguments as in `evaluate_captions`."""
    notes = []
    if args.metrics:
        notes.append(f"tokens: {tokens}")
        notes += [EXPLAINED[name] for name in args.names if name in {*EXPLAINED} - {*missing}]
        notes += [f"{name}: –, {reason}" for name, reason in missing.items()]
    if args.bootstrap:
        resamples = f"{args.bootstrap} resamples of the images, seed {args.seed}"
        notes.append(f"low, high: 95 % interval, {resamples}")
        if set(scores.CIDER) & set(args.names):
            notes.append("CIDEr's document frequencies are those of all images in every resample")
    return notes


def print_evaluation(evaluation):
    names, beams = evaluation.names, evaluation.beams
    sources = ["source", *(beam.source for beam in beams if beam.source)]
    width = 4 if len(sources) == 1 else 6 + max(map(len, sources))
    heading = "beam  source".ljust(width)[:width] + "".join(f"  {name}" for name in names)
    print(evaluation.title)
    columns = COLUMNS if beams[0].objects else ()
    print(heading + "".join(f"  {name:>6}" for name in columns))
    for beam in beams:
        label = f"{beam.beam_size:4d}  {beam.source or 'all'}".ljust(width)[:width]
        lines = [f"{start:{width}}" for start in (label, " low", "high")]
        for name in names:
            texts = beam.texts(name)
            lines = [line + text.rjust(len(name) + 2) for line, text in zip(lines, texts)]
        lines[0] += "".join(
            text.rjust(2 + max(6, len(name))) for name, text in zip(columns, beam.objects or ())
        )
        print(*lines[: 1 if beam.intervals is None else 3], sep="\n")
    for note in evaluation.notes:
        print(note)


def table_rows(evaluation):
    """The evaluation as rows of texts, the heading first; a cell includes its interval."""
    sources = any(beam.source for beam in evaluation.beams)
    objects = COLUMNS if evaluation.beams[0].objects else ()
    rows = [["beam", *["source"] * sources, *evaluation.names, *objects]]
    for beam in evaluation.beams:
        row = [str(beam.beam_size), *[beam.source or "all"] * sources]
        for value, low, high in map(beam.texts, evaluation.names):
            row.append(value if low == "–" else f"{value} ({low}–{high})")
        rows.append([*row, *(beam.objects or ())])
    return rows


def write_table(path, rows, notes):
    """
    Write rows of texts, the heading first, as a Markdown table or, to a .tex file, as a LaTeX
    tabular of the package booktabs; notes, lines that explain it, become comments there.
    """
    if str(path).lower().endswith(".tex"):
        heading, *others = [" & ".join(map(_to_latex, cells)) + r" \\" for cells in rows]
        lines = [f"% {note}" for note in ["needs \\usepackage{booktabs}", *notes]]
        lines.append(f"\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}")
        lines += ["\\toprule", heading, "\\midrule", *others, "\\bottomrule", "\\end{tabular}"]
    else:
        heading, *others = [f"| {' | '.join(cells)} |" for cells in rows]
        lines = [heading, "|" + "---|" * len(rows[0]), *others, "", *(f"* {n}" for n in notes)]
    with atomic_write(path) as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _to_latex(text):
    text = re.sub(r"([%_&#$])", r"\\\1", text).replace("–", "--")
    return re.sub(r" (\([\d.-]+\))$", r" {\\scriptsize \1}", text)


def cell(name, value):
    """A number as text, a dash for None"""
    if value is None:
        return "–"
    return f"{value:.0f}" if name == "vocabulary" else f"{value:.2f}"
