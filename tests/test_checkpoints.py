"""A checkpoint is whole or absent, builds the same model, and runs no code."""

import copy
import json
import os
import pickle
import resource
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoints import (
    PRETRAINED,
    add_model_options,
    build,
    find_checkpoint,
    find_latest,
    find_model,
    load,
    load_captioner,
    main,
    save,
)
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


@torch.no_grad()
def outputs(encoder, decoder):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator).to(torch.uint8)
    captions = torch.tensor([[[4, 1, 2, 5, 0]], [[4, 2, 1, 3, 5]]])
    return decoder(encoder(images), captions, torch.tensor([[4], [5]]))


def test_saved_model_gives_identical_outputs(path, models):
    encoder, decoder, word_map, checkpoint = load_captioner(path, "cpu")
    assert not encoder.training and not decoder.training
    for ours, theirs in zip(outputs(encoder, decoder), outputs(*models), strict=True):
        assert torch.equal(ours, theirs)
    assert (word_map, checkpoint["epoch"], checkpoint["bleu4"]) == (WORD_MAP, 3, 21.5)
    assert encoder.args == models[0].args and decoder.args == models[1].args
    assert decoder.dropout.p == 0.3


@pytest.mark.parametrize("key", DECODERS)
def test_each_kind_of_decoder_is_loaded_as_what_it_was(key, models, tmp_path):
    encoder, decoder = models
    other = DECODERS[key](**decoder.args | {"attention": key}).eval()
    save(tmp_path / "x.pth.tar", encoder, other, WORD_MAP)
    loaded = load_captioner(tmp_path / "x.pth.tar", "cpu")[1]
    assert type(loaded) is DECODERS[key] and loaded.args["attention"] == key
    for ours, theirs in zip(outputs(encoder, loaded), outputs(encoder, other), strict=True):
        assert torch.equal(ours, theirs)


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


def test_file_holds_tensors_and_plain_values_only(path):
    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value)
            value = list(value.values())
        if isinstance(value, list | tuple):
            for part in value:
                check(part)
        else:
            assert type(value) in (torch.Tensor, int, float, str, bool, type(None))

    check(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    "error, raised",
    [
        (OSError(28, "No space left on device"), "cannot be written: No space left on device"),
        (
            RuntimeError("unexpected pos 64 vs 0\nmore"),
            r"written: unexpected pos 64 vs 0 \(.* GB of the disk are free\)$",
        ),
        (KeyboardInterrupt(), ""),
    ],
)
def test_interrupted_save_leaves_the_old_file_unchanged(path, models, monkeypatch, error, raised):
    def interrupted(state, file):
        Path(file).write_bytes(b"half a checkpoint")
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(UserError if raised else KeyboardInterrupt, match=raised or None):
        save(path, *models, WORD_MAP)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_full_disk_leaves_the_old_file_unchanged(path, models):
    """A limit on file size, which causes a system error like that of a full disk."""
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            save(path, *models, WORD_MAP)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value).startswith(f"{path} cannot be written: ")
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_missing_folder_is_named(path, models):
    for folder in (path.parent / "no", path):
        with pytest.raises(UserError, match=f"{folder}/y cannot be written: "):
            save(folder / "y", *models, WORD_MAP)


def test_saving_again_replaces_the_file(path, models):
    save(path, *models, WORD_MAP, epoch=4)
    assert load(path)["epoch"] == 4 and os.listdir(path.parent) == [path.name]


class Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def refused(path, *what, word_map=None):
    with pytest.raises(UserError) as error:
        load_captioner(path, "cpu", word_map)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert all(part in message for part in what), message


def test_missing_checkpoint_names_the_path(tmp_path):
    refused(tmp_path / "x.pth.tar", "not found")


@pytest.mark.parametrize(
    "content", ["truncated", "empty", "folder", "text", "json", "zip", "zeros", "png"]
)
def test_damaged_or_foreign_file_names_the_path(path, content):
    data = path.read_bytes()
    if content == "folder":
        path.unlink()
        path.mkdir()
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("photo.jpg", "no photo")
    else:
        path.write_bytes(
            {
                "truncated": data[: len(data) // 2],
                "empty": b"",
                "zeros": b"\0" * 5000,
                "text": b"a cat sits\n" * 99,
                "json": json.dumps(WORD_MAP).encode(),
                "png": b"\x89PNG\r\n\x1a\n" + b"x" * 999,
            }[content]
        )
    refused(path)


@pytest.mark.parametrize("length", [1, 2, 10, 100, 1000])
def test_truncated_checkpoint_is_damaged(path, length):
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "damaged")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_truncated_pickle_is_damaged(path, protocol):
    data = pickle.dumps({"format": 1, "word_map": WORD_MAP, "score": 1.5}, protocol)
    for length in range(1, len(data)):
        path.write_bytes(data[:length])
        refused(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_code_in_a_pickle_does_not_run(tmp_path, kind):
    path, proof = tmp_path / "x.pth.tar", tmp_path / "proof"
    content = {"format": 1, "encoder": Evil(proof)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    refused(path, "posix.system", "nothing in the file was run")
    assert not proof.exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(2), {"format": 99}])
def test_file_of_another_program_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth.tar")
    refused(tmp_path / "x.pth.tar", "not a checkpoint of this program's format 1")


@pytest.mark.parametrize("part", ["encoder", "decoder", "encoder_args", "decoder_args"])
def test_missing_part_is_named(path, part):
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[part]
    torch.save(checkpoint, path)
    refused(path, "does not hold a complete model", part)


def test_missing_or_misshapen_tensor_is_named(path):
    checkpoint = torch.load(path, weights_only=True)
    bias = checkpoint["decoder"].pop("fc.bias")
    torch.save(checkpoint, path)
    refused(path, "fc.bias")
    checkpoint["decoder"]["fc.bias"] = bias[:-1]
    torch.save(checkpoint, path)
    refused(path, "fc.bias")


def without_word_map(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["word_map"] = None
    torch.save(checkpoint, path)


def write_map(folder, word_map):
    (folder / "WORDMAP_other.json").write_text(json.dumps(word_map))
    return folder / "WORDMAP_other.json"


def test_word_map_in_the_checkpoint_takes_precedence(path):
    other = write_map(path.parent, dict(WORD_MAP, dog=6))
    assert load_captioner(path, "cpu", other)[2] == WORD_MAP


def test_checkpoint_without_word_map_uses_the_given_file(path):
    without_word_map(path)
    refused(path, "pass --word_map")
    other = {("dog" if word == "cat" else word): i for word, i in WORD_MAP.items()}
    assert load_captioner(path, "cpu", write_map(path.parent, other))[2] == other


def test_word_map_of_another_size_is_refused(path):
    without_word_map(path)
    refused(
        path,
        "was trained on 6 words, but the word map has 7",
        word_map=write_map(path.parent, {**WORD_MAP, "<end>": 6, "dog": 5}),
    )


@pytest.mark.parametrize(
    "other",
    [
        {**WORD_MAP, "cat": 1},
        {**WORD_MAP, "cat": "2"},
        [1, 2, 3],
        {f"word{i}": i for i in range(6)},
    ],
)
def test_invalid_word_map_is_named(path, other):
    without_word_map(path)
    with pytest.raises(UserError, match=f"{path.parent}/WORDMAP_other.json is not a word map"):
        load_captioner(path, "cpu", write_map(path.parent, other))
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "word_map": other}, path)
    refused(path, "is not a word map")


def test_conversion_stores_the_word_map(path, models, capsys):
    without_word_map(path)
    new = path.parent / "new.pth.tar"
    main([str(path), str(new), "--word_map", str(write_map(path.parent, WORD_MAP))])
    assert capsys.readouterr().out == f"wrote {new} ({ENCODER}, 6 words)\n"
    encoder, decoder, word_map, checkpoint = load_captioner(new, "cpu")
    assert (word_map, checkpoint["epoch"], checkpoint["bleu4"]) == (WORD_MAP, 3, 21.5)
    assert torch.equal(outputs(encoder, decoder)[0], outputs(*models)[0])


def test_conversion_without_word_map_says_so(path, capsys):
    without_word_map(path)
    new = path.parent / "new.pth.tar"
    main([str(path), str(new)])
    assert f"wrote {new} ({ENCODER}, no word map" in capsys.readouterr().out
    refused(new, "pass --word_map")


@pytest.mark.parametrize("name", ["x.pth.tar", "link", "dangling"])
def test_conversion_overwrites_nothing(path, name):
    (path.parent / "link").symlink_to(path)
    (path.parent / "dangling").symlink_to("nowhere")
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"{path.parent / name} exists already"):
        main([str(path), str(path.parent / name)])
    assert path.read_bytes() == before


def test_decoder_of_another_encoder_is_refused(path, models):
    other = DecoderWithAttention(5, 4, 6, len(WORD_MAP), 99)
    save(path, models[0], other, WORD_MAP)
    refused(
        path, f"encoder returns vectors of {models[0].encoder_dim} numbers, its decoder takes 99"
    )


def test_build_gives_the_model_of_a_loaded_file(path, models):
    encoder, decoder = build(load(path), path)
    for ours, theirs in zip((encoder, decoder), models):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(
            torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items()
        )


def test_options_of_a_trained_model_have_short_and_long_spellings():
    parser = Parser()
    add_model_options(parser)
    short = parser.parse_args(["-m", "x.pth.tar", "-wm", "words.json"])
    assert short == parser.parse_args(["--model", "x.pth.tar", "--word_map", "words.json"])
    assert parser.parse_args(["--checkpoint_folder", "runs"]).checkpoint_folder == "runs"
    with pytest.raises(UserError, match="--model: expected one argument"):
        parser.parse_args(["-m"])


def test_arguments_and_words_are_checked_as_a_file_is_loaded(path):
    checkpoint = torch.load(path, weights_only=True)
    for part, message in (
        ({"word_map": {**WORD_MAP, "dog": 9}}, "is not a word map"),
        ({"encoder_args": {"name": 3}}, "its encoder has no name"),
        ({"encoder_args": {"name": "x", "stride": 8}}, "stride is not 16 or 32"),
        (
            {"encoder_args": {"name": "x", "image_size": 1 << 20}},
            "image_size is not from 32 to 2048",
        ),
        ({"offset": [0.1, float("nan")]}, "offset is not two fractions"),
        ({"offset": 0.1}, "offset is not two fractions"),
        ({"decoder_args": {}}, "missing 4 required positional arguments"),
    ):
        torch.save({**checkpoint, **part}, path)
        with pytest.raises(UserError, match=message):
            load(path)


def test_only_best_checkpoint_is_found(tmp_path):
    for name in ("BEST_checkpoint_a.pth.tar", "checkpoint_a.pth.tar", "BEST_checkpoint_a.txt"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path) == str(tmp_path / "BEST_checkpoint_a.pth.tar")


def test_model_is_the_given_one_else_that_of_the_folder_else_the_current_folder_else_the_shipped(
    tmp_path, monkeypatch
):
    printed, here, folder = [], tmp_path / "here", tmp_path / "folder"
    for path in (here, folder):
        path.mkdir()
    (folder / "BEST_checkpoint_a.pth.tar").touch()
    monkeypatch.chdir(here)
    assert find_model("x.pth.tar", folder, printed.append) == "x.pth.tar"
    assert find_model(None, folder, printed.append) == str(folder / "BEST_checkpoint_a.pth.tar")
    with pytest.raises(UserError, match="pass --model FILE, or --checkpoint_folder"):
        find_model(None, ".", printed.append)  # a folder that was passed is not skipped
    assert not printed
    assert find_model(None, None, printed.append) == str(PRETRAINED)
    assert len(printed) == 1 and str(PRETRAINED) in printed[0]
    (here / "BEST_checkpoint_b.pth.tar").touch()
    assert find_model(None, None, printed.append) == "BEST_checkpoint_b.pth.tar"
    assert len(printed) == 2 and "model: BEST_checkpoint_b.pth.tar" in printed[1]


def test_half_rounds_matrices_keeps_statistics_and_leaves_out_what_resuming_needs(tmp_path, models):
    old, new, models = tmp_path / "old.pth.tar", tmp_path / "new.pth.tar", copy.deepcopy(models)
    next(m for m in models[0].modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var.fill_(
        1e6
    )  # more than float16 holds
    save(
        old,
        *models,
        WORD_MAP,
        optimizer={"state": {0: torch.zeros(99)}},
        trained=None,
        options={"epochs": 3, "checkpoint": "/home/me/BEST.pth.tar", "amp": None},
    )
    main([str(old), str(new), "--half"])
    checkpoint = torch.load(new, weights_only=True)
    assert checkpoint.keys() == {
        "format",
        "encoder",
        "encoder_args",
        "decoder",
        "decoder_args",
        "offset",
        "word_map",
        "options",
    }
    assert checkpoint["options"] == {"epochs": 3, "checkpoint": "BEST.pth.tar", "amp": None}
    for model, ours in zip(models, load_captioner(new, "cpu")):
        for name, weight in model.state_dict().items():
            loaded = ours.state_dict()[name]
            small = weight.dim() < 2
            assert loaded.dtype == weight.dtype
            assert torch.equal(loaded, weight if small else weight.half().to(weight.dtype)), name


def test_average_is_the_mean_of_two_phases_of_one_model(tmp_path, models, capsys):
    paths = [tmp_path / f"{name}.pth.tar" for name in ("a", "b", "mean", "other")]
    save(paths[0], *models, WORD_MAP, options={"epochs": 3}, progress={"epoch": 2})
    later = [copy.deepcopy(model) for model in models]
    with torch.no_grad():
        for weight in (*later[0].parameters(), *later[1].parameters()):
            weight.add_(torch.randn_like(weight))
    later[1].args["dropout"] = 0.3  # may differ between phases
    save(paths[1], *later, WORD_MAP)
    main([*map(str, (paths[0], paths[2], "--average", paths[1]))])
    assert "progress" not in torch.load(paths[2], weights_only=True)  # nothing to resume
    for a, b, mean in zip(models, later, load_captioner(paths[2], "cpu")):
        for name, weight in mean.state_dict().items():
            torch.testing.assert_close(
                weight,
                ((a.state_dict()[name].double() + b.state_dict()[name].double()) / 2).to(
                    weight.dtype
                ),
                msg=name,
            )
    main([*map(str, (paths[0], tmp_path / "three", "--average", paths[1], paths[1]))])
    for a, b, mean in zip(models, later, load_captioner(tmp_path / "three", "cpu")):
        for name, weight in mean.state_dict().items():
            torch.testing.assert_close(
                weight,
                ((a.state_dict()[name].double() + 2 * b.state_dict()[name].double()) / 3).to(
                    weight.dtype
                ),
                msg=name,
            )
    other = {word: i for i, word in enumerate(reversed(WORD_MAP))}
    save(paths[3], *later, other | {"<pad>": 0, "<end>": other["<pad>"]})
    with pytest.raises(UserError, match="another model or word map than"):
        main([*map(str, (paths[0], tmp_path / "new", "--average", paths[3]))])
    assert not (tmp_path / "new").exists()


def test_no_checkpoint_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"in {tmp_path}; pass --"):
        find_checkpoint(tmp_path)


def test_latest_run_is_found_by_time_not_by_name(tmp_path):
    for seconds, name in ((30, "a"), (50, "b"), (40, "c")):
        for prefix, later in (("", 0), ("BEST_", 99)):
            path = tmp_path / f"{prefix}checkpoint_{name}.pth.tar"
            path.touch()
            os.utime(path, (seconds + later,) * 2)
    assert find_latest(tmp_path) == str(tmp_path / "checkpoint_b.pth.tar")
    with pytest.raises(UserError, match="none; pass --resume FILE, or --checkpoint_folder"):
        find_latest(tmp_path / "none")


def test_several_checkpoints_are_listed(tmp_path):
    files = [tmp_path / f"BEST_checkpoint_{name}.pth.tar" for name in "ab"]
    for file in files:
        file.touch()
    with pytest.raises(UserError, match=f"pass --model, one of: {files[0]}, {files[1]}$"):
        find_checkpoint(tmp_path)
