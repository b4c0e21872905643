"""
Captions and where the model looked for each word, as an HTML page that needs nothing beside it: no
network, no other file. page.css and page.js, which lie next to this module, go into each page.
"""

import base64
import hashlib
import html
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from utils import atomic_write

LONGEST = 640  # pixels, of a photograph's longer edge in the page
QUALITY = 85  # of its JPEG
# Shares of the attention in one ninth of the photograph; spread evenly, each has 0.11.
SPREAD = 0.17
PLACES = ("at the upper left", "at the top", "at the upper right",
          "on the left", "in the centre", "on the right",
          "at the lower left", "at the bottom", "at the lower right")
HINT = ("Point at a word, tap it or use the arrow keys to see where the model looked; "
        "Escape shows the photograph.")

STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8")
                 for kind in ("css", "js"))


def attention_page(captioned, title):
    """
    A whole HTML document: photographs, captions, and over each word where the model looked.

    captioned: objects with
      name        the photograph's file; its last part is the heading
      image       uint8 (H, W, 3), of any shape
      words       T strings
      attention   (T, P) on a square grid, P = side * side, row by row, over the photograph squashed
                  to a square; the page stretches it back. Each word has its own scale, in 255 steps
      score       total log-probability in nats
      n_best      (text, score), the best first, the caption itself among them; shown if several
      references  strings, if there are any; folded away
    title: of the document

    Raises ValueError unless there is one row of attention per word and P is a square.
    """
    views = [view(one, "h2") for one in captioned]
    count = "" if len(views) == 1 else f"{len(views)} photographs. "
    return document(title, count + HINT, views)


def document(title, lead, parts):
    """A whole HTML document. title, lead: texts; parts: HTML, `view`'s among it"""
    # The browser itself sees to it that the page asks for nothing and runs no script but ours.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = (f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
              f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'")
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en" class="sat-page">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<link rel="icon" href="data:,">',  # without it, browsers ask a server for one
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        "</head>",
        "<body>",
        f'<header><h1>{escape(title)}</h1><p class="sat-quiet">{escape(lead)}</p></header>',
        "<main>",
        *parts,
        "</main>",
        f"<script>{SCRIPT}</script>",
        "</body>",
        "</html>",
        "",
    ])


def fragment(captioned):
    """
    The same view of one image, for a notebook's cell. Style and script touch only such views, and
    any number of them may stand in one document.
    """
    return f"<style>{STYLE}</style>\n{view(captioned, 'p', HINT)}\n<script>{SCRIPT}</script>\n"


def is_page(path):
    return os.fspath(path).lower().endswith((".html", ".htm"))


def write_page(path, captioned, title):
    """Write `attention_page` to a file, which is there whole or not at all; OSError if it can't."""
    content = attention_page(captioned, title)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def view(captioned, heading, hint=""):
    """The <article> of one image. heading: the tag around its name; hint: while no word is shown"""
    words, attention = captioned.words, np.asarray(captioned.attention, dtype=np.float32)
    side = math.isqrt(attention.shape[-1])
    if attention.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {attention.shape}")
    image, name = captioned.image, escape(os.path.basename(captioned.name) or captioned.name)
    # Only one word can be reached with the tab key, from there the arrow keys go on.
    options = " ".join(
        f'<span class="sat-word" role="option" aria-selected="false" tabindex="{-(i > 0)}" '
        f'data-where="{_where(alpha)}">{escape(word)}</span>'
        for i, (word, alpha) in enumerate(zip(words, attention.reshape(-1, side, side))))
    return "\n".join([
        f'<article class="sat" aria-label="{name}" data-side="{side}" '
        f'data-attention="{_in_bytes(attention)}">',
        f'<{heading} class="sat-name" dir="auto">{name}</{heading}>',
        '<div class="sat-view">',
        f'<div class="sat-picture" style="--ratio:{image.shape[1] / image.shape[0]:.5f}">'
        f'<img alt="{escape(" ".join(words))}" src="{_jpeg(image)}">'
        '<canvas aria-hidden="true"></canvas></div>',
        '<div class="sat-text">',
        f'<div class="sat-words" role="listbox" aria-orientation="horizontal" '
        f'aria-label="Words of the caption" dir="auto">{options}</div>' if words else
        '<p class="sat-quiet">The caption has no words.</p>',
        '<p class="sat-where sat-quiet" role="status" data-hint="' + hint + '"></p>',
        *_candidates(captioned),
        *_references(getattr(captioned, "references", None)),
        "</div>",
        "</div>",
        "</article>",
    ])


def _candidates(captioned):
    """Lines of HTML: the score, or all captions with theirs if there are several."""
    if len(captioned.n_best) < 2:
        return [f'<p class="sat-quiet">log-probability {_nats(captioned.score)} nats</p>']
    label = f"The {len(captioned.n_best)} best captions, with log-probabilities in nats"
    return [
        f'<p class="sat-label sat-quiet">{label}</p>',
        f'<ol class="sat-list" aria-label="{label}">',
        *(f'<li><div class="sat-row"><span dir="auto">{escape(text)}</span> '
          f'<span class="sat-nats">{_nats(score)}</span></div></li>'
          for text, score in captioned.n_best),
        "</ol>",
    ]


def _references(references):
    if not references:
        return []
    count = "1 reference" if len(references) == 1 else f"{len(references)} references"
    return [
        f'<details class="sat-references"><summary class="sat-quiet">{count}</summary>',
        '<ul class="sat-list">',
        *(f'<li dir="auto">{escape(text)}</li>' for text in references),
        "</ul></details>",
    ]


def escape(text):
    """Text as HTML that shows it as it is. What UTF-8 cannot say, as in file names, is spelt."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return html.escape(text.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def _nats(score):
    return f"{score:.3f}".replace("-", "\N{MINUS SIGN}")


def _in_bytes(attention):
    """Base64 of a byte per cell, row by row; each word's most attended cell is 255."""
    largest = attention.max(1, initial=0, keepdims=True)
    scaled = np.rint(255 * attention / np.where(largest > 0, largest, 1))
    return base64.b64encode(scaled.astype(np.uint8).tobytes()).decode()


def _where(alpha):
    """Words for the ninth of the photograph with most of the attention (side, side)."""
    edges = np.linspace(0, alpha.shape[0], 4)
    cells = np.arange(alpha.shape[0])
    # (3, side): how much of each cell lies in each third
    thirds = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    thirds = thirds.clip(min=0)
    ninths = (thirds @ alpha @ thirds.T).ravel() / (alpha.sum() or 1)
    if ninths.max() < SPREAD:
        return "attention spread over the photograph"
    return f"most attention {PLACES[ninths.argmax()]}, {100 * ninths.max():.0f} %"


def _jpeg(image):
    """A data URI of uint8 (H, W, 3), scaled down to LONGEST pixels if it is larger."""
    photograph = Image.fromarray(image)
    photograph.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
