"""
`TrainingState`: everything that training changes. After `load_state_dict(state_dict)`, training
continues bit for bit; resume.py says what else that takes.
"""

import copy
import math
from dataclasses import asdict, dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

NO_SUMS = (0.0, 0, 0, 0, 0.0)  # loss or reward, correct tokens, tokens, captions, seconds


@dataclass
class Progress:
    """How far a run has come: a checkpoint's `progress`."""

    epoch: int = 0  # complete epochs done
    bleu4: float | None = None  # of the last validation
    best: float | None = None  # the best score so far, of the `monitored_metric`
    best_loss: float = -math.inf  # its validation loss, which decides between equal scores
    stale: int = 0  # epochs since the best one
    rows: int = 0  # in the log, from earlier phases
    baseline: float = 0.0  # of hard attention
    step: int = 0  # batches done in the current epoch
    sums: list = field(default_factory=lambda: list(NO_SUMS))  # over these, see EpochTotals

    @property
    def epochs_without_improvement(self):
        """As in the tutorial, a first epoch with a score of 0 counts, although it is the best."""
        return self.stale + (self.stale == self.epoch - 1 and self.best == 0)

    @classmethod
    def from_dict(cls, content):
        """The inverse of `dataclasses.asdict`, for older checkpoints too."""
        content = {"best": content.get("best_bleu4"), **content}  # of versions with BLEU-4 only
        given = {name: x for name, x in content.items() if x is not None}
        found = cls(**{name: given[name] for name in cls.__dataclass_fields__ if name in given})
        for number in (found.epoch, found.stale, found.rows, found.step):
            range(number)  # TypeError unless it is whole
        return found


def monitored_metric(args):
    """The validation metric that decides which model is the best."""
    return "cider_d" if args.self_critical else "bleu4"


class TrainingState:
    """
    Models, optimizer, schedule and progress of a run. `encoder` and `decoder` are trained;
    `parallel_cells` and `parallel_decoder` are the encoder's `cells` and the decoder, wrapped for
    gradients of several processes; `averaged_encoder` and `averaged_decoder` are validated and
    saved: with --ema averages of the weights, else the models themselves.
    """

    def __init__(self, args, encoder, decoder, criterion, steps_per_epoch, processes):
        self.args, self.processes, self.criterion = args, processes, criterion
        self.encoder, self.decoder, self.steps_per_epoch = encoder, decoder, steps_per_epoch
        self.parallel_decoder = _parallel(decoder, processes)
        cells = _Cells(encoder)
        self.parallel_cells = _parallel(cells, processes) if args.fine_tune_encoder else cells
        trained = [decoder, encoder] if args.fine_tune_encoder else [decoder]
        averages = {m: copy.deepcopy(m).requires_grad_(False) for m in trained if args.ema}
        self.averaged_encoder = averages.get(encoder, encoder)
        self.averaged_decoder = averages.get(decoder, decoder)
        self._averages = [(average, model) for model, average in averages.items()]
        rates = args.decoder_lr, args.encoder_lr
        groups = [
            {"params": [p for p in m.parameters() if p.requires_grad], "lr": lr, "initial_lr": lr}
            for m, lr in zip(trained, rates)
        ]
        self.optimizer = torch.optim.Adam(groups, fused=True)
        # float16 has no numbers below 6e-8: losses are scaled up so that no gradient underflows.
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
        self.progress, self._steps_done = Progress(), 0

    @property
    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def last_lr(self):
        """The decoder's learning rate in the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def before_step(self):
        """With --cosine, set the learning rates of the optimizer's next step."""
        if self.args.cosine:
            steps = self.args.epochs * self.steps_per_epoch
            factor = 0.5 + 0.5 * math.cos(math.pi * self._steps_done / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def after_step(self):
        """Update averages and criterion after the optimizer's step."""
        self._steps_done += 1
        if self._averages:
            # At step n the decay is at most n / (n + 9): with a constant one the initial random
            # weights would dominate the average for a long time.
            decay = min(self.args.ema, self._steps_done / (self._steps_done + 9))
            for average, model in self._averages:
                weights = list(average.parameters()), list(model.parameters())
                get_ema_multi_avg_fn(decay)(*weights, None)
        self.criterion.after_step(self.processes)

    def after_epoch(self, stats):
        """
        Count an epoch with these metrics, lower the learning rate after each --decay_after epochs
        in a row without improvement, and return whether this one is the best so far.
        """
        args, progress, (score, loss) = self.args, self.progress, self._score(stats)
        improved = progress.best is None or (score, -loss) > (progress.best, -progress.best_loss)
        if improved:
            self.set_score_to_beat(stats)
        progress.stale = 0 if improved else progress.stale + 1
        progress.epoch, progress.bleu4 = stats["epoch"], stats["bleu4"]
        progress.step, progress.sums = 0, list(NO_SUMS)
        stale = progress.epochs_without_improvement
        if stale and stale % args.decay_after == 0 and args.lr_decay < 1 and not args.cosine:
            for group in self.optimizer.param_groups:
                group["lr"] *= args.lr_decay
            self.processes.print(f"learning rate is now {self.last_lr:.3g}")
        return improved

    def set_score_to_beat(self, stats):
        """stats: the metrics of the model to improve on"""
        self.progress.best, self.progress.best_loss = self._score(stats)

    def _score(self, stats):
        """
        What decides between models: the monitored metric, then the validation loss. A metric that
        would be printed as 0.00 is 0: without a common 4-gram BLEU-4 says nothing.
        """
        score = stats[monitored_metric(self.args)]
        return score if score >= 0.005 else 0.0, stats["val_loss"]

    def state_dict(self):
        """A checkpoint's content besides the averaged models; `trained`: the weights averaged"""
        trained = {"encoder": self.encoder.state_dict(), "decoder": self.decoder.state_dict()}
        return {
            "trained": trained if self.args.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "bleu4": self.progress.bleu4,
        }

    def load_state_dict(self, state):
        """Restore `state_dict`, also an older version's; the models already have its weights."""
        saved, groups = state["optimizer"], self.optimizer.state_dict()["param_groups"]
        for group, old in zip(groups, saved["param_groups"], strict=True):
            # Only what changes: another version of torch may have other settings of Adam.
            group["params"], group["lr"] = old["params"], float(old["lr"])
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        if state.get("scaler"):  # empty for other precisions
            self.scaler.load_state_dict(state["scaler"])
        if self.args.ema:
            self.encoder.load_state_dict(state["trained"]["encoder"])
            self.decoder.load_state_dict(state["trained"]["decoder"])
        self.progress = Progress.from_dict(state["progress"])
        self._steps_done = self.progress.epoch * self.steps_per_epoch + self.progress.step
        self.criterion.baseline = torch.tensor(self.progress.baseline)


class _Cells(torch.nn.Module):
    """An encoder's `cells` as a forward pass, the only method that is wrapped for processes."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        return self.encoder.cells(images)


def _parallel(module, processes):
    return module if processes.world_size == 1 else DistributedDataParallel(module)
