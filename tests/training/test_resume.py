"""A resumed run equals one that was never interrupted."""

import math
import shutil
import signal
from pathlib import Path

import factories
import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, resume_args, same, timeless_rows, train_args

import checkpoints
import train
from training.interrupts import Interrupted
from utils import UserError


def change(folder, **parts):
    """Change parts of the run's checkpoint, whose path is returned."""
    path = folder / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    for part, value in parts.items():
        checkpoint[part] = checkpoint[part] | value if isinstance(value, dict) else value
    torch.save(checkpoint, path)
    return path


def test_resumed_run_equals_uninterrupted(data, finished, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs 1 --batch_size 30"))
    log = tmp_path / f"log_{NAME}.jsonl"
    log.write_text(log.read_text() + '{"epoch": 2, "lr"')  # cut off when the run was killed
    # Only changed options are passed: the others come from the checkpoint.
    train.main(resume_args(tmp_path, "--epochs 3"))  # on its device
    a, b = load_checkpoint(finished), load_checkpoint(tmp_path)
    for key in ("encoder", "decoder", "optimizer", "bleu4"):
        assert same(a[key], b[key]), key
    for progress in (a["progress"], b["progress"]):
        progress["sums"][-1] = 0  # seconds
    assert a["progress"] == b["progress"]
    assert [row["epoch"] for row in log_rows(finished)] == [1, 2, 3]
    assert timeless_rows(finished) == timeless_rows(tmp_path)


def test_a_run_saved_within_an_epoch_continues_bit_for_bit(data, tmp_path, monkeypatch):
    """As after SIGKILL: the last checkpoint is all that is left."""
    whole, parts, saved, save = tmp_path / "whole", tmp_path / "parts", [], checkpoints.save

    def keep(path, *args, **kwargs):
        save(path, *args, **kwargs)
        saved.append((Path(path).read_bytes(), kwargs["progress"]["step"]))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", keep)
        train.main(train_args(data, whole, "--epochs 1 --batch_size 30 --save_minutes 0"))
    # Four batches, the last before validation; then the best and the last checkpoint.
    assert [step for _, step in saved] == [1, 2, 3, 4, 0, 0]
    parts.mkdir()
    for content, step in saved[:4]:
        (parts / f"checkpoint_{NAME}.pth.tar").write_bytes(content)
        train.main(resume_args(parts))
        for key in ("decoder", "optimizer"):
            assert same(load_checkpoint(whole)[key], load_checkpoint(parts)[key]), step


def test_a_run_of_an_older_version_or_a_newer_torch_is_resumed(run):
    checkpoint = load_checkpoint(run)
    for new in ("trained", "data", "scaler"):
        del checkpoint[new]
    for option in ("attention", "self_critical", "ema", "cosine", "augment"):
        del checkpoint["options"][option]
    checkpoint["options"]["document_frequencies"] = ["text.txt.gz"]  # it is gone
    progress = checkpoint["progress"]
    del progress["baseline"], progress["best_loss"]
    progress["best_bleu4"], progress["of_another_version"] = progress.pop("best") + 50, 1
    for group in checkpoint["optimizer"]["param_groups"]:
        for name in group.keys() - {"params", "lr"}:
            del group[name]
        group["of_another_torch"] = True
    torch.save(checkpoint, run / f"checkpoint_{NAME}.pth.tar")
    train.main(resume_args(run, "--epochs 4"))
    resumed = load_checkpoint(run)
    assert resumed["progress"]["best"] >= 50 and resumed["progress"]["epoch"] == 4
    [group] = resumed["optimizer"]["param_groups"]
    assert "of_another_torch" not in group and "betas" in group


def test_a_resumed_run_must_find_its_data_and_batches_unchanged(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        factories.raise_signal_at(patched, 2, signal.SIGINT)
        train.main(train_args(data, tmp_path, "--epochs 1 --batch_size 30"))
    for option in ("--batch_size 40", "--seed 3", "--single_captions", "--accumulate 2"):
        with pytest.raises(UserError, match=f"was run with {option.split()[0][2:]} "):
            train.main(resume_args(tmp_path, option))
    change(tmp_path, data={"images": 21, "captions": "00000000"})
    with monkeypatch.context() as patched:  # said before hours of work on the wrong data
        patched.setattr(train, "build_model", lambda *args: 1 / 0)
        with pytest.raises(UserError, match="other data.* 21, .* 22, .* pass their --data_folder"):
            train.main(resume_args(tmp_path))
    words = load_checkpoint(tmp_path)["word_map"]
    change(tmp_path, data=None, word_map={"<unk>": words["<start>"], "<start>": words["<unk>"]})
    with pytest.raises(UserError, match="with another word map .* pass the --data_folder"):
        train.main(resume_args(tmp_path))


def test_a_run_that_is_damaged_or_contradicts_the_options_is_a_one_line_error(finished, tmp_path):
    wrong = {"attention": "purple", "decoder_lr": math.nan, "epochs": math.nan, "batch_size": "30"}
    wrong |= {"seed": 1 << 80, "cosine": math.nan, "data_folder": 5, "pretrain_text": "x"}
    for part, value, options, message in (
        ("options", {}, "--decoder_lr 1", "decoder_lr 0.005, .* pass --checkpoint"),
        ("options", {}, "--fine_tune_encoder", "run with fine_tune_encoder False"),
        ("options", {}, "--self_critical", "run with self_critical False"),
        ("options", {"ema": 0.5}, "", "does not fit this run"),
        ("options", {"cosine": True}, "--batch_size 80", "run with batch_size 30"),
        ("options", {"cosine": True}, "", "run with epochs 3, which --resume cannot change"),
        ("options", {"self_critical": True}, "--single_captions", "--single_captions is for"),
        *(("options", {name: x}, "", f"its option {name} is ") for name, x in wrong.items()),
        ("optimizer", {"param_groups": []}, "", "does not fit this run"),
        ("progress", 5, "", "not a run to resume"),
        ("progress", {"epoch": "x"}, "", "does not fit this run"),
        ("progress", {"step": math.nan}, "", "does not fit this run"),
        ("decoder_args", {"decoder_dim": 33}, "", "does not hold a complete model"),
        ("word_map", [], "", "is not a word map"),
    ):
        shutil.copy(finished / f"checkpoint_{NAME}.pth.tar", tmp_path)
        path = change(tmp_path, **{part: value})
        with pytest.raises(UserError, match=message) as error:
            train.main(f"--resume {path} --epochs 4 {options}".split())
        assert "\n" not in str(error.value) and (str(path) in str(error.value) or options)
    with pytest.raises(UserError, match="is a model, not a run to resume; pass it as --checkpoint"):
        train.main(["--resume", str(checkpoints.PRETRAINED)])


def test_resuming_a_run_that_is_done_says_so(run, capsys):
    train.main(resume_args(run, "--epochs 3"))
    out = capsys.readouterr().out
    assert "3 epochs and 0 batches are done\n" in out
    assert "nothing is left to do: --epochs is 3; pass more to go on" in out
    assert "training from" not in out


def test_a_folder_that_a_resumed_run_misses_is_asked_for(run, tmp_path, monkeypatch):
    """Relative ones, from another folder; no features are encoded again for hours."""
    monkeypatch.chdir(tmp_path)
    data = load_checkpoint(run)["options"]["data_folder"]
    for option in ("data_folder", "features_folder"):
        (tmp_path / "data").mkdir(exist_ok=True)
        change(run, options={"data_folder": data, option: "data" if "data_" in option else "gone"})
        with monkeypatch.context() as patched:
            patched.setattr(train, "load_splits", lambda *args: 1 / 0)
            with pytest.raises(UserError, match=f"run with --{option} .*; pass --{option}"):
                train.main(resume_args(run, "--epochs 4"))
    for options in ("--no-cache_features", "--features_folder new"):
        train.main(resume_args(run, options))
    assert not (tmp_path / "gone").exists() and list((tmp_path / "new").iterdir())
