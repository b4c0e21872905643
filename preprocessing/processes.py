"""A function of many items, computed by worker processes."""

import multiprocessing
import os
import signal
import threading

from torch.utils.data import DataLoader, Dataset

from datasets import load_batches
from utils import set_up_process

CHUNK = 4  # items that a process takes at a time; few, since an interrupt waits for them


class _Results(Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return -(-len(self.items) // CHUNK)

    def __getitem__(self, i):
        return [self.function(item) for item in self.items[i * CHUNK : (i + 1) * CHUNK]]


def map_in_processes(function, items, workers):
    """
    Yield function(item) of each item, in order. Fewer than 2 workers: computed in this process.
    The processes end with this one; UserError if one was killed.
    """
    several = workers > 1
    loader = DataLoader(
        _Results(function, items),
        batch_size=None,
        num_workers=workers if several else 0,
        collate_fn=_unchanged,  # arrays are sent through pipes, not by way of a small /dev/shm
        worker_init_fn=_start_worker,
        prefetch_factor=4 if several else None,
    )
    for results in load_batches(loader):
        yield from results


def _unchanged(results):
    return results


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent handles it
    set_up_process()  # for spawned processes; forked ones have these settings already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # torch's own watch ends a worker only once it has sent its results, which nobody reads.
    multiprocessing.parent_process().join()
    os._exit(1)
