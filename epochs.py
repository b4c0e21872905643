"""One epoch of training, and one validation: what train.py does again and again."""

import signal
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_
from tqdm import tqdm

from files import UserError
from metrics import bleu, top_k_correct
from models import doubly_stochastic_loss
from search import beam_search
from utils import autocast


def train_one_epoch(encoder, decoder, loader, optimizer, scaler, args, processes, progress,
                    interrupts, save):
    """
    The batches of an epoch that progress does not count yet; it is kept up to date, and save()
    called as often as the options say. Returns the epoch's mean loss per word, top-5 accuracy (%),
    seconds and captions/s.

    Raises UserError where a loss or a weight is not finite, before anything of it is saved, and
    Stopped after a signal.
    """
    decoder.train()
    epoch, first, start = progress["epoch"] + 1, progress["step"], time.perf_counter()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    loss_sum, correct, words_seen, captions_seen, before = progress["sums"]
    if not processes.first:  # those sums are all processes'
        loss_sum, correct = 0.0, 0
    steps = first + len(loader)
    # The first batch whose loss is not finite, kept on the device: reading it waits for a GPU.
    bad = torch.full((), steps, device=processes.device)
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch", initial=first, total=steps,
               disable=None if processes.first else True)

    def keep_progress(step):
        _check_finite(bad, parameters, epoch, step)
        sums = [*processes.sum(float(loss_sum), int(correct)), words_seen, captions_seen,
                before + time.perf_counter() - start]
        progress.update(step=step, sums=sums)

    with interrupts.held():
        step = first
        for images, captions, lengths in bar:
            # The loss is a mean over the words of the joint batch, whoever holds them.
            words, rows, stop, due = processes.sum(
                int((lengths - 1).sum()), lengths.numel(), bool(interrupts.signum),
                processes.first and interrupts.due())
            if stop:  # whichever process got the signal, all stop here
                interrupts.signum = interrupts.signum or signal.SIGTERM
                break
            if due and step > first:
                keep_progress(step)
                save()
            # Dropout follows from these alone, so a resumed run draws the same.
            torch.manual_seed(_mix(args.seed, epoch, step, processes.rank))
            with autocast(processes.device, args.amp):
                features, captions = _encode(
                    encoder, images, captions, processes.device, args.fine_tune_encoder)
                scores, targets, alphas = decoder(features, captions, lengths)
                # Processes average their gradients, hence each divides by its fair share.
                loss = doubly_stochastic_loss(scores, targets, alphas, args.alpha_c,
                                              words / processes.world, rows / processes.world)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_value_(parameters, args.grad_clip)
            scaler.step(optimizer)
            scaler.update()

            loss = loss.detach()
            loss_sum += loss * words / processes.world
            bad = torch.where(loss.isfinite(), bad, bad.clamp(max=step))
            correct += top_k_correct(scores.detach(), targets)
            words_seen, captions_seen = words_seen + int(words), captions_seen + int(rows)
            if step % 20 == 0 or processes.device.type == "cpu":
                _check_finite(bad, (), epoch, step + 1)
                if not bar.disable:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
            step += 1
        keep_progress(step)
    loss_sum, correct, *_, seconds = progress["sums"]
    return {"train_loss": loss_sum / words_seen, "train_top5": 100 * correct / words_seen,
            "train_seconds": seconds, "captions_per_second": captions_seen / seconds}


def _check_finite(bad, parameters, epoch, done):
    """UserError if one of the batches done was bad, or if a weight is not finite after them."""
    batch, what = int(bad) + 1, "the loss"
    if batch > done:
        if all(bool(p.isfinite().all()) for p in parameters):
            return
        batch, what = done, "a weight"
    raise UserError(f"epoch {epoch}, batch {batch}: {what} is not finite; the checkpoints are as "
                    f"they were before; try a lower --decoder_lr")


def _mix(*numbers):
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@torch.inference_mode()
def validate(encoder, decoder, loader, batches, data, args, processes):
    """
    Caption every image once without teacher forcing: BLEU-1..4, which decide. Beside them,
    with teacher forcing: loss, top-5 accuracy, and BLEU-4 as the tutorial reports it, of each
    caption's most likely words given the true ones before them.
    """
    decoder.eval()
    words_of = {i: word for word, i in data.word_map.items()}
    free, forced, loss_sum, correct, words = [], [], 0.0, 0, 0
    all_words = int((data.lengths - 1).sum())
    bar = tqdm(loader, desc="validation", unit="batch", disable=None if processes.first else True)
    for rows, (images, captions, lengths) in zip(batches, bar):
        with autocast(processes.device, args.amp):
            features, captions = _encode(encoder, images, captions, processes.device, False)
            scores, targets, alphas = decoder(features, captions, lengths)
            found = beam_search(decoder, features, data.word_map, args.val_beam_size)
        # A share of the loss of all validation captions, however they are batched.
        loss_sum += doubly_stochastic_loss(scores, targets, alphas, args.alpha_c, all_words,
                                           len(data.lengths))
        correct += top_k_correct(scores, targets)
        words += len(targets)
        ends = (lengths - 1).flatten().tolist()
        references = [list(map(str, t.tolist())) for t in targets.split(ends)]
        hypotheses = [list(map(str, t.tolist())) for t in scores.argmax(1).split(ends)]
        r = captions.shape[1]
        forced += [(references[i - i % r:i - i % r + r], hypothesis)
                   for i, hypothesis in enumerate(hypotheses)]
        free += [(data.entry(int(i))["references"], [words_of[word] for word in caption.words])
                 for i, caption in zip(rows, found)]
    loss_sum, correct, words = processes.sum(float(loss_sum), int(correct), words)
    free, forced = processes.gather(free), processes.gather(forced)
    scores = bleu(*zip(*free))
    return {"val_loss": loss_sum, "val_top5": 100 * correct / words,
            "teacher_forced_bleu4": bleu(*zip(*forced))[3],
            **{f"bleu{n}": score for n, score in enumerate(scores, 1)}}


def _encode(encoder, images, captions, device, fine_tune):
    """A batch on the device; images become features unless they are cached features."""
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    if images.dtype != torch.uint8:
        return images.float(), captions
    with nullcontext() if fine_tune else torch.no_grad():
        return encoder(images), captions
