"""Shared by several tests: small decoders, captions and data sets."""

import itertools
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from checkpoints import PRETRAINED, load
from models import DECODERS, DecoderWithAttention
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from utils import UserError, write_json

ROOT = Path(__file__).resolve().parent.parent
SMALL_ENCODER = "--encoder mobilenet_v3_small --encoder_weights none".split()
ENCODER = ["--encoder", "tf_efficientnet_lite2", "--encoder_weights", str(PRETRAINED)]

DECODER_KINDS = list(dict.fromkeys(DECODERS.values()))
VOCAB = 11
WORD_MAP = {"<pad>": 0, "<unk>": VOCAB - 3, "<start>": VOCAB - 2, "<end>": VOCAB - 1}
NAME = "demo_5_cap_per_img_0_min_word_freq"


def write_scenes(folder, train, val, test, **options):
    """Draw scenes and write their input files into this folder, which is returned."""
    scenes = make_demo(folder / "demo", train, val, test)
    options = {"min_word_freq": 0, "output_folder": folder, "workers": 1} | options
    create_input_files("demo", scenes, folder / "demo", **options)
    return folder


def make_decoder(vocab_size=23, seed=0, scale=3.0, kind=DecoderWithAttention, **arguments):
    """A small random decoder in float64, its weights large enough for sharp attention."""
    torch.manual_seed(seed)
    sizes = {"attention_dim": 7, "embed_dim": 5, "decoder_dim": 6, "encoder_dim": 9, "dropout": 0.0}
    decoder = kind(vocab_size=vocab_size, **sizes | arguments).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(scale)
    return decoder


def make_captions(n, r, vocab_size=23, longest=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n, r), generator=g)
    captions = torch.randint(1, vocab_size, (n, r, longest + 3), generator=g)
    captions[torch.arange(longest + 3) >= lengths.unsqueeze(2)] = 0
    return captions, lengths


def make_case(seed, end_bias, kind=DecoderWithAttention):
    """
    A random decoder and 8 images; the larger end_bias, the sooner captions end. A random LSTM's
    would end at once or never. So unit 0 serves as a clock: it rises at each step, from a value
    that depends on the image, and raises the logit of <end>.
    """
    decoder = make_decoder(VOCAB, seed=seed, kind=kind).eval()
    end, size = WORD_MAP["<end>"], 6
    lstm = decoder.decode_step
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
        for gate, bias in enumerate((9.0, 9.0, 0.25, 9.0)):  # input, forget, candidate, output
            row = gate * size
            lstm.weight_ih[row] = lstm.weight_hh[row] = lstm.bias_hh[row] = 0
            lstm.bias_ih[row] = bias
        decoder.fc.weight[:, 0] = 0
        decoder.fc.weight[end, 0] = 8
        decoder.fc.bias[end] += end_bias
    torch.manual_seed(seed)
    return decoder, torch.randn(8, 4, 9, dtype=torch.float64)


# Images with captions in Karpathy's format, and the input files made from them


def karpathy_entry(filename, split="train", captions=("a dog",), **more):
    sentences = [{"tokens": caption.split(), "raw": caption} for caption in captions]
    return {"filename": filename, "split": split, "sentences": sentences, **more}


ONE_PER_SPLIT = [
    karpathy_entry("a.png"),
    karpathy_entry("b.png", "val"),
    karpathy_entry("c.png", "test"),
    karpathy_entry("d.png", "restval"),
]


def many_entries(n=9):
    return [karpathy_entry(f"{i}.png", captions=["a b", "b c", "c d", "d a"]) for i in range(n)]


def grey_of(i):
    """The grey level in which `write_karpathy` draws image i."""
    return 10 * i + 5


def write_karpathy(folder, entries, bad=()):
    """Draw the images in folder/images, each in its grey, and write the JSON; returns its path."""
    for i, image in enumerate(entries):
        path = folder / "images" / image.get("filepath", "") / image["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if image["filename"] in bad:
            path.write_bytes(b"no image at all")
        else:
            Image.new("RGB", (40, 30), (grey_of(i),) * 3).save(path)
        os.utime(path, (1, 1))  # so that drawing it again gives the same file
    write_json(folder / "dataset.json", {"images": entries, "dataset": "x"})
    return folder / "dataset.json"


INPUT_OPTIONS = {"min_word_freq": 0, "captions_per_image": 2, "max_len": 4, "workers": 0}


def write_input_files(folder, entries, output="out", bad=(), **options):
    """The input files of the data set x in folder/output; returns a function that reads one."""
    path, output = write_karpathy(folder, entries, bad), folder / output
    create_input_files(
        "x", path, folder / "images", output_folder=output, **INPUT_OPTIONS | options
    )

    def read(kind):
        [path] = output.glob(f"{kind}_x_*")
        if path.suffix == ".json":
            return json.loads(path.read_text())
        with h5py.File(path) as file:
            return file["images"][:], dict(file.attrs)

    return read


def contents(folder):
    """{name: bytes} of the files in a folder"""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


needs_signals = pytest.mark.skipif(os.name != "posix", reason="sends signals")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="forks a process to kill it")


def restore_interrupts():
    """For Popen's preexec_fn: a test run started in the background ignores Ctrl-C, we must not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


# Files as the tutorial's code writes them
TUTORIAL_NAME = "flickr8k_2_cap_per_img_0_min_word_freq"
IMAGES, R = 5, 2
TUTORIAL_WORD_MAP = {"a": 1, "cat": 2, "sits": 3, "<unk>": 4, "<start>": 5, "<end>": 6, "<pad>": 0}
TUTORIAL_CAPTIONS = [
    [5, 1 + i % 3, 4, 6, 0, 0] if i % 2 else [5, 1, 2, 3, 6, 0] for i in range(IMAGES * R)
]
TUTORIAL_LENGTHS = [4 if i % 2 else 5 for i in range(IMAGES * R)]


def write_tutorial_files(folder, captions=TUTORIAL_CAPTIONS, lengths=TUTORIAL_LENGTHS, size=256):
    """As the tutorial's create_input_files() does; there is no REFERENCES file."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, size, size), np.uint8)
    with h5py.File(folder / f"TRAIN_IMAGES_{TUTORIAL_NAME}.hdf5", "a") as h:
        h.attrs["captions_per_image"] = R
        h.create_dataset("images", data=pixels)
    files = {"TRAIN_CAPTIONS": captions, "TRAIN_CAPLENS": lengths, "WORDMAP": TUTORIAL_WORD_MAP}
    for kind, content in files.items():
        (folder / f"{kind}_{TUTORIAL_NAME}.json").write_text(json.dumps(content))
    return pixels


# Runs of the scripts

SMALL = "--decoder_dim 32 --attention_dim 16 --emb_dim 8 --workers 0 --device cpu".split()


def train_args(data, folder, *options):
    """train.py's arguments for a small model; options: words, or several in a string"""
    folders = f"--data_folder {data} --checkpoint_folder {folder} --decoder_lr 5e-3"
    return [*SMALL_ENCODER, *SMALL, *" ".join([folders, *map(str, options)]).split()]


def resume_args(folder, *options):
    return " ".join([f"--checkpoint_folder {folder} --resume", *map(str, options)]).split()


def load_checkpoint(folder, prefix=""):
    return torch.load(Path(folder) / f"{prefix}checkpoint_{NAME}.pth.tar", weights_only=True)


def log_rows(folder):
    return [json.loads(row) for row in (Path(folder) / f"log_{NAME}.jsonl").open()]


def timeless_rows(folder):
    """The rows of the log without their times."""
    return [{k: row[k] for k in row if "second" not in k} for row in log_rows(folder)]


def same(a, b):
    """Whether two values are equal bit for bit, including nested dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run_script(script, *args, processes=1):
    """Run a script in its own process, or in several with torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split()
    command += [ROOT / script, *map(str, args)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)


def raise_signal_at(monkeypatch, call, signum, function="training.engine.derive_seed"):
    """Send this process a signal at the call-th call of a function, "module.name"."""
    original, calls = pkgutil.resolve_name(function), itertools.count(1)

    def with_signal(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(function, with_signal)


# Sets of captions to score
CAPTION_WORDS = (
    "a a the the man men dog dogs puppy runs running ran on in street road quickly red two "
    "big ball boy boys child jumps near water grass white while"
).split()


def caption_sets(count, seed):
    """
    Yield `count` sets of 2..5 images: references, and captions that share words with them or equal
    one of them. Captions have 4 or more words: in shorter ones NLTK counts a missed n-gram.
    """
    rng = random.Random(seed)

    def caption(low):
        return [rng.choice(CAPTION_WORDS) for _ in range(rng.randint(low, 10))]

    for _ in range(count):
        images = range(rng.randint(2, 5))
        references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in images]
        captions = [caption(4) for _ in images]
        for i in images:
            drawn = rng.choice(references[i])
            if len(drawn) > 3 and rng.random() < 0.4:
                captions[i] = drawn
        yield references, captions


def as_coco(references, captions):
    """Captions as pycocoevalcap takes them"""
    return (
        {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)},
        {i: [" ".join(words)] for i, words in enumerate(captions)},
    )


def refused(path, *what, load=load):
    """Loading this file ends in one line that names it and `what`."""
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 600
    assert all(part in message for part in what), message
