"""The batched search against a list of beams, one image at a time."""

import numpy as np
import pytest
import reference
import torch
from factories import WORD_MAP as WORDS
from factories import make_case

from modeling.beam_search import Search, beam_search
from modeling.sampling import most_likely_location, token_probabilities
from utils import UserError

WORD_MAP = WORDS | {"the": 1}  # the other words have no names
PAD, UNK, START, END = (WORD_MAP[token] for token in ("<pad>", "<unk>", "<start>", "<end>"))
MAX_LEN = 12


def run(decoder, features, beam_size=3, max_len=MAX_LEN, **options):
    return beam_search(decoder, features, WORD_MAP, beam_size, max_len=max_len, **options)


def make_case_of_words(seed, end_bias):
    """A decoder that never says <pad> or <start>, and images"""
    decoder, features = make_case(seed, end_bias)
    with torch.no_grad():
        decoder.fc.bias[[PAD, START]] = -1e3
    return decoder, features


def run_both(decoder, features, beam_size, n_best=1, hard_attention=False, **options):
    """The captions of the batched search, after a comparison with those of the reference"""
    captions = run(
        decoder, features, beam_size, n_best=n_best, hard_attention=hard_attention, **options
    )
    hard = most_likely_location if hard_attention else None
    for caption, image in zip(captions, reference.encode(features).split(1)):
        expected = reference.search(
            decoder, image, WORD_MAP, beam_size, MAX_LEN, hard=hard, **options
        )
        found = [caption, *caption.alternatives]
        assert len(found) == min(n_best, len(expected))
        for ours, (words, alphas, score) in zip(found, expected):
            # as the tutorial's evaluation does
            kept = [t for t, word in enumerate(words[1:]) if word not in (PAD, START, END)]
            assert ours.tokens == [words[1 + t] for t in kept]
            assert ours.finished == (words[-1] == END)
            assert ours.score == pytest.approx(score, abs=1e-9)
            expected_alphas = torch.stack(alphas)[kept]
            assert ours.alphas.shape == expected_alphas.shape
            np.testing.assert_allclose(ours.alphas, expected_alphas, atol=1e-6)
    return captions


@pytest.mark.parametrize("beam_size", range(1, 11))
def test_batched_search_equals_one_image_at_a_time(beam_size):
    """All its finished beams, with and without hard attention"""
    finished, lengths = [], set()
    for seed in range(4):
        decoder, features = make_case(seed, end_bias=(-9, -4, -1, 1)[seed])
        captions = run_both(decoder, features, beam_size, n_best=beam_size)
        finished += [caption.finished for caption in captions]
        lengths |= {len(caption.tokens) for caption in captions}
        if seed:
            # A vector for each location: on a coarser grid neighbours have equal attention, and
            # which is the arg max would depend on the order of floating-point sums.
            fine = torch.randn(3, 196, 9, dtype=torch.float64)
            for hard in run_both(decoder, fine, beam_size, hard_attention=True):
                assert (np.sort(hard.alphas)[:, -2:] == [0, 1]).all()
    assert len(lengths) > 4 and 0 < np.mean(finished) < 1  # a real mixture


@pytest.mark.parametrize(
    "options",
    [{"length_penalty": x} for x in (0.3, 0.7, 1, 2)]
    + [{"no_repeat_ngram": x} for x in (1, 2, 3)]
    + [{"no_repeat_words": True}, {"no_repeat_words": True, "no_repeat_ngram": 2}]
    + [{"no_unk": True}, {"no_unk": True, "no_repeat_ngram": 2, "length_penalty": 0.7}],
    ids=str,
)
def test_options_of_the_search_change_both_alike(options):
    changed = 0
    for seed in range(6):
        # what repeats is looked for among all tokens
        make = make_case_of_words if "no_repeat" in str(options) else make_case
        decoder, features = make(seed, end_bias=(-9, -4, -1)[seed % 3])
        with torch.no_grad():
            decoder.fc.bias[UNK] += 4 * ("no_unk" in options)
        for beam_size in (1, 4):
            captions = run_both(decoder, features, beam_size, n_best=min(3, beam_size), **options)
            free = run(decoder, features, beam_size)
            changed += sum(a.score != b.score for a, b in zip(free, captions))
            for tokens in (caption.tokens for caption in captions):
                assert UNK not in tokens or "no_unk" not in options
                n = options.get("no_repeat_ngram", MAX_LEN + 1)
                ngrams = list(zip(*(tokens[i:] for i in range(n))))
                assert len(ngrams) == len(set(ngrams))
                content = [token for token in tokens if token not in (WORD_MAP["the"], UNK)]
                assert len(content) == len(set(content)) or "no_repeat_words" not in options
    assert changed > 3 or options == {"length_penalty": 0.3}


def test_captions_may_be_empty_beams_wider_than_the_vocabulary_and_batches_without_image():
    decoder, features = make_case(0, end_bias=1e4)
    for caption in run(decoder, features):
        assert caption.tokens == [] and caption.finished and caption.alphas.shape == (0, 196)
    assert len(run_both(*make_case(1, end_bias=0), beam_size=20, n_best=3)) == 8
    assert run(decoder, features[:0]) == []


def test_impossible_options_and_those_that_nothing_would_read_are_errors():
    for options in (
        {"beam_size": 0},
        {"max_len": 0},
        {"beam_size": 3, "n_best": 4},
        {"n_best": 0, "sample": True},
        {"length_penalty": -1},
        {"length_penalty": float("nan")},
        {"no_repeat_ngram": -1},
        {"temperature": 0, "sample": True},
        {"top_p": 0, "sample": True},
        {"top_p": 1.1, "sample": True},
        {"temperature": 0.5},
        {"hard_attention": True, "sample": True},
    ):
        name = [*options][-2 if "sample" in options else -1]
        with pytest.raises(ValueError, match=name):
            Search(**options)
    assert (Search().beam_size, Search().max_len, Search().hard_attention) == (5, 50, False)


def test_scores_that_are_not_finite_are_an_error():
    decoder, features = make_case(0, 0)
    for sample in (False, True):
        with pytest.raises(UserError, match="not finite"):
            run(decoder, features * float("nan"), 2, sample=sample)


# Sampling


def test_sampled_captions_have_the_models_own_scores_and_attention():
    decoder, features = make_case_of_words(0, end_bias=-8)
    torch.manual_seed(0)
    captions = run(decoder, features, sample=True, temperature=0.8, top_p=0.95, n_best=3)
    lengths, finished = set(), set()
    for caption, image in zip(captions, reference.encode(features).split(1)):
        scores = [c.score for c in (caption, *caption.alternatives)]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        for sampled in (caption, *caption.alternatives):
            words = sampled.tokens + [END] * sampled.finished
            assert sampled.finished or len(sampled.tokens) == MAX_LEN
            caption_ids = torch.tensor([WORD_MAP["<start>"], *words])
            logits, alphas = reference.decode(decoder, image, caption_ids)
            log_probs = logits.log_softmax(1)[range(len(words)), words]
            assert sampled.score == pytest.approx(log_probs.sum().item())
            expected = alphas[: len(sampled.tokens)].detach()
            np.testing.assert_allclose(sampled.alphas, expected, atol=1e-6)
            lengths.add(len(words))
            finished.add(sampled.finished)
    assert len(lengths) > 3 and finished == {False, True}


def test_sampling_only_from_the_likeliest_word_is_greedy_search():
    decoder, features = make_case(1, end_bias=-1)
    greedy = run(decoder, features, 1)
    for options in ({"temperature": 1e-4}, {"top_p": 1e-9}):
        for found, expected in zip(run(decoder, features, sample=True, **options), greedy):
            assert found.tokens == expected.tokens and found.finished == expected.finished
            if found.finished:
                assert found.score == pytest.approx(expected.score)


def test_the_same_seed_samples_the_same_captions_and_options_hold():
    decoder, features = make_case(2, end_bias=-3)
    with torch.no_grad():
        decoder.fc.bias[UNK] += 4

    def tokens_of(seed, **options):
        torch.manual_seed(seed)
        return [c.tokens for c in run(decoder, features, sample=True, **options)]

    assert tokens_of(3) == tokens_of(3) != tokens_of(4)
    assert any(UNK in tokens for tokens in tokens_of(3))
    for tokens in tokens_of(3, no_unk=True, no_repeat_ngram=1):
        assert UNK not in tokens and len(tokens) == len(set(tokens))
    for tokens in tokens_of(3, no_repeat_words=True):
        content = [token for token in tokens if token not in (WORD_MAP["the"], UNK)]
        assert len(content) == len(set(content))


def test_tokens_are_sampled_as_often_as_they_are_probable():
    """800 captions of one word, for each of 8 images: frequencies against the softmax"""
    decoder, features = make_case_of_words(2, end_bias=0)
    state = decoder.init_hidden_state(reference.encode(features))
    start = torch.full((8,), WORD_MAP["<start>"])
    state, *_ = decoder.step(start, state, reference.encode(features))
    expected = decoder.logits(state[0]).softmax(1)
    torch.manual_seed(0)
    captions = run(decoder, features, max_len=1, sample=True, n_best=800)
    for caption, probabilities in zip(captions, expected):
        first = [(c.tokens or [END])[0] for c in (caption, *caption.alternatives)]
        found = torch.bincount(torch.tensor(first), minlength=len(probabilities)) / len(first)
        torch.testing.assert_close(found.double(), probabilities.detach(), rtol=0, atol=0.07)


def test_nucleus_is_the_fewest_likeliest_words_that_reach_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    for top_p, kept in ((0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.9, 3), (0.96, 4), (1, 4)):
        found = token_probabilities(logits, top_p=top_p)
        assert (found > 0).sum(1).tolist() == [kept, kept]
        torch.testing.assert_close(found, logits.exp() * (found > 0))
    hot = token_probabilities(logits, temperature=2)
    torch.testing.assert_close(hot, logits.exp().sqrt() / logits.exp().sqrt().sum(1, True))
