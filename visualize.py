"""
Draw training curves from the log of train.py.

    python visualize.py curves log_NAME.jsonl -o curves.png
    python visualize.py curves runs/*/log_*.jsonl -o curves.png    # several runs in one picture
    python visualize.py curves log_NAME.jsonl -o curves.png --watch    # again after each epoch
"""

import os
import sys
import time

from utils import Parser, run_script
from visualization import figures
from visualization.curves import draw_curves, name_runs, read_run
from visualization.files import writing

WATCH_SECONDS = 2  # between looks at the logs


def get_args(argv=None):
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    curves = commands.add_parser(
        "curves",
        help="loss, reward, BLEU-4, CIDEr-D, learning rate and speed by epoch",
        description="Draw what train.py logged after each epoch, with a panel for each metric.",
    )
    curves.add_argument("logs", nargs="+", metavar="log_NAME.jsonl", help="drawn as one line each")
    curves.add_argument("-o", "--out", default="curves.png", help="PNG, PDF or SVG")
    curves.add_argument(
        "--watch",
        action="store_true",
        help="go on, and draw again whenever a log has changed, until Ctrl-C",
    )
    return parser.parse_args(argv)


def draw(args):
    runs = [read_run(path, name) for path, name in zip(args.logs, name_runs(args.logs))]
    with writing(args.out):
        figures.save(draw_curves(runs), args.out)
    print(f"curves: {args.out}", file=sys.stderr)


def main():
    args = get_args()
    if not args.watch:
        draw(args)
    drawn = None
    if args.watch and not all(map(os.path.exists, args.logs)):
        print(f"waiting for {' '.join(args.logs)}", file=sys.stderr)
    while args.watch:
        sizes = [os.path.getsize(log) if os.path.exists(log) else 0 for log in args.logs]
        if all(sizes) and sizes != drawn:  # a log is there from the start, its first row later
            draw(args)
            drawn = sizes
        time.sleep(WATCH_SECONDS)


if __name__ == "__main__":
    run_script(main)
