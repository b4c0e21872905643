"""The convolutional encoder: alone, and with the captions of a folder."""

import copy
import os
import tempfile
from functools import partial

import torch
from PIL import Image

from benchmarks.end_to_end import write_data_set
from benchmarks.measuring import ROOT, compare
from caption import Captioner
from datasets import CaptionDataset
from modeling.backbones import fold_batchnorm
from modeling.devices import autocast
from models import Encoder
from training.feature_cache import cache_features

IMAGES = 16
PHOTOGRAPHS = ("docs/photo.jpg", "docs/examples/cat.jpg", "docs/examples/coffee.jpg")
PIXELS = 500, 375  # the usual size in Flickr8k
# Name, stride, pixels: the paper's kind of encoder, and that of the model we ship
ENCODERS = (("resnet101", 32, 256), ("tf_efficientnet_lite2", 16, 320))


def encoder(args):
    """Features of images, by the network as it is and with its BatchNorms folded."""
    for name, stride, size in ENCODERS:
        torch.manual_seed(0)
        plain = Encoder(name=name, weights="none", stride=stride).to(args.device)
        folded = copy.deepcopy(plain)
        fold_batchnorm(folded.resnet)
        shape = IMAGES, 3, size, size
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=args.device)

        @torch.inference_mode()
        def run(encoder, amp=None, images=images):
            with autocast(args.device, amp):
                encoder.cells(images)

        for amp in (None, "bf16"):
            row = compare(
                f"{name}, {size} pixels, stride {stride}, {amp or 'float32'}",
                partial(run, plain),
                partial(run, folded, amp),
                args,
            )
            yield row | {"note": f"{IMAGES / row['ours']:.1f} images/s"}


def folder(args, n=300):
    """A folder's captions at beam 5, and a feature cache, beside the encoder alone."""
    captioner = Captioner(device=str(args.device), amp=args.amp)
    images = torch.randint(0, 256, (30, 3, *[captioner.image_size] * 2), dtype=torch.uint8)

    @torch.inference_mode()
    def encoder_alone():
        with autocast(args.device, args.amp):
            for _ in range(0, n, len(images)):
                captioner.encoder.cells(images.to(args.device))

    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{i}.jpg" for i in range(n)]
        different = [Image.open(ROOT / path).convert("RGB").resize(PIXELS) for path in PHOTOGRAPHS]
        for i, path in enumerate(paths):
            different[i % len(different)].save(path)
        write_data_set(folder, size=captioner.image_size, TRAIN=n)
        data = CaptionDataset(folder, "x", "TRAIN")

        def captions():
            for _ in captioner.each(paths):
                pass

        def cache():
            with autocast(args.device, args.amp):
                os.remove(cache_features(data, captioner.encoder, args.device, args.amp))

        for what, function in (("captions of a folder", captions), ("a feature cache", cache)):
            row = compare(
                f"{what}, {n} images; textbook: the encoder alone",
                encoder_alone,
                function,
                args,
                memory=False,
            )
            share = row["textbook"] / row["ours"]
            yield row | {
                "share": share,
                "note": f"{n / row['ours']:.1f} images/s, {share:.2f} of the encoder's",
            }
