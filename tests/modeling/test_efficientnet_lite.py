"""modeling/efficientnet_lite.py against timm's."""

import pytest
import timm
import torch

from modeling import backbones
from modeling.backbones import load_backbone
from modeling.efficientnet_lite import MEAN, SCALES, STD, DepthwiseConv2d, EfficientNetLite
from utils import UserError

slow = pytest.mark.slow


@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[slow] * (name[-1] in "34")) for name in SCALES]
)
@torch.no_grad()
def test_network_is_that_of_timm(name, stride):
    torch.manual_seed(0)
    theirs = timm.create_model(name, output_stride=stride).double().eval()
    ours = EfficientNetLite(name, stride).double().eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for height, width in ((64, 64), (75, 110)):  # padded differently
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-9, atol=1e-9)
    config = timm.get_pretrained_cfg(name)
    assert (config.mean, config.std) == (MEAN, STD)


@pytest.mark.parametrize("stride", [32, 16])  # 16: with dilated convolutions
def test_gradients_are_those_of_timm(stride):
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", output_stride=stride).double().eval()
    ours = EfficientNetLite("tf_efficientnet_lite0", stride).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert any(isinstance(module, DepthwiseConv2d) for module in ours.modules())
    images, gradients = torch.randn(2, 3, 75, 110, dtype=torch.float64, requires_grad=True), []
    for network in (ours, theirs):
        loss = network(images).square().sum()
        gradients.append(torch.autograd.grad(loss, [images, *network.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16: after a BatchNorm
def test_gradients_of_a_depthwise_convolution_under_autocast_are_those_of_float64(dtype):
    torch.manual_seed(0)
    layout = {"padding": 4, "dilation": 2, "groups": 8, "bias": False}
    layer, plain = (cls(8, 8, 5, **layout) for cls in (DepthwiseConv2d, torch.nn.Conv2d))
    plain.double().load_state_dict(layer.state_dict())
    images, gradients = torch.randn(4, 8, 20, 20).to(dtype).requires_grad_(), []
    for network, enabled in ((layer, True), (plain, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = network(images if enabled else images.double())
        loss = (out.double() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()
        gradients.append(torch.autograd.grad(loss, [images, network.weight]))
        assert enabled == ("_Depthwise" in type(out.grad_fn).__name__)
    for ours, exact, input_dtype in zip(*gradients, (dtype, torch.float32)):
        assert ours.dtype == input_dtype
        assert (ours - exact).norm() < 0.01 * exact.norm()


def test_initial_weights_are_spread_as_those_of_timm():
    torch.manual_seed(0)
    name = "tf_efficientnet_lite0"
    theirs = timm.create_model(name).state_dict()
    for key, weight in EfficientNetLite(name).state_dict().items():
        if weight.dim() == 4 and weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(theirs[key].std().item(), rel=0.1), key


@pytest.mark.parametrize("stride", [32, 16])
def test_facts_of_its_feature_map_are_those_found_by_encoding_an_image(monkeypatch, stride):
    """Without them `load_backbone` looks for the channels, the stride and what is fine-tuned."""
    name = "tf_efficientnet_lite2"
    known, made = load_backbone(name, None, stride), EfficientNetLite(name, stride)
    del made.feature_map
    monkeypatch.setattr(backbones.efficientnet_lite, "EfficientNetLite", lambda *_: made)
    found = load_backbone(name, None, stride)
    with pytest.raises(UserError, match=f"has {stride}"):
        load_backbone(name, None, 8)
    monkeypatch.setattr(backbones.efficientnet_lite, "SCALES", {})
    theirs = load_backbone(name, None, stride)  # timm's
    shapes = [[[p.shape for p in m.parameters()] for m in x[2]] for x in (known, found, theirs)]
    assert shapes[0] == shapes[1] == shapes[2] != []
    assert known.channels == found.channels == theirs.channels
