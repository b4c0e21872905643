"""`train_one_epoch` and `validate`, which train.py calls in turn."""

import math
import signal
import time

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_
from tqdm import tqdm

from datasets import Item, WorkerDied, load_batches
from evaluation.metrics import CiderD, bleu, top_k_correct
from modeling.beam_search import beam_search
from modeling.devices import autocast
from training.losses import Batch, doubly_stochastic_loss
from utils import UserError

SIDES = ("left", "right")  # words that are wrong for a mirrored image
CHECK_EVERY = 20  # steps between checks of the loss on a GPU, since each check waits for it


def train_one_epoch(state, loader, epoch, run):
    """
    Train on the batches of an epoch that state.progress does not count as done, update progress and
    save as often as the options say.

    state: TrainingState; run: Run, which handles signals and saves

    Returns the criterion's metrics of the epoch, the learning rate, seconds and captions/s.
    Raises UserError if a loss or weight is not finite, before it is saved, and Interrupted after a
    signal.
    """
    args, processes, progress = state.args, state.processes, state.progress
    state.decoder.train(state.criterion.dropout)
    state.criterion.sampling_prob = scheduled_sampling_prob(args, epoch)
    loader.sampler.epoch, loader.sampler.start = epoch, progress.step
    first_step, steps = progress.step, loader.sampler.num_batches
    totals = EpochTotals(progress.sums, processes)
    bar = tqdm(
        load_batches(loader),
        desc=f"epoch {epoch}",
        unit="batch",
        initial=first_step,
        total=steps,
        disable=None if processes.is_main else True,
    )

    def update_progress(step):
        sums = totals.sums()
        if not math.isfinite(sums[0]):
            raise _not_finite("the loss", epoch, step)
        if not all(bool(p.isfinite().all()) for p in state.parameters):
            raise _not_finite("a weight", epoch, step)
        progress.step, progress.sums = step, sums
        progress.baseline = float(state.criterion.baseline)

    with run.interrupts.deferred():
        step = first_step
        try:
            for images, captions, lengths, indices in bar:
                # The loss is a mean over the tokens of the joint batch of all processes.
                num_tokens, num_captions, stop, save_due = processes.all_reduce(
                    int((lengths - 1).sum()),
                    state.criterion.count_captions(lengths),
                    bool(run.interrupts.signum),
                    processes.is_main and run.interrupts.save_due(),
                )
                if stop:  # some process got a signal: all of them stop at this step
                    run.interrupts.signum = run.interrupts.signum or signal.SIGTERM
                    break
                if save_due and step > first_step:
                    update_progress(step)
                    run.save()
                # Dropout depends on these numbers alone, so a resumed run has the same.
                torch.manual_seed(derive_seed(args.seed, epoch, step, processes.rank))
                if args.augment:
                    images = augment(images, captions, loader.dataset.word_map)
                loss, total, correct = train_step(
                    state,
                    Item(images, captions, lengths, indices),
                    num_tokens / processes.world_size,
                    num_captions / processes.world_size,
                )
                totals.add(total, correct, num_tokens, num_captions)
                if step % CHECK_EVERY == 0 or processes.device.type == "cpu":
                    if not math.isfinite(loss + totals.total):  # of this step and those before it
                        raise _not_finite("the loss", epoch, step + 1)
                    if not bar.disable:
                        bar.set_postfix(loss=f"{loss.item():.3f}")
                step += 1
        except WorkerDied:  # between two steps, so what is done is whole
            update_progress(step)
            raise
        update_progress(step)
    total, correct, tokens, captions, seconds = progress.sums
    return {
        "lr": state.last_lr,
        **state.criterion.metrics(total, correct, tokens, captions),
        "train_seconds": seconds,
        "captions_per_second": captions / seconds,
    }


def _not_finite(what, epoch, step):
    return UserError(
        f"epoch {epoch}, batch {step}: {what} is not finite; the checkpoints were not changed; try "
        f"a lower --decoder_lr"
    )


def train_step(state, batch, num_tokens, num_captions):
    """
    One step of the optimizer. batch: N items of `CaptionDataset`; num_tokens, num_captions: as in
    `Batch`

    Returns the loss (a scalar without gradient), and the criterion's total and correct.
    """
    args, processes, optimizer = state.args, state.processes, state.optimizer
    loss_sum = total = correct = 0
    optimizer.zero_grad(set_to_none=True)
    for part in micro_batches(batch, args.accumulate):
        with autocast(processes.device, args.amp):
            part = encode(state.parallel_cells, part, processes.device, num_tokens, num_captions)
            loss, part_total, part_correct = state.criterion(state.parallel_decoder, part)
        state.scaler.scale(loss).backward()
        loss_sum = loss_sum + loss.detach()
        total, correct = total + part_total, correct + part_correct
    state.scaler.unscale_(optimizer)
    clip_grad_value_(state.parameters, args.grad_clip)
    state.scaler.step(optimizer)
    state.scaler.update()
    state.after_step()
    return loss_sum, total, correct


def scheduled_sampling_prob(args, epoch):
    """It rises by --sampling_step after every --sampling_every epochs, up to --sampling_max."""
    return min(args.sampling_max, args.sampling_step * ((epoch - 1) // args.sampling_every))


def derive_seed(*numbers):
    """One seed computed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def micro_batches(batch, count):
    """Yield the items of a batch in `count` parts of about the same number."""
    for part in np.array_split(np.arange(len(batch.indices)), count):
        yield Item(*(field[part[0] : part[-1] + 1] for field in batch))


def encode(cells, batch, device, num_tokens, num_captions):
    """
    The `Batch` on the device, with features of the images, from a batch of `CaptionDataset`, whose
    images may already be features. cells: of the encoder; num_tokens, num_captions: as in `Batch`
    """
    images, captions, lengths, indices = batch
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    features = cells(images) if images.dtype == torch.uint8 else images.float()
    return Batch(features, captions, lengths, indices.numpy(), num_tokens, num_captions)


def augment(images, captions, word_map):
    """
    Random crops of 7/8 of the width and height, half of them mirrored, but never images with a
    caption that contains left or right.

    images: uint8 (N, 3, S, S); captions: (N, R, L) token ids
    Returns uint8 (N, 3, 7/8 S, 7/8 S).
    """
    from torchvision.transforms import v2  # only here: --help need not wait 2 s for it

    sides = torch.tensor([word_map[word] for word in SIDES if word in word_map], dtype=torch.long)
    has_side = torch.isin(captions, sides).flatten(1).any(1)
    crop = v2.RandomCrop(images.shape[-1] * 7 // 8)
    crop_and_flip = v2.Compose([crop, v2.RandomHorizontalFlip()])
    return torch.stack(
        [(crop if side else crop_and_flip)(image) for image, side in zip(images, has_side.tolist())]
    )


class EpochTotals:
    """
    Sums over an epoch, for its metrics: loss or reward, correct tokens, tokens, captions, seconds.

    initial: these five numbers for the batches already done, of all processes
    """

    def __init__(self, initial, processes):
        self.total, self.correct, self.tokens, self.captions, self._seconds = initial
        if not processes.is_main:  # `sums` adds up all processes
            self.total, self.correct = 0.0, 0
        self._processes, self._start = processes, time.perf_counter()

    def add(self, total, correct, tokens, captions):
        """total and correct of this process, as tensors; tokens and captions of all processes"""
        self.total, self.correct = self.total + total, self.correct + correct
        self.tokens, self.captions = self.tokens + int(tokens), self.captions + int(captions)

    def sums(self):
        seconds = self._seconds + time.perf_counter() - self._start
        return [
            *self._processes.all_reduce(float(self.total), int(self.correct)),
            self.tokens,
            self.captions,
            seconds,
        ]


@torch.inference_mode()
def validate(state, loader):
    """
    Caption every image once without teacher forcing, for BLEU-1..4 and CIDEr-D, one of which
    decides which model is the best (see `generated_metrics`). Also, with teacher forcing: loss,
    top-5 accuracy, and BLEU-4 as the tutorial reports it, of the most likely token after each true
    beginning.

    state: TrainingState, whose averaged models are validated
    Returns these metrics by their names in the log.
    """
    args, processes, data = state.args, state.processes, loader.dataset
    encoder, decoder = state.averaged_encoder, state.averaged_decoder.eval()
    word_of = {i: word for word, i in data.word_map.items()}
    generated, teacher_forced, loss, correct, tokens = [], [], 0.0, 0, 0
    num_tokens, num_captions = int((data.lengths - 1).sum()), int((data.lengths > 1).sum())
    bar = tqdm(
        load_batches(loader),
        total=len(loader),
        desc="validation",
        unit="batch",
        disable=None if processes.is_main else True,
    )
    for batch in bar:
        with autocast(processes.device, args.amp):
            batch = encode(encoder.cells, batch, processes.device, num_tokens, num_captions)
            output = decoder(batch.features, batch.captions, batch.lengths)
            hypotheses = beam_search(decoder, batch.features, data.word_map, args.val_beam_size)
        # This batch's share of the mean over all validation captions.
        loss += doubly_stochastic_loss(
            output, batch.lengths, args.alpha_c, num_tokens, num_captions
        )
        correct += top_k_correct(output.logits, output.targets)
        tokens += len(output.targets)
        teacher_forced += _teacher_forced(output.logits.argmax(1), output.targets, batch.lengths)
        generated += [
            (int(i), [word_of[id] for id in caption.tokens])
            for i, caption in zip(batch.indices, hypotheses)
        ]
    loss, correct, tokens = processes.all_reduce(float(loss), int(correct), tokens)
    generated = processes.all_gather(generated)
    teacher_forced = processes.all_gather(teacher_forced)
    return {
        "val_loss": loss,
        "val_top5": 100 * correct / tokens,
        "teacher_forced_bleu4": bleu(*zip(*teacher_forced))[3],
        **generated_metrics([(data.entry(i), words) for i, words in generated]),
    }


def generated_metrics(generated):
    """
    BLEU-1..4 and CIDEr-D by their names in the log. If the images come from several sources, these
    are means over the sources, so that none decides alone because it is large; each source's own
    have its name, as in cider_d_coco.

    generated: pairs of an image's entry in REFERENCES and the words of its caption
    """
    by_source = {}
    for entry, words in generated:
        pairs = by_source.setdefault(entry.get("source"), [])
        pairs.append((entry["references"], words))
    metrics = {}
    for source, pairs in by_source.items():
        references, captions = zip(*pairs)
        cider_d = CiderD(references).score(captions, references)
        scores = bleu(references, captions)
        metrics[source] = {
            **{f"bleu{n}": score for n, score in enumerate(scores, 1)},
            "cider_d": 100 * float(cider_d.mean()),
        }
    if len(metrics) == 1:
        return metrics[source]
    names = metrics[source].keys()
    return {
        **{name: sum(values[name] for values in metrics.values()) / len(metrics) for name in names},
        **{
            f"{name}_{source}": values[name] for source, values in metrics.items() for name in names
        },
    }


def _teacher_forced(predicted, targets, lengths):
    """
    Pairs for BLEU, one per caption: its image's references and its most likely tokens, as strings.

    predicted, targets: (W,) ids, caption by caption; lengths (N, R)
    """
    decode_lengths, r = (lengths - 1).flatten().tolist(), lengths.shape[1]
    references, hypotheses = (
        [list(map(str, caption.tolist())) for caption in ids.split(decode_lengths)]
        for ids in (targets, predicted)
    )
    return [
        (references[i - i % r : i - i % r + r], hypothesis)
        for i, hypothesis in enumerate(hypotheses)
        if hypothesis
    ]
