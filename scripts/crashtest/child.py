"""A process of main.py, which outlives nothing: not the strike that it is meant for, not this
process."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.crashtest.victim import ROOT

ALIVE = set()  # whose groups `end_all` ends
PROGRAM = str(ROOT / "main.py")


@dataclass
class Ending:
    """How a process ended: its exit code (negative: the signal), its seconds, when it was struck
    and for how long it lived on (None: it was not), what it wrote."""

    code: int
    seconds: float
    struck: float | None
    lived_on: float | None
    stdout: str
    stderr: str

    def said(self):
        """What it wrote to stderr but for progress and for what the victim says."""
        lines = re.split(r"[\n\r]", self.stderr)
        return [line for line in lines if line.strip() and not line.startswith("struck ")]


class Child:
    """`program` with `flags`; with a `plan`, see victim.py, it strikes itself. It sees GPUs where
    `device` is not "cpu"."""

    def __init__(self, flags, folder, plan=None, program=PROGRAM, device="cpu"):
        command = [sys.executable, program, *flags]
        if plan is not None:
            plan = json.dumps({**plan, "program": program})
            command = [sys.executable, "-m", "scripts.crashtest.victim", plan, *flags]
        self.paths = [Path(folder, name) for name in ("stdout", "stderr")]
        self.struck, self.began = None, time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context(open(path, "wb")) for path in self.paths)
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ALIVE.add(self.process.pid)

    def running(self):
        return self.process.poll() is None

    def strike(self, number, group):
        """Send a signal to the process, or to all of its group."""
        self.struck = self.struck or time.time()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self, seconds):
        """Whether it has ended within so many seconds."""
        try:
            self.process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self, timeout):
        """The Ending; TimeoutError, with what it wrote, if it has none within `timeout` seconds."""
        ended = self.wait(timeout)
        now = time.time()
        if not ended:
            kill_group(self.process.pid)
            self.process.wait()
        ALIVE.discard(self.process.pid)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.paths)
        if not ended:
            raise TimeoutError(f"it had not ended after {timeout:.0f} s: {err[-300:]!r}")
        itself = re.search(r"^struck ([\d.]+)$", err, re.MULTILINE)
        struck = float(itself[1]) if itself else self.struck
        lived_on = None if struck is None else now - struck
        return Ending(self.process.returncode, now - self.began, struck, lived_on, out, err)


def kill_group(pid):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def end_all():
    """Kill what still runs."""
    while ALIVE:
        kill_group(ALIVE.pop())
