"""What every script does with its options: mistakes end in one line, help tells the defaults."""

import re
import subprocess
import sys

import pytest
from factories import ROOT, run_script, train_args

import caption
import eval as eval_script
import train
from evaluation import captions
from modeling.sampling import most_likely_location
from utils import UserError


@pytest.mark.parametrize("script, args, message", [
    ("train.py", ["--data_folder", "nowhere"], "no data set in nowhere; pass the --data_folder of"),
    ("eval.py", ["--model", "missing.pth.tar"], "missing.pth.tar not found"),
    ("train.py", ["--resume", "--data_folder", "{data}", "--checkpoint_folder", "{tmp}"],
     "no checkpoint_*.pth.tar in"),
    ("train.py", ["--resume", "{tmp}/gone.pth.tar"], "gone.pth.tar not found"),
    ("train.py", ["--data_folder", "{data}", "--encoder", "resnet1000"], "unknown encoder"),
    ("train.py", ["--resume", "x", "--checkpoint", "y"], "pass one of them"),
    ("train.py", ["--device", "gpu"], "--device gpu cannot be used here"),
    ("train.py", ["--batch_size", "0"], "--batch_size is 0, it must be at least 1"),
    ("train.py", ["--dropout", "nan"], "--dropout is nan"),
    ("train.py", ["--lr_decay", "-1"], "--lr_decay is -1.0, it must be above 0"),
    ("train.py", ["--samples", "1"], "--samples is 1, it must be at least 2"),
    ("train.py", ["--ema", "1"], "--ema is 1.0, it must be below 1"),
    ("train.py", ["--sampling_max", "1.5"], "--sampling_max is 1.5, it must be at most 1"),
    ("train.py", ["--self_critical"], "needs a trained model to start from, --checkpoint FILE"),
    ("train.py", ["--self_critical", "--attention", "hard", "--checkpoint", "x"],
     "--attention is of training on true captions, which --self_critical does without"),
    ("eval.py", ["--length_penalty", "nan"], "--length_penalty is nan, it must be 0 to 10"),
    ("eval.py", ["--max_len", "0"], "--max_len is 0, it must be at least 1"),
    ("train.py", ["--epochs", "x"], "invalid int value: 'x'; --help lists the options"),
    ("eval.py", ["--beam_sizes", "0"], "--beam_sizes is 0"),
    ("eval.py", ["--results", "{tmp}"], "is a folder; name a file in it"),
])
def test_mistakes_end_in_one_line_and_exit_code_2(data, tmp_path, script, args, message):
    result = run_script(script, *(arg.format(data=data, tmp=tmp_path) for arg in args))
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script, told", [
    ("train.py", {"--decoder_dim": "512", "--encoder": "resnet101", "--dropout": "0.5"}),
    ("eval.py", {"--batch_size": "64", "--beam_sizes": "[1, 3, 5]"}),
    ("caption.py", {"--beam_size": "5", "--max_len": "50"}),
])
def test_help_tells_the_defaults(script, told):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
    options = {text.split()[0]: " ".join(text.split())
               for text in re.split("\n  (?=-)", done.stdout)}
    assert "None" not in done.stdout and "False" not in done.stdout
    for option, default in told.items():
        assert options[option].endswith(f"(default: {default})")


def test_options_are_not_abbreviated():
    with pytest.raises(UserError, match="unrecognized arguments: --lr 3"):
        train.get_args(["--lr", "3"])


def test_search_options_reach_the_search_of_both_scripts(data, tmp_path, monkeypatch, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    options = ["--max_len", "7", "--length_penalty", "0.5", "--no_unk", "--attention", "hard",
               "--device", "cpu", "--checkpoint_folder", str(tmp_path)]
    asked = []
    for script in (captions, caption):
        search = script.beam_search
        monkeypatch.setattr(script, "beam_search", lambda *args, search=search, **options: (
            asked.append(options) or search(*args, **options)))
    eval_script.main(["--data_folder", str(data), "--beam_sizes", "2", "--workers", "0", *options])
    picture = next((data / "demo").glob("*.png"))
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", str(picture), "--no_attention",
                                      *options])
    caption.main()
    for found in asked:
        assert found.pop("n_best", 1) == 1
        assert found == {"max_len": 7, "length_penalty": 0.5, "no_unk": True,
                         "hard_attention": most_likely_location}
    assert len(asked) == 2
