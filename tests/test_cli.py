"""The options of every script: mistakes end in one line, --help shows the defaults."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from factories import ROOT
from PIL import Image

import caption
import eval as eval_script
import train
import utils
from checkpoints import PRETRAINED
from evaluation import captions
from modeling.beam_search import Search
from utils import UserError, search_options, write_json

SCRIPTS = ("create_input_files", "train", "eval", "caption", "checkpoints", "benchmark")


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main as a shell would: its exit code, stdout and stderr."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = 0
        try:
            utils.run_script(importlib.import_module(script).main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def here(data, tmp_path, monkeypatch):
    """The current folder, with the files for the mistakes below."""
    for i in range(3):
        Image.fromarray(np.full((40, 60, 3), 80 * i, np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,a dog\n")
    write_json(tmp_path / "list.json", [])
    (tmp_path / "broken.json").write_text('{"images":\n]}')
    (tmp_path / "latin.json").write_bytes("[é]".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Options, and what the one line of the error names
MISTAKES = {
    "create_input_files": [
        ("--karpathy_json none.json --image_folder empty", "none.json not found"),
        ("--karpathy_json list.json --image_folder empty", "list.json has no list 'images'"),
        ("--karpathy_json broken.json --image_folder empty", "broken.json, line 2: broken JSON"),
        ("--karpathy_json latin.json --image_folder empty", "latin.json is not UTF-8"),
        ("--karpathy_json empty --image_folder empty", "empty cannot be read: Is a directory"),
        ("--karpathy_json a --captions b", "--karpathy_json and --captions exclude each other"),
        ("--captions captions.csv", "--image_folder"),
        ("--image_size 31", "--image_size is 31, it must be at least 32 and at most 2048"),
        ("--val_fraction 1", "--val_fraction is 1.0, it must be at least 0 and below 1"),
        ("--max_len many", "--max_len: invalid int value: 'many'; --help lists the options"),
    ],
    "train": [
        ("--data_folder nowhere", "no data set in nowhere; pass the --data_folder"),
        ("--resume --checkpoint_folder empty", "no checkpoint_*.pth.tar in empty"),
        ("--resume gone.pth.tar", "gone.pth.tar not found"),
        ("--data_folder data --encoder resnet1000", "unknown encoder resnet1000"),
        ("--resume x --checkpoint y", "pass one of them"),
        ("--device gpu", "--device gpu cannot be used here"),
        ("--dropout nan", "--dropout is nan, it must be at least 0 and below 1"),
        ("--samples 1", "--samples is 1, it must be at least 2"),
        ("--self_critical", "needs a trained model to start from, --checkpoint FILE"),
        ("--cross_entropy_share 0.1", "--cross_entropy_share is for --self_critical"),
        ("--encoder_stride 8", "--encoder_stride: invalid choice: 8 (choose from 16, 32)"),
        ("--decoder_lr abc", "--decoder_lr: invalid float value: 'abc'"),
        ("--lr 3", "unrecognized arguments: --lr 3"),  # options are not abbreviated
    ],
    "eval": [
        ("--model missing.pth.tar", "missing.pth.tar not found"),
        ("--length_penalty nan", "--length_penalty is nan, it must be at least 0 and at most 10"),
        ("--beam_sizes 3 0", "--beam_sizes is 0, it must be at least 1"),
        ("--bootstrap 0", "--bootstrap is 0, it must be at least 1"),
        ("--results empty", "--results empty is not a file"),
        ("--results nowhere/r.json", "--results nowhere/r.json"),
        ("--report x.txt", "--report x.txt is a web page, its name must end in .html"),
        ("--table t.csv", "--table t.csv must end in .tex or .md"),
        ("--image_folder empty", "--image_folder is for --report"),
        ("--compare a b --report x.html", "leave --report and --results out"),
        ("--compare none.json none.json", "none.json not found; write it with eval.py --results"),
        ("--compare none.json", "--compare: expected 2 arguments"),
        ("--metrics WER", "unknown metric WER; valid ones: all, BLEU, BLEU-1"),
        ("--temperature 2", "--temperature and --top_p are for --sample"),
        ("--sample --length_penalty 1", "--length_penalty and --attention hard are not for"),
        ("--seed -1", "--seed is -1, it must be at least 0"),
        ("--seed 2147483648", "--seed is 2147483648, it must be at most 2147483647"),
    ],
    "caption": [
        ("--img nothing.jpg", "nothing.jpg not found"),
        ("--img empty", "no images in empty"),
        ("--img 0.png --n_best 6", "--n_best 6 needs --beam_size 6"),
        ("-i 0.png -b 0", "--beam_size is 0, it must be at least 1"),
        ("--img 0.png --model missing.pth.tar", "missing.pth.tar not found"),
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
    "benchmark": [
        ("--repeats 0", "--repeats is 0, it must be at least 1"),
        ("--stages dinner", "invalid choice: 'dinner'"),
    ],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_ends_in_one_line_and_exit_code_2(call, here, script):
    before = sorted(here.iterdir())
    for arguments, message in MISTAKES[script]:
        code, out, err = call(script, *arguments.split())
        *others, line = err.splitlines()
        assert code == 2 and line.startswith(f"{script}.py: ") and message in line, arguments
        # Other lines may only say which model was chosen.
        assert all(other.startswith("model: ") for other in others), arguments
        assert sorted(here.iterdir()) == before and not out, arguments


def test_a_script_in_its_own_process_ends_with_the_same_line_and_exit_code(tmp_path):
    options = ["--karpathy_json", "none.json", "--image_folder", tmp_path]
    command = [sys.executable, ROOT / "create_input_files.py", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("create_input_files.py: none.json not found")
    assert done.stderr.count("\n") == 1


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
    options = [*options.split(), "--device", "cpu", "--model", str(PRETRAINED)]
    asked = []
    for module in (captions, caption):
        find = module.find_captions

        def recorded(decoder, features, word_map, search, find=find):
            asked.append(search)
            return find(decoder, features, word_map, search)

        monkeypatch.setattr(module, "find_captions", recorded)
    eval_script.main(["--data_folder", str(data), "--beam_sizes", "2", "--workers", "0", *options])
    call("caption", "--img", next((data / "demo").glob("*.png")), "--no_attention", *options)
    expected = Search(
        2, max_len=7, length_penalty=0.5, no_unk=True, hard_attention=True, no_repeat_ngram=3
    )
    assert asked == [expected, replace(expected, beam_size=5)]
    args = eval_script.get_args("--sample --temperature 2 --top_p 0.5 --beam_sizes 3".split())
    expected = Search(1, sample=True, temperature=2.0, top_p=0.5)
    assert Search(*args.beam_sizes, **args.search) == expected


def test_caption_says_unk_only_when_asked_and_eval_unless_asked():
    for module, options, default in ((caption, ["--img", "x"], True), (eval_script, [], False)):
        for more, expected in ([], default), (["--unk"], False), (["--no_unk"], True):
            args = module.get_args([*options, *more])
            assert search_options(args)["no_unk"] is expected


def test_options_from_a_checkpoint_are_defaults_that_the_command_line_overrides():
    options = {"epochs": 7, "decoder_lr": 1, "emb_dim": None, "of_another_version": object()}
    args = train.get_args(["--epochs", "9"], "x.pth.tar", options)
    assert (args.epochs, args.decoder_lr, args.emb_dim, args.dropout) == (9, 1, None, 0.5)
    assert not hasattr(args, "of_another_version")
    with pytest.raises(UserError, match="^x.pth.tar is damaged: its option attention is 'purple'"):
        train.get_args([], "x.pth.tar", {"attention": "purple"})
