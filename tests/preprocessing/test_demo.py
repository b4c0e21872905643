import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from factories import contents, kill_at, needs_fork, needs_signals, restore_interrupts
from PIL import Image, ImageChops

from preprocessing import demo

ROOT = Path(__file__).resolve().parents[2]
COUNTS = {"train": 120, "val": 10, "test": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.make_demo(folder, **COUNTS)
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return json.loads((folder / "dataset_demo.json").read_text())["images"]


def captions(image):
    return [" ".join(sentence["tokens"]) for sentence in image["sentences"]]


def far_apart(found, wanted):
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


def test_same_seed_gives_the_same_bytes_in_a_used_folder(tmp_path):
    first, again = (demo.make_demo(tmp_path / name, 4, 2, 2, seed=3).parent for name in "ab")
    assert contents(first) == contents(again) and len(contents(first)) == 9
    demo.make_demo(again, 4, 2, 2, seed=4)
    demo.make_demo(again, 4, 2, 2, seed=3)
    assert contents(first) == contents(again)


def test_another_seed_draws_other_pictures(tmp_path):
    first, other = (contents(demo.make_demo(tmp_path / f"{s}", 4, 2, 2, s).parent) for s in (1, -1))
    assert first.keys() == other.keys() and all(first[name] != other[name] for name in first)


def test_an_interrupted_run_leaves_no_json(tmp_path, monkeypatch):
    path = demo.make_demo(tmp_path, 3, 1, 1)
    assert path.exists()
    monkeypatch.setattr(demo, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.make_demo(tmp_path, 3, 1, 1)
    assert not list(tmp_path.glob("*.json*"))


def test_too_many_scenes_are_refused_and_the_most_are_not():
    most = len(demo.ONE_OBJECT) + len(demo.TWO_OBJECTS)
    assert len(demo.choose_scenes(most, Random(0))) == most
    with pytest.raises(demo.UserError, match=str(most)):
        demo.choose_scenes(most + 1, Random(0))


def test_splits_have_the_sizes_asked_for(images):
    splits = [image["split"] for image in images]
    assert {split: splits.count(split) for split in COUNTS} == COUNTS


def test_pictures_are_256_by_256(folder, images):
    assert {Image.open(folder / i["filename"]).size for i in images} == {(256, 256)}


def test_five_different_captions_per_image(images):
    assert all(len(set(captions(image))) == 5 for image in images)
    assert all(len(set(demo.describe(scene))) == 5 for scene in demo.ONE_OBJECT + demo.TWO_OBJECTS)


def test_sentence_ids_are_unique_and_listed_by_their_image(images):
    for image in images:
        assert image["sentids"] == [s["sentid"] for s in image["sentences"]]
    assert len({k for image in images for k in image["sentids"]}) == 5 * len(images)


def test_splits_share_no_scene(images):
    scenes = [frozenset(captions(image)) for image in images]
    assert len(set(scenes)) == len(scenes)


def test_words_name_one_object_and_every_caption_contains_them(images):
    for image in images:
        words = [word for obj in image["objects"] for word in obj["words"]]
        assert len(set(words)) == len(words)
        assert all(text.split().count(word) == 1 for text in captions(image) for word in words)
        others = set(demo.SHAPES) - set(words)
        assert not any(others & set(text.split()) for text in captions(image))


def test_boxes_are_tight_around_what_each_object_changed():
    """The oracle: the pixels that differ when the object is left out."""
    rng = Random(5)
    for scene in demo.choose_scenes(50, rng):
        background, objects = demo.compose(scene, rng)
        picture = demo.draw(background, objects)
        for i, (points, _) in enumerate(objects):
            without = demo.draw(background, objects[:i] + objects[i + 1 :])
            changed = ImageChops.difference(picture, without).getbbox()
            assert far_apart(changed, demo.box(points)) < 1.5  # pixels


def test_boxes_in_the_file_fit_the_dark_pixels_of_the_picture(folder, images):
    for image in images:
        channels = Image.open(folder / image["filename"]).split()
        darkest = ImageChops.darker(ImageChops.darker(*channels[:2]), channels[2])
        dark = darkest.point(lambda value: 255 * (value < 95))
        for obj in image["objects"]:
            box = [256 * v for v in obj["box"]]
            assert 0 < box[0] < box[2] < 256 and 0 < box[1] < box[3] < 256
            x0, y0 = int(box[0]) - 4, int(box[1]) - 4
            around = dark.crop((x0, y0, int(box[2]) + 5, int(box[3]) + 5)).getbbox()
            found = [v + (x0, y0)[i % 2] for i, v in enumerate(around)]
            assert far_apart(found, box) < 3.5  # pixels; the tip of a large heart fades out


def test_positions_and_sizes_in_captions_are_true_of_the_boxes(images):
    """Read the captions, not the scene: each way to say it has its own test on the boxes."""

    def above(a, b):
        return a[3] < b[1] and b[1] + b[3] - a[1] - a[3] > 2 * abs(a[0] - b[0] + a[2] - b[2])

    turned = lambda box: [box[1], box[0], box[3], box[2]]  # noqa: E731
    relations = {
        "above": above,
        "below": lambda a, b: above(b, a),
        "to the left of": lambda a, b: above(turned(a), turned(b)),
        "to the right of": lambda a, b: above(turned(b), turned(a)),
    }
    corners = {f"in the {v} {h} corner": (x, y) for x, h in [(0, "left"), (2, "right")]
               for y, v in [(0, "upper"), (2, "lower")]}  # fmt: skip
    places = {"at the top": (1, 0), "at the bottom": (1, 2), "in the middle": (1, 1),
              "on the left side": (0, 1), "on the right side": (2, 1)} | corners  # fmt: skip
    checked = set()
    for image in images:
        boxes = {obj["words"][1]: obj["box"] for obj in image["objects"]}
        for text in captions(image):
            words = text.split()
            named = [w for w in words if w in boxes]
            [where] = [w for w in [*relations, *places] if w in text]
            if where in relations:
                assert relations[where](*(boxes[w] for w in named))
            else:
                [box] = boxes.values()
                assert places[where] == (int(1.5 * (box[0] + box[2])), int(1.5 * (box[1] + box[3])))
            for name in named:
                side = 256 * max(boxes[name][2] - boxes[name][0], boxes[name][3] - boxes[name][1])
                size = words[words.index(name) - 2]
                assert {"small": 89 < side < 99, "large": 113 < side < 123}.get(size, True)
            checked.add(where)
    assert checked >= relations.keys() and len(checked) > 8


def test_every_colour_is_drawn_as_its_name():
    for colour, rgb in demo.COLOURS.items():
        scene = ([("large", colour, "square")], (1, 1))
        background, objects = demo.compose(scene, Random(0))
        assert far_apart(demo.draw(background, objects).getpixel((128, 128)), rgb) <= 14


@needs_signals
def test_interrupt_while_the_demo_is_drawn_ends_it_before_the_rest_and_keeps_the_pictures(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "create_input_files.py", "--output_folder", tmp_path],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_interrupts,
    )
    while len(list(tmp_path.glob("demo/*.png"))) < 20 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.endswith("create_input_files.py: interrupted\n")
    assert 20 <= len(list(tmp_path.glob("demo/*.png"))) < 1000
    assert not list(tmp_path.glob("demo/*.json"))


def test_existing_demo_is_not_drawn_again(tmp_path):
    demo.make_demo(tmp_path, 5, 1, 1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    drawn = contents(tmp_path)
    (tmp_path / "demo_00002.png").unlink()
    (tmp_path / "demo_00003.png").write_bytes(b"half")
    demo.make_demo(tmp_path, 5, 1, 1)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert [path.stem[-1] for path in before if before[path] != after[path]] in (
        ["2", "3"],
        ["3", "2"],
    )
    assert contents(tmp_path) == drawn


@needs_fork
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
