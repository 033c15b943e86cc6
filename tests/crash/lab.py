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
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tests.crash.remains import differences, read_rows, saved, snapshot

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300  # seconds after which a process hangs
GRACE = 20  # seconds to save and end in; SLURM's KillWait is 30 by default
ALIVE = set()  # the process groups that `end_all` kills


say = partial(print, flush=True)


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


class Blow(NamedTuple):
    """How one process was struck, and how it ended."""

    what: str
    code: int | None  # exit code; negative: of a signal; None: it hung
    lived_on: float | None = None  # seconds from the strike to the end; None: nothing struck it
    kind: str | None = None  # of moment; None: no hit
    allowed: tuple = ()  # exit codes beside 0
    step: int = 0  # the steps that a process had made when it was asked to end
    stdout: str = ""
    stderr: str = ""


class Child:
    """A process of main.py. With a `plan`, see victim.py, it strikes itself."""

    def __init__(self, lab, plan=None):
        command = [sys.executable, lab.program, *lab.flags]
        if plan is not None:
            plan = json.dumps({**plan, "program": lab.program})
            command = [sys.executable, "-m", "tests.crash.victim", plan, *lab.flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if lab.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.paths, self.struck = [lab.folder / "stdout", lab.folder / "stderr"], None
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=err,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ALIVE.add(self.process.pid)

    def wait(self, seconds):
        """Returns whether it ended within `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.returncode is not None

    def strike(self, number, group):
        """Send a signal to the process, or to all of its group."""
        self.struck = time.time()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, what, **facts):
        """Wait for the end; returns the Blow."""
        ended, now = self.wait(PATIENCE), time.time()
        if not ended:
            self.strike(signal.SIGKILL, group=True)
            self.process.wait()
        ALIVE.discard(self.process.pid)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.paths)
        itself = re.search(r"^struck ([\d.]+)$", err, re.MULTILINE)
        struck = float(itself[1]) if itself else self.struck
        return Blow(what, self.process.returncode if ended else None, struck and now - struck,
                    stdout=out, stderr=err, **facts)  # fmt: skip


def end_all():
    """Kill every process that still runs."""
    while ALIVE:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(ALIVE.pop(), signal.SIGKILL)


class Lab:
    """A case in `folder`, and its unbroken run: `unbroken` its snapshot, `census` its moments by
    kind, `seconds` how long it took, `start` of them before the first step, `size` a checkpoint's
    bytes, `bytes` those of all its files."""

    def __init__(self, case, folder, program=ROOT / "main.py", say=say, device="cpu"):
        self.case, self.program, self.say, self.device = case, str(program), say, device
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
            blow = Child(self, plan).end("unbroken")
            if blow.code != 0:
                raise RuntimeError(f"the unbroken run failed: {blow}")
            snapshots.append(snapshot(self.out))
        self.seconds, self.unbroken = time.time() - began, snapshots[0]
        if unlike := differences(*snapshots):
            raise RuntimeError(f"two unbroken runs differ: {unlike}")
        self.census = json.loads(census.read_text(encoding="utf-8"))
        epochs = [row for row in read_rows(self.out) if row["kind"] == "epoch"]
        self.start = max(self.seconds - sum(row["seconds"] for row in epochs), 0.0)
        self.size = max(x.stat().st_size for x in self.out.glob("checkpoints/*.pt"))
        self.bytes = sum(x.stat().st_size for x in self.out.rglob("*"))

    def fresh(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def break_runs(self, how, hits, strike, more=lambda: True, mend=None):
        """Break runs until they were hit `hits` times, or more() is false; returns the Report.

        strike(rest) runs one process, of a run of which the part `rest`, 0 to 1, is left, and
        returns its Blow. mend() then repairs the disk, and such a run has to end on a good one."""
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
        steps, total, finished, blow = 0, self.case.epochs * self.case.steps, False, None
        while not finished or (mend and blow.kind):
            broken = not finished and report.hits < hits and more()
            blow = strike(1 - steps / total) if broken else Child(self).end("unbroken")
            if mend:
                mend()
            faults, before = list(faults_of(blow)), steps
            try:
                epoch, step = saved(self.out)
                steps = epoch * self.case.steps + step
            except Exception as error:  # torch raises many kinds for a damaged file
                faults.append(f"the checkpoints are damaged: {error}")
            if steps < before and blow.kind != "damaged":
                faults.append(f"the checkpoint went back from step {before} to {steps}")
            if blow.code == 130 and steps - before < blow.step:
                faults.append(f"{steps - before} of {blow.step} steps are saved")
            if blow.kind:
                report.hits += 1
                report.kinds[blow.kind] = report.kinds.get(blow.kind, 0) + 1
                if blow.code == 130:
                    report.longest = max(report.longest, round(blow.lived_on, 2))
                self.say(f"{self.case.name}: {report.how} {report.hits}/{hits}, {blow.what}: "
                         f"exit code {blow.code}, {steps} of {total} steps are saved")  # fmt: skip
            report.faults += [f"{blow.what}: {fault}" for fault in faults]
            if blow.code not in (0, *blow.allowed):
                return
            finished = blow.code == 0
        faults = differences(self.unbroken, snapshot(self.out))
        if "finished" not in blow.stdout.lower():
            faults.append("the last command did not print that the run has finished")
        report.faults += [f"round {report.rounds}: {fault}" for fault in faults]
        self.say(f"{self.case.name}: the run ended {'DIFFERENT' if faults else 'equal'}")


def faults_of(blow):
    """What is wrong with how a process ended."""
    if blow.code is None:
        yield f"it had not ended after {PATIENCE} s: {blow.stderr[-300:]!r}"
    elif blow.code not in (0, *blow.allowed):
        yield f"exit code {blow.code}: {blow.stderr[-400:]!r}"
    elif blow.code in (1, 2) and "error: " not in blow.stderr and "Stopped: " not in blow.stdout:
        yield f"exit code {blow.code} without a sentence"
    elif blow.code == 130 and blow.lived_on > GRACE:
        yield f"it ended {blow.lived_on:.1f} s after the signal"
    # A signal in Python's own start, before main.py takes over, prints one.
    if "Traceback" in blow.stderr and blow.code != -signal.SIGINT:
        yield f"a traceback: {blow.stderr[-400:]!r}"
