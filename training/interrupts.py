"""Signals: after SIGINT (Ctrl-C) or SIGTERM a run finishes its step, saves and stops."""

import os
import signal
import threading
import time
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Within these seconds a second signal counts as a repetition of the first: torchrun passes on the
# Ctrl-C that the terminal has already sent to all processes.
REPEAT_SECONDS = 3


class Interrupted(KeyboardInterrupt):
    """Raised by a signal; `code` is the exit code by the shell's convention, 130 or 143."""

    def __init__(self, signum, message=""):
        super().__init__(message)
        self.signum, self.code = signum, 128 + signum


class Interrupts:
    """
    `with Interrupts(save_minutes) as interrupts:` a signal raises Interrupted, but within
    `with interrupts.deferred():` only at the end of that block. A second signal, more than
    REPEAT_SECONDS after the first, has its default effect at once.
    """

    def __init__(self, save_minutes):
        self.save_minutes, self.signum, self._deferring = save_minutes, 0, False
        self._first_time, self._last_save = None, time.monotonic()
        self._repeat_seconds = REPEAT_SECONDS

    def __enter__(self):
        self._previous_handlers = {}
        if threading.current_thread() is threading.main_thread():  # other threads get none
            self._previous_handlers = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _):
        if not self.signum:
            self.signum, self._first_time = signum, time.monotonic()
            if not self._deferring:
                self._deferring = True  # until the state is saved
                raise Interrupted(signum)
        elif time.monotonic() - self._first_time > self._repeat_seconds:
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
        """Whether it is time to save; if so, restarts the clock."""
        if time.monotonic() - self._last_save < 60 * self.save_minutes:
            return False
        self._last_save = time.monotonic()
        return True


def leave_signals_to_parent(_=None):
    """
    For worker processes: ignore signals that are sent to all processes at once, so that the parent
    can finish its step. A SIGTERM sent by the parent still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it says who sent a signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_at_sigterm_of_parent, daemon=True).start()


def _exit_at_sigterm_of_parent():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
