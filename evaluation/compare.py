"""Compares two models' captions of the same images: `eval.py --compare`."""

import numpy as np

from evaluation import scores
from evaluation.results import read_results
from evaluation.table import cell, footnotes, write_table
from utils import UserError


def compare(path_a, path_b, args):
    """
    Print each metric for two files of eval.py --results, their difference with its 95 % interval
    over resamples of the images (the same for both), and the share of resamples in which A is
    higher. args: eval.py's options
    """
    a, b = read_results(path_a), read_results(path_b)
    check_same_images(path_a, a, path_b, b)
    systems = [[found[image][0] for image in a] for found in (a, b)]
    references = [texts for _, texts in a.values()]
    systems, references, tokens = scores.tokenize(systems, references, args.tokens)
    measured, missing = scores.measure(systems, references, args.names)
    if "unseen" in missing:
        missing["unseen"] = "it needs the training captions; run eval.py on the model"
    resampled = [scores.resample(metrics, args.bootstrap, args.seed) for metrics in measured]
    rows = [["metric", "A", "B", "A - B", "low", "high", "A higher"]]
    title = f"A {path_a}, B {path_b}: {len(a)} images"
    print(title)
    print("metric             A         B     A - B       low      high  A higher")
    for name in args.names:
        if name in missing:
            continue
        first, second = (metrics[name].total for metrics in measured)
        values, higher = [first, second, first - second, None, None], "–"
        if name in resampled[0]:
            first, second = (totals[name] for totals in resampled)
            values[3:] = scores.interval(first - second)
            higher = f"{100 * np.mean((first > second) + (first == second) / 2):.1f} %"
        rows.append([name, *(cell(name, value) for value in values), higher])
        print(f"{name:10}" + "".join(text.rjust(10) for text in rows[-1][1:]))
    notes = footnotes(args, tokens, missing)
    notes.append("A higher: share of the resamples, ties counted as halves")
    print(*notes, sep="\n")
    if args.table:
        write_table(args.table, rows, [title, *notes])


def check_same_images(path_a, a, path_b, b):
    """UserError unless both files have the same images with the same references."""
    advice = "caption the same split of the same data set with both models"
    if unshared := a.keys() ^ b.keys():
        image = min(unshared, key=str)
        only = path_a if image in a else path_b
        raise UserError(
            f"{path_a} and {path_b} have different images: {image} is only in {only}; {advice}"
        )
    for image in a:
        if sorted(a[image][1]) != sorted(b[image][1]):
            raise UserError(
                f"image {image} has other references in {path_a} than in {path_b}; {advice}"
            )
