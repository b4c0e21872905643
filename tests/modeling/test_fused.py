"""modeling/fused.py against the network as it is, in float64, and its copy-free promises."""

import copy

import pytest
import torch
from torch import nn

from modeling.fused import ConvNormAct, FusedBody, fuse
from models import Encoder

# Norms with ReLU and ReLU6, with their own activation and without, beside branches and additions;
# convolutions with biases, groups and TensorFlow's padding.
NETWORKS = [
    "resnet18",
    "resnext50_32x4d",
    "mobilenet_v2",
    "googlenet",
    "vgg11_bn",
    "densenet121",
    "shufflenet_v2_x0_5",
    "regnet_x_400mf",
    "tf_efficientnet_lite0",
    "resnet18d",
    "mobilenetv3_small_050",
    "tf_efficientnet_b0",
    "hrnet_w18_small",
    "repvgg_a0",
]


def random_encoder(name, **options):
    torch.manual_seed(0)
    encoder = Encoder(name=name, weights="none", **options)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return encoder


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_fused_network_is_the_same_function(name):
    encoder = random_encoder(name).double()
    fused = fuse(encoder.resnet)
    for height, width in ((64, 64), (96, 64) if name.startswith("hrnet") else (75, 110)):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(fused(images), encoder.resnet(images), rtol=1e-9, atol=1e-9)


def test_gradients_of_fused_network_are_the_same():
    for name in ("resnet18", "tf_efficientnet_lite0"):
        encoder = random_encoder(name).double()
        encoder.fine_tune()
        images = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        leaves = [images, *(p for p in encoder.parameters() if p.requires_grad)]
        weights = torch.randn_like(encoder.resnet(images))
        expected = torch.autograd.grad((encoder.resnet(images) * weights).sum(), leaves)
        found = torch.autograd.grad((fuse(encoder.resnet)(images) * weights).sum(), leaves)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@torch.no_grad()
def test_fused_kernel_is_as_precise_as_the_plain_network():
    for name in ("resnet50", "tf_efficientnet_lite2"):
        encoder = random_encoder(name)
        images = torch.randn(2, 3, 128, 128).contiguous(memory_format=torch.channels_last)
        fused, plain = fuse(encoder.resnet)(images), encoder.resnet(images)
        exact = encoder.resnet.double()(images.double())
        assert (fused - exact).norm() < 2 * (plain - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize(
    "name, layers",
    [("resnet18", 20), ("resnet101", 104), ("mobilenet_v2", 52), ("tf_efficientnet_lite2", 64)],
)
def test_every_norm_of_usual_encoders_is_fused(name, layers):
    fused = fuse(random_encoder(name).resnet)
    assert len(fused.layers) == layers
    left = [
        fused.graph_module.get_submodule(node.target)
        for node in fused.graph_module.graph.nodes
        if node.op == "call_module"
    ]
    assert not [module for module in left if isinstance(module, nn.BatchNorm2d)]
    if name != "resnet18":
        return
    # The ReLU of the stem and the first of each block; the second follows an addition, and stays.
    assert sum(isinstance(module.act, nn.ReLU) for module in fused.layers) == 1 + 8


def test_network_without_norms_to_fuse_is_used_as_it_is():
    for name in ("vgg11", "vit_tiny_patch16_224"):
        body = random_encoder(name).resnet
        assert fuse(body) is body


def test_network_whose_path_depends_on_its_input_is_used_as_it_is():
    class Branches(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    body = Branches(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert fuse(body) is body


def test_norm_and_activation_that_others_read_too_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            y = self.conv(x)
            z = self.norm(y)
            return self.act(z) + z + y

    class NormTwice(Twice):
        def forward(self, x):
            z = self.norm(self.conv(x))
            return self.act(z) + z

    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    body = Twice().eval()
    assert fuse(body) is body
    body = NormTwice().eval()
    with torch.no_grad():
        torch.testing.assert_close(fuse(body)(x), body(x))


@torch.no_grad()
def test_weights_changed_between_two_calls_are_used_at_once():
    encoder = random_encoder("resnet18").double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    before = encoder(images)
    for change in (
        lambda: encoder.resnet[0].weight.data.mul_(2),
        lambda: encoder.resnet[4][0].bn1.running_mean.add_(1),
        lambda: encoder.load_state_dict(random_encoder("resnet18").state_dict()),
    ):
        change()
        after = encoder(images)
        assert not torch.equal(before, after)
        expected = encoder.resnet(images).flatten(2).transpose(1, 2)
        torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-9)
        before = after
    encoder.resnet = random_encoder("mobilenet_v2").resnet.double()
    assert encoder(images).shape[2] == 1280


@torch.no_grad()
def test_a_copy_of_an_encoder_computes_with_its_own_weights():
    encoder = random_encoder("resnet18")
    images = torch.randn(2, 3, 64, 64)
    before = encoder(images)
    other = copy.deepcopy(encoder)
    for weight in other.parameters():
        weight.zero_()
    assert torch.equal(encoder(images), before)
    assert not torch.equal(other(images), before)


@torch.no_grad()
def test_fused_modules_are_neither_saved_nor_trained_twice():
    encoder = random_encoder("resnet18")
    names, parameters = list(encoder.state_dict()), len(list(encoder.parameters()))
    encoder(torch.randn(1, 3, 64, 64))
    assert isinstance(encoder._body, FusedBody) and isinstance(encoder._body.layers[0], ConvNormAct)
    assert list(encoder.state_dict()) == names and len(list(encoder.parameters())) == parameters


@torch.no_grad()
def test_half_precision_is_used_in_fused_networks_too():
    encoder = random_encoder("resnet18")
    images = torch.randn(1, 3, 64, 64)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(images)
    assert found.dtype == torch.bfloat16
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()
