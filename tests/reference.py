"""
Teacher forcing, loss and search as plainly as they can be written: one caption at a time, with the
lines of models.py alone, so that batches, their order and what is shared in them can be compared.
"""

import torch
import torch.nn.functional as F

from datasets import SPECIAL_TOKENS


def encode(features, size=14):
    """(N, G, E) on the backbone's square grid -> (N, size^2, E), the tutorial's encoding"""
    n, g, e = features.shape
    side = int(g**0.5)
    grid = features.reshape(n, side, side, e).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(grid, size).permute(0, 2, 3, 1).reshape(n, size * size, e)


def decode(decoder, annotations, caption, hard=None):
    """
    Teacher forcing of one caption. annotations (1, P, E); caption (T + 1,) ids, <start> first

    Returns logits (T, V) and alphas (T, P).
    """
    state, logits, alphas = decoder.init_hidden_state(annotations), [], []
    for token in caption[:-1]:
        state, alpha, _ = decoder.step(token.view(1), state, annotations, hard)
        logits.append(decoder.logits(decoder.dropout(state[0])))
        alphas.append(alpha)
    return torch.cat(logits), torch.cat(alphas)


def decode_all(decoder, features, captions, lengths):
    """`decode` for captions (N, R, L) of lengths (N, R): lists of logits and alphas"""
    size = decoder.args["encoded_image_size"]
    found = [
        decode(decoder, annotations, caption[:length])
        for annotations, rows, sizes in zip(encode(features, size).split(1), captions, lengths)
        for caption, length in zip(rows, sizes)
    ]
    return tuple(map(list, zip(*found)))


def loss(decoder, features, captions, lengths, alpha_c=1.0):
    """Cross-entropy over the words plus the doubly stochastic term, equation 14."""
    logits, alphas = decode_all(decoder, features, captions, lengths)
    captions, lengths = captions.flatten(0, 1), lengths.flatten()
    targets = torch.cat([c[1:n] for c, n in zip(captions, lengths)])
    penalty = torch.stack([((1 - a.sum(0)) ** 2).mean() for a in alphas]).mean()
    return F.cross_entropy(torch.cat(logits), targets) + alpha_c * penalty


@torch.no_grad()
def search(decoder, annotations, word_map, beam_size, max_len=50, hard=None, **options):
    """
    Beam search for one image; its beams are a batch that shrinks as they end. annotations
    (1, P, E); options: length_penalty, no_unk, no_repeat_words and no_repeat_ngram of a `Search`

    Returns all finished beams, or the unfinished ones if there are none, best first by
    score / length ** length_penalty: (words with <start> and <end>, weights, score).
    """
    start, end, n = word_map["<start>"], word_map["<end>"], options.get("no_repeat_ngram", 0)
    length_penalty = options.get("length_penalty", 0)
    may_repeat = [i for word, i in word_map.items() if word in ("the", *SPECIAL_TOKENS)]
    state = decoder.init_hidden_state(annotations)
    beams, total = [([start], [])], annotations.new_zeros(1)  # words and weights, log-probabilities
    complete, unfinished, k = [], [], beam_size
    for step in range(1, max_len + 2):  # the tutorial's `if step > 50: break` comes after step 51
        words = torch.tensor([words[-1] for words, _ in beams], device=annotations.device)
        repeated = annotations.expand(len(beams), -1, -1)
        state, _, weights = decoder.step(words, state, repeated, hard)
        scores = total.unsqueeze(1) + torch.log_softmax(decoder.logits(state[0]), dim=1)  # (k, V)
        if options.get("no_unk"):
            scores[:, word_map["<unk>"]] = -torch.inf
        for row, (path, _) in zip(scores, beams):
            for word in path if options.get("no_repeat_words") else ():
                if word not in may_repeat:
                    row[word] = -torch.inf
            for word in range(len(row)) if n else ():
                longer = [*path[1:], word]
                found = [tuple(longer[i : i + n]) for i in range(len(longer) - n + 1)]
                if len(found) > len(set(found)):
                    row[word] = -torch.inf
        total, best = scores.flatten().topk(min(k, scores.numel()))
        parents, words = best // scores.shape[1], (best % scores.shape[1]).tolist()
        beams = [
            (beams[parent][0] + [word], beams[parent][1] + [weights[parent]])
            for parent, word in zip(parents.tolist(), words)
        ]
        complete += [
            (*beam, score) for beam, score in zip(beams, total.tolist()) if beam[0][-1] == end
        ]
        active = [i for i, beam in enumerate(beams) if beam[0][-1] != end]
        k = len(active)
        if step == max_len:
            unfinished = [(*beams[i], total[i].item()) for i in active]
        if k == 0:
            break
        beams, total = [beams[i] for i in active], total[active]
        state = tuple(x[parents[active]] for x in state)
    return sorted(
        complete or unfinished, key=lambda beam: -beam[2] / (len(beam[0]) - 1) ** length_penalty
    )
