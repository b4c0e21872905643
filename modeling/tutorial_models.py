"""
The tutorial's checkpoints as entries of our own format. Their encoder and decoder are whole modules
or state dicts, and they have no word map.
"""

import math

from modeling.legacy_checkpoints import Stub, find_tensors, one_line_errors

BACKBONES = {  # by whether a layer has three convolutions, and the number of layers in block 3
    False: {2: "resnet18", 6: "resnet34"},
    True: {6: "resnet50", 23: "resnet101", 36: "resnet152"},
}
DECODER_ARGS = {  # the weight of the decoder, and the axis whose size this argument is
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
    with one_line_errors(path, "does not hold a complete model"):
        parts = {part: find_tensors(root.get(part)) for part in ("encoder", "decoder")}
        for part, tensors in parts.items():
            if not tensors:
                raise ValueError(f"it has no module {part}, nor its state dict")
        encoder, decoder = parts.values()
        layers = len({name.split(".")[2] for name in encoder if name.startswith("resnet.6.")})
        backbone = BACKBONES["resnet.6.0.conv3.weight" in encoder].get(layers)
        if backbone is None:
            raise ValueError(f"no ResNet of torchvision has {layers} layers in resnet.6")
        size = _attribute(root["encoder"], "adaptive_pool", "output_size") or 14
        size = size[0] if isinstance(size, tuple) else size
        dropout = _attribute(root["decoder"], "dropout", "p")
        sizes = {key: decoder[name].shape[axis] for key, (name, axis) in DECODER_ARGS.items()}
        known = {"epoch": root.get("epoch"), "bleu4": root.get("bleu-4")}
        return {
            "word_map": None,
            "encoder_args": {"name": backbone, "encoded_image_size": size},
            "decoder_args": {
                **sizes,
                "dropout": 0.5 if dropout is None else dropout,
                "encoded_image_size": size,
            },
            **{k: x for k, x in known.items() if type(x) in (int, float) and math.isfinite(x)},
            **parts,
        }


def _attribute(module, child, name):
    """An attribute of a child of a module; None where there is none, as in a state dict."""
    for part in ("module", child):  # DataParallel has its module under "module"
        modules = module.dict_attribute("_modules") if isinstance(module, Stub) else {}
        module = modules.get(part, module)
    return module.state.get(name) if isinstance(module, Stub) else None
