"""
Caption images, and draw where the model looked for each word.

    python caption.py --img photo.jpg                     # the caption, and photo_attention.png
    python caption.py --img photo.jpg --beam_size 5 --n_best 3
    python caption.py --img photos --no_attention > captions.tsv
    python caption.py --img "photos/*.jpg" more.png --json --out overlays
    python caption.py --img photos --out captions.html    # one page: point at a word
    python caption.py --img photo.jpg --out photo.gif     # or .mp4: attention word by word
    python caption.py --img photo.jpg --beam_tree tree.svg      # what the search kept and dropped

Prints one line per caption to stdout, with fields separated by tabs: the path unless --img is a
single file, the score if --n_best is above 1 (total log-probability, the best first), the caption.

As a library, for paths, pictures and arrays alike:

    from caption import Captioner
    captioner = Captioner()                     # or Captioner("BEST_checkpoint_X.pth.tar")
    captioned = captioner("photo.jpg")          # or a PIL image, an array, a list of these
    print(captioned.text, captioned.score)
    captioned.save("photo_attention.png")       # or .html, .gif, .mp4; a notebook shows the page
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoints import PRETRAINED, add_model_options, find_model, load_captioner
from modeling.beam_search import Caption, Search, find_captions
from modeling.devices import autocast, find_device, set_seed
from modeling.field_of_view import find_offset
from preprocessing.images import is_url, read_rgb, resize_square, to_rgb
from utils import (
    Parser,
    UserError,
    add_device_options,
    add_search_options,
    non_negative_int,
    positive_int,
    printable,
    run_script,
    search_options,
)
from visualization import page
from visualization.files import OVERLAY, find_images, overlay_paths, save_attention, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from visualization.beam_tree import Tree

# The library


@dataclass
class Captioned:
    """An image, its caption, and where the model looked for each word."""

    source: Any = field(repr=False)  # the path, PIL image or array that was passed
    words: list[str]  # T of them
    attention: np.ndarray = field(repr=False)  # (T, P) weights for each word; rows sum to 1 at most
    score: float  # total log-probability in nats
    finished: bool  # whether the caption reached <end>; otherwise it was cut off at max_len
    n_best: list[tuple[str, float]]  # texts and scores, the best first, which is this caption
    encoder: Any = field(repr=False)  # a `models.Encoder`, for `offset`

    @cached_property
    def offset(self) -> tuple[float, float]:
        """
        How far to the right of and below its place in the grid a location looks, as fractions of
        the image: see `modeling.field_of_view`. Measured only when something is to be drawn.
        """
        return find_offset(self.encoder)

    def __getstate__(self):
        """What is pickled: the offset instead of the encoder, which is large."""
        return {**self.__dict__, "offset": self.offset, "encoder": None}

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def name(self) -> str:
        """The path if there is one, else "image"."""
        return os.fspath(self.source) if isinstance(self.source, (str, os.PathLike)) else "image"

    @property
    def image(self) -> np.ndarray:
        """The photograph, uint8 (H, W, 3); read at each access, to save memory."""
        return load_pixels(self.source)

    def figure(self, smooth: bool = True) -> "Figure":
        """A matplotlib Figure with the attention for each word; smooth: blend its locations"""
        from visualization.attention import attention_grid  # only here: matplotlib is slow

        return attention_grid(self.image, self.words, self.attention, smooth, self.offset)

    def save(self, path: str | os.PathLike, smooth: bool = True) -> None:
        """
        Write the attention for each word in the format of the path's suffix: .html, .gif or .mp4,
        or a picture. Raises ValueError for any other suffix, OSError if the file cannot be written.

        smooth: as in `figure`; pages always blend locations
        """
        save_attention(self, path, smooth)

    def _repr_html_(self):
        """The view in a notebook: the photograph, and where the model looked for each word."""
        return page.fragment(self)


class Captioner:
    """
    A trained model that captions images:
    `Captioner("BEST_checkpoint_X.pth.tar")("photo.jpg").text`. `each` goes on after an image that
    cannot be read; a call raises its error.

    model: a checkpoint; if not given, the one that comes with the program
    word_map: a WORDMAP file, for checkpoints without word map
    device, amp, plain: as the options of caption.py
    Raises UserError if the checkpoint is missing or not valid.
    """

    def __init__(
        self,
        model: str | os.PathLike = PRETRAINED,
        word_map: str | os.PathLike | None = None,
        device: str | None = None,
        amp: str | None = None,
        plain: bool = False,
    ):
        self.device, self.amp = find_device(device), amp
        self.encoder, self.decoder, self.word_map, _ = load_captioner(
            os.fspath(model), self.device, word_map
        )
        self.decoder.plain = plain
        self.image_size = self.encoder.args["image_size"]
        self.words = {i: word for word, i in self.word_map.items()}

    def __call__(self, images: Any, **options: Any) -> "Captioned | list[Captioned]":
        """
        images: a path, a web address, bytes, an open binary file, a PIL image, an array uint8
        (H, W), (H, W, 3) or (H, W, 4); or several of these, a list, an array (N, H, W, 3) or
        whatever yields them
        options: those of `each`

        Returns a Captioned, or a list for several images. Raises UserError if one is not readable.
        """
        several = (
            isinstance(images, (list, tuple, Iterator))
            and not hasattr(images, "read")
            or isinstance(images, (np.ndarray, torch.Tensor))
            and images.ndim == 4
        )
        results = []
        for result in self.each(list(images) if several else [images], **options):
            if isinstance(result, UserError):
                raise result
            results.append(result)
        return results if several else results[0]

    def each(
        self, images: Sequence[Any], *, batch_size: int = 32, no_unk: bool = True, **options: Any
    ) -> Iterator["Captioned | UserError"]:
        """
        Yield for each of a list of images, in order, a Captioned, or a UserError if it is not
        readable. While the model captions one batch, threads read the next.

        batch_size: images at a time; no_unk, options: fields of a `modeling.beam_search.Search`,
        such as beam_size=5, n_best=1, or sample=True, temperature=0.7
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, it must be at least 1")
        search = Search(no_unk=no_unk, **options)
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        read = partial(_try_read, size=self.image_size)
        with ThreadPoolExecutor() as pool:
            next_pixels = pool.map(read, batches[0] if batches else [])
            for sources, next_sources in zip(batches, [*batches[1:], []]):
                pixels, next_pixels = list(next_pixels), pool.map(read, next_sources)
                readable = [image for image in pixels if isinstance(image, torch.Tensor)]
                captions: Iterator[Caption] = iter(())
                if readable:
                    with torch.inference_mode(), autocast(self.device, self.amp):
                        features = self.encoder.cells(torch.stack(readable).to(self.device))
                        found = find_captions(self.decoder, features, self.word_map, search)
                        captions = iter(found)
                for source, image in zip(sources, pixels):
                    yield (
                        image
                        if isinstance(image, UserError)
                        else self._to_words(source, next(captions))
                    )

    def grow_tree(self, image: Any, no_unk: bool = True, **options: Any) -> "Tree":
        """
        What the search for an image's caption kept and dropped, as a `beam_tree.Tree`, which
        `beam_tree.draw_tree` draws; options: as of `each`. Raises UserError if the image is not
        readable.
        """
        from visualization import beam_tree

        search = Search(no_unk=no_unk, **options)
        with torch.inference_mode(), autocast(self.device, self.amp):
            pixels = torch.from_numpy(resize_square(load_pixels(image), self.image_size))
            features = self.encoder.cells(pixels[None].to(self.device))
            return beam_tree.build_tree(self.decoder, features, self.word_map, search)

    def _to_words(self, source, caption):
        """The Captioned of a beam_search.Caption"""
        n_best = [
            (" ".join(self.words[i] for i in c.tokens), c.score)
            for c in (caption, *caption.alternatives)
        ]
        return Captioned(
            source,
            [self.words[i] for i in caption.tokens],
            caption.alphas,
            caption.score,
            caption.finished,
            n_best,
            self.encoder,
        )


def load_pixels(source):
    """uint8 (H, W, 3) from what `Captioner` takes; UserError if that is not possible"""
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    if isinstance(source, (str, bytes, bytearray)) or hasattr(source, "read"):
        return read_rgb(source)
    if isinstance(source, Image.Image):
        try:
            return to_rgb(source)
        except (OSError, SyntaxError, ValueError) as error:  # its file is cut off
            raise UserError(f"the image is not readable: {error}") from None
    source = np.asarray(source)
    if (
        source.dtype != np.uint8
        or source.ndim not in (2, 3)
        or source.shape[2:] not in ((), (1,), (3,), (4,))
        or 0 in source.shape
    ):
        raise UserError(
            f"an array {source.dtype} of {source.shape} is not an image; pass uint8 of "
            f"(H, W), (H, W, 3) or (H, W, 4)"
        )
    return to_rgb(Image.fromarray(source.squeeze(2) if source.shape[2:] == (1,) else source))


def _try_read(source, size):
    """uint8 (3, size, size), or a UserError that says why the image is not readable"""
    try:
        return torch.from_numpy(resize_square(load_pixels(source), size))
    except UserError as error:
        return error
    except Exception as error:  # any error of a broken file: the others must be captioned
        return UserError(f"{source} is not a readable image: {error!r}")


# The script


def get_args(argv=None):
    parser = Parser(description="Caption images, and draw where the model looked for each word.")
    group = parser.add_argument_group("images and model")
    group.add_argument(
        "-i",
        "--img",
        nargs="+",
        required=True,
        metavar="FILE|FOLDER|GLOB|URL",
        help="what to caption; folders without their subfolders, ** is any of them",
    )
    add_model_options(group)
    add = parser.add_argument_group("captions").add_argument
    add("-b", "--beam_size", type=positive_int, default=5, help="1 is greedy decoding")
    add("--n_best", type=positive_int, default=1, help="captions per image")
    add("--batch_size", type=positive_int, default=32, help="images at a time")
    add("--json", action="store_true", help="print a JSON object per image")
    add_search_options(parser, no_unk=True)
    add("--seed", type=non_negative_int, default=0, help="of --sample")
    add = parser.add_argument_group("pictures").add_argument
    add(
        "--out",
        help="file for the overlay of a single image (.png, .pdf, .gif, .mp4, .html), "
        "folder for the overlays of several, or one .html for all; if not given, "
        f"photo{OVERLAY} beside photo.jpg",
    )
    add("--no_attention", action="store_true", help="draw no overlays")
    add(
        "--smooth",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="blend the locations of the attention grid",
    )
    add(
        "--dont_smooth",
        dest="smooth",
        action="store_false",
        default=argparse.SUPPRESS,
        help="the same as --no-smooth",
    )
    add("--show", action="store_true", help="also show overlays in a window")
    add(
        "--beam_tree",
        metavar="FILE.svg",
        help="draw what the search for a single image considered, kept and dropped",
    )
    add_device_options(parser.add_argument_group("device"))
    return parser.parse_args(argv)


def check_options(args):
    """UserError for options that contradict each other."""
    if args.n_best > args.beam_size and not args.sample:
        raise UserError(
            f"--n_best {args.n_best} needs --beam_size {args.n_best} or more, "
            f"it is {args.beam_size}"
        )
    if args.no_attention and (args.show or args.out):
        raise UserError("--no_attention leaves nothing to save or show; drop --out and --show")
    if args.beam_tree and not args.beam_tree.lower().endswith(".svg"):
        raise UserError(f"--beam_tree {args.beam_tree} must end in .svg")
    if args.sample and args.beam_tree:
        raise UserError("--beam_tree draws a search; leave --sample out")
    if args.out and page.is_page(args.out) and not args.smooth:
        raise UserError(
            f"--no-smooth is for pictures; HTML pages such as {args.out} always blend locations"
        )
    search_options(args)
    find_device(args.device)


def main():
    args = get_args()
    check_options(args)
    paths = find_images(args.img)
    single = len(paths) == 1 and paths == args.img  # not a folder that happens to hold one
    if args.beam_tree and not single:
        raise UserError("--beam_tree is for one image; pass a single file as --img")
    one_page = args.out and page.is_page(args.out) and not single  # for all images
    overlays = overlay_paths(paths, None if one_page else args.out, single)
    if single and not is_url(paths[0]) and not os.path.exists(paths[0]):
        raise UserError(f"{paths[0]} not found")  # before the model is loaded
    model = find_model(args.model, args.checkpoint_folder, partial(print, file=sys.stderr))
    captioner = Captioner(model, args.word_map, args.device, args.amp, args.plain)
    set_seed(args.seed)
    failed, for_page, read_only = 0, [], False
    search = {"beam_size": args.beam_size, "n_best": args.n_best, **search_options(args)}
    results = captioner.each(paths, batch_size=args.batch_size, **search)
    bar = tqdm(results, total=len(paths), unit="image", disable=single or None)
    for overlay, result in zip(overlays, bar):
        if isinstance(result, UserError):
            if single:
                raise result
            tqdm.write(f"{os.path.basename(sys.argv[0])}: {result}", file=sys.stderr)
            failed += 1
            continue
        print_captions(result, args, single)
        if one_page:
            for_page.append(result)
        elif not args.no_attention and not read_only:
            try:
                with writing(overlay, make_folder=True):
                    result.save(overlay, args.smooth)
            except UserError as error:
                if single and args.out:
                    raise
                # The captions go on: where photographs are read-only, without overlays.
                read_only = (
                    not args.out
                    and isinstance(error.__cause__, OSError)
                    and error.__cause__.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
                )
                tqdm.write(
                    f"{os.path.basename(sys.argv[0])}: {error}"
                    + ("; captions go on without overlays, --out FOLDER takes them" * read_only),
                    file=sys.stderr,
                )
                failed += not read_only
        if args.show:
            show(result, overlay, args)
    if args.beam_tree:
        draw_beam_tree(captioner.grow_tree(paths[0], **search), args.beam_tree)
    if for_page:
        with writing(args.out, make_folder=True):
            page.write_page(args.out, for_page, f"{len(for_page)} captions")
    if not args.no_attention and failed < len(paths) and not read_only:
        where = args.out or f"*{OVERLAY} beside the images"
        print(f"attention: {overlays[0] if single else where}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(paths)} images could not be captioned")


def print_captions(captioned, args, single):
    """Print a line per caption, or a JSON object. single: whether to leave out the image's path"""
    if args.json:
        n_best = [{"caption": text, "score": score} for text, score in captioned.n_best]
        fields = {
            "image": captioned.name,
            **n_best[0],
            "words": captioned.words,
            "finished": captioned.finished,
        }
        lines = [json.dumps(fields | ({"n_best": n_best} if args.n_best > 1 else {}))]
    else:
        prefix = "" if single else f"{printable(captioned.name)}\t"
        lines = [
            prefix + (f"{score:.3f}\t" if args.n_best > 1 else "") + printable(text)
            for text, score in captioned.n_best
        ]
    tqdm.write("\n".join(lines), file=sys.stdout)
    if not captioned.words:
        tqdm.write(
            f"{printable(captioned.name)}: the caption is empty; the model may need more training",
            file=sys.stderr,
        )
    sys.stdout.flush()


def show(captioned, overlay, args):
    from visualization import figures

    try:
        figures.show(captioned.figure(args.smooth))
    except RuntimeError as error:
        raise UserError(f"--show: {error}; open {overlay} instead") from None


def draw_beam_tree(tree, path):
    from visualization.beam_tree import draw_tree

    with writing(path, make_folder=True):
        draw_tree(tree, path)
    print(f"beam tree: {path}", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
