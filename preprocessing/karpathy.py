"""Captions and splits in Karpathy's JSON format, read and checked."""

import json
import os
import re
import zipfile
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from datasets import SPECIAL_TOKENS
from utils import UserError, check_is_file, count, read_json

# Karpathy's name of a split -> that of our files
SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}
# What programs that train put around captions, such as <start>, </s>, [SEP], <|endoftext|>, endseq
_START = r"(?:(?i:<(?:start|begin|go|s|[bs]o[sc]|startseq|\|\w+\|)>|\b(?:startseq|ssss)\b)"
_START += r"|\[(?:CLS|[BS]OS|START)\])"
_END = r"(?:(?i:<(?:end|/s|eo[sc]|pad|null|endseq|\|\w+\|)>|\b(?:endseq|eeee)\b)"
_END += r"|\[(?:SEP|EOS|END|PAD)\])"
_MARKS = re.compile(rf"^(?:\W*?{_START})+|(?:{_END}\W*)+$")


class CaptionedImage(NamedTuple):
    path: str
    captions: list  # its captions of 1 to max_len words, each a list of words
    record: dict  # the image's entry in REFERENCES


def read_karpathy(path, dataset):
    """The content of a JSON file, or of dataset_{dataset}.json in a .zip of Karpathy's."""
    if not str(path).lower().endswith(".zip"):
        return read_json(path)
    check_is_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {Path(name).name: name for name in sorted(archive.namelist())}
            wanted = f"dataset_{dataset}.json"
            if wanted in members:
                return json.loads(archive.read(members[wanted]))
    except Exception as error:  # zipfile and json raise many types for damaged files
        reason = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise UserError(f"{path} {reason}") from None
    names = [Path(name).stem.removeprefix("dataset_") for name in members if "dataset_" in name]
    raise UserError(
        f"{path} has no {wanted}; pass --dataset, one of: {', '.join(names) or 'none in it'}"
    )


def strip_marks(captions):
    """Captions without marks of their beginning and end, and how many had some"""
    pairs = [_MARKS.subn("", caption) for caption in captions]
    return [text for text, _ in pairs], sum(found > 0 for _, found in pairs)


def say_marks(source, number, print_line=print):
    """number: of the captions in the file `source` that had marks"""
    if number:
        captions = count(number, "caption")
        print_line(f"{source}: marks such as <start> and <end> removed from {captions}")


def read_sources(sources, folders, dataset, max_len):
    """
    The splits of one or several data sets, {split: CaptionedImages}, as `read_splits` returns them.
    If there are several, each image's record has the "source" it comes from: the file's "dataset",
    else its name without folder and suffix; numbered if two are equal.

    sources, folders: as karpathy_json_path and image_folder of `create_input_files`
    """
    sources, folders = (x if isinstance(x, (list, tuple)) else [x] for x in (sources, folders))
    if len(folders) not in (1, len(sources)):
        raise UserError(
            f"{len(sources)} files of captions, but {len(folders)} image folders; pass "
            f"a folder for each file, or one for all"
        )
    contents = [x if isinstance(x, dict) else read_karpathy(x, dataset) for x in sources]
    paths = [x["source"] if isinstance(x, dict) else x for x in sources]
    parts = [
        read_splits(content, path, folder, max_len)
        for content, path, folder in zip(contents, paths, folders * len(sources))
    ]
    if not any(part["TRAIN"] for part in parts):
        files = ", ".join(map(str, paths))
        raise UserError(f"{files}: no image to train on; give some the split 'train'")
    if len(parts) == 1:
        return parts[0]
    names = [
        str(content.get("dataset") or Path(path).stem) for content, path in zip(contents, paths)
    ]
    if len(set(names)) < len(names):
        names = [f"{name}_{i}" for i, name in enumerate(names, 1)]
    joined, seen = {split: [] for split in SPLITS.values()}, {}
    for part, name, path in zip(parts, names, paths):
        for split, images in part.items():
            for image in images:
                other = seen.setdefault(os.path.realpath(image.path), path)
                if other is not path:
                    raise UserError(f"{image.path} is in {other} and in {path}; leave one out")
                image.record["source"] = name
            joined[split] += images
    return joined


def read_splits(karpathy, source, image_folder, max_len):
    """
    The content of a JSON file as {split: CaptionedImages} for TRAIN, VAL and TEST, in the order of
    the file, without images of other splits, as in the tutorial, or that have no caption of 1 to
    max_len words. source: its path, for errors

    Raises UserError unless every image is in Karpathy's format, occurs once and is inside the image
    folder. Whether its file exists is not checked.
    """
    if not isinstance(karpathy, dict) or not isinstance(karpathy.get("images"), list):
        raise UserError(f"{source} has no list 'images'; pass captions of your own as --captions")
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} not found")
    splits = {split: [] for split in SPLITS.values()}
    skipped, left_out, seen, marked = Counter(), Counter(), set(), 0
    for index, entry in enumerate(karpathy["images"]):
        where = f"{source}: image {index}"
        if isinstance(entry, dict) and "filename" in entry:
            where += f", {entry['filename']}"
        if wrong := _find_mistake(entry):
            raise UserError(f"{where}: {wrong}")
        if (split := SPLITS.get(entry["split"])) is None:
            left_out[entry["split"]] += 1
            continue
        captions = [sentence["tokens"] for sentence in entry["sentences"]]
        texts, number = strip_marks(map(" ".join, captions))
        if number:
            captions, marked = [text.split() for text in texts], marked + number
        if reserved := set(chain(*captions)).intersection(SPECIAL_TOKENS):
            raise UserError(f"{where}: a caption has {min(reserved)}, a reserved token; remove it")
        image = _captioned_image(entry, captions, index, image_folder, max_len)
        if image.record["filename"].startswith("../"):
            raise UserError(f"{where} is not inside the image folder {image_folder}")
        if image.path in seen:
            raise UserError(f"{where} occurs twice; merge the two")
        seen.add(image.path)
        if image.captions:
            splits[split].append(image)
        else:
            skipped[split] += 1
    say_marks(source, marked)
    if left_out:
        images, names = count(left_out.total(), "image"), ", ".join(map(repr, left_out))
        print(f"{source}: {images} left out, of split {names}, not {', '.join(SPLITS)}")
    for split, number in skipped.items():
        images = count(number, "image")
        print(f"{split}: {images} skipped, without a caption of 1 to {max_len} words")
    return splits


def _find_mistake(entry):
    """What in an image's entry is not in Karpathy's format, or None"""
    try:
        captions = [sentence["tokens"] for sentence in entry["sentences"]]
        objects = entry.get("objects", [])
        lists = captions + [obj["words"] for obj in objects]
        text = [entry["filename"], entry.get("filepath", ""), entry["split"], *chain(*lists)]
        "".join(text).encode()  # TypeError unless all are strings, ValueError for surrogates
        valid = all(isinstance(words, list) for words in lists)
        valid &= all([type(x) in (int, float) for x in obj["box"]] == [True] * 4 for obj in objects)
    except (AttributeError, KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        return (
            "not in Karpathy's format: filename, split and sentences, each with a list of tokens, "
            "which are words; objects, if there are any, have a box of 4 numbers and words"
        )


def _captioned_image(entry, captions, index, image_folder, max_len):
    name = os.path.join(entry.get("filepath", ""), entry["filename"])
    name = os.path.relpath(os.path.join(image_folder, name), image_folder)
    captions = list(filter(None, captions))
    record = {
        "filename": name.replace(os.sep, "/"),
        "image_id": entry.get("cocoid", entry.get("imgid", index)),
        "references": captions,
    }
    if "objects" in entry:
        record["objects"] = entry["objects"]
    usable = [caption for caption in captions if len(caption) <= max_len]
    return CaptionedImage(os.path.join(image_folder, name), usable, record)
