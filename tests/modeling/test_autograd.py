"""The linear layer in float32, and the memory of all; test_decoding.py has their gradients."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from factories import make_captions, make_decoder

from modeling import autograd
from modeling.autograd import deferred_linear


@pytest.mark.parametrize("has_onednn", [True, False])  # its operators are private to PyTorch
def test_deferred_linear_and_its_gradients_are_those_in_float64(monkeypatch, has_onednn):
    """In a search, too, and for a slice of a weight, whose rows do not lie one after the other."""
    monkeypatch.setattr(autograd, "find_onednn", autograd.find_onednn.__wrapped__)  # uncached
    if not has_onednn:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        assert autograd.find_onednn() is None
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
