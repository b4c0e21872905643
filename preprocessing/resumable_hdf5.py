"""
HDF5 files that are written row by row and can be resumed: a process may be killed at any moment,
and the next one continues. Used for input files and feature caches.
"""

import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field

import h5py
import numpy as np

from datasets import open_hdf5
from preprocessing.processes import defer_interrupt
from utils import UserError, exclusive_lock, read_json, sync_folder, write_json

SAVE_SECONDS = 2  # time between saves of the progress: the work lost if the process is killed


@dataclass
class ResumableHDF5:
    """
    An HDF5 file with one dataset, whose rows are written straight into the file.

    Space for every row is allocated when the file is created, and its structure never changes
    afterwards, so a process that is killed while writing leaves a valid file, and several
    processes can write different rows at the same time.

    shape: (rows, ...); offset: the byte at which row 0 starts, set by `create` and `inspect`
    """

    path: str
    dataset: str
    shape: tuple
    dtype: type
    attributes: dict = field(default_factory=dict)
    offset: int = 0

    @property
    def row_bytes(self):
        return int(np.prod(self.shape[1:])) * np.dtype(self.dtype).itemsize

    def create(self):
        allocation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        allocation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        allocation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        with h5py.File(self.path, "w", locking=False) as file:  # StagingFolder.lock is ours
            file.attrs.update(self.attributes)
            # Without timestamps, the same content gives the same bytes.
            dataset = file.create_dataset(
                self.dataset, self.shape, self.dtype, track_times=False, dcpl=allocation
            )
            self.offset = dataset.id.get_offset() or 0  # None if there are no rows
        self.sync()

    def inspect(self):
        """The number of rows of the existing file; OSError or KeyError if it is damaged."""
        with open_hdf5(self.path) as file:
            rows, self.offset = len(file[self.dataset]), file[self.dataset].id.get_offset() or 0
        if os.path.getsize(self.path) < self.offset + rows * self.row_bytes:
            raise OSError(f"{self.path} is truncated")
        return rows

    def write(self, first, rows):
        """Write rows, arrays of our dtype, from row number `first` on; None skips a row."""
        with open(self.path, "rb+", buffering=0) as file:
            for number, row in enumerate(rows, first):
                if row is not None:
                    file.seek(self.offset + number * self.row_bytes)
                    rest = memoryview(row).cast("B")
                    while rest:  # a signal or a nearly full disk may interrupt the write
                        rest = rest[file.write(rest) :]

    def drop_rows(self, dropped):
        """Remove these rows from the file; a killed call can be repeated."""
        rows = np.setdiff1d(np.arange(self.shape[0]), dropped)
        if self.inspect() == len(rows):  # already done
            return
        kept = ResumableHDF5(
            f"{self.path}.kept",
            self.dataset,
            (len(rows), *self.shape[1:]),
            self.dtype,
            self.attributes,
        )
        check_space(
            os.path.dirname(self.path),
            len(rows) * self.row_bytes,
            ", then run the same command to continue",
        )
        kept.create()
        with open(self.path, "rb") as source, open(kept.path, "rb+") as target:
            target.seek(kept.offset)
            for row in rows:
                source.seek(self.offset + int(row) * self.row_bytes)
                target.write(source.read(self.row_bytes))
        kept.sync()
        os.replace(kept.path, self.path)

    def sync(self):
        with open(self.path, "rb+") as file:
            os.fsync(file.fileno())


def check_space(folder, needed, next_step=""):
    """UserError unless the folder's disk has `needed` bytes of free space."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            f"free up space{next_step}"
        )


class StagingFolder:
    """
    The folder .unfinished_{name} in which files are made; they are moved to the output folder when
    all are complete. Its progress.json says how many rows of the HDF5 files are safely on disk.

    files     names of all files; the last is moved last, since it is the one that others look for
    key       a hash of everything the files are made from; only a folder of the same key is resumed
    arrays    {label: ResumableHDF5}
    done      {label: number of rows done, from the first one on}
    bad       {label: [[row, reason]]} of those rows that have no content
    complete  whether the files only have to be moved
    started   whether there is work to resume
    """

    def __init__(self, output_folder, name, key, files):
        self.output, self.key, self.files, self.arrays = output_folder, key, files, {}
        self.folder = os.path.join(output_folder, f".unfinished_{name}")
        self._reset()

    def _reset(self):
        self.done, self.bad = dict.fromkeys(self.arrays, 0), {label: [] for label in self.arrays}
        self.overwrite = self.complete = self.started = False
        self._saved = time.monotonic()

    def add(self, label, file, dataset, shape, dtype, **attributes):
        """Declare that one of the files is an HDF5 file with this dataset."""
        self.arrays[label] = ResumableHDF5(self.path(file), dataset, shape, dtype, attributes)
        self._reset()

    def path(self, file):
        return os.path.join(self.folder, file)

    def lock(self, busy):
        """A context in which no other process uses the folder; UserError(busy) if one does."""
        return exclusive_lock(f"{self.folder}.lock", busy)

    @property
    def _progress(self):
        return self.path("progress.json")

    @property
    def rows(self):
        return sum(array.shape[0] for array in self.arrays.values())

    @property
    def rows_done(self):
        return sum(self.done.values())

    def resume(self, overwrite=False):
        """
        Read the progress of an earlier process; returns whether there is work to resume. A run with
        --overwrite resumes only work that was also started with --overwrite.
        """
        try:
            found = read_json(self._progress)
            if found["key"] == self.key and (found["overwrite"] or not overwrite):
                for name in ("done", "bad", "overwrite", "complete"):
                    setattr(self, name, found[name])
                self.started = all(
                    map(self._exists, self.files)
                    if self.complete
                    else map(self._is_valid, self.arrays)
                )
        except (UserError, OSError, KeyError, TypeError, ValueError):  # missing or damaged
            self.started = False
        if not self.started:
            self._reset()
        return self.started

    def _exists(self, file):
        return any(os.path.exists(os.path.join(f, file)) for f in (self.folder, self.output))

    def _is_valid(self, label):
        rows = self.arrays[label].shape[0]
        return self.arrays[label].inspect() in (rows, rows - len(self.bad[label]))

    def check_space(self, next_step=""):
        """UserError unless the disk has space for the rows that are not done yet."""
        remaining = sum(
            (array.shape[0] - self.done[label]) * array.row_bytes
            for label, array in self.arrays.items()
        )
        check_space(self.output, remaining, next_step)

    def start(self, overwrite=False):
        """Create an empty folder, and the HDF5 files with space for every row."""
        self.remove()
        os.makedirs(self.folder)
        for array in self.arrays.values():
            array.create()
        self.overwrite, self.started = overwrite, True
        self.save()

    def advance(self, label, done, bad=()):
        """Record that `done` rows are done; bad: [[row, reason]] of new rows without content."""
        self.bad[label] += bad
        self.done[label] = done
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self):
        """Flush the rows to disk, then record that they are there."""
        if not self.started:  # the folder was removed
            return
        for label, done in self.done.items():
            if done:
                self.arrays[label].sync()
            # An interrupt may have come between the two assignments of advance().
            self.bad[label] = [[row, reason] for row, reason in self.bad[label] if row < done]
        write_json(
            self._progress,
            {name: getattr(self, name) for name in ("key", "overwrite", "complete", "done", "bad")},
        )
        self._saved = time.monotonic()

    def drop_bad(self):
        """Remove the rows without content from the files; a killed call can be repeated."""
        for label, array in self.arrays.items():
            array.drop_rows([row for row, _ in self.bad[label]])

    def move(self):
        """Move the files to the output folder; a killed call can be repeated."""
        *others, last = self.files
        with defer_interrupt():
            if os.path.exists(self.path(last)):  # the old one must not lie beside new files
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.output, last))
                    sync_folder(self.output)
            for file in others:
                self._move(file)
            sync_folder(self.output)
            self._move(last)
            sync_folder(self.output)
            self.remove()

    def _move(self, file):
        with suppress(FileNotFoundError):  # already moved
            os.replace(self.path(file), os.path.join(self.output, file))

    def remove(self):
        with suppress(FileNotFoundError):
            os.remove(self._progress)  # first: without it the rest cannot be resumed
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        self._reset()
