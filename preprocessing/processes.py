"""Worker processes that end with their parent."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

# Forked workers start at once and share the memory of what is imported already (torch); macOS has
# fork too, but its system libraries do not survive it.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def open_pool(processes):
    """
    A ProcessPoolExecutor whose processes end as soon as this one does, even if it is killed. If
    the block is left early, tasks that have not started are cancelled.
    """
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(processes, context, initializer=_start_worker)
    try:
        with defer_interrupt():  # one that comes during os.fork is lost
            pool.submit(int)  # starts the processes
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent handles it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the parent's was forked with us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # Waits for a pipe to close that the parent holds open. Workers that were forked later hold it
    # open too; the last one sees it close first and ends, then the one before it, and so on: all
    # end within milliseconds.
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def defer_interrupt():
    """Defer a Ctrl-C until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # others never get one
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
