"""Worker processes: how many, which signals reach them, and tasks shared out among them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from cli import guard_streams
from data.common import DataError

# Terminals and queues send these to every process of a job.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
LAST = 30  # seconds that a worker lives on after SIGTERM


def usable_cores():
    """The number of cores that this process may use."""
    known = hasattr(os, "sched_getaffinity")  # not on every system
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def ignore_all(*_):
    """In a worker process: ignore the signals of a terminal or a queue, which reach the main
    process too. That one needs its workers until its step is done, and then ends them. SIGTERM
    ends them after LAST seconds, because the interpreter sends it as it exits."""
    guard_streams()
    for number in SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(LAST))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextlib.contextmanager
def held_back():
    """Block signals while processes start: they inherit that, until they call ignore_all."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(function, tasks, jobs):
    """Yield (key, function(*task)) of `tasks` {key: task}, as `jobs` processes finish them.

    An exception of `function` is raised here; DataError says that a process was killed. The
    processes end at once with this generator and with this process, even if it is killed: an
    executor by itself would finish the tasks that have begun, or wait for more for ever.
    """
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(jobs, len(tasks)) or 1, context, _begin, (theirs,))
    try:
        with held_back():
            futures = {pool.submit(function, *task): key for key, task in tasks.items()}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images was killed, often for lack of memory: try fewer "
            "--jobs; the same command goes on from there"
        ) from error
    finally:
        ours.close()
        pool.shutdown(cancel_futures=True)


def _begin(pipe):
    ignore_all()
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()


def _end_with(pipe):
    with contextlib.suppress(EOFError, OSError):  # the other end has closed
        pipe.recv()
    os._exit(1)
