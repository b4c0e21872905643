"""The cache of a frozen encoder's features."""

import os
import shutil
import signal
import subprocess
import sys

import factories
import h5py
import numpy as np
import pytest
import torch
from factories import IMAGES, TUTORIAL_CAPTIONS, TUTORIAL_NAME, R, needs_fork, refused

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
    pixels = factories.write_tutorial_files(tmp_path)
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


def test_other_weights_images_or_precision_have_their_own_file(small, encoder, tmp_path):
    dataset, content = small[0], bytearray(small[0].path.read_bytes())
    path = cache_features(dataset, encoder, "cpu")
    paths = {path, cache_features(dataset, encoder_of(1), "cpu")}
    paths.add(cache_features(dataset, encoder, "cpu", "bf16"))
    for position in (len(content) // 2, len(content) - 1):  # pixels
        dataset.path.write_bytes(content[:position] + b"\1" + content[position + 1 :])
        paths.add(cache_features(dataset, encoder, "cpu"))
    assert len(paths) == 5 and all(path.exists() for path in paths)
    dataset.path.write_bytes(content)
    copy = shutil.copytree(tmp_path, tmp_path / "copy", copy_function=shutil.copyfile)
    before = set(os.listdir(copy))
    found = cache_features(CaptionDataset(copy, TUTORIAL_NAME, "TRAIN"), encoder, "cpu")
    assert found == copy / path.name and set(os.listdir(copy)) == before  # whatever its times
    elsewhere = cache_features(dataset, encoder, "cpu", folder=tmp_path / "a" / "b")
    assert elsewhere.parent == tmp_path / "a" / "b" and elsewhere.exists()
    with pytest.raises(UserError, match="/dev/null/a.*--features_folder"):
        cache_features(dataset, encoder, "cpu", folder="/dev/null/a")


@needs_fork
@pytest.mark.parametrize("end", ["an interrupt", "a kill"])
def test_an_unfinished_cache_is_continued(small, encoder, monkeypatch, end):
    path = cache_features(small[0], encoder, "cpu", batch_size=1)
    expected, calls, cells = path.read_bytes(), [], Encoder.cells
    path.unlink()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a forked process lacks the threads of its parent
        feature_cache.SAVE_SECONDS = 0 if end == "a kill" else 1000

        def stop(encoder, pixels):
            calls.append(1)
            if len(calls) == 3 + 2:  # the first one is for the size
                os.kill(os.getpid(), signal.SIGKILL if end == "a kill" else signal.SIGINT)
            return cells(encoder, pixels)

        Encoder.cells = stop
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            cache_features(small[0], encoder, "cpu", batch_size=1)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert not path.exists()
    with h5py.File(unfinished(path)) as file:
        assert file.attrs["done"] == 3
    monkeypatch.setattr(Encoder, "cells", lambda *x: calls.append(1) or cells(*x))
    assert cache_features(small[0], encoder, "cpu", batch_size=1).read_bytes() == expected
    assert len(calls) == IMAGES - 3 and not unfinished(path).exists()


def test_a_damaged_cache_is_named_and_an_unfinished_one_started_again(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    whole = path.read_bytes()
    with h5py.File(unfinished(path), "w") as file:
        file["features"] = np.zeros((2, 3, 4), np.float16)
        file.attrs["done"] = 2
    foreign = unfinished(path).read_bytes()
    for damaged in (b"", b"no HDF5", whole[:-1000], foreign):
        path.write_bytes(damaged)
        refused(path, "delete it", load=lambda _: cache_features(small[0], encoder, "cpu"))
        path.rename(unfinished(path))
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


def test_features_too_large_for_float16_are_refused_and_leave_nothing(small, encoder, monkeypatch):
    files = beside(small[0])
    monkeypatch.setattr(encoder, "cells", lambda images: torch.full((len(images), 4, 512), 1e5))
    with pytest.raises(UserError, match="resnet18 are too large for float16"):
        cache_features(small[0], encoder, "cpu")
    assert beside(small[0]) == files


def test_features_are_the_same_in_every_storage(small, encoder, monkeypatch):
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
    for free, kept in ((1 << 40, True), (0, False)):  # RAM has space, or none
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if "PAGES" in name else 1)
        assert isinstance(load_features(path, None, CPU), torch.Tensor) == kept
    monkeypatch.delattr(os, "sysconf")  # Windows does not say
    assert load_features(path, None, CPU) == path
