"""
Convolutional classifiers of torchvision and timm, reduced to what the encoder needs: the layers
up to the feature map, their weights, the input normalisation, and which modules to fine-tune.
"""

import math
import re
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modeling import efficientnet_lite, legacy_checkpoints
from utils import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Children that belong to the head, or (Inception, GoogLeNet) to the auxiliary heads for training.
_HEADS = re.compile("fc|classifier|heads?|pre_logits|global_pool|avgpool|dropout|flatten")
_AUXILIARY = re.compile("aux[12]|AuxLogits")


class Backbone(NamedTuple):
    body: nn.Sequential  # the classifier's children without its head
    channels: int  # of the feature map: E
    fine_tuned: list  # modules beyond stride 4: blocks 2-4 of a ResNet
    mean: tuple  # with which its images, 0..1, are normalised
    std: tuple


def load_backbone(name, weights, stride=32):
    """
    name: a convolutional classifier of torchvision, else of timm, or a transformer of timm whose
    tokens form a grid (ViT, DINO, Swin)
    weights: "imagenet" (downloaded once), "none" (random), the path of a state dict or of one of
    our checkpoints, or None where a checkpoint will be loaded into it
    stride: pixels of the image to a cell of the feature map. 32 is the network as it is (some, such
    as VGG, have 16 then); at 16 the last stage keeps the resolution of the one before and dilates
    its convolutions instead (Yu and Koltun 2016, arXiv 1511.07122), with the same weights.

    Raises UserError for an unknown name, a failed download, weights that do not fit or a network
    that cannot have this stride.
    """
    if name in efficientnet_lite.SCALES and weights != "imagenet":  # timm downloads them
        model = efficientnet_lite.EfficientNetLite(name, stride)
        mean, std = efficientnet_lite.MEAN, efficientnet_lite.STD
    elif _is_torchvision(name):
        model, mean, std = _from_torchvision(name, weights, stride)
    else:
        model, mean, std = _from_timm(name, weights, stride)
    state = None if weights in ("imagenet", "none", None) else _read_file(weights, name)
    is_captioner = isinstance(state, dict) and "encoder_args" in state
    if state is not None and not is_captioner:
        _load_classifier(model, state, name, weights)

    body = []
    for child, module in model.named_children():
        if _HEADS.fullmatch(child):
            break
        if not _AUXILIARY.fullmatch(child):
            body.append(module)
    body = nn.Sequential(*body)
    if isinstance(last := body[-1], nn.Sequential) and isinstance(last[-1], nn.MaxPool2d):
        last[-1] = nn.Identity()  # VGG: section 4.3 takes the map before the last max pooling
    probed = getattr(model, "feature_map", None) or _probe(body)
    if probed is None and hasattr(model, "forward_features"):
        # A timm model that is not a sequence of its children: HRNet, DLA and similar ones.
        model.reset_classifier(0, "")
        body = nn.Sequential(model)
        probed = _probe(body)
    if probed is None and hasattr(model, "forward_features"):
        body = nn.Sequential(TokenGrid(model))
        probed = _probe_tokens(body, model)
    if probed is None:
        raise UserError(
            f"{name} makes neither one feature map nor a square grid of tokens; try "
            f"resnet101, vgg19, tf_efficientnet_lite0 or vit_small_patch16_224"
        )
    *probed, found = probed
    if stride < found:
        raise UserError(
            f"--encoder_stride {stride}: {name} has {found} and cannot be dilated; try "
            f"resnet50, resnet101 or tf_efficientnet_lite2, or leave it out"
        )
    if is_captioner:
        _load_encoder(body, state, name, weights)
    if weights == "none":
        calibrate_batchnorm(body)
    return Backbone(body, *probed, mean, std)


class TokenGrid(nn.Module):
    """A transformer of timm whose tokens, without those that stand for no place, are a map."""

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


@torch.no_grad()
def _probe_tokens(body, model):
    """As `_probe`, for a `TokenGrid`: all blocks are fine-tuned, but not how patches are cut."""
    side = 256
    try:
        out = body.eval()(torch.zeros(1, 3, side, side))
    except Exception:
        return None  # networks of many kinds fail in many ways
    if out.dim() != 4 or not 1 < out.shape[2] == out.shape[3] < side // 4:
        return None
    blocks = [
        module
        for name, module in model.named_children()
        if name in ("blocks", "layers", "stages", "norm")
    ]
    return (out.shape[1], blocks, round(side / out.shape[2])) if blocks else None


def _is_torchvision(name):
    import torchvision

    return name in torchvision.models.list_models(module=torchvision.models)


def _from_torchvision(name, weights, stride):
    import torchvision

    pretrained = None
    if weights == "imagenet":
        # The tutorial used V1; V2 classifies better, but its features transfer worse.
        available = torchvision.models.get_model_weights(name)
        pretrained = getattr(available, "IMAGENET1K_V1", available.DEFAULT)
    try:
        model = _create(
            partial(torchvision.models.get_model, name, weights=pretrained),
            stride,
            replace_stride_with_dilation=[False, False, True],
        )
    except Exception as error:  # OSError, HTTPException, RuntimeError for a wrong hash
        if pretrained is None:
            raise
        raise UserError(
            f"could not download {pretrained.url} ({error}); fetch that file and pass "
            f"--encoder_weights FILE, or --encoder_weights none"
        ) from None
    if name in ("googlenet", "inception_v3"):  # torchvision's weights expect -1..1
        return model, (0.5,) * 3, (0.5,) * 3
    return model, IMAGENET_MEAN, IMAGENET_STD


def _create(create, stride, **dilation):
    """
    The model that the function `create` returns, at stride 16 with these options if it takes them.
    Whether they had the effect is seen in its output, see `load_backbone`.
    """
    if stride == 16:
        with suppress(TypeError, ValueError, NotImplementedError, AssertionError):
            return create(**dilation)
    return create()


def _from_timm(name, weights, stride):
    import timm

    if not timm.is_model(name):
        similar = ", ".join(timm.list_models(f"*{name}*")[:8])
        raise UserError(
            f"unknown encoder {name}; see torchvision.models.list_models() and "
            f"timm.list_models()" + (f"; similar: {similar}" if similar else "")
        )
    config = timm.get_pretrained_cfg(name)
    create = partial(timm.create_model, name, pretrained=weights == "imagenet")
    try:
        # Transformers are made for one size of images, unless they are told otherwise; others do
        # not take the option.
        try:
            model = create(dynamic_img_size=True, dynamic_img_pad=True)
        except TypeError:
            try:
                model = create(img_size=256, strict_img_size=False)
            except TypeError:
                model = _create(create, stride, output_stride=16)
    except Exception as error:
        if weights != "imagenet":
            raise
        # huggingface_hub raises many kinds of errors; all mean that there are no weights.
        url = config.url or f"https://huggingface.co/{config.hf_hub_id}/tree/main"
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"could not download {url} ({reason}); fetch that file and pass "
            f"--encoder_weights FILE, or --encoder_weights none"
        ) from None
    return model, config.mean, config.std


def _read_file(path, name):
    """
    A state dict, or a captioner's checkpoint, ours or the tutorial's. No code in the file is run:
    of whole modules only the tensors are read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} not found; --encoder_weights takes imagenet, none or a file")
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file  # timm's download format; timm requires it

        try:
            return load_file(path)
        except Exception as error:
            raise _weights_error(path, name, error) from None
    try:
        return _read_untrusted(path)
    except UserError as error:
        reason = str(error).partition(" is damaged or not a checkpoint: ")[2]
        if not reason:  # it names what is refused
            raise
        raise _weights_error(path, name, reason) from None


def _read_untrusted(path):
    """The content of a file of torch.save, as `_read_file` returns it"""
    root, _ = legacy_checkpoints.read(path)
    if (
        isinstance(root, dict)
        and {"encoder", "decoder"} <= root.keys()
        and "encoder_args" not in root
    ):
        return legacy_checkpoints.convert(root, path)
    with legacy_checkpoints.one_line_errors(path):
        if isinstance(root, dict) and "encoder_args" in root:
            return {
                "encoder_args": root["encoder_args"],
                "encoder": _read_tensors(root["encoder"], path),
            }
        for key in ("state_dict", "model", "model_state_dict"):  # around it, by training programs
            if isinstance(root, dict) and isinstance(root.get(key), dict | legacy_checkpoints.Stub):
                root = root[key]
        return _read_tensors(root, path)


def _read_tensors(root, path):
    """Name -> tensor, of a state dict or a whole module; ValueError if there is none"""
    found = legacy_checkpoints.find_tensors(root)
    if not found:
        raise ValueError("it holds no weights")
    return {name: tensor.read(path) for name, tensor in found.items()}


def _load_encoder(body, checkpoint, name, path):
    """Load the encoder of a trained captioner."""
    try:
        found = checkpoint["encoder_args"]["name"]
        if found != name:
            raise UserError(f"{path} has the encoder {found}, not {name}; pass --encoder {found}")
        body.load_state_dict(
            {key.removeprefix("resnet."): tensor for key, tensor in checkpoint["encoder"].items()}
        )
    except UserError:
        raise
    except Exception as error:
        raise _weights_error(path, name, error) from None


def _load_classifier(model, state, name, path):
    """
    Load a state dict with the classifier's own keys. Those of the head, which is thrown away, may
    be missing, or of another number of classes.
    """
    sizes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    state = {
        key: tensor
        for key, tensor in state.items()
        if not (
            _HEADS.fullmatch(key.partition(".")[0])
            and sizes.get(key) != getattr(tensor, "shape", None)
        )
    }
    try:
        report = model.load_state_dict(state, strict=False)
    except Exception as error:
        raise _weights_error(path, name, error) from None
    missing = [
        key
        for key in report.missing_keys
        if not _HEADS.fullmatch(key.partition(".")[0]) and not key.endswith("num_batches_tracked")
    ]
    if missing or report.unexpected_keys:
        key, verb = (missing[0], "lacks") if missing else (report.unexpected_keys[0], "also has")
        raise UserError(f"{path} does not fit {name}: it {verb} {key}")


def _weights_error(path, name, error):
    reason = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200]
    return UserError(f"{path} does not hold weights of {name}: {reason}")


@torch.no_grad()
def calibrate_batchnorm(body):
    """
    Set the statistics of a random network's BatchNorms to those of noise images. With the initial
    ones, activations of a deep residual network grow with every block, to 1e5 in a ResNet-101.
    """
    norms = [m for m in body.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # this batch only
    body.train()(torch.randn(4, 3, 128, 128))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    body.eval()


@torch.no_grad()
def _probe(body):
    """
    Run one small image. Returns the channels of the feature map, the modules whose output is beyond
    stride 4, and the stride of the feature map; None if the output is not a feature map.
    """
    side, beyond_stride_4, hooks = 128, [], []

    def check_output(module, _, out):
        if isinstance(out, torch.Tensor) and out.dim() == 4 and out.shape[3] < side // 4:
            beyond_stride_4.append(module)

    def register_hooks(module):
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or hasattr(module, "default_cfg"):
            for child in module.children():
                register_hooks(child)
        else:
            hooks.append(module.register_forward_hook(check_output))

    register_hooks(body)
    try:
        out = body.eval()(torch.zeros(1, 3, side, side))
        channels = out.shape[1]
        if out.dim() != 4 or not 1 < out.shape[2] == out.shape[3] < side // 4:
            return None
    except Exception:
        return None  # children that are not a sequence fail in many ways
    finally:
        for hook in hooks:
            hook.remove()
    weights = sum(p.numel() for p in body.parameters())
    if sum(p.numel() for module in beyond_stride_4 for p in module.parameters()) < weights / 2:
        return None  # a transformer that turns tokens into a map only at its end
    return channels, beyond_stride_4, round(side / out.shape[2])


def fold_batchnorm(network):
    """
    Multiply each BatchNorm into the convolution before it, in place, for inference alone: the same
    function with one pass less over each feature map. Networks of torchvision and of this program
    use their layers in the order in which they define them; others stay as they are.
    """
    for module in network.modules():
        if type(module).__module__.split(".")[0] not in ("torchvision", "modeling", "torch"):
            continue
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in pairwise(children):
            if type(conv) in (nn.Conv2d, efficientnet_lite.Conv2dSame) and type(norm) in (
                nn.BatchNorm2d,
                efficientnet_lite.NormAct,
            ):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, getattr(norm, "act", nn.Identity()))
    network.to(memory_format=torch.channels_last)
