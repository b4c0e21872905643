"""Checkpoints of whole modules, as the tutorial wrote them, load without their code."""

import json
import os
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
from modeling.legacy_checkpoints import MAGIC, PROTOCOL
from utils import UserError

FORMS = ("zip", "old")
WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "<unk>": 3, "<start>": 4, "<end>": 5}

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
    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(1, 1, 1, bias=False)


TUTORIAL = (Encoder, Attention, DecoderWithAttention)
for tutorial_class in TUTORIAL:
    tutorial_class.__module__ = "models"  # the name under which it is pickled
Layer.__module__ = "torchvision.models.tiny"


@pytest.fixture
def as_models(monkeypatch):
    """pickle must find a class under its name before it writes the name."""
    for tutorial_class in TUTORIAL:
        monkeypatch.setattr(models, tutorial_class.__name__, tutorial_class, raising=False)
    monkeypatch.setitem(sys.modules, Layer.__module__, types.SimpleNamespace(Layer=Layer))


def tutorial(encoder, encoder_dim):
    """The dictionary that the tutorial saved."""
    torch.manual_seed(1)
    decoder = DecoderWithAttention(encoder_dim)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=4e-4)
    sum(p.sum() for p in decoder.parameters()).backward()
    optimizer.step()
    return {
        "epoch": 3,
        "epochs_since_improvement": 0,
        "bleu-4": 0.215,
        "encoder": encoder,
        "decoder": decoder,
        "encoder_optimizer": None,
        "decoder_optimizer": optimizer,
    }


def layers(n):
    return nn.Sequential(*(Layer() for _ in range(n)))


def small():
    """Too small to be built, but with the parts that `load` looks for."""
    torch.manual_seed(0)
    blocks = [nn.Identity() for _ in range(5)]
    return tutorial(Encoder([nn.BatchNorm2d(2), *blocks, layers(6)]), 3)


def write(path, state, form):
    torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def state(as_models):
    return small()


@pytest.fixture
def path(tmp_path, state, form):
    return write(tmp_path / "OLD.pth.tar", state, form)


def assert_same(tensors, module):
    theirs = module.state_dict()
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


# What loads


def test_tensors_equal_the_modules_bit_for_bit(path, state):
    checkpoint = load(path)
    for name in ("encoder", "decoder"):
        assert_same(checkpoint[name], state[name])


def test_arguments_come_from_the_tensors(path):
    checkpoint = load(path)
    assert checkpoint["encoder_args"] == {"name": "resnet50", "encoded_image_size": 7}
    assert checkpoint["decoder_args"] == {
        "attention_dim": 5,
        "embed_dim": 4,
        "decoder_dim": 6,
        "vocab_size": 6,
        "encoder_dim": 3,
        "dropout": 0.3,
        "encoded_image_size": 7,
    }
    assert (checkpoint["format"], checkpoint["word_map"]) == (checkpoints.FORMAT, None)
    assert (checkpoint["epoch"], checkpoint["bleu4"]) == (3, 0.215)


@pytest.mark.parametrize("value", [None, "0.2", float("nan"), torch.ones(1)])
def test_score_that_is_not_a_number_is_left_out(path, state, value):
    state["bleu-4"] = state["epoch"] = value
    torch.save(state, path)
    assert load(path).keys().isdisjoint(("bleu4", "epoch"))


@pytest.mark.parametrize("value", [1.0, -0.1, None, "0.5"])
def test_odd_dropout_and_pool_take_the_tutorials_values(path, state, value):
    state["decoder"].dropout.p = state["encoder"].adaptive_pool.output_size = value
    torch.save(state, path)
    checkpoint = load(path)
    assert checkpoint["decoder_args"]["dropout"] == 0.5
    assert checkpoint["encoder_args"]["encoded_image_size"] == 14


@pytest.mark.parametrize("n, name", [(6, "resnet50"), (23, "resnet101"), (36, "resnet152")])
def test_backbone_is_recognised_by_its_third_block(tmp_path, state, n, name):
    state["encoder"].resnet[6] = layers(n)
    torch.save(state, tmp_path / "x")
    assert load(tmp_path / "x")["encoder_args"]["name"] == name


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(2)
    return torchvision.models.resnet50(weights=None)


@pytest.fixture
def whole(tmp_path, as_models, form, resnet50):
    """A checkpoint of a true ResNet-50, and its state."""
    state = tutorial(Encoder(list(resnet50.children())[:-2]), 2048)
    return write(tmp_path / "OLD.pth.tar", state, form), state


def test_old_file_captions_after_conversion(whole, tmp_path, monkeypatch, capsys):
    (old, state), new = whole, tmp_path / "NEW.pth.tar"
    monkeypatch.undo()  # our own classes from here on
    words = tmp_path / "WORDMAP.json"
    words.write_text(json.dumps(WORD_MAP))
    checkpoints.main([str(old), str(new), "--word_map", str(words)])
    assert capsys.readouterr().out == f"wrote {new} (resnet50, 6 words)\n"
    checkpoint = checkpoints.load(new)
    encoder, decoder = checkpoints.build(checkpoint, new)
    found = (checkpoint[key] for key in ("word_map", "epoch", "bleu4"))
    assert tuple(found) == (WORD_MAP, 3, 0.215)
    assert_same(encoder.state_dict(), state["encoder"])
    assert_same(decoder.state_dict(), state["decoder"])
    image = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        output = decoder(encoder(image), torch.tensor([[[4, 1, 5]]]), torch.tensor([[3]]))
    assert output.logits.isfinite().all()


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
            return torch.zeros(1).__reduce_ex__(2)[0], (
                value.storage(),
                value.storage_offset(),
                tuple(value.shape),
                value.stride(),
                value.requires_grad,
                OrderedDict(),
            )
        return NotImplemented


def write_torch04(path, state):
    with open(path, "wb") as file:
        for value in (
            MAGIC,
            PROTOCOL,
            {
                "protocol_version": 1001,
                "little_endian": True,
                "type_sizes": {"short": 2, "int": 4, "long": 4},
            },
        ):
            pickle.dump(value, file, 2)
        pickler = OldPickler(file)
        pickler.dump(state)
        pickle.dump(sorted(pickler.storages), file, 2)
        for _, tensor in sorted(pickler.storages.items()):
            file.write(struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes())


class Backend:
    def __reduce__(self):
        return sys.modules["torch.nn.backends.thnn"]._get_thnn_function_backend, ()


def _get_thnn_function_backend():
    raise AssertionError


def test_file_of_torch_04_loads(tmp_path, state, monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "torch.nn.backends.thnn",
        types.SimpleNamespace(_get_thnn_function_backend=_get_thnn_function_backend),
    )
    monkeypatch.setattr(_get_thnn_function_backend, "__module__", "torch.nn.backends.thnn")
    expected = small()
    for module in (*state["encoder"].modules(), *state["decoder"].modules()):
        module._backend = Backend()
    del state["encoder"].resnet[0].num_batches_tracked
    write_torch04(tmp_path / "x", state)
    checkpoint = load(tmp_path / "x")
    expected["encoder"].load_state_dict(checkpoint["encoder"])  # needs no count
    expected["encoder"].resnet[0].num_batches_tracked = None
    assert_same(checkpoint["encoder"], expected["encoder"])
    assert_same(checkpoint["decoder"], state["decoder"])
    assert (checkpoint["epoch"], checkpoint["bleu4"]) == (3, 0.215)


# What does not load


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_missing_module_is_named(path, state, form, name):
    state[name] = {"fc.bias": 1}
    refused(write(path, state, form), f"has no module {name}")
    del state[name]
    refused(write(path, state, form), f"has no module {name}")


@pytest.mark.parametrize("name", ["embedding", "decode_step"])
def test_missing_matrix_is_named(path, state, form, name):
    setattr(state["decoder"], name, None)
    refused(write(path, state, form), f"lacks the decoder's matrix {name}.weight")


def test_missing_or_misshapen_tensor_is_named(path, state, form):
    for bias, message in (
        (None, "the decoder lacks fc.bias"),
        (nn.Parameter(torch.ones(7)), "fc.bias has size (7,), not (6,)"),
    ):
        state["decoder"].fc.bias = bias
        refused(write(path, state, form), "does not hold a complete model", message)


def test_other_encoder_is_named(path, state, form):
    state["encoder"].resnet[6] = layers(5)
    refused(write(path, state, form), "not a ResNet of torchvision", "5 layers")


class Call:
    """Pickled as a call of this function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("part", ["decoder", "decoder_optimizer", "epoch"])
def test_call_in_a_checkpoint_of_the_tutorial_is_refused_and_not_made(path, state, form, part):
    proof = path.parent / "proof"
    evil = Call(os.system, f"touch {proof}")
    if part == "decoder":
        state["decoder"].dropout.p = evil
    else:
        state[part] = evil
    refused(write(path, state, form), " posix.system, which", "nothing in the file was run")
    assert not proof.exists()


def test_file_of_format_1_with_a_module_is_refused_by_name(path, form):
    refused(
        write(path, {"format": 1, "encoder": nn.Linear(2, 3)}, form),
        "torch.nn.modules.linear.Linear",
        "nothing in the file was run",
    )


LINEAR = b"ctorch.nn.modules.linear\nLinear\n)R"
TREES = {  # pickles that put a module into place 255 of the memo
    "in itself": LINEAR + b"r\xff\0\0\0}U\x08_modules}U\1aj\xff\0\0\0ssb",
    "deep": LINEAR
    + b"r\xff\0\0\0"
    + b"}U\x08_modules}U\1a"
    + (LINEAR + b"}U\x08_modules}U\1a") * 5000
    + LINEAR
    + b"ssb" * 5001,
    "twice in each": b"("
    + LINEAR
    + b"q\0"
    + b"".join(LINEAR + b"}U\x08_modules}(U\1ah%cU\1bh%cusbq%c" % (i, i, i + 1) for i in range(60))
    + b"r\xff\0\0\0t",
    "one large dictionary in each": b"(}("
    + b"".join(b"U\5%05dN" % i for i in range(60_000))
    + b"uq\0"
    + LINEAR
    + b"r\xff\0\0\0}U\x08_modules}("
    + b"".join(b"U\5%05d" % i + LINEAR + b"}U\x0b_parametersh\0sb" for i in range(20_000))
    + b"usbt",
}


@pytest.mark.parametrize("kind", TREES)
def test_endless_tree_of_modules_is_refused(tmp_path, kind):
    magic = b"".join(pickle.dumps(x, 2) for x in (MAGIC, PROTOCOL, {"little_endian": True}))
    root = b"\x80\2}(U\1x" + TREES[kind] + b"U\7encoderj\xff\0\0\0U\7decoderj\xff\0\0\0u."
    (tmp_path / "x").write_bytes(magic + root + pickle.dumps([], 2))
    refused(tmp_path / "x", "an endless tree of modules")


def test_arguments_larger_than_the_tensors_are_refused(tmp_path):
    """A model is as large as its arguments say, and they take no space in a file."""
    decoder = models.DecoderWithAttention(5, 4, 6, 6, 3)
    args = dict(decoder.args)
    for name in ("vocab_size", "attention_dim", "decoder_dim", "embed_dim", "encoder_dim"):
        checkpoint = {"decoder_args": {**args, name: 1 << 40}, "decoder": decoder.state_dict()}
        with pytest.raises(UserError, match="x does not hold a complete model"):
            checkpoints.check_model(checkpoint, "x")
    with pytest.raises(UserError, match="encoded_image_size is not from 1 to 256"):
        checkpoints.check_model(
            {
                "decoder_args": {**args, "encoded_image_size": 1 << 20},
                "decoder": decoder.state_dict(),
            },
            "x",
        )


def test_truncated_old_file_is_damaged(path):
    data = path.read_bytes()
    for length in [*range(0, 200, 7), *range(200, len(data), len(data) // 60), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path)
