"""Builds what train.py needs: data, model, cached features, data loaders and criterion."""

import inspect
import math

import torch
from torch.utils.data import DataLoader

import checkpoints
from datasets import CaptionDataset, ResumableBatchSampler
from modeling.devices import autocast
from models import DECODERS, Encoder
from preprocessing.own_captions import read_sentences
from training.embeddings import load_embeddings
from training.feature_cache import cache_features, load_features
from training.interrupts import leave_signals_to_parent
from training.language_model import LONGEST, pretrain
from training.losses import HardAttention, SelfCritical, TeacherForcing
from utils import UserError, count

VALIDATION_BATCH = 64  # images
# The options that describe a model: in a checkpoint, the constructor's arguments, the argument, and
# its value in files that are older than it.
MODEL_OPTIONS = {
    "encoder": ("encoder_args", "name", "resnet101"),
    "encoder_stride": ("encoder_args", "stride", 32),
    "attention": ("decoder_args", "attention", "soft"),
    "attention_dim": ("decoder_args", "attention_dim", 512),
    "emb_dim": ("decoder_args", "embed_dim", 512),
    "decoder_dim": ("decoder_args", "decoder_dim", 512),
    "dropout": ("decoder_args", "dropout", 0.5),
}


def load_splits(args, processes):
    """The training and validation images, as two CaptionDatasets."""
    name = args.data_name
    train_data = CaptionDataset(args.data_folder, name, "TRAIN", by_image=not args.single_captions)
    val_data = CaptionDataset(args.data_folder, name, "VAL")
    if len(val_data) == 0:
        raise UserError(
            f"{name} has no validation images, which decide when to stop; give some "
            f"the split 'val', or pass create_input_files.py a larger --val_fraction"
        )
    val_data.entries  # noqa: B018  read now, so that a broken file is not found an epoch later
    if len(train_data) < processes.world_size:
        raise UserError(
            f"{name} has {len(train_data)} training images; too few for "
            f"{processes.world_size} processes"
        )
    return train_data, val_data


def build_model(args, checkpoint, datasets, processes):
    """
    Encoder and decoder on the device: the checkpoint's, or new ones as the options say.

    datasets: for training and validation. A model that knows more words than they have keeps them:
    the datasets then get its word map.
    """
    word_map, device = datasets[0].word_map, processes.device
    if checkpoint:
        encoder, decoder, word_map = _model_of_checkpoint(checkpoint, args, word_map, processes)
        for data in datasets:
            data.word_map = word_map
    else:
        encoder, decoder = _new_model(args, word_map)
    if encoder.args["image_size"] != datasets[0].image_size:
        encoder.args["image_size"], encoder.offset = datasets[0].image_size, None
    encoder.to(device).fine_tune(args.fine_tune_encoder)
    decoder.to(device).fine_tune_embeddings(args.fine_tune_embeddings)
    decoder.plain = args.plain
    if args.pretrain_text and not checkpoint:
        _pretrain_on_text(decoder, word_map, args, processes)
    return encoder, decoder


def _options_of(attention, args):
    """The MODEL_OPTIONS of a decoder; UserError if another one is set, which it would not read."""
    classes = DECODERS[attention].__mro__
    taken = {name for kind in classes for name in inspect.signature(kind.__init__).parameters}
    options = {}
    for option, (model, argument, default) in MODEL_OPTIONS.items():
        if model == "encoder_args" or argument in taken:
            options[option] = model, argument, default
        elif getattr(args, option) not in (None, default):
            raise UserError(f"--{option} is not for --attention {attention}; leave it out")
    return options


def _new_model(args, word_map):
    encoder = Encoder(name=args.encoder, weights=args.encoder_weights, stride=args.encoder_stride)
    embeddings, emb_dim = None, 512 if args.emb_dim is None else args.emb_dim
    if args.embeddings:
        embeddings, emb_dim = load_embeddings(args.embeddings, word_map)
        if args.emb_dim not in (None, emb_dim):
            raise UserError(
                f"{args.embeddings} has {emb_dim} numbers per word, --emb_dim "
                f"is {args.emb_dim}; leave --emb_dim out"
            )
    arguments = {
        argument: getattr(args, option)
        for option, (model, argument, _) in _options_of(args.attention, args).items()
        if model == "decoder_args"
    }
    decoder = DECODERS[args.attention](
        **arguments | {"embed_dim": emb_dim},
        vocab_size=len(word_map),
        encoder_dim=encoder.encoder_dim,
    )
    if embeddings is not None:
        decoder.load_pretrained_embeddings(embeddings)
    return encoder, decoder


def _pretrain_on_text(decoder, word_map, args, processes):
    captions = [words for words in read_sentences(args.pretrain_text) if len(words) <= LONGEST]
    if not captions:
        raise UserError(
            f"{', '.join(args.pretrain_text)}: no caption of at most {LONGEST} words; "
            f"pass a file with a caption a line"
        )
    loss = pretrain(decoder, captions, word_map, args.pretrain_epochs, args.amp, processes.is_main)
    processes.print(
        f"{count(len(captions), 'caption')} of text, "
        f"{count(args.pretrain_epochs, 'epoch')}: loss "
        f"{loss:.3f}"
    )


def model_options(checkpoint):
    """The options of train.py that describe the model in a checkpoint."""
    return {
        option: checkpoint[model].get(argument, default)
        for option, (model, argument, default) in MODEL_OPTIONS.items()
    }


def _model_of_checkpoint(checkpoint, args, word_map, processes):
    """
    The checkpoint's encoder, decoder and word map, with the words of the data that it lacks.
    UserError unless it matches the options.
    """
    path, saved_word_map = args.resume or args.checkpoint, checkpoint.get("word_map")
    if saved_word_map is None:  # a checkpoint of the tutorial
        if checkpoint["decoder_args"]["vocab_size"] != len(word_map):
            raise UserError(
                f"{path} was trained on {checkpoint['decoder_args']['vocab_size']} "
                f"words, the data have {len(word_map)}; give it its own words first, "
                f"python checkpoints.py {path} NEW.pth.tar --word_map WORDMAP.json, "
                f"and pass NEW.pth.tar"
            )
    elif word_map.items() <= saved_word_map.items():
        word_map = saved_word_map
    elif args.resume:
        word = min(word for word in word_map if saved_word_map.get(word) != word_map[word])
        raise UserError(
            f"{path} was trained with another word map ({len(saved_word_map)} words) "
            f"than that of the data ({len(word_map)} words): the id of {word!r} is "
            f"{saved_word_map.get(word)} there and {word_map[word]} here; pass the "
            f"--data_folder of the run, or --checkpoint {path} for a new phase"
        )
    else:
        word_map = _grow_words(checkpoint, word_map, processes)
    arguments = checkpoint["decoder_args"]
    values = model_options(checkpoint)
    for option in _options_of(values["attention"], args):
        value = values[option]
        same = getattr(args, option) in (None, value)
        if option == "attention":  # soft and hard are ways to train the same decoder
            same = DECODERS[args.attention] is DECODERS[value]
        if option != "dropout" and not same:
            raise UserError(
                f"{path} has {option} {value}, not {getattr(args, option)}; leave --{option} out"
            )
    arguments |= {"dropout": args.dropout, "attention": args.attention}
    if args.embeddings and not args.resume:
        raise UserError(f"{path} has word embeddings of its own; leave --embeddings out")
    if args.pretrain_text and not args.resume:
        raise UserError(f"{path} has a decoder of its own; leave --pretrain_text out")
    return *checkpoints.build(checkpoint, path), word_map


def _grow_words(checkpoint, word_map, processes):
    """
    Give the checkpoint's decoder the words of word_map as well, in place.

    A new word begins as what it was to the model before, <unk>: the new words and <unk> share its
    probability equally, so what the model says does not change otherwise.
    Returns the new word map: word_map, then the checkpoint's other words.
    """
    known, unknown_before = checkpoint["word_map"], checkpoint["word_map"]["<unk>"]
    others = [word for word in known if word not in word_map]
    grown = word_map | {word: i for i, word in enumerate(others, len(word_map))}
    new = [word not in known for word in grown]
    rows = torch.tensor([known.get(word, unknown_before) for word in grown])
    decoder = checkpoint["decoder"]
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        decoder[name] = decoder[name][rows]
    decoder["fc.bias"][rows == unknown_before] -= math.log(1 + sum(new))
    checkpoint["word_map"], checkpoint["decoder_args"]["vocab_size"] = grown, len(grown)
    processes.print(
        f"the model knows {len(known)} words and learns {sum(new)} more from the data, "
        f"which lack {len(others)} of its own"
    )
    return grown


def cache_features_if_frozen(args, encoder, datasets, processes):
    """If the encoder is frozen, make the data sets return its features instead of images."""
    if args.fine_tune_encoder or not args.cache_features:
        return
    if args.augment:
        raise UserError(
            "--augment needs images, not cached features; pass --fine_tune_encoder or "
            "--no-cache_features"
        )
    for data in datasets:
        if not processes.is_main:
            processes.barrier()  # the main process writes the cache, the others read it
        with autocast(processes.device, args.amp):
            path = cache_features(
                data, encoder, processes.device, args.amp, folder=args.features_folder
            )
        if processes.is_main:
            processes.barrier()
        data.use_features(load_features(path, args.cache_in, processes.device))


def build_loaders(args, train_data, val_data, processes):
    """Training and validation DataLoaders, of this process's share of each batch."""
    items = (
        args.batch_size
        if args.single_captions
        else max(1, args.batch_size // train_data.captions_per_image)
    )
    rank, world_size = processes.rank, processes.world_size
    train_sampler = ResumableBatchSampler(len(train_data), items, True, args.seed, rank, world_size)
    val_sampler = ResumableBatchSampler(len(val_data), VALIDATION_BATCH, False, 0, rank, world_size)
    smallest = len(train_data) // train_sampler.num_batches // world_size
    if args.accumulate > smallest:
        unit = "captions" if args.single_captions else "images"
        raise UserError(
            f"--accumulate {args.accumulate} is too large: some steps have only "
            f"{smallest} {unit} per process; lower it or raise --batch_size"
        )
    return (
        build_loader(train_data, train_sampler, args.workers, processes.device),
        build_loader(val_data, val_sampler, args.workers, processes.device),
    )


def build_loader(data, sampler, workers, device):
    workers = 0 if data.in_memory else workers  # data in memory needs no workers
    return DataLoader(
        data,
        sampler=sampler,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda" and not data.in_memory,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator(),
    )  # not the global one, which dropout uses


def build_criterion(args, data):
    """The criterion that the options ask for; data: the training images' CaptionDataset"""
    if args.self_critical:
        return SelfCritical(
            data, args.alpha_c, args.samples, cross_entropy_share=args.cross_entropy_share
        )
    if args.attention == "hard":
        return HardAttention(args.alpha_c, args.lambda_r, args.lambda_e)
    return TeacherForcing(args.alpha_c)
