"""
The tutorial's checkpoints, whose encoder and decoder are whole modules or state dicts and which
have no word map, as entries of our own.
"""

import math

from modeling.legacy_checkpoints import Stub, find_tensors, one_line_errors
from utils import UserError

BACKBONES = {  # by whether a layer has three convolutions, and the number of layers in block 3
    False: {2: "resnet18", 6: "resnet34"},
    True: {6: "resnet50", 23: "resnet101", 36: "resnet152"},
}
DECODER_ARGS = {  # the decoder's matrix, and which of its sizes this argument is
    "attention_dim": ("attention.encoder_att.weight", 0),
    "embed_dim": ("embedding.weight", 1),
    "decoder_dim": ("decode_step.weight_hh", 1),
    "vocab_size": ("embedding.weight", 0),
    "encoder_dim": ("attention.encoder_att.weight", 1),
}


def convert(root, path):
    """
    The model in one of the tutorial's checkpoints as entries of our format, without its optimizers.
    root: the content of the file. UserError that names the module or tensor that is missing.
    """
    with one_line_errors(path):
        parts = {part: find_tensors(root.get(part)) for part in ("encoder", "decoder")}
        for part, tensors in parts.items():
            if not tensors:
                raise UserError(
                    f"{path} has no module {part}: it is not a checkpoint of whole modules or of "
                    f"their state dicts"
                )
        encoder, decoder = parts.values()
        layers = len({name.split(".")[2] for name in encoder if name.startswith("resnet.6.")})
        backbone = BACKBONES["resnet.6.0.conv3.weight" in encoder].get(layers)
        if backbone is None:
            raise UserError(
                f"{path} has an encoder that is not a ResNet of torchvision: resnet.6 has "
                f"{layers} layers"
            )
        size = _attribute(root["encoder"], "adaptive_pool", "output_size")
        size = size[0] if isinstance(size, tuple) and size else size
        size = size if type(size) is int and 0 < size <= 64 else 14
        dropout = _attribute(root["decoder"], "dropout", "p")
        dropout = dropout if type(dropout) is float and 0 <= dropout < 1 else 0.5
        decoder_args = {"dropout": dropout, "encoded_image_size": size}
        for argument, (name, axis) in DECODER_ARGS.items():
            if name not in decoder or decoder[name].dim() != 2:
                raise UserError(f"{path} lacks the decoder's matrix {name}")
            decoder_args[argument] = decoder[name].shape[axis]
        known = {"epoch": root.get("epoch"), "bleu4": root.get("bleu-4")}
        return {
            "word_map": None,
            "encoder_args": {"name": backbone, "encoded_image_size": size},
            "decoder_args": decoder_args,
            **{k: x for k, x in known.items() if type(x) in (int, float) and math.isfinite(x)},
            **parts,
        }


def _attribute(module, child, name):
    """An attribute of a child of a module; None where there is none, as in a state dict."""
    modules = module.dict_attribute("_modules") if isinstance(module, Stub) else {}
    if isinstance(modules.get("module"), Stub):  # in DataParallel
        modules = modules["module"].dict_attribute("_modules")
    return modules[child].state.get(name) if isinstance(modules.get(child), Stub) else None
