"""What several tests need: small decoders, captions and data sets."""

import json
import random

import h5py
import numpy as np
import torch

from checkpoints import PRETRAINED
from models import DecoderWithAttention
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files

ENCODER = ["--encoder", "tf_efficientnet_lite2", "--encoder_weights", str(PRETRAINED)]

VOCAB = 11
WORD_MAP = {"<pad>": 0, "<unk>": VOCAB - 3, "<start>": VOCAB - 2, "<end>": VOCAB - 1}
NAME = "demo_5_cap_per_img_0_min_word_freq"


def write_scenes(folder, train, val, test):
    """So many scenes and their input files in this folder, which is returned."""
    create_input_files("demo", make_demo(folder / "demo", train, val, test), folder / "demo",
                       min_word_freq=0, output_folder=folder, workers=1)
    return folder


def make_decoder(vocab_size=23, dropout=0.0, seed=0, scale=3.0):
    """A small random decoder in float64, its weights large enough for sharp attention."""
    torch.manual_seed(seed)
    decoder = DecoderWithAttention(7, 5, 6, vocab_size, encoder_dim=9, dropout=dropout).double()
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(scale)
    return decoder


def make_captions(n, r, vocab_size=23, longest=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n, r), generator=g)
    captions = torch.randint(1, vocab_size, (n, r, longest + 3), generator=g)
    captions[torch.arange(longest + 3) >= lengths.unsqueeze(2)] = 0
    return captions, lengths


def make_case(seed, end_bias):
    """
    A random decoder and 8 images; end_bias says how soon captions end.

    Left to itself a random LSTM falls into a loop and ends at once or never. So unit 0 is made
    a clock: it rises at each step, from a value that depends on the image, and pulls at <end>.
    """
    decoder = make_decoder(VOCAB, seed=seed).eval()
    end, size = WORD_MAP["<end>"], 6
    lstm = decoder.decode_step
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
        for gate, bias in enumerate((9.0, 9.0, 0.25, 9.0)):  # input, forget, candidate, output
            row = gate * size
            lstm.weight_ih[row] = lstm.weight_hh[row] = lstm.bias_hh[row] = 0
            lstm.bias_ih[row] = bias
        decoder.fc.weight[:, 0] = 0
        decoder.fc.weight[end, 0] = 8
        decoder.fc.bias[end] += end_bias
    torch.manual_seed(seed)
    return decoder, torch.randn(8, 4, 9, dtype=torch.float64)


# Files as the tutorial's code writes them
TUTORIAL_NAME = "flickr8k_2_cap_per_img_0_min_word_freq"
IMAGES, R = 5, 2
TUTORIAL_WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "sits": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
TUTORIAL_CAPTIONS = [[5, 1 + i % 3, 4, 6, 0, 0] if i % 2 else [5, 1, 2, 3, 6, 0]
                     for i in range(IMAGES * R)]
TUTORIAL_LENGTHS = [4 if i % 2 else 5 for i in range(IMAGES * R)]


def write_tutorial_files(folder, captions=TUTORIAL_CAPTIONS, lengths=TUTORIAL_LENGTHS, size=256):
    """As the tutorial's create_input_files() does; there is no REFERENCES file."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, size, size), np.uint8)
    with h5py.File(folder / f"TRAIN_IMAGES_{TUTORIAL_NAME}.hdf5", "a") as h:
        h.attrs["captions_per_image"] = R
        images = h.create_dataset("images", (IMAGES, 3, size, size), dtype="uint8")
        for i, image in enumerate(pixels):
            images[i] = image
    for kind, content in {"TRAIN_CAPTIONS": captions, "TRAIN_CAPLENS": lengths,
                          "WORDMAP": TUTORIAL_WORD_MAP}.items():
        with open(folder / f"{kind}_{TUTORIAL_NAME}.json", "w") as j:
            json.dump(content, j)
    return pixels


# Sets of captions to score
CAPTION_WORDS = (
    "a a the the man men dog dogs puppy runs running ran on in street road quickly red two "
    "big ball boy boys child jumps near water grass white while").split()


def caption_sets(count, seed):
    """
    `count` sets of 2..5 images: references, and captions that share words with them or are one of
    them. Captions have 4 words and more: NLTK counts a missed n-gram in each that is shorter.
    """
    rng = random.Random(seed)

    def caption(low):
        return [rng.choice(CAPTION_WORDS) for _ in range(rng.randint(low, 10))]

    for _ in range(count):
        images = range(rng.randint(2, 5))
        references = [[caption(1) for _ in range(rng.randint(1, 5))] for _ in images]
        captions = [caption(4) for _ in images]
        for i in images:
            drawn = rng.choice(references[i])
            if len(drawn) > 3 and rng.random() < 0.4:
                captions[i] = drawn
        yield references, captions


def as_coco(references, captions):
    """Captions as pycocoevalcap takes them"""
    return ({i: [" ".join(words) for words in texts] for i, texts in enumerate(references)},
            {i: [" ".join(words)] for i, words in enumerate(captions)})
