"""
Score a trained model on the validation or test images, one row per beam size.

    python eval.py --model BEST_checkpoint_X.pth.tar --beam_sizes 1 3 5
    torchrun --nproc_per_node=4 eval.py --model BEST_checkpoint_X.pth.tar
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import distributed
from checkpoints import find_checkpoint, load_captioner
from datasets import Batches, CaptionDataset, find_data_name
from files import Parser, UserError, write_json
from metrics import attention_hits, bleu
from search import beam_search
from utils import AMP, autocast, run


def get_args(argv=None):
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="checkpoint; if not given, the only BEST one in --checkpoint_folder")
    add("--checkpoint_folder", default=".", help="where to look for it")
    add("--word_map", help="for checkpoints that carry none")
    add("--data_folder", default="data", help="what create_input_files.py wrote")
    add("--data_name", help="which data set, if the folder has several")
    add("--split", choices=("val", "test"), default="test")
    add("--beam_sizes", type=int, nargs="+", default=[1, 3, 5], help="1 is greedy decoding")
    add("--max_len", type=int, default=50, help="longest caption, in words")
    add("--batch_size", type=int, default=64, help="images at a time")
    add("--workers", type=int, default=1, help="processes that load images; 0: none")
    add("--results", metavar="FILE", help="write the captions of the last beam size as JSON")
    add("--device", help="cuda, cuda:1, cpu, mps; the GPU if there is one")
    add("--amp", choices=AMP, help="multiply matrices in half precision; float32 if not given")
    args = parser.parse_args(argv)
    for value in (*args.beam_sizes, args.max_len, args.batch_size):
        if value < 1:
            parser.error(f"{value} is no beam size, length or batch size; give 1 or more")
    return args


def main(argv=None):
    args = get_args(argv)
    processes = distributed.start(args.device)
    try:
        evaluate(args, processes)
    finally:
        distributed.stop()


def evaluate(args, processes):
    if args.results and not Path(args.results).resolve().parent.is_dir():
        raise UserError(f"the folder of --results {args.results} does not exist; make it first")
    path = args.model or find_checkpoint(args.checkpoint_folder)
    encoder, decoder, word_map, _ = load_captioner(path, processes.device, args.word_map)
    name = args.data_name or find_data_name(args.data_folder)
    data = CaptionDataset(args.data_folder, name, args.split.upper())
    if len(data) == 0:
        raise UserError(f"{data.path} has no images; choose the other --split")
    # The model speaks its own words; the data set's are not needed, since references are words.
    nouns = {noun for i in range(len(data)) for thing in data.entry(i).get("objects", [])
             for noun in thing["words"]}
    found = caption_split(encoder, decoder, word_map, data, nouns, args, processes)
    if not processes.first:
        return
    references = [data.entry(i)["references"] for i in range(len(data))]
    print(f"{path} on {len(data)} {args.split} images of {name}")
    print("beam  BLEU-1  BLEU-2  BLEU-3  BLEU-4" + "  attention" * bool(nouns))
    for beam_size, captions in zip(args.beam_sizes, zip(*found)):
        scores = bleu(references, [caption["words"] for caption in captions])
        line = f"{beam_size:4d}" + "".join(f"{score:8.2f}" for score in scores)
        if nouns:
            hits, total = (sum(c[key] for c in captions) for key in ("hits", "object_words"))
            line += f"{100 * hits / total:9.2f} %" if total else "          –"
        print(line)
    if nouns:
        print("attention: share of object words at which the most attended place lies in the "
              "object's box")
    if args.results:
        rows = []
        for i, captions in enumerate(found):
            entry = data.entry(i)
            rows.append({"image_id": entry["image_id"], "filename": entry["filename"],
                         "caption": " ".join(captions[-1]["words"]),
                         "score": captions[-1]["score"],
                         "references": [" ".join(words) for words in entry["references"]]})
        write_json(args.results, rows)
        print(f"captions at beam {args.beam_sizes[-1]} are in {args.results}")


@torch.inference_mode()
def caption_split(encoder, decoder, word_map, data, nouns, args, processes):
    """
    Caption every image once at each beam size; each process takes its share.
    nouns: the words that name objects in this data set, if it knows any

    Returns, in every process, per image a list with one dictionary per beam size: words,
    score (nats), and how many of its object words were looked at rightly (hits of object_words).
    """
    words_of = {i: word for word, i in word_map.items()}
    batches = Batches(len(data), args.batch_size, False, 0, processes.rank, processes.world)
    loader = DataLoader(data, sampler=batches, batch_size=None, num_workers=args.workers,
                        pin_memory=processes.device.type == "cuda")
    found = []
    bar = tqdm(loader, desc=args.split, unit="batch", disable=None if processes.first else True)
    for rows, (images, _, _) in zip(batches, bar):
        with autocast(processes.device, args.amp):
            features = encoder(images.to(processes.device, non_blocking=True))
            searches = [beam_search(decoder, features, word_map, beam_size, args.max_len)
                        for beam_size in args.beam_sizes]
        for i, captions in zip(rows.tolist(), zip(*searches)):
            found.append((i, []))
            for caption in captions:
                words = [words_of[word] for word in caption.words]
                hits, total = attention_hits(words, caption.alphas,
                                             data.entry(i).get("objects", []), nouns)
                found[-1][1].append({"words": words, "score": caption.score, "hits": hits,
                                     "object_words": total})
    return [captions for _, captions in sorted(processes.gather(found), key=lambda row: row[0])]


if __name__ == "__main__":
    run(main)
