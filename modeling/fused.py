"""
Convolution, BatchNorm and activation in one step.

A BatchNorm that keeps its statistics, as the encoder's always do, scales and shifts each channel,
and can be multiplied into the convolution's weights before the images come. That is the same
function and, since the product is differentiable, it has the same gradients, with two passes less
over each feature map. Where nothing is trained on a CPU, oneDNN also applies the activation to each
result before it leaves the registers.
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from modeling.autograd import uses_onednn
from modeling.efficientnet_lite import Conv2dSame

# What oneDNN applies to a result: a name, and numbers
_ACTIVATIONS = {nn.Identity: ("none", []), nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0, 6])}


class ConvNormAct(nn.Module):
    """A convolution of a network, and the BatchNorm and activation that follow it."""

    def __init__(self, conv, norm, act):
        super().__init__()
        self.conv, self.norm, self.act = conv, norm, act

    def fold(self):
        """Weights (C', C, k, k) and biases (C') of the convolution and the norm together"""
        conv, norm = self.conv, self.norm
        scale, shift = (norm.running_var + norm.eps).rsqrt(), -norm.running_mean
        if conv.bias is not None:
            shift = shift + conv.bias
        if norm.affine:
            scale = scale * norm.weight
            return conv.weight * scale.view(-1, 1, 1, 1), shift * scale + norm.bias
        return conv.weight * scale.view(-1, 1, 1, 1), shift * scale

    def forward(self, x, folded):
        """x: (N, C, h, w); folded: what `fold` returned; returns (N, C', h', w')"""
        conv, (weight, bias) = self.conv, folded
        if isinstance(conv, Conv2dSame):
            weight = conv.widen(weight, x)
        if uses_onednn(x, weight):
            return torch.ops.mkldnn._convolution_pointwise(
                x,
                weight,
                bias,
                conv.padding,
                conv.stride,
                conv.dilation,
                conv.groups,
                *_ACTIVATIONS[type(self.act)],
                "",
            )
        return self.act(
            F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        )


class FusedBody(nn.Module):
    """A network whose ConvNormActs `layers` are folded once for all images of a call."""

    def __init__(self, graph_module, layers):
        super().__init__()
        self.graph_module, self.layers = graph_module, layers

    def forward(self, images):
        """images: (N, 3, h, w); returns feature maps (N, E, h', w')"""
        folded = [layer.fold() for layer in self.layers]
        return self.graph_module(images, folded)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return (
            isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
            or module.__module__.startswith("timm.layers")
            or super().is_leaf_module(module, name)
        )


def fuse(body):
    """
    The same network, of the same modules, with its convolutions fused; `body` itself where there is
    none to fuse, or where the path of its input depends on the input.
    """
    try:
        graph = _Tracer().trace(body)
    except Exception:
        return body  # tracing fails in many ways
    modules, layers = dict(body.named_modules()), []
    with graph.inserting_after(next(iter(graph.nodes))):
        folded = graph.placeholder("folded")
    for node in list(graph.nodes):
        replaced, layer = _find_layer(node, modules)
        if layer is None:
            continue
        name = f"fused_{len(layers)}"
        with graph.inserting_after(replaced[-1]):
            weights = graph.call_function(operator.getitem, (folded, len(layers)))
        with graph.inserting_after(weights):
            fused = graph.call_module(name, (node.args[0], weights))
        replaced[-1].replace_all_uses_with(fused)
        for old in reversed(replaced):
            graph.erase_node(old)
        layers.append(layer)
        modules[name] = layer
    return FusedBody(fx.GraphModule(modules, graph), nn.ModuleList(layers)) if layers else body


def _find_layer(node, modules):
    """The nodes and the ConvNormAct that begin at this node of a graph; None, None without one"""
    conv, norm = (_module(n, modules) for n in (node, node.next))
    if (
        not (type(conv) is nn.Conv2d and conv.padding_mode == "zeros" or type(conv) is Conv2dSame)
        or not isinstance(norm, nn.BatchNorm2d)
        or list(node.users) != [node.next]
    ):
        return None, None
    nodes = [node, node.next]
    act = getattr(norm, "act", None)  # of a norm that brings its activation
    if act is None or type(act) is nn.Identity:
        act, following = nn.Identity(), nodes[-1].next
        if type(found := _module(following, modules)) in (nn.ReLU, nn.ReLU6) and list(
            nodes[-1].users
        ) == [following]:
            act = found
            nodes.append(following)
    return (nodes, ConvNormAct(conv, norm, act)) if type(act) in _ACTIVATIONS else (None, None)


def _module(node, modules):
    return modules[node.target] if node.op == "call_module" else None
