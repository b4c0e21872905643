"""A resumed run equals one that was never interrupted."""

import math
import signal
from pathlib import Path

import pytest
import torch
from factories import (
    NAME,
    load_checkpoint,
    log_rows,
    raise_signal_at,
    same,
    timeless_rows,
    train_args,
)

import checkpoints
import train
from training.interrupts import Interrupted
from utils import UserError


def test_resumed_run_equals_uninterrupted(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(train_args(data, whole, "--epochs", "4"))
    train.main(train_args(data, parts, "--epochs", "2"))
    half = load_checkpoint(parts)
    # Only changed options are passed: the others come from the checkpoint.
    train.main(["--checkpoint_folder", str(parts), "--resume", "--epochs", "4"])  # on its device
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    for key in ("encoder", "decoder", "optimizer", "progress", "bleu4"):
        assert same(a[key], b[key]), key
    assert not same(half["decoder"], b["decoder"])
    assert [row["epoch"] for row in log_rows(whole)] == [1, 2, 3, 4]
    assert timeless_rows(whole) == timeless_rows(parts)


def test_a_run_saved_within_an_epoch_continues_bit_for_bit(data, tmp_path, monkeypatch):
    """As after SIGKILL: the last checkpoint is all that is left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saved = []

    def keep(path, *args, **kwargs):
        checkpoints_save(path, *args, **kwargs)
        saved.append((Path(path).read_bytes(), kwargs["progress"]["step"]))

    checkpoints_save = checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", keep)
        train.main(
            train_args(data, whole, "--epochs", "1", "--batch_size", "30", "--save_minutes", "0")
        )
    # Four batches, the last before validation; then the best and the last checkpoint.
    assert [step for _, step in saved] == [1, 2, 3, 4, 0, 0]
    parts.mkdir()
    for content, step in saved[:4]:
        (parts / f"checkpoint_{NAME}.pth.tar").write_bytes(content)
        train.main(["--checkpoint_folder", str(parts), "--resume"])
        for key in ("decoder", "optimizer"):
            assert same(load_checkpoint(whole)[key], load_checkpoint(parts)[key]), step


def test_a_failed_validation_leaves_the_epoch_saved(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train, "validate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    assert load_checkpoint(tmp_path)["progress"]["step"] == 4
    train.main(["--checkpoint_folder", str(tmp_path), "--resume"])
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1]


def test_options_of_every_type_are_resumed(data, tmp_path):
    train.main(
        train_args(
            data,
            tmp_path,
            "--epochs",
            "1",
            "--save_minutes",
            "0.5",
            "--dropout",
            "0",
            "--alpha_c",
            "1",
            "--grad_clip",
            "2",
            "--cache_in",
            "ram",
        )
    )
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert load_checkpoint(tmp_path)["options"]["save_minutes"] == 0.5


def test_a_run_saved_with_an_option_that_is_gone_is_resumed(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["options"]["document_frequencies"] = ["text.txt.gz"]
    torch.save(checkpoint, path)
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 2]


def test_a_truncated_row_of_the_log_is_written_again(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    log = tmp_path / f"log_{NAME}.jsonl"
    log.write_text(log.read_text() + '{"epoch": 3, "lr"')
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "3"])
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 2, 3]


def test_a_run_of_the_version_before_cider_d_is_resumed(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    for new in ("trained", "baseline"):
        checkpoint.pop(new, None), checkpoint["progress"].pop(new, None)
    for option in ("attention", "self_critical", "ema", "cosine", "augment"):
        checkpoint["options"].pop(option)
    checkpoint["progress"]["best_bleu4"] = checkpoint["progress"].pop("best") + 50
    torch.save(checkpoint, path)
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    progress = load_checkpoint(tmp_path)["progress"]
    assert progress["best"] >= 50 and progress["epoch"] == 2


def test_a_resumed_run_must_find_its_data_and_batches_unchanged(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        raise_signal_at(patched, 2, signal.SIGINT)
        with pytest.raises(Interrupted):
            train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    resume = ["--checkpoint_folder", str(tmp_path), "--resume"]
    for option in (["--batch_size", "40"], ["--seed", "3"], ["--single_captions"]):
        with pytest.raises(UserError, match=f"was run with {option[0][2:]} "):
            train.main([*resume, *option])
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["data"] |= {"images": 21, "captions": "00000000"}
    torch.save(checkpoint, path)
    with monkeypatch.context() as patched:  # said before hours of work on the wrong data
        patched.setattr(train, "build_model", lambda *args: 1 / 0)
        with pytest.raises(UserError, match="other data: images 21, now 22, captions 00000000, "):
            train.main(resume)
    word_map = checkpoint["word_map"]
    word_map["<unk>"], word_map["<start>"] = word_map["<start>"], word_map["<unk>"]
    del checkpoint["data"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match="the id of '<start>' is 30 there and 31 here"):
        train.main(resume)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"self_critical": True, "single_captions": True},
            "--single_captions is for training on true",
        ),
        ({"attention": "purple"}, "is damaged: its option attention is 'purple'"),
        ({"ema": 0.5}, "it lacks the weights that were being averaged"),
        (
            {"cosine": True, "batch_size": 40},
            "run with batch_size 40, which --resume cannot change",
        ),
        ({"cosine": True}, "was run with epochs 1, which --resume cannot change"),
        (
            {"embeddings": "glove.txt"},
            "run with embeddings glove.txt, which --resume cannot change",
        ),
    ],
)
def test_contradicting_options_of_a_run_are_one_line_errors(data, tmp_path, options, message):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["options"] |= options
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=message) as error:
        train.main(
            [
                "--checkpoint_folder",
                str(tmp_path),
                "--resume",
                "--epochs",
                "2",
                *["--batch_size", "80"] * ("batch_size" in options),
                *["--embeddings", "other.txt"] * ("embeddings" in options),
            ]
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("options", {"epochs": "many"}, "its option epochs is 'many'"),
        ("options", {"batch_size": [80]}, "its option batch_size is"),
        ("options", {"data_folder": None}, "its option data_folder is"),
        ("progress", {"epoch": -1}, "its progress is not valid"),
        ("progress", {"sums": [1, 2]}, "its progress is not valid"),
        ("progress", {"step": 999}, "999 of 2 batches are done"),
        ("optimizer", {"param_groups": []}, "does not fit this run"),
        ("optimizer", {"state": {0: {"step": "x"}}}, "does not fit this run"),
        ("optimizer", {"state": {}}, "averages of gradients are missing"),
        ("lr", "x", "has other settings"),
        ("betas", None, "has other settings"),
        ("options", {"dropout": math.nan}, "its option dropout is nan"),
        ("progress", {"best": None}, "its progress is not valid"),
        ("data", 5, "does not say what data"),
        ("decoder_args", {"decoder_dim": 33}, "does not hold a complete model"),
        ("decoder_args", 5, "does not hold a complete model"),
        ("word_map", [], "is not a word map"),
        ("word_map", {5: 5}, "is not a word map"),
        (
            "optimizer",
            {
                "state": {
                    0: {
                        "step": torch.tensor(1.0),
                        "exp_avg": torch.zeros(2),
                        "exp_avg_sq": torch.zeros(2),
                    }
                }
            },
            "have other sizes",
        ),
    ],
    ids=str,
)
def test_a_damaged_or_hostile_run_is_a_one_line_error(data, tmp_path, part, change, message):
    if not (data / "run").exists():
        train.main(train_args(data, data / "run", "--epochs", "1"))
    checkpoint = load_checkpoint(data / "run")
    if part in ("lr", "betas"):
        checkpoint["optimizer"]["param_groups"][0][part] = change
    elif isinstance(change, dict):
        checkpoint[part] |= change
    else:
        checkpoint[part] = change
    torch.save(checkpoint, tmp_path / "x.pth.tar")
    with pytest.raises(UserError, match=message):
        train.main(["--resume", str(tmp_path / "x.pth.tar"), "--epochs", "2"])


@pytest.mark.parametrize("start", ["--resume", "--checkpoint"])
def test_options_are_parsed_once_whatever_file_a_run_starts_from(
    data, tmp_path, monkeypatch, start
):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = str(tmp_path / f"checkpoint_{NAME}.pth.tar")
    parsed, parse_args = [], train.Parser.parse_args
    monkeypatch.setattr(
        train.Parser, "parse_args", lambda *args: parsed.append(1) or parse_args(*args)
    )
    args, _ = train.get_options_and_checkpoint([start, path, "--epochs", "2"])
    assert len(parsed) == 1 and (args.decoder_dim, args.epochs) == (32, 2)
    assert getattr(args, start[2:]) == path


def test_help_needs_no_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--help"])
    assert end.value.code == 0 and "--stop_after" in capsys.readouterr().out
