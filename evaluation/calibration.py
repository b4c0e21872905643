"""Calibration: the frequencies of a model's words come closer to people's, by the words' biases."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from datasets import SPECIAL_TOKENS

# 0 leaves the biases alone. Chosen on validation images among 0.1 to 0.4: docs/results.md
STRENGTH = 0.25
PRIOR = 3  # added to both frequencies, so that words too rare to be counted keep their bias


def calibrate(
    bias: Tensor,
    word_map: dict[str, int],
    captions: Sequence[Sequence[str]],
    references: Sequence[Sequence[Sequence[str]]],
    strength: float = STRENGTH,
) -> Tensor:
    """
    Beam search and self-critical training favour the most frequent words (“sitting”) beyond their
    share in what people say. As in logit adjustment (Menon et al. 2021, arXiv 2007.07314), the
    log-ratio of the two frequencies, times strength, is subtracted from the logits.

    bias: (V,) of the decoder's `fc`; captions: the model's, of N images; references: of each of
    these images people's captions, which together count as one. Returns the new biases, (V,).
    """
    generated, human, shift = Counter(), Counter(), torch.zeros_like(bias)
    for words, of_image in zip(captions, references, strict=True):
        generated.update(words)
        for reference in of_image:
            for word in reference:
                human[word] += 1 / len(of_image)
    for word, i in word_map.items():
        if word not in SPECIAL_TOKENS:
            shift[i] = math.log((generated[word] + PRIOR) / (human[word] + PRIOR))
    return bias - strength * shift
