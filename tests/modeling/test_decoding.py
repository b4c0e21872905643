"""The fast steps against the plain ones, in float64, and the plain ones against NumPy."""

import copy
import itertools

import numpy as np
import pytest
import torch
from factories import DECODER_KINDS, WORD_MAP, make_captions, make_case, make_decoder
from torch import nn

from modeling import autograd
from modeling.beam_search import beam_search
from modeling.decoding import KNOWN_SOURCE, FastSteps, PlainSteps, source_digest
from modeling.devices import autocast
from models import Attention, DecoderWithAttention, Encoder
from training.losses import doubly_stochastic_loss


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step_in_numpy(decoder, token, h, c, locations):
    """Equations 1 to 5 and 13 for one caption: new h, c; alpha (P,)"""
    w = {name: p.detach().numpy() for name, p in decoder.named_parameters()}

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    energy = []
    for a in locations:  # (E,)
        hidden = linear("attention.encoder_att", a) + linear("attention.decoder_att", h)
        energy.append(linear("attention.full_att", np.maximum(0, hidden))[0])
    alpha = np.exp(energy) / np.exp(energy).sum()
    context = sigmoid(linear("f_beta", h)) * sum(weight * a for weight, a in zip(alpha, locations))
    x = np.concatenate([w["embedding.weight"][token], context])
    gates = w["decode_step.weight_ih"] @ x + w["decode_step.bias_ih"]
    gates += w["decode_step.weight_hh"] @ h + w["decode_step.bias_hh"]
    i, f, g, o = gates.reshape(4, len(h))
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c, alpha


def test_plain_steps_are_the_papers_equations_in_numpy():
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
                h, c, expected = step_in_numpy(decoder, token[m], h, c, locations)
                for ours, numpys in ((found[0][m], h), (found[1][m], c), (alpha[m], expected)):
                    np.testing.assert_allclose(ours.numpy(), numpys, rtol=1e-10, atol=1e-12)
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


@pytest.mark.parametrize("options", [{}, {"hard_fraction": 0.5}, {"sampling_prob": 0.7}], ids=str)
@pytest.mark.parametrize(
    "n, r, cells", [(1, 1, 64), (5, 1, 64), (4, 5, 64), (3, 2, 196), (2, 3, 1), (5, 5, 49)]
)
def test_teacher_forcing_and_every_gradient_are_equal(n, r, cells, options, monkeypatch):
    """Large tensors are processed in chunks: of the usual size, of some items, and of one."""
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

    for kind in DECODER_KINDS:
        for chunk in (autograd.CPU_CHUNK, 20_000, 1):
            monkeypatch.setattr(autograd, "CPU_CHUNK", chunk)
            expect_both_equal(run, make_decoder(seed=n, dropout=0.5, kind=kind))


@pytest.mark.parametrize("options", [{}, {"hard_attention": True}, {"sample": True}], ids=str)
def test_searches_and_samples_are_equal(options):
    if "sample" in options:
        options = options | dict(n_best=3, temperature=0.8, top_p=0.95)
    for kind, seed, beam_size in itertools.product(DECODER_KINDS, range(4), (1, 2, 5, 10)):
        decoder, _ = make_case(seed, end_bias=(-9, -4, -1, 1)[seed], kind=kind)
        features = torch.randn(8, 196 if "hard_attention" in options else 4, 9).double()
        found = []
        for x in (decoder, plain(decoder)):
            torch.manual_seed(0)
            found.append(beam_search(x, features, WORD_MAP, beam_size, max_len=12, **options))
        for fast, slow in zip(*found):
            assert fast.tokens == slow.tokens
            assert fast.score == pytest.approx(slow.score, abs=1e-9)
            np.testing.assert_allclose(fast.alphas, slow.alphas, atol=1e-6)


@pytest.mark.parametrize("is_plain", [False, True])
def test_half_precision_searches_and_trains_in_both(is_plain):
    decoder, features = make_case(0, end_bias=-1)
    decoder, features = decoder.float(), features.float()
    decoder.plain = is_plain
    captions, lengths = make_captions(8, 2, len(WORD_MAP) + 7)
    with autocast(torch.device("cpu"), "bf16"):
        for sample in (False, True):
            found = beam_search(decoder, features, WORD_MAP, 3, max_len=12, sample=sample)
            assert all(np.isfinite(c.score) and c.alphas.dtype == np.float32 for c in found)
        output = decoder.train()(features, captions, lengths, hard_fraction=0.5)
        loss = doubly_stochastic_loss(output, lengths)
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in decoder.parameters())


def test_bfloat16_gradients_have_the_direction_of_float32_gradients(monkeypatch):
    decoder, (captions, lengths) = make_decoder(scale=1.0).float(), make_captions(6, 3)
    features = torch.randn(6, 64, 9)
    for chunk in (autograd.CPU_CHUNK, 20_000, 1):
        monkeypatch.setattr(autograd, "CPU_CHUNK", chunk)
        gradients = []
        for amp in (None, "bf16"):
            with autocast(torch.device("cpu"), amp):
                loss = doubly_stochastic_loss(decoder(features, captions, lengths), lengths)
            found = torch.autograd.grad(loss, list(decoder.parameters()))
            gradients.append(torch.cat([g.flatten() for g in found]))
        assert not torch.equal(*gradients)
        assert nn.functional.cosine_similarity(*gradients, 0) > 0.999


def test_cells_and_pooled_annotations_of_any_image_give_the_same():
    captions, lengths = make_captions(2, 2)
    for stride, height, width in ((16, 64, 64), (32, 96, 160), (32, 64, 448)):
        torch.manual_seed(0)
        name = "resnet50" if stride == 16 else "resnet18"
        encoder = Encoder(name=name, weights="none", stride=stride).double()
        decoder = DecoderWithAttention(7, 5, 6, 23, encoder.encoder_dim, dropout=0.0).double()
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        with torch.no_grad():
            fast = decoder(encoder.cells(images), captions, lengths)
            for features in (encoder(images), encoder(images).unflatten(1, (14, 14))):
                slow = plain(decoder)(features, captions, lengths)
                torch.testing.assert_close(tuple(slow), tuple(fast), rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="60"):
        make_decoder().steps(torch.randn(1, 60, 9).double())


# Who gets which


def test_the_known_source_is_that_of_models_py():
    """Once both paths do the same again, this is the number for KNOWN_SOURCE."""
    d = DecoderWithAttention
    assert KNOWN_SOURCE == source_digest(d.init_hidden_state, d.step, d.logits, Attention.forward)


class TwiceTheContext(DecoderWithAttention):
    def step(self, tokens, state, annotations, hard=None):
        return super().step(tokens, state, 2 * annotations, hard)


class Uniform(Attention):
    def forward(self, annotations, h, hard=None):
        alpha = annotations.new_full(annotations.shape[:2], 1 / annotations.shape[1])
        return annotations.mean(1), alpha, alpha


def test_an_overridden_step_or_attention_runs_as_it_is_written_and_says_so_once(capsys):
    features, rows = torch.randn(2, 64, 9, dtype=torch.float64), torch.arange(2)
    decoder, twice = make_decoder(), make_decoder(kind=TwiceTheContext)
    steps = decoder.steps(2 * features)
    assert isinstance(steps, FastSteps) and not capsys.readouterr().err
    state = twice.steps(features).initial_state(rows)
    found = twice.steps(features).step(rows, state, rows)
    assert capsys.readouterr().err.count("TwiceTheContext") == 1
    torch.testing.assert_close(found, steps.step(rows, state, rows))
    decoder.attention = Uniform(9, 6, 7).double()
    for caption in beam_search(decoder.eval(), features, WORD_MAP, 3, max_len=4):
        np.testing.assert_allclose(caption.alphas, 1 / 196, rtol=1e-6)


CHANGES = {
    "another output layer": lambda d: setattr(d, "fc", nn.Sequential(d.fc)),
    "one more layer": lambda d: d.add_module("x", nn.ReLU()),
    "a layer without bias": lambda d: setattr(d, "f_beta", nn.Linear(6, 9, bias=False).double()),
    "a method of this object": lambda d: setattr(d, "logits", lambda h: d.fc(h) / 2),
    "a hook": lambda d: d.attention.register_forward_hook(lambda *_: None),
}


def test_a_changed_decoder_is_run_as_it_is():
    features = torch.randn(1, 4, 9).double()
    for what, change in CHANGES.items():
        decoder = make_decoder()
        change(decoder)
        assert isinstance(decoder.steps(features), PlainSteps), what


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


def test_rows_need_not_be_sorted_nor_fill_a_grid():
    decoder, features = make_decoder().eval(), torch.randn(4, 64, 9, dtype=torch.float64)
    rows, tokens = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 2, 3, 4])
    for kind in (FastSteps, WithRoom):
        steps, expected = kind(decoder, features, per_image=5), PlainSteps(decoder, features)
        for _ in range(2):
            state = steps.initial_state(rows)
            torch.testing.assert_close(state, expected.initial_state(rows))
            found = steps.step(tokens, state, rows)
            torch.testing.assert_close(found, expected.step(tokens, state, rows))
            for x in (steps, expected):  # without gradients, as in a search
                with torch.no_grad():
                    x.keep(torch.tensor([1, 0, 2]))


def test_no_layer_of_a_new_encoder_is_in_training_mode():
    """BatchNorm of a backbone that is not run when it is built, too."""
    for name in ("tf_efficientnet_lite0", "resnet18"):
        assert not any(m.training for m in Encoder(name=name, weights="none").train().modules())
