"""A function of many items, computed by worker processes."""

import multiprocessing
import os
import signal
import threading

from torch.utils.data import DataLoader, Dataset

from datasets import load_batches
from utils import set_up_process


class _Results(Dataset):
    def __init__(self, function, items):
        self.function, self.items = function, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.function(self.items[i])


def map_in_processes(function, items, workers):
    """
    Yield function(item) of each item, in order. Fewer than 2 workers: computed in this process.
    The processes end with this one; UserError if one was killed.
    """
    options = {"num_workers": workers, "prefetch_factor": 4} if workers > 1 else {}
    # Few items at a time, since an interrupt waits for them; as lists, since tensors would be sent
    # by way of /dev/shm, which may be small.
    results = DataLoader(
        _Results(function, items),
        batch_size=4,
        collate_fn=list,
        worker_init_fn=_start_worker,
        **options,
    )
    for several in load_batches(results):
        yield from several


def _start_worker(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent handles it
    set_up_process()  # for spawned processes; forked ones have these settings already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # torch's own watchdog ends a worker only after it has sent its results, which nobody reads.
    multiprocessing.parent_process().join()
    os._exit(1)
