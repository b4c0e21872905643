"""A checkpoint is whole or absent, builds the same model, and runs no code."""

import copy
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path

import factories
import pytest
import torch

import checkpoints
from checkpoints import PRETRAINED, build, find_model, load, load_captioner, main, save
from modeling import field_of_view
from modeling.field_of_view import find_offset
from models import DECODERS, DecoderWithAttention, Encoder
from utils import Parser, UserError

WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
ENCODER = "mobilenetv3_small_050"  # timm's smallest: 1.2 MB without its head


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    encoder = Encoder(encoded_image_size=7, name=ENCODER, weights="none")
    return encoder.eval(), DecoderWithAttention(
        5, 4, 6, len(WORD_MAP), encoder.encoder_dim, 0.3, encoded_image_size=7
    ).eval()


@pytest.fixture
def path(tmp_path, models):
    save(tmp_path / "x.pth.tar", *models, WORD_MAP, epoch=3, bleu4=21.5)
    return tmp_path / "x.pth.tar"


def change(path, **entries):
    """Entries of a checkpoint, changed in the file"""
    torch.save({**torch.load(path, weights_only=True), **entries}, path)


@torch.no_grad()
def outputs(encoder, decoder):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator).to(torch.uint8)
    captions = torch.tensor([[[4, 1, 2, 5, 0]], [[4, 2, 1, 3, 5]]])
    return decoder(encoder(images), captions, torch.tensor([[4], [5]]))


def assert_same_outputs(ours, theirs):
    for a, b in zip(outputs(*ours), outputs(*theirs), strict=True):
        assert torch.equal(a, b)


def refused(path, *what, word_map=None):
    factories.refused(path, *what, load=lambda path: load_captioner(path, "cpu", word_map))


# What is written and read


@pytest.mark.parametrize("kind", DECODERS)
def test_saved_model_is_the_same_model(path, models, kind):
    decoder = DECODERS[kind](**models[1].args | {"attention": kind}).eval()
    save(path, models[0], decoder, WORD_MAP, epoch=3, bleu4=21.5)
    *loaded, word_map, checkpoint = load_captioner(path, "cpu")
    assert not any(model.training for model in loaded) and type(loaded[1]) is DECODERS[kind]
    assert_same_outputs(loaded, (models[0], decoder))
    assert (word_map, checkpoint["epoch"], checkpoint["bleu4"]) == (WORD_MAP, 3, 21.5)
    assert loaded[0].args == models[0].args and loaded[1].args == decoder.args
    assert loaded[1].dropout.p == 0.3
    for ours, theirs in zip(build(load(path), path), (models[0], decoder)):
        assert factories.same(ours.state_dict(), theirs.state_dict())


def test_file_is_what_torch_itself_reads_as_tensors_and_plain_values(path):
    for file in (path, PRETRAINED):
        assert factories.same(load(file), {**torch.load(file, weights_only=True)})


def test_a_save_measures_nothing_and_a_conversion_stores_where_the_encoder_looks(
    path, models, monkeypatch
):
    assert torch.load(path, weights_only=True)["offset"] is None
    main([str(path), str(path.parent / "new.pth.tar")])
    measured = load_captioner(path, "cpu")[0]
    stored = load_captioner(path.parent / "new.pth.tar", "cpu")[0]
    assert find_offset(measured) == stored.offset
    monkeypatch.setattr(field_of_view, "measure_offset", None)
    assert find_offset(stored) == stored.offset
    save(path, stored, models[1], WORD_MAP)
    assert torch.load(path, weights_only=True)["offset"] == list(stored.offset)
    stored.fine_tune()  # its cells move
    save(path, stored, models[1], WORD_MAP)
    assert torch.load(path, weights_only=True)["offset"] is None


# Writing


def test_save_that_fails_is_one_line_and_leaves_the_old_file(path, models, monkeypatch):
    """A limit on file size causes a system error like that of a full disk."""

    errors = [KeyboardInterrupt("the disk full"), RuntimeError("unexpected pos 64 vs 0\nmore")]

    def interrupted(state, file):
        Path(file).write_bytes(b"half a checkpoint")
        raise errors.pop()

    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"^{path} cannot be written: .*$"):
            save(path, *models, WORD_MAP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]
    for folder in (path.parent / "no", path):
        with pytest.raises(UserError, match=f"{folder}/y cannot be written: "):
            save(folder / "y", *models, WORD_MAP)
    monkeypatch.setattr(torch, "save", interrupted)
    for kind in (UserError, KeyboardInterrupt):
        with pytest.raises(kind, match=r"disk full(\? unexpected pos 64 vs 0)?$"):
            save(path, *models, WORD_MAP)
        assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


# Files that are not checkpoints


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_or_foreign_file_is_named(path):
    refused(path.parent / "none.pth.tar", "not found")
    foreign = b"", b"\0" * 5000, b"a cat sits\n" * 99, b"{}", pickle.dumps({"format": 1})
    for content in foreign:
        path.write_bytes(content)
        refused(path, "damaged")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("photo.jpg", "no photo")
    refused(path, "damaged")
    for content in (
        {"state_dict": {}},
        [1],
        torch.zeros(2),
        *({"format": x} for x in (99, WORD_MAP)),
    ):
        torch.save(content, path)
        refused(path, "not a checkpoint of this program's format 1")


def test_incomplete_or_impossible_model_is_named(path):
    whole, changes = torch.load(path, weights_only=True), []
    for part in ("encoder", "decoder", "encoder_args", "decoder_args"):
        torch.save({key: value for key, value in whole.items() if key != part}, path)
        refused(path, "does not hold a complete model", part)
        for name, weight in list(whole[part].items())[-2:] if "args" not in part else ():
            lacking = {key: value for key, value in whole[part].items() if key != name}
            wrong = [torch.zeros(99), weight * float("nan")][: 1 + weight.is_floating_point()]
            changes += [(part, x, name) for x in (lacking, *(lacking | {name: w} for w in wrong))]
    changes += [("encoder_args", {**whole["encoder_args"], "name": "x" * 99_999}, "encoder x")]
    build_refuses, args = len(changes), whole["decoder_args"]
    for size in ("vocab_size", "attention_dim", "decoder_dim", "embed_dim"):  # no memory
        changes += [("decoder_args", {**args, size: 1 << 40}, "")]
    changes += [
        ("decoder_args", {**args, "encoded_image_size": 1 << 20}, "encoded_image_size"),
        ("decoder_args", {**args, "dropout": float("nan")}, "dropout"),
        ("decoder_args", {}, "missing 4 required positional arguments"),
        ("encoder_args", {"name": 3}, "name"),
        ("encoder_args", {"name": "x", "stride": 8}, "stride"),
        ("encoder_args", {"name": "x", "image_size": 1 << 20}, "image_size"),
        ("encoder_args", {"name": "x", "encoded_image_size": 0}, "encoded_image_size"),
        *(("offset", wrong, "") for wrong in ([0.1, float("nan")], [0.1, 0.6], [0.1], 0.1)),
    ]
    for i, (part, value, named) in enumerate(changes):
        torch.save({**whole, part: value}, path)
        refuse = refused if i < build_refuses else factories.refused  # `load` alone
        refuse(path, "does not hold a complete model: ", named)


def test_decoder_of_another_encoder_is_refused(path, models):
    other = DecoderWithAttention(5, 4, 6, len(WORD_MAP), 99)
    save(path, models[0], other, WORD_MAP)
    refused(path, f"returns {models[0].encoder_dim} numbers, its decoder takes 99")


# Word maps


def write_map(folder, word_map):
    (folder / "WORDMAP_other.json").write_text(json.dumps(word_map))
    return folder / "WORDMAP_other.json"


def test_word_map_is_that_of_the_checkpoint_else_that_of_the_file(path):
    other = {("dog" if word == "cat" else word): i for word, i in WORD_MAP.items()}
    file = write_map(path.parent, other)
    assert load_captioner(path, "cpu", file)[2] == WORD_MAP
    change(path, word_map=None)
    refused(path, "pass --word_map")
    assert load_captioner(path, "cpu", file)[2] == other
    larger = write_map(path.parent, {**WORD_MAP, "<end>": 6, "dog": 5})
    refused(path, "was trained on 6 words, but the word map has 7", word_map=larger)


def test_invalid_word_map_is_named(path):
    for wrong in ({**WORD_MAP, "cat": 1}, {**WORD_MAP, "cat": "2"}, [1, 2, 3], {"a": 0}):
        change(path, word_map=None)
        file = write_map(path.parent, wrong)
        with pytest.raises(UserError, match=f"{file} is not a word map"):
            load_captioner(path, "cpu", file)
        change(path, word_map=wrong)
        refused(path, "is not a word map")


# Conversion


def test_conversion_stores_the_word_map_and_overwrites_nothing(path, models, capsys):
    change(path, word_map=None)
    new, bare = path.parent / "new.pth.tar", path.parent / "bare.pth.tar"
    main([str(path), str(bare)])
    assert f"wrote {bare} ({ENCODER}, no word map" in capsys.readouterr().out
    refused(bare, "pass --word_map")
    main([str(path), str(new), "--word_map", str(write_map(path.parent, WORD_MAP))])
    assert capsys.readouterr().out == f"wrote {new} ({ENCODER}, 6 words)\n"
    *loaded, word_map, checkpoint = load_captioner(new, "cpu")
    assert (word_map, checkpoint["epoch"], checkpoint["bleu4"]) == (WORD_MAP, 3, 21.5)
    assert_same_outputs(loaded, models)
    (path.parent / "link").symlink_to(path)
    (path.parent / "dangling").symlink_to("nowhere")
    before = path.read_bytes()
    for name in (path.name, "link", "dangling"):
        with pytest.raises(UserError, match=f"{path.parent / name} exists already"):
            main([str(path), str(path.parent / name)])
    assert path.read_bytes() == before


def test_half_rounds_matrices_keeps_statistics_and_leaves_out_what_resuming_needs(tmp_path, models):
    old, new, models = tmp_path / "old.pth.tar", tmp_path / "new.pth.tar", copy.deepcopy(models)
    norm = next(m for m in models[0].modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_var.fill_(1e6)  # more than float16 holds
    options = {"epochs": 3, "checkpoint": "/home/me/BEST.pth.tar", "amp": None, "a": ["/b/c"]}
    optimizer = {"state": {0: torch.zeros(99)}}
    save(old, *models, WORD_MAP, optimizer=optimizer, trained=None, options=options)
    main([str(old), str(new), "--half"])
    checkpoint = torch.load(new, weights_only=True)
    assert checkpoint.keys() == {*checkpoints.MODEL_KEYS, "options"}
    assert checkpoint["options"] == options | {"checkpoint": "BEST.pth.tar", "a": ["c"]}
    for model, ours in zip(models, build(load(new), new)):
        for name, weight in model.state_dict().items():
            loaded, small = ours.state_dict()[name], weight.dim() < 2
            assert loaded.dtype == weight.dtype
            assert torch.equal(loaded, weight if small else weight.half().to(weight.dtype)), name


def test_average_is_the_mean_of_several_phases_of_one_model(tmp_path, models):
    a, b, mean, other = (tmp_path / f"{name}.pth.tar" for name in ("a", "b", "mean", "other"))
    save(a, *models, WORD_MAP, options={"epochs": 3}, progress={"epoch": 2})
    later = [copy.deepcopy(model) for model in models]
    with torch.no_grad():
        for weight in (*later[0].parameters(), *later[1].parameters()):
            weight.add_(torch.randn_like(weight))
    later[1].args["dropout"] = 0.3  # may differ between phases
    save(b, *later, WORD_MAP)
    for count in (1, 2):
        main([str(a), str(mean), "--average", *[str(b)] * count])
        assert "progress" not in torch.load(mean, weights_only=True)  # nothing to resume
        for ours, theirs, found in zip(models, later, build(load(mean), mean)):
            for name, weight in found.state_dict().items():
                first, second = (model.state_dict()[name].double() for model in (ours, theirs))
                expected = ((first + count * second) / (1 + count)).to(weight.dtype)
                torch.testing.assert_close(weight, expected, msg=name)
        mean.unlink()
    words = {word: i for i, word in enumerate(reversed(WORD_MAP))}
    save(other, *later, words | {"<pad>": 0, "<end>": words["<pad>"]})
    with pytest.raises(UserError, match="another model or word map than"):
        main([str(a), str(tmp_path / "new"), "--average", str(other)])
    assert not (tmp_path / "new").exists()


# Which file


def test_options_of_a_trained_model_have_short_and_long_spellings():
    parser = Parser()
    checkpoints.add_model_options(parser)
    short = parser.parse_args(["-m", "x.pth.tar", "-wm", "words.json"])
    assert short == parser.parse_args(["--model", "x.pth.tar", "--word_map", "words.json"])
    assert parser.parse_args(["--checkpoint_folder", "runs"]).checkpoint_folder == "runs"


def test_model_is_the_given_one_else_the_folders_else_the_current_folders_else_the_shipped(
    tmp_path, monkeypatch
):
    printed, here, folder = [], tmp_path / "here", tmp_path / "folder"
    for path in (here, folder):
        path.mkdir()
    for name in ("BEST_checkpoint_a.pth.tar", "checkpoint_a.pth.tar", "BEST_checkpoint_a.txt"):
        (folder / name).touch()
    monkeypatch.chdir(here)
    assert find_model("x.pth.tar", folder, printed.append) == "x.pth.tar"
    assert find_model(None, folder, printed.append) == str(folder / "BEST_checkpoint_a.pth.tar")
    with pytest.raises(UserError, match=r"in \.; pass --model FILE, or --checkpoint_folder"):
        find_model(None, ".", printed.append)  # a folder that was passed is not skipped
    assert not printed
    assert find_model(None, None, printed.append) == str(PRETRAINED)
    assert len(printed) == 1 and str(PRETRAINED) in printed[0]
    (here / "BEST_checkpoint_b.pth.tar").touch()
    assert find_model(None, None, printed.append) == "BEST_checkpoint_b.pth.tar"
    assert len(printed) == 2 and "model: BEST_checkpoint_b.pth.tar" in printed[1]
    (here / "BEST_checkpoint_c.pth.tar").touch()
    with pytest.raises(UserError, match="pass --model, one of: BEST_c.*b.*, BEST_c.*c.pth.tar$"):
        find_model(None, None, printed.append)


def test_latest_run_is_found_by_time_not_by_name(tmp_path):
    for seconds, name in ((30, "a"), (50, "b"), (40, "c")):
        for prefix, later in (("", 0), ("BEST_", 99)):
            path = tmp_path / f"{prefix}checkpoint_{name}.pth.tar"
            path.touch()
            os.utime(path, (seconds + later,) * 2)
    assert checkpoints.find_latest(tmp_path) == str(tmp_path / "checkpoint_b.pth.tar")
    with pytest.raises(UserError, match="none; pass --resume FILE, or --checkpoint_folder"):
        checkpoints.find_latest(tmp_path / "none")
