"""Comparing two files of --results, as `eval.py --compare` does."""

import json

import pytest

import eval as eval_script
from evaluation import coco_caption
from utils import UserError


def write(path, rows):
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return str(path)


def result(image, caption="a red dog runs fast", references=("a red dog runs", "the dog sits")):
    row = {"image_id": image, "filename": None, "caption": caption, "score": -1.0}
    return row | {"references": list(references)}


def test_comparison_pairs_the_images(tmp_path, capsys, no_java):
    """A is one word longer on every image, so no resample of the images differs."""
    b = [result(i, " ".join(["a"] * (i + 1))) for i in range(9)]
    a = [{**row, "caption": row["caption"] + " dog"} for row in b]
    a, b = write(tmp_path / "a_b.json", a), write(tmp_path / "b.json", b[::-1])
    table = tmp_path / "t.md"
    eval_script.main(["--compare", a, b, "--table", str(table)])
    printed = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert printed["length"][1:] == ["6.00", "5.00", "1.00", "1.00", "1.00", "100.0", "%"]
    assert printed["BLEU-4"][1:] == ["0.00"] * 5 + ["50.0", "%"]  # ties
    assert printed["vocabulary"][1:] == ["2", "1", "1", "–", "–", "–"]
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert rows[0] == ["metric", "A", "B", "A - B", "low", "high", "A higher"] and len(rows) == 11
    for name, *cells in rows[1:]:
        assert " ".join(cells).split() == printed[name][1:]


@pytest.mark.skipif(bool(coco_caption.java_missing()), reason=coco_caption.java_missing() or "-")
def test_with_java_tokens_are_from_the_ptb_tokenizer_and_the_table_says_so(tmp_path, capsys):
    rows = [result(1, "a man's dog.", ["a man's dog, running", "!"])]
    a = write(tmp_path / "a.json", rows)
    eval_script.main(["--compare", a, a, "--metrics", "length", "vocabulary"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["vocabulary", "4"], ["length", "4.00"]]
    assert "tokens: PTB's, by pycocoevalcap's tokenizer" in lines


def test_files_that_cannot_be_compared_say_why(tmp_path):
    without_references = [{"image_id": 1, "caption": "a"}]
    for rows, message in (
        ("[{", "bad.json.*broken JSON"),
        *((rows, "bad.json is not a list") for rows in ([], {"a": 1}, 3, without_references)),
        ([result(1), result(1)], "bad.json has image 1 twice"),
        ([result(1, "a \ud800")], "bad.json: image 1 has half a surrogate pair"),
        ([result(1, references=["\ud800"])], "bad.json: image 1 has half a surrogate pair"),
        ([result("\ud800")], "bad.json: image .ud800 has half a surrogate pair"),
        ([result(2)], "different images: 1 is only in .*good.json"),
        ([result(1, references=["a dog"])], "image 1 has other references"),
    ):
        good, bad = write(tmp_path / "good.json", [result(1)]), write(tmp_path / "bad.json", rows)
        with pytest.raises(UserError, match=message):
            eval_script.main(["--compare", good, bad])
