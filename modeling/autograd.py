"""
The layers of `modeling.decoding.FastSteps`: the same numbers as the plain expressions, faster and
in less memory.

A layer that runs once per time step has one weight gradient per step, and autograd adds them up
one by one. Here each step only stores the factors of its gradient; after the last step's backward
pass, one large matrix product computes the sum. `deferred_linear`, `deferred_embedding` and
`attention_energy` are called once per batch; what they return is called once per time step.
"""

import math
from functools import lru_cache, partial, reduce

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Bytes to process at a time: as much as the caches of a few cores hold; enough to keep a GPU busy
CPU_CHUNK, GPU_CHUNK = 4 << 20, 1 << 30


@lru_cache
def find_onednn():
    """
    oneDNN's operators for inference, `linear` and `pack`. They are private to PyTorch, so another
    version may lack them or take other arguments: they are tried once, and None if that fails.
    """
    x = torch.eye(2)
    try:
        pack = torch.ops.mkldnn._reorder_linear_weight
        pointwise = torch.ops.mkldnn._linear_pointwise
        linear = partial(pointwise, attr="none", scalars=[], algorithm="")
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


def linear(x, weight, bias=None):
    """
    F.linear, by oneDNN where it takes the tensors: on processors with AVX-512 it is up to 2.5 times
    as fast as the library that PyTorch prefers. It needs contiguous rows.
    """
    if uses_onednn(x, weight):
        return find_onednn()[0](x.contiguous(), weight.contiguous(), bias)
    return F.linear(x, weight, bias)


class _Anchor(torch.autograd.Function):
    """
    An input of all steps of a layer: its backward pass runs after theirs, and layer.gradients()
    returns the gradients of the tensors.
    """

    @staticmethod
    def forward(ctx, layer, *tensors):
        ctx.layer = layer
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.layer.gradients()


class _Step(torch.autograd.Function):
    """One time step of a layer. A layer does not hold its anchor: that would be a memory cycle."""

    @staticmethod
    def forward(ctx, x, anchor, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.contiguous()  # a view would keep a larger tensor alive
        return ctx.layer.backward(*ctx.saved_tensors, grad, ctx.needs_input_grad[0]), None, None


def deferred_linear(weight, bias=None):
    """
    A function like F.linear(x, weight, bias), weight (O, I), bias (O,) or None, x (M, I), where M
    may differ from call to call. Under autocast the weight is cast once, not at every step; on a
    CPU it is packed once for oneDNN.
    """
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight, bias = (None if x is None else x.to(dtype) for x in (weight, bias))
    layer = _Linear(weight, bias)
    anchor = _Anchor.apply(layer, weight, bias)
    return lambda x: _Step.apply(x.to(weight.dtype), anchor, layer)


class _Linear:
    def __init__(self, weight, bias=None):
        self.weight, self.bias, self.inputs, self.grads = weight, bias, [], []
        self.packed = {}  # the weight or its transpose, until `gradients`

    def forward(self, x):
        return linear(x, self.pack(transposed=False), self.bias)

    def backward(self, x, grad, needs_input_grad):
        self.inputs.append(x)
        self.grads.append(grad)
        return linear(grad, self.pack(transposed=True)) if needs_input_grad else None

    def pack(self, transposed):
        """The weight, or its transpose, as `linear` reads it fastest"""
        if transposed not in self.packed:
            self.packed.clear()  # the backward pass does not need the forward's
            weight = self.weight.t() if transposed else self.weight
            if uses_onednn(weight):
                weight = find_onednn()[1](weight.contiguous())
            self.packed[transposed] = weight
        return self.packed[transposed]

    def gradients(self):
        self.packed.clear()
        x, grad = _join(self.inputs), _join(self.grads)
        # A few rows at a time, since allocating large tensors, such as transposed copies, is slow;
        # in half precision all at once, since a sum of rounded parts would lose precision.
        half = x.element_size() < 4
        rows = len(x) if half else _chunk_size(x, min(x.shape[1], grad.shape[1]))
        parts = zip(grad.split(rows), x.split(rows))
        d_weight = reduce(torch.Tensor.add_, (linear(a.t(), b.t()) for a, b in parts))
        return d_weight, None if self.bias is None else grad.sum(0)


def _join(steps):
    """The tensors of all steps in one; the list is emptied."""
    joined = torch.cat(steps) if len(steps) > 1 else steps[0]
    steps.clear()
    return joined


def deferred_embedding(weight):
    """A function like F.embedding(tokens, weight), weight (V, D)"""
    layer = _Embedding(weight)
    anchor = _Anchor.apply(layer, weight)
    return lambda tokens: _Step.apply(tokens, anchor, layer)


class _Embedding(_Linear):  # its inputs are ids in place of one-hot vectors
    def forward(self, tokens):
        return F.embedding(tokens, self.weight)

    def gradients(self):
        tokens, grad = _join(self.inputs), _join(self.grads)
        with torch.enable_grad():
            weight = self.weight.detach().requires_grad_()
            return torch.autograd.grad(F.embedding(tokens, weight), weight, grad)


def attention_energy(keys, weight):
    """
    A function of query (n, R, A), for the first n <= N images; keys (N, P, A), weight (A,):

        energy[n, r, p] = sum_a weight[a] * relu(keys[n, p, a] + query[n, r, a])

    keys + query, (n, R, P, A), would be the decoder's largest tensor by far. It is computed for as
    few images at a time as fit the processor's cache, and again in the backward pass.
    """
    weight = weight.to(keys.dtype)
    layer = _Energy(keys, weight)
    anchor = _Anchor.apply(layer, keys, weight)
    return lambda query: _Step.apply(query.to(keys.dtype), anchor, layer)


class _Energy:
    def __init__(self, keys, weight):
        self.keys, self.weight = keys, weight
        self.d_keys = self.d_weight = None  # sums over the steps; d_keys without the factor weight

    def forward(self, query):
        energy = self.keys.new_empty(*query.shape[:2], self.keys.shape[1])
        opposite = (-query).unsqueeze(2)
        for block, buffer in self.blocks(query):
            # relu(k + q) = max(k, -q) + q: one pass over the block instead of two
            torch.maximum(self.keys[block, None], opposite[block], out=buffer)
            torch.matmul(buffer, self.weight, out=energy[block])
        return energy + (query @ self.weight).unsqueeze(2)

    def backward(self, query, grad, _):
        keys, d_query = self.keys, torch.empty_like(query)
        if self.d_keys is None:  # at least float32: it is a sum over all steps
            dtype = torch.promote_types(keys.dtype, torch.float32)
            self.d_keys, self.d_weight = torch.zeros_like(keys, dtype=dtype), 0
        ones = keys.new_ones(1, 1, query.shape[1])
        for block, buffer in self.blocks(query):
            torch.add(keys[block, None], query[block].unsqueeze(2), out=buffer)
            # grad where the ReLU's input is positive, 0 elsewhere
            relu_grad = torch.ops.aten.threshold_backward(
                grad[block].unsqueeze(3).expand_as(buffer), buffer, 0
            )
            torch.sum(relu_grad, 2, out=d_query[block])
            n, r, p, a = relu_grad.shape
            if r > 1:  # faster than a sum over r
                relu_grad = torch.bmm(ones.expand(n, 1, r), relu_grad.view(n, r, p * a))
            self.d_keys[block] += relu_grad.view(n, p, a)
        # relu(x) = x where x > 0, so the weight's gradient follows from these of queries and keys
        self.d_weight = self.d_weight + (d_query * query).sum((0, 1))
        return d_query * self.weight

    def gradients(self):
        d_keys, self.d_keys = self.d_keys, None
        images = _chunk_size(d_keys, d_keys[0].numel())
        parts = zip(d_keys.split(images), self.keys.split(images))
        of_keys = sum((a * b).sum((0, 1)) for a, b in parts)
        return d_keys.mul_(self.weight), self.d_weight + of_keys.to(self.weight.dtype)

    def blocks(self, query):
        """Yield slices of a few images each, and a buffer (images, R, P, A) for them."""
        shape = query.shape[1], *self.keys.shape[1:]
        step = min(len(query), _chunk_size(self.keys, math.prod(shape)))
        buffer = self.keys.new_empty(step, *shape)
        for i in range(0, len(query), step):
            block = slice(i, min(i + step, len(query)))
            yield block, buffer[: block.stop - i]


def _chunk_size(tensor, numel):
    """How many items of `numel` elements each to process at a time, at least 1."""
    budget = CPU_CHUNK if tensor.device.type == "cpu" else GPU_CHUNK
    return max(1, budget // max(1, numel * tensor.element_size()))
