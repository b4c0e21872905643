"""`beam_search`, the only one: batched, on whatever device the decoder is on."""

from typing import NamedTuple

import numpy as np
import torch


class Caption(NamedTuple):
    words: list  # T word ids, without <start> and <end>
    alphas: np.ndarray  # (T, P) attention per word; each row sums to 1
    score: float  # total log-probability in nats, <end> included, not divided by length
    finished: bool  # whether <end> was reached
    runners_up: list  # the next best Captions, n_best - 1 at most


@torch.inference_mode()
def beam_search(decoder, features, word_map, beam_size=5, max_len=50, n_best=1):
    """
    Caption a batch of images; beam_size=1 is greedy decoding.

    decoder: in evaluation mode; features: (N, G, E) annotation vectors

    The rule is the tutorial's: a beam that reaches <end> is set aside and the beam shrinks
    by one; of those set aside the best total log-probability wins. If none has finished
    after max_len words, the best unfinished one is returned.

    Returns N Captions. Raises ValueError if beam_size < 1, if n_best is not 1..beam_size or
    if the decoder's scores are not finite.
    """
    if beam_size < 1:
        raise ValueError(f"beam_size is {beam_size}, it must be at least 1")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best is {n_best}, it must be 1 to beam_size = {beam_size}")
    n, device = len(features), features.device
    if n == 0:
        return []
    start, end = word_map["<start>"], word_map["<end>"]
    image = decoder.annotate(features)
    state = tuple(x.repeat_interleave(beam_size, 0) for x in decoder.init_hidden_state(image))
    words = torch.full((n, beam_size), start, device=device)
    # A closed slot has score -inf. At first only slot 0 is open, since all are alike.
    scores = state[0].new_full((n, beam_size), -torch.inf)
    scores[:, 0] = 0
    width = torch.full((n, 1), beam_size, device=device)  # of each image's beam
    best_finished = scores.new_full((n, n_best), -torch.inf)
    rows = torch.arange(n, device=device)  # which image each row still at work belongs to
    history = []  # per step: the image rows and their (words, parents, scores, alphas)

    for _ in range(max_len):
        state, alpha = decoder.step(decoder.read(words.flatten(), image), state, image, words.shape)
        log_probs = decoder.scores(state[0]).view(*words.shape, -1).log_softmax(-1)
        scores, words, parents = _extend(scores, log_probs, width)
        history.append((rows, words, parents, scores, alpha.view(*words.shape, -1)))
        state = tuple(_pick(x, parents) for x in state)

        ended = words == end
        best_finished = torch.cat([best_finished, scores.masked_fill(~ended, -torch.inf)], 1)
        best_finished = best_finished.topk(n_best).values
        scores = scores.masked_fill(ended, -torch.inf)
        width = (scores > -torch.inf).sum(1, keepdim=True)
        # Scores only fall, so an open beam below the worst finished one wanted cannot win.
        open_rows = (scores.max(1).values > best_finished[:, -1]).nonzero().squeeze(1)
        if len(open_rows) == 0:  # reading the length is the one host sync per word
            break
        if len(open_rows) <= len(rows) * 3 // 4:  # drop images that are done
            rows, words, scores = rows[open_rows], words[open_rows], scores[open_rows]
            best_finished, width = best_finished[open_rows], width[open_rows]
            image = image[open_rows]
            state = tuple(x.view(-1, beam_size, x.shape[1])[open_rows].flatten(0, 1)
                          for x in state)
    return _trace(history, end, n, n_best)


def _extend(scores, log_probs, width):
    """
    The best continuations of each image's open slots, `width` of them.

    scores (N, K), log_probs (N, K, V), width (N, 1)
    Returns scores (-inf beyond the width), words and parents (slots), each (N, K)
    """
    k = scores.shape[1]
    # The K best of an image are among the K best of each of its slots.
    best, words = log_probs.topk(min(k, log_probs.shape[2]))  # (N, K, min(K, V))
    top, index = (scores.unsqueeze(2) + best).flatten(1).topk(k)
    top = top.masked_fill(torch.arange(k, device=top.device) >= width, -torch.inf)
    return top, words.flatten(1).gather(1, index), index // best.shape[2]


def _pick(x, parents):
    """(N K, H) rows by slot -> rows of the parents (N, K)"""
    n, k = parents.shape
    first = torch.arange(0, n * k, k, device=x.device).unsqueeze(1)
    return x.index_select(0, (first + parents).flatten())


def _trace(history, end, n, n_best):
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
            raise ValueError("the decoder's scores are not finite")
        best = np.argsort(-scores[lasts[:, 0], i, lasts[:, 1]], kind="stable")[:n_best]
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
