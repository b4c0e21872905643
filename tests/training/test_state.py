"""Optimizer, schedule and average, and that a state survives its dictionary."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import load_checkpoint, log_rows, make_decoder, same, train_args

import train
from modeling.devices import Distributed
from training.losses import HardAttention
from training.run import Run
from training.state import Progress, TrainingState, half_cosine


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
        rates.append([group["lr"] for group in state.optimizer.param_groups])
        state.after_step()
        if i % 4 == 3:
            logged += [rate for _, rate in after_epochs(state, [1.0])]
    cosine = np.array([0.5 + 0.5 * math.cos(math.pi * i / 12) for i in range(12)])
    np.testing.assert_allclose(rates, cosine[:, None] * [0.5, 2])
    np.testing.assert_allclose(logged, 0.5 * cosine[3::4])  # of the epoch's last step


def test_learning_rate_decays_and_training_stops_without_improvement(data, tmp_path):
    options = "--decoder_lr 1e-12 --decay_after 2 --stop_after 6 --lr_decay 0.5"
    train.main(train_args(data, tmp_path, options))
    rates = [row["lr"] for row in log_rows(tmp_path)]
    # The first epoch is the best; after 2 and 4 epochs without improvement the rate is halved.
    assert rates == pytest.approx([1e-12, 1e-12, 1e-12, 5e-13, 5e-13, 2.5e-13], rel=1e-6)
    assert load_checkpoint(tmp_path)["progress"]["stale"] == 5  # and the first, whose BLEU-4 is 0
    assert load_checkpoint(tmp_path, "BEST_")["progress"]["epoch"] == 1


@pytest.mark.parametrize(
    "options",
    ["", "--ema 0.9", "--cosine --epochs 3", "--ema 0.9 --cosine --epochs 3 --fine_tune_encoder"],
)
def test_a_state_loaded_from_its_state_dict_continues_bit_for_bit(options):
    def step(state, seed):
        generator = torch.Generator().manual_seed(seed)
        for p in state.parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
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
    assert same(state.state_dict(), resumed.state_dict())
    assert same(state.averaged_decoder.state_dict(), resumed.averaged_decoder.state_dict())
    assert same(state.averaged_encoder.state_dict(), resumed.averaged_encoder.state_dict())
    assert state.last_lr == resumed.last_lr


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


def test_half_a_cosine_falls_from_one_to_zero():
    expected = [1, 0.933013, 0.75, 0.5, 0.25, 0.066987, 0]
    np.testing.assert_allclose([half_cosine(i, 6) for i in range(7)], expected, atol=1e-6)


def test_the_rate_falls_after_each_decay_after_epochs_without_a_better_score():
    """Also if the run is resumed after each epoch."""
    for decay, expected in ((0.5, [1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]), (1, [1] * 8)):
        options, rates = f"--decoder_lr 1 --lr_decay {decay} --decay_after 2", []
        state = make_state(options)
        for score in (3.0, 2.0, 3.0, 1.0, 1.0, 4.0, 4.0, 1.0):
            [(_, rate)] = after_epochs(state, [score])
            rates.append(rate)
            resumed = make_state(options)
            resumed.load_state_dict(copy.deepcopy(state.state_dict()))
            state = resumed
        assert rates == pytest.approx(expected)
        assert state.progress.best == 4 and state.progress.stale == 2


def test_progress_of_every_version_is_read():
    content = {"epoch": 3, "bleu4": 20.5, "best": 21.0, "best_loss": 3.5, "stale": 2, "rows": 7}
    content |= {"baseline": -1.5, "step": 4, "sums": [1.5, 2, 3, 4, 5.5]}
    progress = Progress.from_dict(content)
    assert dataclasses.asdict(progress) == content
    older = {"best_bleu4": 21.0, "of_another_version": 1}
    older |= {key: value for key, value in content.items() if key != "best"}
    assert Progress.from_dict(older) == progress


def test_scores_of_zero_and_ties_are_decided_by_the_loss():
    state = make_state("--decay_after 2 --decoder_lr 1")
    scores = 2e-76, 7e-153, 3e-76, 0.0, 1.5, 1.5, 1.5, 1.4
    found = after_epochs(state, scores, (5.0, 4.0, 4.5, 3.9, 6.0, 5.5, 5.5, 1.0))
    assert [best for best, _ in found] == [True, True, False, True, True, True, False, False]
    assert (state.progress.best, state.progress.best_loss) == (1.5, 5.5)
    assert state.last_lr == pytest.approx(0.8)  # after two without


def test_a_run_stops_after_stop_after_epochs_without_improvement():
    for start, scores, losses, epochs in (
        (None, [0.0] * 60, [2.0] * 60, 20),  # as the tutorial, whose best score begins at 0
        (None, [5.0] * 60, [2.0] * 60, 21),
        (None, [0.0] * 60, np.linspace(2, 1, 60), 60),  # the loss decides
        (None, [0.0, 0.0, 5.0] + [1.0] * 57, [2.0] * 60, 23),
        (0.0, [0.0] * 60, [2.0] * 60, 20),  # a phase
        (5.0, [5.0] * 60, [2.0] * 60, 20),
    ):
        state = make_state("--stop_after 20 --epochs 60")
        if start is not None:
            state.set_score_to_beat({"bleu4": start, "val_loss": 2.0})
        done = []
        for epoch in Run.epochs(SimpleNamespace(args=state.args, state=state)):
            after_epochs(state, scores[epoch - 1 :][:1], losses[epoch - 1 :][:1])
            done.append(epoch)
        assert done == list(range(1, epochs + 1))


def test_a_phase_from_an_older_checkpoint_without_best_loss_is_not_beaten_by_a_tie():
    state = make_state()
    state.progress = Progress(epoch=1, best=1.5)
    assert [best for best, _ in after_epochs(state, [1.5, 1.6], [0.1, 9.0])] == [False, True]
