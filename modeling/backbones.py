"""
Convolutional classifiers of torchvision and timm, reduced to what the encoder needs: the layers
up to the feature map, their weights, the input normalisation, and which modules to fine-tune.
"""

import math
import re
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modeling import efficientnet_lite, legacy_checkpoints, tutorial_models
from utils import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Children that belong to the head, or (Inception, GoogLeNet) to the auxiliary heads for training.
_HEADS = re.compile("fc|classifier|heads?|pre_logits|global_pool|avgpool|dropout|flatten")
_AUXILIARY = re.compile("aux[12]|AuxLogits")


class Backbone(NamedTuple):
    body: nn.Sequential  # the classifier's children without its head
    channels: int  # of the feature map: E
    fine_tuned: list  # modules beyond stride 4: blocks 2-4 of a ResNet
    mean: tuple  # to normalise its images, 0..1
    std: tuple


def load_backbone(name, weights, stride=32):
    """
    name: a convolutional classifier of torchvision, else of timm, or a transformer of timm whose
    tokens form a grid (ViT, DINO, Swin)
    weights: "imagenet" (downloaded once), "none" (random), the path of a state dict or of one of
    our checkpoints, or None where a checkpoint will be loaded into it
    stride: image pixels per cell of the feature map. 32 is the network as it is (some, such
    as VGG, have 16 then); at 16 the last stage keeps the resolution of the one before and dilates
    its convolutions instead (Yu and Koltun 2016, arXiv 1511.07122), with the same weights.

    Raises UserError for an unknown name, a failed download, weights that do not fit or a network
    that cannot have this stride.
    """
    if name in efficientnet_lite.SCALES and weights != "imagenet":  # timm downloads them
        model = efficientnet_lite.EfficientNetLite(name, stride)
        mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
    else:
        found = _from_torchvision(name, weights, stride) or _from_timm(name, weights, stride)
        model, mean, std = found
    body = nn.Sequential()
    for child, module in model.named_children():
        if _HEADS.fullmatch(child):
            break
        if not _AUXILIARY.fullmatch(child):
            body.append(module)
    if isinstance(last := body[-1], nn.Sequential) and isinstance(last[-1], nn.MaxPool2d):
        last[-1] = nn.Identity()  # VGG: section 4.3 takes the map before the last max pooling
    found = getattr(model, "feature_map", None) or _probe(body)
    if found is None and hasattr(model, "forward_features"):
        # A timm model that is not a sequence of its children: HRNet, DLA and similar ones.
        model.reset_classifier(0, "")
        body = nn.Sequential(model)
        found = _probe(body)
        if found is None:
            body = nn.Sequential(TokenGrid(model))
            found = _probe_tokens(body, model)
    if found is None:
        raise UserError(
            f"{name} makes neither one feature map nor a square grid of tokens; try "
            f"resnet101, vgg19, tf_efficientnet_lite0 or vit_small_patch16_224"
        )
    channels, fine_tuned, found_stride = found
    if stride < found_stride:
        raise UserError(
            f"--encoder_stride {stride}: {name} has {found_stride} and cannot be dilated; try "
            f"resnet50, resnet101 or tf_efficientnet_lite2, or leave it out"
        )
    if weights not in ("imagenet", "none", None):
        if not Path(weights).is_file():
            raise UserError(f"{weights} not found; --encoder_weights takes imagenet, none or FILE")
        with legacy_checkpoints.one_line_errors(weights, f"does not hold weights of {name}"):
            _load_file(weights, name, model, body)
            if not all(t.sum(dtype=torch.float32).isfinite() for t in body.state_dict().values()):
                raise ValueError("they are not finite")
    if weights == "none":
        # BatchNorm statistics of noise images, for a random network: with the initial ones, the
        # activations of a deep residual network grow with every block, to 1e5 in a ResNet-101.
        torch.optim.swa_utils.update_bn([torch.randn(4, 3, 128, 128)], body)
    return Backbone(body, channels, fine_tuned, mean, std)


class TokenGrid(nn.Module):
    """A transformer of timm, with its patch tokens as a feature map."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        x = self.model.forward_features(images)
        if x.dim() == 4:  # (N, h, w, E), of Swin
            return x.permute(0, 3, 1, 2)
        x = x[:, getattr(self.model, "num_prefix_tokens", 0) :]  # (N, h w, E)
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).reshape(len(x), -1, side, side)


def _from_torchvision(name, weights, stride):
    import torchvision

    if name not in torchvision.models.list_models(module=torchvision.models):
        return None
    pretrained = None
    if weights == "imagenet":
        # The tutorial used V1; V2 classifies better, but its features transfer worse.
        available = torchvision.models.get_model_weights(name)
        pretrained = getattr(available, "IMAGENET1K_V1", available.DEFAULT)
    create = partial(torchvision.models.get_model, name, weights=pretrained)
    with _one_line_download(pretrained and pretrained.url):
        model = _dilated(create, stride, replace_stride_with_dilation=[False, False, True])
    if name in ("googlenet", "inception_v3"):  # torchvision's weights expect -1..1
        return model, (0.5,) * 3, (0.5,) * 3
    return model, IMAGENET_MEAN, IMAGENET_STD


def _from_timm(name, weights, stride):
    import timm

    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:8])
        raise UserError(
            f"unknown encoder {name}; see torchvision.models.list_models() and "
            f"timm.list_models()" + (f"; similar: {similar}" if similar else "")
        )
    config = timm.get_pretrained_cfg(name)
    if weights == "imagenet" and not config.has_weights:
        raise UserError(f"timm has no weights for {name}; pass --encoder_weights none or FILE")
    create = partial(timm.create_model, name, pretrained=weights == "imagenet")
    url = config.url or f"https://huggingface.co/{config.hf_hub_id}/tree/main"
    model = None
    with _one_line_download(url if weights == "imagenet" else None):
        # Transformers take one image size only, unless told otherwise.
        for options in (
            {"dynamic_img_size": True, "dynamic_img_pad": True},
            {"img_size": 256, "strict_img_size": False},
        ):
            with suppress(TypeError):  # models that do not take the option
                model = model or create(**options)
        model = model or _dilated(create, stride, output_stride=16)
    return model, config.mean, config.std


def _dilated(create, stride, **options):
    """The model of `create`, at stride 16 with these options if it takes them."""
    if stride == 16:
        with suppress(TypeError, ValueError, NotImplementedError, AssertionError):
            return create(**options)
    return create()


@contextmanager
def _one_line_download(url):
    """Turn any error of a download into a UserError; url: None if nothing is downloaded"""
    try:
        yield
    except Exception as error:  # OSError, HTTPException, RuntimeError (wrong hash), timm's
        if url is None:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"could not download {url} ({reason}); fetch that file and pass --encoder_weights "
            f"FILE, or --encoder_weights none"
        ) from None


def _load_file(path, name, model, body):
    """
    Load a weights file: of the whole classifier `model` of this name, or the encoder of a
    captioner's checkpoint, ours or the tutorial's, into `body`. No code in it is run.
    """
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # timm's download format; timm requires it

        root = load_file(path)
    else:
        root = legacy_checkpoints.read(path)
    keys = root.keys() if isinstance(root, dict) else set()
    if {"encoder", "decoder"} <= keys and "encoder_args" not in keys:
        root = tutorial_models.convert(root, path)
    if isinstance(root, dict) and "encoder_args" in root:
        found = root["encoder_args"]["name"]
        if found != name:
            raise UserError(f"{path} has the encoder {found}, not {name}; pass --encoder {found}")
        body.load_state_dict({k.removeprefix("resnet."): t for k, t in root["encoder"].items()})
        return
    for key in ("state_dict", "model", "model_state_dict"):  # training programs wrap it
        if isinstance(root, dict) and isinstance(root.get(key), dict | legacy_checkpoints.Stub):
            root = root[key]
    state = legacy_checkpoints.find_tensors(root)
    if not state:
        raise ValueError("it holds no weights")
    own = model.state_dict()
    # The head is not used: its weights may be missing, or for another number of classes.
    head = {k for k in own.keys() | state if _HEADS.fullmatch(k.partition(".")[0])}
    optional = {k: t for k, t in own.items() if k in head or k.endswith("num_batches_tracked")}
    model.load_state_dict(optional | {k: t for k, t in state.items() if k not in head})


def _probe(body):
    """
    Encode one small image. Returns the channels of the feature map, the modules whose output is
    beyond stride 4, and the map's stride; None if the output is not a feature map.
    """
    beyond_stride_4, hooks = [], []

    def check_output(module, inputs, out):
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[3] < 128 // 4:
            beyond_stride_4.append(module)

    modules = [body]
    for module in modules:
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or hasattr(module, "default_cfg"):
            modules += module.children()
        else:
            hooks.append(module.register_forward_hook(check_output))
    found = _channels_and_stride(body, 128)
    for hook in hooks:
        hook.remove()
    weights = sum(p.numel() for p in body.parameters())
    beyond = sum(p.numel() for module in beyond_stride_4 for p in module.parameters())
    if found is None or beyond < weights / 2:  # a transformer whose tokens become a map at its end
        return None
    return found[0], beyond_stride_4, found[1]


def _probe_tokens(body, model):
    """As `_probe`, for a `TokenGrid`: all blocks are fine-tuned, but not the patch embedding."""
    found, names = _channels_and_stride(body, 256), ("blocks", "layers", "stages", "norm")
    blocks = [module for name, module in model.named_children() if name in names]
    return (found[0], blocks, found[1]) if found and blocks else None


@torch.no_grad()
def _channels_and_stride(body, side):
    """Of the feature map of an image; None unless it is square and beyond stride 4"""
    try:
        shape = body.eval()(torch.zeros(1, 3, side, side)).shape
    except Exception:
        return None  # children that are not a sequence fail in many ways
    is_map = len(shape) == 4 and 1 < shape[2] == shape[3] < side // 4
    return (shape[1], round(side / shape[2])) if is_map else None


def fold_batchnorm(network):
    """
    Fold each BatchNorm into the convolution before it, in place, for inference only: the same
    function with one pass fewer over each feature map. Networks of torchvision and of this program
    apply their layers in the order of their definition; others stay as they are.
    """
    convolutions = nn.Conv2d, efficientnet_lite.Conv2dSame, efficientnet_lite.DepthwiseConv2d
    norms = nn.BatchNorm2d, efficientnet_lite.NormAct
    for module in network.modules():
        if not type(module).__module__.startswith(("torchvision.", "torch.", f"{__package__}.")):
            continue
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if type(conv) in convolutions and type(norm) in norms:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    network.to(memory_format=torch.channels_last)
