"""utils.py: mistakes are one line, files are written whole, and only scripts set up a process."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from factories import ROOT

import utils
from utils import Number, UserError, exclusive_lock, printable, read_json, run_script, write_json

# The settings that belong to a process, and so to the program that imports our modules.
SETTINGS = """
import contextlib, importlib, signal, warnings, torch
from PIL import Image, PngImagePlugin

def settings():
    return {
        "matmul": torch.get_float32_matmul_precision(),
        "denormals": bool(torch.tensor([1e-40]) * 1 != 0),
        "warnings": [str(entry) for entry in warnings.filters],
        "excepthook": sys.excepthook is sys.__excepthook__,
        "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
        "Pillow": [PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS],
        "streams": [(id(s), s.encoding, s.errors) for s in (sys.stdout, sys.stderr)],
    }
"""


def run_code(code, *arguments, exit_code=0):
    code = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport utils\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == exit_code, done.stderr.decode()
    return done


def test_json_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, [1])
    pytest.raises(TypeError, write_json, path, [object()])
    with pytest.raises(ValueError), utils.atomic_write(path) as temporary:
        Path(temporary).write_text("half")
        raise ValueError
    assert read_json(path) == [1] and list(tmp_path.iterdir()) == [path]
    half = "with utils.atomic_write(sys.argv[1]) as temporary:\n"
    half += "    open(temporary, 'w').write('half of a longer file')\n    os._exit(9)"
    run_code(half, path, exit_code=9)
    assert read_json(path) == [1] and len(list(tmp_path.iterdir())) == 2
    write_json(path, 2)  # and what the killed writer left is gone
    assert read_json(path) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_read_or_replaced_is_named(tmp_path):
    pytest.raises(UserError, read_json, tmp_path / "none.json").match(r"none\.json not found")
    (tmp_path / "x.json").write_text('{"a":\n]}')
    pytest.raises(UserError, read_json, tmp_path / "x.json").match(r"x\.json, line 2: broken JSON")
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", tmp_path / "pipe", tmp_path):
        pytest.raises(UserError, write_json, path, 1).match(f"{path} is not a file")
        assert not os.path.isfile(path)
        pytest.raises(UserError, read_json, path).match(f"{path} cannot be read")


def test_a_lock_is_held_by_one_process_and_is_released_with_it(tmp_path, monkeypatch):
    lock = tmp_path / "lock"
    killed = "with utils.exclusive_lock(sys.argv[1], 'busy', 0.1): os._exit(7)"
    for _ in range(2):  # that of the first, which was killed, does not hold up the second
        run_code(killed, lock, exit_code=7)
    with exclusive_lock(lock, "busy", 0.1):
        done = run_code(killed, lock, exit_code=1)
        assert done.stderr.decode().splitlines()[-1] == "utils.UserError: busy"
    assert not lock.exists()
    for error in (OSError("No locks available"), NotImplementedError("no flock")):
        monkeypatch.setattr("filelock.FileLock.acquire", Mock(side_effect=error))
        with pytest.raises(UserError, match="lock cannot be locked"):
            exclusive_lock(lock, "busy", 0.1).__enter__()


def test_every_message_is_printable_on_its_lines():
    error = UserError("a\nb \x1b[31m\ud800 \u2028", ["c\td", "é 猫"])
    assert str(error) == "a\\nb \\x1b[31m\\ud800 \\u2028\n  c\\td\n  é 猫"
    assert printable("a dog") == "a dog"
    long = str(UserError(f"x.json: {'y' * 80_000} is no word; run z", ["z" * 700, "a dog"]))
    assert long.startswith("x.json: yyy") and "y … y" in long and " is no word; run z\n" in long
    assert [len(line) for line in long.splitlines()] == [600, 600, 7]


def test_numbers_are_within_their_bounds():
    fraction, share = Number(float, minimum=0, below=1), Number(float, above=0, maximum=1)
    for kind, good, bad in (
        (utils.positive_int, ["1", "2147483647"], ["0", "-1", "2147483648", "9" * 400]),
        (Number(int, maximum=9), ["9", "-5"], ["10", "2147483648"]),
        (fraction, ["0", "0.99"], ["1", "-0.1", "nan", "inf"]),
        (share, ["1", "0.01"], ["0", "1.01", "nan"]),
    ):
        for text in good:
            assert kind(text) == float(text)
        for text in bad:
            pytest.raises(argparse.ArgumentTypeError, kind, text).match("must be ")


def test_full_memory_interrupts_and_full_disks_are_one_line(capsys, monkeypatch):
    for error, code, name in (
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), 2, "--batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), 2, "--batch_size"),
        (OSError(28, "No space left on device", "x.json\n"), 2, "No space left"),
        (OSError(36, "File name too long", "y" * 80_000), 2, "File name too long"),
        (UserError("x.json is damaged"), 2, "x.json is damaged"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        with pytest.raises(SystemExit) as end:
            run_script(Mock(side_effect=error))
        err = capsys.readouterr().err
        assert end.value.code == code and err.count("\n") == 1 and name in err and len(err) < 650
    pytest.raises(RuntimeError, run_script, Mock(side_effect=RuntimeError("a bug"))).match("a bug")
    # A closed terminal does not change the exit code.
    monkeypatch.setattr(sys, "stderr", Mock(write=Mock(side_effect=OSError(5, "I/O error"))))
    with pytest.raises(SystemExit) as end:
        run_script(Mock(side_effect=KeyboardInterrupt()))
    assert end.value.code == 130


def test_a_closed_pipe_ends_a_script_without_a_word():
    code = "import utils; utils.run_script(lambda: print('x' * 10**6))"
    command = f"'{sys.executable}' -c \"{code}\" | head -c 1"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, shell=True)
    assert (done.stdout, done.stderr) == (b"x", b"")


def test_a_script_sets_up_its_process_and_prints_utf_8_whatever_the_console_is():
    code = r"""
def main():
    found = settings()
    assert found["matmul"] == "high" and not found["denormals"] and found["excepthook"]
    assert found["Pillow"][0] == PngImagePlugin.MAX_TEXT_MEMORY
    assert all(stream[2] == "backslashreplace" for stream in found["streams"])
    assert sum("PIL" in entry or "Glyph" in entry for entry in found["warnings"]) == 2
    print("– 猫 \ud800")
    os._exit(0)  # in a log file a line is there at once
utils.run_script(main)
"""
    done = run_code(SETTINGS + code)
    assert done.stdout.split() == ["–".encode(), "猫".encode(), b"\\ud800"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_a_thread_of_a_script_has_freed_is_there_for_the_others():
    code = """
import resource, threading, numpy as np, torch
utils.set_up_process()
lock, together = threading.Lock(), threading.Barrier(8)
def read():
    together.wait()
    with lock:
        np.ones(25 << 20, np.uint8)
    together.wait()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threads = [threading.Thread(target=read) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    assert int(run_code(code).stdout) < 100  # MB


def test_importing_every_module_and_captioning_changes_no_setting_of_the_process():
    folders = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    paths = [path for folder in folders for path in folder.glob("[!_]*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(paths)]
    names.remove("hubconf")
    assert {"train", "utils", "preprocessing.images", "visualization.figures"} <= set(names)
    code = f"""
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
"""
    run_code(SETTINGS + code)
