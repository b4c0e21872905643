"""Validation photographs in TensorBoard, read back from its files."""

import io
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import NAME, SMALL_ENCODER, log_rows, train_args
from PIL import Image

import train
from caption import Captioner
from datasets import CaptionDataset
from modeling.devices import Distributed
from models import DecoderWithAttention, Encoder
from training import pictures
from visualization.attention import attention_grid


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of two epochs, and its events"""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "COUNT", 4)  # of the six, whose captions are still long
        train.main(train_args(data, folder, "--epochs", "2", "--tensorboard"))
    return folder, read_events(folder / f"tensorboard_{NAME}")


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def table(event):
    """The rows of a table of captions: lists of their cells"""
    text = event.tensor_proto.string_val[0].decode()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n")[2:]]


def test_every_figure_of_the_log_is_in_tensorboard_too(run):
    folder, events = run
    for row in log_rows(folder):
        for key, value in row.items():
            [logged] = [event.value for event in events.Scalars(key) if event.step == row["epoch"]]
            assert math.isclose(logged, value, rel_tol=1e-6, abs_tol=1e-30)  # they are float32


def test_the_same_photographs_spread_over_the_split_are_shown_after_each_epoch(run, data):
    _, events = run
    entries = json.loads((data / f"VAL_REFERENCES_{NAME}.json").read_bytes())
    names = [entries[i]["filename"] for i in (0, 2, 3, 5)]
    assert sorted(events.Tags()["images"]) == sorted(f"attention/{name}" for name in names)
    for name in names:
        assert [event.step for event in events.Images(f"attention/{name}")] == [1, 2]
    for event in events.Tensors("captions/text_summary"):
        assert [row[0] for row in table(event)] == names
        assert [row[2] for row in table(event)] == [
            " ".join(entries[i]["references"][0]) for i in (0, 2, 3, 5)
        ]


def test_their_captions_are_those_of_the_model_after_the_epoch(run, data):
    folder, events = run
    captioner = Captioner(folder / f"checkpoint_{NAME}.pth.tar", device="cpu")
    images, *_ = CaptionDataset(data, NAME, "VAL")[np.array([0, 2, 3, 5])]
    expected = captioner(images.permute(0, 2, 3, 1).numpy(), beam_size=1, no_unk=False)
    last = events.Tensors("captions/text_summary")[-1]
    assert [row[1] for row in table(last)] == [captioned.text for captioned in expected]


def test_the_pictures_have_the_photograph_and_a_panel_for_each_word(run, data):
    folder, events = run
    captioner = Captioner(folder / f"checkpoint_{NAME}.pth.tar", device="cpu")
    images, *_ = CaptionDataset(data, NAME, "VAL")[np.array([0])]
    captioned = captioner(images[0].permute(1, 2, 0).numpy(), beam_size=1, no_unk=False)
    figure = attention_grid(
        captioned.image,
        captioned.words,
        captioned.attention,
        offset=captioned.offset,
        dpi=pictures.DPI,
    )
    figure.canvas.draw()
    expected = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    tag = min(events.Tags()["images"])
    drawn = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("RGB")
    # Of one image or of four at a time, the last bits of attention differ.
    assert abs(np.asarray(drawn).astype(int) - expected).max() <= 2


def test_words_in_angle_brackets_and_bars_are_shown_as_they_are():
    assert pictures._escape("a <unk> | b") == "a &lt;unk&gt; &#124; b"


def test_an_empty_caption_of_a_file_without_name_is_shown_too(data, tmp_path):
    """As of a data set made by the tutorial's code, and a model that ends at once."""
    writer_module = pytest.importorskip("torch.utils.tensorboard")
    for path in data.glob(f"*{NAME}*"):
        if "REFERENCES" not in path.name:
            shutil.copy(path, tmp_path)
    val_data = CaptionDataset(tmp_path, NAME, "VAL")
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    decoder = DecoderWithAttention(8, 8, 8, len(val_data.word_map), encoder.encoder_dim)
    with torch.no_grad():
        decoder.fc.bias[val_data.word_map["<end>"]] = 100
    state = SimpleNamespace(
        args=train.get_args([]),
        averaged_encoder=encoder,
        averaged_decoder=decoder,
        processes=Distributed(torch.device("cpu")),
    )
    with writer_module.SummaryWriter(tmp_path / "log") as writer:
        pictures.ValidationPictures(val_data, val_data.word_map).write(writer, state, 1)
    events = read_events(tmp_path / "log")
    [event] = events.Tensors("captions/text_summary")
    assert [row[:2] for row in table(event)] == [[f"image {i}", ""] for i in range(6)]
    [picture] = events.Images("attention/image 5")
    assert picture.width > 100


def test_a_fine_tuned_average_of_the_model_is_shown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COUNT", 1)
    train.main(
        train_args(
            data,
            tmp_path,
            *SMALL_ENCODER,
            "--fine_tune_encoder",
            "--ema",
            "0.9",
            "--epochs",
            "1",
            "--tensorboard",
        )
    )
    captioner = Captioner(tmp_path / f"checkpoint_{NAME}.pth.tar", device="cpu")
    images, *_ = CaptionDataset(data, NAME, "VAL")[np.array([0])]
    expected = captioner(images[0].permute(1, 2, 0).numpy(), beam_size=1, no_unk=False)
    [event] = read_events(tmp_path / f"tensorboard_{NAME}").Tensors("captions/text_summary")
    assert [row[1] for row in table(event)] == [expected.text]


def test_training_is_the_same_with_and_without_pictures(run, data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    with_pictures, without = (
        torch.load(folder / f"checkpoint_{NAME}.pth.tar", weights_only=True)
        for folder in (run[0], tmp_path)
    )
    for key, weight in without["decoder"].items():
        assert torch.equal(with_pictures["decoder"][key], weight)
