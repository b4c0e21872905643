"""
Score a trained model on the validation or test images, one row per beam size; or compare the
captions of two models.

    python eval.py --model BEST_checkpoint_X.pth.tar --beam_sizes 1 3 5
    python eval.py --model BEST_checkpoint_X.pth.tar --metrics all --bootstrap 1000
    torchrun --nproc_per_node=4 eval.py --model BEST_checkpoint_X.pth.tar
    python eval.py --report report.html          # best, worst and random images, with attention
    python eval.py --compare A.json B.json
"""

from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoints import find_model, load_captioner
from datasets import CaptionDataset, ResumableBatchSampler, find_data_name
from evaluation import scores as scorers
from evaluation.compare import compare
from evaluation.metrics import attention_hits
from evaluation.report import check_photographs, write_report
from modeling.beam_search import add_search_options, beam_search, search_options
from utils import AMP, Parser, UserError, autocast, distributed, read_json, run_script, write_json
from visualization import page

ATTENTION = ("attention: share of object words at which the most attended place lies in the "
             "object's box; then, at most 15 pixels of 256 beside it (the pointing game)")
MARGIN = 15 / 256  # Zhang et al. 2016, arXiv 1608.00507: fair to attention maps of any coarseness


def get_args(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", help="checkpoint; if not given, the only BEST one in --checkpoint_folder or the "
        "current folder, else the one that comes with the program")
    add("--checkpoint_folder", help="where to look for it")
    add("--word_map", help="for checkpoints that carry none")
    add("--data_folder", default="data", help="what create_input_files.py wrote")
    add("--data_name", help="which data set, if the folder has several")
    add("--split", choices=("val", "test"), default="test")
    add("--beam_sizes", type=int, nargs="+", default=[1, 3, 5], help="1 is greedy decoding")
    add_search_options(parser)
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--workers", type=int, default=1, help="processes that load images; 0: none")
    add("--metrics", nargs="+", metavar="NAME",
        help=f"all, BLEU, or some of {', '.join(scorers.NAMES)}; BLEU if not given")
    add("--tokens", choices=("ptb", "data"),
        help="the PTB tokenizer's words, which is the default for --metrics where there is Java, "
             "or the data set's as they stand")
    add("--bootstrap", type=int, metavar="N",
        help="95 %% intervals from N resamples of the images; --compare: 1000 if not given")
    add("--seed", type=int, default=0, help="of the resamples")
    add("--results", metavar="FILE", help="write the captions of the last beam size as JSON, with "
        "each image's scores if --metrics is given")
    add("--report", metavar="FILE", help="write a page of metrics with intervals, lengths, and "
        "best, worst and random images at the last beam size; with all metrics and 1000 resamples "
        "if not told otherwise")
    add("--image_folder", help="where the photographs are, for --report; without it they are shown "
        "as the model sees them, squashed to a square")
    add("--compare", nargs=2, metavar=("A.json", "B.json"),
        help="compare two files of --results, without model and data; all metrics if not given")
    add("--device", help="cuda, cuda:1, cpu, mps; if not given, CUDA's GPU "
        "where there is one, else the CPU")
    add("--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given")
    args = parser.parse_args(argv)
    for option, value in (("batch_size", args.batch_size),
                          *(("beam_sizes", size) for size in args.beam_sizes)):
        if value < 1:
            parser.error(f"--{option} is {value}, it must be at least 1")
    if args.bootstrap is not None and args.bootstrap < 1:
        parser.error(f"--bootstrap is {args.bootstrap}, it must be at least 1")
    if args.compare and (args.report or args.results):
        parser.error("--compare prints a table; leave --report and --results out")
    if args.image_folder and not args.report:
        parser.error("--image_folder is for --report; add --report FILE or leave it out")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}, it must not be negative")
    if args.report and not args.metrics:
        args.metrics = ["all"]
    args.bootstrap = args.bootstrap or (1000 if args.report else None)
    args.search = search_options(args)
    args.names = scorers.parse_names(args.metrics or ["all" if args.compare else "bleu"])
    # The plain table stays comparable with those of training, whatever is installed.
    args.tokens = args.tokens or (None if args.metrics or args.compare else "data")
    return args


def main(argv=None):
    args = get_args(argv)
    if args.compare:
        compare(*args.compare, args.names, args.tokens, args.bootstrap or 1000, args.seed)
        return
    with distributed(args.device) as processes:
        evaluate(args, processes)


def evaluate(args, processes):
    for option in ("results", "report"):
        file = getattr(args, option)
        if file and not Path(file).resolve().parent.is_dir():
            raise UserError(f"the folder of --{option} {file} does not exist; make it first")
        if file and Path(file).is_dir():
            raise UserError(f"--{option} {file} is a folder; name a file in it")
    if args.report and not page.is_page(args.report):
        raise UserError(f"--report {args.report} is a web page; let its name end in .html")
    path = find_model(args.model, args.checkpoint_folder, processes.print)
    encoder, decoder, word_map, _ = load_captioner(path, processes.device, args.word_map)
    name = args.data_name or find_data_name(args.data_folder)
    data = CaptionDataset(args.data_folder, name, args.split.upper())
    if len(data) == 0:
        raise UserError(f"{data.path} has no images; choose the other --split")
    if args.report:
        check_photographs(data, args.image_folder)
    # The model speaks its own words; the data set's are not needed, since references are words.
    nouns = {noun for i in range(len(data)) for thing in data.entry(i).get("objects", [])
             for noun in thing["words"]}
    found = caption_split(encoder, decoder, word_map, data, nouns, args, processes)
    if not processes.is_main:
        return
    references = [data.entry(i)["references"] for i in range(len(data))]
    title = f"{path} on {len(data)} {args.split} images of {name}"
    print(title)
    by_beam = list(zip(*found))
    looked = [attention(captions) for captions in by_beam] if nouns else None
    measured, notes = print_table(by_beam, references, read_training(args, name), looked, args)
    if args.results:
        write_results(args.results, data, [captions[-1] for captions in found],
                      scorers.scores_by_image(measured[-1], len(data)) if args.metrics else None)
        print(f"captions at beam {args.beam_sizes[-1]} are in {args.results}")
    if args.report:
        write_report(args.report, title, args.beam_sizes, measured, args.names, looked, notes,
                     args.bootstrap, args.seed, data, [captions[-1] for captions in found],
                     args.image_folder)
        print(f"the report is {args.report}")


def read_training(args, name):
    """The training captions, a set of tuples of words; None if not asked for or not there"""
    path = Path(args.data_folder) / f"TRAIN_REFERENCES_{name}.json"
    if "unseen" not in args.names or not path.exists():
        return None
    try:
        return {tuple(words) for entry in read_json(path) for words in entry["references"]}
    except (TypeError, KeyError):
        raise UserError(f"{path} is no list of images with references, lists of words; run "
                        f"create_input_files.py again") from None


def print_table(by_beam, references, training, looked, args):
    """
    Print the table. by_beam: per beam size the captions as `caption_split` gives them; looked:
    per beam size the cell of attention accuracy, None if the data set has no boxes of objects
    Returns per beam size what `scorers.measure` does, and the lines below the table.
    """
    systems = [[caption["words"] for caption in captions] for captions in by_beam]
    unseen = None if training is None else [[tuple(words) not in training for words in captions]
                                            for captions in systems]
    systems, references, tokens = scorers.tokenize(systems, references, args.tokens)
    measured, missing = scorers.measure(systems, references, args.names, unseen)
    if "unseen" in missing:
        missing["unseen"] = f"{args.data_folder} has no TRAIN_REFERENCES file"
    print("beam" + scorers.heading(args.names) + "          attention" * bool(looked))
    for i, (beam_size, metrics) in enumerate(zip(args.beam_sizes, measured)):
        line = scorers.row(args.names, {name: m.total for name, m in metrics.items()})
        print(f"{beam_size:4d}{line}" + (f"{looked[i]:>19}" if looked else ""))
        if args.bootstrap:
            for end, line in zip(("low", "high"), scorers.interval_rows(
                    args.names, metrics, args.bootstrap, args.seed)):
                print(f"{end:>4}{line}")
    notes = [ATTENTION] if looked else []
    if args.metrics:
        notes += scorers.footnotes(args.names, tokens, missing)
    if args.bootstrap:
        notes += scorers.bootstrap_note(args.names, args.bootstrap, args.seed)
    for note in notes:
        print(note)
    return measured, notes


def attention(captions):
    """The cell of attention accuracy, without and with margin; a dash if no object was named"""
    *hits, total = (sum(c[key] for c in captions) for key in ("hits", "near", "object_words"))
    return "  ".join(f"{100 * hit / total:.2f} %" for hit in hits) if total else "–"


def write_results(path, data, captions, scores):
    """COCO's results format with further fields; scores: per image {metric: value}, or None"""
    rows = []
    for i, caption in enumerate(captions):
        entry = data.entry(i)
        rows.append({"image_id": entry["image_id"], "filename": entry["filename"],
                     "caption": " ".join(caption["words"]), "score": caption["score"],
                     "references": [" ".join(words) for words in entry["references"]]})
        if scores is not None:
            rows[-1]["scores"] = scores[i]
    write_json(path, rows)


@torch.inference_mode()
def caption_split(encoder, decoder, word_map, data, nouns, args, processes):
    """
    Caption every image once at each beam size; each process takes its share.
    nouns: the words that name objects in this data set, if it knows any

    Returns, in every process, per image a list with one dictionary per beam size: words,
    score (nats), how many of its object words were looked at rightly (hits of object_words, near
    with the pointing game's margin) and, for --report, the attention (T, P) of the last beam size.
    """
    words_of = {i: word for word, i in word_map.items()}
    batches = ResumableBatchSampler(len(data), args.batch_size, False, 0, processes.rank,
                                    processes.world_size)
    loader = DataLoader(data, sampler=batches, batch_size=None, num_workers=args.workers,
                        pin_memory=processes.device.type == "cuda")
    found = []
    bar = tqdm(loader, desc=args.split, unit="batch", disable=None if processes.is_main else True)
    for rows, (images, _, _) in zip(batches, bar):
        with autocast(processes.device, args.amp):
            features = encoder(images.to(processes.device, non_blocking=True))
            searches = [beam_search(decoder, features, word_map, beam_size, **args.search)
                        for beam_size in args.beam_sizes]
        for i, captions in zip(rows.tolist(), zip(*searches)):
            found.append((i, []))
            for caption in captions:
                words = [words_of[word] for word in caption.tokens]
                (hits, total), (near, _) = (
                    attention_hits(words, caption.alphas, data.entry(i).get("objects", []), nouns,
                                   margin) for margin in (0, MARGIN))
                found[-1][1].append({"words": words, "score": caption.score, "hits": hits,
                                     "near": near, "object_words": total})
            if args.report:
                found[-1][1][-1]["attention"] = captions[-1].alphas.astype(np.float16)
    return [captions for _, captions in sorted(processes.all_gather(found), key=lambda row: row[0])]


if __name__ == "__main__":
    run_script(main)
