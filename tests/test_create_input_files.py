"""create_input_files.py: what it writes, against counts by hand, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import utils
from captions import read_captions, split_words
from create_input_files import get_args
from utils import UserError, create_input_files, load_embeddings, read_json, write_json

ROOT = Path(__file__).resolve().parent.parent


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
    write_json(tmp_path / "dataset.json", {"images": entries, "dataset": "x"})
    return tmp_path / "dataset.json"


def create(tmp_path, entries, output="out", bad=(), **options):
    """Create the input files of the data set x; returns a function that reads one of them."""
    options = {"min_word_freq": 0, "captions_per_image": 2, "max_len": 4, "workers": 0} | options
    path = prepare(tmp_path, entries, bad)
    folder = tmp_path / output
    create_input_files("x", path, tmp_path / "images", output_folder=folder, **options)

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
    assert attributes == {"captions_per_image": 3}


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


@pytest.mark.parametrize("method", [utils.START_METHOD, "spawn"])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch, method):
    create(tmp_path, many(), "one")
    monkeypatch.setattr(utils, "START_METHOD", method)
    create(tmp_path, many(), "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_seed_decides_which_captions_are_drawn(tmp_path):
    for output, seed in [("first", 1), ("again", 1), ("other", 2)]:
        create(tmp_path, many(), output, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert [name for name in first if first[name] != other[name]] == [
        "TRAIN_CAPTIONS_x_2_cap_per_img_0_min_word_freq.json"
    ]


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
    message = str(error.value)
    assert message.startswith("22 bad images") and message.endswith("and 2 more")
    assert "1.png" in message and "20.png" in message and "21.png" not in message
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a.png", "dev")], r"split 'dev' of a\.png is none of train, restval, val, test"),
        ([entry("a.png"), entry("a.png")], r"a\.png is there twice"),
        ([entry("../a.png")], r"\.\./a\.png is not inside the image folder"),
        ([entry("a.png", captions=["the <end>"])], r"a\.png: a caption has <end>"),
        ([entry("a.png", "val")], "no image to train on"),
        ([entry("a.png", "val") | {"sentences": [{"raw": "x"}]}], "image 0 .* list of tokens"),
        ([entry("a.png") | {"sentences": [{"tokens": "a dog"}]}], "image 0 .* list of tokens"),
    ],
)
def test_wrong_data_set_is_refused_by_name(tmp_path, entries, message):
    with pytest.raises(UserError, match=message):
        create(tmp_path, entries)
    assert not (tmp_path / "out").exists()


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


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to a process group")
def test_interrupt_leaves_nothing(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    path = prepare(tmp_path, [entry(name) for name in names])
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / names[0])
    for name in names[1:]:  # large, so that the run lasts
        (tmp_path / "images" / name).write_bytes((tmp_path / "images" / names[0]).read_bytes())
    command = [sys.executable, ROOT / "create_input_files.py", "--karpathy_json", path,
               "--image_folder", tmp_path / "images", "--output_folder", tmp_path / "out",
               "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/.unfinished_*/*.hdf5")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, stderr) == (130, "create_input_files.py: interrupted\n")
    assert not list((tmp_path / "out").iterdir())
