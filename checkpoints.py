"""
Checkpoints: one format, tensors and plain values only, read with weights_only=True.

A file holds `encoder` and `decoder` (state dicts), `encoder_args` and `decoder_args` (what
builds them), `word_map`, and in training also `options`, `progress`, `bleu4` and all that is
needed to go on exactly where the run stood.
"""

import pickle
from pathlib import Path

import torch

from files import UserError, read_json, whole
from models import DecoderWithAttention, Encoder

FORMAT = 1


def save(path, encoder, decoder, word_map, **rest):
    """Write a checkpoint that is there whole or not at all; `rest` goes in as it is."""
    state = {"format": FORMAT, "encoder": encoder.state_dict(), "encoder_args": encoder.args,
             "decoder": decoder.state_dict(), "decoder_args": decoder.args,
             "word_map": word_map, **rest}
    with whole(path) as temporary:
        torch.save(state, temporary)


def load(path):
    """
    A checkpoint as a dictionary, tensors on the CPU.

    Raises UserError if the file is missing, damaged or not one of ours.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} not found; train a model first or pass another file") from None
    except pickle.UnpicklingError:  # torch would advise to run whatever is in it
        raise UserError(f"{path} is damaged or not a checkpoint: it is no file of tensors and "
                        f"plain values alone") from None
    except Exception as error:  # bytes that are no pickle fail in all sorts of ways
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this program's format {FORMAT}")
    return checkpoint


def build(checkpoint, path):
    """The encoder and decoder of a checkpoint; `path` is for the message of a UserError."""
    try:
        encoder = Encoder(**checkpoint["encoder_args"], weights=None)
        decoder = DecoderWithAttention(**checkpoint["decoder_args"])
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold a whole model: {reason}") from None
    return encoder, decoder


def load_captioner(path, device, word_map_path=None):
    """
    Returns encoder, decoder (both on the device, in evaluation mode), word map, checkpoint.

    The file's own word map beats the caller's, which is for files that lack one.
    """
    checkpoint = load(path)
    word_map = checkpoint.get("word_map")
    if word_map is None:
        if word_map_path is None:
            raise UserError(f"{path} carries no word map; pass --word_map WORDMAP_….json")
        word_map = read_json(word_map_path)
    encoder, decoder = build(checkpoint, path)
    size = decoder.args["vocab_size"]
    if len(word_map) != size or not {"<start>", "<end>"} <= word_map.keys():
        raise UserError(f"{path} was trained on {size} words, but the word map has "
                        f"{len(word_map)}; pass the WORDMAP file it was trained with")
    return encoder.to(device).eval(), decoder.to(device).eval(), word_map, checkpoint


def find_checkpoint(folder, prefix="BEST_", option="--model"):
    """The only {prefix}checkpoint_*.pth.tar in a folder; UserError that lists them otherwise."""
    found = sorted(Path(folder).glob(f"{prefix}checkpoint_*.pth.tar"))
    if not found:
        raise UserError(f"no {prefix}checkpoint_*.pth.tar in {folder}; run python train.py first "
                        f"or pass {option} FILE")
    if len(found) > 1:
        raise UserError(f"several checkpoints in {folder}; pass {option}, one of: "
                        + ", ".join(map(str, found)))
    return str(found[0])
