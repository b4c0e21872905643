"""eval.py with a stand-in for the model, since only its captions matter here."""

import numpy as np
import pytest
from factories import karpathy_entry, write_karpathy, write_scenes

import eval as eval_script
from evaluation import coco_caption
from evaluation.captions import ImageCaption
from evaluation.objects import NamedObject
from preprocessing.input_files import create_input_files
from utils import write_json

# The stand-in's captions of the 8 test scenes: the first 2, 3, … 9 of these words
WORDS = "there is a red circle above a blue square".split()
# The objects that each of them names
OBJECTS = [NamedObject(True, (1, 1, 1, 1, 0.5, 0.25)), NamedObject(True, (0, 1, 0, 0, 0.25, 0.25))]
OBJECTS.append(NamedObject(False, None))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """12 training, 2 validation and 8 test scenes"""
    return write_scenes(tmp_path_factory.mktemp("data"), 12, 2, 8)


@pytest.fixture
def stub_captions():
    """The stand-in's captions of the test scenes, at every beam size"""
    return [ImageCaption(WORDS[:n], -1.0, OBJECTS, attention=np.eye(196)[:n]) for n in range(2, 10)]


@pytest.fixture
def summary():
    """The figures of OBJECTS in the table"""
    return ["50.00", "100.00", "50.00", "50.00", "37.50", "25.00", "33.33", "100.00"]


@pytest.fixture
def evaluate(data, stub_captions, monkeypatch, no_java):
    """Call eval.py without a model and without Java: evaluate(*options, data=…, by_beam=…)"""

    def call(*options, data=data, by_beam=None):
        def found(model, data, objects, args, processes):
            return by_beam or [stub_captions for _ in args.beam_sizes]

        monkeypatch.setattr(eval_script, "caption_split", found)
        monkeypatch.setattr(eval_script, "load_captioner", lambda *_: None)
        model = ["--model", "m.pth.tar", "--device", "cpu", "--beam_sizes", "1"]
        eval_script.main(["--data_folder", str(data), *model, *map(str, options)])

    return call


@pytest.fixture
def no_java(monkeypatch):
    monkeypatch.setattr(coco_caption, "java_missing", lambda: "java is not in the PATH")


@pytest.fixture(scope="session")
def joined(tmp_path_factory):
    """A data set joined from two, which have the same image ids; 3 and 2 test images"""
    folder, paths = tmp_path_factory.mktemp("joined"), []
    street = ["a red bus on a wet street", "a dog runs in a park", "two men sit at a table"]
    kitchen = ["a white oven in a small kitchen", "a bowl of red apples"]
    for source, captions in {"street": street, "kitchen": kitchen}.items():
        kinds = [(split, text) for split in ("train", "val", "test") for text in captions]
        entries = [
            karpathy_entry(f"{i}.png", split, [text, text + " today"], imgid=i + 10 - len(kinds))
            for i, (split, text) in enumerate(kinds)
        ]
        paths.append(write_karpathy(folder / source, entries))
        write_json(paths[-1], {"images": entries, "dataset": source})
    folders = [path.parent / "images" for path in paths]
    create_input_files("both", paths, folders, 2, 0, str(folder / "data"), workers=0)
    return folder / "data"
