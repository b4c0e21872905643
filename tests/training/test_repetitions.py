"""An image with few captions is filled up by repeating them; a repetition counts nothing."""

import numpy as np
import reference
import torch
from factories import TUTORIAL_NAME, make_captions, make_decoder, write_tutorial_files

from datasets import CaptionDataset
from models import DecoderOutput
from training.engine import teacher_forced_pairs
from training.losses import Batch, TeacherForcing, doubly_stochastic_penalty


def test_loss_and_gradients_are_those_of_the_distinct_captions_alone():
    decoder, (captions, lengths) = make_decoder(), make_captions(3, 4)
    lengths[[0, 0, 1, 1, 1], [2, 3, 1, 2, 3]] = 1  # 2, 1 and 4 captions are distinct
    features = torch.randn(3, 16, 9, dtype=torch.float64)
    assert TeacherForcing().count_captions(lengths) == 7
    assert doubly_stochastic_penalty(torch.zeros(1, 2, 2, 9), lengths[1:2, :2]).tolist() == [[1, 0]]
    batch = Batch(features, captions, lengths, [0, 1, 2], float((lengths - 1).sum()), 7)
    loss, *_ = TeacherForcing(0.7)(decoder, batch)
    ours = torch.autograd.grad(loss, list(decoder.parameters()))
    image = (lengths > 1).nonzero()[:, 0]  # of each caption that counts, as an image of its own
    distinct = captions[lengths > 1][:, None], lengths[lengths > 1][:, None]
    textbook = reference.loss(decoder, features[image], *distinct, 0.7)
    torch.testing.assert_close(loss, textbook)
    for a, b in zip(ours, torch.autograd.grad(textbook, list(decoder.parameters()))):
        torch.testing.assert_close(a, b)


def test_a_caption_equal_to_an_earlier_one_of_its_image_has_nothing_to_predict(tmp_path):
    captions = [
        *([5, 1, 2, 6, 0], [5, 1, 2, 6, 0]),  # image 0: repeated
        *([5, 1, 2, 6, 0], [5, 3, 6, 0, 0]),  # image 1: the first equals one of image 0
        *([5, 3, 6, 0, 0], [5, 3, 1, 6, 0]),
        *([5, 2, 6, 0, 0], [5, 2, 6, 0, 0]),
        *([5, 1, 6, 0, 0], [5, 2, 6, 0, 0]),
    ]
    lengths = [sum(word != 0 for word in caption) for caption in captions]
    write_tutorial_files(tmp_path, captions, lengths)
    expected = [4, 1, 4, 3, 3, 4, 3, 1, 3, 3]
    data = CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")
    assert data.lengths.tolist() == expected
    assert data[np.arange(5)][2].tolist() == np.reshape(expected, (5, 2)).tolist()
    assert [len(data.entry(i)["references"]) for i in range(5)] == [1, 2, 2, 1, 2]
    single = CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN", by_image=False)
    items = [single[i] for i in range(len(single))]
    assert [int(item[2]) for item in items] == [length for length in expected if length > 1]
    for item, row in zip(items, [0, 2, 3, 4, 5, 6, 8, 9]):
        assert item[1][0].tolist() == captions[row]
        assert torch.equal(item[0], data[row // 2][0])


def test_teacher_forced_bleu_leaves_repetitions_out():
    lengths = torch.tensor([[4, 1], [3, 4]])
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    logits = torch.nn.functional.one_hot(targets + 1)
    assert teacher_forced_pairs(DecoderOutput(logits, targets, None, None), lengths) == [
        ([["1", "2", "3"], []], ["2", "3", "4"]),
        ([["4", "5"], ["6", "7", "8"]], ["5", "6"]),
        ([["4", "5"], ["6", "7", "8"]], ["7", "8", "9"]),
    ]
