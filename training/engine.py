"""One epoch of training, and one validation: what train.py does again and again."""

import signal
import time
from contextlib import nullcontext

import numpy as np
import torch
from torch.nn.utils import clip_grad_value_
from tqdm import tqdm

from evaluation.metrics import CiderD, bleu, top_k_correct
from modeling.beam_search import beam_search
from training.build import half_cosine
from training.losses import Share, doubly_stochastic_loss
from utils import UserError, autocast

SIDES = ("left", "right")  # what mirror images exchange


def train_one_epoch(encoder, decoder, average, objective, loader, optimizer, scaler, args,
                    processes, progress, interrupts, save):
    """
    The batches of an epoch that progress does not count yet; it is kept up to date, and save()
    called as often as the options say. Returns the objective's figures of the epoch, its seconds
    and captions/s.

    Raises UserError where a loss or a weight is not finite, before anything of it is saved, and
    Interrupted after a signal.
    """
    decoder.train(objective.dropout)
    word_map = loader.dataset.word_map
    epoch, first, start = progress["epoch"] + 1, progress["step"], time.perf_counter()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total, correct, words_seen, captions_seen, before = progress["sums"]
    if not processes.is_main:  # those sums are all processes'
        total, correct = 0.0, 0
    steps = first + len(loader)
    # The first batch whose loss is not finite, kept on the device: reading it waits for a GPU.
    bad = torch.full((), steps, device=processes.device)
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch", initial=first, total=steps,
               disable=None if processes.is_main else True)

    def keep_progress(step):
        _check_finite(bad, parameters, epoch, step)
        sums = [*processes.all_reduce(float(total), int(correct)), words_seen, captions_seen,
                before + time.perf_counter() - start]
        progress.update(step=step, sums=sums, baseline=float(objective.baseline))

    with interrupts.held():
        step = first
        for batch, rows in zip(map(list, bar), loader.sampler):
            # The loss is a mean over the words of the joint batch, whoever holds them.
            words, captions, stop, due = processes.all_reduce(
                int((batch[2] - 1).sum()), objective.captions(batch[2]), bool(interrupts.signum),
                processes.is_main and interrupts.due())
            if stop:  # whichever process got the signal, all stop here
                interrupts.signum = interrupts.signum or signal.SIGTERM
                break
            if due and step > first:
                keep_progress(step)
                save()
            # Dropout follows from these alone, so a resumed run draws the same.
            torch.manual_seed(_mix(args.seed, epoch, step, processes.rank))
            _set_learning_rate(optimizer, (epoch - 1) * steps + step, args.epochs * steps, args)
            share = Share(words / processes.world_size, captions / processes.world_size)
            optimizer.zero_grad(set_to_none=True)
            step_loss = 0.0
            if args.augment:
                batch[0] = augment(*batch[:2], word_map)
            for images, *part in _parts(rows, batch, args.accumulate):
                with autocast(processes.device, args.amp):
                    features, part[1] = _encode(encoder, *part[:2], processes.device,
                                                args.fine_tune_encoder)
                    loss, amount, right = objective(decoder, features, *part[1:], images, share)
                scaler.scale(loss).backward()
                step_loss = step_loss + loss.detach()
                total, correct = total + amount, correct + right
            bad = torch.where(step_loss.isfinite(), bad, bad.clamp(max=step))
            scaler.unscale_(optimizer)
            clip_grad_value_(parameters, args.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            average.update((epoch - 1) * steps + step)
            objective.step_done(processes)

            words_seen, captions_seen = words_seen + int(words), captions_seen + int(captions)
            if step % 20 == 0 or processes.device.type == "cpu":
                _check_finite(bad, (), epoch, step + 1)
                if not bar.disable:
                    bar.set_postfix(loss=f"{step_loss.item():.3f}")
            step += 1
        keep_progress(step)
    total, correct, *_, seconds = progress["sums"]
    return {**objective.figures(total, correct, words_seen, captions_seen),
            "train_seconds": seconds, "captions_per_second": captions_seen / seconds}


def _parts(rows, batch, count):
    """A batch's images, captions, ... in so many parts of about the same size."""
    for part in np.array_split(np.arange(len(rows)), count):
        part = slice(part[0], part[-1] + 1)
        yield rows[part], *(x[part] for x in batch)


def augment(images, captions, word_map):
    """
    Random crops of 7/8 of the edge, one half of them mirrored; not where a caption says left or
    right, which would then be wrong.

    images: uint8 (N, 3, S, S); captions: (N, R, L) word ids
    Returns uint8 (N, 3, 7/8 S, 7/8 S).
    """
    size, sides = images.shape[-1], [word_map[word] for word in SIDES if word in word_map]
    says_a_side = torch.isin(captions, torch.tensor(sides, dtype=torch.long)).flatten(1).any(1)
    mirrored = (torch.rand(len(images)) < 0.5) & ~says_a_side
    edge = size * 7 // 8
    corners = torch.randint(size - edge + 1, (len(images), 2))
    crops = (image[:, y:y + edge, x:x + edge] for image, (y, x) in zip(images, corners.tolist()))
    return torch.stack([crop.flip(2) if flip else crop for crop, flip in zip(crops, mirrored)])


def _set_learning_rate(optimizer, step, steps, args):
    if args.cosine:  # else it is where the plateau rule has left it
        for group, peak in zip(optimizer.param_groups, (args.decoder_lr, args.encoder_lr)):
            group["lr"] = peak * half_cosine(step, steps)


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
    Caption every image once without teacher forcing: BLEU-1..4 and CIDEr-D, one of which decides
    which model is the best. Beside them, with teacher forcing: loss, top-5 accuracy, and BLEU-4 as
    the tutorial reports it, of each caption's most likely words given the true ones before them.
    """
    decoder.eval()
    words_of = {i: word for word, i in data.word_map.items()}
    free, forced, loss_sum, correct, words = [], [], 0.0, 0, 0
    all_words = int((data.lengths - 1).sum())
    bar = tqdm(loader, desc="validation", unit="batch", disable=None if processes.is_main else True)
    for (images, captions, lengths), rows in zip(bar, batches):
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
        free += [(data.entry(int(i))["references"], [words_of[word] for word in caption.tokens])
                 for i, caption in zip(rows, found)]
    loss_sum, correct, words = processes.all_reduce(float(loss_sum), int(correct), words)
    free, forced = processes.all_gather(free), processes.all_gather(forced)
    references, captions = zip(*free)
    cider_d = CiderD(references).score(captions, references)
    return {"val_loss": loss_sum, "val_top5": 100 * correct / words,
            "teacher_forced_bleu4": bleu(*zip(*forced))[3],
            **{f"bleu{n}": score for n, score in enumerate(bleu(references, captions), 1)},
            "cider_d": 100 * float(cider_d.mean())}


def _encode(encoder, images, captions, device, fine_tune):
    """A batch on the device; images become features unless they are cached features."""
    images, captions = (x.to(device, non_blocking=True) for x in (images, captions))
    if images.dtype != torch.uint8:
        return images.float(), captions
    with nullcontext() if fine_tune else torch.no_grad():
        return encoder(images), captions
