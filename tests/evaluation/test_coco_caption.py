"""The PTB tokenizer and METEOR against pycocoevalcap's own calls; skipped without Java."""

import pytest
from factories import as_coco, caption_sets
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from evaluation import coco_caption
from evaluation.scores import measure, scores_by_image

pytestmark = pytest.mark.skipif(bool(coco_caption.java_missing()),
                                reason=coco_caption.java_missing() or "-")


def test_meteor_of_500_caption_sets_equals_pycocoevalcap():
    meteor = Meteor()  # loads while ours works
    sets = list(caption_sets(500, 8))
    sets[0][1][0] = []
    sets[1] = sets[1][0], [texts[0] for texts in sets[1][0]]  # all as a reference is
    references, captions = (sum(part, []) for part in zip(*sets))
    firsts = [texts[0] for texts in references]  # a second system
    [measured, same], _ = measure([captions, firsts], references, ["METEOR"])
    n = len(firsts)
    assert scores_by_image({"METEOR": same["METEOR"]}, n) == [{"METEOR": 100}] * n
    sums, start = measured["METEOR"].sums, 0
    for texts, found in sets:
        part = sums[start:start + len(found)]
        start += len(found)
        total, each = meteor.compute_score(*as_coco(texts, found))
        assert coco_caption.meteor_from_sums(part.sum(0)) == pytest.approx(total, abs=1e-9)
        assert coco_caption.meteor_from_sums(part) == pytest.approx(each, abs=1e-9)
    assert start == len(sums)


def test_tokens_equal_pycocoevalcap():
    texts = ["A man's dog, isn't it?", "", "T-shirt (red) \n & blue...", "café – naïve", "‘x’ 3.5"]
    expected = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    assert coco_caption.tokenize(texts)[:2] == ["a man 's dog is n't it".split(), []]
    assert [[" ".join(words)] for words in coco_caption.tokenize(texts)] == list(expected.values())


def test_tokens_do_not_depend_on_the_locale(monkeypatch):
    expected = coco_caption.tokenize(["café"])
    monkeypatch.setenv("LC_ALL", "C")
    assert coco_caption.tokenize(["café"]) == expected == [["café"]]


def test_a_java_that_fails_is_a_java_error(monkeypatch):
    monkeypatch.setattr(coco_caption, "UTF8", ("-Xmx1x",))
    with pytest.raises(coco_caption.JavaError, match="PTB tokenizer failed"):
        coco_caption.tokenize(["a"])
    with pytest.raises(coco_caption.JavaError, match="METEOR failed"):
        coco_caption.meteor_sums([[["a"]]] * 500, [["a"]] * 500)
