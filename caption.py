"""
Caption images, and draw where the model looked for each word.

    python caption.py --img photo.jpg                     # the caption, and photo_attention.png
    python caption.py --img photo.jpg --beam_size 5 --n_best 3
    python caption.py --img photos --no_attention > captions.tsv
    python caption.py --img "photos/*.jpg" more.png --json --out overlays

On stdout stands one line per caption, its fields divided by tabs: the path unless --img is a single
file, the score if --n_best is above 1 (total log-probability, the best first), the caption.

From Python:

    from caption import Captioner
    captioner = Captioner("BEST_checkpoint_X.pth.tar")
    captioned = captioner("photo.jpg")          # or a PIL image, an array, a list of these
    print(captioned.text, captioned.score)
    captioned.save("photo_attention.png")
"""

import argparse
import glob
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoints import find_checkpoint, load_captioner
from datasets import read_rgb, squash, to_rgb
from distributed import find_device
from files import Parser, UserError
from search import add_search_options, beam_search, search_options
from utils import AMP, autocast, run

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp")
OVERLAY = "_attention.png"


def get_args(argv=None):
    parser = Parser(
        description="Caption images, and draw where the model looked for each word.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--img", nargs="+", required=True, metavar="FILE|FOLDER|GLOB", help="what to caption")
    add("--model", help="checkpoint; if not given, the only BEST one in --checkpoint_folder")
    add("--checkpoint_folder", default=".", help="where to look for it")
    add("--word_map", help="for checkpoints that carry none")
    add("--beam_size", type=int, default=5, help="1 is greedy decoding")
    add("--n_best", type=int, default=1, help="captions per image")
    add_search_options(parser)
    add("--batch_size", type=int, default=32, help="images at a time")
    add("--json", action="store_true", help="print a JSON object per image")
    add("--out", help="file for the overlay of a single image, folder for those of several; "
        f"if not given, photo{OVERLAY} beside photo.jpg")
    add("--no_attention", action="store_true", help="draw no overlays")
    add("--smooth", action=argparse.BooleanOptionalAction, default=True,
        help="blend the cells of the attention grid")
    add("--show", action="store_true", help="show overlays in a window too")
    add("--device", help="cuda, cuda:1, cpu, mps; the GPU if there is one")
    add("--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given")
    return parser.parse_args(argv)


def check(args):
    """UserError for options that make no sense."""
    for name in ("beam_size", "n_best", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}, it must be at least 1")
    if args.n_best > args.beam_size:
        raise UserError(f"--n_best {args.n_best} needs --beam_size {args.n_best} or more, "
                        f"it is {args.beam_size}")
    if args.no_attention and (args.show or args.out):
        raise UserError("--no_attention leaves nothing to save or show; drop --out and --show")
    args.search = search_options(args)
    find_device(args.device)


def find_images(patterns):
    """
    The paths that files, folders and globs stand for, in this order, each once. In a folder or
    glob these are the files with an image's suffix, sorted, without subfolders.

    Our own overlays are left out, also where the shell has expanded the glob.
    Raises UserError for a folder or glob without images; a file need not exist.
    """
    paths = []
    for pattern in patterns:
        folder = os.path.isdir(pattern)
        if folder or glob.has_magic(pattern) and not os.path.exists(pattern):
            wildcard = os.path.join(glob.escape(pattern), "*") if folder else pattern
            found = sorted(path for path in glob.glob(wildcard) if path.lower().endswith(SUFFIXES)
                           and not path.endswith(OVERLAY) and os.path.isfile(path))
            if not found:
                raise UserError(f"no images {'in' if folder else 'match'} {pattern}")
            paths += found
        else:
            paths.append(pattern)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not path.endswith(OVERLAY)] or paths


def overlay_paths(paths, out, alone):
    """
    A path for the overlay of each image, no two alike and none that of an image.

    out: as in the options; alone: whether it names the file of a single overlay
    Raises UserError if that would overwrite the image, or if a folder is needed but out is a file.
    """
    if out and alone and os.path.basename(out) and not os.path.isdir(out):
        if os.path.realpath(out) == os.path.realpath(paths[0]):
            raise UserError(f"--out {out} is the image itself; pass another file")
        return [out]
    if out and os.path.isfile(out):
        raise UserError(f"--out {out} is a file; the overlays of several images need a folder")
    taken, overlays = set(paths), []
    for path in paths:
        stem, count = os.path.splitext(path)[0], 1
        if out:
            stem = os.path.join(out, os.path.basename(stem))
        overlay = stem + OVERLAY
        while overlay in taken:  # photo.jpg and photo.png, or photo.jpg of two folders
            count += 1
            overlay = f"{stem}_{count}{OVERLAY}"
        taken.add(overlay)
        overlays.append(overlay)
    return overlays


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

    def save(self, path, smooth=True):
        """
        Draw where the model looked for each word. Returns the figure. smooth: blend the cells of
        the attention grid. Raises ValueError for a suffix that is no picture's, OSError if the file
        cannot be written.
        """
        import visualize  # only here: whoever wants captions alone does not wait for matplotlib

        figure = visualize.attention_grid(self.image, self.words, self.attention, smooth)
        visualize.save(figure, path)
        return figure


class Captioner:
    """
    A model that is ready to caption: `Captioner("BEST_checkpoint_X.pth.tar")("photo.jpg").text`.

    model: a checkpoint; word_map: a WORDMAP file, for checkpoints that carry none
    device, amp: as the options of caption.py
    Raises UserError if the checkpoint is missing or is none.
    """

    def __init__(self, model, word_map=None, device=None, amp=None):
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

    def _put_in_words(self, source, caption):
        n_best = [(" ".join(self.words[i] for i in c.words), c.score)
                  for c in (caption, *caption.runners_up)]
        return Captioned(source, [self.words[i] for i in caption.words], caption.alphas,
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
        return torch.from_numpy(squash(read_any(source)))
    except UserError as error:
        return error
    except Exception as error:  # whatever a broken file sets off, the others get their turn
        return UserError(f"{source} is not a readable image: {error!r}")


def describe(captioned, args, alone):
    """
    What is printed of an image: a line per caption, or a JSON object.

    alone: whether the caption needs no path before it
    """
    if args.json:
        n_best = [{"caption": text, "score": score} for text, score in captioned.n_best]
        fields = {"image": captioned.name, **n_best[0], "words": captioned.words,
                  "finished": captioned.finished}
        return json.dumps(fields | ({"n_best": n_best} if args.n_best > 1 else {}))
    prefix = "" if alone else f"{captioned.name}\t"
    if args.n_best == 1:
        return prefix + captioned.text
    return "\n".join(f"{prefix}{score:.3f}\t{text}" for text, score in captioned.n_best)


def draw(captioned, overlay, args):
    """Save an image's overlay, and show it if asked to; UserError if that can't be done."""
    try:
        os.makedirs(os.path.dirname(overlay) or ".", exist_ok=True)
        figure = captioned.save(overlay, args.smooth)
    except (OSError, ValueError) as error:
        raise UserError(f"{overlay} cannot be written: {error}") from None
    if args.show:
        import visualize
        try:
            visualize.show(figure)
        except RuntimeError as error:
            raise UserError(f"--show: {error}; open {overlay} instead") from None


def main():
    args = get_args()
    check(args)
    paths = find_images(args.img)
    alone = paths == args.img[:1]  # one file was asked for, not a folder that happens to hold one
    overlays = overlay_paths(paths, args.out, alone)
    captioner = Captioner(args.model or find_checkpoint(args.checkpoint_folder), args.word_map,
                          args.device, args.amp)
    bad = 0
    results = captioner.each(paths, args.beam_size, args.n_best, args.batch_size, **args.search)
    bar = tqdm(results, total=len(paths), unit="image", disable=alone or None)
    for overlay, result in zip(overlays, bar):
        if isinstance(result, UserError):
            if alone:
                raise result
            tqdm.write(f"{os.path.basename(sys.argv[0])}: {result}", file=sys.stderr)
            bad += 1
            continue
        tqdm.write(describe(result, args, alone), file=sys.stdout)
        sys.stdout.flush()
        if not args.no_attention:
            draw(result, overlay, args)
    if not args.no_attention and bad < len(paths):
        where = args.out or f"*{OVERLAY} beside the images"
        print(f"attention: {overlays[0] if alone else where}", file=sys.stderr)
    if bad:
        raise UserError(f"{bad} of {len(paths)} images could not be captioned")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    run(main)
