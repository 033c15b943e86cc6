"""What a run does after a step, as signals and the clock ask for it and as all ranks agree."""

import os
import signal
import sys
import time
from contextlib import suppress

# What a run is asked to do; the greater one counts.
NOTHING, SAVE, ANNOUNCED, STOP = range(4)

# SIGUSR1 and SIGUSR2 announce the end of a job's time, or ask a run that is no job to save.
ANNOUNCING = [getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)]
# Ctrl-C; a queue's way to end a job; a terminal that closes, and what Windows sends for that.
NAMES = "SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"
ENDING = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
ONE = 1.0  # seconds within which two signals are one that a launcher has passed on


class Requests:
    """What signals have asked of a run. Until the run is `listening`, a signal of ENDING raises
    KeyboardInterrupt; then the first one is noted, and a later one raises it.

    `shared`: other runs share the process. None of them may go on after one of them has failed to
    capture a CUDA graph.
    """

    def __init__(self, shared=False):
        self.stopping = self.announced = self.listening = False
        self.since = None
        self.shared = shared

    def install(self, ending=True):
        """Handle this process's signals; call it in the main thread. Without `ending`, only the
        signals that announce the end of a job's time, which would kill the process. SIGHUP stays
        ignored, as nohup has it."""
        for number in ANNOUNCING:
            signal.signal(number, self.announce)
        for number in ENDING if ending else ():
            if number in ENDING[:2] or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._end)

    def take(self):
        """STOP once a stop was requested, else ANNOUNCED once for an announcement, else NOTHING."""
        announced, self.announced = self.announced, False
        return STOP if self.stopping else ANNOUNCED if announced else NOTHING

    def stop(self):
        """Request that the run save and stop; callable from any thread."""
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
            with suppress(OSError):  # the terminal may have closed since
                blank = b" " * (os.get_terminal_size(2).columns - 1)  # over the bar and ^C
                os.write(2, b"\r" + blank + b"\rStopping after this step; Ctrl-C again, a second "
                            b"later: at once\n")  # fmt: skip
        self.stopping = True


class Control:
    """Decides after each step whether a run saves or stops; all ranks decide alike.

    Args:
        requests: the Requests of this process.
        save_every: ("steps", n) or ("seconds", s), between two checkpoints within an epoch.
    """

    def __init__(self, world, requests, save_every):
        from distributed.delayed import DelayedMax  # main.py handles signals before torch is there

        kind, n = save_every
        self.world, self.requests = world, requests
        self.steps = n if kind == "steps" else None
        self.seconds = n if kind == "seconds" else None
        self.agreed, self.saved_at = DelayedMax(world), time.monotonic()

    def decide(self, step=None):
        """NOTHING, SAVE, ANNOUNCED or STOP. `step`: the training step of the run that was taken
        last; None after a batch of the test."""
        request, now = self.requests.take(), time.monotonic()
        late = self.seconds is not None and now - self.saved_at > self.seconds
        if self.world.rank == 0 and late:
            request, self.saved_at = max(request, SAVE), now
        due = self.steps is not None and step is not None and step % self.steps == 0
        return max(SAVE if due else NOTHING, self.agreed.cast(request))


def ignore():
    """Ignore all signals that this module handles. The interpreter keeps that while it exits; it
    drops handlers, and a signal would kill it then."""
    for number in (*ENDING, *ANNOUNCING):
        signal.signal(number, signal.SIG_IGN)
