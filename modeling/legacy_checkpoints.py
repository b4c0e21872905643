"""
Checkpoints of whole modules, as the well-known tutorial wrote them, in today's format or in the one
before it: their tensors by name, and the arguments of our model, without running their code.
"""

import math

from modeling.stub_unpickler import Refused, Stub, Tensor, one_line_errors
from utils import UserError

MAX_DEPTH, MAX_PARTS = 32, 100_000  # of a tree of modules; a ResNet-152 has 4 and 2000


def convert(root, path):
    """
    The parts of a checkpoint in our format from one of the tutorial's, whose encoder and decoder
    are whole modules. It never carried a word map; its optimizers are left behind.

    root: what `read` found in the file

    Raises UserError that names the module or tensor that is not there.
    """
    with one_line_errors(path):
        for name in ("encoder", "decoder"):
            if not isinstance(root.get(name), Stub):
                raise UserError(f"{path} holds no {name}: it is no checkpoint of whole modules")
        encoder, decoder = (_state_dict(root[name]) for name in ("encoder", "decoder"))
        size = _attribute(root["encoder"], "adaptive_pool", "output_size")
        size = size[0] if isinstance(size, tuple) and size else size
        size = size if type(size) is int and 0 < size <= 64 else 14
        p = _attribute(root["decoder"], "dropout", "p")
        checkpoint = {
            "encoder_args": {"name": _backbone(encoder, path), "encoded_image_size": size},
            "decoder_args": {**_decoder_args(decoder, path),
                             "dropout": p if type(p) is float and 0 <= p < 1 else 0.5,
                             "encoded_image_size": size},
            "word_map": None}
        for key, old in (("epoch", "epoch"), ("bleu4", "bleu-4")):
            if type(root.get(old)) in (int, float) and math.isfinite(root[old]):
                checkpoint[key] = root[old]
        for key, tensors in (("encoder", encoder), ("decoder", decoder)):
            checkpoint[key] = {name: tensor.read(path) for name, tensor in tensors.items()}
        return checkpoint


def _state_dict(module):
    """Name -> Tensor of a stub and all the modules in it."""
    tensors, todo, seen, parts = {}, [((), module)], set(), 0
    while todo:
        path, module = todo.pop()
        children = module.part("_modules")
        own = module.part("_parameters") | module.part("_buffers")
        parts += len(children) + len(own)  # of which modules may share one dictionary
        if id(module) in seen or len(path) > MAX_DEPTH or parts > MAX_PARTS:
            raise Refused("a tree of modules without end")
        seen.add(id(module))
        tensors |= {".".join((*path, name)): tensor for name, tensor in own.items()
                    if isinstance(tensor, Tensor)}
        todo += [((*path, name), child) for name, child in children.items()
                 if isinstance(child, Stub)]
    return tensors


def _backbone(encoder, path):
    """Which ResNet of torchvision, by its third block: layers, three convolutions each or two."""
    layers = {name.split(".")[2] for name in encoder if name.startswith("resnet.6.")}
    names = ({6: "resnet50", 23: "resnet101", 36: "resnet152"}
             if "resnet.6.0.conv3.weight" in encoder else {2: "resnet18", 6: "resnet34"})
    if len(layers) not in names:
        raise UserError(f"{path} holds an encoder that is no ResNet of torchvision: resnet.6 has "
                        f"{len(layers)} layers, not {', '.join(map(str, names))}")
    return names[len(layers)]


def _attribute(module, child, name):
    """An attribute of one of a stub's modules, None if there is none."""
    child = module.part("_modules").get(child)
    return child.state.get(name) if isinstance(child, Stub) else None


def _decoder_args(decoder, path):
    """The arguments of DecoderWithAttention that the shapes of its tensors tell."""
    def shape(name):
        if name not in decoder or len(decoder[name].shape) != 2:
            raise UserError(f"{path} lacks the decoder's matrix {name}")
        return decoder[name].shape

    attention_dim, encoder_dim = shape("attention.encoder_att.weight")
    vocab_size, embed_dim = shape("embedding.weight")
    return {"attention_dim": attention_dim, "embed_dim": embed_dim,
            "decoder_dim": shape("decode_step.weight_hh")[1], "vocab_size": vocab_size,
            "encoder_dim": encoder_dim}
