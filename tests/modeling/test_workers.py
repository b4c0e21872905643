"""Processes that load batches: what their parent hears of them, and which signals they hear."""

import errno
import multiprocessing
import os
import resource
import subprocess
import time
from unittest.mock import Mock

import pytest
import torch
from factories import needs_fork, needs_signals
from torch.utils.data import DataLoader

from modeling.workers import SIGNALS, WorkerDied, load_batches, start_worker
from utils import UserError


class Loader(list):
    """Yields its items as a DataLoader would; an exception is raised."""

    num_workers = 1

    def __iter__(self):
        for item in super().__iter__():
            if isinstance(item, Exception):
                raise item
            yield item


def test_a_loading_process_killed_while_it_makes_or_hands_over_a_batch_is_named():
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    in_it = OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback ...")
    for error in (killed, ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError()):
        batches = load_batches(Loader([1, error]))
        assert next(batches) == 1
        with pytest.raises(WorkerDied, match="--workers"):
            next(batches)
    for other in (RuntimeError("wrong size"), in_it):  # other errors stay what they are
        with pytest.raises(type(other), match=str(other)[:9]):
            list(load_batches(Loader([other])))
    with pytest.raises(UserError, match=r"^x.hdf5: no$"):  # as torch wraps it
        list(load_batches(Loader([UserError("Traceback ...\nutils.UserError: x.hdf5: no\n")])))
    with pytest.raises(UserError, match="^x{500}$"):
        list(load_batches(Loader([UserError(f"{'Traceback ' * 99}: UserError: {'x' * 500}\n")])))


class Items(list):
    """A data set of tensors, for the second of which there is no shared memory"""

    def __getitem__(self, i):
        if i == 1:
            limit = resource.RLIMIT_FSIZE
            resource.setrlimit(limit, (3, resource.getrlimit(limit)[1]))
        return torch.zeros(10_000)


@needs_fork
def test_a_batch_that_shared_memory_does_not_take_is_an_error_of_the_parent():
    loader = DataLoader(Items([0, 1, 2]), None, num_workers=1, worker_init_fn=start_worker)
    with pytest.raises(WorkerDied, match="File too large.* shared memory .*--shm.* --workers 0"):
        list(load_batches(loader))


@needs_fork
def test_a_process_that_cannot_be_started_is_one_line(monkeypatch):
    for number, message in ((errno.EMFILE, "Too many open .* ulimit -n"), (errno.EAGAIN, "tempor")):
        monkeypatch.setattr(os, "fork", Mock(side_effect=OSError(number, os.strerror(number))))
        loader = DataLoader([1], batch_size=None, num_workers=1, worker_init_fn=start_worker)
        with pytest.raises(WorkerDied, match=f"{message}.* --workers 0"):
            list(load_batches(loader))


@needs_signals
def test_a_worker_ignores_signals_except_from_its_parent():
    def serve(ready):
        start_worker()
        ready.send(1)
        time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready, sender = context.Pipe(False)
    worker = context.Process(target=serve, args=(sender,))
    worker.start()
    ready.recv()
    for signum in SIGNALS:
        subprocess.run(["kill", f"-{signum}", str(worker.pid)], check=True)  # another process's
    worker.join(1)
    assert worker.is_alive() and len(SIGNALS) == 4
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0
