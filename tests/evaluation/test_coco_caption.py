"""The PTB tokenizer and METEOR against pycocoevalcap's own calls; skipped without Java."""

import shutil

import numpy as np
import pytest
from factories import as_coco, caption_sets
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from evaluation import coco_caption
from evaluation.scores import measure, scores_by_image

pytestmark = pytest.mark.skipif(
    bool(coco_caption.java_missing()), reason=coco_caption.java_missing() or "-"
)


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
        part = sums[start : start + len(found)]
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


def test_meteor_runs_under_any_path_and_takes_any_token(tmp_path, monkeypatch):
    references, hypotheses = [[["a", "dog", "runs"]]], [["a", "dog", "ran"]]
    expected = coco_caption.meteor_sums(references, hypotheses)
    folder, odd = coco_caption._folder("meteor"), tmp_path / "a b%20é"
    shutil.copytree(folder, odd)
    monkeypatch.setattr(coco_caption, "_folder", lambda _: odd)
    np.testing.assert_array_equal(coco_caption.meteor_sums(references, hypotheses), expected)
    monkeypatch.undo()
    with_breaks = coco_caption.meteor_sums(
        [[["a", "dog\r\n", "\x85runs"]]], [["a\n", "dog", "ran"]]
    )
    np.testing.assert_array_equal(with_breaks, expected)


def test_why_meteor_fails_is_said(tmp_path, monkeypatch):
    (tmp_path / "meteor-1.5.jar").write_bytes(b"no jar")
    monkeypatch.setattr(coco_caption, "_folder", lambda _: tmp_path)
    with pytest.raises(coco_caption.JavaError, match="METEOR failed .*(jarfile|corrupt)"):
        coco_caption.meteor_sums([[["a"]]], [["a"]])


def test_spice_says_what_is_missing_or_gives_the_packages_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_caption, "_folder", lambda _: tmp_path)
    with pytest.raises(coco_caption.JavaError, match="models are missing; download them once with"):
        coco_caption.spice([[["a"]]], [["a"]])
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "stanford-corenlp-3.6.0-models.jar").touch()
    asked = []

    class Spice:
        def compute_score(self, references, captions):
            asked.append((references, captions))
            return 0.25, [{"All": {"f": 0.5}}, {"All": {"f": float("nan")}}]

    monkeypatch.setattr("pycocoevalcap.spice.spice.Spice", Spice)
    found = coco_caption.spice([[["a", "dog"], ["dogs"]], [["a", "cat"]]], [["a", "cow"], []])
    assert found.tolist() == [0.5, 0]
    assert asked == [({0: ["a dog", "dogs"], 1: ["a cat"]}, {0: ["a cow"], 1: [""]})]
