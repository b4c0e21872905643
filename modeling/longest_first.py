"""`LongestFirst`: a padded batch of captions in order of decreasing length, for teacher forcing."""

from collections.abc import Sequence

import torch
from torch import Tensor


class LongestFirst:
    """
    Captions sorted by length, so that those that have not ended at step t are the first ones, and
    so are their images. W is the number of tokens to predict, all except <start>.

    lengths: (N, R), <start> and <end> counted. The order is computed on the CPU, so that the loop
    over time steps never waits for a GPU to know how many captions have not ended.

    images (N,)    the image with the longest caption first, on the device
    rows (N R,)    for each caption, longest first, its image's index in `images`, on the CPU
    batch_sizes    for each of T steps the number M of captions that have not ended
    """

    def __init__(self, lengths: Tensor, device: torch.device):
        to_predict = lengths.cpu() - 1
        images = to_predict.amax(1).argsort(descending=True, stable=True)
        captions = to_predict.flatten().argsort(descending=True, stable=True)
        going_on = to_predict.flatten()[captions] > torch.arange(int(to_predict.max()))[:, None]
        step, caption = going_on.nonzero(as_tuple=True)  # (W,) each, step by step
        places = captions[caption] * len(going_on) + step  # of each token in (N, R, T)
        self.shape, self.batch_sizes = (*lengths.shape, len(going_on)), going_on.sum(1).tolist()
        self.rows = images.argsort()[captions // lengths.shape[1]]  # argsort inverts a permutation
        self.images, self._captions, self._places, self._by_caption = (
            x.to(device, non_blocking=True) for x in (images, captions, places, places.argsort())
        )

    def inputs(self, captions: Tensor) -> Tensor:
        """(N, R, L) -> (N R, L), longest first"""
        return captions.flatten(0, 1).index_select(0, self._captions)

    def targets(self, captions: Tensor) -> Tensor:
        """(N, R, L) -> (W,) the tokens to predict, image by image, caption by caption"""
        tokens = captions[..., 1 : self.shape[2] + 1].flatten()
        return tokens.index_select(0, self._places[self._by_caption])

    def by_caption(self, values: Sequence[Tensor]) -> Tensor:
        """T tensors (M, H), one per step -> (W, H), in the order of `targets`"""
        return torch.cat(tuple(values)).index_select(0, self._by_caption)

    def padded(self, values: Sequence[Tensor]) -> Tensor:
        """T tensors (M, P), one per step -> (N, R, T, P), zero after a caption's end"""
        joined = torch.cat(tuple(values))
        zeros = joined.new_zeros(*self.shape, joined.shape[1])
        return zeros.flatten(0, 2).index_copy(0, self._places, joined).view_as(zeros)
