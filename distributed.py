"""One process or several: `torchrun --nproc_per_node=K train.py` starts K of them."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from files import UserError


class Processes(NamedTuple):
    device: torch.device
    rank: int  # of this process; rank 0 prints and writes
    world: int  # how many there are

    @property
    def first(self):
        return self.rank == 0

    def print(self, *args):
        if self.first:
            print(*args, flush=True)

    def gather(self, items):
        """The items of all processes in one list, rank by rank, in every process."""
        if self.world == 1:
            return list(items)
        shares = [None] * self.world
        dist.all_gather_object(shares, list(items))
        return [item for share in shares for item in share]

    def sum(self, *numbers):
        """Each number summed over all processes, float64 precision."""
        if self.world == 1:
            return numbers
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self):
        if self.world > 1:
            dist.barrier()


def find_device(name=None):
    """
    torch.device by its name, by default the GPU if there is one; UserError if it isn't there.
    From here on torch computes as all our scripts do.
    """
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; nothing on others
    # Numbers below 1e-38 are 0: sharp attention is full of them, and they cost a CPU 10 times
    # as long as others.
    torch.set_flush_denormal(True)
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from None


def start(device=None):
    """
    Join the processes that torchrun started, or be the only one. device: "cuda", "cuda:1",
    "cpu", ...; the GPU if there is one by default. Under torchrun each process takes its own.
    """
    device = find_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes(device, 0, 1)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{world} processes, but {torch.cuda.device_count()} GPUs; lower "
                            f"--nproc_per_node or pass --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Rank 0 may take long over the feature cache while the others wait.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=timedelta(hours=4))
    return Processes(device, rank, world)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
