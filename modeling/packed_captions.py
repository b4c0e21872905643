"""
`PackedCaptions`: a padded batch of captions in order of time steps, as in
torch.nn.utils.rnn.pack_padded_sequence, with the images that the captions share.
"""

from functools import partial
from typing import NamedTuple

import torch


class PackedCaptions(NamedTuple):
    """
    The longest captions come first, so the captions still active at step t are the first ones, and
    so are their images. Computed on the CPU, so that the decoder's loop never waits for a GPU to
    know how many captions are active.

    W is the number of tokens to predict, all except <start>.
    """

    images: torch.Tensor  # (N,) the images, longest caption first
    image_of: torch.Tensor  # (N R,) for each caption, longest first, the position of its image
    batch_sizes: list  # T numbers M: the captions active at each step
    grids: list  # T pairs (n, R): the active images, and the most active captions of one of them
    # In order of steps, (W,) each:
    slots: torch.Tensor  # a caption's index in the flattened grid of its step
    tokens: torch.Tensor  # the input token's index in captions (N, R, L)
    steps: torch.Tensor  # the token's index in a tensor (N, R, T)
    by_caption: torch.Tensor  # the permutation from order of steps to order of captions

    @staticmethod
    def of(lengths, width, device):
        """lengths: (N, R) on the CPU; width: L, padding included"""
        decode_lengths = lengths - 1  # tokens to predict
        longest_first = dict(descending=True, stable=True)
        images = decode_lengths.max(1).values.argsort(dim=0, **longest_first)
        captions = decode_lengths.flatten().argsort(dim=0, **longest_first)
        image_of = images.argsort()[captions // decode_lengths.shape[1]]
        rank_in_image = decode_lengths.argsort(dim=1, **longest_first).argsort(1)
        rank = rank_in_image.flatten()[captions]
        all_steps = torch.arange(int(decode_lengths.max())).unsqueeze(1)
        active = decode_lengths.flatten()[captions] > all_steps  # (T, N R)
        n, r = ((active * (x + 1)).max(1).values for x in (image_of, rank))
        step, caption = active.nonzero(as_tuple=True)
        steps = captions[caption] * len(all_steps) + step
        slots = image_of[caption] * r[step] + rank[caption]
        tokens = captions[caption] * width + step
        to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
        per_token = torch.stack([slots, tokens, steps, steps.argsort()])  # one copy instead of four
        return PackedCaptions(
            to_device(images),
            to_device(image_of),
            active.sum(1).tolist(),
            list(zip(n.tolist(), r.tolist())),
            *to_device(per_token),
        )
