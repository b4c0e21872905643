"""
Compare the speed of our code with the textbook version, in turns: the same decoder with --plain,
and searches of one image at a time.

    python benchmark.py              # all stages but scale and gpu, on the GPU if there is one
    python benchmark.py --stages training search           # some of them
    python benchmark.py --device cpu --json figures.json
    python benchmark.py --stages scale           # 120,000 photographs, from files to an epoch
    python benchmark.py --device cuda --stages gpu --amp bf16  # epochs of COCO on a GPU, in minutes

Sizes are the tutorial's on COCO: 2048-wide features of 256 x 256 images on an 8 x 8 grid (the
textbook version pools them to 14 x 14), 9490 words, captions of 12.5 words on average
with <start> and <end>, all layers 512 wide. Weights, features and captions are random.
Times are medians, after one warm-up run. Memory is the peak of live tensors beyond those that exist
before and after: features, parameters and their gradients.
"""

import os

# The profiler, which measures memory, must not write to the table.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
import torch  # noqa: E402

from benchmarks.encoder import encoder, folder
from benchmarks.end_to_end import cache, coco, start
from benchmarks.files import loading, preprocessing
from benchmarks.gpu import gpu
from benchmarks.measuring import matmul_rate
from benchmarks.model import scaling, search, training
from benchmarks.scale import scale
from modeling.devices import find_device
from utils import AMP, Parser, positive_int, run_script, write_json

STAGES = {
    stage.__name__: stage
    for stage in (
        training,
        search,
        start,
        encoder,
        folder,
        cache,
        preprocessing,
        loading,
        coco,
        scaling,
        scale,
        gpu,
    )
}
LONG = ("scale", "gpu")  # these run if they are asked for


def get_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add(
        "--stages",
        nargs="+",
        choices=STAGES,
        help="which to run; all but scale and gpu if not given",
        default=[stage for stage in STAGES if stage not in LONG],
    )
    add("--repeats", type=positive_int, default=5, help="timed runs of each version")
    add(
        "--device",
        help="cuda, cuda:1, cpu, mps; if not given, CUDA's GPU where there is one, else the CPU",
    )
    add(
        "--amp",
        choices=AMP,
        help="run our version in half precision; the textbook version stays in float32",
    )
    add("--json", metavar="FILE", help="also write the results to this file")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    args.device = find_device(args.device)
    machine = describe_machine(args.device)
    print(f"{machine}\n")
    print(f"{'stage':52}{'textbook':>11}{'ours':>11}{'ratio':>8}   peak memory")
    rows = []
    for stage in args.stages:
        for row in STAGES[stage](args):
            rows.append(row)
            print(format_row(row), flush=True)
    if args.json:
        write_json(args.json, {"machine": machine, "torch": torch.__version__, "rows": rows})


def describe_machine(device):
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {matmul_rate(device) / 1e9:.0f} GFLOP/s in float32 products of 2048 x 2048"


def format_row(row):
    line = f"{row['stage']:52}"
    for version in ("textbook", "ours"):
        line += f"{row[version]:9.3f} s" if row.get(version) is not None else f"{'–':>11}"
    line += f"{row['textbook'] / row['ours']:7.1f}x" if row.get("textbook") else " " * 8
    if "ours_bytes" in row:
        line += f"   {row['textbook_bytes'] / 1e6:.0f} -> {row['ours_bytes'] / 1e6:.0f} MB"
    return line + (f"   {row['note']}" if "note" in row else "")


if __name__ == "__main__":
    run_script(main)
