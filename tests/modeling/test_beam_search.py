"""The batched search against a list of beams, one image at a time."""

import numpy as np
import pytest
import reference
import torch
from factories import DECODER_KINDS, WORD_MAP, make_case

from modeling.beam_search import Search, beam_search
from modeling.sampling import most_likely_location, token_probabilities
from utils import UserError


def expect_equal(ours, textbook):
    words, alphas, score = textbook
    finished = words[-1] == WORD_MAP["<end>"]
    assert ours.tokens == words[1 : len(words) - finished]
    assert ours.finished == finished
    assert ours.score == pytest.approx(score, abs=1e-9)
    expected = torch.stack(alphas)[: len(ours.tokens)]
    assert ours.alphas.shape == expected.shape
    np.testing.assert_allclose(ours.alphas, expected, atol=1e-6)


@pytest.mark.parametrize("kind", DECODER_KINDS)
@pytest.mark.parametrize("beam_size", [1, 2, 3, 4, 5])
def test_batched_search_equals_one_image_at_a_time(beam_size, kind):
    finished, lengths = [], set()
    for seed in range(12):
        decoder, features = make_case(seed, end_bias=(-9, -4, -1, 1)[seed % 4], kind=kind)
        captions = beam_search(decoder, features, WORD_MAP, beam_size, max_len=12)
        for caption, image in zip(captions, reference.encode(features).split(1)):
            expect_equal(caption, reference.search(decoder, image, WORD_MAP, beam_size, 12)[0])
            finished.append(caption.finished)
            lengths.add(len(caption.tokens))
    assert len(finished) == 96 and len(lengths) > 5  # a real mixture ...
    assert 0.02 < np.mean(finished) < 0.98  # ... of finished and unfinished captions


@pytest.mark.parametrize("beam_size", [2, 3, 5])
def test_n_best_are_the_finished_beams_in_order_of_score(beam_size):
    for seed in range(6):
        decoder, features = make_case(seed, end_bias=-3)
        captions = beam_search(decoder, features, WORD_MAP, beam_size, max_len=12, n_best=beam_size)
        for caption, image in zip(captions, reference.encode(features).split(1)):
            expected = reference.search(decoder, image, WORD_MAP, beam_size, 12)
            found = [caption, *caption.alternatives]
            assert len(found) == len(expected)
            for ours, textbook in zip(found, expected):
                expect_equal(ours, textbook)


@pytest.mark.parametrize("length_penalty", [0.3, 0.7, 1, 2])
def test_length_penalty_ranks_the_finished_beams(length_penalty):
    changed = 0
    for seed in range(8):
        decoder, features = make_case(seed, end_bias=(-4, -1)[seed % 2])
        plain = beam_search(decoder, features, WORD_MAP, 4, max_len=12)
        captions = beam_search(
            decoder, features, WORD_MAP, 4, max_len=12, n_best=3, length_penalty=length_penalty
        )
        for caption, image in zip(captions, reference.encode(features).split(1)):
            expected = reference.search(decoder, image, WORD_MAP, 4, 12, length_penalty)
            found = [caption, *caption.alternatives]
            assert len(found) == min(3, len(expected))
            for ours, textbook in zip(found, expected):
                expect_equal(ours, textbook)
        changed += sum(a.tokens != b.tokens for a, b in zip(plain, captions))
    assert changed > 3 or length_penalty < 0.5


@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_unk_never_chooses_it(beam_size):
    unks = 0
    for seed in range(6):
        decoder, features = make_case(seed, end_bias=-3)
        with torch.no_grad():
            decoder.fc.bias[WORD_MAP["<unk>"]] += 4
        unks += sum(
            WORD_MAP["<unk>"] in caption.tokens
            for caption in beam_search(decoder, features, WORD_MAP, beam_size, max_len=12)
        )
        captions = beam_search(decoder, features, WORD_MAP, beam_size, max_len=12, no_unk=True)
        for caption, image in zip(captions, reference.encode(features).split(1)):
            assert WORD_MAP["<unk>"] not in caption.tokens
            expect_equal(
                caption, reference.search(decoder, image, WORD_MAP, beam_size, 12, no_unk=True)[0]
            )
    assert unks > 10


def test_hard_attention_attends_only_to_the_most_likely_location():
    decoder, _ = make_case(3, end_bias=-3)
    # A vector for each location: on a coarser grid neighbours have equal attention, and which of
    # them is the arg max would depend on the order of floating-point sums.
    features = torch.randn(8, 196, 9, dtype=torch.float64)
    ours = beam_search(decoder, features, WORD_MAP, 3, max_len=12, hard_attention=True)
    soft = beam_search(decoder, features, WORD_MAP, 3, max_len=12)
    for caption, image in zip(ours, reference.encode(features).split(1)):
        expected = reference.search(decoder, image, WORD_MAP, 3, 12, hard=most_likely_location)
        expect_equal(caption, expected[0])
        assert (np.sort(caption.alphas)[:, -2:] == [0, 1]).all()
    assert any(a.score != b.score for a, b in zip(ours, soft))


def test_a_search_that_never_finishes_returns_its_best_beam_with_its_attention():
    decoder, features = make_case(0, end_bias=-1e4)
    for caption in beam_search(decoder, features, WORD_MAP, 3, max_len=7):
        assert not caption.finished
        assert len(caption.tokens) == 7
        np.testing.assert_allclose(caption.alphas.sum(1), 1, atol=1e-6)


def test_end_may_follow_the_last_of_max_len_words_as_in_the_tutorial():
    decoder, features = make_case(2, end_bias=-1)
    free = beam_search(decoder, features, WORD_MAP, 3)
    lengths = [len(caption.tokens) for caption in free]
    assert all(caption.finished for caption in free) and len(set(lengths)) > 2
    exact = []
    for i, (length, expected) in enumerate(zip(lengths, free)):
        if length:
            [found] = beam_search(decoder, features[i : i + 1], WORD_MAP, 3, max_len=length)
            exact.append(found.finished and found.tokens == expected.tokens)
    assert sum(exact) >= len(exact) - 1  # a narrower search may set another beam aside
    for caption in beam_search(decoder, features, WORD_MAP, 3, max_len=1):
        assert len(caption.tokens) <= 1


def test_a_caption_can_be_empty():
    decoder, features = make_case(0, end_bias=1e4)
    for caption in beam_search(decoder, features, WORD_MAP, 3):
        assert caption.tokens == [] and caption.finished and caption.alphas.shape == (0, 196)


def test_a_beam_wider_than_the_vocabulary_is_allowed():
    decoder, features = make_case(1, end_bias=0)
    assert len(beam_search(decoder, features, WORD_MAP, beam_size=20, max_len=4)) == 8


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


@pytest.mark.parametrize("sample", [False, True])
def test_scores_that_are_not_finite_are_an_error(sample):
    decoder, features = make_case(0, 0)
    with pytest.raises(UserError, match="not finite"):
        beam_search(decoder, features * float("nan"), WORD_MAP, 2, sample=sample)


def test_no_images_give_no_captions():
    decoder, features = make_case(0, 0)
    assert beam_search(decoder, features[:0], WORD_MAP, 3) == []


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("beam_size", [1, 3])
def test_no_ngram_is_said_twice_when_that_is_asked_for(beam_size, n):
    repeated = 0
    for seed in range(6):
        decoder, features = make_case(seed, end_bias=(-9, -4)[seed % 2])
        plain = beam_search(decoder, features, WORD_MAP, beam_size, max_len=12)
        captions = beam_search(
            decoder, features, WORD_MAP, beam_size, max_len=12, no_repeat_ngram=n
        )
        for before, caption, image in zip(plain, captions, reference.encode(features).split(1)):
            expect_equal(
                caption,
                reference.search(decoder, image, WORD_MAP, beam_size, 12, no_repeat_ngram=n)[0],
            )
            repeated += before.tokens != caption.tokens
            ngrams = list(zip(*(caption.tokens[i:] for i in range(n))))
            assert len(ngrams) == len(set(ngrams))
    assert repeated > 3


def sample(decoder, features, max_len=12, **options):
    return beam_search(decoder, features, WORD_MAP, max_len=max_len, sample=True, **options)


def test_sampled_captions_have_the_models_own_scores_and_attention():
    decoder, features = make_case(0, end_bias=-1)
    torch.manual_seed(0)
    captions = sample(decoder, features, temperature=0.8, top_p=0.95, n_best=3)
    lengths = set()
    for caption, image in zip(captions, reference.encode(features).split(1)):
        scores = [c.score for c in (caption, *caption.alternatives)]
        assert len(scores) == 3 and scores == sorted(scores, reverse=True)
        for sampled in (caption, *caption.alternatives):
            words = sampled.tokens + [WORD_MAP["<end>"]] * sampled.finished
            assert sampled.finished or len(sampled.tokens) == 12
            caption_ids = torch.tensor([WORD_MAP["<start>"], *words])
            logits, alphas = reference.decode(decoder, image, caption_ids)
            log_probs = logits.log_softmax(1)[range(len(words)), words]
            assert sampled.score == pytest.approx(log_probs.sum().item())
            expected = alphas[: len(sampled.tokens)].detach()
            np.testing.assert_allclose(sampled.alphas, expected, atol=1e-6)
            lengths.add(len(words))
    assert len(lengths) > 3


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"top_p": 1e-9}], ids=str)
def test_sampling_only_from_the_likeliest_word_is_greedy_search(options):
    decoder, features = make_case(1, end_bias=-1)
    for sampled, greedy in zip(
        sample(decoder, features, **options),
        beam_search(decoder, features, WORD_MAP, 1, max_len=12),
    ):
        assert sampled.tokens == greedy.tokens and sampled.finished == greedy.finished
        if sampled.finished:
            assert sampled.score == pytest.approx(greedy.score)


def test_the_same_seed_samples_the_same_captions_and_options_hold():
    decoder, features = make_case(2, end_bias=-3)
    with torch.no_grad():
        decoder.fc.bias[WORD_MAP["<unk>"]] += 4

    def tokens_of(seed, **options):
        torch.manual_seed(seed)
        return [c.tokens for c in sample(decoder, features, **options)]

    assert tokens_of(3) == tokens_of(3) != tokens_of(4)
    assert any(WORD_MAP["<unk>"] in tokens for tokens in tokens_of(3))
    for tokens in tokens_of(3, no_unk=True, no_repeat_ngram=1):
        assert WORD_MAP["<unk>"] not in tokens and len(tokens) == len(set(tokens))


def test_nucleus_is_the_fewest_likeliest_words_that_reach_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.15, 0.3, 0.5]]).log()
    for top_p, kept in ((0.4, 1), (0.49, 1), (0.51, 2), (0.79, 2), (0.9, 3), (0.96, 4), (1, 4)):
        found = token_probabilities(logits, top_p=top_p)
        assert (found > 0).sum(1).tolist() == [kept, kept]
        expected = logits.exp() * (found > 0)
        torch.testing.assert_close(found, expected)
    hot = token_probabilities(logits, temperature=2)
    torch.testing.assert_close(hot, logits.exp().sqrt() / logits.exp().sqrt().sum(1, True))
