"""
Autograd functions for `modeling.decoding.FastSteps`: the same numbers as the plain expressions,
faster and in less memory.

A layer that runs once per time step has one weight gradient per step, and autograd adds them up
one by one. Here each step only stores the factors of its gradient; after the last step's backward
pass, one large matrix product computes the sum (`DeferredGradients`).
"""

from functools import lru_cache, partial, reduce

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes to process at a time: as much as the caches of a few cores hold; enough to keep a GPU busy
CPU_CHUNK, GPU_CHUNK = 4 << 20, 1 << 30


@lru_cache
def find_onednn():
    """
    oneDNN's operators for inference, `linear` and `pack`, or None. They are private to PyTorch, so
    they are tried: another version may lack them or call them differently.
    """
    x = torch.eye(2)
    try:
        pack, pointwise = (
            torch.ops.mkldnn._reorder_linear_weight,
            torch.ops.mkldnn._linear_pointwise,
        )

        def linear(x, weight, bias):
            return pointwise(x, weight, bias, "none", [], "")

        return (linear, pack) if torch.equal(linear(x, pack(x), None), x) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def uses_onednn(*tensors):
    """Whether oneDNN's operators for inference take these: on a CPU, float32, without gradients"""
    return (
        find_onednn() is not None
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
        return find_onednn()[0](x.contiguous(), weight.contiguous(), bias)
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
        self.inputs, self.grads = [], []  # one entry per step
        # The weight and its transpose as `linear` reads them fastest, from the first use on, until
        # the gradient is made: not attributes, which would make a cycle with the anchor.
        self.packed = {}
        self.anchor = DeferredGradients.apply(
            partial(self._make_gradients, self.inputs, self.grads, self.packed, bias is not None),
            weight,
            bias,
        )

    def pack(self, transposed):
        """The weight, or its transpose, for `linear`"""
        if transposed not in self.packed:
            self.packed.clear()  # the backward pass does not need the forward's
            weight = self.weight.t() if transposed else self.weight
            if uses_onednn(weight):
                weight = find_onednn()[1](weight.contiguous())
            self.packed[transposed] = weight
        return self.packed[transposed]

    @staticmethod
    def _make_gradients(inputs, grads, packed, has_bias):
        packed.clear()
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


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, anchor, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return linear(x, layer.pack(transposed=False), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        [x], layer = ctx.saved_tensors, ctx.layer
        layer.inputs.append(x)
        layer.grads.append(grad)
        d_x = linear(grad, layer.pack(transposed=True)) if ctx.needs_input_grad[0] else None
        return d_x, None, None


class DeferredEmbedding:
    """
    `embedding = DeferredEmbedding(weight)` for one batch, then `embedding(tokens)` once per time
    step: F.embedding, whose gradient, of the size of the vocabulary, is made once. weight (V, D)
    """

    def __init__(self, weight):
        self.weight, self.tokens, self.grads = weight.detach(), [], []
        self.anchor = DeferredGradients.apply(
            partial(self._make_gradient, self.weight, self.tokens, self.grads), weight
        )

    @staticmethod
    def _make_gradient(weight, tokens, grads):
        all_tokens, grad = torch.cat(tokens), torch.cat(grads)
        tokens.clear()
        grads.clear()
        with torch.enable_grad():
            weight = weight.detach().requires_grad_()
            return torch.autograd.grad(F.embedding(all_tokens, weight), weight, grad)

    def __call__(self, tokens):
        return _Embedding.apply(tokens, self.anchor, self)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, anchor, layer):
        ctx.save_for_backward(tokens)
        ctx.layer = layer
        return F.embedding(tokens, layer.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        [tokens] = ctx.saved_tensors
        ctx.layer.tokens.append(tokens)
        ctx.layer.grads.append(grad.contiguous())  # not a view that keeps more
        return None, None, None


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
