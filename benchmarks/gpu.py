"""What train.py and eval.py cost at COCO's sizes on a GPU; tiny on a CPU, to show that it runs."""

import tempfile
from argparse import Namespace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import model
from benchmarks.measuring import compare, seconds
from benchmarks.scripts import encoder
from datasets import CaptionDataset
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import Encoder
from training.losses import SelfCritical

# Images per step; the encoder, its stride and pixels; images encoded, searched, searched one by one
ON_GPU = Namespace(
    batches=(16, 32, 128), encoder=("resnet101", 32, 256), encoded=128, searched=1000, alone=20
)
ON_CPU = Namespace(batches=(1, 2, 4), encoder=("resnet50", 32, 32), encoded=2, searched=4, alone=2)


def gpu(args):
    """Steps, epochs, encoding and searches in float32 (TF32) and bf16; agreement with the CPU."""
    sizes = ON_GPU if args.device.type == "cuda" else ON_CPU
    n = sizes.batches[0]
    with tempfile.TemporaryDirectory() as folder:
        model.write_data_set(folder, n)
        self_critical = SelfCritical(CaptionDataset(folder, "x", "TRAIN"), alpha_c=1.0)
    yield from encoder(args, [sizes.encoder], sizes.encoded)
    for amp in (None, "bf16"):
        run, name = Namespace(**vars(args) | {"amp": amp}), amp or "TF32"
        for images in sizes.batches:
            yield _step(f"step of {5 * images} captions, {name}", images, run)
        yield _step(f"self-critical step of {5 * n} samples, {name}", n, run, self_critical)
        yield _step(f"fine-tuning step of {5 * n} captions, {name}", n, run, None, sizes.encoder)
        for row in model.search(run, sizes.searched, sizes.alone, f", {name}"):
            time = row["ours"] * 5000 / sizes.searched
            yield row | {"note": f"5,000 images: {time:.0f} s; {row['note']}"}
    yield from _agreement(args)


def _step(stage, n, args, criterion=None, tuned=None):
    """A whole step of train.py, plain and fast at args.amp; tuned: the encoder, if trained too"""
    decoder, encoder = model.decoder_with_realistic_lengths(args.device).train(), None
    batch = model.random_batch(n, 5, args.device)
    if tuned:
        name, stride, side = tuned
        encoder = Encoder(name=name, weights="none", stride=stride).to(args.device)
        encoder.fine_tune()
        images = torch.zeros(n, 3, side, side, dtype=torch.uint8, device=args.device)
        batch = batch._replace(features=images)
    textbook, ours = (  # at this learning rate captions stay as long as they are
        model.make_step(x, batch, args.amp, criterion, encoder, lr=1e-8)
        for x in (model.plain(decoder), decoder)
    )
    row = compare(stage, textbook, ours, args)
    row["epoch"] = row["ours"] * model.COCO_IMAGES / n
    note = f"an epoch of COCO: {row['epoch']:.0f} s, computed from this step"
    if args.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            seconds(ours, args.device)
        busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
        row["busy"] = busy / row["ours"]
        note += f"; the GPU computes {row['busy']:.0%} of the time"
    return row | {"note": note}


def _agreement(args):
    """Gradients and captions on this device against those of the CPU in float64."""

    def compute(decoder, batch, amp=None):
        model.make_step(decoder, batch, amp)()
        gradient = torch.cat([p.grad.flatten() for p in decoder.parameters()])
        with autocast(gradient.device, amp):
            found = beam_search(decoder, batch.features, model.WORD_MAP, 5)
        return gradient.cpu().double(), [caption.tokens for caption in found]

    cpu = torch.device("cpu")
    decoder, batch = model.decoder_with_realistic_lengths(cpu), model.random_batch(8, 5, cpu)
    exact = compute(decoder.double(), batch._replace(features=batch.features.double()))
    features, captions = batch.features.to(args.device), batch.captions.to(args.device)
    batch = batch._replace(features=features, captions=captions)
    before = torch.get_float32_matmul_precision()
    for name, precision in (("float32", "highest"), ("TF32", "high"), ("bf16", "high")):
        torch.set_float32_matmul_precision(precision)
        decoder = model.decoder_with_realistic_lengths(args.device)
        gradient, found = compute(decoder, batch, "bf16" if name == "bf16" else None)
        torch.set_float32_matmul_precision(before)
        error = float((gradient - exact[0]).norm() / exact[0].norm())
        same = sum(a == b for a, b in zip(found, exact[1]))
        row = {"stage": f"{name} against float64 on the CPU", "error": error, "identical": same}
        yield row | {"note": f"gradient error {error:.1e}, {same} of 8 captions identical"}
