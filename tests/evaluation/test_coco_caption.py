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


@pytest.mark.slow
def test_meteor_equals_pycocoevalcap():
    meteor = Meteor()  # loads while ours works
    sets = list(caption_sets(40, 8))
    sets[0][1][0] = []
    sets[2][0][0], sets[2][1][0] = [["a", "dog's", "ball-like", "u.s."]], ["a", "dog", "'s", "us"]
    sets[1] = sets[1][0], [texts[0] for texts in sets[1][0]]  # all as a reference is
    references, captions = (sum(part, []) for part in zip(*sets))
    firsts = [texts[0] for texts in references]  # a second system
    [measured, same], _ = measure([captions, firsts], references, ["METEOR"])
    n = len(firsts)
    assert scores_by_image({"METEOR": same["METEOR"]}, n) == [{"METEOR": 100}] * n
    total, each = meteor.compute_score(*as_coco(references, captions))
    assert measured["METEOR"].total == pytest.approx(100 * total)
    assert measured["METEOR"].by_image == pytest.approx(100 * np.array(each))


def test_tokens_equal_pycocoevalcap_in_any_locale(monkeypatch):
    texts = ["A man's dog, isn't it?", "", "T-shirt (red) \n & blue...", "café – naïve", "‘x’ 3.5"]
    expected = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    monkeypatch.setenv("LC_ALL", "C")
    assert [[" ".join(words)] for words in coco_caption.tokenize(texts)] == list(expected.values())
    assert coco_caption.tokenize(["a \ud800 dog"]) == [["a", "dog"]]


@pytest.mark.slow  # loads METEOR's paraphrases twice
def test_meteor_runs_under_any_path_and_takes_any_token(tmp_path, monkeypatch):
    references, hypotheses = [[["a", "dog", "runs"]]], [["a", "dog", "ran"]]
    expected = coco_caption.meteor(references, [hypotheses])
    assert 0 < expected[0][0] < 1
    odd = tmp_path / "a b%20é"
    shutil.copytree(coco_caption.program_folder("meteor"), odd)
    monkeypatch.setattr(coco_caption, "program_folder", lambda _: odd)
    with_breaks = [[["a", "dog\r\n", "\x85runs"]]], [[["a\n", "dog", "ran", "|||"]]]
    assert coco_caption.meteor(*with_breaks) == expected


def test_a_java_that_fails_is_a_java_error_that_says_why(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(coco_caption, "UTF8", ("-Xmx1x",))
        with pytest.raises(coco_caption.JavaError, match="PTB tokenizer failed"):
            coco_caption.tokenize(["a"])
        with pytest.raises(coco_caption.JavaError, match="METEOR failed"):
            coco_caption.meteor([[["a"]]] * 500, [[["a"]] * 500])
    (tmp_path / "meteor-1.5.jar").write_bytes(b"no jar")
    monkeypatch.setattr(coco_caption, "program_folder", lambda _: tmp_path)
    with pytest.raises(coco_caption.JavaError, match="METEOR failed .*(jarfile|corrupt)"):
        coco_caption.meteor([[["a"]]], [[["a"]]])
