"""The batched search against a list of beams, one image at a time."""

import numpy as np
import pytest
import reference
import torch
from factories import WORD_MAP, make_case

from modeling.beam_search import beam_search
from modeling.sampling import most_likely_location
from utils import UserError


def expect_equal(ours, textbook):
    words, alphas, score = textbook
    finished = words[-1] == WORD_MAP["<end>"]
    assert ours.tokens == words[1:len(words) - finished]
    assert ours.finished == finished
    assert ours.score == pytest.approx(score, abs=1e-9)
    expected = torch.stack(alphas)[:len(ours.tokens)]
    assert ours.alphas.shape == expected.shape
    np.testing.assert_allclose(ours.alphas, expected, atol=1e-6)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 4, 5])
def test_batched_search_equals_one_image_at_a_time(beam_size):
    finished, lengths = [], set()
    for seed in range(12):
        decoder, features = make_case(seed, end_bias=(-9, -4, -1, 1)[seed % 4])
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
        captions = beam_search(decoder, features, WORD_MAP, beam_size, 12, n_best=beam_size)
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
        plain = beam_search(decoder, features, WORD_MAP, 4, 12)
        captions = beam_search(decoder, features, WORD_MAP, 4, 12, n_best=3,
                               length_penalty=length_penalty)
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
        unks += sum(WORD_MAP["<unk>"] in caption.tokens
                    for caption in beam_search(decoder, features, WORD_MAP, beam_size, 12))
        captions = beam_search(decoder, features, WORD_MAP, beam_size, 12, no_unk=True)
        for caption, image in zip(captions, reference.encode(features).split(1)):
            assert WORD_MAP["<unk>"] not in caption.tokens
            expect_equal(caption, reference.search(
                decoder, image, WORD_MAP, beam_size, 12, no_unk=True)[0])
    assert unks > 10


def test_hard_attention_attends_only_to_the_most_likely_location(monkeypatch):
    decoder, _ = make_case(3, end_bias=-3)
    # A vector for each location: on a coarser grid neighbours have equal attention, and which of
    # them is the arg max would depend on the order of floating-point sums.
    features = torch.randn(8, 196, 9, dtype=torch.float64)
    ours = beam_search(decoder, features, WORD_MAP, 3, 12, hard_attention=most_likely_location)
    soft = beam_search(decoder, features, WORD_MAP, 3, 12)
    attend = reference.attend

    def attend_to_one(attention, encoded, h):
        _, alpha = attend(attention, encoded, h)
        best = alpha.argmax(1)
        return encoded[torch.arange(len(alpha)), best], torch.eye(alpha.shape[1])[best]

    monkeypatch.setattr(reference, "attend", attend_to_one)
    for caption, image in zip(ours, reference.encode(features).split(1)):
        expect_equal(caption, reference.search(decoder, image, WORD_MAP, 3, 12)[0])
        assert (np.sort(caption.alphas)[:, -2:] == [0, 1]).all()
    assert any(a.score != b.score for a, b in zip(ours, soft))


def test_a_search_that_never_finishes_returns_its_best_beam_with_its_attention():
    decoder, features = make_case(0, end_bias=-1e4)
    for caption in beam_search(decoder, features, WORD_MAP, 3, max_len=7):
        assert not caption.finished
        assert len(caption.tokens) == 7
        np.testing.assert_allclose(caption.alphas.sum(1), 1, atol=1e-6)


def test_a_caption_can_be_empty():
    decoder, features = make_case(0, end_bias=1e4)
    for caption in beam_search(decoder, features, WORD_MAP, 3):
        assert caption.tokens == [] and caption.finished and caption.alphas.shape == (0, 196)


def test_a_beam_wider_than_the_vocabulary_is_allowed():
    decoder, features = make_case(1, end_bias=0)
    assert len(beam_search(decoder, features, WORD_MAP, beam_size=20, max_len=4)) == 8


def test_wrong_beam_sizes_are_errors():
    decoder, features = make_case(0, 0)
    for beam_size, n_best in ((0, 1), (-1, 1), (3, 4), (3, 0)):
        with pytest.raises(ValueError, match="it must be"):
            beam_search(decoder, features, WORD_MAP, beam_size, n_best=n_best)
    for length_penalty in (-1, 1000, float("nan")):
        with pytest.raises(ValueError, match="length_penalty is .*, it must be 0 to 10"):
            beam_search(decoder, features, WORD_MAP, length_penalty=length_penalty)


def test_scores_that_are_not_finite_are_an_error():
    decoder, features = make_case(0, 0)
    with pytest.raises(UserError, match="not finite"):
        beam_search(decoder, features * float("nan"), WORD_MAP, 2)


def test_no_images_give_no_captions():
    decoder, features = make_case(0, 0)
    assert beam_search(decoder, features[:0], WORD_MAP, 3) == []
