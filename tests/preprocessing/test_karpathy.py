"""What is not in Karpathy's format is refused with one line that names the place."""

import json
import zipfile

import pytest
from factories import ONE_PER_SPLIT, refused, write_input_files
from factories import karpathy_entry as entry

from preprocessing.input_files import create_input_files
from preprocessing.karpathy import read_karpathy
from utils import UserError, write_json


def create(path):
    folder = path.parent / "images"
    folder.mkdir(exist_ok=True)
    create_input_files("x", path, folder, max_len=4, output_folder=path.parent / "out")


def test_wrong_entry_is_refused_by_name(tmp_path):
    path, foreign = tmp_path / "dataset.json", "image 0, a.png: not in Karpathy's format"
    box = [0, 0, 1]
    for change, message in [
        ({"split": "dev"}, "no image to train on"),
        ({"split": ["train"]}, foreign),
        ({"filename": "../a.png"}, "../a.png is not inside the image folder"),
        ({"sentences": []}, "no image to train on"),
        ({"sentences": [{"tokens": "a b c d e".split()}]}, "no image to train on"),
        ({"sentences": None}, foreign),
        ({"sentences": [{"raw": "x"}]}, foreign),
        *(({"sentences": [{"tokens": tokens}]}, wrong) for tokens, wrong in (
            ("a dog", foreign), (["a", None], foreign), (["\ud800"], foreign),
            (["a", "<end>", "dog"], "a.png: a caption has <end>"),
        )),
        *(({"objects": [obj]}, foreign) for obj in (
            {"box": box, "words": []}, {"box": [*box, "1"], "words": []}, {"box": [*box, 1]},
            {"box": [*box, 1], "words": "dog"}, {"box": [*box, 1], "words": [5]},
        )),
        ({"filename": 5}, "image 0, 5: not in Karpathy's format"),
        ({"filename": ""}, "not found"),
        ({"filename": "a\0.png"}, "not found"),
        ({"filepath": ["a"]}, foreign),
    ]:  # fmt: skip
        write_json(path, {"images": [entry("a.png") | change]})
        with pytest.raises(UserError) as error:
            create(path)
        assert message in str(error.value)
        assert not (tmp_path / "out").exists()


def test_images_of_other_splits_and_marks_around_tokens_are_left_out_and_counted(tmp_path, capsys):
    captions = "<start> a dog <end>", "startseq a dog endseq", "start a dog end", "a dog </s> <pad>"
    others = [entry("e.png", "extra"), entry("f.png", "dev"), entry("g.png", "extra")]
    read = write_input_files(tmp_path, [*others, *ONE_PER_SPLIT, entry("h.png", "train", captions)])
    *one, last = read("TRAIN_REFERENCES")
    assert [e["filename"] for e in one] == ["a.png", "d.png"] and last["filename"] == "h.png"
    found = [" ".join(words) for words in last["references"]]
    assert found == ["a dog", "a dog", "start a dog end", "a dog"]
    out, source = capsys.readouterr().out, f"{tmp_path / 'dataset.json'}: "
    assert f"{source}marks such as <start> and <end> removed from 3 captions\n" in out
    assert out.count(f"{source}3 images left out, of split 'extra', 'dev', not train, ") == 1


def test_wrong_file_is_refused_by_name(tmp_path):
    path = tmp_path / "dataset.json"
    for content, message in [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "7" * 5000 + "}", "broken JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": {}}', "--captions"),
        ('{"images": ["a.png"]}', "image 0: not in Karpathy's format"),
        (json.dumps({"images": [entry("a.png"), entry("a.png")]}), "a.png occurs twice"),
        (json.dumps({"images": [entry("a.png", "val")]}), "no image to train on"),
    ]:
        path.write_text(content)
        refused(path, message, load=create)
    refused(tmp_path, "Is a directory", load=lambda path: create_input_files("x", path, path))


def test_karpathys_zip_is_read_as_it_is_downloaded(tmp_path):
    path = tmp_path / "caption_datasets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("coco", "flickr8k"):
            archive.writestr(f"dataset_{name}.json", json.dumps({"images": [], "dataset": name}))
    assert read_karpathy(path, "coco") == {"images": [], "dataset": "coco"}
    refused(path, "--dataset, one of: coco, flickr8k", load=lambda path: read_karpathy(path, "x"))
    path.write_bytes(b"PK\x03\x04")
    refused(path, "cannot be read", load=lambda path: read_karpathy(path, "coco"))
    path.unlink()
    refused(path, "not found", load=lambda path: read_karpathy(path, "coco"))
