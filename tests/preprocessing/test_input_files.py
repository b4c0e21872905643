"""What create_input_files() writes, compared with counts by hand; all of it or nothing."""

import inspect
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
from factories import (
    INPUT_OPTIONS,
    ONE_PER_SPLIT,
    ROOT,
    contents,
    grey_of,
    many_entries,
    restore_interrupts,
)
from factories import karpathy_entry as entry
from factories import write_input_files as create
from factories import write_karpathy as prepare
from PIL import Image

import eval as eval_script
from create_input_files import get_args
from create_input_files import main as script
from datasets import CaptionDataset
from preprocessing import input_files
from preprocessing.input_files import create_input_files
from utils import UserError, write_json

NAME = "x_2_cap_per_img_0_min_word_freq"
ALL_FILES = {
    f"{split}_{kind}_{NAME}.{'hdf5' if kind == 'IMAGES' else 'json'}"
    for split in ("TRAIN", "VAL", "TEST")
    for kind in ("IMAGES", "CAPTIONS", "CAPLENS", "REFERENCES")
} | {f"WORDMAP_{NAME}.json"}


def greys(read, kind):
    """The image in each row of an HDF5 file, recognised by its colour."""
    return [int(image[0, 128, 128]) for image in read(kind)[0]]


# The content of the files


def test_word_is_kept_if_it_occurs_more_than_min_word_freq_times(tmp_path):
    entries = [
        entry("a.png", captions=["red dog", "red dog", "red cat", "cat cat is too long"]),
        entry("b.png", captions=["dog cat cow"]),
        entry("c.png", "val", captions=["cat cat cat bird"]),
    ]
    read = create(tmp_path, entries, min_word_freq=2)
    # in train, in captions of at most 4 words: red 3, dog 3, cat 2, cow 1
    words = ["<pad>", "red", "dog", "<unk>", "<start>", "<end>"]
    assert list(read("WORDMAP").items()) == [(word, i) for i, word in enumerate(words)]
    assert read("TRAIN_CAPTIONS")[2:] == [[4, 2, 3, 3, 5, 0]] * 2
    assert read("TRAIN_CAPLENS") == [4, 4, 5, 5] and read("VAL_CAPLENS") == [6, 6]


def test_images_are_uint8_squares_in_the_order_of_the_json_and_restval_is_trained_on(tmp_path):
    read = create(tmp_path, [*ONE_PER_SPLIT, entry("e.png")], captions_per_image=3)
    images, attributes = read("TRAIN_IMAGES")
    assert images.shape == (3, 3, 256, 256) and images.dtype == np.uint8
    assert attributes == {"captions_per_image": 3}
    assert greys(read, "TRAIN_IMAGES") == [grey_of(0), grey_of(3), grey_of(4)]
    assert greys(read, "VAL_IMAGES") == [grey_of(1)]
    assert greys(read, "TEST_IMAGES") == [grey_of(2)]


def test_captions_are_sampled_without_replacement_and_repeated_if_too_few(tmp_path, capsys):
    many = entry("a.png", captions=[f"w{i}" for i in range(6)])
    read = create(tmp_path, [many, entry("b.png", captions=["x", "y"])], captions_per_image=5)
    captions = [tuple(caption) for caption in read("TRAIN_CAPTIONS")]
    assert len(set(captions[:5])) == 5 and len(captions) == 10
    assert {caption[1] for caption in captions[5:]} == {read("WORDMAP")[word] for word in "xy"}
    out = capsys.readouterr().out
    assert "TRAIN: 2 images, 7 captions, filled up to 10\n" in out
    assert out.startswith("reading 2 images ...\n2 images read in ")
    dataset = CaptionDataset(tmp_path / "out", NAME.replace("2_cap", "5_cap"), "TRAIN")
    assert dataset.lengths.view(2, 5).gt(1).sum(1).tolist() == [5, 2]  # each caption counts once


def test_references_are_all_captions_as_words_of_images_with_a_usable_one(tmp_path, capsys):
    objects = [{"box": [0, 0, 1, 1], "words": ["dog"]}]
    captions = ["a dog", "five words are too many", "dog"]
    references = [caption.split() for caption in captions]
    entries = [
        entry("a.png", captions=captions, imgid=7, objects=objects),
        entry("b.png", imgid=8, cocoid=900),
        entry("c.png"),
        entry("c.png", filepath="val2014"),
        entry("d.png", captions=["a b c d e", ""]),
    ]
    read = create(tmp_path, entries)
    assert greys(read, "TRAIN_IMAGES") == list(map(grey_of, range(4)))
    assert "TRAIN: 1 image skipped" in capsys.readouterr().out
    first, second, third, fourth = read("TRAIN_REFERENCES")
    expected = {"filename": "a.png", "image_id": 7, "references": references, "objects": objects}
    assert first == expected
    assert second == {"filename": "b.png", "image_id": 900, "references": [["a", "dog"]]}
    assert third["image_id"] == 2 and fourth["filename"] == "val2014/c.png"


def test_empty_val_and_test_still_have_files_that_can_be_opened(tmp_path):
    read = create(tmp_path, [entry("a.png")])
    for split in ("VAL", "TEST"):
        assert read(f"{split}_IMAGES")[0].shape == (0, 3, 256, 256)
        assert read(f"{split}_CAPTIONS") == read(f"{split}_REFERENCES") == []
        data = CaptionDataset(tmp_path / "out", NAME, split)
        assert len(data) == 0 and data.entries == []
    with pytest.raises(UserError, match="--split"):
        eval_script.main(["--data_folder", str(tmp_path / "out"), "--device", "cpu"])


def test_words_and_file_names_of_any_script_are_fine(tmp_path):
    entries = [entry("a.png", captions=["ein Käse हिन्दी 猫"])]
    assert list(create(tmp_path, entries)("WORDMAP"))[1:5] == ["ein", "Käse", "हिन्दी", "猫"]
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    path = prepare(tmp_path, [entry(composed)])
    (tmp_path / "images" / composed).rename(tmp_path / "images" / decomposed)
    create_input_files("y", path, tmp_path / "images", output_folder=tmp_path, **INPUT_OPTIONS)


def test_a_vocabulary_that_lacks_most_words_is_an_error_or_a_warning(tmp_path, capsys):
    few = [entry("a.png", captions=["a dog runs fast", "a cat sits still"])]
    with pytest.raises(UserError, match="8 words in 2 captions, 8 become <unk>.*--min_word_freq"):
        create(tmp_path, few, min_word_freq=5)
    unspaced = [entry("a.png", captions=["一只狗在草地上奔跑", "一只猫"])]
    with pytest.raises(UserError, match="put a space between the words"):
        create(tmp_path, unspaced, min_word_freq=5)
    assert not (tmp_path / "out").exists()
    create(tmp_path, few, min_word_freq=1)
    assert "6 become <unk>" in capsys.readouterr().err
    create(tmp_path, few, overwrite=True)
    assert "<unk>" not in capsys.readouterr().err
    create(tmp_path, unspaced, overwrite=True)
    assert "put a space between the words" in capsys.readouterr().err


# Bad images


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_named_and_leave_no_files(tmp_path, workers):
    names = [f"{i}.png" for i in range(25)]
    with pytest.raises(UserError) as error:
        create(tmp_path, [entry(n) for n in names], bad=names[1:23], workers=workers)
    first, *reasons, others, advice = str(error.value).split("\n  ")
    assert first == "22 bad images:" and "12 others" in others and "--skip_bad_images" in advice
    for name, reason in zip(names[1:11], reasons, strict=True):
        assert f"images/{name} is not a readable image" in reason
    assert not os.listdir(tmp_path / "out")
    with pytest.raises(UserError, match="a.png is not a readable(.*\n)*.*no image to train on"):
        create(tmp_path, ONE_PER_SPLIT[:2], bad=["a.png"], skip_bad_images=True)
    assert not os.listdir(tmp_path / "out")


def test_missing_image_is_named_before_any_is_read(tmp_path):
    path = prepare(tmp_path, ONE_PER_SPLIT)
    (tmp_path / "images" / "b.png").unlink()
    for entries, missing in ((ONE_PER_SPLIT, r"b\.png"), ([entry("x" * 5000)], "x")):
        write_json(path, {"images": entries})
        with pytest.raises(UserError, match=rf"1 bad image:.*\n.*{missing} not found"):
            create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
    assert "1 bad image dropped:" in out and "3.png not found" in out
    assert "6 bad images dropped:" in out
    assert all(f"{name} is not a readable image" in out for name in bad)
    write_json(path, {"images": left})
    create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "left", **options)
    dropped, never_there = contents(tmp_path / "out"), contents(tmp_path / "left")
    assert dropped.keys() == never_there.keys()
    for name in dropped:
        if name.endswith(".json"):
            assert dropped[name] == never_there[name]
        else:
            with h5py.File(tmp_path / "out" / name) as a, h5py.File(tmp_path / "left" / name) as b:
                np.testing.assert_array_equal(a["images"], b["images"], strict=True)


# All files or none


def test_two_processes_write_the_same_bytes_as_one_and_the_seed_decides_the_captions(tmp_path):
    for output, options in ("one", {}), ("two", {"workers": 2}), ("other", {"seed": 2}):
        create(tmp_path, many_entries(), output, **options)
    one, two, other = (contents(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two and set(one) == ALL_FILES
    assert {name for name in one if one[name] != other[name]} == {f"TRAIN_CAPTIONS_{NAME}.json"}


def test_existing_files_are_only_replaced_with_overwrite(tmp_path):
    create(tmp_path, ONE_PER_SPLIT, seed=1)
    before = contents(tmp_path / "out")
    (tmp_path / "some").mkdir()
    for file in sorted(ALL_FILES):  # each alone is enough
        (tmp_path / "some" / file).touch()
        with pytest.raises(UserError, match=f"{file} already exists; pass --overwrite"):
            create(tmp_path, many_entries(), "some")
        (tmp_path / "some" / file).unlink()
    create(tmp_path, many_entries(), "other")
    create(tmp_path, many_entries(), overwrite=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "other") != before


def test_script_and_function_have_the_tutorials_defaults():
    args, function = get_args([]), inspect.signature(create_input_files).parameters
    defaults = {"captions_per_image": 5, "min_word_freq": 5, "max_len": 50, "output_folder": "data"}
    for name, default in defaults.items():
        assert getattr(args, name) == function[name].default == default
    assert args.dataset == "demo" and args.workers is function["workers"].default is None


def test_a_run_that_fails_leaves_the_files_of_an_earlier_one_and_no_others(tmp_path, monkeypatch):
    create(tmp_path, ONE_PER_SPLIT)
    before = contents(tmp_path / "out")

    def fail(path, content):
        if "TEST" in os.path.basename(path):
            raise OSError(28, "No space left on device")
        return write_json(path, content)

    monkeypatch.setattr(input_files, "write_json", fail)
    with pytest.raises(UserError, match="out cannot be written"):
        create(tmp_path, many_entries(), overwrite=True)
    assert contents(tmp_path / "out") == before


def test_no_word_map_stands_beside_files_that_were_not_all_moved(tmp_path, monkeypatch):
    create(tmp_path, ONE_PER_SPLIT)

    def fail(source, target, replace=os.replace):
        if Path(target).name.startswith("TEST_CAPTIONS") and Path(target).parent.name == "out":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="out cannot be written: No space left.*--output_folder"):
        create(tmp_path, many_entries(), overwrite=True)
    left = set(contents(tmp_path / "out"))
    assert f"TRAIN_IMAGES_{NAME}.hdf5" in left and f"WORDMAP_{NAME}.json" not in left


def test_what_a_killed_run_left_is_removed(tmp_path):
    create(tmp_path, ONE_PER_SPLIT, "whole")
    for left in (f".unfinished_{NAME}_abc", f".unfinished_{NAME}"):  # the second: of older versions
        (tmp_path / "out" / left).mkdir(parents=True)
        (tmp_path / "out" / left / f"TRAIN_IMAGES_{NAME}.hdf5").write_bytes(b"half")
    other = tmp_path / "out" / ".unfinished_another"
    other.mkdir()
    create(tmp_path, ONE_PER_SPLIT)
    other.rmdir()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def start_slow_run(tmp_path, n=100):
    """The script once two workers have begun to read n large images, and the ids of these"""
    names = [f"{i}.png" for i in range(n)]
    path = prepare(tmp_path, [entry(name, captions=["a dog"] * 6) for name in names])
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / names[0], compress_level=1)
    for name in names[1:]:
        (tmp_path / "images" / name).unlink()
        os.link(tmp_path / "images" / names[0], tmp_path / "images" / name)
    options = f"--karpathy_json {path} --image_folder {path.parent}/images --workers 2"
    command = [sys.executable, ROOT / "create_input_files.py", *options.split()]
    run = {"cwd": tmp_path, "start_new_session": True, "preexec_fn": restore_interrupts}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **run)
    while not list(tmp_path.glob("data/.unfinished_*/*.hdf5")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, list(map(int, children))


def running(pid):
    """Whether there is such a process, and it is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("end", ["an interrupt", "a killed parent", "a killed worker"])
def test_a_run_that_is_stopped_leaves_no_process_and_no_files(tmp_path, end):
    process, workers = start_slow_run(tmp_path)
    if end == "an interrupt":
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid if end == "a killed parent" else workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    left = os.listdir(tmp_path / "data")
    if end == "an interrupt":
        assert process.returncode == 130 and stderr == "create_input_files.py: interrupted\n"
    elif end == "a killed worker":
        assert process.returncode == 2 and "--workers" in stderr and stderr.count("\n") == 1
    else:
        assert len(left) == 1 and left.pop().startswith(".unfinished_")  # the next run removes it
    deadline = time.monotonic() + 30
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(running, workers)) and not left


# Several data sets joined into one

DOGS = [entry("0.png", captions=["a dog", "the dog"]), entry("1.png", "val", ["a dog runs"])]
CATS = [
    entry("0.png", captions=["a cat", "a cat sits"]),
    entry("1.png", captions=["one cat"]),
    entry("2.png", "val", ["a cat"]),
    entry("3.png", "test", ["no cat"]),
]


def write_sources(folder, names=("dogs", "cats")):
    """The JSON files and image folders of DOGS and CATS."""
    paths = []
    for part, name, entries in zip(("one", "two"), names, (DOGS, CATS)):
        path = prepare(folder / part, entries)
        path.write_text(json.dumps({"images": entries, "dataset": name}))
        paths.append(str(path))
    return paths, [str(folder / part / "images") for part in ("one", "two")]


def join(folder, paths, folders):
    create_input_files("x", paths, folders, 2, 1, str(folder / "out"), workers=0, overwrite=True)
    return lambda kind: json.loads(next((folder / "out").glob(f"{kind}_x_*")).read_text())


def test_joined_files_are_those_of_the_parts_one_after_the_other(tmp_path):
    read = join(tmp_path, *write_sources(tmp_path))
    # In training captions: dog and the: 2 and 1; a 3, cat 3, sits and one 1.
    assert list(read("WORDMAP")) == ["<pad>", "a", "dog", "cat", "<unk>", "<start>", "<end>"]
    assert [(e["source"], e["filename"], e["references"]) for e in read("TRAIN_REFERENCES")] == [
        ("dogs", "0.png", [["a", "dog"], ["the", "dog"]]),
        ("cats", "0.png", [["a", "cat"], ["a", "cat", "sits"]]),
        ("cats", "1.png", [["one", "cat"]]),
    ]
    assert [entry["source"] for entry in read("VAL_REFERENCES")] == ["dogs", "cats"]
    assert [entry["source"] for entry in read("TEST_REFERENCES")] == ["cats"]
    data = CaptionDataset(tmp_path / "out", NAME.replace("0_min", "1_min"), "TRAIN")
    assert [int(data[i][0][0, 0, 0]) for i in range(3)] == [grey_of(0), grey_of(0), grey_of(1)]
    assert data.lengths.view(3, 2).gt(1).sum(1).tolist() == [2, 2, 1]


def test_sources_are_named_after_their_file_or_numbered(tmp_path):
    read = join(tmp_path, *write_sources(tmp_path, ("pets", "pets")))
    assert [entry["source"] for entry in read("VAL_REFERENCES")] == ["pets_1", "pets_2"]
    prepare(tmp_path, DOGS + CATS[2:])
    paths = [tmp_path / f"{name}.json" for name in ("first", "second")]
    for path, entries in zip(paths, (DOGS, CATS[2:])):
        path.write_text(json.dumps({"images": [entry | {"split": "train"} for entry in entries]}))
    read = join(tmp_path, list(map(str, paths)), str(tmp_path / "images"))  # one folder for both
    assert [entry["source"][0] for entry in read("TRAIN_REFERENCES")] == ["f", "f", "s", "s"]


def test_an_image_of_two_sources_and_a_wrong_number_of_folders_are_refused(tmp_path):
    paths, folders = write_sources(tmp_path)
    with pytest.raises(UserError, match=r"images/0.png is in .*one.* and in .*two.*"):
        join(tmp_path, paths, folders[:1])
    with pytest.raises(UserError, match="2 files of captions, but 3 image folders"):
        join(tmp_path, paths, [*folders, folders[0]])


def test_the_script_joins_and_refuses_files_that_exist_before_it_reads_captions(
    tmp_path, monkeypatch, capsys
):
    paths, folders = write_sources(tmp_path)
    options = "--captions_per_image 2 --min_word_freq 1 --workers 0 --dataset both".split()
    options += ["--output_folder", str(tmp_path / "out"), "--image_folder", *folders]
    monkeypatch.setattr("sys.argv", ["create_input_files.py", *options, "--karpathy_json", *paths])
    script()
    assert "TRAIN: 3 images" in capsys.readouterr().out
    for captions in (["--karpathy_json", "none.json"], []):
        monkeypatch.setattr("sys.argv", ["create_input_files.py", *options, *captions])
        with pytest.raises(UserError, match="already exists"):
            script()
