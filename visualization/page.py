"""
Captions, and where the model looked for each word, as a self-contained HTML page, which needs no
network and no other file. page.html is its template; page.css and page.js are put into each page.
"""

import base64
import hashlib
import io
import os
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from utils import atomic_write, printable
from visualization.overlay import grey_layer, heat_layers

LONGEST = 640  # pixels, of a photograph's longer edge in the page
QUALITY = 85  # of its JPEG
HEAT = 56, 56  # pixels of a word's heat map, which the browser stretches over the photograph
# A ninth of the photograph with a smaller share of the attention is not named; the mean is 0.11.
SPREAD = 0.17
POSITIONS = (
    *("at the upper left", "at the top", "at the upper right"),
    *("on the left", "in the centre", "on the right"),
    *("at the lower left", "at the bottom", "at the lower right"),
)
HINT = (
    "Point at a word, tap it or use the arrow keys to see where the model looked; "
    "Escape shows the photograph."
)

FOLDER = Path(__file__).parent
STYLE, SCRIPT = ((FOLDER / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))


def escape(text):
    """Plain text escaped for HTML; Markup and values that are not text unchanged."""
    is_plain = isinstance(text, str) and not isinstance(text, Markup)
    return Markup.escape(printable(text)) if is_plain else text


def data_uri(picture):
    """A PIL image as the address of an <img>: with a palette as PNG, otherwise as JPEG"""
    file, kind = io.BytesIO(), "png" if picture.mode == "P" else "jpeg"
    picture.save(file, kind, quality=QUALITY, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


# Other packages use ENVIRONMENT.overlay(loader=...) for their own templates.
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER),
    undefined=StrictUndefined,
    autoescape=True,
    finalize=escape,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters.update(basename=lambda name: os.path.basename(name) or name, data_uri=data_uri)
ENVIRONMENT.globals.update(
    style=Markup(STYLE),
    script=Markup(SCRIPT),
    script_sha256=base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode(),
)


def is_page(path):
    return os.fspath(path).lower().endswith((".html", ".htm"))


def write_page(path, captioned, title):
    """
    Write a page of several images with `atomic_write`; captioned: a list of what `view` takes;
    title: of the document. Raises ValueError as `view` does.
    """
    views = [view(one, "h2") for one in captioned]
    count = "" if len(views) == 1 else f"{len(views)} photographs. "
    content = document(title, count + HINT, views)
    with atomic_write(path) as temporary:
        Path(temporary).write_text(content, encoding="utf-8", newline="\n")


def document(title, lead, parts):
    """A complete HTML document. title, lead: texts; parts: HTML, such as that of `view`"""
    return str(_macros().document(title, lead, list(map(Markup, parts))))


def fragment(captioned):
    """The view of one image for a notebook's cell; several in one document do not clash."""
    return str(_macros().fragment(view(captioned, "p", HINT)))


def view(captioned, heading, hint=""):
    """
    The <article> of one image, as Markup. heading: the tag of its name; hint: shown while no word
    is; captioned: an object with
      name        the photograph's path; its last part is the heading
      image       uint8 (H, W, 3), of any shape
      words       T strings
      attention   (T, P), as in `attention.attention_grid`
      score       total log-probability in nats
      n_best      (text, score), the best first, including the caption itself; shown if several
      references  optional: strings, which are collapsed
      evidence    optional: (T, P), of `modeling.evidence`, to which the page can switch; or None
      offset      optional: as in `attention.attention_grid`

    Raises ValueError unless there is one row of attention per word on a square grid.
    """
    photograph = Image.fromarray(captioned.image)
    ratio = photograph.width / photograph.height
    photograph.thumbnail((LONGEST, LONGEST))
    offset = getattr(captioned, "offset", (0.0, 0.0))
    kinds = {"attention": captioned.attention, "evidence": getattr(captioned, "evidence", None)}
    kinds = {kind: weights for kind, weights in kinds.items() if weights is not None}
    heats = {
        kind: list(heat_layers(captioned.words, weights, HEAT, offset=offset))
        for kind, weights in kinds.items()
    }
    places = {kind: [_describe(row, kind) for row in rows] for kind, rows in kinds.items()}
    layers = {"photograph": photograph, "grey": grey_layer(np.asarray(photograph)), "ratio": ratio}
    return _macros().view(captioned, layers, heats, places, heading, hint)


def _macros():
    return ENVIRONMENT.get_template("page.html").module


def _describe(weights, kind):
    """Text that names the ninth of the photograph with most of the weights (P,) of this kind"""
    side = round(len(weights) ** 0.5)
    grid = Image.fromarray(np.asarray(weights, np.float32).reshape(side, side))
    ninths = np.asarray(grid.resize((3, 3), Image.Resampling.BOX)).ravel()
    if not ninths.any():
        return f"no {kind}"
    share = ninths.max() / ninths.sum()
    if share < SPREAD:
        return f"{kind} spread over the photograph"
    return f"most {kind} {POSITIONS[ninths.argmax()]}, {100 * share:.0f} %"
