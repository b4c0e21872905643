"""All metrics of a set of captions from one call, their bootstrap intervals and their table."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from evaluation import coco_caption as jars
from evaluation.metrics import Cider, CiderD, bleu_counts, bleu_of_counts, ngrams, rouge_l
from utils import UserError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NAMES = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "CIDEr-D", "vocabulary", "unseen", "length")
EXPLAINED = {
    "CIDEr": "CIDEr: as in the paper, without stemming; neither clipped nor length-penalised",
    "CIDEr-D": 'CIDEr-D: clipped and length-penalised; coco-caption prints it as "CIDEr"',
    "vocabulary": "vocabulary: distinct words used",
    "unseen": "unseen: % of captions that are no training caption",
    "length": "length: words per caption",
}


class Metric(NamedTuple):
    """A figure that follows from sums over the images, so a resample need not be scored anew."""
    sums: np.ndarray  # (N, S) what each image adds; None for the vocabulary, which is no sum
    value: Callable  # sums (..., S) -> figures (...), as the table shows them

    @property
    def total(self):
        return float(self.value(None if self.sums is None else self.sums.sum(0)))


def parse_names(names):
    """
    What --metrics was given -> names as in NAMES and in their order; "all" and "bleu" stand for
    several. UserError that lists the valid ones for any other.
    """
    groups = {"all": NAMES, "bleu": BLEU, **{name.lower(): (name,) for name in NAMES}}
    wanted = set()
    for name in names:
        if name.lower() not in groups:
            raise UserError(f"unknown metric {name}; valid ones: all, BLEU, {', '.join(NAMES)}")
        wanted.update(groups[name.lower()])
    return [name for name in NAMES if name in wanted]


def tokenize(systems, references, tokens=None):
    """
    Captions as the field tokenises them. tokens: "ptb" (UserError without Java), "data" for the
    words as they stand, None for PTB where Java is.

    Returns systems and references as `measure` takes them, and what was done, in words.
    """
    if tokens == "data":
        return systems, references, "the data set's"
    flat = [words for captions in (*systems, *references) for words in captions]
    try:
        found = iter(jars.tokenize([" ".join(words) for words in flat]))
    except jars.JavaError as error:
        if tokens == "ptb":
            raise UserError(f"--tokens ptb: {error}; install Java and pycocoevalcap, or pass "
                            f"--tokens data") from None
        return systems, references, f"the data set's, not PTB's: {error}"
    systems = [[next(found) for _ in captions] for captions in systems]
    references = [[next(found) for _ in captions] for captions in references]
    return systems, references, "PTB's, by pycocoevalcap's tokenizer"


def measure(systems, references, names, unseen=None):
    """
    Every metric of several sets of captions of the same images.

    systems: each a list of N captions, references: per image a list; a caption is a list of
    words; names: of NAMES; unseen: per system N truth values, None if not known.
    BLEU is NLTK's, the rest is coco-caption's; document frequencies are those of `references`.

    Returns per system {name: Metric}, and {name: reason} of the metrics that could not be had.
    """
    references = [[words for words in captions if words] for captions in references]
    found, missing = [{} for _ in systems], {}
    for system, columns in zip(found, _by_image(systems, references, names)):
        system.update(columns)
    if "METEOR" in names:
        try:
            counts = jars.meteor_counts(references * len(systems), sum(systems, []))
            for system, part in zip(found, counts.reshape(len(systems), -1, counts.shape[1])):
                system["METEOR"] = Metric(part, lambda sums: 100 * jars.meteor_of_counts(sums))
        except jars.JavaError as error:
            missing["METEOR"] = str(error)
    if "unseen" in names and unseen is None:
        missing["unseen"] = "the training captions are not known"
    for i, (system, captions) in enumerate(zip(found, systems)):
        distinct = len({word for words in captions for word in words})
        system["vocabulary"] = Metric(None, lambda _, distinct=distinct: distinct)
        system["length"] = _mean([len(words) for words in captions], 1)
        if unseen is not None:
            system["unseen"] = _mean(unseen[i], 100)
    return [{name: system[name] for name in names if name in system}
            for system in found], missing


def _mean(values, scale):
    """The metric that is the mean of a value per image"""
    values = np.array(values, dtype=np.float64)
    return Metric(np.stack([values, np.ones_like(values)], 1),
                  lambda sums: scale * sums[..., 0] / sums[..., 1])


def _by_image(systems, references, names):
    """Per system {name: Metric} of what needs an image's references only once"""
    bleu = [name for name in BLEU if name in names]
    ciders = {name: kind(references) for name, kind in (("CIDEr", Cider), ("CIDEr-D", CiderD))
              if name in names}
    weigh = next(iter(ciders.values()), None)  # the vectors of both are the same
    rows = [{name: [] for name in ("BLEU", "ROUGE-L", *ciders)} for _ in systems]
    for captions, *candidates in tqdm(list(zip(references, *systems)), desc="scoring",
                                      unit="image", delay=2, leave=False, disable=None):
        counted = [(len(words), ngrams(words)) for words in captions] if bleu else None
        vectors = weigh.prepare(captions) if weigh else None
        for row, words in zip(rows, candidates):
            if bleu:
                row["BLEU"].append(bleu_counts(counted, words))
            if "ROUGE-L" in names:
                row["ROUGE-L"].append(rouge_l(captions, words))
            vector = weigh.vector(words) if weigh else None
            for name, cider in ciders.items():
                row[name].append(cider.compare(vector, vectors))
    for row in rows:
        counts = np.array(row["BLEU"])
        yield {**{name: Metric(counts, lambda sums, n=int(name[-1]): bleu_of_counts(sums, n))
                  for name in bleu},
               **{name: _mean(row[name], 100) for name in row if name != "BLEU" and row[name]}}


def scores_by_image(measured, images):
    """
    Per image {name: value}, as if the image were all there is; no vocabulary. images: how many
    """
    columns = {name: metric.value(metric.sums).round(4).tolist()
               for name, metric in measured.items() if metric.sums is not None}
    return [{name: column[i] for name, column in columns.items()} for i in range(images)]


def resample(measured, resamples, seed=0):
    """
    The metrics of `resamples` sets of N images, drawn from the N with replacement: {name:
    float64 (resamples,)}. The same seed draws the same images, so two systems are compared in
    pairs. CIDEr's document frequencies stay those of the whole set. The vocabulary is left out:
    a resample holds 63 % of the images, so it would always be too small.
    """
    measured = {name: metric for name, metric in measured.items() if metric.sums is not None}
    if not measured:
        return {}
    n, random = len(next(iter(measured.values())).sums), np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 100):  # a hundred at a time: 100 N numbers
        times = np.stack([np.bincount(random.integers(n, size=n), minlength=n)
                          for _ in range(min(100, resamples - start))]).astype(np.float64)
        parts.append({name: metric.value(times @ metric.sums)
                      for name, metric in measured.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in measured}


def interval(values):
    """Where 95 % of the values lie: from, to"""
    return np.percentile(values, [2.5, 97.5])


def cell(name, value, width=None):
    """A figure as wide as its column; a dash for None"""
    width = width or len(name) + 2
    if value is None:
        return f"{'–':>{width}}"
    return f"{value:{width}.0f}" if name == "vocabulary" else f"{value:{width}.2f}"


def heading(names):
    return "".join(f"  {name}" for name in names)


def row(names, values):
    """The values of {name: value}, each under its name in `heading`; a dash where there is none"""
    return "".join(cell(name, values.get(name)) for name in names)


def interval_rows(names, measured, resamples, seed):
    """Two values to a name: the lower and the upper ends of the intervals"""
    drawn = {name: interval(values) for name, values in resample(measured, resamples, seed).items()}
    return [row(names, {name: ends[i] for name, ends in drawn.items()}) for i in (0, 1)]


def footnotes(names, tokens, missing):
    """What a reader has to know about the columns, a line each."""
    notes = [f"tokens: {tokens}"]
    notes += [EXPLAINED[name] for name in names if name in EXPLAINED and name not in missing]
    return notes + [f"{name}: –, {reason}" for name, reason in missing.items()]


def bootstrap_note(names, resamples, seed):
    """How the intervals came about, in a line or two"""
    notes = [f"low, high: 95 % interval, {resamples} resamples of the images, seed {seed}"]
    if any(name.startswith("CIDEr") for name in names):
        notes.append("CIDEr's document frequencies are those of all images in every resample")
    return notes
