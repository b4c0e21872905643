"""Worker processes that end with their parent."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

# Forked helpers start at once and share the memory of what is imported already (torch); macOS has
# fork too, but its system libraries do not survive it.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


@contextmanager
def open_pool(processes):
    """
    A ProcessPoolExecutor whose processes end as soon as this one does, even if it is killed. If
    the block is left early, what has not begun is not waited for.
    """
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(processes, context, initializer=_begin)
    try:
        with defer_interrupt():  # os.fork would swallow it
            pool.submit(int)  # starts the processes
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, but is the parent's matter
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and not what the parent has set for itself
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    # Waits for the end of a pipe that only the parent holds open. Forked siblings hold it too, but
    # not the one that was forked last: it ends first, and the others after it, in milliseconds.
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def defer_interrupt():
    """Defer a Ctrl-C until the block has ended."""
    if threading.current_thread() is not threading.main_thread():  # only that one gets it
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
