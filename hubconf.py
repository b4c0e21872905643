"""
The model in one line, from any folder, without installing anything:

    torch.hub.load("PATH", "show_attend_tell", source="local")("photo.jpg").text
    torch.hub.load("PATH", "show_attend_tell", "BEST_checkpoint_X.pth.tar", source="local")

Entries: `show_attend_tell`, a `caption.Captioner`; `encoder`, `decoder` and `word_map`, its parts.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "h5py", "filelock", "tqdm"]

_HERE = Path(__file__).resolve().parent
_KEPT = "_show_attend_tell"  # under this name our modules stay in sys.modules
# With what Captioner imports only when it needs it: later this folder is not on the path any more.
_MODULES = [
    "caption",
    "checkpoints",
    "models",
    "modeling.backbones",
    "visualization.attention",
    "visualization.animation",
    "visualization.overlay",
    "visualization.beam_tree",
    "visualization.figures",
    "visualization.page",
]


def _import_ours():
    """
    Import our modules, whatever else is called `utils` or `datasets` in this process. Afterwards
    these names are free again, or those of the foreign modules that had them; ours keep each other.
    Only our packages (modeling, visualization, ...) keep their names, for imports within functions:
    foreign packages of these names must be imported before.
    """
    if _KEPT in sys.modules:
        return sys.modules[_KEPT].modules
    names = {path.stem for path in _HERE.glob("*.py")} | {
        path.parent.name for path in _HERE.glob("*/__init__.py")
    }
    foreign = {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] in names and name != "hubconf" and not _is_ours(module)
    }
    for name in foreign:
        del sys.modules[name]
    sys.path.insert(0, str(_HERE))
    try:
        modules = {name: import_module(name) for name in _MODULES}
    finally:
        sys.path.remove(str(_HERE))
        for path in _HERE.glob("*.py"):
            if path.stem != "hubconf":
                sys.modules.pop(path.stem, None)
        sys.modules.update(foreign)
    sys.modules[_KEPT] = SimpleNamespace(modules=modules)  # a second copy would not know the first
    return modules


def _is_ours(module):
    file = getattr(module, "__file__", None)
    return file is not None and _HERE in Path(file).resolve().parents


_ours = _import_ours()


def show_attend_tell(checkpoint=_ours["checkpoints"].PRETRAINED, **options):
    """
    A `caption.Captioner`; checkpoint: its `model`, a name that torch.hub has for itself; options:
    its other ones
    """
    return _ours["caption"].Captioner(checkpoint, **options)


def encoder(pretrained=True, **options):
    """
    The `models.Encoder` of that model in evaluation mode; with pretrained=False a new one with
    random weights, of these options (name="resnet101", stride=32, ...).
    """
    if pretrained:
        return _load()[0]
    return _ours["models"].Encoder(weights="none", **options).eval()


def decoder(
    pretrained=True,
    attention_dim=512,
    embed_dim=512,
    decoder_dim=512,
    vocab_size=None,
    encoder_dim=2048,
):
    """
    Its `models.DecoderWithAttention` in evaluation mode; with pretrained=False a new one of these
    sizes, by default with as many words as that one.
    """
    if pretrained:
        return _load()[1]
    return (
        _ours["models"]
        .DecoderWithAttention(
            attention_dim, embed_dim, decoder_dim, vocab_size or len(word_map()), encoder_dim
        )
        .eval()
    )


def word_map():
    """Its word map, word -> id."""
    return _load()[2]


def _load():
    checkpoints = _ours["checkpoints"]
    return checkpoints.load_captioner(checkpoints.PRETRAINED, "cpu")
