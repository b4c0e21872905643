"""
The decoder's steps for a batch of images, in training, search and sampling: `PlainSteps` calls the
methods of models.py, `FastSteps` computes the same numbers faster. Both have the same interface:

    steps = decoder.steps(features)             # once per batch of images
    state = steps.initial_state(rows)           # rows (M,): the image of each of M captions
    state, alpha, weights = steps.step(tokens, state, rows)
    logits = steps.logits(state[0])

`rows` may be on the CPU; then no step waits for a GPU.
"""

import inspect
import math
import sys
import zlib
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.autograd import attention_energy, deferred_embedding, deferred_linear

State = tuple[Tensor, ...]  # the LSTM's h and c, each (M, H)
HardAttention = Callable[[Tensor], Tensor]  # alpha (M, P) -> weights (M, P): modeling/sampling.py

# The decoder that FastSteps computes: methods with this `source_digest`, and layers with biases
KNOWN_SOURCE = 2077254964
KNOWN_LAYERS = {"embedding": nn.Embedding, "dropout": nn.Dropout, "decode_step": nn.LSTMCell}
KNOWN_LAYERS |= dict.fromkeys(("init_h", "init_c", "f_beta", "fc"), nn.Linear)
KNOWN_LAYERS |= {f"attention.{name}_att": nn.Linear for name in ("encoder", "decoder", "full")}
KNOWN_PARAMETERS = 19


def make_steps(decoder, features, per_image):
    """FastSteps; PlainSteps if the decoder is `plain` or not the one that FastSteps computes"""
    if not decoder.plain:
        if is_known(decoder):
            return FastSteps(decoder, features, per_image)
        _report_plain(type(decoder).__name__)
    return PlainSteps(decoder, features)


@lru_cache
def _report_plain(name):
    """Once for each class of decoder"""
    message = f"{name} differs from the decoder that modeling/decoding.py computes faster:"
    print(message, "its steps run as they are written", file=sys.stderr)


def is_known(decoder):
    """Whether FastSteps computes what this decoder does; it would not call hooks of the layers."""
    methods = decoder.init_hidden_state, decoder.step, decoder.logits, decoder.attention.forward
    layers = {name: type(x) for name, x in decoder.named_modules() if not any(x.children())}
    inner = [vars(module).items() for module in list(decoder.modules())[1:]]
    return (
        layers == KNOWN_LAYERS
        and len(decoder.state_dict()) == KNOWN_PARAMETERS
        and not any(hooks for items in inner for name, hooks in items if name.endswith("_hooks"))
        and source_digest(*(getattr(x, "__func__", x) for x in methods)) == KNOWN_SOURCE
    )


@lru_cache
def source_digest(*functions):
    """A checksum of the functions' source; None if it cannot be read or a function is wrapped."""
    try:
        text = "".join(map(inspect.getsource, functions))
    except OSError:  # typed at a prompt, for example
        return None
    wrapped = any(hasattr(function, "__wrapped__") for function in functions)
    return None if wrapped else zlib.crc32(text.encode())


class PlainSteps:
    """Calls the methods of any decoder."""

    def __init__(self, decoder, features):
        size = decoder.args["encoded_image_size"]
        features = features.reshape(len(features), -1, features.shape[-1])
        if features.shape[1] != size**2:
            features = F.adaptive_avg_pool2d(_square(features), size).flatten(2).transpose(1, 2)
        self.decoder, self.annotations = decoder, features  # (N, P, E)
        self._rows, self._of_captions = None, None

    def initial_state(self, rows: Tensor) -> State:
        """h and c before the first token of each caption"""
        return tuple(x[rows] for x in self.decoder.init_hidden_state(self.annotations))

    def step(
        self, tokens: Tensor, state: State, rows: Tensor, hard: HardAttention | None = None
    ) -> tuple[State, Tensor, Tensor]:
        """As the decoder's `step`, for annotations[rows]"""
        # In teacher forcing captions only end, from the last row on: one copy serves all steps.
        if self._rows is None or not torch.equal(self._rows[: len(rows)], rows):
            self._rows, self._of_captions = rows, self.annotations[rows]
        return self.decoder.step(tokens, state, self._of_captions[: len(rows)], hard)

    def logits(self, h: Tensor) -> Tensor:
        """h (M, H) -> (M, V)"""
        return self.decoder.logits(h)

    def keep(self, images: Tensor) -> None:
        """Keep only these images, (n,) indices; from then on `rows` are indices into them."""
        self.annotations, self._rows = self.annotations[images], None


class FastSteps:
    """
    Computes the same numbers as `PlainSteps`, with the work rearranged:

    - Pooling from the backbone's G cells to P locations is linear, so it commutes with linear
      layers: encoder_att sees G cells, and the context vector is a sum over G cells.
    - encoder_att is applied once per image, and all captions of an image share the result.
    - decoder_att, f_beta and the LSTM's weights for h all multiply h, as one joined matrix.
    - Weight gradients are summed over all steps by one product, see modeling/autograd.py, where
      the ReLU and full_att are computed in blocks that fit the processor's cache.

    A step's captions lie in a grid (n, R), at most R of each of the first n images, at `slots` (M,)
    of the flattened grid.
    """

    def __init__(self, decoder, features, per_image):
        attention, lstm = decoder.attention, decoder.decode_step
        size = decoder.args["encoded_image_size"]
        features = features.reshape(len(features), -1, features.shape[-1])
        self.decoder, self.features, self.per_image = decoder, features, per_image
        encoder_att = deferred_linear(attention.encoder_att.weight, attention.encoder_att.bias)
        keys = encoder_att(features.flatten(0, 1)).view(*features.shape[:2], -1)
        self.pool = None  # (P, G); each row sums to 1, so that biases pass through it unchanged
        if features.shape[1] != size**2:
            self.pool = pooling_matrix(features.shape[1], size, features.device, features.dtype)
            keys = self.pool @ keys
        self._set_keys(keys)
        of_h = attention.decoder_att, decoder.f_beta
        weight = torch.cat([*(layer.weight for layer in of_h), lstm.weight_hh])
        bias = torch.cat([*(layer.bias for layer in of_h), lstm.bias_hh])
        self._of_h = deferred_linear(weight, bias)
        self._sizes = *(layer.out_features for layer in of_h), 4 * lstm.hidden_size
        self._embedding = deferred_embedding(decoder.embedding.weight)
        self._to_gates = deferred_linear(lstm.weight_ih, lstm.bias_ih)
        self.logits = deferred_linear(decoder.fc.weight, decoder.fc.bias)

    def _set_keys(self, keys):
        self.keys = keys  # (N, P, A), encoder_att of the annotation vectors
        self._energy = attention_energy(keys, self.decoder.attention.full_att.weight.squeeze(0))

    def initial_state(self, rows: Tensor) -> State:
        """As in `PlainSteps`"""
        mean = self.features.mean(1) if self.pool is None else self.pool.mean(0) @ self.features
        rows = rows.to(mean.device, non_blocking=True)
        # c is a sum over many steps, so it is never in half precision.
        layers = self.decoder.init_h, self.decoder.init_c
        return tuple(layer(mean).to(layer.weight.dtype).index_select(0, rows) for layer in layers)

    def step(self, tokens, state, rows, hard=None):
        """As in `PlainSteps`"""
        h, c = state
        query, beta_logits, gates = self._of_h(h).split(self._sizes, 1)
        context, alpha, weights = self._attend(query, rows, hard)
        inputs = torch.cat([self._embedding(tokens), beta_logits.sigmoid() * context], 1)
        i, f, g, o = (gates.to(c.dtype) + self._to_gates(inputs)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return (o.sigmoid() * c.tanh(), c), alpha, weights

    def _attend(self, query, rows, hard):
        """query (M, A), decoder_att(h) -> context (M, E), alpha and weights (M, P)"""
        (n, r), slots = self._arrange(rows)

        def to_grid(x):
            if slots is not None:
                x = x.new_zeros(n * r, x.shape[1]).index_copy(0, slots, x)
            return x.view(n, r, -1)

        def from_grid(x):
            x = x.flatten(0, 1)
            return x if slots is None else x.index_select(0, slots)

        # The bias cancels in the softmax; it is added so that it gets a gradient, of 0.
        energy = self._energy(to_grid(query)) + self.decoder.attention.full_att.bias
        on_grid = energy.softmax(-1)
        alpha = weights = from_grid(on_grid)
        if hard is not None:
            weights = hard(alpha)
            on_grid = to_grid(weights)
        if self.pool is not None:
            on_grid = on_grid @ self.pool
        return from_grid(on_grid @ self.features[:n]), alpha, weights

    def _arrange(self, rows):
        """The grid's shape (n, R), and the slots, or None where the captions fill it in order"""
        ordered, order = rows.sort(stable=True)
        # of each caption among those of its image
        rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
        rank = torch.empty_like(rank).index_copy_(0, order, rank)
        n, r = self.grid_shape(rows, rank)
        slots = rows * r + rank
        in_order = rows.device.type == "cpu" and torch.equal(slots, torch.arange(n * r))
        return (n, r), None if in_order else slots.to(self.features.device, non_blocking=True)

    def grid_shape(self, rows: Tensor, rank: Tensor) -> tuple[int, int]:
        """n and R of the grid in which these captions lie, each the rank-th of its image"""
        if rows.device.type == "cpu":
            return int(rows.max()) + 1, int(rank.max()) + 1
        # Perhaps larger than needed, but the exact size would have to be read from the device.
        return len(self.features), self.per_image or int(rank.max()) + 1

    def keep(self, images: Tensor) -> None:
        """As in `PlainSteps`, without gradients"""
        self.features = self.features[images]
        self._set_keys(self.keys[images])


def _square(cells):
    """(N, G, E) on a square grid -> (N, E, side, side)"""
    side = math.isqrt(cells.shape[1])
    if side**2 != cells.shape[1]:
        raise ValueError(f"{cells.shape[1]} annotation vectors do not form a square grid")
    return cells.transpose(1, 2).unflatten(2, (side, side))


@lru_cache(maxsize=8)
def pooling_matrix(cells, size, device, dtype):
    """AdaptiveAvgPool2d(size) on a square grid of `cells` cells, as a matrix (size^2, cells)"""
    with torch.inference_mode(False):
        one_hot = torch.eye(cells, device=device, dtype=dtype).unsqueeze(2)  # cell, cell, 1
        return F.adaptive_avg_pool2d(_square(one_hot), size).flatten(1).t().contiguous()
