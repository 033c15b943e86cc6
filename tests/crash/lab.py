"""Runs of main.py in processes that end with this one, and rounds of one run: broken, started
again, and compared at its end."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.crash.remains import differences, read_rows, saved, snapshot

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds after which a process hangs
GRACE = 20  # seconds to save and end in; SLURM's KillWait is 30 by default
ALIVE = set()  # the process groups that `end_all` kills


class Case(NamedTuple):
    """A command of main.py without --out; `steps` an epoch."""

    name: str
    flags: tuple
    epochs: int
    steps: int


@dataclass
class Report:
    """The result of a case that was broken in one way: a row of the table."""

    case: str
    how: str
    hits: int = 0
    rounds: int = 0
    equal: int = 0
    kinds: dict = field(default_factory=dict)  # of moments -> hits
    longest: float = 0.0  # seconds from a signal to the end of a run that saved
    faults: list = field(default_factory=list)
    note: str = ""


@contextlib.contextmanager
def uninterrupted():
    """A context that Ctrl-C or SIGTERM ends, and does not interrupt: a process that has begun is in
    ALIVE."""
    arrived, handlers = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(signal.getsignal(number)):
            handlers[number] = signal.signal(number, lambda *_: arrived.append(True))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        raise KeyboardInterrupt


class Child:
    """A process of main.py. With a `plan`, see victim.py, it strikes itself. A hit of `kind` is one
    that came before the end; then the exit code may be one of `codes` instead of 0."""

    def __init__(self, lab, plan=None, kind=None, codes=()):
        command = [sys.executable, lab.program, *lab.flags]
        if plan is not None:
            plan = {"program": lab.program, **plan}
            command = [sys.executable, "-m", "tests.crash.victim", json.dumps(plan), *lab.flags]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if lab.device == "cpu" else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **hidden}
        self.what, self.kind, self.codes, self.plan = "unbroken", kind, codes, plan or {}
        self.paths, self.struck = [lab.folder / "stdout", lab.folder / "stderr"], None
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err, uninterrupted():
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            ALIVE.add(self.process.pid)

    def wait(self, seconds):
        """Returns whether it ended within `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds) is not None
        return False

    def strike(self, number, group=True):
        """Send a signal to the process, or to all of its group."""
        self.struck = time.time()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, what):
        """Wait for the end; returns itself with `code`, None if it hung, `lived_on`, the seconds
        from the strike to the end, and its output."""
        self.what, ended = what, self.wait(PATIENCE)
        now = time.time()
        if not ended:
            self.strike(signal.SIGKILL)
            self.process.wait()
        ALIVE.discard(self.process.pid)
        self.code = self.process.returncode if ended else None
        self.stdout, self.stderr = (path.read_text(errors="replace") for path in self.paths)
        if itself := re.search(r"^struck ([\d.]+)$", self.stderr, re.MULTILINE):
            self.struck = float(itself[1])
        self.lived_on = self.struck and now - self.struck
        return self

    def faults(self):
        """What is wrong with how it ended."""
        if self.code is None:
            yield f"it had not ended after {PATIENCE} s: {self.stderr[-300:]!r}"
        elif self.code not in (0, *self.codes):
            yield f"exit code {self.code}: {self.stderr[-400:]!r}"
        elif self.code in (1, 2) and "error: " not in self.stderr and "Stopped" not in self.stdout:
            yield f"exit code {self.code} without a sentence"
        elif self.code == 130 and self.lived_on > GRACE:
            yield f"it ended {self.lived_on:.1f} s after the signal"
        if "Traceback" in self.stderr and self.plan.get("at", 1) >= 1:  # else it is Python's start
            yield f"a traceback: {self.stderr[-400:]!r}"


def end_all():
    """Kill every process that still runs."""
    while ALIVE:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ALIVE.pop(), signal.SIGKILL)


class Lab:
    """A case in `folder`, and its unbroken run: `unbroken` its snapshot, `census` its moments by
    kind, `seconds` how long it took, `start` of them before the first step, `size` a checkpoint's
    bytes, `bytes` those of all its files."""

    def __init__(self, case, folder, program=ROOT / "main.py", device="cpu"):
        self.case, self.program, self.device = case, str(program), device
        self.folder, self.disk = Path(folder), Path(folder, "disk")
        self.out = self.disk / "out"
        self.folder.mkdir(parents=True)
        self.flags = [*case.flags, "--epochs", str(case.epochs), "--out", str(self.out),
                      "--save_every", "3", "--device", device,
                      *(() if device == "cpu" else ("--deterministic",))]  # fmt: skip

    def run_unbroken(self):
        """Run the case twice, the second time under the victim's hooks. RuntimeError where a run
        fails or the two differ."""
        census, snapshots = self.folder / "census.json", []
        for plan in (None, {"census": str(census)}):
            self.fresh()
            began = time.time()
            if faults := [*Child(self, plan).end("unbroken").faults()]:
                raise RuntimeError(f"the unbroken run failed: {faults}")
            snapshots.append(snapshot(self.out))
        self.seconds, self.unbroken = time.time() - began, snapshots[0]
        if unlike := differences(*snapshots):
            raise RuntimeError(f"two unbroken runs differ: {unlike}")
        self.census = json.loads(census.read_text())
        epochs = [row for row in read_rows(self.out) if row["kind"] == "epoch"]
        self.start = max(self.seconds - sum(row["seconds"] for row in epochs), 0.0)
        self.size = max(x.stat().st_size for x in self.out.glob("checkpoints/*.pt"))
        self.bytes = sum(x.stat().st_size for x in self.out.rglob("*"))

    def fresh(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def break_runs(self, how, hits, strike, more=lambda: True, mend=None):
        """Break runs until they were hit `hits` times, or more() is false; returns the Report.

        strike(rest) runs one process, of a run of which the part `rest`, 0 to 1, is left, and
        returns the Child. mend() then repairs the disk, and each run has to end on a good one."""
        report = Report(self.case.name, how)
        while report.hits < hits and more():
            self.fresh()
            report.rounds += 1
            before = len(report.faults)
            self.one_round(report, hits, strike, more, mend)
            report.equal += len(report.faults) == before
        if report.hits < hits:
            report.note = f"{report.hits} of {hits}: the time was up"
        return report

    def one_round(self, report, hits, strike, more, mend):
        """Start one run again and again until it finishes, or to its first failure."""
        steps, total, finished, child = 0, self.case.epochs * self.case.steps, False, None
        while not finished or (mend and child.kind):
            broken = not finished and report.hits < hits and more()
            child = strike(1 - steps / total) if broken else Child(self).end("unbroken")
            if mend:
                mend()
            faults, before = [*child.faults()], steps
            try:
                epoch, step = saved(self.out)
                steps = epoch * self.case.steps + step
            except Exception as error:  # torch raises many kinds for a damaged file
                faults.append(f"the checkpoints are damaged: {error}")
            if steps < before and child.kind != "damaged":
                faults.append(f"the checkpoint went back from step {before} to {steps}")
            if child.code == 130:
                report.longest = max(report.longest, round(child.lived_on, 2))
                if child.kind == "step" and steps - before < child.plan["k"]:
                    faults.append(f"{steps - before} of {child.plan['k']} steps are saved")
            if child.kind:
                report.hits += 1
                report.kinds[child.kind] = report.kinds.get(child.kind, 0) + 1
                blow = f"{report.how} {report.hits}/{hits}, {child.what}: exit code {child.code}"
                print(f"{self.case.name}: {blow}, {steps} of {total} steps saved", flush=True)
            report.faults += [f"{child.what}: {fault}" for fault in faults]
            if child.code not in (0, *child.codes):
                return
            finished = child.code == 0
        faults = differences(self.unbroken, snapshot(self.out))
        if "finished" not in child.stdout.lower():
            faults.append("the last command did not print that the run has finished")
        report.faults += [f"round {report.rounds}: {fault}" for fault in faults]
        print(f"{self.case.name}: the run ended {'DIFFERENT' if faults else 'equal'}", flush=True)
