"""Processes that do tasks, and what is seen of them while they do."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from data.common import DataError

WORKER = Path(__file__).with_name("resize.py")
SECONDS = 30  # between two lines about progress where there is no terminal
GO_ON = "the same command goes on from what is there"


def usable_cores():
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def work(tasks, jobs):
    """Yields (key, answer) for what the processes say of `tasks` {key: task}; see resize.do.

    They are ended with this generator, and end by themselves with this process.
    """
    answers, busy, left = queue.SimpleQueue(), {}, iter(tasks.items())

    def listen(process):
        with contextlib.suppress(ValueError):  # the line in which it was killed
            for line in process.stdout:
                answers.put((process, json.loads(line)))
        answers.put((process, None))

    def give(process):
        key, task = next(left, (None, None))
        if task is not None:
            busy[process] = key
            with contextlib.suppress(BrokenPipeError):  # listen() hears of it
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()

    processes = []
    try:
        for _ in range(min(jobs, len(tasks))):
            processes.append(subprocess.Popen(
                [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, start_new_session=True,
            ))  # fmt: skip
            threading.Thread(target=listen, args=processes[-1:], daemon=True).start()
            give(processes[-1])
        while busy:
            process, answer = answers.get()
            if answer is None:
                raise DataError(
                    f"a process that decodes images ended with {process.wait()} (-9: killed, "
                    f"often for want of memory; try fewer --jobs); {GO_ON}"
                )
            yield busy[process], answer
            if "done" in answer:
                del busy[process]
                give(process)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


class Progress:
    """Images done in this command: a bar on a terminal, else a line now and then."""

    def __init__(self, total):
        self.total, self.count, self.start = total, 0, time.monotonic()
        self.told, self.seconds = self.start, 0
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, unit=" images", dynamic_ncols=True,
                        disable=not self.terminal or not total)  # fmt: skip

    def add(self, n):
        self.count += n
        self.bar.update(n)
        now = time.monotonic()
        if not self.terminal and now - self.told > SECONDS:
            self.told = now
            print(f"{self.count:,} of {self.total:,} images, {self.rate(now):,.0f} images/s",
                  file=sys.stderr, flush=True)  # fmt: skip

    def rate(self, now):
        return self.count / max(now - self.start, 1e-3)

    def close(self):
        self.bar.close()
        self.seconds = time.monotonic() - self.start
