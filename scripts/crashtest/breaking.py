"""One case, broken by one kind of signal as often as is asked for, and compared round by round."""

import json
import math
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path

from scripts.crashtest.child import PROGRAM, Child
from scripts.crashtest.remains import Remains, differences
from scripts.crashtest.victim import KINDS, MOMENT

SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "TERM", "INT", "USR1")}
GRACE = 20  # seconds to save and end in; SLURM's KillWait is 30 by default
PATIENCE = 300  # seconds after which a process hangs


@dataclass
class Report:
    """What came of a case: a row of the table."""

    case: str
    how: str
    hits: int = 0
    rounds: int = 0
    equal: int = 0
    kinds: dict = field(default_factory=dict)  # moment -> hits
    longest: float = 0.0  # seconds from a signal to the end
    lost: int = 0  # steps, at most, by a signal that asks the run to end
    faults: list = field(default_factory=list)
    note: str = ""

    def hit(self, kind):
        self.hits += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1


class Lab:
    """One case in a folder of its own: the unbroken run, and as many broken ones as are wanted."""

    def __init__(
        self, case, folder, save_every=None, program=PROGRAM, say=print, device="cpu"
    ):
        self.case, self.program, self.say, self.device = case, program, say, device
        self.folder = Path(folder)
        self.out = self.folder / "out"
        self.folder.mkdir(parents=True)
        self.seconds = self.start = self.size = self.unbroken = self.census = None
        self.flags = [
            *(case.flags + ("--epochs", str(case.epochs), "--out", str(self.out))),
            *(("--device", device) if device == "cpu" else ("--device", device, "--deterministic")),
            *(("--save_every", save_every) if save_every else ()),
        ]

    def child(self, plan=None):
        return Child(self.flags, self.folder, plan, self.program, self.device)

    def fresh(self):
        shutil.rmtree(self.out, ignore_errors=True)

    def run_unbroken(self):
        """The Remains that all others are compared with; RuntimeError where the run fails."""
        self.fresh()
        plain = self.child().end(PATIENCE)
        if plain.code:
            raise RuntimeError(f"the unbroken run ended with {plain.code}: {plain.said()[-5:]}")
        self.seconds = plain.seconds
        self.unbroken = Remains(self.out)
        training = sum(x["seconds"] for x in self.unbroken.rows if x["kind"] == "epoch")
        self.start = max(self.seconds - training, 0.0)
        self.unbroken.out = self.folder / "unbroken"
        shutil.move(self.out, self.unbroken.out)  # --out may be a disk of its own
        checkpoints = self.unbroken.out.glob("checkpoints/*.pt")
        self.size = max(path.stat().st_size for path in checkpoints)
        return self.unbroken

    def count_moments(self):
        """How many moments of each kind an unbroken run has, for `draw`; RuntimeError where this
        second unbroken run differs from the first."""
        self.fresh()
        census = self.folder / "census.json"
        counted = self.child({"census": str(census)}).end(PATIENCE)
        if counted.code:
            raise RuntimeError(f"the counted run ended with {counted.code}: {counted.said()[-5:]}")
        odd = differences(self.unbroken, Remains(self.out))
        if odd:
            raise RuntimeError(f"two unbroken runs differ: {odd}")
        self.census = json.loads(census.read_text(encoding="utf-8"))

    def steps(self, place):
        epoch, step = place
        return epoch * self.case.steps + step


def draw(lab, name, rng, done):
    """A plan of victim.py, or {"kind": "time", ...} for a signal from outside; `done` is the part
    of the run that lies behind."""
    number = SIGNALS[name]
    kinds = [kind for kind in KINDS if lab.census.get(MOMENT.get(kind, kind))]
    if number != signal.SIGKILL:  # a limit kills
        kinds = [kind for kind in kinds if kind not in MOMENT]
    # Sometimes anywhere in what is left, sometimes soon, so that a run is hit many times.
    left = (1 - done) * rng.choice((1, 0.25))
    plan = {"signal": int(number), "group": rng.random() < 0.5}
    if rng.random() < 0.3:
        return {**plan, "kind": "time", "at": seconds_into(lab, rng, left)}
    kind = rng.choice(kinds)
    count = lab.census[MOMENT.get(kind, kind)]
    # The log is opened, cut and renamed at the start, once more when a run goes on.
    most = count + 4 if kind == "log" else max(1, math.ceil(count * left))
    plan |= {"kind": kind, "k": rng.randint(1, most)}
    if kind in MOMENT:
        plan["bytes"] = rng.randint(1, lab.size if kind == "write" else 200)
    return plan


def seconds_into(lab, rng, left):
    """A time at which to strike: one in five while the process starts, the rest in the part of the
    run that is `left`."""
    if rng.random() < 0.2:
        return rng.uniform(0, lab.start)
    return lab.start + rng.uniform(0, left * (lab.seconds - lab.start))


def describe(plan):
    """When a signal came, in words."""
    if plan["kind"] == "time":
        return f"after {plan['at']:.2f} s"
    within = f", {plan['bytes']:,} bytes in" if plan["kind"] in MOMENT else ""
    return f"{plan['kind']} {plan['k']}{within}"


def struck(lab, plan):
    """The Ending of a process that meets `plan`, None for one that is let be."""
    if plan is None or plan["kind"] != "time":
        return lab.child(plan).end(PATIENCE)
    child = lab.child()
    if not child.wait(plan["at"]):
        child.strike(plan["signal"], plan["group"])
    return child.end(PATIENCE)


def faults_of(ending, plan, number):
    """What is wrong with how a process ended."""
    allowed = {0}
    if ending.struck is not None:
        # Before main.py takes over, and where a limit is the means, a signal does what it does.
        allowed |= {-number, -signal.SIGXFSZ}
        if number in (signal.SIGINT, signal.SIGTERM):
            allowed.add(130)
    if ending.code not in allowed:
        yield f"exit code {ending.code}: {' | '.join(ending.said()[-3:])[-400:]}"
    elif "Traceback" in ending.stderr and not (plan or {}).get("at", 1) < 1:
        yield f"a traceback: {ending.stderr[-400:]!r}"
    if number != signal.SIGKILL and ending.code == 130 and ending.lived_on > GRACE:
        yield f"it ended {ending.lived_on:.1f} s after the signal"


def break_runs(lab, name, kills, next_plan, more=lambda: True):
    """The Report of `lab`'s case, hit `kills` times by the signal called `name`, in as many rounds
    as that takes; fewer times if `more()` says that there is no time. `next_plan` makes a plan from
    the part of the run that is done."""
    report = Report(lab.case.name, name)
    while report.hits < kills and more():
        lab.fresh()
        report.rounds += 1
        if one_round(lab, kills, next_plan, more, report):
            report.equal += 1
    if report.hits < kills:
        report.note = f"{report.hits} of {kills}: the time was up"
    return report


def one_round(lab, kills, next_plan, more, report):
    """A run from its start to its end, or to a fault; whether it ended equal."""
    name, number = report.how, SIGNALS[report.how]
    before, known, at_end = (0, 0), len(report.faults), False
    while not at_end:
        done = min(lab.steps(before) / (lab.case.epochs * lab.case.steps), 1)
        plan = next_plan(done) if report.hits < kills and more() else None
        faults = []
        try:
            ending = struck(lab, plan)
            faults += faults_of(ending, plan, number)
            remains = Remains(lab.out)
            after = remains.place()
        except Exception as error:  # torch raises many kinds for a damaged file
            report.faults.append(f"{name} {describe(plan) if plan else 'at no time'}: {error}")
            return False
        if ending.struck is not None:
            report.hit(plan["kind"])
            if ending.code == 130:
                report.longest = max(report.longest, ending.lived_on)
                if plan["kind"] == "step":
                    lost = plan["k"] - (lab.steps(after) - lab.steps(before))
                    report.lost = max(report.lost, lost)
            whom = "all its processes" if plan["group"] else "the process"
            lab.say(f"{lab.case.name}: {name} {report.hits}/{kills} to {whom}, {describe(plan)}: "
                    f"exit code {ending.code}; checkpoint of epoch {after[0]} + {after[1]} steps, "
                    f"{remains.epochs} epochs in the log")  # fmt: skip
        if after < before:
            faults.append(f"the checkpoint went back from {before} to {after}")
        before, at_end = after, ending.code == 0
        moment = describe(plan) if plan else "let be"
        report.faults += [f"{name}, {moment}: {fault}" for fault in faults]
        if ending.code > 0 and ending.code != 130:
            return False
    found = differences(lab.unbroken, Remains(lab.out))
    if "Finished" not in ending.stdout and "finished" not in ending.stdout:
        found.append("the last command did not say that the run has finished")
    report.faults += [f"round {report.rounds}: {odd}" for odd in found]
    equal = not found and len(report.faults) == known
    lab.say(f"{lab.case.name}: round {report.rounds} ended {'equal' if equal else 'DIFFERENT'}")
    return equal
