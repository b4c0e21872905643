"""
EfficientNet-Lite, the encoder of the model that comes with the program, in torch alone.

timm has it too, with the same names and outputs; but importing timm, and torchvision with it, takes
longer than importing torch, which would be most of the time for a caption of one photograph.

Tan and Le 2019 (arXiv 1905.11946); Lite, of Liu 2020, leaves out squeeze-and-excitation, replaces
swish by ReLU6, and scales neither stem and head nor the depth of the first and last stage.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# Width and depth, as multiples of EfficientNet-B0's.
SCALES = {
    "tf_efficientnet_lite0": (1.0, 1.0),
    "tf_efficientnet_lite1": (1.0, 1.1),
    "tf_efficientnet_lite2": (1.1, 1.2),
    "tf_efficientnet_lite3": (1.2, 1.4),
    "tf_efficientnet_lite4": (1.4, 1.8),
}
MEAN = STD = (0.5, 0.5, 0.5)  # of the images it was trained on, 0..1
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
# Of each stage of B0: blocks, kernel size, stride, expansion of the channels, output channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Conv2dSame(nn.Conv2d):
    """
    A convolution with stride 2 that pads as TensorFlow does: if the padding of a dimension is odd,
    right or bottom gets one more than left or top.

    Copying x into a larger tensor takes longer than the convolution. Instead all sides are padded
    equally, and where a side of x is even, the weights get a row or column of zeros before them.
    """

    def forward(self, x):
        weight = F.pad(self.weight, (1 - x.shape[3] % 2, 0, 1 - x.shape[2] % 2, 0))
        return self._conv_forward(x, weight, self.bias)


class DepthwiseConv2d(nn.Conv2d):
    """For stride 1 and an output as large as x; on a CPU its gradients are those of `_Depthwise`"""

    def forward(self, x):
        # With a folded BatchNorm it has a bias, and is not trained.
        if x.device.type != "cpu" or not torch.is_grad_enabled() or self.bias is not None:
            return super().forward(x)
        return _Depthwise.apply(x, self.weight, self.padding, self.dilation)


class _Depthwise(torch.autograd.Function):
    """
    PyTorch's gradients on a CPU are many times slower than the convolution: that of x if the
    kernel is dilated, that of the weight in bfloat16. Here the first is a convolution with the
    mirrored kernel, and the second has the weight's precision, under autocast float32.
    """

    @staticmethod
    def forward(ctx, x, weight, padding, dilation):
        ctx.save_for_backward(x, weight)
        ctx.layout = {"padding": padding, "dilation": dilation, "groups": len(weight)}
        return F.conv2d(x, weight, **ctx.layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), grad_x, grad_weight = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            mirrored = weight.to(grad.dtype).flip(2, 3)
            grad_x = F.conv2d(grad, mirrored, **ctx.layout).to(x.dtype)
        if ctx.needs_input_grad[1]:
            x, grad = x.to(weight.dtype), grad.to(weight.dtype)
            grad_weight = torch.nn.grad.conv2d_weight(x, weight.shape, grad, **ctx.layout)
        return grad_x, grad_weight, None, None


def _convolution(channels, out_channels, kernel_size, stride=1, dilation=1, groups=1):
    cls = Conv2dSame if stride > 1 else DepthwiseConv2d if groups > 1 else nn.Conv2d
    padding = kernel_size // 2 * dilation
    return cls(channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False)


class NormAct(nn.BatchNorm2d):
    """BatchNorm, then ReLU6 unless it ends a block"""

    def __init__(self, channels, act=True):
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True) if act else nn.Identity()

    def forward(self, x):
        return self.act(super().forward(x))


class Block(nn.Module):
    """
    Expand the channels, convolve depthwise, reduce the channels again; a block that changes neither
    size nor channels adds its input.
    """

    def __init__(self, channels, out_channels, kernel_size, stride, dilation, expansion):
        super().__init__()
        middle = channels * expansion
        depthwise = _convolution(middle, middle, kernel_size, stride, dilation, groups=middle)
        if expansion == 1:
            self.conv_dw, self.bn1 = depthwise, NormAct(middle)
            self.conv_pw = _convolution(middle, out_channels, 1)
            self.bn2 = NormAct(out_channels, act=False)
        else:
            self.conv_pw, self.bn1 = _convolution(channels, middle, 1), NormAct(middle)
            self.conv_dw, self.bn2 = depthwise, NormAct(middle)
            self.conv_pwl = _convolution(middle, out_channels, 1)
            self.bn3 = NormAct(out_channels, act=False)
        self.has_skip = stride == 1 and channels == out_channels

    def forward(self, x):
        out = x
        for layer in self.children():
            out = layer(out)
        return out.add_(x) if self.has_skip else out


class EfficientNetLite(nn.Sequential):
    """
    name: a key of SCALES; stride: of its feature map, 32, or 16 with its last stages dilated

    images (N, 3, S, S) -> logits (N, 1000); the encoder takes its layers without the head.
    `feature_map` saves `modeling.backbones` from encoding an image to find it: channels of the map,
    modules whose output is beyond stride 4, stride of the map.
    """

    def __init__(self, name, stride=32):
        width, depth = SCALES[name]
        stages, beyond_stride_4, channels, reached, dilation = [], [], _STEM, 2, 1
        for i, (blocks, kernel_size, stage_stride, expansion, out_channels) in enumerate(_STAGES):
            out_channels = _round_channels(out_channels * width)
            if 0 < i < len(_STAGES) - 1:
                blocks = math.ceil(blocks * depth)
            next_dilation = dilation
            if reached * stage_stride > stride:
                stage_stride, next_dilation = 1, dilation * stage_stride
            reached *= stage_stride
            stage = []
            for _ in range(blocks):
                sizes = (channels, out_channels, kernel_size, stage_stride, dilation, expansion)
                stage.append(Block(*sizes))
                channels, stage_stride, dilation = out_channels, 1, next_dilation
            stages.append(nn.Sequential(*stage))
            beyond_stride_4 += stage * (reached > 4)
        super().__init__(
            OrderedDict(
                conv_stem=_convolution(3, _STEM, 3, 2),
                bn1=NormAct(_STEM),
                blocks=nn.Sequential(*stages),
                conv_head=_convolution(channels, _HEAD, 1),
                bn2=NormAct(_HEAD),
                global_pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                classifier=nn.Linear(_HEAD, _CLASSES),
            )
        )
        for module in self.modules():  # as timm: normal, with variance 2 / fan-out
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        self.feature_map = _HEAD, [*beyond_stride_4, self.conv_head, self.bn2], reached


def _round_channels(channels):
    """To a multiple of 8, but not below 90 %"""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 * (rounded < 0.9 * channels)
