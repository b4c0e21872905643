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
from training.resume import check_folders, check_same_data, check_unchanged, load_run, restore_state
from training.run import Run, lock_run
from training.state import TrainingState
from utils import (
    Number,
    Parser,
    UserError,
    add_device_options,
    large_int,
    non_negative_float,
    non_negative_int,
    positive_int,
    process_count,
    run_script,
    small_int,
    timed,
)

share = Number(float, minimum=0, below=1)
size = Number(int, minimum=1, maximum=10_000)  # of a layer: larger ones fill the memory


def train(args, checkpoint, processes):
    set_seed(args.seed)
    train_data, val_data = load_splits(args)
    if args.resume:
        check_same_data(args, checkpoint, train_data)
    encoder, decoder = build_model(args, checkpoint, (train_data, val_data), processes)
    criterion = build_criterion(args, train_data)  # a mistake in its files must not cost an hour
    cache_features_if_frozen(args, encoder, (train_data, val_data), processes)
    train_loader, val_loader = build_loaders(args, train_data, val_data, processes)
    steps = train_loader.sampler.num_batches
    state = TrainingState(args, encoder, decoder, criterion, steps, processes)
    start = None
    if args.resume:
        restore_state(state, checkpoint)
    elif checkpoint:
        # Before Run: interrupted here, the phase has not begun, and there is nothing to resume.
        with timed("validation of the model to start from", processes.print):
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
    """The options, those of a run or model taken from its file, and the checkpoint or None."""
    parser = make_parser()
    given = parser.parse_given(argv)
    path, resume, checkpoint = given.get("checkpoint"), given.get("resume"), None
    if resume and path:
        raise UserError("--resume continues a run, --checkpoint starts a phase; pass one of them")
    if resume:
        if resume is True:
            resume = checkpoints.find_latest(given.get("checkpoint_folder", "."))
        given["resume"], checkpoint = resume, load_run(resume)
        options = {**checkpoint["options"], "checkpoint_folder": str(Path(resume).parent)}
        parser.set_options_from(resume, options)
        check_unchanged(resume, given, parser.options(), checkpoint["progress"])
        check_folders(resume, given, parser.options())
    elif path:
        combine(parser, given)  # refuses conflicts, also if the file is missing
        checkpoint = checkpoints.load(path)
        parser.set_options_from(path, model_options(checkpoint))
    return combine(parser, given), checkpoint


def get_args(argv=None, source=None, options=None):
    """options: default values by option name, from the checkpoint file `source`"""
    parser = make_parser()
    parser.set_options_from(source, options or {})
    return combine(parser, parser.parse_given(argv))


def combine(parser, given):
    """The options given and the parser's defaults for the others; UserError if they conflict."""
    args = argparse.Namespace(**(parser.options() | given))
    if args.self_critical:
        for name, unused in {"attention": "soft", "sampling_max": 0, "single_captions": 0}.items():
            if given.get(name, unused) != unused:
                parser.error(f"--{name} is for teacher forcing; leave it or --self_critical out")
        if not args.checkpoint and not args.resume:
            parser.error("--self_critical needs a trained model to start from, --checkpoint FILE")
        if args.evidence_c and not args.cross_entropy_share:
            parser.error("--evidence_c uses the true captions; add --cross_entropy_share")
    elif args.cross_entropy_share:
        parser.error("--cross_entropy_share needs --self_critical; add it or leave this out")
    if args.evidence_c and (args.sampling_max or args.attention == "hard"):
        parser.error("--evidence_c excludes --sampling_max and --attention hard; leave one out")
    return args


def make_parser():
    parser = Parser(description=__doc__)

    def add(name, type=None, default=None, help=None, **more):
        group.add_argument(name, type=type, default=default, help=help, **more)

    def flag(name, help, default=None):
        """--name; with a default --no-name, too"""
        action = "store_true" if default is None else argparse.BooleanOptionalAction
        group.add_argument(name, action=action, default=bool(default), help=help)

    group = parser.add_argument_group("data")
    add_data_options(group)
    add("--batch_size", large_int, 80, "captions per step, over all processes")
    add("--accumulate", positive_int, 1, "take each step in this many parts, in less memory")
    flag("--single_captions", "shuffle single captions instead of images with all their captions")
    add("--workers", process_count, 1, "processes that load batches; 0: none")
    flag("--cache_features", "encode each image once, while the encoder is frozen", True)
    add("--features_folder", help="where to keep cached features; if not given, beside the data")
    cache_help = "where to read them from while training; if not given, the fastest that fits them"
    add("--cache_in", help=cache_help, choices=("disk", "ram", "device"))

    group = parser.add_argument_group(
        "model", "with --checkpoint and --resume these come from the file"
    )
    add("--encoder", str, "resnet101", "any convolutional classifier of torchvision or timm")
    stride_help = "image pixels per cell of its grid; 16: a finer one, by dilating the last stage"
    add("--encoder_stride", positive_int, 32, stride_help, choices=(16, 32))
    weights_help = "imagenet, none (random) or a file: a state dict, or a checkpoint's encoder"
    add("--encoder_weights", str, "imagenet", weights_help)
    embeddings_help = "size of the word embeddings; if not given, that of --embeddings, else 512"
    add("--emb_dim", size, help=embeddings_help)
    attention_help = "hard: train with one sampled location at a time (section 4.1 of the paper)"
    add("--attention", str, "soft", attention_help, choices=DECODERS)
    add("--attention_dim", size, 512, "size of the hidden layer that scores each location")
    add("--decoder_dim", size, 512, "size of the LSTM's state")
    text_help = "pretrain on captions without images, one per line, or IMAGE TAB CAPTION"
    add("--pretrain_text", help=text_help, nargs="+", metavar="FILE")
    add("--pretrain_epochs", positive_int, 5, "epochs of --pretrain_text")
    add("--dropout", share, 0.5, "of the LSTM's state before the logits")
    add("--embeddings", help="pretrained word embeddings, a text file in GloVe's format")
    flag("--fine_tune_embeddings", "train the embeddings, including those of --embeddings", True)

    group = parser.add_argument_group("optimization")
    add("--epochs", positive_int, 120, "maximum number of epochs")
    add("--decoder_lr", non_negative_float, 4e-4, "learning rate of Adam")
    add("--encoder_lr", non_negative_float, 1e-4, "with --fine_tune_encoder")
    flag("--fine_tune_encoder", "train blocks 2-4 of the encoder", False)
    flag("--augment", "train on random crops and mirror images; not with cached features")
    add("--grad_clip", non_negative_float, 5.0, "clip each gradient to plus or minus this value")
    ema_help = "validate and save averaged weights, of this decay per step such as 0.999; 0: none"
    add("--ema", share, 0.0, ema_help)
    flag("--cosine", "learning rate: half a cosine down to 0 over --epochs, instead of --lr_decay")
    decay_help = "the learning rate's factor after each --decay_after epochs without improvement"
    add("--lr_decay", Number(float, above=0, maximum=1), 0.8, decay_help)
    add("--decay_after", positive_int, 8, "see --lr_decay")
    add("--stop_after", positive_int, 20, "end the run after this many epochs without improvement")
    add("--val_beam_size", small_int, 1, "beam size of the free-running validation")
    add("--seed", non_negative_int, 0, "of initial weights, dropout and the order of batches")

    group = parser.add_argument_group("loss")
    add("--alpha_c", non_negative_float, 1.0, "weight of the doubly stochastic attention term")
    evidence_help = "weight of a term that draws attention to the words' evidence, such as 3"
    add("--evidence_c", non_negative_float, 0.0, evidence_help)
    add("--lambda_r", non_negative_float, 0.01, "hard attention: weight of the reward term")
    add("--lambda_e", non_negative_float, 0.01, "hard attention: weight of the entropy term")
    sampling_help = "scheduled sampling: the maximum probability of feeding back a sampled word"
    add("--sampling_max", Number(float, minimum=0, maximum=1), 0.0, sampling_help)
    add("--sampling_step", non_negative_float, 0.05, "it starts at 0 and rises by this ...")
    add("--sampling_every", positive_int, 5, "... after every so many epochs")
    flag("--self_critical", "with --checkpoint: train on the CIDEr-D of sampled captions")
    samples_help = "--self_critical: captions sampled per image"
    add("--samples", Number(int, minimum=2, maximum=1000), 5, samples_help)
    share_help = "--self_critical: the share of the true captions' cross-entropy in the loss"
    add("--cross_entropy_share", share, 0.0, share_help)

    group = parser.add_argument_group("files")
    add("--checkpoint", help="start a new phase from this model")
    resume_help = "continue a run with its options; without FILE, the latest in --checkpoint_folder"
    add("--resume", help=resume_help, nargs="?", const=True, metavar="FILE")
    flag("--overwrite", "replace the run in --checkpoint_folder")
    add("--save_minutes", non_negative_float, 10.0, "time between saves within an epoch")
    add("--checkpoint_folder", str, ".", "where to write checkpoints and the log")
    flag("--tensorboard", "also log to tensorboard_NAME/, with photographs, captions and attention")

    add_device_options(parser.add_argument_group("device"))
    return parser


if __name__ == "__main__":
    run_script(main)
