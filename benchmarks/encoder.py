"""The convolutional encoder: alone, with the captions of a folder, and when it is fine-tuned."""

import os
import tempfile
from functools import partial

import timm
import torch
from PIL import Image
from torch import nn

from benchmarks.end_to_end import write_data_set
from benchmarks.measuring import ROOT, compare
from caption import Captioner
from datasets import CaptionDataset
from modeling.devices import autocast
from models import Encoder
from preprocessing.feature_cache import cache_features

IMAGES = 16
PHOTOGRAPHS = ("docs/photo.jpg", "docs/examples/cat.jpg", "docs/examples/coffee.jpg")
PIXELS = 500, 375  # the usual size in Flickr8k
# Name, stride, pixels: the paper's kind of encoder, and that of the model we ship
ENCODERS = (("resnet101", 32, 256), ("tf_efficientnet_lite2", 16, 320))


def plain_network(encoder):
    """The layers of torchvision or timm, not fused, with the weights of an `Encoder`"""
    if not encoder.args["name"].startswith("tf_efficientnet_lite"):
        return encoder.resnet
    model = timm.create_model(encoder.args["name"], output_stride=encoder.args["stride"])
    layers = nn.Sequential(model.conv_stem, model.bn1, model.blocks, model.conv_head, model.bn2)
    layers.load_state_dict(encoder.resnet.state_dict())
    return layers.to(next(encoder.parameters()), memory_format=torch.channels_last).eval()


def encoder(args):
    """Features of images, by the layers as torchvision or timm have them and by `models.Encoder`"""
    for name, stride, size in ENCODERS:
        torch.manual_seed(0)
        ours = Encoder(name=name, weights="none", stride=stride).to(args.device)
        plain = plain_network(ours)
        images = torch.randint(
            0, 256, (IMAGES, 3, size, size), dtype=torch.uint8, device=args.device
        )

        @torch.inference_mode()
        def textbook(plain=plain, images=images, ours=ours):
            plain(
                ((images / 255 - ours.mean) / ours.std).contiguous(
                    memory_format=torch.channels_last
                )
            )

        for amp in (None, "bf16"):

            @torch.inference_mode()
            def fused(ours=ours, images=images, amp=amp):
                with autocast(args.device, amp):
                    ours(images)

            row = compare(
                f"{name}, {size} pixels, stride {stride}, {amp or 'float32'}", textbook, fused, args
            )
            yield row | {"note": f"{IMAGES / row['ours']:.1f} images/s"}


def finetune(args):
    """Forward and backward through the encoder, blocks 2-4 trained: plain layers and fused ones."""
    for name, stride, size in ENCODERS:
        torch.manual_seed(0)
        ours = Encoder(name=name, weights="none", stride=stride).to(args.device)
        images = torch.randn(IMAGES, 3, size, size, device=args.device).contiguous(
            memory_format=torch.channels_last
        )

        def step(body, trained, images=images):
            loss = body(images).square().mean()
            torch.autograd.grad(loss, trained)

        ours.fine_tune()
        plain = plain_network(ours)
        trained = [p for p in ours.parameters() if p.requires_grad]
        if plain is not ours.resnet:
            for weight, other in zip(plain.parameters(), ours.parameters()):
                weight.requires_grad = other.requires_grad
        of_plain = [p for p in plain.parameters() if p.requires_grad]
        row = compare(
            f"fine-tuning {name}, {IMAGES} images of {size} pixels",
            partial(step, plain, of_plain),
            partial(step, ours._body, trained),
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
                captioner.encoder(images.to(args.device))

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
