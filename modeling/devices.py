"""The processor or GPU to compute on, random seeds, and the processes of torchrun."""

import os
import random
import sys
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from utils import AMP, UserError

TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def set_seed(seed):
    """Seed the random generators of Python, NumPy and torch (on all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def autocast(device, amp):
    """Matrix products on this device in half precision: amp is "bf16", "fp16" or None (float32)."""
    dtype = None if amp is None else getattr(torch, AMP[amp])
    return torch.autocast(device.type, dtype, enabled=amp is not None)


def find_device(name=None):
    """The torch.device, by default the GPU if there is one; UserError if it is not available."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None


class Distributed(NamedTuple):
    """One of the processes that `torchrun --nproc_per_node=K` started, or the only process."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def print(self, *args, file=None):
        if self.is_main:
            print(*args, file=file, flush=True)

    def all_gather(self, items):
        """The items of all processes in one list, rank by rank, in every process."""
        if self.world_size == 1:
            return list(items)
        shares = [None] * self.world_size
        dist.all_gather_object(shares, list(items))
        return [item for share in shares for item in share]

    def all_reduce(self, *numbers):
        """Each number summed over all processes, in float64."""
        if self.world_size == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def distributed(device=None):
    """
    `with distributed(device) as processes:` a `Distributed`, of the processes that torchrun started
    if it did. device: as in `find_device`; under torchrun each process takes its own GPU
    """
    device, world_size = find_device(device), os.environ.get("WORLD_SIZE") or "1"
    missing = ", ".join(name for name in TORCHRUN_VARIABLES if not os.environ.get(name))
    if missing or world_size == "1":
        if world_size != "1":  # batch systems set some of them
            message = f"WORLD_SIZE is {world_size}, but {missing} not set: running a single process"
            print(f"{message}; to run several, start torchrun", file=sys.stderr)
        yield Distributed(device)
        return
    try:
        world_size, rank, local_rank = (int(os.environ[name]) for name in TORCHRUN_VARIABLES[:3])
    except ValueError as error:
        names = ", ".join(TORCHRUN_VARIABLES[:3])
        raise UserError(f"{names} must be numbers: {error}; start torchrun or unset them") from None
    if device.type == "cuda":
        if local_rank >= (gpus := torch.cuda.device_count()):
            message = f"{world_size} processes, but {gpus} GPUs; lower --nproc_per_node or pass "
            raise UserError(f"{message}--device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Rank 0 may take long over the feature cache while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=4))
    try:
        yield Distributed(device, rank, world_size)
    finally:
        dist.destroy_process_group()
