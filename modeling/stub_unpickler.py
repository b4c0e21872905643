"""
Files of torch.save from anywhere, read without running any of their code.

Such a file is a pickle, a program that may call whatever it names. The unpickler here imports
nothing: an object of a class becomes a `Stub`, and a tensor a place in the file, whose numbers
are read when they are wanted.
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
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what a file from before the zip format begins with
MAX_PICKLE = 6 << 20  # bytes; a ResNet-152 with its optimizers takes 0.3 MB, a word 20 bytes
MAX_DIMENSIONS = 8

DTYPES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
          "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
          "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}
STORAGE = re.compile(rf"torch\.(?:cuda\.)?({'|'.join(DTYPES)})Storage")
STUBS = re.compile(
    r"(?:torch\.nn\.modules|torch\.optim|torchvision\.models)(?:\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|models\.[A-Z]\w*|__main__\.(?:Encoder|Attention|DecoderWithAttention)"
    r"|torch\.nn\.backends\.thnn\._get_thnn_function_backend"  # in every module of torch 0.4
    r"|builtins\.(?:dict|list|tuple|set|int|float|bool|str|object)"
    r"|torch\.(?:Size|float(?:16|32|64)|bfloat16|u?int(?:8|16|32|64)|bool)"
    r"|numpy\.(?:dtype|_?core\.multiarray\.scalar)|_codecs\.encode",  # numbers of NumPy's
    re.ASCII)
PLAIN = {"torch._utils._rebuild_tensor_v2", "collections.OrderedDict",  # all that format 1 needs
         *(f"torch.{kind}Storage" for kind in DTYPES)}
# What torch.save writes; the last line is of newer protocols than its usual one.
INSTRUCTIONS = """
    PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT
    NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
    FRAME MEMOIZE STACK_GLOBAL SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_SET ADDITEMS
    """.split()


class Refused(Exception):
    """Its text names what a file holds and no checkpoint needs."""


class Stub:
    """Stands for any object but tensors and plain values: its attributes, none of its code."""

    def __init__(self, *arguments):
        self.state = {}

    def part(self, name):
        """A dictionary among its attributes, {} where there is none."""
        part = self.state.get(name)
        return part if isinstance(part, dict) else {}


class Dictionary(dict):
    """
    Its keys are strings, tensors and small integers. Other keys can be made to collide, and hashing
    a tuple of tuples can take for ever, here and in torch's unpickler that reads the file next.
    """

    def __setitem__(self, key, value):
        if not isinstance(key, (str, Tensor)) and not (type(key) is int and abs(key) < 1 << 60):
            raise Refused(f"a key {_shown(key)}")
        super().__setitem__(key, value)


class Storage:
    """A one-dimensional array in the file, read when a tensor of it is."""

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
    A view of a storage, with at most as many elements: a stride of 0 could make any number of one.
    That it lies within the storage torch checks as it is read.
    """

    def __init__(self, storage, offset, shape, stride, *options):
        if not (isinstance(storage, Storage) and isinstance(shape, tuple)
                and len(shape) <= MAX_DIMENSIONS and all(type(n) is int for n in shape)
                and math.prod(shape) <= storage.numel):
            raise Refused("a tensor that is larger than its storage")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def read(self, path):
        return self.storage.read(path).as_strided(self.shape, self.stride, self.offset)


# What stands for the names of functions and classes that are more than stubs.
CALLS = {
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), Tensor),
    **dict.fromkeys(("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter",
                     "torch._utils._rebuild_parameter_with_state"), lambda tensor, *_: tensor),
    "collections.defaultdict": lambda *_: Dictionary()}


class Instructions(dict):
    """Code -> method of an unpickler, and a refusal for all others."""

    def __missing__(self, code):
        raise Refused(f"the pickle instruction {code2op[chr(code)].name}")


class StubUnpickler(pickle._Unpickler):
    """
    An unpickler that imports nothing. It extends the standard library's in Python, since the one
    in C calls setattr on whatever a pickle names, hashes any key, and allocates what a pickle says.
    """

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.names = []  # of all functions and classes
        self.storages = {}

    def find_class(self, module, name):
        """What stands for a name: calling it makes an object of ours."""
        # Protocol 2, torch's, writes the names of Python 2: __builtin__, commands.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        name = f"{module}.{name}"
        self.names.append(name)
        if storage := STORAGE.fullmatch(name):
            return DTYPES[storage[1]]
        if name == "collections.OrderedDict":
            return self._new_ordered_dict
        if name in CALLS or STUBS.fullmatch(name):
            return CALLS.get(name, Stub)
        raise Refused(_shown(name))

    def _new_ordered_dict(self, pairs=()):
        """pairs: a list, which only Python 2 writes"""
        new = Dictionary()
        for key, value in pairs:
            new[key] = value
        if pairs:
            self.names.append("an OrderedDict of Python 2")
            del pairs[:]  # given again and again, they would take for ever
        return new

    def persistent_load(self, saved):
        """torch's own: a storage, or (before the zip format) a module's class and source code."""
        match saved:
            case "module", cls, _, _ if cls is Stub:
                return Stub
            case "storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view:
                storage = self.storages.setdefault(key, Storage(dtype, numel))
                if (storage.dtype, storage.numel) == (dtype, numel) and numel >= 0 \
                        and view in ([], [None]):
                    return storage
        kind = saved[0] if isinstance(saved, tuple) and saved else saved
        raise Refused(f"the persistent id {_shown(kind)}")

    def load_empty_dict(self):
        self.append(Dictionary())

    def load_build(self):
        """The attributes of a stub; those of anything else, an OrderedDict's, are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state if isinstance(state, dict) else {}
        elif not isinstance(target, Dictionary):
            raise Refused(f"attributes set on a {type(target).__name__}")

    dispatch = Instructions({code: pickle._Unpickler.dispatch[code] for code in (
        getattr(pickle, name)[0] for name in INSTRUCTIONS)})
    dispatch |= {pickle.EMPTY_DICT[0]: load_empty_dict, pickle.BUILD[0]: load_build,
                 pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,
                 # A set becomes a list: nothing in it is hashed.
                 pickle.EMPTY_SET[0]: pickle._Unpickler.load_empty_list,
                 pickle.ADDITEMS[0]: pickle._Unpickler.load_appends}


def _shown(value):
    """A string from a file, fit for one line of a message; of anything else its type."""
    return ascii(value)[1:-1][:100] if isinstance(value, str) else f"of type {type(value).__name__}"


@contextmanager
def one_line_errors(path):
    """Whatever is raised within becomes a UserError of one line about the file."""
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
    What a file of torch.save holds: dictionaries, lists, tuples, plain values, Stubs and Tensors,
    of which no numbers are read yet; and the names of all functions and classes.

    Raises UserError, one line with the name of what was refused.
    """
    with one_line_errors(path):
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for its other end
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            start, size = file.read(len(ZIP_START)), os.path.getsize(path)
            if start == ZIP_START:
                return _read_zip(file, size)
            if not start.startswith(pickle.PROTO):
                raise ValueError("it is no file of torch.save")
            return _read_old(file, size)


def _read_zip(file, size):
    """
    Today's format: PREFIX/data.pkl, and PREFIX/data/KEY for every storage, stored as they are.
    As nothing is unpacked, all entries together are no larger than the file.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"the compressed entry {_shown(entry.filename)}")
        if sum(entry.file_size for entry in archive.infolist()) > size:
            raise Refused("entries that overlap")
        found = [name for name in archive.namelist() if name.lower().endswith("/data.pkl")]
        if len(found) != 1:  # torch's reader, which may come after, ignores case
            raise ValueError(f"it is a zip file with {len(found)} data.pkl")
        if archive.getinfo(found[0]).file_size > MAX_PICKLE:
            raise Refused(f"a pickle of more than {MAX_PICKLE} bytes")
        byteorder = found[0].removesuffix("data.pkl") + "byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise ValueError("it is of a big-endian machine")
        _seek(file, archive.getinfo(found[0]))
        unpickler = StubUnpickler(io.BytesIO(file.read(MAX_PICKLE)))
        root = unpickler.load()
        for key, storage in unpickler.storages.items():
            entry = archive.getinfo(found[0].removesuffix(".pkl") + f"/{key}")
            if entry.file_size != storage.size:
                raise Refused(f"a storage {_shown(key)} that is not as large as it says")
            storage.start = _seek(file, entry)
    return root, unpickler.names


def _seek(file, entry):
    """Go to where the contents of a zip file's entry begin, which is returned."""
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
        raise ValueError("it is no file of torch.save")
    properties, root, keys = unpickler.load(), unpickler.load(), unpickler.load()
    if not isinstance(properties, dict) or properties.get("little_endian") is not True:
        raise ValueError("it is of a big-endian machine")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("it lacks the list of its storages")
    file.seek(pickles.tell())
    for key in keys:
        storage = unpickler.storages[key]
        if file.read(8) != struct.pack("<q", storage.numel):
            raise Refused(f"a storage {_shown(key)} that is not as large as it says")
        storage.start = file.tell()
        file.seek(storage.size, os.SEEK_CUR)
    if file.tell() > size or any(s.start is None for s in unpickler.storages.values()):
        raise ValueError("it ends too early")
    return root, unpickler.names
