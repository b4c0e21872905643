"""
Resuming a run, so that it ends with the weights of a run that was not interrupted, on a CPU bit for
bit. That takes the same

- batches: `datasets.ResumableBatchSampler` derives their order from seed and epoch;
- random numbers, those of dropout too: `engine.train_one_epoch` seeds each step by seed, epoch,
  step and process;
- weights, optimizer, schedule and averages: `state.TrainingState.load_state_dict`;
- options and data, which are compared here.
"""

import os
import shlex
import zlib
from pathlib import Path

import checkpoints
from utils import UserError, count

# Options of a single start of the script, which are not saved with the run.
TRANSIENT_OPTIONS = ("resume", "checkpoint", "overwrite")
# Options that must not change when a run is resumed: always, since optimizer and model depend on
# them; within an epoch, since the order of its batches does; and with --cosine, since the learning
# rate does.
FIXED = (
    "decoder_lr",
    "encoder_lr",
    "fine_tune_encoder",
    "fine_tune_embeddings",
    "self_critical",
    "ema",
    "augment",
    "embeddings",
    "cosine",
)
FIXED_WITHIN_EPOCH = ("batch_size", "single_captions", "seed", "attention", "accumulate")
FIXED_WITH_COSINE = ("batch_size", "single_captions", "epochs")


def load_run(path):
    """The checkpoint of a run to resume; UserError unless it is one."""
    checkpoint = checkpoints.load(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} is a model, not a run to resume; pass it as --checkpoint")
    if not isinstance(checkpoint.get("options"), dict) or not isinstance(
        checkpoint.get("progress"), dict
    ):
        raise UserError(f"{path} is damaged: the run's options or progress are missing")
    if not isinstance(checkpoint.get("data"), dict | None):  # None in older runs
        raise UserError(f"{path} is damaged: it does not say what data it was trained on")
    return checkpoint


def check_unchanged(args, options, progress):
    """UserError if args differ from the run's saved options in one that must not change."""
    fixed = [
        *FIXED,
        *FIXED_WITHIN_EPOCH * bool(progress.get("step")),
        *FIXED_WITH_COSINE * options["cosine"],
    ]
    for option in fixed:
        if getattr(args, option) != options[option]:
            raise UserError(
                f"{args.resume} was run with {option} {options[option]}, which "
                f"--resume cannot change; for a new phase pass --checkpoint "
                f"{args.resume}"
            )


def check_same_data(args, checkpoint, train_data):
    """UserError unless the checkpoint's run was trained on this data."""
    data, saved_data = describe_data(args, train_data), checkpoint.get("data")
    if saved_data not in (None, data):
        changes = ", ".join(
            f"{key} {saved_data.get(key)}, now {data[key]}"
            for key in data
            if saved_data.get(key) != data[key]
        )
        raise UserError(
            f"{args.resume} was trained on other data: {changes}; pass their "
            f"--data_folder, or --checkpoint {args.resume} for a new phase"
        )


def restore_state(state, checkpoint):
    """Load the checkpoint into `state`; UserError unless it fits the options."""
    args = state.args
    try:
        state.load_state_dict(checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{args.resume} does not fit this run: {reason}") from None
    progress = state.progress
    state.processes.print(
        f"resuming {args.resume}: {count(progress.epoch, 'epoch')} and "
        f"{count(progress.step, 'batch', 'batches')} are done"
    )
    if progress.epoch >= args.epochs:
        state.processes.print(
            f"nothing is left to do: --epochs is {args.epochs}; pass more to go on"
        )


def describe_data(args, data):
    """A summary of the data, which must be the same when a run is resumed."""
    return {
        "name": args.data_name,
        "images": data.num_images,
        "captions_per_image": data.captions_per_image,
        "captions": f"{zlib.crc32(data.captions.numpy().tobytes()):08x}",
    }


def resume_command(args, processes):
    program, world_size = "python", processes.world_size
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if world_size > 1:
        program = f"torchrun --nproc_per_node={local_world_size}"
    if world_size > local_world_size:  # to be run on each machine
        program += (
            f" --nnodes={world_size // local_world_size} --rdzv_backend=c10d "
            f"--rdzv_endpoint=HOST:PORT"
        )
    return f"{program} train.py --resume {shlex.quote(str(last_path(args)))}"


# Files in the checkpoint folder


def last_path(args):
    return Path(args.checkpoint_folder) / f"checkpoint_{args.data_name}.pth.tar"


def best_path(args):
    return Path(args.checkpoint_folder) / f"BEST_checkpoint_{args.data_name}.pth.tar"


def continues(args):
    """Whether the run starts from a checkpoint in its own folder, and so continues its log."""
    source = args.resume or args.checkpoint
    return bool(source) and Path(source).resolve().parent == Path(args.checkpoint_folder).resolve()
