"""
Checkpoints of whole modules, as the tutorial wrote them, in torch's zip format or the one before
it: extracts their tensors by name and the arguments of our model, without running their code.
"""

import math

from modeling.stub_unpickler import Refused, Stub, Tensor, one_line_errors
from utils import UserError

MAX_DEPTH, MAX_PARTS = 32, 100_000  # of a tree of modules; a ResNet-152: 4 and 2000


def convert(root, path):
    """
    Convert one of the tutorial's checkpoints, whose encoder and decoder are whole modules, to the
    dictionary of our format. It has no word map, and its optimizers are left out.

    root: what `stub_unpickler.read` found in the file

    Raises UserError that names the module or tensor that is missing.
    """
    with one_line_errors(path):
        for name in ("encoder", "decoder"):
            if not isinstance(root.get(name), Stub | dict) or not find_tensors(root[name]):
                raise UserError(
                    f"{path} has no module {name}: it is not a checkpoint of whole "
                    f"modules or of their state dicts"
                )
        encoder, decoder = (find_tensors(root[name]) for name in ("encoder", "decoder"))
        size = _attribute(root["encoder"], "adaptive_pool", "output_size")
        size = size[0] if isinstance(size, tuple) and size else size
        size = size if type(size) is int and 0 < size <= 64 else 14
        p = _attribute(root["decoder"], "dropout", "p")
        checkpoint = {
            "encoder_args": {"name": _backbone(encoder, path), "encoded_image_size": size},
            "decoder_args": {
                **_decoder_args(decoder, path),
                "dropout": p if type(p) is float and 0 <= p < 1 else 0.5,
                "encoded_image_size": size,
            },
            "word_map": None,
        }
        for key, old in (("epoch", "epoch"), ("bleu4", "bleu-4")):
            if type(root.get(old)) in (int, float) and math.isfinite(root[old]):
                checkpoint[key] = root[old]
        for key, tensors in (("encoder", encoder), ("decoder", decoder)):
            checkpoint[key] = {name: tensor.read(path) for name, tensor in tensors.items()}
        return checkpoint


def find_tensors(root):
    """
    Name -> Tensor, of a whole module or a state dict, without the prefixes that DataParallel and
    torch.compile put before all names.
    """
    tensors = (
        _state_dict(root)
        if isinstance(root, Stub)
        else {name: tensor for name, tensor in root.items() if isinstance(tensor, Tensor)}
    )
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _state_dict(module):
    """Name -> Tensor, of a stub and all modules in it."""
    tensors, todo, seen, parts = {}, [((), module)], set(), 0
    while todo:
        path, module = todo.pop()
        children = module.dict_attribute("_modules")
        direct = module.dict_attribute("_parameters") | module.dict_attribute("_buffers")
        parts += len(children) + len(direct)  # counted again where modules share a dictionary
        if id(module) in seen or len(path) > MAX_DEPTH or parts > MAX_PARTS:
            raise Refused("an endless tree of modules")
        seen.add(id(module))
        tensors |= {
            ".".join((*path, name)): tensor
            for name, tensor in direct.items()
            if isinstance(tensor, Tensor)
        }
        todo += [
            ((*path, name), child) for name, child in children.items() if isinstance(child, Stub)
        ]
    return tensors


def _backbone(encoder, path):
    """The name of torchvision's ResNet with as many layers in block 3 and convolutions in each."""
    layers = {name.split(".")[2] for name in encoder if name.startswith("resnet.6.")}
    names = (
        {6: "resnet50", 23: "resnet101", 36: "resnet152"}
        if "resnet.6.0.conv3.weight" in encoder
        else {2: "resnet18", 6: "resnet34"}
    )
    if len(layers) not in names:
        raise UserError(
            f"{path} has an encoder that is not a ResNet of torchvision: resnet.6 has "
            f"{len(layers)} layers, not {', '.join(map(str, names))}"
        )
    return names[len(layers)]


def _attribute(module, child, name):
    """An attribute of a child of a stub; None if there is no such child or attribute."""
    if not isinstance(module, Stub):  # a state dict
        return None
    if isinstance(inner := module.dict_attribute("_modules").get("module"), Stub):
        module = inner  # in DataParallel
    child = module.dict_attribute("_modules").get(child)
    return child.state.get(name) if isinstance(child, Stub) else None


def _decoder_args(decoder, path):
    """The arguments of DecoderWithAttention that follow from the shapes of its tensors."""

    def shape(name):
        if name not in decoder or len(decoder[name].shape) != 2:
            raise UserError(f"{path} lacks the decoder's matrix {name}")
        return decoder[name].shape

    attention_dim, encoder_dim = shape("attention.encoder_att.weight")
    vocab_size, embed_dim = shape("embedding.weight")
    return {
        "attention_dim": attention_dim,
        "embed_dim": embed_dim,
        "decoder_dim": shape("decode_step.weight_hh")[1],
        "vocab_size": vocab_size,
        "encoder_dim": encoder_dim,
    }
