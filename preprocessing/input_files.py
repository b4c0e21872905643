"""create_input_files(): images and captions -> the files that training reads."""

import hashlib
import json
import os
import random
import stat
import sys
import time
import unicodedata
from collections import Counter, deque
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from datasets import IMAGE_SIZE, KINDS, SPECIAL_TOKENS, data_file, open_hdf5
from preprocessing.images import read_image, share_lock
from preprocessing.karpathy import read_karpathy, read_sources
from preprocessing.processes import open_pool
from preprocessing.resumable_hdf5 import StagingFolder
from utils import UserError, count, printable, read_json, write_json

MAX_REASONS = 10  # of bad images, printed
CHUNK = 4  # images that a process reads at a time; few, since an interrupt waits for them


class Options(NamedTuple):
    """The options that determine the content of the files, besides images and captions."""

    captions_per_image: int
    min_word_freq: int
    max_len: int
    seed: int
    image_size: int


def create_word_map(captions, min_word_freq):
    """
    Word -> id: <pad> is 0, then the words that occur more than min_word_freq times, in the order
    of their first appearance, then <unk>, <start> and <end>.
    """
    frequency = Counter(word for caption in captions for word in caption)
    words = [word for word, count in frequency.items() if count > min_word_freq]
    return {word: i for i, word in enumerate(["<pad>", *words, "<unk>", "<start>", "<end>"])}


def _check_words(splits, options):
    """
    Say how much of the training captions the word map keeps: UserError if it has no word at all, a
    line if most tokens become <unk>.
    """
    captions = [caption for image in splits["TRAIN"] for caption in image.captions]
    words = create_word_map(captions, options.min_word_freq)
    tokens = sum(map(len, captions))
    unknown = sum(word not in words for caption in captions for word in caption)
    kept = (
        f"of {count(tokens, 'word')} in {count(len(captions), 'caption')}, {unknown} become "
        f"<unk>, since only {len(words) - len(SPECIAL_TOKENS)} different ones occur more than "
        f"{options.min_word_freq} times"
    )
    advice = "pass a lower --min_word_freq, 0 to keep every word"
    unspaced = tokens < 1.5 * len(captions)
    if unspaced:
        advice += (
            "; most captions are one word: if the language is written without spaces, as "
            "Chinese, Japanese and Thai are, put a space between the words first"
        )
    if unknown == tokens:
        raise UserError(f"{kept}; {advice}")
    if unknown > tokens / 2 or unspaced:
        print(f"warning: {kept}; {advice}", file=sys.stderr)


def _sample(captions, n, rng):
    """n captions sampled without replacement; if there are fewer, all, and some repeated."""
    missing = max(n - len(captions), 0)
    return rng.sample(captions, n - missing) + rng.choices(captions, k=missing)


def _encode(caption, word_map, max_len):
    """The ids of <start>, the words and <end>, padded to length max_len + 2."""
    ids = [word_map.get(word, word_map["<unk>"]) for word in caption]
    padding = [word_map["<pad>"]] * (max_len - len(caption))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]


def _find_images(splits, options):
    """
    Look for the image files of splits, {split: list of CaptionedImages}. Returns the splits with
    those found, a message for each missing one, and a hash of the options, the captions and each
    file's size and modification time.
    """
    found, missing = {split: [] for split in splits}, []
    other_options = options._asdict()
    captions_per_image = other_options.pop("captions_per_image")
    if options.image_size == IMAGE_SIZE:  # as in the hashes of files made before it was an option
        del other_options["image_size"]
    digest = hashlib.sha256(json.dumps([captions_per_image, other_options]).encode())
    for split, images in splits.items():
        for image in images:
            state, image = None, _as_on_disk(image)
            try:
                status = os.stat(image.path)
                if stat.S_ISREG(status.st_mode):
                    state = status.st_size, status.st_mtime_ns
                    found[split].append(image)
                else:
                    missing.append(f"{image.path} is not a file")
            except FileNotFoundError:
                missing.append(f"{image.path} not found")
            except OSError as error:  # a name that is too long, no permission
                missing.append(f"{image.path}: {error.strerror}")
            digest.update(json.dumps([split, image.record, state]).encode())
    return found, missing, digest.hexdigest()


def _as_on_disk(image):
    """
    The CaptionedImage with its path as the disk spells it: captions and file names may differ in
    whether é is one character or two (NFC, NFD).
    """
    if not image.path.isascii() and not os.path.exists(image.path):
        for form in ("NFC", "NFD"):
            if os.path.exists(path := unicodedata.normalize(form, image.path)):
                return image._replace(path=path)
    return image


def _first_reasons(reasons):
    """The first reasons, and how many others there are: a wrong folder makes all images bad."""
    shown = reasons[:MAX_REASONS]
    others = len(reasons) - len(shown)
    return [*shown, f"and {others} others"] if others else shown


def _bad_images(reasons, next_step):
    return UserError(f"{count(len(reasons), 'bad image')}:", [*_first_reasons(reasons), next_step])


def _check_bad_images(splits, bad, skip_bad_images, note=""):
    """UserError if there are bad images and they may not be skipped, or none left to train on."""
    if bad and not skip_bad_images:
        raise _bad_images(
            bad, f"repair them, remove their captions or pass --skip_bad_images{note}"
        )
    if not splits["TRAIN"]:
        raise _bad_images(bad, "no image to train on is left")


def _try_read(path, size):
    """The image, uint8 (3, size, size), or a str that says why it cannot be read."""
    try:
        return read_image(path, size)
    except Exception as error:  # any error of a broken file: the others must still be read
        return str(error) if path in str(error) else f"{path}: {error!r}"


def _store_chunk(file, row, paths):
    """Read images into rows of a ResumableHDF5 from `row` on; [[row, reason]] for bad ones."""
    images = [_try_read(path, file.shape[-1]) for path in paths]
    file.write(row, [None if isinstance(image, str) else image for image in images])
    return [[i, image] for i, image in enumerate(images, row) if isinstance(image, str)]


def _store_chunks(chunks, workers):
    """Yield _store_chunk(*chunk) in order. Worker processes write the pixels to the files."""
    if workers <= 1:
        yield from (_store_chunk(*chunk) for chunk in chunks)
        return
    pending = deque()
    try:
        with open_pool(workers, share_lock) as pool:  # one large picture at a time
            for chunk in chunks:
                pending.append(pool.submit(_store_chunk, *chunk))
                if len(pending) == 64 * workers:  # keeps workers busy while progress is saved
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, perhaps out of memory; run the same command to "
            "continue, with --workers 1 if memory is short"
        ) from None


def _store_images(staging, splits, workers):
    """Read all images that have not been read yet into the HDF5 files."""
    positions = [
        (split, row)
        for split, images in splits.items()
        for row in range(staging.done[split], len(images), CHUNK)
    ]
    chunks = (
        (staging.arrays[split], row, [image.path for image in splits[split][row : row + CHUNK]])
        for split, row in positions
    )
    initial = staging.rows_done
    with (
        closing(_store_chunks(chunks, workers)) as results,
        tqdm(
            desc="reading", unit="image", initial=initial, total=staging.rows, disable=None
        ) as bar,
    ):
        start = time.monotonic()
        try:
            for (split, row), bad in zip(positions, results):
                staging.advance(split, min(row + CHUNK, len(splits[split])), bad)
                bar.update(staging.rows_done - bar.n)
        finally:
            staging.save()
        seconds = time.monotonic() - start
    count = staging.rows - initial
    print(f"{count} images read in {seconds:.1f} s, {count / max(seconds, 1e-9):.0f} images/s")


def _drop_bad_images(staging, splits, missing, skip_bad_images):
    """The splits without images that cannot be read; UserError as in _check_bad_images."""
    bad = missing + [reason for rows in staging.bad.values() for _, reason in rows]
    rows = {split: {row for row, _ in staging.bad[split]} for split in splits}
    splits = {
        split: [image for row, image in enumerate(images) if row not in rows[split]]
        for split, images in splits.items()
    }
    if not splits["TRAIN"]:
        staging.remove()
    _check_bad_images(splits, bad, skip_bad_images, "; the other images will not be read again")
    staging.drop_bad()
    if bad:
        print(
            "\n  ".join(
                [f"{count(len(bad), 'bad image')} dropped:", *map(printable, _first_reasons(bad))]
            )
        )
    return splits


def _write_captions(staging, name, splits, options):
    """Write the word map, and each split's sampled captions, their lengths and references."""
    train_captions = (caption for image in splits["TRAIN"] for caption in image.captions)
    word_map = create_word_map(train_captions, options.min_word_freq)
    rng = random.Random(options.seed)
    for split, images in splits.items():
        captions = [
            caption
            for image in images
            for caption in _sample(image.captions, options.captions_per_image, rng)
        ]
        for kind, content in {
            "CAPTIONS": [_encode(caption, word_map, options.max_len) for caption in captions],
            "CAPLENS": [len(caption) + 2 for caption in captions],
            "REFERENCES": [image.record for image in images],
        }.items():
            write_json(staging.path(data_file(split, kind, name)), content)
        distinct = sum(min(len(image.captions), options.captions_per_image) for image in images)
        print(
            f"{split}: {count(len(images), 'image')}, {count(distinct, 'caption')}"
            + (f", filled up to {len(captions)}" if distinct < len(captions) else "")
        )
    write_json(staging.path(staging.files[-1]), word_map)


def _is_already_made(staging):
    """
    Whether the output folder already has exactly the files that we would make. Raises UserError if
    it has other files of the same names.
    """
    paths = [os.path.join(staging.output, file) for file in staging.files]
    existing = [path for path in paths if os.path.exists(path)]
    if not existing:
        return False
    try:
        with open_hdf5(paths[0]) as file:
            same = file.attrs.get("made_from") == staging.key.encode()
    except OSError:  # missing or damaged
        same = False
    if same and existing == paths:
        return True
    raise UserError(
        f"{existing[0]} already exists, made from other images, captions or options, "
        f"or other files of its data set are missing; pass --overwrite, another "
        f"--output_folder or --dataset"
    )


def _stage(output_folder, name, key, splits, options):
    """The StagingFolder of a data set, with an HDF5 file for the images of each split."""
    files = [data_file(split, kind, name) for split in splits for kind in KINDS]
    staging = StagingFolder(output_folder, name, key, [*files, f"WORDMAP_{name}.json"])
    for split, images in splits.items():
        made_from = {"made_from": np.bytes_(key)} if split == "TRAIN" else {}
        staging.add(
            split,
            data_file(split, "IMAGES", name),
            "images",
            (len(images), 3, options.image_size, options.image_size),
            np.uint8,
            captions_per_image=options.captions_per_image,
            **made_from,
        )
    return staging


def _start_or_resume(staging, overwrite):
    if staging.started:
        print(
            f"{staging.rows_done} of {staging.rows} images are already in {staging.folder}; "
            f"continuing"
        )
    else:
        staging.remove()
    staging.check_space()
    if not staging.started:
        staging.start(overwrite)


@contextmanager
def _explain_interruption(staging):
    """If writing fails or is interrupted, say that the same command continues it."""
    try:
        yield
    except BrokenPipeError:  # stdout was closed
        raise
    except OSError as error:
        kept = (
            "; the finished part is kept, run the same command to continue"
            if staging.started
            else ""
        )
        raise UserError(f"cannot write to {staging.output}: {error}{kept}") from error
    except KeyboardInterrupt:
        if not staging.started:
            raise
        raise KeyboardInterrupt(
            f"interrupted; {staging.rows_done} images are kept in "
            f"{staging.folder}, run the same command to continue"
        ) from None


def _with_folders(sources, folders, dataset):
    """The tuples that `read_sources` takes, of one or several sources and folders."""
    sources, folders = (x if isinstance(x, (list, tuple)) else [x] for x in (sources, folders))
    if len(folders) not in (1, len(sources)):
        raise UserError(
            f"{len(sources)} files of captions, but {len(folders)} image folders; pass "
            f"a folder for each file, or one for all"
        )
    if len(folders) == 1:
        folders = folders * len(sources)
    return [
        (source, source["source"], folder)
        if isinstance(source, dict)
        else (read_karpathy(source, dataset), source, folder)
        for source, folder in zip(sources, folders)
    ]


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
      {SPLIT}_CAPTIONS_{NAME}.json    N_c * I lists of max_len + 2 word ids; i is of image i // N_c
      {SPLIT}_CAPLENS_{NAME}.json     N_c * I lengths in words, with <start> and <end>
      {SPLIT}_REFERENCES_{NAME}.json  I entries: filename, image_id, all the captions as words, and
                                      the objects of the picture if the data set has them
      WORDMAP_{NAME}.json             word -> id
    NAME is {dataset}_{N_c}_cap_per_img_{min_word_freq}_min_word_freq. TRAIN_IMAGES has an attribute
    made_from, a hash of everything the files are made from: if they already exist with the same
    hash, nothing is done.

    The images that a killed run has read stay in .unfinished_{NAME} in the output folder, and the
    next run continues with them.

    karpathy_json_path: a file in Karpathy's format, or what own_captions.read_captions returns; or
    a list of these, which are joined: their images have a "source" in REFERENCES
    image_folder: an image is at image_folder/filepath/filename; filepath may be missing. For
    several files one folder each, or one for all
    min_word_freq: words that occur at most this often in the training captions become <unk>
    max_len: captions of more words are only used as references
    workers: processes that decode images; None: one per CPU; 0 and 1: none besides this one
    seed: for sampling captions_per_image of an image's captions
    overwrite: make the files again, even if files of these names exist
    skip_bad_images: leave out images that are missing or cannot be read
    image_size: S, to which images are resized

    Raises UserError for anything wrong with the data, listing all bad images at once, and for files
    of the same names that were made from something else.
    """
    name = f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    if os.path.basename(name) != name:
        raise UserError(f"{name} cannot be part of a file name; pass another --dataset")
    sources = _with_folders(karpathy_json_path, image_folder, dataset)
    options = Options(captions_per_image, min_word_freq, max_len, seed, image_size)
    splits, missing, key = _find_images(read_sources(sources, max_len), options)
    _check_bad_images(splits, missing, skip_bad_images, "; the other images have not been read yet")
    _check_words(splits, options)
    staging = _stage(output_folder, name, key, splits, options)
    with _explain_interruption(staging):
        os.makedirs(output_folder, exist_ok=True)
        with staging.lock(f"another process is making {name} in {output_folder}; wait for it"):
            if not (staging.resume(overwrite) and staging.complete):
                if not overwrite and _is_already_made(staging):
                    staging.remove()  # exists if a run with --overwrite was killed
                    print(
                        f"{name} in {output_folder} is already complete; --overwrite makes it again"
                    )
                    return
                _start_or_resume(staging, overwrite)
                _store_images(staging, splits, os.cpu_count() or 1 if workers is None else workers)
                splits = _drop_bad_images(staging, splits, missing, skip_bad_images)
                _write_captions(staging, name, splits, options)
                staging.complete = True
                staging.save()
            staging.move()
    word_map = os.path.join(output_folder, staging.files[-1])
    words = len(read_json(word_map)) - len(SPECIAL_TOKENS)
    print(f"{count(words, 'word')} and {len(SPECIAL_TOKENS)} special tokens in {word_map}")
