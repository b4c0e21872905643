"""Validation photographs in TensorBoard, read back from its files."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import NAME, load_checkpoint, log_rows, same, train_args

import train
from caption import Captioner
from datasets import CaptionDataset
from modeling.devices import Distributed
from models import DecoderWithAttention, Encoder
from training import pictures

pytestmark = pytest.mark.slow


def read_events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return events.Reload()


def table(event):
    """The rows of a table of captions: lists of their cells"""
    text = event.tensor_proto.string_val[0].decode()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n")[2:]]


def captions_of(folder, data, images):
    """What the run's last model says of these validation photographs, searched for as validated"""
    captioner = Captioner(folder / f"checkpoint_{NAME}.pth.tar", device="cpu")
    pixels = CaptionDataset(data, NAME, "VAL")[np.array(images)].images
    return captioner(pixels.permute(0, 2, 3, 1).numpy(), beam_size=1, no_unk=False)


def test_tensorboard_has_figures_and_captioned_photographs(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COUNT", 4)  # of the six, whose captions are still long
    train.main(train_args(data, tmp_path / "1", "--epochs 2 --tensorboard"))
    events = read_events(tmp_path / "1" / f"tensorboard_{NAME}")
    for row in log_rows(tmp_path / "1"):
        for key, value in row.items():
            [logged] = [event.value for event in events.Scalars(key) if event.step == row["epoch"]]
            assert math.isclose(logged, value, rel_tol=1e-6, abs_tol=1e-30)  # they are float32
    entries = json.loads((data / f"VAL_REFERENCES_{NAME}.json").read_bytes())
    entries = [entries[i] for i in (0, 2, 3, 5)]
    names = [entry["filename"] for entry in entries]
    assert sorted(events.Tags()["images"]) == sorted(f"attention/{name}" for name in names)
    for name in names:
        shown = events.Images(f"attention/{name}")
        assert [picture.step for picture in shown] == [1, 2] and shown[0].width > 100
    found = captions_of(tmp_path / "1", data, [0, 2, 3, 5])
    for name, cells, entry, caption in zip(
        names, table(events.Tensors("captions/text_summary")[-1]), entries, found
    ):
        assert cells == [name, caption.text, " ".join(entry["references"][0])]
    train.main(train_args(data, tmp_path / "2", "--epochs 2"))  # is the same without pictures
    assert same(*(load_checkpoint(tmp_path / name)["decoder"] for name in "12"))


def test_empty_captions_and_angle_brackets_are_shown_as_they_are(data, tmp_path, monkeypatch):
    """As of a data set without file names, and a model that ends at once."""
    writer_module = pytest.importorskip("torch.utils.tensorboard")
    for path in data.glob(f"*{NAME}*"):
        if "REFERENCES" not in path.name:
            shutil.copy(path, tmp_path)
    val_data = CaptionDataset(tmp_path, NAME, "VAL")
    encoder = Encoder(name="mobilenet_v3_small", weights="none")
    decoder = DecoderWithAttention(8, 8, 8, len(val_data.word_map), encoder.encoder_dim)
    with torch.no_grad():
        decoder.fc.bias[val_data.word_map["<end>"]] = 100
    state = SimpleNamespace(args=train.get_args([]), processes=Distributed(torch.device("cpu")))
    state.averaged_encoder, state.averaged_decoder = encoder, decoder
    shown = pictures.ValidationPictures(val_data, val_data.word_map)
    shown.references[0] = "a <unk> | b"
    with writer_module.SummaryWriter(tmp_path / "log") as writer:
        shown.write(writer, state, 1)
    events = read_events(tmp_path / "log")
    [event] = events.Tensors("captions/text_summary")
    assert [row[:2] for row in table(event)] == [[f"image {i}", ""] for i in range(6)]
    assert table(event)[0][2] == "a &lt;unk&gt; &#124; b"
    [picture] = events.Images("attention/image 5")
    assert picture.width > 100


def test_a_fine_tuned_average_of_the_model_is_shown(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "COUNT", 1)
    options = "--fine_tune_encoder --ema 0.9 --epochs 1 --tensorboard"
    train.main(train_args(data, tmp_path, options))
    [event] = read_events(tmp_path / f"tensorboard_{NAME}").Tensors("captions/text_summary")
    assert table(event)[0][1] == captions_of(tmp_path, data, [0])[0].text
    assert load_checkpoint(tmp_path)["offset"] is None  # what was measured is of older weights
