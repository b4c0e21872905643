"""Each metric against its definition, and against NLTK or pycocoevalcap; the counts by hand."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from nltk.translate.bleu_score import corpus_bleu, sentence_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider as PycocoCider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from evaluation import coco_caption as jars
from evaluation.metrics import (
    Cider,
    CiderD,
    attention_hits,
    bleu,
    common_length,
    rouge_l,
    top_k_correct,
)
from evaluation.scores import NAMES, measure, scores_by_image


def ngrams(words, n):
    return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def naive_bleu(references, hypotheses, order):
    """Papineni et al. 2002: clipped precisions, geometric mean, brevity penalty."""
    logs, length, closest = 0.0, 0, 0
    for n in range(1, order + 1):
        matched = total = 0
        for captions, hypothesis in zip(references, hypotheses):
            for gram, count in ngrams(hypothesis, n).items():
                matched += min(count, max(ngrams(caption, n)[gram] for caption in captions))
                total += count
        if not matched:
            return 0.0
        logs += math.log(matched / total) / order
    for captions, hypothesis in zip(references, hypotheses):
        size = len(hypothesis)
        length += size
        closest += min((abs(len(caption) - size), len(caption)) for caption in captions)[1]
    return 100 * math.exp(min(0.0, 1 - closest / length) + logs)


def random_corpus(rng):
    """Hypotheses of 4 words and more: NLTK counts a missed n-gram in each that is shorter."""
    def caption(low):
        return [rng.choice("abcd") for _ in range(rng.randint(low, 12))]

    images = range(rng.randint(1, 6))
    return ([[caption(1) for _ in range(rng.randint(1, 5))] for _ in images],
            [caption(4) for _ in images])


def test_bleu_of_an_example_by_hand():
    # 5 of 6 words (the second "the" is matched once too often: clipped to 1 by the reference),
    # 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; 6 words against 7.
    hypothesis = "the cat sat on the mat".split()
    reference = "a cat sat on the red mat".split()
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    penalty = math.exp(1 - 7 / 6)
    expected = [100 * penalty * math.prod(precisions[:n]) ** (1 / n) for n in (1, 2, 3, 4)]
    assert bleu([[reference]], [hypothesis]) == pytest.approx(expected)


def test_bleu_equals_nltk_with_its_default_weights():
    references, hypothesis = [list("abcdef"), list("abdefg")], list("abcdefg")
    assert bleu([references], [hypothesis])[3] == pytest.approx(
        100 * sentence_bleu(references, hypothesis))
    corpus = [references, [list("gfedcba")]], [hypothesis, list("gfedc")]
    assert bleu(*corpus)[3] == pytest.approx(100 * corpus_bleu(*corpus))


def test_bleu_equals_its_definition_on_random_corpora():
    rng = random.Random(0)
    for _ in range(200):
        references, hypotheses = random_corpus(rng)
        expected = [naive_bleu(references, hypotheses, n) for n in (1, 2, 3, 4)]
        assert bleu(references, hypotheses) == pytest.approx(expected, abs=1e-9)


def test_hypothesis_shorter_than_n_counts_as_one_missed_n_gram():
    """NLTK's way: 2 words have no quadruple, yet one is added to the denominator."""
    references, hypotheses = [[list("abcde")], [list("xy")]], [list("abcde"), list("xy")]
    assert bleu(references, hypotheses) == pytest.approx(
        [100, 100, 100 * (3 / 4) ** (1 / 3), 100 * (3 / 4 * 2 / 3) ** (1 / 4)])


def test_perfect_captions_score_100():
    references, _ = random_corpus(random.Random(1))
    references = [[caption * 4 for caption in captions] for captions in references]
    assert bleu(references, [captions[-1] for captions in references]) == pytest.approx([100] * 4)


def test_order_of_images_and_of_references_is_irrelevant():
    references, hypotheses = random_corpus(random.Random(7))
    turned = [captions[::-1] for captions in references[::-1]]
    assert bleu(turned, hypotheses[::-1]) == pytest.approx(bleu(references, hypotheses))


def test_word_ids_score_as_words_do():
    references, hypotheses = random_corpus(random.Random(3))
    ids = [[[ord(w) for w in c] for c in captions] for captions in references]
    assert bleu(ids, [[ord(w) for w in c] for c in hypotheses]) == bleu(references, hypotheses)


def test_empty_hypotheses_score_0():
    assert bleu([[["a"]], [["b"]]], [[], []]) == [0.0] * 4
    assert bleu([], []) == [0.0] * 4


def test_empty_references_count_for_nothing():
    hypothesis = list("abcde")
    assert bleu([[[], list("abcdf")]], [hypothesis]) == bleu([[list("abcdf")]], [hypothesis])


def test_image_without_references_matches_nothing():
    five = list("abcde")
    for empty in ([], [[]]):
        assert bleu([[five], empty], [five, five])[0] == pytest.approx(50)


# ROUGE-L, CIDEr and METEOR, against pycocoevalcap, hand counts and the paper's formulas.

WORDS = ("a a the the man men dog dogs puppy runs running ran on in street road quickly red two "
         "big ball boy boys child jumps near water grass white while").split()


def caption_sets(count, seed):
    """
    `count` sets of 2..5 images: references, and captions that share words with them or are one of
    them. Captions have 4 words and more: NLTK counts a missed n-gram in each that is shorter.
    """
    rng = random.Random(seed)

    def caption(low):
        return [rng.choice(WORDS) for _ in range(rng.randint(low, 10))]

    for _ in range(count):
        images = range(rng.randint(2, 5))
        references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in images]
        captions = [caption(4) for _ in images]
        for i in images:
            drawn = rng.choice(references[i])
            if len(drawn) > 3 and rng.random() < 0.4:
                captions[i] = drawn
        yield references, captions


def as_coco(references, captions):
    """As pycocoevalcap takes them"""
    return ({i: [" ".join(words) for words in texts] for i, texts in enumerate(references)},
            {i: [" ".join(words)] for i, words in enumerate(captions)})


def naive_cider(references, captions, sigma=None):
    """Vedantam et al. 2015 as they write it, times 10; CIDEr-D if sigma is given. float64 (N,)"""
    scores = []
    for own, caption in zip(references, captions):
        total = 0.0
        for n in (1, 2, 3, 4):
            everywhere = sorted({gram for texts in (*references, [caption]) for words in texts
                                 for gram in ngrams(words, n)})
            found = [sum(any(gram in ngrams(words, n) for words in texts) for texts in references)
                     for gram in everywhere]
            idf = np.log(len(references) / np.maximum(found, 1))

            def vector(words, everywhere=everywhere, n=n, idf=idf):
                counts = ngrams(words, n)
                return np.array([counts[gram] for gram in everywhere]) * idf

            g = vector(caption)
            for words in own:
                r = vector(words)
                length = np.linalg.norm(g) * np.linalg.norm(r)
                cosine = (g if sigma is None else np.minimum(g, r)) @ r / length if length else 0
                apart = len(caption) - len(words)
                total += cosine * (math.exp(-apart ** 2 / (2 * sigma ** 2)) if sigma else 1)
        scores.append(10 * total / 4 / len(own))
    return np.array(scores)


def test_500_caption_sets_score_as_pycocoevalcap_scores_them():
    """Its BLEU adds 1e-9 and 1e-15 against division by 0, which the 4 digits do not show."""
    for references, captions in caption_sets(500, 0):
        coco = as_coco(references, captions)
        [measured], _ = measure([captions], references, NAMES[:4] + NAMES[5:8])
        expected = dict(zip(NAMES[:4], Bleu(4).compute_score(*coco, verbose=0)[0]))
        expected["ROUGE-L"], rouge = Rouge().compute_score(*coco)
        expected["CIDEr-D"], cider_d = PycocoCider().compute_score(*coco)
        for name, value in expected.items():
            if name.startswith("BLEU") and not measured[name].total:
                assert value < 1e-3, name  # its 0 is a root of 1e-15
                continue
            assert measured[name].total / 100 == pytest.approx(value, abs=5e-5), name
        rows = scores_by_image(measured, len(captions))
        assert [row["ROUGE-L"] for row in rows] == pytest.approx(100 * rouge, abs=1e-3)
        assert [row["CIDEr-D"] for row in rows] == pytest.approx(100 * cider_d, abs=1e-3)


def test_cider_and_cider_d_are_the_papers():
    for references, captions in caption_sets(40, 1):
        for scorer, sigma in ((Cider, None), (CiderD, 6)):
            expected = naive_cider(references, captions, sigma)
            assert scorer(references).score(captions, references) == pytest.approx(expected)


def test_cider_by_hand():
    # log 2 weighs every n-gram alike, since each stands in one of two images. "a b" against
    # "a c": cosine 1/2 for words, 0 for pairs; triples and quadruples there are none.
    references = [[["a", "c"]], [["x", "y"]]]
    for scorer in (Cider, CiderD):
        assert scorer(references).score([["a", "b"]], references[:1]) == pytest.approx([10 / 8])


def test_cider_d_gains_nothing_from_a_word_repeated():
    references = [[["a", "c"]], [["x", "y"]]]
    plain, clipped = (scorer(references).score([["a"] * 8], references[:1])[0]
                      for scorer in (Cider, CiderD))
    assert plain == pytest.approx(10 / 4 / 2 ** 0.5)  # 8 / (8 * sqrt 2)
    assert clipped == pytest.approx(plain / 8 * math.exp(-(6 / 6) ** 2 / 2))


def test_document_frequencies_stay_those_of_the_training_captions():
    """pycocoevalcap counts in the set it scores: given the same set, the scores are the same."""
    [(training, _)] = caption_sets(1, 2)
    [(references, captions)] = caption_sets(1, 3)
    together = training + references
    counted = CiderD(together)
    filler = [texts[0] for texts in training]
    _, expected = PycocoCider().compute_score(*as_coco(together, filler + captions))
    assert counted.score(captions, references) == pytest.approx(expected[len(training):])


def test_prepared_references_and_word_ids_score_as_words_do():
    [(references, captions)] = caption_sets(1, 4)
    words = CiderD(references)
    expected = words.score(captions, references)
    prepared = [words.prepare(texts) for texts in references]
    assert words.score(captions, prepared).tolist() == expected.tolist()
    ids = [[[WORDS.index(w) for w in words] for words in texts] for texts in references]
    found = CiderD(ids).score([[WORDS.index(w) for w in words] for words in captions], ids)
    assert found == pytest.approx(expected)


def test_a_word_that_training_never_saw_weighs_most():
    scorer = CiderD([[["a", "b"]], [["a", "c"]], [["a", "d"]]])
    seen_often, unseen = scorer.score([["a"], ["z"]], [[["a", "z"]]] * 2)
    assert seen_often == 0 and unseen > 0


def test_empty_captions_and_references_score_0():
    scorer = CiderD([[["a"]], [["b"]]])
    assert scorer.score([[], ["a"], ["a"]], [[["a"]], [[]], []]).tolist() == [0, 0, 0]
    assert rouge_l([], ["a"]) == rouge_l([["a"]], []) == rouge_l([["b"]], ["a"]) == 0
    with pytest.raises(ValueError, match="needs captions"):
        Cider([])


def test_common_length_equals_the_table_method():
    rng = random.Random(5)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(0, 70))] for _ in range(2))
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, j in itertools.product(range(len(a)), range(len(b))):
            rows[i + 1][j + 1] = (rows[i][j] + 1 if a[i] == b[j]
                                  else max(rows[i][j + 1], rows[i + 1][j]))
        assert common_length(a, b) == rows[-1][-1]


def test_rouge_l_by_hand():
    # "a b c d": of "a c d e f" a subsequence of 3; of "b d" one of 2, which is all of it.
    # Precision 3/4 and recall 2/2 come from different references.
    expected = (1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75)
    assert rouge_l([list("acdef"), list("bd")], list("abcd")) == pytest.approx(expected)


def test_bleu_of_summed_counts_is_nltks():
    """With captions of any length, empty ones and empty references too."""
    rng = random.Random(6)
    for _ in range(200):
        images = range(rng.randint(1, 6))
        references = [[[rng.choice("abc") for _ in range(rng.randint(0, 9))]
                       for _ in range(rng.randint(1, 4))] for _ in images]
        captions = [[rng.choice("abc") for _ in range(rng.randint(0, 9))] for _ in images]
        [measured], _ = measure([captions], references, NAMES[:4])
        found = [metric.total for metric in measured.values()]
        assert found == pytest.approx(bleu(references, captions), abs=1e-9)


needs_java = pytest.mark.skipif(bool(jars.java_missing()), reason=jars.java_missing() or "-")


@needs_java
def test_meteor_of_500_caption_sets_is_pycocoevalcaps():
    meteor = Meteor()  # loads while ours works
    sets = list(caption_sets(500, 8))
    sets[0][1][0] = []
    sets[1] = sets[1][0], [texts[0] for texts in sets[1][0]]  # all as a reference is
    references, captions = (sum(part, []) for part in zip(*sets))
    firsts = [texts[0] for texts in references]  # a second system
    [measured, same], _ = measure([captions, firsts], references, ["METEOR"])
    n = len(firsts)
    assert scores_by_image({"METEOR": same["METEOR"]}, n) == [{"METEOR": 100}] * n
    assert scores_by_image({}, n) == [{}] * n  # of the vocabulary alone, say
    counts, start = measured["METEOR"].sums, 0
    for texts, found in sets:
        part = counts[start:start + len(found)]
        start += len(found)
        total, each = meteor.compute_score(*as_coco(texts, found))
        assert jars.meteor_of_counts(part.sum(0)) == pytest.approx(total, abs=1e-9)
        assert jars.meteor_of_counts(part) == pytest.approx(each, abs=1e-9)
    assert start == len(counts)


@needs_java
def test_tokens_are_pycocoevalcaps():
    texts = ["A man's dog, isn't it?", "", "T-shirt (red) \n & blue...", "café – naïve", "‘x’ 3.5"]
    expected = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert jars.tokenize(texts)[:2] == ["a man 's dog is n't it".split(), []]
    assert [[" ".join(words)] for words in jars.tokenize(texts)] == list(expected.values())


@needs_java
def test_tokens_do_not_depend_on_the_locale(monkeypatch):
    expected = jars.tokenize(["café"])
    monkeypatch.setenv("LC_ALL", "C")
    assert jars.tokenize(["café"]) == expected == [["café"]]


@needs_java
def test_a_java_that_fails_is_a_java_error(monkeypatch):
    monkeypatch.setattr(jars, "UTF8", ("-Xmx1x",))
    with pytest.raises(jars.JavaError, match="PTB tokenizer failed"):
        jars.tokenize(["a"])
    with pytest.raises(jars.JavaError, match="METEOR failed"):
        jars.meteor_counts([[["a"]]] * 500, [["a"]] * 500)


def test_top_k_correct_by_hand():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.3],
                           [0.8, 0.1, 0.2, 0.3],
                           [0.4, 0.3, 0.2, 0.1]])
    targets = torch.tensor([1, 3, 3])  # in places 1, 2 and 4
    assert [int(top_k_correct(scores, targets, k)) for k in (1, 2, 3, 4)] == [1, 2, 2, 3]


def test_top_5_of_fewer_than_5_words_is_always_correct():
    assert int(top_k_correct(torch.rand(3, 4), torch.tensor([0, 1, 3]))) == 3


LEFT_HALF = {"box": [0, 0, 0.5, 1], "words": ["cat", "kitten"]}


def looking_at(row, column, side=4):
    alpha = np.full((side, side), 0.01)
    alpha[row, column] = 0.5
    return alpha.ravel()


@pytest.mark.parametrize("row, column, hit", [(0, 0, 1), (3, 1, 1), (0, 2, 0), (3, 3, 0)])
def test_attention_hits_where_its_peak_lies_in_the_box(row, column, hit):
    alphas = np.stack([looking_at(3, 3), looking_at(row, column)])
    assert attention_hits(["a", "cat"], alphas, [LEFT_HALF], {"cat", "dog"}) == (hit, 1)


def test_rows_are_down_and_columns_across():
    wide = {"box": [0, 0.75, 1, 1], "words": ["road"]}  # not square: the lowest row of 4
    for cell, hit in {(3, 0): 1, (3, 3): 1, (2, 3): 0, (0, 3): 0}.items():
        assert attention_hits(["road"], looking_at(*cell)[None], [wide], {"road"}) == (hit, 1)


def test_centre_of_the_cell_decides_at_the_edge_of_a_box():
    # Column 1 of 4 spans 0.25..0.5, its centre is 0.375; an edge right there is inside.
    for right, hit in {0.37: 0, 0.375: 1, 0.38: 1}.items():
        thing = {"box": [0, 0, right, 1], "words": ["cat"]}
        assert attention_hits(["cat"], looking_at(0, 1)[None], [thing], {"cat"}) == (hit, 1)


@pytest.mark.parametrize("box", [[0, 0, 0.3, 1], [0.45, 0, 1, 1], [0, 0, 1, 0.3], [0, 0.45, 1, 1]])
def test_a_place_counts_as_far_beside_the_box_as_the_margin_says(box):
    # The cell's centre, (0.375, 0.375), is 0.075 away from each of the boxes.
    for margin, hit in {0: 0, 0.07: 0, 0.08: 1}.items():
        assert attention_hits(["cat"], looking_at(1, 1)[None], [{"box": box, "words": ["cat"]}],
                              {"cat"}, margin) == (hit, 1)


def test_word_that_names_nothing_here_is_a_miss():
    alphas = np.stack([looking_at(0, 0)] * 3)
    assert attention_hits(["dog", "kitten", "the"], alphas, [LEFT_HALF],
                          {"cat", "kitten", "dog"}) == (1, 2)


def test_any_object_of_the_name_will_do():
    right = {"box": [0.5, 0, 1, 1], "words": ["cat"]}
    assert attention_hits(["cat"], looking_at(2, 3)[None], [LEFT_HALF, right], {"cat"}) == (1, 1)


def test_caption_without_object_words_counts_nothing():
    assert attention_hits(["the"], looking_at(0, 0)[None], [LEFT_HALF], {"cat"}) == (0, 0)
    assert attention_hits([], np.zeros((0, 16)), [], {"cat"}) == (0, 0)
