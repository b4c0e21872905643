"""What training minimises, against the expectation over all captions and locations of a model."""

import itertools
import math
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from factories import CAPTION_WORDS, as_coco, caption_sets, make_captions, make_decoder
from pycocoevalcap.cider.cider import Cider

from modeling.beam_search import Search
from modeling.devices import Distributed
from modeling.evidence import find_batch_evidence
from modeling.sampling import sample_captions, scheduled_sampling
from training import losses as criteria
from training.losses import Batch, HardAttention, Reward, SelfCritical, TeacherForcing, token_losses

WORD_MAP = {"<pad>": 0, "dog": 1, "<start>": 2, "<end>": 3}
START, END = 2, 3


def tiny_decoder(dropout=0.0):
    sizes = {"attention_dim": 3, "embed_dim": 3, "decoder_dim": 4, "encoder_dim": 3}
    return make_decoder(4, 1, 2.0, **sizes, dropout=dropout, encoded_image_size=2)


def every_caption(tokens):
    """Yield all captions that can be sampled: tokens after <start>, up to <end> or this many."""
    for words in itertools.product(range(4), repeat=tokens):
        length = words.index(END) + 1 if END in words else tokens
        if all(word == 0 for word in words[length:]):  # yield each once
            yield words[:length]


def log_prob(decoder, features, words):
    """The log-probability of a caption by the textbook version; features (1, G, E)"""
    encoded = reference.encode(features, 2)
    logits, _ = reference.decode(decoder, encoded, torch.tensor([START, *words]))
    return logits.log_softmax(1)[range(len(words)), words].sum()


def expect_mean(draw, exact, draws):
    """The mean of what draw() returns equals `exact` within its standard error, which is small."""
    drawn = torch.stack([draw() for _ in range(draws)])
    error = drawn.std(0) / math.sqrt(draws)
    assert error.norm() < 0.05 * exact.norm()
    z = ((drawn.mean(0) - exact) / error)[error > 1e-12]
    assert len(z) > 50 and z.abs().max() < 5 and 0.7 < z.square().mean() < 1.5, z


def flat_gradient(loss, decoder):
    weights = list(decoder.parameters())
    gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def test_loss_and_gradients_are_those_of_the_distinct_captions_alone():
    """An image with few captions is filled up by repeating them, which counts nothing."""
    decoder, (captions, lengths) = make_decoder(), make_captions(3, 4)
    lengths[[0, 0, 1, 1, 1], [2, 3, 1, 2, 3]] = 1  # 2, 1 and 4 captions are distinct
    features = torch.randn(3, 16, 9, dtype=torch.float64)
    assert TeacherForcing().count_captions(lengths) == 7
    found = criteria.doubly_stochastic_penalty(torch.zeros(1, 2, 2, 9), lengths[1:2, :2])
    assert found.tolist() == [[1, 0]]  # without attention mass
    batch = Batch(features, captions, lengths, [0, 1, 2], float((lengths - 1).sum()), 7)
    loss, *_ = TeacherForcing(0.7)(decoder, batch)
    ours = torch.autograd.grad(loss, list(decoder.parameters()))
    image = (lengths > 1).nonzero()[:, 0]  # of each caption that counts, as an image of its own
    distinct = captions[lengths > 1][:, None], lengths[lengths > 1][:, None]
    textbook = reference.loss(decoder, features[image], *distinct, 0.7)
    torch.testing.assert_close(loss, textbook)
    for a, b in zip(ours, torch.autograd.grad(textbook, list(decoder.parameters()))):
        torch.testing.assert_close(a, b)


def test_losses_of_half_precision_logits_are_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        logits, targets = torch.randn(64, 500).mul_(3).to(dtype), torch.randint(500, (64,))
        exact = F.cross_entropy(logits.double(), targets, reduction="none")
        losses = token_losses(logits, targets)
        torch.testing.assert_close(losses, exact.float(), rtol=1e-6, atol=1e-5)


def test_captions_are_sampled_with_their_probabilities():
    decoder, features = tiny_decoder().eval(), torch.randn(1, 4, 3, dtype=torch.float64)
    torch.manual_seed(0)
    search = Search(n_best=400, max_len=2, sample=True)  # words; <end> may follow
    captions, lengths = sample_captions(decoder, features.expand(50, -1, -1), WORD_MAP, search)
    rows = zip(captions.flatten(0, 1).tolist(), lengths.flatten().tolist())
    found = [tuple(caption[1:length]) for caption, length in rows]
    assert (captions[:, :, 0] == START).all() and len(found) == 20000
    assert all((c[n:] == 0).all() for c, n in zip(captions.flatten(0, 1), lengths.flatten()))
    total, possible = 0.0, list(every_caption(3))
    for words in possible:
        p = log_prob(decoder, features, words).exp().item()
        total += p
        assert abs(found.count(words) / 20000 - p) < 4.5 * math.sqrt(p * (1 - p) / 20000), words
    assert total == pytest.approx(1) and len(possible) == 40


def test_self_critical_gradient_is_that_of_the_expected_reward():
    decoder, features = tiny_decoder(dropout=0.5), torch.randn(1, 4, 3, dtype=torch.float64)
    rewards = {words: 3 * math.sin(7 * i) for i, words in enumerate(every_caption(2))}
    decoder.eval()  # without dropout, as the criterion asks for
    expected, penalty = 0.0, 0.0
    for words, reward in rewards.items():
        p = log_prob(decoder, features, words).exp()
        caption, length = torch.tensor([[[START, *words]]]), torch.tensor([[len(words) + 1]])
        output = decoder(features, caption, length)
        expected = expected + p * reward
        # The attention penalty has a gradient of its own, in the sampled captions.
        penalty = penalty + p.detach() * ((1 - output.alphas.sum(2)) ** 2).mean()
    exact = flat_gradient(0.5 * penalty - expected, decoder)

    data = Namespace(word_map=WORD_MAP, entries=[{"references": [["dog"]]}])
    criterion = SelfCritical(data, 0.5, samples=3)
    criterion.sampling = replace(criterion.sampling, max_len=1)
    assert criterion.count_captions(torch.zeros(400, 1)) == 1200 and not criterion.dropout

    def reward(images, captions, lengths):
        rows = zip(captions.flatten(0, 1).tolist(), lengths.flatten().tolist())
        return torch.tensor([rewards[tuple(c[1:n])] for c, n in rows]).view(lengths.shape)

    criterion.reward = reward
    batch = Batch(features.expand(400, -1, -1), None, None, None, None, 1200)

    def draw():
        loss, total, _ = criterion(decoder, batch)
        assert abs(total / 1200 - expected) < 0.5
        return flat_gradient(loss, decoder)

    torch.manual_seed(0)
    expect_mean(draw, exact, draws=40)


def test_each_sample_is_weighted_by_its_reward_minus_the_mean_of_the_other_ones():
    decoder, (captions, lengths) = make_decoder(), make_captions(2, 3)
    output = decoder(torch.randn(2, 64, 9, dtype=torch.float64), captions, lengths)
    rewards = torch.tensor([[1.0, 2.0, 6.0], [0.0, 3.0, 3.0]])
    advantages = [1 - 4, 2 - 3.5, 6 - 1.5, 0 - 3, 3 - 1.5, 3 - 1.5]
    losses = token_losses(output.logits, output.targets).split((lengths - 1).flatten().tolist())
    expected = sum(weight * loss.sum() for weight, loss in zip(advantages, losses)) / 6
    torch.testing.assert_close(criteria.self_critical_loss(output, lengths, rewards, 6), expected)


def test_a_share_of_cross_entropy_is_mixed_into_the_self_critical_loss():
    decoder, features = tiny_decoder(), torch.randn(6, 4, 3, dtype=torch.float64)
    entries = [{"references": [["dog"] * (i + 1)]} for i in range(6)]
    data = Namespace(word_map=WORD_MAP, entries=entries)
    captions = torch.tensor([[[START, 1, END, 0], [START, 1, 1, END]]]).expand(6, -1, -1)
    lengths = torch.tensor([[3, 4]]).expand(6, -1)
    batch = Batch(features, captions, lengths, list(range(6)), 30.0, 24)

    def loss_of(alpha_c, share):
        torch.manual_seed(3)
        criterion = SelfCritical(data, alpha_c, samples=4, cross_entropy_share=share)
        return criterion(decoder, batch)[0]

    output = decoder(features, captions, lengths)
    cross_entropy = F.cross_entropy(output.logits, output.targets)
    expected = 0.7 * loss_of(0.0, 0.0) + 0.3 * cross_entropy
    expected = expected + loss_of(0.5, 0.0) - loss_of(0.0, 0.0)  # the whole penalty
    loss = loss_of(0.5, 0.3)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(flat_gradient(loss, decoder), flat_gradient(expected, decoder))


def test_attention_is_drawn_to_the_square_of_its_evidence_in_the_neighbourhood():
    alphas = torch.rand(2, 1, 3, 16, dtype=torch.float64).softmax(3)
    evidence = torch.rand(2, 1, 3, 16, dtype=torch.float64) * torch.tensor([0.01, 0.1, 1])[:, None]
    evidence[1, 0, 2] = 0  # after the end of a caption
    expected = 0.0
    for i, t in np.ndindex(2, 3):
        grid, target = evidence[i, 0, t].view(4, 4).numpy(), np.zeros((4, 4))
        for y, x in np.ndindex(4, 4):
            target[y, x] = grid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean() ** 2
        share = target / max(target.sum(), 1e-300)
        log_alphas = alphas[i, 0, t].log().view(4, 4).numpy()
        expected -= min(1.0, grid.sum()) * (share * log_alphas).sum()
    assert evidence.sum(3).max() > 1  # so that a word counts less than its evidence
    assert criteria.evidence_loss(alphas, evidence).item() == pytest.approx(expected)


@pytest.mark.parametrize("critical", [False, True])
def test_the_evidence_term_is_added_for_one_true_caption_of_each_image(critical):
    decoder, features = tiny_decoder(), torch.randn(2, 4, 3, dtype=torch.float64)
    entries = [{"references": [["dog"]]}] * 2
    data = Namespace(word_map=WORD_MAP, entries=entries)
    captions = torch.tensor([[[START, 1, END, 0], [START, 1, 1, END], [START, 1, END, 0]]])
    captions, lengths = captions.expand(2, -1, -1), torch.tensor([[3, 4, 1]]).expand(2, -1)
    batch = Batch(features, captions, lengths, [0, 1], 10.0, 4)

    def run(evidence_c, seed):
        torch.manual_seed(seed)
        if critical:
            return SelfCritical(data, 1.0, 4, 0.2, evidence_c)(decoder, batch)
        return TeacherForcing(1.0, evidence_c)(decoder, batch)

    output, expected = decoder(features, captions, lengths), []
    evidence = find_batch_evidence(decoder, features, captions, lengths)
    for r in (0, 1):  # the third only fills up
        term = criteria.evidence_loss(output.alphas[:, [r]], evidence[:, [r]])
        expected.append(3 * 2 * term / 10)
    drawn = set()
    for seed in range(8):
        (loss, total, _), (without, same_total, _) = run(3.0, seed), run(0.0, seed)
        distances = [(loss - without - term).abs().item() for term in expected]
        drawn.add(r := int(np.argmin(distances)))
        assert distances[r] < 1e-6 < distances[1 - r] and total == same_total
        changed = flat_gradient(loss, decoder) - flat_gradient(without, decoder)
        gradient = torch.autograd.grad(
            expected[r],
            list(decoder.parameters()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        torch.testing.assert_close(changed, torch.cat([x.flatten() for x in gradient]))
    assert drawn == {0, 1}


def enumerate_locations(decoder, features, caption):
    """For each sequence of locations: log p(it), log p(words | it) and alpha's summed entropies."""
    encoded = reference.encode(features, 2)  # (1, P, E)
    for locations in itertools.product(range(encoded.shape[1]), repeat=len(caption) - 1):
        h, c = decoder.init_hidden_state(encoded)
        log_p_locations = log_p_words = entropy = 0.0
        for t, location in enumerate(locations):
            _, alpha, _ = decoder.attention(encoded, h)
            log_alpha = alpha[0].log()
            log_p_locations = log_p_locations + log_alpha[location]
            entropy = entropy - (alpha[0] * log_alpha).sum()
            context = torch.sigmoid(decoder.f_beta(h)) * encoded[:, location]
            word = decoder.embedding(caption[t : t + 1])
            h, c = decoder.decode_step(torch.cat([word, context], 1), (h, c))
            log_p_words = log_p_words + decoder.fc(h).log_softmax(1)[0, caption[t + 1]]
        yield log_p_locations, log_p_words, entropy


def test_hard_attention_gradient_is_that_of_the_expected_log_probability():
    """For half of the captions; the others have the gradient of soft attention."""
    decoder, features = tiny_decoder(), 3 * torch.randn(1, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        decoder.decode_step.weight_ih.mul_(2)
        decoder.fc.weight.mul_(4)
    caption, lambda_e = torch.tensor([START, 1, END]), 0.3
    expected = 0.0
    for log_p_locations, log_p_words, entropy in enumerate_locations(decoder, features, caption):
        p = log_p_locations.exp()
        expected = expected + p * log_p_words + lambda_e * p.detach() * entropy
    hard = flat_gradient(-expected / 2, decoder)
    captions, lengths = caption.view(1, 1, 3), torch.tensor([[3]])
    output = decoder(features, captions, lengths)
    entropy = -(output.alphas * output.alphas.log()).sum()
    loss = criteria.doubly_stochastic_loss(output, lengths, 0.0) - lambda_e * entropy / 2
    soft = flat_gradient(loss, decoder)
    assert (hard - soft).norm() > 0.1 * hard.norm()

    criterion = HardAttention(0.0, lambda_r=1.0, lambda_e=lambda_e)
    criterion.baseline = torch.tensor(-2.0)  # the mean does not depend on it
    tensors = (features, captions, lengths.unsqueeze(2))
    features, captions, lengths = (tensor.expand(600, -1, -1) for tensor in tensors)
    batch = Batch(features, captions, lengths.squeeze(2), None, 2 * 600, 600)

    def draw():
        loss, *_ = criterion(decoder, batch)
        return flat_gradient(loss, decoder)

    torch.manual_seed(0)
    expect_mean(draw, 0.5 * hard + 0.5 * soft, draws=40)


def test_hard_attention_samples_for_some_captions_at_all_their_steps():
    decoder, (captions, lengths) = make_decoder(scale=1.0), make_captions(30, 5)
    features = torch.randn(30, 64, 9, dtype=torch.float64)
    output = decoder(features, captions, lengths, hard_fraction=0.5)
    steps, drawn = output.alphas.sum(3) > 0.5, output.weights.amax(3) == 1  # (N, R, T)
    assert (drawn == (drawn[:, :, :1] & steps)).all() and 0 < drawn.sum() < steps.sum()
    assert (output.weights[~drawn] == output.alphas[~drawn]).all()


def test_baseline_is_the_moving_average_of_log_probabilities():
    decoder, (captions, lengths) = make_decoder(), make_captions(4, 3)
    lengths[2, 1] = 1  # a repetition, which counts nothing
    features = torch.randn(4, 64, 9, dtype=torch.float64)
    criterion, baseline = HardAttention(0.0, 0.1, 0.0), 0.0
    for step in range(3):
        log_p = []
        for part in (slice(0, 1), slice(1, 4)):  # a step may come in parts
            torch.manual_seed(step)
            output = decoder(features[part], captions[part], lengths[part], 0.0, 0.5)
            words = range(len(output.targets))
            per_word = torch.log_softmax(output.logits, 1)[words, output.targets]
            found = [x.sum() for x in per_word.split((lengths[part] - 1).flatten().tolist())]
            found = torch.stack(found).detach().view(-1, 3)
            torch.testing.assert_close(criteria.caption_log_probs(output, lengths[part]), found)
            log_p += found[lengths[part] > 1].tolist()
            torch.manual_seed(step)
            batch = Batch(features[part], captions[part], lengths[part], None, 1, 1)
            loss, total, _ = criterion(decoder, batch)
            torch.testing.assert_close(total, -found.sum())  # without the reward
            log_alphas = output.alphas.detach().clamp(min=1e-30).log()
            log_p_locations = (output.weights * log_alphas).sum((2, 3))
            rewards = 0.1 * (found - baseline) * log_p_locations
            assert loss.item() == pytest.approx((total - rewards.sum()).item(), rel=1e-5)
        criterion.after_step(Distributed(torch.device("cpu")))
        baseline = 0.9 * baseline + 0.1 * np.mean(log_p)
        assert float(criterion.baseline) == pytest.approx(baseline, rel=1e-5)


def test_scheduled_sampling_at_1_feeds_back_what_the_model_says():
    decoder, (captions, lengths) = make_decoder(), make_captions(5, 3)
    features = torch.randn(5, 64, 9, dtype=torch.float64)
    with torch.no_grad():
        decoder.fc.weight.mul_(1e9)  # now all probability is on the arg max
    output = decoder(features, captions, lengths, sampling_prob=1.0)
    logits, different = iter(output.logits.split((lengths - 1).flatten().tolist())), 0
    for image, rows, sizes in zip(reference.encode(features).split(1), captions, lengths.tolist()):
        for caption, size in zip(rows, sizes):
            fed = caption[:1]
            while len(fed) < size:
                expected, _ = reference.decode(decoder, image, torch.cat([fed, fed[:1]]))
                fed = torch.cat([fed, expected[-1:].argmax(1)])
            torch.testing.assert_close(next(logits), expected)
            different += int((fed != caption[:size]).sum())
    assert different > 30
    true = torch.cat([c[1:n] for c, n in zip(captions.flatten(0, 1), lengths.flatten())])
    assert torch.equal(output.targets, true)  # the targets stay the true ones


def test_scheduled_sampling_feeds_back_with_the_asked_probability():
    torch.manual_seed(0)
    true = torch.full((4000,), 7)
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    tokens = scheduled_sampling(true, torch.zeros(4000, 1), lambda h: logits.expand(4000, -1), 0.3)
    counts = torch.bincount(tokens, minlength=8) / 4000
    assert counts[7] == pytest.approx(0.7, abs=0.03)
    assert counts[:3].tolist() == pytest.approx([0.15, 0.075, 0.075], abs=0.02)
    assert torch.equal(scheduled_sampling(true, None, lambda _: logits.expand(4000, -1), 0.0), true)


def test_reward_is_cider_d_on_words_end_included():
    sets = list(caption_sets(20, 0))
    references = [texts for found, _ in sets for texts in found]
    samples = [[words, texts[0]] for found, drawn in sets for texts, words in zip(found, drawn)]
    for i, pair in enumerate(samples):  # some samples have no end
        samples[i] = [[*words, *["<end>"] * (i % 7 > 0)] for words in pair]
    words = ["<pad>", *sorted(set(CAPTION_WORDS)), "<unk>", "<start>", "<end>"]
    entries = [{"references": texts} for texts in references]
    data = Namespace(word_map={word: i for i, word in enumerate(words)}, entries=entries)
    ids = [torch.tensor([data.word_map[x] for x in ["<start>", *y]]) for z in samples for y in z]
    captions = torch.nn.utils.rnn.pad_sequence(ids, True).view(len(samples), 2, -1)
    lengths, shuffled = torch.tensor(list(map(len, ids))).view(-1, 2), torch.randperm(len(samples))
    ours = torch.empty(len(samples), 2)
    ours[shuffled] = Reward(data)(shuffled.numpy(), captions[shuffled], lengths[shuffled])
    ended = [[[*words, "<end>"] for words in texts] for texts in references]
    for k in range(2):
        _, expected = Cider().compute_score(*as_coco(ended, [pair[k] for pair in samples]))
        np.testing.assert_allclose(ours[:, k], expected, rtol=1e-5, atol=1e-6)
