"""What is not in Karpathy's format is refused with one line that names the place."""

import json
import zipfile

import pytest
from factories import karpathy_entry as entry

from preprocessing.input_files import create_input_files
from preprocessing.karpathy import read_karpathy
from preprocessing.own_captions import read_captions
from utils import UserError, write_json


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a.png", "dev")], r"split 'dev' of a\.png is not one of train, restval, val, test"),
        ([entry("a.png"), entry("a.png")], r"a\.png occurs twice"),
        ([entry("../a.png")], r"\.\./a\.png is not inside the image folder"),
        ([entry("a.png", captions=["the <end>"])], r"a\.png: a caption has <end>"),
        ([entry("a.png", "val")], "no image to train on"),
        ([entry("a.png", captions=["a b c d e"])], "no image to train on"),
        ([entry("a.png") | {"sentences": []}], "no image to train on"),
        ([entry("a.png") | {"sentences": None}], "image 0, a.png .* list of tokens"),
        ([entry("a.png") | {"sentences": [{"raw": "x"}]}], "image 0, a.png .* list of tokens"),
        ([entry("a.png") | {"sentences": [{"tokens": "a dog"}]}], "a.png .* list of tokens"),
        ([entry("a.png") | {"sentences": [{"tokens": [7]}]}], "a.png: 7 among the tokens"),
        ([entry("a.png") | {"sentences": [{"tokens": ["a", None]}]}], "a.png: None among"),
        ([entry("a.png") | {"sentences": [{"tokens": [["a"]]}]}], r"a.png: \['a'\] among"),
        ([entry("a.png") | {"sentences": [{"tokens": ["\ud800"]}]}], r"'\\ud800' among"),
        ([entry("a.png") | {"split": ["train"]}], r"split \['train'\] of a.png"),
        (["a.png"], "image 0 .* list of tokens"),
    ],
)
def test_wrong_data_set_is_refused_by_name(tmp_path, entries, message):
    write_json(tmp_path / "dataset.json", {"images": entries})
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=message):
        create_input_files("x", tmp_path / "dataset.json", tmp_path / "images", max_len=4,
                           output_folder=tmp_path / "out")  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["filename", "filepath"])
@pytest.mark.parametrize("name", [None, 5, ["a.png"], "", "a\0.png", "a\ud800.png", "\udc80.png"])
def test_invalid_file_name_is_refused(tmp_path, key, name):
    if (key, name) == ("filepath", ""):
        return
    write_json(tmp_path / "dataset.json", {"images": [entry("a.png") | {key: name}]})
    with pytest.raises(UserError, match=rf"dataset.json: image 0: {key} .* not a file name"):
        create_input_files("x", tmp_path / "dataset.json", tmp_path, output_folder=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "7" * 5000 + "}", "broken JSON"),
        ("[]", "has no list 'images'"),
        ('{"images": {}}', "has no list 'images'"),
    ],
)
def test_json_of_another_kind_is_refused(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match="dataset.json.*" + message):
        create_input_files("x", tmp_path / "dataset.json", tmp_path, output_folder=tmp_path / "o")


def test_folder_in_place_of_a_json_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        create_input_files("x", tmp_path, tmp_path)
    with pytest.raises(UserError, match="has no captions: none of its files is a .txt"):
        read_captions(tmp_path)


def test_karpathys_zip_is_read_as_it_is_downloaded(tmp_path):
    content = {
        "images": [
            {"filename": "a.png", "split": "train", "sentences": [{"tokens": ["a", "dog"]}] * 5}
        ]
    }
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as archive:
        for name in ("coco", "flickr8k"):
            archive.writestr(f"dataset_{name}.json", json.dumps({**content, "dataset": name}))
    assert read_karpathy(tmp_path / "caption_datasets.zip", "coco")["dataset"] == "coco"
    with pytest.raises(UserError, match="no dataset_x.json; pass --dataset, one of: coco, flick"):
        read_karpathy(tmp_path / "caption_datasets.zip", "x")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="broken.zip cannot be read"):
        read_karpathy(tmp_path / "broken.zip", "coco")
