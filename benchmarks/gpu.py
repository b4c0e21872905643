"""
What train.py and eval.py cost at COCO's sizes, in one call of minutes: made for a GPU, tiny on a
CPU, where it only shows that it runs.
"""

import copy
import tempfile
from types import SimpleNamespace

import torch
from torch.profiler import DeviceType, ProfilerActivity, profile

from benchmarks.end_to_end import EpochRunner, write_data_set
from benchmarks.files import COCO_IMAGES
from benchmarks.measuring import compare, seconds
from benchmarks.model import (
    CELLS,
    ENCODER_DIM,
    SIZE,
    VOCAB,
    WORD_MAP,
    decoder_with_realistic_lengths,
    random_captions,
    search_one_by_one,
    training_step,
)
from datasets import CaptionDataset
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import DecoderWithAttention, Encoder
from training.losses import doubly_stochastic_loss


def find_sizes(device):
    """How much of everything is run; whole epochs and splits are extrapolated from it."""
    if device.type == "cuda":
        return SimpleNamespace(
            images=11_328,
            batches=(16, 128),
            tuned=640,
            side=256,
            searched=1000,
            search_batch=100,
            textbook=10,
            steps=10,
        )
    return SimpleNamespace(
        images=8, batches=(2, 4), tuned=4, side=64, searched=2, search_batch=2, textbook=1, steps=1
    )


def gpu(args):
    """Rows for benchmark.py's table; args: its options."""
    sizes = find_sizes(args.device)
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(folder, pixels=False, TRAIN=sizes.images)
        data = CaptionDataset(folder, "x", "TRAIN")
        data.use_features(_random_features(sizes.images, args.device))
        encoder = Encoder(weights="none").to(args.device)
        yield from _frozen_epochs(encoder, data, sizes, args)
        yield _self_critical_step(encoder, data, sizes, args)
    yield _fine_tuning(sizes, args)
    yield _search(encoder.eval(), sizes, args)
    yield from _precision(args)


def _random_features(images, device):
    features = torch.empty(images, CELLS, ENCODER_DIM, dtype=torch.float16, device=device)
    for part in features.split(1024):  # in pieces: no second copy in float32
        part.copy_(torch.rand(part.shape, device=device))
    return features


def _frozen_epochs(encoder, data, sizes, args):
    """Epochs from the cache at two batch sizes, beside the textbook's step; and the GPU's share."""
    for images in sizes.batches:
        runner = EpochRunner(encoder, data, args, images=images)
        runner.run()
        scale = COCO_IMAGES / sizes.images
        ours = seconds(runner.run, args.device) * scale
        textbook_decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB).to(args.device)
        textbook, *_ = training_step(textbook_decoder, images, 5, args)
        textbook()
        steps = COCO_IMAGES / images
        yield {
            "stage": f"frozen epoch of COCO from the cache, batch {5 * images}",
            "ours": ours,
            "textbook": seconds(textbook, args.device) * steps,
            "note": f"from {sizes.images} images; {1000 * ours / steps:.1f} ms a step",
        }
    if args.device.type == "cuda":
        wall = seconds(runner.run, args.device)
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            runner.run()
            torch.cuda.synchronize(args.device)
        kernels = [event for event in profiled.events() if event.device_type == DeviceType.CUDA]
        busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
        yield {
            "stage": f"time in which the GPU computes, batch {5 * sizes.batches[-1]}",
            "ours": busy,
            "share": busy / wall,
            "note": f"{100 * busy / wall:.0f} % of {wall:.2f} s, {len(kernels)} kernels",
        }


def _self_critical_step(encoder, data, sizes, args):
    """A step of each criterion on the same batches, from a decoder whose captions end."""
    times, images = {}, sizes.batches[0]
    part = copy.copy(data)
    for name, options in (
        ("cross-entropy", []),
        ("self-critical", ["--self_critical", "--checkpoint", "x"]),
    ):
        runner = EpochRunner(
            encoder,
            part,
            args,
            images=images,
            more=options,
            decoder=decoder_with_realistic_lengths(args.device),
        )
        batches = runner.loader.sampler.num_batches
        runner.run()
        times[name] = seconds(runner.run, args.device) / batches
    ratio = times["self-critical"] / times["cross-entropy"]
    return {
        "stage": f"self-critical step, {images} images × 5 samples",
        "ours": times["self-critical"],
        "note": f"{ratio:.1f} times a cross-entropy step",
    }


def _fine_tuning(sizes, args):
    """An epoch with ResNet-101 trained too, from images that are in memory."""
    encoder = Encoder(weights="none").to(args.device)
    encoder.fine_tune()
    decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB).to(args.device)
    n = min(sizes.tuned, 32)
    images = torch.randint(0, 256, (n, 3, sizes.side, sizes.side), dtype=torch.uint8)
    images = images.pin_memory() if args.device.type == "cuda" else images
    captions, lengths = random_captions(n, 5)
    parameters = [p for m in (encoder, decoder) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 1e-5, fused=True)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(args.device, args.amp):
            features = encoder.cells(images.to(args.device, non_blocking=True))
            output = decoder(features, captions.to(args.device), lengths)
            loss = doubly_stochastic_loss(output, lengths)
        loss.backward()
        optimizer.step()

    step()
    steps = max(1, sizes.tuned // n)
    time = seconds(lambda: [step() for _ in range(steps)], args.device)
    return {
        "stage": "epoch of COCO, fine-tuning ResNet-101",
        "ours": time * COCO_IMAGES / n / steps,
        "note": f"{args.amp or 'float32'}, from {steps} steps of {n} images × 5 captions",
    }


@torch.inference_mode()
def _search(encoder, sizes, args):
    """Beam 5 over COCO's 5,000 test images, ResNet-101 included, beside one image at a time."""
    decoder = decoder_with_realistic_lengths(args.device)
    images = torch.randint(
        0, 256, (sizes.search_batch, 3, sizes.side, sizes.side), dtype=torch.uint8
    )

    def textbook():
        for image in images[: sizes.textbook].to(args.device).split(1):
            search_one_by_one(decoder, encoder.cells(image), 5)

    def ours():
        for _ in range(sizes.searched // sizes.search_batch):
            with autocast(args.device, args.amp):
                beam_search(decoder, encoder.cells(images.to(args.device)), WORD_MAP, 5)

    row = compare(
        "beam 5 over 5000 images, ResNet-101 included", textbook, ours, args, memory=False
    )
    return row | {
        "textbook": row["textbook"] * 5000 / sizes.textbook,
        "ours": row["ours"] * 5000 / sizes.searched,
        "note": f"from {sizes.textbook} images one by one, {sizes.searched} in batches",
    }


def _precision(args):
    """Loss, gradients and captions on this device, in its ways to multiply, against float64."""
    features = torch.rand(8, CELLS, ENCODER_DIM)
    captions, lengths = random_captions(8, 5)
    exact = decoder_with_realistic_lengths(torch.device("cpu")).double()
    expected = _loss_and_gradients(exact, features.double(), captions, lengths)
    searched = [c.tokens for c in beam_search(exact, features.double(), WORD_MAP, 5)]
    for name, precision, amp in (
        ("float32", "highest", None),
        ("TF32", "high", None),
        ("bf16", "high", "bf16"),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        decoder = decoder_with_realistic_lengths(args.device)
        on_device = features.to(args.device)
        with autocast(args.device, amp):
            loss, gradient = _loss_and_gradients(
                decoder, on_device, captions.to(args.device), lengths
            )
            found = [c.tokens for c in beam_search(decoder, on_device, WORD_MAP, 5)]
        torch.set_float32_matmul_precision(before)
        error = (gradient.cpu().double() - expected[1]).norm() / expected[1].norm()
        same = sum(a == b for a, b in zip(found, searched))
        yield {
            "stage": f"{name} against float64",
            "loss_error": abs(loss / expected[0] - 1),
            "gradient_error": float(error),
            "identical": same,
            "note": f"loss {abs(loss / expected[0] - 1):.1e}, gradients {error:.1e} off, {same} "
            f"of 8 captions identical",
        }


def _loss_and_gradients(decoder, features, captions, lengths):
    """The loss, a number, and all gradients in one vector."""
    loss = doubly_stochastic_loss(decoder(features, captions, lengths), lengths)
    gradients = torch.autograd.grad(loss, list(decoder.parameters()))
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])
