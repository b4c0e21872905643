"""
Reads files of torch.save without running their code: our checkpoints, state dicts, and whole
modules as in the tutorial's checkpoints.

Such a file contains a pickle, a program that can call any function it names. It is copied first,
instruction by instruction: those that torch.save does not write are refused, and those that call or
change an object become a persistent id of the same operands. So Python's unpickler makes plain
values, tuples and lists only; the rest is done by `InertUnpickler.persistent_load`, where a name
stands for a function of this file or for `Stub`. torch's own restricted unpickler
(weights_only=True) does not read whole modules of torch before 1.6, nor limit what colliding keys
or strides of 0 cost.
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

import torch

from utils import UserError

MAGIC = 0x1950A86A20F9469CFC6C  # the start of a file in the format before zip
# A ResNet-152 with its optimizers has a pickle of 0.3 MB and 2000 parts, a word of a word map 20
# bytes in 3 steps. With these limits no file takes more than 10 seconds, and 1 GB besides tensors.
MAX_PICKLE, MAX_STEPS, MAX_NAME, MAX_ARGUMENTS, MAX_PARTS = 6 << 20, 1_500_000, 500, 100, 100_000

COPIED = set(
    """
    PROTO STOP MARK GLOBAL BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT NONE NEWTRUE NEWFALSE
    BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT MEMOIZE STACK_GLOBAL SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES
    """.split()
)
_PERSISTENT = pickle.TUPLE3 + pickle.BINPERSID  # persistent_load((operand, operand, what to do))
REPLACED = {
    "REDUCE": b"U\4call" + _PERSISTENT,
    "NEWOBJ": b"U\4call" + _PERSISTENT,
    "BUILD": b"U\5build" + _PERSISTENT,
    "SETITEM": pickle.TUPLE2 + b"U\3set" + _PERSISTENT,
    "SETITEMS": pickle.TUPLE + b"U\3set" + _PERSISTENT,
    "EMPTY_SET": pickle.EMPTY_LIST,  # a set is read as a list, so that nothing in it is hashed
    "ADDITEMS": pickle.APPENDS,
    "FRAME": b"",  # the length of a part, for faster reading
}
FOREIGN = "a pickle instruction that torch.save does not write"
KINDS = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()
DTYPES = {f"torch.{kind}Storage": getattr(torch, f"{kind}Tensor").dtype for kind in KINDS}
STUBS = re.compile(
    r"(?:torch\.(?:nn\.modules|nn\.parallel|optim)|torchvision\.models)(?:\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|models\.[A-Z]\w*|__main__\.(?:Encoder|Attention|DecoderWithAttention)"
    r"|torch\.nn\.backends\.thnn\._get_thnn_function_backend"  # in every module of torch 0.4
    r"|builtins\.(?:dict|list|tuple|set|int|float|bool|str|object)"
    r"|torch\.(?:Size|device|float(?:16|32|64)|bfloat16|u?int(?:8|16|32|64)|bool)"
    r"|numpy\.(?:dtype|_?core\.multiarray\.scalar)|_codecs\.encode",  # NumPy scalars
    re.ASCII,
)


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


def _tensor(storage, offset, shape, stride, *options):
    """torch checks that it lies within the storage; with strides of 0 it could have any size."""
    tensor = storage.as_strided(shape, stride, offset)
    if tensor.dim() > 8 or math.prod(tensor.shape) > storage.numel():
        raise Refused("a tensor that is larger than its storage")
    return tensor


def _dictionary(pairs=()):
    """pairs: a list of keys with values, as Python 2 writes it"""
    items = [part for key, value in pairs for part in (key, value)]
    if pairs:
        pairs.clear()  # so that a file cannot have the same long list copied again and again
    return _set_items({}, items)


def _set_items(dictionary, items):
    """Keys of other types can be made to collide, and to hash nested tuples can take forever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (isinstance(key, str | torch.Tensor) or type(key) is int and abs(key) < 1 << 60):
            raise Refused(f"a {type(key).__name__} as a key")
        dictionary[key] = value
    return dictionary


FUNCTIONS = {
    "collections.OrderedDict": _dictionary,
    "collections.defaultdict": lambda *arguments: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *options: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *options: tensor,
    "torch.nn.parameter.Parameter": lambda tensor, *options: tensor,
}


class InertUnpickler(pickle.Unpickler):
    """
    Reads the next pickle of a file of `size` bytes. storages: by key, not yet filled, together no
    larger than the file
    """

    def __init__(self, pickles, size):
        super().__init__(io.BytesIO(_harmless_copy(pickles)), encoding="utf-8")
        self.size, self.storages = size, {}

    def find_class(self, module, name):
        if len(module) + len(name) > MAX_NAME:
            raise Refused(f"a name of more than {MAX_NAME} letters")
        # Protocol 2, which torch uses, writes builtins under their name of Python 2.
        name = f"{'builtins' if module == '__builtin__' else module}.{name}"
        found = (FUNCTIONS | DTYPES).get(name.replace("torch.cuda.", "torch."))
        if found is None and not STUBS.fullmatch(name):
            raise Refused(ascii(name)[1:-1][:100])
        return found or Stub

    def persistent_load(self, saved):
        """Replaced instructions; of torch, a storage or (before zip) a module's class and source"""
        match saved:
            case function, tuple() as arguments, "call" if len(arguments) <= MAX_ARGUMENTS:
                if function is Stub or function in FUNCTIONS.values():
                    return function(*arguments)
            case Stub() as stub, state, "build":
                stub.state = state if isinstance(state, dict) else {}
                return stub
            case dict() as dictionary, _, "build":  # its attributes are dropped
                return dictionary
            case dict() as dictionary, tuple() as items, "set":
                return _set_items(dictionary, items)
            case "module", cls, _, _ if cls is Stub:
                return cls
            case "storage", torch.dtype() as dtype, str() as key, _, int() as numel, *view:
                self.size -= 0 if key in self.storages else numel * dtype.itemsize
                if self.size < 0:
                    raise Refused("tensors that are larger than the file")
                storage = self.storages.setdefault(key, torch.empty(numel, dtype=dtype))
                if (len(storage), storage.dtype, *view) in ((numel, dtype), (numel, dtype, None)):
                    return storage
        raise Refused(FOREIGN)


def _harmless_copy(pickles):
    """The next pickle of a file in memory, of COPIED and REPLACED instructions"""
    data, parts, copied = pickles.getbuffer(), [], pickles.tell()
    for step, (opcode, argument, start) in enumerate(pickletools.genops(pickles)):
        name = opcode.name
        if name in REPLACED:
            parts += data[copied:start], REPLACED[name]
            copied = pickles.tell()
        # Python allocates a memo as long as the largest index in it.
        elif name not in COPIED or name == "LONG_BINPUT" and argument > MAX_STEPS:
            raise Refused(FOREIGN)
        if step > MAX_STEPS:
            raise Refused("too many instructions")
    return b"".join([*parts, data[copied : pickles.tell()]])


@contextmanager
def one_line_errors(path, problem="is damaged or not a checkpoint"):
    """Turn any error into a one-line UserError about the file."""
    try:
        yield
        return
    except UserError as error:
        if str(path) in str(error):
            raise
        problem += f": {error}"[:200]
    except FileNotFoundError:
        problem = "not found; train a model first or pass another file"
    except Refused as error:
        problem = f"is refused: it holds {error}, which does not belong in a checkpoint; nothing "
        problem += "in the file was run"
    except KeyError as error:
        problem += f": it lacks {error}"
    except Exception as error:  # invalid pickles fail in many ways
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        problem += f": {reason or type(error).__name__}"
    raise UserError(f"{path} {problem}")


def read(path):
    """
    The content of a file of torch.save: dictionaries, lists, tuples, plain values, tensors and
    Stubs. UserError that names what was refused.
    """
    with one_line_errors(path):
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would wait for its other end
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            start, size = file.read(4), os.path.getsize(path)
            file.seek(0)
            if start == b"PK\3\4":
                return _read_zip(file, size)
            if start.startswith(pickle.PROTO):
                return _read_old(file, size)
            raise ValueError("it is not a file of torch.save")


def _read_zip(file, size):
    """The current format: PREFIX/data.pkl, and PREFIX/data/KEY for every storage, uncompressed."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    found = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(f"it is a zip file with {len(found)} data.pkl")
    prefix = found[0]
    order = entries.get(f"{prefix}byteorder")
    if order and _seek(file, order) and file.read(6) != b"little":
        raise ValueError("it was written on a big-endian machine")
    length = min(_seek(file, entries[f"{prefix}data.pkl"]), MAX_PICKLE)
    unpickler = InertUnpickler(io.BytesIO(file.read(length)), size)
    root = unpickler.load()
    for key, storage in unpickler.storages.items():
        _fill(storage, file, _seek(file, entries[f"{prefix}data/{key}"]))
    return root


def _seek(file, entry):
    """Go to the start of an uncompressed entry's content; returns its length."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused("a compressed entry")
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # name, extra fields
    return entry.file_size


def _fill(storage, file, size):
    data = storage.view(torch.uint8).numpy()
    if size != data.nbytes or file.readinto(data) != size:
        raise ValueError("a storage has another size than its tensors")


def _read_old(file, size):
    """
    The format before zip: pickles of a magic number, the protocol, the machine's properties, the
    object and the keys of its storages, then for each key its number of elements and its bytes.
    """
    pickles = io.BytesIO(file.read(MAX_PICKLE))
    magic, _, machine = (InertUnpickler(pickles, size).load() for _ in range(3))
    if magic != MAGIC or machine["little_endian"] is not True:
        raise ValueError("it is not a file of torch.save on a little-endian machine")
    unpickler = InertUnpickler(pickles, size)
    root, keys = unpickler.load(), InertUnpickler(pickles, size).load()
    if keys != sorted(unpickler.storages):
        raise ValueError("it lacks the list of its storages")
    file.seek(pickles.tell())
    for key in keys:
        storage, [numel] = unpickler.storages[key], struct.unpack("<q", file.read(8))
        _fill(storage, file, numel * storage.itemsize)
    return root


def find_tensors(root):
    """
    Name -> tensor, of a whole module or a state dict, without the prefixes that DataParallel and
    torch.compile put before all names.
    """
    tensors, todo, parts = {}, [("", root)], 0
    while todo:
        prefix, module = todo.pop()
        children, direct = {}, module if isinstance(module, dict) else {}
        if isinstance(module, Stub):
            children = module.dict_attribute("_modules")
            direct = module.dict_attribute("_parameters") | module.dict_attribute("_buffers")
        parts += len(children) + len(direct)  # counted again where modules share a dictionary
        if len(prefix) > MAX_NAME or parts > MAX_PARTS:
            raise Refused("an endless tree of modules")
        tensors |= {prefix + k: t for k, t in direct.items() if isinstance(t, torch.Tensor)}
        todo += [(f"{prefix}{k}.", m) for k, m in children.items() if isinstance(m, Stub)]
    for prefix in ("module.", "_orig_mod.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
