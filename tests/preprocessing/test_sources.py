"""Several data sets joined into one."""

import json

import pytest
from factories import (
    contents,
    grey_of,
    karpathy_entry,
    write_input_files,
    write_karpathy,
)

import create_input_files as script
import eval as eval_script
from datasets import CaptionDataset
from preprocessing.input_files import create_input_files
from utils import UserError

NAME = "both_2_cap_per_img_1_min_word_freq"
DOGS = [
    karpathy_entry("0.png", captions=["a dog", "the dog"]),
    karpathy_entry("1.png", "val", ["a dog runs"]),
]
CATS = [
    karpathy_entry("0.png", captions=["a cat", "a cat sits"]),
    karpathy_entry("1.png", captions=["one cat"]),
    karpathy_entry("2.png", "val", ["a cat"]),
    karpathy_entry("3.png", "test", ["no cat"]),
]


def write_sources(folder, names=("dogs", "cats")):
    """The JSON files and image folders of DOGS and CATS."""
    paths = []
    for part, name, entries in zip(("one", "two"), names, (DOGS, CATS)):
        path = write_karpathy(folder / part, entries)
        path.write_text(json.dumps({"images": entries, "dataset": name}))
        paths.append(str(path))
    return paths, [str(folder / part / "images") for part in ("one", "two")]


def join(folder, paths, folders, **options):
    create_input_files("both", paths, folders, 2, 1, str(folder / "out"), workers=0, **options)

    def read(kind):
        return json.loads((folder / f"out/{kind}_{NAME}.json").read_text())

    return read


def test_joined_files_are_those_of_the_parts_one_after_the_other(tmp_path):
    read = join(tmp_path, *write_sources(tmp_path))
    # In training captions: dog and the: 2 and 1; a 3, cat 3, sits and one 1.
    assert list(read("WORDMAP")) == ["<pad>", "a", "dog", "cat", "<unk>", "<start>", "<end>"]
    references = read("TRAIN_REFERENCES")
    assert [(entry["source"], entry["filename"]) for entry in references] == [
        ("dogs", "0.png"),
        ("cats", "0.png"),
        ("cats", "1.png"),
    ]
    assert [entry["references"][0] for entry in references] == [
        ["a", "dog"],
        ["a", "cat"],
        ["one", "cat"],
    ]
    assert [entry["source"] for entry in read("VAL_REFERENCES")] == ["dogs", "cats"]
    assert [entry["source"] for entry in read("TEST_REFERENCES")] == ["cats"]
    data = CaptionDataset(tmp_path / "out", NAME, "TRAIN")
    assert [int(data[i][0][0, 0, 0]) for i in range(3)] == [grey_of(0), grey_of(0), grey_of(1)]
    assert data.lengths.view(3, 2).gt(1).sum(1).tolist() == [2, 2, 1]


def test_a_single_source_in_a_list_gives_the_same_bytes(tmp_path):
    write_input_files(tmp_path, CATS)
    path, folder = str(tmp_path / "dataset.json"), str(tmp_path / "images")
    create_input_files(
        "x",
        [path],
        [folder],
        output_folder=str(tmp_path / "list"),
        min_word_freq=0,
        captions_per_image=2,
        max_len=4,
        workers=0,
    )
    assert contents(tmp_path / "list") == contents(tmp_path / "out")
    assert all(
        "source" not in entry
        for entry in json.loads(next((tmp_path / "out").glob("TRAIN_REFERENCES*")).read_text())
    )


def test_one_folder_can_hold_the_images_of_all(tmp_path):
    write_karpathy(tmp_path, DOGS + CATS[2:])
    paths = [tmp_path / f"{name}.json" for name in ("first", "second")]
    for path, entries in zip(paths, (DOGS, CATS[2:])):
        path.write_text(json.dumps({"images": [entry | {"split": "train"} for entry in entries]}))
    read = join(tmp_path, list(map(str, paths)), str(tmp_path / "images"))
    assert [entry["source"] for entry in read("TRAIN_REFERENCES")] == [
        "first",
        "first",
        "second",
        "second",
    ]  # named after the files


def test_sources_of_one_name_are_numbered(tmp_path):
    read = join(tmp_path, *write_sources(tmp_path, ("pets", "pets")))
    assert [entry["source"] for entry in read("VAL_REFERENCES")] == ["pets_1", "pets_2"]


def test_an_image_of_two_sources_and_a_wrong_number_of_folders_are_refused(tmp_path):
    paths, folders = write_sources(tmp_path)
    with pytest.raises(UserError, match=r"images/0.png is in .*one.* and in .*two.*; leave one"):
        join(tmp_path, paths, folders[:1])
    with pytest.raises(UserError, match="2 files of captions, but 3 image folders; pass a folder"):
        join(tmp_path, paths, [*folders, folders[0]])


def test_the_script_joins_too(tmp_path, monkeypatch, capsys):
    paths, folders = write_sources(tmp_path)
    monkeypatch.setattr(
        "sys.argv",
        [
            "x",
            "--dataset",
            "both",
            "--karpathy_json",
            *paths,
            "--image_folder",
            *folders,
            "--captions_per_image",
            "2",
            "--min_word_freq",
            "1",
            "--output_folder",
            str(tmp_path / "out"),
            "--workers",
            "0",
        ],
    )
    script.main()
    assert "TRAIN: 3 images" in capsys.readouterr().out
    for name, animal in (("a", "dog"), ("b", "cat")):
        (tmp_path / f"{name}.csv").write_text(
            "image,caption,split\n"
            + "".join(
                f"{name}{i}.png,a {animal},{split}\n"
                for i, split in enumerate(("train", "val", "test"))
            )
        )
        for i in range(3):
            (tmp_path / f"one/images/{name}{i}.png").write_bytes(
                (tmp_path / "one/images/0.png").read_bytes()
            )
    monkeypatch.setattr(
        "sys.argv",
        [
            "x",
            "--dataset",
            "own",
            "--captions",
            str(tmp_path / "a.csv"),
            str(tmp_path / "b.csv"),
            "--image_folder",
            folders[0],
            "--output_folder",
            str(tmp_path / "own"),
            "--workers",
            "0",
            "--min_word_freq",
            "0",
        ],
    )
    script.main()
    assert "TRAIN: 2 images" in capsys.readouterr().out


def test_a_split_without_images_can_be_opened(tmp_path):
    write_input_files(tmp_path, CATS[:3])
    data = CaptionDataset(tmp_path / "out", "x_2_cap_per_img_0_min_word_freq", "TEST")
    assert len(data) == 0 and data.entries == []
    with pytest.raises(UserError, match="has no images; choose the other --split"):
        eval_script.main(["--data_folder", str(tmp_path / "out"), "--device", "cpu"])
