"""
Captions, and where the model looked for each word, as a self-contained HTML page, which needs no
network and no other file. page.html is its template; page.css and page.js are put into each page.
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
from visualization.overlay import OVERLAYS, check_overlay, heat_colours

LONGEST = 640  # pixels, of a photograph's longer edge in the page
QUALITY = 85  # of its JPEG
# A ninth of the photograph with less of the attention than this is not named; 0.11 is average.
SPREAD = 0.17
POSITIONS = (
    "at the upper left",
    "at the top",
    "at the upper right",
    "on the left",
    "in the centre",
    "on the right",
    "at the lower left",
    "at the bottom",
    "at the lower right",
)
HINT = (
    "Point at a word, tap it or use the arrow keys to see where the model looked; "
    "Escape shows the photograph."
)

FOLDER = Path(__file__).parent
STYLE, SCRIPT = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


def escape(text):
    """
    Text escaped for HTML, as Markup; Markup is not changed. Characters that UTF-8 cannot encode, as
    in some file names, become escape sequences.
    """
    if not isinstance(text, str) or isinstance(text, Markup):
        return text
    text = text.encode("utf-8", "backslashreplace").decode()
    return Markup.escape(text.replace("\0", "\N{REPLACEMENT CHARACTER}"))


def _basename(name):
    return os.path.basename(name) or name


def _nats(score):
    return f"{score:.3f}".replace("-", "\N{MINUS SIGN}")


# Other packages use ENVIRONMENT.overlay(loader=...) for their own templates.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    finalize=escape,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(basename=_basename, nats=_nats)
ENVIRONMENT.globals.update(
    zip=zip,
    style=Markup(STYLE),
    script=Markup(SCRIPT),
    script_sha256=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
)


def attention_page(captioned, title, overlay=OVERLAYS[0]):
    """
    A complete HTML document: photographs, captions, and where the model looked for each word.

    captioned: objects with
      name        the photograph's path; its last part is the heading
      image       uint8 (H, W, 3), of any shape
      words       T strings
      attention   (T, P) on a square grid, P = side * side, row by row, which covers the photograph
                  resized to a square. Each word has its own scale, in 255 steps
      score       total log-probability in nats
      n_best      (text, score), the best first, including the caption itself; shown if several
      references  optional: strings, which are collapsed
      offset      optional: (x, y) as in `overlay.Drawing`
    title: of the document; overlay: "light" or "heat"

    Raises ValueError unless there is one row of attention per word and P is a square, or for
    another overlay.
    """
    views = [view(one, "h2", overlay=overlay) for one in captioned]
    count = "" if len(views) == 1 else f"{len(views)} photographs. "
    return document(title, count + HINT, views)


def document(title, lead, parts):
    """A complete HTML document. title, lead: texts; parts: HTML, such as that of `view`"""
    return str(_macros().document(title, lead, list(map(Markup, parts))))


def fragment(captioned):
    """
    The view of one image as HTML for a notebook's cell. Style and script affect only such views,
    and one document may contain several.
    """
    return str(_macros().fragment(view(captioned, "p", HINT)))


def is_page(path):
    return os.fspath(path).lower().endswith((".html", ".htm"))


def write_page(path, captioned, title, overlay=OVERLAYS[0]):
    """Write `attention_page` with `atomic_write`; OSError if the file cannot be written."""
    content = attention_page(captioned, title, overlay)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def view(captioned, heading, hint="", overlay=OVERLAYS[0]):
    """
    The <article> of one image, as Markup.

    captioned, overlay: as in `attention_page`; heading: the tag of its name; hint: shown while no
    word is selected
    """
    words, attention = captioned.words, np.asarray(captioned.attention, dtype=np.float32)
    side = math.isqrt(attention.shape[-1])
    if attention.shape != (len(words), side * side):
        raise ValueError(f"{len(words)} words, but attention of shape {attention.shape}")
    image = captioned.image
    return _macros().view(
        captioned,
        {"uri": _jpeg(image), "ratio": image.shape[1] / image.shape[0]},
        {
            "side": side,
            "base64": _to_base64(attention),
            "colours": _colours(overlay),
            "offset": "{:.4f} {:.4f}".format(*getattr(captioned, "offset", (0, 0))),
            "descriptions": [_describe(alpha) for alpha in attention.reshape(-1, side, side)],
        },
        heading,
        hint,
    )


def _macros():
    return ENVIRONMENT.get_template("page.html").module


def _to_base64(attention):
    """Base64 of a byte per location, row by row; each word's most attended location is 255."""
    largest = attention.max(1, initial=0, keepdims=True)
    scaled = np.rint(255 * attention / np.where(largest > 0, largest, 1))
    return base64.b64encode(scaled.astype(np.uint8).tobytes()).decode()


def _colours(overlay):
    """Base64 of the heat map's 256 colours, red, green and blue of each; nothing for light"""
    check_overlay(overlay)
    if overlay != "heat":
        return ""
    return base64.b64encode(np.rint(255 * heat_colours()).astype(np.uint8).tobytes()).decode()


def _describe(alpha):
    """Text that names the ninth of the photograph with most of the attention (side, side)."""
    edges = np.linspace(0, alpha.shape[0], 4)
    starts = np.arange(alpha.shape[0])
    # (3, side): how much of each location's row or column is in each third
    thirds = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    thirds = thirds.clip(min=0)
    ninths = (thirds @ alpha @ thirds.T).ravel() / (alpha.sum() or 1)
    if ninths.max() < SPREAD:
        return "attention spread over the photograph"
    return f"most attention {POSITIONS[ninths.argmax()]}, {100 * ninths.max():.0f} %"


def _jpeg(image):
    """A data URI of uint8 (H, W, 3), scaled down to LONGEST pixels if it is larger."""
    photograph = Image.fromarray(image)
    photograph.thumbnail((LONGEST, LONGEST))
    file = io.BytesIO()
    photograph.save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
