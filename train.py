"""
Train the captioning model.

    python train.py                                            # phase 1: the decoder alone
    python train.py --checkpoint BEST_checkpoint_X.pth.tar --fine_tune_encoder   # phase 2
    python train.py --checkpoint BEST_checkpoint_X.pth.tar --self_critical       # phase 3
    python train.py --resume                                   # continue an interrupted run
    torchrun --nproc_per_node=4 train.py                       # the same run on four GPUs
"""

import argparse
from pathlib import Path

import checkpoints
from datasets import add_data_options, find_data_name
from modeling.devices import distributed, set_seed
from models import DECODERS
from training.build import (
    build_criterion,
    build_loaders,
    build_model,
    cache_features_if_frozen,
    load_splits,
    model_options,
)
from training.engine import train_one_epoch, validate
from training.resume import check_same_data, check_unchanged, load_run, restore_state
from training.run import Run, lock_run
from training.state import TrainingState
from utils import (
    Number,
    Parser,
    UserError,
    add_device_options,
    non_negative_float,
    non_negative_int,
    positive_int,
    run_script,
)


def train(args, checkpoint, processes):
    set_seed(args.seed)
    train_data, val_data = load_splits(args, processes)
    if args.resume:
        check_same_data(args, checkpoint, train_data)
    encoder, decoder = build_model(args, checkpoint, (train_data, val_data), processes)
    criterion = build_criterion(args, train_data)  # a mistake in its files must not cost an hour
    cache_features_if_frozen(args, encoder, (train_data, val_data), processes)
    train_loader, val_loader = build_loaders(args, train_data, val_data, processes)
    state = TrainingState(
        args, encoder, decoder, criterion, train_loader.sampler.num_batches, processes
    )
    start = None
    if args.resume:
        restore_state(state, checkpoint)
    elif checkpoint:
        # Before Run: interrupted here, the phase has not begun, and there is nothing to resume.
        start = validate(state, val_loader)
    with Run(state, train_data) as run:
        if start:
            run.start_phase(start)
        for epoch in run.epochs():
            stats = {"epoch": epoch, **train_one_epoch(state, train_loader, epoch, run)}
            run.save()  # in case the validation fails
            stats |= validate(state, val_loader)
            run.end_epoch(stats)
    run.print_summary()


def main(argv=None):
    args, checkpoint = get_options_and_checkpoint(argv)
    with distributed(args.device) as processes:
        args.data_name = find_data_name(args.data_folder, args.data_name)
        with lock_run(args, processes):
            train(args, checkpoint, processes)


def get_options_and_checkpoint(argv):
    """
    The options, and the checkpoint to start from or None. A resumed run takes its options from the
    checkpoint, a new phase only those of the model.
    """
    given = make_parser().parse_given(argv)
    path = given.get("resume")
    if path and given.get("checkpoint"):
        raise UserError("--resume continues a run, --checkpoint starts a phase; pass one of them")
    if not path:
        args = add_defaults(given)
        if not args.checkpoint:
            return args, None
        checkpoint = checkpoints.load(args.checkpoint)
        return add_defaults(given, args.checkpoint, model_options(checkpoint)), checkpoint
    if path is True:
        path = checkpoints.find_latest(given.get("checkpoint_folder", "."))
    checkpoint = load_run(path)
    options = {**checkpoint["options"], "checkpoint_folder": str(Path(path).parent)}
    args = add_defaults(given, path, options)
    args.resume = path
    check_unchanged(args, {**make_parser().options(), **options}, checkpoint["progress"])
    return args, checkpoint


def make_parser():
    parser = Parser(description=__doc__)
    flag = argparse.BooleanOptionalAction

    group = parser.add_argument_group("data")
    add_data_options(group)
    add = group.add_argument
    add("--batch_size", type=positive_int, default=80, help="captions per step, over all processes")
    add(
        "--accumulate",
        type=positive_int,
        default=1,
        help="split each step's captions into this many parts, which takes less memory",
    )
    add(
        "--single_captions",
        action="store_true",
        help="shuffle single captions instead of images with all their captions",
    )
    add("--workers", type=non_negative_int, default=1, help="processes that load batches; 0: none")
    add(
        "--cache_features",
        action=flag,
        default=True,
        help="with a frozen encoder, encode each image once and keep the result beside the data",
    )
    add("--features_folder", help="where to keep them; if not given, beside the data")
    add(
        "--cache_in",
        choices=("disk", "ram", "device"),
        help="where to read it from while training; if not given, the fastest in which it fits",
    )

    add = parser.add_argument_group(
        "model", "with --checkpoint and --resume these come from the file"
    ).add_argument
    add("--encoder", default="resnet101", help="any convolutional classifier of torchvision, timm")
    add(
        "--encoder_stride",
        type=positive_int,
        choices=(16, 32),
        default=32,
        help="pixels of the "
        "image to a location; 16: a finer attention grid, by dilating the encoder's last stage",
    )
    add(
        "--encoder_weights",
        default="imagenet",
        help="imagenet, none (random) or a file: "
        "a state dict, or a checkpoint whose encoder to use; not with --checkpoint and --resume, "
        "which have their own",
    )
    add(
        "--emb_dim",
        type=positive_int,
        help="size of the word embeddings; if not given, that of --embeddings, else 512",
    )
    add(
        "--attention",
        choices=DECODERS,
        default="soft",
        help="hard: train with one sampled location at a time, section 4.1 of the paper; for an "
        "attention of your own see docs/extending.md",
    )
    add(
        "--attention_dim",
        type=positive_int,
        default=512,
        help="size of the hidden layer that scores each location",
    )
    add("--decoder_dim", type=positive_int, default=512, help="size of the LSTM's state")
    add(
        "--pretrain_text",
        nargs="+",
        metavar="FILE",
        help="captions without images, from which "
        "the decoder learns to write first: a line each, or IMAGE TAB CAPTION; may end in .gz",
    )
    add("--pretrain_epochs", type=positive_int, default=5, help="how often to read them")
    add(
        "--dropout",
        type=Number(float, least=0, below=1),
        default=0.5,
        help="of the LSTM's state before the logits",
    )
    add("--embeddings", help="pretrained word embeddings, a text file in GloVe's format")
    add(
        "--fine_tune_embeddings",
        action=flag,
        default=True,
        help="train the embeddings, including those of --embeddings",
    )

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=positive_int, default=120, help="the most epochs to train")
    add("--decoder_lr", type=non_negative_float, default=4e-4, help="learning rate of Adam")
    add("--encoder_lr", type=non_negative_float, default=1e-4, help="with --fine_tune_encoder")
    add("--fine_tune_encoder", action=flag, default=False, help="train blocks 2-4 of the encoder")
    add(
        "--augment",
        action="store_true",
        help="train on random crops and mirror images; not with cached features",
    )
    add(
        "--grad_clip",
        type=non_negative_float,
        default=5.0,
        help="clip each gradient to plus or minus this value",
    )
    add(
        "--ema",
        type=Number(float, least=0, below=1),
        default=0.0,
        help="validate and save an "
        "exponential moving average of the weights with this decay per step, such as 0.999; 0: "
        "none",
    )
    add(
        "--cosine",
        action="store_true",
        help="let the learning rate fall to 0 over --epochs along "
        "half a cosine, instead of by --lr_decay",
    )
    add(
        "--lr_decay",
        type=Number(float, above=0, most=1),
        default=0.8,
        help="multiply the "
        "learning rate by this after each --decay_after epochs without a better validation BLEU-4 "
        "(--self_critical: CIDEr-D)",
    )
    add("--decay_after", type=positive_int, default=8, help="see --lr_decay")
    add(
        "--stop_after",
        type=positive_int,
        default=20,
        help="end the run after this many epochs without improvement",
    )
    add(
        "--val_beam_size",
        type=positive_int,
        default=1,
        help="beam size of the free-running validation",
    )
    add(
        "--seed",
        type=non_negative_int,
        default=0,
        help="of initial weights, dropout and the order of batches",
    )

    add = parser.add_argument_group("loss").add_argument
    add(
        "--alpha_c",
        type=non_negative_float,
        default=1.0,
        help="weight of the doubly stochastic attention term",
    )
    add(
        "--lambda_r",
        type=non_negative_float,
        default=0.01,
        help="hard attention: weight of the reward term",
    )
    add(
        "--lambda_e",
        type=non_negative_float,
        default=0.01,
        help="hard attention: weight of the entropy term",
    )
    add(
        "--sampling_max",
        type=Number(float, least=0, most=1),
        default=0.0,
        help="scheduled "
        "sampling: the highest probability of feeding back a sampled word instead of the true one",
    )
    add(
        "--sampling_step",
        type=non_negative_float,
        default=0.05,
        help="the probability starts at 0 and rises by this ...",
    )
    add("--sampling_every", type=positive_int, default=5, help="... after every so many epochs")
    add(
        "--self_critical",
        action="store_true",
        help="with --checkpoint: train on the CIDEr-D of captions sampled from the model",
    )
    add(
        "--samples",
        type=Number(int, least=2),
        default=5,
        help="--self_critical: captions sampled per image",
    )
    add(
        "--cross_entropy_share",
        type=Number(float, least=0, below=1),
        default=0.0,
        help="--self_critical: the share of the cross-entropy of the true captions in the loss",
    )

    add = parser.add_argument_group("files").add_argument
    add("--checkpoint", help="start a new phase from this model")
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="FILE",
        help="continue a run with its options; without FILE, the latest in --checkpoint_folder",
    )
    add("--overwrite", action="store_true", help="replace the run in --checkpoint_folder")
    add(
        "--save_minutes",
        type=non_negative_float,
        default=10.0,
        help="time between saves within an epoch",
    )
    add("--checkpoint_folder", default=".", help="where to write checkpoints and the log")
    add(
        "--tensorboard",
        action="store_true",
        help="also log to tensorboard_NAME/, with "
        "validation photographs, their captions and attention",
    )

    add_device_options(parser.add_argument_group("device"))
    return parser


def get_args(argv=None, source=None, options=None):
    """options: default values by option name, from the checkpoint file `source`"""
    return add_defaults(make_parser().parse_given(argv), source, options)


def add_defaults(given, source=None, options=None):
    """
    All options, a Namespace: those that were given, by name, and defaults for the others, as in
    `get_args`. UserError if they contradict each other.
    """
    parser = make_parser()
    parser.set_options_from(source, options or {})
    args = argparse.Namespace(**(parser.options() | given))
    if args.self_critical:
        for name, allowed in (
            ("attention", "soft"),
            ("sampling_max", 0),
            ("single_captions", False),
        ):
            # how the model that the phase starts from was trained
            of_model = name == "attention" and args.attention == (options or {}).get(name)
            if getattr(args, name) != allowed and not of_model:
                parser.error(
                    f"--{name} is for training on true captions, which --self_critical "
                    f"does not use; leave one of the two out"
                )
        if not args.checkpoint and not args.resume:
            parser.error("--self_critical needs a trained model to start from, --checkpoint FILE")
    elif args.cross_entropy_share:
        parser.error("--cross_entropy_share is for --self_critical; leave it out")
    return args


if __name__ == "__main__":
    run_script(main)
