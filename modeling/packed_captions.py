"""
`PackedCaptions`: a padded batch of captions laid out time step by time step, as
torch.nn.utils.rnn.pack_padded_sequence does it, with the images that the captions share.
"""

from functools import partial
from typing import NamedTuple

import torch


class PackedCaptions(NamedTuple):
    """
    The longest captions come first, so that those which go on at step t are a prefix of all, and
    their images a prefix of all images. Made on the CPU, so that the decoder's loop never waits for
    a GPU to say how many captions are left.

    W is the number of tokens to predict, that is all but the <start>s.
    """
    images: torch.Tensor  # (N,) the images, longest caption first
    image_of: torch.Tensor  # (N R,) for each caption, longest first, the position of its image
    batch_sizes: list  # T numbers M: how many captions go on at each step
    grids: list  # T pairs (n, R): the images left, and the most captions that one of them has left
    # Step by step, (W,) each:
    slots: torch.Tensor  # a caption's index in the flattened grid of its step
    tokens: torch.Tensor  # the index in captions (N, R, L) of the token that is read
    steps: torch.Tensor  # its index in a tensor (N, R, T)
    by_caption: torch.Tensor  # the permutation from step by step to caption by caption

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
        goes_on = decode_lengths.flatten()[captions] > all_steps  # (T, N R)
        n, r = ((goes_on * (x + 1)).max(1).values for x in (image_of, rank))
        step, caption = goes_on.nonzero(as_tuple=True)
        steps = captions[caption] * len(all_steps) + step
        slots = image_of[caption] * r[step] + rank[caption]
        tokens = captions[caption] * width + step
        to_device = partial(torch.Tensor.to, device=device, non_blocking=True)
        per_token = torch.stack([slots, tokens, steps, steps.argsort()])  # one copy instead of four
        return PackedCaptions(to_device(images), to_device(image_of), goes_on.sum(1).tolist(),
                              list(zip(n.tolist(), r.tolist())), *to_device(per_token))
