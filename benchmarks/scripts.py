"""What users wait for: the start of scripts, files, the encoder alone and captions of a folder."""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from PIL import Image

from benchmarks.measuring import compare
from benchmarks.model import COCO_IMAGES, write_data_set
from caption import Captioner
from datasets import CaptionDataset
from modeling.backbones import fold_batchnorm
from modeling.devices import autocast
from modeling.efficientnet_lite import DepthwiseConv2d
from models import Encoder
from preprocessing.input_files import create_input_files
from training.feature_cache import cache_features
from utils import write_json

ROOT = Path(__file__).resolve().parent.parent
# Name, stride, pixels: the tutorial's encoder, and that of the model we ship
ENCODERS = (("resnet101", 32, 256), ("tf_efficientnet_lite2", 16, 320))


def start(args):
    """Scripts, from the start of Python to its end, against `import torch`, which all need."""
    run = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
    import_torch = partial(run, [sys.executable, "-c", "import torch"])
    with tempfile.TemporaryDirectory() as folder:
        photograph = shutil.copy(ROOT / "docs/photo.jpg", folder)
        caption = ["caption.py", "--img", photograph, "--device", str(args.device)]
        for name, command in {
            "caption.py, one photograph": [*caption, "--no_attention"],
            "caption.py, with the overlay": caption,
            "Captioner()": ["-c", "from caption import Captioner; Captioner()"],
            "train.py --help": ["train.py", "--help"],
        }.items():
            script = partial(run, [sys.executable, *command])
            row = compare(f"{name}; textbook: import torch", import_torch, script, args, False)
            yield row | {"note": f"{row['ours'] / row['textbook']:.2f} times import torch"}


def write_photographs(folder, n):
    """The paths of n JPEG files of Flickr8k's usual size, links to one photograph"""
    first, *others = paths = [folder / f"{i:06d}.jpg" for i in range(n)]
    Image.open(ROOT / "docs/photo.jpg").convert("RGB").resize((500, 375)).save(first)
    for path in others:
        os.link(first, path)
    return paths


def files(args, photographs=1000, captioned=COCO_IMAGES):
    """Photographs to HDF5, and opening the captions of COCO's training split."""
    with tempfile.TemporaryDirectory() as name:
        folder, sentences = Path(name), [{"tokens": f"photograph {i}".split()} for i in range(5)]
        paths = write_photographs(folder, photographs)
        entries = [{"filename": x.name, "split": "train", "sentences": sentences} for x in paths]
        write_json(folder / "k.json", {"images": entries})

        def create():
            with redirect_stdout(StringIO()):
                create_input_files("x", folder / "k.json", folder, output_folder=folder / "ours")
            shutil.rmtree(folder / "ours")

        row = compare(f"preprocessing {photographs} photographs", None, create, args, False)
        yield row | {"note": f"{photographs / row['ours']:.0f} images/s"}
        write_data_set(folder, captioned)
        load = partial(CaptionDataset, folder, "x", "TRAIN")
        yield compare(f"opening {5 * captioned:,} captions", None, load, args, False)


@torch.inference_mode()
def encode(encoder, pixels, amp, device, batches=1):
    with autocast(device, amp):
        for _ in range(batches):
            encoder.cells(pixels.to(device))


def encoder(args, encoders=ENCODERS, images=16):
    """Features of images, by the network as it is and with its BatchNorms folded."""
    for name, stride, size in encoders:
        torch.manual_seed(0)
        plain = Encoder(name=name, weights="none", stride=stride).to(args.device)
        folded = copy.deepcopy(plain)
        fold_batchnorm(folded.resnet)
        pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=args.device)
        for amp in (None, "bf16"):
            versions = [partial(encode, x, pixels, amp, args.device) for x in (plain, folded)]
            stage = f"{name}, {size} pixels, stride {stride}, {amp or 'float32'}"
            row = compare(stage, *versions, args)
            yield row | {"note": f"{images / row['ours']:.1f} images/s"}


def fine_tuning(args, size=320, images=16):
    """
    Forward and backward of the encoder that we ship, against torch's gradients of depthwise
    convolutions, which a GPU uses too.
    """
    torch.manual_seed(0)
    ours = Encoder(name="tf_efficientnet_lite2", weights="none", stride=16).to(args.device)
    ours.fine_tune()
    plain = copy.deepcopy(ours)
    for module in plain.modules():
        if isinstance(module, DepthwiseConv2d):
            module.forward = partial(torch.nn.Conv2d.forward, module)
    pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8, device=args.device)

    def step(encoder, amp):
        with autocast(args.device, amp):
            features = encoder.cells(pixels)
        features.float().square().mean().backward()

    for amp in (None, "bf16"):
        versions = [partial(step, encoder, amp) for encoder in (plain, ours)]
        row = compare(f"fine-tuning the encoder, {amp or 'float32'}", *versions, args)
        yield row | {"note": f"{images / row['ours']:.1f} images/s"}


def folder(args, n=300):
    """A folder's captions at beam 5, and a feature cache, against the encoder alone."""
    captioner, batch = Captioner(device=str(args.device), amp=args.amp), min(n, 30)
    pixels = torch.zeros(batch, 3, *[captioner.image_size] * 2, dtype=torch.uint8)
    alone = partial(encode, captioner.encoder, pixels, args.amp, args.device, n // batch)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), n)
        write_data_set(folder, n, captioner.image_size)
        data = CaptionDataset(folder, "x", "TRAIN")

        def cache():
            with autocast(args.device, args.amp):
                os.remove(cache_features(data, captioner.encoder, args.device, args.amp))

        whole = {"captions of a folder": lambda: list(captioner.each(paths)), "its cache": cache}
        for what, function in whole.items():
            stage = f"{what}, {n} images; textbook: the encoder"
            row = compare(stage, alone, function, args, memory=False)
            share = row["textbook"] / row["ours"]
            yield row | {"note": f"{n / row['ours']:.1f} images/s, {share:.2f} of the encoder's"}
