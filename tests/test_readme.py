"""What the README says can be done out of the box, done."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints import PRETRAINED, load_captioner

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with photo.jpg, from which scripts are called."""
    shutil.copy(ROOT / "docs/photo.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shipped_model_says_of_the_photograph_what_the_readme_says(here):
    done = subprocess.run([sys.executable, ROOT / "caption.py", "--img", "photo.jpg", "--device",
                           "cpu"], capture_output=True, text=True, check=True)
    block = re.search(r"```\nmodel: .*\n(.+)\nattention: photo_attention.png\n```", README)
    assert done.stdout == f"{block[1]}\n"
    assert str(PRETRAINED) in done.stderr  # it says which model that was
    assert (here / "photo_attention.png").stat().st_size > 10_000


def test_library_example_runs_word_for_word(here, capsys):
    [example] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(example, names := {})
    captioned = names["captioned"]
    assert captioned.text in capsys.readouterr().out
    assert len(captioned.n_best) == 3 and captioned.attention.shape == (len(captioned.words), 196)
    assert captioned.text in (here / "photo.html").read_text(encoding="utf-8")


def test_shipped_file_is_small_halved_and_plain():
    assert PRETRAINED.stat().st_size <= 28_000_000
    checkpoint = torch.load(PRETRAINED, weights_only=True)
    assert checkpoint["options"]["self_critical"]
    for weights in (checkpoint["encoder"], checkpoint["decoder"]):
        assert all(weight.dtype == torch.float16 for weight in weights.values()
                   if weight.dim() > 1)
    _, decoder, word_map, _ = load_captioner(PRETRAINED, "cpu")
    assert decoder.fc.out_features == len(word_map) == 2278


def test_pictures_and_files_that_the_readme_names_exist():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert len(links) > 5 and not missing
