"""Signals: the step is finished, everything saved, and the run continues bit for bit."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import factories
import pytest
import torch
from factories import NAME, ROOT, load_checkpoint, raise_signal_at, same, timeless_rows, train_args
from torch.utils.data import get_worker_info

import checkpoints
import train
from datasets import CaptionDataset
from modeling.devices import Distributed
from training.interrupts import Interrupted, Interrupts
from training.resume import resume_command

STEP, UPDATE = "training.engine.derive_seed", "training.engine.clip_grad_value_"
SAMPLING = "--sampling_max 0.5 --sampling_step 0.3 --sampling_every 1"
CRITICAL = "--self_critical --cross_entropy_share 0.2 --evidence_c 1"


@pytest.mark.parametrize(
    "call, signum, function, options",
    [
        (2, "SIGINT", "training.engine.doubly_stochastic_loss", ""),  # in a validation
        (6, "SIGHUP", STEP, "--workers 2 --cache_in disk --single_captions --decay_after 1"),
        (1, "SIGTERM", UPDATE, "--fine_tune_encoder --ema 0.9 --augment --epochs 1"),
        (1, "SIGINT", "training.state.TrainingState.after_epoch", "--amp fp16"),
        (7, "SIGUSR1", UPDATE, f"--attention hard --ema 0.9 --cosine --accumulate 2 {SAMPLING}"),
        (3, "SIGINT", STEP, f"{CRITICAL} --epochs 1 --checkpoint BEST"),
    ],
)
def test_a_stopped_run_continues_bit_for_bit(
    data, tmp_path, monkeypatch, best, call, signum, function, options
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = f"--epochs 2 --batch_size 30 {options.replace('BEST', str(best))}"
    train.main(train_args(data, whole, options))
    with monkeypatch.context() as patched, pytest.raises(Interrupted) as stopped:
        raise_signal_at(patched, call, getattr(signal, signum), function)
        train.main(train_args(data, parts, options))
    assert stopped.value.code == 128 + getattr(signal, signum)
    last = parts / f"checkpoint_{NAME}.pth.tar"
    assert str(stopped.value).endswith(f"continue with: python train.py --resume {last}")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.main(factories.resume_args(parts, "--workers 1"))
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    for key in ("encoder", "decoder", "trained", "optimizer", "scaler", "bleu4"):
        assert same(a[key], b[key]), key
    assert same(*(load_checkpoint(folder, "BEST_")["decoder"] for folder in (whole, parts)))
    assert timeless_rows(whole) == timeless_rows(parts) and factories.log_rows(whole)


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
        train.main(train_args(data, tmp_path, "--epochs 3 --batch_size 30"))
    assert steps == [3] and load_checkpoint(tmp_path)["progress"]["step"] == 3


@factories.needs_fork
def test_a_signal_ends_the_wait_for_a_batch(data, tmp_path, monkeypatch):
    get, calls = CaptionDataset.__getitem__, itertools.count(1)
    last = tmp_path / f"checkpoint_{NAME}.pth.tar"

    def late(self, index):
        if get_worker_info() and next(calls) == 3:
            time.sleep(1)
            os.kill(os.getppid(), signal.SIGTERM)
            end = time.monotonic() + 20
            while not last.exists() and time.monotonic() < end:
                time.sleep(0.1)
        return get(self, index)

    monkeypatch.setattr(CaptionDataset, "__getitem__", late)
    start, options = time.monotonic(), "--epochs 1 --batch_size 30 --no-cache_features --workers 1"
    with pytest.raises(Interrupted, match="after 2 of 4 batches, all saved"):
        train.main(train_args(data, tmp_path, options))
    assert time.monotonic() - start < 15


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.slow
@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_script_with_the_command_that_continues(data, tmp_path, signum):
    command = [sys.executable, ROOT / "train.py", *train_args(data, tmp_path, "--epochs 1000")]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, **pipes)
    assert any(line.startswith("epoch   1") for line in process.stdout)
    process.send_signal(getattr(signal, signum))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, signum)
    [line] = errors.splitlines()
    assert line.startswith("train.py: stopped in epoch ")
    assert line.endswith(f" train.py --resume {tmp_path}/checkpoint_{NAME}.pth.tar")


def test_the_command_that_continues_starts_as_many_processes(monkeypatch):
    args = train.get_args(["--checkpoint_folder", "my runs", "--data_name", "x"])
    for world_size, local, start in (
        (1, None, "python train.py"),
        (4, "4", "torchrun --nproc_per_node=4 train.py"),
        (8, "4", "torchrun --nproc_per_node=4 --nnodes=2 "),
    ):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if local:  # what torchrun tells each of its processes
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        command = resume_command(args, Distributed(torch.device("cpu"), 0, world_size))
        assert command.startswith(start)
        assert command.endswith(" train.py --resume 'my runs/checkpoint_x.pth.tar'")


def start(args):
    command = [sys.executable, ROOT / "train.py", *args]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def seconds(args):
    begin = time.monotonic()
    assert start(args).wait() == 0
    return time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", ["--epochs 12", "--epochs 3 --fine_tune_encoder --batch_size 55"]
)
def test_training_killed_at_random_moments_ends_in_the_same_weights(tmp_path, options):
    factories.write_scenes(tmp_path, 60, 10, 0, image_size=64)
    options = f"--batch_size 20 {options} --stop_after 99 --save_minutes 0.005"
    whole = seconds(train_args(tmp_path, tmp_path / "whole", options))
    begin = seconds(train_args(tmp_path, tmp_path / "one", options, "--epochs 1"))  # imports mostly
    killed, rng, kills = tmp_path / "killed", random.Random(1), 0
    args = train_args(tmp_path, killed, options)
    while kills < 4:
        process = start(args)
        try:
            assert process.wait(rng.uniform(0.6 * begin, begin + (whole - begin) / 6)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if list(killed.glob("checkpoint_*.pth.tar")):
            args = factories.resume_args(killed, "--workers", rng.randrange(3))
    else:
        assert start(args).wait() == 0
    for prefix in ("", "BEST_"):
        one, other = (load_checkpoint(tmp_path / name, prefix) for name in ("whole", "killed"))
        assert same(one["encoder"], other["encoder"]) and same(one["decoder"], other["decoder"])
        assert one["progress"]["best"] == other["progress"]["best"]
    assert kills >= 1  # the number depends on the machine's speed
