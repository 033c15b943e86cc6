"""Worker processes: how many, which signals reach them, what they take of the machine, and tasks
shared out among them."""

import contextlib
import errno
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from cli import UserError, guard_streams, size
from data.common import DataError

# Terminals and queues send these to every process of a job.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGBREAK")
SIGNALS = {getattr(signal, name) for name in NAMES if hasattr(signal, name)}
LAST = 30  # seconds that a worker lives on after SIGTERM
SHM = "/dev/shm"  # where worker processes leave their batches
AHEAD = 2  # batches that a worker prepares before they are asked for
# What a machine, container or user may have too little of, by the system's error.
DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
REMEDIES = {
    **dict.fromkeys(DESCRIPTORS, "a larger `ulimit -n` helps"),
    errno.EAGAIN: "a larger `ulimit -u`, `ulimit -v` or pids limit of the container helps",
    errno.ENOMEM: "more memory helps",
    errno.ENOSPC: f"{SHM} is full: a container with a larger --shm-size helps",
}
STARTING = threading.Lock()
MISSING = f"{SHM} has to be there and writable"
MOST = 65536  # descriptors that anyone needs
SPARE = 16  # descriptors beside those of batches: of logs, checkpoints and libraries
ENDED = re.compile(r"DataLoader worker \(pid")  # how torch says that a worker was killed
TOO_MANY = re.compile("Too many open files|items of ancdata")


class WorkerError(DataError):
    """A worker process was killed, or what it needs has run out, in the middle of a run."""

    exit_code = 1


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


def start(parts, shape, neighbours):
    """Start the worker processes of `parts` of a data set, by part.start(workers): part.workers for
    each, or fewer where the system has no more. Trying is exact where an estimate is not: limits
    count what others have, too.

    Returns sentences about fewer processes than wanted, and about too little shared memory for
    those of `neighbours` ranks. Raises DataError where not even one can be had.
    """
    wanted = workers = max(part.workers for part in parts)
    notes = []
    while True:
        try:
            for part in parts:
                part.start(workers)
            # A worker sends by two threads of its own and listens to one of this process.
            _check_spare(AHEAD * workers + SPARE, 3 * workers * len(parts) + SPARE)
            break
        except (OSError, ImportError, RuntimeError) as error:
            for part in parts:
                part.close(kill=True)
            cause = _cause(error)
            if cause is None:
                raise
            if cause in DESCRIPTORS and _raise_limit():
                continue
            why = f"{os.strerror(cause) if cause else error}; {REMEDIES.get(cause, MISSING)}"
            if workers <= 1 or cause not in REMEDIES:
                raise DataError(
                    f"no worker process can be started ({why}): --workers 0 does without them"
                ) from error
            workers //= 2
            notes = [f"No more than {workers} of {wanted} --workers can be started ({why})"]
    for part in parts:
        part.workers = workers
    need = neighbours * shared_bytes(parts, shape)
    if not has_room(need):
        free = size(shutil.disk_usage(SHM).free)
        notes.append(
            f"{SHM} has {free} free, and the batches of {neighbours * workers} workers may fill "
            f"{size(need)}: what has no room goes through pipes, more slowly; fewer --workers, or "
            "a container with a larger --shm-size"
        )
    return notes


def shared_bytes(parts, shape):
    """The bytes of shared memory that a rank's batches fill at most: one part is read at a time."""
    images = max(-(-min(x.batch_size, x.examples) // x.size) for x in parts)
    return AHEAD * parts[0].workers * images * math.prod(shape)


def has_room(need):
    """Whether so many bytes of shared memory are free, or the system does not tell."""
    try:
        return shutil.disk_usage(SHM).free >= need
    except OSError:
        return True


def lacking(error):
    """Whether an exception says that the machine has too little of something, whatever was done."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in REMEDIES


def _cause(error):
    """The number of a system's error, 0 where it has none, None for an error of another kind."""
    if "start new thread" in str(error):
        return errno.EAGAIN
    return (error.errno or 0) if isinstance(error, OSError) else (
        0 if isinstance(error, ImportError) else None)  # fmt: skip


def _check_spare(descriptors, threads):
    """Raise OSError or RuntimeError where this process cannot open so many files more, and begin so
    many threads."""
    opened, begun, end = [], [], threading.Event()
    try:
        for _ in range(descriptors):
            opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(threads):
            begun.append(threading.Thread(target=end.wait))
            begun[-1].start()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        end.set()
        for thread in begun:
            if thread.ident is not None:
                thread.join()


def _raise_limit():
    """Raise this process's limit of descriptors to the most that it may have, as far as anyone
    needs; returns whether there was something to raise."""
    try:
        import resource  # not on every system

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
        if soft == resource.RLIM_INFINITY or soft >= most:
            return False
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (ImportError, OSError, ValueError):
        return False
    return True


def processes_of(function):
    """Call function(), which starts processes; returns them. Where it raises, those that it has
    started are killed, and half-made objects go without a word."""
    with STARTING:  # another thread's processes are not these
        before = set(multiprocessing.active_children())
        try:
            function()
        except BaseException as error:
            with undisturbed():
                end(set(multiprocessing.active_children()) - before)
                # A DataLoader that is half made raises in its destructor, which runs here.
                traceback.clear_frames(error.__traceback__)
            raise
        return set(multiprocessing.active_children()) - before


@contextlib.contextmanager
def undisturbed():
    """A context in which destructors print no tracebacks and the end of a process raises nothing,
    as torch has it for its workers."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if handled else None
    try:
        yield
    finally:
        sys.unraisablehook = hook
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


def end(processes):
    """Kill processes that are still there."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def lost(error):
    """The WorkerError for an error that follows from a worker's end, or from a lack of descriptors;
    None for another error."""
    text = "" if isinstance(error, UserError) else str(error)
    # What a batch is fetched by breaks before torch has noticed that the worker has ended.
    if isinstance(error, (ConnectionError, EOFError)) or (
        isinstance(error, RuntimeError) and ENDED.search(text)
    ):
        return WorkerError(
            "a process that decodes images was killed, often for lack of memory: try fewer "
            "--workers; the same command goes on from the last checkpoint"
        )
    if isinstance(error, (RuntimeError, OSError)) and TOO_MANY.search(text):
        return WorkerError(
            "too many files are open to get a batch from a worker: try fewer --workers, or a "
            "larger `ulimit -n`; the same command goes on from the last checkpoint"
        )
    return None


def work(function, tasks, jobs):
    """Yield (key, function(*task)) of `tasks` {key: task}, as `jobs` processes finish them.

    An exception of `function` is raised here; DataError says that a process was killed, or could
    not be started. The processes end at once with this generator and with this process, even if it
    is killed: an executor by itself would finish the tasks that have begun, or wait for more for
    ever.
    """
    _raise_limit()
    jobs, context = min(jobs, len(tasks)) or 1, multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _begin, (theirs,))
    try:
        try:
            _check_spare(3 * jobs + SPARE, SPARE // 4)  # the pool's own thread would wait for ever
            with held_back():
                futures = {pool.submit(function, *task): key for key, task in tasks.items()}
        except (OSError, RuntimeError) as error:
            cause = _cause(error)
            if cause not in REMEDIES:
                raise
            raise DataError(f"{jobs} processes cannot be started ({os.strerror(cause)}; "
                            f"{REMEDIES[cause]}): fewer --jobs") from error  # fmt: skip
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, often for lack of memory: try fewer "
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
