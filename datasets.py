"""
From files to batches: `CaptionDataset` over the files that create_input_files.py writes, its word
map, and `ResumableBatchSampler`, which determines the order of the batches.
"""

import json
import os
import signal
import threading
import warnings
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from utils import UserError, check_is_file, read_json

SPECIAL_TOKENS = ("<pad>", "<unk>", "<start>", "<end>")
KINDS = {"IMAGES": "hdf5", "CAPTIONS": "json", "CAPLENS": "json", "REFERENCES": "json"}
IMAGE_SIZE = 256  # pixels a side of the images, unless another size is asked for
# A smaller image is less than one cell of most encoders; a larger one can only be a mistake.
LEAST_SIZE, LARGEST_SIZE = 32, 2048
CHUNK_BYTES = 4 << 20  # of a caption file, read at a time


def data_file(split, kind, data_name):
    """The name of a data set's file; split is TRAIN, VAL or TEST, kind is one of KINDS."""
    return f"{split}_{kind}_{data_name}.{KINDS[kind]}"


def check_word_map(word_map, path):
    """
    Return the word map if it is valid: words -> ids from 0 up without gaps, with <pad> 0 and the
    other special tokens. Raises UserError, which names the file `path`, otherwise.
    """
    if not isinstance(word_map, dict) or not all(type(i) is int for i in word_map.values()):
        wrong = "it is not an object of words and integers"
    elif missing := [word for word in SPECIAL_TOKENS if word not in word_map]:
        wrong = f"it lacks {', '.join(missing)}"
    elif word_map["<pad>"] != 0:
        wrong = f"<pad> is {word_map['<pad>']}, not 0"
    elif gaps := set(range(len(word_map))).symmetric_difference(word_map.values()):
        wrong = (
            f"its {len(word_map)} words do not have the ids 0 to {len(word_map) - 1} once "
            f"each, see {min(gaps)}"
        )
    else:
        return word_map
    raise UserError(
        f"{path} is not a word map: {wrong}; pass the WORDMAP file of the training data"
    )


def read_word_map(path, next_step=""):
    """Word -> id from a WORDMAP file; UserError as in `read_json` or `check_word_map`."""
    return check_word_map(read_json(path, next_step), path)


def find_data_name(data_folder, name=None):
    """
    The name of the data set: `name` if given, else that of the only one in the folder. UserError
    that lists them if there are several, or if the name would lead out of the folder.
    """
    if name:
        if os.path.basename(name) != name:
            raise UserError(
                f"--data_name {name!r} is not the name of a data set: it has a folder "
                f"in it; pass --data_folder"
            )
        return name
    names = sorted(
        path.stem.removeprefix("WORDMAP_") for path in Path(data_folder).glob("WORDMAP_*.json")
    )
    if not names:
        raise UserError(
            f"no data set in {data_folder}; pass the --data_folder of create_input_files.py"
        )
    if len(names) > 1:
        raise UserError(
            f"several data sets in {data_folder}; pass --data_name, one of: " + ", ".join(names)
        )
    return names[0]


def add_data_options(parser):
    """--data_folder and --data_name, which say what files a script reads"""
    parser.add_argument("--data_folder", default="data", help="what create_input_files.py wrote")
    parser.add_argument("--data_name", help="which data set, if the folder has several")


def open_hdf5(path):
    """
    Open an HDF5 file for reading. Not with HDF5's own locks: our files do not change once they have
    their name, and some network disks have no locks, which looks like a damaged file.
    """
    import h5py  # only here: a caption of a photograph needs none

    check_is_file(path)
    return h5py.File(path, "r", locking=False)


@contextmanager
def _reading(path):
    """
    Turn any error while a file of create_input_files.py is read into a UserError that names it.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found; run python create_input_files.py first") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # HDF5 and JSON raise many kinds for foreign bytes
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is damaged: {reason}; run create_input_files.py again") from None


def read_word_ids(path, vocab_size):
    """
    Read a CAPTIONS file, a JSON list of lists of word ids, all of one length: integers
    (captions, L), of 16 bits where these suffice. The file is read in pieces: as Python lists,
    COCO's captions would take over a gigabyte.

    Raises UserError unless all are ids below `vocab_size`.
    """
    with _reading(path):
        return _parse_word_ids(path, vocab_size)


def _parse_word_ids(path, vocab_size):
    wrong = ValueError(f"it does not hold lists of word ids below {vocab_size}, all of one length")
    dtype = np.int16 if vocab_size <= 1 << 15 else np.int32
    width, pieces, rest, opened, closed = None, [], b"", 0, 0
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy only warns about text that is not a number
        while chunk := file.read(CHUNK_BYTES):
            opened, closed = opened + chunk.count(b"["), closed + chunk.count(b"]")
            complete, bracket, rest = (rest + chunk).rpartition(b"]")
            rows = [
                row.partition(b"]")[0]
                for row in (complete + bracket).split(b"[")
                if row.strip(b", \r\n\t]")
            ]
            if not rows:
                continue
            width = width or rows[0].count(b",") + 1
            ids = np.fromstring(b",".join(rows), dtype=np.int64, sep=",")
            if (
                any(row.count(b",") + 1 != width for row in rows)
                or len(ids) != width * len(rows)
                or ids.min() < 0
                or ids.max() >= vocab_size
            ):
                raise wrong
            pieces.append(ids.astype(dtype).reshape(-1, width))
    if rest.strip() or opened != closed or opened != sum(map(len, pieces)) + 1:
        raise wrong
    return np.concatenate(pieces) if pieces else np.empty((0, 0), dtype)


class Item(NamedTuple):
    """An item of `CaptionDataset`, or a batch of N items, each tensor with a leading N."""

    images: torch.Tensor  # pixels, uint8 (3, S, S); after `use_features` features, float16 (G, E)
    captions: torch.Tensor  # int64 (R, L) word ids: <start> words <end> <pad>...
    lengths: torch.Tensor  # int64 (R,) with <start> and <end>; 1: see `CaptionDataset`
    indices: torch.Tensor  # int64 () the item's own index in the data set


class CaptionDataset(Dataset):
    """
    One split of a data set. An `Item` is an image with its R captions or, with by_image=False, one
    caption with its image (R = 1).

    Images with fewer captions than R were filled up by repeating them; a repetition must not count.
    It has the length 1, which is nothing to predict; with by_image=False there is no item for it.

    Indexing with an array of N items gives the batch at once.
    Pixels stay on disk; the HDF5 file is opened at the first read, once per process,
    so a dataset can be passed to forked and to spawned workers.
    """

    def __init__(
        self, data_folder: str | os.PathLike, data_name: str, split: str, by_image: bool = True
    ):
        self.by_image, folder = by_image, Path(data_folder)
        self.path, captions, lengths, self._references = (
            folder / data_file(split, kind, data_name) for kind in KINDS
        )
        self.word_map = read_word_map(
            folder / f"WORDMAP_{data_name}.json", "run python create_input_files.py first"
        )
        self.captions = torch.from_numpy(read_word_ids(captions, len(self.word_map)))
        with _reading(lengths):
            numbers = np.array(json.loads(lengths.read_bytes()))
            if numbers.ndim != 1 or len(numbers) and numbers.dtype.kind != "i":
                raise ValueError("it is not a list of lengths")
            self.lengths = torch.from_numpy(numbers.astype(np.int32))
        self._key, self._handle, self._pid = "images", None, None
        self.features: torch.Tensor | None = None  # (I, G, E), in memory
        with _reading(self.path), open_hdf5(self.path) as file:
            images, self.captions_per_image = file["images"], int(file.attrs["captions_per_image"])
            self.num_images, *shape = images.shape
            if self.captions_per_image < 1:
                raise ValueError(f"its captions_per_image is {self.captions_per_image}")
            self.image_size = shape[-1] if shape else 0  # S
            if (
                shape != [3, self.image_size, self.image_size]
                or self.image_size < LEAST_SIZE
                or images.dtype != np.uint8
            ):
                raise ValueError(
                    f"it holds {images.dtype} of {images.shape}, not uint8 images of "
                    f"(3, S, S), S at least {LEAST_SIZE}"
                )
        expected = self.num_images * self.captions_per_image
        if not expected == len(self.captions) == len(self.lengths):
            raise UserError(
                f"{self.path} has {self.num_images} images of {self.captions_per_image} captions, "
                f"but CAPTIONS has {len(self.captions)} and CAPLENS {len(self.lengths)}: they do "
                f"not belong together; run create_input_files.py again"
            )
        self._check_captions(captions)
        self.lengths[self._repetitions()] = 1
        self._distinct = (self.lengths > 1).nonzero().flatten().numpy()

    def _repetitions(self):
        """(captions,) whether a caption equals an earlier one of its image"""
        captions = self.captions.view(
            self.num_images, self.captions_per_image, self.captions.shape[1]
        )  # not -1: there may be no image
        repeated = torch.zeros(captions.shape[:2], dtype=torch.bool)
        for i in range(1, captions.shape[1]):
            repeated[:, i] = (captions[:, :i] == captions[:, i : i + 1]).all(2).any(1)
        return repeated.flatten()

    def _check_captions(self, path):
        """UserError unless each caption is <start>, words and <end>, of the length in CAPLENS"""
        if not len(self.lengths):
            return
        rows, lengths = torch.arange(len(self.lengths)), self.lengths.long()
        bad = (lengths < 2) | (lengths > self.captions.shape[1])
        ends = self.captions[rows, (lengths - 1).clamp(0, self.captions.shape[1] - 1)]
        bad |= (ends != self.word_map["<end>"]) | (self.captions[:, 0] != self.word_map["<start>"])
        if bad.any():
            raise UserError(
                f"{path}: caption {int(bad.nonzero()[0])} is not <start>, words and "
                f"<end> of the length in CAPLENS; these two files and the WORDMAP do "
                f"not belong together: run create_input_files.py again"
            )

    @cached_property
    def entries(self) -> list[dict]:
        """The list in REFERENCES, read at the first access: training does not need it."""
        if self._references.exists():
            with _reading(self._references):
                entries = json.loads(self._references.read_bytes())
                needed = {"filename", "image_id", "references"}
                if len(entries) != self.num_images or not all(
                    needed <= entry.keys()
                    and all(isinstance(words, list) for words in entry["references"])
                    for entry in entries
                ):
                    raise ValueError(
                        f"it is not a list of {self.num_images} images with "
                        f"filename, image_id and references, lists of words"
                    )
            return entries
        words = {i: word for word, i in self.word_map.items()}
        captions = [
            [words[i] for i in caption[1 : length - 1]]
            for caption, length in zip(self.captions.tolist(), self.lengths.tolist())
        ]
        n, distinct = self.captions_per_image, self.lengths > 1
        return [
            {
                "filename": None,
                "image_id": i,
                "references": [captions[j] for j in range(i * n, (i + 1) * n) if distinct[j]],
            }
            for i in range(self.num_images)
        ]

    def __len__(self) -> int:
        return self.num_images if self.by_image else len(self._distinct)

    def __getitem__(self, index: int | np.ndarray) -> Item:
        index, r = np.asarray(index), self.captions_per_image
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(index)
        if self.by_image:
            images, captions = index, index[..., None] * r + np.arange(r)
        else:
            caption = self._distinct[index]
            images, captions = caption // r, caption[..., None]
        return Item(
            self._read_images(images),
            self.captions[captions].long(),
            self.lengths[captions].long(),
            torch.from_numpy(index),
        )

    def use_features(self, features: str | os.PathLike | torch.Tensor) -> None:
        """
        Return annotation vectors instead of pixels from here on.

        features: the path of an HDF5 file, or a tensor (I, G, E)
        """
        if isinstance(features, torch.Tensor):
            self.features = features
        else:
            self.path, self._key, self._handle = features, "features", None

    @property
    def in_memory(self) -> bool:
        return self.features is not None

    def _read_images(self, images):
        if self.in_memory:
            return self.features[torch.from_numpy(images).to(self.features.device)]
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = open_hdf5(self.path)[self._key], os.getpid()
        batch = np.empty((images.size, *self._handle.shape[1:]), self._handle.dtype)
        for i, image in enumerate(images.flat):
            try:
                self._handle.read_direct(batch, np.s_[image], np.s_[i])
            except OSError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(
                    f"{self.path}: image {image} cannot be read ({reason}); check the "
                    f"disk, or run create_input_files.py again"
                ) from None
        return torch.from_numpy(batch.reshape(*images.shape, *batch.shape[1:]))

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}

    def entry(self, image: int) -> dict:
        """
        What is known about an image: filename, image_id, references (all its captions as words)
        and, for the demo, objects. Data sets made by the tutorial's code have no REFERENCES
        file: their references are read back from the word ids, <unk> included.
        """
        return self.entries[image]


class ResumableBatchSampler(Sampler):
    """
    The order of an epoch, as index arrays for `CaptionDataset`: `DataLoader(dataset,
    sampler=ResumableBatchSampler(...), batch_size=None)`.

    It depends on seed and epoch alone, so a resumed run continues in the same order. Batch sizes
    differ by one item at most: there is no small last batch with a noisier gradient. Each process
    takes its share of every batch, so K processes train on the same batches as one.
    """

    def __init__(self, num_items, batch_size, shuffle=True, seed=0, rank=0, world_size=1):
        self.num_items, self.shuffle, self.seed = num_items, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0  # start: batches of the epoch already done
        self.num_batches = max(1, min(-(-num_items // batch_size), num_items // world_size))

    def __len__(self) -> int:
        return self.num_batches - self.start

    def __iter__(self):
        order = np.arange(self.num_items)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for batch in np.array_split(order, self.num_batches)[self.start :]:
            share = np.array_split(batch, self.world_size)[self.rank]
            if len(share):
                yield share


class WorkerDied(UserError):
    """A process that loads batches was killed."""


def load_batches(loader):
    """
    Yield a DataLoader's batches. Raises WorkerDied if one of its processes is killed, for want of
    memory for example, and UserErrors of these processes as they were raised there.
    """
    batches = iter(loader)
    if (
        loader.num_workers
        and hasattr(signal, "SIGCHLD")
        and threading.current_thread() is threading.main_thread()
    ):
        # torch's handler raises wherever the program is, also in the middle of a step. Without it,
        # the loader notices within seconds, when a batch is missing.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield from batches
    except UserError as error:  # torch puts the process and its traceback before the message
        raise UserError(str(error).rpartition("UserError: ")[2].removesuffix("\\n")) from None
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        # The last three: it was killed while it handed over a batch that it had made.
        handing_over = loader.num_workers and not isinstance(error, RuntimeError)
        if "DataLoader worker" not in str(error) and not handing_over:
            raise
        raise WorkerDied(
            "a process that loads batches was killed, perhaps for want of memory; "
            "pass --workers 0, or fewer captions at a time"
        ) from None
