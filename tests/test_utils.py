"""utils.py: read errors are one line, and files are written completely or not at all."""

import argparse
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import ROOT, restore_interrupts

import utils
from utils import (
    UserError,
    atomic_write,
    exclusive_lock,
    positive_int,
    printable,
    read_json,
    run_script,
    write_json,
)


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [object()])
    assert read_json(path) == [1] and list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_read_is_named_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.json not found"):
        read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a":\n]}')
    with pytest.raises(UserError, match=r"x\.json, line 2: broken JSON"):
        read_json(tmp_path / "x.json")


def test_two_writers_of_one_file_do_not_take_it_from_each_other(tmp_path):
    path = tmp_path / ("x" * 240)
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        Path(first).write_text("first")
        Path(second).write_text("second, which is complete first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_users_file_named_tmp_is_left_alone(tmp_path):
    (tmp_path / "x.json.tmp").write_text("mine")
    write_json(tmp_path / "x.json", 1)
    assert (tmp_path / "x.json.tmp").read_text() == "mine"


def killed_while_writing(path):
    with atomic_write(path) as temporary:
        Path(temporary).write_text("half")
        os._exit(9)


@pytest.mark.skipif(utils.fcntl is None, reason="a system without such locks")
def test_what_a_killed_writer_left_is_used_again(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_writing, args=[tmp_path / "x"]
    )
    process.start()
    process.join()
    assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "x").exists()
    write_json(tmp_path / "x", 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "x"] and read_json(tmp_path / "x") == 1


def test_files_are_written_where_there_are_no_locks(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    write_json(tmp_path / "x", 1)
    monkeypatch.setattr(utils, "fcntl", None)  # as on Windows
    write_json(tmp_path / "y", 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")]
)
def test_a_disk_without_locks_is_named_as_that(tmp_path, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    with pytest.raises(UserError, match="cannot be locked, as on some network disks"):
        with exclusive_lock(tmp_path / "lock", "busy"):
            pass


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null", "pipe", "folder"])
def test_devices_are_never_replaced_by_a_file(tmp_path, device):
    if device == "pipe":
        os.mkfifo(device := tmp_path / "pipe")
    if device == "folder":
        (device := tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="is not a file; pass another name"):
        write_json(device, 1)
    assert not os.path.isfile(device)


def test_devices_and_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for device in ("/dev/zero", tmp_path / "pipe"):
        with pytest.raises(UserError, match="cannot be read: it is not a file"):
            read_json(device)


def test_every_message_is_printable_on_its_lines():
    error = UserError("a\nb \x1b[31m\ud800 \u2028", ["c\td", "é 猫"])
    assert str(error) == "a\\nb \\x1b[31m\\ud800 \\u2028\n  c\\td\n  é 猫"
    assert printable("a dog") == "a dog"


@pytest.mark.parametrize("text", ["2147483648", "-2147483648", "9" * 400])
def test_integers_beyond_31_bits_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be at most 2147483647"):
        positive_int(text)
    assert positive_int("2147483647") == 2**31 - 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp932", "cp1252", "utf-8"])
def test_output_to_a_file_is_utf_8_whatever_the_console_is(tmp_path, encoding):
    code = "import utils; utils.run_script(lambda: print('– 猫 \\ud800'))"
    with open(tmp_path / "out", "wb") as out:
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=out,
            check=True,
            env={**os.environ, "PYTHONIOENCODING": encoding},
        )
    assert (tmp_path / "out").read_bytes().split() == ["–".encode(), "猫".encode(), b"\\ud800"]


@pytest.mark.skipif(os.name != "posix", reason="a shell")
def test_closed_output_is_no_error(tmp_path):
    code = "import utils; utils.run_script(lambda: (print(1), open('done', 'w').close()))"
    done = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried ..."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_full_memory_is_one_line_that_names_the_options(capsys, error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(fail)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1
    assert "--batch_size" in err and "--accumulate" in err
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


@pytest.mark.parametrize(
    "script", ["train", "eval", "caption", "create_input_files", "checkpoints", "visualize"]
)
def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path, script):
    for name in ("torch", "numpy", "matplotlib"):  # whichever comes first
        (tmp_path / f"{name}.py").write_text(
            "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
        )
    done = subprocess.run(
        [sys.executable, ROOT / f"{script}.py", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=restore_interrupts,
    )
    assert done.stderr == f"{script}.py: interrupted\n" and done.returncode == -signal.SIGINT
