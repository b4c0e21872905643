"""
`Captioner`: a trained model as a library, for paths, pictures and arrays alike.

    from caption import Captioner
    captioner = Captioner()                     # or Captioner("BEST_checkpoint_X.pth.tar")
    captioned = captioner("photo.jpg")          # or a PIL image, an array, a list of these
    print(captioned.text, captioned.score)
    captioned.save("photo_attention.png")       # or .html, .gif, .mp4; a notebook shows the page
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from checkpoints import PRETRAINED, load_captioner
from modeling.beam_search import beam_search
from preprocessing.images import read_rgb, resize_square, to_rgb
from utils import UserError, autocast, find_device
from visualization import page


@dataclass
class Captioned:
    """An image and what the model says of it."""
    source: Any = field(repr=False)  # as it was given: a path, a PIL image or an array
    words: list[str]  # T of them
    attention: np.ndarray = field(repr=False)  # (T, P), what was seen for each; rows sum to 1
    score: float  # total log-probability in nats
    finished: bool  # whether the model ended the sentence, or max_len did
    n_best: list[tuple[str, float]]  # texts and scores, the best first; this one is the first

    @property
    def text(self):
        return " ".join(self.words)

    @property
    def name(self):
        """The path if there is one, else "image"."""
        return os.fspath(self.source) if isinstance(self.source, (str, os.PathLike)) else "image"

    @property
    def image(self):
        """The photograph, uint8 (H, W, 3); read anew, so that many take no memory."""
        return read_any(self.source)

    def figure(self, smooth=True):
        """A Matplotlib figure of where the model looked; smooth: blend the attention's cells"""
        import visualize  # only here: whoever wants captions alone does not wait for matplotlib

        return visualize.attention_grid(self.image, self.words, self.attention, smooth)

    def save(self, path, smooth=True):
        """
        Show where the model looked for each word, in the form that the path's suffix says: .html,
        .gif or .mp4, or a picture. Raises ValueError for a suffix that is none of these, OSError if
        the file cannot be written.
        """
        if page.is_page(path):
            page.write_page(path, [self], self.text)
        elif is_movie(path):
            from visualization import animation as movie

            movie.write_movie(path, self.image, self.words, self.attention, smooth)
        else:
            from visualization import attention as visualize

            visualize.save(self.figure(smooth), path)

    def _repr_html_(self):
        """What a notebook shows: the photograph, and over each word where the model looked."""
        return page.fragment(self)


class Captioner:
    """
    A model that is ready to caption: `Captioner("BEST_checkpoint_X.pth.tar")("photo.jpg").text`.

    model: a checkpoint; the one that comes with the program if not given
    word_map: a WORDMAP file, for checkpoints that carry none
    device, amp: as the options of caption.py
    Raises UserError if the checkpoint is missing or is none.
    """

    def __init__(self, model=PRETRAINED, word_map=None, device=None, amp=None):
        self.device, self.amp = find_device(device), amp
        self.encoder, self.decoder, self.word_map, _ = load_captioner(
            os.fspath(model), self.device, word_map)
        self.words = {i: word for word, i in self.word_map.items()}

    def __call__(self, images, **options):
        """
        images: a path, a PIL image, an array uint8 (H, W), (H, W, 3) or (H, W, 4); or several of
        these, a list or an array (N, H, W, 3)
        options: of `each`

        Returns a Captioned, for several images a list. Raises UserError for one it cannot read.
        """
        several = isinstance(images, (list, tuple)) or np.ndim(images) == 4 and not isinstance(
            images, Image.Image)
        found = list(self.each(list(images) if several else [images], **options))
        for result in found:
            if isinstance(result, UserError):
                raise result
        return found if several else found[0]

    def each(self, images, beam_size=5, n_best=1, batch_size=32, **search):
        """
        Yield a Captioned for each of a list of images in order, or the UserError that reading it
        gave. While the model works on a batch, threads read the next one.

        batch_size: images at a time; n_best and search: of beam_search
        """
        batches = [images[i:i + batch_size] for i in range(0, len(images), batch_size)]
        with ThreadPoolExecutor() as pool:
            following = pool.map(_try_read, batches[0] if batches else [])
            for sources, after in zip(batches, [*batches[1:], []]):
                pixels, following = list(following), pool.map(_try_read, after)
                good = [image for image in pixels if isinstance(image, torch.Tensor)]
                captions = iter(())
                if good:
                    with torch.inference_mode(), autocast(self.device, self.amp):
                        features = self.encoder(torch.stack(good).to(self.device))
                        captions = iter(beam_search(self.decoder, features, self.word_map,
                                                    beam_size, n_best=n_best, **search))
                for source, image in zip(sources, pixels):
                    yield image if isinstance(image, UserError) else self._put_in_words(
                        source, next(captions))

    def grow_tree(self, image, beam_size=5, **search):
        """
        What the search for an image's caption kept and dropped, a `beam_tree.Tree`, which
        `beam_tree.draw_tree` draws. Raises UserError for an image it cannot read.
        """
        from visualization import beam_tree

        with torch.inference_mode(), autocast(self.device, self.amp):
            pixels = torch.from_numpy(resize_square(read_any(image)))
            features = self.encoder(pixels[None].to(self.device))
            return beam_tree.grow_tree(self.decoder, features, self.word_map, beam_size, **search)

    def _put_in_words(self, source, caption):
        n_best = [(" ".join(self.words[i] for i in c.tokens), c.score)
                  for c in (caption, *caption.alternatives)]
        return Captioned(source, [self.words[i] for i in caption.tokens], caption.alphas,
                         caption.score, caption.finished, n_best)


def read_any(source):
    """uint8 (H, W, 3) of a path, a PIL image or an array; UserError if it is none of them"""
    if isinstance(source, (str, os.PathLike)):
        return read_rgb(os.fspath(source))
    if isinstance(source, Image.Image):
        return to_rgb(source)
    source = np.asarray(source)
    if source.dtype != np.uint8 or source.ndim not in (2, 3) or source.shape[2:] not in (
            (), (1,), (3,), (4,)) or 0 in source.shape:
        raise UserError(f"an array {source.dtype} of {source.shape} is no image; pass uint8 of "
                        f"(H, W), (H, W, 3) or (H, W, 4)")
    return to_rgb(Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source))


def _try_read(source):
    """uint8 (3, 256, 256), or the UserError that says why there is none."""
    try:
        return torch.from_numpy(resize_square(read_any(source)))
    except UserError as error:
        return error
    except Exception as error:  # whatever a broken file sets off, the others get their turn
        return UserError(f"{source} is not a readable image: {error!r}")


def is_movie(path):
    return os.fspath(path).lower().endswith((".gif", ".mp4"))


def check_suffix(path):
    """ValueError where `Captioned.save` would raise it."""
    if not page.is_page(path) and not is_movie(path):
        from visualization import attention as visualize

        visualize.find_format(path)
