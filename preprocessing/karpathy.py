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


def read_karpathy(path, dataset):
    """
    The content of a JSON file, or of dataset_{dataset}.json in a .zip, as Karpathy distributes
    them. Raises UserError if it cannot be read.
    """
    if not str(path).lower().endswith(".zip"):
        return read_json(path)
    check_is_file(path)
    wanted = f"dataset_{dataset}.json"
    try:
        with zipfile.ZipFile(path) as archive:
            members = {PurePosixPath(name).name: name for name in archive.namelist()}
            if wanted not in members:
                names = [
                    name[len("dataset_") : -len(".json")]
                    for name in sorted(members)
                    if name.startswith("dataset_") and name.endswith(".json")
                ]
                raise UserError(
                    f"{path} has no {wanted}; pass --dataset, one of: "
                    f"{', '.join(names) or 'none in it'}"
                )
            return json.loads(archive.read(members[wanted]))
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except UserError:
        raise
    except Exception as error:  # zipfile and json raise many kinds for foreign bytes
        raise UserError(f"{path} cannot be read: {error}") from None


class CaptionedImage(NamedTuple):
    path: str
    captions: list  # its captions of 1 to max_len words, each a list of words
    record: dict  # the image's entry in REFERENCES


def _not_karpathy(where):
    return UserError(
        f"{where} is not in Karpathy's format: it needs filename, split and "
        f"sentences, each with a list of tokens"
    )


def _check_name(entry, where):
    """filepath/filename of an image in Karpathy's format; UserError if they are not valid."""
    parts = {"filepath": entry.get("filepath", ""), "filename": entry["filename"]}
    for key, part in parts.items():
        empty = key == "filename" and not part
        if not isinstance(part, str) or empty or "\0" in part or not _is_text(part):
            raise UserError(f"{where}: {key} {part!r} is not a file name; correct it")
    return os.path.join(*parts.values())


def _is_text(text):
    """Whether UTF-8 can encode it; JSON allows half of a surrogate pair, which it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_captions(entry, where):
    """The token lists of an image in Karpathy's format; UserError if they are not valid."""
    try:
        captions = [sentence["tokens"] for sentence in entry["sentences"]]
    except (KeyError, TypeError):
        captions = [None]
    for caption in captions:
        if not isinstance(caption, list):
            raise _not_karpathy(where)
        if not all(isinstance(word, str) for word in caption) or not _is_text("".join(caption)):
            wrong = [word for word in caption if not isinstance(word, str) or not _is_text(word)]
            raise UserError(
                f"{where}: {wrong[0]!r} among the tokens of a caption is not a word; "
                f"tokens are strings"
            )
        if reserved := set(caption).intersection(SPECIAL_TOKENS):
            raise UserError(f"{where}: a caption has {min(reserved)}, a reserved token; remove it")
    return captions


def _captioned_image(entry, index, source, image_folder, max_len):
    """Check one image of a Karpathy JSON; returns the split it goes to and its CaptionedImage."""
    where = f"{source}: image {index}"
    if not isinstance(entry, dict) or not {"filename", "split", "sentences"} <= entry.keys():
        raise _not_karpathy(where)
    name, split = _check_name(entry, where), entry["split"]
    where = f"{where}, {name}"
    if not isinstance(split, str) or split not in SPLITS:
        raise UserError(f"{source}: split {split!r} of {name} is not one of {', '.join(SPLITS)}")
    captions = _check_captions(entry, where)
    name = os.path.relpath(os.path.join(image_folder, name), image_folder)
    if name.split(os.sep)[0] == os.pardir:
        raise UserError(f"{source}: {name} is not inside the image folder {image_folder}")
    references = [caption for caption in captions if caption]
    record = {
        "filename": name.replace(os.sep, "/"),
        "image_id": entry.get("cocoid", entry.get("imgid", index)),
        "references": references,
    }
    if "objects" in entry:
        if not _are_objects(entry["objects"]):
            raise UserError(
                f"{where}: objects must be a list, each with a box of 4 numbers and words"
            )
        record["objects"] = entry["objects"]
    usable = [caption for caption in references if len(caption) <= max_len]
    return SPLITS[split], CaptionedImage(os.path.join(image_folder, name), usable, record)


def _are_objects(objects):
    """Whether this is a list of objects in a picture: {"box": 4 numbers, "words": its names}"""
    return isinstance(objects, list) and all(
        isinstance(obj, dict)
        and isinstance(obj.get("box"), list)
        and len(obj["box"]) == 4
        and all(type(x) in (int, float) for x in obj["box"])
        and isinstance(obj.get("words"), list)
        and all(isinstance(word, str) for word in obj["words"])
        for obj in objects
    )


def read_sources(sources, max_len):
    """
    The splits of several data sets in one, as `read_splits` returns them. Each image's record has
    the "source" it comes from, if there are several.

    sources: tuples (content of a Karpathy JSON, its path, image folder)
    """
    if len(sources) == 1:
        return read_splits(*sources[0], max_len)
    names = _source_names([(content, path) for content, path, _ in sources])
    joined, seen = {split: [] for split in SPLITS.values()}, {}
    for name, source in zip(names, sources):
        for split, images in read_splits(*source, max_len).items():
            for image in images:
                if (file := os.path.realpath(image.path)) in seen:
                    raise UserError(
                        f"{image.path} is in {seen[file]} and in {source[1]}; leave one of them out"
                    )
                seen[file] = source[1]
                image.record["source"] = name
                joined[split].append(image)
    return joined


def _source_names(sources):
    """
    A name for each (content, path): what the file says, else the path without folder and suffix;
    numbered if two are equal.
    """
    names = []
    for content, path in sources:
        name = content.get("dataset") if isinstance(content, dict) else None
        names.append(name if isinstance(name, str) and name else Path(path).stem)
    return (
        names
        if len(set(names)) == len(names)
        else [f"{name}_{i}" for i, name in enumerate(names, 1)]
    )


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
        split, image = _captioned_image(entry, index, source, image_folder, max_len)
        if image.path in seen:
            raise UserError(f"{source}: {image.record['filename']} occurs twice; merge the two")
        seen.add(image.path)
        if image.captions:
            splits[split].append(image)
        else:
            skipped[split] += 1
    for split, number in skipped.items():
        print(
            f"{split}: {count(number, 'image')} skipped, without a caption of 1 to {max_len} words"
        )
    if not splits["TRAIN"]:
        raise UserError(f"{source}: no image to train on; give some the split 'train'")
    return splits
