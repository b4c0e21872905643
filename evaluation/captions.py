"""
A model's captions for every image of a split, and the data set's training captions, which show
which of them are novel.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import ResumableBatchSampler
from modeling.beam_search import Search, find_captions
from modeling.devices import autocast
from modeling.evidence import find_evidence
from modeling.field_of_view import find_offset
from modeling.sampling import most_likely_location
from modeling.workers import load_batches, start_worker
from utils import UserError, read_json


class ImageCaption(NamedTuple):
    """The model's caption of one image at one beam size, and the objects that it names"""

    words: list
    score: float  # total log-probability in nats
    objects: list | None  # `objects.NamedObject`s; None for an image without boxes
    offset: tuple = (0.0, 0.0)  # of the encoder: `modeling.field_of_view.measure_offset`
    attention: np.ndarray = None  # (T, P), only at the last beam size and with --report


@torch.inference_mode()
def caption_split(model, data, objects, args, processes):
    """
    Caption every image once at each of args.beam_sizes; each process takes its share.

    model: encoder, decoder and word map, as `checkpoints.load_captioner` returns them
    data: the CaptionDataset of the split, whose own word map is not needed; objects: its Objects
    args: eval.py's options

    Returns for each beam size the ImageCaptions of all images, in every process.
    """
    encoder, decoder, word_map, *_ = model
    decoder.plain = args.plain
    if (size := encoder.args["image_size"]) != (given := data.image_size):
        processes.print(f"the model was trained on images of {size} pixels, these are of {given}")
    words_of = {i: word for word, i in word_map.items()}
    offset = find_offset(encoder) if objects or args.report else (0.0, 0.0)  # else not used
    hard = most_likely_location if args.search["hard_attention"] else None
    rank, world_size = processes.rank, processes.world_size
    batches = ResumableBatchSampler(len(data), args.batch_size, False, 0, rank, world_size)
    options = {"num_workers": args.workers, "pin_memory": processes.device.type == "cuda"}
    options |= {"sampler": batches, "batch_size": None, "worker_init_fn": start_worker}
    loaded = load_batches(DataLoader(data, **options))
    hidden, found = None if processes.is_main else True, []
    for images, *_, indices in tqdm(loaded, args.split, len(batches), unit="batch", disable=hidden):
        with autocast(processes.device, args.amp):
            features = encoder.cells(images.to(processes.device, non_blocking=True))
            searches = [
                find_captions(decoder, features, word_map, Search(beam_size, **args.search))
                for beam_size in args.beam_sizes
            ]
        for i, image, captions in zip(indices.tolist(), features, zip(*searches)):
            by_beam = []
            for caption in captions:
                words = [words_of[token] for token in caption.tokens]
                if named := objects.find(i, words):
                    with autocast(processes.device, args.amp):
                        start = word_map["<start>"]
                        evidence = find_evidence(decoder, image, caption.tokens, start, hard)
                    named = objects.measure(i, words, caption.alphas, evidence, offset)
                by_beam.append(ImageCaption(words, caption.score, named, offset))
            if args.report:
                by_beam[-1] = by_beam[-1]._replace(attention=captions[-1].alphas.astype(np.float16))
            found.append((i, by_beam))
    found = sorted(processes.all_gather(found), key=lambda item: item[0])
    return [list(captions) for captions in zip(*(by_beam for _, by_beam in found))]


def read_training_captions(data_folder, data_name):
    """The training captions, a set of tuples of words; None if their file does not exist"""
    path = Path(data_folder) / f"TRAIN_REFERENCES_{data_name}.json"
    if not path.exists():
        return None
    try:
        return {tuple(words) for entry in read_json(path) for words in entry["references"]}
    except (TypeError, KeyError):
        raise UserError(f"{path} is damaged; run create_input_files.py again") from None
