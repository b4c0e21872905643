"""train.py and eval.py as a user runs them, on a tiny data set."""

import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from factories import ENCODER, NAME, write_scenes

import eval as evaluation
import train
from modeling.sampling import most_likely_location
from models import Encoder
from preprocessing.demo import make_demo
from preprocessing.input_files import create_input_files
from training import engine as epochs
from training import losses as objectives
from training import run as runs
from training.interrupts import leave_signals_to_parent
from training.losses import doubly_stochastic_loss
from utils import Distributed

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--decoder_dim", "32", "--attention_dim", "16", "--emb_dim", "8", "--workers", "0",
         "--device", "cpu", "--decoder_lr", "5e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """22 training, 6 validation and 6 test scenes, features cached by the first run."""
    return write_scenes(tmp_path_factory.mktemp("data"), 22, 6, 6)


def train_args(data, folder, *options):
    return ["--data_folder", str(data), "--checkpoint_folder", str(folder), *ENCODER, *SMALL,
            *options]


def load(folder, prefix=""):
    return torch.load(Path(folder) / f"{prefix}checkpoint_{NAME}.pth.tar", weights_only=True)


def rows(folder):
    lines = (Path(folder) / f"log_{NAME}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same(a, b):
    """Bit for bit, through dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run_script(script, *args, processes=1):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--master_port=0", "--standalone"]
    return subprocess.run([*command, ROOT / script, *map(str, args)], capture_output=True,
                          text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_resumed_run_equals_uninterrupted(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(train_args(data, whole, "--epochs", "4"))
    train.main(train_args(data, parts, "--epochs", "2"))
    half = load(parts)
    # Only what differs is said again: the run's own options come from its checkpoint.
    train.main(["--checkpoint_folder", str(parts), "--resume", "--epochs", "4"])  # on its device
    a, b = load(whole), load(parts)
    for key in ("encoder", "decoder", "optimizer", "progress", "bleu4"):
        assert same(a[key], b[key]), key
    assert not same(half["decoder"], b["decoder"])
    timeless = [{k: v for k, v in row.items() if "second" not in k} for row in rows(whole)]
    assert [row["epoch"] for row in timeless] == [1, 2, 3, 4]
    assert timeless == [{k: v for k, v in row.items() if "second" not in k} for row in rows(parts)]


def signal_at(monkeypatch, call, signum, function="_set_learning_rate"):
    """Send this process a signal at the call-th call of a function of train.py or epochs.py."""
    module = train if hasattr(train, function) else epochs
    original, calls = getattr(module, function), itertools.count(1)

    def with_signal(*args, **kwargs):
        if next(calls) == call:
            signal.raise_signal(signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, with_signal)


@pytest.mark.parametrize("call, signum, function, options", [
    (1, "SIGTERM", "_set_learning_rate", []),
    (2, "SIGINT", "doubly_stochastic_loss", []),  # in a validation
    (6, "SIGINT", "_set_learning_rate", ["--workers", "2", "--cache_in", "disk"]),
    (2, "SIGTERM", "validate", ["--save_minutes", "0"]),  # which checks, then begins
    (5, "SIGTERM", "clip_grad_value_", ["--single_captions", "--no-cache_features"]),
    (3, "SIGINT", "clip_grad_value_", ["--amp", "fp16", "--decay_after", "1"]),
    (3, "SIGINT", "clip_grad_value_", ["--fine_tune_encoder", "--ema", "0.9"]),
    (2, "SIGINT", "epoch_done", []),
    (6, "SIGINT", "clip_grad_value_", ["--ema", "0.9", "--cosine", "--accumulate", "2"]),
    (7, "SIGTERM", "clip_grad_value_", ["--attention", "hard", "--sampling_max", "0.5",
                                        "--sampling_step", "0.3", "--sampling_every", "1"]),
], ids=str)
def test_a_run_stopped_by_a_signal_goes_on_bit_for_bit(
        data, tmp_path, monkeypatch, call, signum, function, options):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--epochs", "3", "--batch_size", "30", *options]
    train.main(train_args(data, whole, *options))
    with monkeypatch.context() as patched:
        signal_at(patched, call, getattr(signal, signum), function)
        with pytest.raises(train.Interrupted) as stopped:
            train.main(train_args(data, parts, *options))
    assert stopped.value.code == 128 + getattr(signal, signum)
    last = parts / f"checkpoint_{NAME}.pth.tar"
    assert str(stopped.value).endswith(f"go on with: python train.py --resume {last}")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train.main(["--checkpoint_folder", str(parts), "--resume", "--workers", "1"])
    a, b = load(whole), load(parts)
    for key in ("encoder", "decoder", "trained", "optimizer", "scaler", "bleu4"):
        assert same(a[key], b[key]), key
    assert same(load(whole, "BEST_")["decoder"], load(parts, "BEST_")["decoder"])
    timeless = [[{k: v for k, v in row.items() if "second" not in k} for row in rows(folder)]
                for folder in (whole, parts)]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 3


def test_a_second_signal_does_not_cost_the_save_that_the_first_began(data, tmp_path, monkeypatch):
    save, steps = train.checkpoints.save, []

    def impatient(*args, progress, **kwargs):
        steps.append(progress["step"])
        if len(steps) == 1:
            monkeypatch.setattr("training.interrupts.time.monotonic", lambda: 1e9)  # much later
            signal.raise_signal(signal.SIGINT)
        save(*args, progress=progress, **kwargs)

    monkeypatch.setattr(train.checkpoints, "save", impatient)
    signal_at(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(train.Interrupted, match="after 3 of 4 batches, all saved"):
        train.main(train_args(data, tmp_path, "--epochs", "3", "--batch_size", "30"))
    assert steps == [3] and load(tmp_path)["progress"]["step"] == 3


def test_a_failed_validation_leaves_the_epoch_saved(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(train, "validate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    assert load(tmp_path)["progress"]["step"] == 4
    train.main(["--checkpoint_folder", str(tmp_path), "--resume"])
    assert [row["epoch"] for row in rows(tmp_path)] == [1]


def test_a_second_phase_is_what_resume_goes_on_with_from_its_start(data, tmp_path, monkeypatch):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(["--data_folder", str(data), "--checkpoint_folder", str(tmp_path),
                    "--checkpoint", str(tmp_path / f"BEST_checkpoint_{NAME}.pth.tar"),
                    "--fine_tune_encoder", "--device", "cpu", "--workers", "0"])
    assert load(tmp_path)["options"]["fine_tune_encoder"]
    assert [row["epoch"] for row in rows(tmp_path)] == [1]
    monkeypatch.undo()
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 1, 2]  # of both phases


def test_a_phase_of_a_model_elsewhere_replaces_a_run_only_if_told_to(data, tmp_path):
    for folder in ("one", "two"):
        train.main(train_args(data, tmp_path / folder, "--epochs", "1"))
    before = {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    phase = train_args(data, tmp_path / "two", "--epochs", "1", "--checkpoint",
                       str(tmp_path / "one" / f"BEST_checkpoint_{NAME}.pth.tar"))
    with pytest.raises(train.UserError, match="two.*is of an earlier run; pass"):
        train.main(phase)
    assert before == {path: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    train.main([*phase, "--overwrite"])
    assert len(rows(tmp_path / "two")) == 1 and load(tmp_path / "two")["progress"]["rows"] == 0


def test_a_run_that_cannot_begin_leaves_the_one_before(data, tmp_path, monkeypatch):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(train.UserError, match="gone.txt"):
        train.main(train_args(data, tmp_path, "--overwrite", "--embeddings", "gone.txt"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(train.UserError, match="--tensorboard needs a package"):
        train.main(train_args(data, tmp_path, "--overwrite", "--tensorboard"))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_two_runs_do_not_train_in_one_folder(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args: subprocess.run(
        [sys.executable, "-c", f"""if True:
            import sys; sys.path.insert(0, {str(ROOT)!r})
            from training import run as runs; from argparse import Namespace
            one = Namespace(is_main=True, checkpoint_folder={str(tmp_path)!r}, data_name={NAME!r})
            original = runs.exclusive_lock
            runs.exclusive_lock = lambda path, busy, timeout: original(path, busy, 0.1)
            try:
                with runs.lock_run(one, one): print("both")
            except runs.UserError as error: print(error)
        """], stdout=(tmp_path / "said").open("w"), check=True))
    train.main(train_args(data, tmp_path))
    assert f"another run of {NAME} is training in" in (tmp_path / "said").read_text()
    assert not list(tmp_path.glob(".train*"))


def test_references_that_are_broken_are_said_before_the_first_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_one_epoch", lambda *args: 1 / 0)
    path = data / f"VAL_REFERENCES_{NAME}.json"
    whole = path.read_text()
    try:
        path.write_text("[{")
        with pytest.raises(train.UserError, match="broken JSON"):
            train.main(train_args(data, tmp_path))
    finally:
        path.write_text(whole)


def test_what_is_saved_within_an_epoch_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    """As after SIGKILL: the last checkpoint is all that is left."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saved = []

    def keep(path, *args, **kwargs):
        checkpoints_save(path, *args, **kwargs)
        saved.append((Path(path).read_bytes(), kwargs["progress"]["step"]))

    checkpoints_save = train.checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(train.checkpoints, "save", keep)
        train.main(train_args(data, whole, "--epochs", "1", "--batch_size", "30",
                              "--save_minutes", "0"))
    # Four batches, the last before validation; then the best and the last checkpoint.
    assert [step for _, step in saved] == [1, 2, 3, 4, 0, 0]
    parts.mkdir()
    for content, step in saved[:4]:
        (parts / f"checkpoint_{NAME}.pth.tar").write_bytes(content)
        train.main(["--checkpoint_folder", str(parts), "--resume"])
        for key in ("decoder", "optimizer"):
            assert same(load(whole)[key], load(parts)[key]), step


def test_workers_heed_no_signals_but_their_parents():
    def serve(ready):
        leave_signals_to_parent()
        ready.send(1)
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready, sender = context.Pipe(False)
    worker = context.Process(target=serve, args=(sender,))
    worker.start()
    ready.recv()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)  # another process's
    subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
    worker.join(1)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("signum", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_script_with_the_command_that_goes_on(data, tmp_path, signum):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *train_args(data, tmp_path, "--epochs", "1000")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("epoch   1")
    process.send_signal(getattr(signal, signum))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + getattr(signal, signum)
    [line] = errors.splitlines()
    assert line.startswith("train.py: stopped in epoch ") and line.endswith(
        f"all saved; go on with: python train.py --resume {tmp_path}/checkpoint_{NAME}.pth.tar")


@pytest.mark.parametrize("options", [
    ["--attention", "hard"], ["--sampling_max", "0.5", "--sampling_every", "1"],
    ["--self_critical"]], ids=" ".join)
def test_weights_that_are_not_finite_end_every_objective_in_one_line(
        data, tmp_path, monkeypatch, options):
    train.main(train_args(data, tmp_path / "1", "--epochs", "2"))
    if "--self_critical" in options:
        options = [*options, "--checkpoint", str(tmp_path / "1" / f"checkpoint_{NAME}.pth.tar")]
    clip, calls = epochs.clip_grad_value_, itertools.count(1)

    def lose(parameters, *args):
        clip(parameters, *args)
        if next(calls) == 4:  # the first batch of the second epoch
            parameters[0].grad.fill_(math.nan)

    monkeypatch.setattr(epochs, "clip_grad_value_", lose)
    monkeypatch.setattr(epochs, "validate", lambda *args: {"bleu4": 1.0, "cider_d": 1.0})
    with pytest.raises(train.UserError, match="epoch 2, batch .: .* is not finite"):
        train.main(train_args(data, tmp_path / "2", "--epochs", "3", "--batch_size", "40",
                              *options))


def test_a_run_of_before_cider_d_could_decide_is_resumed(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    for new in ("trained", "baseline"):
        checkpoint.pop(new, None), checkpoint["progress"].pop(new, None)
    for option in ("attention", "self_critical", "ema", "cosine", "augment"):
        checkpoint["options"].pop(option)
    checkpoint["progress"]["best_bleu4"] = checkpoint["progress"].pop("best") + 50
    torch.save(checkpoint, path)
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert load(tmp_path)["progress"]["best"] >= 50 and load(tmp_path)["progress"]["epoch"] == 2


@pytest.mark.parametrize("options, message", [
    ({"self_critical": True, "single_captions": True}, "--single_captions is of training on true"),
    ({"attention": "purple"}, "--attention is 'purple', not one of soft, hard"),
    ({"ema": 0.5}, "it lacks the weights that its average is of"),
    ({"cosine": True, "batch_size": 40}, "was run with batch_size 40, which a resumed run keeps"),
    ({"cosine": True}, "was run with epochs 1, which a resumed run keeps"),
    ({"embeddings": "glove.txt"}, "was run with embeddings glove.txt, which a resumed run keeps"),
])
def test_a_run_with_options_that_do_not_go_together_is_one_line(data, tmp_path, options, message):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["options"] |= options
    torch.save(checkpoint, path)
    with pytest.raises(train.UserError, match=message) as error:
        train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2",
                    *["--batch_size", "80"] * ("batch_size" in options),
                    *["--embeddings", "other.txt"] * ("embeddings" in options)])
    assert "\n" not in str(error.value)


def test_each_option_reaches_its_objective(data):
    """Numbers that all differ, so that none can take another's place."""
    images = train.CaptionDataset(data, NAME, "TRAIN")

    def objective(*options):
        return vars(train._objective(train.get_args(["--alpha_c", "0.5", *options]), images))

    assert objective() == {"alpha_c": 0.5, "own": 0}
    hard = objective("--attention", "hard", "--lambda_r", "0.2", "--lambda_e", "0.3")
    assert {"alpha_c": 0.5, "lambda_r": 0.2, "lambda_e": 0.3,
            "sampled": 0.5}.items() <= hard.items()
    critical = objective("--self_critical", "--checkpoint", "x", "--samples", "3")
    assert {"alpha_c": 0.5, "samples": 3, "max_len": 50}.items() <= critical.items()


def test_schedule_is_that_of_the_options_and_the_plateau_rule_stays_out_of_it(
        data, tmp_path, monkeypatch):
    seen, clip = [], epochs.clip_grad_value_

    def keep_rate(*args):
        clip(*args)
        seen.append(optimizers[-1].param_groups[0]["lr"])

    optimizers, adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda *args, **kwargs: optimizers.append(
        adam(*args, **kwargs)) or optimizers[-1])
    monkeypatch.setattr(epochs, "clip_grad_value_", keep_rate)
    train.main(train_args(data, tmp_path, "--epochs", "3", "--batch_size", "40", "--cosine",
                          "--decay_after", "1", "--decoder_lr", "1e-9"))
    steps = len(seen)
    assert steps == 9  # 3 an epoch
    assert seen == pytest.approx([1e-9 * (0.5 + 0.5 * math.cos(math.pi * i / steps))
                                  for i in range(steps)])
    assert [row["lr"] for row in rows(tmp_path)] == pytest.approx(seen[2::3])


def test_the_baseline_of_hard_attention_is_the_same_for_one_and_two_processes(data, tmp_path):
    """With no reward and no place drawn at random: what is left is the log-probability."""
    script = tmp_path / "none_drawn.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import train; from training import losses as objectives\n"
                      "objectives.HardAttention.__init__.__defaults__ = (1e-12,)\ntrain.main()\n")
    baselines = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = run_script(script, *train_args(
            data, folder, "--epochs", "1", "--attention", "hard", "--dropout", "0", "--lambda_r",
            "0", "--batch_size", "40", "--decoder_lr", "1e-6"), processes=processes)
        assert result.returncode == 0, result.stderr
        baselines.append(load(folder)["progress"]["baseline"])
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-4)
    # About 11 words of 1 in 34 each, of which the average has seen 1 - 0.9 ** 3.
    assert -20 < baselines[0] < -6


@pytest.mark.parametrize("broken", ["loss", "weight"])
def test_a_loss_or_weight_that_is_not_finite_ends_the_run_and_touches_no_checkpoint(
        data, tmp_path, monkeypatch, broken):
    train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    calls, clip, loss = itertools.count(1), epochs.clip_grad_value_, doubly_stochastic_loss
    if broken == "weight":  # the gradient is lost in the second batch of four

        def clip_grad_value(parameters, *args):
            clip(parameters, *args)
            if next(calls) == 2:
                parameters[0].grad.fill_(math.nan)
        monkeypatch.setattr(epochs, "clip_grad_value_", clip_grad_value)
    else:
        monkeypatch.setattr(objectives, "doubly_stochastic_loss", lambda *args: loss(*args) * (
            math.inf if next(calls) == 2 else 1))
    with pytest.raises(train.UserError, match=f"epoch 2, batch 2: (the|a) {broken} is not finite"):
        train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2",
                    "--save_minutes", "0" if broken == "weight" else "10"])
    after = {path: path.read_bytes() for path in tmp_path.iterdir()}
    last = tmp_path / f"checkpoint_{NAME}.pth.tar"
    if broken == "weight":  # the first batch was saved, the second was not
        assert load(tmp_path)["progress"]["step"] == 1
        before[last] = after[last]
    assert before == after


def test_a_run_is_replaced_only_if_asked_to(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(train.UserError, match="is of an earlier run; pass --resume"):
        train.main(train_args(data, tmp_path, "--epochs", "1"))
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    train.main(train_args(data, tmp_path, "--epochs", "2", "--overwrite", "--seed", "1"))
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2]


def test_a_resumed_run_must_find_its_data_and_batches_unchanged(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        signal_at(patched, 2, signal.SIGINT)
        with pytest.raises(train.Interrupted):
            train.main(train_args(data, tmp_path, "--epochs", "1", "--batch_size", "30"))
    resume = ["--checkpoint_folder", str(tmp_path), "--resume"]
    for option in (["--batch_size", "40"], ["--seed", "3"], ["--single_captions"]):
        with pytest.raises(train.UserError, match=f"was run with {option[0][2:]} "):
            train.main([*resume, *option])
    path = tmp_path / f"checkpoint_{NAME}.pth.tar"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["data"] |= {"images": 21, "captions": "00000000"}
    torch.save(checkpoint, path)
    with pytest.raises(train.UserError, match="other data: images 21, now 22, captions 00000000, "):
        train.main(resume)
    word_map = checkpoint["word_map"]
    word_map["<unk>"], word_map["<start>"] = word_map["<start>"], word_map["<unk>"]
    del checkpoint["data"]
    torch.save(checkpoint, path)
    with pytest.raises(train.UserError, match="the word '<start>' is number 30 there and 31 here"):
        train.main(resume)


def test_options_of_every_type_are_resumed(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1", "--save_minutes", "0.5", "--dropout",
                          "0", "--alpha_c", "1", "--grad_clip", "2", "--cache_in", "ram"))
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "2"])
    assert load(tmp_path)["options"]["save_minutes"] == 0.5


def test_a_row_of_the_log_that_a_kill_cut_short_is_written_again(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "2"))
    log = tmp_path / f"log_{NAME}.jsonl"
    log.write_text(log.read_text() + '{"epoch": 3, "lr"')
    train.main(["--checkpoint_folder", str(tmp_path), "--resume", "--epochs", "3"])
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("part, change, message", [
    ("options", {"epochs": "many"}, "its option epochs is 'many'"),
    ("options", {"batch_size": [80]}, "its option batch_size is"),
    ("options", {"data_folder": None}, "its option data_folder is"),
    ("progress", {"epoch": -1}, "its progress is none of a run"),
    ("progress", {"sums": [1, 2]}, "its progress is none of a run"),
    ("progress", {"step": 999}, "999 of 2 batches are done"),
    ("optimizer", {"param_groups": []}, "does not fit this run"),
    ("optimizer", {"state": {0: {"step": "x"}}}, "does not fit this run"),
    ("optimizer", {"state": {}}, "have other sizes"),
    ("lr", "x", "has other settings"),
    ("betas", None, "has other settings"),
    ("options", {"dropout": math.nan}, "--dropout is nan"),
    ("options", {5: 5}, "its options have no names"),
    ("progress", {"best": None}, "its progress is none of a run"),
    ("data", 5, "does not say what data"),
    ("decoder_args", {"decoder_dim": 33}, "does not hold a whole model"),
    ("decoder_args", 5, "does not hold a whole model"),
    ("word_map", [], "is no word map"),
    ("word_map", {5: 5}, "is no word map"),
    ("optimizer", {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2),
                                 "exp_avg_sq": torch.zeros(2)}}}, "have other sizes"),
], ids=str)
def test_a_run_that_is_damaged_or_anybodys_is_no_traceback(data, tmp_path, part, change, message):
    if not (data / "run").exists():
        train.main(train_args(data, data / "run", "--epochs", "1"))
    checkpoint = load(data / "run")
    if part in ("lr", "betas"):
        checkpoint["optimizer"]["param_groups"][0][part] = change
    elif isinstance(change, dict):
        checkpoint[part] |= change
    else:
        checkpoint[part] = change
    torch.save(checkpoint, tmp_path / "x.pth.tar")
    with pytest.raises(train.UserError, match=message):
        train.main(["--resume", str(tmp_path / "x.pth.tar"), "--epochs", "2"])


def test_the_number_of_loading_processes_changes_nothing(data, tmp_path):
    for workers in "02":
        train.main(train_args(data, tmp_path / workers, "--epochs", "1", "--workers", workers,
                              "--cache_in", "disk"))
    assert same(load(tmp_path / "0")["decoder"], load(tmp_path / "2")["decoder"])


def test_cached_features_train_like_fresh_ones_up_to_float16(data, tmp_path):
    for name in ("--cache_features", "--no-cache_features"):
        train.main(train_args(data, tmp_path / name, "--epochs", "1", name))
    a, b = (rows(tmp_path / name)[0] for name in ("--cache_features", "--no-cache_features"))
    for key in ("train_loss", "val_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-3)
    assert not same(load(tmp_path / "--cache_features")["decoder"],
                    load(tmp_path / "--no-cache_features")["decoder"])


def test_training_overfits_eight_images_to_bleu_100(tmp_path):
    path = make_demo(tmp_path / "demo", 8, 0, 0)
    karpathy = json.loads(Path(path).read_text())
    (tmp_path / "demo" / "again").mkdir()
    for image in karpathy["images"][:8]:  # the same eight to validate on
        copy = {**image, "split": "val", "filepath": "again"}
        (tmp_path / "demo/again" / image["filename"]).write_bytes(
            (tmp_path / "demo" / image["filename"]).read_bytes())
        karpathy["images"].append(copy)
    Path(path).write_text(json.dumps(karpathy))
    create_input_files("demo", path, tmp_path / "demo", min_word_freq=0, output_folder=tmp_path,
                       workers=1)
    train.main(train_args(tmp_path, tmp_path, "--epochs", "120", "--stop_after", "120",
                          "--batch_size", "20", "--decoder_dim", "96", "--val_beam_size", "3",
                          "--dropout", "0.1"))
    best = load(tmp_path, "BEST_")
    assert best["bleu4"] == pytest.approx(100)
    assert best["bleu4"] == max(row["bleu4"] for row in rows(tmp_path))


@pytest.mark.parametrize("options", [
    ["--batch_size", "110"], ["--batch_size", "55", "--accumulate", "3"],
    ["--batch_size", "55", "--fine_tune_encoder", "--encoder_lr", "1e-2"]], ids=" ".join)
def test_two_processes_take_the_gradient_of_one_on_the_joint_batch(data, tmp_path, options):
    """
    Plain gradient steps, so weights tell gradients. 110 captions are 22 images, 11 for each
    process; 55 are 11 images, 6 and 5.
    """
    options = ["--epochs", "1", "--dropout", "0", "--decoder_lr", "1.0", *options]
    script = tmp_path / "plain_gradient.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch, train\n"
        "torch.optim.Adam = lambda groups, **_: torch.optim.SGD(groups, lr=1.0)\n"
        "train.main()\n")
    for processes in (1, 2):
        result = run_script(script, *train_args(data, tmp_path / str(processes), *options),
                            processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (load(tmp_path / n) for n in "12")
    for part in ("encoder", "decoder"):
        for name in one[part]:
            torch.testing.assert_close(one[part][name], two[part][name], rtol=1e-4, atol=1e-6)
    if "--fine_tune_encoder" in options:
        whole = Encoder(name="tf_efficientnet_lite2", weights=ENCODER[3]).state_dict()
        assert not same(one["encoder"], whole)
    a, b = rows(tmp_path / "1")[0], rows(tmp_path / "2")[0]
    for key in a:
        if "second" not in key:
            assert a[key] == pytest.approx(b[key], rel=1e-4), key


def test_parts_of_a_step_take_its_gradient(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda groups, **_: torch.optim.SGD(groups, lr=1.0))
    whole, *parts = (train_args(data, tmp_path / n, "--epochs", "1", "--dropout", "0",
                                "--batch_size", "55", "--accumulate", n)
                     for n in ("1", "2", "11"))  # a batch has 11 images
    train.main(whole)
    for options in parts:
        train.main(options)
        a, b = load(tmp_path / "1"), load(options[3])
        for name in a["decoder"]:
            torch.testing.assert_close(a["decoder"][name], b["decoder"][name], rtol=1e-4, atol=1e-6)
        a, b = rows(tmp_path / "1")[0], rows(options[3])[0]
        assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a if "second" not in k)


def test_augmented_images_are_crops_and_mirrored_only_where_no_caption_says_a_side():
    word_map = {"<pad>": 0, "left": 1, "dog": 2}
    rows, columns = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = torch.stack([rows, columns, columns]).to(torch.uint8)
    captions = torch.tensor([[[2, 2], [2, 0]], [[2, 0], [2, 1]]]).repeat(200, 1, 1)
    torch.manual_seed(0)
    crops = epochs.augment(image.expand(400, -1, -1, -1), captions, word_map)
    assert crops.shape == (400, 3, 224, 224) and crops.dtype == torch.uint8
    steps = crops[:, 1, 0].int().diff(dim=1)
    mirrored = (steps == -1).all(1)
    assert (mirrored | (steps == 1).all(1)).all() and (crops[:, 0].int().diff(dim=1) == 1).all()
    assert not mirrored[1::2].any() and 75 < mirrored[::2].sum() < 125
    for corner in (crops[:, 0, 0, 0], crops[:, 1, 0].amin(1)):
        assert set(corner.tolist()) == set(range(33))


def test_augmented_fine_tuning_goes_on_bit_for_bit_and_cached_features_are_refused(
        data, tmp_path, monkeypatch):
    with pytest.raises(train.UserError, match="--augment needs images, not cached features"):
        train.main(train_args(data, tmp_path, "--augment"))
    options = ["--fine_tune_encoder", "--augment", "--epochs", "1", "--batch_size", "30"]
    train.main(train_args(data, tmp_path / "whole", *options))
    with monkeypatch.context() as patched:
        signal_at(patched, 3, signal.SIGINT)
        with pytest.raises(train.Interrupted):
            train.main(train_args(data, tmp_path / "parts", *options))
    train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume"])
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(a["decoder"], b["decoder"]) and same(a["encoder"], b["encoder"])
    train.main(train_args(data, tmp_path / "plain", *[x for x in options if x != "--augment"]))
    assert not same(load(tmp_path / "plain")["encoder"], a["encoder"])


def test_more_parts_than_images_are_an_error(data, tmp_path):
    with pytest.raises(train.UserError, match="12 is more parts than some steps have images in a"):
        train.main(train_args(data, tmp_path, "--batch_size", "55", "--accumulate", "12"))


def test_stopped_self_critical_training_goes_on_bit_for_bit(data, tmp_path, monkeypatch):
    train.main(train_args(data, tmp_path / "1", "--epochs", "4"))
    options = ["--data_folder", str(data), "--device", "cpu", "--self_critical", "--epochs", "2",
               "--checkpoint", str(tmp_path / "1" / f"BEST_checkpoint_{NAME}.pth.tar"),
               "--batch_size", "30", "--checkpoint_folder"]
    train.main([*options, str(tmp_path / "whole")])
    with monkeypatch.context() as patched:
        signal_at(patched, 6, signal.SIGINT)
        with pytest.raises(train.Interrupted):
            train.main([*options, str(tmp_path / "parts")])
    with pytest.raises(train.UserError, match="was run with ema 0.0, which a resumed run keeps"):
        train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume", "--ema", "0.9"])
    train.main(["--checkpoint_folder", str(tmp_path / "parts"), "--resume"])
    a, b = load(tmp_path / "whole"), load(tmp_path / "parts")
    assert same(a["decoder"], b["decoder"]) and same(a["optimizer"], b["optimizer"])
    assert [row["train_reward"] for row in rows(tmp_path / "whole")] == [
        row["train_reward"] for row in rows(tmp_path / "parts")]


def test_self_critical_training_raises_the_reward_and_saves_the_best_cider_d(
        data, tmp_path, capsys):
    train.main(train_args(data, tmp_path / "1", "--epochs", "20", "--stop_after", "20"))
    capsys.readouterr()
    train.main(["--data_folder", str(data), "--checkpoint_folder", str(tmp_path / "2"), "--device",
                "cpu", "--checkpoint", str(tmp_path / "1" / f"BEST_checkpoint_{NAME}.pth.tar"),
                "--self_critical", "--epochs", "18", "--workers", "0", "--decoder_lr", "2e-3",
                "--samples", "7", "--batch_size", "30"])
    printed, figures = capsys.readouterr().out, rows(tmp_path / "2")
    rewards = [row["train_reward"] for row in figures]
    assert min(rewards[-3:]) > 1.2 * rewards[0], rewards
    assert f"epoch   1   reward {rewards[0]:.3f} in " in printed
    best = max(row["cider_d"] for row in figures)
    assert f"done after epoch 18: best validation CIDEr-D {best:.2f}, of " in printed
    assert load(tmp_path / "2")["progress"]["best"] == pytest.approx(best)
    assert {"train_reward", "cider_d", "bleu4", "val_loss"} <= figures[0].keys()
    evaluation.main(["--checkpoint_folder", str(tmp_path / "2"), "--data_folder", str(data),
                     "--split", "val", "--workers", "0", "--device", "cpu", "--beam_sizes", "1",
                     "--metrics", "CIDEr-D", "--tokens", "data"])
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["1", f"{best:.2f}"]


@pytest.mark.parametrize("options", [
    ["--attention", "hard", "--sampling_max", "0.2", "--sampling_every", "1", "--ema", "0.9"],
    ["--self_critical", "--amp", "bf16", "--samples", "3"],
    ["--self_critical", "--fine_tune_encoder", "--accumulate", "2"]],
    ids=" ".join)
def test_every_objective_trains_in_two_processes(data, tmp_path, options):
    args = train_args(data, tmp_path / "1", "--epochs", "1")
    train.main(args)
    if "--self_critical" in options:
        options = [*options, "--checkpoint", tmp_path / "1" / f"checkpoint_{NAME}.pth.tar"]
    result = run_script("train.py", *train_args(data, tmp_path / "2", "--epochs", "2", *options),
                        processes=2)
    assert result.returncode == 0, result.stderr
    figures = rows(tmp_path / "2")
    assert len(figures) == 2 and all(math.isfinite(x) for row in figures for x in row.values())
    before, after = load(tmp_path / "1")["decoder"], load(tmp_path / "2")["decoder"]
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still in ([], ["attention.full_att.bias"])  # which no softmax can feel


def test_the_average_of_the_weights_is_what_is_saved_and_validated(
        data, tmp_path, capsys, monkeypatch):
    means, step = [], torch.optim.Adam.step

    def average_by_hand(optimizer, *args, **kwargs):
        weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        means[:] = means or weights
        result = step(optimizer, *args, **kwargs)
        keep = min(0.8, (1 + len(counted)) / (10 + len(counted)))
        counted.append(1)
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            means[i] = keep * means[i] + (1 - keep) * p.detach()
        return result

    counted = []
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.Adam, "step", average_by_hand)
        train.main(train_args(data, tmp_path, "--epochs", "3", "--batch_size", "40",
                              "--ema", "0.8"))
    last = load(tmp_path)
    for ours, theirs in zip(last["decoder"].values(), means):  # no buffers: the same order
        torch.testing.assert_close(ours, theirs)
    assert not same(last["decoder"], last["trained"]["decoder"])
    assert same(last["encoder"], last["trained"]["encoder"])
    train.main(train_args(data, tmp_path / "plain", "--epochs", "3", "--batch_size", "40"))
    assert same(load(tmp_path / "plain")["decoder"], last["trained"]["decoder"])
    assert load(tmp_path / "plain")["trained"] is None
    capsys.readouterr()
    evaluation.main(["--model", str(tmp_path / f"checkpoint_{NAME}.pth.tar"), "--device", "cpu",
                     "--data_folder", str(data), "--split", "val", "--workers", "0"])
    assert float(capsys.readouterr().out.splitlines()[2].split()[4]) == pytest.approx(
        rows(tmp_path)[-1]["bleu4"], abs=0.006)


def test_scheduled_sampling_rises_by_steps_to_its_maximum(data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "train_one_epoch", lambda e, d, average, objective, *rest:
        seen.append(objective.own) or {"train_loss": 1.0, "train_seconds": 1.0})
    train.main(train_args(data, tmp_path, "--epochs", "9", "--sampling_max", "0.25",
                          "--sampling_step", "0.1", "--sampling_every", "2"))
    assert seen == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25])


def test_search_options_reach_the_search_of_both_scripts(data, tmp_path, monkeypatch, capsys):
    import caption
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    options = ["--max_len", "7", "--length_penalty", "0.5", "--no_unk", "--attention", "hard",
               "--device", "cpu", "--checkpoint_folder", str(tmp_path)]
    asked = []
    for script in (evaluation, caption):
        search = script.beam_search
        monkeypatch.setattr(script, "beam_search", lambda *args, search=search, **options: (
            asked.append(options) or search(*args, **options)))
    evaluation.main(["--data_folder", str(data), "--beam_sizes", "2", "--workers", "0", *options])
    picture = next((data / "demo").glob("*.png"))
    monkeypatch.setattr(sys, "argv", ["caption.py", "--img", str(picture), "--no_attention",
                                      *options])
    caption.main()
    for found in asked:
        assert found.pop("n_best", 1) == 1
        assert found == {"max_len": 7, "length_penalty": 0.5, "no_unk": True,
                         "hard_attention": most_likely_location}
    assert len(asked) == 2


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_trains_like_float32_and_resumes_exactly(data, tmp_path, amp):
    full, whole, parts = (tmp_path / name for name in ("full", "whole", "parts"))
    train.main(train_args(data, full, "--epochs", "2"))
    train.main(train_args(data, whole, "--epochs", "2", "--amp", amp))
    train.main(train_args(data, parts, "--epochs", "1", "--amp", amp))
    train.main(["--checkpoint_folder", str(parts), "--resume", "--epochs", "2"])
    a, b = load(whole), load(parts)
    for key in ("decoder", "optimizer", "scaler"):
        assert same(a[key], b[key]), key
    assert bool(a["scaler"]) == (amp == "fp16")
    assert {p.dtype for p in a["decoder"].values()} == {torch.float32}
    assert not same(a["decoder"], load(full)["decoder"])
    for row, expected in zip(rows(whole), rows(full)):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=0.02)


def test_two_processes_evaluate_like_one(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "6"))
    common = ["--checkpoint_folder", tmp_path, "--data_folder", data, "--device", "cpu",
              "--batch_size", "4", "--workers", "0", "--beam_sizes", "1", "3"]
    tables = []
    for processes in (1, 2):
        result = run_script("eval.py", *common, "--results", tmp_path / f"{processes}.json",
                            processes=processes)
        assert result.returncode == 0, result.stderr
        tables.append(result.stdout.replace(f"{processes}.json", ""))
    assert tables[0] == tables[1]
    assert re.search("BLEU-4 +attention", tables[0])
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in "12")
    assert [{**row, "score": 0} for row in one] == [{**row, "score": 0} for row in two]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in two], rel=1e-4)
    assert len(one) == 6 and all(len(row["references"]) == 5 for row in one)
    assert one[0].keys() == {"image_id", "filename", "caption", "score", "references"}


def test_validation_is_eval_on_the_validation_images(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "8", "--no-cache_features"))
    best = load(tmp_path, "BEST_")
    capsys.readouterr()
    evaluation.main(["--checkpoint_folder", str(tmp_path), "--data_folder", str(data), "--split",
                     "val", "--workers", "0", "--device", "cpu"])
    greedy = capsys.readouterr().out.splitlines()[2].split()
    assert greedy[0] == "1" and best["bleu4"] > 0
    assert float(greedy[4]) == pytest.approx(best["bleu4"], abs=0.006)


def test_fine_tuning_starts_from_the_checkpoint_and_trains_blocks_2_to_4_only(
        data, tmp_path, capsys):
    train.main(train_args(data, tmp_path / "1", "--epochs", "2"))
    checkpoint = tmp_path / "1" / f"BEST_checkpoint_{NAME}.pth.tar"
    train.main(["--data_folder", str(data), "--checkpoint_folder", str(tmp_path / "2"),
                "--checkpoint", str(checkpoint), "--fine_tune_encoder", "--epochs", "1",
                "--workers", "0", "--device", "cpu", "--batch_size", "55"])
    assert "start " in capsys.readouterr().out
    before, after = torch.load(checkpoint, weights_only=True), load(tmp_path / "2")
    assert before["encoder_args"] == after["encoder_args"]
    changed = {key.split(".")[1] + "." + key.split(".")[2]
               for key in before["encoder"]
               if not torch.equal(before["encoder"][key], after["encoder"][key])}
    assert "0.weight" not in changed  # conv_stem
    assert not any(key.startswith(("1.", "2.0", "2.1")) for key in changed)  # stride 2 and 4
    assert {"2.2", "2.3", "2.4", "2.5", "2.6", "3.weight"} <= changed
    assert not any("running" in key for key in changed)
    assert not same(before["decoder"], after["decoder"])


def test_learning_rate_decays_and_training_stops_without_improvement(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--decoder_lr", "1e-12", "--decay_after", "2",
                          "--stop_after", "5", "--lr_decay", "0.5"))
    rates = [row["lr"] for row in rows(tmp_path)]
    # The first epoch is the best; after 2 and 4 epochs without improvement the rate is halved.
    assert rates == pytest.approx([1e-12, 1e-12, 1e-12, 5e-13, 5e-13, 2.5e-13], rel=1e-6)
    assert load(tmp_path)["progress"]["stale"] == 5
    assert same(load(tmp_path, "BEST_")["progress"]["epoch"], 1)


def test_log_holds_the_figures_that_are_printed(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path, "--epochs", "2", "--tensorboard"))
    printed = capsys.readouterr().out
    for row in rows(tmp_path):
        assert f"free-running: BLEU-4 {row['bleu4']:.2f}" in printed
        assert all(math.isfinite(value) for value in row.values())
        assert {"train_loss", "val_loss", "val_top5", "teacher_forced_bleu4", "bleu1",
                "captions_per_second", "lr"} <= row.keys()
    assert list((tmp_path / f"tensorboard_{NAME}").glob("events*"))


def test_pretrained_embeddings_are_used_and_stay_fixed_if_told_to(data, tmp_path):
    word_map = json.loads((data / f"WORDMAP_{NAME}.json").read_text())
    glove = tmp_path / "glove.txt"
    glove.write_text("red 1 2 3 4\nnowhere 5 5 5 5\ncircle -1 0 1 0.5\n")
    common = train_args(data, tmp_path, "--epochs", "1", "--embeddings", str(glove))
    common.remove("--emb_dim")
    common.remove("8")
    train.main([*common, "--no-fine_tune_embeddings"])
    fixed = load(tmp_path)["decoder"]["embedding.weight"]
    assert fixed.shape == (len(word_map), 4)
    assert fixed[word_map["red"]].tolist() == [1, 2, 3, 4]
    assert fixed[word_map["circle"]].tolist() == [-1, 0, 1, 0.5]
    train.main([*common, "--overwrite"])
    tuned = load(tmp_path)["decoder"]["embedding.weight"]
    assert not torch.equal(fixed, tuned)


def test_single_captions_train_too(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1", "--single_captions",
                          "--batch_size", "16"))
    train.main(train_args(data, tmp_path / "by_image", "--epochs", "1", "--batch_size", "16"))
    one, other = rows(tmp_path)[0], rows(tmp_path / "by_image")[0]
    assert one["train_loss"] != other["train_loss"]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.2)


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


def test_a_checkpoint_that_differs_from_the_options_says_in_what(data, tmp_path):
    train.main(train_args(data, tmp_path, "--epochs", "1"))
    checkpoint = str(tmp_path / f"checkpoint_{NAME}.pth.tar")
    with pytest.raises(train.UserError, match="decoder_dim 32, not 64"):
        train.main(["--data_folder", str(data), "--checkpoint", checkpoint, "--decoder_dim", "64"])
    for option in (["--decoder_lr", "1"], ["--fine_tune_encoder"]):
        with pytest.raises(train.UserError, match="for a new phase pass --checkpoint"):
            train.main(["--resume", checkpoint, *option])
    with pytest.raises(train.UserError, match="leave --embeddings out"):
        train.main(["--data_folder", str(data), "--checkpoint", checkpoint, "--embeddings", "x"])


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


@pytest.mark.parametrize("world, local, command", [
    (1, None, "python train.py"),
    (4, "4", "torchrun --nproc_per_node=4 train.py"),
    (8, "4", "torchrun --nproc_per_node=4 --nnodes=2 --rdzv_backend=c10d "
             "--rdzv_endpoint=HOST:PORT train.py"),
])
def test_the_command_that_goes_on_starts_as_many_processes(monkeypatch, world, local, command):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local:  # what torchrun tells each of its processes
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    args = train.get_args(["--checkpoint_folder", "my runs"])
    assert runs.resume_command(args, "x", Distributed(torch.device("cpu"), 0, world)) == (
        f"{command} --resume 'my runs/checkpoint_x.pth.tar'")


def test_options_are_not_abbreviated():
    with pytest.raises(train.UserError, match="unrecognized arguments: --lr 3"):
        train.get_args(["--lr", "3"])


def test_a_phase_in_a_folder_of_its_own_begins_with_the_best_model_known(data, tmp_path, capsys):
    train.main(train_args(data, tmp_path / "one", "--epochs", "3"))
    best = tmp_path / "one" / f"BEST_checkpoint_{NAME}.pth.tar"
    # So small a rate that no epoch is better.
    train.main(train_args(data, tmp_path / "two", "--epochs", "1", "--checkpoint", str(best),
                          "--decoder_lr", "1e-12"))
    assert same(*(load(tmp_path / folder, "BEST_")["decoder"] for folder in ("one", "two")))
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("done after epoch 1: best validation BLEU-4 ") and printed.endswith(
        f"of the model that the phase began with, in {tmp_path / 'two' / best.name}")
