"""
Random choices: tokens sampled from the decoder's distribution, and the locations of stochastic
hard attention (paper section 4.1).
"""

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


@torch.no_grad()
def sample_captions(decoder, features, word_map, samples, max_len=50):
    """
    Sample captions from the decoder's distribution, token by token: `samples` for each image.

    decoder: in evaluation mode; features: (N, G, E)

    Returns captions (N, samples, L) int64, <start> ... <end> <pad>, and their lengths (N, samples)
    on the CPU, <start> and <end> counted, as the decoder's forward takes them. A caption that has
    not ended after max_len tokens is cut off there, without <end>.
    """
    n, device = len(features), features.device
    annotations = decoder.encode_memory(features)
    state = tuple(x.repeat_interleave(samples, 0) for x in decoder.init_hidden_state(annotations))
    captions = torch.full((n * samples, max_len + 1), word_map["<pad>"], device=device)
    captions[:, 0] = word_map["<start>"]
    unfinished, tokens = torch.arange(n * samples, device=device), captions[:, 0]
    for t in range(1, max_len + 1):
        token_gates = decoder.embed_to_gates(tokens, annotations)
        state, *_ = decoder.step(token_gates, state, annotations, (n, samples), unfinished)
        tokens = sample_categorical(decoder.logits(state[0]).softmax(-1))
        captions[unfinished, t] = tokens
        active = (tokens != word_map["<end>"]).nonzero().squeeze(1)
        unfinished, tokens = unfinished[active], tokens[active]
        state = tuple(x[active] for x in state)
        if len(unfinished) == 0:
            break
    ended = captions == word_map["<end>"]
    lengths = torch.where(ended.any(1), ended.byte().argmax(1) + 1, max_len + 1).cpu()
    return captions[:, :lengths.max()].view(n, samples, -1), lengths.view(n, samples)
