"""Runs of main.py, several at a time, in processes that end with this one."""

import ctypes
import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from tqdm import tqdm

from architecture import GPTS
from cli import command
from data import DataError, data_folder, default_data_dir
from data.imagenet import find
from data.workers import usable_cores
from flags import EPOCH_STEPS, OF_TEXT
from runs.log import RunError
from scripts.results import epochs_done, log_name
from scripts.words import number

MAIN = Path(__file__).resolve().parent.parent / "main.py"
GRACE = 30  # seconds that a run gets to stop
UNRECORDED = 3  # the exit code of a scripts.together that could not record a CUDA graph
FETCHED = ("mnist", "cifar10", "cifar100")
ITSELF = "CIFAR-100 itself is here"  # why its stand-in is left out
WORK = {"vgg": 3.1e8, "resnet18": 5.6e8, "resnet50": 4.1e9}  # multiplications for an image
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
# Windows has no sessions: a group of its own, which takes another signal.
GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)


def tasks(results, figures, most=None):
    """The distinct runs of the figures, a row of the table each, with as many epochs as any of the
    figures reads, or `most` where no schedule asks for all: figure by figure, the longest first, so
    that none is left to the end alone."""
    rows = {}
    for row in results.table:
        if row.figure in figures:
            first = rows.setdefault(name := log_name(row), row)
            epochs = max(first.epochs, row.epochs)
            most_here = epochs if row.scheduled else most or epochs
            rows[name] = first._replace(epochs=min(epochs, most_here))
    return sorted(rows.values(), key=lambda x: (figures.index(x.figure), -cost(x) * x.epochs))


def file_to_fetch(task, data_dir):
    """The file of a data set that a run fetches, where it is not there yet, else None."""
    name = task.flag("--dataset")
    path = data_folder(data_dir) / f"{name}.npz"
    return path if name in FETCHED and not path.exists() else None


def availability(data_dir, fetch):
    """A function of a task: why the data or the packages at hand do not allow it, or None. `fetch`:
    get the data now, or try once; else a data set that a run fetches counts as being there."""
    folder = data_folder(data_dir)

    @cache
    def missing_data(name):
        if name == "imagenet":
            try:
                find(folder)
            except DataError as error:
                return str(error)
        elif name.startswith("npz:"):  # tiny100, which stands in for CIFAR-100
            if (folder / "cifar100.npz").exists():
                return ITSELF
            path = folder / name.removeprefix("npz:")
            return None if path.exists() else f"there is no {path}, a stand-in for CIFAR-100"
        elif fetch and name in FETCHED and not (folder / f"{name}.npz").exists():
            from data.prepare import prepare

            try:
                prepare(name, folder)
            except DataError as error:
                reason = str(error).splitlines()[0]
                where = [] if data_dir == default_data_dir() else ["--data_dir", data_dir]
                way = command("data.prepare", name, *where)
                return f"{reason}; `{way}` prints the ways to get it"
        return None

    def reason(task):
        package, _, class_name = task.flag("--optimizer").partition(".")
        lacks = class_name and not importlib.util.find_spec(package)
        return missing_data(task.flag("--dataset")) or (f"pip install {package}" if lacks else None)

    return reason


def cost(task):
    """The work of an epoch, in units that are alike for all runs; the clock gives them a length."""
    arch, imagenet = task.flag("--arch"), task.flag("--dataset") == "imagenet"
    examples = int(task.flag("--train_examples", 1_281_167 if imagenet else 50_000))
    steps = examples / int(task.flag("--train_bs", 128))
    weights, work = 0, WORK.get(arch)
    if arch == "fcn":  # as many multiplications as weights
        depth, width = int(task.flag("--depth")), int(task.flag("--width"))
        weights = work = 3072 * width + (depth - 2) * width**2 + 10 * width
    elif arch in GPTS:
        size, steps = GPTS[arch], EPOCH_STEPS
        examples = steps * OF_TEXT["train_bs"]
        weights = 12 * size.depth * size.width**2
        work = weights * size.context
    # Polar factors of 128 rows at most.
    polar = 600 * weights if task.flag("--optimizer") == "spectral" else 0
    return examples * (work + 4e5) + steps * (3e7 + polar)


def is_finished(results, task):
    """Whether nothing is left of a task; False where the log is another run's."""
    try:
        result = results.find(task)
    except RunError:
        return False  # main.py says what it is
    return result is not None and result.finished


class Process(subprocess.Popen):
    """A run of main.py in a session of its own: Ctrl-C reaches this process alone, which asks the
    run to stop. However this process ends, Linux kills the run with it."""

    def __init__(self, words, output, environment):
        parent = os.getpid()

        def die_with_parent():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nohup ignores it
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it ended before
                os._exit(1)

        with open(output, "a", encoding="utf-8") as file:
            super().__init__(
                [sys.executable, str(MAIN), *words], stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, env=environment,
                preexec_fn=die_with_parent if LIBC else None, creationflags=GROUP,
            )  # fmt: skip

    def stop(self):
        """Ask it to save and to stop after this step."""
        self.send_signal(STOP)

    def kill(self):
        """End it and its own workers at once."""
        if hasattr(os, "killpg"):
            os.killpg(self.pid, signal.SIGKILL)
        else:
            super().kill()
        self.wait()


class Runner:
    """Runs tasks, `jobs` at a time.

    `place` are the flags of main.py for data, device and --fresh, `deadline` is a time.monotonic()
    or None. `start(words, output, environment)` starts a run; Process has its methods. After run(),
    `ended` maps the tasks whose run ended to its last figures, `failed` names to reasons.
    """

    def __init__(self, results, todo, jobs, place, deadline, start=Process):
        self.results, self.todo, self.jobs, self.place = results, todo, jobs, place
        self.deadline, self.start = deadline, start
        self.running, self.ended, self.failed, self.again = {}, {}, {}, set()
        self.work = self.left()

    def run(self, title):
        """Run the tasks; returns whether all of them ended before the deadline."""
        waiting = list(self.todo)
        bar = tqdm(total=self.work or 1, smoothing=0, mininterval=1, dynamic_ncols=True,
                   file=sys.stdout if sys.stdout.isatty() else io.StringIO(),
                   bar_format="{desc} {bar} {remaining} left")  # fmt: skip
        try:
            while waiting or self.running:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return False
                while waiting and len(self.running) < self.jobs:
                    task = waiting.pop(0)
                    self.running[task] = self.begin(task)
                time.sleep(0.2)
                for task, run in list(self.running.items()):
                    if (code := run.poll()) is None:
                        continue
                    del self.running[task]
                    if code == UNRECORDED and task not in self.again:
                        self.again.add(task)
                        waiting.insert(0, task)
                    else:
                        self.ended[task] = self.outcome(task, code)
                        bar.n = bar.total - self.left()
                        left = {**bar.format_dict, "bar_format": "{remaining} left"}
                        tqdm.write(f"{len(self.ended)} of {len(self.todo)}  {log_name(task)}"
                                   f"  {self.ended[task]}  {tqdm.format_meter(**left)}")
                bar.n = bar.total - self.left()
                bar.set_description_str(f"{title}: {len(self.ended)} of {len(self.todo)} runs")
            return True
        finally:
            bar.close()
            self.stop()

    def stop(self):
        """Ask the running runs to stop after this step; kill them after GRACE seconds."""
        for run in self.running.values():
            run.stop()
        end = time.monotonic() + GRACE
        while any(run.poll() is None for run in self.running.values()) and time.monotonic() < end:
            time.sleep(0.05)
        for run in self.running.values():
            if run.poll() is None:
                run.kill()
        self.running = {}

    def begin(self, task):
        """Start the run of a task. After a graph that could not be recorded, none is tried."""
        output = self.output(task)
        output.parent.mkdir(parents=True, exist_ok=True)
        words = [*task.flags, "--epochs", str(task.epochs), "--out", str(self.results.folder)]
        words += [x for x in self.place if x != "--fresh" or task not in self.again]
        words += ["--cuda_graph", "off"] if self.again else []
        threads = max(1, usable_cores() // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1",
                       "PYTHONIOENCODING": "utf-8"}  # fmt: skip
        return self.start(words, output, environment)

    def outcome(self, task, code):
        """The last figures of a run that ended with an exit code, or why it failed."""
        if is_finished(self.results, task):
            result = self.results.find(task)
            if result.stopped:
                return f"stopped: {result.stopped}"
            test = f"test {result.last['test_acc']:.2%}"
            test = f"validation {number(result.test_loss)}" if result.is_text else test
            return f"loss {number(result.loss)}  {test}"
        reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if code >= 0:
            text = self.output(task).read_text(encoding="utf-8", errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            reasons = [line for line in lines if re.match(r"error: |Stopped: |\w*Error\b", line)]
            reason = (reasons or lines or [reason])[-1]
        self.failed[log_name(task)] = words = f"failed: {reason} (see {self.output(task)})"
        return words

    def output(self, task):
        return self.results.folder / "output" / f"{log_name(task)}.txt"

    def left(self):
        """The work that is left; a run that has ended leaves none."""
        rest = {task: epochs_done(self.results.log(log_name(task)))
                for task in self.todo if task not in self.ended}  # fmt: skip
        return sum(cost(task) * max(0, task.epochs - done) for task, done in rest.items())
