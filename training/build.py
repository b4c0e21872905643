"""
The model that a phase of training begins with, its learning rate from step to step, and the
average of its weights.
"""

import copy
import math

import torch

import checkpoints
from models import DecoderWithAttention, Encoder
from training.embeddings import load_embeddings
from utils import UserError


def new_model(args, word_map):
    """Encoder and decoder as the options say."""
    encoder = Encoder(name=args.encoder, weights=args.encoder_weights)
    embeddings, emb_dim = None, 512 if args.emb_dim is None else args.emb_dim
    if args.embeddings:
        embeddings, emb_dim = load_embeddings(args.embeddings, word_map)
        if args.emb_dim not in (None, emb_dim):
            raise UserError(f"{args.embeddings} has {emb_dim} numbers a word, --emb_dim is "
                            f"{args.emb_dim}; leave --emb_dim out")
    decoder = DecoderWithAttention(args.attention_dim, emb_dim, args.decoder_dim, len(word_map),
                                   encoder.encoder_dim, args.dropout)
    if embeddings is not None:
        decoder.load_pretrained_embeddings(embeddings)
    return encoder, decoder


def model_options(checkpoint):
    """What a checkpoint's model says of train.py's options."""
    sizes = checkpoint["decoder_args"]
    return {"encoder": checkpoint["encoder_args"]["name"], "attention_dim": sizes["attention_dim"],
            "emb_dim": sizes["embed_dim"], "decoder_dim": sizes["decoder_dim"],
            "dropout": sizes.get("dropout", 0.5)}


def from_checkpoint(checkpoint, args, word_map):
    """The model of a checkpoint, if it is the one asked for and speaks the data's words."""
    path, theirs = args.resume or args.checkpoint, checkpoint.get("word_map")
    if theirs is None:  # a whole module of the tutorial's
        if checkpoint["decoder_args"]["vocab_size"] != len(word_map):
            raise UserError(f"{path} was trained on {checkpoint['decoder_args']['vocab_size']} "
                            f"words, the data have {len(word_map)}")
    elif theirs != word_map:
        word = min(word for word in theirs.keys() | word_map.keys()
                   if theirs.get(word) != word_map.get(word))
        raise UserError(f"{path} was trained with another word map ({len(theirs)} words) than "
                        f"that of the data ({len(word_map)} words); the word {word!r} is number "
                        f"{theirs.get(word)} there and {word_map.get(word)} here; to begin with "
                        f"its encoder alone, pass it as --encoder_weights, with --encoder "
                        f"{checkpoint['encoder_args']['name']}")
    for option, value in model_options(checkpoint).items():
        if option != "dropout" and getattr(args, option) not in (None, value):
            raise UserError(f"{path} has {option} {value}, not {getattr(args, option)}; "
                            f"leave --{option} out")
    if args.embeddings and not args.resume:
        raise UserError(f"{path} has word embeddings of its own; leave --embeddings out")
    checkpoint["decoder_args"]["dropout"] = args.dropout
    return checkpoints.build(checkpoint, path)


def half_cosine(step, steps):
    """The factor of the learning rate at a step, counted from 0: it would be 0 after all steps."""
    return 0.5 + 0.5 * math.cos(math.pi * step / steps)


class Average:
    """
    The exponential moving average of the weights that are trained: `update(step)` after each step.

    decay: what the average keeps of itself at each step, at most (1 + step) / (10 + step): else it
    would long be one of random weights; 0: no average, `encoder` and `decoder` are those that
    are trained
    """

    def __init__(self, encoder, decoder, decay):
        self.encoder, self.decoder, self.decay = encoder, decoder, decay
        self._trained, self._pairs = {"encoder": encoder, "decoder": decoder}, []
        if decay:
            self.decoder = self._averaged(decoder)
            if any(p.requires_grad for p in encoder.parameters()):
                self.encoder = self._averaged(encoder)

    def _averaged(self, model):
        average = copy.deepcopy(model)
        for mean, weight in zip(average.parameters(), model.parameters()):
            if weight.requires_grad:
                self._pairs.append((mean.requires_grad_(False), weight))
        return average

    @torch.no_grad()
    def update(self, step):
        """step: how many were done before this one"""
        if self._pairs:
            keep = min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(*map(list, zip(*self._pairs)), 1 - keep)

    def state(self):
        """What a checkpoint keeps of it besides the average: the weights that are trained."""
        return {name: model.state_dict() for name, model in self._trained.items()} \
            if self.decay else None

    def load(self, state):
        """
        Go on where `state` was taken, the models given at the start being the averages. Raises
        ValueError or RuntimeError unless it is of such models.
        """
        if not isinstance(state, dict) or state.keys() != self._trained.keys():
            raise ValueError("it lacks the weights that its average is of")
        for name, model in self._trained.items():
            model.load_state_dict(state[name])
