"""
A pickle read without running any of it.

torch.save writes a pickle, a program that may call whatever it names. Here its instructions are
listed one after the other, and the few that a checkpoint needs are carried out on objects of
ours: a name stays a name, an object of a class is a `Stub` that does nothing, and a tensor is a
place in the file, within a storage that the file is known to hold.
"""

import math
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pickletools import genops

import torch

MAX_STEPS = 1 << 21  # of all pickles in a file; a ResNet-152 with its optimizer takes 1 << 16
MAX_LINE, MAX_STRING = 1 << 16, 1 << 26  # bytes
MAX_DIMENSIONS = 8

DTYPES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
          "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32,
          "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}
REBUILD_TENSOR = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
REBUILD_PARAMETER = {"torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter",
                     "torch._utils._rebuild_parameter_with_state"}
DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict"}
NAMED_ONLY = {f"builtins.{name}"  # never called
              for name in ("list", "tuple", "int", "float", "bool", "str", "object")}
NAMED_ONLY |= {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
KNOWN = (REBUILD_TENSOR | REBUILD_PARAMETER | DICTIONARIES | NAMED_ONLY
         | {"builtins.set", "torch.Size"})
STORAGE = re.compile(rf"torch\.(?:cuda\.)?({'|'.join(DTYPES)})Storage")
STUBS = re.compile(
    r"(?:torch\.nn\.modules|torch\.optim|torchvision\.models)(?:\.[a-z_]\w*)*\._?[A-Z]\w*"
    r"|models\.[A-Z]\w*|__main__\.(?:Encoder|Attention|DecoderWithAttention)"
    r"|torch\.nn\.backends\.thnn\._get_thnn_function_backend",  # in every module of torch 0.4
    re.ASCII)


class Refused(Exception):
    """Its text names what a file holds and no checkpoint needs."""


class Name:
    """A function or class that a pickle names; nothing is imported."""
    __slots__ = ("text",)

    def __init__(self, text):
        self.text = text


class Stub:
    """Stands for an object of a class of modules or optimizers: what it had, none of its code."""
    __slots__ = ("name", "state")

    def __init__(self, name):
        self.name, self.state = name, {}

    def part(self, key):
        """A dictionary of its state, {} where there is none."""
        part = self.state.get(key)
        return part if isinstance(part, dict) else {}


class Storage:
    """A run of numbers in the file, read when a tensor of it is first wanted."""
    __slots__ = ("dtype", "numel", "path", "start", "data")

    def __init__(self, dtype, numel, path, start=None):
        self.dtype, self.numel, self.path, self.start, self.data = dtype, numel, path, start, None

    @property
    def size(self):
        return self.numel * self.dtype.itemsize  # bytes

    def read(self):
        if self.data is None:
            data = torch.empty(self.size, dtype=torch.uint8)
            with open(self.path, "rb") as file:
                file.seek(self.start)
                if file.readinto(data.numpy()) != self.size:
                    raise ValueError("it ends too early")
            self.data = data.view(self.dtype)
        return self.data


class Tensor:
    """A view of a storage that lies within it. Raises Refused if it does not."""
    __slots__ = ("storage", "offset", "shape", "stride")

    def __init__(self, storage, offset, shape, stride):
        if not isinstance(storage, Storage):
            raise Refused(f"a tensor on {shown(storage)}")
        for numbers in (shape, stride):
            if not isinstance(numbers, tuple) or len(numbers) > MAX_DIMENSIONS:
                raise Refused("a tensor without a proper size and stride")
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 1 << 48
                                                for n in numbers):
            raise Refused("a tensor with an impossible size, stride or offset")
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride))
        # As many elements as the storage at most: a stride of 0 would make any number of one.
        count = math.prod(shape)
        if count > storage.numel or (count and last >= storage.numel):
            raise Refused(f"a tensor of size {shape} that is larger than its storage")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def read(self):
        return self.storage.read().as_strided(self.shape, self.stride, self.offset)


def shown(value):
    """A text from a file, fit for one line of a message; of anything else its type."""
    return ascii(value)[1:-1][:100] if isinstance(value, str) else type(value).__name__


class Stream:
    """Part of a file for pickletools, which asks for as many bytes as a pickle says."""

    def __init__(self, file, end):
        self.file, self.left = file, end - file.tell()

    def _count(self, data):
        self.left -= len(data)
        return data

    def read(self, n):
        return self._count(self.file.read(min(n, self.left, MAX_STRING)))

    def readline(self):
        return self._count(self.file.readline(min(self.left, MAX_LINE)))


class Machine:
    """
    Carries out the pickles of one file on objects of ours. An instruction without a method here
    is refused: INST, OBJ, NEWOBJ_EX, EXT1, PERSID and whatever else torch.save never writes.

    new_storage(dtype, key, numel) -> Storage, Refused where the file cannot hold it
    """
    values = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
              "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
              "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    constants = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
    ignored = {"PROTO", "FRAME"}

    def __init__(self, new_storage):
        self.new_storage = new_storage
        self.steps = 0
        self.stubs = []

    def run(self, stream):
        """The object of the next pickle. Raises Refused, and ValueError and others if broken."""
        self.stack, self.outer, self.memo = [], [], {}
        for opcode, argument, _ in genops(stream):
            self._spend(1)
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in self.values:
                self.stack.append(argument)
            elif name in self.constants:
                self.stack.append(self.constants[name])
            elif name not in self.ignored:
                step = getattr(self, f"do_{name.lower()}", None)
                if step is None:
                    raise Refused(f"the pickle instruction {name} {shown(argument)}")
                step(argument)

    def _spend(self, steps):
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise Refused(f"a pickle of more than {MAX_STEPS} steps")

    def _key(self, key):
        """
        Whether a key is a text; others are not kept. Their hashes can be chosen such that a
        dictionary of many is slow, and a tuple of tuples takes for ever, so both are bounded.
        """
        if isinstance(key, tuple):
            raise Refused("a tuple as a key")
        if type(key) is not str:
            self._spend(128)
        return type(key) is str

    def _fill(self, target, pairs):
        if not isinstance(target, dict):
            raise Refused(f"items set on {shown(target)}")
        for key, value in pairs:
            if self._key(key):
                target[key] = value

    def _pop_mark(self):
        items, self.stack = self.stack, self.outer.pop()
        return items

    def do_mark(self, _):
        self.outer.append(self.stack)
        self.stack = []

    def do_pop(self, _):
        self.stack.pop()

    def do_pop_mark(self, _):
        self._pop_mark()

    def do_dup(self, _):
        self.stack.append(self.stack[-1])

    def do_put(self, index):
        self.memo[index] = self.stack[-1]

    do_binput = do_long_binput = do_put

    def do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def do_get(self, index):
        self.stack.append(self.memo[index])

    do_binget = do_long_binget = do_get

    def do_empty_list(self, _):
        self.stack.append([])

    def do_list(self, _):
        items = self._pop_mark()
        self.stack.append(items)

    def do_append(self, _):
        self._extend([self.stack.pop()])

    def do_appends(self, _):
        self._extend(self._pop_mark())

    def _extend(self, items):
        if not isinstance(self.stack[-1], list):
            raise Refused(f"items appended to {shown(self.stack[-1])}")
        self.stack[-1].extend(items)

    def do_tuple(self, _):
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def do_tuple1(self, _):
        self._tuple(1)

    def do_tuple2(self, _):
        self._tuple(2)

    def do_tuple3(self, _):
        self._tuple(3)

    def _tuple(self, n):
        self.stack.append(tuple(self.stack.pop() for _ in range(n))[::-1])

    def do_empty_dict(self, _):
        self.stack.append({})

    def do_dict(self, _):
        items = self._pop_mark()
        self.stack.append({})
        self._fill(self.stack[-1], zip(items[::2], items[1::2]))

    def do_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self.stack[-1], [(key, value)])

    def do_setitems(self, _):
        items = self._pop_mark()
        self._fill(self.stack[-1], zip(items[::2], items[1::2]))

    def do_empty_set(self, _):
        self.stack.append(Stub("set"))

    def do_additems(self, _):
        for item in self._pop_mark():
            self._key(item)

    def do_global(self, argument):
        module, _, name = argument.partition(" ")
        self._name(module, name)

    def do_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self._name(module, name)

    def do_inst(self, argument):
        self.do_global(argument)
        raise Refused(f"the pickle instruction INST {shown(argument)}")

    def _name(self, module, name):
        """Push the name if it is a known one; a dotted name would reach into other modules."""
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is no text")
        # Protocol 2, torch's, writes the names of Python 2: __builtin__, commands.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        text = f"{module}.{name}"
        if "." in name or not (text in KNOWN or STORAGE.fullmatch(text) or STUBS.fullmatch(text)):
            raise Refused(shown(text))
        if STUBS.fullmatch(text):
            self.stubs.append(text)
        self.stack.append(Name(text))

    def do_reduce(self, _):
        arguments, name = self.stack.pop(), self.stack.pop()
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise Refused(f"a call of {shown(name)}")
        self.stack.append(self._call(name.text, *arguments))

    do_newobj = do_reduce

    def _call(self, name, *arguments):
        """What calling this name gives, all of it our own."""
        if name in REBUILD_TENSOR:
            return Tensor(*arguments[:4])
        if name in REBUILD_PARAMETER and arguments and isinstance(arguments[0], Tensor):
            return arguments[0]
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], tuple):
            return arguments[0]
        if name in DICTIONARIES and not any(isinstance(a, dict) for a in arguments):
            return self._dictionary(arguments)
        if name == "builtins.set" and (not arguments or isinstance(arguments[0], list)):
            for item in (arguments or [()])[0]:
                self._spend(1)
                self._key(item)
            return Stub("set")
        if STUBS.fullmatch(name):
            return Stub(name)
        raise Refused(f"a call of {name}")

    def _dictionary(self, arguments):
        """From nothing, a default's name, or (Python 2) a list of pairs."""
        made = {}
        if arguments and isinstance(arguments[0], list):
            self._spend(len(arguments[0]))  # the same list may be given again and again
            self._fill(made, arguments[0])
        return made

    def do_build(self, _):
        """The state of a stub; that of anything else, an OrderedDict's _metadata, is dropped."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Stub):
            if not isinstance(state, dict):
                raise Refused(f"a {shown(self.stack[-1].name)} made of {shown(state)}")
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            raise Refused(f"attributes set on {shown(self.stack[-1])}")

    def do_binpersid(self, _):
        """torch's own: a storage, or (before the zip format) a module's class and source code."""
        saved = self.stack.pop()
        kind, *rest = saved if isinstance(saved, tuple) and saved else (None,)
        if kind == "module" and len(rest) == 3 and isinstance(rest[0], Name):
            self.stack.append(rest[0])
        elif kind == "storage" and len(rest) in (4, 5):
            self.stack.append(self._storage(*rest))
        else:
            raise Refused(f"the persistent id {shown(kind)}")

    def _storage(self, kind, key, location, numel, view=None):
        dtype = STORAGE.fullmatch(kind.text) if isinstance(kind, Name) else None
        if dtype is None or type(key) is not str or view is not None:
            raise Refused("a storage of an unknown kind")
        if type(numel) is not int or not 0 <= numel < 1 << 48:
            raise Refused("a storage of an impossible size")
        return self.new_storage(DTYPES[dtype[1]], key, numel)
