"""An image with few captions is filled up by repeating them; a repetition counts nothing."""

import json

import numpy as np
import reference
import torch
from factories import (
    TUTORIAL_NAME,
    karpathy_entry,
    make_captions,
    make_decoder,
    write_input_files,
    write_tutorial_files,
)

from datasets import CaptionDataset
from training.engine import _teacher_forced
from training.losses import Batch, HardAttention, TeacherForcing


def repeated_batch():
    """Captions (3, 4, L) of which 2, 1 and 4 are distinct, in lengths as CaptionDataset gives."""
    captions, lengths = make_captions(3, 4)
    for image, row, same in ((0, 2, 0), (0, 3, 1), (1, 1, 0), (1, 2, 0), (1, 3, 0)):
        captions[image, row], lengths[image, row] = captions[image, same], 1
    return captions, lengths


def test_loss_and_gradients_are_those_of_the_distinct_captions_alone():
    decoder, features = make_decoder(), torch.randn(3, 16, 9, dtype=torch.float64)
    captions, lengths = repeated_batch()
    distinct = lengths > 1
    batch = Batch(
        features,
        captions,
        lengths,
        [0, 1, 2],
        float((lengths - 1).sum()),
        TeacherForcing().count_captions(lengths),
    )
    loss, _, correct = TeacherForcing(0.7)(decoder, batch)
    ours = torch.autograd.grad(loss, list(decoder.parameters()))
    image = distinct.nonzero()[:, 0]  # of each caption that counts, as an image of its own
    textbook = reference.loss(
        decoder, features[image], captions[distinct][:, None], lengths[distinct][:, None], 0.7
    )
    torch.testing.assert_close(loss, textbook)
    for a, b in zip(ours, torch.autograd.grad(textbook, list(decoder.parameters()))):
        torch.testing.assert_close(a, b)
    assert correct <= (lengths - 1).sum()


def test_baseline_of_hard_attention_is_a_mean_over_the_distinct_captions():
    captions, lengths = repeated_batch()
    criterion = HardAttention(1.0, 0.1, 0.1)
    assert criterion.count_captions(lengths) == 7
    criterion(
        make_decoder(),
        Batch(torch.randn(3, 16, 9, dtype=torch.float64), captions, lengths, [0, 1, 2], 1.0, 7),
    )
    assert criterion._num_captions == 7


def test_a_caption_equal_to_an_earlier_one_of_its_image_has_nothing_to_predict(tmp_path):
    captions = [
        [5, 1, 2, 6, 0],
        [5, 1, 2, 6, 0],  # image 0: repeated
        [5, 1, 2, 6, 0],
        [5, 3, 6, 0, 0],  # image 1: the first equals one of image 0
        [5, 3, 6, 0, 0],
        [5, 3, 1, 6, 0],
        [5, 2, 6, 0, 0],
        [5, 2, 6, 0, 0],
        [5, 1, 6, 0, 0],
        [5, 2, 6, 0, 0],
    ]
    lengths = [sum(word != 0 for word in caption) for caption in captions]
    write_tutorial_files(tmp_path, captions, lengths)
    expected = [4, 1, 4, 3, 3, 4, 3, 1, 3, 3]
    data = CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")
    assert data.lengths.tolist() == expected
    assert data[np.arange(5)][2].tolist() == np.reshape(expected, (5, 2)).tolist()
    assert [len(data.entry(i)["references"]) for i in range(5)] == [1, 2, 2, 1, 2]
    single = CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN", by_image=False)
    assert len(single) == 8
    items = [single[i] for i in range(8)]
    assert [int(item[2]) for item in items] == [length for length in expected if length > 1]
    for item, row in zip(items, [0, 2, 3, 4, 5, 6, 8, 9]):
        assert item[1][0].tolist() == captions[row]
        assert torch.equal(item[0], data[row // 2][0])


def test_images_with_one_to_five_captions_count_one_to_five(tmp_path):
    words = ["a", "b", "c", "d", "e"]
    entries = [
        karpathy_entry(f"{i}.png", captions=[f"{word} {i}" for word in words[: i + 1]])
        for i in range(5)
    ]
    write_input_files(tmp_path, [*entries, karpathy_entry("v.png", "val")], captions_per_image=5)
    name = "x_5_cap_per_img_0_min_word_freq"
    data = CaptionDataset(tmp_path / "out", name, "TRAIN")
    assert (data.lengths.view(5, 5) > 1).sum(1).tolist() == [1, 2, 3, 4, 5]
    kept = json.loads((tmp_path / f"out/TRAIN_CAPLENS_{name}.json").read_text())
    assert min(kept) == 4  # the files are the tutorial's


def test_teacher_forced_bleu_leaves_repetitions_out():
    lengths = torch.tensor([[4, 1], [3, 4]])
    targets = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8])
    assert _teacher_forced(targets + 1, targets, lengths) == [
        ([["1", "2", "3"], []], ["2", "3", "4"]),
        ([["4", "5"], ["6", "7", "8"]], ["5", "6"]),
        ([["4", "5"], ["6", "7", "8"]], ["7", "8", "9"]),
    ]
