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
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

import checkpoints
from modeling.legacy_checkpoints import DTYPES, MAGIC, MAX_PICKLE, Stub, read
from utils import UserError

FORMS = ("zip", "old")  # torch's format, and the one before zip
HEAD = [pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True})]
WATCHED = {"os.system", "subprocess.Popen", "os.exec", "os.mkdir", "os.remove", "shutil.rmtree"}
WATCHED |= {"pickle.find_class", "socket.connect", "ctypes.dlopen", "os.putenv"}
heard = []
sys.addaudithook(lambda event, arguments: heard.append(event) if event in WATCHED else None)


def write_pickle(path, data, form, storages=(), **options):
    """A file of torch.save whose pickle is `data`; storages: pairs of key and bytes (of floats)"""
    if form == "zip":
        with zipfile.ZipFile(path, "w", **options) as file:
            file.writestr("x/data.pkl", data)
            for key, content in storages:
                file.writestr(f"x/data/{key}", content)
    else:
        keys = pickle.dumps([key for key, _ in storages], 2)
        contents = (struct.pack("<q", len(content) // 4) + content for _, content in storages)
        path.write_bytes(b"".join([*HEAD, data, keys, *contents]))
    return path


def save(value, path, form, **options):
    torch.save(value, path, _use_new_zipfile_serialization=form == "zip", **options)
    return path


class Call:
    """Pickled as a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Saved(tuple):
    """Pickled as this persistent id."""


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if type(value) is Saved else None


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


# Code: names that are not tensors' or modules', and ways to call, change or hash what is named

NAMES = """
    os.system posix.system subprocess.Popen builtins.eval builtins.setattr builtins.__import__
    io.open importlib.import_module functools.partial copyreg._reconstructor numpy.load
    torch.load torch.from_file torch.storage._load_from_bytes torch._utils._rebuild_wrapper_subclass
    torch.nn.modules.module.register_module_forward_hook torch.nn.modules.os.system
    torch.package.PackageImporter torchvision.models.os models.torch __main__.Evil canary.fire
    """.split()
PLACES = (  # what is before and after a call: at the root, in our format, in a module's state
    (b"", b""),
    (b"}(U\6formatK\1U\7encoder", b"u"),
    (b"}U\7encoderctorch.nn.modules.linear\nLinear\n)\x81}U\5state", b"sbs"),
)
FIRE = b"ccanary\nfire\n"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS_X = b"(U\7storagectorch\nFloatStorage\nU\1xU\3cpuK\4"  # the start of a storage's id
OBJECTS = b"]", b"U\1x", LINEAR, TENSOR, FLOATS_X + b"tQ"  # that no instruction calls or changes
OBJECTS += (LINEAR + b")R", TENSOR + b"(" + FLOATS_X + b"tQK\0))tR")
CHANGES = (
    b"}U\1aK\1sb.",
    b"N}U\5numelK\x09s\x86b.",
    b"U\1aK\1s.",
    b"K\0K\1s.",
    b"(U\1aK\1u.",
    b"]R.",
)
ATTACKS = [
    *(a + b for a in OBJECTS for b in CHANGES if a[-2:] != b")R" or b[-2:] != b"b."),
    *(a + b")R." for a in (OBJECTS[1], OBJECTS[4], OBJECTS[5], b"ctorch\nFloatStorage\n")),
    FIRE + b")R.",
    b"ccanary\nFire\n)\x81}b.",
    b"(icanary\nfire\n.",  # INST
    b"(" + FIRE + b"o.",  # OBJ
    b"(" + LINEAR + b"o.",
    LINEAR + b")}\x92.",  # NEWOBJ_EX
    b"\x82\1)R.",  # EXT1
    b"Pcanary.fire\n.",  # PERSID
    b"\x8c\6canary\x8c\4fire\x93)R.",  # STACK_GLOBAL
    b"K\1K\1\x93.",
    b"ctorch.nn.modules\nlinear.os.system\n)R.",
    b"\x8c\5torch\x8c\x14nn.modules.os.system\x93.",
    b"\x8c\5torch\x8c\7nn.Size\x93.",  # a known name cut elsewhere
    b"ctorch.nn.modules." + b"a" * 600 + b"\nA\n.",
    b"}" + FIRE + b")RK\1s.",
    b"(U\7storage" + FIRE + b"U\1xU\3cpuK\4tQ.",
    TENSOR + b"(" + FIRE + b"t.",  # its hooks
    b"}K\1a.",
    b"}(K\1\x90.",
    LINEAR + b")R(K\1e.",
    FLOATS_X + b"tQ(K\1e.",
    LINEAR + b"(" + b"N" * 200 + b"tR.",
    b"})K\1s.",  # a tuple as a key
    b"()K\1d.",
    b"}\x8a\x09" + b"\1" * 9 + b"K\1s.",
    b"(\x91.",  # FROZENSET
    b"\x96\1\0\0\0\0\0\0\0x.",  # BYTEARRAY8
    b"U\4evil\x85Q.",
    b")Q.",
    b"(U\6moduleK\1NNtQ.",
    FLOATS_X + b"(U\1yK\0K\2ttQ.",  # a view
]


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


def hostile_pickles(command):
    """Pairs of what the message must name and a pickle"""
    for name in NAMES:
        module, function = name.encode().rsplit(b".", 1)
        call = b"c%s\n%s\nU%c%s\x85R" % (module, function, len(command), command)
        for before, after in PLACES:
            yield f" {name}, which", b"\x80\2" + before + call + after + b"."
    for data in ATTACKS:
        for pickle_ in (b"\x80\2" + data, b"\x80\2}(U\6formatK\1U\1x" + data[:-1] + b"u."):
            yield "canary" if FIRE in data else "", pickle_


def test_no_hostile_file_runs_anything(tmp_path, canary):
    """In both formats; each file ends in one line."""
    path, proof, count = tmp_path / "x", tmp_path / "proof", 0
    checkpoints.load(checkpoints.PRETRAINED)  # whatever is imported then
    for form in FORMS:
        for named, data in hostile_pickles(f"touch {proof}".encode()):
            write_pickle(path, data, form, [("x", b"\0" * 16)])
            del heard[:]
            message = outcome(path)
            assert heard == canary == [] and not proof.exists(), (form, data)
            assert " is refused: " in message or " is damaged " in message, (message, form, data)
            assert named in message or "a pickle instruction that" in message, (message, data)
            count += 1
    for place in range(5):
        parts = [*HEAD, pickle.dumps({"format": 1}, 2), pickle.dumps([], 2)]
        parts[place] = b"\x80\2" + FIRE + b")R."
        path.write_bytes(b"".join(parts))
        assert "canary.fire" in outcome(path) and canary == []
    assert count > 400
    pickle.loads(pickle.dumps(Call(os.system, f"touch {proof}")))
    assert proof.exists() and "os.system" in heard  # as Python itself reads it


# What may be in a file


@pytest.mark.parametrize("form", FORMS)
def test_modules_become_stubs_and_tensors_and_plain_values_themselves(tmp_path, form):
    layer = torch.nn.Linear(2, 3)
    layer.number, layer.texts = 7, {"a": ["b"]}
    tensors = [
        tensor
        for dtype in DTYPES.values()
        for whole in [torch.arange(24).reshape(2, 3, 4).to(dtype)]
        for tensor in (whole, whole[1:].transpose(0, 2), whole[0, 1, 2], whole[:0])
    ]
    values = {"plain": 5, "list": [1.5, None, True], "ordered": OrderedDict(a=1), "text": "é"}
    odd = {"score": np.float64(0.2), "set": {1, (2, 3)}, "size": torch.Size([2])}
    for protocol in (2, 4):
        content = {"layer": layer, "tensors": tensors, **values, **odd, "dtype": torch.float32}
        root = read(save(content, tmp_path / "x", form, pickle_protocol=protocol))
        stub = root["layer"]
        assert type(stub) is type(root["score"]) is Stub
        assert (stub.state["number"], stub.state["texts"]) == (7, {"a": ["b"]})
        assert torch.equal(stub.dict_attribute("_parameters")["weight"], layer.weight)
        assert {key: root[key] for key in values} == values
        for tensor, expected in zip(root["tensors"], tensors, strict=True):
            assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
            assert tensor.stride() == expected.stride()


@pytest.mark.parametrize("form", FORMS)
def test_file_of_python_2_is_read(tmp_path, form):
    """Its strings are bytes, and an OrderedDict is made from a list of pairs."""
    ordered = b"ccollections\nOrderedDict\n](](U\1aK\1e](U\1bK\2ee\x85R"
    path = write_pickle(tmp_path / "x", b"\x80\2(" + ordered + b"T\4\0\0\0wordt.", form)
    assert read(path) == ({"a": 1, "b": 2}, "word")


# Tensors and their storages

REBUILD = torch.zeros(1).__reduce_ex__(2)[0]  # torch's function that makes a tensor of a storage
FLOATS = (("0", struct.pack("<4f", 1, 2, 3, 4)),)
WRONG = {  # what is changed, to which values
    "size": [(2, 3), (2.0, 2), (1 << 200, 2), ([1], 1 << 40), (1,) * 9, (-1, 2), (-2, -2), (2,)],
    "numel": [5, 3, -4, 1 << 40, 1 << 200, 4.0],
    "kind": [torch.DoubleStorage, torch.nn.Linear],
    "key": ["1", 0, ("0",)],
    "size, stride": [((1 << 40,), (0,)), ((5,), (0,)), ((3, 3), (0, 1)), ((1 << 40,) * 2, (0, 0))],
    "stride": [(-2, 1), (1 << 62, 1), None, (2, "x")],
    "offset": [-1, 1, 1 << 200],
}


def tensor(
    numel=4, offset=0, size=(2, 2), stride=(2, 1), kind=torch.FloatStorage, key="0", view=()
):
    saved = Saved(("storage", kind, key, "cpu", numel, *view))
    return Call(REBUILD, saved, offset, size, stride, False, OrderedDict())


@pytest.mark.parametrize("form", FORMS)
def test_tensors_larger_than_their_storage_or_beyond_it_are_refused(tmp_path, form):
    path = tmp_path / "x"
    good = tensor(view=(None,) if form == "old" else ())
    write_pickle(path, pickled({"format": 1, "x": good}), form, FLOATS)
    assert read(path)["x"].tolist() == [[1, 2], [3, 4]]
    assert "does not hold a complete model" in outcome(path)  # but is not refused
    for names, values in WRONG.items():
        for value in values:
            changed = zip(names.split(", "), value) if ", " in names else [(names, value)]
            write_pickle(path, pickled([tensor(**dict(changed))]), form, FLOATS)
            assert outcome(path, read) != "loaded", value
    for wrong in ([tensor(), tensor(numel=8)], [tensor(view=(("y", 0, 2),))]):
        assert "refused" in outcome(write_pickle(path, pickled(wrong), form, FLOATS))
    many = [tensor(key=str(i), numel=10_000) for i in range(1000)]  # 40 MB, of which the file has
    for storages in ((), FLOATS, [(str(i), b"\0" * 40_000) for i in range(999)]):
        assert outcome(write_pickle(path, pickled(many), form, storages), read) != "loaded"


def test_storages_of_an_old_file_are_those_that_it_lists(tmp_path):
    for keys in (b"])" + b"\x85" * 100_000 + b"a.", b"](K\1K\2e.", b"}."):  # a deep tuple's hash
        parts = [*HEAD, pickle.dumps({"format": 1}, 2), b"\x80\2" + keys]
        (tmp_path / "x").write_bytes(b"".join(parts))
        assert "lacks the list of its storages" in outcome(tmp_path / "x")


def test_zip_file_whose_entries_are_not_what_they_claim_is_refused(tmp_path):
    path = write_pickle(tmp_path / "x", pickled([tensor()]), "zip", FLOATS)
    data = path.read_bytes()
    assert outcome(path, read) == "loaded"
    entry = data.rindex(b"PK\1\2")
    for size in (0, 1, 1 << 20, (1 << 32) - 2):
        for sizes in (size, size), (16, size):
            path.write_bytes(data[: entry + 20] + struct.pack("<2I", *sizes) + data[entry + 28 :])
            assert outcome(path, read) != "loaded"
    write_pickle(path, b"\0" * 10_000_000, "zip", compression=zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 20_000 and "a compressed entry" in outcome(path)
    with zipfile.ZipFile(write_pickle(path, pickled([1]), "zip"), "a") as file:
        file.writestr("y/data.pkl", b"\x80\2" + FIRE + b")R.")
    assert "zip file with 2 data" in outcome(path)
    # Ten storages that are the same bytes of the file
    write_pickle(path, pickled([tensor(5000, key=str(i)) for i in range(10)]), "zip", FLOATS)
    assert "tensors that are larger than the file" in outcome(path)


def test_files_of_big_endian_machines_and_of_torchscript_are_refused(tmp_path):
    """Numbers of the former would be read as others."""
    path = tmp_path / "x"
    parts = [*HEAD[:2], *(pickle.dumps(x, 2) for x in ({"little_endian": False}, {}, []))]
    path.write_bytes(b"".join(parts))
    assert "little-endian machine" in outcome(path)
    with zipfile.ZipFile(write_pickle(path, pickled({}), "zip"), "a") as archive:
        archive.writestr("x/byteorder", "big")
    assert "it was written on a big-endian machine" in outcome(path)
    write_pickle(path, b"\x80\2c__torch__\nModule\n)\x81.", "zip")
    assert "__torch__.Module" in outcome(path)


# Bombs: small files that would take much time or memory

FORMAT_1 = b"}(U\6formatK\1U\1x"
TWICE = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(200))  # tuples twice in tuples
HASH = (1 << 61) - 1  # all multiples of it have one hash
COLLIDING = b"".join(b"\x8a\x0c" + (k * HASH).to_bytes(12, "little") + b"N" for k in range(100_000))
LAUGHS = b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(30))
LONG_NAME = b"(X" + struct.pack("<I", 1 << 20) + b"torch.nn.modules.".ljust(1 << 20, b"a") + b"\x94"
NONES, MODULES = b"N" * 300_000, b"(" + LINEAR + b"q\0"
TENSORS = b"(" + TENSOR + b"q\0(" + FLOATS_X + b"tQK\0))tq\1"
PAIRS = b"(]q\0(" + b"U\0)\x86" * 50_000 + b"eccollections\nOrderedDict\nq\1"
BOMBS = {
    "memo of 2^32 places": b"]r\xff\xff\xff\xff.",
    "memo of 10^4000 places": b"]p" + b"9" * 4000 + b"\n.",
    "text of 4 GB": b"X\xff\xff\xff\xffx.",
    "bytes of 2^63 bytes": b"\x8e" + struct.pack("<Q", 1 << 63) + b"x.",
    "frame of 2^60 bytes": b"\x95" + struct.pack("<Q", 1 << 60) + b"].",
    "number of 2 GB": b"\x8b\xff\xff\xff\x7f\1.",
    "number of 10^5 digits": b"L" + b"9" * 100_000 + b"L\n.",
    "line without end": b"c" + b"x" * 1_000_000,
    "lists in lists": FORMAT_1 + b"]" * 100_000 + b"a" * 99_999 + b"u.",
    "tuples in tuples": FORMAT_1 + b")" + b"\x85" * 100_000 + b"u.",
    "tuples in tuples as a key": FORMAT_1 + b"})" + b"\x85" * 100_000 + b"K\1su.",
    "tuples twice in tuples as a key": FORMAT_1 + b"}" + TWICE + b"K\1su.",
    "tuples twice in tuples in a set": FORMAT_1 + b"\x8f(" + TWICE + b"\x90u.",
    "a billion laughs": b"]q\0" + LAUGHS + b".",
    "list in itself": b"]q\0h\0a.",
    "dictionary in itself": FORMAT_1 + b"}q\0U\1xh\0su.",
    "numbers with one hash": FORMAT_1 + b"}(" + COLLIDING + b"uu.",
    "marks without end": b"(" * 300_000 + b".",
    "dictionaries in dictionaries": FORMAT_1 + b"}U\1a" * 100_000 + b"N" + b"s" * 100_000 + b"u.",
    "modules without end": MODULES + b"h\0)\x81" * 300_000 + b"t.",
    "calls with many arguments": MODULES + b"(" + NONES + b"tq\1" + b"h\0h\1R" * 99_999 + b"t.",
    "long names again and again": LONG_NAME + b"\x8c\1A\x94" + b"h\0h\1\x93" * 100_000 + b"t.",
    "persistent ids with many parts": b"((U\7storage" + NONES + b"tq\0" + b"h\0Q" * 99_999 + b"t.",
    "tensors without end": TENSORS + b"h\0h\1R" * 300_000 + b"t.",
    "the same pairs again and again": FORMAT_1 + PAIRS + b"h\1h\0\x85R" * 9_000 + b"tu.",
    "steps without end": b"N" * (MAX_PICKLE - 100) + b".",
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


# Damage


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize("form", FORMS)
def test_flipped_bytes_give_one_line_or_the_content(tmp_path, form):
    content = {"layer": torch.nn.Linear(20, 30), "list": [1, 2.5, "x"]}
    path = save(content, tmp_path / "x", form)
    data, generator, loaded = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 1, 3, 30))):
            changed[generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(changed)
        loaded += outcome(path, read) == "loaded"
    assert loaded > 20  # a flip in a tensor is a number like any other


def test_path_that_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        assert "it is not a file" in outcome(path)
