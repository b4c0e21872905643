"""An evaluation as one HTML page: metrics, lengths, and images with their captions."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jinja2 import FileSystemLoader
from markupsafe import Markup

from evaluation.scores import scores_by_image
from evaluation.table import cell
from preprocessing.images import read_rgb
from utils import UserError, atomic_write
from visualization import page

IMAGES_PER_SECTION = 24
ENVIRONMENT = page.ENVIRONMENT.overlay(loader=FileSystemLoader(Path(__file__).parent))


def write_report(path, evaluation, data, image_folder=None, seed=0):
    """
    Write an evaluation as an HTML page.

    evaluation: a table.Evaluation; images are shown with the captions of its last beam size, which
    must have attention
    data: the CaptionDataset
    image_folder: where the photographs are; without it they are shown as the model sees them,
    resized to a square
    seed: for choosing the random images

    Raises UserError if a photograph cannot be read, OSError if the page cannot be written.
    """
    captions, metrics = evaluation.beams[-1].captions, evaluation.beams[-1].metrics
    scores = scores_by_image(metrics, len(data))
    if not scores[0]:
        raise UserError(
            "--report ranks images, but none of these metrics scores single images; "
            "add one that does, such as --metrics CIDEr-D"
        )
    by = "CIDEr-D" if "CIDEr-D" in scores[0] else next(iter(scores[0]))
    order = sorted(range(len(scores)), key=lambda i: -scores[i][by])
    drawn = random.Random(seed).sample(range(len(scores)), min(IMAGES_PER_SECTION, len(scores)))
    sections = [
        (
            heading,
            [
                _view(data, i, captions[i], f"{by} {scores[i][by]:.1f}", image_folder)
                for i in images
            ],
        )
        for heading, images in (
            (f"Best by {by}", order[:IMAGES_PER_SECTION]),
            (f"Worst by {by}", order[: -IMAGES_PER_SECTION - 1 : -1]),
            ("At random", drawn),
        )
    ]
    body = ENVIRONMENT.get_template("report.html").render(
        columns=["beam", *evaluation.names],
        rows=[_row(evaluation.names, beam) for beam in evaluation.beams],
        notes=list(map(page.escape, evaluation.notes)),
        lengths=_lengths(captions, data),
        sections=sections,
    )
    content = page.document(evaluation.title, page.HINT, [body])
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def check_photographs(data, folder):
    """UserError unless the photographs that `write_report` will show are there."""
    names = [data.entry(i)["filename"] for i in range(len(data))] if folder else []
    for path in (Path(folder) / name for name in names if name):
        if not path.exists():
            raise UserError(f"{path} not found; pass the --image_folder of create_input_files.py")


def _view(data, i, caption, score, image_folder):
    """One image with its caption, attention and references, as HTML. score: text after its name"""
    entry = data.entry(i)
    return Markup(
        page.view(
            SimpleNamespace(
                name=" · ".join(
                    filter(
                        None,
                        (str(entry["filename"] or entry["image_id"]), entry.get("source"), score),
                    )
                ),
                image=_photograph(data, i, image_folder),
                words=caption.words,
                attention=caption.attention,
                offset=caption.offset,
                score=caption.score,
                n_best=[],
                references=[" ".join(words) for words in entry["references"]],
            ),
            "h3",
        )
    )


def _photograph(data, i, folder):
    """uint8 (H, W, 3)"""
    name = data.entry(i)["filename"]
    if folder is None or name is None:
        return np.ascontiguousarray(data[i].images.numpy().transpose(1, 2, 0))
    return read_rgb(Path(folder) / name)


def _row(names, beam):
    """A beam size's row of the table: the texts of its cells and intervals"""
    cells = []
    for name in names:
        value = cell(name, beam.metrics[name].total if name in beam.metrics else None).strip()
        ends = (beam.intervals or {}).get(name, ())
        cells.append((value, "–".join(f"{end:.2f}" for end in ends)))
    label = f"{beam.beam_size} {beam.source}" if beam.source else beam.beam_size
    return {"label": label, "cells": cells, "attention": beam.attention}


def _lengths(captions, data):
    """
    For the histogram, of the captions and of the references: the mean number of words, and the
    share of those with 0, 1, 2, … words.
    """
    counts = [
        np.bincount([len(caption.words) for caption in captions]),
        np.bincount(
            [len(words) for i in range(len(data)) for words in data.entry(i)["references"]] or [0]
        ),
    ]
    longest = max(map(len, counts))
    shares = [np.pad(count, (0, longest - len(count))) / max(1, count.sum()) for count in counts]
    return {
        "shares": np.stack(shares, 1).tolist(),
        "highest": np.max(shares),
        "means": [share @ np.arange(longest) for share in shares],
    }
