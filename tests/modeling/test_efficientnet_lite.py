"""modeling/efficientnet_lite.py against timm's."""

import pytest
import timm
import torch
from torch import nn

from modeling.backbones import _probe, load_backbone
from modeling.efficientnet_lite import MEAN, SCALES, STD, EfficientNetLite


@pytest.mark.parametrize("stride", [32, 16])
@pytest.mark.parametrize("name", SCALES)
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


def test_initial_weights_are_spread_as_those_of_timm():
    torch.manual_seed(0)
    name = "tf_efficientnet_lite0"
    theirs = timm.create_model(name).state_dict()
    for key, weight in EfficientNetLite(name).state_dict().items():
        if weight.dim() == 4 and weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(theirs[key].std().item(), rel=0.1), key


@pytest.mark.parametrize("stride", [32, 16])
def test_facts_of_its_feature_map_are_those_found_by_encoding_an_image(stride):
    body = load_backbone("tf_efficientnet_lite1", "none", stride)
    channels, fine_tuned, found = _probe(body.body)
    assert (body.channels, stride) == (channels, found)
    assert body.fine_tuned == fine_tuned


def test_the_same_weights_are_fine_tuned_as_with_timm():
    ours = load_backbone("tf_efficientnet_lite2", "none")
    model = timm.create_model("tf_efficientnet_lite2")
    body = nn.Sequential(model.conv_stem, model.bn1, model.blocks, model.conv_head, model.bn2)
    _, theirs, _ = _probe(body)
    assert [[p.shape for p in module.parameters()] for module in ours.fine_tuned] == [
        [p.shape for p in module.parameters()] for module in theirs
    ]
