"""An evaluation as one HTML page: metrics, lengths, and images with their captions."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jinja2 import FileSystemLoader

from evaluation.objects import COLUMNS
from evaluation.scores import scores_by_image
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
    image_folder: of the photographs; without it the squares that the model sees are shown
    seed: for choosing the random images
    """
    captions, metrics = evaluation.beams[-1].captions, evaluation.beams[-1].metrics
    scores = scores_by_image(metrics, len(data))
    if not scores[0]:
        raise UserError("--report ranks images by a metric; add one, such as --metrics CIDEr-D")
    by = "CIDEr-D" if "CIDEr-D" in scores[0] else next(iter(scores[0]))
    order = sorted(range(len(scores)), key=lambda i: -scores[i][by])
    number = min(IMAGES_PER_SECTION, len(scores))
    chosen = {
        f"Best by {by}": order[:number],
        f"Worst by {by}": order[::-1][:number],
        "At random": random.Random(seed).sample(range(len(scores)), number),
    }
    sections = []
    for heading, images in chosen.items():
        texts = [f"{by} {scores[i][by]:.1f}" for i in images]
        views = [_view(data, i, captions[i], text, image_folder) for i, text in zip(images, texts)]
        sections.append((heading, views))
    body = ENVIRONMENT.get_template("report.html").render(
        names=evaluation.names,
        columns=list(COLUMNS if evaluation.beams[0].objects else ()),
        beams=evaluation.beams,
        map=map,
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


def _view(data, i, caption, score, folder):
    """One image with its caption, attention and references, as HTML. score: text after its name"""
    entry, filename = data.entry(i), data.entry(i)["filename"]
    if folder is None or filename is None:
        image = np.ascontiguousarray(data[i].images.numpy().transpose(1, 2, 0))
    else:
        image = read_rgb(Path(folder) / filename)
    name = (str(filename or entry["image_id"]), entry.get("source"), score)
    captioned = SimpleNamespace(
        **caption._asdict(),
        name=" · ".join(filter(None, name)),
        image=image,
        n_best=[],
        references=[" ".join(words) for words in entry["references"]],
    )
    return page.view(captioned, "h3")


def _lengths(captions, data):
    """For the histogram: the shares of captions and references with 0, 1, … words, and means."""
    references = [words for i in range(len(data)) for words in data.entry(i)["references"]]
    lengths = [len(caption.words) for caption in captions], [len(words) for words in references]
    size = 1 + max(map(max, lengths))
    shares = [np.bincount(counts, minlength=size) / len(counts) for counts in lengths]
    means = [np.mean(counts) for counts in lengths]
    return {"shares": np.stack(shares, 1).tolist(), "highest": np.max(shares), "means": means}
