"""
Caption images, and draw where the model looked for each word.

    python caption.py --img photo.jpg                     # the caption, and photo_attention.png
    python caption.py --img photos --no_attention > captions.tsv
    python caption.py --img "photos/*.jpg" more.png --json --out overlays
    python caption.py --img photos --out captions.html    # one page: point at a word
    python caption.py --img photo.jpg --out photo.gif     # or .mp4: attention word by word

Prints one line per caption to stdout, with fields separated by tabs: the path unless --img is a
single file, the score if --n_best is above 1 (total log-probability, the best first), the caption.
As a library:

    from caption import Captioner
    captioned = Captioner()("photo.jpg")        # or a PIL image, an array, a list of these
    print(captioned.text, captioned.score)
    captioned.save("photo_attention.png")       # or .html, .gif, .mp4; a notebook shows the page
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np
import torch
from tqdm import tqdm

try:
    from checkpoints import PRETRAINED, add_model_options, find_model, load_captioner
    from modeling.beam_search import Search, find_captions
    from modeling.devices import autocast, find_device, set_seed
    from modeling.evidence import find_evidence
    from modeling.sampling import most_likely_location
    from preprocessing.images import is_url, read_source, resize_square
    from utils import (
        Parser,
        UserError,
        add_device_options,
        add_search_options,
        large_int,
        non_negative_int,
        printable,
        run_script,
        search_options,
        small_int,
    )
    from visualization import files, page
    from visualization.captioned import Captioned
except ImportError as error:
    name, here = (error.name or "").partition(".")[0], Path(__file__).parent
    theirs = getattr(sys.modules.get(name), "__file__", None) or __file__
    own = (here, here / name)  # a module's folder, not .venv within ours
    if Path(theirs).parent in own or name not in {path.stem for path in here.iterdir()}:
        raise
    advice = "rename it, or use torch.hub.load as README.md says"
    raise ImportError(f"{theirs} hides the {name} of {here}: {advice}") from error

if TYPE_CHECKING:
    from visualization.beam_tree import Tree


FOR_READERS = {"no_unk": True, "no_repeat_words": True}  # of a Search, unless others are given


class Captioner:
    """
    A trained model that captions images: `Captioner("BEST_checkpoint_X.pth.tar")("photo.jpg").text`

    model: a checkpoint, by default the one that comes with the program
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
        loaded = load_captioner(os.fspath(model), self.device, word_map)
        self.encoder, self.decoder, self.word_map, _ = loaded
        self.decoder.plain = plain
        self.image_size = self.encoder.args["image_size"]
        self.words = {i: word for word, i in self.word_map.items()}

    def __call__(self, images: Any, **options: Any) -> "Captioned | list[Captioned]":
        """
        images: a path, a web address, bytes, an open binary file, a PIL image, an array uint8
        (H, W), (H, W, 3) or (H, W, 4); or several of these, an array (N, H, W, 3) or any iterable
        options: those of `each`

        Returns a Captioned, or a list for several images. Raises UserError if one is not readable.
        """
        one = isinstance(images, (str, bytes, bytearray)) or hasattr(images, "read")
        one = one or not isinstance(images, Iterable) or getattr(images, "ndim", 1) in (0, 2, 3)
        results = []
        for result in self.each([images] if one else images, **options):
            if isinstance(result, UserError):
                raise result
            results.append(result)
        return results[0] if one else results

    def each(
        self,
        images: Iterable[Any],
        *,
        batch_size: int = 32,
        evidence: bool = False,
        **options: Any,
    ) -> Iterator["Captioned | UserError"]:
        """
        Yield for each of these images, in order, a Captioned, or a UserError if it is not readable.
        While the model captions one batch, threads read the next. evidence: whether to compute it;
        options: fields of a `modeling.beam_search.Search`, as beam_size=5, n_best=1, or
        sample=True, temperature=0.7; no_unk and no_repeat_words are True unless given
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, it must be at least 1")
        search, images = Search(**FOR_READERS | options), iter(images)
        with ThreadPoolExecutor() as pool:

            def start_reading():
                reading = []
                for image in islice(images, batch_size):
                    reading.append(pool.submit(self._read, image))
                    if not isinstance(image, (str, os.PathLike, bytes)):
                        wait(reading)  # a camera may put its next picture into the same array
                return reading

            reading = start_reading()
            while reading:
                batch, reading = reading, start_reading()
                squares = [future.result()[-1] for future in batch if not future.exception()]
                captions = iter(self._caption(squares, search, evidence) if squares else [])
                for future in batch:
                    if isinstance(future.exception(), UserError):
                        yield future.exception()
                    else:
                        *source, _ = future.result()
                        yield self._to_words(*next(captions), *source)

    def grow_tree(self, image: Any, **options: Any) -> "Tree":
        """What the search for an image's caption kept and dropped; options: those of `each`"""
        from visualization.beam_tree import build_tree

        *_, square = self._read(image)
        search = Search(**FOR_READERS | options)
        with torch.inference_mode(), autocast(self.device, self.amp):
            return build_tree(self.decoder, self._encode([square]), self.word_map, search)

    def _read(self, source):
        """Name, pixels (None for those of a file) and checksum of a `Captioned`; a square for it"""
        pixels, is_file = read_source(source)
        name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else "image"
        kept = None if is_file else pixels  # there may be thousands of files
        return name, kept, crc32(pixels.data), resize_square(pixels, self.image_size)

    def _encode(self, squares):
        """Images uint8 (3, size, size) -> features (N, G, E)"""
        return self.encoder.cells(torch.from_numpy(np.stack(squares)).to(self.device))

    def _caption(self, squares, search, evidence):
        """Pairs of each image's beam_search.Caption and its evidence, None unless asked for"""
        hard = most_likely_location if search.hard_attention else None
        with torch.inference_mode(), autocast(self.device, self.amp):
            features = self._encode(squares)
            captions = find_captions(self.decoder, features, self.word_map, search)
            if not evidence:
                return [(best, None) for best in captions]
            rest = self.word_map["<start>"], hard
            pairs = zip(features, captions)
            return [(best, find_evidence(self.decoder, x, best.tokens, *rest)) for x, best in pairs]

    def _to_words(self, best, evidence, name, pixels, checksum):
        """The Captioned of a beam_search.Caption"""
        found = (best, *best.alternatives)
        words = [[self.words[i] for i in caption.tokens] for caption in found]
        n_best = [(" ".join(text), caption.score) for text, caption in zip(words, found)]
        rest = (n_best, self.encoder, pixels, checksum, evidence)
        return Captioned(name, words[0], best.alphas, best.score, best.finished, *rest)


# The script


def get_args(argv=None):
    parser = Parser(description="Caption images, and draw where the model looked for each word.")
    group = parser.add_argument_group("images and model")
    text = "what to caption; folders without their subfolders; in a glob ** is any of these"
    several = {"nargs": "+", "metavar": "FILE|FOLDER|GLOB|URL", "help": text}
    group.add_argument("-i", "--img", required=True, **several)
    add_model_options(group)
    add = parser.add_argument_group("captions").add_argument
    add("-b", "--beam_size", type=small_int, default=5, help="1 is greedy decoding")
    add("--n_best", type=small_int, default=1, help="captions per image")
    add("--batch_size", type=large_int, default=32, help="images at a time")
    add("--json", action="store_true", help="print a JSON object per image")
    add_search_options(parser, **FOR_READERS)
    add("--seed", type=non_negative_int, default=0, help="of --sample")
    add = parser.add_argument_group("pictures").add_argument
    text = "file for the overlay of a single image (.png, .pdf, .gif, .mp4, .html), folder for "
    text += f"those of several, or one .html for all; if not given, NAME{files.OVERLAY} beside it"
    add("--out", help=text)
    add("--no_attention", action="store_true", help="draw no overlays")
    text = "draw what each location contributed to the word, instead of attention to it"
    add("--evidence", action="store_true", help=text)
    add("--smooth", action="store_true", default=True, help="blend the attention's locations")
    blocks = {"action": "store_false", "default": argparse.SUPPRESS, "help": "draw blocks"}
    add("--no-smooth", "--dont_smooth", dest="smooth", **blocks)
    add("--show", action="store_true", help="also show overlays in a window")
    add("--beam_tree", metavar="FILE", help="draw the beam search for a single image")
    add_device_options(parser.add_argument_group("device"))
    return parser.parse_args(argv)


def check_options(args, single):
    """UserError for options that conflict; single: whether --img is one file"""
    if args.n_best > args.beam_size and not args.sample:
        raise UserError(f"--n_best {args.n_best} needs --beam_size {args.n_best} or more")
    if args.no_attention and (args.show or args.out or args.evidence):
        raise UserError("--no_attention leaves nothing to draw; drop --out, --show and --evidence")
    if args.out and page.is_page(args.out) and not args.smooth:
        raise UserError(f"--no-smooth is for pictures; pages such as {args.out} always blend")
    if args.beam_tree and (args.sample or not single):
        raise UserError("--beam_tree draws the search for one file; pass one --img, no --sample")


def main():
    args = get_args()
    paths = files.find_images(args.img)
    single = len(paths) == 1 and paths == args.img  # not a folder that happens to hold one
    check_options(args, single)
    search = {"beam_size": args.beam_size, "n_best": args.n_best, **search_options(args)}
    one_page = args.out and page.is_page(args.out) and not single  # for all images
    overlays = files.overlay_paths(paths, None if one_page else args.out, single)
    if single and not is_url(paths[0]) and not os.path.exists(paths[0]):
        raise UserError(f"{paths[0]} not found")  # before the model is loaded
    model = find_model(args.model, args.checkpoint_folder, partial(print, file=sys.stderr))
    captioner = Captioner(model, args.word_map, args.device, args.amp, args.plain)
    set_seed(args.seed)
    draws = not args.no_attention and (args.out or files.can_write_beside(overlays))
    failed, for_page = 0, []
    options = {"batch_size": args.batch_size, "evidence": args.evidence, **search}
    results = captioner.each(paths, **options)
    bar = tqdm(results, total=len(paths), unit="image", disable=single or None)
    for overlay, result in zip(overlays, bar):
        try:
            if isinstance(result, UserError):
                raise result
            print_captions(result, args, single)
            if one_page:
                for_page.append(result)
            elif draws:
                with files.writing(overlay):
                    result.save(overlay, args.smooth)
        except UserError as error:  # the other images are captioned
            if single:
                raise
            failed += 1
            tqdm.write(f"caption.py: {error}", file=sys.stderr)
            continue
        if args.show:
            from visualization.figures import show

            show(result.figure(args.smooth))
    if args.beam_tree:
        from visualization.beam_tree import draw_tree

        with files.writing(args.beam_tree):
            draw_tree(captioner.grow_tree(result.image, **search), args.beam_tree)
        print(f"beam tree: {args.beam_tree}", file=sys.stderr)
    if for_page:
        with files.writing(args.out):
            page.write_page(args.out, for_page, f"{len(for_page)} captions")
    if draws and failed < len(paths):
        where = overlays[0] if single else args.out or f"*{files.OVERLAY} beside the images"
        print(f"{'evidence' if args.evidence else 'attention'}: {where}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(paths)} images could not be captioned or drawn")


def print_captions(captioned, args, single):
    """Print a line per caption, or a JSON object. single: whether to leave out the image's path"""
    name, several = printable(captioned.name), args.n_best > 1
    if args.json:
        n_best = [{"caption": text, "score": score} for text, score in captioned.n_best]
        fields = {"image": captioned.name, **n_best[0], "words": captioned.words}
        fields |= {"finished": captioned.finished} | ({"n_best": n_best} if several else {})
        tqdm.write(json.dumps(fields), sys.stdout)
    else:
        for text, score in captioned.n_best:
            columns = ([] if single else [name]) + ([f"{score:.3f}"] if several else [])
            tqdm.write("\t".join([*columns, printable(text)]), sys.stdout)
    sys.stdout.flush()
    if not captioned.words:
        tqdm.write(f"{name}: the caption is empty; the model may need more training", sys.stderr)


if __name__ == "__main__":
    run_script(main)
