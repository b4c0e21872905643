"""The convolutional encoder: alone, and with the captions and the feature cache of a folder."""

import copy
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks.measuring import ROOT, compare
from benchmarks.model import write_data_set
from caption import Captioner
from datasets import CaptionDataset
from modeling.backbones import fold_batchnorm
from modeling.devices import autocast
from models import Encoder
from training.feature_cache import cache_features

# Name, stride, pixels: the paper's kind of encoder, and that of the model we ship
ENCODERS = (("resnet101", 32, 256), ("tf_efficientnet_lite2", 16, 320))


def encoder(args, encoders=ENCODERS, images=16):
    """Features of images, by the network as it is and with its BatchNorms folded."""
    for name, stride, size in encoders:
        torch.manual_seed(0)
        plain = Encoder(name=name, weights="none", stride=stride).to(args.device)
        folded = copy.deepcopy(plain)
        fold_batchnorm(folded.resnet)
        pixels = torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8)
        pixels = pixels.to(args.device)

        @torch.inference_mode()
        def run(encoder, amp=None, pixels=pixels):
            with autocast(args.device, amp):
                encoder.cells(pixels)

        for amp in (None, "bf16"):
            stage = f"{name}, {size} pixels, stride {stride}, {amp or 'float32'}"
            row = compare(stage, partial(run, plain), partial(run, folded, amp), args)
            yield row | {"note": f"{images / row['ours']:.1f} images/s"}


def write_photographs(folder, n):
    """The paths of n JPEG files of Flickr8k's usual size, links to one photograph"""
    paths = [folder / f"{i:06d}.jpg" for i in range(n)]
    Image.open(ROOT / "docs/photo.jpg").convert("RGB").resize((500, 375)).save(paths[0])
    for path in paths[1:]:
        os.link(paths[0], path)
    return paths


def folder(args, n=300):
    """A folder's captions at beam 5, and a feature cache, beside the encoder alone."""
    captioner = Captioner(device=str(args.device), amp=args.amp)
    pixels = torch.zeros(min(n, 30), 3, *[captioner.image_size] * 2, dtype=torch.uint8)

    @torch.inference_mode()
    def encoder_alone():
        with autocast(args.device, args.amp):
            for _ in range(0, n, len(pixels)):
                captioner.encoder.cells(pixels.to(args.device))

    with tempfile.TemporaryDirectory() as folder:
        paths = write_photographs(Path(folder), n)
        write_data_set(folder, n, captioner.image_size)
        data = CaptionDataset(folder, "x", "TRAIN")

        def cache():
            with autocast(args.device, args.amp):
                os.remove(cache_features(data, captioner.encoder, args.device, args.amp))

        def captions():
            list(captioner.each(paths))

        for what, function in (("captions of a folder", captions), ("a feature cache", cache)):
            stage = f"{what}, {n} images; textbook: the encoder alone"
            row = compare(stage, encoder_alone, function, args, memory=False)
            share = row["textbook"] / row["ours"]
            note = f"{n / row['ours']:.1f} images/s, {share:.2f} of the encoder's"
            yield row | {"share": share, "note": note}
