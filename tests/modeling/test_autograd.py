"""The layers of the fast steps, against finite differences and torch."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from factories import make_captions, make_decoder

from modeling import autograd
from modeling.autograd import attention_energy, deferred_embedding, deferred_linear


def energy_steps(keys, first, second, weight):
    energy = attention_energy(keys, weight)
    return energy(first), energy(second)


def linear_steps(weight, bias, first, second):
    layer = deferred_linear(weight, bias)
    return layer(second * layer(first))


def embedding_steps(weight):
    embedding = deferred_embedding(weight)
    return embedding(torch.tensor([1, 3, 1])) * embedding(torch.tensor([0, 0, 2])).sin()


@pytest.mark.parametrize(
    "two_steps, shapes",
    [
        (energy_steps, ((3, 6, 4), (3, 2, 4), (2, 1, 4), (4,))),  # one image has ended
        (linear_steps, ((3, 3), (3,), (4, 3), (4, 3))),
        (lambda weight, x: deferred_linear(weight)(x), ((2, 3), (4, 3))),
        (embedding_steps, ((4, 3),)),
    ],
)
def test_gradients_over_two_steps_equal_finite_differences(two_steps, shapes):
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_deferred_linear_and_its_gradients_in_float32_equal_those_in_float64():
    """In a search, too, and for a slice of a weight, whose rows do not lie one after the other."""
    whole, bias = torch.randn(64, 100, requires_grad=True), torch.randn(64, requires_grad=True)
    for has_bias, rows in ((True, (1,)), (False, (5, 40)), (True, (5, 40))):
        inputs = [torch.randn(m, 60, requires_grad=True) for m in rows]
        leaves = [whole, *inputs, *([bias] if has_bias else [])]

        def run(layer_of, dtype, inputs=inputs, has_bias=has_bias, leaves=leaves):
            layer = layer_of(whole.to(dtype)[:, 40:], bias.to(dtype) if has_bias else None)
            outputs = [layer(x.to(dtype)) for x in inputs]
            return outputs, torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)

        def expect_close(found, expected):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4, check_dtype=False)

        exact = run(lambda *parameters: lambda y: F.linear(y, *parameters), torch.float64)
        expect_close(run(deferred_linear, torch.float32), exact)
        with torch.no_grad():
            layer = deferred_linear(whole[:, 40:], bias if has_bias else None)
            expect_close([layer(x) for x in inputs], exact[0])


def test_frozen_inputs_of_deferred_linear_get_no_gradient():
    """Features of a frozen encoder: the product that would make theirs is a third of the layer."""
    weight, x = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    deferred_linear(weight)(x).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 5))


def test_products_without_onednns_private_operators_are_torchs(monkeypatch):
    """Another version of PyTorch may lack them."""
    x, weight, bias = torch.randn(7, 60), torch.randn(50, 60), torch.randn(50)
    exact = F.linear(x.double(), weight.double(), bias.double())

    def products():
        layer = deferred_linear(weight, bias)
        with torch.no_grad():
            return [y.double() for y in (autograd.linear(x, weight, bias), layer(x))]

    with_onednn = products()
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    autograd.find_onednn.cache_clear()
    assert autograd.find_onednn() is None
    without = products()
    monkeypatch.undo()
    autograd.find_onednn.cache_clear()
    torch.testing.assert_close(with_onednn + without, [exact] * 4, rtol=1e-5, atol=1e-4)


def test_a_batch_without_backward_pass_keeps_no_memory():
    """Steps store what the gradients need; that must not outlive the batch."""
    decoder, (captions, lengths) = make_decoder(), make_captions(4, 2)
    steps = decoder.steps(torch.randn(4, 64, 9, dtype=torch.float64))
    rows = torch.arange(4)
    state, *_ = steps.step(captions[:, 0, 0], steps.initial_state(rows), rows)
    logits, keys = steps.logits(state[0]), weakref.ref(steps.keys)
    decoder(torch.randn(4, 64, 9, dtype=torch.float64), captions, lengths)
    del steps, state, logits, _
    assert keys() is None
