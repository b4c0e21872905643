"""BLEU, CIDEr and the accuracies against their definitions, NLTK, pycocoevalcap and by hand."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from factories import CAPTION_WORDS, as_coco, caption_sets
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.cider.cider import Cider as PycocoCider

from evaluation.metrics import CiderD, TfIdf, bleu, cider, cider_d, top_k_correct


def count_ngrams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def naive_bleu(references, hypotheses, order):
    """Papineni et al. 2002: clipped precisions, geometric mean, brevity penalty."""
    logs, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        matched = total = 0
        for captions, hypothesis in zip(references, hypotheses):
            for gram, count in count_ngrams(hypothesis, n).items():
                matched += min(count, max(count_ngrams(caption, n)[gram] for caption in captions))
                total += count
        if not matched:
            return 0.0
        logs += math.log(matched / total) / order
    for captions, hypothesis in zip(references, hypotheses):
        size = len(hypothesis)
        length += size
        closest += min((abs(len(caption) - size), len(caption)) for caption in captions)[1]
    return 100 * math.exp(min(0.0, 1 - closest / length) + logs)


def test_bleu_equals_its_definition_on_random_corpora():
    for references, hypotheses in caption_sets(200, 11):
        expected = [naive_bleu(references, hypotheses, n) for n in (1, 2, 3, 4)]
        assert bleu(references, hypotheses) == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts")
def test_bleu_equals_nltk_for_captions_of_any_length():
    """Empty captions and references, and images without references, too."""
    rng = random.Random(6)
    weights = [(1 / n,) * n for n in (1, 2, 3, 4)]

    def captions(number):
        return [[rng.choice("abc") for _ in range(rng.randint(0, 9))] for _ in range(number)]

    for _ in range(300):
        hypotheses = captions(rng.randint(0, 6))
        references = [captions(rng.randint(0, 4)) for _ in hypotheses]
        given = [[words for words in texts if words] or [[]] for texts in references]
        expected = corpus_bleu(given, hypotheses, weights) if any(hypotheses) else np.zeros(4)
        # abs=0, since 1e-75 differs from 0 and from 2e-75
        expected = pytest.approx(100 * np.array(expected), rel=1e-9, abs=0)
        assert bleu(references, hypotheses) == expected


def naive_cider(references, captions, sigma=None):
    """Vedantam et al. 2015 as they write it, times 10; CIDEr-D if sigma is given. float64 (N,)"""
    scores = np.zeros(len(captions))
    for n in (1, 2, 3, 4):
        documents = [
            {gram for words in own for gram in count_ngrams(words, n)} for own in references
        ]
        grams = sorted(set().union(*documents, *(count_ngrams(words, n) for words in captions)))
        found = [sum(gram in document for document in documents) for gram in grams]
        idf = np.log(len(references) / np.maximum(found, 1))

        def vector(words, n=n, grams=grams, idf=idf):
            counts = count_ngrams(words, n)
            return np.array([counts[gram] for gram in grams]) * idf

        for i, (own, caption) in enumerate(zip(references, captions)):
            g = vector(caption)
            for words in own:
                r = vector(words)
                length = np.linalg.norm(g) * np.linalg.norm(r)
                cosine = (g if sigma is None else np.minimum(g, r)) @ r / length if length else 0
                apart = len(caption) - len(words)
                cosine *= math.exp(-(apart**2) / (2 * sigma**2)) if sigma else 1
                scores[i] += 10 * cosine / 4 / len(own)
    return scores


def test_cider_and_cider_d_equal_the_definition_in_the_paper():
    for references, captions in caption_sets(40, 1):
        vector = TfIdf(references).vector
        for function, sigma in ((cider, None), (cider_d, 6)):
            expected = naive_cider(references, captions, sigma)
            pairs = zip(captions, references)
            found = [function(vector(words), list(map(vector, texts))) for words, texts in pairs]
            assert found == pytest.approx(expected)
        assert CiderD(references).score(captions, references) == pytest.approx(expected)


def test_document_frequencies_stay_those_of_the_training_captions():
    """pycocoevalcap counts in the set it scores: given the same set, the scores are the same."""
    [(training, _)] = caption_sets(1, 2)
    [(references, captions)] = caption_sets(1, 3)
    together = training + references
    counted = CiderD(together)
    filler = [texts[0] for texts in training]
    _, expected = PycocoCider().compute_score(*as_coco(together, filler + captions))
    assert counted.score(captions, references) == pytest.approx(expected[len(training) :])


def test_cider_d_of_ids_is_that_of_words_and_0_without_words_or_references():
    [(references, captions)] = caption_sets(1, 5)
    expected = CiderD(references).score(captions, references[:1] * len(captions))
    ids = [[[CAPTION_WORDS.index(w) for w in words] for words in texts] for texts in references]
    captions = [[CAPTION_WORDS.index(w) for w in words] for words in captions]
    own = [*ids[0], []]  # one list for all captions, which is read once
    assert CiderD(ids).score(captions, [own] * len(captions)) == pytest.approx(expected)
    scorer = CiderD([[["a"]], [["b"]]])
    assert scorer.score([[], ["a"], ["a"]], [[["a"]], [[]], []]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="needs captions"):
        TfIdf([])


def test_top_k_correct_by_hand():
    logits = torch.tensor([[0.1, 0.9, 0.5, 0.3], [0.8, 0.1, 0.2, 0.3], [0.4, 0.3, 0.2, 0.1]])
    targets = torch.tensor([1, 3, 3])  # of rank 1, 2 and 4
    assert [int(top_k_correct(logits, targets, k)) for k in (1, 2, 3, 4)] == [1, 2, 2, 3]
    assert int(top_k_correct(logits, targets)) == 3  # of fewer than 5 words each is among 5
    assert int(top_k_correct(torch.arange(7.0).repeat(2, 1), torch.tensor([1, 2]))) == 1
