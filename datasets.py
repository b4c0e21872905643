"""
From files to batches: reading an image, `CaptionDataset` over the files that
create_input_files.py writes, and the order in which it is gone through.
"""

import os
import warnings
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler

from files import UserError, read_json, read_word_map
from preprocessing.own_captions import are_objects

# A picture that can be read is read without a word about what is odd in it.
warnings.filterwarnings("ignore", module=r"PIL\.")
ROWS = 256  # of a picture that are worked on at a time, where floats take 8 times the memory
PIECE = 4 << 20  # bytes of a caption file that are read at a time


def read_rgb(path):
    """
    Read any picture as upright RGB: uint8 (height, width, 3).

    EXIF rotation is applied, transparency laid over white, 16 bits and floats are
    brought to 8, and of an animation the first frame is taken.
    Raises UserError if the file is missing, not a readable picture or of more than 179 million
    pixels, which would take gigabytes (Pillow's limit against decompression bombs).
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path} not found") from None
    except Exception as error:  # decoders raise all sorts: EOFError, RuntimeError, struct.error
        raise UserError(f"{path} is not a readable image: {_reason(error)}") from None


def to_rgb(image):
    """The same for a PIL image in memory, which stays as it is."""
    if image.mode in ("RGB", "L", "CMYK", "YCbCr") and "transparency" not in image.info:
        return np.asarray(_upright(image).convert("RGB"))  # most photographs
    if image.mode.startswith("I") or image.mode == "F":
        # More than 8 bits, which PIL would clip to 0..255 instead of scaling.
        rgba = _to_8_bits(np.asarray(_upright(image)))
    else:
        # Through RGBA, since converting straight to RGB shows whatever colour stands
        # under a transparent pixel.
        rgba = np.asarray(_upright(image).convert("RGBA"))
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() < 255:
        rgb = rgb.copy()
        for i in range(0, len(rgb), ROWS):
            part, opaque = rgb[i:i + ROWS], alpha[i:i + ROWS] / 255
            part[:] = np.round(255 + (part / 1.0 - 255) * opaque)
    return rgb


def _upright(image):
    """As its EXIF says; a picture that says nothing is not copied."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    return ImageOps.exif_transpose(image)


def _reason(error):
    """In one line why a picture could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in none of the formats that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0] or type(error).__name__


def _to_8_bits(image):
    """(height, width) or (height, width, channels) of more than 8 bits -> RGBA uint8"""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("it has values that are not finite")
    white = image.max(initial=1) if image.dtype.kind == "f" else 65535
    grey = np.empty(image.shape, np.uint8)
    for i in range(0, len(image), ROWS):
        grey[i:i + ROWS] = np.clip(np.round(image[i:i + ROWS] / white * 255), 0, 255)
    return np.asarray(Image.fromarray(grey).convert("RGBA"))


def read_image(path, size=256):
    """
    Read a picture for the encoder: uint8 (3, size, size), squashed to a square as in the
    tutorial. PIL's bilinear filter widens as it shrinks, so nothing is aliased.
    Raises UserError as `read_rgb` does.
    """
    return squash(read_rgb(path), size)


def squash(rgb, size=256):
    """uint8 (height, width, 3) -> (3, size, size)"""
    image = Image.fromarray(rgb).resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def find_data_name(data_folder):
    """The only data set in the folder; UserError that lists them if there are several."""
    names = sorted(path.stem.removeprefix("WORDMAP_")
                   for path in Path(data_folder).glob("WORDMAP_*.json"))
    if not names:
        raise UserError(f"no data set in {data_folder}; pass the --data_folder of "
                        f"create_input_files.py")
    if len(names) > 1:
        raise UserError(f"several data sets in {data_folder}; pass --data_name, one of: "
                        + ", ".join(names))
    return names[0]


def read_word_ids(path, words):
    """
    A CAPTIONS file, a JSON list of lists of word ids of one length: integers (captions, L),
    16 bits each where they suffice. It is read in pieces: as Python's lists, COCO's would take
    over a gigabyte.

    Raises UserError unless all are ids below `words`.
    """
    wrong = UserError(f"{path} holds no lists of word ids of one length below {words}; "
                      f"run create_input_files.py again")
    dtype = np.int16 if words <= 1 << 15 else np.int32
    width, pieces, rest, opened, closed = None, [], b"", 0, 0
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy only warns where text is no number
            while chunk := file.read(PIECE):
                opened, closed = opened + chunk.count(b"["), closed + chunk.count(b"]")
                whole, bracket, rest = (rest + chunk).rpartition(b"]")
                rows = [row.partition(b"]")[0] for row in (whole + bracket).split(b"[") if
                        row.strip(b", \r\n\t]")]
                if not rows:
                    continue
                width = width or rows[0].count(b",") + 1
                ids = np.fromstring(b",".join(rows), dtype=np.int64, sep=",")
                if any(row.count(b",") + 1 != width for row in rows) \
                        or len(ids) != width * len(rows) or ids.min() < 0 or ids.max() >= words:
                    raise wrong
                pieces.append(ids.astype(dtype).reshape(-1, width))
    except FileNotFoundError:
        raise UserError(f"{path} not found; run python create_input_files.py first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, DeprecationWarning):
        raise wrong from None
    if rest.strip() or opened != closed or opened != sum(map(len, pieces)) + 1:
        raise wrong
    return np.concatenate(pieces) if pieces else np.empty((0, 0), dtype)


def _read_lengths(path):
    """A CAPLENS file: int32 (captions,); UserError if it is no list of whole numbers."""
    lengths = read_json(path, "run python create_input_files.py first")
    if not isinstance(lengths, list) or not all(type(x) is int and 0 <= x < 1 << 31
                                                for x in lengths):
        raise UserError(f"{path} is no list of lengths; run create_input_files.py again")
    return torch.from_numpy(np.array(lengths, dtype=np.int32))


def _is_entry(entry):
    return isinstance(entry, dict) and isinstance(entry.get("references"), list) \
        and {"filename", "image_id"} <= entry.keys() \
        and are_objects(entry.get("objects", [])) and all(
            isinstance(caption, list) and all(isinstance(word, str) for word in caption)
            for caption in entry["references"])


class CaptionDataset(Dataset):
    """
    One split of a data set. An item is an image with its R captions or, with
    by_image=False, one caption with its image (R = 1):

      image     uint8 (3, 256, 256), or float16 (P, E) where `use_features` was called
      captions  int64 (R, L) word ids: <start> words <end> <pad>...
      lengths   int64 (R,) true lengths, <start> and <end> counted

    Indexing with an array of n items gives the batch at once, each with a leading n.
    Pixels stay on disk; the HDF5 file is opened at the first read, once per process,
    so a dataset can be handed to forked and spawned workers alike.
    """

    def __init__(self, data_folder, data_name, split, by_image=True):
        self.by_image, hint = by_image, "run python create_input_files.py first"
        self.path = self._file(data_folder, split, "IMAGES", data_name, "hdf5")
        self.word_map = read_word_map(Path(data_folder) / f"WORDMAP_{data_name}.json", hint)
        captions = self._file(data_folder, split, "CAPTIONS", data_name, "json")
        self.captions = torch.from_numpy(read_word_ids(captions, len(self.word_map)))
        self.lengths = _read_lengths(self._file(data_folder, split, "CAPLENS", data_name, "json"))
        self._key, self._handle, self._pid = "images", None, None
        self.features = None  # a tensor (I, G, E) in memory, or none
        try:
            with h5py.File(self.path, "r") as file:
                self.captions_per_image = int(file.attrs["captions_per_image"])
                if self.captions_per_image < 1:
                    raise UserError(f"{self.path} has {self.captions_per_image} captions an image; "
                                    f"run create_input_files.py again")
                self.images, *shape = file["images"].shape
                if shape != [3, 256, 256] or file["images"].dtype != np.uint8:
                    raise UserError(
                        f"{self.path} holds {file['images'].dtype} of {(self.images, *shape)}, not "
                        f"uint8 images of (3, 256, 256); run create_input_files.py again")
        except FileNotFoundError:
            raise UserError(f"{self.path} not found; run python create_input_files.py "
                            f"first") from None
        except Exception as error:  # what HDF5 makes of foreign bytes is of all sorts
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path} is damaged or holds no images: {error}; run "
                            f"create_input_files.py again") from None
        if len(self.captions) != len(self.lengths):
            raise UserError(
                f"{self.path}: its CAPTIONS file has {len(self.captions)} captions, but CAPLENS "
                f"has {len(self.lengths)}; run create_input_files.py again")
        if len(self.lengths) != self.images * self.captions_per_image:
            raise UserError(
                f"{self.path} has {self.images} images of {self.captions_per_image} captions, but "
                f"its CAPLENS file has {len(self.lengths)}; run create_input_files.py again")
        self._check_captions(captions)
        self._references = self._file(data_folder, split, "REFERENCES", data_name, "json")

    def _check_captions(self, path):
        """UserError unless every caption is <start>, words and <end>, of the length it should be"""
        if not len(self.lengths):
            return
        rows, lengths = torch.arange(len(self.lengths)), self.lengths.long()
        bad = (lengths < 2) | (lengths > self.captions.shape[1])
        ends = self.captions[rows, (lengths - 1).clamp(0, self.captions.shape[1] - 1)]
        bad |= (ends != self.word_map["<end>"]) | (self.captions[:, 0] != self.word_map["<start>"])
        if bad.any():
            raise UserError(f"{path}: caption {int(bad.nonzero()[0])} does not go from <start> to "
                            f"<end> in the number of words that CAPLENS says; the two or the "
                            f"WORDMAP are not of one data set: run create_input_files.py again")

    @cached_property
    def entries(self):
        """The list in REFERENCES, read when first asked for: training does without."""
        if self._references.exists():
            entries = read_json(self._references)
            if not isinstance(entries, list) or not all(map(_is_entry, entries)):
                raise UserError(f"{self._references} is no list of images with references, lists "
                                f"of words; run create_input_files.py again")
            if len(entries) != self.images:
                raise UserError(f"{self._references} is of {len(entries)} images, {self.path} has "
                                f"{self.images}; run create_input_files.py again")
            return entries
        words = {i: word for word, i in self.word_map.items()}
        captions = [[words[i] for i in caption[1:length - 1]] for caption, length in
                    zip(self.captions.tolist(), self.lengths.tolist())]
        n = self.captions_per_image
        return [{"filename": None, "image_id": i, "references": captions[i * n:(i + 1) * n]}
                for i in range(self.images)]

    @staticmethod
    def _file(folder, split, kind, name, suffix):
        return Path(folder) / f"{split}_{kind}_{name}.{suffix}"

    def __len__(self):
        return self.images if self.by_image else len(self.lengths)

    def __getitem__(self, index):
        index, r = np.asarray(index), self.captions_per_image
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(index)
        if self.by_image:
            images, captions = index, index[..., None] * r + np.arange(r)
        else:
            images, captions = index // r, index[..., None]
        return self._images(images), self.captions[captions].long(), self.lengths[captions].long()

    def use_features(self, features):
        """Hand over annotation vectors, not pixels: an HDF5 file's, or a tensor's (I, G, E)"""
        if isinstance(features, torch.Tensor):
            self.features = features
        else:
            self.path, self._key, self._handle = features, "features", None

    @property
    def in_memory(self):
        return self.features is not None

    def _images(self, images):
        if self.in_memory:
            return self.features[torch.from_numpy(images).to(self.features.device)]
        if self._handle is None or self._pid != os.getpid():
            self._handle, self._pid = h5py.File(self.path, "r")[self._key], os.getpid()
        if images.ndim == 0:
            return torch.from_numpy(self._handle[int(images)])
        batch = np.empty((len(images), *self._handle.shape[1:]), self._handle.dtype)
        for i, image in enumerate(images):
            self._handle.read_direct(batch, np.s_[image], np.s_[i])
        return torch.from_numpy(batch)

    def __getstate__(self):
        return {**self.__dict__, "_handle": None}

    def entry(self, image):
        """
        What is known of an image: filename, image_id, references (all its captions as words)
        and, for the demo, objects. Data sets made by the tutorial's code have no such
        file: there the references are read back from the word ids, <unk> included.
        """
        return self.entries[image]


class Batches(Sampler):
    """
    The order of an epoch, as index arrays for `CaptionDataset`: `DataLoader(dataset,
    sampler=Batches(...), batch_size=None)`.

    It follows from seed and epoch alone, so a resumed run goes on in the same order. Batches
    differ by one item at most: there is no small last one whose gradient is noisier. Each
    process takes its share of every batch, so K processes train on the batches of one.
    """

    def __init__(self, items, batch_size, shuffle=True, seed=0, rank=0, world=1):
        self.items, self.shuffle, self.seed = items, shuffle, seed
        self.rank, self.world = rank, world
        self.epoch, self.start = 0, 0  # start: batches of the epoch that are done already
        self.batches = max(1, min(-(-items // batch_size), items // world))

    def __len__(self):
        return self.batches - self.start

    def __iter__(self):
        order = np.arange(self.items)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        for batch in np.array_split(order, self.batches)[self.start:]:
            share = np.array_split(batch, self.world)[self.rank]
            if len(share):
                yield share
