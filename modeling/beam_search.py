"""
`find_captions`: captions of a batch of images, the most probable by beam search, or sampled.

The search's index spaces, N images and K beams:

image   0 .. N-1, in the order of the batch
row     of an image still searched: rows[row]. Finished rows are dropped once they are half of all.
beam    0 .. K-1, within a row; it is open until it has reached <end>
lines   (M,) row * K + beam of each open beam, ascending: the indices of the decoder's state
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling.sampling import make_ban, most_likely_location, sample_captions
from utils import MAX_LENGTH_PENALTY, UserError


@dataclass(frozen=True)
class Search:
    """
    Options of `find_captions`; ValueError for values that are invalid or would be ignored.

    beam_size: K; 1 is greedy decoding
    n_best: captions per image, at most K unless they are sampled
    length_penalty: finished captions are ranked by their score over length ** length_penalty,
    <end> counted; at 1 that is the mean per word
    no_unk: never choose <unk>; scores are not renormalised
    no_repeat_words: never choose a content word of English twice, see `sampling.FUNCTION_WORDS`
    no_repeat_ngram: never choose a token that would repeat an n-gram of this length; 0: allowed
    hard_attention: attend only to the most attended location (section 4.1)
    sample: instead of searching, sample from `sampling.token_probabilities` (temperature, top_p)
    """

    beam_size: int = 5
    max_len: int = 50
    n_best: int = 1
    length_penalty: float = 0.0
    no_unk: bool = False
    no_repeat_words: bool = False
    no_repeat_ngram: int = 0
    hard_attention: bool = False
    sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        max_n_best, max_penalty = math.inf if self.sample else self.beam_size, MAX_LENGTH_PENALTY
        for name, holds, rule in (
            ("beam_size", self.beam_size >= 1, "at least 1"),
            ("max_len", self.max_len >= 1, "at least 1"),
            ("n_best", 1 <= self.n_best <= max_n_best, f"1 to {max_n_best}"),
            ("length_penalty", 0 <= self.length_penalty <= max_penalty, f"0 to {max_penalty}"),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "at least 0"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be {rule}")
        if self.sample and (self.length_penalty or self.hard_attention):
            raise ValueError("length_penalty and hard_attention exclude sample=True")
        if not self.sample and (self.temperature, self.top_p) != (1, 1):
            raise ValueError("temperature and top_p need sample=True")


class Caption(NamedTuple):
    tokens: list[int]  # T ids, without <start>, <end> and <pad>, also where these were generated
    alphas: np.ndarray  # (T, P) the context vector's weights for each token
    score: float  # total log-probability in nats of all tokens, not divided by length
    finished: bool  # whether <end> was reached
    alternatives: list["Caption"]  # the next best, n_best - 1 at most


def beam_search(
    decoder: torch.nn.Module,
    features: Tensor,
    word_map: dict[str, int],
    beam_size: int = 5,
    **options: Any,
) -> list[Caption]:
    """`find_captions` with the options of a `Search` as keywords"""
    return find_captions(decoder, features, word_map, Search(beam_size, **options))


@torch.inference_mode()
def find_captions(
    decoder: torch.nn.Module,
    features: Tensor,
    word_map: dict[str, int],
    search: Search,
    callback: Callable | None = None,
) -> list[Caption]:
    """
    decoder: in evaluation mode; features: (N, G, E) annotation vectors
    callback: called after each step of a search, for n rows, with five tensors: scores and tokens
    of each beam's best continuations, (n, K, C), scores -inf for closed beams; and scores, tokens
    and parents of the beams kept from them, (n, K), scores -inf beyond the row's width

    The rule is the tutorial's: a beam that reaches <end> is set aside, and the search continues
    with one beam fewer; of the beams set aside, the one with the best score wins. A caption has at
    most max_len words and <end>; if no beam has finished, the best one of max_len words is taken.

    Returns N Captions. Raises UserError if the decoder's logits are not finite.
    """
    if len(features) == 0:
        return []
    if search.sample:
        return _sampled(decoder, features, word_map, search)
    history = _search(decoder, features, word_map, search, callback)
    return _backtrack(history, len(features), word_map, search)


def _search(decoder, features, word_map, search, callback):
    """Returns for each step rows (n,), and tokens, parents, scores (n, K) and alphas (n, K, P)"""
    n, k, device = len(features), search.beam_size, features.device
    end, hard = word_map["<end>"], most_likely_location if search.hard_attention else None
    steps = decoder.steps(features, k)
    rows = torch.arange(n, device=device)
    state = steps.initial_state(rows)
    tokens = torch.full((n, k), word_map["<start>"], device=device)
    # A closed beam has score -inf. At first only beam 0 is open, since all would be equal.
    dtype = torch.promote_types(state[0].dtype, torch.float32)
    scores = torch.full((n, k), -torch.inf, device=device, dtype=dtype)
    scores[:, 0], lines = 0, torch.arange(0, n * k, k, device=device)
    width = torch.full((n, 1), k, device=device)  # beams that each row has left
    best_finished = scores.new_full((n, search.n_best), -torch.inf)
    ban = make_ban(search, word_map, device)
    paths = tokens.new_zeros(n, k, 0)  # each beam's tokens so far, if some may not be repeated
    history = []

    for length in range(1, search.max_len + 2):  # <end> counts as a token, not as a word
        state, _, weights = steps.step(tokens.flatten()[lines], state, lines // k, hard)
        log_probs = steps.logits(state[0]).to(scores.dtype).log_softmax(-1)
        if search.no_unk:
            log_probs[:, word_map["<unk>"]] = -torch.inf
        if ban:
            ban(log_probs, paths.flatten(0, 1)[lines])
        scores, tokens, parents = _extend(scores, log_probs, lines, width, callback)
        alphas = _to_beams(weights.to(scores.dtype), lines, tokens.shape)
        history.append((rows, tokens, parents, scores, alphas))
        if ban:
            parent_paths = paths.gather(1, parents.unsqueeze(2).expand(-1, -1, length - 1))
            paths = torch.cat([parent_paths, tokens.unsqueeze(2)], 2)

        ended = tokens == end
        ranks = scores.masked_fill(~ended, -torch.inf) / length**search.length_penalty
        best_finished = torch.cat([best_finished, ranks], 1).topk(search.n_best).values
        scores = scores.masked_fill(ended, -torch.inf)
        width = (scores > -torch.inf).sum(1, keepdim=True)
        # Scores only decrease, so a row is done once its best open beam, even at the most
        # favourable length, ranks below the n_best-th finished one.
        bound = scores.amax(1) / (search.max_len + 1) ** search.length_penalty
        active = bound > best_finished[:, -1]
        is_open = ((scores > -torch.inf) & active.unsqueeze(1)).flatten()
        # The only transfer from the device in a step:
        num_open, num_active = torch.stack([is_open.sum(), active.sum()]).tolist()
        if num_open == 0:
            break
        lines, before = _true_indices(is_open, num_open), lines
        # Each open beam continues the state of its parent.
        parent_lines = torch.searchsorted(before, lines // k * k + parents.flatten()[lines])
        state = tuple(x.index_select(0, parent_lines) for x in state)
        if num_active <= len(rows) // 2:  # rarely, since it copies
            kept = _true_indices(active, num_active)
            lines = torch.searchsorted(kept, lines // k) * k + lines % k
            rows, tokens, scores = rows[kept], tokens[kept], scores[kept]
            best_finished, width, paths = best_finished[kept], width[kept], paths[kept]
            steps.keep(kept)
    return history


def _extend(scores, log_probs, lines, width, callback):
    """
    scores (n, K), log_probs (M, V) of the open beams, width (n, 1) -> of each row's best
    continuations scores, -inf beyond the width, tokens and parents (beams), each (n, K)
    """
    n, k = scores.shape
    # The K best of a row are among the K best of each of its beams.
    best, tokens = log_probs.topk(min(k, log_probs.shape[1]))  # (M, C), C = min(K, V)
    total = scores.flatten()[lines].unsqueeze(1) + best
    total, tokens = _to_beams(total, lines, (n, k), -torch.inf), _to_beams(tokens, lines, (n, k))
    top, index = total.flatten(1).topk(k)
    top = top.masked_fill(torch.arange(k, device=top.device) >= width, -torch.inf)
    kept = top, tokens.flatten(1).gather(1, index), index // total.shape[2]
    if callback:
        callback(total, tokens, *kept)
    return kept


def _to_beams(x, lines, shape, value=0):
    """x (M, C) of the open beams -> (n, K, C), this value where a beam is closed; shape (n, K)"""
    full = x.new_full((math.prod(shape), x.shape[1]), value)
    return full.index_copy(0, lines, x).view(*shape, -1)


def _true_indices(mask, count):
    """The indices of a mask's `count` true values; nonzero() would wait for a GPU to count them."""
    return mask.byte().argsort(dim=0, descending=True, stable=True)[:count]


def _backtrack(history, n, word_map, search):
    """Follow the parents back from the best last tokens. Returns N Captions."""
    steps, alpha = len(history), history[0][-1]
    tokens, parents = np.zeros((2, steps, n, alpha.shape[1]), dtype=np.int64)
    scores = np.full(tokens.shape, -np.inf)
    alphas = np.zeros((*tokens.shape, alpha.shape[2]), dtype=np.float32)
    for t, step in enumerate(history):
        rows, *columns = (x.cpu().numpy() for x in step)
        for full, part in zip((tokens, parents, scores, alphas), columns):
            full[t, rows] = part

    last = min(steps, search.max_len) - 1
    is_end = (tokens == word_map["<end>"]) & (scores > -np.inf)
    unfinished = ~is_end.any((0, 2))
    is_end[last, unfinished] = scores[last, unfinished] > -np.inf
    _check_finite(is_end.any((0, 2)).all())
    captions = []
    for i in range(n):
        ends = np.argwhere(is_end[:, i])  # (step, beam)
        ranks = scores[ends[:, 0], i, ends[:, 1]] / (ends[:, 0] + 1.0) ** search.length_penalty
        best = ends[np.argsort(-ranks, kind="stable")[: search.n_best]]
        columns = tokens[:, i], parents[:, i], scores[:, i], alphas[:, i]
        first, *others = (_path(columns, word_map, *last) for last in best)
        captions.append(first._replace(alternatives=others))
    return captions


def _path(columns, word_map, step, beam):
    """The Caption that ends in `beam` at `step`; columns: as `_search` returns, of one image"""
    tokens, parents, scores, alphas = columns
    score, path, attention = float(scores[step, beam]), [], []
    for t in range(step, -1, -1):
        path.insert(0, int(tokens[t, beam]))
        beam = parents[t, beam]  # alphas are indexed by the parent beams
        attention.insert(0, alphas[t, beam])
    return _caption(path, np.stack(attention), score, word_map)


def _caption(path, attention, score, word_map):
    """The Caption of a path, without the tokens that the tutorial's evaluation leaves out"""
    left_out = [word_map[token] for token in ("<start>", "<end>", "<pad>")]
    words = [t for t, token in enumerate(path) if token not in left_out]
    finished = path[-1] == word_map["<end>"]
    return Caption([path[t] for t in words], attention[words], score, finished, [])


def _sampled(decoder, features, word_map, search):
    """For each image, the sampled Caption with the best score; `alternatives`: its other samples"""
    captions, lengths = sample_captions(decoder, features, word_map, search)
    output = decoder(features, captions, lengths)
    log_probs = output.logits.double().log_softmax(-1).gather(1, output.targets.unsqueeze(1))
    _check_finite(log_probs.isfinite().all())
    token_scores = iter(log_probs.squeeze(1).split((lengths - 1).flatten().tolist()))
    found = []
    for paths, weights in zip(captions.tolist(), output.weights.float().cpu().numpy()):
        of_image = []
        for path, attention in zip(paths, weights):
            scores = next(token_scores)
            finished = path[len(scores)] == word_map["<end>"]
            if not finished:  # what follows max_len words only shows that it did not end
                scores = scores[: search.max_len]
            tokens = path[1 : len(scores) + 1]
            of_image.append(_caption(tokens, attention, float(scores.sum()), word_map))
        first, *others = sorted(of_image, key=lambda caption: -caption.score)
        found.append(first._replace(alternatives=others))
    return found


def _check_finite(is_finite):
    if not is_finite:
        raise UserError(
            "the model's scores are not finite: the model is damaged, or its numbers are too large "
            "for --amp fp16; leave --amp out, or pass another --model"
        )
