"""
Objects that captions name: are they in the picture, and do attention and evidence lie in their
boxes? The demo's data say where its objects are and which words name them. For photographs, with
`eval.py --boxes`, these are COCO's 80 things, named as CHAIR has it (Rohrbach et al. 2018, arXiv
1809.02156): by the names of a line of things.txt, where _ is a space, and their plurals.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils import UserError, read_json

MARGIN = 15 / 256  # Zhang et al. 2016, arXiv 1608.00507: compensates for coarse attention maps
NO_THING = "-"  # the first name in the line of things.txt whose names only look like things
QUALIFIERS = ("baby", "adult", "child", "passenger")  # persons, but not before another thing
COLUMNS = ("attention", "near", "evidence", "near", "inside", "chance", "CHAIRi", "CHAIRs")


class NamedObject(NamedTuple):
    """An object that a caption names"""

    exists: bool  # in the picture, by boxes or references
    # The first six of COLUMNS as numbers from 0 to 1; None for an object without boxes
    figures: tuple[float, ...] | None


@cache
def _names():
    """Of COCO's things: the words of each name -> the first name of its thing"""
    lines = Path(__file__).with_name("things.txt").read_text().splitlines()
    return {
        tuple(name.split("_")): line.split()[0].replace("_", " ")
        for line in lines
        for name in line.split()
    }


def _find_thing(*words):
    """The thing of this name, singular or plural; None if there is none"""
    *first, last = words
    singulars = [last] + [last.removesuffix(end) for end in ("s", "es") if last.endswith(end)]
    singulars += [last.removesuffix("ies") + "y"] if last.endswith("ies") else []
    return next((_names()[(*first, x)] for x in singulars if (*first, x) in _names()), None)


def find_things(words: list[str]) -> list[tuple[int, str]]:
    """COCO's things that a caption names, each with the index of the (last) word that does"""
    found, i = [], 0
    while i < len(words):
        pair, thing = words[i : i + 2], _find_thing(words[i])
        if len(pair) == 2 and (named := _find_thing(*pair)):  # a hot dog is no dog
            i, thing = i + 1, named
        elif len(pair) == 2 and pair[0] in QUALIFIERS and _find_thing(pair[1]):
            thing = None
        if thing not in (None, NO_THING):
            found.append((i, thing))
        i += 1
    return found


def read_boxes(path: str) -> tuple[dict[int, dict[str, list]], dict[int, str]]:
    """
    A file in the form of COCO's instances_val2017.json -> {image id: {thing: [[left, top, right,
    bottom], as fractions of the image]}} and {image id: file name}; UserError for any other.
    """
    content, found = read_json(path), {}
    try:
        sizes = {x["id"]: (x["width"], x["height"]) for x in content["images"]}
        files = {x["id"]: x["file_name"] for x in content["images"]}
        names = {x["id"]: x["name"] for x in content["categories"]}
        found = {image: {} for image in sizes}
        for annotation in content["annotations"]:
            image, (x, y, w, h) = annotation["image_id"], annotation["bbox"]
            width, height = sizes[image]
            box = [x / width, y / height, (x + w) / width, (y + h) / height]
            found[image].setdefault(names[annotation["category_id"]], []).append(box)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} is not in the form of COCO's instances: images need id, file_name, width and "
            f"height, categories id and name, annotations image_id, category_id and bbox (wrong: "
            f"{error!r})"
        ) from None
    return found, files


def _is_same(entry, file):
    """Whether an image's entry, of the same id, is COCO's: other data sets have such ids, too."""
    name = Path(entry["filename"] or "").name
    return name == Path(file).name or str(entry["image_id"]).zfill(12) in name


class Objects:
    """
    The objects of a data set's images. data: a CaptionDataset; path: a file for `read_boxes`, which
    may lack some images; None: the objects that the data themselves have, perhaps none
    """

    def __init__(self, data, path=None):
        entries = [data.entry(i) for i in range(len(data))]
        if path is None:
            self._boxes = [_boxes_by_word(entry.get("objects", [])) for entry in entries]
            nouns = {noun for boxes in self._boxes for noun in boxes}
            self._find = lambda words: [(t, word) for t, word in enumerate(words) if word in nouns]
        else:
            (boxes, files), self._find = read_boxes(path), find_things
            ids = [entry["image_id"] for entry in entries]
            self._boxes = [
                boxes[i] if i in files and _is_same(entry, files[i]) else None
                for i, entry in zip(ids, entries)
            ]
            if not any(self._boxes):
                raise UserError(f"{path} has no boxes of this data set's images; pass its own")
        self._references = [entry["references"] for entry in entries]

    def __bool__(self):
        return any(self._boxes)

    def find(self, image, words):
        """The objects that an image's caption names, by word index; None if it has no boxes"""
        return None if self._boxes[image] is None else self._find(words)

    def measure(self, image, words, attention, evidence, offset):
        """
        The `NamedObject`s of an image's caption, T words; attention, evidence: (T, P) on a square
        grid; offset: of the encoder (see modeling/field_of_view.py)
        """
        boxes, measured = self._boxes[image], []
        exists = boxes.keys() | {x for text in self._references[image] for _, x in self._find(text)}
        for t, name in self._find(words):
            figures = None
            if name in boxes:
                inside, near = (
                    in_boxes(boxes[name], attention.shape[1], offset, m) for m in (0, MARGIN)
                )
                hits = (  # a word without any evidence is a miss
                    float(weights[t].max() > 0 and place[weights[t].argmax()])
                    for weights in (attention, evidence)
                    for place in (inside, near)
                )
                share = attention[t][inside].sum() / attention[t].sum()
                figures = *hits, float(share), float(inside.mean())
            measured.append(NamedObject(name in exists, figures))
        return measured


def _boxes_by_word(objects):
    """The "objects" of an image's entry -> {word: boxes}"""
    found = {}
    for one in objects:
        for word in one["words"]:
            found.setdefault(word, []).append(one["box"])
    return found


def in_boxes(
    boxes: list[list[float]],
    locations: int,
    offset: tuple[float, float] = (0.0, 0.0),
    margin: float = 0.0,
) -> np.ndarray:
    """
    Which of P locations on a square grid, (P,) bool, look at one of these boxes, [left, top, right,
    bottom] as fractions of the image, or at most `margin` beside it. offset: how far to the right
    of and below its place a location looks, but not beyond the image's edge
    """
    side = round(locations**0.5)
    centres = (np.arange(side) + 0.5) / side
    x, y = (np.clip(centres + shift, 0, 1) for shift in offset)
    inside = np.zeros((side, side), bool)
    for left, top, right, bottom in boxes:
        columns = (left - margin <= x) & (x <= right + margin)
        rows = (top - margin <= y) & (y <= bottom + margin)
        inside |= rows[:, None] & columns
    return inside.ravel()


def summarise(captions):
    """
    COLUMNS in per cent as texts; captions: the NamedObjects of each caption, None for images
    without boxes, which do not count. Dashes where there are none
    """
    captions = [objects for objects in captions if objects is not None]
    named = [one for objects in captions for one in objects]
    figures = [one.figures for one in named if one.figures]
    means = list(np.mean(figures, 0)) if figures else [None] * 6
    means.append(np.mean([not one.exists for one in named]) if named else None)
    wrong = [not all(one.exists for one in objects) for objects in captions]
    means.append(np.mean(wrong) if wrong else None)
    return tuple("–" if x is None else f"{100 * x:.2f}" for x in means)
