"""Two processes compute what one computes."""

import json
import math
import re

import pytest
import torch
from factories import (
    ENCODER,
    NAME,
    ROOT,
    SMALL_ENCODER,
    load_checkpoint,
    log_rows,
    run_script,
    same,
    train_args,
)

import train
from models import Encoder


@pytest.mark.parametrize(
    "options",
    [
        ["--batch_size", "110"],
        ["--batch_size", "55", "--accumulate", "3"],
        ["--batch_size", "55", "--fine_tune_encoder", "--encoder_lr", "1e-2"],
    ],
    ids=" ".join,
)
def test_two_processes_compute_the_gradient_of_one_on_the_joint_batch(data, tmp_path, options):
    """
    Plain gradient steps, so that the weights show the gradients. 110 captions are 22 images, 11
    for each process; 55 are 11 images, 6 and 5.
    """
    options = ["--epochs", "1", "--dropout", "0", "--decoder_lr", "1.0", *options]
    script = tmp_path / "plain_gradient.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train\n"
        "torch.optim.Adam = lambda groups, **_: torch.optim.SGD(groups, lr=1.0)\n"
        "train.main()\n"
    )
    for processes in (1, 2):
        result = run_script(
            script, *train_args(data, tmp_path / str(processes), *options), processes=processes
        )
        assert result.returncode == 0, result.stderr
    one, two = (load_checkpoint(tmp_path / n) for n in "12")
    for part in ("encoder", "decoder"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name], rtol=1e-4, atol=1e-6)
    if "--fine_tune_encoder" in options:
        whole = Encoder(name="tf_efficientnet_lite2", weights=ENCODER[3]).state_dict()
        assert not same(one["encoder"], whole)
    for key in ("train_loss", "val_loss"):
        a, b = (log_rows(tmp_path / n)[0][key] for n in "12")
        assert a == pytest.approx(b, rel=1e-4), key


def test_the_baseline_of_hard_attention_is_the_same_for_one_and_two_processes(data, tmp_path):
    """Without reward and sampled locations, so that only the log-probability remains."""
    script = tmp_path / "none_drawn.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\nfrom training import losses\n"
        "losses.HardAttention.__init__.__defaults__ = (1e-12,)\ntrain.main()\n"
    )
    baselines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = run_script(
            script,
            *train_args(
                data,
                folder,
                "--epochs",
                "1",
                "--attention",
                "hard",
                "--dropout",
                "0",
                "--lambda_r",
                "0",
                "--batch_size",
                "40",
                "--decoder_lr",
                "1e-6",
            ),
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        baselines.append(load_checkpoint(folder)["progress"]["baseline"])
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-4)
    # About 11 words of probability 1 / 34 each, weighted 1 - 0.9 ** 3 in the average.
    assert -20 < baselines[0] < -6


@pytest.mark.parametrize(
    "options",
    [
        ["--attention", "hard", "--sampling_max", "0.2", "--sampling_every", "1", "--ema", "0.9"],
        ["--self_critical", "--amp", "bf16", "--samples", "3", "--cross_entropy_share", "0.2"],
        ["--self_critical", "--fine_tune_encoder", "--accumulate", "2"],
    ],
    ids=" ".join,
)
def test_every_criterion_trains_in_two_processes(data, tmp_path, options):
    args = train_args(data, tmp_path / "1", *SMALL_ENCODER, "--epochs", "1")
    train.main(args)
    if "--self_critical" in options:
        options = [*options, "--checkpoint", tmp_path / "1" / f"checkpoint_{NAME}.pth.tar"]
    result = run_script(
        "train.py",
        *train_args(data, tmp_path / "2", *SMALL_ENCODER, "--epochs", "2", *options),
        processes=2,
    )
    assert result.returncode == 0, result.stderr
    figures = log_rows(tmp_path / "2")
    assert len(figures) == 2 and all(math.isfinite(x) for row in figures for x in row.values())
    before, after = (load_checkpoint(tmp_path / n)["decoder"] for n in "12")
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still in ([], ["attention.full_att.bias"])  # which has no effect on a softmax


def test_two_processes_evaluate_like_one(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "6"))
    common = [
        "--checkpoint_folder",
        tmp_path,
        "--data_folder",
        data,
        "--device",
        "cpu",
        "--batch_size",
        "4",
        "--workers",
        "0",
        "--beam_sizes",
        "1",
        "3",
    ]
    tables = []
    for processes in (1, 2):
        result = run_script(
            "eval.py", *common, "--results", tmp_path / f"{processes}.json", processes=processes
        )
        assert result.returncode == 0, result.stderr
        tables.append(result.stdout.replace(f"{processes}.json", ""))
    assert tables[0] == tables[1]
    assert re.search("BLEU-4 +attention", tables[0])
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "12")
    assert [{**row, "score": 0} for row in one] == [{**row, "score": 0} for row in two]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], rel=1e-4)
    assert len(one) == 6 and all(len(row["references"]) == 5 for row in one)
    assert one[0].keys() == {"image_id", "filename", "caption", "score", "references"}
