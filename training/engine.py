"""`train_one_epoch` and `validate`, which train.py calls in turn."""

import signal
import time

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_
from tqdm import tqdm

from datasets import Item
from evaluation.metrics import CiderD, bleu, top_k_correct
from modeling.beam_search import beam_search
from modeling.devices import autocast
from modeling.workers import WorkerDied, load_batches
from training.interrupts import Interrupted
from training.losses import Batch, doubly_stochastic_loss
from utils import UserError

SIDES = ("left", "right")  # words that are wrong for a mirrored image
CHECK_EVERY = 20  # steps between checks of the loss on a GPU, since each check waits for it


def train_one_epoch(state, loader, epoch, run):
    """
    Train on the batches of an epoch that state.progress does not count as done; run, a Run, handles
    signals and saves. Returns the epoch's figures for the log. UserError if a loss or weight is not
    finite, before it is saved; Interrupted after a signal.
    """
    args, processes, criterion = state.args, state.processes, state.criterion
    state.decoder.train(criterion.dropout)
    criterion.sampling_prob = scheduled_sampling_prob(args, epoch)
    step = first_step = state.progress.step
    loader.sampler.epoch, loader.sampler.start = epoch, first_step
    totals = EpochTotals(state, epoch)
    extent = {"initial": first_step, "total": state.steps_per_epoch}
    batches = load_batches(loader)
    bar = progress_bar(None, processes, desc=f"epoch {epoch}", **extent)
    with run.interrupts.deferred(), bar:
        while step < state.steps_per_epoch:
            died, counts = None, (0, 0)
            try:
                with run.interrupts.waiting():
                    images, captions, lengths, indices = next(batches)
                counts = int((lengths - 1).sum()), criterion.count_captions(lengths)
            except WorkerDied as error:
                died = error
            except Interrupted:
                pass
            # The loss is a mean over the tokens of the joint batch of all processes.
            num_tokens, num_captions, stop, save_due = processes.all_reduce(
                *counts,
                bool(died or run.interrupts.signum),
                processes.is_main and run.save_due(),
            )
            if stop:  # some process got a signal or no batch: all of them stop at this step
                break
            if save_due and step > first_step:
                totals.update_progress(step)
                run.save()
            # Dropout depends on this seed alone, so that of a resumed run is the same.
            torch.manual_seed(derive_seed(args.seed, epoch, step, processes.rank))
            if args.augment:
                images = augment(images, captions, loader.dataset.word_map)
            batch = Item(images, captions, lengths, indices)
            divisors = num_tokens / processes.world_size, num_captions / processes.world_size
            loss, total, correct = train_step(state, batch, *divisors)
            totals.add(total, correct, int(num_tokens), int(num_captions))
            if step % CHECK_EVERY == 0 or processes.device.type == "cpu":
                totals.check_finite(loss + totals.total, step + 1)
                bar.set_postfix(loss=f"{loss.item():.3f}")
            step += 1
            bar.update()
        totals.update_progress(step)
        if step < state.steps_per_epoch:
            raise died or Interrupted(run.interrupts.signum or signal.SIGTERM)
    total, correct, tokens, captions, seconds = state.progress.sums
    return {
        "lr": state.last_lr,
        **criterion.metrics(total, correct, tokens, captions),
        "train_seconds": seconds,
        "captions_per_second": captions / seconds,
    }


def progress_bar(batches, processes, **options):
    """tqdm's, in the main process if it has a terminal"""
    return tqdm(batches, unit="batch", disable=None if processes.is_main else True, **options)


def train_step(state, batch, num_tokens, num_captions):
    """One step of the optimizer. Returns the loss, detached, and the criterion's total, correct."""
    args, device = state.args, state.processes.device
    loss_sum = total = correct = 0
    state.before_step()
    state.optimizer.zero_grad(set_to_none=True)
    for part in zip(*(field.tensor_split(args.accumulate) for field in batch)):
        with autocast(device, args.amp):
            part = encode(state.parallel_cells, Item(*part), device, num_tokens, num_captions)
            loss, part_total, part_correct = state.criterion(state.parallel_decoder, part)
        state.scaler.scale(loss).backward()
        loss_sum = loss_sum + loss.detach()
        total, correct = total + part_total, correct + part_correct
    state.scaler.unscale_(state.optimizer)
    clip_grad_value_(state.parameters, args.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.after_step()
    return loss_sum, total, correct


def scheduled_sampling_prob(args, epoch):
    """It rises by --sampling_step every --sampling_every epochs, up to --sampling_max."""
    return min(args.sampling_max, args.sampling_step * ((epoch - 1) // args.sampling_every))


def derive_seed(*numbers):
    """One seed computed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def encode(cells, batch, device, num_tokens, num_captions):
    """An Item as a `Batch`; images may be features already; cells: the encoder's method"""
    images, captions, lengths, indices = batch
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    features = cells(images) if images.dtype == torch.uint8 else images.float()
    return Batch(features, captions, lengths, indices.numpy(), num_tokens, num_captions)


def augment(images, captions, word_map):
    """
    Random crops of 7/8 of the width and height, uint8 (N, 3, S, S) -> (N, 3, 7/8 S, 7/8 S), half of
    them mirrored, but never images with a caption (N, R, L) that contains left or right.
    """
    from torchvision.transforms import v2  # only here: --help need not wait 2 s for it

    sides = torch.tensor([word_map[word] for word in SIDES if word in word_map], dtype=torch.long)
    has_side = torch.isin(captions, sides).flatten(1).any(1)
    crop = v2.RandomCrop(images.shape[-1] * 7 // 8)
    crop_and_flip = v2.Compose([crop, v2.RandomHorizontalFlip()])
    pairs = zip(images, has_side.tolist())
    return torch.stack([(crop if side else crop_and_flip)(image) for image, side in pairs])


class EpochTotals:
    """Sums over an epoch; `Progress.sums` has those of the batches done, over all processes."""

    def __init__(self, state, epoch):
        self._state, self._epoch, self._start = state, epoch, time.perf_counter()
        self.total, self.correct, self.tokens, self.captions, self._seconds = state.progress.sums
        if not state.processes.is_main:  # `update_progress` adds up all processes
            self.total, self.correct = 0.0, 0

    def add(self, total, correct, tokens, captions):
        """total and correct of this process, as tensors; tokens and captions of all processes"""
        self.total, self.correct = self.total + total, self.correct + correct
        self.tokens, self.captions = self.tokens + tokens, self.captions + captions

    def update_progress(self, step):
        """Count the batches before `step` as done; UserError if loss or weights are not finite."""
        sums = self._state.processes.all_reduce(float(self.total), int(self.correct))
        self.check_finite(sums[0], step)
        for weight in self._state.parameters:
            self.check_finite(weight, step, "a weight")
        seconds = self._seconds + time.perf_counter() - self._start
        progress = self._state.progress
        progress.step, progress.sums = step, [*sums, self.tokens, self.captions, seconds]
        progress.baseline = float(self._state.criterion.baseline)

    def check_finite(self, value, step, what="the loss"):
        if not torch.as_tensor(value).isfinite().all():
            raise UserError(
                f"epoch {self._epoch}, batch {step}: {what} is not finite; the checkpoints were "
                f"not changed; try a lower --decoder_lr"
            )


@torch.inference_mode()
def validate(state, loader):
    """
    Metrics of the averaged models by their names in the log: `generated_metrics` of one caption per
    image, found by beam search, one of which decides which model is the best; and, with teacher
    forcing, loss, top-5 accuracy and BLEU-4 as the tutorial reports it.
    """
    args, processes, data = state.args, state.processes, loader.dataset
    encoder, decoder = state.averaged_encoder, state.averaged_decoder.eval()
    word_of = {i: word for word, i in data.word_map.items()}
    generated, teacher_forced, loss, correct, tokens = [], [], 0.0, 0, 0
    num_tokens, num_captions = int((data.lengths - 1).sum()), int((data.lengths > 1).sum())
    batches = load_batches(loader)
    for batch in progress_bar(batches, processes, desc="validation", total=len(loader)):
        with autocast(processes.device, args.amp):
            batch = encode(encoder.cells, batch, processes.device, num_tokens, num_captions)
            output = decoder(batch.features, batch.captions, batch.lengths)
            hypotheses = beam_search(decoder, batch.features, data.word_map, args.val_beam_size)
        loss += doubly_stochastic_loss(
            output, batch.lengths, args.alpha_c, batch.num_tokens, batch.num_captions
        )
        correct += top_k_correct(output.logits, output.targets)
        tokens += len(output.targets)
        teacher_forced += teacher_forced_pairs(output, batch.lengths)
        for image, caption in zip(batch.indices, hypotheses):
            generated.append((int(image), [word_of[token] for token in caption.tokens]))
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
    BLEU-1..4 and CIDEr-D of pairs of an image's entry in REFERENCES and the words of its caption.
    If the images come from several sources, these are means over the sources, so that a large one
    does not decide alone; the metrics of each source have its name, as in cider_d_coco.
    """
    by_source = {}
    for entry, words in generated:
        by_source.setdefault(entry.get("source"), []).append((entry["references"], words))
    metrics = {}
    for source, pairs in by_source.items():
        references, captions = zip(*pairs)
        metrics[source] = {f"bleu{n}": x for n, x in enumerate(bleu(references, captions), 1)}
        cider_d = CiderD(references).score(captions, references)
        metrics[source]["cider_d"] = 100 * float(cider_d.mean())
    names, count = metrics[source].keys(), len(metrics)
    means = {name: sum(values[name] for values in metrics.values()) / count for name in names}
    if count > 1:
        for source, values in metrics.items():
            means |= {f"{name}_{source}": value for name, value in values.items()}
    return means


def teacher_forced_pairs(output, lengths):
    """
    Pairs for BLEU, one per caption that is not a repetition: its image's references, and the most
    likely token after each true beginning, all as strings. lengths: (N, R)
    """
    sizes, r = (lengths - 1).flatten().tolist(), lengths.shape[1]
    references, hypotheses = (
        [list(map(str, caption.tolist())) for caption in ids.split(sizes)]
        for ids in (output.targets, output.logits.argmax(1))
    )
    starts = (i - i % r for i in range(len(hypotheses)))
    pairs = [(references[i : i + r], caption) for i, caption in zip(starts, hypotheses)]
    return [pair for pair in pairs if pair[1]]
