"""The tutorial's files, read in pieces, and the order of an epoch."""

import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from factories import (
    IMAGES,
    TUTORIAL_CAPTIONS,
    TUTORIAL_LENGTHS,
    TUTORIAL_NAME,
    TUTORIAL_WORD_MAP,
    R,
    write_tutorial_files,
)
from torch.utils.data import DataLoader

from datasets import (
    CaptionDataset,
    ResumableBatchSampler,
    WorkerDied,
    add_data_options,
    find_data_name,
    load_batches,
    read_word_ids,
)
from utils import Parser, UserError

# The files of the tutorial


@pytest.fixture
def data(tmp_path):
    pixels = write_tutorial_files(tmp_path)
    return tmp_path, pixels


def equal(batch, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def test_item_is_an_image_with_its_captions(data):
    folder, pixels = data
    dataset = CaptionDataset(folder, TUTORIAL_NAME, "TRAIN")
    assert len(dataset) == IMAGES and dataset.word_map == TUTORIAL_WORD_MAP
    for i in range(IMAGES):
        image, captions, lengths, index = dataset[i]
        assert int(index) == i
        assert image.dtype == torch.uint8 and captions.dtype == lengths.dtype == torch.int64
        np.testing.assert_array_equal(image, pixels[i])
        assert captions.tolist() == TUTORIAL_CAPTIONS[R * i : R * i + R]
        assert lengths.tolist() == TUTORIAL_LENGTHS[R * i : R * i + R]


def test_item_is_a_caption_with_its_image(data):
    folder, pixels = data
    dataset = CaptionDataset(folder, TUTORIAL_NAME, "TRAIN", by_image=False)
    assert len(dataset) == IMAGES * R
    for i in range(IMAGES * R):
        image, captions, lengths, index = dataset[i]
        assert int(index) == i
        np.testing.assert_array_equal(image, pixels[i // R])
        assert captions.tolist() == [TUTORIAL_CAPTIONS[i]]
        assert lengths.tolist() == [TUTORIAL_LENGTHS[i]]


@pytest.mark.parametrize("by_image", [True, False])
def test_batch_is_its_items_stacked(data, by_image):
    dataset = CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN", by_image)
    index = np.array([3, 0, 4])
    items = [dataset[int(i)] for i in index]
    assert equal(dataset[index], [torch.stack(column) for column in zip(*items)])


@pytest.mark.parametrize("index", [-1, IMAGES])
def test_index_out_of_range_is_an_error(data, index):
    with pytest.raises(IndexError):
        CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN")[index]


def test_references_are_read_back_from_word_ids(data):
    entry = CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN").entry(1)
    assert entry == {
        "filename": None,
        "image_id": 1,
        "references": [["a", "cat", "sits"], ["a", "<unk>"]],
    }


def test_references_file_takes_precedence_over_word_ids(data):
    entries = [
        {"filename": f"{i}.jpg", "image_id": i, "references": [["un", "chat"]]}
        for i in range(IMAGES)
    ]
    path = data[0] / f"TRAIN_REFERENCES_{TUTORIAL_NAME}.json"
    path.write_text(json.dumps(entries))
    assert CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN").entry(3) == entries[3]


@pytest.mark.parametrize(
    "captions, lengths",
    [
        (TUTORIAL_CAPTIONS[:-1], TUTORIAL_LENGTHS[:-1]),
        (TUTORIAL_CAPTIONS[:-1], TUTORIAL_LENGTHS),
        (TUTORIAL_CAPTIONS, TUTORIAL_LENGTHS[:-1]),
    ],
)
def test_count_mismatch_is_a_user_error(tmp_path, captions, lengths):
    write_tutorial_files(tmp_path, captions, lengths)
    with pytest.raises(UserError, match="create_input_files.py"):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize(
    "references",
    [
        {},
        [[]] * IMAGES,
        [{"filename": "a.jpg"}] * IMAGES,
        [{"filename": "a.jpg", "image_id": 1, "references": [["un"]]}] * (IMAGES - 1),
        [{"filename": "a.jpg", "image_id": 1, "references": None}] * IMAGES,
        [{"filename": "a.jpg", "image_id": 1, "references": ["un chat"]}] * IMAGES,
    ],
    ids=str,
)
def test_references_of_another_form_or_number_are_named(data, references):
    path = data[0] / f"TRAIN_REFERENCES_{TUTORIAL_NAME}.json"
    path.write_text(json.dumps(references))
    with pytest.raises(UserError, match=f"{path.name} is damaged: .*again$"):
        CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN").entry(0)


def test_images_without_captions_are_refused(tmp_path):
    write_tutorial_files(tmp_path, captions=[], lengths=[])
    with h5py.File(tmp_path / FILES[0], "r+") as file:
        file.attrs["captions_per_image"] = 0
    with pytest.raises(UserError, match=f"{FILES[0]} is damaged: its captions_per_image is 0; "):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((IMAGES, 3, 8, 8), "uint8"),
        ((IMAGES,), "uint8"),
        ((IMAGES, 256, 256, 3), "uint8"),
        ((IMAGES, 3, 256, 256), "float32"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(data, shape, dtype):
    with h5py.File(data[0] / FILES[0], "w") as file:
        file.attrs["captions_per_image"] = R
        file.create_dataset("images", shape, dtype)
    with pytest.raises(UserError, match=f"{FILES[0]} is damaged: it holds {dtype} of .*not uint8"):
        CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize(
    "lengths",
    [
        [length + 1 for length in TUTORIAL_LENGTHS],
        [1] * len(TUTORIAL_LENGTHS),
        [99] * len(TUTORIAL_LENGTHS),
    ],
)
def test_captions_that_do_not_end_where_their_lengths_say_are_refused(tmp_path, lengths):
    write_tutorial_files(tmp_path, TUTORIAL_CAPTIONS, lengths)
    with pytest.raises(UserError, match=f"{FILES[1]}: caption 0 is not <start>, words and <end>"):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize("length", ["a", [2], 2.5, 1e400, None, True, {}])
def test_lengths_that_are_not_integers_are_refused(tmp_path, length):
    many = [length] * len(TUTORIAL_LENGTHS)
    for lengths, wrong in (
        (many, f"{FILES[2]} is damaged"),
        (length, "CAPLENS"),
        ([*TUTORIAL_LENGTHS[:-1], length], "CAPLENS"),
    ):
        write_tutorial_files(tmp_path, TUTORIAL_CAPTIONS, lengths)
        with pytest.raises(UserError, match=f"{wrong}.*create_input_files.py again$"):
            CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")
        (tmp_path / FILES[0]).unlink()


@pytest.mark.parametrize("length", [-1, 0, 2**40, 2**70])
def test_impossible_lengths_are_refused(tmp_path, length):
    write_tutorial_files(tmp_path, TUTORIAL_CAPTIONS, [*TUTORIAL_LENGTHS[:-1], length])
    with pytest.raises(UserError, match="create_input_files.py again$"):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


def test_files_of_two_data_sets_are_refused(tmp_path):
    write_tutorial_files(tmp_path)
    other = {**TUTORIAL_WORD_MAP, "dog": 4, "<unk>": 5, "<start>": 6, "<end>": 7}
    (tmp_path / FILES[3]).write_text(json.dumps(other))
    with pytest.raises(UserError, match="these two files and the WORDMAP do not belong"):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize(
    "word_map, reason",
    [
        ([1], "not an object of words"),
        ({"a": "1"}, "not an object of words"),
        ({"a": 1}, "lacks <pad>"),
        ({"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3}, "lacks <end>"),
        ({"<pad>": 4, "a": 0, "<unk>": 1, "<start>": 2, "<end>": 3}, "<pad> is 4"),
        ({"<pad>": 0, "a": 1, "<unk>": 3, "<start>": 4, "<end>": 5}, "see 2"),
        ({"<pad>": 0, "a": 1, "b": 1, "<unk>": 2, "<start>": 3, "<end>": 4}, "see 5"),
    ],
)
def test_word_map_with_gaps_duplicates_or_missing_special_tokens_is_refused(data, word_map, reason):
    (data[0] / FILES[3]).write_text(json.dumps(word_map))
    with pytest.raises(UserError, match=f"{FILES[3]} is not a word map: .*{reason}"):
        CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN")


FILES = [
    f"TRAIN_IMAGES_{TUTORIAL_NAME}.hdf5",
    f"TRAIN_CAPTIONS_{TUTORIAL_NAME}.json",
    f"TRAIN_CAPLENS_{TUTORIAL_NAME}.json",
    f"WORDMAP_{TUTORIAL_NAME}.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_or_damaged_file_is_named(tmp_path, name, damage):
    write_tutorial_files(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        size = path.stat().st_size // 2 if damage == "truncated" else 0
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError) as error:
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    next_step = "run python create_input_files.py first" if damage == "missing" else ""
    assert str(error.value).endswith(next_step)


def test_hdf5_file_of_something_else_is_a_user_error(tmp_path):
    write_tutorial_files(tmp_path)
    with h5py.File(tmp_path / FILES[0], "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(UserError, match=FILES[0]):
        CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_batches_of_one_process(data, method):
    dataset = CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN")
    batches = ResumableBatchSampler(IMAGES, 2)
    expected = [dataset[rows] for rows in batches]  # the parent has the file open from here on
    loader = DataLoader(
        dataset, sampler=batches, batch_size=None, num_workers=2, multiprocessing_context=method
    )
    got = list(loader)
    assert len(got) == len(loader) == 3 and all(map(equal, got, expected))
    assert equal(dataset[np.arange(IMAGES)], [torch.stack(c) for c in zip(*dataset)])


def test_pickled_dataset_carries_no_handle(data):
    dataset = CaptionDataset(data[0], TUTORIAL_NAME, "TRAIN")
    before = dataset[2]
    assert dataset._handle is not None
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._handle is None and equal(copy[2], before)
    assert dataset._handle is not None


def test_only_data_set_is_found(tmp_path):
    (tmp_path / "WORDMAP_coco_5.json").touch()
    (tmp_path / "WORDMAP_notes.txt").touch()
    assert find_data_name(tmp_path) == "coco_5"


def test_no_data_set_names_the_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"no data set in {folder}; pass the --data_folder"):
            find_data_name(folder)


def test_data_options_find_the_only_data_set_of_the_default_folder():
    parser = Parser()
    add_data_options(parser)
    assert vars(parser.parse_args([])) == {"data_folder": "data", "data_name": None}


def test_several_data_sets_are_listed(tmp_path):
    for name in "ba":
        (tmp_path / f"WORDMAP_{name}.json").touch()
    with pytest.raises(UserError, match="pass --data_name, one of: a, b$"):
        find_data_name(tmp_path)


# The order of an epoch

SIZES = [(1, 1), (7, 3), (10, 5), (10, 4), (3, 8), (101, 16), (64, 64)]


@pytest.mark.parametrize("items, size", SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_item_occurs_once_in_batches_of_nearly_equal_size(items, size, shuffle):
    batches = ResumableBatchSampler(items, size, shuffle)
    order = [list(batch) for batch in batches]
    assert sorted(sum(order, [])) == list(range(items))
    sizes = {len(batch) for batch in order}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size
    assert len(batches) == len(order) == -(-items // size)
    assert shuffle or sum(order, []) == list(range(items))


def epoch(number, **options):
    batches = ResumableBatchSampler(50, 8, **options)
    batches.epoch = number
    return [batch.tolist() for batch in batches]


def test_order_follows_from_seed_and_epoch_alone():
    first = epoch(3, seed=1)
    np.random.seed(5)
    assert epoch(3, seed=1) == first
    assert len({str(epoch(e, seed=s)) for e in range(4) for s in range(4)}) == 16


@pytest.mark.parametrize(
    "items, size, world",
    [(items, size, world) for items, size in SIZES for world in (2, 3, 5) if items >= world],
)
def test_processes_share_the_batches_of_one(items, size, world):
    shares = [
        ResumableBatchSampler(items, size, rank=rank, world_size=world) for rank in range(world)
    ]
    whole = [np.concatenate(parts).tolist() for parts in zip(*shares, strict=True)]
    assert sorted(sum(whole, [])) == list(range(items))
    assert all(len(part) for share in shares for part in share)
    assert {len(share) for share in shares} == {len(whole)}
    if items // world >= -(-items // size):  # a batch of one process feeds all of them
        assert whole == [batch.tolist() for batch in ResumableBatchSampler(items, size)]


# Captions, read in pieces


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2, 3], [4, 5, 6], [7, 0, 0]]",
        "[[1,2,3],[4,5,6],[7,0,0]]",
        "[\n [1, 2, 3],\n [4, 5, 6],\n [7, 0, 0]\n]\n",
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 11, 1000])
def test_word_ids_equal_those_of_json_for_any_chunk_size(tmp_path, monkeypatch, text, piece):
    path = tmp_path / "captions.json"
    path.write_text(text)
    monkeypatch.setattr("datasets.CHUNK_BYTES", piece)
    ids = read_word_ids(path, 8)
    assert ids.tolist() == json.loads(text) and ids.dtype == np.int16


def test_file_without_captions_is_valid(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    assert len(read_word_ids(tmp_path / "captions.json", 8)) == 0


def test_word_ids_beyond_16_bits_are_kept(tmp_path):
    (tmp_path / "captions.json").write_text("[[40000, 1]]")
    assert read_word_ids(tmp_path / "captions.json", 50000).tolist() == [[40000, 1]]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[",
        "[[1, 2]",
        "[[1, 2], [3",
        "[[1, 2], [3]]",
        "[[1], [2, 3], [4]]",
        "[[1, 8]]",
        "[[1, -1]]",
        "[[1, 2.5]]",
        '[[1, "a"]]',
        "[[1, null]]",
        "[[1, 2]] x",
        "{}",
        "3",
        "[[1,,2]]",
        "[[]]",
        "[[1, 99999999999999999999]]",
    ],
)
def test_invalid_list_of_word_ids_is_a_user_error(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match="captions.json"):
        read_word_ids(path, 8)


class Loader(list):
    """Yields its items as a DataLoader would; an exception is raised."""

    num_workers = 1

    def __iter__(self):
        for item in super().__iter__():
            if isinstance(item, Exception):
                raise item
            yield item


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        ConnectionRefusedError(111, "Connection refused"),
        EOFError(),
        FileNotFoundError(2, "No such file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_loading_process_killed_while_it_makes_or_hands_over_a_batch_is_named(error):
    batches = load_batches(Loader([1, error]))
    assert next(batches) == 1
    with pytest.raises(WorkerDied, match="a process that loads batches was killed"):
        next(batches)


def test_other_errors_of_loading_stay_what_they_are():
    with pytest.raises(RuntimeError, match="size"):
        list(load_batches(Loader([RuntimeError("wrong size")])))
