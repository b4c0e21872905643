"""Complete epochs and scripts, as a user runs them."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import torch

import train
from benchmarks.files import COCO_IMAGES
from benchmarks.measuring import ROOT, compare, seconds
from benchmarks.model import (
    CELLS,
    ENCODER_DIM,
    SIZE,
    VOCAB,
    WORD_MAP,
    decoder_with_realistic_lengths,
    random_captions,
    search_one_by_one,
)
from datasets import CaptionDataset, ResumableBatchSampler
from modeling.beam_search import beam_search
from modeling.devices import Distributed, autocast
from models import DecoderWithAttention, Encoder
from training.build import build_criterion, build_loader
from training.engine import train_one_epoch
from training.feature_cache import cache_features, load_features
from training.interrupts import Interrupts
from training.state import Progress, TrainingState
from utils import write_json


def write_data_set(folder, pixels=True, size=256, **images):
    """
    The files of create_input_files.py for random images: TRAIN=160, VAL=16, ... Without pixels they
    are black, and take no space on disk.
    """
    words = {f"word{i}": i for i in range(1, VOCAB - 3)}
    write_json(f"{folder}/WORDMAP_x.json", WORD_MAP | words)
    for split, n in images.items():
        captions, lengths = random_captions(n, 5)
        write_json(f"{folder}/{split}_CAPTIONS_x.json", captions.flatten(0, 1).tolist())
        write_json(f"{folder}/{split}_CAPLENS_x.json", lengths.flatten().tolist())
        with h5py.File(f"{folder}/{split}_IMAGES_x.hdf5", "w") as file:
            file.attrs["captions_per_image"] = 5
            array = file.create_dataset("images", (n, 3, size, size), np.uint8)
            if pixels:
                array[:] = np.random.default_rng(0).integers(0, 256, array.shape, np.uint8)


def options(args, folder, *more):
    amp = ["--amp", args.amp] if args.amp else []
    return [
        "--data_folder",
        str(folder),
        "--checkpoint_folder",
        str(folder),
        "--encoder_weights",
        "none",
        "--device",
        str(args.device),
        *amp,
        *more,
    ]


class PreloadedBatches(list):
    """The batches of a loader of cached features, in float32 on the device."""

    num_workers = 0

    def __init__(self, loader, device):
        super().__init__((features.to(device).float(), *rest) for features, *rest in loader)
        self.dataset, self.sampler = loader.dataset, loader.sampler


class EpochRunner:
    """Training as in train.py on this data: run() trains for one epoch."""

    def __init__(
        self, encoder, data, args, fine_tune=False, preload=False, images=16, more=(), decoder=None
    ):
        """images: in a batch, each with 5 captions; more: further options of train.py"""
        run_args = train.get_args(options(args, ".", *more))
        run_args.fine_tune_encoder = fine_tune
        decoder = decoder or DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB, encoder.encoder_dim)
        sampler = ResumableBatchSampler(len(data), images)
        self.loader = build_loader(data, sampler, run_args.workers, args.device)
        if preload:
            self.loader = PreloadedBatches(self.loader, args.device)
        self.state = TrainingState(
            run_args,
            encoder,
            decoder.to(args.device),
            build_criterion(run_args, data),
            sampler.num_batches,
            Distributed(args.device),
        )

    def run(self):
        self.state.progress = Progress()
        run = SimpleNamespace(interrupts=Interrupts(), save_due=lambda: False)
        train_one_epoch(self.state, self.loader, 1, run)


def cache(args):
    """An epoch of train.py with the feature cache and without it, and with the decoder alone."""
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(folder, TRAIN=96, VAL=5)
        times = {}
        for option, epochs in (("--cache_features", 4), ("--no-cache_features", 2)):
            shutil.rmtree(Path(folder, "run"), ignore_errors=True)
            with redirect_stdout(StringIO()):
                train.main(
                    options(
                        args,
                        folder,
                        "--checkpoint_folder",
                        f"{folder}/run",
                        option,
                        "--epochs",
                        str(epochs),
                    )
                )
            log = Path(folder, "run", "log_x.jsonl").read_text().splitlines()
            times[option] = min(json.loads(line)["train_seconds"] for line in log[1:])
        torch.manual_seed(0)  # the same encoder as in that run, whose features exist
        encoder = Encoder(weights="none").to(args.device).eval()
        data = CaptionDataset(folder, "x", "TRAIN")
        with autocast(args.device, args.amp):
            path = cache_features(data, encoder, args.device, args.amp)
        data.use_features(load_features(path, None, args.device))
        runner = EpochRunner(encoder, data, args, preload=True)
        runner.run()
        decoder_alone = min(seconds(runner.run, args.device) for _ in range(3))
    cached, uncached = times["--cache_features"], times["--no-cache_features"]
    yield {
        "stage": "epoch of 96 images, ResNet-101; textbook: no cache",
        "textbook": uncached,
        "ours": cached,
        "decoder": decoder_alone,
        "note": f"{cached / decoder_alone:.2f} times the decoder's own {decoder_alone:.3f} s",
    }


def coco(args):
    """Epochs of COCO with ResNet-101, extrapolated from a part, on random data of its sizes."""
    gpu = args.device.type == "cuda"
    part, batches = (320, 20) if gpu else (48, 3)
    scale = COCO_IMAGES / part
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(folder, TRAIN=part)
        data = CaptionDataset(folder, "x", "TRAIN")
        encoder = Encoder(weights="none").to(args.device)
        for fine_tune in (False, True):
            encoder.fine_tune(fine_tune)
            if not fine_tune:
                features = torch.rand(part, CELLS, ENCODER_DIM, device=args.device).half()
                data.use_features(features)
            else:
                data = CaptionDataset(folder, "x", "TRAIN")
            runner = EpochRunner(encoder, data, args, fine_tune)
            runner.run()
            time = scale * min(seconds(runner.run, args.device) for _ in range(3))
            what = "fine-tuning ResNet-101" if fine_tune else "decoder alone, from the cache"
            yield {
                "stage": f"epoch of COCO, {what}",
                "ours": time,
                "note": f"from {batches} of {COCO_IMAGES // 16 + 1} batches",
            }
    encoder.eval()
    decoder, n = decoder_with_realistic_lengths(args.device), 5000 if gpu else 50
    images = torch.randint(0, 256, (50, 3, 256, 256), dtype=torch.uint8)

    @torch.inference_mode()
    def textbook():
        for image in images[:10].to(args.device).split(1):
            search_one_by_one(decoder, encoder.cells(image), 5)

    @torch.inference_mode()
    def ours():
        for _ in range(n // 50):
            with autocast(args.device, args.amp):
                beam_search(decoder, encoder.cells(images.to(args.device)), WORD_MAP, 5)

    row = compare(
        "beam-5 search of 5000 images, with ResNet-101", textbook, ours, args, memory=False
    )
    yield row | {
        "textbook": row["textbook"] * 500,
        "ours": row["ours"] * 5000 / n,
        "note": f"from 10 images one by one and {n} in batches of 50",
    }


def start(args):
    """Scripts, from the start of Python to its end, beside `import torch`, which all need."""
    with tempfile.TemporaryDirectory() as folder:
        photograph = shutil.copy(ROOT / "docs/photo.jpg", folder)
        caption = ["caption.py", "--img", photograph, "--device", str(args.device)]
        commands = {
            "import torch": ["-c", "import torch"],
            "caption.py, one photograph": [*caption, "--no_attention"],
            "caption.py, with the overlay": caption,
            "Captioner()": ["-c", "from caption import Captioner; Captioner()"],
            "train.py --help": ["train.py", "--help"],
            "eval.py --help": ["eval.py", "--help"],
        }

        def run(command):
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)

        times = {name: [] for name in commands}
        for i in range(args.repeats + 1):
            for name, command in commands.items():
                time = seconds(partial(run, command), args.device)
                times[name] += [time] if i else []  # the first time files come from the disk
    times = {name: statistics.median(values) for name, values in times.items()}
    for name, time in times.items():
        share = time / times["import torch"]
        yield {
            "stage": name,
            "ours": time,
            "share": share,
            "note": f"{share:.2f} times import torch",
        }
