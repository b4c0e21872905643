"""Where an encoder's cells look, relative to the place at which they are drawn."""

import pytest
import torch
from torch import nn

from modeling import field_of_view
from modeling.field_of_view import find_offset, measure_offset
from models import Encoder


class Windows(nn.Module):
    """Convolutions of stride 2 with a window of 3 equal weights, padded on one side or on both."""

    def __init__(self, layers, padding):
        super().__init__()
        self.pad, self.layers = nn.ConstantPad2d(padding, 0.0), layers
        self.convolution = nn.Conv2d(3, 3, 3, stride=2, bias=False)
        nn.init.zeros_(self.convolution.weight)
        for i in range(3):
            nn.init.ones_(self.convolution.weight[i, i])

    def forward(self, images):
        for _ in range(self.layers):
            images = self.convolution(self.pad(images))
        return images.flatten(2).transpose(1, 2)


@pytest.fixture(autouse=True)
def noise_images(monkeypatch):
    monkeypatch.setattr(field_of_view, "NOISE_IMAGES", 8)


# Left, right, top, bottom. A cell is drawn in the middle of the 2 ** layers pixels that it stands
# for. The window of 3 reaches one beyond a pixel's pair on one side, so its middle is half a pixel
# from the pair's; the next layer's pixels are 2 wide, and so on: (2 ** layers - 1) / 2 pixels.
def test_offset_is_what_the_padding_says():
    signs = {(0, 1, 0, 1): (1, 1), (1, 1, 1, 1): (-1, -1), (0, 1, 1, 0): (1, -1)}
    for layers, side in ((1, 128), (3, 128), (4, 128), (4, 112)):  # 112: one cell in the middle
        for padding, (x, y) in signs.items():
            pixels = (2**layers - 1) / 2 / side
            # The squared gradients of neighbouring cells' projections overlap, are random there.
            found = measure_offset(Windows(layers, padding), side)
            assert found == pytest.approx((x * pixels, y * pixels), abs=0.004 * layers)


def test_measuring_changes_nothing_and_is_repeated_only_for_an_encoder_in_training(monkeypatch):
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    with torch.inference_mode():
        offset = find_offset(encoder)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(weight.grad is None for weight in encoder.parameters())
    monkeypatch.setattr(field_of_view, "measure_offset", lambda _, side: (0.1, side))
    assert find_offset(encoder) == offset
    encoder.fine_tune()
    assert find_offset(encoder) == (0.1, 256)
