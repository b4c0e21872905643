"""The decoder's training step and beam search against the textbook version; random data."""

import copy
import statistics
from functools import partial

import h5py
import numpy as np
import torch

from benchmarks.measuring import compare
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import DecoderWithAttention
from training.losses import Batch, TeacherForcing
from utils import write_json

SIZE, CELLS, ENCODER_DIM, VOCAB = 512, 64, 2048, 9490
WORD_MAP = {"<pad>": 0, "<unk>": VOCAB - 3, "<start>": VOCAB - 2, "<end>": VOCAB - 1}
COCO_IMAGES = 113_287  # of its training split, 5 captions each


def random_captions(n, r, seed=0):
    """captions (n, r, L); lengths (n, r) as in COCO: mean 12.5, standard deviation 2.4, skewed"""
    rng = np.random.default_rng(seed)
    lengths = torch.from_numpy((8 + rng.gamma(3.5, 4.5 / 3.5, (n, r))).round().astype(np.int64))
    captions = torch.from_numpy(rng.integers(1, VOCAB - 3, (n, r, int(lengths.max()))))
    captions[..., 0] = WORD_MAP["<start>"]
    captions.scatter_(2, lengths.unsqueeze(2) - 1, WORD_MAP["<end>"])
    captions[torch.arange(captions.shape[2]) >= lengths.unsqueeze(2)] = 0
    return captions, lengths


def write_data_set(folder, n, size=256):
    """The files of create_input_files.py for n black images, which take no space on disk"""
    captions, lengths = random_captions(n, 5)
    captions = torch.nn.functional.pad(captions, (0, 52 - captions.shape[2]))
    words = {f"word{i}": i for i in range(1, VOCAB - 3)}
    write_json(f"{folder}/WORDMAP_x.json", WORD_MAP | words)
    write_json(f"{folder}/TRAIN_CAPTIONS_x.json", captions.flatten(0, 1).tolist())
    write_json(f"{folder}/TRAIN_CAPLENS_x.json", lengths.flatten().tolist())
    with h5py.File(f"{folder}/TRAIN_IMAGES_x.hdf5", "w") as file:
        file.attrs["captions_per_image"] = 5
        file.create_dataset("images", (n, 3, size, size), np.uint8)


def plain(decoder):
    """The textbook version: the same decoder and weights, running the lines of models.py."""
    decoder = copy.copy(decoder)
    decoder.plain = True
    return decoder


def random_batch(n, r, device):
    """Cached features of n images with r captions each"""
    captions, lengths = random_captions(n, r)
    features = torch.rand(n, CELLS, ENCODER_DIM, device=device)
    tokens = int((lengths - 1).sum())
    return Batch(features, captions.to(device), lengths, np.arange(n), tokens, n * r)


def make_step(decoder, batch, amp=None, criterion=None, encoder=None, lr=None):
    """
    A function: forward and backward, and Adam's update if there is a learning rate. With an
    encoder, the batch has images instead of features.
    """
    criterion = criterion or TeacherForcing()
    parameters = [p for x in (decoder, encoder) if x for p in x.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam(parameters, lr, fused=True) if lr else None

    def step():
        for parameter in parameters:
            parameter.grad.zero_()
        with autocast(batch.features.device, amp):
            features = batch.features if encoder is None else encoder.cells(batch.features)
            loss, *_ = criterion(decoder, batch._replace(features=features))
        loss.backward()
        if optimizer:
            torch.nn.utils.clip_grad_value_(parameters, 5)
            optimizer.step()

    return step


def training(args):
    """Forward and backward for several batches."""
    for n, r in ((32, 1), (80, 1), (16, 5)):
        torch.manual_seed(0)
        decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB, ENCODER_DIM).to(args.device)
        batch = random_batch(n, r, args.device)
        textbook, ours = make_step(plain(decoder), batch), make_step(decoder, batch, args.amp)
        yield compare(f"training step, {n * r} captions of {n} images", textbook, ours, args)


def decoder_with_realistic_lengths(device):
    """
    A random decoder whose captions are as long as real ones, 11 words on average: unit 0 of the
    LSTM rises at each step, from a value that depends on the image, and raises the logit of <end>.
    """
    torch.manual_seed(0)
    decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB, ENCODER_DIM)
    lstm, end = decoder.decode_step, WORD_MAP["<end>"]
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
        decoder.fc.weight.mul_(12)
        for gate, bias in enumerate((9.0, 9.0, 0.085, 9.0)):  # input, forget, candidate, output
            row = gate * SIZE
            lstm.weight_ih[row] = lstm.weight_hh[row] = lstm.bias_hh[row] = 0
            lstm.bias_ih[row] = bias
        decoder.init_c.weight[0].sub_(decoder.init_c.weight[0].mean()).mul_(12)
        decoder.init_c.bias[0] = 0
        decoder.fc.weight[:, 0] = decoder.fc.weight[end] = 0
        decoder.fc.weight[end, 0], decoder.fc.bias[end] = 60, -33
    return decoder.to(device).eval()


def search(args, images=100, one_by_one=100, precision=""):
    """Beam search of a batch, against the textbook's of some of its images, one at a time."""
    decoder = decoder_with_realistic_lengths(args.device)
    features = torch.rand(images, CELLS, ENCODER_DIM, device=args.device)
    for beam_size in (1, 3, 5):

        def run(decoder, parts, amp, beam_size=beam_size):
            with autocast(args.device, amp):
                batches = [beam_search(decoder, part, WORD_MAP, beam_size) for part in parts]
            return [caption.tokens for batch in batches for caption in batch]

        textbook = partial(run, plain(decoder), features[:one_by_one].split(1), None)
        ours = partial(run, decoder, [features], args.amp)
        stage = f"beam search{precision}, beam {beam_size}, {images} images"
        row, found = compare(stage, textbook, ours, args), ours()
        row["textbook"] *= images / one_by_one
        row["identical"] = sum(a == b for a, b in zip(found, textbook()))
        words = statistics.mean(map(len, found))
        note = f"{row['identical']} of {one_by_one} captions identical, {words:.1f} words"
        yield row | {"note": note}
