"""eval.py as a user runs it: every metric, intervals, comparing two files; nothing is trained."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import NAME, write_scenes
from PIL import Image

import eval as evaluation
from datasets import CaptionDataset
from evaluation import coco_caption as jars
from evaluation import report
from evaluation import scores as scorers
from evaluation.compare import compare
from evaluation.metrics import bleu
from utils import UserError
from visualization import page

ROOT = Path(__file__).resolve().parents[2]
# What the stand-in of the model says of the 8 test scenes, at every beam size.
SAID = "there is a red circle above a blue square"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 training, 2 validation and 8 test scenes"""
    return write_scenes(tmp_path_factory.mktemp("data"), 12, 2, 8)


@pytest.fixture
def spoken(data, monkeypatch):
    """eval.py with a model that says the same of every image: main(*options) -> printed lines"""
    def caption_split(encoder, decoder, word_map, data, nouns, args, processes):
        return [[{"words": SAID.split()[:i + 2], "score": -1.0, "hits": 1, "near": 2,
                  "object_words": 3, "attention": np.eye(196)[:i + 2]} for _ in args.beam_sizes]
                for i in range(len(data))]

    monkeypatch.setattr(evaluation, "caption_split", caption_split)
    monkeypatch.setattr(evaluation, "load_captioner", lambda *_: (None, None, {}, None))
    return ["--data_folder", str(data), "--model", "m.pth.tar", "--device", "cpu",
            "--beam_sizes", "1"]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(jars, "java_missing", lambda: "java is not in the PATH")


def write(path, rows):
    Path(path).write_text(json.dumps(rows))
    return str(path)


def result(image, caption="a red dog runs fast", references=("a red dog runs", "the dog sits")):
    return {"image_id": image, "filename": None, "caption": caption, "score": -1.0,
            "references": list(references)}


def test_without_metrics_the_table_is_bleu_of_the_data_sets_words(spoken, tmp_path, capsys, data):
    evaluation.main([*spoken, "--results", str(tmp_path / "r.json")])
    _, heading, row, *_ = capsys.readouterr().out.splitlines()
    assert heading == "beam  BLEU-1  BLEU-2  BLEU-3  BLEU-4          attention"
    rows = json.loads((tmp_path / "r.json").read_text())
    expected = bleu([[text.split() for text in row["references"]] for row in rows],
                    [row["caption"].split() for row in rows])
    assert row == "   1" + "".join(f"{value:8.2f}" for value in expected) + "   33.33 %  66.67 %"
    assert rows[0].keys() == {"image_id", "filename", "caption", "score", "references"}


def test_attention_accuracy_is_a_mean_over_words_and_a_dash_without_any():
    some, none = ({"hits": 1, "near": 2, "object_words": 4}, dict.fromkeys(
        ("hits", "near", "object_words"), 0))
    assert evaluation.attention([some, some, none]) == "25.00 %  50.00 %"
    assert evaluation.attention([none]) == "–"


def test_without_java_meteor_is_a_dash_and_the_rest_comes(spoken, no_java, tmp_path, capsys):
    evaluation.main([*spoken, "--metrics", "all", "--results", str(tmp_path / "r.json")])
    _, heading, row, *notes = capsys.readouterr().out.splitlines()
    assert heading.split()[1:-1] == list(scorers.NAMES)
    cells = dict(zip(heading.split(), row.split()))
    assert cells["METEOR"] == "–" and float(cells["CIDEr-D"]) > 0 and cells["vocabulary"] == "8"
    assert float(cells["length"]) == np.mean([min(i + 2, 9) for i in range(8)]).round(2)
    assert "METEOR: –, java is not in the PATH" in notes
    assert "tokens: the data set's, not PTB's: java is not in the PATH" in notes
    scores = [row["scores"] for row in json.loads((tmp_path / "r.json").read_text())]
    assert scores[0].keys() == set(scorers.NAMES) - {"METEOR", "vocabulary"}
    assert np.mean([s["CIDEr-D"] for s in scores]) == pytest.approx(float(cells["CIDEr-D"]),
                                                                    abs=0.01)


@pytest.mark.skipif(bool(jars.java_missing()), reason=jars.java_missing() or "-")
def test_with_java_words_are_ptbs_and_the_table_says_so(tmp_path, capsys):
    rows = [result(1, "a man's dog.", ["a man's dog, running", "!"])]
    a = write(tmp_path / "a.json", rows)
    evaluation.main(["--compare", a, a, "--metrics", "length", "vocabulary"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["vocabulary", "4"], ["length", "4.00"]]
    assert "tokens: PTB's, by pycocoevalcap's tokenizer" in lines


def test_unseen_counts_captions_that_no_training_image_has(spoken, data, capsys, no_java):
    training = json.loads((data / f"TRAIN_REFERENCES_{NAME}.json").read_text())
    known = {tuple(words) for entry in training for words in entry["references"]}
    evaluation.main([*spoken, "--metrics", "unseen"])
    row = capsys.readouterr().out.splitlines()[2].split()
    said = [tuple(SAID.split()[:i + 2]) for i in range(8)]
    assert float(row[1]) == 100 * np.mean([words not in known for words in said])


def test_unseen_is_a_dash_without_the_training_captions(spoken, data, capsys, no_java):
    file = data / f"TRAIN_REFERENCES_{NAME}.json"
    file.rename(data / "away")
    try:
        evaluation.main([*spoken, "--metrics", "unseen", "--bootstrap", "5"])
    finally:
        (data / "away").rename(file)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in rows[:3]] == [["1", "–"], ["low", "–"], ["high", "–"]]
    assert f"unseen: –, {data} has no TRAIN_REFERENCES file" in rows


def test_resamples_are_scored_as_if_their_images_were_scored_anew():
    random = np.random.default_rng(0)
    references = [[list(random.choice(list("abcd"), 8)) for _ in range(3)] for _ in range(6)]
    captions = [list(random.choice(list("abcd"), 7)) for _ in range(6)]
    [measured], _ = scorers.measure([captions], references, [*scorers.BLEU, "ROUGE-L", "length"])
    found = scorers.resample(measured, 150, seed=3)
    draws = np.random.default_rng(3)
    for k in range(150):
        drawn = draws.integers(6, size=6)
        again, _ = scorers.measure([[captions[i] for i in drawn]], [references[i] for i in drawn],
                                   [*scorers.BLEU, "ROUGE-L", "length"])
        for name, metric in again[0].items():
            assert found[name][k] == pytest.approx(metric.total), name


def test_interval_of_a_mean_is_the_normal_one():
    random = np.random.default_rng(1)
    unseen = random.random(2000) < 0.3
    captions = [["a"]] * 2000
    [measured], _ = scorers.measure([captions], [[["a"]]] * 2000, ["unseen"], [unseen])
    low, high = scorers.interval(scorers.resample(measured, 4000)["unseen"])
    error = 1.96 * unseen.std() / 2000 ** 0.5
    assert [low, high] == pytest.approx(100 * (unseen.mean() + np.array([-error, error])), abs=0.15)


def test_comparison_of_a_file_with_itself_is_a_tie(tmp_path, capsys, no_java):
    rows = [result(i, f"a {word} dog runs fast") for i, word in enumerate(["red", "big", "old"])]
    a, b = write(tmp_path / "a.json", rows), write(tmp_path / "b.json", rows[::-1])
    evaluation.main(["--compare", a, b])
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    for name in ("BLEU-1", "ROUGE-L", "CIDEr", "CIDEr-D", "length"):
        assert table[name][0] == table[name][1] and table[name][2:] == [
            "0.00", "0.00", "0.00", "50.0", "%"]
    assert table["vocabulary"] == ["7", "7", "0", "–", "–", "–"]


def test_comparison_pairs_the_images(tmp_path, capsys, no_java):
    """A is one word longer on every image, so no resample of the images differs."""
    b = [result(i, " ".join(["a"] * (i + 1))) for i in range(9)]
    a = [{**row, "caption": row["caption"] + " dog"} for row in b]
    compare(write(tmp_path / "a.json", a), write(tmp_path / "b.json", b[::-1]), ["length"])
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["length", "6.00", "5.00", "1.00", "1.00", "1.00", "100.0", "%"]


@pytest.mark.parametrize("rows, message", [
    ("[{", "broken JSON"),
    ([], "no list of captions"),
    ({"a": 1}, "no list of captions"),
    ([1], "entry 0: it is no object"),
    ([{"caption": "a", "references": []}], "no image_id"),
    ([{"image_id": [1], "caption": "a", "references": []}], "no image_id"),
    ([{"image_id": 1, "references": []}], "no caption"),
    ([{"image_id": 1, "caption": "a"}], "no references"),
    ([{"image_id": 1, "caption": "a", "references": [["a"]]}], "no references"),
    ([result(1), result(1)], "has image 1 twice"),
    ([result(2)], "different images: 1 is only in"),
    ([result(1, references=["a dog"])], "image 1 has other references"),
])
def test_files_that_cannot_be_compared_say_why(tmp_path, rows, message):
    good, bad = write(tmp_path / "good.json", [result(1)]), tmp_path / "bad.json"
    bad.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(UserError, match=message):
        compare(good, str(bad), ["BLEU-1"])


def test_unknown_metric_lists_the_valid_ones():
    found = subprocess.run([sys.executable, ROOT / "eval.py", "--metrics", "SPICE"],
                           capture_output=True, text=True, timeout=300)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert "unknown metric SPICE; valid ones: all, BLEU, BLEU-1" in found.stderr


@pytest.mark.parametrize("args, message", [
    (["--bootstrap", "0"], "--bootstrap is 0"),
    (["--seed", "-1"], "--seed is -1"),
    (["--compare", "none.json", "none.json"], "none.json not found; write it with eval.py"),
    (["--compare", "none.json"], "expected 2 arguments"),
    (["--compare", "a.json", "b.json", "--report", "r.html"], "leave --report and --results out"),
    (["--image_folder", "photos"], "--image_folder is for --report"),
])
def test_mistakes_are_the_users(args, message):
    with pytest.raises(UserError, match=message):
        evaluation.main(args)


def test_ptb_tokens_without_java_are_refused(spoken, no_java):
    with pytest.raises(UserError, match="--tokens ptb: java is not in the PATH"):
        evaluation.main([*spoken, "--tokens", "ptb"])


def test_names_are_taken_in_any_case_and_put_in_order():
    assert scorers.parse_names(["cider-d", "Bleu"]) == [*scorers.BLEU, "CIDEr-D"]
    assert scorers.parse_names(["ALL"]) == list(scorers.NAMES)


def test_the_report_shows_metrics_with_intervals_and_the_best_worst_and_random_images(
        spoken, tmp_path, capsys, data, no_java, monkeypatch):
    monkeypatch.setattr(report, "SHOWN", 3)
    options = [*spoken, "--beam_sizes", "1", "2", "--bootstrap", "50"]
    evaluation.main([*options, "--report", str(tmp_path / "r.html"),
                     "--results", str(tmp_path / "r.json")])
    printed = capsys.readouterr().out
    html = (tmp_path / "r.html").read_text()
    _, heading, one, low, high, *_ = printed.splitlines()
    names = heading.replace("ROUGE-L", "ROUGE_L").split()[1:-1]  # the last is attention
    cells = re.findall(r"<td>(.*?)<br><span class=\"sat-quiet\">(.*?)</span>", html)
    assert len(cells) == 2 * len(names)
    for (value, spread), a, b, c in zip(cells, one.split()[1:], low.split()[1:], high.split()[1:]):
        assert value == a and (spread == f"{b}–{c}" or spread == "" and b == "–")
    looked = [line.split()[-4:] for line in printed.splitlines() if re.match("   [12] ", line)]
    assert [cell.split() for cell in re.findall("<td>([0-9.% ]+)</td></tr>", html)] == looked
    assert len(looked) == 2 and 'scope="col">attention<' in html
    assert page.escape(evaluation.ATTENTION) in html
    scores = {row["filename"]: row["scores"]["CIDEr-D"]
              for row in json.loads((tmp_path / "r.json").read_text())}
    shown = re.findall(r'<article[^>]* aria-label="(.*?) · CIDEr-D (.*?)"', html)
    assert len(shown) == 9 and all(float(x) == pytest.approx(scores[name], abs=0.05)
                                   for name, x in shown)
    ranked = sorted(scores.values(), reverse=True)
    assert [scores[name] for name, _ in shown[:6]] == ranked[:3] + ranked[:-4:-1]
    assert len({name for name, _ in shown[6:]}) == 3
    assert html.count("5 references") == 9 and "captions, 5.5 on average" in html  # 2 to 9 words
    assert html.count("<title>") == 1 + 2 * max(10, 1 + max(
        len(words) for i in range(8) for words in CaptionDataset(
            data, NAME, "TEST").entry(i)["references"]))


def test_the_report_shows_the_photographs_themselves_if_told_where_they_are(
        spoken, tmp_path, data, no_java, monkeypatch):
    path = str(tmp_path / "r.html")
    evaluation.main([*spoken, "--report", path, "--bootstrap", "5"])
    assert set(re.findall("--ratio:([0-9.]+)", (tmp_path / "r.html").read_text())) == {"1.00000"}
    (tmp_path / "wide").mkdir()
    for picture in (data / "demo").glob("*.png"):
        Image.open(picture).resize((60, 30)).save(tmp_path / "wide" / picture.name)
    evaluation.main([*spoken, "--report", path, "--bootstrap", "5", "--image_folder",
                     str(tmp_path / "wide")])
    assert set(re.findall("--ratio:([0-9.]+)", (tmp_path / "r.html").read_text())) == {"2.00000"}
    monkeypatch.setattr(evaluation, "caption_split", None)  # said before any work
    with pytest.raises(UserError, match="demo_.*not found; pass the --image_folder of create_inpu"):
        evaluation.main([*spoken, "--report", path, "--image_folder", str(tmp_path)])
    with pytest.raises(UserError, match="--report r.txt is a web page; let its name end in .html"):
        evaluation.main([*spoken, "--report", "r.txt"])
    with pytest.raises(UserError, match="--report .* is a folder"):
        evaluation.main([*spoken, "--report", str(tmp_path)])
