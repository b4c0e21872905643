"""Any file gives a result or an error that names it; FUZZ=600 pytest ... tries 600 of each kind."""

import io
import json
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import IMAGES, TUTORIAL_NAME, write_tutorial_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import checkpoints
from datasets import CaptionDataset
from models import DecoderWithAttention, Encoder
from preprocessing.images import read_image
from preprocessing.input_files import create_input_files
from preprocessing.own_captions import read_captions
from utils import UserError

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ", 25)),
    deadline=20_000,
    database=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a", "dog", "chien", "犬", "\ud800", "", " "]
SPLITS = ["train", "val", "test", "restval"]
KEYS = (
    "images filename filepath split sentences tokens caption image annotations id file_name "
    "image_id captions objects box words"
).split()
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=9)
    | st.floats(allow_subnormal=False)  # which torch is set to flush to 0
    | st.sampled_from([*WORDS, *SPLITS, "a.png", "../a.png", "/a", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from([*WORDS, *KEYS]), inner, max_size=5)
    ),
    max_leaves=12,
)
json_files = json_values.map(json.dumps).map(str.encode)


def read(function, content, name, named=True):
    """What it returns for these bytes, None for a UserError, which names the file if `named`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            return function(path)
        except UserError as error:
            assert (str(path) if named else folder) in str(error), error


def mangled(original):
    """Strategy: these bytes with some of them removed, changed, repeated or inserted."""
    positions = st.integers(0, len(original))
    edits = st.lists(st.tuples(positions, positions, st.binary(max_size=6)), min_size=1, max_size=4)

    def edit(edits):
        content = original
        for start, end, new in edits:
            # Mostly a small change; removing a large piece is rare.
            end = start + (end - start) % 9 if (start + end) % 4 else end
            content = content[:start] + new + content[max(start, end) :]
        return content

    return edits.map(edit)


def picture(suffix, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned upright
    Image.fromarray(pixels).convert(mode).save(file, suffix, exif=exif)
    return file.getvalue()


MODES = "JPEG RGB,JPEG CMYK,PNG RGBA,PNG P,GIF P,TIFF RGB,BMP RGB,WEBP RGB,PNG I;16,TIFF F,PPM RGB"
PICTURES = [picture(*mode.split()) for mode in MODES.split(",")]


@fuzz
@given(st.sampled_from(PICTURES).flatmap(mangled) | st.binary(max_size=200))
def test_any_bytes_are_a_picture_or_a_user_error(content):
    result = read(read_image, content, "x.jpg")
    assert result is None or (result.shape == (3, 256, 256) and result.dtype == np.uint8)


captions = st.lists(
    st.fixed_dictionaries({"tokens": st.lists(st.sampled_from(WORDS), max_size=6) | json_values}),
    max_size=3,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "filename": st.sampled_from(["a.png", "b.png", "../a.png", "gone.png", ""]) | json_values,
        "filepath": st.sampled_from(["", ".", ".."]) | json_values,
        "split": st.sampled_from(SPLITS) | json_values,
        "sentences": captions | json_values,
        "objects": json_values,
    },
)
karpathy = st.fixed_dictionaries({"images": st.lists(entries, max_size=4)}) | json_values


@fuzz
@given(karpathy, st.booleans())
def test_any_content_of_karpathys_json_is_prepared_or_a_user_error(content, skip):
    def prepare(path):
        for name in ("a.png", "b.png"):
            Image.new("RGB", (5, 4)).save(path.parent / name)
        arguments = "x", str(path), str(path.parent), 2, 0, str(path.parent / "out"), 4
        create_input_files(*arguments, workers=1, skip_bad_images=skip)

    read(prepare, json.dumps(content).encode(), "x.json", named=False)


@fuzz
@given(
    json_files
    | mangled(b'image,caption,split\na.png,"A dog, running.",train\nb.png,Two cats,val\n')
    | mangled(b"a.png#0\tA dog .\nb.png#1\tTwo cats .\n")
    | mangled(b'{"image": "a.png", "caption": "A dog"}\n{"image": "b.png", "captions": ["x"]}\n')
)
def test_any_caption_file_is_converted_or_a_user_error(content):
    for image in (read(read_captions, content, "x.txt") or {"images": []})["images"]:
        assert isinstance(image["filename"], str) and image["split"]
        assert all(isinstance(word, str) for s in image["sentences"] for word in s["tokens"])


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tutorial_files(folder)
    entry = {"filename": "1.jpg", "image_id": 1, "references": [["a", "cat"]]}
    path = folder / f"TRAIN_REFERENCES_{TUTORIAL_NAME}.json"
    path.write_text(json.dumps([entry] * IMAGES))
    return folder


@fuzz
@given(data=st.data())
def test_any_file_of_a_data_set_is_read_or_a_user_error_that_names_it(data_set, data):
    path = data.draw(st.sampled_from(sorted(data_set.glob("*.json"))))
    whole = path.read_bytes()
    try:
        path.write_bytes(data.draw(mangled(whole) | json_files))
        dataset = CaptionDataset(data_set, TUTORIAL_NAME, "TRAIN")
        assert sorted(dataset.word_map.values()) == list(range(len(dataset.word_map)))
        assert 0 <= dataset.captions.min() <= dataset.captions.max() < len(dataset.word_map)
        assert all("references" in dataset.entry(i) for i in range(IMAGES))
    except UserError as error:
        assert str(data_set) in str(error) and "\n" not in str(error)
    finally:
        path.write_bytes(whole)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of ours, and the same tensors as pickles of both of torch's formats."""
    word_map = {"<pad>": 0, "a": 1, "dog": 2, "<unk>": 3, "<start>": 4, "<end>": 5}
    encoder = Encoder(7, "mobilenetv3_small_050", "none")
    sizes = 5, 4, 6, len(word_map), encoder.encoder_dim
    decoder = DecoderWithAttention(*sizes, encoded_image_size=7)
    path = tmp_path_factory.mktemp("model") / "x.pth.tar"
    checkpoints.save(path, encoder, decoder, word_map)
    found = [path.read_bytes()]
    for new in (True, False):
        content = {"format": 1, "decoder": decoder.state_dict(), "word_map": word_map}
        torch.save(content, path, _use_new_zipfile_serialization=new)
        found.append(path.read_bytes())
    return [*found, pickle.dumps({"format": 1, "word_map": word_map}, 2)]


@fuzz
@given(data=st.data())
def test_any_checkpoint_is_a_model_or_a_user_error(files, data):
    whole = st.sampled_from(range(len(files))).flatmap(lambda i: mangled(files[i]))
    content = data.draw(whole | st.binary(max_size=100))
    read(lambda path: checkpoints.load_captioner(path, "cpu"), content, "x.pth.tar")
