"""
`TrainingState`: everything that training changes. After `load_state_dict(state_dict)`, training
continues bit for bit; resume.py says what else that takes.
"""

import math
from dataclasses import asdict, dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# Checkpoints keep older names of these fields of Progress.
CHECKPOINT_KEYS = {"epochs_since_improvement": "stale", "previous_rows": "rows"}


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # complete epochs done
    bleu4: float | None = None  # of the last validation
    best: float | None = None  # the best score so far, of the `monitored_metric`
    best_loss: float | None = None  # its validation loss, which decides between equal scores
    epochs_since_improvement: int = 0
    previous_rows: int = 0  # rows in the log from earlier phases
    baseline: float = 0.0  # of hard attention
    step: int = 0  # batches done in the current epoch
    sums: list = field(default_factory=lambda: [0.0, 0, 0, 0, 0.0])  # theirs, of EpochTotals

    @property
    def epochs_without_improvement(self):
        """
        epochs_since_improvement as --stop_after counts them, and the tutorial: from a best score of
        0, so that a first epoch with a score of 0 is no improvement, though it is the best so far.
        """
        first_is_best = self.epochs_since_improvement == self.epoch - 1
        return self.epochs_since_improvement + (first_is_best and self.best == 0)

    def to_dict(self):
        """The content of a checkpoint's `progress`."""
        return {CHECKPOINT_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content):
        """The inverse of `to_dict`, for older checkpoints too; ValueError if it is not valid."""
        content = dict(content)
        if "best_bleu4" in content:  # its name when BLEU-4 alone could decide
            content["best"] = content.pop("best_bleu4")
        names = {CHECKPOINT_KEYS.get(name, name): name for name in cls.__dataclass_fields__}
        progress = cls(**{names[key]: value for key, value in content.items() if key in names})
        counts = (
            progress.epoch,
            progress.epochs_since_improvement,
            progress.previous_rows,
            progress.step,
        )
        numbers = (*progress.sums, progress.baseline)
        scores = [
            score
            for score in (progress.bleu4, progress.best, progress.best_loss)
            if score is not None
        ]
        if (
            not all(type(n) is int and n >= 0 for n in counts)
            or len(progress.sums) != 5
            or not all(type(n) in (int, float) for n in (*numbers, *scores))
            or progress.epoch
            and progress.best is None
        ):
            raise ValueError("its progress is not valid")
        return progress


def monitored_metric(args):
    """The validation metric that decides which model is the best."""
    return "cider_d" if args.self_critical else "bleu4"


class TrainingState:
    """
    Models, optimizer, schedule and progress of a run.

    args: train.py's options; encoder, decoder: on processes.device; steps_per_epoch: steps of the
    optimizer

    encoder, decoder            the models that are trained
    parallel_cells, ..._decoder  the encoder's `cells` and the decoder, wrapped for gradients of
                                several processes
    averaged_encoder, ..._decoder  the models that are validated and saved: with --ema the averages
                                of the weights, else the models themselves
    criterion, optimizer, scheduler (None without --cosine), scaler, progress
    """

    def __init__(self, args, encoder, decoder, criterion, steps_per_epoch, processes):
        self.args, self.processes, self.criterion = args, processes, criterion
        self.encoder, self.decoder = encoder, decoder
        self.steps_per_epoch = steps_per_epoch
        trained = [decoder, encoder] if args.fine_tune_encoder else [decoder]
        # Wrapped for gradients only: validation and checkpoints use the modules themselves.
        self.parallel_decoder = _parallel(decoder, processes)
        cells = _Cells(encoder)
        self.parallel_cells = _parallel(cells, processes) if args.fine_tune_encoder else cells
        self._averages = [(_average(model, args.ema), model) for model in trained if args.ema]
        averaged = {model: average.module for average, model in self._averages}
        self.averaged_encoder = averaged.get(encoder, encoder)
        self.averaged_decoder = averaged.get(decoder, decoder)
        self.optimizer = torch.optim.Adam(
            [
                {
                    "params": [p for p in model.parameters() if p.requires_grad],
                    "lr": lr,
                    "initial_lr": lr,
                }
                for model, lr in zip(trained, (args.decoder_lr, args.encoder_lr))
            ],
            fused=True,
        )
        self.scheduler = None  # of --cosine; without it, `after_epoch` lowers the learning rate
        if args.cosine:
            # Unlike CosineAnnealingLR, which computes each rate from the one before, LambdaLR gives
            # the same rates to a resumed run.
            steps = args.epochs * steps_per_epoch
            self.scheduler = LambdaLR(self.optimizer, lambda step: half_cosine(step, steps))
        # float16 has no numbers below 6e-8: losses are scaled up so that no gradient underflows.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        self.progress = Progress()

    @property
    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def last_lr(self):
        """The decoder's learning rate in the last step."""
        if self.args.cosine:
            scheduler = self.scheduler
            return scheduler.base_lrs[0] * scheduler.lr_lambdas[0](scheduler.last_epoch - 1)
        return self.optimizer.param_groups[0]["lr"]

    def after_step(self):
        """Update averages, learning rate and criterion after the optimizer's step."""
        for average, model in self._averages:
            average.update_parameters(model)
        if self.args.cosine:
            self.scheduler.step()
        self.criterion.after_step(self.processes)

    def after_epoch(self, stats):
        """
        Count a complete epoch and lower the learning rate if it is due. stats: its metrics.

        Returns whether it is the best so far.
        """
        progress, (score, loss) = self.progress, self._score(stats)
        improved = (
            progress.best is None
            or score > progress.best
            or (
                score == progress.best
                and progress.best_loss is not None
                and loss < progress.best_loss
            )
        )
        best = (score, loss) if improved else (progress.best, progress.best_loss)
        self.progress = Progress(
            stats["epoch"],
            stats["bleu4"],
            *best,
            0 if improved else progress.epochs_since_improvement + 1,
            progress.previous_rows,
            progress.baseline,
        )
        if not self.args.cosine:
            self._decay_if_due()
        return improved

    def _decay_if_due(self):
        """
        Lower the learning rates after each --decay_after epochs in a row without improvement.
        ReduceLROnPlateau sees one number, it cannot let the loss decide between equal scores.
        """
        stale, lr = self.progress.epochs_since_improvement, self.last_lr
        if stale and stale % self.args.decay_after == 0:
            for group in self.optimizer.param_groups:
                group["lr"] *= self.args.lr_decay
        if self.last_lr != lr:
            self.processes.print(f"learning rate is now {self.last_lr:.3g}")

    def set_score_to_beat(self, stats):
        """A phase is to improve on the model that it starts from; stats: its metrics."""
        self.progress.best, self.progress.best_loss = self._score(stats)

    def _score(self, stats):
        """
        What decides between models: the monitored metric and, where that is equal, the validation
        loss. A metric that would be printed as 0.00 is 0: of captions that share no 4-gram with
        their references, BLEU-4 says nothing.
        """
        score = stats[monitored_metric(self.args)]
        return score if score >= 0.005 else 0.0, stats["val_loss"]

    def state_dict(self):
        """
        A checkpoint's content besides the averaged models. `trained` holds the weights that are
        averaged, None without --ema.
        """
        trained = {"encoder": self.encoder.state_dict(), "decoder": self.decoder.state_dict()}
        return {
            "trained": trained if self.args.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.to_dict(),
            "bleu4": self.progress.bleu4,
        }

    def load_state_dict(self, state):
        """
        Restore what `state_dict` returned. encoder and decoder must already have the weights of the
        same checkpoint. Older checkpoints may lack `trained` and `scaler`.

        Raises ValueError, KeyError, TypeError, AttributeError or RuntimeError if it does not fit.
        """
        progress = Progress.from_dict(state["progress"])
        if progress.step > self.steps_per_epoch:
            raise ValueError(f"{progress.step} of {self.steps_per_epoch} batches are done")
        _load_optimizer(self.optimizer, state["optimizer"], progress.epoch > 0)
        if state.get("scaler"):  # empty for other precisions
            self.scaler.load_state_dict(state["scaler"])
        if self.args.ema:
            trained = state.get("trained")
            if not isinstance(trained, dict) or trained.keys() != {"encoder", "decoder"}:
                raise ValueError("it lacks the weights that were being averaged")
            self.encoder.load_state_dict(trained["encoder"])
            self.decoder.load_state_dict(trained["decoder"])
        self.progress = progress
        self.criterion.baseline = torch.tensor(progress.baseline)
        for average, _ in self._averages:
            average.n_averaged.fill_(1 + self._steps_done)
        if self.args.cosine and self._steps_done:
            self._restore_cosine()

    @property
    def _steps_done(self):
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def _restore_cosine(self):
        """Compute the scheduler's state from `progress`, so that checkpoints need not hold it."""
        self.scheduler.load_state_dict(
            {
                **self.scheduler.state_dict(),
                "last_epoch": self._steps_done - 1,
                "_step_count": self._steps_done + 1,
            }
        )
        self.scheduler.step()


class _Cells(torch.nn.Module):
    """An encoder's `cells` as a forward pass, the only method that is wrapped for processes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder.cells(images)


def _parallel(module, processes):
    return module if processes.world_size == 1 else DistributedDataParallel(module)


def _average(model, decay):
    """
    The exponential moving average of a model's weights. Its decay at step n is n / (n + 9), at most
    `decay`: with a constant decay the initial random weights would dominate it for a long time.
    """

    def update(averages, weights, n_averaged):
        n = int(average.n_averaged)  # on the CPU
        get_ema_multi_avg_fn(min(decay, n / (n + 9)))(averages, weights, n_averaged)

    average = AveragedModel(model, multi_avg_fn=update)
    average.n_averaged.fill_(1)  # the initial weights
    return average.requires_grad_(False)


def half_cosine(step, steps):
    """The learning rate's factor at `step` of `steps`, counted from 0; at `steps` it is 0."""
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


def _load_optimizer(optimizer, state, trained):
    """
    Load a checkpoint's state into the optimizer; trained: whether it must hold averages.

    Raises ValueError or other errors unless the settings, apart from the learning rate, are equal
    and the averages of gradients have the sizes of the weights.
    """

    def settings():
        return [
            {
                key: value
                for key, value in group.items()
                if key not in ("params", "lr", "initial_lr")
            }
            for group in optimizer.param_groups
        ]

    expected, initial_lrs = settings(), [group["initial_lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    if settings() != expected or not all(
        type(group["lr"]) is float and 0 <= group["lr"] < 1e9 for group in optimizer.param_groups
    ):
        raise ValueError("its optimizer has other settings")
    if trained and not optimizer.state:
        raise ValueError("its averages of gradients are missing")
    for group, initial_lr in zip(optimizer.param_groups, initial_lrs):
        group["initial_lr"] = initial_lr
        for parameter in group["params"]:
            averages = optimizer.state.get(parameter)
            if averages is None:  # nothing has given this weight a gradient yet
                continue
            if averages["step"].numel() != 1 or {
                averages[key].shape for key in ("exp_avg", "exp_avg_sq")
            } != {parameter.shape}:
                raise ValueError("its averages of gradients have other sizes than the weights")
