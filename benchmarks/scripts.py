"""What people wait for: the start of scripts, and files of images and captions."""

import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

from benchmarks.encoder import write_photographs
from benchmarks.measuring import ROOT, compare
from benchmarks.model import COCO_IMAGES, write_data_set
from datasets import CaptionDataset
from preprocessing.input_files import create_input_files
from utils import write_json


def start(args):
    """Scripts, from the start of Python to its end, beside `import torch`, which all need."""
    run = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
    import_torch = partial(run, [sys.executable, "-c", "import torch"])
    with tempfile.TemporaryDirectory() as folder:
        photograph = shutil.copy(ROOT / "docs/photo.jpg", folder)
        caption = ["caption.py", "--img", photograph, "--device", str(args.device)]
        for name, command in {
            "caption.py, one photograph": [*caption, "--no_attention"],
            "caption.py, with the overlay": caption,
            "Captioner()": ["-c", "from caption import Captioner; Captioner()"],
            "train.py --help": ["train.py", "--help"],
            "eval.py --help": ["eval.py", "--help"],
        }.items():
            script = partial(run, [sys.executable, *command])
            row = compare(f"{name}; textbook: import torch", import_torch, script, args, False)
            row["share"] = row["ours"] / row["textbook"]
            yield row | {"note": f"{row['share']:.2f} times import torch"}


def files(args, photographs=1000, captioned=COCO_IMAGES):
    """Photographs to HDF5, and opening the captions of COCO's training split."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photographs(folder, photographs)
        sentences = [{"tokens": f"a photograph number {i} of something".split()} for i in range(5)]
        entries = [{"filename": x.name, "split": "train", "sentences": sentences} for x in paths]
        write_json(folder / "k.json", {"images": entries})

        def create():
            with redirect_stdout(StringIO()):
                create_input_files("x", folder / "k.json", folder, output_folder=folder / "ours")
            shutil.rmtree(folder / "ours")

        row = compare(f"preprocessing {photographs} photographs", None, create, args, False)
        yield row | {"note": f"{photographs / row['ours']:.0f} images/s"}
        write_data_set(folder, captioned)
        stage, load = f"opening {5 * captioned:,} captions", partial(CaptionDataset, folder, "x")
        yield compare(stage, None, partial(load, "TRAIN"), args, False)
