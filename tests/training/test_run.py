"""The checkpoint folder: logs, locks, phases, what is replaced and what is not."""

import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from factories import (
    NAME,
    ROOT,
    load_checkpoint,
    log_rows,
    needs_fork,
    raise_signal_at,
    same,
    train_args,
)
from torch.utils.data import get_worker_info

import train
from datasets import CaptionDataset
from modeling.devices import Distributed
from training.run import Run, lock_run
from utils import UserError


def test_a_run_is_replaced_only_with_overwrite(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="is of an earlier run; pass --resume"):
        train.main(train_args(data, tmp_path, "--epochs", "1"))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    train.main(train_args(data, tmp_path, "--epochs", "2", "--overwrite", "--seed", "1"))
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 2]


def test_curves_are_drawn_after_each_epoch(data, tmp_path, monkeypatch):
    curves, contents, end_epoch = tmp_path / f"log_{NAME}.png", [], Run.end_epoch

    def record(run, stats):
        contents.append(curves.exists() and curves.read_bytes())
        end_epoch(run, stats)
        contents.append(curves.read_bytes())

    monkeypatch.setattr(Run, "end_epoch", record)
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    assert contents[0] is False and contents[1] == contents[2] != contents[3]
    train.main(train_args(data, tmp_path, "--epochs", "1", "--overwrite"))
    assert contents[4] is False  # not those of the run before


def test_curves_that_cannot_be_drawn_are_a_line_and_the_run_goes_on(
    data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "visualization.curves", None)
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    assert capsys.readouterr().err.count(f"log_{NAME}.png was not drawn: ") == 2
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 2]


def test_every_process_stops_with_the_line_that_a_run_is_there(tmp_path):
    """Otherwise torchrun prints the traceback of those that wait for the first one."""
    (tmp_path / f"checkpoint_{NAME}.pth.tar").touch()
    args = train.get_args(["--checkpoint_folder", str(tmp_path), "--data_name", NAME])
    for rank in (0, 1):
        with (
            pytest.raises(UserError, match="is of an earlier run; pass --resume"),
            lock_run(args, Distributed(torch.device("cpu"), rank, 2)),
        ):
            pass


def test_a_run_that_fails_to_start_leaves_the_earlier_run_unchanged(data, tmp_path, monkeypatch):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="gone.txt"):
        train.main(train_args(data, tmp_path, "--overwrite", "--embeddings", "gone.txt"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard needs the package"):
        train.main(train_args(data, tmp_path, "--overwrite", "--tensorboard"))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_two_runs_do_not_train_in_one_folder(data, tmp_path, monkeypatch):
    code = f"""if True:
        import sys; sys.path.insert(0, {str(ROOT)!r})
        from argparse import Namespace
        from training import run
        args = Namespace(checkpoint_folder={str(tmp_path)!r}, data_name={NAME!r})
        lock = run.exclusive_lock
        run.exclusive_lock = lambda path, busy, timeout: lock(path, busy, 0.1)
        try:
            with run.lock_run(args, Namespace(is_main=True)): print("both")
        except run.UserError as error: print(error)
    """
    errors = []
    monkeypatch.setattr(
        train,
        "train",
        lambda *args: errors.append(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
        ),
    )
    train.main(train_args(data, tmp_path))
    assert f"another run of {NAME} is training in" in errors[0]
    assert not list(tmp_path.glob(".train*"))


def test_broken_references_are_reported_before_the_first_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
    path = data / f"VAL_REFERENCES_{NAME}.json"
    whole = path.read_text()
    try:
        path.write_text("[{")
        with pytest.raises(UserError, match="VAL_REFERENCES.* is damaged: "):
            train.main(train_args(data, tmp_path))
    finally:
        path.write_text(whole)


def test_the_log_holds_the_metrics_that_are_printed(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    printed = capsys.readouterr().out
    for row in log_rows(tmp_path):
        assert f"free-running: BLEU-4 {row['bleu4']:.2f}" in printed
        assert all(math.isfinite(value) for value in row.values())
        assert {
            "train_loss",
            "val_loss",
            "val_top5",
            "teacher_forced_bleu4",
            "bleu1",
            "captions_per_second",
            "lr",
        } <= row.keys()


def test_resume_continues_a_second_phase_from_its_start(data, tmp_path, monkeypatch):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(
            [
                "--data_folder",
                str(data),
                "--checkpoint_folder",
                str(tmp_path),
                "--checkpoint",
                str(tmp_path / f"BEST_checkpoint_{NAME}.pth.tar"),
                "--fine_tune_encoder",
                "--device",
                "cpu",
                "--workers",
                "0",
            ]
        )
    assert load_checkpoint(tmp_path)["options"]["fine_tune_encoder"]
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1]
    monkeypatch.undo()
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert [row["epoch"] for row in log_rows(tmp_path)] == [1, 1, 2]  # of both phases


def test_a_phase_interrupted_before_its_start_is_scored_changes_nothing(
    data, tmp_path, monkeypatch
):
    """Saved without the score to beat, it would be resumed and replace a better best model."""
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    raise_signal_at(monkeypatch, 1, signal.SIGINT, "training.engine.beam_search")
    # A test run in the background may have been started with SIGINT ignored.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        train.main(
            [
                "--data_folder",
                str(data),
                "--checkpoint_folder",
                str(tmp_path),
                "--checkpoint",
                str(tmp_path / f"BEST_checkpoint_{NAME}.pth.tar"),
                "--device",
                "cpu",
                "--workers",
                "0",
            ]
        )
    signal.signal(signal.SIGINT, handler)
    assert "resume" not in str(interrupted.value)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_phase_from_another_folder_replaces_a_run_only_with_overwrite(data, tmp_path):
    for folder in ("one", "two"):
        train.main(train_args(data, tmp_path / folder, "--epochs", "1"))
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    phase = train_args(
        data,
        tmp_path / "two",
        "--epochs",
        "1",
        "--checkpoint",
        str(tmp_path / "one" / f"BEST_checkpoint_{NAME}.pth.tar"),
    )
    with pytest.raises(UserError, match="two.*is of an earlier run; pass"):
        train.main(phase)
    assert before == {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    train.main([*phase, "--overwrite"])
    assert len(log_rows(tmp_path / "two")) == 1
    assert load_checkpoint(tmp_path / "two")["progress"]["rows"] == 0


def test_a_phase_in_a_new_folder_starts_with_the_checkpoint_as_its_best(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path / "one", "--epochs", "3"))
    best = tmp_path / "one" / f"BEST_checkpoint_{NAME}.pth.tar"
    # So small a rate that no epoch is better.
    train.main(
        train_args(
            data,
            tmp_path / "two",
            "--epochs",
            "1",
            "--checkpoint",
            str(best),
            "--decoder_lr",
            "1e-12",
        )
    )
    assert same(
        *(load_checkpoint(tmp_path / folder, "BEST_")["decoder"] for folder in ("one", "two"))
    )
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("done after epoch 1: best validation BLEU-4 ") and printed.endswith(
        f"from the model that the phase started from, in {tmp_path / 'two' / best.name}"
    )


def test_fine_tuning_starts_from_the_checkpoint_and_trains_blocks_2_to_4_only(
    data, tmp_path, capsys
):
    train.main(train_args(data, tmp_path / "1", "--epochs", "2"))
    checkpoint = tmp_path / "1" / f"BEST_checkpoint_{NAME}.pth.tar"
    train.main(
        [
            "--data_folder",
            str(data),
            "--checkpoint_folder",
            str(tmp_path / "2"),
            "--checkpoint",
            str(checkpoint),
            "--fine_tune_encoder",
            "--epochs",
            "1",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--batch_size",
            "55",
        ]
    )
    assert "start " in capsys.readouterr().out
    before, after = torch.load(checkpoint, weights_only=True), load_checkpoint(tmp_path / "2")
    assert before["encoder_args"] == after["encoder_args"]
    changed = {
        key.split(".")[1] + "." + key.split(".")[2]
        for key in before["encoder"]
        if not torch.equal(before["encoder"][key], after["encoder"][key])
    }
    assert "0.weight" not in changed  # conv_stem
    assert not any(key.startswith(("1.", "2.0", "2.1")) for key in changed)  # stride 2 and 4
    assert {"2.2", "2.3", "2.4", "2.5", "2.6", "3.weight"} <= changed
    assert not any("running" in key for key in changed)
    assert not same(before["decoder"], after["decoder"])


def test_a_checkpoint_that_differs_from_the_options_names_the_option(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    checkpoint = str(tmp_path / f"checkpoint_{NAME}.pth.tar")
    with pytest.raises(UserError, match="decoder_dim 32, not 64"):
        train.main(["--data_folder", str(data), "--checkpoint", checkpoint, "--decoder_dim", "64"])
    for option in (["--decoder_lr", "1"], ["--fine_tune_encoder"]):
        with pytest.raises(UserError, match="for a new phase pass --checkpoint"):
            train.main(["--resume", checkpoint, *option])
    with pytest.raises(UserError, match="leave --embeddings out"):
        train.main(["--data_folder", str(data), "--checkpoint", checkpoint, "--embeddings", "x"])


@needs_fork
def test_a_killed_loading_process_ends_the_run_in_one_line_with_all_steps_saved(
    data, tmp_path, monkeypatch
):
    get, limit = CaptionDataset.__getitem__, 4

    def killed_at_the_fifth_batch(self, index):
        if get_worker_info() is not None:
            self.batches_read = getattr(self, "batches_read", 0) + 1
            if self.batches_read > limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return get(self, index)

    args = train_args(data, tmp_path, "--no-cache_features", "--batch_size", "10", "--epochs", "1")
    args[args.index("--workers") + 1] = "1"
    monkeypatch.setattr(CaptionDataset, "__getitem__", killed_at_the_fifth_batch)
    with pytest.raises(UserError, match="loads batches was killed, .* continue with: python train"):
        train.main(args)
    step = load_checkpoint(tmp_path)["progress"]["step"]
    assert 0 < step <= 4
    monkeypatch.undo()
    train.main(["--resume", "--checkpoint_folder", str(tmp_path), "--workers", "0"])
    assert load_checkpoint(tmp_path)["progress"]["epoch"] == 1


def test_data_name_cannot_lead_out_of_the_folder(data, tmp_path):
    with pytest.raises(UserError, match="is not the name of a data set: it has a folder in it"):
        train.main([*train_args(data, tmp_path), "--data_name", "x/../../y"])


def test_resuming_a_run_that_is_done_says_so(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    capsys.readouterr()
    train.main(["--resume", "--checkpoint_folder", str(tmp_path), "--epochs", "1"])
    out = capsys.readouterr().out
    assert "1 epoch and 0 batches are done\n" in out
    assert "nothing is left to do: --epochs is 1; pass more to go on" in out
