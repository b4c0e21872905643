"""The decoder's training step, beam search and the encoder, compared with the textbook version."""

import copy
import statistics
from functools import partial

import numpy as np
import torch

from benchmarks.measuring import compare, exponent, matmul_rate, seconds
from modeling.beam_search import beam_search
from modeling.devices import autocast
from models import DecoderWithAttention
from training.losses import doubly_stochastic_loss

SIZE, CELLS, PIXELS, ENCODER_DIM, VOCAB = 512, 64, 196, 2048, 9490
WORD_MAP = {"<pad>": 0, "<unk>": VOCAB - 3, "<start>": VOCAB - 2, "<end>": VOCAB - 1}


def random_captions(n, r, seed=0, mean=12.5, vocab=None):
    """captions (n, r, L); lengths (n, r) as in COCO: mean 12.5, standard deviation 2.4, skewed"""
    rng = np.random.default_rng(seed)
    shortest = 0.64 * mean
    lengths = shortest + rng.gamma(3.5, (mean - shortest) / 3.5, (n, r))
    lengths = torch.from_numpy(lengths.round().astype(np.int64))
    vocab = vocab or VOCAB
    captions = torch.from_numpy(rng.integers(1, vocab - 3, (n, r, int(lengths.max()))))
    captions[..., 0] = vocab - 2  # <start>, as in WORD_MAP
    captions.scatter_(2, lengths.unsqueeze(2) - 1, vocab - 1)  # <end>
    captions[torch.arange(captions.shape[2]) >= lengths.unsqueeze(2)] = 0
    return captions, lengths


def step_flops(n, lengths):
    """
    The least FLOPs of a training step of the decoder with a frozen encoder: the model's matrix
    products in their cheapest form (attention projected once per image, on 64 cells; no padding),
    2 FLOPs per multiplication and addition. In the backward pass a product costs the same again for
    its weight and again for its input, if that has a gradient, which features have not. Other
    operations (softmax, gates, optimizer) are not counted, so 100 % cannot be reached.
    """
    a = h = e = SIZE  # attention, decoder, embedding
    tokens = int((lengths - 1).sum())
    per_image = 2 * CELLS * ENCODER_DIM * a + 2 * 2 * ENCODER_DIM * h  # keys; h and c
    attention = PIXELS * 2 * a
    context = 2 * PIXELS * CELLS + 2 * CELLS * ENCODER_DIM
    lstm = 2 * (e + ENCODER_DIM + h) * 4 * h
    linear = 2 * h * (a + ENCODER_DIM) + 2 * h * VOCAB  # query and gate; logits
    return 2 * n * per_image + tokens * (3 * (attention + lstm + linear) + 2 * context)


def plain(decoder):
    """The decoder with the same weights, whose steps are the lines of models.py: the textbook."""
    decoder = copy.copy(decoder)
    decoder.plain = True
    return decoder


def search_one_by_one(decoder, features, beam_size):
    """The textbook's search: one image at a time, of features (N, G, E)"""
    return [
        caption
        for image in features.split(1)
        for caption in beam_search(plain(decoder), image, WORD_MAP, beam_size)
    ]


def training_step(decoder, n, r, args, vocab=None, mean=12.5, cells=CELLS):
    """Two functions, forward and backward of n images with r captions each; and the lengths."""
    features = torch.rand(n, cells, ENCODER_DIM, device=args.device)
    captions, lengths = random_captions(n, r, 0, mean, vocab)
    captions = captions.to(args.device)
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(decoder, amp):
        decoder.zero_grad(set_to_none=False)
        with autocast(args.device, amp):
            loss = doubly_stochastic_loss(decoder(features, captions, lengths), lengths)
        loss.backward()

    textbook, ours = partial(step, plain(decoder), None), partial(step, decoder, args.amp)
    return textbook, ours, lengths


def training(args):
    rate = matmul_rate(args.device)
    for n, r in ((32, 1), (80, 1), (16, 5)):
        torch.manual_seed(0)
        decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB, ENCODER_DIM).to(args.device)
        textbook, ours, lengths = training_step(decoder, n, r, args)
        row = compare(f"training step, {n * r} captions of {n} images", textbook, ours, args)
        row["flops"] = step_flops(n, lengths)
        row["floor_share"] = row["flops"] / rate / row["ours"]
        yield row | {"note": f"{100 * row['floor_share']:.0f} % of the FLOP floor"}


def decoder_with_realistic_lengths(device):
    """
    A random decoder whose captions are as long as real ones, 11 words on average.

    Unit 0 of the LSTM serves as a clock: it rises at each step, from a value that depends on the
    image, and raises the logit of <end>. The other logits are scaled to those of a trained model.
    """
    torch.manual_seed(0)
    decoder = DecoderWithAttention(SIZE, SIZE, SIZE, VOCAB, ENCODER_DIM)
    lstm = decoder.decode_step
    with torch.no_grad():
        decoder.embedding.weight.mul_(20)
        decoder.fc.weight.mul_(12)
        for gate, bias in enumerate((9.0, 9.0, 0.085, 9.0)):  # input, forget, candidate, output
            row = gate * SIZE
            lstm.weight_ih[row] = lstm.weight_hh[row] = lstm.bias_hh[row] = 0
            lstm.bias_ih[row] = bias
        decoder.init_c.weight[0] -= decoder.init_c.weight[0].mean()
        decoder.init_c.weight[0] *= 12
        decoder.init_c.bias[0] = 0
        decoder.fc.weight[:, 0] = 0
        decoder.fc.weight[WORD_MAP["<end>"]] = 0
        decoder.fc.weight[WORD_MAP["<end>"], 0] = 60
        decoder.fc.bias[WORD_MAP["<end>"]] = -33
    return decoder.to(device).eval()


def search(args):
    decoder = decoder_with_realistic_lengths(args.device)
    features = torch.rand(100, CELLS, ENCODER_DIM, device=args.device)
    for beam_size in (1, 3, 5):
        results = {}

        def textbook(beam_size=beam_size, results=results):
            results["textbook"] = search_one_by_one(decoder, features, beam_size)

        def ours(beam_size=beam_size, results=results):
            with autocast(args.device, args.amp):
                results["ours"] = beam_search(decoder, features, WORD_MAP, beam_size)

        row = compare(f"beam search, beam {beam_size}, 100 images", textbook, ours, args)
        same = sum(a.tokens == b.tokens for a, b in zip(results["ours"], results["textbook"]))
        length = statistics.mean(len(caption.tokens) for caption in results["ours"])
        yield row | {
            "identical": same,
            "words": length,
            "note": f"{same} of 100 captions identical, {length:.1f} words",
        }


def scaling(args):
    """How the time grows with each size alone, and the exponent: 1 is linear."""

    def make_step(n, r=5, vocab=None, mean=12.5, cells=CELLS):
        decoder = DecoderWithAttention(SIZE, SIZE, SIZE, vocab or VOCAB, ENCODER_DIM)
        return training_step(decoder.to(args.device), n, r, args, vocab, mean, cells)[1]

    def make_search(n, beam_size, cells=CELLS):
        features = torch.rand(n, cells, ENCODER_DIM, device=args.device)
        return lambda: beam_search(decoder, features, WORD_MAP, beam_size)

    decoder = decoder_with_realistic_lengths(args.device)
    for what, sizes, make in (
        ("training step, images of 5 captions", (8, 16, 32, 64), lambda n: make_step(n)),
        ("training step, vocabulary", (2500, 5000, 10000, 20000), lambda v: make_step(16, 5, v)),
        ("training step, words a caption", (6, 12, 24, 48), lambda t: make_step(16, mean=t)),
        (
            "training step, cells of an image (stride 16: 196)",
            (49, 64, 100, 196),
            lambda cells: make_step(16, cells=cells),
        ),
        ("beam search at 5, images", (25, 50, 100, 200), lambda n: make_search(n, 5)),
        ("beam search of 100 images, beams", (1, 2, 4, 8), lambda k: make_search(100, k)),
        (
            "beam search at 5, cells of an image",
            (49, 64, 100, 196),
            lambda cells: make_search(100, 5, cells),
        ),
    ):
        times = []
        for size in sizes:
            function = make(size)
            function()
            times.append(
                statistics.median(seconds(function, args.device) for _ in range(args.repeats))
            )
        table = ", ".join(f"{size}: {time:.3f} s" for size, time in zip(sizes, times))
        yield {
            "stage": what,
            "sizes": sizes,
            "seconds": times,
            "exponent": exponent(sizes, times),
            "note": f"exponent {exponent(sizes, times):.2f}   ({table})",
        }
