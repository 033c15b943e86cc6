"""Runs of main.py, several at a time, in processes that end with this one."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from data import DataError
from data.imagenet import find
from runs.log import RunError, read_rows
from scripts.results import epochs_done, log_name
from scripts.worker import UNRECORDED

GRACE = 30  # seconds that a run gets to stop
STREAMS = 32  # the most runs in a process: torch has as many streams


class Task(NamedTuple):
    """A run to make: what several figures share is one task."""

    name: str
    flags: tuple
    epochs: int  # the most that a figure reads


def tasks(results, figures, most=None):
    """The distinct runs of the figures, figure by figure, the longest first, so that none is left
    to the end alone; no longer than `most` epochs."""
    epochs, every = {}, []
    for row in results.table:
        if row.figure in figures:
            n = row.epochs if most is None else min(row.epochs, most)
            epochs[row.flags] = max(epochs.get(row.flags, 0), n)
    for figure in figures:
        flags = dict.fromkeys(row.flags for row in results.table if row.figure == figure)
        mine = [Task(log_name(f), f, epochs.pop(f)) for f in flags if f in epochs]
        every += sorted(mine, key=lambda task: -cost(task) * task.epochs)
    return every


class Availability:
    """What the data and the packages at hand allow; `fetch` gets a set that is not here."""

    def __init__(self, data_dir, fetch):
        self.data_dir, self.fetch, self.known = data_dir, fetch, {}

    def lacking(self, task):
        """Why a task cannot be run here, or None."""
        flag = values(task.flags)
        for key, ask in ((flag["--dataset"], self._data), (flag["--optimizer"], self._package)):
            if key not in self.known:
                self.known[key] = ask(key)
            if self.known[key]:
                return self.known[key]
        return None

    def _data(self, name):
        here = Path(self.data_dir).expanduser()
        if name == "imagenet":
            try:
                find(self.data_dir)
                return None
            except DataError:
                return f"there is no folder {here / name}, nor $IMAGENET_PATH"
        if name.startswith("npz:"):
            if (here / "cifar100.npz").exists():
                return "CIFAR-100 itself is here"
            path = here / name[len("npz:") :]
            return None if path.exists() else f"there is no {path}"
        if name == "digits" or (here / f"{name}.npz").exists():
            return None
        if not self.fetch:
            return f"there is no {here / name}.npz yet"
        from data.prepare import prepare

        try:
            prepare(name, self.data_dir)
        except DataError as error:
            said = str(error).splitlines()[0]
            return f"{said}; `python -m data.prepare {name}` tells the ways"
        return None

    @staticmethod
    def _package(optimizer):
        package = optimizer.split(".")[0]
        if "." not in optimizer or importlib.util.find_spec(package):
            return None
        return f"pip install {package}"


def values(flags):
    """Each flag with the word that follows it."""
    return dict(zip(flags, [*flags[1:], None]))


def cost(task):
    """The work of an epoch in units that are alike for all runs; the clock gives them a length."""
    flag = values(task.flags)
    arch, dataset = flag["--arch"], flag["--dataset"]
    examples = int(flag.get("--train_examples") or (1_281_167 if dataset == "imagenet" else 50_000))
    if arch == "fcn":
        depth, width = int(flag["--depth"]), int(flag["--width"])
        work = 3072 * width + (depth - 2) * width**2 + 10 * width
    else:  # multiplications for an image
        work = {"vgg": 3.1e8, "resnet18": 5.6e8, "resnet50": 4.1e9}[arch]
    steps = examples / int(flag.get("--train_bs", 128))
    # Polar factors of 128 rows at most; of an FCN as many multiplications are weights.
    spectral = flag.get("--optimizer") == "spectral"
    polar = 600 * work if spectral and arch == "fcn" else 0
    return examples * (work + 4e5) + steps * (3e7 + polar)


class Process:
    """A run of main.py in a process of its own."""

    def __init__(self, words, output, environment):
        with open(output, "a", encoding="utf-8") as file:
            self.process = worker(words, environment, file, subprocess.STDOUT)

    def poll(self):
        """The exit code, or None for as long as there is none."""
        return self.process.poll()

    def stop(self):
        """Ask it to stop after this step."""
        tell(self.process, b"s")

    def wait(self, seconds):
        """Whether it has ended within that time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        self.process.stdin.close()


class Host:
    """A process that has several runs at once, each in a thread."""

    def __init__(self, environment, output):
        self.codes, self.number, self.stopping = {}, 0, False
        # A hardware queue for each stream: the default of 8 has streams wait for one another.
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(STREAMS), **environment}
        with open(output, "a", encoding="utf-8") as file:
            self.process = worker([], environment, subprocess.PIPE, file)
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, words, output):
        """The run, with the methods of a Process."""
        self.number += 1
        self._tell({"run": self.number, "flags": words, "output": str(output)})
        return Thread(self, self.number)

    def stop(self):
        """Ask all of them to stop after this step; once is enough."""
        if not self.stopping:
            self._tell({"stop": True})
        self.stopping = True

    def _tell(self, order):
        tell(self.process, json.dumps(order).encode() + b"\n")

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _listen(self):
        for line in self.process.stdout:
            answer = json.loads(line)
            self.codes[answer["run"]] = answer["code"]


class Thread:
    """A run of main.py in a thread of a Host."""

    def __init__(self, host, number):
        self.host, self.number = host, number

    def poll(self):
        gone = self.host.process.poll()  # asked before the codes, all of which are there by then
        return self.host.codes.get(self.number, gone)

    def stop(self):
        """Ask it, and all the others, to stop after this step."""
        self.host.stop()

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.poll() is not None

    def kill(self):
        self.host.process.kill()
        self.host.process.wait()

    def close(self):
        pass


def worker(words, environment, stdout, stderr):
    """Ctrl-C reaches it through this process alone."""
    return subprocess.Popen(
        [sys.executable, "-m", "scripts.worker", *words],
        stdin=subprocess.PIPE, stdout=stdout, stderr=stderr, start_new_session=True,
        env={**environment, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip


def tell(process, what):
    try:
        process.stdin.write(what)
        process.stdin.flush()
    except OSError:  # it has ended by itself
        pass


class Runner:
    """Runs tasks, `jobs` at a time, each in a process of its own or, `together`, in one.

    `place` are the flags of main.py that say where things lie, `deadline` is a time.monotonic() or
    None. What failed is in `failed`, name -> reason. Where a run that shares a process cannot
    record a CUDA graph, all of that process start again without graphs.
    """

    def __init__(self, results, jobs, place, deadline, title, together=False):
        self.jobs = min(jobs, STREAMS) if together else jobs
        self.results, self.place, self.deadline = results, place, deadline
        self.title, self.running, self.ended, self.failed = title, {}, set(), {}
        self.terminal, self.began = sys.stdout.isatty(), time.monotonic()
        self.together, self.host, self.restarted = together, None, set()

    def run(self, todo):
        """True if every task came to its end, False when the time was up."""
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
                    self._start(waiting.pop(0))
                time.sleep(0.2)
                for run, task in list(self.running.items()):
                    code = run.poll()
                    if code == UNRECORDED:
                        del self.running[run]
                        waiting.insert(0, task)
                        self.restarted.add(task)
                    elif code is not None:
                        self._ended(run, task)
                bar.n = bar.total - self._left()
                bar.set_description_str(
                    f"{self.title}: {len(self.ended)} of {len(todo)} runs, {self.time_left()}"
                )
            return True
        finally:
            bar.close()
            self.stop()

    def stop(self):
        """Ask what is running to stop after this step, and wait for it."""
        for run in self.running:
            run.stop()
        end = time.monotonic() + GRACE
        for run in self.running:
            if not run.wait(max(0.1, end - time.monotonic())):
                run.kill()
            run.close()
        self.running = {}
        if self.host is not None:
            self.host.close()
            self.host = None

    def gained(self):
        """The number of epochs that were run since the start."""
        return sum(self._epochs(task) - n for task, n in self.at_start.items())

    def _start(self, task):
        output = self._output(task)
        output.parent.mkdir(parents=True, exist_ok=True)
        words = [*task.flags, "--epochs", str(task.epochs), "--out", str(self.results.folder)]
        words += [x for x in self.place if x != "--fresh" or task not in self.restarted]
        words += ["--cuda_graph", "off"] if self.restarted else []
        environment = {"OMP_NUM_THREADS": str(max(1, cores() // self.jobs)), **os.environ}
        if not self.together:
            run = Process(words, output, environment)
        else:
            if self.host is None or self.host.process.poll() is not None:
                self.host = Host(environment, output.parent / "worker.txt")
            run = self.host.start(words, output)
        self.running[run] = task

    def _ended(self, run, task):
        del self.running[run]
        run.close()
        self.ended.add(task)
        if is_finished(self.results, task):
            said = self._figures(task)
        else:
            said = f"failed: {self._reason(run.poll(), task)} (see {self._output(task)})"
            self.failed[task.name] = said
        if not self.terminal:
            words = f"{len(self.ended)} of {len(self.todo)}  {task.name}  {said}"
            print(f"{words}  {self.time_left()}", flush=True)

    def _reason(self, code, task):
        """Why a run did not come to its end, in one line."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        text = self._output(task).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        told = [line for line in lines if re.match(r"error: |Stopped: |\w*Error\b", line)]
        return (told or lines or [f"exit code {code}"])[-1]

    def _figures(self, task):
        """How a finished run came out."""
        rows = read_rows(self._log(task))
        if rows[-1].get("stopped"):
            return f"stopped: {rows[-1]['stopped']}"
        last = [row for row in rows if row["kind"] == "epoch"][-1]
        return f"loss {last['train_loss']:.4f}  test {last['test_acc']:.2%}"

    def _output(self, task):
        return self.results.folder / "output" / f"{task.name}.txt"

    def _log(self, task):
        return self.results.folder / "logs" / f"{task.name}.jsonl"

    def _epochs(self, task):
        return min(task.epochs, epochs_done(self._log(task)))

    def _left(self):
        """The work that is left; a run that has ended leaves none."""
        rest = [task for task in self.todo if task not in self.ended]
        return sum(cost(task) * (task.epochs - self._epochs(task)) for task in rest)

    def time_left(self):
        """The time left, in words, from the epochs that were run since the start."""
        done = sum(cost(task) * (self._epochs(task) - n) for task, n in self.at_start.items())
        if done <= 0:
            return "? left"
        return f"{clock((time.monotonic() - self.began) * self._left() / done)} left"


def cores():
    """The processor's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_finished(results, task):
    """Whether nothing is left of a task; not where something else lies in its place."""
    row = next(row for row in results.table if row.flags == task.flags)
    try:
        found = results.find(row._replace(epochs=task.epochs))
    except RunError:
        return False  # main.py says what it is
    return found is not None and found.finished


def clock(seconds):
    """Seconds as people write them: 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
