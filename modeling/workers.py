"""Processes of a DataLoader: how they start, end and fail; and `map_in_processes`."""

import multiprocessing
import os
import signal
import threading
from functools import partial
from multiprocessing.queues import Queue

from torch.utils.data import DataLoader

from utils import UserError, set_up_process

# These announce the end: Ctrl-C, `kill`, a closed terminal, a batch system's time limit. Windows
# lacks the last two.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]
TOO_MANY_FILES = "Too many open files"
TORCH_ERRORS = ("DataLoader worker", TOO_MANY_FILES, "Pin memory thread")  # RuntimeErrors


class WorkerDied(UserError):
    """A process that loads batches was killed, or cannot hand over a batch."""


def start_worker(_=None):
    """
    A DataLoader's worker_init_fn. The process ends with its parent, ignores signals but the
    parent's own, so that the parent can finish a step, and a batch that it cannot hand over becomes
    an error of the parent.
    """

    def exit_at_sigterm_of_parent():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    def end_with_parent():
        # torch's own watchdog ends a worker only after it has sent its results, which nobody reads.
        multiprocessing.parent_process().join()
        os._exit(1)

    Queue._on_queue_feeder_error = _send_error
    for signum in SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it says who sent a signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=exit_at_sigterm_of_parent, daemon=True).start()
    threading.Thread(target=end_with_parent, daemon=True).start()
    set_up_process()  # for spawned processes; forked ones have these settings already


def _send_error(queue, error, item):
    """In a Queue, the hook for an item that cannot be sent: its reader would wait for ever."""
    try:
        index, _ = item
        queue.put((index, _failure(str(error).partition("\n")[0])))
    except ValueError:  # bytes, of which the pipe takes no more; or the queue is closed
        os._exit(1)


def _failure(reason):
    step = "give more memory or shared memory (in docker with --shm-size)"
    if TOO_MANY_FILES in reason:  # after which torch gives advice of its own
        reason, step = TOO_MANY_FILES, "allow more with ulimit -n"
    return WorkerDied(
        f"a process that loads batches was killed or failed: {reason}; {step}, or pass fewer "
        f"--workers or --workers 0"
    )


def load_batches(loader):
    """
    Yield a DataLoader's batches. Raises WorkerDied if one of its processes is killed, because the
    memory is full for example, cannot be started or cannot hand over a batch, and UserErrors of
    these processes as they were raised there.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        batches = iter(loader)
        if loader.num_workers and hasattr(signal, "SIGCHLD") and in_main_thread:
            # torch's handler raises wherever the program is, also in the middle of a step. Without
            # it, the loader notices within seconds, when a batch is missing.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for batch in batches:
            if isinstance(batch, WorkerDied):
                raise batch
            yield batch
    except WorkerDied:
        raise
    except UserError as error:  # torch puts the process and its traceback before the message
        raise UserError(error.args[0].rpartition("UserError: ")[2].removesuffix("\\n")) from None
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError):
            known = any(text in reason for text in TORCH_ERRORS)
        else:  # of starting it or of handing over a batch, unless it was raised in it
            known = loader.num_workers and not reason.startswith("Caught ")
        if not known:
            raise
        raise _failure(reason or "it handed over no batch") from None


def map_in_processes(function, items, workers):
    """
    Yield function(item) of each item, in order. Fewer than 2 workers: computed in this process.
    The processes end with this one; UserError if one was killed.
    """
    options = {"num_workers": workers, "prefetch_factor": 4} if workers > 1 else {}
    options |= {"collate_fn": partial(_apply, function), "worker_init_fn": start_worker}
    # Few items at a time, since an interrupt waits for them; as lists, since tensors would be sent
    # by way of /dev/shm, which may be small.
    for results in load_batches(DataLoader(items, batch_size=4, **options)):
        yield from results


def _apply(function, items):
    return [function(item) for item in items]
