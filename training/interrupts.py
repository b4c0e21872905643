"""A run that is told to stop, by SIGINT (Ctrl-C) or SIGTERM, finishes its step and saves."""

import os
import signal
import threading
import time
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a second signal counts as the first: torchrun passes on the Ctrl-C that the
# terminal has already sent to all processes.
REPEAT_SECONDS = 3


class Interrupted(KeyboardInterrupt):
    """Raised by a signal; its text says how to go on, its exit code is the shell's: 130, 143."""

    def __init__(self, signum, message=""):
        super().__init__(message)
        self.signum, self.code = signum, 128 + signum


class Interrupts:
    """
    `with Interrupts(save_minutes) as interrupts:` a signal raises Interrupted, but within
    `with interrupts.deferred():` only at the end of that block. A second signal more than
    REPEAT_SECONDS after the first has its usual effect at once.
    """

    def __init__(self, save_minutes):
        self.save_minutes, self.signum, self._deferring = save_minutes, 0, False
        self._first, self._last_save, self._repeat_seconds = None, time.monotonic(), REPEAT_SECONDS

    def __enter__(self):
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():  # only it gets signals
            self._previous_handlers = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _):
        if not self.signum:
            self.signum, self._first = signum, time.monotonic()
            if not self._deferring:
                self._deferring = True  # until whoever catches it has saved
                raise Interrupted(signum)
        elif time.monotonic() - self._first > self._repeat_seconds:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def ignore_signals(self):
        """From here on signals have no effect."""
        self._deferring, self._repeat_seconds = True, float("inf")

    @contextmanager
    def deferred(self):
        self._deferring = True
        yield
        self._deferring = False
        if self.signum:
            raise Interrupted(self.signum)

    def save_due(self):
        """Whether it is time to save; if so, the clock starts anew."""
        if time.monotonic() - self._last_save < 60 * self.save_minutes:
            return False
        self._last_save = time.monotonic()
        return True


def leave_signals_to_parent(_=None):
    """
    For worker processes: a signal that is sent to all processes at once stops the parent, which
    first finishes its step. A SIGTERM of the parent's own still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which alone tells who sent a signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_at_sigterm_of_parent, daemon=True).start()


def _exit_at_sigterm_of_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
