"""
Score a trained model on the validation or test images, one row per beam size; or compare the
captions of two models.

    python eval.py --model BEST_checkpoint_X.pth.tar --beam_sizes 1 3 5
    python eval.py --model BEST_checkpoint_X.pth.tar --metrics all --bootstrap 1000
    torchrun --nproc_per_node=4 eval.py --model BEST_checkpoint_X.pth.tar
    python eval.py --report report.html          # best, worst and random images, with attention
    python eval.py --compare A.json B.json
    python eval.py --model BEST_checkpoint_X.pth.tar --split train --beam_sizes 5 --no_unk \\
        --calibrate NEW.pth.tar              # word frequencies closer to people's
"""

import os
import sys
from functools import partial
from pathlib import Path

import checkpoints
from checkpoints import add_model_options, find_model, load_captioner
from datasets import CaptionDataset, add_data_options, find_data_name
from evaluation.calibration import calibrate
from evaluation.captions import caption_split, read_training_captions
from evaluation.compare import compare
from evaluation.objects import Objects
from evaluation.results import write_results
from evaluation.scores import GROUPS, NAMES, scores_by_image
from evaluation.table import evaluate_captions, print_evaluation, table_rows, write_table
from modeling.devices import distributed, set_seed
from utils import (
    Parser,
    UserError,
    add_device_options,
    add_search_options,
    count,
    large_int,
    non_negative_int,
    process_count,
    run_script,
    search_options,
    small_int,
    timed,
)


def get_args(argv=None):
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("model and data")
    add_model_options(group)
    add_data_options(group)
    add = group.add_argument
    text = "which images of the data set"
    add("--split", choices=("train", "val", "test"), default="test", help=text)
    add("--batch_size", type=large_int, default=64, help="images at a time")
    add("--workers", type=process_count, default=1, help="processes that load images; 0: none")
    add_device_options(parser.add_argument_group("device"))
    add_search_options(parser)
    add = parser.add_argument_group("scores").add_argument
    text = "one row of the table for each; 1 is greedy decoding"
    add("--beam_sizes", type=small_int, nargs="+", default=[1, 3, 5], help=text)
    text = f"all, BLEU, or some of {', '.join(NAMES)}; BLEU if not given"
    add("--metrics", nargs="+", metavar="NAME", type=str.lower, choices=GROUPS, help=text)
    text = "the PTB tokenizer's words (default for --metrics if there is Java) or the data set's"
    add("--tokens", choices=("ptb", "data"), help=text)
    text = "COCO's instances_….json: are the things that captions name there, and looked at?"
    add("--boxes", metavar="FILE", help=text)
    text = "95 %% intervals from N resamples of the images; --compare: 1000 if not given"
    add("--bootstrap", type=large_int, metavar="N", help=text)
    add("--seed", type=non_negative_int, default=0, help="of resamples, --sample, random images")
    add = parser.add_argument_group("output").add_argument
    text = "write captions of the last beam size as JSON, with --metrics also each image's scores"
    add("--results", metavar="FILE", help=text)
    text = "write the table, or that of --compare, for a paper: .tex (booktabs) or .md"
    add("--table", metavar="FILE", help=text)
    text = "write an HTML page: metrics with intervals (unless given, --metrics all --bootstrap "
    text += "1000), caption lengths, and the best, worst and random images at the last beam size"
    add("--report", metavar="FILE", help=text)
    text = "write the model with output biases that bring the word frequencies of its captions, at "
    text += "the last beam size, closer to people's; needs --split train"
    add("--calibrate", metavar="FILE", help=text)
    text = "for --report: the photographs; without it squares are shown, as the model sees them"
    add("--image_folder", help=text)
    text = "compare two files of --results, without model or data; with --metrics all unless given"
    add("--compare", nargs=2, metavar=("A.json", "B.json"), help=text)
    args = parser.parse_args(argv)
    if args.compare and (args.report or args.results or args.boxes or args.calibrate):
        others = "--report, --results, --boxes and --calibrate"
        parser.error(f"--compare prints a table; leave {others} out")
    if args.calibrate and args.split != "train":
        parser.error("--calibrate counts words on the training images; add --split train")
    if args.calibrate and args.sample:
        parser.error("--calibrate is for searched captions; leave --sample out")
    if args.image_folder and not args.report:
        parser.error("--image_folder is for --report; add --report FILE or leave it out")
    if args.report or args.compare:
        args.metrics, args.bootstrap = args.metrics or ["all"], args.bootstrap or 1000
    args.search = search_options(args)
    if args.sample:
        args.beam_sizes = [1]  # one row: sampling has no beams
    wanted = {name for group in args.metrics or ["bleu"] for name in GROUPS[group]}
    args.names = [name for name in NAMES if name in wanted]
    # Without --metrics, BLEU is comparable with that of training, whether or not Java is installed.
    args.tokens = args.tokens or (None if args.metrics else "data")
    return args


def main(argv=None):
    args = get_args(argv)
    check_outputs(args)
    if args.compare:
        return compare(*args.compare, args)
    with distributed(args.device) as processes:
        set_seed(args.seed + processes.rank)
        evaluate(args, processes)


def check_outputs(args):
    """UserError if an output file cannot be written; checked before any work."""
    suffixes = {"results": "", "report": (".html", ".htm"), "table": (".tex", ".md")}
    suffixes["calibrate"] = ""
    for option, endings in suffixes.items():
        if (file := getattr(args, option)) is None:
            continue
        folder = Path(file).resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--{option} {file}: {folder} is not a writable folder; pass another")
        if Path(file).exists() and not Path(file).is_file():
            raise UserError(f"--{option} {file} is not a file; pass another name")
        if option == "calibrate" and os.path.lexists(file):
            raise UserError(f"--calibrate {file} exists already; pass another name")
        if not file.lower().endswith(endings):
            raise UserError(f"--{option} {file} must end in {' or '.join(endings)}")


def evaluate(args, processes):
    name = find_data_name(args.data_folder, args.data_name)
    data = CaptionDataset(args.data_folder, name, args.split.upper())
    path = find_model(args.model, args.checkpoint_folder, processes.print)
    model = load_captioner(path, processes.device, args.word_map)
    if len(data) == 0:
        raise UserError(f"{data.path} has no images; choose another --split")
    if args.report:
        from evaluation.report import check_photographs, write_report

        check_photographs(data, args.image_folder)
    objects = Objects(data, args.boxes)
    say = partial(processes.print, file=sys.stderr)  # stdout is for the table
    with timed(f"captioning {count(len(data), 'image')}", say):
        captions = caption_split(model, data, objects, args, processes)
    if not processes.is_main:
        return
    training = read_training_captions(args.data_folder, name) if "unseen" in args.names else None
    title = f"{path} on {count(len(data), f'{args.split} image')} of {name}"
    if args.sample:
        title += f", sampled at temperature {args.temperature:g}, top_p {args.top_p:g}"
    with timed("scoring", say):
        evaluation = evaluate_captions(title, captions, data, training, bool(objects), args)
    if args.results:  # the files first: printing may fail
        last = evaluation.beams[-1]
        scores = scores_by_image(last.metrics, len(data)) if args.metrics else None
        write_results(args.results, data, last.captions, scores)
    if args.report:
        write_report(args.report, evaluation, data, args.image_folder, args.seed)
    if args.calibrate:
        write_calibrated(path, args.calibrate, model[2], evaluation.beams[-1].captions, data)
    if args.table:
        write_table(args.table, table_rows(evaluation), [title, *evaluation.notes])
    print_evaluation(evaluation)
    if args.table:
        print("the table is", args.table)
    if args.results:
        print(f"captions at beam {args.beam_sizes[-1]} are in", args.results)
    if args.report:
        print("the report is", args.report)
    if args.calibrate:
        print("the calibrated model is", args.calibrate)


def write_calibrated(path, new, word_map, captions, data):
    """Write the model of the file `path` with calibrated biases; captions: of all images"""
    checkpoint = checkpoints.load(path)
    encoder, decoder = checkpoints.build(checkpoint, path)
    words = [caption.words for caption in captions]
    references = [data.entry(i)["references"] for i in range(len(data))]
    decoder.fc.bias.data = calibrate(decoder.fc.bias.data, word_map, words, references)
    checkpoints.save(new, encoder, decoder, word_map, options=checkpoint.get("options", {}))


if __name__ == "__main__":
    run_script(main)
