"""
Compare the speed of our code with the textbook version, in turns: the same decoder with --plain,
and searches of one image at a time.

    python benchmark.py              # all stages but gpu, on the GPU if there is one
    python benchmark.py --stages training search --device cpu --json figures.json
    python benchmark.py --device cuda --stages gpu    # COCO's sizes in float32 and bf16, in minutes

Sizes are the tutorial's on COCO: features of 8 x 8 cells, 9490 words, captions of 12.5 words on
average with <start> and <end>, layers 512 wide. Weights, features and captions are random. Times
are medians; memory is the peak beyond features, parameters and their gradients.
"""

import os

# The profiler, which measures memory, must not print into the table.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
import torch  # noqa: E402

from benchmarks.gpu import gpu
from benchmarks.model import search, training
from benchmarks.scripts import encoder, files, fine_tuning, folder, start
from modeling.devices import find_device
from utils import AMP, Parser, positive_int, run_script, write_json

STAGES = {
    x.__name__: x for x in (training, search, start, files, encoder, fine_tuning, folder, gpu)
}


def get_args(argv=None):
    parser = Parser(description=__doc__)
    default = [stage for stage in STAGES if stage != "gpu"]
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=default, help="all but gpu if not given")
    add("--repeats", type=positive_int, default=5, help="timed runs of each version")
    add("--device", help="cuda, cuda:1, cpu, mps; if not given, a GPU where there is one")
    add("--amp", choices=AMP, help="our version in half precision, the textbook's in float32")
    add("--json", metavar="FILE", help="also write the results to this file")
    return parser.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    args.device = find_device(args.device)
    on_gpu, machine = args.device.type == "cuda", f"{torch.get_num_threads()} CPU threads"
    machine = torch.cuda.get_device_name(args.device) if on_gpu else machine
    print(f"{machine}\n")
    print(f"{'stage':52}{'textbook':>11}{'ours':>11}{'ratio':>8}   peak memory")
    rows = []
    for stage in args.stages:
        for row in STAGES[stage](args):
            rows.append(row)
            print(format_row(row), flush=True)
    if args.json:
        write_json(args.json, {"machine": machine, "torch": torch.__version__, "rows": rows})


def format_row(row):
    line = f"{row['stage']:52}"
    for version in ("textbook", "ours"):
        line += f"{row[version]:9.3f} s" if version in row else f"{'–':>11}"
    line += f"{row['textbook'] / row['ours']:7.1f}x" if row.get("textbook") else " " * 8
    sizes = [f"{row[key] / 1e6:.0f}" for key in ("textbook_bytes", "ours_bytes") if key in row]
    line += f"   {' -> '.join(sizes)} MB" if sizes else ""
    return line + (f"   {row['note']}" if "note" in row else "")


if __name__ == "__main__":
    run_script(main)
