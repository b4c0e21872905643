"""
Cached features of a frozen encoder: each image is encoded once for all epochs and captions, and
its features are kept on disk, in RAM or on the GPU.
"""

import copy
import errno
import hashlib
import os
import shutil
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from datasets import open_hdf5, writing_hdf5
from modeling.backbones import fold_batchnorm
from utils import UserError

# Of an image file, for its fingerprint: a file of up to 64 MB is read whole.
SAMPLES, SAMPLE_BYTES = 1024, 1 << 16
SAVE_SECONDS = 10  # of work that is lost at most if the process is killed


def cache_features(dataset, encoder, device, amp=None, batch_size=32, folder=None):
    """
    Encode each image of the dataset and write the annotation vectors to an HDF5 file in a folder,
    by default that of its images: "features" (I, G, E) float16. Returns the file's path.

    The name contains a hash of the image file's content, the encoder, its weights and amp (see
    modeling.devices.autocast), so a cache is never used for other images or another encoder; a
    complete one is used again, also where both files were copied to. The work of an interrupted
    call is kept, and the next call continues it.
    Raises UserError if the file cannot be written, another process is writing it, or a feature is
    too large for float16.
    """
    path = _cache_path(dataset, encoder, amp, folder)
    if path.exists():
        _check_cache(path, dataset.num_images, encoder)
        return path
    images = copy.copy(dataset)
    images.by_image = True
    encoder = copy.deepcopy(encoder)
    fold_batchnorm(encoder.resnet)
    with torch.inference_mode():
        encoded = encoder.cells(images[np.arange(1)].images.to(device))
    unfinished = path.with_name(f".unfinished_{path.name}")
    next_step = (
        "run the same command to continue, or pass --features_folder, a folder for it, or "
        "--no-cache_features"
    )
    try:
        with writing_hdf5(path, next_step):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _open_unfinished(unfinished, (len(images), *encoded.shape[1:])) as file:
                _encode_remaining(file, images, encoder, device, batch_size)
            os.replace(unfinished, path)
    except BlockingIOError:  # HDF5 locks a file while it is written
        raise UserError(
            f"{path} is being written by another process; wait for it, or pass --no-cache_features"
        ) from None
    return path


def _open_unfinished(path, shape):
    """The file of an interrupted call; a new one if there is none, or a damaged one."""
    try:
        with open_hdf5(path) as file:
            whole = file["features"].shape == shape and 0 <= file.attrs["done"] <= shape[0]
    except (OSError, KeyError):
        whole = False
    file = h5py.File(path, "r+" if whole else "w", locking="best-effort")
    if not whole:
        # Without times, the same content gives the same bytes.
        features = file.create_dataset("features", shape, np.float16, track_times=False)
        file.attrs["done"] = 0
        if features.nbytes > shutil.disk_usage(path.parent).free:
            file.close()
            path.unlink()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return file


def _encode_remaining(file, images, encoder, device, batch_size):
    """Encode the images from file.attrs["done"] on, which counts those whose rows are written."""
    features, done, saved = file["features"], int(file.attrs["done"]), time.monotonic()
    bar = tqdm(desc="encoding", unit="image", initial=done, total=len(images), disable=None)
    try:
        with bar, torch.inference_mode():
            for i in range(done, len(images), batch_size):
                rows = np.arange(i, min(i + batch_size, len(images)))
                encoded = encoder.cells(images[rows].images.to(device)).half().cpu().numpy()
                if not np.isfinite(encoded).all():
                    os.remove(file.filename)
                    raise UserError(
                        f"features of {encoder.args['name']} are too large for float16; pass "
                        f"--no-cache_features"
                    )
                features[i : i + len(rows)] = encoded
                done = i + len(rows)
                bar.update(len(rows))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    _save(file, done)
                    saved = time.monotonic()
    finally:
        _save(file, done)


def _save(file, done):
    """Write the rows to disk, then that they are there."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())
    file.attrs["done"] = done
    file.flush()


def _check_cache(path, num_images, encoder):
    """UserError unless the file holds this encoder's features of `num_images` images."""
    try:
        with open_hdf5(path) as file:
            features = file["features"]
            count, _, width = features.shape
            valid = features.dtype == np.float16 and count == num_images
            valid = valid and width == encoder.encoder_dim
    except Exception:  # HDF5 raises many kinds for foreign bytes
        valid = False
    if not valid:
        raise UserError(f"{path} is damaged; delete it, and it will be made again")


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
    """
    A hash of a file's size and of SAMPLES blocks spread over it: the same for a copy, whatever its
    times, and another for images in another order, of another size or of other photographs.
    """
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
        step = max(1, (64 << 20) // max(1, features.nbytes // max(1, len(features))))
        for i in range(0, len(features), step):  # in pieces: no second copy of all features
            tensor[i : i + step] = torch.from_numpy(features[i : i + step]).to(tensor.device)
    return tensor


def _choose_storage(size, device):
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * size:
        return "device"
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows and macOS do not say
        return "disk"
    return "ram" if free > 2 * size else "disk"
