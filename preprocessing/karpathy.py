"""Captions and splits in Karpathy's JSON format, read and checked."""

import json
import os
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets import SPECIAL_TOKENS
from utils import UserError, check_is_file, count, read_json

# Karpathy's name of a split -> that of our files
SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}


class CaptionedImage(NamedTuple):
    path: str
    captions: list  # its captions of 1 to max_len words, each a list of words
    record: dict  # the image's entry in REFERENCES


def read_karpathy(path, dataset):
    """
    The content of a JSON file, or of dataset_{dataset}.json in a .zip, as Karpathy distributes
    them. Raises UserError if it cannot be read.
    """
    if not str(path).lower().endswith(".zip"):
        return read_json(path)
    check_is_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(name).name: name for name in sorted(archive.namelist())}
            wanted = f"dataset_{dataset}.json"
            if wanted in members:
                return json.loads(archive.read(members[wanted]))
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except Exception as error:  # zipfile and json raise many kinds for foreign bytes
        raise UserError(f"{path} cannot be read: {error}") from None
    names = [Path(name).stem.removeprefix("dataset_") for name in members if "dataset_" in name]
    raise UserError(
        f"{path} has no {wanted}; pass --dataset, one of: {', '.join(names) or 'none in it'}"
    )


def read_sources(sources, max_len):
    """
    The splits of several data sets in one, as `read_splits` returns them. Each image's record has
    the "source" it comes from, if there are several: what the file says, else its name without
    folder and suffix; numbered if two are equal.

    sources: tuples (content of a Karpathy JSON, its path, image folder)
    """
    if len(sources) == 1:
        return read_splits(*sources[0], max_len)
    joined, seen = {split: [] for split in SPLITS.values()}, {}
    parts = [read_splits(*source, max_len) for source in sources]
    names = [str(content.get("dataset") or Path(path).stem) for content, path, _ in sources]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names, 1)]
    for part, name, (_, path, _) in zip(parts, names, sources):
        for split, images in part.items():
            for image in images:
                other = seen.setdefault(os.path.realpath(image.path), path)
                if other is not path:
                    raise UserError(f"{image.path} is in {other} and in {path}; leave one out")
                image.record["source"] = name
                joined[split].append(image)
    return joined


def read_splits(karpathy, source, image_folder, max_len):
    """
    Check the content of a JSON file: {split: CaptionedImages} for TRAIN, VAL and TEST, in the order
    of the file, without images that have no caption of 1 to max_len words.

    source: the path of the JSON, for errors
    Raises UserError unless every image is in Karpathy's format, occurs once and is inside the image
    folder. Whether its file exists is not checked.
    """
    if not isinstance(karpathy, dict) or not isinstance(karpathy.get("images"), list):
        raise UserError(f"{source} has no list 'images'; pass captions of your own as --captions")
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} not found")
    splits = {split: [] for split in SPLITS.values()}
    skipped, seen = Counter(), set()
    for index, entry in enumerate(karpathy["images"]):
        where = f"{source}: image {index}"
        if isinstance(entry, dict) and isinstance(entry.get("filename"), str):
            where += f", {entry['filename']}"
        if wrong := _find_mistake(entry):
            raise UserError(f"{where}: {wrong}")
        image, split = _captioned_image(entry, index, image_folder, max_len), SPLITS[entry["split"]]
        if image.record["filename"].startswith("../"):
            raise UserError(f"{where} is not inside the image folder {image_folder}")
        if image.path in seen:
            raise UserError(f"{where} occurs twice; merge the two")
        seen.add(image.path)
        if image.captions:
            splits[split].append(image)
        else:
            skipped[split] += 1
    for split, number in skipped.items():
        images = count(number, "image")
        print(f"{split}: {images} skipped, without a caption of 1 to {max_len} words")
    if not splits["TRAIN"]:
        raise UserError(f"{source}: no image to train on; give some the split 'train'")
    return splits


def _find_mistake(entry):
    """What in an image's entry is not in Karpathy's format, or None"""
    try:
        name = [entry["filename"], entry.get("filepath", "")]
        captions = [sentence["tokens"] for sentence in entry["sentences"]]
        if not all(isinstance(caption, list) for caption in captions):
            raise TypeError
        split, objects = entry["split"], entry.get("objects", [])
    except (AttributeError, KeyError, TypeError):
        return "not in Karpathy's format: filename, split and sentences, each with a list of tokens"
    if not entry["filename"] or not all(_is_text(part) and "\0" not in part for part in name):
        return f"{name} is not a file name; correct it"
    if not isinstance(split, str) or split not in SPLITS:
        return f"split {split!r} is not one of {', '.join(SPLITS)}"
    words = [word for caption in captions for word in caption]
    if wrong := [word for word in words if not _is_text(word)]:
        return f"{wrong[0]!r} among the tokens of a caption is not a word; tokens are strings"
    if reserved := set(words).intersection(SPECIAL_TOKENS):
        return f"a caption has {min(reserved)}, a reserved token; remove it"
    if not _are_objects(objects):
        return "objects must be a list, each with a box of 4 numbers and words"


def _is_text(value):
    """Whether it is a string that UTF-8 can encode; JSON allows half of a surrogate pair."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _are_objects(objects):
    """Whether this is a list of objects in a picture: {"box": 4 numbers, "words": its names}"""
    try:
        return isinstance(objects, list) and all(
            len(obj["box"]) == 4
            and all(type(x) in (int, float) for x in obj["box"])
            and all(isinstance(word, str) for word in obj["words"])
            for obj in objects
        )
    except (KeyError, TypeError):
        return False


def _captioned_image(entry, index, image_folder, max_len):
    name = os.path.join(entry.get("filepath", ""), entry["filename"])
    name = os.path.relpath(os.path.join(image_folder, name), image_folder)
    captions = [sentence["tokens"] for sentence in entry["sentences"]]
    references = [caption for caption in captions if caption]
    record = {
        "filename": name.replace(os.sep, "/"),
        "image_id": entry.get("cocoid", entry.get("imgid", index)),
        "references": references,
    }
    if "objects" in entry:
        record["objects"] = entry["objects"]
    usable = [caption for caption in references if len(caption) <= max_len]
    return CaptionedImage(os.path.join(image_folder, name), usable, record)
