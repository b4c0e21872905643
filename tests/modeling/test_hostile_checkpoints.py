"""A file of torch.save is read without running any of it; foreign content is refused."""

import copyreg
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import types
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from factories import refused

import checkpoints
from modeling.legacy_checkpoints import (
    DTYPES,
    MAGIC,
    MAX_INSTRUCTIONS,
    MAX_PICKLE,
    PROTOCOL,
    Stub,
    Tensor,
    read,
)
from utils import UserError

FORMS = ("zip", "old")  # torch's format, and the one before zip


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def write_pickle(path, data, form, storages=(), **options):
    """A file of torch.save whose pickle is `data`; storages: pairs of key and bytes (of floats)"""
    if form == "zip":
        with zipfile.ZipFile(path, "w", **options) as file:
            file.writestr("x/data.pkl", data)
            file.writestr("x/version", "3\n")
            for key, content in storages:
                file.writestr(f"x/data/{key}", content)
    else:
        head = b"".join(pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": True}))
        path.write_bytes(
            head
            + data
            + pickle.dumps([key for key, _ in storages], 2)
            + b"".join(struct.pack("<q", len(content) // 4) + content for _, content in storages)
        )
    return path


class Call:
    """Pickled as a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Saved:
    """Pickled as this persistent id."""

    def __init__(self, *parts):
        self.id = parts


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Saved) else None


def pickled(value):
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


def outcome(path, load=checkpoints.load):
    """How loading ends: a message of one line that names the file, or "loaded"."""
    try:
        load(path)
    except UserError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message and len(message) < 600, message
        return message
    return "loaded"


# Names

NAMES = """
    os.system posix.system nt.system os.popen os.execv os.remove posix.mkdir os.environ.update
    subprocess.Popen subprocess.check_output pty.spawn builtins.eval builtins.exec builtins.compile
    builtins.open builtins.getattr builtins.setattr builtins.__import__ builtins.map io.open
    importlib.import_module runpy.run_path code.interact ctypes.CDLL shutil.rmtree pickle.loads
    marshal.loads types.FunctionType functools.partial functools.reduce operator.attrgetter
    operator.methodcaller webbrowser.open timeit.timeit pdb.run logging.config.dictConfig
    copyreg._reconstructor copyreg.add_extension socket.create_connection
    urllib.request.urlopen numpy.load numpy.fromfile torch.load torch.save torch.serialization.load
    torch.hub.load torch.jit.load torch.from_file torch.storage._load_from_bytes
    torch._utils._rebuild_wrapper_subclass torch._tensor._rebuild_from_type_v2
    torch.nn.modules.module.register_module_forward_hook torch.nn.modules.os.system
    torch.package.PackageImporter torchvision.models.os models.torch __main__.Evil canary.fire
    """.split()


PLACES = {  # what is before and after a call
    "root": (b"", b""),
    "format 1": (b"}(U\6formatK\1U\7encoder", b"u"),
    "module": (b"}U\7encoderctorch.nn.modules.linear\nLinear\n)\x81}U\5state", b"sbs"),
}


def test_names_of_anything_but_tensors_and_modules_are_refused(tmp_path, form):
    path, proof, found = tmp_path / "x", tmp_path / "proof", {}
    command = f"touch {proof}".encode()
    for name in NAMES:
        module, function = name.encode().rsplit(b".", 1)
        call = b"c%s\n%s\nU%c%s\x85R" % (module, function, len(command), command)
        for place, (before, after) in PLACES.items():
            write_pickle(path, b"\x80\2" + before + call + after + b".", form)
            message = outcome(path)
            if f" {name}, which" not in message or "nothing in the file was run" not in message:
                found[name, place] = message
    assert found == {} and not proof.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_name_in_a_pickle_of_a_true_function_is_refused(tmp_path, form, protocol):
    proof = tmp_path / "proof"
    data = pickle.dumps([Call(os.system, f"touch {proof}")], protocol)
    refused(write_pickle(tmp_path / "x", data, form), " posix.system, which")
    assert not proof.exists()
    pickle.loads(data)
    assert proof.exists()  # as every other unpickler runs it


def test_name_of_many_lines_is_shown_on_one_line(tmp_path, form):
    write_pickle(tmp_path / "x", b"\x80\4\x8c\x03a\nb\x8c\x03\x1b[0\x93.", form)
    refused(tmp_path / "x", r"a\nb.\x1b[0")


# Ways to make a call


@pytest.fixture
def canary(monkeypatch):
    """A list of the calls of `canary.fire`, which is also extension 1 of copyreg's registry."""
    calls = []
    module = types.ModuleType("canary")
    module.fire = lambda *args, **kwargs: calls.append(args)
    module.Fire = type("Fire", (), {"__init__": module.fire, "__setstate__": module.fire})
    monkeypatch.setitem(sys.modules, "canary", module)
    copyreg.add_extension("canary", "fire", 1)
    yield calls
    copyreg.remove_extension("canary", "fire", 1)
    copyreg.clear_extension_cache()


FIRE = b"ccanary\nfire\n"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
ATTACKS = {  # pickles, and what the message names
    "REDUCE": (FIRE + b")R.", "canary.fire"),
    "NEWOBJ": (b"ccanary\nFire\n)\x81.", "canary.Fire"),
    "NEWOBJ_EX": (LINEAR + b")}\x92.", "NEWOBJ_EX"),
    "BUILD": (b"ccanary\nFire\n)\x81}b.", "canary.Fire"),
    "INST": (b"(icanary\nfire\n.", "INST"),
    "OBJ": (b"(" + FIRE + b"o.", "OBJ"),
    "OBJ of a known name": (b"(" + LINEAR + b"o.", "OBJ"),
    "EXT1": (b"\x82\1)R.", "EXT1"),
    "EXT2": (b"\x83\1\0)R.", "EXT2"),
    "EXT4": (b"\x84\1\0\0\0)R.", "EXT4"),
    "PERSID": (b"Pcanary.fire\n.", "PERSID"),
    "STACK_GLOBAL": (b"\x8c\6canary\x8c\4fire\x93)R.", "canary.fire"),
    "STACK_GLOBAL of memo": (b"\x8c\6canary\x94\x8c\4fire\x94h\0h\1\x93)R.", "canary.fire"),
    "STACK_GLOBAL of numbers": (b"K\1K\1\x93.", "damaged"),
    "dotted name": (b"ctorch.nn.modules\nlinear.os.system\n)R.", "torch.nn.modules.linear.os.s"),
    "dotted name on the stack": (
        b"\x8c\5torch\x8c\x14nn.modules.os.system\x93.",
        "torch.nn.modules.os.system",
    ),
    "known name cut elsewhere": (b"\x8c\5torch\x8c\7nn.Size\x93.", "torch.nn.Size"),
    "key": (b"}" + FIRE + b")RK\1s.", "canary.fire"),
    "element": (b"](" + FIRE + b")Re.", "canary.fire"),
    "set": (b"c__builtin__\nset\n](" + FIRE + b")Re\x85R.", "canary.fire"),
    "default of a dictionary": (b"ccollections\ndefaultdict\n" + FIRE + b"\x85R.", "canary.fire"),
    "pairs of a dictionary": (b"ccollections\nOrderedDict\n]" + FIRE + b")Ra\x85R.", "canary.fire"),
    "storage's type": (b"(U\7storage" + FIRE + b"U\1xU\3cpuK\4tQ.", "canary.fire"),
    "module's type": (b"(U\6module" + FIRE + b"U\1xU\1xtQ.", "canary.fire"),
    "hooks of a tensor": (TENSOR + b"(" + FIRE + b"t.", "canary.fire"),
    "state of a module": (LINEAR + b")\x81}U\1a" + FIRE + b"sb.", "canary.fire"),
    "attributes of a module's class": (LINEAR + b"N}U\1aK\1s\x86b.", "attributes set on a Global"),
    "attributes of a function": (TENSOR + b"N}U\1aK\1s\x86b.", "attributes set on a Global"),
    "attributes of a list": (b"]}U\1aK\1sb.", "damaged"),
    "attributes of a tensor": (
        TENSOR + b"((U\7storagectorch\nFloatStorage\nU\1xU\3cpuK\4tQK\0))tR}b.",
        "attributes set on a Tensor",
    ),
    "call of an object": (LINEAR + b")R)R.", "damaged"),
    "call of a string": (b"U\1x)R.", "damaged"),
    "call with many arguments": (
        LINEAR + b"(" + b"N" * 200 + b"tR.",
        "a call with 200 arguments",
    ),
    "slots of a type": (LINEAR + b"N}U\4makeK\1s\x86b.", "attributes set on a Global"),
    "slots of a list": (b"]N}U\1aK\1s\x86b.", "damaged"),
    "slots of a storage": (
        b"(U\7storagectorch\nFloatStorage\nU\1xU\3cpuK\4tQN}U\5numelK\x09s\x86b.",
        "attributes set on a Storage",
    ),
    "long name": (
        b"ctorch.nn.modules." + b"a" * 600 + b"\nA\n.",
        "torch.nn.modules.aaa",
    ),
    "item of a module": (LINEAR + b")RU\1aK\1s.", "damaged"),
    "list appended to a dictionary": (b"}K\1a.", "damaged"),
    "tuple as a key": (b"})K\1s.", "a key of type tuple"),
    "DICT with a tuple as a key": (b"()K\1d.", "DICT"),
    "large number as a key": (b"}\x8a\x09" + b"\1" * 9 + b"K\1s.", "a key of type int"),
    "FROZENSET": (b"(\x91.", "FROZENSET"),
    "BYTEARRAY8": (b"\x96\1\0\0\0\0\0\0\0x.", "BYTEARRAY8"),
    "NEXT_BUFFER": (b"\x97.", "NEXT_BUFFER"),
    "persistent id": (b"U\4evil\x85Q.", "the persistent id evil"),
    "empty persistent id": (b")Q.", "the persistent id of type tuple"),
    "module that is none": (b"(U\6moduleK\1NNtQ.", "the persistent id module"),
    "view of a storage": (
        b"(U\7storagectorch\nFloatStorage\nU\1xU\3cpuK\4(U\1yK\0K\2ttQ.",
        "the persistent id storage",
    ),
}


def test_no_pickle_can_call_a_function(tmp_path, form, canary):
    found = {}
    for name, (data, named) in ATTACKS.items():
        for root in (b"\x80\2" + data, b"\x80\2}(U\6formatK\1U\1x" + data[:-1] + b"u."):
            message = outcome(write_pickle(tmp_path / "x", root, form))
            if named not in message:
                found[name] = message
    assert found == {} and canary == []


@pytest.mark.parametrize("place", range(5))
def test_call_in_any_pickle_of_the_old_format_is_refused(tmp_path, canary, place):
    pickles = [pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {}, {"format": 1}, [])]
    pickles[place] = b"\x80\2" + FIRE + b")R."
    (tmp_path / "x").write_bytes(b"".join(pickles))
    refused(tmp_path / "x", "canary.fire")
    assert canary == []


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_torchscript_file_is_refused_by_name(tmp_path):
    class Module(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.jit.save(torch.jit.trace(Module(), torch.zeros(1)), tmp_path / "x")
    refused(tmp_path / "x", "a TorchScript program")


def test_zip_that_torch_would_take_for_torchscript_is_refused(tmp_path):
    path = write_pickle(tmp_path / "x", pickled({"format": 1}), "zip")
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("x/constants.pkl", b"\x80\2" + FIRE + b")R.")
    refused(path, "a TorchScript program")


def test_tar_file_is_refused(tmp_path):
    """torch would unpack it; its name can be the beginning of a checkpoint."""
    with tarfile.open(tmp_path / "x", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo(pickle.dumps(MAGIC, 2).decode("latin-1")))
        tar.addfile(tarfile.TarInfo("storages"))
    refused(tmp_path / "x", "a tar file")


# What may be in a file


def test_stubs_keep_attributes_and_nothing_of_their_classes(tmp_path, form):
    layer = torch.nn.Linear(2, 3)
    layer.number, layer.texts = 7, {"a": ["b"]}
    torch.save({"layer": layer}, tmp_path / "x", _use_new_zipfile_serialization=form == "zip")
    root, names = read(tmp_path / "x")
    assert type(root["layer"]) is Stub and "torch.nn.modules.linear.Linear" in names
    assert (root["layer"].state["number"], root["layer"].state["texts"]) == (7, {"a": ["b"]})
    weight = root["layer"].dict_attribute("_parameters")["weight"]
    assert torch.equal(weight.read(tmp_path / "x"), layer.weight)


def test_tensors_of_every_type_and_stride_are_read(tmp_path, form):
    tensors = []
    for dtype in DTYPES.values():
        whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
        tensors += [whole, whole[1:].transpose(0, 2), whole[0, 1, 2], whole[:0]]
    torch.save(tensors, tmp_path / "x", _use_new_zipfile_serialization=form == "zip")
    found, _ = read(tmp_path / "x")
    for tensor, expected in zip(found, tensors, strict=True):
        tensor = tensor.read(tmp_path / "x")
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_values_of_newer_pickle_protocols_and_of_numpy_are_accepted(tmp_path, form):
    state = {
        "score": np.float64(0.2),
        "set": {1, (2, 3)},
        "plain": 5,
        "list": [1.5, None, True],
        "size": torch.Size([2]),
        "dtype": torch.float32,
        "ordered": OrderedDict(a=1),
    }
    for protocol in (2, 4):
        torch.save(
            state,
            tmp_path / "x",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=form == "zip",
        )
        root, _ = read(tmp_path / "x")
        assert (root["plain"], root["list"], root["ordered"]) == (5, [1.5, None, True], {"a": 1})
        assert isinstance(root["score"], Stub)


def test_file_of_python_2_is_read(tmp_path, form):
    """Its strings are bytes, and an OrderedDict is made from a list of pairs."""
    ordered = b"ccollections\nOrderedDict\n](](U\1aK\1e](U\1bK\2ee\x85R"
    path = write_pickle(tmp_path / "x", b"\x80\2(" + ordered + b"T\4\0\0\0wordt.", form)
    assert read(path)[0] == ({"a": 1, "b": 2}, "word")


# Tensors and their storages

REBUILD = torch.zeros(1).__reduce_ex__(2)[0]  # torch's function that makes a tensor of a storage
FLOATS = (("0", struct.pack("<4f", 1, 2, 3, 4)),)


def tensor(
    numel=4, offset=0, size=(2, 2), stride=(2, 1), kind=torch.FloatStorage, key="0", view=()
):
    saved = Saved("storage", kind, key, "cpu", numel, *view)
    return Call(REBUILD, saved, offset, size, stride, False, OrderedDict())


def test_tensor_within_its_storage_is_read(tmp_path, form):
    root = {"format": 1, "x": tensor(view=(None,) if form == "old" else ())}
    path = write_pickle(tmp_path / "x", pickled(root), form, FLOATS)
    assert read(path)[0]["x"].read(path).tolist() == [[1, 2], [3, 4]]
    refused(path, "does not hold a complete model")  # but is not refused


LARGER = {  # than their storage: what is changed, to which values
    "size": [(2, 3), [2, 2], (2.0, 2), (1 << 200, 2), ([1], 1 << 40), ("x", 1 << 40), (1,) * 9],
    "numel": [5, 3, -4, 1 << 40, 1 << 200, 4.0],
    "kind": [torch.DoubleStorage, torch.nn.Linear],
    "key": ["1", 0, ("0",)],
    "size, stride": [((1 << 40,), (0,)), ((5,), (0,)), ((3, 3), (0, 1))],
}
BEYOND = {  # the end or the start of their storage
    "size": [(-1, 2), (-2, -2), (2,)],
    "stride": [(-2, 1), (1 << 62, 1), None, (2, "x")],
    "offset": [-1, 1, 1 << 200],
}


def wrong_tensors(table):
    for names, values in table.items():
        for value in values:
            changed = zip(names.split(", "), value) if ", " in names else [(names, value)]
            yield tensor(**dict(changed)), (names, value)


def test_tensors_larger_than_their_storage_are_refused(tmp_path, form):
    """Before any memory is allocated."""
    for wrong, case in wrong_tensors(LARGER):
        for root in ({"format": 1, "encoder": wrong}, [wrong]):
            path = write_pickle(tmp_path / "x", pickled(root), form, FLOATS)
            assert outcome(path, read) != "loaded", case


def test_tensors_beyond_their_storage_are_rejected_by_torch(tmp_path, form):
    for wrong, case in wrong_tensors(BEYOND):
        path = write_pickle(tmp_path / "x", pickled([wrong]), form, FLOATS)
        [found], _ = read(path)
        assert isinstance(found, Tensor), case
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            found.read(path)


def test_two_sizes_of_one_storage_are_refused(tmp_path, form):
    path = write_pickle(tmp_path / "x", pickled([tensor(), tensor(numel=8)]), form, FLOATS)
    refused(path, "the persistent id storage")


def test_storages_of_an_old_file_are_those_that_follow(tmp_path):
    many = [tensor(key=str(i), numel=10_000) for i in range(1000)]
    for storages in ((), FLOATS, [(str(i), b"\0" * 40_000) for i in range(999)]):
        refused(write_pickle(tmp_path / "x", pickled(many), "old", storages))


def test_list_of_storages_that_are_not_strings_is_refused(tmp_path):
    pickles = [
        pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": True}, {"format": 1})
    ]
    for keys in (b"])" + b"\x85" * 100_000 + b"a.", b"](K\1K\2e.", b"}."):  # a deep tuple's hash
        (tmp_path / "x").write_bytes(b"".join(pickles) + b"\x80\2" + keys)
        refused(tmp_path / "x", "lacks the list of its storages")


def test_compressed_entry_is_refused(tmp_path):
    write_pickle(tmp_path / "x", b"\0" * 10_000_000, "zip", compression=zipfile.ZIP_DEFLATED)
    assert os.path.getsize(tmp_path / "x") < 20_000
    refused(tmp_path / "x", "compressed entry x/data.pkl")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 32) - 2])
def test_storage_of_another_size_than_its_entry_is_refused(tmp_path, size):
    path = write_pickle(tmp_path / "x", pickled([tensor()]), "zip", FLOATS)
    data = path.read_bytes()
    entry = data.rindex(b"PK\1\2")
    for sizes in (size, size), (16, size):
        path.write_bytes(data[: entry + 20] + struct.pack("<2I", *sizes) + data[entry + 28 :])
        refused(path)


def test_entries_that_overlap_are_refused(tmp_path):
    path = write_pickle(
        tmp_path / "x",
        pickled([1]),
        "zip",
        [(str(i), b"x" * (5000 if i == 0 else 1)) for i in range(9)],
    )
    data = bytearray(path.read_bytes())
    first = data.index(b"x/data/0", data.index(b"PK\1\2")) - 46  # the large one's, of 46 bytes
    for entry in range(first, first + 9 * (46 + len("x/data/0")), 46 + len("x/data/0")):
        data[entry + 20 : entry + 28] = struct.pack("<2I", 5000, 5000)
        data[entry + 42 : entry + 46] = data[first + 42 : first + 46]
    path.write_bytes(data)
    refused(path, "entries that overlap")


def test_two_pickles_in_a_zip_are_refused(tmp_path):
    for name, message in (("x/DATA.PKL", "two entries of"), ("y/data.pkl", "zip file with 2 data")):
        path = write_pickle(tmp_path / "x", pickled([1]), "zip")
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(name, b"\x80\2" + FIRE + b")R.")
        refused(path, message)


@pytest.mark.parametrize("name", ["x/data/0", "x/DATA/0"])
def test_two_entries_of_one_name_are_refused(tmp_path, name):
    """torch could read the shorter one for a tensor of the longer one's size."""
    path = write_pickle(tmp_path / "x", pickled([tensor()]), "zip", FLOATS)
    with zipfile.ZipFile(path) as file:
        entries = [(name, b"\0"), *((entry, file.read(entry)) for entry in file.namelist())]
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")  # zipfile's, of the name that is there twice
        for entry, content in entries:
            file.writestr(entry, content)
    refused(path, "two entries of one name")


# Bombs: small files that would take much time or memory

FORMAT_1 = b"}(U\6formatK\1U\1x"
BOMBS = {
    "memo of 2^32 places": b"]r\xff\xff\xff\xff.",
    "memo of 10^4000 places": b"]p" + b"9" * 4000 + b"\n.",
    "text of 4 GB": b"X\xff\xff\xff\xffx.",
    "text of 2^60 bytes": b"\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "bytes of 4 GB": b"B\xff\xff\xff\xffx.",
    "bytes of 2^63 bytes": b"\x8e" + struct.pack("<Q", 1 << 63) + b"x.",
    "bytearray of 4 GB": b"\x96\xff\xff\xff\xff\0\0\0\0.",
    "frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 1 << 60) + b"].",
    "number of 2 GB": b"\x8b\xff\xff\xff\x7f\1.",
    "number of -1 bytes": b"\x8b\xff\xff\xff\xff\1.",
    "number of 10^5 digits": b"L" + b"9" * 100_000 + b"L\n.",
    "line without end": b"c" + b"x" * 1_000_000,
    "lists in lists": FORMAT_1 + b"]" * 100_000 + b"a" * 99_999 + b"u.",
    "tuples in tuples": FORMAT_1 + b")" + b"\x85" * 100_000 + b"u.",
    "tuples in tuples as a key": FORMAT_1 + b"})" + b"\x85" * 100_000 + b"K\1su.",
    "tuples twice in tuples as a key": FORMAT_1
    + b"})"
    + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))
    + b"K\1su.",
    "tuples twice in tuples in a set": FORMAT_1
    + b"c__builtin__\nset\n])"
    + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))
    + b"a\x85Ru.",
    "a billion laughs": b"]q\0"
    + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(30))
    + b".",
    "list in itself": b"]q\0h\0a.",
    "dictionary in itself": FORMAT_1 + b"}q\0U\1xh\0su.",
    "numbers with one hash": FORMAT_1
    + b"}("
    + b"".join(
        b"\x8a\x0c" + (k * ((1 << 61) - 1)).to_bytes(12, "little") + b"N" for k in range(100_000)
    )
    + b"uu.",
    "marks without end": b"(" * 300_000 + b".",
    "dictionaries without end": b"(" + b"}" * 300_000 + b"t.",
    "dictionaries in dictionaries": FORMAT_1 + b"}U\1a" * 100_000 + b"N" + b"s" * 100_000 + b"u.",
    "modules without end": b"(ctorch.nn.modules.linear\nLinear\nq\0"
    + b"h\0)\x81" * 100_000
    + b"t.",
    "calls with many arguments": b"(ctorch.nn.modules.linear\nLinear\nq\0("
    + b"N" * 300_000
    + b"tq\1"
    + b"h\0h\1R" * 100_000
    + b"t.",
    "long names again and again": b"(X"
    + struct.pack("<I", 1_000_000)
    + b"torch.nn.modules.".ljust(1_000_000, b"a")
    + b"\x94\x8c\1A\x94"
    + b"h\0h\1\x93" * 100_000
    + b"t.",
    "persistent ids with many parts": b"((U\7storage"
    + b"N" * 300_000
    + b"tq\0"
    + b"h\0Q" * 100_000
    + b"t.",
    "tensors without end": b"("
    + TENSOR
    + b"q\0((U\7storagectorch\nFloatStorage\nU\1xU\3cpuK\4tQK\0))tq\1"
    + b"h\0h\1R" * 100_000
    + b"t.",
    "the same pairs again and again": FORMAT_1
    + b"(]q\0("
    + b"U\0)\x86" * 50_000
    + b"e"
    + b"ccollections\nOrderedDict\nh\0\x85R" * 9_000
    + b"tu.",
    "steps without end": b"N" * MAX_PICKLE + b".",
}
MEASURE = """
import json, resource, sys, time
import checkpoints
from utils import UserError

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
for path in sys.argv[1:]:
    began = time.process_time()
    try:
        checkpoints.load(path)
        message = "loaded"
    except UserError as error:
        message = str(error)
    print(json.dumps([time.process_time() - began, message]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="measures memory by /proc")
def test_bombs_end_in_one_line_within_10_seconds_and_2_gb(tmp_path):
    """All are read by one process that has 2 GB for it."""
    paths = {
        (name, form): write_pickle(tmp_path / f"{i}_{form}", b"\x80\2" + data, form)
        for i, (name, data) in enumerate(BOMBS.items())
        for form in FORMS
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths.values()],
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(paths, done.stdout.splitlines(), strict=True):
        seconds, message = json.loads(line)
        assert seconds < 10 and "\n" not in message and len(message) < 600, (case, line)
        endings = " is refused: ", " damaged ", " complete model: ", " is not a checkpoint of "
        assert any(ending in message for ending in endings), (case, line)


@pytest.mark.parametrize(
    "name", ["memo of 2^32 places", "text of 4 GB", "bytes of 4 GB", "frame of 2^60 bytes"]
)
def test_size_that_a_pickle_claims_is_not_allocated(tmp_path, form, name):
    write_pickle(tmp_path / "x", b"\x80\2" + BOMBS[name], form)
    tracemalloc.start()
    refused(tmp_path / "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_PICKLE


def test_pickle_beyond_the_limit_is_refused(tmp_path):
    write_pickle(tmp_path / "x", b"N" * MAX_PICKLE + b".", "zip")
    refused(tmp_path / "x", f"a pickle of more than {MAX_PICKLE} bytes")


def test_pickle_of_many_instructions_is_refused(tmp_path, form):
    write_pickle(tmp_path / "x", b"\x80\2" + b"N" * MAX_INSTRUCTIONS + b".", form)
    refused(tmp_path / "x", f"a pickle of more than {MAX_INSTRUCTIONS} instructions")


# Damage


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_flipped_bytes_give_one_line_or_the_content(tmp_path, form):
    path = tmp_path / "x"
    torch.save(
        {"layer": torch.nn.Linear(20, 30), "list": [1, 2.5, "x"]},
        path,
        _use_new_zipfile_serialization=form == "zip",
    )
    data, generator, loaded = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 3, 30))):
            changed[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            loaded += "layer" in read(path)[0]
        except UserError as error:
            assert "\n" not in str(error)
    assert loaded > 20  # a flip in a tensor is a number like any other


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_path_that_is_not_a_file_is_refused(tmp_path, kind):
    (os.mkdir if kind == "folder" else os.mkfifo)(tmp_path / "x")
    refused(tmp_path / "x", "it is not a file")


def test_files_of_big_endian_machines_are_refused(tmp_path):
    """Their numbers would be read as others."""
    head = (pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": False}, {}, []))
    (tmp_path / "x").write_bytes(b"".join(head))
    refused(tmp_path / "x", "it was written on a big-endian machine")
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/byteorder", "big")
    refused(tmp_path / "x", "it was written on a big-endian machine")
