"""The cache of a frozen encoder's features."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from factories import IMAGES, TUTORIAL_CAPTIONS, TUTORIAL_NAME, R, write_tutorial_files

from datasets import CaptionDataset
from models import Encoder
from preprocessing import feature_cache, resumable_hdf5
from preprocessing.feature_cache import cache_features, load_features
from utils import UserError, read_json

ROOT = Path(__file__).resolve().parents[2]


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
    return sorted(os.listdir(dataset.path.parent))


def test_cached_features_equal_the_encoders(small, encoder):
    dataset, pixels = small
    with torch.no_grad():
        expected = encoder.cells(pixels)
    dataset.use_features(cache_features(dataset, encoder, "cpu", batch_size=2))
    features, captions, *_ = dataset[np.arange(IMAGES)]
    assert features.dtype == torch.float16 and features.shape == (IMAGES, 64, 512)
    torch.testing.assert_close(features.float(), expected, rtol=1e-3, atol=1e-3)
    assert captions.reshape(-1, 6).tolist() == TUTORIAL_CAPTIONS


def test_cache_serves_caption_items_too(small, encoder):
    dataset, pixels = small
    by_caption = CaptionDataset(dataset.path.parent, TUTORIAL_NAME, "TRAIN", by_image=False)
    path = cache_features(by_caption, encoder, "cpu", batch_size=2)
    assert path == cache_features(dataset, encoder, "cpu") and not by_caption.by_image
    by_caption.use_features(path)
    with torch.no_grad():
        expected = encoder.cells(pixels)
    for i in range(IMAGES * R):
        features, captions, *_ = by_caption[i]
        torch.testing.assert_close(features.float(), expected[i // R], rtol=1e-3, atol=1e-3)
        assert captions.tolist() == [TUTORIAL_CAPTIONS[i]]


def test_second_call_uses_the_file_again(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    before, files = path.stat(), beside(small[0])
    assert cache_features(small[0], encoder_of(0), "cpu") == path
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino
    assert beside(small[0]) == files


def test_other_weights_and_other_images_have_their_own_file(small, encoder):
    dataset, _ = small
    paths = {cache_features(dataset, encoder, "cpu"), cache_features(dataset, encoder_of(1), "cpu")}
    with h5py.File(dataset.path, "r+") as file:
        file["images"][0] = 0
    paths.add(cache_features(dataset, encoder, "cpu"))
    assert len(paths) == 3 and all(path.exists() for path in paths)


def test_interrupted_call_leaves_no_complete_file_and_the_next_one_continues(
    small, encoder, monkeypatch
):
    dataset, calls, cells = small[0], [], Encoder.cells
    whole = cache_features(dataset, encoder, "cpu", batch_size=2)
    expected = whole.read_bytes()
    whole.unlink()

    def fail(encoder, images):
        calls.append(len(images))
        if len(calls) == 4:  # one image for the size, then batches of two
            raise KeyboardInterrupt
        return cells(encoder, images)

    files = beside(dataset)
    monkeypatch.setattr(Encoder, "cells", fail)
    with pytest.raises(KeyboardInterrupt):
        cache_features(dataset, encoder, "cpu", batch_size=2)
    [left] = set(beside(dataset)) - set(files)
    assert calls == [1, 2, 2, 1] and left == f".unfinished_{whole.stem}"
    del calls[:]
    assert cache_features(dataset, encoder, "cpu", batch_size=2) == whole
    assert calls == [1, 1] and whole.read_bytes() == expected
    assert set(beside(dataset)) - set(files) == {whole.name}


def killed_after(images, dataset, encoder):
    """Encode images one at a time, and kill the process when this many are done."""
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)  # a forked process lacks the threads of its parent
        cells, calls = Encoder.cells, []
        resumable_hdf5.SAVE_SECONDS = 0

        def die(encoder, pixels):
            calls.append(1)
            if len(calls) == images + 2:  # the first one is for the size
                os.kill(os.getpid(), signal.SIGKILL)
            return cells(encoder, pixels)

        Encoder.cells = die
        cache_features(dataset, encoder, "cpu", batch_size=1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def unfinished(path):
    return path.parent / f".unfinished_{path.stem}"


@pytest.mark.parametrize(
    "file, damage",
    [
        ("hdf5", b""),
        ("hdf5", b"no HDF5"),
        ("hdf5", "half"),
        ("hdf5", "missing"),
        ("json", "half"),
        ("json", "missing"),
    ],
)
def test_an_unfinished_file_that_is_damaged_is_started_again(small, encoder, file, damage):
    path = cache_features(small[0], encoder, "cpu")
    expected = path.read_bytes()
    path.unlink()
    killed_after(3, small[0], encoder)
    [damaged] = unfinished(path).glob(f"*.{file}")
    whole = damaged.read_bytes()
    if damage == "missing":
        damaged.unlink()
    else:
        damaged.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert cache_features(small[0], encoder, "cpu").read_bytes() == expected


def test_a_killed_process_is_resumed(small, encoder, monkeypatch):
    """SIGKILL in the middle of an image: those that were written before it count."""
    path = cache_features(small[0], encoder, "cpu", batch_size=1)
    expected, calls, cells = path.read_bytes(), [], Encoder.cells
    path.unlink()
    killed_after(3, small[0], encoder)
    assert not path.exists()
    assert read_json(unfinished(path) / "progress.json")["done"] == {"features": 3}
    monkeypatch.setattr(Encoder, "cells", lambda *x: calls.append(1) or cells(*x))
    assert cache_features(small[0], encoder, "cpu", batch_size=1).read_bytes() == expected
    assert len(calls) == 1 + 2 and not unfinished(path).exists()


def test_what_is_left_of_a_process_killed_after_its_last_step_is_removed(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    unfinished(path).mkdir()
    (unfinished(path) / "progress.json").write_text("{}")
    assert cache_features(small[0], encoder, "cpu") == path and not unfinished(path).exists()


def test_a_cache_of_earlier_versions_which_stored_progress_inside_is_used(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    with h5py.File(path, "r+") as file:
        file["done"] = np.array([IMAGES])
    before = path.read_bytes()
    assert cache_features(small[0], encoder, "cpu").read_bytes() == before
    assert load_features(path, "ram", torch.device("cpu")).shape == (IMAGES, 64, 512)


@pytest.mark.parametrize("damage", ["truncated", "other shape", "other file"])
def test_a_cache_that_is_damaged_is_named(small, encoder, damage):
    path = cache_features(small[0], encoder, "cpu")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        with h5py.File(path, "w") as file:
            file["features" if damage == "other shape" else "x"] = np.zeros((2, 3, 4), np.float16)
    with pytest.raises(UserError, match=f"{path} is damaged; delete it"):
        cache_features(small[0], encoder, "cpu")


def test_a_cache_that_another_process_is_writing_is_left_alone(small, encoder):
    path = cache_features(small[0], encoder, "cpu")
    expected = path.read_bytes()
    path.unlink()
    code = f"""
from utils import exclusive_lock
with exclusive_lock({str(unfinished(path)) + ".lock"!r}, ""):
    print(flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(UserError, match="being written by another process"):
            cache_features(small[0], encoder, "cpu")
        writer.communicate(b"\n")
    assert cache_features(small[0], encoder, "cpu").read_bytes() == expected


@pytest.mark.parametrize("where", ["disk", "ram", "device"])
def test_features_are_the_same_in_every_storage(small, encoder, where):
    path = cache_features(small[0], encoder, "cpu")
    small[0].use_features(load_features(path, where, torch.device("cpu")))
    assert small[0].in_memory == (where != "disk")
    with h5py.File(path, "r") as file:
        expected = torch.from_numpy(file["features"][:])
    index = np.array([3, 0, 4])
    assert torch.equal(small[0][index][0], expected[torch.from_numpy(index)])
    assert torch.equal(small[0][2][0], expected[2])


def test_features_go_to_ram_if_it_has_space_and_stay_on_disk_otherwise(small, encoder, monkeypatch):
    path, cpu = cache_features(small[0], encoder, "cpu"), torch.device("cpu")
    for free, kept in ((1 << 40, True), (0, False)):
        monkeypatch.setattr(os, "sysconf", lambda name, free=free: free if "PAGES" in name else 1)
        assert isinstance(load_features(path, None, cpu), torch.Tensor) == kept


def test_amp_has_a_cache_of_its_own(small, encoder):
    assert cache_features(*small[:1], encoder, "cpu") != cache_features(
        *small[:1], encoder, "cpu", "bf16"
    )


def test_features_too_large_for_float16_are_refused(small, encoder, monkeypatch):
    files = beside(small[0])
    monkeypatch.setattr(encoder, "cells", lambda images: torch.full((len(images), 4, 512), 1e5))
    with pytest.raises(UserError, match="resnet18 are too large for float16"):
        cache_features(small[0], encoder, "cpu")
    assert beside(small[0]) == files


def test_full_disk_is_refused_beforehand(small, encoder, monkeypatch):
    files = beside(small[0])
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match="free up space or pass --no-cache_features"):
        cache_features(small[0], encoder, "cpu")
    assert beside(small[0]) == files


def test_copies_of_data_and_cache_are_used_again_whatever_their_times(small, encoder, tmp_path):
    path = cache_features(small[0], encoder, "cpu")
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in tmp_path.iterdir():
        if file.is_file():
            (copied / file.name).write_bytes(file.read_bytes())
    dataset = CaptionDataset(copied, TUTORIAL_NAME, "TRAIN")
    before = beside(dataset)
    assert cache_features(dataset, encoder, "cpu") == copied / path.name
    assert beside(dataset) == before


def test_fingerprint_sees_every_block_of_a_small_file_and_the_ends_of_a_large_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_cache, "SAMPLES", 16)
    monkeypatch.setattr(feature_cache, "SAMPLE_BYTES", 64)
    for size, positions in ((1000, range(0, 1000, 7)), (5000, (0, 63, 4936, 4999))):
        content, found = bytearray(size), set()
        for position in (None, *positions):
            if position is not None:
                content[position] ^= 1
            (tmp_path / "x").write_bytes(content)
            found.add(feature_cache._fingerprint(tmp_path / "x"))
        assert len(found) == 1 + len(positions)


def test_cache_can_be_kept_in_another_folder(small, encoder, tmp_path):
    before = beside(small[0])
    path = cache_features(small[0], encoder, "cpu", folder=tmp_path / "a" / "b")
    assert path.parent == tmp_path / "a" / "b" and path.exists()
    assert set(beside(small[0])) - set(before) == {"a"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_read_only_folder_is_named_with_the_option_for_another(small, encoder, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("preprocessing.resumable_hdf5.StagingFolder.start", refuse)
    with pytest.raises(UserError, match="cannot be written: .*; pass --features_folder, a folder"):
        cache_features(small[0], encoder, "cpu")


def test_features_are_read_from_disk_where_the_system_does_not_say_its_memory(
    small, encoder, monkeypatch
):
    path = cache_features(small[0], encoder, "cpu")
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    assert load_features(path, None, torch.device("cpu")) == path
