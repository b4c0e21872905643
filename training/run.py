"""What a training run keeps besides its weights: where it stands, its data's state, its log."""

import json
import os
import shlex
import zlib
from contextlib import nullcontext
from pathlib import Path

from utils import UserError, atomic_write, exclusive_lock

# Options that are about one start of the program, not about the run.
TRANSIENT_OPTIONS = ("resume", "checkpoint", "overwrite")


def new_progress():
    """
    Where a run stands, saved with its weights: whole epochs, the last BLEU-4, the best score (of
    the metric that decides), epochs since it; rows of the log that are of phases before; the
    baseline of hard attention; and of the epoch begun the batches, with what they add up to: loss
    or reward, words right, words, captions and seconds.
    """
    return {"epoch": 0, "bleu4": None, "best": None, "stale": 0, "rows": 0, "baseline": 0.0,
            "step": 0, "sums": [0.0, 0, 0, 0, 0.0]}


def decisive(args):
    """Which of validation's figures says what is the best model."""
    return "cider_d" if args.self_critical else "bleu4"


def epoch_done(progress, row, optimizer, args, processes):
    """Bring progress and learning rate up to a whole epoch; returns whether it is the best."""
    score = row[decisive(args)]
    better = progress["best"] is None or score > progress["best"]
    stale = 0 if better else progress["stale"] + 1
    progress |= new_progress() | {
        "epoch": row["epoch"], "bleu4": row["bleu4"], "stale": stale,
        "best": score if better else progress["best"], "rows": progress["rows"],
        "baseline": progress["baseline"]}
    if stale and stale % args.decay_after == 0 and not args.cosine:
        for group in optimizer.param_groups:
            group["lr"] *= args.lr_decay
        processes.print(f"learning rate is now {optimizer.param_groups[0]['lr']:.3g}")
    return better


def check_run(checkpoint, defaults, path):
    """
    UserError unless the checkpoint's options have the types of the defaults, and its progress
    that of a run: the file may be anybody's.
    """
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} is a model, not a run to resume; pass it as --checkpoint")
    options, progress = checkpoint.get("options"), checkpoint.get("progress")
    if not isinstance(options, dict) or not isinstance(progress, dict):
        raise UserError(f"{path} is damaged: it has no options or no progress of a run")
    if "best_bleu4" in progress:  # its name when BLEU-4 alone could decide
        progress["best"] = progress.pop("best_bleu4")
    sums = progress.get("sums", new_progress()["sums"])
    numbers = [progress.get("epoch"), progress.get("stale"), progress.get("step", 0),
               progress.get("rows", 0)]
    if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(sums, list) \
            or progress["epoch"] and progress.get("best") is None \
            or len(sums) != 5 or not all(type(n) in (int, float) for n in sums) \
            or not all(type(progress.get(key)) in (float, int, type(None))
                       for key in ("bleu4", "best")) \
            or type(progress.get("baseline", 0.0)) is not float:
        raise UserError(f"{path} is damaged: its progress is none of a run")
    if not all(isinstance(name, str) for name in options):
        raise UserError(f"{path} is damaged: its options have no names")
    for name, default in defaults.items():
        value, kinds = options.get(name, default), {type(default)}
        if default is None:  # of those options, some are texts and some numbers
            kinds = {str, int, type(None)}
        elif type(default) is float:
            kinds = {int, float}
        if name not in TRANSIENT_OPTIONS and type(value) not in kinds:
            raise UserError(f"{path} is damaged: its option {name} is {ascii(value)[:50]}")


def load_optimizer(optimizer, state, trained):
    """
    Give the optimiser the state of a checkpoint; trained: whether it must know every weight.

    Raises ValueError or the like unless the state is one of such an optimiser: its settings but
    the learning rate, and averages of the weights' own sizes.
    """
    def settings():
        return [{key: value for key, value in group.items() if key not in ("params", "lr")}
                for group in optimizer.param_groups]

    ours = settings()
    optimizer.load_state_dict(state)
    if settings() != ours or not all(type(group["lr"]) is float and 0 <= group["lr"] < 1e9
                                     for group in optimizer.param_groups):
        raise ValueError("its optimiser has other settings")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = optimizer.state[parameter] if parameter in optimizer.state else None
            if known is None and not trained:
                continue
            if known is None or known["step"].numel() != 1 or {
                    known[key].shape for key in ("exp_avg", "exp_avg_sq")} != {parameter.shape}:
                raise ValueError("its averages of gradients have other sizes than the weights")


def lock_run(args, processes):
    """A context in which no other run may write to the checkpoint folder; UserError if one does."""
    if not processes.is_main:
        return nullcontext()
    folder = Path(args.checkpoint_folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Loading processes of a run that was killed take some seconds to see it.
    return exclusive_lock(str(folder / f".train_{args.data_name}.lock"),
                 f"another run of {args.data_name} is training in {folder}; wait for it or pass "
                 f"another --checkpoint_folder", timeout=15)


def resume_command(args, name, processes):
    program, here = "python", int(os.environ.get("LOCAL_WORLD_SIZE", processes.world_size))
    if processes.world_size > 1:
        program = f"torchrun --nproc_per_node={here}"
    if processes.world_size > here:  # and on each machine
        program += (f" --nnodes={processes.world_size // here} --rdzv_backend=c10d "
                    f"--rdzv_endpoint=HOST:PORT")
    path = Path(args.checkpoint_folder) / f"checkpoint_{name}.pth.tar"
    return f"{program} train.py --resume {shlex.quote(str(path))}"


def data_state(data, name):
    """What a resumed run must find unchanged, since the order of its batches follows from it."""
    return {"name": name, "images": data.num_images, "captions_per_image": data.captions_per_image,
            "captions": f"{zlib.crc32(data.captions.numpy().tobytes()):08x}"}


def check_data(checkpoint, data, name, path):
    """UserError that says in what the data of a run to resume have changed."""
    theirs, ours = checkpoint.get("data"), data_state(data, name)  # older runs do not tell
    if not isinstance(theirs, dict | None):
        raise UserError(f"{path} is damaged: it does not say what data it was trained on")
    if theirs not in (None, ours):
        differ = ", ".join(f"{key} {theirs.get(key)}, now {ours[key]}" for key in ours
                           if theirs.get(key) != ours[key])
        raise UserError(f"{path} was trained on other data: {differ}; pass their --data_folder, "
                        f"or --checkpoint {path} for a new phase")


def best_file(args, name):
    return Path(args.checkpoint_folder) / f"BEST_checkpoint_{name}.pth.tar"


def _run_files(args, name):
    return [Path(args.checkpoint_folder) / f"checkpoint_{name}.pth.tar", best_file(args, name)]


def _goes_on(args):
    """Whether what the run begins with lies in its folder: it adds to what is there."""
    source = args.resume or args.checkpoint
    return bool(source) and Path(source).resolve().parent == Path(args.checkpoint_folder).resolve()


def check_folder(args, name):
    """UserError if another run is in the folder already that is not to be replaced."""
    for path in _run_files(args, name):
        if path.exists() and not args.overwrite and not _goes_on(args):
            raise UserError(f"{path} is of an earlier run; pass --resume to go on with it, "
                            f"--overwrite to replace it, or another --checkpoint_folder")


def _epoch(line):
    """The epoch of a row of the log; infinity if a kill has left only part of the row."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return float("inf")
    return epoch if type(epoch) is int else float("inf")


def open_log(args, name, progress, processes):
    """
    A function that logs a row of figures to log_NAME.jsonl, and to TensorBoard if asked to. From
    here on the folder is this run's: another one that was there is gone.
    """
    folder = Path(args.checkpoint_folder)
    path, writer = folder / f"log_{name}.jsonl", None
    if not processes.is_main:
        return lambda row: None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs a package; run pip install tensorboard") from None
    folder.mkdir(parents=True, exist_ok=True)
    # A resumed run keeps the rows up to where it goes on; a new phase adds to those before it.
    goes_on = path.exists() and _goes_on(args)
    kept = path.read_text(errors="replace").splitlines() if goes_on else []
    if args.resume:
        while len(kept) > progress["rows"] and not _epoch(kept[-1]) <= progress["epoch"]:
            kept.pop()
    else:
        progress["rows"] = len(kept)
    with atomic_write(path) as temporary:
        Path(temporary).write_text("".join(line + "\n" for line in kept))
    if not _goes_on(args):
        for file in _run_files(args, name):
            file.unlink(missing_ok=True)
    before = progress["rows"]
    if args.tensorboard:
        writer = SummaryWriter(folder / f"tensorboard_{name}",
                               purge_step=before + progress["epoch"] + 1)

    def log(row):
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if writer:
            for key, value in row.items():
                writer.add_scalar(key, value, before + row["epoch"])
            writer.flush()
    return log
