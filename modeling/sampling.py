"""
Random choices: tokens sampled from the decoder's distribution, and the locations of stochastic
hard attention (paper section 4.1).
"""

from typing import NamedTuple

import torch


def sample_categorical(probabilities):
    """
    Sample one index per row of probabilities (..., K): (...) int64.

    It is the index of the smallest of K exponential waiting times with these rates, which unlike
    torch.multinomial does not make the CPU wait for a GPU. Probabilities that are not finite give
    an arbitrary index; training reports them, since its loss is not finite either.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def one_hot_locations(alpha, locations):
    """Attention weights like alpha (..., P) that are 1 at the locations (...) and 0 elsewhere."""
    return torch.zeros_like(alpha).scatter(-1, locations.unsqueeze(-1), 1)


def most_likely_location(alpha):
    """Hard attention at test time: all the weight (..., P) is on the most attended location."""
    return one_hot_locations(alpha, alpha.argmax(-1))


def sample_location(alpha, hard):
    """
    Hard attention in training: weights (n, R, P) that are 1 at a location sampled from alpha
    (n, R, P), equation 8, for the captions where hard (N, R) is true; alpha, the expectation, for
    the others.
    """
    n, r, _ = alpha.shape
    sampled = one_hot_locations(alpha, sample_categorical(alpha.detach()))
    return torch.where(hard[:n, :r, None], sampled, alpha)


class Sampling(NamedTuple):
    """How tokens are sampled: from probabilities ** (1 / temperature), the likeliest alone that
    together reach top_p (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751)."""

    temperature: float = 1.0
    top_p: float = 1.0

    def probabilities(self, logits):
        """logits (..., V) -> probabilities (..., V), each row's sum 1 up to a factor"""
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # of the likelier tokens
            ordered = ordered.masked_fill(before >= self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
        return probabilities


def ban_repeated_ngrams(logits, captions, n):
    """
    Set to -inf, in place, the logits (M, V) of tokens that would repeat an n-gram of their caption.
    captions: (M, t) the tokens so far, after <start>
    """
    t = captions.shape[1]
    if t < n:
        return
    ends = captions[:, n - 1 :]  # (M, W), the last token of each n-gram so far
    same = torch.ones_like(ends, dtype=torch.bool)  # whether it begins as the caption ends
    for i in range(n - 1):
        same &= captions[:, i : t - n + 1 + i] == captions[:, t - n + 1 + i, None]
    banned = torch.zeros_like(logits).scatter_add(1, ends, same.to(logits.dtype))
    logits.masked_fill_(banned > 0, -torch.inf)


@torch.no_grad()
def sample_captions(
    decoder, features, word_map, samples, max_len=50, sampling=None, no_unk=False, no_repeat_ngram=0
):
    """
    Sample captions from the decoder's distribution, token by token: `samples` for each image.

    decoder: in evaluation mode; features: (N, G, E)
    sampling: a `Sampling`, by default from the distribution as it is
    no_unk, no_repeat_ngram: as in `beam_search`

    Returns captions (N, samples, L) int64, <start> ... <end> <pad>, and their lengths (N, samples)
    on the CPU, <start> and <end> counted, as the decoder's forward takes them. As in the search,
    <end> may follow max_len words; a caption that has not ended with the next token is cut off
    after it, without <end>.
    """
    n, device, sampling = len(features), features.device, sampling or Sampling()
    annotations, to_logits = decoder.encode_memory(features), decoder.to_logits()
    state = tuple(x.repeat_interleave(samples, 0) for x in decoder.init_hidden_state(annotations))
    captions = torch.full((n * samples, max_len + 2), word_map["<pad>"], device=device)
    captions[:, 0] = word_map["<start>"]
    unfinished, tokens = torch.arange(n * samples, device=device), captions[:, 0]
    for t in range(1, max_len + 2):
        token_gates = decoder.embed_to_gates(tokens, annotations)
        state, *_ = decoder.step(token_gates, state, annotations, (n, samples), unfinished)
        logits = to_logits(state[0])
        if no_unk:
            logits[:, word_map["<unk>"]] = -torch.inf
        if no_repeat_ngram:
            ban_repeated_ngrams(logits, captions[unfinished, 1:t], no_repeat_ngram)
        tokens = sample_categorical(sampling.probabilities(logits))
        captions[unfinished, t] = tokens
        active = (tokens != word_map["<end>"]).nonzero().squeeze(1)
        unfinished, tokens = unfinished[active], tokens[active]
        state = tuple(x[active] for x in state)
        if len(unfinished) == 0:
            break
    ended = captions == word_map["<end>"]
    lengths = torch.where(ended.any(1), ended.byte().argmax(1) + 1, max_len + 2).cpu()
    return captions[:, : lengths.max()].view(n, samples, -1), lengths.view(n, samples)
