"""Runs of main.py, several at a time, in processes that end with this one."""

import ctypes
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import DataError
from data.imagenet import find
from data.workers import usable_cores
from runs.log import RunError, read_rows
from scripts.results import epochs_done, log_name

MAIN = Path(__file__).resolve().parent.parent / "main.py"
GRACE = 30  # seconds that a run gets to stop
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


class Task(NamedTuple):
    """A run to make: a run that several figures share is one task."""

    name: str
    flags: tuple
    epochs: int  # the most that a figure reads

    def flag(self, name, default=None):
        return dict(zip(self.flags, self.flags[1:])).get(name, default)


def tasks(results, figures, most=None):
    """The distinct runs of the figures, of `most` epochs at most: figure by figure, the longest
    first, so that none is left to the end alone."""
    epochs, every = {}, []
    for row in results.table:
        if row.figure in figures:
            epochs[row.flags] = max(epochs.get(row.flags, 0), min(row.epochs, most or row.epochs))
    for figure in figures:
        flags = dict.fromkeys(row.flags for row in results.table if row.figure == figure)
        mine = [Task(log_name(f), f, epochs.pop(f)) for f in flags if f in epochs]
        every += sorted(mine, key=lambda task: -cost(task) * task.epochs)
    return every


def availability(data_dir, fetch):
    """A function of a task: why the data or the packages at hand do not allow it, or None. `fetch`:
    get the data, or try once."""
    folder = Path(data_dir).expanduser()
    data = cache(lambda name: missing_data(name, folder, fetch))
    return lambda task: data(task.flag("--dataset")) or missing_package(task.flag("--optimizer"))


def missing_data(name, folder, fetch):
    path = folder / f"{name.removeprefix('npz:').removesuffix('.npz')}.npz"
    if name == "imagenet":
        try:
            find(folder)
        except DataError:
            return f"there is no folder {folder / name}, nor $IMAGENET_PATH"
    elif name.startswith("npz:") and (folder / "cifar100.npz").exists():  # it stands in for that
        return "CIFAR-100 itself is here"
    elif name != "digits" and not path.exists():
        if name.startswith("npz:") or not fetch:
            return f"there is no {path}" + ("" if name.startswith("npz:") else " yet")
        from data.prepare import prepare

        try:
            prepare(name, folder)
        except DataError as error:
            reason = str(error).splitlines()[0]
            return f"{reason}; `python -m data.prepare {name}` tells the ways"
    return None


def missing_package(optimizer):
    package, _, class_name = optimizer.partition(".")
    if class_name and not importlib.util.find_spec(package):
        return f"pip install {package}"
    return None


def cost(task):
    """The work of an epoch, in units that are alike for all runs; the clock gives them a length."""
    arch, imagenet = task.flag("--arch"), task.flag("--dataset") == "imagenet"
    examples = int(task.flag("--train_examples", 1_281_167 if imagenet else 50_000))
    if arch == "fcn":
        depth, width = int(task.flag("--depth")), int(task.flag("--width"))
        work = 3072 * width + (depth - 2) * width**2 + 10 * width
    else:  # multiplications for an image
        work = {"vgg": 3.1e8, "resnet18": 5.6e8, "resnet50": 4.1e9}[arch]
    steps = examples / int(task.flag("--train_bs", 128))
    # Polar factors of 128 rows at most; an FCN has as many multiplications as weights.
    polar = 600 * work if task.flag("--optimizer") == "spectral" and arch == "fcn" else 0
    return examples * (work + 4e5) + steps * (3e7 + polar)


def is_finished(results, task):
    """Whether nothing is left of a task; False where the log is another run's."""
    row = next(row for row in results.table if row.flags == task.flags)
    try:
        result = results.find(row._replace(epochs=task.epochs))
    except RunError:
        return False  # main.py says what it is
    return result is not None and result.finished


class Process:
    """A run of main.py in a session of its own: Ctrl-C reaches this process alone, which asks the
    run to stop. However this process ends, Linux kills the run with it."""

    def __init__(self, words, output, environment):
        parent = os.getpid()

        def die_with_parent():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nohup ignores it
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before
                os._exit(1)

        environment = {**environment, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(output, "a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(MAIN), *words], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env=environment,
                preexec_fn=die_with_parent if LIBC else None,
            )  # fmt: skip
        self.poll = self.process.poll  # the exit code, or None while it runs

    def stop(self):
        """Ask it to save and to stop after this step."""
        self.process.send_signal(signal.SIGINT)

    def wait(self, seconds):
        """Whether it ends within that time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self):
        """End it and its own workers at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Runner:
    """Runs tasks, `jobs` at a time.

    `place` are the flags of main.py for data, device and --fresh, `deadline` is a time.monotonic()
    or None. `start(words, output, environment)` starts a run; Process has its methods. After run(),
    `ended` has the tasks whose run ended, `failed` maps names to reasons.
    """

    def __init__(self, results, jobs, place, deadline, title, start=Process):
        self.results, self.jobs, self.place, self.deadline = results, jobs, place, deadline
        self.title, self.start, self.running, self.ended, self.failed = title, start, {}, set(), {}
        self.terminal, self.began = sys.stdout.isatty(), time.monotonic()

    def run(self, todo):
        """Run the tasks; returns whether all of them ended before the deadline."""
        self.todo, waiting = todo, list(todo)
        self.at_start = {task: self._epochs(task) for task in todo}
        bar = tqdm(
            total=sum(cost(task) * task.epochs for task in todo), disable=not self.terminal,
            file=sys.stdout, dynamic_ncols=True, bar_format="{desc} {bar}",
        )  # fmt: skip
        try:
            while waiting or self.running:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return False
                while waiting and len(self.running) < self.jobs:
                    task = waiting.pop(0)
                    self.running[task] = self._start(task)
                time.sleep(0.2)
                for task, run in list(self.running.items()):
                    if run.poll() is not None:
                        del self.running[task]
                        self._ended(task, run.poll())
                bar.n = bar.total - self._left()
                bar.set_description_str(
                    f"{self.title}: {len(self.ended)} of {len(todo)} runs, {self.time_left()}"
                )
            return True
        finally:
            bar.close()
            self.stop()

    def stop(self):
        """Ask the running runs to stop after this step; kill them after GRACE seconds."""
        for run in self.running.values():
            run.stop()
        end = time.monotonic() + GRACE
        for run in self.running.values():
            if not run.wait(max(0.1, end - time.monotonic())):
                run.kill()
        self.running = {}

    def _start(self, task):
        output = self._output(task)
        output.parent.mkdir(parents=True, exist_ok=True)
        words = [*task.flags, "--epochs", str(task.epochs), "--out", str(self.results.folder)]
        threads = max(1, usable_cores() // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        return self.start([*words, *self.place], output, environment)

    def _ended(self, task, code):
        self.ended.add(task)
        if is_finished(self.results, task):
            words = self._outcome(task)
        else:
            words = f"failed: {self._reason(code, task)} (see {self._output(task)})"
            self.failed[task.name] = words
        if not self.terminal:
            words = f"{len(self.ended)} of {len(self.todo)}  {task.name}  {words}"
            print(f"{words}  {self.time_left()}", flush=True)

    def _reason(self, code, task):
        """Why a run failed, in one line."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        text = self._output(task).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reasons = [line for line in lines if re.match(r"error: |Stopped: |\w*Error\b", line)]
        return (reasons or lines or [f"exit code {code}"])[-1]

    def _outcome(self, task):
        """The last figures of a finished run."""
        rows = read_rows(self.results.log(task.name))
        if rows[-1].get("stopped"):
            return f"stopped: {rows[-1]['stopped']}"
        last = [row for row in rows if row["kind"] == "epoch"][-1]
        return f"loss {last['train_loss']:.4f}  test {last['test_acc']:.2%}"

    def _output(self, task):
        return self.results.folder / "output" / f"{task.name}.txt"

    def _epochs(self, task):
        return min(task.epochs, epochs_done(self.results.log(task.name)))

    def gained(self):
        """The number of epochs that were run since the start."""
        return sum(self._epochs(task) - n for task, n in self.at_start.items())

    def _left(self):
        """The work that is left; a run that has ended leaves none."""
        rest = [task for task in self.todo if task not in self.ended]
        return sum(cost(task) * (task.epochs - self._epochs(task)) for task in rest)

    def time_left(self):
        """The time left, in words, at the speed since the start."""
        done = sum(cost(task) * (self._epochs(task) - n) for task, n in self.at_start.items())
        if done <= 0:
            return "? left"
        seconds = (time.monotonic() - self.began) * self._left() / done
        return f"{tqdm.format_interval(seconds)} left"
