"""`beam_search` and `sample`: captions for a batch of images, on the decoder's device."""

from typing import NamedTuple

import numpy as np
import torch

from files import UserError
from models import draw, look_at_likeliest

MAX_LENGTH_PENALTY = 10  # beyond, only the length would count, and powers overflow


def add_search_options(parser):
    """The options of the scripts that search; `search_options` makes beam_search's of them."""
    add = parser.add_argument
    add("--max_len", type=int, default=50, help="longest caption, in words")
    add("--length_penalty", type=float, default=0.0,
        help="rank captions by their score over length to this power; 1: mean per word")
    add("--no_unk", action="store_true", help="never say <unk>")
    add("--attention", choices=("soft", "hard"), default="soft", help="hard: see the most attended "
        "place alone; for models that were trained with --attention hard")


def search_options(args):
    """UserError unless they make sense."""
    if args.max_len < 1:
        raise UserError(f"--max_len is {args.max_len}, it must be at least 1")
    if not 0 <= args.length_penalty <= MAX_LENGTH_PENALTY:
        raise UserError(f"--length_penalty is {args.length_penalty}, it must be 0 to "
                        f"{MAX_LENGTH_PENALTY}")
    return {"max_len": args.max_len, "length_penalty": args.length_penalty, "no_unk": args.no_unk,
            "look": look_at_likeliest if args.attention == "hard" else None}


class Caption(NamedTuple):
    words: list  # T word ids, without <start> and <end>
    alphas: np.ndarray  # (T, P) what was seen for each word; each row sums to 1
    score: float  # total log-probability in nats, <end> included, not divided by length
    finished: bool  # whether <end> was reached
    runners_up: list  # the next best Captions, n_best - 1 at most


@torch.inference_mode()
def beam_search(decoder, features, word_map, beam_size=5, max_len=50, n_best=1,
                length_penalty=0.0, no_unk=False, look=None, watch=None):
    """
    Caption a batch of images; beam_size=1 is greedy decoding.

    decoder: in evaluation mode; features: (N, G, E) annotation vectors
    length_penalty: finished captions are ranked by their score over length ** length_penalty,
    <end> counted; at 1 that is the mean per word
    no_unk: never choose <unk>; probabilities stay as they are
    look: hard attention, see `Attention`; `look_at_likeliest` is the one for tests
    watch: called after each word, for the n images still at work, with the totals and word ids of
    each slot's best continuations, (n, K, C), -inf where there is none, and with the beams kept of
    them: their scores, -inf beyond the beam's width, words and parents, (n, K)

    The rule is the tutorial's: a beam that reaches <end> is set aside and the beam shrinks
    by one; of those set aside the best total log-probability wins. If none has finished
    after max_len words, the best unfinished one is returned.

    Returns N Captions. Raises ValueError if beam_size < 1, if n_best is not 1..beam_size or if
    length_penalty is not 0..10, UserError if the decoder's scores are not finite.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}, it must be at least 1")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best is {n_best}, it must be 1 to beam_size = {beam_size}")
    if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
        raise ValueError(f"length_penalty is {length_penalty}, it must be 0 to "
                         f"{MAX_LENGTH_PENALTY}")
    n, device = len(features), features.device
    if n == 0:
        return []
    start, end = word_map["<start>"], word_map["<end>"]
    image = decoder.annotate(features)
    state = decoder.init_hidden_state(image)
    words = torch.full((n, beam_size), start, device=device)
    # A closed slot has score -inf. At first only slot 0 is open, since all are alike.
    scores = state[0].new_full((n, beam_size), -torch.inf)
    scores[:, 0] = 0
    slots = torch.arange(0, n * beam_size, beam_size, device=device)  # the open ones: M
    width = torch.full((n, 1), beam_size, device=device)  # of each image's beam
    best_finished = scores.new_full((n, n_best), -torch.inf)
    rows = torch.arange(n, device=device)  # which image each row still at work belongs to
    history = []  # per step: the image rows and their (words, parents, scores, alphas)

    for length in range(1, max_len + 1):
        read = decoder.read(words.flatten()[slots], image)
        state, _, seen = decoder.step(read, state, image, words.shape, slots, look)
        log_probs = decoder.scores(state[0]).log_softmax(-1)
        if no_unk:
            log_probs[:, word_map["<unk>"]] = -torch.inf
        scores, words, parents = _extend(scores, log_probs, slots, width, watch)
        history.append((rows, words, parents, scores, _by_slot(seen, slots, words.shape)))

        ended = words == end
        ranks = scores.masked_fill(~ended, -torch.inf) / length ** length_penalty
        best_finished = torch.cat([best_finished, ranks], 1)
        best_finished = best_finished.topk(n_best).values
        scores = scores.masked_fill(ended, -torch.inf)
        width = (scores > -torch.inf).sum(1, keepdim=True)
        # Scores only fall, so an image is done whose open beams, even if all they still lose is
        # made up for by the greatest length, are below the worst finished one wanted.
        at_work = scores.max(1).values / max_len ** length_penalty > best_finished[:, -1]
        source = slots.new_zeros(words.numel()).index_copy(  # slot -> its row in the state
            0, slots, torch.arange(len(slots), device=device))
        first = torch.arange(0, words.numel(), beam_size, device=device).unsqueeze(1)
        source = source[first + parents]  # (N, K): of each slot's parent
        is_open = ((scores > -torch.inf) & at_work.unsqueeze(1)).flatten()
        m, images = torch.stack([is_open.sum(), at_work.sum()]).tolist()  # the word's one host sync
        if m == 0:
            break
        slots = _first(is_open, m)
        state = tuple(x.index_select(0, source.flatten()[slots]) for x in state)
        if images <= len(rows) // 2:  # drop those that are done; each time, the others are copied
            keep = _first(at_work, images)
            place = torch.zeros_like(rows).index_copy(0, keep, torch.arange(images, device=device))
            slots = place[slots // beam_size] * beam_size + slots % beam_size
            rows, words, scores = rows[keep], words[keep], scores[keep]
            best_finished, width, image = best_finished[keep], width[keep], image[keep]
    return _trace(history, end, n, n_best, length_penalty)


def _extend(scores, log_probs, slots, width, watch=None):
    """
    The best continuations of each image's open slots, `width` of them.

    scores (N, K), log_probs (M, V) of the M open slots, width (N, 1)
    Returns scores (-inf beyond the width), words and parents (slots), each (N, K)
    """
    n, k = scores.shape
    # The K best of an image are among the K best of each of its slots.
    best, words = log_probs.topk(min(k, log_probs.shape[1]))  # (M, min(K, V))
    each = best.shape[1]
    total = scores.flatten()[slots].unsqueeze(1) + best
    total = scores.new_full((n * k, each), -torch.inf).index_copy(0, slots, total.to(scores.dtype))
    words = _by_slot(words, slots, (n, k))
    top, index = total.view(n, -1).topk(k)
    top = top.masked_fill(torch.arange(k, device=top.device) >= width, -torch.inf)
    kept = top, words.flatten(1).gather(1, index), index // each
    if watch:
        watch(total.view(n, k, each), words, *kept)
    return kept


def _by_slot(x, slots, shape):
    """(M, ...) of the open slots -> (N, K, ...), zero where a slot is closed"""
    return x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, slots, x).view(*shape, -1)


def _first(mask, count):
    """Where a mask with `count` true values has them; nonzero() would wait for a GPU to count."""
    return mask.byte().argsort(dim=0, descending=True, stable=True)[:count]


def _trace(history, end, n, n_best, length_penalty):
    """Follow the parents back from the winners: N Captions."""
    steps, alpha = len(history), history[0][-1]
    words, parents = np.zeros((2, steps, n, alpha.shape[1]), dtype=np.int64)
    scores = np.full(words.shape, -np.inf)
    alphas = np.zeros((*words.shape, alpha.shape[2]), dtype=np.float32)
    for t, step in enumerate(history):
        rows, *columns = (x.cpu().numpy() for x in step)
        for whole, part in zip((words, parents, scores, alphas), columns):
            whole[t, rows] = part

    finished = (words == end) & (scores > -np.inf)
    captions = []
    for i in range(n):
        lasts = np.argwhere(finished[:, i])  # (step, slot) of every finished beam
        if not len(lasts):
            lasts = np.array([(steps - 1, slot) for slot in range(words.shape[2])
                              if scores[-1, i, slot] > -np.inf])
        if not len(lasts):
            raise UserError("the model's scores are not finite: it is damaged, or too large for "
                            "--amp fp16; leave that out, or pass another --model")
        ranks = scores[lasts[:, 0], i, lasts[:, 1]] / (lasts[:, 0] + 1.0) ** length_penalty
        best = np.argsort(-ranks, kind="stable")[:n_best]
        first, *others = (_path(words[:, i], parents[:, i], scores[:, i], alphas[:, i], end, *last)
                          for last in lasts[best])
        captions.append(first._replace(runners_up=others))
    return captions


def _path(words, parents, scores, alphas, end, step, slot):
    """One image's beam that stands in `slot` after `step`; all but alphas (T, K)"""
    score, finished = float(scores[step, slot]), bool(words[step, slot] == end)
    path, looks = [], []
    for t in range(step, -1, -1):
        path.append(int(words[t, slot]))
        slot = parents[t, slot]
        looks.append(alphas[t, slot])  # where the parent looked when it chose the word
    length = len(path) - finished  # <end> is no word
    alphas = np.array(looks[::-1][:length], dtype=alphas.dtype).reshape(length, alphas.shape[2])
    return Caption(path[::-1][:length], alphas, score, finished, [])


@torch.no_grad()
def sample(decoder, features, word_map, samples, max_len=50):
    """
    Draw captions, word by word, as probable as the decoder holds them: `samples` per image.

    decoder: in evaluation mode; features: (N, G, E)

    Returns captions (N, samples, L) int64, <start> ... <end> <pad>, and their lengths (N, samples)
    on the CPU, <start> and <end> counted, as the decoder's forward takes them. One that has not
    ended after max_len words stops there, without <end>.
    """
    n, device = len(features), features.device
    image = decoder.annotate(features)
    state = tuple(x.repeat_interleave(samples, 0) for x in decoder.init_hidden_state(image))
    captions = torch.full((n * samples, max_len + 1), word_map["<pad>"], device=device)
    captions[:, 0] = word_map["<start>"]
    open_, words = torch.arange(n * samples, device=device), captions[:, 0]
    for t in range(1, max_len + 1):
        read = decoder.read(words, image)
        state, *_ = decoder.step(read, state, image, (n, samples), open_)
        words = draw(decoder.scores(state[0]).softmax(-1))
        captions[open_, t] = words
        going = (words != word_map["<end>"]).nonzero().squeeze(1)
        open_, words, state = open_[going], words[going], tuple(x[going] for x in state)
        if len(open_) == 0:
            break
    ended = captions == word_map["<end>"]
    lengths = torch.where(ended.any(1), ended.byte().argmax(1) + 1, max_len + 1).cpu()
    return captions[:, :lengths.max()].view(n, samples, -1), lengths.view(n, samples)
