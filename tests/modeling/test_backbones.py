"""The cut through a classifier, its weights from a file, and what goes wrong on the way."""

import os
from http.client import IncompleteRead
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import nn

from checkpoints import PRETRAINED, build, load, save
from modeling.backbones import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from models import DecoderWithAttention, Encoder
from utils import UserError


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    for function in ("torch.hub.download_url_to_file", "timm.models._hub.hf_hub_download"):
        monkeypatch.setattr(function, None)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def before_pooling(model, image):
    seen = []
    model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model(image)
    return seen[0]


def all_but_the_last(model, image):
    return nn.Sequential(*list(model.children())[:-1])(image)


FEATURES = {  # of the whole classifier, before it is cut; the others are timm's
    "resnet18": before_pooling,
    "mobilenet_v2": lambda model, image: model.features(image),
    "googlenet": before_pooling,  # its auxiliary classifiers stand between the blocks
    "densenet121": lambda model, image: model.features(image),
    "shufflenet_v2_x0_5": all_but_the_last,
    "vgg11": lambda model, image: model.features[:-1](image),
}
MORE = (
    "densenet121 shufflenet_v2_x0_5 vgg11 resnet18d tf_efficientnet_b0 ghostnet_050 convnext_atto"
)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    "name",  # dla34 is not a sequence of its children
    ["resnet18", "mobilenet_v2", "googlenet", "mobilenetv3_small_050", "dla34"]
    + [slow(name) for name in (*MORE.split(), "repvgg_a0", "efficientvit_b0")],
)
@torch.no_grad()
def test_body_gives_the_classifiers_own_features(monkeypatch, name):
    is_timms, image, seen = name not in FEATURES, torch.rand(1, 3, 128, 128), []
    module, maker = (timm, "create_model") if is_timms else (torchvision.models, "get_model")
    make = getattr(module, maker)
    features = FEATURES.get(name, lambda model, image: model.forward_features(image))

    def watched(*args, **kwargs):
        model = make(*args, **kwargs)
        seen.append(features(model.eval(), image))
        return model

    monkeypatch.setattr(module, maker, watched)
    backbone = load_backbone(name, None)  # "none" changes the BatchNorms after the cut
    torch.testing.assert_close(backbone.body.eval()(image), seen[0])
    config, normal = timm.get_pretrained_cfg(name), (IMAGENET_MEAN, IMAGENET_STD)
    if name == "googlenet":  # its weights want -1..1
        normal = ((0.5,) * 3,) * 2
    assert seen[0].shape[1] == backbone.channels
    assert backbone[3:] == ((config.mean, config.std) if is_timms else normal)


def test_random_batchnorm_has_the_statistics_of_one_batch_of_noise():
    torch.manual_seed(0)
    body = load_backbone("resnet18", "none").body
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(weights=None)
    noise = plain.conv1(torch.randn(4, 3, 128, 128))
    torch.testing.assert_close(body[1].running_mean, noise.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(body[1].running_var, noise.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert body[1].momentum == 0.1 and not body.training


@pytest.mark.parametrize(
    "name, cells, width",
    [
        ("vit_tiny_patch16_224", 196, 192),
        slow("swin_tiny_patch4_window7_224", 64, 768),
        slow("vit_small_patch14_dinov2", 196, 384),
    ],
)
def test_tokens_of_a_transformer_form_the_grid_of_the_image(tmp_path, name, cells, width):
    encoder = Encoder(name=name, weights="none")
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert encoder.cells(images).shape == (1, cells, width)
        assert encoder.cells(torch.zeros(1, 3, 320, 320)).shape[0::2] == (1, width)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    assert sum(p.requires_grad for p in encoder.parameters()) > 100
    path = tmp_path / "x.pth.tar"
    save(path, encoder, DecoderWithAttention(5, 4, 6, 9, encoder.encoder_dim), None)
    loaded, _ = build(load(path), path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), encoder(images))


def test_tokens_of_a_vit_are_in_the_order_of_its_patches():
    encoder = Encoder(14, "vit_tiny_patch16_224", "none", image_size=224)  # 14 x 14 patches
    model = encoder.resnet[0].model
    with torch.no_grad():
        images = torch.randn(2, 3, 224, 224)
        expected = model.forward_features(images)[:, 1:]  # without the class token
        torch.testing.assert_close(encoder.cells(images), expected)
        patch = model.patch_embed.proj(images[:, :, 48:64, 80:96]).flatten(1)
        torch.testing.assert_close(model.patch_embed(images)[:, 3, 5], patch)


@pytest.mark.parametrize("name", ["resnet50", "tf_efficientnet_lite0", slow("resnet18d")])
def test_stride_16_keeps_the_weights_and_sees_the_same_at_every_second_cell(name):
    """
    Dilation leaves out the subsampling alone: every second cell of the finer map is a cell of the
    coarse one, where no stage after the first dilated one pads the border.
    """
    torch.manual_seed(0)
    coarse = Encoder(name=name, weights="none", encoded_image_size=64)
    fine = Encoder(name=name, weights="none", encoded_image_size=64, stride=16)
    fine.load_state_dict(coarse.state_dict())
    images = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    with torch.no_grad():
        coarse = coarse.cells(images)[0].unflatten(0, (16, 16))[5:11, 5:11]
        fine = fine.cells(images)[0].unflatten(0, (32, 32))
    near = {"rtol": 1e-3, "atol": 1e-3 * coarse.abs().max()}
    assert sum(torch.allclose(fine[i::2, i::2][5:11, 5:11], coarse, **near) for i in (0, 1)) == 1


def test_stride_16_is_refused_where_it_is_not_reached():
    for name in ("resnet18", "mobilenetv3_small_050"):
        with pytest.raises(UserError, match=f"--encoder_stride 16: {name} has 32 and cannot"):
            Encoder(name=name, weights="none", stride=16)
    with torch.no_grad():  # by itself 14 x 14, and 15 x 15, which is pooled
        for name, stride, side in (("vgg11", 16, 224), ("squeezenet1_1", 32, 256)):
            encoder = Encoder(name=name, weights="none", stride=stride)
            images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
            assert encoder.cells(images).shape == (1, 196, 512)


def test_names_that_are_no_encoders_are_user_errors():
    for name, weights, message in (
        ("efficientnet_lite", "none", "unknown encoder efficientnet_lite; .*tf_efficientnet_l"),
        ("resnet-xyz", "none", r"unknown encoder resnet-xyz; see torchvision.*\(\)$"),
        ("efficientnet_lite2", "imagenet", "no weights for efficientnet_lite2"),
        ("mixer_s32_224", "none", "mixer_s32_224 makes neither one feature map nor a square"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(name, weights)


# Weights from a file


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(1)
    return torchvision.models.squeezenet1_1(weights=None).eval()


def test_weights_are_found_in_whatever_programs_save_them_in(tmp_path, classifier):
    from safetensors.torch import save_file

    images, state, path = torch.randn(1, 3, 96, 96), classifier.state_dict(), tmp_path / "w.pth"
    contents = [
        {"state_dict": state, "epoch": 3},
        {"model": state},
        {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        {**state, "classifier.1.weight": torch.zeros(7, 512, 1, 1)},  # other classes
        {k: t for k, t in state.items() if "classifier" not in k},
        nn.DataParallel(classifier),
    ]
    with torch.no_grad():
        expected = classifier.features(images)
        for content in contents:
            torch.save(content, path)
            body = load_backbone("squeezenet1_1", str(path)).body
            torch.testing.assert_close(body(images), expected, rtol=0, atol=0)
        save_file(state, tmp_path / "w.safetensors")
        body = load_backbone("squeezenet1_1", tmp_path / "w.safetensors").body
        torch.testing.assert_close(body(images), expected, rtol=0, atol=0)
        torch.save({key: tensor.half() for key, tensor in state.items()}, path)
        body = load_backbone("squeezenet1_1", path).body
        assert {p.dtype for p in body.parameters()} == {torch.float32}
        assert (body(images) - expected).norm() < 0.01 * expected.norm()


def test_encoder_of_a_captioner_is_taken_as_weights(tmp_path):
    torch.manual_seed(0)
    trained, path = Encoder(name="resnet18", weights="none"), tmp_path / "x.pth.tar"
    decoder = DecoderWithAttention(5, 4, 6, 9, 512)
    states = {f"module.{n}": t for n, t in trained.state_dict().items()}
    torch.save({"encoder": states, "decoder": decoder.state_dict()}, tmp_path / "OLD.pth.tar")
    save(path, trained, decoder, None)
    for file in (path, tmp_path / "OLD.pth.tar"):
        encoder = Encoder(name="resnet18", weights=str(file))
        assert all(torch.equal(encoder.state_dict()[k], t) for k, t in trained.state_dict().items())
        with pytest.raises(UserError, match=f"{file} .*pass --encoder resnet18"):
            Encoder(name="mobilenet_v2", weights=str(file))


KEY = "features.3.squeeze.weight"


def test_weights_that_do_not_fit_or_are_none_end_in_one_line(tmp_path, classifier):
    state, path = classifier.state_dict(), tmp_path / "w.pth"
    lacking = {key: tensor for key, tensor in state.items() if key != KEY}
    for content, message in (
        (lacking, KEY),
        ({**state, "decoder.fc": torch.zeros(1)}, "decoder.fc"),
        ({**state, KEY: torch.zeros(3)}, KEY),
        ({**state, KEY: state[KEY] * float("nan")}, "not finite"),
        ({"encoder_args": 3, "encoder": 4}, ""),
        ({"encoder_args": {"name": "squeezenet1_1"}, "encoder": {"resnet.0": torch.ones(1)}}, ""),
        (5, "no weights"),
        (os.system, r"(posix|nt)\.system"),  # is refused by name
    ):
        torch.save(content, path)
        with pytest.raises(UserError, match=f"{path} .*{message}") as error:
            load_backbone("squeezenet1_1", str(path))
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    for suffix in ("pth", "safetensors"):
        for content in (b"", b"text", b"PK\x03\x04 no zip"):
            (tmp_path / f"w.{suffix}").write_bytes(content)
            with pytest.raises(UserError, match=f"{tmp_path}/w.{suffix} "):
                load_backbone("squeezenet1_1", tmp_path / f"w.{suffix}")
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match=f"{path} not found; --encoder_weights takes"):
            load_backbone("squeezenet1_1", path)


# Downloads


def test_failed_download_names_url_and_option(monkeypatch):
    """Of torchvision's first weights, which are the tutorial's, or of timm's"""
    problems = URLError("no network"), RuntimeError("hash"), IncompleteRead(b"half")
    for module, maker, name, url in (
        (torchvision.models, "get_model", "mobilenet_v2", r"https://\S*/mobilenet_v2-b0353104.pth"),
        (timm, "create_model", "resnet18d", r"https://\S*resnet18d\S*"),
    ):
        for problem in problems:
            monkeypatch.setattr(module, maker, make := Mock(side_effect=problem))
            with pytest.raises(UserError, match=rf"^could not download {url} \(") as error:
                load_backbone(name, "imagenet")
            assert "--encoder_weights FILE" in str(error.value) and "\n" not in str(error.value)
            assert name == "resnet18d" or make.call_args[1]["weights"].url.endswith(url[-12:])
        with pytest.raises(IncompleteRead):  # not a download
            load_backbone(name, "none")


# What the repository ships


def test_shipped_encoder_loads_and_expects_images_of_minus_1_to_1():
    encoder = Encoder(name="tf_efficientnet_lite2", weights=PRETRAINED)
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5] * 3
    stored = torch.load(PRETRAINED, weights_only=True)["encoder"]
    loaded = encoder.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key].to(loaded[key].dtype)) for key in stored)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), encoder(image / 127.5 - 1))
