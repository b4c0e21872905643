"""
How good captions are: BLEU, ROUGE-L, CIDEr and CIDEr-D, top-5 accuracy, and where the attention
fell. Everything here is Python and NumPy; METEOR is in jars.py.
"""

import math
import warnings
from collections import Counter
from typing import NamedTuple

import numpy as np
from nltk.translate.bleu_score import corpus_bleu

WEIGHTS = [(1,), (1 / 2,) * 2, (1 / 3,) * 3, (1 / 4,) * 4]


def bleu(references, hypotheses):
    """
    Corpus BLEU-1 to BLEU-4 by NLTK, unsmoothed, 0..100.

    references: per image a list of captions, hypotheses: per image one caption; a caption is
    a list of words (or ids). Empty references count for nothing and are left out.
    """
    # [[]] where no reference is left: nothing matches it, and NLTK fails without any.
    references = [[caption for caption in captions if caption] or [[]] for captions in references]
    if not any(hypotheses):
        return [0.0] * 4  # NLTK divides by the length of all hypotheses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns where no n-gram matches; the 0 says it
        return [100 * value for value in corpus_bleu(references, hypotheses, weights=WEIGHTS)]


def ngrams(words, order=4):
    """How often each n-gram (a tuple) stands in a caption: Counters for n = 1..order."""
    return [Counter(zip(*(words[i:] for i in range(n)))) for n in range(1, order + 1)]


def bleu_counts(references, hypothesis):
    """
    What corpus BLEU sums over the images: matches (4), n-grams (4), length, closest length of a
    reference; float64 (10,).

    references: [(length, its `ngrams`)] of one image, none of them empty; hypothesis: words
    """
    matches, totals, size = [], [], len(hypothesis)
    for n, found in enumerate(ngrams(hypothesis)):
        matches.append(sum(min(count, max((grams[n][gram] for _, grams in references), default=0))
                           for gram, count in found.items()))
        totals.append(max(1, size - n))  # NLTK's way: a caption too short misses one n-gram
    closest = min((length for length, _ in references), default=0,
                  key=lambda length: (abs(length - size), length))
    return np.array([*matches, *totals, size, closest], dtype=np.float64)


def bleu_of_counts(counts, order):
    """BLEU-`order`, 0..100, of summed `bleu_counts` (..., 10); the same figure as `bleu`'s."""
    matches, totals = counts[..., :order], counts[..., 4:4 + order]
    size, closest = counts[..., 8], counts[..., 9]
    with np.errstate(divide="ignore", invalid="ignore"):  # log 0 where nothing matches
        penalty = np.minimum(0, 1 - closest / size)
        value = np.exp(penalty + np.log(matches / totals).mean(-1))
    return 100 * np.where(matches.min(-1) > 0, value, 0)


def common_length(a, b):
    """
    Length of the longest common subsequence of two lists of words. Bit i of `open_` is cleared
    where the subsequence grows at a[i] (Hyyrö 2004): one addition a word instead of a row.
    """
    places = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(a)) - 1
    open_ = every
    for word in b:
        met = open_ & places.get(word, 0)
        open_ = (open_ + met | open_ - met) & every
    return len(a) - open_.bit_count()


def rouge_l(references, hypothesis, beta=1.2):
    """
    ROUGE-L of one caption, 0..1, as coco-caption has it: F with recall weighted beta times, of
    the best precision and the best recall, which may come from different references.
    """
    if not hypothesis or not references:
        return 0.0
    common = [(common_length(hypothesis, words), len(words)) for words in references]
    precision = max(common)[0] / len(hypothesis)
    recall = max(length / size for length, size in common)
    if not recall:
        return 0.0
    return (1 + beta ** 2) * precision * recall / (recall + beta ** 2 * precision)


class Vector(NamedTuple):
    """A caption as CIDEr sees it."""
    weights: list  # for n = 1..4 a dictionary of n-gram -> term frequency x log(N / documents)
    norms: list  # their 4 Euclidean lengths
    length: int  # in words


class Cider:
    """
    CIDEr (Vedantam et al. 2015, equations 1 to 3), times 10 as its authors' code has it: the mean
    cosine between caption and reference, over n = 1..4 and the references. Words are compared as
    they stand; the paper stems them.

    documents: per image a list of captions, lists of words or of ids. Their document frequencies
    are fixed from here on. Raises ValueError if there are none.
    """

    def __init__(self, documents):
        if not len(documents):
            raise ValueError("CIDEr needs captions to count document frequencies in")
        found = Counter()
        for captions in documents:
            found.update({gram for caption in captions for counts in ngrams(caption)
                          for gram in counts})
        # What stands in one image weighs as much as what stands in none, so it need not be kept:
        # that is most n-grams.
        self._rare = math.log(len(documents))
        self._weight = {gram: self._rare - math.log(count) for gram, count in found.items()
                        if count > 1}

    def vector(self, caption):
        weights = [{gram: count * self._weight.get(gram, self._rare)
                    for gram, count in counts.items()} for counts in ngrams(caption)]
        norms = [math.sqrt(sum(x * x for x in part.values())) for part in weights]
        return Vector(weights, norms, len(caption))

    def prepare(self, captions):
        """The references of an image, ready for `score`: worth keeping if they come again."""
        return [self.vector(caption) for caption in captions if caption]

    def score(self, candidates, references):
        """
        candidates: C captions; references: for each the captions of its image, or what `prepare`
        made of them. A list that is given several times is prepared once.

        Returns float64 (C,), 0..10.
        """
        ready = {}
        for captions in references:
            if id(captions) not in ready:
                prepared = all(isinstance(caption, Vector) for caption in captions)
                ready[id(captions)] = captions if prepared else self.prepare(captions)
        return np.array([self.compare(self.vector(candidate), ready[id(captions)])
                         for candidate, captions in zip(candidates, references)], dtype=np.float64)

    def compare(self, candidate, references):
        """One caption's score, 0..10; all given as `Vector`"""
        if not references:
            return 0.0
        total = sum(self._similarity(candidate, reference) for reference in references)
        return 10 * total / 4 / len(references)

    def _similarity(self, a, b):
        """The sum of 4 cosines"""
        total = 0.0
        for x, y, norm_x, norm_y in zip(a.weights, b.weights, a.norms, b.norms):
            if norm_x and norm_y:
                total += sum(x[gram] * y[gram] for gram in x.keys() & y.keys()) / (norm_x * norm_y)
        return total


class CiderD(Cider):
    """
    CIDEr-D (the same paper, section 5.2 on): a word repeated gains nothing, since the caption's
    weights are clipped to the reference's, and lengths that differ cost (a Gaussian, sigma = 6
    words). What coco-caption prints as "CIDEr" is this. With the training set's captions as
    documents it is the reward of self-critical training.
    """

    SIGMA = 6.0

    def _similarity(self, a, b):
        total = 0.0
        for x, y, norm_x, norm_y in zip(a.weights, b.weights, a.norms, b.norms):
            if norm_x and norm_y:
                total += sum(min(x[gram], y[gram]) * y[gram]
                             for gram in x.keys() & y.keys()) / (norm_x * norm_y)
        return total * math.exp(-(a.length - b.length) ** 2 / (2 * self.SIGMA ** 2))


def top_k_correct(scores, targets, k=5):
    """How many of the targets (W,) are among the k best scores (W, V), as a 0-dim tensor."""
    return (scores.topk(min(k, scores.shape[1])).indices == targets.unsqueeze(1)).any(1).sum()


def attention_hits(words, alphas, objects, nouns, margin=0.0):
    """
    Attention accuracy of one caption: at each word that names an object, does the most
    attended place lie in that object's box?

    words: T words, alphas: (T, P) on a square grid over the image
    objects: [{"box": [left, top, right, bottom] as fractions of the image, "words": [...]}]
    nouns: all words that name objects in the data set; one that names nothing in this
    image is a miss.
    margin: how far beside the box the place may lie, as a fraction of the image

    Returns hits and object words, two counts.
    """
    hits = total = 0
    for word, alpha in zip(words, alphas):
        if word not in nouns:
            continue
        total += 1
        side = round(len(alpha) ** 0.5)
        row, column = divmod(int(np.argmax(alpha)), side)
        x, y = (column + 0.5) / side, (row + 0.5) / side
        hits += any(word in thing["words"]
                    and thing["box"][0] - margin <= x <= thing["box"][2] + margin
                    and thing["box"][1] - margin <= y <= thing["box"][3] + margin
                    for thing in objects)
    return hits, total
