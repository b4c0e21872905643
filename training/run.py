"""`Run`: a training run in its checkpoint folder: its lock, checkpoints, log and interruption."""

import json
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import checkpoints
from datasets import CaptionDataset
from modeling.workers import WorkerDied
from training import resume
from training.interrupts import Interrupted, Interrupts
from training.resume import best_path, continues, last_path
from training.state import monitored_metric
from utils import UserError, atomic_write, count, exclusive_lock


class Run:
    """
    `with Run(state, train_data) as run:` the run in args.checkpoint_folder. After a signal within
    the block, the state is saved and the script exits with the command that continues the run.
    """

    def __init__(self, state, train_data):
        self.args, self.state, self.processes = state.args, state, state.processes
        self.word_map, self.data = train_data.word_map, resume.describe_data(self.args, train_data)
        self.interrupts, self._last_save, self._log = Interrupts(), time.monotonic(), None

    def __enter__(self):
        if self.processes.is_main:
            self._log = Log(self.args, self.state.progress, self.word_map)
        self.interrupts.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        state, progress = self.state, self.state.progress
        advice = f"continue with: {resume.resume_command(self.args, self.processes)}"
        try:
            if isinstance(error, (Interrupted, WorkerDied)):
                self.interrupts.saving = True  # which another signal must not interrupt
                self.save()
            if isinstance(error, Interrupted):
                if not self.processes.is_main:
                    raise SystemExit(error.code) from None
                done = f"{progress.step} of {state.steps_per_epoch} batches, all saved; {advice}"
                message = f"stopped in epoch {progress.epoch + 1} after {done}"
                raise Interrupted(error.signum, message) from None
            if isinstance(error, WorkerDied):
                raise UserError(f"{error}; all steps are saved, {advice}") from None
        finally:
            self.interrupts.__exit__()

    def start_phase(self, stats):
        """stats: the validation metrics of the checkpoint's model, the score to improve on"""
        self.processes.print(f"start   {format_scores(stats)}")
        self.state.set_score_to_beat(stats)
        with self.interrupts.deferred():
            if not best_path(self.args).exists():
                self.save(best_path(self.args))  # so that a new folder has a best model
            self.save()  # from here on --resume continues this phase

    def epochs(self):
        """Yield the numbers of the remaining epochs, until the options say to stop."""
        args, progress, begin = self.args, self.state.progress, self.state.progress.epoch
        while (
            progress.epoch < args.epochs and progress.epochs_without_improvement < args.stop_after
        ):
            if progress.epoch == begin:  # it may be an hour until the epoch's line
                batches = count(self.state.steps_per_epoch, "batch", "batches")
                self.state.processes.print(
                    f"training from epoch {begin + 1}, {batches} an epoch ..."
                )
            yield progress.epoch + 1

    def save_due(self):
        """Whether it is time to save; if so, restarts the clock."""
        if time.monotonic() - self._last_save < 60 * self.args.save_minutes:
            return False
        self._last_save = time.monotonic()
        return True

    def save(self, path=None):
        """Write the state to the run's checkpoint, or to another path."""
        if not self.processes.is_main:
            return
        encoder, decoder = self.state.averaged_encoder, self.state.averaged_decoder
        if self.args.fine_tune_encoder:  # it was measured with older weights
            encoder.offset = None
        options = {k: v for k, v in vars(self.args).items() if k not in resume.TRANSIENT_OPTIONS}
        content = {"options": options, "data": self.data, **self.state.state_dict()}
        checkpoints.save(path or last_path(self.args), encoder, decoder, self.word_map, **content)

    def end_epoch(self, stats):
        """Print, count, log and save an epoch; stats: its training and validation metrics"""
        name = "reward" if self.args.self_critical else "loss"
        self.processes.print(
            f"epoch {stats['epoch']:3d}   {name} {stats[f'train_{name}']:.3f} in "
            f"{stats['train_seconds']:.0f} s   {format_scores(stats)}"
        )
        with self.interrupts.deferred():
            if self.state.after_epoch(stats):
                self.save(best_path(self.args))
            if self._log:
                self._log.write(stats)
            self.save()  # last: until then, a resumed run repeats all of the above
        if self._log:
            self._log.draw(self.state)

    def print_summary(self):
        progress = self.state.progress
        metric = {"bleu4": "BLEU-4", "cider_d": "CIDEr-D"}[monitored_metric(self.args)]
        best = progress.epoch - progress.stale
        source = f"epoch {best}" if best else "the model that the phase started from"
        self.processes.print(
            f"done after epoch {progress.epoch}: best validation {metric} {progress.best:.2f}, "
            f"from {source}, in {best_path(self.args)}"
        )


def format_scores(stats):
    """The validation's metrics in a line: the mean's, and those of each source if several."""
    sources = [key.removeprefix("bleu4_") for key in stats if key.startswith("bleu4_")]
    names = {"mean " if sources else "": ""} | {f"{source} ": f"_{source}" for source in sources}
    scores = [
        f"{name}BLEU-4 {stats['bleu4' + key]:.2f}, CIDEr-D {stats['cider_d' + key]:.2f}"
        for name, key in names.items()
    ]
    return (
        f"teacher-forced: loss {stats['val_loss']:.3f}, top-5 {stats['val_top5']:.2f} %, "
        f"BLEU-4 {stats['teacher_forced_bleu4']:.2f}   free-running: {'; '.join(scores)}"
    )


class Log:
    """
    log_NAME.jsonl, its curves in log_NAME.png, and TensorBoard's files with --tensorboard: the same
    figures, and some captioned validation photographs. Unless the run continues what is in the
    folder, creating its Log removes the log, curves and checkpoints of an earlier run.
    """

    def __init__(self, args, progress, word_map):
        folder = Path(args.checkpoint_folder)
        self.path, self._writer = folder / f"log_{args.data_name}.jsonl", None
        self._curves = self.path.with_suffix(".png")
        if args.tensorboard:  # before anything of an earlier run is removed
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--tensorboard needs: pip install tensorboard") from None
            from training.pictures import ValidationPictures  # only here: matplotlib is slow

            val_data = CaptionDataset(args.data_folder, args.data_name, "VAL")
            self._pictures = ValidationPictures(val_data, word_map)
        rows = []
        if continues(args) and self.path.exists():
            rows = self.path.read_text(errors="replace").splitlines()
        # A resumed run keeps the rows up to its last epoch; a new phase appends to earlier phases.
        if args.resume:
            del rows[progress.rows + progress.epoch :]
        else:
            progress.rows = len(rows)
        with atomic_write(self.path) as temporary:
            Path(temporary).write_text("".join(row + "\n" for row in rows))
        if not continues(args):
            for path in (last_path(args), best_path(args), self._curves):
                path.unlink(missing_ok=True)
        self._previous_rows = progress.rows
        if args.tensorboard:
            events, step = folder / f"tensorboard_{args.data_name}", progress.rows + progress.epoch
            self._writer = SummaryWriter(events, purge_step=step + 1)

    def write(self, row):
        """row: an epoch's metrics"""
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer:
            for key, value in row.items():
                self._writer.add_scalar(key, value, self._previous_rows + row["epoch"])

    def draw(self, state):
        """The curves, whose failure does not end the run, and TensorBoard's pictures."""
        try:
            from visualization.curves import write_curves  # only here: matplotlib is slow

            write_curves(self.path, self._curves)
        except Exception as error:
            reason = " ".join(str(error).split())
            print(f"{self._curves} was not drawn: {reason}", file=sys.stderr)
        if self._writer:
            self._pictures.write(self._writer, state, self._previous_rows + state.progress.epoch)
            self._writer.flush()


@contextmanager
def lock_run(args, processes):
    """
    A context in which no other run of the data set can write to the checkpoint folder. UserError if
    one does so now, or if the folder has an earlier run that may not be replaced.
    """
    folder, name, lock = Path(args.checkpoint_folder), args.data_name, nullcontext()
    if processes.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        busy = f"another run of {name} is training in {folder}; wait for it or pass another "
        busy += "--checkpoint_folder"
        # The workers of a killed run may hold the lock for some seconds.
        lock = exclusive_lock(str(folder / f".train_{name}.lock"), busy, timeout=15)
    with lock:
        for path in (last_path(args), best_path(args)):  # in all processes, so that all of them end
            if path.exists() and not args.overwrite and not continues(args):
                raise UserError(
                    f"{path} is of an earlier run; pass --resume to continue it, --overwrite to "
                    f"replace it, or another --checkpoint_folder"
                )
        yield
