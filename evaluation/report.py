"""An evaluation as one HTML page: metrics, lengths, and images with what was said of them."""

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from evaluation import scores as scorers
from preprocessing.images import read_rgb
from utils import UserError, atomic_write
from visualization import page

SHOWN = 24  # images of each kind


def write_report(path, title, beam_sizes, measured, names, looked, notes, bootstrap, seed, data,
                 captions, image_folder=None):
    """
    measured: per beam size {name: scorers.Metric}, the last of which ranks the images; names: the
    metrics; looked: per beam size the cell of attention accuracy, or None; notes: lines below the
    table; bootstrap: resamples of the intervals, seed theirs
    data: the CaptionDataset; captions: per image what `eval.caption_split` found at the last beam
    image_folder: where the photographs are; without it they are shown as the model sees them,
    squashed to a square

    Raises UserError if a photograph cannot be read, OSError if the page cannot be written.
    """
    scores = scorers.scores_by_image(measured[-1], len(data))
    if not scores[0]:
        raise UserError("--report ranks images, which the metrics asked for don't score; "
                        "add one, such as --metrics CIDEr-D")
    by = "CIDEr-D" if "CIDEr-D" in scores[0] else next(iter(scores[0]))
    order = sorted(range(len(scores)), key=lambda i: -scores[i][by])
    some = random.Random(seed).sample(range(len(scores)), min(SHOWN, len(scores)))
    parts = [_table(beam_sizes, measured, names, looked, bootstrap, seed),
             f'<p class="sat-quiet">{"<br>".join(map(page.escape, notes))}</p>',
             *_lengths(data, captions)]
    for heading, rows in ((f"Best by {by}", order[:SHOWN]),
                          (f"Worst by {by}", order[:-SHOWN - 1:-1]), ("At random", some)):
        parts.append(f"<h2>{heading}: {len(rows)} images</h2>")
        for i in rows:
            entry = data.entry(i)
            parts.append(page.view(SimpleNamespace(
                name=f"{entry['filename'] or entry['image_id']} · {by} {scores[i][by]:.1f}",
                image=_photograph(data, i, image_folder), words=captions[i]["words"],
                attention=captions[i]["attention"], score=captions[i]["score"], n_best=[],
                references=[" ".join(words) for words in entry["references"]]), "h3"))
    content = page.document(title, page.HINT, parts)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def check_photographs(data, folder):
    """UserError unless the photographs that `write_report` will show are there."""
    names = [data.entry(i)["filename"] for i in range(len(data))] if folder else []
    for path in (Path(folder) / name for name in names if name):
        if not path.exists():
            raise UserError(f"{path} not found; pass the --image_folder of create_input_files.py")


def _photograph(data, i, folder):
    """uint8 (H, W, 3)"""
    name = data.entry(i)["filename"]
    if folder is None or name is None:
        return np.ascontiguousarray(data[i][0].numpy().transpose(1, 2, 0))
    return read_rgb(Path(folder) / name)


def _table(beam_sizes, measured, names, looked, bootstrap, seed):
    """A row per beam size: each metric with its 95 % interval below"""
    rows = []
    for i, (beam_size, metrics) in enumerate(zip(beam_sizes, measured)):
        ends = {name: scorers.interval(values) for name, values in
                scorers.resample(metrics, bootstrap, seed).items()} if bootstrap else {}
        cells = []
        for name in names:
            value = scorers.cell(name, metrics[name].total if name in metrics else None).strip()
            spread = "–".join(f"{end:.2f}" for end in ends[name]) if name in ends else ""
            cells.append(f'<td>{value}<br><span class="sat-quiet">{spread}</span></td>')
        cells += [f"<td>{looked[i]}</td>"] if looked else []
        rows.append(f'<tr><th scope="row">{beam_size}</th>{"".join(cells)}</tr>')
    heads = ("beam", *names, *(["attention"] if looked else []))
    heads = "".join(f'<th scope="col">{page.escape(name)}</th>' for name in heads)
    return (f'<div class="sat-scroll"><table class="sat-table"><thead><tr>{heads}</tr></thead>'
            f'<tbody>{"".join(rows)}</tbody></table></div>')


def _lengths(data, captions):
    """Lines of HTML: a histogram of the captions' lengths beside that of the references'"""
    ours = np.bincount([len(caption["words"]) for caption in captions])
    theirs = np.bincount([len(words) for i in range(len(data))
                          for words in data.entry(i)["references"]] or [0])
    longest = max(len(ours), len(theirs))
    shares = [np.pad(count, (0, longest - len(count))) / max(1, count.sum())
              for count in (ours, theirs)]
    top, bars = max(share.max() for share in shares), []
    for length, pair in enumerate(zip(*shares)):
        for k, share in enumerate(pair):
            height = 100 * share / top
            bars.append(f'<rect class="sat-bar{k}" x="{12 * length + 1 + 5 * k}" '
                        f'y="{100 - height:.2f}" width="5" height="{height:.2f}">'
                        f"<title>{length} words: {100 * share:.1f} %</title></rect>")
        if length % 5 == 0:
            bars.append(f'<text x="{12 * length + 6}" y="113">{length}</text>')
    means = [(share * np.arange(longest)).sum() for share in shares]
    return ["<h2>Words a caption</h2>",
            f'<p class="sat-quiet"><span class="sat-key0"></span> captions, {means[0]:.1f} on '
            f'average <span class="sat-key1"></span> references, {means[1]:.1f}</p>',
            f'<svg class="sat-chart" viewBox="0 0 {12 * longest} 118" role="img" aria-label="Share '
            f'of captions and references by their number of words">{"".join(bars)}</svg>']
