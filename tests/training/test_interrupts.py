"""Signals: the step is finished, everything saved, and the run continues bit for bit."""

import multiprocessing
import signal
import subprocess
import sys
import time

import pytest
import torch
from factories import (
    NAME,
    ROOT,
    SMALL_ENCODER,
    load_checkpoint,
    log_rows,
    raise_signal_at,
    same,
    timeless_rows,
    train_args,
)

import checkpoints
import train
from modeling.devices import Distributed
from training.interrupts import Interrupted, leave_signals_to_parent
from training.resume import resume_command
from utils import UserError


@pytest.mark.parametrize(
    "call, signum, function, options",
    [
        (1, "SIGTERM", "training.engine.derive_seed", []),
        (2, "SIGINT", "training.engine.doubly_stochastic_loss", []),  # in a validation
        (6, "SIGINT", "training.engine.derive_seed", ["--workers", "2", "--cache_in", "disk"]),
        (2, "SIGTERM", "train.validate", ["--save_minutes", "0"]),  # which checks, then begins
        (
            5,
            "SIGTERM",
            "training.engine.clip_grad_value_",
            [*SMALL_ENCODER, "--single_captions", "--no-cache_features"],
        ),
        (
            3,
            "SIGINT",
            "training.engine.clip_grad_value_",
            [*SMALL_ENCODER, "--amp", "fp16", "--decay_after", "1"],
        ),
        (3, "SIGINT", "training.engine.clip_grad_value_", ["--fine_tune_encoder", "--ema", "0.9"]),
        (2, "SIGINT", "training.state.TrainingState.after_epoch", []),
        (
            6,
            "SIGINT",
            "training.engine.clip_grad_value_",
            ["--ema", "0.9", "--cosine", "--accumulate", "2"],
        ),
        (
            7,
            "SIGTERM",
            "training.engine.clip_grad_value_",
            [
                "--attention",
                "hard",
                "--sampling_max",
                "0.5",
                "--sampling_step",
                "0.3",
                "--sampling_every",
                "1",
            ],
        ),
    ],
    ids=str,
)
def test_a_run_stopped_by_a_signal_continues_bit_for_bit(
    data, tmp_path, monkeypatch, call, signum, function, options
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", "3", "--batch_size", "30", *options]
    train.main(train_args(data, whole, *options))
    with monkeypatch.context() as patched:
        raise_signal_at(patched, call, getattr(signal, signum), function)
        with pytest.raises(Interrupted) as stopped:
            train.main(train_args(data, parts, *options))
    assert stopped.value.code == 128 + getattr(signal, signum)
    last = parts / f"checkpoint_{NAME}.pth.tar"
    assert str(stopped.value).endswith(f"continue with: python train.py --resume {last}")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.main(["--checkpoint_folder", str(parts), "--resume", "--workers", "1"])
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    for key in ("encoder", "decoder", "trained", "optimizer", "scaler", "bleu4"):
        assert same(a[key], b[key]), key
    assert same(*(load_checkpoint(folder, "BEST_")["decoder"] for folder in (whole, parts)))
    assert timeless_rows(whole) == timeless_rows(parts) and len(log_rows(whole)) == 3


@pytest.mark.parametrize("mixed", [False, True], ids=["plain", "mixed"])
def test_stopped_self_critical_training_continues_bit_for_bit(data, tmp_path, monkeypatch, mixed):
    train.main(train_args(data, tmp_path / "1", "--epochs", "4"))
    options = [
        *["--cross_entropy_share", "0.2"] * mixed,
        "--data_folder",
        str(data),
        "--device",
        "cpu",
        "--self_critical",
        "--epochs",
        "2",
        "--checkpoint",
        str(tmp_path / "1" / f"BEST_checkpoint_{NAME}.pth.tar"),
        "--batch_size",
        "30",
        "--checkpoint_folder",
    ]
    train.main([*options, str(tmp_path / "whole")])
    with monkeypatch.context() as patched:
        raise_signal_at(patched, 6, signal.SIGINT)
        with pytest.raises(Interrupted):
            train.main([*options, str(tmp_path / "parts")])
    with pytest.raises(UserError, match="was run with ema 0.0, which --resume cannot change"):
        train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume", "--ema", "0.9"])
    train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume"])
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert same(a["decoder"], b["decoder"]) and same(a["optimizer"], b["optimizer"])
    assert [row["train_reward"] for row in log_rows(tmp_path / "whole")] == [
        row["train_reward"] for row in log_rows(tmp_path / "parts")
    ]


def test_augmented_fine_tuning_continues_bit_for_bit_and_cached_features_are_refused(
    data, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match="--augment needs images, not cached features"):
        train.main(train_args(data, tmp_path, "--augment"))
    options = ["--fine_tune_encoder", "--augment", "--epochs", "1", "--batch_size", "30"]
    train.main(train_args(data, tmp_path / "whole", *options))
    with monkeypatch.context() as patched:
        raise_signal_at(patched, 3, signal.SIGINT)
        with pytest.raises(Interrupted):
            train.main(train_args(data, tmp_path / "parts", *options))
    train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume"])
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    assert same(a["decoder"], b["decoder"]) and same(a["encoder"], b["encoder"])
    train.main(train_args(data, tmp_path / "plain", *[x for x in options if x != "--augment"]))
    assert not same(load_checkpoint(tmp_path / "plain")["encoder"], a["encoder"])


def test_a_second_signal_does_not_interrupt_the_save(data, tmp_path, monkeypatch):
    save, steps = checkpoints.save, []

    def impatient(*args, progress, **kwargs):
        steps.append(progress["step"])
        if len(steps) == 1:
            monkeypatch.setattr("training.interrupts.time.monotonic", lambda: 1e9)  # much later
            signal.raise_signal(signal.SIGINT)
        save(*args, progress=progress, **kwargs)

    monkeypatch.setattr(checkpoints, "save", impatient)
    raise_signal_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(Interrupted, match="after 3 of 4 batches, all saved"):
        train.main(train_args(data, tmp_path, "--epochs", "3", "--batch_size", "30"))
    assert steps == [3] and load_checkpoint(tmp_path)["progress"]["step"] == 3


def test_workers_ignore_signals_except_from_their_parent():
    def serve(ready):
        leave_signals_to_parent()
        ready.send(1)
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready, sender = context.Pipe(False)
    worker = context.Process(target=serve, args=(sender,))
    worker.start()
    ready.recv()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # another process's
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_script_with_the_command_that_continues(data, tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *train_args(data, tmp_path, "--epochs", "1000")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("epoch   1")
    process.send_signal(getattr(signal, signum))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, signum)
    [line] = errors.splitlines()
    assert line.startswith("train.py: stopped in epoch ") and line.endswith(
        f"all saved; continue with: python train.py --resume {tmp_path}/checkpoint_{NAME}.pth.tar"
    )


@pytest.mark.parametrize(
    "world_size, local, command",
    [
        (1, None, "python train.py"),
        (4, "4", "torchrun --nproc_per_node=4 train.py"),
        (
            8,
            "4",
            "torchrun --nproc_per_node=4 --nnodes=2 --rdzv_backend=c10d "
            "--rdzv_endpoint=HOST:PORT train.py",
        ),
    ],
)
def test_the_command_that_continues_starts_as_many_processes(
    monkeypatch, world_size, local, command
):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:  # what torchrun tells each of its processes
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    args = train.get_args(["--checkpoint_folder", "my runs", "--data_name", "x"])
    processes = Distributed(torch.device("cpu"), 0, world_size)
    assert resume_command(args, processes) == f"{command} --resume 'my runs/checkpoint_x.pth.tar'"
