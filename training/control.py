"""What signals ask of a run: noted when they come, looked at between two steps."""

import os
import signal
import sys
import time
from contextlib import contextmanager

# What a run is asked for; the greater one counts.
NOTHING, SAVE, ANNOUNCED, STOP = range(4)

# SIGUSR1 and SIGUSR2 announce the end of a job's time, or ask a run that is no job to save.
ANNOUNCING = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
ENDING = [signal.SIGINT, signal.SIGTERM]  # Ctrl-C; a queue's way to end a job
LAST = 30  # seconds that a worker goes on after SIGTERM
ONE = 1.0  # seconds within which two signals are one, that a launcher has passed on


class Requests:
    """What a run has been asked for. Until it is `listening`, a signal of ENDING raises
    KeyboardInterrupt; from there on the first one is noted, and one that comes later raises it.

    `shared`: whether other runs share the process, in which none may go on once one of them could
    not record a CUDA graph.
    """

    def __init__(self, shared=False):
        self.stopping = self.announced = self.listening = False
        self.since = None
        self.shared = shared

    def install(self, ending=True):
        """Take this process's signals; in its main thread. Without `ending`, those alone that
        would end the process and are not meant to."""
        for number in ANNOUNCING:
            signal.signal(number, self.announce)
        for number in ENDING if ending else ():
            signal.signal(number, self._end)

    def take(self):
        """What is asked: to end, once that was asked, or what came since it was taken last."""
        announced, self.announced = self.announced, False
        return STOP if self.stopping else ANNOUNCED if announced else NOTHING

    def stop(self):
        """Ask the run to save and to end, from any thread."""
        self.stopping = True

    def announce(self, *_):
        """Tell the run that its time is nearly up, or to save."""
        self.announced = True

    def _end(self, number, frame):
        now, first = time.monotonic(), self.since is None
        if not first and now - self.since <= ONE:
            return
        self.since = now
        if not first or not self.listening:
            raise KeyboardInterrupt
        if number == signal.SIGINT and sys.stderr.isatty():
            os.write(2, b"\nStopping after this step; Ctrl-C again, a second later: at once\n")
        self.stopping = True


def ignore_all(*_):
    """In a worker process: a signal to a terminal or a job reaches every process of it, and the
    main one, which needs its workers to the end of a step, ends them. What else ends them, as the
    interpreter does when it stops, has to wait a little."""
    ignore(signal.SIGINT, *ANNOUNCING)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*ENDING, *ANNOUNCING})


def ignore(*numbers):
    """Have signals do nothing; all that this module knows, where none are given. The interpreter
    does not change that as it ends, while what it has handlers for would kill it."""
    for number in numbers or (*ENDING, *ANNOUNCING):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def held_back():
    """While processes are made: what is sent to them waits until they have called ignore_all."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*ENDING, *ANNOUNCING})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
