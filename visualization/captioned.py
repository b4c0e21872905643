"""`Captioned`: an image with its caption, which draws itself."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from modeling.field_of_view import find_offset
from preprocessing.images import read_rgb
from utils import UserError
from visualization import files, page

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Captioned:
    """An image, its caption, and where the model looked for each word."""

    name: str  # the path or web address, else "image"
    words: list[str]  # T of them
    attention: np.ndarray = field(repr=False)  # (T, P) weights for each word; rows sum to 1 at most
    score: float  # total log-probability in nats
    finished: bool  # whether the caption reached <end>; otherwise it was cut off at max_len
    n_best: list[tuple[str, float]]  # texts and scores, the best first, which is this caption
    encoder: Any = field(repr=False)  # a `models.Encoder`, for `offset`
    pixels: np.ndarray | None = field(repr=False)  # of `image`; None: it is read from its path
    checksum: int = field(repr=False)  # of the pixels
    evidence: np.ndarray | None = field(repr=False)  # (T, P) of `modeling.evidence`, if asked for

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def image(self) -> np.ndarray:
        """The upright photograph, uint8 (H, W, 3), of a path read again; UserError if it changed"""
        pixels = read_rgb(self.name) if self.pixels is None else self.pixels
        if crc32(pixels.data) != self.checksum:
            raise UserError(f"{self.name} has changed since it was captioned; caption it again")
        return pixels

    @cached_property
    def offset(self) -> tuple[float, float]:
        """`modeling.field_of_view.find_offset`, measured only when something is to be drawn"""
        return find_offset(self.encoder)

    @property
    def shown(self) -> np.ndarray:
        """What pictures show: evidence if it was asked for, else attention; pages have both."""
        return self.attention if self.evidence is None else self.evidence

    def figure(self, smooth: bool = True) -> "Figure":
        """A matplotlib Figure with what is `shown` for each word; smooth: blend its locations"""
        from visualization.attention import attention_grid  # only here: matplotlib is slow

        return attention_grid(self.image, self.words, self.shown, smooth, self.offset)

    def save(self, path: str | os.PathLike, smooth: bool = True) -> None:
        """
        Write what is `shown` for each word in the format of the path's suffix: .html, .gif or .mp4,
        or a picture; ValueError for any other. smooth: as in `figure`; pages always blend locations
        """
        if page.is_page(path):
            page.write_page(path, [self], self.text)
        elif os.fspath(path).lower().endswith(files.ANIMATIONS):
            from visualization.animation import write_animation

            write_animation(path, self.image, self.words, self.shown, smooth, self.offset)
        else:
            from visualization import figures

            figures.save(self.figure(smooth), path)

    def _repr_html_(self):  # in a notebook
        return page.fragment(self)
