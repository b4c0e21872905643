"""The cache of a frozen encoder's features."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from factories import (
    IMAGES,
    TUTORIAL_CAPTIONS,
    TUTORIAL_NAME,
    R,
    needs_fork,
    refused,
    write_tutorial_files,
)

from datasets import CaptionDataset
from models import Encoder
from training import feature_cache
from training.feature_cache import cache_features, load_features
from utils import UserError

CPU = torch.device("cpu")


def encoder_of(seed):
    torch.manual_seed(seed)
    return Encoder(name="resnet18", weights="none").eval()


@pytest.fixture(scope="module")
def encoder():
    return encoder_of(0)


@pytest.fixture
def small(tmp_path):
    pixels = write_tutorial_files(tmp_path)
    return CaptionDataset(tmp_path, TUTORIAL_NAME, "TRAIN"), torch.from_numpy(pixels)


def beside(dataset):
    return set(os.listdir(dataset.path.parent))


def unfinished(path):
    return path.with_name(f".unfinished_{path.name}")


@pytest.mark.parametrize("by_image", [True, False])
def test_cached_features_equal_the_encoders_and_are_made_once(small, encoder, by_image):
    pixels, folder = small[1], small[0].path.parent
    dataset = CaptionDataset(folder, TUTORIAL_NAME, "TRAIN", by_image)
    with torch.no_grad():
        expected = encoder.cells(pixels)
    path = cache_features(dataset, encoder, "cpu", batch_size=2)
    before, files = path.stat(), beside(dataset)
    assert cache_features(dataset, encoder_of(0), "cpu") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert beside(dataset) == files and dataset.by_image == by_image
    dataset.use_features(path)
    for i in range(len(dataset)):
        features, captions, *_ = dataset[i]
        assert features.dtype == torch.float16 and features.shape == (64, 512)
        image = i if by_image else i // R
        torch.testing.assert_close(features.float(), expected[image], rtol=1e-3, atol=1e-3)
        wanted = TUTORIAL_CAPTIONS[R * i : R * i + R] if by_image else [TUTORIAL_CAPTIONS[i]]
        assert captions.tolist() == wanted


def test_other_weights_images_or_precision_have_their_own_file(small, encoder):
    dataset, _ = small
    paths = {cache_features(dataset, encoder, "cpu"), cache_features(dataset, encoder_of(1), "cpu")}
    paths.add(cache_features(dataset, encoder, "cpu", "bf16"))
    with h5py.File(dataset.path, "r+") as file:
        file["images"][0] = 0
    paths.add(cache_features(dataset, encoder, "cpu"))
    assert len(paths) == 4 and all(path.exists() for path in paths)


def test_copies_of_data_and_cache_are_used_again_whatever_their_times(small, encoder, tmp_path):
    path = cache_features(small[0], encoder, "cpu")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in filter(Path.is_file, tmp_path.iterdir()):
        (copied / file.name).write_bytes(file.read_bytes())
    dataset = CaptionDataset(copied, TUTORIAL_NAME, "TRAIN")
    before = beside(dataset)
    assert cache_features(dataset, encoder, "cpu") == copied / path.name
    assert beside(dataset) == before


def test_a_change_anywhere_in_a_small_image_file_gives_another_cache(small, encoder):
    dataset, content = small[0], bytearray(small[0].path.read_bytes())
    paths = {cache_features(dataset, encoder, "cpu")}
    for position in (len(content) // 2, len(content) - 1):  # pixels
        content[position] ^= 1
        dataset.path.write_bytes(content)
        paths.add(cache_features(dataset, encoder, "cpu"))
    assert len(paths) == 3


# Interruptions


@pytest.mark.parametrize("images, save_seconds", [(2, 10), (4, 0)])
def test_interrupted_call_is_continued_and_gives_the_same_bytes(
    small, encoder, monkeypatch, images, save_seconds
):
    dataset, calls, cells = small[0], [], Encoder.cells
    whole = cache_features(dataset, encoder, "cpu", batch_size=2)
    expected = whole.read_bytes()
    whole.unlink()

    def fail(encoder, pixels):
        calls.append(len(pixels))
        if len(calls) == 2 + images // 2:  # one image for the size, then batches of two
            raise KeyboardInterrupt
        return cells(encoder, pixels)

    files = beside(dataset)
    monkeypatch.setattr(feature_cache, "SAVE_SECONDS", save_seconds)
    monkeypatch.setattr(Encoder, "cells", fail)
    with pytest.raises(KeyboardInterrupt):
        cache_features(dataset, encoder, "cpu", batch_size=2)
    assert beside(dataset) - files == {unfinished(whole).name}
    done = sum(calls[1:-1])
    assert done == images
    del calls[:]
    monkeypatch.setattr(Encoder, "cells", lambda *x: calls.append(len(x[1])) or cells(*x))
    assert cache_features(dataset, encoder, "cpu", batch_size=2) == whole
    assert sum(calls[1:]) == IMAGES - done and whole.read_bytes() == expected
    assert beside(dataset) - files == {whole.name}


def killed_after(images, dataset, encoder):
    """Encode images one at a time, and kill the process when this many are done."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a forked process lacks the threads of its parent
        cells, calls = Encoder.cells, []
        feature_cache.SAVE_SECONDS = 0

        def die(encoder, pixels):
            calls.append(1)
            if len(calls) == images + 2:  # the first one is for the size
                os.kill(os.getpid(), signal.SIGKILL)
            return cells(encoder, pixels)

        Encoder.cells = die
        cache_features(dataset, encoder, "cpu", batch_size=1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@needs_fork
def test_a_killed_call_is_continued_where_its_counter_stands(small, encoder, monkeypatch):
    path = cache_features(small[0], encoder, "cpu", batch_size=1)
    expected, calls, cells = path.read_bytes(), [], Encoder.cells
    path.unlink()
    killed_after(3, small[0], encoder)
    assert not path.exists()
    with h5py.File(unfinished(path)) as file:
        assert file.attrs["done"] == 3
    monkeypatch.setattr(Encoder, "cells", lambda *x: calls.append(1) or cells(*x))
    assert cache_features(small[0], encoder, "cpu", batch_size=1).read_bytes() == expected
    assert len(calls) == 1 + 2 and not unfinished(path).exists()


def test_an_unfinished_file_that_is_damaged_is_started_again(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    whole = path.read_bytes()
    for damaged in (b"", b"no HDF5", whole[: len(whole) // 2]):
        unfinished(path).write_bytes(damaged)
        path.unlink()
        assert cache_features(small[0], encoder, "cpu").read_bytes() == whole
    path.unlink()
    with h5py.File(unfinished(path), "w") as file:
        file["features"] = np.zeros((2, 3, 4), np.float16)
        file.attrs["done"] = 2
    assert cache_features(small[0], encoder, "cpu").read_bytes() == whole


def test_a_cache_that_another_process_is_writing_is_left_alone(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    expected = path.read_bytes()
    shutil.move(path, unfinished(path))
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print(flush=True); input()"
    command = [sys.executable, "-c", code, str(unfinished(path))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        with pytest.raises(UserError, match="being written by another process"):
            cache_features(small[0], encoder, "cpu")
        writer.communicate(b"\n")
    assert cache_features(small[0], encoder, "cpu").read_bytes() == expected


def test_a_cache_that_is_damaged_is_named(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    path.write_bytes(path.read_bytes()[:-1000])
    refused(path, "delete it", load=lambda _: cache_features(small[0], encoder, "cpu"))
    for name in ("features", "x"):
        with h5py.File(path, "w") as file:
            file[name] = np.zeros((2, 3, 4), np.float16)
        refused(path, "delete it", load=lambda _: cache_features(small[0], encoder, "cpu"))


def test_features_too_large_for_float16_are_refused_and_leave_nothing(small, encoder, monkeypatch):
    files = beside(small[0])
    monkeypatch.setattr(encoder, "cells", lambda images: torch.full((len(images), 4, 512), 1e5))
    with pytest.raises(UserError, match="resnet18 are too large for float16"):
        cache_features(small[0], encoder, "cpu")
    assert beside(small[0]) == files


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_cannot_be_written_is_named_with_the_option_for_another(
    small, encoder, monkeypatch, number
):
    def refuse(path, mode, original=h5py.File, **options):
        if mode == "r":
            return original(path, mode, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(h5py, "File", refuse)
    with pytest.raises(UserError, match=f"{os.strerror(number)}.*--features_folder"):
        cache_features(small[0], encoder, "cpu")


def test_full_disk_is_noticed_beforehand(small, encoder, monkeypatch):
    files = beside(small[0])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="No space left.*--features_folder"):
        cache_features(small[0], encoder, "cpu")
    assert beside(small[0]) == files


def test_cache_can_be_kept_in_another_folder(small, encoder, tmp_path):
    before = beside(small[0])
    path = cache_features(small[0], encoder, "cpu", folder=tmp_path / "a" / "b")
    assert path.parent == tmp_path / "a" / "b" and path.exists()
    assert beside(small[0]) - before == {"a"}


# Reading


def test_features_are_the_same_in_every_storage(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    with h5py.File(path, "r") as file:
        expected = torch.from_numpy(file["features"][:])
    index = np.array([3, 0, 4])
    for where in ("disk", "ram", "device"):
        dataset = CaptionDataset(path.parent, TUTORIAL_NAME, "TRAIN")
        dataset.use_features(load_features(path, where, CPU))
        assert dataset.in_memory == (where != "disk")
        assert torch.equal(dataset[index][0], expected[torch.from_numpy(index)])
        assert torch.equal(dataset[2][0], expected[2])


def test_features_go_to_ram_if_it_has_space_and_stay_on_disk_otherwise(small, encoder, monkeypatch):
    path = cache_features(small[0], encoder, "cpu")
    for free, kept in ((1 << 40, True), (0, False)):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if "PAGES" in name else 1)
        assert isinstance(load_features(path, None, CPU), torch.Tensor) == kept
    monkeypatch.delattr(os, "sysconf")  # Windows does not say
    assert load_features(path, None, CPU) == path
