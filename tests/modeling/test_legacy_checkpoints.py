"""Checkpoints of whole modules, as the tutorial wrote them, load without their code."""

import json
import pickle
import struct
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torchvision
from factories import refused
from torch import nn

import checkpoints
import models
from checkpoints import load
from modeling.legacy_checkpoints import MAGIC

FORMS = ("zip", "old")
WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
MACHINE = {"little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
HEAD = b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, MACHINE))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Couldn't retrieve source"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


# The tutorial's classes, as far as their tensors go.


class Encoder(nn.Module):
    def __init__(self, children):
        super().__init__()
        self.enc_image_size = 7
        self.resnet = nn.Sequential(*children)
        self.adaptive_pool = nn.AdaptiveAvgPool2d((7, 7))


class Attention(nn.Module):
    def __init__(self, encoder_dim, decoder_dim, attention_dim):
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu = nn.ReLU()


class DecoderWithAttention(nn.Module):
    def __init__(self, encoder_dim):
        super().__init__()
        self.attention = Attention(encoder_dim, 6, 5)
        self.embedding = nn.Embedding(len(WORD_MAP), 4)
        self.dropout = nn.Dropout(p=0.3)
        self.decode_step = nn.LSTMCell(4 + encoder_dim, 6, bias=True)
        self.init_h = nn.Linear(encoder_dim, 6)
        self.init_c = nn.Linear(encoder_dim, 6)
        self.f_beta = nn.Linear(6, encoder_dim)
        self.fc = nn.Linear(6, len(WORD_MAP))


class Layer(nn.Module):
    def __init__(self, conv="conv3"):
        super().__init__()
        self.add_module(conv, nn.Conv2d(1, 1, 1, bias=False))


def _get_thnn_function_backend():
    raise AssertionError


TUTORIAL = (Encoder, Attention, DecoderWithAttention)
for tutorial_class in TUTORIAL:
    tutorial_class.__module__ = "models"  # the name under which it is pickled
Layer.__module__ = "torchvision.models.tiny"
_get_thnn_function_backend.__module__ = "torch.nn.backends.thnn"


@pytest.fixture
def as_models(monkeypatch):
    """pickle must find a class under its name before it writes the name."""
    for tutorial_class in TUTORIAL:
        monkeypatch.setattr(models, tutorial_class.__name__, tutorial_class, raising=False)
    for value in (Layer, _get_thnn_function_backend):
        module = types.SimpleNamespace(**{value.__name__: value})
        monkeypatch.setitem(sys.modules, value.__module__, module)


def tutorial(encoder, encoder_dim):
    """The dictionary that the tutorial saved."""
    torch.manual_seed(1)
    decoder = DecoderWithAttention(encoder_dim)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    sum(p.sum() for p in decoder.parameters()).backward()
    optimizer.step()
    state = {"epoch": 3, "epochs_since_improvement": 0, "bleu-4": 0.215, "encoder": encoder}
    return {**state, "decoder": decoder, "encoder_optimizer": None, "decoder_optimizer": optimizer}


def small():
    """Too small to be built, but with the parts that `load` looks for."""
    torch.manual_seed(0)
    block = nn.Sequential(*(Layer() for _ in range(6)))
    return tutorial(Encoder([nn.BatchNorm2d(2), *(nn.Identity() for _ in range(5)), block]), 3)


def write(path, state, form="zip"):
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture
def state(as_models):
    return small()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "OLD.pth.tar"


def assert_same(tensors, module):
    theirs = module.state_dict()
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# What loads


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_the_modules_and_arguments_come_from_them(path, state, form, wrap):
    wrapped = {name: wrap(state[name]) for name in ("encoder", "decoder")}
    checkpoint = load(write(path, state | wrapped, form))
    assert_same(checkpoint["encoder"], state["encoder"])
    assert_same(checkpoint["decoder"], state["decoder"])
    assert checkpoint["encoder_args"] == {"name": "resnet50", "encoded_image_size": 7}
    sizes = {"attention_dim": 5, "embed_dim": 4, "decoder_dim": 6, "vocab_size": 6}
    others = {"encoder_dim": 3, "dropout": 0.3, "encoded_image_size": 7}
    assert checkpoint["decoder_args"] == sizes | others
    assert (checkpoint["format"], checkpoint["word_map"]) == (checkpoints.FORMAT, None)
    assert (checkpoint["epoch"], checkpoint["bleu4"]) == (3, 0.215)


def test_values_of_another_kind_are_left_out_or_named(path, state):
    for value in (None, "0.2", float("nan"), torch.ones(1)):
        state["bleu-4"] = state["epoch"] = value
        assert load(write(path, state)).keys().isdisjoint(("bleu4", "epoch"))
    state["encoder"].adaptive_pool.output_size = 9
    for value in (-0.1, "0.5", 65):
        state["decoder"].dropout.p = value
        refused(write(path, state), "does not hold a complete model")
    states = {part: state[part].state_dict() for part in ("encoder", "decoder")}
    state["decoder"].dropout.p = 0.0
    for models_, size, dropout in ((state, 9, 0), (states, 14, 0.5)):
        checkpoint = load(write(path, models_))
        assert checkpoint["encoder_args"]["encoded_image_size"] == size
        assert checkpoint["decoder_args"]["encoded_image_size"] == size
        assert checkpoint["decoder_args"]["dropout"] == dropout


def test_backbone_is_recognised_by_its_third_block(path, state):
    counts = {"resnet18": 2, "resnet34": 6, "resnet50": 6, "resnet101": 23, "resnet152": 36}
    for name, n in counts.items():
        conv = "conv2" if name in ("resnet18", "resnet34") else "conv3"
        state["encoder"].resnet[6] = nn.Sequential(*(Layer(conv) for _ in range(n)))
        assert load(write(path, state))["encoder_args"]["name"] == name
    state["encoder"].resnet[6] = nn.Sequential(*(Layer() for _ in range(5)))
    refused(write(path, state), "no ResNet of torchvision has 5 layers")


def test_old_file_of_a_whole_resnet_is_converted(path, as_models, monkeypatch):
    torch.manual_seed(2)
    children = list(torchvision.models.resnet18(weights=None).children())[:-2]
    state, new = tutorial(Encoder(children), 512), path.parent / "NEW.pth.tar"
    write(path, state, "old")
    monkeypatch.undo()  # our own classes from here on
    words = path.parent / "WORDMAP.json"
    words.write_text(json.dumps(WORD_MAP))
    checkpoints.main([str(path), str(new), "--word_map", str(words)])
    encoder, decoder = checkpoints.build(load(new), new)
    assert_same(encoder.state_dict(), state["encoder"])
    assert_same(decoder.state_dict(), state["decoder"])


# The format of torch 0.4, by hand: Parameter called, no counts in BatchNorm, source code saved.


class OldPickler(pickle.Pickler):
    def __init__(self, file):
        super().__init__(file, protocol=2)
        self.storages, self.classes = {}, set()

    def persistent_id(self, value):
        if isinstance(value, type) and issubclass(value, nn.Module) and value not in self.classes:
            self.classes.add(value)
            return "module", value, "models.py", f"class {value.__name__}:\n    pass\n"
        if isinstance(value, torch.storage.TypedStorage):
            key = str(value.data_ptr())
            self.storages[key] = torch.tensor([], dtype=value.dtype).set_(value)
            kind = {torch.float32: torch.cuda.FloatStorage, torch.int64: torch.cuda.LongStorage}
            return "storage", kind[value.dtype], key, "cuda:0", value.size(), None
        return None

    def reducer_override(self, value):
        if isinstance(value, nn.Parameter):
            return nn.Parameter, (value.detach(), value.requires_grad)
        if isinstance(value, torch.Tensor):
            rebuild, (_, offset, size, stride, *_) = value.__reduce_ex__(2)
            options = (offset, tuple(size), stride, value.requires_grad, OrderedDict())
            return rebuild, (value.storage(), *options)
        return NotImplemented


class Backend:
    def __reduce__(self):
        return _get_thnn_function_backend, ()


def test_file_of_torch_04_loads(path, state):
    expected = small()
    for module in (*state["encoder"].modules(), *state["decoder"].modules()):
        module._backend = Backend()
    del state["encoder"].resnet[0].num_batches_tracked
    with open(path, "wb") as file:
        file.write(HEAD)
        pickler = OldPickler(file)
        pickler.dump(state)
        pickle.dump(sorted(pickler.storages), file, 2)
        for _, tensor in sorted(pickler.storages.items()):
            file.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())
    checkpoint = load(path)
    expected["encoder"].load_state_dict(checkpoint["encoder"])  # needs no count
    expected["encoder"].resnet[0].num_batches_tracked = None
    assert_same(checkpoint["encoder"], expected["encoder"])
    assert_same(checkpoint["decoder"], state["decoder"])
    assert (checkpoint["epoch"], checkpoint["bleu4"]) == (3, 0.215)


# What does not load


def test_what_is_missing_or_misshapen_is_named(path, state):
    decoder = state["decoder"]
    bias, embedding = decoder.fc.bias, decoder.embedding
    for wrong in (None, nn.Parameter(torch.ones(7))):
        decoder.fc.bias = wrong
        refused(write(path, state), "does not hold a complete model", "fc.bias")
    decoder.fc.bias, decoder.embedding = bias, None
    refused(write(path, state), "lacks 'embedding.weight'")
    decoder.embedding = embedding
    for name in ("encoder", "decoder"):
        refused(write(path, {**state, name: {"fc.bias": 1}}), f"has no module {name}")


LINEAR = b"ctorch.nn.modules.linear\nLinear\n)R"
MODULES = b"}U\x08_modules}"
ROOT = LINEAR + b"r\xff\0\0\0" + MODULES  # the module in place 255 of the memo
SHARED = b"(}(" + b"".join(b"U\5%05dN" % i for i in range(60_000)) + b"uq\0"
MANY = [b"U\5%05d" % i + LINEAR + b"}U\x0b_parametersh\0sb" for i in range(20_000)]
TWICE = [LINEAR + MODULES + b"(U\1ah%cU\1bh%cusbq%c" % (i, i, i + 1) for i in range(60)]
TREES = {
    "in itself": ROOT + b"U\1aj\xff\0\0\0ssb",
    "deep": ROOT + b"U\1a" + (LINEAR + MODULES + b"U\1a") * 5000 + LINEAR + b"ssb" * 5001,
    "twice in each": b"(" + LINEAR + b"q\0" + b"".join(TWICE) + b"r\xff\0\0\0t",
    "one large dictionary in each": SHARED + ROOT + b"(" + b"".join(MANY) + b"usbt",
}


@pytest.mark.parametrize("kind", TREES)
def test_endless_tree_of_modules_is_refused(path, kind):
    root = b"\x80\2}(U\1x" + TREES[kind] + b"U\7encoderj\xff\0\0\0U\7decoderj\xff\0\0\0u."
    path.write_bytes(HEAD + root + pickle.dumps([], 2))
    refused(path, "an endless tree of modules")


def test_truncated_file_is_damaged(path, state):
    for form in FORMS:
        data = write(path, state, form).read_bytes()
        for length in [0, 19, *range(200, len(data), len(data) // 20), len(data) - 1]:
            path.write_bytes(data[:length])
            refused(path)
