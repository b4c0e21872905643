"""A run that is told to stop finishes its step and saves: SIGINT (Ctrl-C) and SIGTERM."""

import os
import signal
import threading
import time
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 3  # seconds: torchrun passes on the Ctrl-C that the terminal has sent to all anyway


class Interrupted(KeyboardInterrupt):
    """Raised by a signal; its text says how to go on, its exit code is the shell's: 130, 143."""

    def __init__(self, signum, message=""):
        super().__init__(message)
        self.signum, self.code = signum, 128 + signum


class Interrupts:
    """
    `with Interrupts(minutes) as interrupts:` a signal raises Interrupted, but within
    `with interrupts.held():` only at its end. A second signal, if it comes more than PATIENCE
    seconds after the first, has its usual effect at once.
    """

    def __init__(self, minutes):
        self.minutes, self.signum, self._holding = minutes, 0, False
        self._since, self._saved, self._patience = None, time.monotonic(), PATIENCE

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # only it gets signals
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, *_):
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _):
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if not self._holding:
                self._holding = True  # until whoever catches it has saved
                raise Interrupted(signum)
        elif time.monotonic() - self._since > self._patience:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def hold(self):
        """From here on signals are only noted."""
        self._holding, self._patience = True, float("inf")

    @contextmanager
    def held(self):
        self._holding = True
        yield
        self._holding = False
        if self.signum:
            raise Interrupted(self.signum)

    def due(self):
        """Whether it is time to save; if so, the clock starts anew."""
        if time.monotonic() - self._saved < 60 * self.minutes:
            return False
        self._saved = time.monotonic()
        return True


def leave_signals_to_parent(_=None):
    """
    For worker processes: whoever signals all processes at once stops the parent, which first
    finishes its step. A SIGTERM of the parent's own still ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which alone tells who sent a signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parents_signal, daemon=True).start()


def _end_with_parents_signal():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
