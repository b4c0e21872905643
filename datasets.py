"""
From files to batches: `CaptionDataset` over the files that create_input_files.py writes, its word
map, and `ResumableBatchSampler`, which determines the order of the batches.
"""

import json
import os
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
IMAGE_SIZE = 256  # pixels, width and height of the images, unless another size is given
# A smaller image is less than one cell of most encoders; a larger one can only be a mistake.
MIN_SIZE, MAX_SIZE = 32, 2048


def data_file(split, kind, data_name):
    """The name of a data set's file; split is TRAIN, VAL or TEST, kind is one of KINDS."""
    return f"{split}_{kind}_{data_name}.{KINDS[kind]}"


def check_word_map(word_map, path):
    """Return the word map, or raise a UserError that names the file `path` if it is not one."""
    valid = isinstance(word_map, dict) and all(type(i) is int for i in word_map.values())
    valid = valid and sorted(word_map.values()) == list(range(len(word_map)))
    if not valid or word_map.get("<pad>") != 0 or not word_map.keys() >= set(SPECIAL_TOKENS):
        raise UserError(
            f"{path} is not a word map, which maps words to ids from 0 up without gaps, <pad> to "
            f"0, and has <unk>, <start> and <end>; pass the WORDMAP file of the training data"
        )
    return word_map


def read_word_map(path, next_step=""):
    """Word -> id from a WORDMAP file; UserError as in `read_json` or `check_word_map`."""
    return check_word_map(read_json(path, next_step), path)


def find_data_name(data_folder, name=None):
    """The name of the data set: `name` if given, else that of the only one in the folder."""
    if name:
        if os.path.basename(name) != name:
            raise UserError(
                f"--data_name {name} is not the name of a data set: it contains a folder; pass "
                f"that as --data_folder"
            )
        return name
    paths = Path(data_folder).glob("WORDMAP_*.json")
    found = sorted(path.stem.removeprefix("WORDMAP_") for path in paths)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(found)
        raise UserError(f"several data sets in {data_folder}; pass --data_name, one of: {names}")
    raise UserError(
        f"no data set in {data_folder}; pass the --data_folder of create_input_files.py"
    )


def add_data_options(parser):
    """--data_folder and --data_name, which say what files a script reads"""
    parser.add_argument("--data_folder", default="data", help="what create_input_files.py wrote")
    parser.add_argument("--data_name", help="which data set, if the folder has several")


def open_hdf5(path):
    """
    Open an HDF5 file for reading, without HDF5's locks: our files do not change once they have
    their names, and on network disks without locks HDF5 fails as it does for a damaged file.
    """
    import h5py  # only here: a caption of a photograph needs none

    check_is_file(path)
    for locking in (False, None, True):
        try:
            return h5py.File(path, "r", locking=locking)
        except OSError as error:  # in one process all must open a file with the same flag
            if locking or "flag values don't match" not in str(error):
                raise


@contextmanager
def writing_hdf5(path, next_step):
    """Turn the error of a full or read-only disk into a UserError with this next step."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failed = error
        while isinstance(failed, RuntimeError):  # of h5py, closing the file after such an OSError
            failed = failed.__context__
        if not isinstance(failed, OSError) or isinstance(
            failed, (BrokenPipeError, BlockingIOError)
        ):
            raise
        reason = os.strerror(failed.errno) if failed.errno else failed
        raise UserError(f"{path} cannot be written: {reason}; {next_step}") from None


@contextmanager
def _reading(path):
    """Turn any error while a file of create_input_files.py is read into a UserError naming it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found; run python create_input_files.py first") from None
    except Exception as error:  # h5py and json raise many types for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{path} cannot be read or is damaged: {reason}; run create_input_files.py again"
        ) from None


def _read_integers(path, dimensions):
    """The tensor of integers in a JSON file; UserError if it holds anything else."""
    with _reading(path):
        numbers = np.array(json.loads(path.read_bytes()))
        if not numbers.size:  # NumPy makes it floats
            numbers = np.empty((0,) * dimensions, np.int64)
        if numbers.dtype.kind != "i" or numbers.ndim != dimensions:
            raise ValueError(f"it is not an array of integers in {dimensions} dimensions")
        return torch.from_numpy(numbers)


class Item(NamedTuple):
    """An item of `CaptionDataset`, or a batch of N items, each tensor with a leading N."""

    images: torch.Tensor  # pixels, uint8 (3, S, S); after `use_features` features, float16 (G, E)
    captions: torch.Tensor  # int64 (R, L) token ids: <start> words <end> <pad>...
    lengths: torch.Tensor  # int64 (R,) with <start> and <end>; 1: see `CaptionDataset`
    indices: torch.Tensor  # int64 () the item's own index in the data set


class CaptionDataset(Dataset):
    """
    One split of a data set. An `Item` is an image with its R captions or, with by_image=False, one
    caption with its image (R = 1). Indexing with an array of N items gives the batch at once.

    Images with fewer captions than R were filled up with repetitions, which must not count: their
    length is 1, so that nothing is predicted, and with by_image=False they are not items.

    Pixels stay on disk; the HDF5 file is opened at the first read, once per process, so a dataset
    can be passed to forked and to spawned workers.
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
        self.captions, self.lengths = _read_integers(captions, 2), _read_integers(lengths, 1)
        self._key, self._handle, self._pid = "images", None, None
        self.features: torch.Tensor | None = None  # (I, G, E), in memory
        with _reading(self.path), open_hdf5(self.path) as file:
            images, self.captions_per_image = file["images"], int(file.attrs["captions_per_image"])
            self.num_images, _, _, self.image_size = images.shape  # I, S
            square = images.shape[1:] == (3, self.image_size, self.image_size)
            if not square or self.image_size < MIN_SIZE or images.dtype != np.uint8:
                raise ValueError(f"{images.shape} {images.dtype} is not uint8 (I, 3, S, S)")
        if not self._belong_together():
            raise UserError(
                f"{captions} and the IMAGES, CAPLENS and WORDMAP beside it do not belong together; "
                f"run create_input_files.py again"
            )
        few = len(self.word_map) <= 1 << 15  # COCO has half a million captions of 52 ids
        self.captions = self.captions.to(torch.int16 if few else torch.int32)
        self._mark_repetitions()
        self._distinct = (self.lengths > 1).nonzero().flatten().numpy()

    def _belong_together(self):
        """Whether each image has its captions, and these are <start>, words and <end>."""
        captions, lengths, n = self.captions, self.lengths, self.captions_per_image
        if n < 1 or not self.num_images * n == len(captions) == len(lengths):
            return False
        if not len(captions):
            return True
        if lengths.min() < 2 or lengths.max() > captions.shape[1]:
            return False
        if captions.min() < 0 or captions.max() >= len(self.word_map):
            return False
        starts, ends = captions[:, 0], captions.gather(1, lengths.unsqueeze(1) - 1)
        start, end = self.word_map["<start>"], self.word_map["<end>"]
        return bool((starts == start).all() and (ends == end).all())

    def _mark_repetitions(self):
        """Give a caption that equals an earlier one of its image the length 1."""
        shape = self.num_images, self.captions_per_image
        captions, lengths = self.captions.unflatten(0, shape), self.lengths.unflatten(0, shape)
        for i in range(1, self.captions_per_image):
            repeated = (captions[:, :i] == captions[:, i : i + 1]).all(2).any(1)
            lengths[repeated, i] = 1

    @cached_property
    def entries(self) -> list[dict]:
        """
        For each image filename, image_id, references (all its captions as words) and, for the demo,
        objects; read at the first access, since training does not need it. Data sets made by the
        tutorial's code have no REFERENCES file: their captions are decoded from the token ids.
        """
        if self._references.exists():
            needed = {"filename", "image_id", "references"}
            with _reading(self._references):
                entries = json.loads(self._references.read_bytes())
                if len(entries) != self.num_images or not all(needed <= e.keys() for e in entries):
                    raise ValueError(f"it needs {self.num_images} images with {sorted(needed)}")
            return entries
        words = sorted(self.word_map, key=self.word_map.__getitem__)
        images = range(self.num_images)
        entries = [{"filename": None, "image_id": i, "references": []} for i in images]
        for i in self._distinct:
            caption = self.captions[i, 1 : self.lengths[i] - 1].tolist()
            entries[i // self.captions_per_image]["references"].append([words[k] for k in caption])
        return entries

    def entry(self, image: int) -> dict:
        """What is known about an image, see `entries`."""
        return self.entries[image]

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
            self.lengths[captions],
            torch.from_numpy(index),
        )

    def use_features(self, features: str | os.PathLike | torch.Tensor) -> None:
        """
        Return features, an encoder's `cells`, instead of pixels from now on.

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
        with _reading(self.path):
            if self._handle is None or self._pid != os.getpid():
                self._handle, self._pid = open_hdf5(self.path)[self._key], os.getpid()
            batch = np.empty((images.size, *self._handle.shape[1:]), self._handle.dtype)
            for i, image in enumerate(images.flat):
                self._handle.read_direct(batch, np.s_[image], np.s_[i])
        return torch.from_numpy(batch.reshape(*images.shape, *batch.shape[1:]))

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}


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
