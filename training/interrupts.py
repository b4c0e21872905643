"""Signals: after Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 a run finishes its step, saves and stops."""

import os
import signal
import threading
import time
from contextlib import contextmanager

from modeling.workers import SIGNALS

# Within these seconds a second signal counts as a repetition of the first: torchrun passes on the
# Ctrl-C that the terminal has already sent to all processes.
REPEAT_SECONDS = 3


class Interrupted(KeyboardInterrupt):
    """Raised by a signal; `code` is the exit code by the shell's convention, such as 130."""

    def __init__(self, signum, message=""):
        super().__init__(message)
        self.signum, self.code = signum, 128 + signum


class Interrupts:
    """
    `with Interrupts() as interrupts:` a signal raises Interrupted, but within
    `with interrupts.deferred():` only at the end of that block, and there at once within
    `with interrupts.waiting():`. A second signal, more than REPEAT_SECONDS after the first, has its
    default effect at once, until `saving` is set.
    """

    signum = 0
    saving = False
    _deferring = False

    def __enter__(self):
        is_main = threading.current_thread() is threading.main_thread()  # other threads get none
        self._previous = {}
        for signum in SIGNALS if is_main else ():
            ignored = signal.getsignal(signum) == signal.SIG_IGN
            if not (ignored and signum.name == "SIGHUP"):  # as by nohup
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum, _):
        if not self.signum:
            self.signum, self._first_time = signum, time.monotonic()
            if not self._deferring and not self.saving:
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

    @contextmanager
    def waiting(self):
        self._deferring = False
        try:
            if self.signum:
                raise Interrupted(self.signum)
            yield
        finally:
            self._deferring = True
