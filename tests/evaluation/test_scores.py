"""All metrics from one call against pycocoevalcap's; bootstrap resamples against scoring anew."""

import numpy as np
import pytest
from factories import as_coco, caption_sets
from nltk.translate.bleu_score import corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from evaluation.scores import BLEU, NAMES, interval, measure, resample, scores_by_image


def test_500_caption_sets_score_as_pycocoevalcap_scores_them():
    """Its BLEU adds 1e-9 and 1e-15 against division by 0, which the 4 digits do not show."""
    for references, captions in caption_sets(500, 0):
        coco = as_coco(references, captions)
        [metrics], _ = measure([captions], references, [*BLEU, "ROUGE-L", "CIDEr", "CIDEr-D"])
        expected = dict(zip(BLEU, Bleu(4).compute_score(*coco, verbose=0)[0]))
        expected["ROUGE-L"], rouge = Rouge().compute_score(*coco)
        expected["CIDEr-D"], cider_d = Cider().compute_score(*coco)
        for name, value in expected.items():
            if name.startswith("BLEU") and not metrics[name].total:
                assert value < 1e-3, name  # its 0 is a root of 1e-15
                continue
            assert metrics[name].total / 100 == pytest.approx(value, abs=5e-5), name
        rows = scores_by_image(metrics, len(captions))
        assert [row["ROUGE-L"] for row in rows] == pytest.approx(100 * rouge, abs=1e-3)
        assert [row["CIDEr-D"] for row in rows] == pytest.approx(100 * cider_d, abs=1e-3)


def test_several_systems_are_measured_as_each_alone():
    [(references, captions)] = caption_sets(1, 9)
    names = [name for name in NAMES if name != "METEOR"]
    systems = [captions, [texts[0] for texts in references], [[] for _ in captions]]
    novel = [[i % 3 == k for i in range(len(captions))] for k in range(3)]
    together, missing = measure(systems, references, names, novel)
    assert missing == {}
    for metrics, system, flags in zip(together, systems, novel):
        [alone], _ = measure([system], references, names, [flags])
        assert [m.total for m in metrics.values()] == [m.total for m in alone.values()]
        assert metrics["unseen"].total == 100 * np.mean(flags) and [*metrics] == names


def test_captions_that_repeat_a_content_word_are_counted():
    texts = ["a bed and a bed", "a dog in the snow in a park", "", "two dogs chase a dog"]
    captions = [text.split() for text in texts]
    [metrics], _ = measure([captions], [[]] * 4, ["repeats"])
    assert metrics["repeats"].by_image.tolist() == [100, 0, 0, 0]
    assert metrics["repeats"].total == 25


def test_rouge_l_by_hand():
    # "a b c d": of "a c d e f" a subsequence of 3; of "b d" one of 2, which is all of it.
    # Precision 3/4 and recall 2/2 come from different references.
    expected = 100 * (1 + 1.44) * 0.75 * 1 / (1 + 1.44 * 0.75)
    references = [[list("acdef"), list("bd")], [], [["b"]], [["a"]]]
    [metrics], _ = measure([[list("abcd"), ["a"], ["a"], []]], references, ["ROUGE-L"])
    assert metrics["ROUGE-L"].by_image == pytest.approx([expected, 0, 0, 0])


@pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts")
def test_scores_of_an_image_are_those_of_the_image_alone():
    [(references, captions)] = caption_sets(1, 10)
    [metrics], _ = measure([captions], references, [*BLEU, "length"])
    weights = [(1 / n,) * n for n in (1, 2, 3, 4)]
    for row, texts, caption in zip(scores_by_image(metrics, len(captions)), references, captions):
        expected = corpus_bleu([texts], [caption], weights)
        assert [row[name] for name in BLEU] == pytest.approx(100 * np.array(expected), abs=1e-4)
        assert row["length"] == len(caption)
    assert scores_by_image({}, 2) == [{}, {}]  # of the vocabulary alone, say


def test_resamples_equal_scoring_their_images_again():
    random = np.random.default_rng(0)
    references = [[list(random.choice(list("abcd"), 8)) for _ in range(3)] for _ in range(6)]
    captions = [list(random.choice(list("abcd"), 7)) for _ in range(6)]
    names = [*BLEU, "ROUGE-L", "length"]
    [metrics], _ = measure([captions], references, names)
    found = resample(metrics, 150, seed=3)
    draws = np.random.default_rng(3)
    for k in range(150):
        drawn = draws.integers(6, size=6)
        [again], _ = measure([[captions[i] for i in drawn]], [references[i] for i in drawn], names)
        for name, metric in again.items():
            assert found[name][k] == pytest.approx(metric.total), name
    [metrics], _ = measure([[list("abcx")]], [[list("abcd")]], BLEU)
    assert metrics["BLEU-3"].total > 0 == metrics["BLEU-4"].total  # which ties
    assert resample(metrics, 3)["BLEU-4"].tolist() == [0, 0, 0]


def test_interval_of_a_mean_is_the_normal_one():
    random = np.random.default_rng(1)
    novel = random.random(2000) < 0.3
    captions = [["a"]] * 2000
    [metrics], _ = measure([captions], [[["a"]]] * 2000, ["unseen"], [novel])
    low, high = interval(resample(metrics, 4000)["unseen"])
    error = 1.96 * novel.std() / 2000**0.5
    assert [low, high] == pytest.approx(100 * (novel.mean() + np.array([-error, error])), abs=0.15)
