"""eval.py on a data set that was joined from two: rows for each source and for all."""

import json

import numpy as np
import pytest
from factories import karpathy_entry, write_karpathy

import eval as eval_script
from evaluation.captions import ImageCaption
from evaluation.metrics import CiderD, bleu
from preprocessing.input_files import create_input_files
from utils import UserError

CAPTIONS = {
    "street": ["a red bus on a wet street", "a dog runs in a park", "two men sit at a table"],
    "kitchen": ["a white oven in a small kitchen", "a bowl of red apples"],
}
FOUND = [
    "a red bus on a street",
    "a dog runs in the park",
    "two men eat",
    "a white oven in a kitchen",
    "a bowl of apples",
]


@pytest.fixture
def joined(tmp_path):
    """The data folder of a joined data set, whose two sources have the same image ids."""
    paths, folders = [], []
    for source, captions in CAPTIONS.items():
        folder = tmp_path / source
        entries = [
            karpathy_entry(f"{source}{i}.png", split, [caption, caption + " today"])
            for split in ("train", "val", "test")
            for i, caption in enumerate(captions)
        ]
        for i, entry in enumerate(entries):
            entry["filename"], entry["imgid"] = f"{i}.png", i + 10 - len(entries)
        path = write_karpathy(folder, entries)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": source}))
        paths.append(str(path))
        folders.append(str(folder / "images"))
    create_input_files("both", paths, folders, 2, 0, str(tmp_path / "data"), workers=0)
    return tmp_path / "data"


def run(joined, monkeypatch, *options):
    captions = [ImageCaption(words.split(), -1.0, 0, 0, 0) for words in FOUND]
    monkeypatch.setattr(eval_script, "load_captioner", lambda *_: None)
    monkeypatch.setattr(
        eval_script,
        "caption_split",
        lambda model, data, args, processes: [captions for _ in args.beam_sizes],
    )
    eval_script.main(
        [
            "--data_folder",
            str(joined),
            "--model",
            "m.pth.tar",
            "--device",
            "cpu",
            "--tokens",
            "data",
            "--metrics",
            "BLEU",
            "CIDEr-D",
            *options,
        ]
    )


def test_each_source_has_a_row_equal_to_its_images_alone(joined, monkeypatch, capsys, tmp_path):
    run(joined, monkeypatch, "--beam_sizes", "1", "3", "--results", str(tmp_path / "r.json"))
    _, heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["beam", "source"]
    assert [row.split()[:2] for row in rows[:6]] == [
        [beam, source] for beam in "13" for source in ("street", "kitchen", "all")
    ]
    found = iter(FOUND)
    pairs = {
        source: [
            ([words.split() for words in (caption, caption + " today")], next(found).split())
            for caption in captions
        ]
        for source, captions in CAPTIONS.items()
    }
    pairs["all"] = [pair for part in pairs.values() for pair in part]
    for row, part in zip(rows, pairs.values()):
        references, captions = zip(*part)
        expected = [
            *bleu(references, captions),
            100 * CiderD(references).score(captions, references).mean(),
        ]
        assert row.split()[2:] == [f"{value:.2f}" for value in expected]
    results = json.loads((tmp_path / "r.json").read_text())
    assert [row["source"] for row in results] == ["street"] * 3 + ["kitchen"] * 2
    assert len({row["image_id"] for row in results}) == 3  # ids alone clash


def test_results_of_joined_sources_are_compared_image_by_image(
    joined, monkeypatch, capsys, tmp_path
):
    path = str(tmp_path / "r.json")
    run(joined, monkeypatch, "--beam_sizes", "1", "--results", path)
    capsys.readouterr()
    eval_script.main(["--compare", path, path, "--tokens", "data", "--metrics", "BLEU-1"])
    assert "5 images" in capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(UserError, match="has image street 7 twice"):
        eval_script.main(["--compare", path, path])


def test_the_report_has_the_same_rows_and_says_where_an_image_is_from(
    joined, monkeypatch, tmp_path
):
    original = ImageCaption.__new__

    monkeypatch.setattr(
        ImageCaption,
        "__new__",
        lambda cls, words, *rest: original(cls, words, *rest, attention=np.eye(196)[: len(words)]),
    )
    run(
        joined,
        monkeypatch,
        "--beam_sizes",
        "3",
        "--report",
        str(tmp_path / "r.html"),
        "--bootstrap",
        "5",
    )
    text = (tmp_path / "r.html").read_text()
    for row in ("3 street", "3 kitchen", "3"):
        assert f'<th scope="row">{row}</th>' in text
    assert "0.png · kitchen ·" in text or "4.png · kitchen ·" in text
