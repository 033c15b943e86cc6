"""main.py in this process, struck at a chosen moment: `python -m scripts.crashtest.victim PLAN
FLAGS`, FLAGS being those of main.py, --out among them.

Nothing of the program is changed. What it does to the files below --out is seen by an audit hook,
fsync, a step and a batch of an evaluation by a wrapper, each a moment of a kind:

    create      a checkpoint's temporary file is opened to be written: the epoch's row is in the
                log by then, the checkpoint is not
    write       as create; death comes within the file, after `bytes` of it
    fsync       before the call
    read        a checkpoint is opened to be read, back or to go on from it
    rename      before each of the renames of a checkpoint
    sync        after them, before the folder is flushed
    log         the log is opened, cut, renamed
    step        after a step of training
    evaluation  before a batch of an evaluation
    row         as evaluation; death comes within the rows written next, after `bytes` of them

PLAN is JSON: {"kind": ..., "k": the moment's number among those of its kind, "signal": what this
process sends itself there, "group": true to send it to the workers too, "bytes": ...}. "write" and
"row" are the kernel's doing: a file that outgrows the process's limit ends it with SIGXFSZ.
{"errno": ..., "k": ..., "until": ...} strikes nobody: what writes to --out fails with that error
instead, from the k-th such moment to the one before `until`. {"limit": BYTES} lets no file grow
past that, EFBIG. {"census": FILE} counts the moments of each kind, for a plan to be drawn from.
"""

import json
import os
import resource
import runpy
import signal
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("create", "write", "fsync", "read", "rename", "sync", "log", "step", "evaluation", "row")
# What is counted for a kind that is another one's moment.
MOMENT = {"write": "create", "row": "evaluation"}
CHANGES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Victim:
    """Counts the moments of this process, and strikes at the one that `plan` names."""

    def __init__(self, plan, out):
        self.plan, self.out, self.pid = plan, os.path.abspath(out), os.getpid()
        self.seen, self.changes = Counter(), 0
        self.awaited = MOMENT.get(plan.get("kind"), plan.get("kind"))

    def moment(self, kind):
        if os.getpid() != self.pid:  # a worker, which has inherited the hooks
            return
        self.seen[kind] += 1
        if kind == self.awaited and self.seen[kind] == self.plan["k"]:
            self.strike()

    def strike(self):
        plan = self.plan
        # One write call: another process reads this.
        os.write(2, f"\nstruck {time.time():.3f}\n".encode())
        if plan["kind"] in MOMENT:
            grown = sum(os.path.getsize(path) for path in Path(self.out, "logs").glob("*.jsonl"))
            limit = plan["bytes"] + (grown if plan["kind"] == "row" else 0)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        elif plan.get("group"):
            os.killpg(0, plan["signal"])
        else:
            os.kill(self.pid, plan["signal"])

    def change(self, path):
        """A moment at which something below --out is to be changed, which can fail."""
        if "errno" in self.plan and os.getpid() == self.pid:
            self.changes += 1
            if self.plan["k"] <= self.changes < self.plan["until"]:
                if self.changes == self.plan["k"]:
                    os.write(2, f"\nstruck {time.time():.3f}\n".encode())
                raise OSError(self.plan["errno"], os.strerror(self.plan["errno"]), str(path))

    def audit(self, event, args):
        """What sys.addaudithook tells: before every open, rename, ... of Python's."""
        if event not in ("open", "os.rename", "os.mkdir") or not isinstance(args[0], str | Path):
            return
        path = os.path.abspath(args[0])
        folder = os.path.relpath(path, self.out).split(os.sep)[0]
        if path.endswith(".lock") or folder not in ("checkpoints", "logs"):
            return
        changes = event != "open" or bool(args[2] & CHANGES)
        if changes:
            self.change(path)
        if folder == "logs":
            self.moment("log")
        elif event == "os.rename":
            self.moment("rename")
        elif event == "open" and os.path.basename(path) == "checkpoints":
            self.moment("sync")
        elif event == "open":
            self.moment("create" if changes else "read")

    def watch(self):
        """Put the hooks in place."""
        import training.step as train

        fsync, step, evaluate = os.fsync, train.Step.__call__, train.evaluate

        def counted_fsync(file):
            self.moment("fsync")
            fsync(file)

        def counted_step(*args, **kwargs):
            found = step(*args, **kwargs)
            self.moment("step")
            return found

        def counted_evaluate(net, batches, *args, **kwargs):
            return evaluate(net, Counted(batches, self), *args, **kwargs)

        os.fsync, train.Step.__call__ = counted_fsync, counted_step
        train.evaluate = counted_evaluate
        sys.addaudithook(self.audit)


class Counted:
    """Batches as they are; before each there is a moment."""

    def __init__(self, batches, victim):
        self.batches, self.victim = batches, victim

    def __iter__(self):
        for batch in self.batches:
            self.victim.moment("evaluation")
            yield batch

    def __len__(self):
        return len(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def main():
    plan, flags = json.loads(sys.argv[1]), sys.argv[2:]
    program = plan.get("program", str(ROOT / "main.py"))
    victim = Victim(plan, flags[flags.index("--out") + 1])
    victim.watch()
    if "limit" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], plan["limit"]))
    sys.argv = [program, *flags]
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        if "census" in plan and os.getpid() == victim.pid:
            Path(plan["census"]).write_text(json.dumps(victim.seen), encoding="utf-8")


if __name__ == "__main__":
    main()
