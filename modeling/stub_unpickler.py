"""
Reads untrusted files of torch.save without running any of their code.

Such a file contains a pickle, a program that can call any function it names. The unpickler here
imports nothing: an object of a class becomes a `Stub`, and a tensor becomes a `Tensor`, a position
in the file from which the numbers are read later.
"""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from contextlib import contextmanager
from pickletools import code2op

import numpy as np
import torch

from utils import UserError

ZIP_START = b"PK\3\4"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # the start of a file in the format before zip
MAX_PICKLE = 6 << 20  # bytes; a ResNet-152 with its optimizers takes 0.3 MB, a word 20 bytes
MAX_DIMENSIONS = 8

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
STORAGE = re.compile(rf"torch\.(?:cuda\.)?({'|'.join(DTYPES)})Storage")
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
PLAIN = {
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",  # format 1 needs no others
    *(f"torch.{kind}Storage" for kind in DTYPES),
}
# What torch.save writes; the last line is for newer pickle protocols than its default.
INSTRUCTIONS = """
    PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    FRAME MEMOIZE STACK_GLOBAL SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_SET ADDITEMS
    """.split()


class Refused(Exception):
    """Raised for content that no checkpoint needs; the message names it."""


class Stub:
    """Any object other than tensors and plain values: its attributes without its class."""

    def __init__(self, *arguments):
        self.state = {}

    def dict_attribute(self, name):
        """The attribute `name` if it is a dictionary, else {}."""
        value = self.state.get(name)
        return value if isinstance(value, dict) else {}


class Dictionary(dict):
    """
    A dict whose keys must be strings, tensors or small integers. Other keys can be made to collide,
    and hashing nested tuples can take forever, here and in torch's unpickler, which reads the file
    next.
    """

    def __setitem__(self, key, value):
        if not isinstance(key, (str, Tensor)) and not (type(key) is int and abs(key) < 1 << 60):
            raise Refused(f"a key {_printable(key)}")
        super().__setitem__(key, value)


class Storage:
    """A one-dimensional array in the file, read when one of its tensors is read."""

    def __init__(self, dtype, numel):
        self.dtype, self.numel, self.size = dtype, numel, numel * dtype.itemsize  # size in bytes
        self.start, self.data = None, None

    def read(self, path):
        if self.data is None:
            data = np.fromfile(path, np.uint8, self.size, offset=self.start)
            self.data = torch.from_numpy(data).view(self.dtype)
        return self.data


class Tensor:
    """
    A view of a storage, with at most as many elements as it: a stride of 0 would otherwise allow a
    tensor of any size. torch checks that it lies within the storage when it is read.
    """

    def __init__(self, storage, offset, shape, stride, *options):
        if not (
            isinstance(storage, Storage)
            and isinstance(shape, tuple)
            and len(shape) <= MAX_DIMENSIONS
            and all(type(n) is int for n in shape)
            and math.prod(shape) <= storage.numel
        ):
            raise Refused("a tensor that is larger than its storage")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def read(self, path):
        return self.storage.read(path).as_strided(self.shape, self.stride, self.offset)


# Replacements for functions and classes that cannot be stubs.
CALLS = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), Tensor),
    **dict.fromkeys(
        (
            "torch._utils._rebuild_parameter",
            "torch.nn.parameter.Parameter",
            "torch._utils._rebuild_parameter_with_state",
        ),
        lambda tensor, *_: tensor,
    ),
    "collections.defaultdict": lambda *_: Dictionary(),
}


class Instructions(dict):
    """Instruction code -> unpickler method; raises Refused for codes not in it."""

    def __missing__(self, code):
        raise Refused(f"the pickle instruction {code2op[chr(code)].name}")


class StubUnpickler(pickle._Unpickler):
    """
    An unpickler that imports nothing. It extends the standard library's Python version, since the C
    version calls setattr on any object, hashes any key, and allocates any size a pickle asks for.
    """

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.names = []  # of all functions and classes
        self.storages = {}

    def find_class(self, module, name):
        """The replacement for a function or class; raises Refused if it has none."""
        # Protocol 2, which torch uses, writes names of Python 2 such as __builtin__.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        name = f"{module}.{name}"
        self.names.append(name)
        if storage := STORAGE.fullmatch(name):
            return DTYPES[storage[1]]
        if name == "collections.OrderedDict":
            return self._new_ordered_dict
        if name in CALLS or STUBS.fullmatch(name):
            return CALLS.get(name, Stub)
        raise Refused(_printable(name))

    def _new_ordered_dict(self, pairs=()):
        """pairs: a list, which only Python 2 writes"""
        new = Dictionary()
        for key, value in pairs:
            new[key] = value
        if pairs:
            self.names.append("an OrderedDict of Python 2")
            del pairs[:]  # so that a pickle cannot pass the same long list again and again
        return new

    def persistent_load(self, saved):
        """torch's persistent ids: a storage, or (before zip) a module's class and source code."""
        match saved:
            case "module", cls, _, _ if cls is Stub:
                return Stub
            case "storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view:
                storage = self.storages.setdefault(key, Storage(dtype, numel))
                if (
                    (storage.dtype, storage.numel) == (dtype, numel)
                    and numel >= 0
                    and view in ([], [None])
                ):
                    return storage
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        raise Refused(f"the persistent id {_printable(kind)}")

    def load_empty_dict(self):
        self.append(Dictionary())

    def load_build(self):
        """Set the attributes of a stub; those of a Dictionary are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state if isinstance(state, dict) else {}
        elif not isinstance(target, Dictionary):
            raise Refused(f"attributes set on a {type(target).__name__}")

    dispatch = Instructions(
        {
            code: pickle._Unpickler.dispatch[code]
            for code in (getattr(pickle, name)[0] for name in INSTRUCTIONS)
        }
    )
    dispatch |= {
        pickle.EMPTY_DICT[0]: load_empty_dict,
        pickle.BUILD[0]: load_build,
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,
        # A set becomes a list, so that nothing in it is hashed.
        pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,
        pickle.ADDITEMS[0]: pickle._Unpickler.load_appends,
    }


def _printable(value):
    """A string from a file, escaped for a one-line message; for other values the type."""
    return ascii(value)[1:-1][:100] if isinstance(value, str) else f"of type {type(value).__name__}"


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
            start, size = file.read(len(ZIP_START)), os.path.getsize(path)
            if start == ZIP_START:
                return _read_zip(file, size)
            if not start.startswith(pickle.PROTO):
                raise ValueError("it is not a file of torch.save")
            return _read_old(file, size)


def _read_zip(file, size):
    """
    The current format: a zip with PREFIX/data.pkl, and PREFIX/data/KEY for every storage, all
    uncompressed, so that the entries together are no larger than the file.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"the compressed entry {_printable(entry.filename)}")
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise Refused("entries that overlap")
        # torch's reader, which may run next, ignores case and may take another of two entries.
        names = [name.lower() for name in archive.namelist()]
        found = [name for name in archive.namelist() if name.lower().endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"it is a zip file with {len(found)} data.pkl")
        if len(set(names)) < len(names):
            raise Refused("two entries of one name")
        if archive.getinfo(found[0]).file_size > MAX_PICKLE:
            raise Refused(f"a pickle of more than {MAX_PICKLE} bytes")
        byteorder = found[0].removesuffix("data.pkl") + "byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise ValueError("it was written on a big-endian machine")
        _seek(file, archive.getinfo(found[0]))
        unpickler = StubUnpickler(io.BytesIO(file.read(MAX_PICKLE)))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            entry = archive.getinfo(found[0].removesuffix(".pkl") + f"/{key}")
            if entry.file_size != storage.size:
                raise Refused(f"a storage {_printable(key)} of a wrong size")
            storage.start = _seek(file, entry)
    return root, unpickler.names


def _seek(file, entry):
    """Seek to the start of an uncompressed entry's content; returns this position."""
    file.seek(entry.header_offset + 26)
    return file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # name, extra fields


def _read_old(file, size):
    """
    The format before zip: five pickles (a magic number, the protocol, the machine's properties,
    the object, the keys of the storages), then per key its number of elements and its bytes.
    """
    file.seek(0)
    pickles = io.BytesIO(file.read(MAX_PICKLE))
    unpickler = StubUnpickler(pickles)
    if unpickler.load() != MAGIC or unpickler.load() != PROTOCOL:
        raise ValueError("it is not a file of torch.save")
    properties, root, keys = unpickler.load(), unpickler.load(), unpickler.load()
    if not isinstance(properties, dict) or properties.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it lacks the list of its storages")
    file.seek(pickles.tell())
    for key in keys:
        storage = unpickler.storages[key]
        if file.read(8) != struct.pack("<q", storage.numel):
            raise Refused(f"a storage {_printable(key)} of a wrong size")
        storage.start = file.tell()
        file.seek(storage.size, os.SEEK_CUR)
    if file.tell() > size or any(s.start is None for s in unpickler.storages.values()):
        raise ValueError("it ends too early")
    return root, unpickler.names
