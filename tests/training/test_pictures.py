"""Validation photographs in TensorBoard, read back from its files."""

import io
import json
import math

import numpy as np
import pytest
import torch
from factories import NAME, log_rows, train_args
from PIL import Image

import train
from caption import Captioner
from datasets import CaptionDataset
from training import pictures
from visualization.attention import attention_grid
from visualization.overlay import Drawing


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of two epochs, and its events"""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "COUNT", 4)  # of the six, whose captions are still long
        train.main(train_args(data, folder, "--epochs", "2", "--tensorboard"))
    events = accumulator.EventAccumulator(str(folder / f"tensorboard_{NAME}"),
                                          size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return folder, events


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
            " ".join(entries[i]["references"][0]) for i in (0, 2, 3, 5)]


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
    figure = attention_grid(captioned.image, captioned.words, captioned.attention,
                            Drawing(offset=captioned.offset), pictures.DPI)
    figure.canvas.draw()
    expected = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    tag = min(events.Tags()["images"])
    drawn = Image.open(io.BytesIO(events.Images(tag)[-1].encoded_image_string)).convert("RGB")
    # Of one image or of four at a time, the last bits of attention differ.
    assert abs(np.asarray(drawn).astype(int) - expected).max() <= 2


def test_words_in_angle_brackets_and_bars_are_shown_as_they_are():
    assert pictures._escape("a <unk> | b") == "a &lt;unk&gt; &#124; b"


def test_training_is_the_same_with_and_without_pictures(run, data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    with_pictures, without = (torch.load(folder / f"checkpoint_{NAME}.pth.tar", weights_only=True)
                              for folder in (run[0], tmp_path))
    for key, weight in without["decoder"].items():
        assert torch.equal(with_pictures["decoder"][key], weight)
