"""
Captions of your own -> Karpathy's format. The kind of file is recognised by its content:

  COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
  JSON lines  {"image": "a.jpg", "caption": "A dog."}, or "captions": [several]; or a list of these
  JSON        {"a.jpg": "A dog.", "b.jpg": [several]}
  folder      a.txt beside a.jpg, a caption a line
  Flickr8k    a.jpg#0<TAB>A dog.
  table       separated by tabs, |, commas or semicolons, such as Flickr30k's results.csv and
              Kaggle's captions.txt: a header names the columns; without one there are two, file
              name and caption. A cell may hold a list of captions, as Python or JSON write it

A column or key "split" (train, restval, val, test) is kept; without it, images are assigned to
splits at random, each with all its captions.
"""

import ast
import csv
import gzip
import json
import os
import random
import re
import string
import unicodedata
import zlib
from contextlib import suppress
from pathlib import Path

from preprocessing.images import find_suffixes
from utils import UserError, broken_json, check_is_file, read_text

IMAGE_KEYS = (
    "image",
    "filename",
    "file_name",
    "file",
    "image_name",
    "image_path",
    "image_file",
    "filepath",
    "file_path",
    "path",
    "img",
    "img_path",
    "name",
)
ASCII_SEPARATORS = str.maketrans(dict.fromkeys(string.punctuation, " "))  # categories P and S
CAPTION_KEYS = ("caption", "text", "sentence", "comment", "captions", "description", "raw")

# The readers below yield tuples (file name, caption, split or None, COCO's image id or None).


def split_words(caption):
    """
    Lower-case words of a caption; punctuation and symbols separate words as spaces do.

    Gives Karpathy's tokens for all 40,000 captions of Flickr8k. Uses Unicode categories, so that it
    works for other quotation marks and scripts too; composed and decomposed é are the same.
    """
    if caption.isascii():  # ten times as fast
        return caption.lower().translate(ASCII_SEPARATORS).split()
    text = unicodedata.normalize("NFC", caption.lower())
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).split()


def _first(entry, keys):
    """The value of the first key that the entry has, else None."""
    return next((entry[key] for key in keys if key in entry), None)


def _from_coco(path, content, split=None):
    """split: of all its images, unless they say otherwise"""
    try:
        images = {image["id"]: image for image in content["images"]}
        for annotation in content["annotations"]:
            image = images.get(annotation["image_id"])
            if image is None:
                raise UserError(f"{path}: no image has the id {annotation['image_id']!r}")
            yield image["file_name"], annotation["caption"], image.get("split", split), image["id"]
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path} is not in COCO's format: images need id and file_name, "
            "annotations image_id and caption"
        ) from None


def _from_objects(path, entries):
    for number, entry in enumerate(entries, 1):
        image = caption = None
        if isinstance(entry, dict):
            image, caption = _first(entry, IMAGE_KEYS), _first(entry, CAPTION_KEYS)
        captions = [caption] if isinstance(caption, str) else caption
        if not isinstance(image, str) or not isinstance(captions, list):
            raise UserError(
                f"{path}, entry {number} lacks an image ({', '.join(IMAGE_KEYS)}) "
                f"or a caption ({', '.join(CAPTION_KEYS)})"
            )
        for caption in captions:
            yield image, caption, entry.get("split"), None


def _from_json_lines(path, lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise broken_json(path, error, number) from None


def _from_tokens(path, lines):
    for number, line in enumerate(lines, 1):
        if line.strip():
            match = re.fullmatch(r"(.+)#\d+\t(.*)", line)
            if not match:
                raise UserError(f"{path}, line {number} is not name.jpg#0<TAB>caption: {line!r}")
            yield *match.groups(), None, None


def _rows(path, reader):
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _from_table(path, lines):
    separator = re.search(r"[\t|,;]", lines[0])  # the first one: later captions contain commas
    delimiter = separator.group() if separator else "\t"
    # Quotation marks have a meaning in CSV only; elsewhere they are part of a caption.
    quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    rows = csv.reader((line + "\n" for line in lines), delimiter=delimiter, quoting=quoting)
    header = [cell.strip().strip('"').lower() for cell in next(_rows(path, rows))]
    columns = {cell: i for i, cell in enumerate(header)}
    image_at, caption_at = _first(columns, IMAGE_KEYS), _first(columns, CAPTION_KEYS)
    if image_at is None or caption_at is None:
        two_columns = len(header) == 2 or len(header) > 2 and delimiter == ","
        if not two_columns or not re.search(r"\.\w{2,5}$", header[0]):
            raise _unrecognised(path)
        columns, image_at, caption_at = {"image": 0, "caption": 1}, 0, 1
        rows = csv.reader((line + "\n" for line in lines), delimiter=delimiter, quoting=quoting)
    split_at = columns.get("split")
    incomplete_lines = []
    for row in _rows(path, rows):
        if any("\n" in cell for cell in row):
            raise UserError(
                f"{path}, line {rows.line_num}: an opening quotation mark is not closed on its "
                "line; close it, or put each caption on one line"
            )
        if caption_at == len(columns) - 1:  # further columns are commas in the caption
            row[caption_at:] = [delimiter.join(row[caption_at:])] if row[caption_at:] else []
        if len(row) > len(columns):
            raise UserError(f"{path}, line {rows.line_num}: {len(row)} columns, not {len(columns)}")
        if len(row) == len(columns):
            split = None if split_at is None else row[split_at].strip().strip('"')
            for caption in _cell_captions(row[caption_at]):
                yield row[image_at].strip().strip('"'), caption, split, None
        elif row:
            incomplete_lines.append(rows.line_num)
    if incomplete_lines:  # Flickr30k's results.csv has one
        print(
            f"{path}: {len(incomplete_lines)} lines without a caption ignored, first line "
            f"{incomplete_lines[0]}"
        )


def _cell_captions(cell):
    """The captions in a table's cell: one, or a list as Python or JSON write it."""
    if re.fullmatch(r"\s*\[\s*[\"'].*[\"']\s*,?\s*\]\s*", cell, re.DOTALL):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            captions = ast.literal_eval(cell.strip())
            if all(isinstance(caption, str) for caption in captions):
                return captions
    return [cell]


def _from_folder(path):
    images = {
        Path(name).stem: name
        for name in sorted(os.listdir(path))
        if Path(name).suffix.lower() in find_suffixes()
    }
    for text in sorted(Path(path).glob("*.txt")):
        for caption in read_text(text).splitlines():
            if caption.strip():
                yield images.get(text.stem, f"{text.stem}.jpg"), caption, None, None


def _from_mapping(path, content):
    for name, captions in content.items():
        for caption in [captions] if isinstance(captions, str) else captions:
            yield name, caption, None, None


def _is_mapping(content):
    """Whether this is {file name: caption, or list of captions}"""
    return bool(content) and all(
        re.search(r"\.\w{2,5}$", name)
        and (
            isinstance(captions, str)
            or (isinstance(captions, list) and all(isinstance(c, str) for c in captions))
        )
        for name, captions in content.items()
    )


def _unrecognised(path):
    return UserError(
        f"{path}: format not recognised; expected COCO's images and annotations, JSON lines or "
        f"a table with an image ({', '.join(IMAGE_KEYS)}) and a caption "
        f"({', '.join(CAPTION_KEYS)}), name.jpg#0<TAB>caption, or two columns name.jpg,caption"
    )


def _read(path, split=None):
    """The tuples from a file in any of the formats; split: as in `_from_coco`"""
    if os.path.isdir(path):
        return _from_folder(path)
    text = read_text(path)
    lines = [line.rstrip("\r") for line in text.strip("\n").split("\n")]
    if not text.strip():
        raise UserError(f"{path} is empty")
    if text.lstrip()[0] in "{[":
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            if not lines[0].rstrip().endswith("}"):  # not JSON lines: one object over many lines
                raise broken_json(path, error) from None
            return _from_objects(path, _from_json_lines(path, lines))
        if isinstance(content, list):
            first = content[0] if content and isinstance(content[0], dict) else {}
            if "score" in first and "references" in first:
                raise UserError(
                    f"{path} holds captions generated by a model, from eval.py "
                    f"--results; training needs captions written by people"
                )
            return _from_objects(path, content)
        if "annotations" in content:
            return _from_coco(path, content, split)
        if isinstance(content.get("images"), list):
            raise UserError(f"{path} has images without annotations; is it for --karpathy_json?")
        return (
            _from_mapping(path, content) if _is_mapping(content) else _from_objects(path, [content])
        )
    if re.match(r".+#\d+\t", lines[0]):
        return _from_tokens(path, lines)
    return _from_table(path, lines)


def _draw_splits(names, seed, val_fraction, test_fraction):
    """Name -> random split, which does not depend on the order of the names."""
    if not 0 <= val_fraction <= val_fraction + test_fraction < 1:
        raise UserError(
            f"--val_fraction {val_fraction} and --test_fraction {test_fraction} must "
            f"be at least 0 and below 1 together"
        )
    names = sorted(names)
    random.Random(seed).shuffle(names)
    val = round(len(names) * val_fraction)
    test = val + round(len(names) * test_fraction)
    return {n: "val" if i < val else "test" if i < test else "train" for i, n in enumerate(names)}


def coco_split(path):
    """The split that the name of one of COCO's files says, as captions_val2017.json, or None"""
    match = re.search(r"(train|val|test)\d{4}", os.path.basename(path))
    return match and match[1]


def read_captions(path, seed=123, val_fraction=0.1, test_fraction=0.1, default_split=None):
    """
    A caption file in Karpathy's format: {"source": path, "images": [{"filename", "split", "imgid",
    "sentences": [{"tokens", "raw"}]}]}, with "cocoid" for COCO's; in order of their first captions.

    seed and the fractions of the images are used only if the file has no splits.
    default_split: of the images of a file in COCO's format, which has none inside
    Raises UserError for a file that is broken, not recognised or has splits for some images only.
    """
    images = {}
    for filename, caption, split, cocoid in _read(path, default_split):
        if not isinstance(caption, str) or not isinstance(filename, str) or not filename:
            raise UserError(f"{path}: caption {caption!r} of image {filename!r}: both must be text")
        filename = filename.replace("\\", "/")  # as Windows writes paths
        new = {"filename": filename, "split": split or None, "imgid": len(images), "sentences": []}
        image = images.setdefault(filename, new)
        if cocoid is not None:
            image["cocoid"] = cocoid
        if image["split"] != new["split"]:
            raise UserError(f"{path}: {filename} is in {image['split']} and in {split}")
        image["sentences"].append({"tokens": split_words(caption), "raw": caption.strip()})
    if not images:
        raise UserError(
            f"{path} has no captions: "
            + (
                "none of its files is a .txt with some"
                if os.path.isdir(path)
                else "only a header or empty lines"
            )
        )
    missing = [image["filename"] for image in images.values() if image["split"] is None]
    if len(missing) == len(images):
        splits = _draw_splits(images, seed, val_fraction, test_fraction)
        for filename, image in images.items():
            image["split"] = splits[filename]
    elif missing:
        raise UserError(f"{path}: {missing[0]} has no split, but other images have one")
    return {"source": path, "images": list(images.values())}


def read_sentences(paths):
    """
    Captions without images, from text files, which may be compressed (.gz): a caption a line, or
    IMAGE TAB CAPTION.

    Returns lists of words. Raises UserError for a file that cannot be read, and if there is no
    caption in any.
    """
    lines = [line for path in paths for line in _read_lines(path)]
    captions = [split_words(line.split("\t", 1)[-1]) for line in lines]
    if not any(captions):
        raise UserError(f"{', '.join(paths)}: no captions")
    return [words for words in captions if words]


def _read_lines(path):
    check_is_file(path)
    if not str(path).endswith(".gz"):
        return read_text(path).splitlines()
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
