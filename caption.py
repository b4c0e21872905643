"""
Caption images, and draw where the model looked for each word.

    python caption.py --img photo.jpg                     # the caption, and photo_attention.png
    python caption.py --img photo.jpg --beam_size 5 --n_best 3
    python caption.py --img photos --no_attention > captions.tsv
    python caption.py --img "photos/*.jpg" more.png --json --out overlays
    python caption.py --img photos --out captions.html    # one page: point at a word
    python caption.py --img photo.jpg --out photo.gif     # or .mp4: the gaze moving
    python caption.py --img photo.jpg --beam_tree tree.svg      # what the search kept and dropped

On stdout stands one line per caption, its fields divided by tabs: the path unless --img is a single
file, the score if --n_best is above 1 (total log-probability, the best first), the caption.

From Python: `from caption import Captioner`, see captioner.py.
"""

import argparse
import glob
import json
import os
import sys
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from captioner import Captioner, check_suffix
from checkpoints import find_model
from modeling.beam_search import add_search_options, search_options
from utils import AMP, Parser, UserError, find_device, run_script
from visualization import page

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp")
OVERLAY = "_attention.png"
ONE_FILE = (".png", ".jpg", ".pdf", ".svg", ".gif", ".mp4")  # what --out of several images is not


def get_args(argv=None):
    parser = Parser(description="Caption images, and draw where the model looked for each word.")
    add = parser.add_argument
    add("--img", nargs="+", required=True, metavar="FILE|FOLDER|GLOB", help="what to caption")
    add("--model", help="checkpoint; if not given, the only BEST one in --checkpoint_folder or the "
        "current folder, else the one that comes with the program")
    add("--checkpoint_folder", help="where to look for it")
    add("--word_map", help="for checkpoints that carry none")
    add("--beam_size", type=int, default=5, help="1 is greedy decoding")
    add("--n_best", type=int, default=1, help="captions per image")
    add_search_options(parser)
    add("--batch_size", type=int, default=32, help="images at a time")
    add("--json", action="store_true", help="print a JSON object per image")
    add("--out", help="file for the overlay of a single image (.png, .pdf, .gif, .mp4, .html), "
        "folder for those of several, or one .html for all; if not given, "
        f"photo{OVERLAY} beside photo.jpg")
    add("--no_attention", action="store_true", help="draw no overlays")
    add("--beam_tree", metavar="FILE.svg", help="draw what the search for a single image "
        "considered, kept and dropped")
    add("--smooth", action=argparse.BooleanOptionalAction, default=True,
        help="blend the cells of the attention grid")
    add("--show", action="store_true", help="show overlays in a window too")
    add("--device", help="cuda, cuda:1, cpu, mps; if not given, CUDA's GPU "
        "where there is one, else the CPU")
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
    if args.beam_tree and not args.beam_tree.lower().endswith(".svg"):
        raise UserError(f"--beam_tree {args.beam_tree} must end in .svg")
    if args.out and page.is_page(args.out) and not args.smooth:
        raise UserError(f"--no-smooth is for pictures; {args.out} blends cells")
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
        try:
            check_suffix(out)  # now: it is drawn only when all the work is done
        except ValueError as error:
            raise UserError(f"--out {out} cannot be written: {error}") from None
        return [out]
    if out and os.path.isfile(out):
        raise UserError(f"--out {out} is a file; the overlays of several images need a folder")
    if out and out.lower().endswith(ONE_FILE):
        raise UserError(f"--out {out} is one file, but there are {len(paths)} images; pass a "
                        f"folder or an .html")
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


@contextmanager
def written(path):
    """Makes the folder of a file to write; what fails in the context becomes a UserError."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from None


def show(captioned, overlay, args):
    from visualization import attention as visualize
    try:
        visualize.show(captioned.figure(args.smooth))
    except RuntimeError as error:
        raise UserError(f"--show: {error}; open {overlay} instead") from None


def main():
    args = get_args()
    check(args)
    paths = find_images(args.img)
    alone = len(paths) == 1 and paths == args.img  # not a folder that happens to hold one
    if args.beam_tree and not alone:
        raise UserError("--beam_tree is of one image; pass a single file as --img")
    together = args.out and page.is_page(args.out) and not alone  # one page of all images
    overlays = overlay_paths(paths, None if together else args.out, alone)
    model = find_model(args.model, args.checkpoint_folder, partial(print, file=sys.stderr))
    captioner = Captioner(model, args.word_map, args.device, args.amp)
    bad, captioned = 0, []
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
        if not result.words:
            tqdm.write(f"{result.name}: the model has no words for it; it may need more training",
                       file=sys.stderr)
        sys.stdout.flush()
        if args.no_attention:
            continue
        if together:
            captioned.append(result)
        else:
            with written(overlay):
                result.save(overlay, args.smooth)
        if args.show:
            show(result, overlay, args)
    if args.beam_tree:
        from visualization.beam_tree import draw_tree  # fonts are measured: only here
        with written(args.beam_tree):
            draw_tree(captioner.grow_tree(paths[0], args.beam_size, n_best=args.n_best,
                                          **args.search), args.beam_tree)
        print(f"beam tree: {args.beam_tree}", file=sys.stderr)
    if captioned:
        with written(args.out):
            page.write_page(args.out, captioned, f"{len(captioned)} captions")
    if not args.no_attention and bad < len(paths):
        where = args.out or f"*{OVERLAY} beside the images"
        print(f"attention: {overlays[0] if alone else where}", file=sys.stderr)
    if bad:
        raise UserError(f"{bad} of {len(paths)} images could not be captioned")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be valid text
    run_script(main)
