"""What create_input_files() writes, compared with counts by hand."""

import re
from pathlib import Path

import h5py
import numpy as np
import pytest
from factories import ONE_PER_SPLIT, contents, grey_of, many_entries
from factories import karpathy_entry as entry
from factories import write_input_files as create
from factories import write_karpathy as prepare

from create_input_files import get_args
from preprocessing import processes
from preprocessing.input_files import create_input_files
from utils import UserError, write_json

ROOT = Path(__file__).resolve().parents[2]


def greys(read, kind):
    """The image in each row of an HDF5 file, recognised by its colour."""
    return [int(image[0, 128, 128]) for image in read(kind)[0]]


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
    read = create(tmp_path, ONE_PER_SPLIT)
    assert greys(read, "TRAIN_IMAGES") == [grey_of(0), grey_of(3)]
    assert greys(read, "VAL_IMAGES") == [grey_of(1)]
    assert greys(read, "TEST_IMAGES") == [grey_of(2)]


def test_images_keep_the_order_of_the_json_with_more_processes_too(tmp_path):
    names = np.random.default_rng(0).permutation(24)
    read = create(tmp_path, [entry(f"{i}.png") for i in names], workers=2)
    assert greys(read, "TRAIN_IMAGES") == [grey_of(i) for i in range(24)]
    assert [r["filename"] for r in read("TRAIN_REFERENCES")] == [f"{i}.png" for i in names]


def test_image_file_is_uint8_of_256_pixels_and_stores_captions_per_image(tmp_path):
    images, attributes = create(tmp_path, ONE_PER_SPLIT, captions_per_image=3)("TRAIN_IMAGES")
    assert images.shape == (2, 3, 256, 256) and images.dtype == np.uint8
    assert attributes.keys() == {"captions_per_image", "made_from"}
    assert attributes["captions_per_image"] == 3 and len(attributes["made_from"]) == 64


def test_filepath_is_a_folder_of_the_image_folder(tmp_path):
    entries = [entry("a.png", filepath="train2014"), entry("a.png", "val", filepath="val2014")]
    read = create(tmp_path, entries)
    assert greys(read, "VAL_IMAGES") == [grey_of(1)]
    assert read("VAL_REFERENCES")[0]["filename"] == "val2014/a.png"


def test_captions_are_sampled_without_replacement(tmp_path):
    captions = [f"w{i}" for i in range(6)]
    read = create(tmp_path, [entry("a.png", captions=captions)], captions_per_image=5)
    assert len({tuple(caption) for caption in read("TRAIN_CAPTIONS")}) == 5


def test_too_few_captions_are_all_used_and_some_repeated(tmp_path):
    read = create(tmp_path, [entry("a.png", captions=["x", "y"])], captions_per_image=5)
    words = [caption[1] for caption in read("TRAIN_CAPTIONS")]
    assert len(words) == 5 and set(words) == {read("WORDMAP")["x"], read("WORDMAP")["y"]}


def test_image_without_a_usable_caption_is_skipped_and_counted(tmp_path, capsys):
    entries = [entry("a.png", captions=["a b c d e", ""]), entry("b.png")]
    read = create(tmp_path, entries)
    assert greys(read, "TRAIN_IMAGES") == [grey_of(1)] and len(read("TRAIN_REFERENCES")) == 1
    assert "TRAIN: 1 image skipped" in capsys.readouterr().out


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


@pytest.mark.parametrize("method", [processes.START_METHOD, "spawn"])
def test_two_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch, method):
    create(tmp_path, many_entries(), "one")
    monkeypatch.setattr(processes, "START_METHOD", method)
    create(tmp_path, many_entries(), "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_seed_decides_which_captions_are_sampled(tmp_path):
    for output, seed in [("first", 1), ("again", 1), ("other", 2)]:
        create(tmp_path, many_entries(), output, seed=seed)
    first, again, other = (contents(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        "TRAIN_CAPTIONS_x_2_cap_per_img_0_min_word_freq.json",
        "TRAIN_IMAGES_x_2_cap_per_img_0_min_word_freq.hdf5",  # only its attribute made_from
    }


def test_no_temporary_files_are_left(tmp_path):
    create(tmp_path, ONE_PER_SPLIT)
    kinds = ["IMAGES", "CAPTIONS", "CAPLENS", "REFERENCES"]
    expected = {f"{split}_{kind}" for split in ("TRAIN", "VAL", "TEST") for kind in kinds}
    names = contents(tmp_path / "out")
    assert {name.partition("_x_")[0] for name in names} == expected | {"WORDMAP"}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_all_named_and_leave_no_outputs(tmp_path, workers):
    names = [f"{i}.png" for i in range(25)]
    with pytest.raises(UserError) as error:
        create(tmp_path, [entry(n) for n in names], bad=names[1:23], workers=workers)
    first, *reasons, others, advice = str(error.value).split("\n  ")
    assert first == "22 bad images:" and others == "and 12 others"
    assert advice.startswith("repair them") and "--skip_bad_images" in advice
    for name, reason in zip(names[1:11], reasons, strict=True):
        assert f"images/{name} is not a readable image" in reason
    [kept] = (tmp_path / "out").iterdir()
    assert kept.name.startswith(".unfinished_")


def test_words_of_any_script_and_long_names_of_missing_files_are_fine(tmp_path):
    entries = [entry("a.png", captions=["ein Käse हिन्दी 猫"])]
    assert list(create(tmp_path, entries)("WORDMAP"))[1:5] == ["ein", "Käse", "हिन्दी", "猫"]
    write_json(tmp_path / "dataset.json", {"images": [entry("x" * 5000 + ".png")]})
    with pytest.raises(UserError, match="1 bad image:.*\n.*x.png: File name too long"):
        create_input_files("x", tmp_path / "dataset.json", tmp_path, output_folder=tmp_path / "o")


def test_missing_image_is_named_before_any_is_read(tmp_path):
    path = prepare(tmp_path, ONE_PER_SPLIT)
    (tmp_path / "images" / "b.png").unlink()
    with pytest.raises(UserError, match=r"1 bad image:.*\n.*b\.png not found"):
        create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "captions, min_word_freq, message",
    [
        (
            ["a dog runs", "a dog sits"],
            5,
            "of 6 words in 2 captions, 6 become <unk>, since only 0 "
            "different ones occur more than 5 times; pass a lower --min_word_freq, 0 to keep every "
            "word",
        ),
        (["一只狗在草地上奔跑", "一只猫"], 5, ": if the language is written without spaces, as"),
    ],
)
def test_a_vocabulary_without_words_is_an_error_that_says_what_to_pass(
    tmp_path, captions, min_word_freq, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        create(tmp_path, [entry("a.png", captions=captions)], min_word_freq=min_word_freq)
    assert not (tmp_path / "out").exists()


def test_it_is_said_when_most_tokens_become_unknown(tmp_path, capsys):
    captions = ["a dog runs fast", "a cat sits still"]
    create(tmp_path, [entry("a.png", captions=captions)], min_word_freq=1)
    assert (
        "warning: of 8 words in 2 captions, 6 become <unk>, since only 1 different ones occur "
        "more than 1 times; pass a lower --min_word_freq"
    ) in capsys.readouterr().err
    create(tmp_path, [entry("a.png", captions=captions)], min_word_freq=0, overwrite=True)
    assert "<unk>" not in capsys.readouterr().err
    create(tmp_path, [entry("a.png", captions=["一只狗", "一只猫"])], overwrite=True)
    assert "put a space between the words first" in capsys.readouterr().err


def test_repeated_captions_are_said_to_fill_up(tmp_path, capsys):
    create(
        tmp_path,
        [entry("a.png", captions=["a b", "c d"]), entry("b.png", captions=["e f"])],
        captions_per_image=3,
    )
    assert "TRAIN: 2 images, 3 captions, filled up to 6\n" in capsys.readouterr().out


def test_names_match_whether_composed_or_decomposed(tmp_path):
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    path = prepare(tmp_path, [entry(composed)])
    (tmp_path / "images" / composed).rename(tmp_path / "images" / decomposed)
    create_input_files(
        "x", path, tmp_path / "images", output_folder=tmp_path / "out", min_word_freq=0, workers=0
    )


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
    with pytest.raises(UserError, match="a.png is not a readable(.*\n.*)no image to train on is"):
        create(tmp_path, entries, bad=["a.png"], skip_bad_images=True)
    assert not contents(tmp_path / "out")


def test_options_have_the_values_of_the_tutorial():
    args = get_args([])
    assert (args.captions_per_image, args.min_word_freq, args.max_len) == (5, 5, 50)
    assert (args.dataset, args.output_folder, args.workers) == ("demo", "data", None)
