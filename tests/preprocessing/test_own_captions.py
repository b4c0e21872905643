"""Captions of one's own, in every format that is recognised."""

import gzip
import json
import sys
import unicodedata
from pathlib import Path

import pytest
from factories import karpathy_entry as entry
from factories import refused
from factories import write_karpathy as prepare
from hypothesis import given
from hypothesis import strategies as st

from create_input_files import find_captions, get_args, main
from preprocessing.own_captions import read_captions, read_sentences, split_words
from utils import UserError, read_json, write_json

CAPTIONS = [
    ("a.jpg", "A man's dog, running."), ("b.jpg", "Two dogs"),
    ("a.jpg", "A t-shirt | 3 \"dogs\""), ("b.jpg", "Dogs!"),
]  # fmt: skip


FORMATS = {
    "csv": 'image,caption\na.jpg,"A man\'s dog, running."\nb.jpg,Two dogs\n'
    'a.jpg,"A t-shirt | 3 ""dogs"""\nb.jpg,Dogs!\n',
    "kaggle, commas unquoted": "image,caption\na.jpg,A man's dog, running.\nb.jpg,Two dogs\n"
    'a.jpg,A t-shirt | 3 "dogs"\nb.jpg,Dogs!\n',
    "columns turned round": '\ufeffText;File_Name\r\n"A man\'s dog, running.";a.jpg\r\n'
    'Two dogs;b.jpg\r\n"A t-shirt | 3 ""dogs""";a.jpg\r\nDogs!;b.jpg\r\n',
    "no header": "a.jpg,A man's dog, running.\nb.jpg,Two dogs\n"
    'a.jpg,A t-shirt | 3 "dogs"\nb.jpg,Dogs!\n',
    "tsv": "file\tsentence\n" + "".join(f"{image}\t{text}\n" for image, text in CAPTIONS),
    "results.csv": "image_name| comment_number| comment\n"
    + "".join(f"{image}| 0| {text}\n" for image, text in CAPTIONS)
    + "b.jpg| 4   A dog runs .\n",
    "tokens": "".join(f"{image}#{i}\t{text}\n" for i, (image, text) in enumerate(CAPTIONS)),
    "json lines": "".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in CAPTIONS),
    "json lists": json.dumps([
        {"filename": "a.jpg", "captions": [CAPTIONS[0][1], CAPTIONS[2][1]]},
        {"filename": "b.jpg", "captions": [CAPTIONS[1][1], CAPTIONS[3][1]]},
    ]),
    "coco": json.dumps({
        "images": [{"id": 5, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}],
        "annotations": [{"image_id": {"a": 4, "b": 5}[i[0]], "caption": c} for i, c in CAPTIONS],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_karpathy_form(tmp_path, name):
    path = tmp_path / "captions.any"
    path.write_text(FORMATS[name], encoding="utf-8", newline="")
    a, b = read_captions(path, val_fraction=0, test_fraction=0)["images"]
    assert (a["filename"], b["filename"]) == ("a.jpg", "b.jpg")
    assert [s["tokens"] for s in a["sentences"]] == [
        ["a", "man", "s", "dog", "running"], ["a", "t", "shirt", "3", "dogs"]
    ]  # fmt: skip
    assert [s["tokens"] for s in b["sentences"]] == [["two", "dogs"], ["dogs"]]
    assert a["split"] == "train" and a.get("cocoid") == (4 if name == "coco" else None)


def read_text_as_captions(tmp_path, text, **options):
    path = tmp_path / "captions.any"
    path.write_text(text, encoding="utf-8")
    return read_captions(path, **options)["images"]


def test_split_column_is_kept(tmp_path):
    text = "image,split,caption\na.jpg,val,x\nb.jpg,train,y\na.jpg,val,z\n"
    images = read_text_as_captions(tmp_path, text)
    assert [image["split"] for image in images] == ["val", "train"]


def test_images_not_captions_are_drawn_into_splits_whatever_their_order(tmp_path):
    lines = [f"{i}.jpg,caption {k}\n" for i in range(50) for k in range(3)]
    images = read_text_as_captions(tmp_path, "".join(lines), test_fraction=0.2)
    splits = [image["split"] for image in images]
    assert [splits.count(s) for s in ("train", "val", "test")] == [35, 5, 10]
    by_name = {image["filename"]: image["split"] for image in images}
    turned = read_text_as_captions(tmp_path, "".join(lines[::-1]), test_fraction=0.2)
    assert by_name == {image["filename"]: image["split"] for image in turned}
    other = read_text_as_captions(tmp_path, "".join(lines), test_fraction=0.2, seed=1)
    assert by_name != {image["filename"]: image["split"] for image in other}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("some prose\nand more\n", "not recognised; expected"),
        ("picture,words\na.jpg,x\n", "not recognised; expected"),
        ('image,caption\na.jpg,"never closed\nb.jpg,x\n', "quotation mark"),
        ("image,split,caption\na.jpg,val,x\na.jpg,test,x\n", "a.jpg is in val and in test"),
        ("image,split,caption\na.jpg,val,x\nb.jpg,,x\n", "b.jpg has no split"),
        ("caption\timage\nx\ta.jpg\ty\n", "line 2: 3 columns, not 2"),
        ('{"image": "a.jpg", "caption": "x"}\n{"image": }\n', "line 2: broken JSON"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "entry 1 lacks"),
        ('{"images": [\n{"id": 1,}], "annotations": []}', "line 2: broken JSON"),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "has the id 3"),
        ('{"images": [{"id": 3}], "annotations": [{"image_id": 3}]}', "COCO's format"),
        ('{"images": [{"filename": "a.jpg"}]}', "--karpathy_json"),
        ("a.jpg#0\tx\nb.jpg\ty\n", "line 2 is not name.jpg#0"),
        (
            '[{"image_id": 1, "filename": "a.jpg", "caption": "x", "score": -1, "references": []}]',
            "eval.py --results; training needs captions written by",
        ),
        ("[" * 100_000, "nested too deeply"),
        ('[{"image": ' + "7" * 5000 + "}]", "broken JSON"),
    ],
)
def test_unrecognised_captions_are_refused_with_the_line(tmp_path, text, message):
    with pytest.raises(UserError, match="captions.any.*" + message):
        read_text_as_captions(tmp_path, text)


def test_words_of_other_scripts_are_not_split():
    assert split_words("“Ein Käse”—हिन्दी, at&t") == ["ein", "käse", "हिन्दी", "at", "t"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Calls create_input_files.py in a folder with images/0.png to 9.png."""
    prepare(tmp_path, [entry(f"{i}.png") for i in range(10)])
    monkeypatch.chdir(tmp_path)

    def call(*options):
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "create_input_files.py",
                "--image_folder",
                "images",
                "--min_word_freq",
                "0",
                "--workers",
                "1",
                *options,
            ],
        )
        main()

    return call


def test_script_makes_the_files_of_own_captions(script, capsys):
    Path("mine.csv").write_text("".join(f"{i}.png,A dog.\n" for i in range(10)))
    script("--dataset", "mine", "--captions", "mine.csv")
    references = read_json("data/TRAIN_REFERENCES_mine_5_cap_per_img_0_min_word_freq.json")
    assert len(references) == 8 and references[0]["references"] == [["a", "dog"]]
    assert "TRAIN: 8 images, 8 captions, filled up to 40" in capsys.readouterr().out


def test_own_captions_without_validation_images_give_a_warning(script, capsys):
    Path("mine.csv").write_text("0.png,A dog.\n")
    script("--captions", "mine.csv")
    assert capsys.readouterr().err.splitlines()[:2] == [
        "warning: mine.csv has no val images, which training needs",
        "warning: mine.csv has no test images, which evaluation needs",
    ]


def test_fractions_that_leave_no_training_images_are_refused(script):
    Path("mine.csv").write_text("0.png,A dog.\n")
    with pytest.raises(UserError, match="--val_fraction 0.5 and --test_fraction 0.5 .*below 1"):
        script("--captions", "mine.csv", "--val_fraction", "0.5", "--test_fraction", "0.5")


def test_sentences_are_the_captions_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("1\tA dog.\n2\tTwo cats\n1\tthe Dog\n\na line\twith a tab\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"1\tein Hund\nA line, alone\n"))
    assert read_sentences([str(tmp_path / "a.txt"), str(tmp_path / "b.txt.gz")]) == [
        ["a", "dog"],
        ["two", "cats"],
        ["the", "dog"],
        ["with", "a", "tab"],
        ["ein", "hund"],
        ["a", "line", "alone"],
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.txt", None, "not found"),
        ("x.txt.gz", None, "not found"),
        ("x.txt", b"\n \n", "no captions"),
        ("x.txt", b"a \xff", "is not UTF-8 text"),
        ("x.txt.gz", gzip.compress(b"a \xff", mtime=0), "is not UTF-8 text"),
        ("x.txt.gz", b"not gzip", "cannot be read"),
        ("x.txt.gz", gzip.compress(b"abc" * 99, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_text_that_cannot_be_read_is_a_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    refused(path, message, load=lambda path: read_sentences([str(path)]))


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_split_as_unicode_is(text):
    separated = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text.lower())
    assert split_words(text) == separated.split()
    assert split_words(text + " é") == [*separated.split(), "é"]


def read_file(tmp_path, name, text, **options):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return {
        image["filename"]: [" ".join(s["tokens"]) for s in image["sentences"]]
        for image in read_captions(tmp_path / name, **options)["images"]
    }


@pytest.mark.parametrize(
    "cell", ["['A dog runs.', \"A dog's ball\"]", '["A dog runs.", "A dog\'s ball"]']
)
def test_a_cell_with_a_list_holds_several_captions(tmp_path, cell):
    quoted = '"' + cell.replace('"', '""') + '"'
    found = read_file(tmp_path, "x.csv", f"image,caption\na.jpg,{quoted}\nb.jpg,[red] dog\n")
    assert found == {"a.jpg": ["a dog runs", "a dog s ball"], "b.jpg": ["red dog"]}


@pytest.mark.parametrize(
    "header",
    ["image_path,caption", "filepath,text", "name,description", "img,raw", "path,captions"],
)
def test_columns_are_known_by_the_names_that_people_give_them(tmp_path, header):
    found = read_file(tmp_path, "x.csv", f"{header}\na.jpg,a dog\n")
    assert found == {"a.jpg": ["a dog"]}


def test_names_mapped_to_captions_are_read(tmp_path):
    found = read_file(tmp_path, "x.json", '{"a.jpg": ["A dog.", "Dogs"], "b.png": "A cat"}')
    assert found == {"a.jpg": ["a dog", "dogs"], "b.png": ["a cat"]}


def test_a_text_file_beside_each_picture_is_read(tmp_path):
    for name, text in {"a": "A dog.\n\nDogs\n", "b": "A cat", "c": "A cow"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "a.PNG").touch()
    (tmp_path / "b.webp").touch()
    found = {
        image["filename"]: len(image["sentences"]) for image in read_captions(tmp_path)["images"]
    }
    assert found == {"a.PNG": 2, "b.webp": 1, "c.jpg": 1}  # the last one will be reported missing


def test_backslashes_separate_folders(tmp_path):
    assert list(read_file(tmp_path, "x.csv", "image,caption\na\\b.jpg,a dog\n")) == ["a/b.jpg"]


def test_a_header_without_captions_is_an_error(tmp_path):
    with pytest.raises(UserError, match="x.csv has no captions: only a header or empty lines"):
        read_file(tmp_path, "x.csv", "image,caption\n")


def test_cocos_two_files_keep_their_splits_when_given_together(tmp_path):
    for split in ("train", "val"):
        write_json(
            tmp_path / f"captions_{split}2017.json",
            {
                "images": [{"id": i, "file_name": f"{split}{i}.jpg"} for i in range(3)],
                "annotations": [{"image_id": i, "caption": "a dog"} for i in range(3)],
            },
        )
    files = [str(tmp_path / f"captions_{split}2017.json") for split in ("train", "val")]
    options = ["--image_folder", "x", "--dataset", "x", "--captions"]
    both, _ = find_captions(get_args([*options, *files]))
    assert [{image["split"] for image in source["images"]} for source in both] == [
        {"train"},
        {"val"},
    ]
    [alone], _ = find_captions(get_args([*options, files[1], "--val_fraction", "0.34"]))
    assert {image["split"] for image in alone["images"]} == {"train", "val"}
