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
    `with Interrupts() as interrupts:` a signal raises Interrupted, but within
    `with interrupts.deferred():` only at the end of that block. A second signal, more than
    REPEAT_SECONDS after the first, has its default effect at once, until `saving` is set.
    """

    signum = 0
    saving = False
    _deferring = False

    def __enter__(self):
        is_main = threading.current_thread() is threading.main_thread()  # other threads get none
        self._previous = {s: signal.signal(s, self._handle) for s in SIGNALS if is_main}
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _):
        if not self.signum:
            self.signum, self._first_time = signum, time.monotonic()
            if not self._deferring:
                raise Interrupted(signum)
        elif not self.saving and time.monotonic() - self._first_time > REPEAT_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    @contextmanager
    def deferred(self):
        self._deferring = True
        yield
        self._deferring = False
        if self.signum:
            raise Interrupted(self.signum)


def leave_signals_to_parent(_=None):
    """In a worker: ignore signals, so that its parent can finish a step, except the parent's."""

    def exit_at_sigterm_of_parent():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it says who sent a signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=exit_at_sigterm_of_parent, daemon=True).start()
