"""Which images caption.py reads, and which files it writes its overlays to."""

import glob
import os
import sys
from contextlib import contextmanager
from itertools import count
from urllib.parse import urlsplit

from preprocessing.images import find_suffixes, is_url
from utils import UserError
from visualization import page

OVERLAY = "_attention.png"
ANIMATIONS = (".gif", ".mp4")
ONE_FILE = (".png", ".jpg", ".pdf", ".svg", *ANIMATIONS)  # not for --out of several images


def find_images(patterns):
    """
    The image paths for files, web addresses, folders and globs, in this order, without repetitions
    and without our own overlays. A folder stands for its files with an image's suffix, without
    subfolders; a glob for those that it matches, where ** is any number of folders.

    Raises UserError for a folder or glob without images; a file need not exist.
    """
    paths, skipped = [], 0
    for pattern in patterns:
        wildcard = os.path.join(glob.escape(pattern), "*") if os.path.isdir(pattern) else pattern
        if not glob.has_magic(wildcard) or os.path.isfile(pattern) or is_url(pattern):
            paths.append(pattern)
            continue
        found = sorted(filter(os.path.isfile, glob.glob(wildcard, recursive=True)))
        found = [path for path in found if not path.endswith(OVERLAY)]
        images = [path for path in found if path.lower().endswith(tuple(find_suffixes()))]
        if not images:
            raise UserError(f"no images in {pattern}, which has {len(found)} other files")
        paths, skipped = paths + images, skipped + len(found) - len(images)
    if skipped:
        print(f"{skipped} files are not images and were skipped", file=sys.stderr)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not path.endswith(OVERLAY)] or paths


def overlay_paths(paths, out, single):
    """
    A path for the overlay of each image, all different, and none the path of an image. out: as in
    the options of caption.py; single: whether it may be the file of the only overlay

    Raises UserError if that would overwrite the image, or if out is a file but a folder is needed.
    """
    is_file = out and not os.path.isdir(out) and (os.path.splitext(out)[1] or os.path.isfile(out))
    if single and is_file:
        if os.path.realpath(out) == os.path.realpath(paths[0]):
            raise UserError(f"--out {out} is the image itself; pass another file")
        if not page.is_page(out) and not out.lower().endswith(ANIMATIONS):
            from visualization import figures  # matplotlib is slow, so only for a picture

            try:
                figures.find_format(out)  # now, before all the work is done
            except ValueError as error:
                raise UserError(f"--out {out} cannot be written: {error}") from None
        return [out]
    if out and (os.path.isfile(out) or out.lower().endswith(ONE_FILE)):
        raise UserError(
            f"--out {out} is one file, but there are {len(paths)} images; pass a folder or an .html"
        )
    taken, overlays = set(paths), []
    for path in paths:
        if is_url(path):  # goes to the current folder
            path = os.path.basename(urlsplit(path).path) or "image"
        stem = os.path.splitext(path)[0]
        if out:
            stem = os.path.join(out, os.path.basename(stem))
        # There may be photo.jpg and photo.png, or photo.jpg of two folders.
        names = (f"{stem}_{i}{OVERLAY}" if i > 1 else stem + OVERLAY for i in count(1))
        overlays.append(next(name for name in names if name not in taken))
        taken.add(overlays[-1])
    return overlays


def can_write_beside(overlays):
    """Whether overlays can be written beside the images; prints which folder is read-only"""
    for folder in {os.path.dirname(path) or "." for path in overlays}:
        if os.path.isdir(folder) and not os.access(folder, os.W_OK):
            advice = "is read-only; pass --out FOLDER for the overlays"
            print(f"caption.py: {folder} {advice}", file=sys.stderr)
            return False
    return True


@contextmanager
def writing(path):
    """Make the folder of `path`, and turn errors of writing the file into UserErrors."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
