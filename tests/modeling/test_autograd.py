"""The autograd functions behind the fast steps, against finite differences and torch."""

import weakref
from functools import partial

import pytest
import torch
from factories import make_captions, make_decoder
from torch import nn

from modeling import autograd
from modeling.autograd import AttentionEnergy, DeferredEmbedding, DeferredLinear


def test_gradients_of_attention_energy_over_two_steps_equal_finite_differences():
    def two_steps(keys, first, second, weight):
        energy = AttentionEnergy(keys, weight)
        return energy(first), energy(second)

    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 6, 4), (3, 2, 4), (2, 1, 4), (4,))
    ]  # one image has ended
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_gradients_of_deferred_linear_over_two_steps_equal_finite_differences():
    def two_steps(weight, bias, first, second):
        layer = DeferredLinear(weight, bias)
        return layer(second * layer(first))

    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((3, 3), (3,), (4, 3), (4, 3))
    ]
    assert torch.autograd.gradcheck(two_steps, inputs)


def test_gradients_of_deferred_linear_without_bias_equal_finite_differences():
    inputs = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (4, 3))
    ]
    assert torch.autograd.gradcheck(lambda weight, x: DeferredLinear(weight)(x), inputs)


@pytest.mark.parametrize("rows", [(1,), (5, 40)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_deferred_linear_and_its_gradients_in_float32_equal_those_in_float64(rows, has_bias):
    """In a search, too, and for a slice of a weight, whose rows do not lie one after the other."""
    whole, bias = torch.randn(64, 100, requires_grad=True), torch.randn(64, requires_grad=True)
    inputs = [torch.randn(m, 60, requires_grad=True) for m in rows]
    leaves = [whole, *inputs, *([bias] if has_bias else [])]

    def run(layer_of, dtype):
        layer = layer_of(whole.to(dtype)[:, 40:], bias.to(dtype) if has_bias else None)
        outputs = [layer(x.to(dtype)) for x in inputs]
        return outputs, torch.autograd.grad(sum(y.sin().sum() for y in outputs), leaves)

    outputs, grads = run(DeferredLinear, torch.float32)
    exact = run(lambda weight, bias: lambda x: nn.functional.linear(x, weight, bias), torch.float64)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-4, check_dtype=False)
    close((outputs, grads), exact)
    with torch.no_grad():
        layer = DeferredLinear(whole[:, 40:], bias if has_bias else None)
        close([layer(x) for x in inputs], exact[0])


def test_frozen_inputs_of_deferred_linear_get_no_gradient():
    """Features of a frozen encoder: the product that would make theirs is a third of the layer."""
    weight, x = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5)
    layer = DeferredLinear(weight)
    layer(x).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 5))


def test_gradient_of_deferred_embedding_over_two_steps_equals_finite_differences():
    def two_steps(weight):
        embedding = DeferredEmbedding(weight)
        return embedding(torch.tensor([1, 3, 1])) * embedding(torch.tensor([0, 0, 2])).sin()

    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_steps, [weight])


def test_products_without_onednns_private_operators_are_torchs(monkeypatch):
    """Another version of PyTorch may lack them."""
    x, weight, bias = torch.randn(7, 60), torch.randn(50, 60), torch.randn(50)
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())

    def products():
        layer = DeferredLinear(weight, bias)
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
    keys = []
    for _ in range(2):
        steps = decoder.steps(torch.randn(4, 64, 9, dtype=torch.float64))
        keys.append(weakref.ref(steps.energy.keys))
        decoder(torch.randn(4, 64, 9, dtype=torch.float64), captions, lengths)
        del steps
    assert [key() for key in keys] == [None, None]
