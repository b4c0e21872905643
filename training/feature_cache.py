"""
Cached features of a frozen encoder: each image is encoded once for all epochs and captions, and
its features are kept on disk, in RAM or on the GPU.
"""

import copy
import hashlib
import os
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from datasets import open_hdf5, writing_hdf5
from modeling.backbones import fold_batchnorm
from utils import UserError

# Of an image file, for its fingerprint; a file of up to 64 MB is read whole
SAMPLES, SAMPLE_BYTES = 1024, 1 << 16
SAVE_SECONDS = 10  # of work, the maximum lost if the process is killed


def cache_features(dataset, encoder, device, amp=None, batch_size=32, folder=None):
    """
    Encode each image of the dataset and write the encoder's `cells` to an HDF5 file in a folder, by
    default that of its images: "features" (I, G, E) float16. Returns the file's path.

    The name contains a hash of the image file's content, the encoder, its weights and amp (see
    modeling.devices.autocast), so a cache is never used for other images or another encoder; a
    complete one is used again, also after both files were copied. The work of an interrupted call
    is kept, and the next call continues it.
    Raises UserError if the file cannot be written, another process is writing it, or a feature is
    too large for float16.
    """
    path = _cache_path(dataset, encoder, amp, folder)
    if path.exists():
        if _count_done(path, dataset, encoder) is None:
            raise UserError(f"{path} is damaged; delete it, and it will be made again")
        return path
    images, folded = copy.copy(dataset), copy.deepcopy(encoder)
    images.by_image = True
    fold_batchnorm(folded.resnet)
    unfinished = path.with_name(f".unfinished_{path.name}")
    next_step = (
        "run the same command to continue, or pass another folder for it as --features_folder, or "
        "--no-cache_features"
    )
    try:
        with writing_hdf5(path, next_step):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write_features(unfinished, images, folded, device, batch_size)
            except UserError:  # the features written are useless
                unfinished.unlink(missing_ok=True)
                raise
            os.replace(unfinished, path)
    except BlockingIOError:  # HDF5 locks a file while it is written
        raise UserError(
            f"{path} is being written by another process; wait for it, or pass --no-cache_features"
        ) from None
    return path


def _count_done(path, dataset, encoder):
    """How many images' features the file has; None if missing, damaged or of another data set."""
    try:
        with open_hdf5(path) as file:
            features, done = file["features"], int(file.attrs.get("done", 0))
            count, _, width = features.shape
            valid = (count, width) == (dataset.num_images, encoder.encoder_dim)
            return done if valid and features.dtype == np.float16 else None
    except Exception:  # h5py raises many types for damaged files
        return None


@torch.inference_mode()
def _write_features(path, images, encoder, device, batch_size):
    """Encode the images that the file lacks; its attribute "done" counts those that it has."""
    done = _count_done(path, images, encoder)
    with h5py.File(path, "w" if done is None else "r+", locking="best-effort") as file:
        if done is None:
            shape = encoder.cells(images[np.arange(1)].images.to(device)).shape[1:]
            # Without times, the same content gives the same bytes.
            file.create_dataset("features", (len(images), *shape), np.float16, track_times=False)
            file.attrs["done"] = done = 0
        saved = time.monotonic()
        bar = tqdm(desc="encoding", unit="image", initial=done, total=len(images), disable=None)
        try:
            for i in range(done, len(images), batch_size):
                rows = np.arange(i, min(i + batch_size, len(images)))
                encoded = encoder.cells(images[rows].images.to(device)).half().cpu().numpy()
                if not np.isfinite(encoded).all():
                    raise UserError(
                        f"features of {encoder.args['name']} are too large for float16; pass "
                        f"--no-cache_features"
                    )
                file["features"][i : i + len(rows)] = encoded
                done = i + len(rows)
                bar.update(len(rows))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    _save(file, done)
                    saved = time.monotonic()
        finally:
            bar.close()
            _save(file, done)


def _save(file, done):
    """Write the rows to disk, and only then count them as done."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())
    file.attrs["done"] = done
    file.flush()


def _cache_path(dataset, encoder, amp, folder):
    digest = hashlib.sha256()
    digest.update(repr((encoder.args, amp, _fingerprint(dataset.path))).encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    stem = dataset.path.stem.replace("_IMAGES_", "_FEATURES_")
    name = f"{stem}_{encoder.args['name']}_{digest.hexdigest()[:16]}.hdf5"
    return Path(folder or dataset.path.parent) / name


def _fingerprint(path):
    """A hash of a file's size and of SAMPLES blocks spread over it, whatever its name and times"""
    size, digest = os.path.getsize(path), hashlib.sha256()
    with open(path, "rb") as file:
        for i in range(SAMPLES):
            file.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return size, digest.hexdigest()


def load_features(path, storage, device):
    """
    Cached features as training reads them: the path itself for storage "disk", a tensor (I, G, E)
    float16 in RAM for "ram" or on the device for "device". None chooses the fastest of these with
    enough free space for twice the features.
    """
    with open_hdf5(path) as file:
        features = file["features"]
        if storage is None:
            storage = _choose_storage(features.nbytes, device)
        if storage == "disk":
            return path
        tensor = torch.empty(
            features.shape, dtype=torch.float16, device=device if storage == "device" else "cpu"
        )
        for i in range(0, len(features), 256):  # in pieces: no second copy of all features
            tensor[i : i + 256] = torch.from_numpy(features[i : i + 256]).to(tensor.device)
    return tensor


def _choose_storage(size, device):
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * size:
        return "device"
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows and macOS do not say
        return "disk"
    return "ram" if free > 2 * size else "disk"
