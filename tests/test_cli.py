"""The options of every script: mistakes end in one line, --help shows the defaults."""

import importlib
import re
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from factories import run_script
from PIL import Image

import caption
import eval as eval_script
import train
import utils
from checkpoints import PRETRAINED
from evaluation import captions
from modeling.beam_search import Search
from utils import search_options


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main as a shell would: its exit code, stdout and stderr."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            sys.exit(utils.run_script(importlib.import_module(script).main) or 0)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    """The current folder, with the files for the mistakes below."""
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,a dog\n")
    (tmp_path / "broken.json").write_text('{"images":\n]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Options, and what the one line of the error names
MISTAKES = {
    "create_input_files": [
        ("--karpathy_json none.json --image_folder empty", "none.json not found"),
        ("--karpathy_json broken.json --image_folder empty", "broken.json, line 2: broken JSON"),
        ("--karpathy_json a --captions b", "--karpathy_json and --captions exclude each other"),
        ("--captions captions.csv", "--image_folder"),
        ("--image_size 31", "--image_size is 31, it must be at least 32 and at most 2048"),
    ],
    "train": [
        ("--data_folder nowhere", "no data set in nowhere; pass the --data_folder"),
        ("--resume --checkpoint_folder empty", "no checkpoint_*.pth.tar in empty"),
        ("--resume x --checkpoint y", "pass one of them"),
        ("--samples 1", "--samples is 1, it must be at least 2"),
        ("--self_critical", "needs a trained model to start from, --checkpoint FILE"),
        ("--self_critical --checkpoint x --evidence_c 1", "add --cross_entropy_share"),
        ("--evidence_c 1 --attention hard", "--evidence_c excludes"),
        ("--evidence_c 1 --sampling_max 0.1", "--evidence_c excludes"),
        ("--lr 3", "unrecognized arguments: --lr 3"),  # options are not abbreviated
    ],
    "eval": [
        ("--model missing.pth.tar", "missing.pth.tar not found"),
        ("--results nowhere/r.json", "--results nowhere/r.json"),
        ("--report x.txt", "--report x.txt must end in .html or .htm"),
        ("--table t.csv", "--table t.csv must end in .tex or .md"),
        ("--image_folder empty", "--image_folder is for --report"),
        ("--compare a b --report x.html", "leave --report, --results, --boxes and --calibrate out"),
        ("--compare none.json none.json", "none.json not found; write it with eval.py --results"),
        ("--metrics WER", "--metrics: invalid choice: 'wer' (choose from"),
        ("--calibrate x.pth.tar", "--calibrate counts words on the training images"),
        ("--split train --calibrate 0.png", "--calibrate 0.png exists already"),
        ("--temperature 2", "--temperature and --top_p are for --sample"),
        ("--sample --length_penalty 1", "--length_penalty and --attention hard are not for"),
        ("--seed 2147483648", "--seed is 2147483648, it must be at least 0 and at most 2147483647"),
    ],
    "caption": [
        ("--img nothing.jpg", "nothing.jpg not found"),
        ("--img empty", "no images in empty"),
        ("--img 0.png --n_best 6", "--n_best 6 needs --beam_size 6"),
        ("--img 0.png --out 0.png", "--out 0.png is the image itself"),
        ("--img 0.png --out x.abc", "x.abc cannot be written"),
        ("--img 0.png 1.png --out x.gif", "x.gif is one file, but there are 2 images"),
        ("", "the following arguments are required: -i/--img"),
    ],
    "checkpoints": [
        ("gone.pth.tar new", "gone.pth.tar not found"),
        ("gone.pth.tar 0.png", "0.png exists already; pass another name for the new file"),
        ("0.png new", "0.png is damaged or not a checkpoint"),
    ],
    "benchmark": [("--stages dinner", "invalid choice: 'dinner'")],
}


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_code_2(call, here, script):
    before = sorted(here.iterdir())
    for arguments, message in MISTAKES[script]:
        code, out, err = call(script, *arguments.split())
        assert code == 2 and err.startswith(f"{script}.py: ") and message in err, arguments
        assert err.count("\n") == 1 and sorted(here.iterdir()) == before and not out, arguments


FILLING = [  # commands, and options whose largest values would fill the memory
    ("create_input_files --captions a --image_folder b", "max_len captions_per_image workers"),
    ("eval --data_folder nowhere", "max_len batch_size workers beam_sizes bootstrap"),
    ("caption --img nothing.jpg", "max_len beam_size n_best batch_size"),
    ("train --data_folder nowhere", "batch_size workers samples val_beam_size"),
    ("train --data_folder nowhere", "emb_dim attention_dim decoder_dim"),
]


@pytest.mark.parametrize("command, options", FILLING)
def test_a_value_that_would_fill_the_memory_is_refused(call, command, options):
    for option in options.split():
        code, _, err = call(*command.split(), f"--{option}", "2147483647")
        assert code == 2 and f"--{option} is 2147483647, it must be at least " in err


def test_a_script_in_its_own_process_ends_with_the_same_line_and_exit_code(tmp_path):
    options = ["--karpathy_json", "none.json", "--image_folder", tmp_path]
    done = run_script("create_input_files.py", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("create_input_files.py: none.json not found")


def test_help_shows_the_defaults(call):
    for script, defaults in {
        "create_input_files": {"--captions_per_image": "5", "--dataset": "demo"},
        "train": {"--decoder_dim": "512", "--encoder": "resnet101", "--dropout": "0.5"},
        "eval": {"--batch_size": "64", "--beam_sizes": "[1, 3, 5]"},
        "caption": {"-b": "5", "--max_len": "50"},
        "checkpoints": {},
        "benchmark": {"--repeats": "5"},
    }.items():
        code, out, _ = call(script, "--help")
        texts = [" ".join(text.split()) for text in re.split("\n  (?=-)", out)]
        options = {text.split()[0].rstrip(","): text for text in texts}
        assert code == 0 and not re.search("None|False|SUPPRESS", out), script
        for option, default in defaults.items():
            assert f"(default: {default})" in options[option], option


def test_search_options_reach_the_search_of_both_scripts(data, monkeypatch, call):
    options = "--max_len 7 --length_penalty 0.5 --no_unk --attention hard --no_repeat_ngram 3"
    options = [*options.split(), "--no_repeat_words", "--device", "cpu", "--model", PRETRAINED]
    asked = [Mock(side_effect=caption.find_captions) for _ in range(2)]
    monkeypatch.setattr(captions, "find_captions", asked[0])
    monkeypatch.setattr(caption, "find_captions", asked[1])
    call("eval", "--data_folder", data, "--beam_sizes", "2", "--workers", "0", *options)
    call("caption", "--img", next((data / "demo").glob("*.png")), "--no_attention", *options)
    numbers = {"max_len": 7, "length_penalty": 0.5, "no_repeat_ngram": 3}
    expected = Search(2, **numbers, no_unk=True, no_repeat_words=True, hard_attention=True)
    found = [find.call_args.args[3] for find in asked]
    assert found == [expected, replace(expected, beam_size=5)]
    args = eval_script.get_args("--sample --temperature 2 --top_p 0.5 --beam_sizes 3".split())
    expected = Search(1, sample=True, temperature=2.0, top_p=0.5)
    assert Search(*args.beam_sizes, **args.search) == expected


@pytest.mark.parametrize("name", ["unk", "repeat_words"])
def test_caption_says_unk_and_repeats_words_only_when_asked_and_eval_unless_asked(name):
    for module, options, default in ((caption, ["--img", "x"], True), (eval_script, [], False)):
        for more, expected in ([], default), ([f"--{name}"], False), ([f"--no_{name}"], True):
            args = module.get_args([*options, *more])
            assert search_options(args)[f"no_{name}"] is expected


def test_options_from_a_checkpoint_are_defaults_that_the_command_line_overrides():
    options = {"epochs": 7, "decoder_lr": 1, "emb_dim": None, "amp": None, "unknown": object()}
    args = train.get_args(["--epochs", "9"], "x.pth.tar", options)
    assert (args.epochs, args.decoder_lr, args.emb_dim, args.dropout) == (9, 1, None, 0.5)
    assert not hasattr(args, "unknown")
