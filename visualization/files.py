"""Which images caption.py reads, and which files it writes its overlays to."""

import glob
import os
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

from preprocessing.images import find_suffixes, is_url
from utils import UserError
from visualization import page

OVERLAY = "_attention.png"
ANIMATIONS = (".gif", ".mp4")
ONE_FILE = (".png", ".jpg", ".pdf", ".svg", *ANIMATIONS)  # what --out of several images cannot be


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
            raise UserError(f"no images in {pattern}, only {len(found)} other files")
        paths, skipped = paths + images, skipped + len(found) - len(images)
    if skipped:
        print(f"{skipped} files are not images and were skipped", file=sys.stderr)
    paths = list(dict.fromkeys(paths))
    return [path for path in paths if not path.endswith(OVERLAY)] or paths


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
        if not page.is_page(out) and not out.lower().endswith(ANIMATIONS):
            from visualization import figures  # matplotlib is slow, so only for a picture

            with writing(out):
                figures.find_format(out)  # now, before all the work is done
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
        overlay, count = stem + OVERLAY, 1
        while overlay in taken:  # photo.jpg and photo.png, or photo.jpg of two folders
            count += 1
            overlay = f"{stem}_{count}{OVERLAY}"
        taken.add(overlay)
        overlays.append(overlay)
    return overlays


def save_attention(captioned, path, smooth=True):
    """
    Write a `caption.Captioned` in the format of the path's suffix: an HTML page, an animation or a
    picture. Raises ValueError for any other suffix, OSError if the file cannot be written.
    """
    if page.is_page(path):
        page.write_page(path, [captioned], captioned.text)
    elif os.fspath(path).lower().endswith(ANIMATIONS):
        from visualization.animation import write_animation

        words, alphas = captioned.words, captioned.attention
        write_animation(path, captioned.image, words, alphas, smooth, captioned.offset)
    else:
        from visualization import figures

        figures.save(captioned.figure(smooth), path)


@contextmanager
def writing(path, make_folder=False):
    """`with writing(path):` turn errors of writing the file into UserErrors."""
    try:
        if make_folder:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
