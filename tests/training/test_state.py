"""Optimizer, schedule and average, and that a state survives its dictionary."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, make_decoder, same, train_args

import eval as eval_script
import train
from modeling.devices import Distributed
from training import engine
from training.losses import TeacherForcing
from training.run import Run
from training.state import Progress, TrainingState, half_cosine


def test_the_cosine_schedule_ignores_the_plateau_rule(data, tmp_path, monkeypatch):
    seen, clip = [], engine.clip_grad_value_

    def keep_rate(*args):
        clip(*args)
        seen.append(optimizers[-1].param_groups[0]["lr"])

    optimizers, adam = [], torch.optim.Adam
    monkeypatch.setattr(
        torch.optim,
        "Adam",
        lambda *args, **kwargs: optimizers.append(adam(*args, **kwargs)) or optimizers[-1],
    )
    monkeypatch.setattr(engine, "clip_grad_value_", keep_rate)
    train.main(
        train_args(
            data,
            tmp_path,
            "--epochs",
            "3",
            "--batch_size",
            "40",
            "--cosine",
            "--decay_after",
            "1",
            "--decoder_lr",
            "1e-9",
        )
    )
    steps = len(seen)
    assert steps == 9  # 3 an epoch
    assert seen == pytest.approx(
        [1e-9 * (0.5 + 0.5 * math.cos(math.pi * i / steps)) for i in range(steps)]
    )
    assert [row["lr"] for row in log_rows(tmp_path)] == pytest.approx(seen[2::3])


def test_learning_rate_decays_and_training_stops_without_improvement(data, tmp_path, capsys):
    train.main(
        train_args(
            data,
            tmp_path,
            "--decoder_lr",
            "1e-12",
            "--decay_after",
            "2",
            "--stop_after",
            "6",
            "--lr_decay",
            "0.5",
        )
    )
    rates = [row["lr"] for row in log_rows(tmp_path)]
    # The first epoch is the best; after 2 and 4 epochs without improvement the rate is halved.
    assert rates == pytest.approx([1e-12, 1e-12, 1e-12, 5e-13, 5e-13, 2.5e-13], rel=1e-6)
    assert load_checkpoint(tmp_path)["progress"]["stale"] == 5  # and the first, whose BLEU-4 is 0
    assert same(load_checkpoint(tmp_path, "BEST_")["progress"]["epoch"], 1)


def test_the_average_of_the_weights_is_what_is_saved_and_validated(
    data, tmp_path, capsys, monkeypatch
):
    means, step = [], torch.optim.Adam.step

    def average_by_hand(optimizer, *args, **kwargs):
        weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        means[:] = means or weights
        result = step(optimizer, *args, **kwargs)
        keep = min(0.8, (1 + len(counted)) / (10 + len(counted)))
        counted.append(1)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            means[i] = keep * means[i] + (1 - keep) * p.detach()
        return result

    counted = []
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", average_by_hand)
        train.main(
            train_args(data, tmp_path, "--epochs", "3", "--batch_size", "40", "--ema", "0.8")
        )
    last = load_checkpoint(tmp_path)
    for ours, theirs in zip(last["decoder"].values(), means):  # no buffers: the same order
        torch.testing.assert_close(ours, theirs)
    assert not same(last["decoder"], last["trained"]["decoder"])
    assert same(last["encoder"], last["trained"]["encoder"])
    train.main(train_args(data, tmp_path / "plain", "--epochs", "3", "--batch_size", "40"))
    assert same(load_checkpoint(tmp_path / "plain")["decoder"], last["trained"]["decoder"])
    assert load_checkpoint(tmp_path / "plain")["trained"] is None
    capsys.readouterr()
    eval_script.main(
        [
            "--model",
            str(tmp_path / f"checkpoint_{NAME}.pth.tar"),
            "--device",
            "cpu",
            "--data_folder",
            str(data),
            "--split",
            "val",
            "--workers",
            "0",
        ]
    )
    assert float(capsys.readouterr().out.splitlines()[2].split()[4]) == pytest.approx(
        log_rows(tmp_path)[-1]["bleu4"], abs=0.006
    )


def make_state(*options, steps_per_epoch=4, encoder=None):
    """A TrainingState of small models."""
    args = train.get_args(options)
    encoder = encoder or torch.nn.Linear(3, 3).requires_grad_(args.fine_tune_encoder)
    return TrainingState(
        args,
        encoder,
        make_decoder(),
        TeacherForcing(),
        steps_per_epoch,
        Distributed(torch.device("cpu")),
    )


def random_step(state, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in state.parameters:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    state.optimizer.step()
    state.after_step()


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--ema", "0.9"],
        ["--cosine", "--epochs", "3"],
        ["--ema", "0.9", "--cosine", "--epochs", "3", "--fine_tune_encoder"],
    ],
    ids=" ".join,
)
def test_a_state_loaded_from_its_state_dict_continues_bit_for_bit(options):
    def run(state, first):
        for step in range(first, 12):
            random_step(state, step)
            state.progress.step += 1
            if state.progress.step == 4:
                state.after_epoch(
                    {
                        "epoch": state.progress.epoch + 1,
                        "val_loss": 2.0,
                        "bleu4": (5.0, 3.0, 4.0)[state.progress.epoch],
                    }
                )
        return state

    state, interrupted = make_state(*options), make_state(*options)
    for step in range(3):
        random_step(interrupted, step)
        interrupted.progress.step += 1
    saved = copy.deepcopy(
        [
            interrupted.state_dict(),
            interrupted.averaged_encoder.state_dict(),
            interrupted.averaged_decoder.state_dict(),
        ]
    )
    resumed = make_state(*options)
    resumed.averaged_encoder.load_state_dict(saved[1])
    resumed.averaged_decoder.load_state_dict(saved[2])
    resumed.load_state_dict(saved[0])
    run(state, 0), run(resumed, 3)
    assert same(state.state_dict(), resumed.state_dict())
    assert same(state.averaged_decoder.state_dict(), resumed.averaged_decoder.state_dict())
    assert state.last_lr == resumed.last_lr


def test_the_average_of_weights_equals_a_loop_by_hand():
    state = make_state("--ema", "0.7", "--no-fine_tune_embeddings")
    assert state.averaged_encoder is state.encoder  # which is frozen
    state.decoder.fine_tune_embeddings(False)
    expected = [p.detach().clone() for p in state.decoder.parameters()]
    for step in range(30):
        keep = min(0.7, (1 + step) / (10 + step))  # 0.1, 0.18, ... from step 20 on 0.7
        with torch.no_grad():
            for i, p in enumerate(state.decoder.parameters()):
                if p.requires_grad:
                    p.add_(torch.randn_like(p))
                expected[i] = keep * expected[i] + (1 - keep) * p
        state.after_step()
    for average, by_hand in zip(state.averaged_decoder.parameters(), expected):
        torch.testing.assert_close(average, by_hand)
    assert not torch.equal(state.averaged_decoder.fc.weight, state.decoder.fc.weight)
    assert torch.equal(state.averaged_decoder.embedding.weight, state.decoder.embedding.weight)


def test_without_an_average_the_models_are_those_that_are_trained():
    state = make_state()
    state.after_step()
    assert state.averaged_decoder is state.decoder and state.averaged_encoder is state.encoder
    assert state.state_dict()["trained"] is None


def test_half_a_cosine_falls_from_one_to_zero():
    np.testing.assert_allclose(
        [half_cosine(i, 6) for i in range(7)],
        [1, 0.933013, 0.75, 0.5, 0.25, 0.066987, 0],
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "decay, expected", [("0.5", [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]), ("1", [1] * 9)]
)
def test_the_rate_falls_after_each_decay_after_epochs_without_a_better_score(decay, expected):
    """Also if the run is resumed after each epoch."""
    scores, rates = [3.0, 2.0, 3.0, 1.0, 1.0, 4.0, 4.0, 1.0], [1.0]
    state = make_state("--decoder_lr", "1", "--lr_decay", decay, "--decay_after", "2")
    for epoch, score in enumerate(scores, 1):
        state.after_epoch({"epoch": epoch, "bleu4": score, "val_loss": 2.0})
        for group in state.optimizer.param_groups:
            for p in group["params"]:
                state.optimizer.state[p] = {
                    "step": torch.tensor(1.0),
                    "exp_avg": p.detach() * 0,
                    "exp_avg_sq": p.detach() * 0,
                }
        resumed = make_state("--decoder_lr", "1", "--lr_decay", decay, "--decay_after", "2")
        resumed.load_state_dict(copy.deepcopy(state.state_dict()))
        state = resumed
        rates.append(state.last_lr)
    assert rates == pytest.approx(expected)
    assert state.progress.best == 4 and state.progress.epochs_since_improvement == 2


def test_progress_of_every_version_is_read():
    progress = Progress(
        epoch=3,
        bleu4=20.5,
        best=21.0,
        best_loss=3.5,
        epochs_since_improvement=2,
        previous_rows=7,
        baseline=-1.5,
        step=4,
        sums=[1.5, 2, 3, 4, 5.5],
    )
    content = progress.to_dict()
    assert content == {
        "epoch": 3,
        "bleu4": 20.5,
        "best": 21.0,
        "best_loss": 3.5,
        "stale": 2,
        "rows": 7,
        "baseline": -1.5,
        "step": 4,
        "sums": [1.5, 2, 3, 4, 5.5],
    }
    assert Progress.from_dict(content) == progress
    content["best_bleu4"] = content.pop("best")
    assert Progress.from_dict(content) == progress


def stub_state(**progress):
    state = TrainingState.__new__(TrainingState)
    state.args = train.get_args(["--decay_after", "2"])
    state.progress = Progress(**progress)
    weight = torch.nn.Parameter(torch.zeros(1))
    state.optimizer = torch.optim.Adam([weight], 1.0)
    state.processes = Distributed(torch.device("cpu"))
    return state


def test_scores_of_zero_and_ties_are_decided_by_the_loss():
    state, improved = stub_state(), []
    for epoch, (bleu4, loss) in enumerate(
        [
            (2e-76, 5.0),
            (7e-153, 4.0),
            (3e-76, 4.5),
            (0.0, 3.9),
            (1.5, 6.0),
            (1.5, 5.5),
            (1.5, 5.5),
            (1.4, 1.0),
        ],
        1,
    ):
        improved.append(state.after_epoch({"epoch": epoch, "bleu4": bleu4, "val_loss": loss}))
    assert improved == [True, True, False, True, True, True, False, False]
    assert (state.progress.best, state.progress.best_loss) == (1.5, 5.5)
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(0.8)  # after two without


@pytest.mark.parametrize(
    "start, scores, losses, epochs",
    [
        (None, [0.0] * 60, [2.0] * 60, 20),  # as the tutorial, whose best score begins at 0
        (None, [5.0] * 60, [2.0] * 60, 21),
        (None, [0.0] * 60, np.linspace(2, 1, 60), 60),  # the loss decides
        (None, [0.0, 0.0, 5.0] + [1.0] * 57, [2.0] * 60, 23),
        (0.0, [0.0] * 60, [2.0] * 60, 20),  # a phase
        (5.0, [5.0] * 60, [2.0] * 60, 20),
    ],
)
def test_a_run_stops_after_stop_after_epochs_without_improvement(start, scores, losses, epochs):
    state = stub_state()
    state.args = train.get_args(["--stop_after", "20", "--epochs", "60"])
    if start is not None:
        state.set_score_to_beat({"bleu4": start, "val_loss": 2.0})
    done = []
    for epoch in Run.epochs(SimpleNamespace(args=state.args, state=state)):
        stats = {"epoch": epoch, "bleu4": scores[epoch - 1], "val_loss": float(losses[epoch - 1])}
        state.after_epoch(stats)
        done.append(epoch)
    assert done == list(range(1, epochs + 1))


def test_a_phase_from_an_older_checkpoint_without_best_loss_is_not_beaten_by_a_tie():
    state = stub_state(epoch=1, best=1.5)
    assert not state.after_epoch({"epoch": 2, "bleu4": 1.5, "val_loss": 0.1})
    assert state.after_epoch({"epoch": 3, "bleu4": 1.6, "val_loss": 9.0})
