"""
Reads files of torch.save that others wrote, without running their code: state dicts, and whole
modules as in the tutorial's checkpoints, which `convert` turns into the parts of our format.

Such a file contains a pickle, a program that can call any function it names. Its instructions are
checked first, and then run with inert objects in place of all that they name: an object of a class
becomes a `Stub`, and a tensor a `Tensor`, a position in the file from which its numbers are read.
"""

import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

from utils import UserError

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the start of a file in the format before zip
# Of a pickle; a ResNet-152 with its optimizers takes 0.3 MB, a word of a word map 20 bytes and 3
# instructions. With these limits no file takes more than seconds and 1 GB.
MAX_PICKLE, MAX_INSTRUCTIONS, MAX_NAME, MAX_ARGUMENTS = 6 << 20, 1_000_000, 500, 100
MAX_PARTS = 100_000  # of a tree of modules; a ResNet-152 has 2000

# What torch.save writes; the last line is for newer pickle protocols than its default.
INSTRUCTIONS = """
    PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    FRAME MEMOIZE STACK_GLOBAL SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_SET ADDITEMS
    """
# A call passes its arguments as one tuple: Python would copy a long one in each of many calls.
CALL = pickle.TUPLE1 + pickle.REDUCE
REPLACED = dict.fromkeys(INSTRUCTIONS.split()) | {  # what runs instead, or None: the same
    "REDUCE": CALL,
    "NEWOBJ": CALL,  # takes nothing but true classes
    "EMPTY_DICT": b"ccollections\nOrderedDict\n)" + CALL,  # a `Dictionary`, which checks its keys
    "EMPTY_SET": pickle.EMPTY_LIST,  # so that nothing in a set is hashed
    "ADDITEMS": pickle.APPENDS,
    "FRAME": b"",  # a length, which these changes make wrong
}

KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
DTYPES = {f"torch.{kind}Storage": getattr(torch, f"{kind}Tensor").dtype for kind in KINDS}
PLAIN = {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict", *DTYPES}  # as in format 1
STUBS = re.compile(
    r"(?:torch\.nn\.modules|torch\.optim|torchvision\.models)(?:\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|models\.[A-Z]\w*|__main__\.(?:Encoder|Attention|DecoderWithAttention)"
    r"|torch\.nn\.parallel\.data_parallel\.DataParallel"
    r"|torch\.nn\.backends\.thnn\._get_thnn_function_backend"  # in every module of torch 0.4
    r"|builtins\.(?:dict|list|tuple|set|int|float|bool|str|object)"
    r"|torch\.(?:Size|device|float(?:16|32|64)|bfloat16|u?int(?:8|16|32|64)|bool)"
    r"|numpy\.(?:dtype|_?core\.multiarray\.scalar)|_codecs\.encode",  # NumPy scalars
    re.ASCII,
)
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


class Refused(Exception):
    """Raised for content that no checkpoint needs; the message names it."""


def _refuse(wrong, what):
    if wrong:
        raise Refused(what)


def _printable(value):
    """A string from a file, escaped for a one-line message; for other values the type."""
    return ascii(value)[1:-1][:100] if isinstance(value, str) else f"of type {type(value).__name__}"


class _Inert:
    """Base of what a pickle can reach. The instruction BUILD calls `__setstate__`, if it exists."""

    __slots__ = ()

    def __setstate__(self, state):
        raise Refused(f"attributes set on a {type(self).__name__}")


class Global(_Inert):
    """A function or class that a pickle names; a call of it is a call of `make`."""

    __slots__ = ("make",)

    def __init__(self, make):
        self.make = make

    def __call__(self, arguments):
        _refuse(len(arguments) > MAX_ARGUMENTS, f"a call with {len(arguments)} arguments")
        return self.make(*arguments)


class Stub(_Inert):
    """Any object other than tensors and plain values: its attributes without its class."""

    __slots__ = ("state",)

    def __init__(self, *arguments):
        self.state = {}

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}

    def dict_attribute(self, name):
        """The attribute `name` if it is a dictionary, else {}."""
        value = self.state.get(name)
        return value if isinstance(value, dict) else {}


class Dictionary(_Inert, dict):
    """
    A dict whose keys must be strings, tensors or small integers. Other keys can be made to collide,
    and hashing nested tuples can take forever, here and in torch's unpickler, which reads the file
    next.
    """

    __slots__ = ()

    def __setitem__(self, key, value):
        good = isinstance(key, (str, Tensor)) or (type(key) is int and abs(key) < 1 << 60)
        _refuse(not good, f"a key {_printable(key)}")
        super().__setitem__(key, value)

    def __setstate__(self, state):
        """Drops attributes."""


class Storage(_Inert):
    """A one-dimensional array in the file, read when one of its tensors is read."""

    __slots__ = ("dtype", "numel", "size", "start", "data")

    def __init__(self, dtype, numel):
        self.dtype, self.numel, self.size = dtype, numel, numel * dtype.itemsize  # size in bytes
        self.start, self.data = None, None

    def read(self, path):
        if self.data is None:
            data = np.fromfile(path, np.uint8, self.size, offset=self.start)
            self.data = torch.from_numpy(data).view(self.dtype)
        return self.data


class Tensor(_Inert):
    """
    A view of a storage, with at most as many elements as it: a stride of 0 would otherwise allow a
    tensor of any size. torch checks that it lies within the storage when it is read.
    """

    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage, offset, shape, stride, *options):
        fits = isinstance(storage, Storage) and isinstance(shape, tuple) and len(shape) <= 8
        fits = fits and all(type(n) is int for n in shape) and math.prod(shape) <= storage.numel
        _refuse(not fits, "a tensor that is larger than its storage")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def read(self, path):
        """The torch tensor, from the file at `path`"""
        return self.storage.read(path).as_strided(self.shape, self.stride, self.offset)


MAKERS = {  # of names that do not make a stub
    **DTYPES,
    "collections.defaultdict": lambda *arguments: Dictionary(),
    "torch._utils._rebuild_tensor": Tensor,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *options: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *options: tensor,
    "torch.nn.parameter.Parameter": lambda tensor, *options: tensor,
}


class StubUnpickler(pickle.Unpickler):
    """Reads one pickle; adds to `names` what it names, and to `storages` what its tensors view."""

    def __init__(self, file, names, storages):
        super().__init__(io.BytesIO(_checked(file)), encoding="utf-8")
        self.names, self.storages = names, storages

    def find_class(self, module, name):
        """A stub for a function or class; raises Refused unless it is known to be harmless."""
        # Protocol 2, which torch uses, writes builtins under their name of Python 2.
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        make = MAKERS.get(name.replace("torch.cuda.", "torch."), Stub)
        if name == "collections.OrderedDict":
            make = self._ordered_dict
        unknown = len(name) > MAX_NAME or (make is Stub and not STUBS.fullmatch(name))
        _refuse(unknown, _printable(name))
        self.names[name] = True
        return Global(make)

    def _ordered_dict(self, pairs=()):
        """pairs: a list, which only Python 2 writes"""
        new = Dictionary()
        for key, value in pairs:
            new[key] = value
        if pairs:
            self.names["an OrderedDict of Python 2"] = True
            del pairs[:]  # so that a pickle cannot pass the same long list again and again
        return new

    def persistent_load(self, saved):
        """torch's persistent ids: a storage, or (before zip) a module's class and source code."""
        match saved:
            case "module", Global() as cls, _, _ if cls.make is Stub:
                return cls
            case "storage", Global(make=torch.dtype() as dtype), str() as key, _, int() as n, *view:
                storage = self.storages.setdefault(key, Storage(dtype, n))
                if (storage.dtype, storage.numel) == (dtype, n) and n >= 0 and view in ([], [None]):
                    return storage
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        raise Refused(f"the persistent id {_printable(kind)}")


def _checked(file):
    """
    The next pickle in a file in memory, changed as `REPLACED` says. Refused if an instruction is
    not in there; ValueError if one is damaged, such as a string beyond the end of the file.
    """
    data, out = file.getbuffer(), bytearray()
    for count, (instruction, argument, start) in enumerate(pickletools.genops(file)):
        name = instruction.name
        if name not in REPLACED:
            raise Refused(f"the pickle instruction {name}")
        if count == MAX_INSTRUCTIONS:
            raise Refused(f"a pickle of more than {count} instructions")
        if name == "LONG_BINPUT" and argument > MAX_INSTRUCTIONS:  # places of an array
            raise Refused(f"the place {argument} of a pickle's memo")
        new = REPLACED[name]
        out += data[start : file.tell()] if new is None else new
    return out


@contextmanager
def one_line_errors(path):
    """Turn any error into a one-line UserError about the file."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} not found; train a model first or pass another file") from None
    except Refused as error:
        raise UserError(
            f"{path} is refused: it holds {error}, which does not belong in a "
            f"checkpoint; nothing in the file was run"
        ) from None
    except Exception as error:  # invalid pickles fail in many ways
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged or not a checkpoint: {reason or type(error).__name__}"
        ) from None


def read(path):
    """
    Returns the content of a file of torch.save: dictionaries, lists, tuples, plain values, Stubs
    and Tensors, whose numbers are not read yet; and the names of all functions and classes in it.

    Raises UserError that names what was refused.
    """
    with one_line_errors(path):
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for its other end
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            start, size, names = file.read(512), os.path.getsize(path), {}
            _refuse(start[257:262] == b"ustar", "a tar file")
            if start.startswith(b"PK\3\4"):
                return _read_zip(file, size, names), list(names)
            if start.startswith(pickle.PROTO):
                return _read_old(file, size, names), list(names)
            raise ValueError("it is not a file of torch.save")


def _read_zip(file, size, names):
    """
    The current format: a zip with PREFIX/data.pkl, and PREFIX/data/KEY for every storage, all
    uncompressed, so that the entries together are no larger than the file.
    """
    with zipfile.ZipFile(file) as archive:
        entries, storages = {entry.filename.lower(): entry for entry in archive.infolist()}, {}
    # torch's reader, which may run next, ignores case and may take another of two entries.
    _refuse(len(entries) < len(archive.infolist()), "two entries of one name")
    _refuse(any(name.endswith("/constants.pkl") for name in entries), "a TorchScript program")
    for name, entry in entries.items():
        compressed = entry.compress_type != zipfile.ZIP_STORED
        _refuse(compressed, f"the compressed entry {_printable(name)}")
    _refuse(sum(entry.file_size for entry in entries.values()) > size, "entries that overlap")
    found = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(f"it is a zip file with {len(found)} data.pkl")
    prefix = found[0]
    if f"{prefix}byteorder" in entries:
        _seek(file, entries[f"{prefix}byteorder"])
        if file.read(6) != b"little":
            raise ValueError("it was written on a big-endian machine")
    length = entries[f"{prefix}data.pkl"].file_size
    _refuse(length > MAX_PICKLE, f"a pickle of more than {MAX_PICKLE} bytes")
    _seek(file, entries[f"{prefix}data.pkl"])
    root = StubUnpickler(io.BytesIO(file.read(length)), names, storages).load()
    for key, storage in storages.items():
        entry = entries.get(f"{prefix}data/{key}".lower())
        wrong = entry is None or entry.file_size != storage.size
        _refuse(wrong, f"a storage {_printable(key)} of a wrong size")
        storage.start = _seek(file, entry)
    return root


def _seek(file, entry):
    """Seek to the start of an uncompressed entry's content; returns this position."""
    file.seek(entry.header_offset + 26)
    return file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # name, extra fields


def _read_old(file, size, names):
    """
    The format before zip: five pickles (a magic number, the protocol, the machine's properties,
    the object, the keys of the storages), then per key its number of elements and its bytes.
    """
    file.seek(0)
    pickles, storages = io.BytesIO(file.read(MAX_PICKLE)), {}
    parts = (StubUnpickler(pickles, names, storages).load() for _ in range(5))
    if next(parts) != MAGIC or next(parts) != PROTOCOL:
        raise ValueError("it is not a file of torch.save")
    properties, root, keys = parts
    if not isinstance(properties, dict) or properties.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it lacks the list of its storages")
    file.seek(pickles.tell())
    for key in keys:
        wrong = file.read(8) != struct.pack("<q", storages[key].numel)
        _refuse(wrong, f"a storage {_printable(key)} of a wrong size")
        storages[key].start = file.tell()
        file.seek(storages[key].size, os.SEEK_CUR)
    if file.tell() > size or any(storage.start is None for storage in storages.values()):
        raise ValueError("it ends too early")
    return root


def find_tensors(root):
    """
    Name -> Tensor, of a whole module or a state dict, without the prefixes that DataParallel and
    torch.compile put before all names.
    """
    tensors, todo, parts = {}, [("", root)], 0
    while todo:
        prefix, module = todo.pop()
        children, direct = {}, module
        if isinstance(module, Stub):
            children = module.dict_attribute("_modules")
            direct = module.dict_attribute("_parameters") | module.dict_attribute("_buffers")
        parts += len(children) + len(direct)  # counted again where modules share a dictionary
        _refuse(len(prefix) > MAX_NAME or parts > MAX_PARTS, "an endless tree of modules")
        tensors |= {prefix + name: t for name, t in direct.items() if isinstance(t, Tensor)}
        todo += [(f"{prefix}{name}.", m) for name, m in children.items() if isinstance(m, Stub)]
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def convert(root, path):
    """
    Convert one of the tutorial's checkpoints, whose encoder and decoder are whole modules or state
    dicts, to the dictionary of our format. It has no word map, and its optimizers are left out.

    root: what `read` found in the file

    Raises UserError that names the module or tensor that is missing.
    """
    with one_line_errors(path):
        checkpoint, tensors = {"word_map": None}, {}
        for part in ("encoder", "decoder"):
            known = isinstance(root.get(part), Stub | dict)
            tensors[part] = find_tensors(root[part]) if known else {}
            if not tensors[part]:
                raise UserError(
                    f"{path} has no module {part}: it is not a checkpoint of whole "
                    f"modules or of their state dicts"
                )
        encoder, decoder = tensors.values()
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
        checkpoint["encoder_args"] = {"name": backbone, "encoded_image_size": size}
        checkpoint["decoder_args"] = {"dropout": dropout, "encoded_image_size": size}
        for argument, (name, axis) in DECODER_ARGS.items():
            if name not in decoder or len(decoder[name].shape) != 2:
                raise UserError(f"{path} lacks the decoder's matrix {name}")
            checkpoint["decoder_args"][argument] = decoder[name].shape[axis]
        for key, old in (("epoch", "epoch"), ("bleu4", "bleu-4")):
            if type(root.get(old)) in (int, float) and math.isfinite(root[old]):
                checkpoint[key] = root[old]
        for part, found in tensors.items():
            checkpoint[part] = {name: tensor.read(path) for name, tensor in found.items()}
        return checkpoint


def _attribute(module, child, name):
    """An attribute of a child of a module; None where there is none, as in a state dict."""
    modules = module.dict_attribute("_modules") if isinstance(module, Stub) else {}
    if isinstance(modules.get("module"), Stub):  # in DataParallel
        modules = modules["module"].dict_attribute("_modules")
    return modules[child].state.get(name) if isinstance(modules.get(child), Stub) else None
