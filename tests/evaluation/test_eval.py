"""eval.py as a user runs it, with a stand-in for the model: tables, results, mistakes."""

import json

import numpy as np
import pytest
from factories import NAME

import eval as eval_script
from evaluation import coco_caption
from evaluation.captions import ImageCaption, read_training_captions
from evaluation.metrics import bleu
from evaluation.scores import NAMES
from evaluation.table import attention_accuracy
from utils import UserError


def test_without_metrics_the_table_is_bleu_of_the_data_sets_words(stub_options, tmp_path, capsys):
    eval_script.main([*stub_options, "--results", str(tmp_path / "r.json")])
    _, heading, row, *_ = capsys.readouterr().out.splitlines()
    assert heading == "beam  BLEU-1  BLEU-2  BLEU-3  BLEU-4          attention"
    rows = json.loads((tmp_path / "r.json").read_text())
    expected = bleu(
        [[text.split() for text in row["references"]] for row in rows],
        [row["caption"].split() for row in rows],
    )
    assert row == "   1" + "".join(f"{value:8.2f}" for value in expected) + "   33.33 %  66.67 %"
    assert rows[0].keys() == {"image_id", "filename", "caption", "score", "references"}


def test_attention_accuracy_is_a_mean_over_words_and_a_dash_without_any():
    some = ImageCaption(["a"] * 4, score=-1.0, object_words=4, hits=1, near_hits=2)
    none = ImageCaption(["a"] * 4, score=-1.0, object_words=0, hits=0, near_hits=0)
    assert attention_accuracy([some, some, none]) == ("25.00 %", "50.00 %")
    assert attention_accuracy([none]) == ("–", "–")


def test_without_java_meteor_is_a_dash_and_other_metrics_are_computed(
    stub_options, no_java, tmp_path, capsys
):
    eval_script.main([*stub_options, "--metrics", "all", "--results", str(tmp_path / "r.json")])
    _, heading, row, *notes = capsys.readouterr().out.splitlines()
    assert heading.split()[1:-1] == list(NAMES)
    cells = dict(zip(heading.split(), row.split()))
    assert cells["METEOR"] == "–" and float(cells["CIDEr-D"]) > 0 and cells["vocabulary"] == "8"
    assert float(cells["length"]) == np.mean([min(i + 2, 9) for i in range(8)]).round(2)
    assert "METEOR: –, java is not in the PATH" in notes
    assert "tokens: the data set's, not PTB's: java is not in the PATH" in notes
    scores = [row["scores"] for row in json.loads((tmp_path / "r.json").read_text())]
    assert scores[0].keys() == set(NAMES) - {"METEOR", "vocabulary"}
    assert np.mean([s["CIDEr-D"] for s in scores]) == pytest.approx(
        float(cells["CIDEr-D"]), abs=0.01
    )


def test_meteor_has_no_interval(stub_options, tmp_path, capsys, no_java, monkeypatch):
    def meteor(references, systems):
        return [(0.25, [0.5] * len(references)) for _ in systems]

    monkeypatch.setattr(coco_caption, "meteor", meteor)
    metrics = ["--metrics", "METEOR", "length", "--bootstrap", "5"]
    files = {name: str(tmp_path / name) for name in ("r.json", "t.md", "r.html")}
    outputs = ["--results", files["r.json"], "--table", files["t.md"], "--report", files["r.html"]]
    eval_script.main([*stub_options, *metrics, *outputs])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in rows[:3]] == ["25.00", "–", "–"]
    assert json.loads((tmp_path / "r.json").read_text())[0]["scores"]["METEOR"] == 50
    assert "| 1 | 25.00 | 5.50 (" in (tmp_path / "t.md").read_text()
    assert '<td>25.00<br><span class="sat-quiet"></span></td>' in (tmp_path / "r.html").read_text()
    eval_script.main(["--compare", files["r.json"], files["r.json"], *metrics])
    line = capsys.readouterr().out.splitlines()[2]
    assert line.split() == ["METEOR", "25.00", "25.00", "0.00", "–", "–", "–"]


def test_unseen_counts_captions_that_no_training_image_has(
    stub_options, data, capsys, no_java, stub_captions
):
    training = json.loads((data / f"TRAIN_REFERENCES_{NAME}.json").read_text())
    known = {tuple(words) for entry in training for words in entry["references"]}
    eval_script.main([*stub_options, "--metrics", "unseen"])
    row = capsys.readouterr().out.splitlines()[2].split()
    assert float(row[1]) == 100 * np.mean(
        [tuple(caption.words) not in known for caption in stub_captions]
    )


def test_unseen_is_a_dash_without_the_training_captions(stub_options, data, capsys, no_java):
    file = data / f"TRAIN_REFERENCES_{NAME}.json"
    file.rename(data / "away")
    try:
        eval_script.main([*stub_options, "--metrics", "unseen", "--bootstrap", "5"])
    finally:
        (data / "away").rename(file)
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in rows[:3]] == [["1", "–"], ["low", "–"], ["high", "–"]]
    assert f"unseen: –, {data} has no TRAIN_REFERENCES file" in rows


@pytest.mark.parametrize(
    "args, message",
    [
        (["--metrics", "WER"], "unknown metric WER; valid ones: all, BLEU, BLEU-1, BLEU-2"),
        (["--bootstrap", "0"], "--bootstrap is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--workers", "-1"], "--workers is -1"),
        (["--beam_sizes", "3", "0"], "--beam_sizes is 0"),
        (["--batch_size", "0"], "--batch_size is 0"),
        (["--results", "nowhere/r.json"], "folder of --results nowhere/r.json does not exist"),
        (["--compare", "none.json", "none.json"], "none.json not found; write it with eval.py"),
        (["--compare", "none.json"], "expected 2 arguments"),
        (
            ["--compare", "a.json", "b.json", "--report", "r.html"],
            "leave --report and --results out",
        ),
        (["--image_folder", "photos"], "--image_folder is for --report"),
    ],
)
def test_contradicting_options_are_user_errors(args, message):
    with pytest.raises(UserError, match=message):
        eval_script.main(args)


def test_damaged_training_captions_are_named_with_the_next_step(tmp_path):
    assert read_training_captions(tmp_path, NAME) is None
    file = tmp_path / f"TRAIN_REFERENCES_{NAME}.json"
    for damaged in ("[1]", "3", '[{"words": []}]', '[{"references": [[[]]]}]'):
        file.write_text(damaged)
        with pytest.raises(UserError, match="TRAIN_REFERENCES.*run create_input_files.py again"):
            read_training_captions(tmp_path, NAME)


def test_ptb_tokens_without_java_are_refused(stub_options, no_java):
    with pytest.raises(UserError, match="--tokens ptb: java is not in the PATH"):
        eval_script.main([*stub_options, "--tokens", "ptb"])


def test_table_for_a_paper_holds_what_is_printed(stub_options, tmp_path, capsys, no_java):
    names = ["bleu", "length"]
    for suffix in ("md", "tex"):
        eval_script.main(
            [
                *stub_options,
                "--metrics",
                *names,
                "--bootstrap",
                "50",
                "--table",
                str(tmp_path / f"t.{suffix}"),
            ]
        )
    _, heading, row, low, high, *_ = capsys.readouterr().out.splitlines()
    values, lows, highs = row.split()[1:6], low.split()[1:6], high.split()[1:6]
    heading, rule, cells, empty, *notes = (tmp_path / "t.md").read_text().splitlines()
    assert heading == (
        "| beam | BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | length | attention | attention near |"
    )
    assert rule == "|" + "---|" * 8 and empty == ""
    assert (
        cells
        == "| 1 | "
        + " | ".join(f"{v} ({a}–{b})" for v, a, b in zip(values, lows, highs))
        + " | 33.33 % | 66.67 % |"
    )
    assert any("50 resamples" in note for note in notes)
    tex = (tmp_path / "t.tex").read_text().splitlines()
    assert tex[0] == "% needs \\usepackage{booktabs}" and "\\begin{tabular}{lrrrrrrr}" in tex
    [line] = [line for line in tex if line.startswith("1 & ")]
    assert (
        line
        == "1 & "
        + " & ".join(f"{v} {{\\scriptsize ({a}--{b})}}" for v, a, b in zip(values, lows, highs))
        + " & 33.33 \\% & 66.67 \\% \\\\"
    )
    with pytest.raises(UserError, match="must end in .tex or .md"):
        eval_script.main([*stub_options, "--table", "t.csv"])
