"""
A `caption.Captioner` in one line, torch.hub.load("PATH", "show_attend_tell", source="local"), from
any folder; the other entries, `encoder`, `decoder` and `word_map`, are its parts.
"""

import sys
from importlib import import_module
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "h5py", "filelock", "tqdm"]
_here, _ours = Path(__file__).resolve().parent, "_show_attend_tell_"

if f"{_ours}caption" not in sys.modules:  # else an earlier torch.hub.load has imported them
    # Foreign modules with the names of ours, such as `utils`, are restored afterwards. Only our
    # packages keep their names, for imports within functions.
    _names = {path.stem for path in _here.iterdir()}
    _others = {key: sys.modules.pop(key) for key in [*sys.modules] if key.split(".")[0] in _names}
    sys.path.insert(0, str(_here))
    try:
        for _path in _here.glob("visualization/[!_]*.py"):
            import_module(f"visualization.{_path.stem}")
        for _name in ("models", "caption"):
            sys.modules[_ours + _name] = import_module(_name)
    finally:
        sys.path.remove(str(_here))
        for _path in _here.glob("*.py"):
            sys.modules.pop(_path.stem, None)
        sys.modules.update(_others)

show_attend_tell = sys.modules[f"{_ours}caption"].Captioner


def encoder(pretrained=True, **options):
    """Its `models.Encoder`, or a new one of these options: name="resnet101", stride=32, ..."""
    if pretrained:
        return show_attend_tell(device="cpu").encoder
    return sys.modules[f"{_ours}models"].Encoder(weights="none", **options).eval()


def decoder(pretrained=True, **sizes):
    """Its `models.DecoderWithAttention`, or a new one of these sizes: decoder_dim=512, ..."""
    if pretrained:
        return show_attend_tell(device="cpu").decoder
    sizes = {"attention_dim": 512, "embed_dim": 512, "decoder_dim": 512, **sizes}
    sizes.setdefault("vocab_size", len(word_map()))
    return sys.modules[f"{_ours}models"].DecoderWithAttention(**sizes).eval()


def word_map():
    return show_attend_tell(device="cpu").word_map
