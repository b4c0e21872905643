"""A checkpoint is whole or absent, builds the same model, and runs no code."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from checkpoints import build, find_checkpoint, load, load_captioner, save
from datasets import UserError
from models import DecoderWithAttention, Encoder

WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
ENCODER = "mobilenetv3_small_050"  # timm's smallest: 1.2 MB without its head


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    encoder = Encoder(encoded_image_size=7, name=ENCODER, weights="none")
    return encoder.eval(), DecoderWithAttention(5, 4, 6, len(WORD_MAP), encoder.encoder_dim, 0.3,
                                                encoded_image_size=7).eval()


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


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_save_leaves_the_old_file_whole(path, models, monkeypatch, error):
    def interrupted(state, file):
        Path(file).write_bytes(b"half a checkpoint")
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(type(error)):
        save(path, *models, WORD_MAP)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_saving_again_replaces_the_file(path, models):
    save(path, *models, WORD_MAP, epoch=4)
    assert load(path)["epoch"] == 4 and os.listdir(path.parent) == [path.name]


class Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def refused(path, *what):
    with pytest.raises(UserError) as error:
        load_captioner(path, "cpu")
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    assert all(part in message for part in what), message


def test_missing_checkpoint_names_the_path(tmp_path):
    refused(tmp_path / "x.pth.tar", "not found")


@pytest.mark.parametrize("content", ["truncated", "empty", "folder", "text", "json", "zip",
                                     "zeros", "png"])
def test_damaged_or_foreign_file_names_the_path(path, content):
    data = path.read_bytes()
    if content == "folder":
        path.unlink()
        path.mkdir()
    elif content == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("photo.jpg", "no photo")
    else:
        path.write_bytes({"truncated": data[:len(data) // 2], "empty": b"", "zeros": b"\0" * 5000,
                          "text": b"a cat sits\n" * 99, "json": json.dumps(WORD_MAP).encode(),
                          "png": b"\x89PNG\r\n\x1a\n" + b"x" * 999}[content])
    refused(path)


@pytest.mark.parametrize("length", [1, 2, 10, 100, 1000])
def test_start_of_a_checkpoint_is_damaged(path, length):
    path.write_bytes(path.read_bytes()[:length])
    refused(path, "damaged")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_start_of_a_pickle_is_damaged(path, protocol):
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
    refused(path, "damaged or not a checkpoint")
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
    refused(path, "does not hold a whole model", part)


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


def test_files_word_map_beats_the_callers(path):
    other = write_map(path.parent, dict(WORD_MAP, dog=6))
    assert load_captioner(path, "cpu", other)[2] == WORD_MAP


def test_file_without_word_map_takes_the_callers(path):
    without_word_map(path)
    refused(path, "pass --word_map")
    other = {("dog" if word == "cat" else word): i for word, i in WORD_MAP.items()}
    assert load_captioner(path, "cpu", write_map(path.parent, other))[2] == other


@pytest.mark.parametrize("other", [
    {**WORD_MAP, "dog": 6}, {"<pad>": 0, "<start>": 1, "<end>": 2},
    {**{f"word{i}": i for i in range(5)}, "<start>": 5}])
def test_word_map_that_does_not_fit_is_refused(path, other):
    without_word_map(path)
    with pytest.raises(UserError, match=f"{path} was trained on 6 words"):
        load_captioner(path, "cpu", write_map(path.parent, other))


def test_build_gives_the_model_of_a_loaded_file(path, models):
    encoder, decoder = build(load(path), path)
    for ours, theirs in zip((encoder, decoder), models):
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[key])
                   for key, value in ours.state_dict().items())


def test_only_best_checkpoint_is_found(tmp_path):
    for name in ("BEST_checkpoint_a.pth.tar", "checkpoint_a.pth.tar", "BEST_checkpoint_a.txt"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path) == str(tmp_path / "BEST_checkpoint_a.pth.tar")


def test_no_checkpoint_names_the_folder(tmp_path):
    with pytest.raises(UserError, match=f"in {tmp_path}; run python train.py first"):
        find_checkpoint(tmp_path)


def test_several_checkpoints_are_listed(tmp_path):
    files = [tmp_path / f"BEST_checkpoint_{name}.pth.tar" for name in "ab"]
    for file in files:
        file.touch()
    with pytest.raises(UserError, match=f"pass --model, one of: {files[0]}, {files[1]}$"):
        find_checkpoint(tmp_path)
