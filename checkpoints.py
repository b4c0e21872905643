"""
Checkpoints: one format, tensors and plain values only, read with weights_only=True.

    python checkpoints.py OLD NEW --word_map WORDMAP.json   # one of whole modules becomes ours
    python checkpoints.py BEST NEW --half                   # a small one, to pass on
    python checkpoints.py BEST NEW --average BEST_BEFORE    # the mean of two phases' weights

A file holds `encoder` and `decoder` (state dicts), `encoder_args` and `decoder_args` (their
constructors' arguments), `word_map`, and in training also `options`, `progress`, `bleu4` and all
that is needed to continue the run exactly. With train.py's --ema, `encoder` and `decoder` are the
averaged weights, and those being trained are in `trained`.

Checkpoints of whole modules, as the well-known tutorial wrote them, load as well, without running
their code (see modeling/legacy_checkpoints.py).
"""

import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from datasets import check_word_map, read_word_map
from modeling import legacy_checkpoints, stub_unpickler
from models import DecoderWithAttention, Encoder
from utils import Parser, UserError, atomic_write, run_script

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained/flickr8k_efficientnet_lite2.pth.tar"
MAX_ENCODED_IMAGE_SIZE = 256  # beyond it a file asks for memory, not for a model
OURS = ("format", "encoder", "encoder_args", "decoder", "decoder_args", "word_map")  # save's own


def get_args(argv=None):
    parser = Parser(description="Convert an old checkpoint, or make a smaller one or "
                    "the mean of two.")
    parser.add_argument("old", help="a checkpoint of whole modules, or one of ours")
    parser.add_argument("new", help="the file to write; it must not exist yet")
    parser.add_argument("--word_map", help="the WORDMAP file it was trained with, to go inside")
    parser.add_argument("--average", metavar="OTHER", help="take the mean of its weights "
        "and those of this checkpoint, of a phase before or after: often better than either")
    parser.add_argument("--half", action="store_true", help="matrices and convolutions in float16, "
        "without what only --resume needs: for passing a model on")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if os.path.lexists(args.new):
        raise UserError(f"{args.new} exists already; pass another name for the new file")
    checkpoint = load(args.old)
    encoder, decoder = build(checkpoint, args.old)
    word_map = find_word_map(checkpoint, args.old, args.word_map, required=False)
    rest = {key: value for key, value in checkpoint.items() if key not in OURS}
    if args.average:
        _average(encoder, decoder, word_map, args)
        rest = {"options": rest.get("options", {})}  # these weights are no state of the run
    if args.half:
        # Of the paths among the options only the file's name, without the folders of this machine.
        rest = {"options": {option: os.path.basename(value) if isinstance(value, str) else value
                            for option, value in rest.get("options", {}).items()}}
        for model in (encoder, decoder):
            for weight in model.parameters():
                if weight.dim() > 1:  # the others are small, and may exceed float16's range
                    weight.data = weight.data.half()
    save(args.new, encoder, decoder, word_map, **rest)
    carries = f"{len(word_map)} words" if word_map else "no word map: it needs --word_map each time"
    print(f"wrote {args.new} ({encoder.args['name']}, {carries})")


@torch.no_grad()
def _average(encoder, decoder, word_map, args):
    """
    Make the weights the mean of theirs and those of another checkpoint: Wortsman et al. 2021,
    arXiv 2109.01903. UserError unless it is of the same model and words.
    """
    other = load(args.average)
    words = find_word_map(other, args.average, args.word_map, required=False)
    for ours, theirs in zip((encoder, decoder), build(other, args.average)):
        if word_map != words or {**ours.args, "dropout": 0} != {**theirs.args, "dropout": 0}:
            raise UserError(f"{args.average} is of another model or other words than {args.old}; "
                            f"pass a phase of the same training")
        theirs = theirs.state_dict()
        for name, weight in ours.state_dict().items():
            if weight.is_floating_point():
                weight.lerp_(theirs[name], 0.5)


def add_model_options(parser):
    """The options of `find_model` and `load_captioner`, for scripts that use a trained model."""
    parser.add_argument("-m", "--model", help="checkpoint; if not given, the only BEST one in "
        "--checkpoint_folder or the current folder, else the one that comes with the program")
    parser.add_argument("--checkpoint_folder", help="where to look for it")
    parser.add_argument("-wm", "--word_map", help="for checkpoints that carry none")


def save(path, encoder, decoder, word_map, **rest):
    """
    Write a checkpoint with `atomic_write`; `rest` goes in as it is.

    Raises UserError if the disk is full or the folder is not there or not writable.
    """
    state = {"format": FORMAT, "encoder": encoder.state_dict(), "encoder_args": encoder.args,
             "decoder": decoder.state_dict(), "decoder_args": decoder.args,
             "word_map": word_map, **rest}
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeErrors only
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:200]
        folder = os.path.dirname(path) or "."
        if isinstance(error, RuntimeError) and os.path.isdir(folder):
            # the usual cause is a full disk, which torch does not name
            reason += f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB of the disk are free)"
        raise UserError(f"{path} cannot be written: {reason}") from None


def load(path):
    """
    A checkpoint as a dictionary, tensors on the CPU, checked to hold a model; an old one has the
    parts of `build` and, where it knows them, epoch and bleu4, and its word_map is None.

    `stub_unpickler.read` goes through the file before torch does, since torch names neither
    what it refuses nor bounds the memory that tensors of stride 0 or colliding keys ask for.

    Raises UserError if the file is missing, damaged or not one of ours.
    """
    root, names = stub_unpickler.read(path)
    if not isinstance(root, dict):
        root = {}
    if root.get("format") == FORMAT:
        del root  # of a hostile file it may be large
        checkpoint = _load_plain(path, names)
    elif "format" not in root and not root.keys().isdisjoint(("encoder", "decoder")):
        checkpoint = {"format": FORMAT, **legacy_checkpoints.convert(root, path)}
    else:
        raise UserError(f"{path} is not a checkpoint of this program's format {FORMAT}")
    check_model(checkpoint, path)
    return checkpoint


def _load_plain(path, names):
    """What a file of format 1 holds; names: the functions and classes in it."""
    if foreign := [name for name in names if name not in stub_unpickler.PLAIN]:
        raise UserError(f"{path} is refused: it holds {foreign[0][:100]}, but checkpoints of "
                        f"format {FORMAT} are tensors and plain values; nothing in the file was "
                        f"run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch would advise to run whatever is in it
        raise UserError(f"{path} is damaged or not a checkpoint: it is no file of tensors and "
                        f"plain values alone") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from None


@contextmanager
def _one_line(path):
    """Errors of a checkpoint that lacks a part, or has one of a wrong type or size: a UserError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError,
            AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold a whole model: {reason}") from None


def check_model(checkpoint, path):
    """
    UserError unless a checkpoint holds the arguments of a model, its decoder's tensors in the sizes
    that these say, and, if any, the decoder's number of words.

    Tensors are no larger than the file, but a model is made as large as its arguments want.
    """
    with _one_line(path):
        with torch.device("meta"):  # sizes only, no memory
            decoder = DecoderWithAttention(**checkpoint["decoder_args"])
        size = decoder.args["encoded_image_size"]
        if type(size) is not int or not 1 <= size <= MAX_ENCODED_IMAGE_SIZE:
            raise ValueError(f"encoded_image_size is not from 1 to {MAX_ENCODED_IMAGE_SIZE}")
        for name, tensor in decoder.state_dict().items():
            found = checkpoint["decoder"].get(name)
            if found is None:
                raise ValueError(f"the decoder lacks {name}")
            if found.shape != tensor.shape:
                raise ValueError(f"the decoder's {name} has size {tuple(found.shape)}, not "
                                 f"{tuple(tensor.shape)}")
        if not isinstance(checkpoint["encoder_args"]["name"], str):
            raise TypeError("its encoder has no name")
    if checkpoint.get("word_map") is not None:
        _check_words(check_word_map(checkpoint["word_map"], path), checkpoint, path)


def _check_words(word_map, checkpoint, path):
    size = checkpoint["decoder_args"]["vocab_size"]
    if len(word_map) != size:
        raise UserError(f"{path} was trained on {size} words, but the word map has "
                        f"{len(word_map)}; pass the WORDMAP file it was trained with")


def build(checkpoint, path):
    """The encoder and decoder of what `load` returned; `path` is for the message of a UserError."""
    with _one_line(path):
        encoder = Encoder(**checkpoint["encoder_args"], weights=None)
        decoder = DecoderWithAttention(**checkpoint["decoder_args"])
        if encoder.encoder_dim != decoder.args["encoder_dim"]:
            raise ValueError(f"its encoder gives vectors of {encoder.encoder_dim} numbers, its "
                             f"decoder takes {decoder.args['encoder_dim']}")
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
    return encoder, decoder


def find_word_map(checkpoint, path, word_map_path, required=True):
    """
    The word map in the checkpoint, else the caller's, which is for files that lack one. None if
    there is neither and none is required.

    Raises UserError if the caller's is no word map or not of the decoder's number of words.
    """
    word_map = checkpoint.get("word_map")
    if word_map is None and word_map_path is not None:
        word_map = read_word_map(word_map_path)
        _check_words(word_map, checkpoint, path)
    if word_map is None and required:
        raise UserError(f"{path} carries no word map; pass --word_map WORDMAP_….json")
    return word_map


def load_captioner(path, device, word_map_path=None):
    """
    Returns encoder, decoder (both on the device, in evaluation mode), word map, checkpoint.

    word_map_path: a WORDMAP file, for checkpoints that carry none
    """
    checkpoint = load(path)
    encoder, decoder = build(checkpoint, path)
    word_map = find_word_map(checkpoint, path, word_map_path)
    return encoder.to(device).eval(), decoder.to(device).eval(), word_map, checkpoint


def find_model(model, folder, say):
    """
    The path of the checkpoint that the options name: `model`, else the only BEST one in `folder`.
    Where neither is given, the only BEST one in the current folder, else the one that comes with
    the program; `say`, a function like print, then tells which.
    """
    if model:
        return model
    if folder:
        return find_checkpoint(folder)
    if any(Path().glob("BEST_checkpoint_*.pth.tar")):
        found = find_checkpoint(".")
        say(f"model: {found}, the only one in this folder; --model takes another")
        return found
    say(f"model: {PRETRAINED}, which comes with the program; --model takes another")
    return str(PRETRAINED)


def find_checkpoint(folder):
    """The only BEST_checkpoint_*.pth.tar in a folder; UserError that lists them otherwise."""
    found = _checkpoints(folder, "BEST_", "--model")
    if len(found) > 1:
        raise UserError(f"several checkpoints in {folder}; pass --model, one of: "
                        + ", ".join(map(str, found)))
    return str(found[0])


def find_latest(folder):
    """The path of the checkpoint_*.pth.tar in a folder that was written last."""
    return str(max(_checkpoints(folder, "", "--resume"), key=os.path.getmtime))


def _checkpoints(folder, prefix, option):
    found = sorted(Path(folder).glob(f"{prefix}checkpoint_*.pth.tar"))
    if not found:
        raise UserError(f"no {prefix}checkpoint_*.pth.tar in {folder}; pass {option} FILE, or "
                        f"--checkpoint_folder, where train.py wrote it")
    return found


if __name__ == "__main__":
    run_script(main)
