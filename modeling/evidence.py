"""
What each location contributed to a word. Attention says where the model looked, not what it used:
a location that is looked at may speak for another word, or for none.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modeling.decoding import HardAttention
from modeling.longest_first import LongestFirst


@torch.inference_mode(False)
def find_evidence(
    decoder: nn.Module,
    features: Tensor,
    tokens: Sequence[int],
    start: int,
    hard: HardAttention | None = None,
) -> np.ndarray:
    """
    The positive part of w_p <d log p(word) / dz, a_p> for each word of a caption and each location
    p, of annotation vector a_p and weight w_p in the context vector z = sum of w_p a_p. What the
    word's log-probability would lose to first order without the location, other weights unchanged.

    decoder: in evaluation mode; features: (G, E) of one image; tokens: the T words of its caption;
    start: the id of <start>; hard: as in `Attention`, for captions that were searched for so

    Returns float32 (T, P) in nats. All words share one backward pass.
    """
    if not tokens:
        return np.zeros((0, decoder.args["encoded_image_size"] ** 2), np.float32)
    image = features.clone().unsqueeze(0)  # a clone: autograd takes no inference tensors
    captions = torch.tensor([[[start, *tokens]]], device=features.device)
    lengths = torch.tensor([[len(tokens) + 1]])
    found = find_batch_evidence(decoder, image, captions, lengths, hard)
    return found[0, 0].float().cpu().numpy()


@torch.no_grad()
def find_batch_evidence(
    decoder: nn.Module,
    features: Tensor,
    captions: Tensor,
    lengths: Tensor,
    hard: HardAttention | None = None,
) -> Tensor:
    """
    As `find_evidence`, for a batch with teacher forcing; arguments as those of the decoder.
    Returns (N, R, T, P), zero after a caption's end.
    """
    order = LongestFirst(lengths, features.device)
    steps = decoder.steps(features.detach().index_select(0, order.images))
    inputs, state, history = order.inputs(captions), steps.initial_state(order.rows), []
    for t, m in enumerate(order.batch_sizes):
        tokens, state = inputs[:m, t], tuple(x[:m] for x in state)
        history.append((tokens, inputs[:m, t + 1], *state))
        state, _, _ = steps.step(tokens, state, order.rows[:m], hard)
    tokens, targets, *state = map(torch.cat, zip(*history))
    rows, weights = torch.cat([order.rows[:m] for m in order.batch_sizes]), []

    def as_inputs(alpha):
        """The context vectors' weights, of which each word depends on its own alone"""
        weights.append((alpha if hard is None else hard(alpha)).detach().requires_grad_())
        return weights[0]

    with torch.enable_grad():
        state, _, _ = steps.step(tokens, tuple(state), rows, as_inputs)
        log_probs = steps.logits(state[0]).log_softmax(1).gather(1, targets.unsqueeze(1))
        [gradient] = torch.autograd.grad(log_probs.sum(), weights)
    return order.padded([(weights[0] * gradient).clamp(min=0)])
