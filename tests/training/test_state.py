"""Optimizer, schedule and average, and that a state survives its dictionary."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import make_decoder, same

import train
from modeling.devices import Distributed
from training.losses import HardAttention
from training.run import Run
from training.state import Progress, TrainingState


def make_state(options="", steps_per_epoch=4):
    """A TrainingState of small models."""
    args, processes = train.get_args(options.split()), Distributed(torch.device("cpu"))
    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 3).requires_grad_(args.fine_tune_encoder)
    criterion = HardAttention(1.0, 0.1, 0.1)
    criterion.after_step = lambda processes: None
    return TrainingState(args, encoder, make_decoder(), criterion, steps_per_epoch, processes)


def after_epochs(state, scores, losses=(2.0,) * 99):
    """Count epochs with these scores: for each, whether it was the best so far, and the rate"""
    first, found = state.progress.epoch + 1, []
    for epoch, (score, loss) in enumerate(zip(scores, losses), first):
        best = state.after_epoch({"epoch": epoch, "bleu4": score, "val_loss": float(loss)})
        found.append((best, state.last_lr))
    return found


def test_the_cosine_schedule_ignores_the_plateau_rule():
    options = "--epochs 3 --cosine --decay_after 1 --decoder_lr 0.5 --encoder_lr 2"
    state, rates, logged = make_state(f"{options} --fine_tune_encoder"), [], []
    for i in range(12):  # four steps an epoch
        state.before_step()
        rates.append([group["lr"] for group in state.optimizer.param_groups])
        state.after_step()
        if i % 4 == 3:
            logged += [rate for _, rate in after_epochs(state, [1.0])]
    cosine = np.array([0.5 + 0.5 * math.cos(math.pi * i / 12) for i in range(12)])
    np.testing.assert_allclose(rates, cosine[:, None] * [0.5, 2])
    np.testing.assert_allclose(logged, 0.5 * cosine[3::4])  # of the epoch's last step


@pytest.mark.parametrize("options", ["", "--ema 0.9 --cosine --epochs 3 --fine_tune_encoder"])
def test_a_state_loaded_from_its_state_dict_continues_bit_for_bit(options):
    def step(state, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in state.parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        state.before_step()
        state.optimizer.step()
        state.after_step()
        state.progress.step += 1
        if state.progress.step == 4:
            after_epochs(state, [(5.0, 3.0, 4.0)[state.progress.epoch]])

    state, interrupted, resumed = (make_state(options) for _ in range(3))
    for seed in range(12):
        step(state, seed)
    for seed in range(7):
        step(interrupted, seed)
    interrupted.progress.baseline = -1.5
    saved = copy.deepcopy(interrupted.state_dict())
    for name in ("averaged_encoder", "averaged_decoder"):
        getattr(resumed, name).load_state_dict(getattr(interrupted, name).state_dict())
    resumed.load_state_dict(saved)
    assert float(resumed.criterion.baseline) == -1.5
    resumed.progress.baseline = 0.0
    for seed in range(7, 12):
        step(resumed, seed)
    assert same(state.state_dict(), resumed.state_dict()) and state.last_lr == resumed.last_lr
    for name in ("averaged_encoder", "averaged_decoder"):
        assert same(getattr(state, name).state_dict(), getattr(resumed, name).state_dict())


def test_the_average_of_weights_equals_a_loop_by_hand():
    state = make_state("--ema 0.7 --no-fine_tune_embeddings")
    assert state.averaged_encoder is state.encoder  # which is frozen
    state.decoder.fine_tune_embeddings(False)
    expected = [p.detach().clone() for p in state.decoder.parameters()]
    for step in range(30):
        keep = min(0.7, (1 + step) / (10 + step))  # from step 20 on 0.7
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
    without = make_state()
    without.after_step()
    assert without.averaged_decoder is without.decoder and without.state_dict()["trained"] is None


def test_the_rate_falls_after_each_decay_after_epochs_without_a_better_score():
    """Also if the run is resumed after each epoch."""
    many = 3.0, 2.0, 3.0, 1.0, 1.0, 4.0, 4.0, 1.0
    for options, scores, expected in (
        ("0.5 --decay_after 2", many, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]),
        ("0.5 --decay_after 3", [1.0] * 4, [1, 1, 1, 0.5]),
        ("0.5 --decay_after 3", [0.0] * 6, [1, 1, 0.5, 0.5, 0.5, 0.25]),  # as in the tutorial
    ):
        options, rates = f"--decoder_lr 1 --lr_decay {options}", []
        state = make_state(options)
        for score in scores:
            [(_, rate)] = after_epochs(state, [score])
            rates.append(rate)
            resumed = make_state(options)
            resumed.load_state_dict(copy.deepcopy(state.state_dict()))
            state = resumed
        assert rates == pytest.approx(expected)


def test_scores_of_zero_and_ties_are_decided_by_the_loss():
    state = make_state("--decay_after 2 --decoder_lr 1")
    scores = 2e-76, 7e-153, 3e-76, 0.0, 1.5, 1.5, 1.5, 1.4
    found = after_epochs(state, scores, (5.0, 4.0, 4.5, 3.9, 6.0, 5.5, 5.5, 1.0))
    assert [best for best, _ in found] == [True, True, False, True, True, True, False, False]
    assert (state.progress.best, state.progress.best_loss) == (1.5, 5.5)
    assert state.last_lr == pytest.approx(0.8)  # after two without
    state.set_score_to_beat({"bleu4": 0.01, "val_loss": 1.0})
    assert state.progress.best == 0.01
    old = {"epoch": 1, "best": 1.5, "best_loss": None}
    state.progress = Progress.from_dict(old)  # of a run begun before there was a best_loss
    assert [best for best, _ in after_epochs(state, [1.5, 1.6], [0.1, 9.0])] == [False, True]


def test_a_run_stops_after_stop_after_epochs_without_improvement():
    for start, scores, losses, epochs in (
        (None, [0.0] * 60, [2.0] * 60, 20),  # as the tutorial, whose best score begins at 0
        (None, [5.0] * 60, [2.0] * 60, 21),
        (None, [0.0] * 60, np.linspace(2, 1, 60), 60),  # the loss decides
        (None, [0.0, 0.0, 5.0] + [1.0] * 57, [2.0] * 60, 23),
        (0.0, [0.0] * 60, [2.0] * 60, 20),  # a phase
    ):
        state = make_state("--stop_after 20 --epochs 60")
        if start is not None:
            state.set_score_to_beat({"bleu4": start, "val_loss": 2.0})
        done = []
        for epoch in Run.epochs(SimpleNamespace(args=state.args, state=state)):
            after_epochs(state, scores[epoch - 1 :][:1], losses[epoch - 1 :][:1])
            done.append(epoch)
        assert done == list(range(1, epochs + 1))
