"""Computes all metrics of sets of captions in one call, and their bootstrap intervals."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from pycocoevalcap.rouge.rouge import Rouge
from tqdm import tqdm

from evaluation import coco_caption
from evaluation.metrics import TfIdf, bleu_from_sums, bleu_sums, cider, cider_d
from modeling.sampling import FUNCTION_WORDS
from utils import UserError

BLEU = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4")
CIDER = {"CIDEr": cider, "CIDEr-D": cider_d}
NAMES = (*BLEU, "METEOR", "ROUGE-L", *CIDER, "vocabulary", "unseen", "repeats", "length")
# What --metrics takes, and what it stands for
GROUPS = {"all": NAMES, "bleu": BLEU, **{name.lower(): (name,) for name in NAMES}}


class Metric(NamedTuple):
    """A metric as the table shows it. One that has sums over images has an interval, too."""

    total: float
    by_image: np.ndarray | None = None  # (N,), each computed from one image; None: vocabulary
    sums: np.ndarray | None = None  # (N, S), each image's summands; None: METEOR and vocabulary
    value: Callable | None = None  # sums (..., S) -> values (...)


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
    Compute metrics for several sets of captions of the same images. CIDEr's document frequencies
    are those of the references.

    systems: each a list of N captions; references: per image a list; a caption is a list of words
    names: from NAMES
    novel: per system N booleans, whether a caption is not a training caption, for the metric
    "unseen"; None if not known

    Returns per system {name: Metric}, and {name: reason} for the metrics that are missing.
    """
    references = [[words for words in captions if words] for captions in references]
    found, missing = [_metrics(rows) for rows in _score(systems, references, names)], {}
    if "METEOR" in names:
        try:
            for metrics, (total, each) in zip(found, coco_caption.meteor(references, systems)):
                metrics["METEOR"] = Metric(100 * total, 100 * np.array(each))
        except coco_caption.JavaError as error:
            missing["METEOR"] = str(error)
    if "unseen" in names and novel is None:
        missing["unseen"] = "the training captions are not known"
    for i, (metrics, captions) in enumerate(zip(found, systems)):
        metrics["vocabulary"] = Metric(len({word for words in captions for word in words}))
        if novel is not None:
            metrics["unseen"] = _mean(novel[i], 100)
    return [{name: one[name] for name in names if name in one} for one in found], missing


def _score(systems, references, names):
    """Per system and image: scores by name, those of BLEU as `bleu_sums`"""
    rows, rouge = [[] for _ in systems], Rouge()
    ciders = {name: function for name, function in CIDER.items() if name in names}
    tf_idf = TfIdf(references) if ciders else None
    images = list(zip(references, *systems))
    for captions, *candidates in tqdm(images, "scoring", delay=2, leave=False, disable=None):
        # What depends on the references alone is computed once for all systems.
        vectors = [tf_idf.vector(words) for words in captions] if ciders else []
        texts = [" ".join(words) for words in captions]
        for row, words in zip(rows, candidates):
            content = [word for word in words if word not in FUNCTION_WORDS]
            scores = {"repeats": len(set(content)) < len(content), "length": len(words)}
            if set(BLEU) & set(names):
                scores["BLEU"] = bleu_sums(captions, words)
            if "ROUGE-L" in names:
                scores["ROUGE-L"] = rouge.calc_score([" ".join(words)], texts) if texts else 0
            if ciders:
                vector = tf_idf.vector(words)
                scores |= {name: function(vector, vectors) for name, function in ciders.items()}
            row.append(scores)
    return rows


def _metrics(rows):
    """{name: Metric} from the scores of each image"""
    metrics = {}
    for name in rows[0]:
        values = [scores[name] for scores in rows]
        if name == "BLEU":
            sums = np.array(values, dtype=np.float64)
            for order, bleu in enumerate(BLEU, 1):
                metrics[bleu] = _summed(sums, partial(bleu_from_sums, order=order))
        else:
            metrics[name] = _mean(values, 1 if name == "length" else 100)
    return metrics


def _mean(values, scale):
    """The Metric that is the mean over images of these values, times scale"""
    sums = np.stack([np.array(values, dtype=np.float64), np.ones(len(values))], 1)
    return _summed(sums, lambda sums: scale * sums[..., 0] / sums[..., 1])


def _summed(sums, value):
    return Metric(float(value(sums.sum(0))), value(sums), sums, value)


def scores_by_image(metrics, num_images):
    """Per image {name: value}, each computed from this image alone; without the vocabulary"""
    by_name = {name: metric.by_image for name, metric in metrics.items()}
    columns = {name: x.round(4).tolist() for name, x in by_name.items() if x is not None}
    return [{name: column[i] for name, column in columns.items()} for i in range(num_images)]


def resample(metrics, resamples, seed=0):
    """
    The metrics of `resamples` sets of N images, sampled from the N with replacement: {name:
    float64 (resamples,)}. The same seed gives the same images, so that two systems can be compared
    in pairs. CIDEr's document frequencies stay those of all images. METEOR is left out, since its
    program scores whole sets of images, and so is the vocabulary, which would always be too small:
    a resample has 63 % of the images.
    """
    metrics = {name: metric for name, metric in metrics.items() if metric.sums is not None}
    sums, rng = {name: [] for name in metrics}, np.random.default_rng(seed)
    n = max((len(metric.sums) for metric in metrics.values()), default=1)
    for _ in range(resamples):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        for name, metric in metrics.items():
            sums[name].append(counts @ metric.sums)
    return {name: metric.value(np.array(sums[name])) for name, metric in metrics.items()}


def interval(values):
    """The ends of the interval that contains the middle 95 % of the values"""
    return np.percentile(values, [2.5, 97.5])
