"""Runs of main.py, several at a time, each in a process of its own that ends with this one."""

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
from scripts.results import epochs_done, run_name

GRACE = 30  # seconds that a run gets to stop


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
        mine = [Task(run_name(f), f, epochs.pop(f)) for f in flags if f in epochs]
        every += sorted(mine, key=lambda task: -cost(task) * task.epochs)
    return every


class Availability:
    """What the data and the packages at hand allow."""

    def __init__(self, data_dir):
        self.data_dir, self.known = data_dir, {}

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
            return None if (here / name).is_dir() else f"there is no folder {here / name}"
        if name.startswith("npz:"):
            if (here / "cifar100.npz").exists():
                return "CIFAR-100 itself is here"
            path = here / name[len("npz:") :]
            return None if path.exists() else f"there is no {path}"
        if name == "digits" or (here / f"{name}.npz").exists():
            return None
        from data.prepare import prepare

        try:
            prepare(name, self.data_dir)
        except DataError as error:
            return str(error).splitlines()[0]
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
    return examples * (work + 4e5) + steps * 3e7


class Runner:
    """Runs tasks, `jobs` at a time, each in a process of its own."""

    def __init__(self, results, jobs, place, deadline, title):
        self.results, self.jobs, self.place, self.deadline = results, jobs, place, deadline
        self.title, self.running, self.failed = title, {}, {}
        self.began = time.monotonic()
        self.terminal = sys.stdout.isatty()

    def run(self, todo):
        """True if every task came to its end; False when the time was up. What failed is in
        `failed`, name -> reason."""
        self.start_epochs = {task: self._epochs(task) for task in todo}
        self.work = {task: cost(task) * task.epochs for task in todo}
        self.ended, waiting = set(), list(todo)
        total = sum(self.work.values())
        bar = tqdm(
            total=total, disable=not self.terminal, file=sys.stdout, dynamic_ncols=True,
            bar_format="{desc} {bar}", initial=self._done(todo),
        )  # fmt: skip
        try:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self._start(waiting.pop(0))
                time.sleep(0.2)
                for process, task in list(self.running.items()):
                    if process.poll() is not None:
                        self._ended(process, task, todo)
                bar.n = self._done(todo)
                said = f"{self.title}: {len(self.ended)} of {len(todo)} runs, {self._left(todo)}"
                bar.set_description_str(said)
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return False
            return True
        finally:
            bar.close()
            self.stop()

    def stop(self):
        """Ask what is running to stop after this step, and wait for it."""
        for process in self.running:
            process.send_signal(signal.SIGINT)
        end = time.monotonic() + GRACE
        for process in self.running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.running = {}

    def _start(self, task):
        """The process ends with this one, however that ends: it holds the other end of its
        standard input. Ctrl-C reaches it through this one alone."""
        output = self.results.folder / "output" / f"{task.name}.txt"
        output.parent.mkdir(parents=True, exist_ok=True)
        words = [*task.flags, "--epochs", str(task.epochs), "--out", str(self.results.folder)]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with open(output, "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "scripts.runner", *words, *self.place],
                stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**environment, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
            )  # fmt: skip
        self.running[process] = task

    def _ended(self, process, task, todo):
        del self.running[process]
        process.stdin.close()
        self.ended.add(task)
        if self._finished(task):
            said = self._figures(task)
        else:
            output = self.results.folder / "output" / f"{task.name}.txt"
            lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
            lines = [line for line in lines if line.strip()]
            error = [line for line in lines if re.match(r"error:|\w*(Error|Killed)", line)]
            said = (error or lines or [f"exit code {process.returncode}"])[-1]
            self.failed[task.name] = said = f"failed: {said} (all of it: {output})"
        if not self.terminal:
            print(f"{len(self.ended)} of {len(todo)}  {task.name}  {said}  {self._left(todo)}",
                  flush=True)  # fmt: skip

    def _log(self, task):
        return self.results.folder / "logs" / f"{task.name}.jsonl"

    def _epochs(self, task):
        return min(task.epochs, epochs_done(self._log(task)))

    def _finished(self, task):
        return is_finished(self.results, task)

    def _figures(self, task):
        lines = self._log(task).read_text(encoding="utf-8").splitlines()
        end = json.loads(lines[-1])
        if end["stopped"]:
            return f"stopped: {end['stopped']}"
        return f"loss {end['train_loss']:.4f}  test {end['test_acc']:.2%}"

    def _done(self, todo):
        """The work behind us; a run that stopped early is done."""
        return sum(
            self.work[t] if t in self.ended else cost(t) * self._epochs(t) for t in todo
        )

    def _left(self, todo):
        """The time left, in words, from the work done since the start."""
        before = sum(cost(task) * n for task, n in self.start_epochs.items())
        now, total = self._done(todo), sum(self.work.values())
        if now <= before:
            return "? left"
        seconds = (time.monotonic() - self.began) * (total - now) / (now - before)
        return f"{clock(seconds)} left"


def is_finished(results, task):
    rows = [row for row in results.table if row.flags == task.flags]
    found = results.find(rows[0]._replace(epochs=task.epochs))
    return found is not None and found.finished


def clock(seconds):
    """Seconds as people write them: 0:07, 12:30, 3:05:00."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def worker(argv):
    """One run of main.py, which ends when the process that started it is gone."""

    def watch():
        sys.stdin.buffer.read()  # until the other end is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    import main as program

    return program.main(argv)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:]))
