"""hubconf.py: the model in one line, from any folder, beside foreign modules of our names."""

import shutil
import subprocess
import sys

import pytest
from factories import ROOT

from checkpoints import PRETRAINED

PHOTO = str(ROOT / "docs" / "photo.jpg")
START = f"""
import sys, torch
def load(entry, *args, **options):
    return torch.hub.load({str(ROOT)!r}, entry, *args, source="local", **options)
"""


def run(code, folder):
    """What this code prints in a new Python in the folder."""
    command = [sys.executable, "-c", START + code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_model_loads_in_one_line_beside_foreign_modules_of_our_names(tmp_path):
    names = "datasets", "evaluation", "caption", "utils", "models", "visualization", "modeling"
    for name in names:
        (tmp_path / f"{name}.py").write_text("THEIRS = True\n")
    code = f"""
import datasets, evaluation, caption
captioned = load("show_attend_tell")({PHOTO!r})
captioned.save("photo.html"), captioned.save("photo.png"), captioned.save("photo.gif")
assert datasets.THEIRS and sys.modules["caption"] is caption and caption.THEIRS
import utils, models, visualization, modeling
assert all(sys.modules[name].THEIRS for name in {names})
again = load("show_attend_tell")({PHOTO!r})
assert type(again) is type(captioned) and again.text == captioned.text
print(again.text)
"""
    assert len(run(code, tmp_path)[-1].split()) > 3
    assert {"photo.html", "photo.png", "photo.gif"} <= {p.name for p in tmp_path.iterdir()}


def test_what_it_returns_can_be_pickled_for_a_process_that_loads_it_too(tmp_path):
    code = f"""
import pickle
captioner = load("show_attend_tell", device="cpu")
captioned = captioner({PHOTO!r})
pickle.dump((captioner, captioned), open("x.pickle", "wb"))
print(captioned.text)
"""
    text = run(code, tmp_path)[-1]
    code = f"""
import pickle
try: pickle.load(open("x.pickle", "rb"))
except ModuleNotFoundError as error: print(error)
load("word_map")
captioner, captioned = pickle.load(open("x.pickle", "rb"))
captioned.save("x.gif")
print(captioned.text), print(captioner({PHOTO!r}).text)
"""
    assert run(code, tmp_path)[-3:] == ["No module named 'show_attend_tell_hub'", text, text]


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_and_the_parts_load_trained_or_new(tmp_path):
    shutil.copy(PRETRAINED, tmp_path / "own.pth.tar")
    code = """
own = load("show_attend_tell", "own.pth.tar", device="cpu")
encoder, decoder, word_map = map(load, ("encoder", "decoder", "word_map"))
assert not encoder.training and not decoder.training and len(word_map) == 3530
for mine, its in ((own.encoder, encoder), (own.decoder, decoder)):
    assert all(map(torch.equal, mine.state_dict().values(), its.state_dict().values()))
new = load("encoder", pretrained=False, name="squeezenet1_1")
small = load("decoder", pretrained=False, decoder_dim=8, encoder_dim=new.encoder_dim)
assert new.encoder_dim == 512 and small.fc.weight.shape == (3530, 8)
assert small.attention.encoder_att.weight.shape == (512, 512) and not small.training
try: load("show_attend_tell", "gone.pth.tar")
except Exception as error: print(error)
"""
    assert "gone.pth.tar not found" in run(code, tmp_path)[-1]
