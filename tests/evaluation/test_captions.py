"""Captioning a split: every image once at each beam size, in order, with its attention hits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import VOCAB, WORD_MAP, make_case
from torch.utils.data import Dataset

from datasets import Item
from evaluation.captions import caption_split
from evaluation.objects import Objects
from modeling.beam_search import beam_search
from modeling.devices import Distributed
from modeling.evidence import find_evidence
from modeling.sampling import most_likely_location

WORDS = {**{f"word{i}": i for i in range(1, VOCAB - 3)}, **WORD_MAP}
WORDS_OF = {i: word for word, i in WORDS.items()}
NOUNS = {word for word in WORDS if word not in WORD_MAP}


class Split(Dataset):
    """Annotation vectors in place of images, and boxes of objects, as CaptionDataset has them"""

    image_size = 320

    def __init__(self, features):
        self.features = features

    def __len__(self):
        return len(self.features)

    def __getitem__(self, indices):
        return Item(self.features[indices], [], [], torch.from_numpy(indices))

    def entry(self, i):
        bottom = 0.4 if i % 2 else 0.5  # of the odd ones, a little above where the model looks
        box = [0, 0, 0.4 + i / 20, bottom]
        return {"references": [], "objects": [{"box": box, "words": sorted(NOUNS)}]}


@pytest.mark.parametrize("batch_size, report, hard", [(3, None, True), (8, "r.html", False)])
def test_captions_of_a_split_are_those_of_each_image_alone(batch_size, report, hard, capsys):
    decoder, features = make_case(seed=2, end_bias=-4.0)
    encoder, offset = torch.nn.Identity(), (0.2, -0.1)
    encoder.cells = encoder.forward
    encoder.args = {"image_size": 256 if report else 320}
    encoder.offset = offset  # where its cells look, which is measured of encoders that see images
    options = {"batch_size": batch_size, "workers": 0, "split": "test", "report": report}
    search = {"max_len": 9, "hard_attention": hard}
    options |= {"amp": None, "plain": False, "beam_sizes": [1, 3], "search": search}
    args, processes = SimpleNamespace(**options), Distributed(torch.device("cpu"))
    data = Split(features)
    objects, model = Objects(data), (encoder, decoder, WORDS, None)
    found = caption_split(model, data, objects, args, processes)
    assert [len(captions) for captions in found] == [8, 8]
    assert ("images of 256 pixels, these are of 320" in capsys.readouterr().out) is bool(report)
    for beam_size, captions in zip(args.beam_sizes, found):
        for i, caption in enumerate(captions):
            [alone] = beam_search(decoder, features[i : i + 1], WORDS, beam_size, **search)
            assert caption.words == [WORDS_OF[token] for token in alone.tokens]
            assert caption.score == pytest.approx(alone.score)
            given = decoder, features[i], alone.tokens, WORDS["<start>"]
            evidence = find_evidence(*given, most_likely_location if hard else None)
            named = objects.measure(i, caption.words, alone.alphas, evidence, offset)
            assert [one.exists for one in caption.objects] == [one.exists for one in named]
            for one, other in zip(caption.objects, named):
                assert one.figures == pytest.approx(other.figures)
            if report and beam_size == 3:
                np.testing.assert_allclose(caption.attention, alone.alphas, atol=1e-3)
            else:
                assert caption.attention is None
    figures = np.mean([one.figures for caption in found[0] for one in caption.objects], 0)
    assert 0 < figures[0] < figures[1] < 1 and 0 < figures[2] < 1
