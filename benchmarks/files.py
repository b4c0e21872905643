"""From image files to batches: reading and resizing images, writing HDF5, loading captions."""

import io
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import h5py
import imageio.v3 as imageio
import numpy as np
import torch
from PIL import Image

from benchmarks.measuring import compare, measure_process
from benchmarks.model import VOCAB, WORD_MAP, random_captions
from preprocessing.input_files import create_input_files
from utils import write_json

COCO_IMAGES = 113_287  # of its training split, 5 captions each


def draw_photographs(folder, n, different=100):
    """n JPEG files of 500 x 375 pixels, noise that compresses about as well as photographs."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:06d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        if i >= different:
            os.link(paths[i % different], path)
            continue
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        fine = rng.integers(-12, 13, (375, 500, 3))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) + fine
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def write_karpathy(path, photographs, val=0):
    """val: how many of them, the last ones, are for validation"""
    sentences = [{"tokens": f"a photograph number {i} of something".split()} for i in range(5)]
    write_json(
        path,
        {
            "images": [
                {
                    "filename": photograph.name,
                    "sentences": sentences,
                    "split": "val" if i >= len(photographs) - val else "train",
                }
                for i, photograph in enumerate(photographs)
            ]
        },
    )


def preprocessing(args):
    """Reading and resizing photographs and writing them to HDF5, and the memory this takes."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        photographs = draw_photographs(folder, 1000)
        write_karpathy(folder / "karpathy.json", photographs)

        def textbook():
            with h5py.File(folder / "textbook.hdf5", "w") as file:
                images = file.create_dataset("images", (len(photographs), 3, 256, 256), "uint8")
                for i, path in enumerate(photographs):
                    image = Image.fromarray(imageio.imread(path)).resize(
                        (256, 256), Image.Resampling.BILINEAR
                    )
                    images[i] = np.asarray(image).transpose(2, 0, 1)

        def ours():
            with redirect_stdout(io.StringIO()):
                create_input_files(
                    "photos", folder / "karpathy.json", folder, output_folder=folder / "ours"
                )
            shutil.rmtree(folder / "ours")

        row = compare("preprocessing 1000 photographs", textbook, ours, args, memory=False)
        yield row | {"note": f"{1000 / row['ours']:.0f} images/s, {os.cpu_count()} processes"}

    peaks = {n: memory_of_preprocessing(n) for n in (1000, 5000)}
    slope = (peaks[5000] - peaks[1000]) / 4000
    yield {
        "stage": "preprocessing memory, 1000 and 5000 photographs",
        "bytes": peaks,
        "bytes_per_image": slope,
        "note": f"{peaks[1000] / 1e6:.0f} and {peaks[5000] / 1e6:.0f} MB, "
        f"{slope / 1e3:+.1f} kB an image",
    }


def memory_of_preprocessing(n):
    """Peak bytes of a process, including its workers, that writes n photographs to HDF5."""
    with tempfile.TemporaryDirectory() as folder:
        write_karpathy(Path(folder, "k.json"), draw_photographs(Path(folder), n))
        return measure_process(f"""
            from preprocessing.input_files import create_input_files
            create_input_files("p", {folder!r} + "/k.json", {folder!r}, output_folder={folder!r})
        """)["bytes"]


def loading(args):
    """Loading the captions of a split of COCO's size, and starting workers that read from it."""
    for images in (COCO_IMAGES // 100, COCO_IMAGES):
        with tempfile.TemporaryDirectory() as folder:
            yield from opening(folder, images)


def opening(folder, images):
    captions, lengths = random_captions(images, 5)
    captions = torch.nn.functional.pad(captions, (0, 52 - captions.shape[2])).flatten(0, 1)
    write_json(f"{folder}/TRAIN_CAPTIONS_x.json", captions.tolist())
    write_json(f"{folder}/TRAIN_CAPLENS_x.json", lengths.flatten().tolist())
    words = {f"word{i}": i for i in range(1, VOCAB - 3)}
    write_json(f"{folder}/WORDMAP_x.json", WORD_MAP | words)
    with h5py.File(f"{folder}/TRAIN_IMAGES_x.hdf5", "w") as file:
        file.attrs["captions_per_image"] = 5  # no pixels are written: the file stays small
        file.create_dataset("images", (images, 3, 256, 256), "uint8")
    count = len(captions)
    del captions, lengths
    textbook = measure_process(f"""
        captions = json.load(open({folder!r} + "/TRAIN_CAPTIONS_x.json"))
        lengths = json.load(open({folder!r} + "/TRAIN_CAPLENS_x.json"))
    """)
    ours = measure_process(f"""
        from datasets import CaptionDataset
        data = CaptionDataset({folder!r}, "x", "TRAIN")
    """)
    yield {
        "stage": f"opening {count:,} captions",
        "textbook": textbook["seconds"],
        "ours": ours["seconds"],
        "textbook_bytes": textbook["bytes_beyond_imports"],
        "ours_bytes": ours["bytes_beyond_imports"],
    }
    for method in ("fork", "spawn"):
        workers = measure_process(f"""
            from torch.utils.data import DataLoader
            from datasets import ResumableBatchSampler, CaptionDataset
            data = CaptionDataset({folder!r}, "x", "TRAIN")
            private = lambda pid: sum(int(line.split()[1]) for line in
                open(f"/proc/{{pid}}/smaps_rollup") if line.startswith("Private")) * 1024
            start = time.perf_counter()
            sampler = ResumableBatchSampler(len(data), 16)
            batches = iter(DataLoader(data, sampler=sampler, batch_size=None, num_workers=2,
                                      multiprocessing_context={method!r}))
            next(batches)
            result["start"] = time.perf_counter() - start
            result["private"] = [private(w.pid) for w in batches._workers]
        """)
        memory = " and ".join(f"{size / 1e6:.0f}" for size in workers["private"])
        yield {
            "stage": f"  two workers' first batch, {method}",
            "ours": workers["start"],
            "worker_bytes": workers["private"],
            "note": f"{memory} MB of their own",
        }
