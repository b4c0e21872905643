"""One epoch of training and one validation."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import factories
import pytest
import torch
from factories import NAME, contents, load_checkpoint, log_rows, resume_args, train_args

import eval as eval_script
import train
from evaluation.metrics import CiderD, bleu
from models import DecoderOutput, DecoderWithAttention
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from training import engine
from training.run import format_scores
from utils import UserError


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """The folder of eight images, the same ones to validate on, and of a run that learned them"""
    folder = tmp_path_factory.mktemp("overfitted")
    path = Path(make_demo(folder / "demo", 8, 0, 0))
    karpathy = json.loads(path.read_text())
    shutil.copytree(folder / "demo", folder / "demo" / "again")
    again = {"split": "val", "filepath": "again"}
    karpathy["images"] += [image | again for image in karpathy["images"][:8]]
    path.write_text(json.dumps(karpathy))
    options = {"min_word_freq": 0, "output_folder": folder, "workers": 1, "image_size": 64}
    create_input_files("demo", path, folder / "demo", **options)
    options = "--epochs 50 --stop_after 50 --batch_size 20 --decoder_dim 96 --dropout 0.1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visualization.curves.write_curves", lambda log, picture: None)
        train.main(train_args(folder, folder, options, "--val_beam_size 3 --decoder_lr 1e-2"))
    return folder


def test_training_overfits_and_without_a_step_is_as_validated(overfitted, tmp_path):
    best = load_checkpoint(overfitted, "BEST_")["bleu4"]
    assert best == pytest.approx(100) and best == max(row["bleu4"] for row in log_rows(overfitted))
    options = f"--checkpoint {overfitted}/BEST_checkpoint_{NAME}.pth.tar --decoder_dim 96"
    options += " --decoder_lr 0 --dropout 0 --epochs 1 --batch_size 40"
    train.main(train_args(overfitted, tmp_path, options))
    [row] = log_rows(tmp_path)
    assert row["train_loss"] == pytest.approx(row["val_loss"], rel=1e-4)
    assert row["train_top5"] == pytest.approx(row["val_top5"], abs=0.5)


def test_self_critical_training_is_scored_as_by_eval(overfitted, tmp_path, capsys):
    """Of averaged weights, from images."""
    best = overfitted / f"BEST_checkpoint_{NAME}.pth.tar"
    options = f"--checkpoint {best} --self_critical --epochs 2 --samples 3 --decoder_lr 1e-2"
    options += " --batch_size 20 --decoder_dim 96 --ema 0.5 --no-cache_features"
    train.main(train_args(overfitted, tmp_path, options))
    printed, rows = capsys.readouterr().out, log_rows(tmp_path)
    start = float(re.search(r"^start .*CIDEr-D (\S+)$", printed, re.M)[1])
    for row in rows:
        assert {"train_reward", "cider_d", "bleu4", "val_loss"} <= row.keys()
        assert f"epoch {row['epoch']:3d}   reward {row['train_reward']:.3f} in " in printed
    best = max([start, *(round(row["cider_d"], 2) for row in rows)])  # may be that of the start
    assert f"done after epoch 2: best validation CIDEr-D {best:.2f}, from " in printed
    assert load_checkpoint(tmp_path)["progress"]["best"] == pytest.approx(best, abs=0.006)
    options = f"--model {tmp_path}/checkpoint_{NAME}.pth.tar --data_folder {overfitted} --split val"
    options += " --workers 0 --device cpu --beam_sizes 1 --metrics BLEU CIDEr-D --tokens data"
    eval_script.main(options.split())
    scores = capsys.readouterr().out.splitlines()[2].split()[1:6]
    expected = [rows[-1][name] for name in ("bleu1", "bleu2", "bleu3", "bleu4", "cider_d")]
    assert [float(score) for score in scores] == pytest.approx(expected, abs=0.006)
    assert 0 < expected[0] < 100 and expected[-1] != start


def test_accumulated_parts_give_the_gradient_of_the_whole_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **_: torch.optim.SGD(groups, lr=1.0))
    options = "--epochs 1 --dropout 0 --batch_size 55 --accumulate"  # a batch has 11 images
    runs = []
    for count in (1, 2, 11):
        folder = tmp_path / str(count)
        train.main(train_args(data, folder, options, count))
        runs.append((load_checkpoint(folder)["decoder"], log_rows(folder)[0]))
    for weights, row in runs[1:]:
        torch.testing.assert_close(weights, runs[0][0], rtol=1e-4, atol=1e-6)
        for key in ("train_loss", "train_top5", "val_loss"):
            assert row[key] == pytest.approx(runs[0][1][key], rel=1e-4), key


def test_augmented_images_are_crops_mirrored_only_where_no_caption_names_a_side():
    word_map = {"<pad>": 0, "left": 1, "dog": 2, "right": 3}
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([rows, columns, columns]).to(torch.uint8)
    neutral, left, right = [[2, 2], [2, 0]], [[2, 0], [2, 1]], [[3, 0], [2, 2]]
    captions = torch.tensor([neutral, left, neutral, right]).repeat(100, 1, 1)
    torch.manual_seed(0)
    crops = engine.augment(image.expand(400, -1, -1, -1), captions, word_map)
    assert crops.shape == (400, 3, 224, 224) and crops.dtype == torch.uint8
    steps = crops[:, 1, 0].int().diff(dim=1)
    mirrored = (steps == -1).all(1)
    assert (mirrored | (steps == 1).all(1)).all() and (crops[:, 0].int().diff(dim=1) == 1).all()
    assert not mirrored[1::2].any() and 75 < mirrored[::2].sum() < 125
    for corner in (crops[:, 0, 0, 0], crops[:, 1, 0].amin(1)):
        assert set(corner.tolist()) == set(range(33))


def test_half_precision_trains_like_float32(data, tmp_path, finished):
    for amp in ("bf16", "fp16"):
        folder = tmp_path / amp
        train.main(train_args(data, folder, f"--amp {amp} --batch_size 30 --epochs 1"))
        checkpoint = load_checkpoint(folder)
        assert bool(checkpoint["scaler"]) == (amp == "fp16")
        assert {p.dtype for p in checkpoint["decoder"].values()} == {torch.float32}
        loss, expected = (log_rows(path)[0]["train_loss"] for path in (folder, finished))
        assert loss != expected and loss == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_what_is_not_finite_ends_the_run_and_is_not_saved(run, monkeypatch, broken):
    before = contents(run)
    calls, clip, step = itertools.count(1), engine.clip_grad_value_, engine.train_step

    def clip_grad_value(parameters, *args):
        clip(parameters, *args)
        if next(calls) == 2:  # the gradient is lost in the second batch of four
            parameters[0].grad.fill_(math.nan)

    def train_step(*args):
        loss, *others = step(*args)
        return loss * (math.inf if next(calls) == 2 else 1), *others

    name, minutes = ("train_step", 10) if broken == "loss" else ("clip_grad_value_", 0)
    monkeypatch.setattr(engine, name, train_step if broken == "loss" else clip_grad_value)
    with pytest.raises(UserError, match=f"epoch 4, batch 2: (the|a) {broken} is not finite"):
        train.main(resume_args(run, "--epochs 4 --save_minutes", minutes))
    after = contents(run)
    if broken == "weight":  # the first batch was saved, the second was not
        assert load_checkpoint(run)["progress"]["step"] == 1
        del before[f"checkpoint_{NAME}.pth.tar"], after[f"checkpoint_{NAME}.pth.tar"]
    assert before == after


def test_scheduled_sampling_rises_by_steps_to_its_maximum(data, tmp_path, monkeypatch):
    options = "--sampling_max 0.25 --sampling_step 0.1 --sampling_every 2"
    args = train.get_args(options.split())
    assert [engine.scheduled_sampling_prob(args, epoch) for epoch in range(1, 10)] == pytest.approx(
        [0, 0, 0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25]
    )
    forward, used = DecoderWithAttention.forward, []

    def record(decoder, features, captions, lengths, sampling_prob=None, hard_fraction=0.0):
        used.append(sampling_prob)
        return forward(decoder, features, captions, lengths, sampling_prob or 0.0, hard_fraction)

    monkeypatch.setattr(DecoderWithAttention, "forward", record)
    train.main(train_args(data, tmp_path, "--epochs 3 --batch_size 110", options))
    assert used == [0, None, 0, None, 0.1, None]  # each epoch: one training batch, one validation


def test_metrics_of_several_sources_are_their_means_and_each_sources_own():
    sets, pairs = dict(zip("ab", factories.caption_sets(2, 5))), {}
    for source, (references, captions) in sets.items():
        entries = [{"source": source, "references": texts} for texts in references]
        pairs[source] = list(zip(entries, captions))
    assert len(pairs["a"]) != len(pairs["b"])
    found = engine.generated_metrics(pairs["a"] + pairs["b"])
    for source, (references, captions) in sets.items():
        expected = {f"bleu{n}": score for n, score in enumerate(bleu(references, captions), 1)}
        expected["cider_d"] = 100 * CiderD(references).score(captions, references).mean()
        assert engine.generated_metrics(pairs[source]) == expected
        assert all(found[f"{name}_{source}"] == value for name, value in expected.items())
    for name in expected:
        assert found[name] == (found[f"{name}_a"] + found[f"{name}_b"]) / 2
    text = format_scores(found | {"val_loss": 1, "val_top5": 2, "teacher_forced_bleu4": 3})
    assert "free-running: mean BLEU-4 " in text and "; b BLEU-4 " in text


def test_teacher_forced_bleu_leaves_repetitions_out():
    lengths = torch.tensor([[4, 1], [3, 4]])
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    logits = torch.nn.functional.one_hot(targets + 1)
    assert engine.teacher_forced_pairs(DecoderOutput(logits, targets, None, None), lengths) == [
        ([["1", "2", "3"], []], ["2", "3", "4"]),
        ([["4", "5"], ["6", "7", "8"]], ["5", "6"]),
        ([["4", "5"], ["6", "7", "8"]], ["7", "8", "9"]),
    ]
