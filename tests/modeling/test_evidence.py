"""Evidence beside finite differences of the plain equations, a word and a location at a time."""

import numpy as np
import pytest
import torch
from factories import make_captions, make_decoder

from modeling.decoding import PlainSteps
from modeling.evidence import find_batch_evidence, find_evidence
from modeling.sampling import most_likely_location

START, TOKENS = 22, [3, 17, 3, 8]


def log_prob(decoder, annotations, t, hard):
    """Of word t after those before it; hard: as in `Attention`, before word t and at it"""
    state = decoder.init_hidden_state(annotations)
    for token in [START, *TOKENS][:t]:
        state, *_ = decoder.step(torch.tensor([token]), state, annotations, hard[0])
    token = torch.tensor([[START, *TOKENS][t]])
    state, *_ = decoder.step(token, state, annotations, hard[1])
    return decoder.logits(state[0]).log_softmax(1)[0, TOKENS[t]]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("hard", [None, most_likely_location])
def test_evidence_is_the_weight_times_the_change_of_the_words_log_probability(plain, hard):
    decoder = make_decoder(encoded_image_size=3, scale=1.5).eval()
    decoder.plain = plain
    features = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():  # as a search has them
        found = find_evidence(decoder, features.clone(), TOKENS, START, hard)
    assert found.shape == (4, 9) and found.dtype == np.float32
    annotations = PlainSteps(decoder, features.unsqueeze(0)).annotations
    for t in range(4):
        for p in range(9):
            values, weight = [], None
            for change in (1e-5, -1e-5):

                def changed(alpha, change=change, p=p):
                    nonlocal weight
                    weights = alpha.clone() if hard is None else hard(alpha)
                    weight = weights[0, p].detach().item()
                    weights[0, p] += change
                    return weights

                values.append(log_prob(decoder, annotations, t, (hard, changed)).item())
            expected = max(0.0, weight * (values[0] - values[1]) / 2e-5)
            assert found[t, p] == pytest.approx(expected, abs=1e-7)
    assert 0 < (found > 0).sum() < found.size


def test_a_caption_without_words_has_no_evidence():
    decoder = make_decoder(encoded_image_size=3).eval()
    assert find_evidence(decoder, torch.randn(4, 9).double(), [], START).shape == (0, 9)


@pytest.mark.parametrize("plain", [False, True])
def test_evidence_of_a_batch_is_that_of_its_captions_one_by_one(plain):
    decoder, (captions, lengths) = make_decoder(scale=1.5).eval(), make_captions(3, 2)
    decoder.plain, features = plain, torch.randn(3, 64, 9, dtype=torch.float64)
    found = find_batch_evidence(decoder, features, captions, lengths)
    assert found.shape == (3, 2, int(lengths.max()) - 1, 196) and not found.requires_grad
    for i, r in np.ndindex(3, 2):
        start, *words = captions[i, r, : lengths[i, r]].tolist()
        expected = find_evidence(decoder, features[i], words, start)
        torch.testing.assert_close(found[i, r, : len(words)].float().numpy(), expected)
        assert not found[i, r, len(words) :].any()
    assert found.any()
