"""Computes all metrics of sets of captions in one call, and their bootstrap intervals."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from pycocoevalcap.rouge.rouge import Rouge
from tqdm import tqdm

from evaluation import coco_caption
from evaluation.metrics import (
    TfIdf,
    bleu_from_sums,
    bleu_sums,
    cider,
    cider_d,
    ngrams,
)
from utils import UserError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
NAMES = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "CIDEr-D", "vocabulary", "unseen", "length")


class Metric(NamedTuple):
    """A metric as the table shows it. One that has sums over images has an interval, too."""

    total: float
    by_image: np.ndarray | None = None  # (N,), each computed from one image; None: vocabulary
    sums: np.ndarray | None = None  # (N, S), each image's summands; None: METEOR and vocabulary
    value: Callable | None = None  # sums (..., S) -> values (...)


def parse_names(names):
    """
    The arguments of --metrics, in any case, -> names as in NAMES and in their order; "all"
    and "bleu" stand for several. UserError that lists the valid names for an unknown one.
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
    Tokenise captions. tokens: "ptb" for the PTB tokenizer (UserError without Java), "data" to leave
    the words as they are, None for PTB if Java is installed.

    Returns systems and references as `measure` takes them, and a description of the tokens.
    """
    if tokens == "data":
        return systems, references, "the data set's"
    captions = [words for group in (*systems, *references) for words in group]
    try:
        tokenized = iter(coco_caption.tokenize([" ".join(words) for words in captions]))
    except coco_caption.JavaError as error:
        if tokens == "ptb":
            raise UserError(f"--tokens ptb: {error}; install Java, or pass --tokens data") from None
        return systems, references, f"the data set's, not PTB's: {error}"
    systems = [[next(tokenized) for _ in captions] for captions in systems]
    references = [[next(tokenized) for _ in captions] for captions in references]
    return systems, references, "PTB's, by pycocoevalcap's tokenizer"


def measure(systems, references, names, novel=None):
    """
    Compute metrics for several sets of captions of the same images.

    systems: each a list of N captions; references: per image a list; a caption is a list of words
    names: from NAMES
    novel: per system N booleans, whether a caption is not a training caption, for the metric
    "unseen"; None if not known
    Document frequencies are those of `references`.

    Returns per system {name: Metric}, and {name: reason} for the metrics that are missing.
    """
    references = [[words for words in captions if words] for captions in references]
    found, missing = _score_images(systems, references, names), {}
    if "METEOR" in names:
        try:
            for system, (total, each) in zip(found, coco_caption.meteor(references, systems)):
                system["METEOR"] = Metric(100 * total, 100 * np.array(each))
        except coco_caption.JavaError as error:
            missing["METEOR"] = str(error)
    if "unseen" in names and novel is None:
        missing["unseen"] = "the training captions are not known"
    for i, (system, captions) in enumerate(zip(found, systems)):
        system["vocabulary"] = Metric(len({word for words in captions for word in words}))
        system["length"] = _mean([len(words) for words in captions], 1)
        if novel is not None:
            system["unseen"] = _mean(novel[i], 100)
    return [{name: system[name] for name in names if name in system} for system in found], missing


def _from_sums(sums, value):
    return Metric(float(value(sums.sum(0))), value(sums), sums, value)


def _mean(values, scale):
    """The Metric that is the mean over images of these values, times scale"""
    values = np.array(values, dtype=np.float64)
    return _from_sums(
        np.stack([values, np.ones_like(values)], 1),
        lambda sums: scale * sums[..., 0] / sums[..., 1],
    )


def _score_images(systems, references, names):
    """Per system {name: Metric} for those of BLEU, ROUGE-L, CIDEr and CIDEr-D in names"""
    bleu = [name for name in BLEU if name in names]
    ciders = {
        name: function
        for name, function in (("CIDEr", cider), ("CIDEr-D", cider_d))
        if name in names
    }
    tf_idf = TfIdf(references) if ciders else None
    rows = [{name: [] for name in ("BLEU", "ROUGE-L", *ciders)} for _ in systems]
    for captions, *candidates in tqdm(
        list(zip(references, *systems)),
        desc="scoring",
        unit="image",
        delay=2,
        leave=False,
        disable=None,
    ):
        # What depends on the references alone is computed once for all systems.
        vectors = [tf_idf.vector(ngrams(words)) for words in captions] if ciders else []
        texts = [" ".join(words) for words in captions]
        for row, words in zip(rows, candidates):
            if bleu:
                row["BLEU"].append(bleu_sums(captions, words))
            if "ROUGE-L" in names:
                row["ROUGE-L"].append(Rouge().calc_score([" ".join(words)], texts) if texts else 0)
            vector = tf_idf.vector(ngrams(words)) if ciders else None
            for name, function in ciders.items():
                row[name].append(function(vector, vectors))
    metrics = []
    for row in rows:
        sums = np.array(row.pop("BLEU"), dtype=np.float64)
        metrics.append(
            {
                name: _from_sums(sums, lambda sums, n=int(name[-1]): bleu_from_sums(sums, n))
                for name in bleu
            }
            | {name: _mean(values, 100) for name, values in row.items() if values}
        )
    return metrics


def scores_by_image(metrics, num_images):
    """Per image {name: value}, each computed from this image alone; without the vocabulary"""
    columns = {
        name: metric.by_image.round(4).tolist()
        for name, metric in metrics.items()
        if metric.by_image is not None
    }
    return [{name: column[i] for name, column in columns.items()} for i in range(num_images)]


def resample(metrics, resamples, seed=0):
    """
    The metrics of `resamples` sets of N images, drawn from the N with replacement: {name:
    float64 (resamples,)}. The same seed draws the same images, so that two systems can be compared
    in pairs. CIDEr's document frequencies stay those of all images. METEOR is left out,
    since its program scores a set of images, and so is the vocabulary: a resample has 63 % of the
    images, so it would always be too small.
    """
    metrics = {name: metric for name, metric in metrics.items() if metric.sums is not None}
    if not metrics:
        return {}
    n, rng = len(next(iter(metrics.values())).sums), np.random.default_rng(seed)
    parts = []
    for start in range(0, resamples, 100):  # 100 at a time, to limit memory
        counts = np.stack(
            [
                np.bincount(rng.integers(n, size=n), minlength=n)
                for _ in range(min(100, resamples - start))
            ]
        ).astype(np.float64)
        parts.append({name: metric.value(counts @ metric.sums) for name, metric in metrics.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in metrics}


def interval(values):
    """The ends of the interval that contains the middle 95 % of the values"""
    return np.percentile(values, [2.5, 97.5])


def intervals(metrics, resamples, seed):
    """{name: (low, high)}, the 95 % interval of each metric that has one"""
    return {name: interval(values) for name, values in resample(metrics, resamples, seed).items()}
