"""
Features of a frozen encoder: each image is encoded once, for all epochs and all its captions,
and kept on disk, in RAM or on the GPU.
"""

import copy
import hashlib
import os
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from preprocessing.resumable_hdf5 import StagingFolder
from utils import UserError


def cache_features(dataset, encoder, device, amp=None, batch_size=32):
    """
    Encode each image of the dataset and keep the annotation vectors in an HDF5 file beside its
    images: "features" (I, G, E) float16. Returns the file's path.

    The name carries a hash of the image file's state, of the encoder and its weights and of
    amp (see utils.autocast), so a cache never serves other images or another encoder; a complete
    one is used again. What an interrupted call has encoded is kept, and the next one goes on.
    Raises UserError if the disk is too small, a feature too large for float16, or another process
    is writing the same file.
    """
    path = _path(dataset, encoder, amp)
    staging = StagingFolder(path.parent, path.stem, path.stem, [path.name])
    if path.exists():
        _check(path, dataset.num_images, encoder)
        staging.remove()  # what a process leaves that is killed just after it has moved the file
        return path
    images = copy.copy(dataset)
    images.by_image = True
    with torch.inference_mode():
        encoded = encoder(images[np.arange(1)][0].to(device))
    staging.add("features", path.name, "features", (len(images), *encoded.shape[1:]), np.float16)
    try:
        with staging.lock(f"{path} is being written by another process; wait for it, or pass "
                          f"--no-cache_features"):
            resumed = staging.resume()
            staging.check_space(" or pass --no-cache_features")
            if not resumed:
                staging.start()
            _encode_rest(staging, images, encoder, device, batch_size)
            staging.move()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {str(error).partition(chr(10))[0]}; what is "
                        f"done is kept, the same command goes on") from None
    return path


def _encode_rest(staging, images, encoder, device, batch_size):
    """Encode the images that are not done yet."""
    [file], done = staging.arrays.values(), staging.done["features"]
    bar = tqdm(total=len(images), initial=done, desc=f"encoding {Path(file.path).stem}",
               unit="image", disable=None)
    try:
        with bar, torch.inference_mode():
            for i in range(done, len(images), batch_size):
                rows = np.arange(i, min(i + batch_size, len(images)))
                encoded = encoder(images[rows][0].to(device)).half().cpu().numpy()
                if not np.isfinite(encoded).all():
                    staging.remove()
                    raise UserError(f"features of {encoder.args['name']} are too large for "
                                    f"float16; pass --no-cache_features")
                file.write(i, encoded)
                staging.advance("features", i + len(rows))
                bar.update(len(rows))
    finally:
        staging.save()


def _check(path, images, encoder):
    """UserError unless the file holds this encoder's features of so many images."""
    try:
        with h5py.File(path, "r") as file:
            features = file["features"]
            sound = features.dtype == np.float16 and features.ndim == 3 \
                and len(features) == images and features.shape[2] == encoder.encoder_dim
    except Exception:  # what HDF5 makes of foreign bytes is of all sorts
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; delete it, and it is made anew")


def _path(dataset, encoder, amp):
    stat, weights = os.stat(dataset.path), hashlib.sha256()
    weights.update(repr((encoder.args, amp, stat.st_size, stat.st_mtime_ns)).encode())
    for name, tensor in encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().contiguous().numpy().tobytes())
    stem = dataset.path.stem.replace("_IMAGES_", "_FEATURES_")
    return dataset.path.with_name(
        f"{stem}_{encoder.args['name']}_{weights.hexdigest()[:16]}.hdf5")


def load_features(path, where, device):
    """
    Where training reads cached features from: the path itself ("disk"), or a tensor
    (I, G, E) float16 in RAM ("ram") or on the device ("device"). None chooses the fastest that
    fits with as much room again to spare.
    """
    with h5py.File(path, "r") as file:
        features = file["features"]
        if where is None:
            where = _choose_storage(features.nbytes, device)
        if where == "disk":
            return path
        tensor = torch.empty(features.shape, dtype=torch.float16,
                             device=device if where == "device" else "cpu")
        step = max(1, (64 << 20) // max(1, features.nbytes // max(1, len(features))))
        for i in range(0, len(features), step):  # never a second copy of them all
            tensor[i:i + step] = torch.from_numpy(features[i:i + step]).to(tensor.device)
    return tensor


def _choose_storage(size, device):
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 2 * size:
        return "device"
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not tell
        return "disk"
    return "ram" if free > 2 * size else "disk"
