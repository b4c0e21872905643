"""Two processes compute what one computes."""

import json
import math
import time

import pytest
import torch
from factories import ROOT, load_checkpoint, log_rows, run_script, same, train_args

import train
from models import Encoder

pytestmark = pytest.mark.slow


def run(script, *args, processes):
    result = run_script(script, *args, processes=processes)
    assert result.returncode == 0, result.stderr
    return result.stdout


def patched_script(path, patch):
    """A script that changes something and then runs train.py"""
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{patch}\ntrain.main()\n")
    return path


@pytest.mark.parametrize("more", ["--accumulate 3", "--fine_tune_encoder --encoder_lr 1e-2"])
def test_two_processes_compute_the_gradient_of_one_on_the_joint_batch(data, tmp_path, more):
    """Plain gradient steps show the gradients; 11 images are 6 for one process, 5 for the other."""
    patch = "import torch, train; from torch.optim import SGD\n"
    patch += "torch.optim.Adam = lambda groups, **_: SGD(groups, lr=1.0)"
    script = patched_script(tmp_path / "plain_gradient.py", patch)
    options = f"--epochs 1 --dropout 0 --decoder_lr 1.0 --batch_size 55 {more}"
    for n in (1, 2):
        run(script, *train_args(data, tmp_path / str(n), options), processes=n)
    one, two = (load_checkpoint(tmp_path / n) for n in "12")
    for part in ("encoder", "decoder"):
        torch.testing.assert_close(one[part], two[part], rtol=1e-4, atol=1e-6)
    torch.manual_seed(0)
    untrained = Encoder(name="mobilenet_v3_small", weights="none").state_dict()
    assert same(one["encoder"], untrained) != ("--fine_tune_encoder" in more)
    for key in ("train_loss", "val_loss"):
        a, b = (log_rows(tmp_path / n)[0][key] for n in "12")
        assert a == pytest.approx(b, rel=1e-4), key


def test_the_baseline_of_hard_attention_is_the_same_for_one_and_two_processes(data, tmp_path):
    """Without reward and sampled locations, so that only the log-probability remains."""
    patch = "import train; from training import losses\n"
    patch += "losses.HardAttention.hard_fraction = 1e-12"
    script = patched_script(tmp_path / "none_sampled.py", patch)
    options = "--epochs 1 --attention hard --dropout 0 --lambda_r 0 --batch_size 40"
    baselines = []
    for n in (1, 2):
        args = train_args(data, tmp_path / str(n), options, "--decoder_lr 1e-6")
        run(script, *args, processes=n)
        baselines.append(load_checkpoint(tmp_path / str(n))["progress"]["baseline"])
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-4)
    # About 11 words of probability 1 / 34 each, weighted 1 - 0.9 ** 3 in the average.
    assert -20 < baselines[0] < -6


@pytest.mark.parametrize(
    "options",
    [
        "--attention hard --sampling_max 0.2 --sampling_every 1 --ema 0.9",
        "--self_critical --amp bf16 --samples 3 --cross_entropy_share 0.2 --checkpoint BEST",
        "--self_critical --fine_tune_encoder --accumulate 2 --checkpoint BEST",
    ],
)
def test_every_criterion_trains_in_two_processes(data, tmp_path, best, options):
    options = f"--epochs 2 {options.replace('BEST', str(best))}"
    run("train.py", *train_args(data, tmp_path, options), processes=2)
    figures = log_rows(tmp_path)
    assert len(figures) == 2 and all(math.isfinite(x) for row in figures for x in row.values())
    before, after = torch.load(best, weights_only=True)["decoder"], load_checkpoint(tmp_path)
    still = [name for name in before if torch.equal(before[name], after["decoder"][name])]
    assert still in ([], ["attention.full_att.bias"])  # which has no effect on a softmax


def test_two_processes_evaluate_like_one(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs 6"))
    common = f"--checkpoint_folder {tmp_path} --data_folder {data} --device cpu --batch_size 4"
    common += " --workers 0 --beam_sizes 1 3 --results"
    tables, results = [], []
    for n in (1, 2):
        path = tmp_path / f"{n}.json"
        table = run("eval.py", *common.split(), path, processes=n)
        tables.append(table.replace(path.name, ""))
        results.append(json.loads(path.read_text()))
    assert tables[0] == tables[1] and "BLEU-4" in tables[0]
    scores = [[row.pop("score") for row in rows] for rows in results]
    assert results[0] == results[1] and scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert len(results[0]) == 6 and all(len(row["references"]) == 5 for row in results[0])
    assert results[0][0].keys() == {"image_id", "filename", "caption", "references"}


def test_a_signal_to_one_process_that_waits_for_a_batch_stops_both_at_the_same_step(data, tmp_path):
    patch = """
import os, signal, time, train
from datasets import CaptionDataset
from torch.utils.data import get_worker_info
get, calls = CaptionDataset.__getitem__, []
def late(self, index):
    calls.append(index)
    if get_worker_info() and os.environ["RANK"] == "1" and len(calls) == 3:
        time.sleep(1)
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(60)
    return get(self, index)
CaptionDataset.__getitem__ = late
"""
    script = patched_script(tmp_path / "late.py", patch)
    options = "--epochs 1 --batch_size 30 --no-cache_features --workers 1"
    begin = time.monotonic()
    done = run_script(script, *train_args(data, tmp_path, options), processes=2)
    assert done.returncode and time.monotonic() - begin < 50
    assert "stopped in epoch 1 after 2 of 4 batches, all saved; continue with" in done.stderr
    assert load_checkpoint(tmp_path)["progress"]["step"] == 2
