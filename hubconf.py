"""
A `caption.Captioner` in one line, torch.hub.load("PATH", "show_attend_tell", source="local"), from
any folder; the other entries, `encoder`, `decoder` and `word_map`, are its parts. They can be
pickled; a process that reads the pickle calls torch.hub.load first.
"""

import builtins
import importlib.machinery
import pathlib
import sys
import types

dependencies = ["torch", "torchvision", "timm", "numpy", "PIL", "h5py", "filelock", "tqdm"]
_here, _package = pathlib.Path(__file__).resolve().parent, "show_attend_tell_hub"
_names = {path.stem for path in _here.iterdir()}


class _Loader(importlib.machinery.SourceFileLoader):
    """Makes our modules those of a package, since others too have a `utils` or `visualization`."""

    @staticmethod
    def find_spec(name, path, _):
        if name.startswith(f"{_package}."):
            if spec := importlib.machinery.PathFinder.find_spec(name, path):
                spec.loader = _Loader(name, spec.origin)
            return spec

    def exec_module(self, module):
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


def _import(name, *args):
    """What `import` calls in our modules: our names are those of the package."""
    first = name.partition(".")[0]
    if first not in _names:
        return builtins.__import__(name, *args)
    module = builtins.__import__(f"{_package}.{name}", *args)
    return module if args[2] else sys.modules[f"{_package}.{first}"]  # args[2]: `from` its names


if _package not in sys.modules:  # else they are those of an earlier torch.hub.load
    sys.modules[_package] = types.ModuleType(_package)
    sys.modules[_package].__path__ = [str(_here)]
    sys.meta_path.insert(0, _Loader)
show_attend_tell = importlib.import_module(f"{_package}.caption").Captioner
_models = importlib.import_module(f"{_package}.models")


def encoder(pretrained=True, **options):
    """Its `models.Encoder`, or a new one of these options: name="resnet101", stride=32, ..."""
    if pretrained:
        return show_attend_tell(device="cpu").encoder
    return _models.Encoder(weights="none", **options).eval()


def decoder(pretrained=True, **sizes):
    """Its `models.DecoderWithAttention`, or a new one of these sizes: decoder_dim=512, ..."""
    if pretrained:
        return show_attend_tell(device="cpu").decoder
    sizes = {"attention_dim": 512, "embed_dim": 512, "decoder_dim": 512, **sizes}
    sizes.setdefault("vocab_size", len(word_map()))
    return _models.DecoderWithAttention(**sizes).eval()


def word_map():
    return show_attend_tell(device="cpu").word_map
