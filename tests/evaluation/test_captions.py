"""Captioning a split: every image once at each beam size, in order, with its attention hits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import VOCAB, WORD_MAP, make_case
from torch.utils.data import Dataset

from datasets import Item
from evaluation.captions import MARGIN, caption_split
from evaluation.metrics import attention_hits
from modeling.beam_search import beam_search
from modeling.devices import Distributed

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
        return {"objects": [{"box": [0, 0, 0.4 + i / 20, bottom], "words": sorted(NOUNS)}]}


@pytest.mark.parametrize("batch_size, report", [(3, None), (8, "r.html")])
def test_captions_of_a_split_are_those_of_each_image_alone(batch_size, report, capsys):
    decoder, features = make_case(seed=2, end_bias=-4.0)
    encoder, offset = torch.nn.Identity(), (0.2, -0.1)
    encoder.cells = encoder.forward
    encoder.args = {"image_size": 256 if report else 320}
    encoder.offset = offset  # where its cells look, which is measured of encoders that see images
    options = {"batch_size": batch_size, "workers": 0, "split": "test", "report": report}
    options |= {"amp": None, "plain": False, "beam_sizes": [1, 3], "search": {"max_len": 9}}
    args, processes = SimpleNamespace(**options), Distributed(torch.device("cpu"))
    found = caption_split((encoder, decoder, WORDS, None), Split(features), args, processes)
    assert [len(captions) for captions in found] == [8, 8]
    assert ("images of 256 pixels, these are of 320" in capsys.readouterr().out) is bool(report)
    for beam_size, captions in zip(args.beam_sizes, found):
        for i, caption in enumerate(captions):
            [alone] = beam_search(decoder, features[i : i + 1], WORDS, beam_size, max_len=9)
            assert caption.words == [WORDS_OF[token] for token in alone.tokens]
            assert caption.score == pytest.approx(alone.score)
            seen = caption.words, alone.alphas, Split(features).entry(i)["objects"], NOUNS
            assert (caption.hits, caption.object_words) == attention_hits(*seen, 0, offset)
            assert caption.near_hits == attention_hits(*seen, MARGIN, offset)[0]
            if report and beam_size == 3:
                np.testing.assert_allclose(caption.attention, alone.alphas, atol=1e-3)
            else:
                assert caption.attention is None
    hits, near_hits = (sum(getattr(c, name) for c in found[0]) for name in ("hits", "near_hits"))
    assert 0 < hits < near_hits < sum(caption.object_words for caption in found[0])
