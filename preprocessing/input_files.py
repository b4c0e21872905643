"""create_input_files(): images and captions -> the files that training reads."""

import os
import random
import shutil
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

import h5py
from tqdm import tqdm

from datasets import IMAGE_SIZE, KINDS, SPECIAL_TOKENS, data_file, writing_hdf5
from modeling.workers import map_in_processes
from preprocessing.images import read_image
from preprocessing.karpathy import read_sources
from utils import UserError, count, printable, write_json

MAX_REASONS = 10  # of bad images, printed


def create_word_map(captions, min_word_freq):
    """
    Word -> id: <pad> is 0, then the words that occur more than min_word_freq times, in the order
    of their first appearance, then <unk>, <start> and <end>.
    """
    frequency = Counter(chain(*captions))
    words = [word for word, count in frequency.items() if count > min_word_freq]
    return {word: i for i, word in enumerate(["<pad>", *words, "<unk>", "<start>", "<end>"])}


def _training_captions(splits):
    return [caption for image in splits["TRAIN"] for caption in image.captions]


def _check_words(captions, min_word_freq):
    """UserError if all words of the training captions become <unk>, a warning if most do."""
    frequencies = Counter(chain(*captions)).values()
    tokens, unknown = sum(frequencies), sum(n for n in frequencies if n <= min_word_freq)
    unspaced = tokens < 1.5 * len(captions)
    message = (
        f"of {count(tokens, 'word')} in {count(len(captions), 'caption')}, {unknown} become <unk>; "
        f"pass a lower --min_word_freq, 0 to keep every word"
    )
    if unspaced:  # as in Chinese, Japanese and Thai
        message += "; if the language is written without spaces, put a space between the words"
    if unknown == tokens:
        raise UserError(message)
    if unknown > tokens / 2 or unspaced:
        print(f"warning: {message}", file=sys.stderr)


def _find_images(splits):
    """The splits, {split: CaptionedImages}, of images whose file exists, and a line per other."""
    found, missing = {split: [] for split in splits}, []
    for split, images in splits.items():
        for image in images:
            # Captions and file names may differ in whether é is one character or two.
            forms = (unicodedata.normalize(form, image.path) for form in ("NFC", "NFD"))
            path = next(filter(os.path.isfile, (image.path, *forms)), None)
            if path:
                found[split].append(image._replace(path=path))
            else:
                missing.append(f"{image.path} not found")
    return found, missing


def _report_bad_images(reasons, skipped, splits):
    """Print why images are bad; UserError unless they are skipped and leave some to train on."""
    if not reasons:
        return
    lines = reasons[:MAX_REASONS]  # a wrong folder makes all images bad
    if len(reasons) > MAX_REASONS:
        lines.append(f"and {len(reasons) - MAX_REASONS} others")
    title = count(len(reasons), "bad image")
    if not skipped:
        lines.append("repair them, remove their captions or pass --skip_bad_images")
    elif not splits["TRAIN"]:
        lines.append("no image to train on is left")
    if not skipped or not splits["TRAIN"]:
        raise UserError(f"{title}:", lines)
    print("\n  ".join(map(printable, [f"{title} dropped:", *lines])))


def _try_read(path, size):
    """The image, uint8 (3, size, size), or a str that says why it cannot be read."""
    try:
        return read_image(path, size)
    except Exception as error:  # any error of a broken file: the others must still be read
        return str(error) if path in str(error) else f"{path}: {error!r}"


def _store_images(folder, name, splits, captions_per_image, size, skip_bad_images, workers):
    """Write the HDF5 files. Returns the splits with the images read, and a line for each other."""
    paths = [image.path for images in splits.values() for image in images]
    print(f"reading {count(len(paths), 'image')} ...")
    pictures = map_in_processes(partial(_try_read, size=size), paths, workers)
    pictures = iter(tqdm(pictures, "reading", len(paths), unit="image", disable=None))
    shape, good, bad, start = (3, size, size), {}, [], time.monotonic()
    # Only a dataset in chunks can shrink; without them it is read a little faster.
    shrinkable = {"chunks": (1, *shape), "maxshape": (None, *shape)} if skip_bad_images else {}
    for split, images in splits.items():
        good[split] = []
        with h5py.File(os.path.join(folder, data_file(split, "IMAGES", name)), "w") as file:
            file.attrs["captions_per_image"] = captions_per_image
            rows = file.create_dataset(  # without times, the same content gives the same bytes
                "images", (len(images), *shape), "uint8", track_times=False, **shrinkable
            )
            for image, picture in zip(images, pictures):
                if isinstance(picture, str):
                    bad.append(picture)
                else:
                    rows[len(good[split])] = picture
                    good[split].append(image)
            if skip_bad_images:
                rows.resize(len(good[split]), axis=0)
    seconds = time.monotonic() - start
    images, rate = count(len(paths), "image"), len(paths) / seconds
    print(f"{images} read in {seconds:.1f} s, {rate:.0f} images/s")
    return good, bad


def _sample(captions, n, rng):
    """n captions sampled without replacement; if there are fewer, all, and some repeated."""
    missing = max(n - len(captions), 0)
    return rng.sample(captions, n - missing) + rng.choices(captions, k=missing)


def _encode(caption, word_map, max_len):
    """The ids of <start>, the words and <end>, padded to length max_len + 2."""
    ids = [word_map.get(word, word_map["<unk>"]) for word in caption]
    padding = [word_map["<pad>"]] * (max_len - len(caption))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]


def _write_captions(folder, name, splits, word_map, captions_per_image, max_len, seed):
    """Write each split's sampled captions, their lengths and references."""
    rng = random.Random(seed)
    for split, images in splits.items():
        sampled = [_sample(image.captions, captions_per_image, rng) for image in images]
        sampled = list(chain(*sampled))
        for kind, content in {
            "CAPTIONS": [_encode(caption, word_map, max_len) for caption in sampled],
            "CAPLENS": [len(caption) + 2 for caption in sampled],
            "REFERENCES": [image.record for image in images],
        }.items():
            write_json(os.path.join(folder, data_file(split, kind, name)), content)
        distinct = sum(min(len(image.captions), captions_per_image) for image in images)
        filled = f", filled up to {len(sampled)}" if distinct < len(sampled) else ""
        print(f"{split}: {count(len(images), 'image')}, {count(distinct, 'caption')}{filled}")


def data_set_name(dataset, captions_per_image, min_word_freq):
    """What the names of a data set's files end with"""
    name = f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    if os.path.basename(name) != name:
        raise UserError(f"--dataset {dataset} cannot be part of a file name; pass another name")
    return name


def _file_names(name):
    """All files of a data set; the word map, which others look for, last"""
    splits = ("TRAIN", "VAL", "TEST")
    files = [data_file(split, kind, name) for split in splits for kind in KINDS]
    return [*files, f"WORDMAP_{name}.json"]


def refuse_existing(output_folder, name):
    """UserError if the output folder has a file of the data set."""
    for file in _file_names(name):
        path = os.path.join(output_folder, file)
        if os.path.exists(path):
            raise UserError(
                f"{path} already exists; pass --overwrite to make the files of its data set again, "
                f"or another --output_folder or --dataset"
            )


@contextmanager
def _moved_when_complete(output_folder, name):
    """A folder for new files, which are moved to the output folder once all are written."""
    os.makedirs(output_folder, exist_ok=True)
    prefix = f".unfinished_{name}"
    for left in os.listdir(output_folder):
        if left.startswith(prefix):  # of a killed run
            shutil.rmtree(os.path.join(output_folder, left), ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}_", dir=output_folder) as folder:
        yield folder
        *files, word_map = _file_names(name)
        # An old word map must not stand beside new files, even if we are killed now.
        Path(output_folder, word_map).unlink(missing_ok=True)
        for file in (*files, word_map):
            os.replace(os.path.join(folder, file), os.path.join(output_folder, file))


def create_input_files(
    dataset,
    karpathy_json_path,
    image_folder,
    captions_per_image=5,
    min_word_freq=5,
    output_folder="data",
    max_len=50,
    *,
    workers=None,
    seed=123,
    overwrite=False,
    skip_bad_images=False,
    image_size=IMAGE_SIZE,
):
    """
    Write the files that train.py and eval.py read. All appear together at the end, or none does.

    For SPLIT in TRAIN (train and restval), VAL, TEST and N_c = captions_per_image:
      {SPLIT}_IMAGES_{NAME}.hdf5      "images" (I, 3, S, S) uint8, attribute captions_per_image
      {SPLIT}_CAPTIONS_{NAME}.json    N_c * I lists of max_len + 2 token ids; i is of image i // N_c
      {SPLIT}_CAPLENS_{NAME}.json     N_c * I lengths in tokens, with <start> and <end>
      {SPLIT}_REFERENCES_{NAME}.json  I entries: filename, image_id, all the captions as words, and
                                      the objects of the picture if the data set has them
      WORDMAP_{NAME}.json             word -> id
    NAME is {dataset}_{N_c}_cap_per_img_{min_word_freq}_min_word_freq.

    karpathy_json_path: a file in Karpathy's format, or what own_captions.read_captions returns; or
    a list of these, which are joined: their images have a "source" in REFERENCES
    image_folder: an image is at image_folder/filepath/filename; for several files one folder each,
    or one for all
    workers: processes that decode images; None: one per CPU
    The others are the options of create_input_files.py.

    Raises UserError for anything wrong with the data, listing the first bad images unless
    skip_bad_images leaves these out, and if there are files of the same names without overwrite.
    """
    name = data_set_name(dataset, captions_per_image, min_word_freq)
    if not overwrite:
        refuse_existing(output_folder, name)
    sources = read_sources(karpathy_json_path, image_folder, dataset, max_len)
    splits, missing = _find_images(sources)
    _report_bad_images(missing, skip_bad_images, splits)
    _check_words(_training_captions(splits), min_word_freq)
    workers = os.cpu_count() if workers is None else workers
    disk = writing_hdf5(output_folder, "free up space, or pass another --output_folder")
    with disk, _moved_when_complete(output_folder, name) as folder:
        splits, unreadable = _store_images(
            folder, name, splits, captions_per_image, image_size, skip_bad_images, workers
        )
        _report_bad_images(unreadable, skip_bad_images, splits)
        word_map = create_word_map(_training_captions(splits), min_word_freq)
        write_json(os.path.join(folder, f"WORDMAP_{name}.json"), word_map)
        _write_captions(folder, name, splits, word_map, captions_per_image, max_len, seed)
    words = count(len(word_map) - len(SPECIAL_TOKENS), "word")
    path = os.path.join(output_folder, f"WORDMAP_{name}.json")
    print(f"{words} and {len(SPECIAL_TOKENS)} special tokens in {path}")
