"""
Resuming a run, so that it ends with the weights of a run that was not interrupted, on a CPU bit for
bit. Besides what `TrainingState.load_state_dict` restores, that takes the same batches (their order
is derived by `ResumableBatchSampler` from seed and epoch), the same random numbers (seeded by
`train_one_epoch` for each step), and the same options and data, which are compared here.
"""

import os
import shlex
import zlib
from pathlib import Path

import checkpoints
from utils import UserError, count

# Options of one start of the script, which are not saved with the run.
TRANSIENT_OPTIONS = ("resume", "checkpoint", "overwrite")
# Options that a resumed run keeps, since optimizer and model depend on them; within an epoch, since
# the order of its batches does; and with --cosine, since the learning rate does.
FIXED = "decoder_lr encoder_lr fine_tune_encoder fine_tune_embeddings embeddings".split()
FIXED += "self_critical ema augment cosine".split()
FIXED_WITHIN_EPOCH = "batch_size single_captions seed attention accumulate".split()
FIXED_WITH_COSINE = "batch_size single_captions epochs".split()


def load_run(path):
    """The checkpoint of a run to resume; UserError unless it is one."""
    checkpoint = checkpoints.load(path)
    parts = "optimizer", "options", "progress"
    if not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise UserError(f"{path} is a model, not a run to resume; pass it as --checkpoint")
    return checkpoint


def check_unchanged(path, given, saved, progress):
    """UserError if an option that must not change was given another value than that saved."""
    within_epoch = FIXED_WITHIN_EPOCH if progress.get("step") else []
    with_cosine = FIXED_WITH_COSINE if saved["cosine"] else []
    for option in FIXED + within_epoch + with_cosine:
        if given.get(option, saved[option]) != saved[option]:
            raise UserError(
                f"{path} was run with {option} {saved[option]}, which --resume cannot change; for "
                f"a new phase pass --checkpoint {path}"
            )


def check_folders(path, given, saved):
    """UserError unless a run finds what it was saved to read, whose paths may be relative."""
    options = saved | given
    read = {"data_folder": f"WORDMAP_{options['data_name']}.json"}
    if options["cache_features"] and not options["fine_tune_encoder"]:
        read["features_folder"] = ""  # it would be made, and filled for hours
    for option, file in read.items():
        folder = saved[option]
        if folder and option not in given and not os.path.exists(os.path.join(folder, file)):
            raise UserError(
                f"{path} was run with --{option} {folder}, which is not here; pass --{option}"
            )


def check_same_data(args, checkpoint, train_data):
    """UserError unless the checkpoint's run used this data; older checkpoints do not say which."""
    data, saved = describe_data(args, train_data), checkpoint.get("data")
    if saved and saved != data:
        raise UserError(
            f"{args.resume} was trained on other data, {saved}, not {data}; pass their "
            f"--data_folder, or --checkpoint {args.resume} for a new phase"
        )


def describe_data(args, data):
    """A summary of the data, which must be the same when a run is resumed."""
    return {
        "name": args.data_name,
        "images": data.num_images,
        "captions_per_image": data.captions_per_image,
        "captions": f"{zlib.crc32(data.captions.numpy().tobytes()):08x}",
    }


def restore_state(state, checkpoint):
    """Load the checkpoint into `state`; UserError unless it fits the options."""
    args, say = state.args, state.processes.print
    try:
        state.load_state_dict(checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{args.resume} does not fit this run: {reason}") from None
    progress = state.progress
    done = f"{count(progress.epoch, 'epoch')} and {count(progress.step, 'batch', 'batches')}"
    say(f"resuming {args.resume}: {done} are done")
    if progress.epoch >= args.epochs:
        say(f"nothing is left to do: --epochs is {args.epochs}; pass more to go on")


def resume_command(args, processes):
    """The command that continues the run, for each machine if there are several."""
    program, world_size = "python", processes.world_size
    if world_size > 1:
        per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        program = f"torchrun --nproc_per_node={per_machine}"
        if per_machine < world_size:
            machines = world_size // per_machine
            program += f" --nnodes={machines} --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT"
    return f"{program} train.py --resume {shlex.quote(str(last_path(args)))}"


def last_path(args):
    return Path(args.checkpoint_folder) / f"checkpoint_{args.data_name}.pth.tar"


def best_path(args):
    return Path(args.checkpoint_folder) / f"BEST_checkpoint_{args.data_name}.pth.tar"


def continues(args):
    """Whether the run starts from a checkpoint in its own folder, and so continues its log."""
    source = args.resume or args.checkpoint
    return bool(source) and Path(source).resolve().parent == Path(args.checkpoint_folder).resolve()
