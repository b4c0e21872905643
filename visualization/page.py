"""
Captions and where the model looked for each word, as an HTML page that needs nothing beside it: no
network, no other file. page.html has its parts, page.css and page.js go into each page.
"""

import base64
import hashlib
import io
import math
import os
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
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

FOLDER = Path(__file__).parent
STYLE, SCRIPT = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


def escape(text):
    """
    Text as Markup that shows it as it is; Markup stays as it is. What UTF-8 cannot encode, as in
    some file names, is written out as an escape sequence.
    """
    if not isinstance(text, str) or isinstance(text, Markup):
        return text
    text = text.encode("utf-8", "backslashreplace").decode()
    return Markup.escape(text.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def _basename(name):
    return os.path.basename(name) or name


def _nats(score):
    return f"{score:.3f}".replace("-", "\N{MINUS SIGN}")


# Templates of other packages are found through ENVIRONMENT.overlay(loader=...).
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, finalize=escape, undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters.update(basename=_basename, nats=_nats)
ENVIRONMENT.globals.update(
    zip=zip, style=Markup(STYLE), script=Markup(SCRIPT),
    script_sha256=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode())


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
    return str(_macros().document(title, lead, list(map(Markup, parts))))


def fragment(captioned):
    """
    The same view of one image, for a notebook's cell. Style and script touch only such views, and
    any number of them may stand in one document.
    """
    return str(_macros().fragment(view(captioned, "p", HINT)))


def is_page(path):
    return os.fspath(path).lower().endswith((".html", ".htm"))


def write_page(path, captioned, title):
    """Write `attention_page` to a file, which is there whole or not at all; OSError if it can't."""
    content = attention_page(captioned, title)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def view(captioned, heading, hint=""):
    """
    The <article> of one image, as Markup.

    captioned: as in `attention_page`; heading: the tag around its name; hint: shown as long as no
    word is chosen
    """
    words, attention = captioned.words, np.asarray(captioned.attention, dtype=np.float32)
    side = math.isqrt(attention.shape[-1])
    if attention.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {attention.shape}")
    image = captioned.image
    return _macros().view(
        captioned,
        {"uri": _jpeg(image), "ratio": image.shape[1] / image.shape[0]},
        {"side": side, "in_bytes": _in_bytes(attention),
         "places": [_place(alpha) for alpha in attention.reshape(-1, side, side)]},
        heading, hint)


def _macros():
    return ENVIRONMENT.get_template("page.html").module


def _in_bytes(attention):
    """Base64 of a byte per cell, row by row; each word's most attended cell is 255."""
    largest = attention.max(1, initial=0, keepdims=True)
    scaled = np.rint(255 * attention / np.where(largest > 0, largest, 1))
    return base64.b64encode(scaled.astype(np.uint8).tobytes()).decode()


def _place(alpha):
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
