"""The cut through a classifier, its weights from a file, and what goes wrong on the way."""

import http.client
import os
import re
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from torch import nn

from checkpoints import PRETRAINED, build, load, save
from datasets import UserError
from modeling.backbones import IMAGENET_MEAN, IMAGENET_STD, load_backbone
from models import DecoderWithAttention, Encoder


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test wants to download")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)


@torch.no_grad()
def features_of(monkeypatch, module, maker, name, features):
    """What the whole classifier, before it is cut, and its body make of one image."""
    make, image, seen = getattr(module, maker), torch.rand(1, 3, 128, 128), []

    def watched(*args, **kwargs):
        model = make(*args, **kwargs)
        seen.append(features(model.eval(), image))
        return model

    monkeypatch.setattr(module, maker, watched)
    backbone = load_backbone(name, None)  # "none" changes the BatchNorms after the cut
    return seen[0], backbone.body.eval()(image), backbone


def before_pooling(model, image):
    seen = []
    model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    model(image)
    return seen[0]


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
@pytest.mark.parametrize(
    "name, features",
    [
        ("resnet18", before_pooling),
        ("squeezenet1_1", lambda model, image: model.features(image)),
        ("mobilenet_v2", lambda model, image: model.features(image)),
        ("mobilenet_v3_small", before_pooling),
        ("densenet121", lambda model, image: model.features(image)),
        (
            "shufflenet_v2_x0_5",
            lambda model, image: model.conv5(
                model.stage4(model.stage3(model.stage2(model.maxpool(model.conv1(image)))))
            ),
        ),
        ("regnet_x_400mf", before_pooling),
        ("googlenet", before_pooling),  # its auxiliary classifiers stand between the blocks
        ("vgg19", lambda model, image: model.features[:-1](image)),
    ],
)
def test_body_gives_torchvisions_own_features(monkeypatch, name, features):
    expected, got, backbone = features_of(
        monkeypatch, torchvision.models, "get_model", name, features
    )
    torch.testing.assert_close(got, expected)
    assert got.shape[1] == backbone.channels
    if name == "googlenet":  # its weights want -1..1
        assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    else:
        assert backbone.mean == IMAGENET_MEAN and backbone.std == IMAGENET_STD


@pytest.mark.parametrize(
    "name",
    [
        "resnet18d",
        "tf_efficientnet_b0",
        "mobilenetv3_small_050",
        "ghostnet_050",
        "convnext_atto",
        "repvgg_a0",
        "dla34",
        "efficientvit_b0",
    ],
)  # dla34 is not a sequence of its children
def test_body_gives_timms_own_features(monkeypatch, name):
    expected, got, backbone = features_of(
        monkeypatch, timm, "create_model", name, lambda model, image: model.forward_features(image)
    )
    torch.testing.assert_close(got, expected)
    config = timm.get_pretrained_cfg(name)
    assert got.shape[1] == backbone.channels
    assert (backbone.mean, backbone.std) == (config.mean, config.std)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("resnet18", (64, 512)),
        ("mobilenet_v2", (64, 1280)),
        ("tf_efficientnet_lite0", (64, 1280)),
        ("squeezenet1_1", (196, 512)),
    ],
)  # 15 x 15 of its own, pooled to 14 x 14
def test_annotation_vectors_of_a_256_pixel_image(name, shape):
    with torch.no_grad():
        encoder = Encoder(name=name, weights="none")
        got = encoder.cells(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
    assert got.shape == (1, *shape)


def test_blocks_2_to_4_of_a_resnet_are_fine_tuned():
    encoder = Encoder(name="resnet18", weights="none")
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    trained = {name.split(".")[1] for name, p in encoder.named_parameters() if p.requires_grad}
    assert trained == {"5", "6", "7"}  # of conv1, bn1, relu, maxpool, layer1, ..., layer4
    assert all(p.requires_grad for block in list(encoder.resnet)[5:] for p in block.parameters())


@pytest.mark.parametrize("name", ["mixer_s32_224", "levit_128s"])
def test_classifier_without_a_map_or_a_grid_of_tokens_is_a_user_error(name):
    with pytest.raises(UserError, match=f"{name} makes neither one feature map nor a square grid"):
        load_backbone(name, "none")


@pytest.mark.parametrize(
    "name, cells, width",
    [
        ("vit_tiny_patch16_224", 196, 192),
        ("swin_tiny_patch4_window7_224", 64, 768),
        ("vit_small_patch14_dinov2", 196, 384),
    ],
)
def test_tokens_of_a_transformer_form_the_grid_of_the_image(name, cells, width):
    encoder = Encoder(name=name, weights="none")
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert encoder.cells(images).shape == (1, cells, width)
        assert encoder.cells(torch.zeros(1, 3, 320, 320)).shape[0::2] == (1, width)
    assert not any(p.requires_grad for p in encoder.parameters())
    encoder.fine_tune()
    assert sum(p.requires_grad for p in encoder.parameters()) > 100


def test_tokens_of_a_vit_are_in_the_order_of_its_patches():
    encoder = Encoder(14, "vit_tiny_patch16_224", "none", image_size=224)  # 14 x 14 patches
    model = encoder.resnet[0].model
    with torch.no_grad():
        images = torch.randn(2, 3, 224, 224)
        expected = model.forward_features(images)[:, 1:]  # without the class token
        torch.testing.assert_close(encoder.cells(images), expected)
        patches = model.patch_embed(images)
        torch.testing.assert_close(
            patches[:, 3, 5], model.patch_embed.proj(images[:, :, 48:64, 80:96]).flatten(1)
        )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, model: {"state_dict": state, "epoch": 3},
        lambda state, model: {"model": state},
        lambda state, model: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state, model: {
            "state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
        },
        lambda state, model: {
            **state,
            "classifier.1.weight": torch.zeros(7, 512, 1, 1),
            "classifier.1.bias": torch.zeros(7),
        },
        lambda state, model: model,
        lambda state, model: nn.DataParallel(model),
    ],
    ids=["state_dict", "model", "module", "compiled", "classes", "whole", "parallel"],
)
def test_weights_are_found_in_whatever_programs_save_them_in(tmp_path, wrap):
    torch.manual_seed(1)
    model = torchvision.models.squeezenet1_1(weights=None)
    torch.save(wrap(model.state_dict(), model), tmp_path / "w.pth")
    body = load_backbone("squeezenet1_1", str(tmp_path / "w.pth")).body
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(body(images), model.eval().features(images))


def test_weights_file_that_would_run_code_is_refused_by_name(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/run",)

    torch.save({"state_dict": {}, "x": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="(posix|nt).system") as error:
        load_backbone("squeezenet1_1", str(tmp_path / "w.pth"))
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_captioner_with_a_transformer_is_loaded_from_its_checkpoint(tmp_path, name):
    torch.manual_seed(0)
    encoder = Encoder(name=name, weights="none")
    decoder = DecoderWithAttention(5, 4, 6, 9, encoder.encoder_dim)
    save(tmp_path / "x.pth.tar", encoder, decoder, None)
    loaded, _ = build(load(tmp_path / "x.pth.tar"), tmp_path / "x.pth.tar")
    images = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(images), encoder(images))


@pytest.mark.parametrize(
    "content",
    [
        {"encoder_args": 3, "encoder": 4},
        {"encoder_args": {}},
        5,
        {"encoder_args": {"name": "squeezenet1_1"}, "encoder": {}},
    ],
)
def test_file_that_is_almost_a_checkpoint_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="w.pth") as error:
        load_backbone("squeezenet1_1", str(tmp_path / "w.pth"))
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def test_encoder_of_a_tutorial_checkpoint_is_taken_as_weights(tmp_path):
    torch.manual_seed(0)
    trained = Encoder(name="resnet18", weights="none")
    decoder = DecoderWithAttention(5, 4, 6, 9, 512)
    torch.save(
        {
            "encoder": {f"module.{n}": t for n, t in trained.state_dict().items()},
            "decoder": decoder.state_dict(),
        },
        tmp_path / "OLD.pth.tar",
    )
    loaded = Encoder(name="resnet18", weights=str(tmp_path / "OLD.pth.tar"))
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images), trained(images))


def test_unknown_name_lists_similar_ones():
    with pytest.raises(UserError, match="unknown encoder efficientnet_lite; .*tf_efficientnet_l"):
        load_backbone("efficientnet_lite", "none")
    with pytest.raises(UserError, match=r"unknown encoder resnet-xyz; see torchvision.*\(\)$"):
        load_backbone("resnet-xyz", "none")


# Weights from a file


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(5)
    model = torchvision.models.mobilenet_v2(weights=None).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    return model


def body_of(classifier):
    return {
        key: value
        for key, value in classifier.state_dict().items()
        if not key.startswith("classifier")
    }


@pytest.mark.parametrize("content", ["whole", "without head", "half", "safetensors"])
def test_weights_file_gives_the_classifiers_features(tmp_path, classifier, content):
    path = tmp_path / ("w.safetensors" if content == "safetensors" else "w.pth")
    state = classifier.state_dict() if content == "whole" else body_of(classifier)
    if content == "half":  # as pretrained/ stores them: convolutions in 16 bits, the rest in 32
        state = {k: v.half() if v.dim() == 4 else v for k, v in state.items()}
    if content == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save(state, path)
    body, image = load_backbone("mobilenet_v2", path).body.eval(), torch.rand(1, 3, 96, 96)
    assert {p.dtype for p in body.parameters()} == {torch.float32}
    with torch.no_grad():
        expected, got = classifier.features(image), body(image)
    if content == "half":
        assert (got - expected).norm() < 0.01 * expected.norm()
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


KEY = "features.3.conv.0.0.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(KEY), f"lacks {KEY}"),
        (lambda state: state.update({"decoder.fc": torch.zeros(1)}), "also has decoder.fc"),
        (lambda state: state.update({KEY: torch.zeros(3)}), f"does not hold weights of .*{KEY}"),
    ],
)
def test_weights_that_do_not_fit_name_file_and_key(tmp_path, classifier, change, message):
    state = body_of(classifier)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"{tmp_path}/w.pth .*{message}") as error:
        load_backbone("mobilenet_v2", str(tmp_path / "w.pth"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no zip"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_without_weights_is_named(tmp_path, content, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} does not hold weights of squeezenet1_1"):
        load_backbone("squeezenet1_1", path)


def test_missing_weights_file_is_named(tmp_path):
    for path in (tmp_path / "w.pth", tmp_path):
        with pytest.raises(UserError, match=f"{path} not found; --encoder_weights takes"):
            load_backbone("squeezenet1_1", path)


# Downloads

PROBLEMS = [
    URLError("no network"),
    TimeoutError("timed out"),
    RuntimeError("invalid hash value"),
    http.client.IncompleteRead(b"half"),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: type(problem).__name__)
@pytest.mark.parametrize(
    "module, maker, name, url",
    [
        (
            torchvision.models,
            "get_model",
            "resnet18",
            "https://download.pytorch.org/models/resnet18-f37072fd.pth",
        ),
        (timm, "create_model", "resnet18d", r"https://\S*resnet18d\S*"),
    ],
)
def test_failed_download_names_url_and_option(monkeypatch, problem, module, maker, name, url):
    def fail(*args, **kwargs):
        raise problem

    monkeypatch.setattr(module, maker, fail)
    with pytest.raises(UserError) as error:
        load_backbone(name, "imagenet")
    message = str(error.value)
    assert re.match(rf"could not download {url} \(", message), message
    assert "--encoder_weights FILE" in message and "\n" not in message


@pytest.mark.parametrize(
    "module, maker, name",
    [(torchvision.models, "get_model", "resnet18"), (timm, "create_model", "resnet18d")],
)
def test_other_errors_are_not_reported_as_failed_downloads(monkeypatch, module, maker, name):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(module, maker, fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        load_backbone(name, "none")


def test_imagenet_weights_are_the_tutorials(monkeypatch):
    asked, make = [], torchvision.models.get_model

    def note(name, weights):
        asked.append(weights)
        return make(name, weights=None)

    monkeypatch.setattr(torchvision.models, "get_model", note)
    load_backbone("mobilenet_v2", "imagenet")
    assert asked == [torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1]


# What the repository ships


def test_shipped_encoder_loads_and_expects_images_of_minus_1_to_1():
    encoder = Encoder(name="tf_efficientnet_lite2", weights=PRETRAINED)
    assert encoder.mean.flatten().tolist() == encoder.std.flatten().tolist() == [0.5] * 3
    stored = torch.load(PRETRAINED, weights_only=True)["encoder"]
    loaded = encoder.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[key], stored[key].to(loaded[key].dtype)) for key in stored)
    image = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(encoder(image), encoder(torch.ones(1, 3, 64, 64)))


def test_weights_may_be_a_checkpoint_with_that_encoder(tmp_path):
    trained = Encoder(name="mobilenetv3_small_050", weights="none")
    path = tmp_path / "x.pth.tar"
    save(path, trained, DecoderWithAttention(5, 4, 6, 9, trained.encoder_dim), None)
    encoder = Encoder(name="mobilenetv3_small_050", weights=str(path))
    for key, tensor in trained.state_dict().items():
        assert torch.equal(encoder.state_dict()[key], tensor)
    with pytest.raises(UserError, match="pass --encoder mobilenetv3_small_050"):
        Encoder(name="resnet18", weights=str(path))
    torch.save({"encoder_args": {"name": "resnet18"}, "encoder": {"resnet.0.weight": 3}}, path)
    with pytest.raises(UserError, match="does not hold weights of resnet18"):
        Encoder(name="resnet18", weights=str(path))


@pytest.mark.parametrize("name", ["resnet50", "tf_efficientnet_lite0", "resnet18d"])
def test_stride_16_keeps_the_weights_and_sees_the_same_at_every_second_cell(name):
    """
    Dilation leaves out the subsampling alone: every second cell of the finer map is a cell of the
    coarse one, where no stage after the first dilated one pads the border.
    """
    torch.manual_seed(0)
    coarse, fine = (
        Encoder(name=name, weights="none", encoded_image_size=64, stride=stride).eval()
        for stride in (32, 16)
    )
    fine.load_state_dict(coarse.state_dict())
    images = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8)
    with torch.no_grad():
        coarse, fine = (
            encoder.cells(images)[0].unflatten(0, (side, side))
            for encoder, side in ((coarse, 16), (fine, 32))
        )
    starts = [
        start
        for start in ((0, 0), (1, 1))
        if torch.allclose(
            fine[start[0] :: 2, start[1] :: 2][5:11, 5:11],
            coarse[5:11, 5:11],
            rtol=1e-3,
            atol=1e-3 * coarse.abs().max(),
        )
    ]
    assert len(starts) == 1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "densenet121", "dla34"])
def test_an_encoder_that_cannot_be_dilated_is_refused(name):
    with pytest.raises(UserError, match=f"--encoder_stride 16: {name} has 32 and cannot"):
        Encoder(name=name, weights="none", stride=16)


def test_vgg_has_stride_16_by_itself():
    encoder = Encoder(name="vgg11", weights="none", stride=16)
    with torch.no_grad():
        assert encoder.cells(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)).shape == (1, 196, 512)
