"""
Random choices: tokens sampled from the decoder's distribution, and the locations of stochastic
hard attention (paper section 4.1).
"""

import torch

from datasets import SPECIAL_TOKENS

NEVER = -torch.inf  # as a logit
ENGLISH = "the"  # a model that says it is one of English, as the following words are
# Words that good sentences repeat; the others are content words.
FUNCTION_WORDS = frozenset(
    "a an the this that these those its his her their he she it they and or as while who which is "
    "are was were be being been has have of in on at to with by for from into onto near over under "
    "up down off out through along around across behind between beside against".split()
)
MAY_REPEAT = FUNCTION_WORDS.union(SPECIAL_TOKENS)


def sample_categorical(probabilities):
    """
    Sample an index per row of probabilities (..., K) -> (...) int64: the first of K exponential
    waiting times with these rates. Unlike torch.multinomial, the CPU does not wait for a GPU.
    """
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def most_likely_location(alpha):
    """Hard attention at test time: all the weight (..., P) is on the most attended location."""
    return _one_hot(alpha, alpha.argmax(-1))


def _one_hot(alpha, locations):
    return torch.zeros_like(alpha).scatter(-1, locations.unsqueeze(-1), 1)


def locations_sampler(count, fraction, device):
    """
    Hard attention in training, for about this fraction of `count` captions: a function that maps
    alpha (M, P) of the first M captions to weights (M, P). For the chosen captions these are 1 at a
    location sampled from alpha (equation 8), for the others alpha. None if the fraction is 0.
    """
    if not fraction:
        return None
    is_hard = torch.rand(count, 1, device=device) < fraction

    def sample_locations(alpha):
        sampled = _one_hot(alpha, sample_categorical(alpha.detach()))
        return torch.where(is_hard[: len(alpha)], sampled, alpha)

    return sample_locations


@torch.no_grad()
def scheduled_sampling(tokens, h, logits, probability):
    """
    Scheduled sampling (Bengio et al. 2015, arXiv 1506.03099): the true tokens (M,), each with this
    probability replaced by one sampled from the model's own logits(h), h (M, H) -> (M, V).
    """
    sampled = sample_categorical(logits(h).softmax(-1))
    return torch.where(torch.rand(len(tokens), device=tokens.device) < probability, sampled, tokens)


def token_probabilities(logits, temperature=1.0, top_p=1.0):
    """
    Unnormalised probabilities of tokens: softmax of logits (..., V) / temperature, and 0
    outside the smallest set of likeliest tokens whose probabilities sum to top_p or more (nucleus
    sampling, Holtzman et al. 2020, arXiv 1904.09751).
    """
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # of the likelier tokens
        ordered = ordered.masked_fill(before >= top_p, 0)
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    return probabilities


def make_ban(search, word_map, device):
    """
    What a `beam_search.Search` forbids to repeat, as a function: it sets to -inf, in place, the
    logits (M, V) of such tokens, given captions (M, t), the tokens so far after <start>. None if
    everything may be repeated.
    """
    words, n = search.no_repeat_words and ENGLISH in word_map, search.no_repeat_ngram
    if not words and not n:
        return None
    is_content = torch.ones(max(word_map.values()) + 1, device=device)
    is_content[[i for word, i in word_map.items() if word in MAY_REPEAT]] = 0

    def ban(logits, captions):
        if words:
            used = is_content[captions].to(logits.dtype)
            logits.masked_fill_(torch.zeros_like(logits).scatter_add(1, captions, used) > 0, NEVER)
        if n:
            _ban_repeated_ngrams(logits, captions, n)

    return ban


def _ban_repeated_ngrams(logits, captions, n):
    if captions.shape[1] < n:
        return
    ngrams = captions.unfold(1, n, 1)  # (M, t - n + 1, n)
    beginning = captions[:, None, captions.shape[1] - n + 1 :]  # of the n-gram that comes next
    same = (ngrams[..., :-1] == beginning).all(2).to(logits.dtype)
    banned = torch.zeros_like(logits).scatter_add(1, ngrams[..., -1], same)
    logits.masked_fill_(banned > 0, NEVER)


@torch.no_grad()
def sample_captions(decoder, features, word_map, search):
    """
    R = search.n_best captions of each image, sampled token by token from the decoder, in evaluation
    mode; features: as in its `steps`; search: a `beam_search.Search`

    Returns captions (N, R, L), <start> ... <end> <pad>, and their lengths (N, R) on the CPU, as the
    decoder's forward takes them. At most max_len + 1 tokens follow <start>; a caption that has not
    ended with them has no <end>.
    """
    n, r, device = len(features), search.n_best, features.device
    steps = decoder.steps(features, r)
    going_on = torch.arange(n * r, device=device)  # unfinished captions, image by image
    state = steps.initial_state(going_on // r)
    captions = torch.full((n * r, search.max_len + 2), word_map["<pad>"], device=device)
    captions[:, 0], ban = word_map["<start>"], make_ban(search, word_map, device)
    for t in range(1, search.max_len + 2):
        state, _, _ = steps.step(captions[going_on, t - 1], state, going_on // r)
        logits = steps.logits(state[0])
        if search.no_unk:
            logits[:, word_map["<unk>"]] = NEVER
        if ban:
            ban(logits, captions[going_on, 1:t])
        tokens = sample_categorical(token_probabilities(logits, search.temperature, search.top_p))
        captions[going_on, t] = tokens
        unfinished = (tokens != word_map["<end>"]).nonzero().squeeze(1)
        going_on, state = going_on[unfinished], tuple(x[unfinished] for x in state)
        if len(going_on) == 0:
            break
    ended = captions == word_map["<end>"]
    lengths = torch.where(ended.any(1), ended.byte().argmax(1) + 1, search.max_len + 2).cpu()
    return captions[:, : lengths.max()].view(n, r, -1), lengths.view(n, r)
