"""
Checkpoints: one format, tensors and plain values only, read with weights_only=True.

    python checkpoints.py OLD NEW --word_map WORDMAP.json   # convert one of the tutorial's
    python checkpoints.py BEST NEW --half                   # make a small one, to pass on
    python checkpoints.py BEST NEW --average BEST_BEFORE    # average the weights of several phases

A file holds `format` (1), `encoder` and `decoder` (state dicts), `encoder_args` and `decoder_args`
(their constructors' arguments), `offset` (where the encoder's cells look, see
modeling/field_of_view.py; None if it has not been measured, and older files lack it) and
`word_map`. Those of
train.py also hold what continues the run: `options`, `data` (a summary of the data set), `bleu4`,
and of `training.state.TrainingState` `optimizer`, `scaler`, `progress` and `trained`. With --ema,
`encoder` and `decoder` are the averaged weights, and those being trained are in `trained`.

Checkpoints of whole modules, as the tutorial wrote them, can be loaded as well, without running
their code (see modeling/legacy_checkpoints.py).
"""

import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from datasets import (
    IMAGE_SIZE,
    LARGEST_SIZE,
    LEAST_SIZE,
    check_word_map,
    read_word_map,
)
from modeling import legacy_checkpoints
from modeling.backbones import fold_batchnorm
from modeling.field_of_view import find_offset, known_offset
from models import DECODERS, ENCODED_IMAGE_SIZE, Encoder
from utils import Parser, UserError, atomic_write, run_script

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained/everyday_efficientnet_lite2.pth.tar"
MAX_ENCODED_IMAGE_SIZE = 256  # a larger value can only be an attempt to fill the memory
MODEL_KEYS = ("format", "encoder", "encoder_args", "decoder", "decoder_args", "offset", "word_map")


def get_args(argv=None):
    parser = Parser(
        description="Convert an old checkpoint, make a smaller one, or the mean of several."
    )
    parser.add_argument("old", help="a checkpoint of train.py, or of the tutorial")
    parser.add_argument("new", help="the file to write; it must not exist yet")
    parser.add_argument("--word_map", help="the WORDMAP file it was trained with, to store inside")
    parser.add_argument(
        "--average",
        metavar="OTHER",
        nargs="+",
        help="average its weights with "
        "those of these checkpoints, of other phases or of the same phase with another --seed: "
        "often better than each",
    )
    parser.add_argument(
        "--half",
        action="store_true",
        help="store matrices and convolutions in "
        "float16, and leave out what only --resume needs: for passing a model on",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if os.path.lexists(args.new):
        raise UserError(f"{args.new} exists already; pass another name for the new file")
    checkpoint = load(args.old)
    encoder, decoder = build(checkpoint, args.old)
    word_map = find_word_map(checkpoint, args.old, args.word_map, required=False)
    extra = {key: value for key, value in checkpoint.items() if key not in MODEL_KEYS}
    if args.average:
        _average(encoder, decoder, word_map, args)
        extra = {"options": extra.get("options", {})}  # a run cannot continue from these weights
        encoder.offset = None  # that of other weights
    # So that nobody who gets the file has to measure it. Now, since with weights in float16 the
    # encoder cannot run.
    find_offset(encoder)
    if args.half:
        # Paths among the options are reduced to file names, without the folders of this machine.
        extra = {
            "options": {
                option: _file_names(value) for option, value in extra.get("options", {}).items()
            }
        }
        for model in (encoder, decoder):
            for weight in model.parameters():
                if weight.dim() > 1:  # the others are small, and may exceed float16's range
                    weight.data = weight.data.half()
    save(args.new, encoder, decoder, word_map, **extra)
    words = f"{len(word_map)} words" if word_map else "no word map: it needs --word_map each time"
    print(f"wrote {args.new} ({encoder.args['name']}, {words})")


def _file_names(value):
    """A path without its folders, or a list of such; any other value as it is."""
    if isinstance(value, list):
        return [_file_names(item) for item in value]
    return os.path.basename(value) if isinstance(value, str) else value


@torch.no_grad()
def _average(encoder, decoder, word_map, args):
    """
    Average the weights in place with those of other checkpoints: Wortsman et al. 2021 and 2022,
    arXiv 2109.01903 and 2203.05482. UserError unless they have the same model and word map.
    """
    for i, path in enumerate(args.average, 1):
        other = load(path)
        other_word_map = find_word_map(other, path, args.word_map, required=False)
        for ours, theirs in zip((encoder, decoder), build(other, path)):
            if word_map != other_word_map or {**ours.args, "dropout": 0} != {
                **theirs.args,
                "dropout": 0,
            }:
                raise UserError(
                    f"{path} has another model or word map than {args.old}; pass a "
                    f"phase of the same training"
                )
            theirs = theirs.state_dict()
            for name, weight in ours.state_dict().items():
                if weight.is_floating_point():
                    weight.lerp_(theirs[name], 1 / (i + 1))


def add_model_options(parser):
    """The options of `find_model` and `load_captioner`, for scripts that use a trained model."""
    parser.add_argument(
        "-m",
        "--model",
        help="checkpoint; if not given, the only BEST one in "
        "--checkpoint_folder or the current folder, else the one that comes with the program",
    )
    parser.add_argument("--checkpoint_folder", help="where to look for it")
    parser.add_argument("-wm", "--word_map", help="WORDMAP file, for checkpoints without word map")


def save(path, encoder, decoder, word_map, **extra):
    """
    Write a checkpoint with `atomic_write`; extra: further entries of its dictionary.

    Raises UserError if the disk is full or the folder is missing or not writable.
    """
    offset = known_offset(encoder)
    state = {
        "format": FORMAT,
        "encoder": encoder.state_dict(),
        "encoder_args": encoder.args,
        "decoder": decoder.state_dict(),
        "decoder_args": decoder.args,
        "offset": None if offset is None else list(offset),
        "word_map": word_map,
        **extra,
    }
    try:
        with atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeErrors only
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0][:200]
        folder = os.path.dirname(path) or "."
        if isinstance(error, RuntimeError) and os.path.isdir(folder):
            # usually the disk is full, which torch does not say
            reason += f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB of the disk are free)"
        raise UserError(f"{path} cannot be written: {reason}") from None


def load(path):
    """
    Read a checkpoint: a dictionary with tensors on the CPU that holds a valid model. One of the
    tutorial has only the entries that `build` needs, epoch and bleu4 if known, and word_map None.

    `legacy_checkpoints.read` checks the file before torch reads it, since torch neither names what
    it refuses nor limits the memory for tensors of stride 0 or the time for colliding keys.

    Raises UserError if the file is missing, damaged or not a checkpoint.
    """
    root, names = legacy_checkpoints.read(path)
    if not isinstance(root, dict):
        root = {}
    if root.get("format") == FORMAT:
        del root  # it may be large if the file is hostile
        checkpoint = _load_plain(path, names)
    elif "format" not in root and not root.keys().isdisjoint(("encoder", "decoder")):
        checkpoint = {"format": FORMAT, **legacy_checkpoints.convert(root, path)}
    else:
        raise UserError(f"{path} is not a checkpoint of this program's format {FORMAT}")
    check_model(checkpoint, path)
    return checkpoint


def _load_plain(path, names):
    """The content of a file of format 1; names: the functions and classes in it."""
    if foreign := [name for name in names if name not in legacy_checkpoints.PLAIN]:
        raise UserError(
            f"{path} is refused: it holds {foreign[0][:100]}, but checkpoints of "
            f"format {FORMAT} are tensors and plain values; nothing in the file was "
            f"run"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message suggests weights_only=False
        raise UserError(
            f"{path} is damaged or not a checkpoint: it does not hold only tensors and plain values"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from None


@contextmanager
def _one_line_errors(path):
    """Turn errors from missing parts, wrong types or sizes of a checkpoint into a UserError."""
    try:
        yield
    except (
        KeyError,
        TypeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
        AttributeError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold a complete model: {reason}") from None


class _NoInitialWeights(TorchFunctionMode):
    """
    A context in which new modules leave their weights as they find them, for those of a file. To
    draw random numbers only to overwrite them takes as long as to read them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def check_model(checkpoint, path):
    """
    UserError unless a checkpoint holds the arguments of a model, the decoder's tensors in the sizes
    that follow from them and, if it has a word map, one of the decoder's vocabulary size.

    This protects memory: tensors are not larger than the file, but arguments can say any size.
    """
    with _one_line_errors(path):
        with torch.device("meta"), _NoInitialWeights():  # sizes only, no memory
            decoder = build_decoder(checkpoint["decoder_args"])
        encoder_args = checkpoint.get("encoder_args", {})
        for size in (
            decoder.args["encoded_image_size"],
            encoder_args.get("encoded_image_size", ENCODED_IMAGE_SIZE),
        ):
            if type(size) is not int or not 1 <= size <= MAX_ENCODED_IMAGE_SIZE:
                raise ValueError(f"encoded_image_size is not from 1 to {MAX_ENCODED_IMAGE_SIZE}")
        if not 0 <= decoder.args["dropout"] <= 1:  # false for NaN too
            raise ValueError(f"its dropout is {decoder.args['dropout']}")
        for name, tensor in decoder.state_dict().items():
            found = checkpoint["decoder"].get(name)
            if found is None:
                raise ValueError(f"the decoder lacks {name}")
            if found.shape != tensor.shape:
                raise ValueError(
                    f"the decoder's {name} has size {tuple(found.shape)}, not {tuple(tensor.shape)}"
                )
        if not isinstance(checkpoint["encoder_args"]["name"], str):
            raise TypeError("its encoder has no name")
        if encoder_args.get("stride", 32) not in (16, 32):
            raise ValueError("the encoder's stride is not 16 or 32")
        size = encoder_args.get("image_size", IMAGE_SIZE)
        if type(size) is not int or not LEAST_SIZE <= size <= LARGEST_SIZE:
            raise ValueError(f"image_size is not from {LEAST_SIZE} to {LARGEST_SIZE}")
        if (offset := checkpoint.get("offset")) is not None and not (
            isinstance(offset, list)
            and len(offset) == 2
            and all(isinstance(part, float) and abs(part) <= 0.5 for part in offset)
        ):
            raise ValueError("offset is not two fractions of an image")
    if checkpoint.get("word_map") is not None:
        _check_vocab_size(check_word_map(checkpoint["word_map"], path), checkpoint, path)


def _check_vocab_size(word_map, checkpoint, path):
    size = checkpoint["decoder_args"]["vocab_size"]
    if len(word_map) != size:
        raise UserError(
            f"{path} was trained on {size} words, but the word map has "
            f"{len(word_map)}; pass the WORDMAP file it was trained with"
        )


def build_decoder(arguments):
    """The decoder with a checkpoint's decoder_args; those of old files say no kind of attention."""
    return DECODERS[arguments.get("attention", "soft")](**arguments)


def build(checkpoint, path):
    """Encoder and decoder from the dictionary that `load` returned; path: for error messages"""
    with _one_line_errors(path), _NoInitialWeights():
        with torch.device("meta"):  # sizes only: a small file may claim any encoder
            encoder = Encoder(**checkpoint["encoder_args"], weights=None)
        _check_encoder(encoder.state_dict(), checkpoint["encoder"])
        encoder = Encoder(**checkpoint["encoder_args"], weights=None)
        decoder = build_decoder(checkpoint["decoder_args"])
        if encoder.encoder_dim != decoder.args["encoder_dim"]:
            raise ValueError(
                f"its encoder returns vectors of {encoder.encoder_dim} numbers, its "
                f"decoder takes {decoder.args['encoder_dim']}"
            )
        encoder.load_state_dict(checkpoint["encoder"])
        if checkpoint.get("offset") is not None:
            encoder.offset = tuple(checkpoint["offset"])
        decoder.load_state_dict(checkpoint["decoder"])
    return encoder, decoder


def _check_encoder(expected, found):
    """ValueError unless the tensors in the file, by name, have the sizes that are expected"""
    for name, tensor in expected.items():
        if name not in found:
            raise ValueError(f"the encoder lacks {name}")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"the encoder's {name} has size {tuple(found[name].shape)}, not "
                f"{tuple(tensor.shape)}"
            )


def find_word_map(checkpoint, path, word_map_path, required=True):
    """
    The checkpoint's word map, or that of the file word_map_path if the checkpoint has none. None if
    there is neither and it is not required.

    Raises UserError if the file is not a word map or not of the decoder's vocabulary size.
    """
    word_map = checkpoint.get("word_map")
    if word_map is None and word_map_path is not None:
        word_map = read_word_map(word_map_path)
        _check_vocab_size(word_map, checkpoint, path)
    if word_map is None and required:
        raise UserError(f"{path} has no word map; pass --word_map WORDMAP_….json")
    return word_map


def load_captioner(path, device, word_map_path=None):
    """
    Returns encoder, decoder (both on the device, in evaluation mode), word map, checkpoint. The
    encoder's BatchNorms are folded into its convolutions: it is for inference alone.

    word_map_path: a WORDMAP file, for checkpoints without word map
    """
    checkpoint = load(path)
    encoder, decoder = build(checkpoint, path)
    word_map = find_word_map(checkpoint, path, word_map_path)
    fold_batchnorm(encoder.resnet)
    return encoder.to(device).eval(), decoder.to(device).eval(), word_map, checkpoint


def find_model(model, folder, print_line):
    """
    The path of the checkpoint to use: `model`, else the only BEST one in `folder`.
    If neither is given, the only BEST one in the current folder, else the one that comes with
    the program; print_line, a function like print, then gets a line that says which.
    """
    if model:
        return model
    if folder:
        return find_checkpoint(folder)
    if any(Path().glob("BEST_checkpoint_*.pth.tar")):
        found = find_checkpoint(".")
        print_line(f"model: {found}, the only one in this folder; --model takes another")
        return found
    print_line(f"model: {PRETRAINED}, which comes with the program; --model takes another")
    return str(PRETRAINED)


def find_checkpoint(folder):
    """The only BEST_checkpoint_*.pth.tar in a folder; UserError if there are none or several."""
    found = _checkpoints(folder, "BEST_", "--model")
    if len(found) > 1:
        raise UserError(
            f"several checkpoints in {folder}; pass --model, one of: " + ", ".join(map(str, found))
        )
    return str(found[0])


def find_latest(folder):
    """The path of the checkpoint_*.pth.tar in a folder that was written last."""
    return str(max(_checkpoints(folder, "", "--resume"), key=os.path.getmtime))


def _checkpoints(folder, prefix, option):
    found = sorted(Path(folder).glob(f"{prefix}checkpoint_*.pth.tar"))
    if not found:
        raise UserError(
            f"no {prefix}checkpoint_*.pth.tar in {folder}; pass {option} FILE, or "
            f"--checkpoint_folder, where train.py wrote it"
        )
    return found


if __name__ == "__main__":
    run_script(main)
