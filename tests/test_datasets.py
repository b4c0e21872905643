"""The tutorial's files, what is wrong with files, and the order of an epoch."""

import json
import pickle

import factories
import h5py
import numpy as np
import pytest
import torch
from factories import IMAGES, TUTORIAL_LENGTHS, TUTORIAL_NAME, TUTORIAL_WORD_MAP, R, refused
from torch.utils.data import DataLoader

from datasets import CaptionDataset, ResumableBatchSampler, add_data_options, find_data_name
from utils import Parser

PIXELS, WORDS = f"TRAIN_IMAGES_{TUTORIAL_NAME}.hdf5", f"WORDMAP_{TUTORIAL_NAME}.json"
CAPTIONS, LENGTHS = (f"TRAIN_{kind}_{TUTORIAL_NAME}.json" for kind in ("CAPTIONS", "CAPLENS"))


@pytest.fixture
def data(tmp_path):
    """The folder of the tutorial's files, and their pixels"""
    return tmp_path, factories.write_tutorial_files(tmp_path)


def read(folder, by_image=True):
    return CaptionDataset(folder, TUTORIAL_NAME, "TRAIN", by_image)


def equal(batch, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def stacked(items):
    return [torch.stack(column) for column in zip(*items)]


@pytest.mark.parametrize("by_image", [True, False])
def test_item_is_an_image_with_its_captions_or_a_caption_with_its_image(data, by_image):
    folder, pixels = data
    dataset, r = read(folder, by_image), R if by_image else 1
    assert len(dataset) == IMAGES * R / r and dataset.word_map == TUTORIAL_WORD_MAP
    assert dataset.image_size == 256 and not dataset.in_memory
    for i in range(len(dataset)):
        image, captions, lengths, index = dataset[i]
        assert int(index) == i
        assert image.dtype == torch.uint8 and captions.dtype == lengths.dtype == torch.int64
        np.testing.assert_array_equal(image, pixels[i * r // R])
        assert captions.tolist() == factories.TUTORIAL_CAPTIONS[r * i : r * i + r]
        assert lengths.tolist() == TUTORIAL_LENGTHS[r * i : r * i + r]
    index = np.array([3, 0, 4])
    assert equal(dataset[index], stacked(dataset[int(i)] for i in index))
    for outside in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[outside]


def test_a_caption_equal_to_an_earlier_one_of_its_image_has_nothing_to_predict(tmp_path):
    captions = [
        *([5, 1, 2, 6, 0], [5, 1, 2, 6, 0]),  # image 0: repeated
        *([5, 1, 2, 6, 0], [5, 3, 6, 0, 0]),  # image 1: the first equals one of image 0
        *([5, 3, 6, 0, 0], [5, 3, 1, 6, 0]),
        *([5, 2, 6, 0, 0], [5, 2, 6, 0, 0]),
        *([5, 1, 6, 0, 0], [5, 2, 6, 0, 0]),
    ]
    lengths = [sum(word != 0 for word in caption) for caption in captions]
    factories.write_tutorial_files(tmp_path, captions, lengths)
    expected = [4, 1, 4, 3, 3, 4, 3, 1, 3, 3]
    data = read(tmp_path)
    assert data.lengths.tolist() == expected
    assert data[np.arange(5)][2].tolist() == np.reshape(expected, (5, 2)).tolist()
    assert [len(data.entry(i)["references"]) for i in range(5)] == [1, 2, 2, 1, 2]
    single = read(tmp_path, by_image=False)
    items = [single[i] for i in range(len(single))]
    assert [int(item[2]) for item in items] == [length for length in expected if length > 1]
    for item, row in zip(items, [0, 2, 3, 4, 5, 6, 8, 9]):
        assert item[1][0].tolist() == captions[row]
        assert torch.equal(item[0], data[row // 2][0])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_and_pickled_copies_give_the_batches_of_one_process(data, method):
    dataset, batches = read(data[0]), ResumableBatchSampler(IMAGES, 2)
    expected = [dataset[rows] for rows in batches]  # the parent has the file open from here on
    loader = DataLoader(
        dataset, sampler=batches, batch_size=None, num_workers=2, multiprocessing_context=method
    )
    got = list(loader)
    assert len(got) == len(loader) == 3 and all(map(equal, got, expected))
    assert equal(pickle.loads(pickle.dumps(dataset))[2], dataset[2])


def test_references_are_those_of_their_file_or_read_back_from_word_ids(data):
    references = [["a", "cat", "sits"], ["a", "<unk>"]]
    found = read(data[0]).entry(1)
    assert found == {"filename": None, "image_id": 1, "references": references}
    path = data[0] / f"TRAIN_REFERENCES_{TUTORIAL_NAME}.json"
    entry = {"filename": "1.jpg", "image_id": 1, "references": [["un", "chat"]]}
    path.write_text(json.dumps([entry] * IMAGES))
    assert read(data[0]).entry(3) == entry
    for wrong in ({}, [[]] * IMAGES, [{"filename": "a.jpg"}] * IMAGES, [entry] * (IMAGES - 1)):
        path.write_text(json.dumps(wrong))
        refused(path, "create_input_files.py", load=lambda _: read(data[0]).entry(0))


@pytest.mark.parametrize("locking", [None, True, False, "best-effort"])
def test_images_that_this_process_has_open_are_read(data, locking):
    with h5py.File(data[0] / PIXELS, locking=locking):
        np.testing.assert_array_equal(read(data[0])[1].images, data[1][1])


# What is wrong with files


def test_missing_damaged_or_foreign_file_is_named(data):
    for name in (PIXELS, CAPTIONS, LENGTHS, WORDS):
        path = data[0] / name
        whole = path.read_bytes()
        path.unlink()
        refused(path, "run python create_input_files.py first", load=lambda _: read(data[0]))
        for content in (b"", whole[: len(whole) // 2], b"[7]", b"{}", b"no such file"):
            path.write_bytes(content)
            refused(path if name in (PIXELS, WORDS) else data[0], load=lambda _: read(data[0]))
        path.write_bytes(whole)


def test_captions_and_lengths_that_do_not_fit_are_refused(tmp_path):
    captions, lengths = factories.TUTORIAL_CAPTIONS, TUTORIAL_LENGTHS
    bad_lengths = [[*lengths[:-1], n] for n in (0, 1, 4.5, 5, 99, 2**40, 2**70, "a")]
    bad_last = [[1, 1, 4, 6, 0, 0], [5, 7, 4, 6, 0, 0], [5, -1, 4, 6, 0, 0], [5, 6]]
    bad_captions = [[*captions[:-1], last] for last in bad_last]
    for wrong, wrong_lengths in [
        (captions[:-1], lengths[:-1]),
        (captions[:-1], lengths),
        (captions, lengths[:-1]),
        ([], []),
        *((captions, bad) for bad in bad_lengths),
        *((bad, lengths) for bad in bad_captions),
    ]:
        for path in tmp_path.iterdir():
            path.unlink()
        factories.write_tutorial_files(tmp_path, wrong, wrong_lengths)
        refused(tmp_path, "CAP", "create_input_files.py again", load=read)


def test_images_of_another_shape_or_type_are_refused(data):
    for shape, dtype, count in [
        *(((IMAGES, *shape), "uint8", R) for shape in ((3, 8, 8), (), (256, 256, 3))),
        ((IMAGES, 3, 256, 256), "float32", R),
        ((IMAGES, 3, 256, 256), "uint8", 0),
    ]:
        with h5py.File(data[0] / PIXELS, "w") as file:
            file.attrs["captions_per_image"] = count
            file.create_dataset("images", shape, dtype)
        refused(data[0], "IMAGES", "create_input_files.py again", load=read)


def test_word_map_with_gaps_duplicates_or_missing_special_tokens_is_refused(data):
    for word_map in [
        [1],
        {"a": "1"},
        {"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3},
        {"<pad>": 4, "a": 0, "<unk>": 1, "<start>": 2, "<end>": 3},
        {"<pad>": 0, "a": 1, "<unk>": 3, "<start>": 4, "<end>": 5},
        {"<pad>": 0, "a": 1, "b": 1, "<unk>": 2, "<start>": 3, "<end>": 4},
    ]:
        (data[0] / WORDS).write_text(json.dumps(word_map))
        refused(data[0] / WORDS, "is not a word map", load=lambda _: read(data[0]))
    other = {**TUTORIAL_WORD_MAP, "dog": 4, "<unk>": 5, "<start>": 6, "<end>": 7}
    (data[0] / WORDS).write_text(json.dumps(other))
    refused(data[0], CAPTIONS, "WORDMAP", load=read)


def test_word_ids_are_kept_in_16_bits_where_these_suffice(data):
    for size, dtype in ((1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        more = {str(i): i for i in range(len(TUTORIAL_WORD_MAP), size)}
        (data[0] / WORDS).write_text(json.dumps(TUTORIAL_WORD_MAP | more))
        assert read(data[0]).captions.dtype == dtype


def test_only_data_set_of_the_folder_is_found(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        refused(folder, "--data_folder", load=find_data_name)
    for name in ("WORDMAP_coco_5.json", "WORDMAP_notes.txt"):
        (tmp_path / name).touch()
    assert find_data_name(tmp_path) == "coco_5"
    (tmp_path / "WORDMAP_a.json").touch()
    refused(tmp_path, "--data_name, one of: a, coco_5", load=find_data_name)
    assert find_data_name(tmp_path, "a") == "a"
    parser = Parser()
    add_data_options(parser)
    assert vars(parser.parse_args([])) == {"data_folder": "data", "data_name": None}


# The order of an epoch


def epoch(number, items=50, size=8, **options):
    batches = ResumableBatchSampler(items, size, **options)
    batches.epoch = number
    return [batch.tolist() for batch in batches]


def test_every_item_occurs_once_in_batches_of_nearly_equal_size_which_processes_share():
    for items, size, world in [
        (1, 1, 1),
        (3, 8, 1),
        (7, 3, 2),
        (7, 1, 2),
        (10, 5, 3),
        (101, 16, 5),
    ]:
        for shuffle in (True, False):
            options = [{"rank": rank, "world_size": world} for rank in range(world)]
            shares = [ResumableBatchSampler(items, size, shuffle, **option) for option in options]
            whole = [np.concatenate(parts).tolist() for parts in zip(*shares, strict=True)]
            order, sizes = sum(whole, []), {len(batch) for batch in whole}
            assert sorted(order) == list(range(items)) and (shuffle or order == sorted(order))
            assert max(sizes) - min(sizes) <= 1
            if items // world >= -(-items // size):  # a batch of one process feeds all of them
                assert whole == epoch(0, items, size, shuffle=shuffle)
                assert max(sizes) <= size and len(whole) == -(-items // size)
            for share in shares:
                parts = [list(part) for part in share]
                assert all(parts) and len(share) == len(parts)
                share.start = len(parts) // 2  # as a resumed run does
                assert [list(part) for part in share] == parts[share.start :]
                assert len(share) == len(parts) - share.start


def test_order_follows_from_seed_and_epoch_alone():
    first = epoch(3, seed=1)
    np.random.seed(5)
    assert epoch(3, seed=1) == first
    assert len({str(epoch(e, seed=s)) for e in range(4) for s in range(4)}) == 16
    # Old checkpoints continue in the order in which they began.
    assert epoch(2, 10, 3, seed=1) == [[8, 5, 6], [0, 9, 1], [4, 3], [7, 2]]
