"""Which images caption.py reads, and which files it writes its overlays to."""

import glob
import os
import sys
from collections import Counter
from contextlib import contextmanager
from urllib.parse import urlsplit

from preprocessing.images import find_suffixes, is_url
from utils import UserError, printable
from visualization import page
from visualization.overlay import OVERLAYS

OVERLAY = "_attention.png"
ANIMATIONS = (".gif", ".mp4")
ONE_FILE = (".png", ".jpg", ".pdf", ".svg", *ANIMATIONS)  # what --out of several images cannot be


def find_images(patterns):
    """
    The image paths for files, web addresses, folders and globs, in this order, without
    repetitions. A folder stands for its files with an image's suffix, sorted, without subfolders; a
    glob for those that it matches, where ** is any number of folders. How many other files were
    passed over is said on stderr.

    Our own overlays are left out, even if the shell has expanded the glob.
    Raises UserError for a folder or glob without images; a file need not exist.
    """
    paths, passed_over, suffixes = [], Counter(), tuple(find_suffixes())
    for pattern in patterns:
        folder = os.path.isdir(pattern)
        is_glob = glob.has_magic(pattern) and not os.path.exists(pattern) and not is_url(pattern)
        if folder or is_glob:
            wildcard = os.path.join(glob.escape(pattern), "*") if folder else pattern
            found = [
                path
                for path in sorted(glob.glob(wildcard, recursive=True))
                if not path.endswith(OVERLAY) and os.path.isfile(path)
            ]
            images = [path for path in found if path.lower().endswith(suffixes)]
            passed_over.update(
                os.path.splitext(path)[1].lower() or os.path.basename(path)
                for path in found
                if not path.lower().endswith(suffixes)
            )
            if not images:
                raise UserError(
                    f"no images {'in' if folder else 'match'} {pattern}"
                    + (f", only {_count(passed_over)}" if passed_over else "")
                )
            paths += images
        else:
            paths.append(pattern)
    if passed_over:
        print(f"skipped, not images: {_count(passed_over)}", file=sys.stderr)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not path.endswith(OVERLAY)] or paths


def _count(kinds):
    """How many files of each kind, as in "3 .txt, 1 .mov": the most frequent five kinds"""
    others = sum(kinds.values()) - sum(n for _, n in kinds.most_common(5))
    shown = ", ".join(f"{n} {printable(kind)}" for kind, n in kinds.most_common(5))
    return shown + f" and {others} others" * bool(others)


def overlay_paths(paths, out, single):
    """
    A path for the overlay of each image, all different, and none that of an image.

    out: as in the options of caption.py; single: whether a single file was given, so that `out` may
    be the file of its overlay
    Raises UserError if that would overwrite the image, or if out is a file but a folder is needed.
    """
    if out and single and os.path.basename(out) and not os.path.isdir(out):
        if os.path.realpath(out) == os.path.realpath(paths[0]):
            raise UserError(f"--out {out} is the image itself; pass another file")
        try:
            check_suffix(out)  # now, before all the work is done
        except ValueError as error:
            raise UserError(f"--out {out} cannot be written: {error}") from None
        return [out]
    if out and os.path.isfile(out):
        raise UserError(f"--out {out} is a file; the overlays of several images need a folder")
    if out and out.lower().endswith(ONE_FILE):
        raise UserError(
            f"--out {out} is one file, but there are {len(paths)} images; pass a folder or an .html"
        )
    taken, overlays = set(paths), []
    for path in paths:
        if is_url(path):  # goes to the current folder
            path = os.path.basename(urlsplit(path).path) or "image"
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


# Matplotlib and imageio are imported only where they are needed, so that captions
# without pictures start faster.


def save_attention(captioned, path, smooth=True, overlay=OVERLAYS[0]):
    """
    Write a `caption.Captioned` in the format of the path's suffix: an HTML page, an animation or a
    picture. smooth, overlay: as in `caption.Captioned.figure`

    Raises ValueError for any other suffix or overlay, OSError if the file cannot be written.
    """
    if page.is_page(path):
        page.write_page(path, [captioned], captioned.text, overlay)
    elif _is_animation(path):
        from visualization.animation import write_animation
        from visualization.overlay import Drawing

        write_animation(
            path,
            captioned.image,
            captioned.words,
            captioned.attention,
            Drawing(smooth, overlay, captioned.offset),
        )
    else:
        from visualization import figures

        figures.save(captioned.figure(smooth, overlay), path)


def check_suffix(path):
    """ValueError where `save_attention` would raise it."""
    if not page.is_page(path) and not _is_animation(path):
        from visualization import figures

        figures.find_format(path)


def _is_animation(path):
    return os.fspath(path).lower().endswith(ANIMATIONS)


@contextmanager
def writing(path, make_folder=False):
    """`with writing(path):` turn errors of writing the file into UserErrors."""
    try:
        if make_folder:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
