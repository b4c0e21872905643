"""The fast steps against the plain ones, in float64, and the plain ones against loops in NumPy."""

import copy

import numpy as np
import pytest
import torch
from factories import DECODER_KINDS, WORD_MAP, make_captions, make_case, make_decoder
from torch import nn

from modeling import autograd
from modeling.beam_search import beam_search
from modeling.decoding import (
    KNOWN_SOURCE,
    FastSteps,
    PlainSteps,
    pooling_matrix,
    source_digest,
)
from modeling.devices import autocast
from modeling.sampling import most_likely_location
from models import Attention, DecoderWithAttention, Encoder
from training.losses import doubly_stochastic_loss


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step_by_loops(decoder, token, h, c, locations):
    """Equations 1 to 5 and 13 for one caption, a number at a time: new h, c; alpha (P,)"""
    w = {name: p.detach().numpy() for name, p in decoder.named_parameters()}
    energy = []
    for a in locations:  # (E,)
        total = w["attention.full_att.bias"][0]
        for i in range(len(w["attention.encoder_att.bias"])):
            hidden = w["attention.encoder_att.bias"][i] + w["attention.decoder_att.bias"][i]
            hidden += sum(x * y for x, y in zip(w["attention.encoder_att.weight"][i], a))
            hidden += sum(x * y for x, y in zip(w["attention.decoder_att.weight"][i], h))
            total += w["attention.full_att.weight"][0, i] * max(0, hidden)
        energy.append(total)
    alpha = np.exp(np.array(energy) - max(energy))
    alpha /= alpha.sum()
    context = sum(weight * a for weight, a in zip(alpha, locations))
    context = sigmoid(w["f_beta.weight"] @ h + w["f_beta.bias"]) * context
    x = [*w["embedding.weight"][token], *context]
    gates = []
    for row in range(4 * len(h)):
        total = w["decode_step.bias_ih"][row] + w["decode_step.bias_hh"][row]
        total += sum(p * q for p, q in zip(w["decode_step.weight_ih"][row], x))
        total += sum(p * q for p, q in zip(w["decode_step.weight_hh"][row], h))
        gates.append(total)
    i, f, g, o = np.array(gates).reshape(4, len(h))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c, alpha


def test_plain_steps_are_the_papers_equations_counted_by_loops():
    decoder, features = make_decoder(), torch.randn(2, 4, 9, dtype=torch.float64)
    decoder.args["encoded_image_size"] = 2
    steps, rows = PlainSteps(decoder, features), torch.tensor([0, 1, 1])
    tokens = torch.tensor([[3, 5, 7], [1, 4, 9]])
    with torch.no_grad():
        state = steps.initial_state(rows)
        for m, image in enumerate(rows.tolist()):
            locations = features[image].numpy()
            mean = sum(locations) / len(locations)
            h = decoder.init_h.weight.numpy() @ mean + decoder.init_h.bias.numpy()
            c = decoder.init_c.weight.numpy() @ mean + decoder.init_c.bias.numpy()
            found = state
            for token in tokens:
                found, alpha, _ = steps.step(token, found, rows)
                h, c, expected = step_by_loops(decoder, token[m], h, c, locations)
                for ours, loops in ((found[0][m], h), (found[1][m], c), (alpha[m], expected)):
                    np.testing.assert_allclose(ours.numpy(), loops, rtol=1e-10, atol=1e-12)
            logits = decoder.fc.weight.numpy() @ h + decoder.fc.bias.numpy()
            np.testing.assert_allclose(steps.logits(found[0])[m].numpy(), logits, rtol=1e-9)


# Both paths agree


def plain(decoder):
    decoder = copy.deepcopy(decoder)
    decoder.plain = True
    return decoder


def expect_both_equal(run, decoder):
    """run(decoder) returns tensors, in a tuple; the plain decoder must give the same ones."""
    torch.manual_seed(0)
    fast = run(decoder)
    torch.manual_seed(0)
    torch.testing.assert_close(run(plain(decoder)), fast, rtol=1e-9, atol=1e-11)


@pytest.fixture(params=[autograd.CPU_CHUNK, 20_000, 1], ids=lambda size: f"chunks of {size} bytes")
def chunks(request, monkeypatch):
    """Large tensors are processed in chunks: here of the usual size, of some items, and of one."""
    monkeypatch.setattr(autograd, "CPU_CHUNK", request.param)


@pytest.mark.parametrize("kind", DECODER_KINDS)
@pytest.mark.parametrize("options", [{}, {"hard_fraction": 0.5}, {"sampling_prob": 0.7}], ids=str)
@pytest.mark.parametrize(
    "n, r, cells", [(1, 1, 64), (5, 1, 64), (4, 5, 64), (3, 2, 196), (2, 3, 1), (5, 5, 49)]
)
def test_teacher_forcing_and_every_gradient_are_equal(kind, options, n, r, cells, chunks):
    decoder = make_decoder(seed=n, dropout=0.5, kind=kind)
    captions, lengths = make_captions(n, r, seed=n)
    lengths[0, -1] = 1 if r > 1 else lengths[0, -1]  # a caption of which nothing is predicted
    data = torch.randn(n, cells, 9, dtype=torch.float64)

    def run(decoder):
        features = data.clone().requires_grad_()
        output = decoder(features, captions, lengths, **options)
        loss = doubly_stochastic_loss(output, lengths, alpha_c=0.7)
        loss = loss + (output.weights * output.alphas.detach()).sum()
        wanted = [features, *decoder.parameters()]
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return *output, loss, *gradients

    expect_both_equal(run, decoder)


@pytest.mark.parametrize("kind", DECODER_KINDS)
@pytest.mark.parametrize("beam_size", range(1, 11))
@pytest.mark.parametrize("hard_attention", [False, True])
def test_searches_are_equal(kind, beam_size, hard_attention):
    for seed in range(4):
        decoder, _ = make_case(seed, end_bias=(-9, -4, -1, 1)[seed], kind=kind)
        features = torch.randn(8, 196 if hard_attention else 4, 9, dtype=torch.float64)
        found = [
            beam_search(x, features, WORD_MAP, beam_size, max_len=12, hard_attention=hard_attention)
            for x in (decoder, plain(decoder))
        ]
        for fast, slow in zip(*found):
            assert fast.tokens == slow.tokens
            assert fast.score == pytest.approx(slow.score, abs=1e-9)
            np.testing.assert_allclose(fast.alphas, slow.alphas, atol=1e-6)


@pytest.mark.parametrize("kind", DECODER_KINDS)
def test_sampled_captions_are_equal(kind):
    decoder, features = make_case(0, end_bias=-1, kind=kind)
    options = dict(max_len=12, n_best=3, sample=True, temperature=0.8, top_p=0.95)
    found = []
    for x in (decoder, plain(decoder)):
        torch.manual_seed(0)
        found.append(beam_search(x, features, WORD_MAP, **options))
    assert [c.tokens for c in found[0]] == [c.tokens for c in found[1]]
    assert [c.score for c in found[0]] == pytest.approx([c.score for c in found[1]])


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("sample", [False, True])
def test_half_precision_searches_and_trains_in_both(is_plain, sample):
    decoder, features = make_case(0, end_bias=-1)
    decoder, features = decoder.float(), features.float()
    decoder.plain = is_plain
    captions, lengths = make_captions(8, 2, len(WORD_MAP) + 7)
    with autocast(torch.device("cpu"), "bf16"):
        found = beam_search(decoder, features, WORD_MAP, 3, max_len=12, sample=sample)
        output = decoder.train()(features, captions, lengths, hard_fraction=0.5)
        loss = doubly_stochastic_loss(output, lengths)
    loss.backward()
    assert all(np.isfinite(c.score) and c.alphas.dtype == np.float32 for c in found)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("stride, height, width", [(16, 64, 64), (32, 288, 512), (32, 64, 448)])
def test_cells_and_pooled_annotations_of_any_image_give_the_same(stride, height, width):
    torch.manual_seed(0)
    encoder = Encoder(
        name="resnet50" if stride == 16 else "resnet18", weights="none", stride=stride
    )
    decoder = DecoderWithAttention(7, 5, 6, 23, encoder.double().encoder_dim, dropout=0.0).double()
    captions, lengths = make_captions(2, 2)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        fast = decoder(encoder.cells(images), captions, lengths)
        for features in (encoder(images), encoder(images).unflatten(1, (14, 14))):
            slow = plain(decoder)(features, captions, lengths)
            torch.testing.assert_close(tuple(slow), tuple(fast), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cells", [1, 49, 64, 100, 196, 256])
def test_pooling_matrix_equals_adaptive_average_pooling(cells):
    side = int(cells**0.5)
    grid = torch.randn(2, 3, side, side, dtype=torch.float64)
    pool = pooling_matrix(cells, 14, grid.device, grid.dtype)
    torch.testing.assert_close(
        nn.AdaptiveAvgPool2d(14)(grid).flatten(2), grid.flatten(2) @ pool.t()
    )
    torch.testing.assert_close(pool.sum(1), torch.ones(196, dtype=torch.float64))


# Who gets which


def test_the_known_source_is_that_of_models_py():
    """Once both paths do the same again, this is the number for KNOWN_SOURCE."""
    d = DecoderWithAttention
    digest = source_digest(d.init_hidden_state, d.step, d.logits, Attention.forward)
    assert digest == KNOWN_SOURCE


class TwiceTheContext(DecoderWithAttention):
    def step(self, tokens, state, annotations, hard=None):
        return super().step(tokens, state, 2 * annotations, hard)


class Uniform(Attention):
    def forward(self, annotations, h, hard=None):
        alpha = annotations.new_full(annotations.shape[:2], 1 / annotations.shape[1])
        return annotations.mean(1), alpha, alpha


def test_an_overridden_step_or_attention_runs_as_it_is_written_and_says_so_once(capsys):
    features = torch.randn(2, 64, 9, dtype=torch.float64)
    captions, lengths = make_captions(2, 3)
    decoder = make_decoder()
    assert isinstance(decoder.steps(features), FastSteps) and not capsys.readouterr().err
    twice = make_decoder(kind=TwiceTheContext)
    for _ in range(2):
        found = twice(features, captions, lengths).logits
    assert capsys.readouterr().err.count("TwiceTheContext") == 1
    assert (found - decoder(features, captions, lengths).logits).abs().max() > 1e-3
    first, second = (
        x.steps(y).step(captions[:, 0, 0], x.steps(features).initial_state(rows), rows)
        for rows in [torch.arange(2)]
        for x, y in ((twice, features), (decoder, 2 * features))
    )
    torch.testing.assert_close(first, second)
    decoder.attention = Uniform(9, 6, 7).double()
    assert isinstance(decoder.steps(features), PlainSteps)
    for caption in beam_search(decoder.eval(), features, WORD_MAP, 3, max_len=4):
        np.testing.assert_allclose(caption.alphas, 1 / 196, rtol=1e-6)


CHANGES = {
    "another output layer": lambda d: setattr(d, "fc", nn.Sequential(d.fc)),
    "one more layer": lambda d: d.add_module("x", nn.ReLU()),
    "a layer without bias": lambda d: setattr(d, "f_beta", nn.Linear(6, 9, bias=False).double()),
    "a method of this object": lambda d: setattr(d, "logits", lambda h: d.fc(h) / 2),
    "a hook": lambda d: d.attention.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_decoder_is_run_as_it_is(change):
    decoder = make_decoder()
    CHANGES[change](decoder)
    assert isinstance(decoder.steps(torch.randn(1, 4, 9).double()), PlainSteps)


def test_the_gate_may_be_a_scalar_as_in_the_paper():
    decoder = make_decoder()
    decoder.f_beta = nn.Linear(6, 1).double()
    features = torch.randn(4, 64, 9, dtype=torch.float64)
    assert isinstance(decoder.steps(features), FastSteps)
    captions, lengths = make_captions(4, 3)
    expect_both_equal(lambda x: tuple(x(features, captions, lengths)), decoder)


class WithRoom(FastSteps):
    """As on a GPU, where captions are not counted: a grid with room for all that there may be"""

    def grid_shape(self, rows, rank):
        return len(self.features), self.per_image


@pytest.mark.parametrize("kind", [FastSteps, WithRoom])
def test_rows_need_not_be_sorted_nor_fill_a_grid(kind):
    decoder, features = make_decoder().eval(), torch.randn(4, 64, 9, dtype=torch.float64)
    rows, tokens = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 2, 3, 4])
    steps, expected = kind(decoder, features, per_image=5), PlainSteps(decoder, features)
    for _ in range(2):
        state = steps.initial_state(rows)
        torch.testing.assert_close(state, expected.initial_state(rows))
        found = steps.step(tokens, state, rows)
        torch.testing.assert_close(found, expected.step(tokens, state, rows))
        for x in (steps, expected):  # without gradients, as in a search
            with torch.no_grad():
                x.keep(torch.tensor([1, 0, 2]))


def test_hard_attention_sees_one_location_in_both():
    decoder, features = make_decoder().eval(), torch.randn(3, 196, 9, dtype=torch.float64)
    rows, tokens = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 2, 3, 4])
    for x in (decoder, plain(decoder)):
        steps = x.steps(features)
        _, alpha, weights = steps.step(
            tokens, steps.initial_state(rows), rows, hard=most_likely_location
        )
        assert torch.equal(weights, nn.functional.one_hot(alpha.argmax(1), 196).double())


def test_no_layer_of_a_new_encoder_is_in_training_mode():
    """BatchNorm of a backbone that is not run when it is built, too."""
    for name in ("tf_efficientnet_lite0", "resnet18"):
        assert not any(m.training for m in Encoder(name=name, weights="none").train().modules())
