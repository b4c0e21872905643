"""
What the scripts share: seeds, errors of the user, pretrained embeddings, and
create_input_files(), which turns captioned photographs into the files that we train on.
"""

import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import NamedTuple

import h5py
import numpy as np
import torch
from tqdm import tqdm

from datasets import read_image
from files import UserError, read_json, write_json

IMAGE_SIZE = 256  # pixels a side, of the images in the HDF5 files
SPLITS = {"train": "TRAIN", "restval": "TRAIN", "val": "VAL", "test": "TEST"}  # Karpathy's: ours
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
RESERVED = ("<pad>", "<unk>", "<start>", "<end>")

# Forked readers start at once and share the memory of what is imported already (torch); macOS has
# fork too, but its system libraries do not survive it.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def run(main):
    """Call a script's main(); a mistake of the user ends it with one line and exit code 2."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        message = "interrupted" if stopped else error
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(130 if stopped else 2)


def autocast(device, amp):
    """
    A context that multiplies matrices in half precision on this device: amp is "bf16", "fp16"
    or None, which leaves everything as it is. Weights stay float32 all the same.
    """
    return torch.autocast(device.type, AMP.get(amp), enabled=amp is not None)


def set_seed(seed):
    """Seed every generator that we draw from: Python's, NumPy's and torch's on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def init_embedding(embeddings):
    """Fill a (V, D) tensor in place from U(-sqrt(3/D), sqrt(3/D)), whose variance is 1/D."""
    limit = math.sqrt(3 / embeddings.size(1))
    torch.nn.init.uniform_(embeddings, -limit, limit)


def _numbers(texts):
    """The float32 array of some texts, None unless all are finite numbers."""
    try:
        numbers = np.array(texts, dtype=np.float32)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def load_embeddings(emb_file, word_map):
    """
    Pretrained word vectors from a file in GloVe's text format: a word and D numbers per line.

    Words are compared as they stand: ours and those of glove.6B are lower-case. A word that the
    file lacks gets init_embedding's random vector.

    Returns the (V, D) float32 embeddings, row i for word id i, and D.
    Raises UserError, with the line number, for a line without exactly D finite numbers.
    """
    vectors, size = {}, None
    try:
        with open(emb_file, encoding="utf-8") as file:
            for line_number, line in enumerate(file, 1):
                word, *values = line.rstrip().split(" ")
                size = size or len(values)
                if len(values) > size and _numbers(values[:1]) is None:
                    continue  # glove.840B has words with spaces inside, like "at name@domain.com"
                if not size or len(values) != size:
                    where = f"{emb_file}, line {line_number}"
                    raise UserError(f"{where}: {len(values)} numbers where line 1 has {size}")
                if word in word_map:
                    vectors[word] = _numbers(values)
                    if vectors[word] is None:
                        raise UserError(f"{emb_file}, line {line_number}: not a finite number")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{emb_file} cannot be read: {error}") from None
    if not size:
        raise UserError(f"{emb_file} is empty")
    embeddings = torch.empty(len(word_map), size)
    init_embedding(embeddings)
    for word, vector in vectors.items():
        embeddings[word_map[word]] = torch.from_numpy(vector)
    print(f"{len(vectors)} of {len(word_map)} words have a vector in {emb_file}")
    return embeddings, size


class CaptionedImage(NamedTuple):
    path: str
    captions: list  # those of 1 to max_len words, each a list of words
    record: dict  # the image's entry in REFERENCES


def _captioned_image(entry, index, source, image_folder, max_len):
    """Check one image of a Karpathy JSON; returns the split it goes to and its CaptionedImage."""
    try:
        name = os.path.join(entry.get("filepath", ""), entry["filename"])
        split = entry["split"]
        captions = [sentence["tokens"] for sentence in entry["sentences"]]
        if not all(isinstance(caption, list) for caption in captions):
            raise TypeError
        reserved = {word for caption in captions for word in caption}.intersection(RESERVED)
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{source}: image {index} is not in Karpathy's form: "
            "it needs filename, split and sentences, each with a list of tokens"
        ) from None
    if split not in SPLITS:
        raise UserError(f"{source}: split {split!r} of {name} is none of {', '.join(SPLITS)}")
    if reserved:
        raise UserError(f"{source}: {name}: a caption has {min(reserved)}, a word of our own")
    name = os.path.relpath(os.path.join(image_folder, name), image_folder)
    if name.split(os.sep)[0] == os.pardir:
        raise UserError(f"{source}: {name} is not inside the image folder {image_folder}")
    references = [caption for caption in captions if caption]
    record = {
        "filename": name.replace(os.sep, "/"),
        "image_id": entry.get("cocoid", entry.get("imgid", index)),
        "references": references,
    }
    if "objects" in entry:
        record["objects"] = entry["objects"]
    usable = [caption for caption in references if len(caption) <= max_len]
    return SPLITS[split], CaptionedImage(os.path.join(image_folder, name), usable, record)


def _read_splits(karpathy, source, image_folder, max_len):
    """The CaptionedImages of TRAIN, VAL and TEST in the order of the JSON, checked."""
    if not isinstance(karpathy, dict) or not isinstance(karpathy.get("images"), list):
        raise UserError(f"{source} has no list 'images'; captions of your own go to --captions")
    if not os.path.isdir(image_folder):
        raise UserError(f"image folder {image_folder} not found")
    splits = {split: [] for split in SPLITS.values()}
    skipped, seen = Counter(), set()
    for index, entry in enumerate(karpathy["images"]):
        split, image = _captioned_image(entry, index, source, image_folder, max_len)
        if image.path in seen:
            raise UserError(f"{source}: {image.record['filename']} is there twice; merge the two")
        seen.add(image.path)
        if image.captions:
            splits[split].append(image)
        else:
            skipped[split] += 1
    for split, count in skipped.items():
        print(f"{split}: {count} images skipped, without a caption of 1 to {max_len} words")
    if not splits["TRAIN"]:
        raise UserError(f"{source}: no image to train on; give some the split 'train'")
    _raise_bad(
        f"{image.path} not found"
        for images in splits.values()
        for image in images
        if not os.path.isfile(image.path)
    )
    return splits


def _raise_bad(reasons):
    """UserError with the first 20 reasons, one per line; nothing if there are none."""
    reasons = list(reasons)
    if reasons:
        more = [f"... and {len(reasons) - 20} more"] if len(reasons) > 20 else []
        lines = [f"{len(reasons)} bad images; repair them or remove their captions:"]
        raise UserError("\n  ".join(lines + reasons[:20] + more))


def create_word_map(captions, min_word_freq):
    """
    Word -> id: <pad> is 0, then the words that occur more than min_word_freq times, in the order
    of their first appearance, then <unk>, <start> and <end>.
    """
    frequency = Counter(word for caption in captions for word in caption)
    words = [word for word, count in frequency.items() if count > min_word_freq]
    return {word: i for i, word in enumerate(["<pad>", *words, "<unk>", "<start>", "<end>"])}


def _sample(captions, n, rng):
    """n of the captions without replacement; if there are fewer, all, filled up by repetition."""
    missing = max(n - len(captions), 0)
    return rng.sample(captions, n - missing) + rng.choices(captions, k=missing)


def _encode(caption, word_map, max_len):
    """<start>, the words and <end> as ids, padded to max_len + 2 of them."""
    ids = [word_map.get(word, word_map["<unk>"]) for word in caption]
    padding = [word_map["<pad>"]] * (max_len - len(caption))
    return [word_map["<start>"], *ids, word_map["<end>"], *padding]


def _try_read(path):
    """The (3, 256, 256) uint8 image, or as a str why it can't be read."""
    try:
        return read_image(path, IMAGE_SIZE)
    except Exception as error:  # whatever a broken file sets off, the other files get their turn
        return str(error) if path in str(error) else f"{path}: {error!r}"


@contextmanager
def _interrupt_afterwards():
    """Hold a Ctrl-C back until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets it
        yield
        return
    held = []
    handler = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if held:
        raise KeyboardInterrupt


def _read_images(paths, workers):
    """Yield _try_read(path) in order; at most 4 * workers images wait in memory."""
    if workers <= 1:
        yield from map(_try_read, paths)
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context(START_METHOD),
        initializer=signal.signal,  # Ctrl-C reaches the whole group, but is the parent's to handle
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    waiting = deque()
    try:
        with _interrupt_afterwards():  # os.fork would swallow it
            pool.submit(int)  # starts the processes
        for path in paths:
            waiting.append(pool.submit(_try_read, path))
            if len(waiting) == 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a reading process died, out of memory? try --workers 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_images(path, n, pixels, captions_per_image, title):
    """Write the next n of _read_images to an HDF5 file; returns the reasons of the bad ones."""
    bad = []
    with h5py.File(path, "w") as h:
        h.attrs["captions_per_image"] = captions_per_image
        images = h.create_dataset("images", (n, 3, IMAGE_SIZE, IMAGE_SIZE), dtype="uint8")
        for i in tqdm(range(n), desc=title, unit="image", disable=None):
            image = next(pixels)
            if isinstance(image, str):
                bad.append(image)
            else:
                images[i] = image
    return bad


def create_input_files(
    dataset,
    karpathy_json_path,
    image_folder,
    captions_per_image=5,
    min_word_freq=5,
    output_folder="data",
    max_len=50,
    workers=None,
    seed=123,
):
    """
    Write the files that train.py and eval.py read; all appear together at the end, or none does.

    For SPLIT in TRAIN (train and restval), VAL, TEST and N_c = captions_per_image:
      {SPLIT}_IMAGES_{NAME}.hdf5      "images" (I, 3, 256, 256) uint8, attribute captions_per_image
      {SPLIT}_CAPTIONS_{NAME}.json    N_c * I lists of max_len + 2 word ids; i is of image i // N_c
      {SPLIT}_CAPLENS_{NAME}.json     N_c * I lengths in words, with <start> and <end>
      {SPLIT}_REFERENCES_{NAME}.json  I entries: filename, image_id, all the captions as words, and
                                      the objects of the picture if the data set has them
      WORDMAP_{NAME}.json             word -> id
    NAME is {dataset}_{N_c}_cap_per_img_{min_word_freq}_min_word_freq.

    karpathy_json_path: a file in Karpathy's form, or what captions.read_captions returns
    image_folder: an image is at image_folder/filepath/filename; filepath may be missing
    min_word_freq: a word is known if the captions trained on have it more often than this
    max_len: longer captions, in words, are references only
    workers: processes that decode images; all CPUs if None; 0 and 1 do it here
    seed: of the choice among an image's captions

    Raises UserError for anything wrong with the data, with all the bad images in one go.
    """
    name = f"{dataset}_{captions_per_image}_cap_per_img_{min_word_freq}_min_word_freq"
    if captions_per_image < 1 or max_len < 1 or os.path.basename(name) != name:
        raise UserError(f"no files can be named {name} for captions of {max_len} words")
    if isinstance(karpathy_json_path, dict):
        karpathy, source = karpathy_json_path, karpathy_json_path["source"]
    else:
        karpathy, source = read_json(karpathy_json_path), karpathy_json_path
    splits = _read_splits(karpathy, source, image_folder, max_len)
    trained_on = (caption for image in splits["TRAIN"] for caption in image.captions)
    word_map = create_word_map(trained_on, min_word_freq)
    paths = [image.path for images in splits.values() for image in images]
    workers = os.cpu_count() or 1 if workers is None else workers
    rng = random.Random(seed)
    bad = []
    try:
        os.makedirs(output_folder, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=output_folder, prefix=".unfinished_") as folder,
            closing(_read_images(paths, workers)) as pixels,
        ):
            needed, free = len(paths) * 3 * IMAGE_SIZE**2, shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(f"{output_folder}: {needed} bytes needed, {free} free")
            for split, images in splits.items():
                start = time.perf_counter()
                captions = [
                    caption
                    for image in images
                    for caption in _sample(image.captions, captions_per_image, rng)
                ]
                for kind, content in {
                    "CAPTIONS": [_encode(caption, word_map, max_len) for caption in captions],
                    "CAPLENS": [len(caption) + 2 for caption in captions],
                    "REFERENCES": [image.record for image in images],
                }.items():
                    write_json(os.path.join(folder, f"{split}_{kind}_{name}.json"), content)
                path = os.path.join(folder, f"{split}_IMAGES_{name}.hdf5")
                bad += _write_images(path, len(images), pixels, captions_per_image, split)
                seconds = time.perf_counter() - start
                print(
                    f"{split}: {len(images)} images, {len(captions)} captions, "
                    f"{seconds:.1f} s, {len(images) / seconds:.0f} images/s"
                )
            _raise_bad(bad)
            write_json(os.path.join(folder, f"WORDMAP_{name}.json"), word_map)
            with _interrupt_afterwards():
                for file in os.listdir(folder):
                    os.replace(os.path.join(folder, file), os.path.join(output_folder, file))
    except OSError as error:
        raise UserError(f"cannot write to {output_folder}: {error}") from error
    print(f"{len(word_map)} words in {output_folder}/WORDMAP_{name}.json")
