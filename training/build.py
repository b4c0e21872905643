"""Builds what train.py needs: data, model, cached features, data loaders and criterion."""

import inspect
import math

import torch
from torch.utils.data import DataLoader

import checkpoints
from datasets import CaptionDataset, ResumableBatchSampler
from modeling.devices import autocast
from modeling.workers import start_worker
from models import DECODERS, Encoder
from preprocessing.own_captions import read_sentences
from training.embeddings import load_embeddings
from training.feature_cache import cache_features, load_features
from training.language_model import LONGEST, pretrain
from training.losses import HardAttention, SelfCritical, TeacherForcing
from utils import UserError, count, timed

VALIDATION_BATCH = 64  # images
# The options that describe a model: the argument of each, and its value in older checkpoints.
MODEL_OPTIONS = {
    "encoder": ("encoder_args", "name", "resnet101"),
    "encoder_stride": ("encoder_args", "stride", 32),
    "attention": ("decoder_args", "attention", "soft"),
    "attention_dim": ("decoder_args", "attention_dim", 512),
    "emb_dim": ("decoder_args", "embed_dim", 512),
    "decoder_dim": ("decoder_args", "decoder_dim", 512),
    "dropout": ("decoder_args", "dropout", 0.5),
}


def load_splits(args):
    """The training and validation images, as two CaptionDatasets."""
    name = args.data_name
    train_data = CaptionDataset(args.data_folder, name, "TRAIN", by_image=not args.single_captions)
    val_data = CaptionDataset(args.data_folder, name, "VAL")
    if len(val_data) == 0:
        raise UserError(
            f"{name} has no validation images, which decide when to stop; give some the split "
            f"'val', or pass create_input_files.py a larger --val_fraction"
        )
    val_data.entries  # noqa: B018  read now, so that a broken file is not found an epoch later
    return train_data, val_data


def build_model(args, checkpoint, datasets, processes):
    """
    Encoder and decoder on the device: the checkpoint's, or new ones as the options say. The
    datasets, for training and validation, get the word map of the checkpoint's model.
    """
    word_map, image_size = datasets[0].word_map, datasets[0].image_size
    if checkpoint:
        path = args.resume or args.checkpoint
        word_map = _words_of_checkpoint(path, args.resume, checkpoint, word_map, processes)
        for data in datasets:
            data.word_map = word_map
        _check_options(args, checkpoint, path)
        checkpoint["decoder_args"] |= {"dropout": args.dropout, "attention": args.attention}
        encoder, decoder = checkpoints.build(checkpoint, path)
    else:
        encoder, decoder = _new_model(args, word_map)
    if encoder.args["image_size"] != image_size:
        encoder.args["image_size"], encoder.offset = image_size, None
    encoder.to(processes.device).fine_tune(args.fine_tune_encoder)
    decoder.to(processes.device).fine_tune_embeddings(args.fine_tune_embeddings)
    decoder.plain = args.plain
    if args.pretrain_text and not checkpoint:
        _pretrain_on_text(decoder, word_map, args, processes)
    return encoder, decoder


def model_options(checkpoint):
    """The options of train.py that describe the model in a checkpoint."""
    return {
        option: checkpoint[model].get(argument, default)
        for option, (model, argument, default) in MODEL_OPTIONS.items()
    }


def _new_model(args, word_map):
    arguments = _decoder_arguments(args) | {"embed_dim": args.emb_dim or 512}
    encoder = Encoder(name=args.encoder, weights=args.encoder_weights, stride=args.encoder_stride)
    if args.embeddings:
        embeddings = load_embeddings(args.embeddings, word_map)
        arguments["embed_dim"] = embeddings.shape[1]
        if args.emb_dim not in (None, embeddings.shape[1]):
            size = f"{embeddings.shape[1]} numbers per word, not --emb_dim {args.emb_dim}"
            raise UserError(f"{args.embeddings} has {size}; leave --emb_dim out")
    decoder = DECODERS[args.attention](
        **arguments, vocab_size=len(word_map), encoder_dim=encoder.encoder_dim
    )
    if args.embeddings:
        decoder.load_pretrained_embeddings(embeddings)
    return encoder, decoder


def _decoder_arguments(args):
    """The decoder's arguments that are options; UserError if one is set that it does not take."""
    classes = DECODERS[args.attention].__mro__
    taken = {name for kind in classes for name in inspect.signature(kind.__init__).parameters}
    arguments = {}
    for option, (model, argument, default) in MODEL_OPTIONS.items():
        if model == "decoder_args" and argument in taken:
            arguments[argument] = getattr(args, option)
        elif model == "decoder_args" and getattr(args, option) not in (None, default):
            raise UserError(f"--{option} is not for --attention {args.attention}; leave it out")
    return arguments


def _pretrain_on_text(decoder, word_map, args, processes):
    captions = read_sentences(args.pretrain_text, processes.print)
    captions = [words for words in captions if len(words) <= LONGEST]
    if not captions:
        files = ", ".join(args.pretrain_text)
        raise UserError(f"{files}: no caption of at most {LONGEST} words; pass a file with some")
    text = f"{count(len(captions), 'caption')} of text, {count(args.pretrain_epochs, 'epoch')}"
    with timed(f"training on {text}", processes.print):
        loss = pretrain(decoder, captions, word_map, args.pretrain_epochs, processes, args.amp)
    processes.print(f"{text}: loss {loss:.3f}")


def _check_options(args, checkpoint, path):
    """UserError unless the options fit the checkpoint's model."""
    for option, value in model_options(checkpoint).items():
        asked = getattr(args, option)
        same = option == "dropout" or asked in (None, value)
        if option == "attention":  # soft and hard are ways to train the same decoder
            same = DECODERS[asked] is DECODERS[value]
        if not same:
            raise UserError(f"{path} has {option} {value}, not {asked}; leave --{option} out")
    for option in ("embeddings", "pretrain_text"):
        if getattr(args, option) and not args.resume:
            raise UserError(f"{path} has a decoder of its own; leave --{option} out")


def _words_of_checkpoint(path, resume, checkpoint, word_map, processes):
    """A word map of the checkpoint's words and the data's, which its decoder gets too."""
    known = checkpoint.get("word_map")
    if known is None:  # a checkpoint of the tutorial
        if checkpoint["decoder_args"]["vocab_size"] == len(word_map):
            return word_map
        raise UserError(
            f"{path} has no word map and other words than the data; give it its own first: "
            f"python checkpoints.py {path} NEW.pth.tar --word_map WORDMAP.json"
        )
    if word_map.items() <= known.items():
        return known
    if resume:
        raise UserError(
            f"{path} was trained with another word map than that of the data; pass the "
            f"--data_folder of the run, or --checkpoint {path} for a new phase"
        )
    return _grow_words(checkpoint, word_map, processes)


def _grow_words(checkpoint, word_map, processes):
    """
    Add the words of word_map to the checkpoint's decoder, in place; returns the new word map. New
    words begin with the weights of <unk>, as which the model knew them, and share its probability.
    """
    known, unknown_before = checkpoint["word_map"], checkpoint["word_map"]["<unk>"]
    others = [word for word in known if word not in word_map]
    grown = word_map | {word: i for i, word in enumerate(others, len(word_map))}
    added = len(grown.keys() - known.keys())
    rows = torch.tensor([known.get(word, unknown_before) for word in grown])
    decoder = checkpoint["decoder"]
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        decoder[name] = decoder[name][rows]
    decoder["fc.bias"][rows == unknown_before] -= math.log(1 + added)
    checkpoint["word_map"], checkpoint["decoder_args"]["vocab_size"] = grown, len(grown)
    processes.print(
        f"the model knows {len(known)} words and learns {added} more from the data, "
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
        folder = args.features_folder
        what = f"reading or making the features of {count(data.num_images, 'image')}"
        with timed(what, processes.print):
            with autocast(processes.device, args.amp):
                path = cache_features(data, encoder, processes.device, args.amp, folder=folder)
            if processes.is_main:
                processes.barrier()
            data.use_features(load_features(path, args.cache_in, processes.device))


def build_loaders(args, train_data, val_data, processes):
    """Training and validation DataLoaders, of this process's share of each batch."""
    captions_per_item = 1 if args.single_captions else train_data.captions_per_image
    items = max(1, args.batch_size // captions_per_item)
    share = processes.rank, processes.world_size
    train_sampler = ResumableBatchSampler(len(train_data), items, True, args.seed, *share)
    val_sampler = ResumableBatchSampler(len(val_data), VALIDATION_BATCH, False, 0, *share)
    smallest = len(train_data) // train_sampler.num_batches // processes.world_size
    if args.accumulate > smallest:
        unit = "captions" if args.single_captions else "images"
        raise UserError(
            f"--accumulate {args.accumulate} is too large: some steps have only {smallest} {unit} "
            f"per process; lower it or raise --batch_size"
        )
    return tuple(
        DataLoader(
            data,
            sampler=sampler,
            batch_size=None,
            num_workers=0 if data.in_memory else args.workers,
            persistent_workers=args.workers > 0 and not data.in_memory,
            pin_memory=processes.device.type == "cuda" and not data.in_memory,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # not the global one, which dropout uses
        )
        for data, sampler in ((train_data, train_sampler), (val_data, val_sampler))
    )


def build_criterion(args, data):
    """The criterion that the options ask for; data: the training images' CaptionDataset"""
    if args.self_critical:
        share = args.cross_entropy_share
        return SelfCritical(data, args.alpha_c, args.samples, share, args.evidence_c)
    if args.attention == "hard":
        return HardAttention(args.alpha_c, args.lambda_r, args.lambda_e)
    return TeacherForcing(args.alpha_c, args.evidence_c)
