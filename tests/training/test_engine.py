"""One epoch of training and one validation."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from factories import (
    NAME,
    SMALL_ENCODER,
    load_checkpoint,
    log_rows,
    same,
    train_args,
)

import eval as eval_script
import train
from evaluation.metrics import CiderD, bleu
from models import DecoderWithAttention
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from training import engine, losses
from training.losses import doubly_stochastic_loss
from training.run import _format_scores
from utils import UserError


def test_training_overfits_eight_images_to_bleu_100(tmp_path):
    path = make_demo(tmp_path / "demo", 8, 0, 0)
    karpathy = json.loads(Path(path).read_text())
    (tmp_path / "demo" / "again").mkdir()
    for image in karpathy["images"][:8]:  # the same eight to validate on
        copy = {**image, "split": "val", "filepath": "again"}
        (tmp_path / "demo/again" / image["filename"]).write_bytes(
            (tmp_path / "demo" / image["filename"]).read_bytes()
        )
        karpathy["images"].append(copy)
    Path(path).write_text(json.dumps(karpathy))
    create_input_files(
        "demo", path, tmp_path / "demo", min_word_freq=0, output_folder=tmp_path, workers=1
    )
    train.main(
        train_args(
            tmp_path,
            tmp_path,
            "--epochs",
            "120",
            "--stop_after",
            "120",
            "--batch_size",
            "20",
            "--decoder_dim",
            "96",
            "--val_beam_size",
            "3",
            "--dropout",
            "0.1",
        )
    )
    best = load_checkpoint(tmp_path, "BEST_")
    assert best["bleu4"] == pytest.approx(100)
    assert best["bleu4"] == max(row["bleu4"] for row in log_rows(tmp_path))


def test_accumulated_parts_give_the_gradient_of_the_whole_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **_: torch.optim.SGD(groups, lr=1.0))
    whole, *parts = (
        train_args(
            data,
            tmp_path / n,
            "--epochs",
            "1",
            "--dropout",
            "0",
            "--batch_size",
            "55",
            "--accumulate",
            n,
        )
        for n in ("1", "2", "11")
    )  # a batch has 11 images
    train.main(whole)
    for options in parts:
        train.main(options)
        a, b = load_checkpoint(tmp_path / "1"), load_checkpoint(options[3])
        for name in a["decoder"]:
            torch.testing.assert_close(a["decoder"][name], b["decoder"][name], rtol=1e-4, atol=1e-6)
        for key in ("train_loss", "val_loss"):
            a, b = (log_rows(folder)[0][key] for folder in (tmp_path / "1", options[3]))
            assert a == pytest.approx(b, rel=1e-4), key


def test_more_parts_than_images_are_an_error(data, tmp_path):
    with pytest.raises(UserError, match="--accumulate 12 is too large: .* have only 11 images"):
        train.main(train_args(data, tmp_path, "--batch_size", "55", "--accumulate", "12"))


def test_augmented_images_are_crops_mirrored_only_where_no_caption_names_a_side():
    word_map = {"<pad>": 0, "left": 1, "dog": 2}
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([rows, columns, columns]).to(torch.uint8)
    captions = torch.tensor([[[2, 2], [2, 0]], [[2, 0], [2, 1]]]).repeat(200, 1, 1)
    torch.manual_seed(0)
    crops = engine.augment(image.expand(400, -1, -1, -1), captions, word_map)
    assert crops.shape == (400, 3, 224, 224) and crops.dtype == torch.uint8
    steps = crops[:, 1, 0].int().diff(dim=1)
    mirrored = (steps == -1).all(1)
    assert (mirrored | (steps == 1).all(1)).all() and (crops[:, 0].int().diff(dim=1) == 1).all()
    assert not mirrored[1::2].any() and 75 < mirrored[::2].sum() < 125
    for corner in (crops[:, 0, 0, 0], crops[:, 1, 0].amin(1)):
        assert set(corner.tolist()) == set(range(33))


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_like_float32_and_resumes_exactly(data, tmp_path, amp):
    full, whole, parts = (tmp_path / name for name in ("full", "whole", "parts"))
    train.main(train_args(data, full, *SMALL_ENCODER, "--epochs", "2"))
    train.main(train_args(data, whole, *SMALL_ENCODER, "--epochs", "2", "--amp", amp))
    train.main(train_args(data, parts, *SMALL_ENCODER, "--epochs", "1", "--amp", amp))
    train.main(["--checkpoint_folder", str(parts), "--resume", "--epochs", "2"])
    a, b = load_checkpoint(whole), load_checkpoint(parts)
    for key in ("decoder", "optimizer", "scaler"):
        assert same(a[key], b[key]), key
    assert bool(a["scaler"]) == (amp == "fp16")
    assert {p.dtype for p in a["decoder"].values()} == {torch.float32}
    assert not same(a["decoder"], load_checkpoint(full)["decoder"])
    for row, expected in zip(log_rows(whole), log_rows(full)):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


def test_validation_is_eval_on_the_validation_images(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, *SMALL_ENCODER, "--epochs", "8", "--no-cache_features"))
    [best] = [
        row
        for row in log_rows(tmp_path)
        if row["epoch"] == load_checkpoint(tmp_path, "BEST_")["progress"]["epoch"]
    ]
    capsys.readouterr()
    eval_script.main(
        [
            "--checkpoint_folder",
            str(tmp_path),
            "--data_folder",
            str(data),
            "--split",
            "val",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
    )
    greedy = capsys.readouterr().out.splitlines()[2].split()
    expected = [best[f"bleu{n}"] for n in (1, 2, 3, 4)]
    assert greedy[0] == "1" and expected[0] > 0  # BLEU-4 may be 0 after so few epochs
    assert [float(score) for score in greedy[1:5]] == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_a_loss_or_weight_that_is_not_finite_ends_the_run_and_touches_no_checkpoint(
    data, tmp_path, monkeypatch, broken
):
    train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls, clip, loss = itertools.count(1), engine.clip_grad_value_, doubly_stochastic_loss
    if broken == "weight":  # the gradient is lost in the second batch of four

        def clip_grad_value(parameters, *args):
            clip(parameters, *args)
            if next(calls) == 2:
                parameters[0].grad.fill_(math.nan)

        monkeypatch.setattr(engine, "clip_grad_value_", clip_grad_value)
    else:
        monkeypatch.setattr(
            losses,
            "doubly_stochastic_loss",
            lambda *args: loss(*args) * (math.inf if next(calls) == 2 else 1),
        )
    with pytest.raises(UserError, match=f"epoch 2, batch 2: (the|a) {broken} is not finite"):
        train.main(
            [
                "--checkpoint_folder",
                str(tmp_path),
                "--resume",
                "--epochs",
                "2",
                "--save_minutes",
                "0" if broken == "weight" else "10",
            ]
        )
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    last = tmp_path / f"checkpoint_{NAME}.pth.tar"
    if broken == "weight":  # the first batch was saved, the second was not
        assert load_checkpoint(tmp_path)["progress"]["step"] == 1
        before[last] = after[last]
    assert before == after


@pytest.mark.parametrize(
    "options",
    [
        ["--attention", "hard"],
        ["--sampling_max", "0.5", "--sampling_every", "1"],
        ["--self_critical"],
    ],
    ids=" ".join,
)
def test_weights_that_are_not_finite_end_every_criterion_in_one_line(
    data, tmp_path, monkeypatch, options
):
    train.main(train_args(data, tmp_path / "1", "--epochs", "2"))
    if "--self_critical" in options:
        options = [*options, "--checkpoint", str(tmp_path / "1" / f"checkpoint_{NAME}.pth.tar")]
    clip, calls = engine.clip_grad_value_, itertools.count(1)

    def lose(parameters, *args):
        clip(parameters, *args)
        if next(calls) == 4:  # the first batch of the second epoch
            parameters[0].grad.fill_(math.nan)

    monkeypatch.setattr(engine, "clip_grad_value_", lose)
    with pytest.raises(UserError, match="epoch 2, batch .: .* is not finite"):
        train.main(
            train_args(data, tmp_path / "2", "--epochs", "3", "--batch_size", "40", *options)
        )


def test_self_critical_training_saves_the_best_cider_d_which_eval_confirms(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path / "1", "--epochs", "8"))
    capsys.readouterr()
    train.main(
        [
            "--data_folder",
            str(data),
            "--checkpoint_folder",
            str(tmp_path / "2"),
            "--device",
            "cpu",
            "--checkpoint",
            str(tmp_path / "1" / f"checkpoint_{NAME}.pth.tar"),
            "--self_critical",
            "--epochs",
            "4",
            "--workers",
            "0",
            "--decoder_lr",
            "2e-3",
            "--samples",
            "3",
            "--batch_size",
            "30",
        ]
    )
    printed, stats = capsys.readouterr().out, log_rows(tmp_path / "2")
    start = float(re.search(r"^start .*CIDEr-D (\S+)$", printed, re.M)[1])
    for row in stats:
        assert {"train_reward", "cider_d", "bleu4", "val_loss"} <= row.keys()
        assert f"epoch {row['epoch']:3d}   reward {row['train_reward']:.3f} in " in printed
    # Which is the best depends on the machine; the model may be that of the start.
    best = max([start, *(round(row["cider_d"], 2) for row in stats)])
    assert f"done after epoch 4: best validation CIDEr-D {best:.2f}, from " in printed
    assert load_checkpoint(tmp_path / "2")["progress"]["best"] == pytest.approx(best, abs=0.006)
    eval_script.main(
        [
            "--checkpoint_folder",
            str(tmp_path / "2"),
            "--data_folder",
            str(data),
            "--split",
            "val",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--beam_sizes",
            "1",
            "--metrics",
            "CIDEr-D",
            "--tokens",
            "data",
        ]
    )
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["1", f"{best:.2f}"]


def test_scheduled_sampling_rises_by_steps_to_its_maximum(data, tmp_path, monkeypatch):
    options = ["--sampling_max", "0.25", "--sampling_step", "0.1", "--sampling_every", "2"]
    args = train.get_args(options)
    assert [engine.scheduled_sampling_prob(args, epoch) for epoch in range(1, 10)] == pytest.approx(
        [0, 0, 0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25]
    )
    forward, used = DecoderWithAttention.forward, []

    def record(decoder, features, captions, lengths, sampling_prob=None):
        used.append(sampling_prob)
        return forward(decoder, features, captions, lengths, sampling_prob or 0.0)

    monkeypatch.setattr(DecoderWithAttention, "forward", record)
    train.main(train_args(data, tmp_path, "--epochs", "3", "--batch_size", "110", *options))
    assert used == [0, None, 0, None, 0.1, None]  # each epoch: one training batch, one validation


def test_metrics_of_several_sources_are_their_means_and_each_sources_own():
    """So a gain in the small source outweighs a smaller loss in the large one."""

    def entry(source, caption):
        return {"source": source, "references": [caption.split(), (caption + " now").split()]}

    large = [
        entry("large", f"a {colour} {animal} runs in the {place}")
        for colour in ("red", "blue")
        for animal in ("dog", "cat", "horse")
        for place in ("park", "street")
    ]
    small = [entry("small", "two men sit at a table"), entry("small", "a bowl of red apples")]

    def metrics(wrong_large, wrong_small):
        pairs = [
            (found, found["references"][0] if i >= wrong else ["a", "dog", "runs", "there"])
            for part, wrong in ((large, wrong_large), (small, wrong_small))
            for i, found in enumerate(part)
        ]
        return engine.generated_metrics(pairs), pairs

    found, pairs = metrics(2, 1)
    for source, part in (("large", pairs[:12]), ("small", pairs[12:])):
        alone = engine.generated_metrics(
            [({**entry, "source": None}, words) for entry, words in part]
        )
        references, captions = zip(*((entry["references"], words) for entry, words in part))
        assert alone == {
            **{f"bleu{n}": score for n, score in enumerate(bleu(references, captions), 1)},
            "cider_d": 100 * CiderD(references).score(captions, references).mean(),
        }
        assert all(found[f"{name}_{source}"] == value for name, value in alone.items())
    for name in ("bleu1", "bleu4", "cider_d"):
        assert found[name] == (found[f"{name}_large"] + found[f"{name}_small"]) / 2
    better, _ = metrics(4, 0)
    assert better["cider_d_large"] < found["cider_d_large"]
    assert better["cider_d"] > found["cider_d"]
    text = _format_scores(found | {"val_loss": 1, "val_top5": 2, "teacher_forced_bleu4": 3})
    assert "free-running: mean BLEU-4 " in text and "; small BLEU-4 " in text
    assert engine.generated_metrics(pairs[:12]).keys() == {
        "bleu1",
        "bleu2",
        "bleu3",
        "bleu4",
        "cider_d",
    }
