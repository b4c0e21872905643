"""BLEU, counted by NLTK, CIDEr and CIDEr-D, and top-5 accuracy."""

import math
import sys
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch


def ngrams(words):
    """How often each n-gram (a tuple) occurs in a caption: Counters for n = 1..4"""
    shifted = [words[i:] for i in range(4)]
    return [Counter(zip(*shifted[:n])) for n in (1, 2, 3, 4)]


def bleu(references: list[list[list[str]]], hypotheses: list[list[str]]) -> list[float]:
    """
    Corpus BLEU-1 to BLEU-4 (Papineni et al. 2002), unsmoothed, 0..100; equal to NLTK's corpus_bleu.

    references: per image a list of captions, of which empty ones are ignored; hypotheses: per image
    one caption; a caption is a list of words or ids
    """
    sums = np.zeros(10)
    for captions, hypothesis in zip(references, hypotheses):
        sums += bleu_sums(captions, hypothesis)
    # What NLTK puts in place of a precision of 0: BLEU-4 is then about 1e-75, so early epochs in
    # which no 4-gram matches are still ranked by their shorter n-grams.
    tiny = sys.float_info.min
    return [float(bleu_from_sums(sums, order, tiny)) for order in (1, 2, 3, 4)]


def bleu_sums(references, hypothesis):
    """
    What corpus BLEU sums over the images: matches (4), n-grams (4), length, closest length of a
    reference; 10 numbers. references: captions of one image; hypothesis: a caption
    """
    from nltk.translate import bleu_score  # only here: it takes as long as half of torch

    references = [caption for caption in references if caption] or [[]]
    precisions = [bleu_score.modified_precision(references, hypothesis, n) for n in (1, 2, 3, 4)]
    return [
        *(p.numerator for p in precisions),
        *(p.denominator for p in precisions),
        len(hypothesis),
        bleu_score.closest_ref_length(references, len(hypothesis)),
    ]


def bleu_from_sums(sums, order, min_precision=0.0):
    """
    BLEU-`order`, 0..100 (...,), from summed `bleu_sums` (..., 10); min_precision takes the place of
    a precision of 0 if any word matches.
    """
    matches, totals = sums[..., :order], sums[..., 4 : 4 + order]
    length, closest = sums[..., 8], sums[..., 9]
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 where nothing matches
        brevity_penalty = np.minimum(0, 1 - closest / length)
        precisions = np.maximum(matches / totals, min_precision)
        value = np.exp(brevity_penalty + np.log(precisions).mean(-1))
    return 100 * np.where(matches[..., 0] > 0, value, 0)


# CIDEr


class TfIdfVector(NamedTuple):
    """The TF-IDF weights of a caption, which CIDEr compares"""

    weights: list  # for n = 1..4 {n-gram: term frequency x log(images / images that have it)}
    norms: list  # the Euclidean norms of the 4 weight vectors
    length: int  # in words


class TfIdf:
    """
    TF-IDF weights of n-grams. Words are compared without stemming, unlike in CIDEr's paper.

    documents: per image a list of captions, lists of words or ids, in which document frequencies
    are counted; ValueError if there are none
    """

    def __init__(self, documents: list[list[list[str]]]):
        if not len(documents):
            raise ValueError("CIDEr needs captions to count document frequencies in")
        found: Counter = Counter()
        for captions in documents:
            found.update({gram for words in captions for part in ngrams(words) for gram in part})
        # An n-gram in one image weighs the same as one in none, so most need not be stored.
        self._max_idf = math.log(len(documents))
        self._idf = {gram: self._max_idf - math.log(n) for gram, n in found.items() if n > 1}

    def vector(self, words):
        """The `TfIdfVector` of a caption, a list of words"""
        weights = [
            {gram: count * self._idf.get(gram, self._max_idf) for gram, count in part.items()}
            for part in ngrams(words)
        ]
        norms = [math.sqrt(sum([x * x for x in part.values()])) for part in weights]
        return TfIdfVector(weights, norms, len(words))


def cider(candidate: TfIdfVector, references: list[TfIdfVector]) -> float:
    """
    CIDEr of one caption, 0..10 (Vedantam et al. 2015, equations 1 to 3, times 10 as in its authors'
    code): the cosine between caption and reference, averaged over n = 1..4 and the references.
    """
    cosines = [sum(_cosines(candidate, reference)) for reference in references]
    return 10 * sum(cosines) / 4 / max(1, len(references))


def cider_d(candidate: TfIdfVector, references: list[TfIdfVector], sigma: float = 6.0) -> float:
    """
    CIDEr-D of one caption, 0..10 (the same paper, from section 5.2 on): weights are clipped to the
    reference's, so repeating a word gains nothing, and a difference in length lowers the score (a
    Gaussian; sigma in words). coco-caption prints this as "CIDEr".
    """
    cosines = [
        sum(_cosines(candidate, reference, clip=True))
        * math.exp(-((candidate.length - reference.length) ** 2) / (2 * sigma**2))
        for reference in references
    ]
    return 10 * sum(cosines) / 4 / max(1, len(references))


def _cosines(a, b, clip=False):
    """Cosines between a and b for n = 1..4, where they are not 0. clip: limit a's weights to b's"""
    cosines = []
    for x, y, norm_x, norm_y in zip(a.weights, b.weights, a.norms, b.norms):
        # Summed in the order of words; a set's order differs between processes, and a resumed run
        # must have the same rewards to the last bit.
        common = [(weight, y[gram]) for gram, weight in x.items() if gram in y]
        if not common:
            break  # then they have no longer n-grams in common either
        if norm_x and norm_y:
            dot = sum([(min(p, q) if clip else p) * q for p, q in common])
            cosines.append(dot / (norm_x * norm_y))
    return cosines


class CiderD(TfIdf):
    """
    CIDEr-D of many captions with fixed document frequencies, such as those of the training captions
    in self-critical training. documents: as in `TfIdf`
    """

    def score(self, candidates: list[list[str]], references: list[list[list[str]]]) -> np.ndarray:
        """
        CIDEr-D, float64 (C,), 0..10. candidates: C captions; references: for each those of its
        image, of which empty ones are ignored; a list that occurs several times is read once
        """
        vector, vectors = self.vector, {}
        for captions in references:
            if id(captions) not in vectors:
                vectors[id(captions)] = [vector(caption) for caption in captions if caption]
        pairs = zip(candidates, references)
        scores = [cider_d(vector(words), vectors[id(captions)]) for words, captions in pairs]
        return np.array(scores, dtype=np.float64)


# Top-5 accuracy


def top_k_correct(logits: torch.Tensor, targets: torch.Tensor, k: int = 5) -> torch.Tensor:
    """How many of the targets (W,) are among the k largest logits (W, V), as a 0-dim tensor"""
    return (logits.topk(min(k, logits.shape[1])).indices == targets.unsqueeze(1)).any(1).sum()
