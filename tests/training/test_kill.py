"""A run killed at random moments, repeatedly, ends with the weights of an uninterrupted one."""

import os
import random
import subprocess
import sys
import time

import pytest
from factories import ROOT, load_checkpoint, resume_args, same, train_args, write_scenes

pytestmark = pytest.mark.slow
KILLS = 4


def start(args):
    command = [sys.executable, ROOT / "train.py", *args]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def seconds(args):
    begin = time.monotonic()
    assert start(args).wait() == 0
    return time.monotonic() - begin


@pytest.mark.parametrize(
    "options", ["--epochs 12", "--epochs 3 --fine_tune_encoder --batch_size 55"]
)
def test_training_killed_at_random_moments_ends_in_the_same_weights(tmp_path, options):
    write_scenes(tmp_path, 60, 10, 0, image_size=64)
    options = f"--batch_size 20 {options} --stop_after 99 --save_minutes 0.005"
    whole = seconds(train_args(tmp_path, tmp_path / "whole", options))
    begin = seconds(train_args(tmp_path, tmp_path / "one", options, "--epochs 1"))  # imports mostly
    killed, rng, kills = tmp_path / "killed", random.Random(1), 0
    args = train_args(tmp_path, killed, options)
    while kills < KILLS:
        process = start(args)
        try:
            assert process.wait(rng.uniform(0.6 * begin, begin + (whole - begin) / 6)) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        if list(killed.glob("checkpoint_*.pth.tar")):
            args = resume_args(killed, "--workers", rng.randrange(3))
    else:
        assert start(args).wait() == 0
    for prefix in ("", "BEST_"):
        one, other = (load_checkpoint(tmp_path / name, prefix) for name in ("whole", "killed"))
        assert same(one["encoder"], other["encoder"]) and same(one["decoder"], other["decoder"])
        assert one["progress"]["best"] == other["progress"]["best"]
    assert kills >= 1  # the number depends on the machine's speed
