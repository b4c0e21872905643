"""
SIGKILL at random moments, repeatedly, until the job is done: the files equal those of an
uninterrupted run, weights bit for bit. Slow: `make test-slow`, or python -m pytest -m slow.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from factories import ENCODER, write_scenes

from preprocessing.demo import make_demo

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
pytestmark = pytest.mark.slow


def seconds(command):
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    return time.monotonic() - start


def run_with_kills(command, again, kills, shortest, longest, rng):
    """Start the command, kill it `kills` times, each time starting `again`; then let it end."""
    for kill in range(kills):
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        try:
            process.wait(rng.uniform(shortest, longest))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        else:  # it ended before the kill
            assert process.returncode == 0, process.stderr.read()
            return kill
        command = again()
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, env=ENVIRONMENT, text=True
    )
    assert done.returncode == 0, done.stderr
    return kills


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def test_preprocessing_killed_at_random_moments_leaves_the_same_bytes(tmp_path):
    scenes = make_demo(tmp_path / "demo", 600, 100, 100)

    def command(folder, workers):
        return [
            str(ROOT / "create_input_files.py"),
            "--karpathy_json",
            str(scenes),
            "--image_folder",
            str(tmp_path / "demo"),
            "--output_folder",
            str(tmp_path / folder),
            "--workers",
            str(workers),
        ]

    whole = seconds([sys.executable, *command("whole", 1)])
    rng, kills = random.Random(0), 0
    for attempt in range(99):
        if kills >= 30:
            break
        folder = f"killed{attempt}"
        commands = (command(folder, workers) for workers in [1, 2, 1, 2, 1, 2, 1, 2, 1, 2])
        kills += run_with_kills(
            next(commands), lambda c=commands: next(c), 8, 0.5 * whole, 1.02 * whole, rng
        )
        assert contents(tmp_path / folder) == contents(tmp_path / "whole")
    print(f"{kills} kills of preprocessing, {whole:.1f} s uninterrupted")
    assert kills >= 30


@pytest.mark.parametrize("options", [[], ["--fine_tune_encoder", "--batch_size", "55"]], ids=str)
def test_training_killed_at_random_moments_ends_in_the_same_weights(tmp_path, options):
    write_scenes(tmp_path, 60, 10, 0)

    epochs = 6 if options else 60

    def command(folder, epochs=epochs):
        return [
            str(ROOT / "train.py"),
            "--data_folder",
            str(tmp_path),
            "--checkpoint_folder",
            str(tmp_path / folder),
            *ENCODER,
            "--decoder_dim",
            "64",
            "--attention_dim",
            "32",
            "--emb_dim",
            "16",
            "--decoder_lr",
            "5e-3",
            "--epochs",
            str(epochs),
            "--stop_after",
            "99",
            "--batch_size",
            "20",
            "--save_minutes",
            "0.005",
            "--device",
            "cpu",
            *options,
        ]

    whole = seconds([sys.executable, *command("whole")])
    begin = seconds([sys.executable, *command("one", 1)])  # mostly imports

    def again():
        folder = tmp_path / "killed"
        if list(folder.glob("checkpoint_*.pth.tar")):
            rest = ["--resume", "--checkpoint_folder", str(folder)]
            return [str(ROOT / "train.py"), *rest, "--workers", str(rng.randrange(3))]
        return command("killed")

    rng = random.Random(1)
    kills = run_with_kills(
        command("killed"), again, 18, 0.6 * begin, begin + (whole - begin) / 20, rng
    )
    print(f"{kills} kills of training, {whole:.1f} s uninterrupted")
    for prefix in ("", "BEST_"):
        one, other = (
            torch.load(
                next((tmp_path / folder).glob(f"{prefix}checkpoint_*.pth.tar")), weights_only=True
            )
            for folder in ("whole", "killed")
        )
        for part in ("encoder", "decoder"):
            assert one[part].keys() == other[part].keys()
            for name, tensor in one[part].items():
                assert torch.equal(tensor, other[part][name]), name
        assert one["progress"]["best"] == other["progress"]["best"]
    assert kills >= 5  # the number depends on the machine's speed
