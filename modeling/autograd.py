"""
Autograd functions for the decoder's loop and its cross-entropy: the same numbers as the plain
expressions, faster and in less memory. `models.py` can be understood without reading them.

A layer that runs once per time step has one weight gradient per step, and autograd adds them up
one by one. Here each step only stores the factors of its gradient; after the last step's backward
pass, one large matrix product computes the sum (`DeferredGradients`).
"""

from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes to process at a time: as much as the caches of a few cores hold; enough to keep a GPU busy
CPU_CHUNK, GPU_CHUNK = 4 << 20, 1 << 30


def uses_onednn(*tensors):
    """Whether oneDNN's operators for inference take these: on a CPU, float32, without gradients"""
    return (
        torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


class DeferredGradients(torch.autograd.Function):
    """
    `anchor = DeferredGradients.apply(make_gradients, *tensors)`: once the backward pass of every
    function that takes the anchor as an input has run, make_gradients() is called and returns the
    gradients of the tensors.
    """

    @staticmethod
    def forward(ctx, make_gradients, *tensors):
        ctx.make_gradients = make_gradients
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.make_gradients()


def linear(x, weight, bias=None):
    """
    F.linear, by oneDNN where it takes the tensors: on processors with AVX-512 it is up to 2.5 times
    as fast as the library that PyTorch prefers. It needs rows that lie one after the other.
    """
    if uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), weight.contiguous(), bias, "none", [], ""
        )
    return F.linear(x, weight, bias)


class DeferredLinear:
    """
    `layer = DeferredLinear(weight, bias)` for one batch, then `layer(x)` once per time step.

    weight (O, I), bias (O,) or None, x (M, I), where M may differ from call to call. Under autocast
    the weight is cast once, not at every step; on a CPU it is laid out once as oneDNN reads it.
    """

    def __init__(self, weight, bias=None):
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.packed = self._pack(self.weight)
        self.packed_transpose = None  # made by the first backward pass
        self.inputs, self.grads = [], []  # one entry per step
        self.anchor = DeferredGradients.apply(
            partial(self._make_gradients, self.inputs, self.grads, bias is not None), weight, bias
        )

    @staticmethod
    def _pack(weight):
        """The weight as `linear` reads it fastest"""
        if uses_onednn(weight):
            return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return weight

    @staticmethod
    def _make_gradients(inputs, grads, has_bias):
        x, grad = (torch.cat(y) if len(y) > 1 else y[0] for y in (inputs, grads))
        inputs.clear()
        grads.clear()
        # The transposed copies of some rows at a time, since large new tensors are slow. In half
        # precision all at once: the sum of rounded parts would lose digits.
        half = x.element_size() < 4
        rows = len(x) if half else _chunk_size(x, min(x.shape[1], grad.shape[1]))
        d_weight = reduce(
            torch.Tensor.add_,
            (linear(a.t(), b.t()) for a, b in zip(grad.split(rows), x.split(rows))),
        )
        return d_weight, grad.sum(0) if has_bias else None

    def __call__(self, x):
        return _Linear.apply(x.to(self.weight.dtype), self.anchor, self)

    def backward(self, grad):
        """The gradient of x"""
        if self.packed_transpose is None:
            self.packed_transpose = self._pack(self.weight.t())
        return linear(grad, self.packed_transpose)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return linear(x, layer.packed, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        [x] = ctx.saved_tensors
        ctx.layer.inputs.append(x)
        ctx.layer.grads.append(grad)
        return ctx.layer.backward(grad) if ctx.needs_input_grad[0] else None, None, None


class AttentionEnergy:
    """
    `energy = AttentionEnergy(keys, weight)` for one batch, then energy(query) once per time step:

        energy[n, r, p] = sum_a weight[a] * relu(keys[n, p, a] + query[n, r, a])

    keys (N, P, A), weight (A,), query (n, R, A) for the first n <= N images; returns (n, R, P).

    keys + query, (n, R, P, A), would be the decoder's largest tensor by far. It is never stored:
    it is computed for a few images at a time, small enough for the processor's cache, and computed
    again in the backward pass.
    """

    def __init__(self, keys, weight):
        weight = weight.to(keys.dtype)
        self.keys, self.weight = keys.detach(), weight
        self.d_keys = []  # one tensor after the first backward, without the factor `weight`
        self.anchor = DeferredGradients.apply(
            partial(self._make_gradients, self.keys, weight.detach(), self.d_keys), keys, weight
        )

    @staticmethod
    def _make_gradients(keys, weight, d_keys):
        # relu(x) = x where x > 0, so the gradient of the weight follows from those of keys
        # (here) and query (in _Energy), and needs no pass over the large tensor.
        total = d_keys.pop()
        images = _chunk_size(total, total[0].numel())
        d_weight = sum((a * b).sum((0, 1)) for a, b in zip(total.split(images), keys.split(images)))
        return total.mul_(weight), d_weight

    def __call__(self, query):
        query = query.to(self.keys.dtype)
        return _Energy.apply(query, self.weight, self.anchor, self.keys, self.d_keys)


def _chunk_size(tensor, numel):
    """How many items of `numel` elements each to process at a time, at least 1."""
    budget = CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK
    return max(1, budget // max(1, numel * tensor.element_size()))


def _blocks(keys, query):
    """Yield slices of a few images each, and a buffer (images, R, P, A) for them."""
    shape = query.shape[1], *keys.shape[1:]
    step = min(len(query), _chunk_size(keys, shape[0] * shape[1] * shape[2]))
    buffer = keys.new_empty(step, *shape)
    for i in range(0, len(query), max(1, step)):
        block = slice(i, min(i + step, len(query)))
        yield block, buffer[: block.stop - i]


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, weight, anchor, keys, d_keys):
        ctx.save_for_backward(query, keys, weight)
        ctx.d_keys = d_keys
        energy = keys.new_empty(*query.shape[:2], keys.shape[1])
        opposite = (-query).unsqueeze(2)
        for block, buffer in _blocks(keys, query):
            # relu(k + q) = max(k, -q) + q: one pass over the block instead of two
            torch.maximum(keys[block, None], opposite[block], out=buffer)
            torch.matmul(buffer, weight, out=energy[block])
        return energy + (query @ weight).unsqueeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, keys, weight = ctx.saved_tensors
        grad, d_query = grad.contiguous(), torch.empty_like(query)
        if not ctx.d_keys:
            # At least float32: it is a sum over all steps.
            ctx.d_keys.append(
                keys.new_zeros(keys.shape, dtype=torch.promote_types(keys.dtype, torch.float32))
            )
        [d_keys] = ctx.d_keys
        ones = keys.new_ones(1, 1, query.shape[1])
        for block, buffer in _blocks(keys, query):
            torch.add(keys[block, None], query[block].unsqueeze(2), out=buffer)
            # grad where the ReLU's input is positive, 0 elsewhere
            relu_grad = torch.ops.aten.threshold_backward(
                grad[block].unsqueeze(3).expand_as(buffer), buffer, 0
            )
            torch.sum(relu_grad, 2, out=d_query[block])
            n, r, p, a = relu_grad.shape
            if r == 1:
                d_keys[block] += relu_grad.squeeze(1)
            else:
                d_keys[block] += torch.bmm(ones.expand(n, 1, r), relu_grad.view(n, r, p * a)).view(
                    n, p, a
                )
        return d_query * weight, (d_query * query).sum((0, 1)), None, None, None


def log_softmax_parts(logits, targets):
    """
    The two parts of a log-probability, the target's logit and the logsumexp, each (W,) in at least
    float32, without a second tensor of the logits' size. logits (W, V), targets (W,)
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = _chunk_size(logits, logits.shape[1])
    totals = torch.cat([part.to(dtype).logsumexp(1) for part in logits.split(rows)])
    return logits.gather(1, targets.unsqueeze(1)).squeeze(1).to(dtype), totals


class CrossEntropy(torch.autograd.Function):
    """
    `CrossEntropy.apply(logits, targets, weights)`: F.cross_entropy with reduction="sum", in at
    least float32. The gradient is the only further tensor of the logits' size; PyTorch's version
    needs two more.

    logits (W, V), targets (W,); weights (W,) of the tokens, or None
    """

    @staticmethod
    def forward(ctx, logits, targets, weights):
        chosen, totals = log_softmax_parts(logits, targets)
        ctx.save_for_backward(logits, targets, totals, weights)
        losses = totals - chosen
        return losses.sum() if weights is None else (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets, totals, weights = ctx.saved_tensors
        d_logits, rows = torch.empty_like(logits), _chunk_size(logits, logits.shape[1])
        grads = grad.expand_as(totals) if weights is None else grad * weights.to(totals.dtype)
        for part, target, total, out, d_loss in zip(
            *(x.split(rows) for x in (logits, targets, totals, d_logits, grads))
        ):
            # Rounded to the logits' precision only at the end, since p - 1 may be small.
            d_part = (part - total.unsqueeze(1)).exp_()
            d_part.scatter_add_(1, target.unsqueeze(1), torch.full_like(total, -1).unsqueeze(1))
            out.copy_(d_part.mul_(d_loss.unsqueeze(1)))
        return d_logits, None, None
