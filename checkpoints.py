"""
Checkpoints: one format, tensors and plain values only, read with weights_only=True.

    python checkpoints.py OLD NEW --word_map WORDMAP.json   # convert one of the tutorial's
    python checkpoints.py BEST NEW --half                   # make a small one, to share
    python checkpoints.py BEST NEW --average BEST_BEFORE    # average the weights of several phases

A file holds `format` (1), `encoder` and `decoder` (state dicts), `encoder_args` and `decoder_args`
(their constructors' arguments), `offset` (where the encoder's locations look, see
modeling/field_of_view.py; None if it has not been measured, and older files lack it) and
`word_map`. Those of train.py also hold what continues the run: `options`, `data` (a summary of the
data set), `bleu4`, and `optimizer`, `scaler`, `progress` and `trained` of
`training.state.TrainingState`. With --ema, `encoder` and `decoder` are the averaged weights, and
`trained` those being trained. The tutorial's checkpoints can be loaded as well. No code in a file
is run, see modeling/legacy_checkpoints.py.
"""

import os
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from datasets import IMAGE_SIZE, MAX_SIZE, MIN_SIZE, check_word_map, read_word_map
from modeling import legacy_checkpoints, tutorial_models
from modeling.backbones import fold_batchnorm
from modeling.field_of_view import find_offset, known_offset
from models import DECODERS, Encoder
from utils import Parser, UserError, atomic_write, run_script

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained/everyday_efficientnet_lite2.pth.tar"
MAX_ENCODED_IMAGE_SIZE = 256  # a larger value can only be an attempt to fill the memory
INCOMPLETE = "does not hold a complete model"
MODEL_KEYS = ("format", "encoder", "encoder_args", "decoder", "decoder_args", "offset", "word_map")


def get_args(argv=None):
    parser = Parser(description="Convert an old checkpoint, make it smaller, or average several.")
    parser.add_argument("old", help="a checkpoint of train.py, or of the tutorial")
    parser.add_argument("new", help="the file to write; it must not exist yet")
    parser.add_argument("--word_map", help="the WORDMAP file it was trained with, to store inside")
    text = "average its weights with those of these checkpoints, of other phases or of the same "
    text += "phase with another --seed: often better than each"
    parser.add_argument("--average", metavar="OTHER", nargs="+", help=text)
    text = "for sharing a model: store matrices and convolutions in float16, and leave out what "
    parser.add_argument("--half", action="store_true", help=text + "only --resume needs")
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
        encoder.offset = None  # it was measured with other weights
    find_offset(encoder)  # now: with weights in float16 the encoder cannot run
    if args.half:
        options = extra.get("options", {})
        extra = {"options": {option: _file_names(value) for option, value in options.items()}}
        for weight in (*encoder.parameters(), *decoder.parameters()):
            if weight.dim() > 1:  # the others are small, and may exceed float16's range
                weight.data = weight.data.half()
    save(args.new, encoder, decoder, word_map, **extra)
    words = f"{len(word_map)} words" if word_map else "no word map: it needs --word_map each time"
    print(f"wrote {args.new} ({encoder.args['name']}, {words})")


def _file_names(value):
    """An option's value, with paths as file names, without the folders of this machine"""
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
            same = {**ours.args, "dropout": 0} == {**theirs.args, "dropout": 0}
            if not same or word_map != other_word_map:
                raise UserError(
                    f"{path} has another model or word map than {args.old}; pass a phase of the "
                    f"same training"
                )
            theirs = theirs.state_dict()
            for name, weight in ours.state_dict().items():
                if weight.is_floating_point():
                    weight.lerp_(theirs[name], 1 / (i + 1))


def add_model_options(parser):
    """The options of `find_model` and `load_captioner`, for scripts that use a trained model."""
    text = "checkpoint; if not given, the only BEST one in --checkpoint_folder or the current "
    text += "folder, else the one that comes with the program"
    parser.add_argument("-m", "--model", help=text)
    parser.add_argument("--checkpoint_folder", help="where to look for it")
    parser.add_argument("-wm", "--word_map", help="WORDMAP file, for checkpoints without word map")


def save(path, encoder, decoder, word_map, **extra):
    """Write a checkpoint whole or not at all; extra: further entries of its dictionary."""
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
    except (OSError, RuntimeError) as error:  # RuntimeError: torch does not say that a disk is full
        reason = getattr(error, "strerror", None) or f"is the disk full? {error}".partition("\n")[0]
        raise UserError(f"{path} cannot be written: {reason}") from None


def load(path):
    """
    Read a checkpoint: a dictionary with tensors on the CPU that holds a valid model. One of the
    tutorial has only the entries that `build` needs, epoch and bleu4 if known, and word_map None.

    Raises UserError if the file is missing, damaged or not a checkpoint.
    """
    root = legacy_checkpoints.read(path)
    version = root.get("format") if isinstance(root, dict) else 0
    if type(version) is int and version == FORMAT:
        checkpoint = root
    elif version is None and not root.keys().isdisjoint(("encoder", "decoder")):
        checkpoint = {"format": FORMAT, **tutorial_models.convert(root, path)}
    else:
        raise UserError(f"{path} is not a checkpoint of this program's format {FORMAT}")
    check_model(checkpoint, path)
    return checkpoint


class _NoInitialWeights(TorchFunctionMode):
    """
    New modules keep uninitialised weights, which those of a file replace: random initialisation
    would take as long as reading the file.
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

    This protects memory: tensors are not larger than the file, but arguments can claim any size.
    """
    with legacy_checkpoints.one_line_errors(path, INCOMPLETE):
        with torch.device("meta"), _NoInitialWeights():  # sizes only, no memory
            decoder = build_decoder(checkpoint["decoder_args"])
        _check_tensors("decoder", decoder, checkpoint)
        args = {"stride": 32, "image_size": IMAGE_SIZE, **checkpoint["encoder_args"]}
        grids = {decoder.args["encoded_image_size"], args.get("encoded_image_size", 1)}
        x, y = checkpoint.get("offset") or (0.0, 0.0)
        for name, valid in {
            "encoder's name": isinstance(args["name"], str),
            "encoder's stride": args["stride"] in (16, 32),
            "image_size": args["image_size"] in range(MIN_SIZE, MAX_SIZE + 1),
            "encoded_image_size": grids <= set(range(1, MAX_ENCODED_IMAGE_SIZE + 1)),
            "dropout": 0 <= decoder.args["dropout"] <= 1,
            "offset": abs(x) <= 0.5 and abs(y) <= 0.5,  # false for NaN too
        }.items():
            if not valid:
                raise ValueError(f"its {name} is not valid")
    if checkpoint.get("word_map") is not None:
        _check_vocab_size(check_word_map(checkpoint["word_map"], path), checkpoint, path)


def _check_tensors(part, model, checkpoint):
    """KeyError or ValueError unless a checkpoint has this part's tensors, in size and finite"""
    for name, tensor in model.state_dict().items():
        saved = checkpoint[part][name]
        if saved.shape != tensor.shape:
            sizes = tuple(saved.shape), tuple(tensor.shape)
            raise ValueError(f"the {part}'s {name} has size {sizes[0]}, not {sizes[1]}")
        if not saved.sum(dtype=torch.float32).isfinite():  # quicker than of each weight
            raise ValueError(f"the {part}'s {name} is not finite")


def _check_vocab_size(word_map, checkpoint, path):
    size = checkpoint["decoder_args"]["vocab_size"]
    if len(word_map) != size:
        raise UserError(
            f"{path} was trained on {size} words, but the word map has {len(word_map)}; pass the "
            f"WORDMAP file it was trained with"
        )


def build_decoder(arguments):
    """The decoder with a checkpoint's decoder_args; those of old files lack `attention`."""
    return DECODERS[arguments.get("attention", "soft")](**arguments)


def build(checkpoint, path):
    """Encoder and decoder from the dictionary that `load` returned; path: for error messages"""
    args = {**checkpoint["encoder_args"], "weights": None}
    with legacy_checkpoints.one_line_errors(path, INCOMPLETE), _NoInitialWeights():
        with torch.device("meta"):  # sizes only: a small file may claim any encoder
            _check_tensors("encoder", Encoder(**args), checkpoint)
        encoder = Encoder(**args)
        decoder = build_decoder(checkpoint["decoder_args"])
        sizes = encoder.encoder_dim, decoder.args["encoder_dim"]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"its encoder returns {sizes[0]} numbers, its decoder takes {sizes[1]}"
            )
        encoder.load_state_dict(checkpoint["encoder"])
        decoder.load_state_dict(checkpoint["decoder"])
        if checkpoint.get("offset") is not None:
            encoder.offset = tuple(checkpoint["offset"])
    return encoder, decoder


def find_word_map(checkpoint, path, word_map_path, required=True):
    """
    The checkpoint's word map, else that of the file word_map_path. None if there is neither and it
    is not required. UserError if it is not a word map or not of the decoder's vocabulary size.
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
    The path of the checkpoint to use: `model`, else the only BEST one in `folder`. If neither is
    given, the only BEST one in the current folder, else the one that comes with the program; then
    print_line, a function like print, reports which.
    """
    if model or folder:
        return model or find_checkpoint(folder)
    found, what = str(PRETRAINED), "which comes with the program"
    if any(Path().glob("BEST_checkpoint_*.pth.tar")):
        found, what = find_checkpoint("."), "the only one in this folder"
    print_line(f"model: {found}, {what}; --model takes another")
    return found


def find_checkpoint(folder):
    """The only BEST_checkpoint_*.pth.tar in a folder; UserError if there are none or several."""
    found = _checkpoints(folder, "BEST_", "--model")
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise UserError(f"several checkpoints in {folder}; pass --model, one of: {listed}")
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
