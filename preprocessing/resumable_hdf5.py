"""
A data set in the making: image files that a killed process leaves sound, and the folder in which
everything stands until it is whole.
"""

import os
import shutil
from contextlib import suppress

import h5py
import numpy as np

from preprocessing.processes import defer_interrupt
from utils import UserError, read_json, sync_folder, write_json

IMAGE_SIZE = 256  # pixels a side, of the images in the HDF5 files
IMAGE_BYTES = 3 * IMAGE_SIZE**2
KINDS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}


def preallocate(file, name, shape, dtype):
    """
    A dataset of an HDF5 file whose structure never changes again: the place of every number is
    set aside now, so a process that is killed while it writes them leaves a sound file.
    """
    places = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    places.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    places.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # Without times, what is made of the same is the same, byte for byte.
    return file.create_dataset(name, shape, dtype, track_times=False, dcpl=places)


def create_images(path, n, **attributes):
    """An HDF5 file with room for "images" (n, 3, 256, 256) uint8, which write_images() fills."""
    with h5py.File(path, "w") as file:
        file.attrs.update(attributes)
        preallocate(file, "images", (n, 3, IMAGE_SIZE, IMAGE_SIZE), "uint8")
    _sync_file(path)


def find_images(path):
    """How many images the file has, and the byte at which the first one starts."""
    with h5py.File(path, "r") as file:
        images = file["images"]
        return len(images), images.id.get_offset() or 0


def write_images(path, start, images):
    """
    Write images one after the other from byte `start` on. Where one is a str, the reason why it
    can't be read, its place is passed over. Returns these: [(index, reason)].
    """
    bad = []
    with open(path, "rb+", buffering=0) as file:  # a buffer would cut each image into two writes
        file.seek(start)
        for i, image in enumerate(images):
            if isinstance(image, str):
                bad.append((i, image))
                file.seek(IMAGE_BYTES, os.SEEK_CUR)
                continue
            rest = memoryview(image).cast("B")
            while rest:  # a signal, or a disk that is nearly full, may cut it short
                rest = rest[file.write(rest):]
    return bad


def _copy_rows(source, target, rows):
    """Copy these images, an ascending array, to the start of another file."""
    start = find_images(source)[1]
    with open(source, "rb") as old, open(target, "rb+") as new:
        new.seek(find_images(target)[1])
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
            for piece in np.split(run, range(64, len(run), 64)):
                old.seek(start + int(piece[0]) * IMAGE_BYTES)
                new.write(old.read(len(piece) * IMAGE_BYTES))


def _sync_file(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def check_space(folder, needed, next_step=""):
    """UserError unless the folder's disk has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
                        f"make room{next_step}")


class Work:
    """
    The folder .unfinished_{NAME} of a data set: its files, and progress.json, which says how much
    of them is safe on the disk.

    rows      {split: images to read}
    key       a hash of all that the files are made from; work of another key is never gone on with
    done      {split: images read, from the first one on}
    bad       {split: [[row, reason]]} of those among them that can't be read
    complete  whether the files have only to be moved to the output folder
    begun     whether there is work to go on with
    """

    def __init__(self, output_folder, name, rows, key, captions_per_image):
        self.output, self.name, self.rows, self.key = output_folder, name, rows, key
        self.captions_per_image = captions_per_image
        self.folder = os.path.join(output_folder, f".unfinished_{name}")
        self.files = [f"{split}_{kind}_{name}.{suffix}"
                      for split in rows for kind, suffix in KINDS.items()]
        self.files.append(f"WORDMAP_{name}.json")  # last: a data set is found by it
        self._reset()

    def _reset(self):
        self.done, self.bad = dict.fromkeys(self.rows, 0), {split: [] for split in self.rows}
        self.overwrite = self.complete = self.begun = False

    def path(self, split, kind="IMAGES"):
        return os.path.join(self.folder, f"{split}_{kind}_{self.name}.{KINDS[kind]}")

    @property
    def word_map(self):
        return os.path.join(self.folder, self.files[-1])

    @property
    def _progress(self):
        return os.path.join(self.folder, "progress.json")

    def resume(self, overwrite):
        """
        Whether there is work to go on with. A run with --overwrite starts anew, unless it was
        begun with --overwrite itself.
        """
        try:
            found = read_json(self._progress)
            if found["key"] != self.key or overwrite and not found["overwrite"]:
                return False
            if not self._is_progress(found["done"], found["bad"]):
                return False
            for what in ("done", "bad", "overwrite", "complete"):
                setattr(self, what, found[what])
            self.begun = all(map(self._exists, self.files) if self.complete else
                             map(self._is_sound, self.rows))
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError):
            # none there, or not as we leave it
            self.begun = False
        if not self.begun:
            self._reset()
        return self.begun

    def _is_progress(self, done, bad):
        return self.rows.keys() == done.keys() == bad.keys() and all(
            type(done[split]) is int and 0 <= done[split] <= n and all(
                type(row) is int and 0 <= row < n and isinstance(why, str)
                for row, why in bad[split])
            for split, n in self.rows.items())

    def _exists(self, file):
        return any(os.path.exists(os.path.join(f, file)) for f in (self.folder, self.output))

    def _is_sound(self, split):
        path, n = self.path(split), self.rows[split]
        found, start = find_images(path)
        kept = n - len(self.bad[split]) if self.done[split] == n else n
        return found in (n, kept) and os.path.getsize(path) >= start + found * IMAGE_BYTES

    def begin(self, overwrite):
        """An empty folder with a place for every image."""
        self.remove()
        os.makedirs(self.folder)
        for split, n in self.rows.items():
            self._create(self.path(split), split, n)
        self.overwrite = overwrite
        self.save()
        self.begun = True

    def _create(self, path, split, n):
        made_from = {"made_from": np.bytes_(self.key)} if split == "TRAIN" else {}
        create_images(path, n, captions_per_image=self.captions_per_image, **made_from)

    def save(self):
        """First the images, then the word that they are there."""
        for split, done in self.done.items():
            if done:
                _sync_file(self.path(split))
            # An interrupt may have come between the two.
            self.bad[split] = [[row, why] for row, why in self.bad[split] if row < done]
        write_json(self._progress, {what: getattr(self, what) for what in
                                    ("key", "overwrite", "complete", "done", "bad")})

    def drop_bad(self):
        """Leave the images that can't be read out of the files; a killed call can be repeated."""
        for split, n in self.rows.items():
            path, kept = self.path(split), self.path(split) + ".kept"
            rows = np.setdiff1d(np.arange(n), [row for row, _ in self.bad[split]])
            if find_images(path)[0] == len(rows):
                continue
            check_space(self.folder, len(rows) * IMAGE_BYTES, ", and the same command goes on")
            self._create(kept, split, len(rows))
            if len(rows):
                _copy_rows(path, kept, rows)
            _sync_file(kept)
            os.replace(kept, path)

    def move(self):
        """The files to where they belong; a killed call can be repeated."""
        *files, word_map = self.files
        with defer_interrupt():
            if os.path.exists(self.word_map):  # that of other files must not stand beside ours
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.output, word_map))
                    sync_folder(self.output)
            for file in files:
                self._move(file)
            sync_folder(self.output)
            self._move(word_map)
            sync_folder(self.output)
            self.remove()

    def _move(self, file):
        with suppress(FileNotFoundError):  # moved already
            os.replace(os.path.join(self.folder, file), os.path.join(self.output, file))

    def remove(self):
        with suppress(FileNotFoundError):
            os.remove(self._progress)  # first: without it the rest is nothing to go on with
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        self._reset()
