"""create_input_files.py: what it writes, against counts by hand, and what it refuses."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from create_input_files import get_args
from preprocessing import demo
from preprocessing import input_files as preparation
from preprocessing import processes as workers
from preprocessing.input_files import create_input_files
from preprocessing.own_captions import read_captions, split_words
from preprocessing.resumable_hdf5 import Work
from training.embeddings import load_embeddings
from utils import UserError, exclusive_lock, read_json, write_json

ROOT = Path(__file__).resolve().parents[2]


def entry(filename, split="train", captions=("a dog",), **more):
    sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
    return {"filename": filename, "split": split, "sentences": sentences, **more}


def grey(i):
    return 10 * i + 5


def prepare(tmp_path, entries, bad=()):
    """Draw image i in the grey that is grey(i) and write the Karpathy JSON; returns its path."""
    for i, image in enumerate(entries):
        path = tmp_path / "images" / image.get("filepath", "") / image["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if image["filename"] in bad:
            path.write_bytes(b"no image at all")
        else:
            Image.new("RGB", (40, 30), (grey(i),) * 3).save(path)
        os.utime(path, (1, 1))  # drawn twice, it is the same file
    write_json(tmp_path / "dataset.json", {"images": entries, "dataset": "x"})
    return tmp_path / "dataset.json"


OPTIONS = {"min_word_freq": 0, "captions_per_image": 2, "max_len": 4, "workers": 0}


def create(tmp_path, entries, output="out", bad=(), **options):
    """Create the input files of the data set x; returns a function that reads one of them."""
    path, folder = prepare(tmp_path, entries, bad), tmp_path / output
    create_input_files("x", path, tmp_path / "images", output_folder=folder, **OPTIONS | options)

    def read(kind):
        [path] = folder.glob(f"{kind}_x_*")
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with h5py.File(path) as h:
            return h["images"][:], dict(h.attrs)

    return read


def greys(read, kind):
    """Which image each row of an HDF5 file is, known by its colour."""
    return [int(image[0, 128, 128]) for image in read(kind)[0]]


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def script(*args, **options):
    command = [sys.executable, ROOT / "create_input_files.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


SPLITS = [entry("a.png"), entry("b.png", "val"), entry("c.png", "test"), entry("d.png", "restval")]


def test_word_is_kept_if_it_occurs_more_than_min_word_freq_times(tmp_path):
    entries = [
        entry("a.png", captions=["red dog", "red dog", "red cat"]),
        entry("b.png", captions=["dog cat cow"]),
        entry("c.png", "val", captions=["cat cat cat bird bird bird"]),
    ]
    read = create(tmp_path, entries, min_word_freq=2)
    # in train: red 3, dog 3, cat 2, cow 1
    assert read("WORDMAP") == {"<pad>": 0, "red": 1, "dog": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
    assert read("TRAIN_CAPTIONS")[2:] == [[4, 2, 3, 3, 5, 0]] * 2


def test_word_of_a_caption_too_long_to_train_on_is_not_counted(tmp_path):
    read = create(tmp_path, [entry("a.png", captions=["dog", "dog", "cat is not a dog"])])
    assert list(read("WORDMAP")) == ["<pad>", "dog", "<unk>", "<start>", "<end>"]


def test_caption_is_start_words_end_padding(tmp_path):
    read = create(tmp_path, [entry("a.png", captions=["a dog", "a b c d"])])
    assert read("WORDMAP") == {
        "<pad>": 0, "a": 1, "dog": 2, "b": 3, "c": 4, "d": 5, "<unk>": 6, "<start>": 7, "<end>": 8
    }  # fmt: skip
    assert sorted(read("TRAIN_CAPTIONS")) == [[7, 1, 2, 8, 0, 0], [7, 1, 3, 4, 5, 8]]
    lengths = [caption.index(8) + 1 for caption in read("TRAIN_CAPTIONS")]
    assert read("TRAIN_CAPLENS") == lengths and sorted(lengths) == [4, 6]


def test_restval_is_trained_on(tmp_path):
    read = create(tmp_path, SPLITS)
    assert greys(read, "TRAIN_IMAGES") == [grey(0), grey(3)]
    assert greys(read, "VAL_IMAGES") == [grey(1)]
    assert greys(read, "TEST_IMAGES") == [grey(2)]


def test_images_keep_the_order_of_the_json_with_more_processes_too(tmp_path):
    names = np.random.default_rng(0).permutation(24)
    read = create(tmp_path, [entry(f"{i}.png") for i in names], workers=2)
    assert greys(read, "TRAIN_IMAGES") == [grey(i) for i in range(24)]
    assert [r["filename"] for r in read("TRAIN_REFERENCES")] == [f"{i}.png" for i in names]


def test_image_file_is_uint8_of_256_pixels_and_knows_captions_per_image(tmp_path):
    images, attributes = create(tmp_path, SPLITS, captions_per_image=3)("TRAIN_IMAGES")
    assert images.shape == (2, 3, 256, 256) and images.dtype == np.uint8
    assert attributes.keys() == {"captions_per_image", "made_from"}
    assert attributes["captions_per_image"] == 3 and len(attributes["made_from"]) == 64


def test_filepath_is_a_folder_of_the_image_folder(tmp_path):
    entries = [entry("a.png", filepath="train2014"), entry("a.png", "val", filepath="val2014")]
    read = create(tmp_path, entries)
    assert greys(read, "VAL_IMAGES") == [grey(1)]
    assert read("VAL_REFERENCES")[0]["filename"] == "val2014/a.png"


def test_captions_are_drawn_without_replacement(tmp_path):
    captions = [f"w{i}" for i in range(6)]
    read = create(tmp_path, [entry("a.png", captions=captions)], captions_per_image=5)
    assert len({tuple(caption) for caption in read("TRAIN_CAPTIONS")}) == 5


def test_too_few_captions_are_all_used_and_filled_up_by_repetition(tmp_path):
    read = create(tmp_path, [entry("a.png", captions=["x", "y"])], captions_per_image=5)
    words = [caption[1] for caption in read("TRAIN_CAPTIONS")]
    assert len(words) == 5 and set(words) == {read("WORDMAP")["x"], read("WORDMAP")["y"]}


def test_image_without_a_usable_caption_is_skipped_and_counted(tmp_path, capsys):
    entries = [entry("a.png", captions=["a b c d e", ""]), entry("b.png")]
    read = create(tmp_path, entries)
    assert greys(read, "TRAIN_IMAGES") == [grey(1)] and len(read("TRAIN_REFERENCES")) == 1
    assert "TRAIN: 1 images skipped" in capsys.readouterr().out


def test_references_are_all_captions_of_any_length_as_words(tmp_path):
    objects = [{"box": [0, 0, 1, 1], "words": ["dog"]}]
    captions = ["a dog", "five words are too many", "dog"]
    entries = [
        entry("a.png", captions=captions, imgid=7, objects=objects),
        entry("b.png", imgid=8, cocoid=900),
        entry("c.png"),
    ]
    first, second, third = create(tmp_path, entries)("TRAIN_REFERENCES")
    references = [caption.split() for caption in captions]
    assert first == {
        "filename": "a.png", "image_id": 7, "references": references, "objects": objects
    }  # fmt: skip
    assert second == {"filename": "b.png", "image_id": 900, "references": [["a", "dog"]]}
    assert third["image_id"] == 2


def test_empty_val_and_test_still_have_files(tmp_path):
    read = create(tmp_path, [entry("a.png")])
    for split in ("VAL", "TEST"):
        assert read(f"{split}_IMAGES")[0].shape == (0, 3, 256, 256)
        assert read(f"{split}_CAPTIONS") == read(f"{split}_REFERENCES") == []


def many(n=9):
    return [entry(f"{i}.png", captions=["a b", "b c", "c d", "d a"]) for i in range(n)]


@pytest.mark.parametrize("method", [workers.START_METHOD, "spawn"])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch, method):
    create(tmp_path, many(), "one")
    monkeypatch.setattr(workers, "START_METHOD", method)
    create(tmp_path, many(), "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_seed_decides_which_captions_are_drawn(tmp_path):
    for output, seed in [("first", 1), ("again", 1), ("other", 2)]:
        create(tmp_path, many(), output, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        "TRAIN_CAPTIONS_x_2_cap_per_img_0_min_word_freq.json",
        "TRAIN_IMAGES_x_2_cap_per_img_0_min_word_freq.hdf5",  # only its attribute made_from
    }


def test_only_the_files_themselves_are_left(tmp_path):
    create(tmp_path, SPLITS)
    kinds = ["IMAGES", "CAPTIONS", "CAPLENS", "REFERENCES"]
    expected = {f"{split}_{kind}" for split in ("TRAIN", "VAL", "TEST") for kind in kinds}
    names = contents(tmp_path / "out")
    assert {name.partition("_x_")[0] for name in names} == expected | {"WORDMAP"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_all_named_and_leave_no_outputs(tmp_path, workers):
    names = [f"{i}.png" for i in range(25)]
    with pytest.raises(UserError) as error:
        create(tmp_path, [entry(n) for n in names], bad=names[1:23], workers=workers)
    first, *reasons = str(error.value).split("\n")
    assert first.startswith("22 bad images; repair them") and "--skip_bad_images" in first
    for name, reason in zip(names[1:23], reasons, strict=True):
        assert f"images/{name} is not a readable image" in reason
    [kept] = (tmp_path / "out").iterdir()
    assert kept.name.startswith(".unfinished_")


def test_what_was_read_is_not_read_again_to_skip_the_bad_images(tmp_path, monkeypatch):
    entries = [entry(f"{i}.png") for i in range(6)]
    with pytest.raises(UserError, match="which does not read the others again"):
        create(tmp_path, entries, bad=["2.png"])
    paths = count_reads(monkeypatch)
    create(tmp_path, entries, bad=["2.png"], skip_bad_images=True)
    assert paths == []


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a.png", "dev")], r"split 'dev' of a\.png is none of train, restval, val, test"),
        ([entry("a.png"), entry("a.png")], r"a\.png is there twice"),
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
def test_what_is_no_name_of_a_file_is_refused(tmp_path, key, name):
    if (key, name) == ("filepath", ""):
        return
    write_json(tmp_path / "dataset.json", {"images": [entry("a.png") | {key: name}]})
    with pytest.raises(UserError, match=rf"dataset.json: image 0: {key} .* no name of a file"):
        create_input_files("x", tmp_path / "dataset.json", tmp_path, output_folder=tmp_path / "out")


def test_words_of_any_script_and_long_names_of_missing_files_are_fine(tmp_path):
    entries = [entry("a.png", captions=["ein Käse हिन्दी 猫"])]
    assert list(create(tmp_path, entries)("WORDMAP"))[1:5] == ["ein", "Käse", "हिन्दी", "猫"]
    write_json(tmp_path / "dataset.json", {"images": [entry("x" * 5000 + ".png")]})
    with pytest.raises(UserError, match="1 bad images.*\n.*x.png: File name too long"):
        create_input_files("x", tmp_path / "dataset.json", tmp_path, output_folder=tmp_path / "o")


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
    for read in (read_captions, lambda path: create_input_files("x", path, tmp_path)):
        with pytest.raises(UserError, match="cannot be read: Is a directory"):
            read(tmp_path)


def test_missing_image_is_named_before_any_is_read(tmp_path):
    path = prepare(tmp_path, SPLITS)
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 bad images.*\n.*b\.png not found"):
        create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
        ("some prose\nand more\n", "not recognised; looked for"),
        ("picture,words\na.jpg,x\n", "not recognised; looked for"),
        ('image,caption\na.jpg,"never closed\nb.jpg,x\n', "quotation mark"),
        ("image,split,caption\na.jpg,val,x\na.jpg,test,x\n", "a.jpg is in val and in test"),
        ("image,split,caption\na.jpg,val,x\nb.jpg,,x\n", "b.jpg has no split"),
        ("caption\timage\nx\ta.jpg\ty\n", "line 2: 3 columns, not 2"),
        ('{"image": "a.jpg", "caption": "x"}\n{"image": }\n', "line 2: broken JSON"),
        ('{"image": "a.jpg"}\n{"image": "b.jpg"}\n', "entry 1 lacks"),
        ('{"images": [\n{"id": 1,}], "annotations": []}', "line 2: broken JSON"),
        ('{"images": [], "annotations": [{"image_id": 3, "caption": "x"}]}', "has the id 3"),
        ('{"images": [{"id": 3}], "annotations": [{"image_id": 3}]}', "COCO's form"),
        ('{"images": [{"filename": "a.jpg"}]}', "--karpathy_json"),
        ("a.jpg#0\tx\nb.jpg\ty\n", "line 2 is not name.jpg#0"),
        ('[{"image_id": 1, "filename": "a.jpg", "caption": "x", "score": -1, "references": []}]',
         "eval.py --results; training needs people's own"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"image": ' + "7" * 5000 + "}]", "broken JSON"),
    ],
)
def test_captions_not_understood_are_refused_with_the_place(tmp_path, text, message):
    with pytest.raises(UserError, match="captions.any.*" + message):
        read_text_as_captions(tmp_path, text)


def test_words_of_other_scripts_stay_whole():
    assert split_words("“Ein Käse”—हिन्दी, at&t") == ["ein", "käse", "हिन्दी", "at", "t"]


def glove(tmp_path, text):
    path = tmp_path / "glove.txt"
    path.write_text(text)
    return load_embeddings(path, {"<pad>": 0, "dog": 1, "cat": 2})


def test_embedding_of_a_word_is_its_line_and_others_are_random_within_the_limit(tmp_path, capsys):
    embeddings, size = glove(tmp_path, "dog 1 -2 3\nat a.b@c 9 9 9\n<cow> 0 0 0\ncat 4 5 6e1\n")
    assert size == 3 and embeddings.shape == (3, 3) and embeddings.dtype == torch.float32
    assert embeddings[1:].tolist() == [[1, -2, 3], [4, 5, 60]]
    assert 0 < embeddings[0].abs().max() <= 1  # sqrt(3 / 3)
    assert "2 of 3 words" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["cow 1 2", "cow 1 2 3 4", "dog 1 2 x", "dog 1 2 nan", ""])
def test_broken_line_of_embeddings_is_named(tmp_path, line):
    with pytest.raises(UserError, match=r"glove\.txt, line 2"):
        glove(tmp_path, f"cat 1 2 3\n{line}\n")


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.json not found"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a":\n]}')
    with pytest.raises(UserError, match=r"x\.json, line 2: broken JSON"):
        read_json(tmp_path / "x.json")


def test_options_have_the_values_of_the_tutorial():
    args = get_args([])
    assert (args.captions_per_image, args.min_word_freq, args.max_len) == (5, 5, 50)
    assert (args.dataset, args.output_folder, args.workers) == ("demo", "data", None)


def test_script_ends_with_one_line_and_code_2(tmp_path):
    done = script("--karpathy_json", "none.json", "--image_folder", tmp_path, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "create_input_files.py: none.json not found\n"


def test_script_makes_the_files_of_own_captions(tmp_path):
    prepare(tmp_path, [entry(f"{i}.png") for i in range(10)])
    (tmp_path / "mine.csv").write_text("".join(f"{i}.png,A dog.\n" for i in range(10)))
    done = script("--dataset", "mine", "--captions", "mine.csv", "--image_folder", "images",
                  "--min_word_freq", 0, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("data/TRAIN_REFERENCES_mine_5_cap_per_img_0_min_word_freq.json")
    references = read_json(path)
    assert len(references) == 8 and references[0]["references"] == [["a", "dog"]]
    assert "TRAIN: 8 images, 40 captions" in done.stdout


def test_own_captions_without_validation_images_give_a_warning(tmp_path):
    prepare(tmp_path, [entry("0.png")])
    (tmp_path / "mine.csv").write_text("0.png,A dog.\n")
    done = script("--captions", "mine.csv", "--image_folder", "images", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines()[:2] == [
        "warning: mine.csv has no val images, to choose the best epoch by",
        "warning: mine.csv has no test images, to evaluate with",
    ]


# ---- Runs that end before they are through, and runs after them

FORK = pytest.mark.skipif(sys.platform != "linux", reason="forks a process to kill it")
POSIX = pytest.mark.skipif(os.name != "posix", reason="sends signals")
MIXED = [
    entry(f"{i}.png", split, captions=["a b", "b c", "c d"], imgid=i)
    for i, split in enumerate(["train", "val", "train", "test", "restval", "train"])
]


def kill_at(module, name, k):
    """From its k-th call on, the function of this name ends this process as a power cut would."""
    function, calls = getattr(module, name), []

    def counted(*args, **options):
        calls.append(args)
        if len(calls) >= k:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    setattr(module, name, counted)


def create_killed(tmp_path, module, name, k, entries, bad=(), **options):
    """create() in a process that kills itself; returns whether it did."""
    path = prepare(tmp_path, entries, bad)

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        preparation.SAVE_SECONDS, preparation.CHUNK = 0, 1
        kill_at(module, name, k)
        create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out",
                           **OPTIONS | options)  # fmt: skip

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def count_reads(monkeypatch):
    paths = []

    def read(path, size, read_image=preparation.read_image):
        paths.append(Path(path).name)
        return read_image(path, size)

    monkeypatch.setattr(preparation, "read_image", read)
    return paths


@FORK
@pytest.mark.parametrize("module, name", [(preparation, "read_image"), (os, "replace"),
                                          (os, "remove"), (os, "fsync")])  # fmt: skip
def test_run_killed_at_any_moment_and_run_again_gives_the_bytes_of_one(tmp_path, module, name):
    options = {"entries": MIXED, "bad": ["2.png", "3.png"], "skip_bad_images": True}
    create(tmp_path, output="whole", **options)
    whole, k = contents(tmp_path / "whole"), 0
    while create_killed(tmp_path, module, name, k := k + (3 if name == "fsync" else 1), **options):
        left = {file for file in os.listdir(tmp_path / "out") if not file.startswith(".")}
        assert not any(file.startswith("WORDMAP") for file in left) or left == whole.keys()
        create(tmp_path, **options)
        assert contents(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
    assert k > (4 if name == "remove" else 6)
    assert contents(tmp_path / "out") == whole


@FORK
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_reads_only_what_is_missing(tmp_path, monkeypatch, capsys, workers):
    create(tmp_path, MIXED, "whole")
    assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED)
    paths = count_reads(monkeypatch)
    create(tmp_path, MIXED, workers=workers)
    assert "4 of 6 images are in" in capsys.readouterr().out
    assert workers or paths == ["1.png", "3.png"]  # training images come first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@FORK
def test_run_for_other_images_or_options_starts_anew(tmp_path, monkeypatch):
    paths = count_reads(monkeypatch)
    for options in ({"seed": 5}, {"max_len": 3}, {"entries": MIXED[::-1]}):
        assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED)
        paths.clear()
        create(tmp_path, **{"entries": MIXED} | options)
        assert len(paths) == 6
        create(tmp_path, output="whole", **{"entries": MIXED} | options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out"), shutil.rmtree(tmp_path / "whole")


@FORK
def test_image_that_has_changed_since_is_read_again(tmp_path):
    path = prepare(tmp_path, MIXED)
    assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED)
    Image.new("RGB", (9, 9), "white").save(tmp_path / "images/0.png")
    create_input_files("x", path, tmp_path / "images", 2, 0, tmp_path / "out", 4, 0)
    with h5py.File(next((tmp_path / "out").glob("TRAIN_IMAGES*"))) as file:
        assert file["images"][0].min() == 255


def test_complete_data_set_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    create(tmp_path, SPLITS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(preparation, "read_image", None)
    create(tmp_path, SPLITS)
    assert "is complete already; --overwrite makes it anew" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("change", ["seed", "tutorial", "incomplete"])
def test_files_of_something_else_are_not_overwritten_unless_told_so(tmp_path, change):
    create(tmp_path, SPLITS)
    expected, options = contents(tmp_path / "out"), {}
    if change == "seed":
        create(tmp_path, SPLITS, "other", seed=5)
        expected, options = contents(tmp_path / "other"), {"seed": 5}
    elif change == "tutorial":
        with h5py.File(next((tmp_path / "out").glob("TRAIN_IMAGES*")), "r+") as file:
            del file.attrs["made_from"]
    else:
        next((tmp_path / "out").glob("VAL_CAPLENS*")).unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="TRAIN_IMAGES_x_.* is there already.* --output_folder"):
        create(tmp_path, SPLITS, **options)
    assert contents(tmp_path / "out") == before
    create(tmp_path, SPLITS, overwrite=True, **options)
    assert contents(tmp_path / "out") == expected


@FORK
def test_overwrite_starts_anew_but_goes_on_with_its_own_work(tmp_path, monkeypatch):
    create(tmp_path, MIXED)
    whole, paths = contents(tmp_path / "out"), count_reads(monkeypatch)
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 6 and contents(tmp_path / "out") == whole
    assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED, overwrite=True)
    paths.clear()
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 2 and contents(tmp_path / "out") == whole
    shutil.rmtree(tmp_path / "out")
    assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED)
    paths.clear()
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 6 and contents(tmp_path / "out") == whole


def without_key(files):
    """The contents of a folder, but for the attribute made_from."""
    [key] = {Path(path).name: None for path in files if path.startswith("TRAIN_IMAGES")}
    with h5py.File.in_memory(files[key]) as file:
        made_from = bytes(file.attrs["made_from"])
    return files | {key: files[key].replace(made_from, b"0" * 64)}


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_bad_images_gives_the_files_of_a_run_without_them(tmp_path, capsys, workers):
    entries = [entry(f"{i}.png", captions=[f"w{i} a", f"w{i} b", "c"], imgid=i) for i in range(12)]
    entries += [entry(f"v{i}.png", "val", imgid=20 + i) for i in range(2)]
    bad, missing = ["0.png", "5.png", "6.png", "11.png", "v0.png", "v1.png"], ["3.png"]
    left = [e for e in entries if e["filename"] not in bad + missing]
    path = prepare(tmp_path, entries, bad)
    (tmp_path / "images/3.png").unlink()
    options = {"min_word_freq": 0, "workers": workers, "skip_bad_images": True}
    create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out", **options)
    out = capsys.readouterr().out
    assert "7 bad images dropped:" in out and "3.png not found" in out
    assert all(f"{name} is not a readable image" in out for name in bad)
    write_json(path, {"images": left})
    create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "left", **options)
    assert without_key(contents(tmp_path / "out")) == without_key(contents(tmp_path / "left"))


def test_skipping_the_last_image_to_train_on_is_an_error_and_leaves_nothing(tmp_path):
    entries = [entry("a.png"), entry("b.png", "val")]
    with pytest.raises(UserError, match="no image to train on is left:\n.*a.png is not a readable"):
        create(tmp_path, entries, bad=["a.png"], skip_bad_images=True)
    assert not contents(tmp_path / "out")


def disk_with(monkeypatch, images):
    usage = shutil.disk_usage("/")._replace(free=images * 3 * 256 * 256)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_disk_too_small_is_told_before_the_first_image_and_leaves_nothing(tmp_path, monkeypatch):
    paths = count_reads(monkeypatch)
    disk_with(monkeypatch, 5)
    with pytest.raises(UserError, match=r"needs 0\.00 GB, 0\.00 GB are free"):
        create(tmp_path, MIXED)
    assert not paths and not contents(tmp_path / "out")


@FORK
def test_images_that_are_written_need_no_more_space(tmp_path, monkeypatch):
    assert create_killed(tmp_path, preparation, "read_image", 5, entries=MIXED)
    disk_with(monkeypatch, 2)
    create(tmp_path, MIXED)


def test_disk_that_is_full_keeps_what_is_done(tmp_path, monkeypatch):
    create(tmp_path, many(), "whole")

    def fail(target, start, images, write=preparation.write_images, calls=[]):  # noqa: B006
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(target, start, images)

    monkeypatch.setattr(preparation, "write_images", fail)
    with pytest.raises(UserError, match="No space left.* kept, the same command goes on"):
        create(tmp_path, many())
    paths = count_reads(monkeypatch)
    create(tmp_path, many())
    assert len(paths) == 5 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_second_run_at_the_same_time_is_refused_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    work = Work(tmp_path / "out", "x_2_cap_per_img_0_min_word_freq", {}, "", 2)
    start = time.monotonic()
    lock = exclusive_lock(f"{work.folder}.lock", "")
    with lock, pytest.raises(UserError, match="another process"):
        create(tmp_path, SPLITS)
    assert time.monotonic() - start < 3
    create(tmp_path, SPLITS)


def start_slow_run(tmp_path, n=40):
    """The script with two helpers at n large images, once it has begun; and its command."""
    names = [f"{i}.png" for i in range(n)]
    path = prepare(tmp_path, [entry(name) for name in names])
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / names[0], compress_level=1)
    for name in names[1:]:  # large, so that the run lasts
        (tmp_path / "images" / name).unlink()
        os.link(tmp_path / "images" / names[0], tmp_path / "images" / name)
    command = [sys.executable, ROOT / "create_input_files.py", "--karpathy_json", path,
               "--image_folder", tmp_path / "images", "--output_folder", tmp_path / "out",
               "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/.unfinished_*/progress.json")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    return process, command


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def runs(pid):
    """Whether there is such a process, and it is not only waiting for someone to count it out."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@POSIX
def test_interrupt_while_the_demo_is_drawn_ends_it_soon_and_keeps_the_pictures(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "create_input_files.py", "--output_folder",
                                tmp_path], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    while len(list(tmp_path.glob("demo/*.png"))) < 20 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=5)
    assert process.returncode == 130 and stderr.endswith("create_input_files.py: interrupted\n")
    assert 20 <= len(list(tmp_path.glob("demo/*.png"))) < 1000
    assert not list(tmp_path.glob("demo/*.json"))


@POSIX
def test_interrupt_keeps_what_is_done_and_the_same_command_goes_on(tmp_path):
    process, command = start_slow_run(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130 and stderr.count("\n") == 1
    assert stderr.startswith("create_input_files.py: interrupted; ")
    assert stderr.endswith("the same command goes on\n")
    [work] = (tmp_path / "out").iterdir()
    done = read_json(work / "progress.json")["done"]["TRAIN"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert f"{done} of 40 images are in" in again.stdout and not again.returncode, again.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_helpers_end_with_a_killed_parent_and_a_new_run_starts_at_once(tmp_path, signum):
    process, command = start_slow_run(tmp_path, 12)
    helpers = children(process.pid)
    assert len(helpers) == 2
    process.send_signal(signum)
    process.wait()
    process.stderr.close()
    time.sleep(1)
    assert not any(map(runs, helpers))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "images are in" in done.stdout


def test_demo_that_is_there_is_not_drawn_again(tmp_path):
    demo.make_demo(tmp_path, 5, 1, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    drawn = contents(tmp_path)
    (tmp_path / "demo_00002.png").unlink()
    (tmp_path / "demo_00003.png").write_bytes(b"half")
    demo.make_demo(tmp_path, 5, 1, 1)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert [path.stem[-1] for path in before if before[path] != after[path]] in (["2", "3"],
                                                                                 ["3", "2"])
    assert contents(tmp_path) == drawn


@FORK
@pytest.mark.parametrize("k", [1, 3, 6])
def test_demo_killed_while_it_is_drawn_is_completed(tmp_path, monkeypatch, k):
    monkeypatch.setattr(demo, "open_pool", ThreadPoolExecutor)  # all in the process to be killed
    demo.make_demo(tmp_path / "whole", 5, 1, 1)

    def run():
        kill_at(os, "replace", k)
        demo.make_demo(tmp_path / "killed", 5, 1, 1)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    demo.make_demo(tmp_path / "killed", 5, 1, 1)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
