"""
What each location contributed to a word. Attention says where the model looked, not what it used:
a location that is looked at may speak for another word, or for none.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modeling.decoding import HardAttention


@torch.inference_mode(False)
@torch.enable_grad()
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
    steps = decoder.steps(features.clone().unsqueeze(0))  # a clone: autograd takes no inference
    device, states, weights = features.device, [], []  # tensors
    inputs, row = torch.tensor([start, *tokens], device=device), torch.zeros(1, dtype=torch.long)
    state = steps.initial_state(row)
    for token in inputs[:-1].split(1):
        states.append(state)
        with torch.no_grad():
            state, _, _ = steps.step(token, state, row, hard)

    def as_inputs(alpha):
        """The context vectors' weights, of which each word depends on its own alone"""
        weights.append((alpha if hard is None else hard(alpha)).detach().requires_grad_())
        return weights[0]

    state = tuple(torch.cat(parts).detach() for parts in zip(*states))
    state, _, _ = steps.step(inputs[:-1], state, row.expand(len(states)), as_inputs)
    log_probs = steps.logits(state[0]).log_softmax(1).gather(1, inputs[1:].unsqueeze(1))
    [gradient] = torch.autograd.grad(log_probs.sum(), weights)
    return (weights[0] * gradient).detach().clamp(min=0).float().cpu().numpy()
