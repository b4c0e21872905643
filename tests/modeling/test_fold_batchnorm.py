"""A network whose BatchNorms are folded into its convolutions is the same function."""

import copy

import pytest
import torch
from torch import nn

from modeling.backbones import fold_batchnorm
from models import Encoder

# Of every family of torchvision with BatchNorm, EfficientNet-Lite, and some of timm: how many are
# folded, or None where some are and some are not.
NETWORKS = {"resnet18": 20, "mobilenet_v2": 52, "densenet121": None, "tf_efficientnet_lite2": 64}
NETWORKS |= {"squeezenet1_1": 0, "resnet18d": None}
MORE = {"resnext50_32x4d": 53, "wide_resnet50_2": 53, "googlenet": 57, "vgg11_bn": 8}
MORE |= dict.fromkeys(["mobilenet_v3_small", "shufflenet_v2_x0_5", "regnet_x_400mf"])
MORE |= dict.fromkeys(["mnasnet0_5", "efficientnet_b0", "hrnet_w18_small"])


def random_encoder(name):
    torch.manual_seed(0)
    encoder = Encoder(name=name, weights="none")
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return encoder


def count_norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    "name, expected",
    [*NETWORKS.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in MORE.items())],
)
@torch.no_grad()
def test_a_folded_network_is_the_same_function(name, expected):
    encoder = random_encoder(name).double()
    folded = copy.deepcopy(encoder.resnet)
    fold_batchnorm(folded)
    before, after = count_norms(encoder.resnet), count_norms(folded)
    assert expected in (None, before - after) and (before > after or expected == 0)
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    torch.testing.assert_close(folded(images), encoder.resnet(images), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_folded_weights_in_float32_and_bfloat16_are_as_precise_as_the_network():
    encoder = random_encoder("resnet18")
    images = torch.randn(1, 3, 64, 64)
    exact = encoder.resnet(images)
    fold_batchnorm(encoder.resnet)
    assert (encoder.resnet(images) - exact).norm() < 1e-4 * exact.norm()
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.resnet(images)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()
