"""
`beam_search`: the most probable captions of a batch of images, on the decoder's device; and
`draw_captions`, drawn at random.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from modeling.sampling import (
    Sampling,
    ban_repeated_ngrams,
    most_likely_location,
    sample_captions,
)
from utils import Number, UserError, non_negative_int, positive_int

MAX_LENGTH_PENALTY = 10  # beyond it only the length would count, and powers overflow


def add_search_options(parser, no_unk=False):
    """
    The options of beam search; `search_options` turns them into its keyword arguments.

    no_unk: the default of --no_unk
    """
    add = parser.add_argument_group("search").add_argument
    add("--max_len", type=positive_int, default=50, help="longest caption, in words")
    add(
        "--length_penalty",
        type=Number(float, least=0, most=MAX_LENGTH_PENALTY),
        default=0.0,
        help="rank captions by their score over length to this power; 1: mean per word",
    )
    add("--no_unk", action="store_true", default=no_unk, help="never say <unk>")
    add(
        "--no_repeat_ngram",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="say no N words twice in the same order; 0: allowed",
    )
    add(
        "--sample",
        action="store_true",
        help="draw captions at random, the same ones with the "
        "same --seed, instead of searching for the most probable one",
    )
    add(
        "--temperature",
        type=Number(float, above=0, most=100),
        default=1.0,
        help="--sample: above 1 more varied, below 1 safer",
    )
    add(
        "--top_p",
        type=Number(float, above=0, most=1),
        default=1.0,
        help="--sample: only from the likeliest words that together have this probability",
    )
    add(
        "--unk",
        dest="no_unk",
        action="store_false",
        default=argparse.SUPPRESS,
        help="say <unk> where no known word is as likely, as in the tutorial",
    )
    add(
        "--attention",
        choices=("soft", "hard"),
        default="soft",
        help="hard: look at the most "
        "attended location alone; for models that were trained with --attention hard",
    )


def search_options(args):
    """
    The keyword arguments of `find_captions` from the options of `add_search_options`; UserError if
    they contradict each other.
    """
    if args.sample and (args.length_penalty or args.attention == "hard"):
        raise UserError(
            "--length_penalty and --attention hard are for the search, not for "
            "--sample; leave one out"
        )
    if not args.sample and (args.temperature, args.top_p) != (1, 1):
        raise UserError("--temperature and --top_p are for --sample; add it or leave them out")
    if args.sample:
        return {
            "max_len": args.max_len,
            "no_unk": args.no_unk,
            "no_repeat_ngram": args.no_repeat_ngram,
            "sampling": Sampling(args.temperature, args.top_p),
        }
    return {
        "max_len": args.max_len,
        "length_penalty": args.length_penalty,
        "no_unk": args.no_unk,
        "no_repeat_ngram": args.no_repeat_ngram,
        "hard_attention": most_likely_location if args.attention == "hard" else None,
    }


class Caption(NamedTuple):
    tokens: list  # T ids, without <start> and <end>
    alphas: np.ndarray  # (T, P) the context vector's weights for each token; rows sum to 1
    score: float  # total log-probability in nats, <end> included, not divided by length
    finished: bool  # whether <end> was reached
    alternatives: list  # the next best Captions, n_best - 1 at most


def find_captions(decoder, features, word_map, beam_size=5, sampling=None, **options):
    """`beam_search`, or with a `Sampling` captions drawn at random: N Captions."""
    if sampling is None:
        return beam_search(decoder, features, word_map, beam_size, **options)
    return draw_captions(decoder, features, word_map, sampling, **options)


@torch.inference_mode()
def draw_captions(
    decoder, features, word_map, sampling, max_len=50, n_best=1, no_unk=False, no_repeat_ngram=0
):
    """
    Draw n_best captions for each image at random; see `sample_captions`, whose draws are those of
    torch's generator. Returns N Captions: of each image's the most probable one, the others as its
    alternatives. Scores are the model's own log-probabilities, whatever the temperature.
    """
    if len(features) == 0:
        return []
    if n_best < 1 or max_len < 1:
        raise ValueError(f"n_best is {n_best}, max_len {max_len}: they must be at least 1")
    tokens, lengths = sample_captions(
        decoder, features, word_map, n_best, max_len, sampling, no_unk, no_repeat_ngram
    )
    logits, targets, alphas = decoder(features, tokens, lengths)
    log_probs = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).double()
    counts = (lengths - 1).flatten().tolist()
    scores = torch.stack([part.sum() for part in log_probs.split(counts)]).view(lengths.shape)
    tokens, alphas, end = tokens.tolist(), alphas.float().cpu().numpy(), word_map["<end>"]
    captions = []
    for i in range(len(features)):
        drawn = []
        for r, length in enumerate(lengths[i].tolist()):
            path = tokens[i][r][1:length]
            finished = path[-1] == end
            path = path[:-1] if finished else path[:max_len]
            drawn.append(
                Caption(path, alphas[i, r, : len(path)], float(scores[i, r]), finished, [])
            )
        first, *others = sorted(drawn, key=lambda caption: -caption.score)
        captions.append(first._replace(alternatives=others))
    return captions


@torch.inference_mode()
def beam_search(
    decoder,
    features,
    word_map,
    beam_size=5,
    max_len=50,
    n_best=1,
    length_penalty=0.0,
    no_unk=False,
    no_repeat_ngram=0,
    hard_attention=None,
    callback=None,
):
    """
    Caption a batch of images; beam_size=1 is greedy decoding.

    decoder: in evaluation mode; features: (N, G, E) annotation vectors
    length_penalty: finished captions are ranked by their score over length ** length_penalty,
    <end> counted; at 1 that is the mean per word
    no_unk: never choose <unk>; probabilities stay as they are
    no_repeat_ngram: never choose a token that would repeat so many in the same order; 0: allowed
    hard_attention: see `Attention`; at test time it is `most_likely_location`
    callback: called after each step, for the n images still active, with five tensors: scores and
    tokens of each slot's best continuations, (n, K, C), scores -inf for closed slots; and scores,
    tokens and parents of the beams kept from them, (n, K), scores -inf beyond the image's width

    The rule is the tutorial's: a beam that reaches <end> is set aside, and the search continues
    with one beam less; of those set aside, the best total log-probability wins. A caption has at
    most max_len words, and <end> may follow them; if none has finished, the best unfinished one of
    max_len words is returned.

    Returns N Captions. Raises ValueError if beam_size or max_len < 1, if n_best is not
    1..beam_size or if length_penalty is not 0..10, UserError if the decoder's logits are not
    finite.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}, it must be at least 1")
    if max_len < 1:
        raise ValueError(f"max_len is {max_len}, it must be at least 1")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best is {n_best}, it must be 1 to beam_size = {beam_size}")
    if not 0 <= length_penalty <= MAX_LENGTH_PENALTY:
        raise ValueError(
            f"length_penalty is {length_penalty}, it must be 0 to {MAX_LENGTH_PENALTY}"
        )
    n, device = len(features), features.device
    if n == 0:
        return []
    start, end = word_map["<start>"], word_map["<end>"]
    annotations, to_logits = decoder.encode_memory(features), decoder.to_logits()
    state = decoder.init_hidden_state(annotations)
    tokens = torch.full((n, beam_size), start, device=device)
    # A closed slot has score -inf. At first only slot 0 is open, since all would be equal.
    scores = state[0].new_full((n, beam_size), -torch.inf)
    scores[:, 0] = 0
    slots = torch.arange(0, n * beam_size, beam_size, device=device)  # the M open ones
    width = torch.full((n, 1), beam_size, device=device)  # beams left for each image
    best_finished = scores.new_full((n, n_best), -torch.inf)
    rows = torch.arange(n, device=device)  # the image of each row still active
    paths = tokens.new_zeros(n, beam_size, 0)  # each slot's tokens so far, with no_repeat_ngram
    history = []  # per step: rows and their tokens, parents, scores, alphas

    for length in range(1, max_len + 2):  # <end> counts as a token, not as a word
        token_gates = decoder.embed_to_gates(tokens.flatten()[slots], annotations)
        state, _, weights = decoder.step(
            token_gates, state, annotations, tokens.shape, slots, hard_attention
        )
        log_probs = to_logits(state[0]).log_softmax(-1)
        if no_unk:
            log_probs[:, word_map["<unk>"]] = -torch.inf
        if no_repeat_ngram:
            ban_repeated_ngrams(log_probs, paths.flatten(0, 1)[slots], no_repeat_ngram)
        scores, tokens, parents = _extend(scores, log_probs, slots, width, callback)
        history.append(
            (rows, tokens, parents, scores, _scatter_to_slots(weights, slots, tokens.shape))
        )

        if no_repeat_ngram:
            parent_paths = paths.gather(1, parents.unsqueeze(2).expand(-1, -1, length - 1))
            paths = torch.cat([parent_paths, tokens.unsqueeze(2)], 2)
        ended = tokens == end
        ranks = scores.masked_fill(~ended, -torch.inf) / length**length_penalty
        best_finished = torch.cat([best_finished, ranks], 1)
        best_finished = best_finished.topk(n_best).values
        scores = scores.masked_fill(ended, -torch.inf)
        width = (scores > -torch.inf).sum(1, keepdim=True)
        # Scores only decrease, so an image is done once its best open beam, even at the most
        # favourable length, ranks below the n_best-th finished one.
        active = scores.max(1).values / (max_len + 1) ** length_penalty > best_finished[:, -1]
        source = slots.new_zeros(tokens.numel()).index_copy(  # slot -> its row in the state
            0, slots, torch.arange(len(slots), device=device)
        )
        first_slot = torch.arange(0, tokens.numel(), beam_size, device=device).unsqueeze(1)
        source = source[first_slot + parents]  # (N, K): of each slot's parent
        is_open = ((scores > -torch.inf) & active.unsqueeze(1)).flatten()
        # The step's only transfer from the device to the host:
        num_open, num_active = torch.stack([is_open.sum(), active.sum()]).tolist()
        if num_open == 0:
            break
        slots = _true_indices(is_open, num_open)
        state = tuple(x.index_select(0, source.flatten()[slots]) for x in state)
        if num_active <= len(rows) // 2:  # drop the rows that are done; rarely, since it copies
            kept = _true_indices(active, num_active)
            new_row = torch.zeros_like(rows).index_copy(
                0, kept, torch.arange(num_active, device=device)
            )
            slots = new_row[slots // beam_size] * beam_size + slots % beam_size
            rows, tokens, scores = rows[kept], tokens[kept], scores[kept]
            best_finished, width, paths = best_finished[kept], width[kept], paths[kept]
            annotations = annotations[kept]
    return _backtrack(history, end, n, n_best, length_penalty, max_len)


def _extend(scores, log_probs, slots, width, callback=None):
    """
    The `width` best continuations of each image's open slots.

    scores (N, K), log_probs (M, V) of the M open slots, width (N, 1)
    Returns scores (-inf beyond the width), tokens and parents (slots), each (N, K)
    """
    n, k = scores.shape
    # The K best of an image are among the K best of each of its slots.
    best, tokens = log_probs.topk(min(k, log_probs.shape[1]))  # (M, min(K, V))
    per_slot = best.shape[1]
    total = scores.flatten()[slots].unsqueeze(1) + best
    total = scores.new_full((n * k, per_slot), -torch.inf).index_copy(
        0, slots, total.to(scores.dtype)
    )
    tokens = _scatter_to_slots(tokens, slots, (n, k))
    top, index = total.view(n, -1).topk(k)
    top = top.masked_fill(torch.arange(k, device=top.device) >= width, -torch.inf)
    kept = top, tokens.flatten(1).gather(1, index), index // per_slot
    if callback:
        callback(total.view(n, k, per_slot), tokens, *kept)
    return kept


def _scatter_to_slots(x, slots, shape):
    """(M, ...) of the open slots -> (N, K, ...), zero where a slot is closed"""
    return x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, slots, x).view(*shape, -1)


def _true_indices(mask, count):
    """The indices of a mask's `count` true values; nonzero() would wait for a GPU to count them."""
    return mask.byte().argsort(dim=0, descending=True, stable=True)[:count]


def _backtrack(history, end, n, n_best, length_penalty, max_len):
    """Follow the parents back from the best last tokens. Returns N Captions."""
    steps, alpha = len(history), history[0][-1]
    tokens, parents = np.zeros((2, steps, n, alpha.shape[1]), dtype=np.int64)
    scores = np.full(tokens.shape, -np.inf)
    alphas = np.zeros((*tokens.shape, alpha.shape[2]), dtype=np.float32)
    for t, step in enumerate(history):
        rows, *columns = (x.cpu().numpy() for x in step)
        for full, part in zip((tokens, parents, scores, alphas), columns):
            full[t, rows] = part

    finished = (tokens == end) & (scores > -np.inf)
    captions = []
    for i in range(n):
        ends = np.argwhere(finished[:, i])  # (step, slot) of every finished beam
        if not len(ends):
            last = min(steps, max_len) - 1
            ends = np.array(
                [(last, slot) for slot in range(tokens.shape[2]) if scores[last, i, slot] > -np.inf]
            )
        if not len(ends):
            raise UserError(
                "the model's scores are not finite: it is damaged, or too large for "
                "--amp fp16; leave that out, or pass another --model"
            )
        ranks = scores[ends[:, 0], i, ends[:, 1]] / (ends[:, 0] + 1.0) ** length_penalty
        best = np.argsort(-ranks, kind="stable")[:n_best]
        first, *others = (
            _path(tokens[:, i], parents[:, i], scores[:, i], alphas[:, i], end, *last)
            for last in ends[best]
        )
        captions.append(first._replace(alternatives=others))
    return captions


def _path(tokens, parents, scores, alphas, end, step, slot):
    """The Caption of the beam in `slot` after `step`; arrays of one image, (T, K) or (T, K, P)"""
    score, finished = float(scores[step, slot]), bool(tokens[step, slot] == end)
    path, attention = [], []
    for t in range(step, -1, -1):
        path.append(int(tokens[t, slot]))
        slot = parents[t, slot]
        attention.append(alphas[t, slot])
    length = len(path) - finished  # without <end>
    alphas = np.array(attention[::-1][:length], alphas.dtype).reshape(length, alphas.shape[2])
    return Caption(path[::-1][:length], alphas, score, finished, [])
