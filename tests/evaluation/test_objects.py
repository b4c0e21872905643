"""Objects that captions name: which they are, whether they are there, and hits in their boxes."""

import numpy as np
import pytest
from factories import refused

from evaluation.objects import MARGIN, Objects, find_things, in_boxes, read_boxes, summarise
from utils import write_json


class Data(list):
    """Entries as those of a CaptionDataset"""

    def entry(self, i):
        return {"references": [], **self[i]}


def test_a_location_is_in_a_box_if_it_looks_there_or_within_a_margin_beside_it():
    """The oracle: each location alone, which looks at its centre + offset, not beyond the edge."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        boxes = rng.random((2, 4)) * [0.6, 0.6, 0.4, 0.4]
        boxes[:, 2:] += boxes[:, :2]
        offset, margin = rng.uniform(-0.3, 0.3, 2), rng.choice([0, 0.07])
        expected = []
        for row, column in np.ndindex(4, 4):
            x, y = (min(max(i / 4 + 0.125 + o, 0), 1) for i, o in zip((column, row), offset))
            beside = [(a - x, x - c, b - y, y - d) for a, b, c, d in boxes]
            expected.append(min(map(max, beside)) <= margin)
        assert in_boxes(boxes, 16, offset, margin).tolist() == expected
        found += expected
    assert 0.1 < np.mean(found) < 0.9
    # Column 1 of 4 spans 0.25..0.5; a box that ends exactly at its centre contains it.
    assert [in_boxes([[0, 0, x, 1]], 16)[1] for x in (0.37, 0.375)] == [False, True]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("two men ride horses past a bus", ["1 person", "3 horse", "6 bus"]),
        ("a hot dog and a dog on benches", ["2 hot dog", "5 dog", "7 bench"]),
        ("puppies with knives in a wine glass", ["0 dog", "2 knife", "6 wine glass"]),
        ("a baby elephant by a train track", ["2 elephant"]),
        ("a baby on a passenger train", ["1 person", "5 train"]),
        ("a child passenger and a baby", ["2 person", "5 person"]),
        ("traffic lights at the home plate", ["1 traffic light"]),
        ("the glass looks grass green", []),
        ("", []),
    ],
)
def test_things_are_named_by_synonyms_plurals_and_pairs_of_words(caption, expected):
    assert [f"{i} {thing}" for i, thing in find_things(caption.split())] == expected


def test_figures_of_named_objects_are_those_counted_by_hand(tmp_path):
    """Two images of the file, one that it lacks, and one of another data set with the same id"""
    images = [(7, 100, 50), (8, 10, 10)]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": width, "height": height}
            for i, width, height in images
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 50, 50]},  # the left half
            {"image_id": 7, "category_id": 2, "bbox": [75, 25, 25, 25]},  # 1 of 4 x 4 places: 12..
            {"image_id": 7, "category_id": 2, "bbox": [0, 0, 25, 12.5]},
        ],
    }
    write_json(tmp_path / "i.json", content)
    boxes, _ = read_boxes(tmp_path / "i.json")
    assert boxes == {
        7: {"cat": [[0, 0, 0.5, 1]], "dog": [[0.75, 0.5, 1, 1], [0, 0, 0.25, 0.25]]},
        8: {},
    }
    names = {7: "val2014/COCO_val2014_000000000007.jpg", 8: "8.jpg", 9: "9.jpg"}
    data = Data([{"image_id": i, "filename": name} for i, name in names.items()])
    data.append({"image_id": 7, "filename": "1234567_8.jpg"})
    data[0]["references"] = [["a", "kitten", "on", "a", "sofa"]]
    objects = Objects(data, tmp_path / "i.json")
    words = "a cat by dogs a couch a zebra".split()
    assert bool(objects) and objects.find(2, words) is objects.find(3, words) is None
    attention, evidence = np.full((8, 16), 0.01), np.zeros((8, 16))
    attention[1, 2], evidence[1, 5] = 0.5, 1  # 2 is right of the cat's box by 1/8, 5 in it
    attention[3, 15], evidence[3, 4] = 0.85, 1  # in a dog; below one
    found = objects.measure(0, words, attention, evidence, (0.0, 0.0))
    assert [one.exists for one in found] == [True, True, True, False]
    cat, dog, couch, zebra = (one.figures for one in found)
    assert couch is zebra is None  # the couch is known from a reference, without a box
    assert cat == pytest.approx((0, 0, 1, 1, 0.08 / 0.65, 8 / 16))
    assert dog == pytest.approx((1, 1, 0, 0, 0.87 / 1.0, 3 / 16))
    assert MARGIN < 1 / 8
    [silent] = objects.measure(0, ["dog"], attention, 0 * evidence, (0.0, 0.0))
    assert silent.figures[2:4] == (0, 0)  # though the first location is in a dog's box
    nothing = objects.measure(1, ["zebra"], attention, evidence, (0.0, 0.0))
    mean = (0.08 / 0.65 + 0.87) / 2
    expected = (50, 50, 50, 50, 100 * mean, 100 * 11 / 32, 100 * 2 / 5, 100)
    texts = tuple(f"{x:.2f}" for x in expected)
    assert summarise([found, nothing, None]) == texts
    assert summarise([found, nothing, [], []])[-1] == "50.00"
    assert summarise([None]) == ("–",) * 8


def test_the_demos_objects_are_named_by_their_own_words():
    left, right = ({"box": [x, 0, x + 0.5, 1], "words": ["cat", "red"]} for x in (0, 0.5))
    data = Data([{"objects": [left, right]}, {"objects": [{**left, "words": ["dog"]}]}])
    objects, alphas = Objects(data), np.eye(16)
    assert objects.find(0, ["the", "dog", "red"]) == [(1, "dog"), (2, "red")]
    found = objects.measure(0, ["the", "dog", "red"], alphas, alphas, (0.0, 0.0))
    assert [one.exists for one in found] == [False, True] and found[1].figures[0] == 1
    assert not Objects(Data([{}]))


def test_a_file_that_is_no_coco_instances_is_named(tmp_path):
    path = tmp_path / "i.json"
    images, categories = [{"id": 1, "file_name": "1.jpg", "width": 1, "height": 1}], []
    good = {"images": images, "categories": categories, "annotations": []}
    for change in ({"images": 3}, {"annotations": [{"image_id": 2, "bbox": [0, 0, 1, 1]}]}, {}):
        write_json(path, good | change)
        refused(path, load=lambda path: Objects(Data([{"image_id": 1, "filename": "1.jpg"}]), path))
