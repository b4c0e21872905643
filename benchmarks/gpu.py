"""What train.py and eval.py cost at COCO's sizes on a GPU; tiny on a CPU, to show that it runs."""

import tempfile
from argparse import Namespace

import torch

from benchmarks import model
from benchmarks.encoder import encoder
from benchmarks.measuring import busy_seconds, compare
from datasets import CaptionDataset
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import Encoder
from training.losses import SelfCritical

# Images in the training steps and in the others, their pixels, and the textbook's search
ON_GPU = Namespace(batches=(16, 32, 128), encoded=128, tuned=16, side=256, searched=1000, alone=20)
ON_CPU = Namespace(batches=(1, 2, 4), encoded=2, tuned=1, side=32, searched=4, alone=2)


def gpu(args):
    """Steps, epochs, encoding and searches in float32 (TF32) and bf16; agreement with the CPU."""
    sizes = ON_GPU if args.device.type == "cuda" else ON_CPU
    yield from encoder(args, [("resnet101", 32, sizes.side)], sizes.encoded)
    for amp in (None, "bf16"):
        run, name = Namespace(**vars(args) | {"amp": amp}), amp or "TF32"
        for n in sizes.batches:
            yield _step(f"step of {5 * n} captions, {name}", n, run)
        n = sizes.batches[0]
        yield _step(f"self-critical step of {5 * n} samples, {name}", n, run, _self_critical(n))
        n = sizes.tuned
        yield _step(f"fine-tuning step of {5 * n} captions, {name}", n, run, side=sizes.side)
        for row in model.search(run, sizes.searched, sizes.alone, f", {name}"):
            time = row["ours"] * 5000 / sizes.searched
            yield row | {"note": f"5,000 images: {time:.0f} s; {row['note']}"}
    yield from _agreement(args)


def _step(stage, n, args, criterion=None, side=None):
    """A whole step of train.py, plain and fast; side: of images, if the encoder is trained too"""
    decoder, encoder = model.decoder_with_realistic_lengths(args.device).train(), None
    batch, parameters = model.random_batch(n, 5, args.device), list(decoder.parameters())
    if side:
        encoder = Encoder(weights="none").to(args.device)
        encoder.fine_tune()
        parameters += [p for p in encoder.parameters() if p.requires_grad]
        images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, device=args.device)
        batch = batch._replace(features=images)
    optimizer = torch.optim.Adam(parameters, 1e-8, fused=True)  # the captions stay as long
    textbook, ours = (
        model.make_step(x, batch, args.amp, criterion, encoder, optimizer)
        for x in (model.plain(decoder), decoder)
    )
    row, busy = compare(stage, textbook, ours, args), busy_seconds(ours, args.device)
    row["epoch"] = row["ours"] * model.COCO_IMAGES / n
    note = f"an epoch of COCO: {row['epoch']:.0f} s, computed from this step"
    if busy is not None:
        row["busy"] = busy / row["ours"]
        note += f"; the GPU computes {row['busy']:.0%} of the time"
    return row | {"note": note}


def _self_critical(n):
    with tempfile.TemporaryDirectory() as folder:
        model.write_data_set(folder, n)
        return SelfCritical(CaptionDataset(folder, "x", "TRAIN"), alpha_c=1.0)


def _agreement(args):
    """Loss, gradients and captions on this device against those of the CPU in float64."""

    def compute(decoder, batch, amp=None):
        loss = model.make_step(decoder, batch, amp)()
        gradient = torch.cat([p.grad.flatten() for p in decoder.parameters()])
        with autocast(gradient.device, amp):
            found = beam_search(decoder, batch.features, model.WORD_MAP, 5)
        return loss.item(), gradient.cpu().double(), [caption.tokens for caption in found]

    cpu = torch.device("cpu")
    decoder, batch = model.decoder_with_realistic_lengths(cpu), model.random_batch(8, 5, cpu)
    exact = compute(decoder.double(), batch._replace(features=batch.features.double()))
    features, captions = batch.features.to(args.device), batch.captions.to(args.device)
    batch, before = (
        batch._replace(features=features, captions=captions),
        torch.get_float32_matmul_precision(),
    )
    for name, precision, amp in (
        ("float32", "highest", None),
        ("TF32", "high", None),
        ("bf16", "high", "bf16"),
    ):
        torch.set_float32_matmul_precision(precision)
        decoder = model.decoder_with_realistic_lengths(args.device)
        loss, gradient, found = compute(decoder, batch, amp)
        torch.set_float32_matmul_precision(before)
        row = {
            "stage": f"{name} against float64 on the CPU",
            "loss_error": abs(loss / exact[0] - 1),
            "gradient_error": float((gradient - exact[1]).norm() / exact[1].norm()),
            "identical": sum(a == b for a, b in zip(found, exact[2])),
        }
        note = (
            "loss {loss_error:.1e}, gradients {gradient_error:.1e} off, {identical} of 8 captions"
        )
        yield row | {"note": note.format(**row) + " identical"}
