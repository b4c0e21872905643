"""utils.py: read errors are one line, and files are written completely or not at all."""

import argparse
import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factories import ROOT

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


# The settings that belong to a process, and so to the program that imports our modules.
SETTINGS = """
def settings():
    handlers = [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    streams = [(id(s), s.encoding, s.errors) for s in (sys.stdout, sys.stderr)]
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "denormals": bool(torch.tensor([1e-40]) * 1 != 0),
        "warnings": [str(entry) for entry in warnings.filters],
        "excepthook": sys.excepthook is sys.__excepthook__,
        "signals": list(map(str, handlers)),
        "Pillow": [PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS],
        "streams": streams,
    }
"""
PREAMBLE = f"""
import contextlib, importlib, signal, sys, warnings
sys.path.insert(0, {str(ROOT)!r})
import torch
from PIL import Image, PngImagePlugin
{SETTINGS}
"""


def run_code(code):
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert done.returncode == 0, done.stderr


def test_importing_every_module_and_captioning_changes_no_setting_of_the_process():
    folders = ("", "modeling", "preprocessing", "training", "evaluation", "visualization")
    names = [
        ".".join([*filter(None, [folder]), path.stem])
        for folder in folders
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem not in ("__init__", "hubconf")
    ]
    assert {"train", "utils", "preprocessing.images", "visualization.figures"} <= set(names)
    run_code(f"""
for name in ("imageio", "matplotlib", "nltk", "skimage", "timm", "torchvision"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)  # these have warnings filters of their own
before = settings()
for name in {[*names, "hubconf"]}:  # the last, since it hides the others
    importlib.import_module(name)
    assert settings() == before, name
from caption import Captioner
Captioner(device="cpu")({str(ROOT / "docs/examples/cat.jpg")!r})
assert settings() == before, [(x, y) for x, y in zip(settings().items(), before.items()) if x != y]
""")


def test_a_script_sets_up_its_process():
    run_code("""
import utils
def main():
    found = settings()
    assert found["matmul"] == "high" and not found["denormals"] and found["excepthook"]
    assert found["Pillow"][0] == PngImagePlugin.MAX_TEXT_MEMORY
    assert all(stream[1:] == ("utf-8", "backslashreplace") for stream in found["streams"])
    assert sum("PIL" in entry or "Glyph" in entry for entry in found["warnings"]) == 2
utils.run_script(main)
""")
