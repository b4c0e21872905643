"""Two models' captions of the same images, compared image by image: `eval.py --compare`."""

import numpy as np

from evaluation import scores as scorers
from utils import UserError, read_json


def read_results(path):
    """
    A file of eval.py --results: {image_id: (caption, references)}, texts.
    Raises UserError if it is none, or if an image is in it twice.
    """
    rows, found = read_json(path, "write it with eval.py --results"), {}
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path} is no list of captions; write it with eval.py --results")
    for i, row in enumerate(rows):
        if reason := _wrong(row):
            raise UserError(f"{path}, entry {i}: {reason}; write it with eval.py --results")
        if row["image_id"] in found:
            raise UserError(f"{path} has image {row['image_id']} twice; give one caption an image")
        found[row["image_id"]] = row["caption"], row["references"]
    return found


def _wrong(row):
    """What a row lacks, or None"""
    if not isinstance(row, dict):
        return "it is no object"
    if type(row.get("image_id")) not in (int, str):
        return "it has no image_id, a number or a text"
    if not isinstance(row.get("caption"), str):
        return "it has no caption, a text"
    texts = row.get("references")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return "it has no references, a list of texts"
    return None


def check_alike(path_a, a, path_b, b):
    """UserError unless both files are of the same images with the same references."""
    if lonely := a.keys() ^ b.keys():
        image = min(lonely, key=str)
        path = path_a if image in a else path_b
        raise UserError(f"{path_a} and {path_b} are of different images: {image} is only in "
                        f"{path}, one of {len(lonely)}; caption the same split with both models")
    for image in a:
        if sorted(a[image][1]) != sorted(b[image][1]):
            raise UserError(f"image {image} has other references in {path_a} than in {path_b}; "
                            f"caption the same data set with both models")


def compare(path_a, path_b, names, tokens=None, resamples=1000, seed=0):
    """
    Print each metric of both files, their difference, its 95 % interval over resamples of the
    images, the same ones for both, and the share of the resamples in which A is higher.
    names: as in `scorers.NAMES`; tokens as in `scorers.tokenize`.
    """
    a, b = read_results(path_a), read_results(path_b)
    check_alike(path_a, a, path_b, b)
    systems = [[found[image][0].split() for image in a] for found in (a, b)]
    references = [[text.split() for text in texts] for _, texts in a.values()]
    systems, references, how = scorers.tokenize(systems, references, tokens)
    (first, second), missing = scorers.measure(systems, references, names)
    if "unseen" in missing:
        missing["unseen"] = "it takes the training captions; run eval.py on the model"
    draws = [scorers.resample(measured, resamples, seed) for measured in (first, second)]
    print(f"A {path_a}, B {path_b}: {len(a)} images")
    print("metric             A         B     A - B       low      high  A higher")
    for name in names:
        if name in missing:
            continue
        values = [first[name].total, second[name].total, first[name].total - second[name].total]
        line = "".join(scorers.cell(name, value, 10) for value in values)
        print(f"{name:10}{line}" + _spread(name, *(drawn.get(name) for drawn in draws)))
    for note in (*scorers.footnotes(names, how, missing),
                 *scorers.bootstrap_note(names, resamples, seed),
                 "A higher: share of the resamples, ties counted as halves"):
        print(note)


def _spread(name, a, b):
    """Interval of a - b and how often it is above 0: three cells, dashes for the vocabulary"""
    if a is None:
        return "".join(scorers.cell(name, None, 10) for _ in range(3))
    ends, higher = scorers.interval(a - b), np.mean((a > b) + (a == b) / 2)
    return "".join(scorers.cell(name, end, 10) for end in ends) + f"{100 * higher:8.1f} %"
