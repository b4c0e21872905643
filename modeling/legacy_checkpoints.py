"""
Checkpoint files of anybody's: what they hold, read without running any of it.

The checkpoints of the well-known tutorial hold whole modules, in today's zip format or in the
one before it, which torch 0.4 wrote; `captioner` takes their tensors out by name.
"""

import math
import os
import stat
import struct
import zipfile
from contextlib import contextmanager
from typing import NamedTuple

import torch

from modeling.stub_unpickler import Machine, Refused, Storage, Stream, Stub, Tensor, shown
from utils import UserError

ZIP_START = b"PK\3\4"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what a file from before the zip format begins with
MAX_DEPTH, MAX_PARTS = 32, 100_000  # of a tree of modules; a ResNet-152 has 4 and 2000


class Contents(NamedTuple):
    root: object  # dictionaries, lists, tuples, plain values, and the classes above
    stubs: list  # the names of all classes of modules and optimizers that occur


@contextmanager
def _one_line(path):
    """Whatever goes wrong within becomes a UserError of one line about the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found; train a model first or pass another file") from None
    except Refused as error:
        raise UserError(f"{path} is refused: it holds {error}, which is no part of a checkpoint; "
                        f"nothing in the file was run") from None
    except Exception as error:  # bytes that are no pickle fail in all sorts of ways
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{path} is damaged or not a checkpoint: "
                        f"{reason or type(error).__name__}") from None


def read(path):
    """
    The Contents of a file of torch.save: names, sizes and structure, but no tensor's numbers.

    Raises UserError, one line with the name of what was refused.
    """
    with _one_line(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its other end
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            start = file.read(len(ZIP_START))
            file.seek(0)
            return (_read_zip if start == ZIP_START else _read_old)(path, file, status.st_size)


def _read_zip(path, file, size):
    """Today's format: PREFIX/data.pkl, and PREFIX/data/KEY for every storage."""
    records = _records(file, size)
    [pickle] = [name for name in records if name.endswith("/data.pkl")] or [None]
    if pickle is None:
        raise ValueError("it is a zip file without data.pkl")
    prefix = pickle.removesuffix("data.pkl")
    if foreign := [name for name in records if not name.startswith(prefix)]:
        raise Refused(f"the entry {shown(foreign[0])}")

    def new_storage(dtype, key, numel):
        start, nbytes = records.get(f"{prefix}data/{key}", (0, -1))
        storage = Storage(dtype, numel, path, start)
        if storage.size != nbytes:
            raise Refused(f"a storage {shown(key)} that is not as large as it says")
        return storages.setdefault((key, dtype), storage)

    storages = {}
    machine = Machine(new_storage)
    start, nbytes = records.get(f"{prefix}byteorder", (0, 0))
    file.seek(start)
    if file.read(min(nbytes, 6)) not in (b"little", b""):
        raise ValueError("it is of a big-endian machine")
    start, nbytes = records[pickle]
    file.seek(start)
    return Contents(machine.run(Stream(file, start + nbytes)), machine.stubs)


def _records(file, size):
    """
    Name -> start and size of every entry, which is stored as it is, as torch.save does:
    nothing is unpacked, and all entries together are no larger than the file.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    records = {}
    for entry in entries:
        name = entry.filename
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Refused(f"the compressed entry {shown(name)}")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(ZIP_START) or name in records:
            raise ValueError(f"its entry {shown(name)} is broken")
        start = file.tell() + sum(struct.unpack("<HH", header[26:]))  # its name and extra fields
        if start + entry.file_size > size:
            raise ValueError(f"its entry {shown(name)} ends beyond the file")
        records[name] = start, entry.file_size
    if sum(nbytes for _, nbytes in records.values()) > size:
        raise Refused("entries that overlap")
    return records


def _read_old(path, file, size):
    """
    The format before zip: five pickles (a magic number, the protocol, the machine's properties,
    the object, the keys of the storages), then per key its number of elements and its bytes.
    """
    storages = {}
    claimed = 0

    def new_storage(dtype, key, numel):
        nonlocal claimed
        storage = storages.get(key)
        if storage is None:
            storage = storages[key] = Storage(dtype, numel, path)
            claimed += storage.size
        if claimed > size or (storage.dtype, storage.numel) != (dtype, numel):
            raise Refused(f"a storage {shown(key)} that is larger than the file")
        return storage

    machine, stream = Machine(new_storage), Stream(file, size)
    if machine.run(stream) != MAGIC or machine.run(stream) != PROTOCOL:
        raise ValueError("it is no file of torch.save")
    properties = machine.run(stream)
    if not isinstance(properties, dict) or properties.get("little_endian") is not True:
        raise ValueError("it is of a big-endian machine")
    root, keys = machine.run(stream), machine.run(stream)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise ValueError("it lacks the list of its storages")
    _place(storages, keys, file, size)
    return Contents(root, machine.stubs)


def _place(storages, keys, file, size):
    """Note where the numbers of each storage stand in a file of the old format."""
    for key in keys:
        storage = storages.pop(key, None)
        if storage is None:
            raise ValueError(f"its storage {shown(key)} belongs to no tensor")
        if file.read(8) != struct.pack("<q", storage.numel):
            raise Refused(f"a storage {shown(key)} that is not as large as it says")
        storage.start = file.tell()
        if storage.start + storage.size > size:
            raise ValueError("it ends too early")
        file.seek(storage.size, os.SEEK_CUR)
    if storages:
        raise ValueError(f"it lacks the storage {shown(next(iter(storages)))}")


def captioner(root, path):
    """
    The parts of a checkpoint in our format from one of the tutorial's, whose encoder and decoder
    are whole modules. It never carried a word map; its optimizers are left behind.

    root: what `read` found in the file

    Raises UserError that names the module or tensor that is not there.
    """
    with _one_line(path):
        for name in ("encoder", "decoder"):
            if not isinstance(root.get(name), Stub):
                raise UserError(f"{path} holds no {name}: it is no checkpoint of whole modules")
        encoder, decoder = (_state_dict(root[name]) for name in ("encoder", "decoder"))
        checkpoint = {
            "encoder_args": {"name": _backbone(encoder, path),
                             "encoded_image_size": _encoded_image_size(root["encoder"])},
            "decoder_args": _decoder_args(decoder, root, path), "word_map": None}
        for key, old in (("epoch", "epoch"), ("bleu4", "bleu-4")):
            if type(root.get(old)) in (int, float) and math.isfinite(root[old]):
                checkpoint[key] = root[old]
        for key, tensors in (("encoder", encoder), ("decoder", decoder)):
            checkpoint[key] = {name: tensor.read() for name, tensor in tensors.items()}
        _fill_in_counts(checkpoint["encoder"])
        return checkpoint


def _state_dict(module):
    """Name -> Tensor of a stub and all the modules in it."""
    tensors, todo, seen, parts = {}, [((), module)], set(), 0
    while todo:
        prefix, module = todo.pop()
        if id(module) in seen or len(prefix) > MAX_DEPTH or parts > MAX_PARTS:
            raise Refused("a tree of modules without end")
        seen.add(id(module))
        for name, tensor in [*module.part("_parameters").items(), *module.part("_buffers").items()]:
            parts += 1
            if isinstance(tensor, Tensor):
                tensors[".".join((*prefix, name))] = tensor
        for name, child in module.part("_modules").items():
            parts += 1
            if isinstance(child, Stub):
                todo.append(((*prefix, name), child))
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


def _encoded_image_size(encoder):
    pool = encoder.part("_modules").get("adaptive_pool")
    size = pool.state.get("output_size") if isinstance(pool, Stub) else None
    if isinstance(size, tuple) and size:
        size = size[0]
    return size if type(size) is int and 0 < size <= 64 else 14


def _decoder_args(decoder, root, path):
    """The arguments of DecoderWithAttention, from the shapes of its tensors."""
    def shape(name):
        if name not in decoder or len(decoder[name].shape) != 2:
            raise UserError(f"{path} lacks the decoder's matrix {name}")
        return decoder[name].shape

    attention_dim, encoder_dim = shape("attention.encoder_att.weight")
    vocab_size, embed_dim = shape("embedding.weight")
    dropout = root["decoder"].part("_modules").get("dropout")
    dropout = dropout.state.get("p") if isinstance(dropout, Stub) else None
    return {"attention_dim": attention_dim, "embed_dim": embed_dim,
            "decoder_dim": shape("decode_step.weight_hh")[1], "vocab_size": vocab_size,
            "encoder_dim": encoder_dim,
            "dropout": dropout if type(dropout) is float and 0 <= dropout < 1 else 0.5,
            "encoded_image_size": _encoded_image_size(root["encoder"])}


def _fill_in_counts(encoder):
    """torch 0.4.0's BatchNorm did not count its batches; only training without momentum asks."""
    for name in [name for name in encoder if name.endswith("running_mean")]:
        encoder.setdefault(name.removesuffix("running_mean") + "num_batches_tracked",
                           torch.tensor(0))
