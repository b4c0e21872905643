"""
Train the captioning model.

    python train.py                                            # phase 1: the decoder alone
    python train.py --checkpoint BEST_checkpoint_X.pth.tar --fine_tune_encoder   # phase 2
    python train.py --checkpoint BEST_checkpoint_X.pth.tar --self_critical       # phase 3
    python train.py --resume                                   # go on where the run stood
    torchrun --nproc_per_node=4 train.py                       # the same run on four GPUs
"""

import argparse
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoints
from datasets import CaptionDataset, ResumableBatchSampler, find_data_name
from preprocessing.feature_cache import cache_features, load_features
from training.build import Average, from_checkpoint, model_options, new_model
from training.engine import train_one_epoch, validate
from training.interrupts import Interrupted, Interrupts, leave_signals_to_parent
from training.losses import HardAttention, SelfCritical, TeacherForcing
from training.run import (
    TRANSIENT_OPTIONS,
    best_file,
    check_data,
    check_folder,
    check_run,
    data_state,
    decisive,
    epoch_done,
    load_optimizer,
    lock_run,
    new_progress,
    open_log,
    resume_command,
)
from utils import AMP, Parser, UserError, autocast, distributed, run_script, set_seed


def get_args(argv=None, **defaults):
    parser = Parser(description=__doc__)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    # Data
    add("--data_folder", default="data", help="what create_input_files.py wrote")
    add("--data_name", help="which data set, if the folder has several")
    add("--batch_size", type=int, default=80, help="captions per step, over all processes")
    add("--accumulate", type=int, default=1, help="go through each step's captions in so many "
        "parts, which takes less memory")
    add("--single_captions", action="store_true",
        help="shuffle captions one by one, not images with all their captions")
    add("--workers", type=int, default=1, help="processes that load batches; 0: none")
    add("--cache_features", action=flag, default=True,
        help="with a frozen encoder, encode each image once and keep the result beside the data")
    add("--cache_in", choices=("disk", "ram", "device"),
        help="where to read it from while training; the fastest in which it fits")
    # Model; with --checkpoint and --resume these come from the file
    add("--encoder", default="resnet101", help="any convolutional classifier of torchvision, timm")
    add("--encoder_weights", default="imagenet", help="imagenet, none (random) or a file: "
        "a state dict, or a checkpoint to take the encoder of; --checkpoint and --resume "
        "bring their own")
    add("--emb_dim", type=int, help="word embeddings; 512, or the size of --embeddings")
    add("--attention_dim", type=int, default=512, help="layer that scores each place")
    add("--decoder_dim", type=int, default=512, help="state of the LSTM")
    add("--dropout", type=float, default=0.5, help="of the state that scores the words")
    add("--embeddings", help="pretrained word embeddings, a text file in GloVe's format")
    add("--fine_tune_embeddings", action=flag, default=True,
        help="train the embeddings too, those of --embeddings as well")
    # Training
    add("--epochs", type=int, default=120, help="stop here if not stopped earlier")
    add("--decoder_lr", type=float, default=4e-4, help="learning rate of Adam")
    add("--encoder_lr", type=float, default=1e-4, help="with --fine_tune_encoder")
    add("--fine_tune_encoder", action=flag, default=False, help="train blocks 2-4 of the encoder")
    add("--augment", action="store_true", help="train on random crops and mirror images; not with "
        "cached features")
    add("--grad_clip", type=float, default=5.0, help="each gradient's bound, plus and minus")
    add("--alpha_c", type=float, default=1.0, help="weight of doubly stochastic attention")
    add("--attention", choices=("soft", "hard"), default="soft",
        help="hard: look at one place, drawn at random; section 4.1 of the paper")
    add("--lambda_r", type=float, default=0.01, help="hard attention: weight of the reward")
    add("--lambda_e", type=float, default=0.01, help="hard attention: weight of the entropy")
    add("--sampling_max", type=float, default=0.0, help="scheduled sampling: the probability of a "
        "word of the model's own in place of the true one, at most")
    add("--sampling_step", type=float, default=0.05, help="it begins at 0 and rises by this ...")
    add("--sampling_every", type=int, default=5, help="... after so many epochs")
    add("--self_critical", action="store_true",
        help="with --checkpoint: train on the CIDEr-D of captions that the model draws")
    add("--samples", type=int, default=5, help="--self_critical: captions drawn per image")
    add("--ema", type=float, default=0.0, help="validate and save the exponential moving average "
        "of the weights, which keeps this of itself at each step (0.999); 0: none")
    add("--cosine", action="store_true", help="the learning rate falls to 0 over --epochs, in half "
        "a cosine, whatever validation says")
    add("--lr_decay", type=float, default=0.8, help="factor after each --decay_after epochs "
        "without better validation BLEU-4 (--self_critical: CIDEr-D)")
    add("--decay_after", type=int, default=8, help="see --lr_decay")
    add("--stop_after", type=int, default=20, help="epochs without a better one that end the run")
    add("--val_beam_size", type=int, default=1, help="beam of the free-running validation")
    add("--seed", type=int, default=0, help="of weights, dropout and the order of batches")
    add("--device", help="cuda, cuda:1, cpu, mps; if not given, CUDA's GPU "
        "where there is one, else the CPU")
    add("--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given")
    # Files
    add("--checkpoint", help="start a new phase from this model")
    add("--resume", nargs="?", const=True, metavar="FILE",
        help="go on with a run, its options and all; without FILE, the latest in "
        "--checkpoint_folder")
    add("--overwrite", action="store_true", help="replace the run in --checkpoint_folder")
    add("--save_minutes", type=float, default=10.0, help="time between saves within an epoch")
    add("--checkpoint_folder", default=".", help="where checkpoints and the log go")
    add("--tensorboard", action="store_true", help="log to tensorboard_NAME/ too")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    for least, names in ((2, "samples"),
                         (1, "batch_size epochs val_beam_size decay_after stop_after attention_dim "
                             "decoder_dim emb_dim accumulate sampling_every"),
                         (0, "workers seed dropout decoder_lr encoder_lr grad_clip alpha_c "
                             "save_minutes lambda_r lambda_e sampling_max sampling_step ema")):
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not value >= least:  # not a number is neither
                parser.error(f"--{name} is {value}, it must be at least {least}")
    for name in ("dropout", "ema"):
        if not getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, it must be below 1")
    if not args.sampling_max <= 1:
        parser.error(f"--sampling_max is {args.sampling_max}, it must be at most 1")
    if args.self_critical:
        for name, without in (("attention", "soft"), ("sampling_max", 0),
                              ("single_captions", False)):
            if getattr(args, name) != without:
                parser.error(f"--{name} is of training on true captions, which --self_critical "
                             f"does without; leave one of the two out")
        if not args.checkpoint and not args.resume:
            parser.error("--self_critical needs a trained model to start from, --checkpoint FILE")
    if not 0 < args.lr_decay <= 1:
        parser.error(f"--lr_decay is {args.lr_decay}, it must be above 0 and at most 1")
    return args


def main(argv=None):
    args, checkpoint = get_run(argv)
    with distributed(args.device) as processes:
        args.data_name = args.data_name or find_data_name(args.data_folder)
        with lock_run(args, processes):
            train(args, checkpoint, processes)


def get_run(argv):
    """
    The options and the checkpoint to start from, None if there is none. A resumed run keeps
    its options; of those that the optimiser or the model depend on, none may change.
    """
    args = get_args(argv)
    if args.resume and args.checkpoint:
        raise UserError("--resume goes on, --checkpoint starts a phase; pass one of them")
    if args.checkpoint:
        checkpoint = checkpoints.load(args.checkpoint)
        checkpoints.check_model(checkpoint, args.checkpoint)
        return get_args(argv, **model_options(checkpoint)), checkpoint
    if not args.resume:
        return args, None
    path = args.resume
    if path is True:
        path = checkpoints.find_latest(args.checkpoint_folder)
    checkpoint = checkpoints.load(path)
    checkpoints.check_model(checkpoint, path)
    check_run(checkpoint, vars(get_args([])), path)  # also brings older runs up to date
    options = {**vars(get_args([])), **checkpoint["options"]}
    args = get_args(argv, **{**options, "checkpoint_folder": str(Path(path).parent)})
    kept = ["decoder_lr", "encoder_lr", "fine_tune_encoder", "fine_tune_embeddings",
            "self_critical", "ema", "augment", "embeddings", "cosine"]
    if checkpoint["progress"].get("step"):  # what the order of the epoch's other batches follows
        kept += ["batch_size", "single_captions", "seed", "attention", "accumulate"]
    if options["cosine"]:  # which counts steps, to the last epoch's end
        kept += ["batch_size", "single_captions", "epochs"]
    for option in kept:
        if getattr(args, option) != options[option]:
            raise UserError(f"{path} was run with {option} {options[option]}, which a resumed run "
                            f"keeps; for a new phase pass --checkpoint {path}")
    args.resume = path
    return args, checkpoint


def train(args, checkpoint, processes):
    name = args.data_name
    train_data = CaptionDataset(args.data_folder, name, "TRAIN", by_image=not args.single_captions)
    val_data = CaptionDataset(args.data_folder, name, "VAL")
    if len(val_data) == 0:
        raise UserError(f"{name} has no validation images, which say when to stop; give some the "
                        f"split 'val', or create_input_files.py a larger --val_fraction")
    val_data.entries  # noqa: B018  read now: whether it can be is no matter to learn an epoch later
    if len(train_data) < processes.world_size:
        raise UserError(f"{name} has {len(train_data)} training images; too few for "
                        f"{processes.world_size} processes")
    if args.resume:
        check_data(checkpoint, train_data, name, args.resume)
    check_folder(args, name)
    set_seed(args.seed)
    if checkpoint:
        encoder, decoder = from_checkpoint(checkpoint, args, train_data.word_map)
    else:
        encoder, decoder = new_model(args, train_data.word_map)
    encoder.to(processes.device).fine_tune(args.fine_tune_encoder)
    decoder.to(processes.device).fine_tune_embeddings(args.fine_tune_embeddings)

    cached = args.cache_features and not args.fine_tune_encoder
    if args.augment and cached:
        raise UserError("--augment needs images, not cached features; pass --fine_tune_encoder or "
                        "--no-cache_features")
    if cached:
        for data in (train_data, val_data):
            if not processes.is_main:
                processes.barrier()  # for the first to make it
            with autocast(processes.device, args.amp):
                path = cache_features(data, encoder, processes.device, args.amp)
            if processes.is_main:
                processes.barrier()
            data.use_features(load_features(path, args.cache_in, processes.device))
    items = args.batch_size if args.single_captions else max(
        1, args.batch_size // train_data.captions_per_image)
    batches = ResumableBatchSampler(len(train_data), items, True, args.seed, processes.rank,
                                    processes.world_size)
    val_batches = ResumableBatchSampler(len(val_data), 64, False, 0, processes.rank,
                                        processes.world_size)
    smallest = len(train_data) // batches.num_batches // processes.world_size
    if args.accumulate > smallest:
        raise UserError(f"--accumulate {args.accumulate} is more parts than some steps have "
                        f"{'captions' if args.single_captions else 'images'} in a process, "
                        f"{smallest}; lower it or raise --batch_size")
    train_loader = _loader(train_data, batches, args, processes)
    val_loader = _loader(val_data, val_batches, args, processes)

    groups = [{"params": [p for p in decoder.parameters() if p.requires_grad],
               "lr": args.decoder_lr}]
    if args.fine_tune_encoder:
        groups.append({"params": [p for p in encoder.parameters() if p.requires_grad],
                       "lr": args.encoder_lr})
    optimizer = torch.optim.Adam(groups, fused=True)
    # float16 reaches down to 6e-8 only: its losses are scaled up so that no gradient is lost.
    scaler = torch.amp.GradScaler(processes.device.type, enabled=args.amp == "fp16")
    average = Average(encoder, decoder, args.ema)
    objective = _objective(args, train_data)
    progress = new_progress()
    if args.resume:
        progress |= checkpoint["progress"]
        processes.print(f"going on with {args.resume}: {progress['epoch']} epochs and "
                        f"{progress['step']} batches are done")
        try:
            load_optimizer(optimizer, checkpoint["optimizer"], progress["epoch"] > 0)
            if checkpoint.get("scaler"):  # there is none of other precisions and of older runs
                scaler.load_state_dict(checkpoint["scaler"])
            if args.ema:
                average.load(checkpoint.get("trained"))
            objective.baseline = torch.tensor(progress["baseline"])
            if progress["step"] > batches.num_batches:
                raise ValueError(f"{progress['step']} of {batches.num_batches} batches are done")
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{args.resume} does not fit this run: {reason}") from None
    log = open_log(args, name, progress, processes)
    if args.checkpoint and not args.resume:
        scores = validate(encoder, decoder, val_loader, val_batches, val_data, args, processes)
        processes.print(f"start   {_show(scores)}")
        progress["best"] = scores[decisive(args)]  # the mark to beat

    def save(prefix=""):
        if processes.is_main:
            options = {k: v for k, v in vars(args).items() if k not in TRANSIENT_OPTIONS}
            path = Path(args.checkpoint_folder) / f"{prefix}checkpoint_{name}.pth.tar"
            checkpoints.save(path, average.encoder, average.decoder, train_data.word_map,
                             trained=average.state(), options=options,
                             optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                             progress=progress, bleu4=progress["bleu4"],
                             data=data_state(train_data, name))

    # Wrapped for gradients only: validation and checkpoints use the bare modules.
    parallel_encoder = _parallel(encoder, processes) if args.fine_tune_encoder else encoder
    parallel_decoder = _parallel(decoder, processes)
    with Interrupts(args.save_minutes) as interrupts:
        try:
            if args.checkpoint and not args.resume:
                with interrupts.held():
                    if not best_file(args, name).exists():
                        save("BEST_")  # in a folder of its own, the model it begins with is one
                    save()  # from here on --resume goes on with this phase
            while progress["epoch"] < args.epochs and progress["stale"] < args.stop_after:
                epoch = batches.epoch = progress["epoch"] + 1
                batches.start = progress["step"]
                objective.own = min(args.sampling_max, args.sampling_step
                                    * (progress["epoch"] // args.sampling_every))
                figures = train_one_epoch(parallel_encoder, parallel_decoder, average, objective,
                                          train_loader, optimizer, scaler, args, processes,
                                          progress, interrupts, save)
                row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], **figures}
                with interrupts.held():
                    save()  # whatever becomes of the validation, here or in another process
                row |= validate(average.encoder, average.decoder, val_loader, val_batches,
                                val_data, args, processes)
                trained = (f"reward {row['train_reward']:.3f}" if args.self_critical else
                           f"loss {row['train_loss']:.3f}")
                processes.print(f"epoch {epoch:3d}   {trained} in {row['train_seconds']:.0f} s   "
                                f"{_show(row)}")
                with interrupts.held():
                    if epoch_done(progress, row, optimizer, args, processes):
                        save("BEST_")
                    log(row)
                    save()  # last: without it, none of the above has happened
        except Interrupted as stopped:
            interrupts.hold()  # impatience must not cost what this is all about
            save()
            if not processes.is_main:
                raise SystemExit(stopped.code) from None
            raise Interrupted(stopped.signum, f"stopped in epoch {progress['epoch'] + 1} after "
                          f"{progress['step']} of {batches.num_batches} batches, all saved; go on "
                          f"with: {resume_command(args, name, processes)}") from None
    metric = {"bleu4": "BLEU-4", "cider_d": "CIDEr-D"}[decisive(args)]
    best = progress["epoch"] - progress["stale"]
    processes.print(f"done after epoch {progress['epoch']}: best validation {metric} "
                    f"{progress['best']:.2f}, of "
                    f"{f'epoch {best}' if best else 'the model that the phase began with'}, in "
                    f"{best_file(args, name)}")


def _objective(args, data):
    if args.self_critical:
        return SelfCritical(data, args.alpha_c, args.samples)
    if args.attention == "hard":
        return HardAttention(args.alpha_c, args.lambda_r, args.lambda_e)
    return TeacherForcing(args.alpha_c)


def _loader(data, batches, args, processes):
    workers = 0 if data.in_memory else args.workers  # what is in memory need not be fetched
    return DataLoader(data, sampler=batches, batch_size=None, num_workers=workers,
                      persistent_workers=workers > 0,
                      pin_memory=processes.device.type == "cuda" and not data.in_memory,
                      worker_init_fn=leave_signals_to_parent,
                      generator=torch.Generator())  # leaves the global one, dropout's, alone


def _parallel(module, processes):
    if processes.world_size == 1:
        return module
    return DistributedDataParallel(module)


def _show(row):
    return (f"teacher-forced: loss {row['val_loss']:.3f}, top-5 {row['val_top5']:.2f} %, "
            f"BLEU-4 {row['teacher_forced_bleu4']:.2f}   free-running: BLEU-4 {row['bleu4']:.2f}, "
            f"CIDEr-D {row['cider_d']:.2f}")


if __name__ == "__main__":
    run_script(main)
