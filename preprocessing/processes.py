"""Worker processes that exit when their parent does."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from utils import set_up_process

# Forked workers start at once and share the memory of modules already imported (torch); macOS has
# fork too, but its system libraries do not work after it.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def open_pool(processes, take_lock=None):
    """
    A ProcessPoolExecutor whose processes exit as soon as this one does, even if it is killed. If
    the block is left early, tasks that have not started are cancelled.

    take_lock: a function that each process calls first, with a lock that all of them share
    """
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(processes, context, _start_worker, (take_lock, context.Lock()))
    try:
        with defer_interrupt():  # a Ctrl-C during os.fork would be lost
            pool.submit(int)  # starts the processes
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(take_lock, lock):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the parent's handler
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if START_METHOD == "spawn":  # forked processes have the settings of their script already
        set_up_process()
    if take_lock:
        take_lock(lock)


def _end_with_parent():
    # Waits until a pipe closes that the parent keeps open. Workers forked later keep it open too:
    # the last one sees it close and exits first, then the one before it, and so on, all within
    # milliseconds.
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def defer_interrupt():
    """Defer a Ctrl-C until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # other threads never get it
        yield
        return
    interrupted = []
    handler = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt
