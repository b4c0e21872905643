"""From 15,000 to 120,000 photographs (COCO's number): files, feature cache and an epoch."""

import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.files import write_karpathy
from benchmarks.measuring import exponent, measure_process

SIZES = (15_000, 30_000, 60_000, 120_000)
SIDE = 32  # pixels, the least that create_input_files.py takes


def scale(args, sizes=SIZES):
    """
    The scripts on small photographs, a small network and a small decoder: what is left is what they
    do for each image. Seconds, and the peak memory of a process with the largest of its workers.
    """
    rows = {}
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for what, (time, memory, size) in run_scripts(Path(folder), n, args).items():
                rows.setdefault(what, []).append((time, memory, size))
    for what, measured in rows.items():
        times, memories, file_sizes = zip(*measured)
        slope = exponent(sizes, times)
        yield {
            "stage": f"{what}, {sizes[-1]:,} photographs",
            "ours": times[-1],
            "sizes": sizes,
            "seconds": times,
            "bytes": memories,
            "files": file_sizes,
            "exponent": slope,
            "note": f"exponent {slope:.2f}, {max(memories) / 1e9:.2f} GB of memory, "
            f"{file_sizes[-1] / 1e9:.2f} GB of files   ("
            + ", ".join(
                f"{n:,}: {time:.1f} s, {memory / 1e9:.2f} GB"
                for n, time, memory in zip(sizes, times, memories)
            )
            + ")",
        }


def run_scripts(folder, n, args):
    """Name of a script -> seconds, bytes of memory, bytes of new files"""
    photographs = draw_small_photographs(folder / "photos", n)
    write_karpathy(folder / "k.json", photographs, val=n // 100)
    data, runs = folder / "data", {}
    create = [
        "create_input_files.py",
        "--karpathy_json",
        str(folder / "k.json"),
        "--image_folder",
        str(folder / "photos"),
        "--output_folder",
        str(data),
        "--image_size",
        str(SIDE),
    ]
    train = [
        "train.py",
        "--data_folder",
        str(data),
        "--device",
        str(args.device),
        "--epochs",
        "1",
        "--encoder",
        "resnet18",
        "--encoder_weights",
        "none",
        "--emb_dim",
        "16",
        "--attention_dim",
        "16",
        "--decoder_dim",
        "16",
        "--checkpoint_folder",
    ]
    for what, command in (
        ("create_input_files.py", create),
        ("train.py, feature cache and an epoch", [*train, str(folder / "a")]),
        ("train.py, an epoch from the cache", [*train, str(folder / "b")]),
    ):
        before = _bytes_of(data)
        run = measure_process(f"""
            import subprocess
            subprocess.run([sys.executable, *{command!r}], check=True, capture_output=True)
        """)
        runs[what] = run["seconds"], run["bytes"], _bytes_of(data) - before
    return runs


def draw_small_photographs(folder, n, different=100):
    """n JPEG files of 64 x 48 pixels, links to a few different ones; returns their paths"""
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:07d}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        if i < different:
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(path)
        else:
            os.link(paths[i % different], path)
    return paths


def _bytes_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
