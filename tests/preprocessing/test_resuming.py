"""Runs that end before they are complete, and the runs after them."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from factories import (
    INPUT_OPTIONS,
    ONE_PER_SPLIT,
    contents,
    kill_at,
    many_entries,
    needs_fork,
    needs_signals,
    restore_interrupts,
)
from factories import karpathy_entry as entry
from factories import write_input_files as create
from factories import write_karpathy as prepare
from PIL import Image

from preprocessing import input_files, resumable_hdf5
from preprocessing.input_files import create_input_files
from preprocessing.resumable_hdf5 import ResumableHDF5
from utils import UserError, exclusive_lock, read_json

ROOT = Path(__file__).resolve().parents[2]


MIXED = [
    entry(f"{i}.png", split, captions=["a b", "b c", "c d"], imgid=i)
    for i, split in enumerate(["train", "val", "train", "test", "restval", "train"])
]


def create_killed(tmp_path, module, name, k, entries, bad=(), **options):
    """create() in a process that kills itself; returns whether it did."""
    path = prepare(tmp_path, entries, bad)

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resumable_hdf5.SAVE_SECONDS, input_files.CHUNK = 0, 1
        kill_at(module, name, k)
        create_input_files("x", path, tmp_path / "images", output_folder=tmp_path / "out",
                           **INPUT_OPTIONS | options)  # fmt: skip

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def count_reads(monkeypatch):
    paths = []

    def read(path, size, read_image=input_files.read_image):
        paths.append(Path(path).name)
        return read_image(path, size)

    monkeypatch.setattr(input_files, "read_image", read)
    return paths


def test_good_images_are_not_read_again_to_skip_the_bad_ones(tmp_path, monkeypatch):
    entries = [entry(f"{i}.png") for i in range(6)]
    with pytest.raises(UserError, match="the other images will not be read again"):
        create(tmp_path, entries, bad=["2.png"])
    paths = count_reads(monkeypatch)
    create(tmp_path, entries, bad=["2.png"], skip_bad_images=True)
    assert paths == []


@needs_fork
@pytest.mark.parametrize("module, name", [(input_files, "read_image"), (os, "replace"),
                                          (os, "remove"), (os, "fsync")])  # fmt: skip
def test_run_killed_at_any_moment_and_resumed_gives_the_same_bytes(tmp_path, module, name):
    options = {"entries": MIXED, "bad": ["2.png", "3.png"], "skip_bad_images": True}
    create(tmp_path, output="whole", **options)
    whole, k = contents(tmp_path / "whole"), 0
    while create_killed(tmp_path, module, name, k := k + (3 if name == "fsync" else 1), **options):
        left = {file for file in os.listdir(tmp_path / "out") if not file.startswith(".")}
        assert not any(file.startswith("WORDMAP") for file in left) or left == whole.keys()
        create(tmp_path, **options)
        assert contents(tmp_path / "out") == whole
        shutil.rmtree(tmp_path / "out")
    assert k > (4 if name == "remove" else 6)
    assert contents(tmp_path / "out") == whole


@needs_fork
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_reads_only_what_is_missing(tmp_path, monkeypatch, capsys, workers):
    create(tmp_path, MIXED, "whole")
    assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED)
    paths = count_reads(monkeypatch)
    create(tmp_path, MIXED, workers=workers)
    assert "4 of 6 images are already in" in capsys.readouterr().out
    assert workers or paths == ["1.png", "3.png"]  # training images come first
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@needs_fork
def test_run_for_other_images_or_options_starts_over(tmp_path, monkeypatch):
    paths = count_reads(monkeypatch)
    for options in ({"seed": 5}, {"max_len": 3}, {"entries": MIXED[::-1]}):
        assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED)
        paths.clear()
        create(tmp_path, **{"entries": MIXED} | options)
        assert len(paths) == 6
        create(tmp_path, output="whole", **{"entries": MIXED} | options)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out"), shutil.rmtree(tmp_path / "whole")


@needs_fork
def test_image_that_has_changed_since_is_read_again(tmp_path):
    path = prepare(tmp_path, MIXED)
    assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED)
    Image.new("RGB", (9, 9), "white").save(tmp_path / "images/0.png")
    create_input_files("x", path, tmp_path / "images", 2, 0, tmp_path / "out", 4, workers=0)
    with h5py.File(next((tmp_path / "out").glob("TRAIN_IMAGES*"))) as file:
        assert file["images"][0].min() == 255


def test_complete_data_set_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    create(tmp_path, ONE_PER_SPLIT)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(input_files, "read_image", None)
    create(tmp_path, ONE_PER_SPLIT)
    assert "is already complete; --overwrite makes it again" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("change", ["seed", "tutorial", "incomplete"])
def test_files_of_another_data_set_are_only_overwritten_with_overwrite(tmp_path, change):
    create(tmp_path, ONE_PER_SPLIT)
    expected, options = contents(tmp_path / "out"), {}
    if change == "seed":
        create(tmp_path, ONE_PER_SPLIT, "other", seed=5)
        expected, options = contents(tmp_path / "other"), {"seed": 5}
    elif change == "tutorial":
        with h5py.File(next((tmp_path / "out").glob("TRAIN_IMAGES*")), "r+") as file:
            del file.attrs["made_from"]
    else:
        next((tmp_path / "out").glob("VAL_CAPLENS*")).unlink()
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="TRAIN_IMAGES_x_.* already exists.* --output_folder"):
        create(tmp_path, ONE_PER_SPLIT, **options)
    assert contents(tmp_path / "out") == before
    create(tmp_path, ONE_PER_SPLIT, overwrite=True, **options)
    assert contents(tmp_path / "out") == expected


@needs_fork
def test_overwrite_starts_over_but_resumes_its_own_work(tmp_path, monkeypatch):
    create(tmp_path, MIXED)
    whole, paths = contents(tmp_path / "out"), count_reads(monkeypatch)
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 6 and contents(tmp_path / "out") == whole
    assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED, overwrite=True)
    paths.clear()
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 2 and contents(tmp_path / "out") == whole
    shutil.rmtree(tmp_path / "out")
    assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED)
    paths.clear()
    create(tmp_path, MIXED, overwrite=True)
    assert len(paths) == 6 and contents(tmp_path / "out") == whole


def disk_with(monkeypatch, images):
    usage = shutil.disk_usage("/")._replace(free=images * 3 * 256 * 256)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)


def test_too_small_disk_is_reported_before_any_image_and_leaves_nothing(tmp_path, monkeypatch):
    paths = count_reads(monkeypatch)
    disk_with(monkeypatch, 5)
    with pytest.raises(UserError, match=r"needs 0\.00 GB, 0\.00 GB are free"):
        create(tmp_path, MIXED)
    assert not paths and not contents(tmp_path / "out")


@needs_fork
def test_images_that_are_written_need_no_more_space(tmp_path, monkeypatch):
    assert create_killed(tmp_path, input_files, "read_image", 5, entries=MIXED)
    disk_with(monkeypatch, 2)
    create(tmp_path, MIXED)


def test_full_disk_keeps_the_finished_part(tmp_path, monkeypatch):
    create(tmp_path, many_entries(), "whole")

    def fail(self, row, images, write=ResumableHDF5.write, calls=[]):  # noqa: B006
        calls.append(row)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, row, images)

    monkeypatch.setattr(ResumableHDF5, "write", fail)
    with pytest.raises(UserError, match="No space left.* kept, run the same command"):
        create(tmp_path, many_entries())
    paths = count_reads(monkeypatch)
    create(tmp_path, many_entries())
    assert len(paths) == 5 and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_second_run_at_the_same_time_is_refused_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    name = "x_2_cap_per_img_0_min_word_freq"
    start = time.monotonic()
    lock = exclusive_lock(tmp_path / f"out/.unfinished_{name}.lock", "")
    with lock, pytest.raises(UserError, match="another process"):
        create(tmp_path, ONE_PER_SPLIT)
    assert time.monotonic() - start < 3
    create(tmp_path, ONE_PER_SPLIT)


def start_slow_run(tmp_path, n=40):
    """The script with two workers reading n large images, once it has begun; and its command."""
    names = [f"{i}.png" for i in range(n)]
    path = prepare(tmp_path, [entry(name) for name in names])
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / names[0], compress_level=1)
    for name in names[1:]:  # large, so that the run takes some time
        (tmp_path / "images" / name).unlink()
        os.link(tmp_path / "images" / names[0], tmp_path / "images" / name)
    command = [sys.executable, ROOT / "create_input_files.py", "--karpathy_json", path,
               "--image_folder", tmp_path / "images", "--output_folder", tmp_path / "out",
               "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=restore_interrupts,
    )
    while not list(tmp_path.glob("out/.unfinished_*/progress.json")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    return process, command


def children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def runs(pid):
    """Whether there is such a process, and it is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@needs_signals
def test_interrupt_keeps_the_finished_part_and_the_same_command_continues(tmp_path):
    process, command = start_slow_run(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("\n") == 1
    assert stderr.startswith("create_input_files.py: interrupted; ")
    assert stderr.endswith("run the same command to continue\n")
    [work] = (tmp_path / "out").iterdir()
    done = read_json(work / "progress.json")["done"]["TRAIN"]
    again = subprocess.run(command, capture_output=True, text=True)
    assert f"{done} of 40 images are already in" in again.stdout
    assert not again.returncode, again.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_killed_parent_and_a_new_run_starts_at_once(tmp_path, signum):
    process, command = start_slow_run(tmp_path, 12)
    helpers = children(process.pid)
    assert len(helpers) == 2
    process.send_signal(signum)
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 20
    while any(map(runs, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, helpers))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "images are already in" in done.stdout
