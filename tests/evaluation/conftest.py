"""eval.py with a stand-in for the model, since only its captions matter here."""

import numpy as np
import pytest
from factories import write_scenes

import eval as eval_script
from evaluation import coco_caption
from evaluation.captions import ImageCaption

# The stand-in's captions of the 8 test scenes: the first 2, 3, … 9 of these words
WORDS = "there is a red circle above a blue square".split()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """12 training, 2 validation and 8 test scenes"""
    return write_scenes(tmp_path_factory.mktemp("data"), 12, 2, 8)


@pytest.fixture
def stub_captions():
    """The stand-in's captions of the test scenes, at every beam size"""
    return [
        ImageCaption(
            WORDS[: i + 2],
            score=-1.0,
            object_words=3,
            hits=1,
            near_hits=2,
            attention=np.eye(196)[: i + 2],
        )
        for i in range(8)
    ]


@pytest.fixture
def stub_options(data, stub_captions, monkeypatch):
    """Options for eval.py, whose model is a stand-in"""
    monkeypatch.setattr(
        eval_script,
        "caption_split",
        lambda model, data, args, processes: [stub_captions for _ in args.beam_sizes],
    )
    monkeypatch.setattr(eval_script, "load_captioner", lambda *_: None)
    return [
        "--data_folder",
        str(data),
        "--model",
        "m.pth.tar",
        "--device",
        "cpu",
        "--beam_sizes",
        "1",
    ]


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(coco_caption, "java_missing", lambda: "java is not in the PATH")
