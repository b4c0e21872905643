import json
from random import Random

import numpy as np
import pytest
from factories import contents
from PIL import Image

from preprocessing import demo

COUNTS = {"train": 85, "val": 8, "test": 8}


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


def test_same_seed_gives_the_same_bytes_also_in_a_used_folder(tmp_path):
    first, again = (demo.make_demo(tmp_path / name, 4, 2, 2, seed=3).parent for name in "ab")
    assert contents(first) == contents(again) and len(contents(first)) == 9
    other = contents(demo.make_demo(again, 4, 2, 2, seed=4).parent)
    assert all(other[name] != content for name, content in contents(first).items())


def test_several_processes_draw_what_one_does(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 1)
    assert contents(demo.make_demo(tmp_path, **COUNTS).parent) == contents(folder)


def test_an_interrupted_run_leaves_no_json(tmp_path, monkeypatch):
    path = demo.make_demo(tmp_path, 3, 1, 1)
    assert path.exists()
    monkeypatch.setattr(demo, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.make_demo(tmp_path, 3, 1, 1)
    assert not list(tmp_path.glob("*.json*"))


def test_more_scenes_than_exist_are_refused(tmp_path):
    count = len(demo.ONE_OBJECT) + len(demo.TWO_OBJECTS)
    assert len(demo.choose_scenes(count, Random(0))) == count
    with pytest.raises(demo.UserError, match=str(count)):
        demo.choose_scenes(count + 1, Random(0))
    with pytest.raises(demo.UserError, match=str(count)):  # before a list of so many is made
        demo.make_demo(tmp_path, train=1 << 60)


def test_splits_have_the_sizes_asked_for_and_share_no_scene(folder, images):
    splits = [image["split"] for image in images]
    assert {split: splits.count(split) for split in COUNTS} == COUNTS
    assert {Image.open(folder / i["filename"]).size for i in images} == {(256, 256)}
    assert len({frozenset(captions(image)) for image in images}) == len(images)
    assert all(len(set(captions(image))) == 5 for image in images)
    sentids = [k for image in images for k in image["sentids"]]
    assert sentids == [s["sentid"] for image in images for s in image["sentences"]]
    assert len(set(sentids)) == 5 * len(images)


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
        for i, (_, points, _) in enumerate(objects):
            without = demo.draw(background, objects[:i] + objects[i + 1 :])
            change = np.abs(np.asarray(picture, int) - np.asarray(without, int)).max(2) > 8
            rows, columns = change.any(1).nonzero()[0], change.any(0).nonzero()[0]
            changed = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            assert far_apart(changed, demo.box(points)) < 1.7  # pixels


def test_positions_and_sizes_in_captions_are_true_of_the_boxes(images):
    """Read the captions, not the scene. One object is in a cell of 3 x 3, two are clearly apart."""
    directions, checked = {"above": 1j, "below": -1j, "left": 1, "right": -1}, set()
    for image in images:
        boxes = {obj["words"][1]: obj["box"] for obj in image["objects"]}
        for text in captions(image):
            words = text.split()
            named = [word for word in words if word in boxes]
            corners = [(complex(*boxes[name][:2]), complex(*boxes[name][2:])) for name in named]
            centres, halves = [sum(pair) / 2 for pair in corners], [(b - a) / 2 for a, b in corners]
            if len(named) == 2:
                [way] = directions.keys() & set(words)
                apart, sizes = (x / directions[way] for x in (centres[1] - centres[0], sum(halves)))
                assert apart.real > max(abs(sizes.real), 2 * abs(apart.imag))
            else:
                right = 1 + ("right" in words) - ("left" in words)
                down = 1 + bool({"lower", "bottom"} & {*words}) - bool({"upper", "top"} & {*words})
                way = right, down
                assert way == (int(3 * centres[0].real), int(3 * centres[0].imag))
            for name, half in zip(named, halves):
                side, size = 512 * max(half.real, half.imag), words[words.index(name) - 2]
                assert {"small": 89 < side < 99, "large": 113 < side < 123}.get(size, True)
            checked.add(way)
    assert checked >= directions.keys() and len(checked) > 8


def test_every_colour_is_drawn_as_its_name():
    for colour, rgb in demo.COLOURS.items():
        scene = ([("large", colour, "square")], (1, 1))
        background, objects = demo.compose(scene, Random(0))
        assert far_apart(demo.draw(background, objects).getpixel((128, 128)), rgb) <= 14
