"""Calibrated biases: words become about as frequent as people's."""

import json
import math

import pytest
import torch
from factories import NAME

import checkpoints
import eval as eval_script
from checkpoints import PRETRAINED
from evaluation.calibration import PRIOR, calibrate

WORD_MAP = {
    "<pad>": 0,
    "a": 1,
    "cat": 2,
    "sits": 3,
    "rests": 4,
    "<unk>": 5,
    "<start>": 6,
    "<end>": 7,
}


def test_biases_by_hand():
    captions = [["a", "cat", "sits"], ["a", "cat", "sits"]]
    references = [[["a", "cat", "sits"], ["a", "cat", "rests"]], [["the", "cat", "rests"]]]
    bias = torch.arange(8.0)
    found = calibrate(bias, WORD_MAP, captions, references, strength=0.5)
    # how often: by the model, by people (two captions of one image are half a caption each)
    counts = {"a": (2, 1), "cat": (2, 2), "sits": (2, 0.5), "rests": (0, 1.5)}
    expected = bias.tolist()
    for word, (generated, human) in counts.items():
        expected[WORD_MAP[word]] -= 0.5 * math.log((generated + PRIOR) / (human + PRIOR))
    assert found.tolist() == pytest.approx(expected)
    assert calibrate(bias, WORD_MAP, captions, references, strength=0).tolist() == bias.tolist()
    with pytest.raises(ValueError):  # captions of other images
        calibrate(bias, WORD_MAP, captions, references[:1])


def test_eval_writes_the_model_calibrated_by_its_captions_of_the_split(data, tmp_path, capsys):
    new, results = tmp_path / "new.pth.tar", tmp_path / "r.json"
    options = ["--data_folder", data, "--model", PRETRAINED, "--split", "train", "--device", "cpu"]
    options += ["--beam_sizes", "1", "--workers", "0", "--results", results, "--calibrate", new]
    eval_script.main([*map(str, options)])
    assert f"on 12 train images of {NAME}" in capsys.readouterr().out
    rows = json.loads(results.read_text())
    captions = [row["caption"].split() for row in rows]
    references = [[text.split() for text in row["references"]] for row in rows]
    old, found = (checkpoints.load(str(path)) for path in (PRETRAINED, new))
    bias = old["decoder"].pop("fc.bias")
    expected = calibrate(bias, old["word_map"], captions, references)
    torch.testing.assert_close(found["decoder"].pop("fc.bias"), expected)
    assert found["word_map"] == old["word_map"] and (expected != bias).any()
    for model in ("encoder", "decoder"):
        for name, weight in found[model].items():
            assert torch.equal(weight, old[model][name].to(weight.dtype)), name
