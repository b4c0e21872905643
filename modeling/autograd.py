"""
Two pieces of the decoder's loop and its cross-entropy with gradients of their own: the same
numbers as the plain expressions, faster and smaller. `models.py` can be read without them.

A layer that runs once per word has one gradient of its weight per word, and autograd adds
them up as they come. Here each word only leaves behind what its share is made of; when the
last word has gone backward, one large product makes the sum (`Afterwards`).
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable


class Afterwards(torch.autograd.Function):
    """
    `token = Afterwards.apply(gradients, *tensors)`: once everything that took the token has
    gone backward, gradients() makes the gradients of the tensors.
    """

    @staticmethod
    def forward(ctx, gradients, *tensors):
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return None, *ctx.gradients()


class LinearPerWord:
    """
    `layer = LinearPerWord(weight, bias)` for one batch, then `layer(x)` once per word.

    weight (O, I), bias (O,), x (M, I) with another M each time. Under autocast the weight is
    cast once, not at every word.
    """

    def __init__(self, weight, bias):
        device = weight.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            weight, bias = weight.to(dtype), bias.to(dtype)
        self.weight, self.bias = weight.detach(), bias.detach()
        self.inputs, self.grads = [], []  # what the words leave behind
        self.token = Afterwards.apply(partial(self._gradients, self.inputs, self.grads),
                                      weight, bias)

    @staticmethod
    def _gradients(inputs, grads):
        x, grad = torch.cat(inputs), torch.cat(grads)
        inputs.clear()
        grads.clear()
        return grad.t() @ x, grad.sum(0)

    def __call__(self, x):
        return _Linear.apply(x.to(self.weight.dtype), self.token, self.weight, self.bias,
                             self.inputs, self.grads)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, weight, bias, inputs, grads):
        ctx.save_for_backward(x, weight)
        ctx.inputs, ctx.grads = inputs, grads
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.inputs.append(x)
        ctx.grads.append(grad)
        return grad @ weight, None, None, None, None, None


class AttentionEnergy:
    """
    `energy = AttentionEnergy(keys, weight)` for one batch, then energy(query) once per word:

        energy[n, r, p] = sum_a weight[a] * relu(keys[n, p, a] + query[n, r, a])

    keys (N, P, A), weight (A,), query (n, R, A) for the first n <= N images; returns (n, R, P).

    The sum over (N, R, P, A) is the decoder's largest tensor by far. It is never stored: some
    images at a time, small enough for the processor's cache, it is made, used and made again
    in the backward pass.
    """

    def __init__(self, keys, weight):
        weight = weight.to(keys.dtype)
        self.keys, self.weight = keys.detach(), weight
        self.d_keys = []  # one tensor from the first backward on, still without factor `weight`
        self.token = Afterwards.apply(
            partial(self._gradients, self.keys, weight.detach(), self.d_keys), keys, weight)

    @staticmethod
    def _gradients(keys, weight, d_keys):
        # relu(x) = x where it is open, so the gradient of the weight follows from those of keys
        # (here) and query (in _Energy), and needs no pass over the large tensor.
        total = d_keys.pop()
        return total * weight, (total * keys).sum((0, 1))

    def __call__(self, query):
        query = query.to(self.keys.dtype)
        return _Energy.apply(query, self.weight, self.token, self.keys, self.d_keys)


def _at_a_time(tensor, numbers):
    """How many items of so many numbers each to take at a time, at least 1."""
    # What the caches of a few cores hold; on a GPU, what keeps it busy.
    budget = 4 << 20 if tensor.device.type == "cpu" else 1 << 30
    return max(1, budget // max(1, numbers * tensor.element_size()))


def _blocks(keys, query):
    """Some images at a time: their place, and room for (images, R, P, A) numbers."""
    shape = query.shape[1], *keys.shape[1:]
    step = min(len(query), _at_a_time(keys, shape[0] * shape[1] * shape[2]))
    room = keys.new_empty(step, *shape)
    for i in range(0, len(query), max(1, step)):
        block = slice(i, min(i + step, len(query)))
        yield block, room[:block.stop - i]


class _Energy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, weight, token, keys, d_keys):
        ctx.save_for_backward(query, keys, weight)
        ctx.d_keys = d_keys
        energy = keys.new_empty(*query.shape[:2], keys.shape[1])
        opposite = (-query).unsqueeze(2)
        for block, room in _blocks(keys, query):
            # relu(k + q) = max(k, -q) + q: one pass over the block instead of two
            torch.maximum(keys[block, None], opposite[block], out=room)
            torch.matmul(room, weight, out=energy[block])
        return energy + (query @ weight).unsqueeze(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, keys, weight = ctx.saved_tensors
        grad, d_query = grad.contiguous(), torch.empty_like(query)
        if not ctx.d_keys:
            # At least float32: it is a sum over all words.
            ctx.d_keys.append(keys.new_zeros(
                keys.shape, dtype=torch.promote_types(keys.dtype, torch.float32)))
        [d_keys] = ctx.d_keys
        ones = keys.new_ones(1, 1, query.shape[1])
        for block, room in _blocks(keys, query):
            torch.add(keys[block, None], query[block].unsqueeze(2), out=room)
            # grad where the ReLU is open, 0 elsewhere
            open_ = torch.ops.aten.threshold_backward(grad[block].unsqueeze(3).expand_as(room),
                                                      room, 0)
            torch.sum(open_, 2, out=d_query[block])
            n, r, p, a = open_.shape
            if r == 1:
                d_keys[block] += open_.squeeze(1)
            else:
                d_keys[block] += torch.bmm(ones.expand(n, 1, r),
                                           open_.view(n, r, p * a)).view(n, p, a)
        return d_query * weight, (d_query * query).sum((0, 1)), None, None, None


def log_softmax_parts(scores, targets):
    """
    The two parts of a log-probability, target's score and logsumexp, each (W,) in float32 at least,
    without a second tensor of the scores' size. scores (W, V), targets (W,)
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    rows = _at_a_time(scores, scores.shape[1])
    totals = torch.cat([part.to(dtype).logsumexp(1) for part in scores.split(rows)])
    return scores.gather(1, targets.unsqueeze(1)).squeeze(1).to(dtype), totals


class CrossEntropy(torch.autograd.Function):
    """
    `CrossEntropy.apply(scores, targets, weights)`: F.cross_entropy's sum over the words, in float32
    at least, but without a second and third tensor of the scores' size: the gradient is the only
    one.

    scores (W, V), targets (W,); weights (W,) of the words, or None
    """

    @staticmethod
    def forward(ctx, scores, targets, weights):
        chosen, totals = log_softmax_parts(scores, targets)
        ctx.save_for_backward(scores, targets, totals, weights)
        losses = totals - chosen
        return losses.sum() if weights is None else (losses * weights).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scores, targets, totals, weights = ctx.saved_tensors
        d_scores, rows = torch.empty_like(scores), _at_a_time(scores, scores.shape[1])
        grads = grad.expand_as(totals) if weights is None else grad * weights.to(totals.dtype)
        for part, target, total, out, d_loss in zip(
                *(x.split(rows) for x in (scores, targets, totals, d_scores, grads))):
            # Rounded to the scores' precision only when all is done: p - 1 is small.
            d_part = (part - total.unsqueeze(1)).exp_()
            d_part.scatter_add_(1, target.unsqueeze(1), torch.full_like(total, -1).unsqueeze(1))
            out.copy_(d_part.mul_(d_loss.unsqueeze(1)))
        return d_scores, None, None
