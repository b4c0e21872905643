"""
Captions of your own -> Karpathy's format. The kind of file is recognised by its content:

  COCO        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
  JSON lines  {"image": "a.jpg", "caption": "A dog."}, or "captions": [several]; or a list of these
  JSON        {"a.jpg": "A dog.", "b.jpg": [several]}
  folder      a.txt beside a.jpg, a caption per line
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
from preprocessing.karpathy import SPLITS, say_marks, strip_marks
from utils import UserError, broken_json, check_is_file, read_text

IMAGE_KEYS = (
    "image filename file_name file image_name image_path image_file filepath file_path path img "
    "img_path name"
).split()
CAPTION_KEYS = "caption text sentence comment captions description raw".split()
EXPECTED = f"an image ({', '.join(IMAGE_KEYS)}) and a caption ({', '.join(CAPTION_KEYS)})"
FILE_NAME = r".*\.\w{2,5}"
ASCII_SEPARATORS = str.maketrans(dict.fromkeys(string.punctuation, " "))  # categories P and S


def split_words(caption):
    """
    Lower-case words of a caption; punctuation and symbols separate words as spaces do. Gives
    Karpathy's tokens for all captions of Flickr8k; é composed and decomposed are the same.
    """
    if caption.isascii():  # ten times as fast
        return caption.lower().translate(ASCII_SEPARATORS).split()
    text = unicodedata.normalize("NFC", caption.lower())
    return "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in text).split()


def _read_coco(path, content, split):
    try:
        images = {image["id"]: image for image in content["images"]}
        for annotation in content["annotations"]:
            image = images[annotation["image_id"]]
            entry = {"image": image["file_name"], "caption": annotation["caption"]}
            yield {**entry, "split": image.get("split", split), "cocoid": image["id"]}
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not in COCO's format: images need id and file_name, annotations "
            f"image_id, that of an image, and caption (wrong: {error})"
        ) from None


def _read_json(path, content, split):
    if isinstance(content, list):
        return content
    if "annotations" in content:
        return _read_coco(path, content, split)
    if isinstance(content.get("images"), list):
        raise UserError(f"{path} has images without annotations; is it for --karpathy_json?")
    if content and all(re.fullmatch(FILE_NAME, name) for name in content):
        return [{"image": name, "caption": captions} for name, captions in content.items()]
    return [content]


def _read_json_lines(path, lines):
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise broken_json(path, error, number) from None


def _read_tokens(path, lines):
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"(?P<image>.+)#\d+\t(?P<caption>.*)", line)
        if match:
            yield match.groupdict()
        elif line.strip():
            raise UserError(f"{path}, line {number} is not name.jpg#0<TAB>caption: {line!r}")


def _read_table(path, lines):
    separator = re.search(r"[\t|,;]", lines[0])  # the first one: later captions contain commas
    delimiter = separator.group() if separator else "\t"
    # Quotation marks have a meaning in CSV only; elsewhere they are part of a caption.
    quoting = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    reader = csv.reader((line + "\n" for line in lines), delimiter=delimiter, quoting=quoting)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    header = [cell.strip().strip('"').lower() for cell in rows[0][1]]
    if not (_first(IMAGE_KEYS, header) and _first(CAPTION_KEYS, header)):
        if len(header) < 2 or not re.fullmatch(FILE_NAME, rows[0][1][0].strip()):
            raise UserError(
                f"{path}: format not recognised; expected COCO's images and annotations, JSON "
                f"lines or a table with {EXPECTED}, name.jpg#0<TAB>caption, or two columns "
                f"name.jpg,caption"
            )
        header = ["image", "caption"]
        rows.insert(0, rows[0])
    width, incomplete = len(header), []
    for number, row in rows[1:]:
        if header[-1] in CAPTION_KEYS and len(row) > width:  # commas in the caption
            row[width - 1 :] = [delimiter.join(row[width - 1 :])]
        if len(row) > width or any("\n" in cell for cell in row):
            raise UserError(
                f"{path}, line {number} has {len(row)} columns, not {width}, or a quotation "
                f"mark that is not closed; correct it, a caption must be on one line"
            )
        if len(row) == width:
            yield dict(zip(header, map(_cell_content, header, row)))
        elif row:
            incomplete.append(number)
    if incomplete:  # Flickr30k's results.csv has one
        print(f"{path}: {len(incomplete)} lines without a caption ignored, first {incomplete[0]}")


def _cell_content(name, cell):
    """A cell of a column of this name: text, or captions in a list as Python or JSON write it"""
    if name not in CAPTION_KEYS:
        return cell.strip().strip('"')
    if re.fullmatch(r"\s*\[\s*[\"'].*[\"']\s*,?\s*\]\s*", cell):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            captions = ast.literal_eval(cell.strip())
            if all(isinstance(caption, str) for caption in captions):
                return captions
    return cell


def _read_folder(path):
    suffixes = find_suffixes()
    names = [name for name in sorted(os.listdir(path)) if Path(name).suffix.lower() in suffixes]
    images = {Path(name).stem: name for name in names}
    for text in sorted(Path(path).glob("*.txt")):
        captions = list(filter(str.strip, read_text(text).splitlines()))
        yield {"image": images.get(text.stem, f"{text.stem}.jpg"), "captions": captions}


def _read(path, split):
    """
    The entries of a file in any of the formats: dictionaries with one of IMAGE_KEYS, one of
    CAPTION_KEYS and possibly "split" and "cocoid". split: of COCO's images
    """
    if os.path.isdir(path):
        return _read_folder(path)
    text = read_text(path)
    lines = [line.rstrip("\r") for line in text.strip("\n").split("\n")]
    if not text.strip():
        raise UserError(f"{path} is empty")
    if text.lstrip()[0] in "{[":
        try:
            return _read_json(path, json.loads(text), split)
        except (ValueError, RecursionError) as error:
            if lines[0].rstrip().endswith("}"):  # else one object over many lines
                return _read_json_lines(path, lines)
            raise broken_json(path, error) from None
    if re.match(r".+#\d+\t", lines[0]):
        return _read_tokens(path, lines)
    return _read_table(path, lines)


def _first(keys, entry):
    """The first of the keys that the entry has, or None"""
    return next((key for key in keys if key in entry), None)


def _captions_of(entry, where):
    """The file name in an entry, and its captions; where: the entry's place, for errors"""
    image = captions = None
    if isinstance(entry, dict):
        image, captions = (entry.get(_first(keys, entry)) for keys in (IMAGE_KEYS, CAPTION_KEYS))
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(image, str) or not image or not isinstance(captions, list):
        raise UserError(f"{where} lacks {EXPECTED}")
    if not all(isinstance(caption, str) for caption in captions):
        raise UserError(f"{where}: the captions of {image} must be text")
    if "score" in entry and "references" in entry:
        raise UserError(
            f"{where} is a caption generated by a model, from eval.py --results; training needs "
            f"captions written by people"
        )
    return image.replace("\\", "/"), captions  # \ as Windows writes paths


def _assign_splits(images, seed, val_fraction, test_fraction):
    """Give each image a random split, which does not depend on their order."""
    if not 0 <= val_fraction <= val_fraction + test_fraction < 1:
        raise UserError(
            f"--val_fraction {val_fraction} and --test_fraction {test_fraction} must "
            f"be at least 0 and below 1 together"
        )
    names = sorted(images)
    random.Random(seed).shuffle(names)
    val = round(len(names) * val_fraction)
    test = val + round(len(names) * test_fraction)
    for i, name in enumerate(names):
        images[name]["split"] = "val" if i < val else "test" if i < test else "train"


def read_captions(path, seed=123, val_fraction=0.1, test_fraction=0.1, default_split=None):
    """
    A caption file in Karpathy's format: {"source": path, "images": [{"filename", "split", "imgid",
    "sentences": [{"tokens", "raw"}]}]}, with "cocoid" for COCO's; in order of their first captions.

    seed and the fractions of the images are used only if the file has no splits; default_split is
    that of the images of a file in COCO's format, which has none inside.
    """
    images, marked = {}, 0
    for number, entry in enumerate(_read(path, default_split), 1):
        filename, captions = _captions_of(entry, f"{path}, entry {number}")
        new = {"filename": filename, "split": entry.get("split") or None, "imgid": len(images)}
        image = images.setdefault(filename, new | {"sentences": []}) if captions else new
        if image["split"] != new["split"]:
            raise UserError(f"{path}: {filename} is in {image['split']} and in {new['split']}")
        if new["split"] not in (None, *SPLITS):
            known = ", ".join(SPLITS)
            raise UserError(f"{path}: {filename} has split {new['split']!r}, not one of {known}")
        if "cocoid" in entry:
            image["cocoid"] = entry["cocoid"]
        captions, found = strip_marks(captions)
        marked += found
        for caption in captions:
            image["sentences"].append({"tokens": split_words(caption), "raw": caption.strip()})
    say_marks(path, marked)
    if not images:
        raise UserError(
            f"{path} has no captions; pass a file of images and captions or a folder of .txt"
        )
    missing = [image["filename"] for image in images.values() if image["split"] is None]
    if len(missing) == len(images):
        _assign_splits(images, seed, val_fraction, test_fraction)
    elif missing:
        raise UserError(f"{path}: {missing[0]} has no split, but other images have one")
    return {"source": path, "images": list(images.values())}


def read_all_captions(paths, seed, val_fraction, test_fraction):
    """
    `read_captions` of each file. The images of COCO's files for training and validation, given
    together, get the splits in the files' names, such as captions_val2017.json.
    """
    matches = [re.search(r"(train|val|test)\d{4}", os.path.basename(path)) for path in paths]
    splits = [match and match[1] for match in matches]
    if not {"train", "val"} <= set(splits):
        splits = [None] * len(paths)
    return [
        read_captions(path, seed, val_fraction, test_fraction, split)
        for path, split in zip(paths, splits)
    ]


def read_sentences(paths, print_line=print):
    """
    Captions without images, from text files, which may be compressed (.gz): one per line, or
    IMAGE TAB CAPTION. Returns lists of words; UserError if there are none.
    """
    captions = []
    for path in paths:
        texts, marked = strip_marks(line.split("\t", 1)[-1] for line in _read_lines(path))
        captions += filter(None, map(split_words, texts))
        say_marks(path, marked, print_line)
    if not captions:
        raise UserError(f"{', '.join(paths)}: no captions")
    return captions


def _read_lines(path):
    if not str(path).endswith(".gz"):
        return read_text(path).splitlines()
    check_is_file(path)
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig") as file:
            return file.read().splitlines()
    except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: not UTF-8
        raise UserError(f"{path} cannot be read: {error}") from None
