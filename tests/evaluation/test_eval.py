"""eval.py as a user runs it, with a stand-in for the model: tables, results, sources, mistakes."""

import json

import numpy as np
import pytest
from factories import NAME

import eval as eval_script
from evaluation import coco_caption
from evaluation.captions import ImageCaption
from evaluation.metrics import CiderD, bleu
from evaluation.objects import COLUMNS
from evaluation.scores import NAMES
from utils import UserError


def test_without_metrics_the_table_is_bleu_of_the_data_sets_words(
    evaluate, summary, tmp_path, capsys
):
    evaluate("--results", tmp_path / "r.json")
    out, phases = capsys.readouterr()
    _, heading, row, *_ = out.splitlines()
    words = ("captioning 8 images ...", "captioning 8 images took", "scoring ...", "scoring took")
    assert all(map(str.startswith, phases.splitlines(), words)) and phases.count("\n") == 4
    assert heading.split() == ["beam", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", *COLUMNS]
    rows = json.loads((tmp_path / "r.json").read_text())
    references = [[text.split() for text in row["references"]] for row in rows]
    expected = bleu(references, [row["caption"].split() for row in rows])
    assert row.split() == ["1", *(f"{value:.2f}" for value in expected), *summary]
    assert len(row) == len(heading)
    assert rows[0].keys() == {"image_id", "filename", "caption", "score", "references"}


def test_without_java_meteor_is_a_dash_and_other_metrics_are_computed(
    evaluate, data, stub_captions, tmp_path, capsys
):
    evaluate("--metrics", "all", "--results", tmp_path / "r.json")
    _, heading, row, *notes = capsys.readouterr().out.splitlines()
    assert heading.split()[1:] == [*NAMES, *COLUMNS]
    cells = dict(zip(heading.split(), row.split()))
    assert cells["METEOR"] == "–" and float(cells["CIDEr-D"]) > 0 and cells["vocabulary"] == "8"
    assert float(cells["length"]) == np.mean([min(i + 2, 9) for i in range(8)]).round(2)
    assert "METEOR: –, java is not in the PATH" in notes
    assert "tokens: the data set's, not PTB's: java is not in the PATH" in notes
    scores = [row["scores"] for row in json.loads((tmp_path / "r.json").read_text())]
    assert scores[0].keys() == set(NAMES) - {"METEOR", "vocabulary"}
    for name in ("CIDEr-D", "ROUGE-L", "unseen"):
        mean = np.mean([s[name] for s in scores])
        assert mean == pytest.approx(float(cells[name]), abs=0.01)
    training = json.loads((data / f"TRAIN_REFERENCES_{NAME}.json").read_text())
    known = [words for entry in training for words in entry["references"]]
    assert [s["unseen"] for s in scores] == [100 * (c.words not in known) for c in stub_captions]


def test_meteor_has_no_interval(evaluate, tmp_path, capsys, monkeypatch):
    def meteor(references, systems):
        return [(0.25, [0.5] * len(references)) for _ in systems]

    monkeypatch.setattr(coco_caption, "meteor", meteor)
    metrics = ["--metrics", "METEOR", "length", "--bootstrap", "5"]
    results, table, report = (tmp_path / name for name in ("r.json", "t.md", "r.html"))
    evaluate(*metrics, "--results", results, "--table", table, "--report", report)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in rows[:3]] == ["25.00", "–", "–"]
    assert json.loads(results.read_text())[0]["scores"]["METEOR"] == 50
    assert "| 1 | 25.00 | 5.50 (" in table.read_text()
    assert '<td>25.00<br><span class="sat-quiet"></span></td>' in report.read_text()
    eval_script.main(["--compare", str(results), str(results), *metrics])
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["METEOR", "25.00", "25.00", "0.00", "–", "–", "–"]


def test_unseen_is_a_dash_without_the_training_captions(evaluate, data, tmp_path, capsys):
    for file in data.iterdir():
        if not file.name.startswith("TRAIN_"):
            (tmp_path / file.name).symlink_to(file)
    evaluate("--metrics", "Unseen", "--bootstrap", "5", data=tmp_path)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in rows[:3]] == [["1", "–"], ["low", "–"], ["high", "–"]]
    assert f"unseen: –, {tmp_path} has no TRAIN_REFERENCES file" in rows
    for damaged in ("[1]", "3", '[{"words": []}]', '[{"references": [[[]]]}]'):
        (tmp_path / f"TRAIN_REFERENCES_{NAME}.json").write_text(damaged)
        with pytest.raises(UserError, match="TRAIN_REFERENCES.*run create_input_files.py again"):
            evaluate("--metrics", "unseen", data=tmp_path)
    with pytest.raises(UserError, match="--tokens ptb: java is not in the PATH"):
        evaluate("--tokens", "ptb")
    path = tmp_path / "instances.json"
    path.write_text('{"images": [], "categories": [], "annotations": []}')
    with pytest.raises(UserError, match="instances.json has no boxes of this data set's images"):
        evaluate("--boxes", path)
    with pytest.raises(UserError, match="--compare .*--boxes"):
        evaluate("--compare", "a.json", "b.json", "--boxes", path)


def test_table_for_a_paper_holds_what_is_printed(evaluate, summary, tmp_path, capsys):
    for name in ("t.md", "t.tex"):
        options = ["--metrics", "bleu", "length", "--bootstrap", "50"]
        evaluate(*options, "--table", tmp_path / name)
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = list(zip(*(line.split()[1:6] for line in lines[:3])))  # (value, low, high)
    heading, rule, row, _, *notes = (tmp_path / "t.md").read_text().splitlines()
    names = [*"beam BLEU-1 BLEU-2 BLEU-3 BLEU-4 length".split(), *COLUMNS]
    assert heading == f"| {' | '.join(names)} |" and rule == "|" + "---|" * 14
    texts = " | ".join(f"{value} ({low}–{high})" for value, low, high in cells)
    assert row == f"| 1 | {texts} | {' | '.join(summary)} |"
    assert any("50 resamples" in note for note in notes)
    tex = (tmp_path / "t.tex").read_text().splitlines()
    assert f"\\begin{{tabular}}{{l{'r' * 13}}}" in tex
    [line] = [line for line in tex if line.startswith("1 & ")]
    texts = " & ".join(f"{value} {{\\scriptsize ({low}--{high})}}" for value, low, high in cells)
    assert line == f"1 & {texts} & {' & '.join(summary)} \\\\"


def test_each_source_has_a_row_equal_to_its_images_alone(joined, evaluate, capsys, tmp_path):
    texts = ["a red bus on a street", "a dog runs in the park", "two men eat"]
    texts += ["a white oven in a kitchen", "a bowl of apples"]
    captions = [ImageCaption(text.split(), -1.0, []) for text in texts]
    # At beam size 1 the first word is missing.
    first = [caption._replace(words=caption.words[1:]) for caption in captions]
    last = [caption._replace(attention=np.eye(196)[: len(caption.words)]) for caption in captions]
    path = str(tmp_path / "r.json")
    options = "--tokens data --metrics BLEU CIDEr-D --beam_sizes 1 3 --bootstrap 5".split()
    outputs = ["--results", path, "--report", tmp_path / "r.html"]
    evaluate(*options, *outputs, data=joined, by_beam=[first, last])
    _, heading, *rows = capsys.readouterr().out.splitlines()
    rows = rows[: 6 * 3 : 3]  # without those of the intervals
    assert heading.split()[:2] == ["beam", "source"]
    sources = [[beam, source] for beam in "13" for source in ("street", "kitchen", "all")]
    assert [row.split()[:2] for row in rows] == sources
    results = json.loads((tmp_path / "r.json").read_text())
    assert [row["source"] for row in results] == ["street"] * 3 + ["kitchen"] * 2
    assert len({row["image_id"] for row in results}) == 3  # ids alone clash
    parts = (results[:3], results[3:], results)
    for k, row in enumerate(rows):
        references = [[text.split() for text in one["references"]] for one in parts[k % 3]]
        words = [one["caption"].split()[k < 3 :] for one in parts[k % 3]]
        cider_d = 100 * CiderD(references).score(words, references).mean()
        expected = [*bleu(references, words), cider_d]
        assert row.split()[2:] == [f"{value:.2f}" for value in expected]
    html = (tmp_path / "r.html").read_text()
    assert all(f'<th scope="row">{label}</th>' in html for label in ("3 street", "3 kitchen", "3"))
    assert ".png · kitchen · CIDEr-D" in html
    compared = ["--compare", path, path, "--tokens", "data", "--metrics", "CIDEr-D"]
    eval_script.main(compared)
    title, _, line, *_ = capsys.readouterr().out.splitlines()
    assert "5 images" in title and line.split()[1] == rows[-1].split()[-1]
    (tmp_path / "r.json").write_text(json.dumps([*results, results[0]]))
    with pytest.raises(UserError, match="r.json has image street 7 twice"):
        eval_script.main(compared)
