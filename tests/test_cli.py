"""The options of every script: mistakes end in one line, --help shows the defaults."""

import importlib
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from factories import NAME, ROOT, load_checkpoint, train_args
from PIL import Image

import caption
import eval as eval_script
import train
import utils
from evaluation import captions
from modeling.beam_search import Search
from utils import UserError, search_options, write_json

SCRIPTS = (
    "create_input_files",
    "train",
    "eval",
    "caption",
    "checkpoints",
    "benchmark",
)


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
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "create_input_files": [
        ("--karpathy_json none.json --image_folder empty", "none.json not found"),
        ("--karpathy_json list.json --image_folder empty", "list.json has no list 'images'"),
        ("--karpathy_json a --captions b", "--karpathy_json and --captions exclude each other"),
        ("--dataset x", "no captions given; pass --karpathy_json FILE or --captions FILE"),
        ("--captions captions.csv", "no images given; pass --image_folder FOLDER"),
        (
            "--karpathy_json list.json list.json --image_folder empty empty empty",
            "2 files of captions, but 3 image folders",
        ),
        ("--image_size 31", "--image_size is 31, it must be at least 32 and at most 2048"),
        ("--captions_per_image 0", "--captions_per_image is 0, it must be at least 1"),
        ("--val_fraction 1", "--val_fraction is 1.0, it must be at least 0 and below 1"),
        ("--max_len many", "--max_len: invalid int value: 'many'; --help lists the options"),
    ],
    "train": [
        ("--data_folder nowhere", "no data set in nowhere; pass the --data_folder of"),
        ("--resume --checkpoint_folder empty", "no checkpoint_*.pth.tar in empty"),
        ("--resume gone.pth.tar", "gone.pth.tar not found"),
        ("--data_folder data --encoder resnet1000", "unknown encoder resnet1000"),
        ("--resume x --checkpoint y", "pass one of them"),
        ("--device gpu", "--device gpu cannot be used here"),
        ("--batch_size 0", "--batch_size is 0, it must be at least 1"),
        ("--dropout nan", "--dropout is nan, it must be at least 0 and below 1"),
        ("--lr_decay -1", "--lr_decay is -1.0, it must be above 0 and at most 1"),
        ("--samples 1", "--samples is 1, it must be at least 2"),
        ("--ema 1", "--ema is 1.0, it must be at least 0 and below 1"),
        ("--sampling_max 1.5", "--sampling_max is 1.5, it must be at least 0 and at most 1"),
        ("--self_critical", "needs a trained model to start from, --checkpoint FILE"),
        (
            "--self_critical --attention hard --checkpoint x",
            "--attention is for training on true captions, which --self_critical does not use",
        ),
        ("--cross_entropy_share 0.1", "--cross_entropy_share is for --self_critical"),
        ("--cross_entropy_share 1", "--cross_entropy_share is 1.0, it must be at least 0 and"),
        (
            "--data_folder data --encoder resnet18 --encoder_weights none --encoder_stride 16",
            "--encoder_stride 16: resnet18 has 32 and cannot be dilated",
        ),
        ("--encoder_stride 8", "--encoder_stride: invalid choice: 8 (choose from 16, 32)"),
        (
            "--data_folder data --encoder_weights none --pretrain_text gone.txt",
            "gone.txt not found",
        ),
        ("--epochs x", "--epochs: invalid int value: 'x'; --help lists the options"),
        ("--lr 3", "unrecognized arguments: --lr 3"),  # options are not abbreviated
    ],
    "eval": [
        ("--model missing.pth.tar", "missing.pth.tar not found"),
        ("--length_penalty nan", "--length_penalty is nan, it must be at least 0 and at most 10"),
        ("--max_len 0", "--max_len is 0, it must be at least 1"),
        ("--beam_sizes 0", "--beam_sizes is 0, it must be at least 1"),
        ("--beam_sizes 3 0", "--beam_sizes is 0, it must be at least 1"),
        ("--results empty", "is a folder; pass a file in it"),
        ("--report x.txt", "--report x.txt: the report is a web page, its name must end in .html"),
        ("--image_folder empty", "--image_folder is for --report"),
        ("--compare a b --report x.html", "leave --report and --results out"),
        ("--metrics WER", "unknown metric WER; valid ones: all, BLEU, BLEU-1"),
        ("--seed -1", "--seed is -1, it must be at least 0"),
    ],
    "caption": [
        ("--img nothing.jpg", "nothing.jpg not found"),
        ("--img empty", "no images in empty"),
        ("--img nothing*.jpg", "no images match nothing*.jpg"),
        ("--img 0.png --n_best 6", "--n_best 6 needs --beam_size 6"),
        ("--img 0.png --beam_size 0", "--beam_size is 0, it must be at least 1"),
        ("-i 0.png -b 0", "--beam_size is 0, it must be at least 1"),
        ("--img 0.png --device abacus", "--device abacus cannot be used here"),
        ("--img 0.png --model missing.pth.tar", "missing.pth.tar not found"),
        ("--img 0.png --out 0.png", "--out 0.png is the image itself"),
        ("--img 0.png 1.png --out 2.png", "--out 2.png is a file"),
        ("--img 0.png --out x.abc", "x.abc cannot be written: Format 'abc' is not supported"),
        ("--img 0.png --out x.html --no-smooth", "--no-smooth is for pictures"),
        ("--img 0.png 1.png --out x.gif", "x.gif is one file, but there are 2 images"),
        ("--img 0.png --show --no_attention", "--no_attention leaves nothing to save or show"),
        ("--img 0.png 1.png --beam_tree t.svg", "--beam_tree is for one image"),
        ("--img 0.png --beam_tree t.png", "--beam_tree t.png must end in .svg"),
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


@pytest.mark.parametrize(
    "script, arguments, message",
    [(script, *mistake) for script in SCRIPTS for mistake in MISTAKES[script]],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(call, here, script, arguments, message):
    before = sorted(here.iterdir())
    code, out, err = call(script, *arguments.split())
    line = err.splitlines()[-1]
    assert code == 2 and line.startswith(f"{script}.py: ") and message in line
    # Other lines may only say which model was chosen.
    assert all(other.startswith("model: ") for other in err.splitlines()[:-1])
    assert set(here.iterdir()) - set(before) <= {here / "data"} and not out


def test_a_script_in_its_own_process_ends_with_the_same_line_and_exit_code(tmp_path):
    for script, options in (
        ("create_input_files", ["--karpathy_json", "none.json", "--image_folder", tmp_path]),
        ("checkpoints", ["none.json", "new"]),
    ):
        done = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"{script}.py: none.json not found")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script, defaults",
    [
        ("create_input_files", {"--captions_per_image": "5", "--dataset": "demo"}),
        ("train", {"--decoder_dim": "512", "--encoder": "resnet101", "--dropout": "0.5"}),
        ("eval", {"--batch_size": "64", "--beam_sizes": "[1, 3, 5]"}),
        ("caption", {"-b": "5", "--max_len": "50"}),
        ("checkpoints", {}),
        ("benchmark", {"--repeats": "5"}),
    ],
)
def test_help_shows_the_defaults(call, script, defaults):
    code, out, _ = call(script, "--help")
    options = {
        text.split()[0].rstrip(","): " ".join(text.split()) for text in re.split("\n  (?=-)", out)
    }
    assert code == 0 and "None" not in out and "False" not in out and "SUPPRESS" not in out
    for option, default in defaults.items():
        assert options[option].split("\n\n")[0].find(f"(default: {default})") > 0


def test_search_options_reach_the_search_of_both_scripts(data, tmp_path, monkeypatch, call):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    options = [
        "--max_len",
        "7",
        "--length_penalty",
        "0.5",
        "--no_unk",
        "--attention",
        "hard",
        "--no_repeat_ngram",
        "3",
        "--device",
        "cpu",
        "--checkpoint_folder",
        str(tmp_path),
    ]
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
    assert set(asked) == {expected, replace(expected, beam_size=5)}
    assert len(asked) == 2


@pytest.mark.parametrize(
    "script, options, expected",
    [
        ("caption", [], True),
        ("caption", ["--unk"], False),
        ("caption", ["--no_unk"], True),
        ("eval", [], False),
        ("eval", ["--no_unk"], True),
        ("eval", ["--unk"], False),
    ],
)
def test_caption_says_unk_only_when_asked_and_eval_unless_asked(script, options, expected):
    module = {"caption": caption, "eval": eval_script}[script]
    args = module.get_args([*(["--img", "x"] if script == "caption" else []), *options])
    assert search_options(args)["no_unk"] is expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dropout": float("nan")}, "its option dropout is nan, it must be at least 0 and below 1"),
        ({"epochs": "many"}, "its option epochs is 'many'"),
        ({"epochs": True}, "its option epochs is True"),
        ({"attention": "purple"}, "its option attention is 'purple'"),
        ({"tensorboard": 1}, "its option tensorboard is 1"),
        ({"data_folder": None}, "its option data_folder is None"),
    ],
)
def test_an_option_from_a_checkpoint_is_checked_like_one_from_the_command_line(options, message):
    with pytest.raises(UserError, match=f"^x.pth.tar is damaged: {message}"):
        train.get_args([], "x.pth.tar", options)


def test_options_from_a_checkpoint_are_overridden_by_the_command_line(data, tmp_path):
    options = {"epochs": 7, "decoder_lr": 1, "emb_dim": None, "of_another_version": object()}
    args = train.get_args(["--epochs", "9"], "x.pth.tar", options)
    assert (args.epochs, args.decoder_lr, args.emb_dim) == (9, 1, None)
    assert not hasattr(args, "of_another_version")
    train.main(train_args(data, tmp_path, "--epochs", "1", "--alpha_c", "0.5"))
    train.main(["--resume", str(tmp_path / f"checkpoint_{NAME}.pth.tar"), "--epochs", "2"])
    saved = load_checkpoint(tmp_path)["options"]
    assert (saved["epochs"], saved["alpha_c"], saved["decoder_lr"]) == (2, 0.5, 5e-3)
