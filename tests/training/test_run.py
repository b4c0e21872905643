"""The checkpoint folder: logs, locks, phases, what is replaced and what is not."""

import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
from functools import partial

import factories
import pytest
import torch
from factories import NAME, contents, load_checkpoint, log_rows, resume_args, same, train_args
from torch.utils.data import get_worker_info

import train
from datasets import CaptionDataset
from modeling.devices import Distributed
from training import run as run_module
from training.run import Run, lock_run
from utils import UserError, exclusive_lock


def test_only_overwrite_replaces_a_run_if_the_new_one_starts(data, run, best, monkeypatch):
    before = contents(run)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for options, message in (
        ("", "checkpoint_.* pass --resume"),
        (f"--checkpoint {best}", "checkpoint_.* pass --resume"),  # of another folder
        ("--overwrite --embeddings gone.txt", "gone.txt"),
        ("--overwrite --tensorboard", "--tensorboard needs"),
    ):
        with pytest.raises(UserError, match=message):
            train.main(train_args(data, run, "--epochs 1", options))
        assert before == contents(run)
    for options in ("--seed 1", f"--checkpoint {best}"):
        train.main(train_args(data, run, "--epochs 1 --overwrite", options))
        assert [row["epoch"] for row in log_rows(run)] == [1]
        assert load_checkpoint(run)["progress"]["rows"] == 0


def test_a_folder_is_of_one_run_in_every_process(tmp_path, monkeypatch):
    """In each, since torchrun prints the traceback of those that wait for the first one."""
    args = train.get_args(["--checkpoint_folder", str(tmp_path), "--data_name", NAME])
    processes = [Distributed(torch.device("cpu"), rank, 2) for rank in (0, 1)]
    impatient = partial(exclusive_lock, timeout=0.1)
    monkeypatch.setattr(run_module, "exclusive_lock", lambda *args, timeout: impatient(*args))
    with lock_run(args, processes[0]):
        with pytest.raises(UserError, match=f"{NAME} .*{tmp_path}.* --checkpoint_folder"):
            lock_run(args, processes[0]).__enter__()
    assert not list(tmp_path.iterdir())
    (tmp_path / f"checkpoint_{NAME}.pth.tar").touch()
    for process in processes:
        pytest.raises(UserError, lock_run(args, process).__enter__).match("pass --resume")


def test_curves_are_drawn_after_each_epoch(data, tmp_path, monkeypatch):
    curves, seen, end_epoch = tmp_path / f"log_{NAME}.png", [], Run.end_epoch

    def record(run, stats):
        seen.append(curves.exists() and curves.read_bytes())
        end_epoch(run, stats)
        seen.append(curves.read_bytes())

    monkeypatch.setattr(Run, "end_epoch", record)
    train.main(train_args(data, tmp_path, "--epochs 2"))
    assert seen[0] is False and seen[1] == seen[2] != seen[3]
    train.main(train_args(data, tmp_path, "--epochs 1 --overwrite"))
    assert seen[4] is False  # not those of the run before


def test_broken_references_are_reported_before_the_first_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
    folder = shutil.copytree(data, tmp_path / "data")
    (folder / f"VAL_REFERENCES_{NAME}.json").write_text("[{")
    arguments = train_args(folder, tmp_path)
    pytest.raises(UserError, train.main, arguments).match("VAL_REFERENCES.* is damaged: ")


def test_the_log_holds_what_is_printed_without_curves_too(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "visualization.curves", None)
    train.main(train_args(data, tmp_path, "--epochs 2"))
    printed, errors = capsys.readouterr()
    assert errors.count(f"log_{NAME}.png was not drawn: ") == 2
    phases = r".* features of 22 images \.\.\.\n.* took \d+ s\n.* features of 6 .*\n.* took \d+ s\n"
    assert re.match(phases + r"training from epoch 1, 2 batches an epoch \.\.\.\nepoch ", printed)
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 2]
    names = "val_loss val_top5 teacher_forced_bleu4 bleu1 captions_per_second lr train_top5"
    for row in log_rows(tmp_path):
        assert f"epoch {row['epoch']:3d}   loss {row['train_loss']:.3f} in " in printed
        assert f"free-running: BLEU-4 {row['bleu4']:.2f}" in printed
        assert all(math.isfinite(value) for value in row.values())
        assert set(names.split()) <= row.keys()
        assert row["captions_per_second"] == pytest.approx(110 / row["train_seconds"])


def test_resume_continues_a_second_phase_from_its_start(data, run, monkeypatch):
    phase = f"--checkpoint {run}/BEST_checkpoint_{NAME}.pth.tar --fine_tune_encoder"
    with monkeypatch.context() as patched:
        patched.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
        pytest.raises(ZeroDivisionError, train.main, train_args(data, run, phase))
    assert load_checkpoint(run)["options"]["fine_tune_encoder"]
    assert [row["epoch"] for row in log_rows(run)] == [1, 2, 3]
    train.main(resume_args(run, "--epochs 2"))
    assert [row["epoch"] for row in log_rows(run)] == [1, 2, 3, 1, 2]  # of both phases


def test_a_phase_interrupted_before_its_start_is_scored_changes_nothing(data, run, monkeypatch):
    """Saved without the score to beat, it would be resumed and replace a better best model."""
    before = contents(run)
    factories.raise_signal_at(monkeypatch, 1, signal.SIGINT, "training.engine.beam_search")
    # A test run in the background may have been started with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        train.main(train_args(data, run, f"--checkpoint {run}/BEST_checkpoint_{NAME}.pth.tar"))
    signal.signal(signal.SIGINT, handler)
    assert "resume" not in str(interrupted.value) and before == contents(run)


def test_a_phase_in_a_new_folder_begins_with_its_best(data, tmp_path, best, capsys):
    # So small a rate that no epoch is better.
    train.main(train_args(data, tmp_path, f"--epochs 1 --checkpoint {best} --decoder_lr 1e-12"))
    before = torch.load(best, weights_only=True)["decoder"]
    assert same(before, load_checkpoint(tmp_path, "BEST_")["decoder"])
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("done after epoch 1: best validation BLEU-4 ")
    source = f"the model that the phase started from, in {tmp_path / best.name}"
    assert printed.endswith(f"from {source}")


def test_fine_tuning_trains_the_decoder_and_blocks_2_to_4_only(data, tmp_path, best, capsys):
    options = f"--checkpoint {best} --fine_tune_encoder --epochs 1 --batch_size 55"
    train.main(train_args(data, tmp_path, options))
    begin, end = "validation of the model to start from ...", "validation of .* took [0-9]+ s"
    assert re.search(f"{begin}\n{end}\nstart ", capsys.readouterr().out)
    before, after = torch.load(best, weights_only=True), load_checkpoint(tmp_path)
    assert before["encoder_args"] == after["encoder_args"]
    pairs = {name: (weight, after["encoder"][name]) for name, weight in before["encoder"].items()}
    changed = {name for name, pair in pairs.items() if not same(*pair)}
    blocks = {int(name.split(".")[2]) for name in changed}  # of mobilenet_v3_small
    assert min(blocks) == 2 and max(blocks) == 12, blocks  # the first two have strides 2 and 4
    assert not any("running" in name for name in changed)
    assert not same(before["decoder"], after["decoder"])


def test_options_that_do_not_suit_the_model_or_each_other_are_named(data, tmp_path, best):
    for options, message in (
        (f"--checkpoint {best} --decoder_dim 64", "decoder_dim 32, not 64; .* --decoder_dim"),
        (f"--checkpoint {best} --encoder resnet18", "encoder mobilenet_v3_small, not resnet18"),
        (f"--checkpoint {best} --embeddings x", "leave --embeddings out"),
        ("--data_name x/../../y", "x/../../y"),
        ("--augment", "--augment .* --fine_tune_encoder .* --no-cache_features"),
        ("--accumulate 12", "--accumulate 12 .* 11 images .* --batch_size"),
    ):
        pytest.raises(UserError, train.main, train_args(data, tmp_path, options)).match(message)


@factories.needs_fork
@pytest.mark.parametrize("split, batch, epoch", [("TRAIN", 5, 0), ("VAL", 1, 0), ("", 0, 1)])
def test_a_killed_loader_ends_a_run_in_one_line(data, tmp_path, monkeypatch, split, batch, epoch):
    """While it loads a batch for training or validation, or, without a split, between epochs"""
    get, batches, end_epoch = CaptionDataset.__getitem__, itertools.count(1), Run.end_epoch

    def killed(self, index):
        if get_worker_info() and split in self.path.name and next(batches) == batch:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    def end_epoch_and_kill(run, stats):
        end_epoch(run, stats)
        for process in multiprocessing.active_children():
            process.kill()

    options = "--no-cache_features --batch_size 10 --epochs 2 --workers 1"
    with monkeypatch.context() as patched:
        patched.setattr(CaptionDataset, "__getitem__", killed)
        patched.setattr(Run, "end_epoch", end_epoch_and_kill)
        with pytest.raises(UserError, match="was killed.* continue with: python train"):
            train.main(train_args(data, tmp_path, options))
    progress = load_checkpoint(tmp_path)["progress"]
    steps = {"TRAIN": range(1, 5), "VAL": [11], "": [0]}[split]
    assert progress["epoch"] == epoch and progress["step"] in steps
    train.main(resume_args(tmp_path, "--workers 0"))
    assert load_checkpoint(tmp_path)["progress"]["epoch"] == 2
