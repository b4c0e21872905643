"""Pictures of every kind, the tutorial's files, the order of an epoch and the feature cache."""

import json
import pickle
import struct
import zlib

import h5py
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from datasets import (
    Batches,
    CaptionDataset,
    UserError,
    find_data_name,
    read_image,
    read_rgb,
    read_word_ids,
)

NAME = "flickr8k_2_cap_per_img_0_min_word_freq"
IMAGES, R = 5, 2
WORD_MAP = {"<pad>": 0, "a": 1, "cat": 2, "sits": 3, "<unk>": 4, "<start>": 5, "<end>": 6}
CAPTIONS = [[5, 1 + i % 3, 4, 6, 0, 0] if i % 2 else [5, 1, 2, 3, 6, 0]
            for i in range(IMAGES * R)]
LENGTHS = [4 if i % 2 else 5 for i in range(IMAGES * R)]


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[..., None], 3, 2)


# --- pictures ---


def test_grey_becomes_three_equal_channels(tmp_path):
    values = np.array([[0, 64, 65], [128, 254, 255]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey(values))


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False], [False, True]])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), grey([[255, 0], [0, 255]]))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 1000], [32768, 65000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"),
                                  grey([[0, 1, 4], [128, 253, 255]]))  # / 257, rounded


def palette_picture():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    return image


def test_palette_becomes_its_colours(tmp_path):
    palette_picture().save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tolist() == [[[255, 0, 0], [0, 0, 255]]]


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_transparent_palette_entry_is_white(tmp_path, suffix):
    palette_picture().save(tmp_path / f"a.{suffix}", transparency=0)
    assert read_rgb(tmp_path / f"a.{suffix}").tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.array([[[100, 200, 0, 255], [100, 200, 0, 0], [100, 200, 0, 51]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # 51 is a fifth: 0.2 * colour + 0.8 * 255
    assert read_rgb(tmp_path / "a.png").tolist() == [[[100, 200, 0], [255] * 3, [224, 244, 204]]]


def test_transparent_grey_is_laid_over_white(tmp_path):
    Image.fromarray(np.array([[[100, 255], [100, 51]]], np.uint8)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").tolist() == grey([[100, 224]]).tolist()


def test_cmyk_jpeg_shows_its_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg")  # red in print
    assert np.abs(read_rgb(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    red.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[blue], duration=50)
    assert np.abs(read_rgb(tmp_path / f"a.{suffix}").astype(int) - [255, 0, 0]).max() <= 3


def quadrants():
    """red, green / blue, white, wider than high"""
    image = np.zeros((32, 48, 3), np.uint8)
    image[:16, :24], image[:16, 24:], image[16:, :24] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image[16:, 24:] = 255
    return Image.fromarray(image)


# How a picture must be turned before it is stored, to be upright again by its EXIF tag.
T = Image.Transpose
STORED = {1: None, 2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
          6: T.ROTATE_90, 7: T.TRANSVERSE, 8: T.ROTATE_270}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotated_jpeg_is_upright(tmp_path, orientation):
    upright, turn, exif = quadrants(), STORED[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    got = read_rgb(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(got, np.asarray(ImageOps.exif_transpose(image)))
    assert got.shape == (32, 48, 3)
    assert np.abs(got.astype(int) - np.asarray(upright)).max() < 12  # JPEG's loss


def test_suffix_does_not_matter(tmp_path):
    Image.fromarray(grey([[7, 8]])).save(tmp_path / "a.jpg", format="PNG")
    (tmp_path / "a.jpg").rename(tmp_path / "b")
    Image.fromarray(grey([[7, 8]])).save(tmp_path / "a.jpg", format="PNG")
    for name in ("a.jpg", "b"):
        np.testing.assert_array_equal(read_rgb(tmp_path / name), grey([[7, 8]]))


def noise_file(path, **options):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize("broken", ["missing", "folder", "empty", "text", "png", "jpg", "gif",
                                    "webp", "tif", "avif"])
def test_unreadable_picture_is_one_line_with_its_path(tmp_path, broken):
    path = tmp_path / f"x.{broken}"
    if broken == "folder":
        path.mkdir()
    elif broken == "empty":
        path.touch()
    elif broken == "text":
        path.write_text("a cat\nsits\n" * 50)
    elif broken != "missing":
        data = noise_file(path).read_bytes()
        path.write_bytes(data[:len(data) // 2])
    for read in (read_rgb, read_image):
        with pytest.raises(UserError) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    expected = {"missing": "not found", "folder": "is a folder"}.get(broken, "not a readable image")
    assert expected in str(error.value)


@pytest.mark.parametrize("problem", [EOFError, RuntimeError, TypeError, MemoryError])
def test_whatever_a_decoder_raises_is_the_users_error(tmp_path, monkeypatch, problem):
    def fail(*args, **kwargs):
        raise problem

    path = noise_file(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match=f"x.png is not a readable image: {problem.__name__}"):
        read_rgb(path)


def test_fine_checkerboard_shrinks_to_grey(tmp_path):
    board = np.indices((1024, 1024)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png").astype(int)
    assert image.shape == (3, 256, 256) and np.abs(image - 127.5).max() < 3


def test_image_is_squashed_not_cropped(tmp_path):
    quadrants().save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", 64)
    assert image.shape == (3, 64, 64) and image.dtype == np.uint8
    for (y, x), colour in {(0, 0): (255, 0, 0), (0, 63): (0, 255, 0), (63, 0): (0, 0, 255),
                           (63, 63): (255, 255, 255), (28, 28): (255, 0, 0)}.items():
        assert tuple(image[:, y, x]) == colour


# --- the files of the tutorial ---


def write_tutorial_files(folder, captions=CAPTIONS, lengths=LENGTHS, size=256):
    """As the tutorial's create_input_files() does; there is no REFERENCES file."""
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, size, size), np.uint8)
    with h5py.File(folder / f"TRAIN_IMAGES_{NAME}.hdf5", "a") as h:
        h.attrs["captions_per_image"] = R
        images = h.create_dataset("images", (IMAGES, 3, size, size), dtype="uint8")
        for i, image in enumerate(pixels):
            images[i] = image
    for kind, content in ((f"TRAIN_CAPTIONS_{NAME}", captions), (f"TRAIN_CAPLENS_{NAME}", lengths),
                          (f"WORDMAP_{NAME}", WORD_MAP)):
        with open(folder / f"{kind}.json", "w") as j:
            json.dump(content, j)
    return pixels


@pytest.fixture
def data(tmp_path):
    pixels = write_tutorial_files(tmp_path)
    return tmp_path, pixels


def equal(batch, other):
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def test_item_is_an_image_with_its_captions(data):
    folder, pixels = data
    dataset = CaptionDataset(folder, NAME, "TRAIN")
    assert len(dataset) == IMAGES and dataset.word_map == WORD_MAP
    for i in range(IMAGES):
        image, captions, lengths = dataset[i]
        assert image.dtype == torch.uint8 and captions.dtype == lengths.dtype == torch.int64
        np.testing.assert_array_equal(image, pixels[i])
        assert captions.tolist() == CAPTIONS[R * i:R * i + R]
        assert lengths.tolist() == LENGTHS[R * i:R * i + R]


def test_item_is_a_caption_with_its_image(data):
    folder, pixels = data
    dataset = CaptionDataset(folder, NAME, "TRAIN", by_image=False)
    assert len(dataset) == IMAGES * R
    for i in range(IMAGES * R):
        image, captions, lengths = dataset[i]
        np.testing.assert_array_equal(image, pixels[i // R])
        assert captions.tolist() == [CAPTIONS[i]] and lengths.tolist() == [LENGTHS[i]]


@pytest.mark.parametrize("by_image", [True, False])
def test_batch_is_its_items_stacked(data, by_image):
    dataset = CaptionDataset(data[0], NAME, "TRAIN", by_image)
    index = np.array([3, 0, 4])
    items = [dataset[int(i)] for i in index]
    assert equal(dataset[index], [torch.stack(column) for column in zip(*items)])


@pytest.mark.parametrize("index", [-1, IMAGES])
def test_index_out_of_range(data, index):
    with pytest.raises(IndexError):
        CaptionDataset(data[0], NAME, "TRAIN")[index]


def test_references_are_read_back_from_word_ids(data):
    entry = CaptionDataset(data[0], NAME, "TRAIN").entry(1)
    assert entry == {"filename": None, "image_id": 1,
                     "references": [["a", "cat", "sits"], ["a", "<unk>"]]}


def test_references_file_beats_the_word_ids(data):
    entries = [{"filename": f"{i}.jpg", "image_id": i, "references": [["un", "chat"]]}
               for i in range(IMAGES)]
    path = data[0] / f"TRAIN_REFERENCES_{NAME}.json"
    path.write_text(json.dumps(entries))
    assert CaptionDataset(data[0], NAME, "TRAIN").entry(3) == entries[3]


@pytest.mark.parametrize("captions, lengths", [
    (CAPTIONS[:-1], LENGTHS[:-1]), (CAPTIONS[:-1], LENGTHS), (CAPTIONS, LENGTHS[:-1])])
def test_count_mismatch_is_a_user_error(tmp_path, captions, lengths):
    write_tutorial_files(tmp_path, captions, lengths)
    with pytest.raises(UserError, match="create_input_files.py"):
        CaptionDataset(tmp_path, NAME, "TRAIN")


@pytest.mark.parametrize("references", [
    {}, [[]] * IMAGES, [{"filename": "a.jpg", "image_id": 1, "references": ["un chat"]}] * IMAGES,
    [{"filename": "a.jpg", "image_id": 1, "references": [["un"]]}] * (IMAGES - 1)], ids=str)
def test_references_of_another_form_or_number_are_named(data, references):
    path = data[0] / f"TRAIN_REFERENCES_{NAME}.json"
    path.write_text(json.dumps(references))
    with pytest.raises(UserError, match=f"{path.name} is "):
        CaptionDataset(data[0], NAME, "TRAIN").entry(0)


@pytest.mark.parametrize("shape, dtype", [((IMAGES, 3, 8, 8), "uint8"), ((IMAGES,), "uint8"),
                                          ((IMAGES, 256, 256, 3), "uint8"),
                                          ((IMAGES, 3, 256, 256), "float32")])
def test_images_of_another_shape_or_type_are_refused(data, shape, dtype):
    with h5py.File(data[0] / FILES[0], "w") as file:
        file.attrs["captions_per_image"] = R
        file.create_dataset("images", shape, dtype)
    with pytest.raises(UserError, match=f"{FILES[0]} holds {dtype} of .* not uint8 images"):
        CaptionDataset(data[0], NAME, "TRAIN")


@pytest.mark.parametrize("lengths", [
    [length + 1 for length in LENGTHS], [1] * len(LENGTHS), [99] * len(LENGTHS)])
def test_captions_that_do_not_end_where_their_lengths_say_are_refused(tmp_path, lengths):
    write_tutorial_files(tmp_path, CAPTIONS, lengths)
    with pytest.raises(UserError, match=f"{FILES[1]}: caption 0 does not go from <start> to <end>"):
        CaptionDataset(tmp_path, NAME, "TRAIN")


@pytest.mark.parametrize("lengths", ["a", {}, [[2]], [2.0], [-1], [2 ** 40], [None]])
def test_lengths_that_are_no_whole_numbers_are_refused(tmp_path, lengths):
    write_tutorial_files(tmp_path, CAPTIONS, lengths)
    with pytest.raises(UserError, match=f"{FILES[2]} is no list of lengths"):
        CaptionDataset(tmp_path, NAME, "TRAIN")


@pytest.mark.parametrize("word_map, reason", [
    ([1], "no object of words"), ({"a": "1"}, "no object of words"), ({"a": 1}, "lacks <pad>"),
    ({"<pad>": 0, "a": 1, "<unk>": 2, "<start>": 3}, "lacks <end>"),
    ({"<pad>": 4, "a": 0, "<unk>": 1, "<start>": 2, "<end>": 3}, "<pad> is 4"),
    ({"<pad>": 0, "a": 1, "<unk>": 3, "<start>": 4, "<end>": 5}, "see 2"),
    ({"<pad>": 0, "a": 1, "b": 1, "<unk>": 2, "<start>": 3, "<end>": 4}, "see 5")])
def test_a_word_map_with_gaps_twins_or_without_special_words_says_so(data, word_map, reason):
    (data[0] / FILES[3]).write_text(json.dumps(word_map))
    with pytest.raises(UserError, match=f"{FILES[3]} is no word map: .*{reason}"):
        CaptionDataset(data[0], NAME, "TRAIN")


FILES = [f"TRAIN_IMAGES_{NAME}.hdf5", f"TRAIN_CAPTIONS_{NAME}.json", f"TRAIN_CAPLENS_{NAME}.json",
         f"WORDMAP_{NAME}.json"]


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
        CaptionDataset(tmp_path, NAME, "TRAIN")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_hdf5_file_of_something_else_is_a_user_error(tmp_path):
    write_tutorial_files(tmp_path)
    with h5py.File(tmp_path / FILES[0], "w") as file:
        file["other"] = np.zeros(3)
    with pytest.raises(UserError, match=FILES[0]):
        CaptionDataset(tmp_path, NAME, "TRAIN")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_give_the_batches_of_one_process(data, method):
    dataset = CaptionDataset(data[0], NAME, "TRAIN")
    batches = Batches(IMAGES, 2)
    expected = [dataset[rows] for rows in batches]  # the parent has the file open from here on
    loader = DataLoader(dataset, sampler=batches, batch_size=None, num_workers=2,
                        multiprocessing_context=method)
    got = list(loader)
    assert len(got) == len(loader) == 3 and all(map(equal, got, expected))
    assert equal(dataset[np.arange(IMAGES)], [torch.stack(c) for c in zip(*dataset)])


def test_pickled_dataset_carries_no_handle(data):
    dataset = CaptionDataset(data[0], NAME, "TRAIN")
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


def test_several_data_sets_are_listed(tmp_path):
    for name in "ba":
        (tmp_path / f"WORDMAP_{name}.json").touch()
    with pytest.raises(UserError, match="pass --data_name, one of: a, b$"):
        find_data_name(tmp_path)


# --- the order of an epoch ---

SIZES = [(1, 1), (7, 3), (10, 5), (10, 4), (3, 8), (101, 16), (64, 64)]


@pytest.mark.parametrize("items, size", SIZES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_item_once_in_batches_of_nearly_one_size(items, size, shuffle):
    batches = Batches(items, size, shuffle)
    order = [list(batch) for batch in batches]
    assert sorted(sum(order, [])) == list(range(items))
    sizes = {len(batch) for batch in order}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size
    assert len(batches) == len(order) == -(-items // size)
    assert shuffle or sum(order, []) == list(range(items))


def epoch(number, **options):
    batches = Batches(50, 8, **options)
    batches.epoch = number
    return [batch.tolist() for batch in batches]


def test_order_follows_from_seed_and_epoch_alone():
    first = epoch(3, seed=1)
    np.random.seed(5)
    assert epoch(3, seed=1) == first
    assert len({str(epoch(e, seed=s)) for e in range(4) for s in range(4)}) == 16


@pytest.mark.parametrize("items, size, world", [
    (items, size, world) for items, size in SIZES for world in (2, 3, 5) if items >= world])
def test_processes_share_the_batches_of_one(items, size, world):
    shares = [Batches(items, size, rank=rank, world=world) for rank in range(world)]
    whole = [np.concatenate(parts).tolist() for parts in zip(*shares, strict=True)]
    assert sorted(sum(whole, [])) == list(range(items))
    assert all(len(part) for share in shares for part in share)
    assert {len(share) for share in shares} == {len(whole)}
    if items // world >= -(-items // size):  # a batch of one process feeds all of them
        assert whole == [batch.tolist() for batch in Batches(items, size)]


# --- captions, read in pieces ---


@pytest.mark.parametrize("text", [
    "[[1, 2, 3], [4, 5, 6], [7, 0, 0]]", "[[1,2,3],[4,5,6],[7,0,0]]", "[\n [1, 2, 3],\n"
    " [4, 5, 6],\n [7, 0, 0]\n]\n"])
@pytest.mark.parametrize("piece", [1, 2, 3, 5, 7, 11, 1000])
def test_word_ids_are_those_of_json_wherever_the_pieces_end(tmp_path, monkeypatch, text, piece):
    path = tmp_path / "captions.json"
    path.write_text(text)
    monkeypatch.setattr("datasets.PIECE", piece)
    ids = read_word_ids(path, 8)
    assert ids.tolist() == json.loads(text) and ids.dtype == np.int16


def test_no_captions_are_no_error(tmp_path):
    (tmp_path / "captions.json").write_text("[]")
    assert len(read_word_ids(tmp_path / "captions.json", 8)) == 0


def test_word_ids_beyond_16_bits_are_kept(tmp_path):
    (tmp_path / "captions.json").write_text("[[40000, 1]]")
    assert read_word_ids(tmp_path / "captions.json", 50000).tolist() == [[40000, 1]]


@pytest.mark.parametrize("text", [
    "", " ", "[", "[[1, 2]", "[[1, 2], [3", "[[1, 2], [3]]", "[[1], [2, 3], [4]]", "[[1, 8]]",
    "[[1, -1]]", "[[1, 2.5]]", "[[1, \"a\"]]", "[[1, null]]", "[[1, 2]] x", "{}", "3", "[[1,,2]]",
    "[[]]", "[[1, 99999999999999999999]]"])
def test_what_is_no_list_of_word_ids_is_a_user_error(tmp_path, text):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(UserError, match="captions.json"):
        read_word_ids(path, 8)


@pytest.mark.parametrize("side", [16_000, 30_000])
def test_a_decompression_bomb_is_refused_before_it_goes_off(tmp_path, side):
    """A PNG of a few hundred bytes that says it has 256 or 900 million pixels."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99_999))) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="bomb.png is not a readable image: .*decompression bomb"):
        read_rgb(tmp_path / "bomb.png")


def test_one_pixel_fills_the_square(tmp_path):
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "1.png")
    assert np.array_equal(read_image(tmp_path / "1.png").reshape(3, -1),
                          np.repeat([[9], [8], [7]], 256 * 256, 1))
