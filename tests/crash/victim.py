"""main.py in this process, struck at a chosen moment: `python -m tests.crash.victim PLAN FLAGS`.

The program is unchanged: an audit hook, torch's hook of all optimizers and wrappers of os.fsync and
Module.eval see the moments, which are of these kinds:

    create, read  a checkpoint's file is opened for writing, or for reading
    write         as create; the kernel ends the process within the file, after `bytes` of it
    fsync         before the call
    rename, sync  before each rename of a checkpoint, and before the folder is flushed
    log           the log or the record is opened, truncated or renamed
    step          after a step of the optimizer
    evaluation    before an evaluation
    row           as evaluation; the kernel ends the process within the log's next rows

PLAN is JSON. {"kind", "k": the moment's number within its kind, "signal": sent to this process,
"group": true to send it to the workers too, "bytes"} strikes once. {"errno", "k", "until"} lets the
changes below --out and the calls of fsync fail, from the k-th to the one before `until`. {"limit":
BYTES} lets no file outgrow that (EFBIG). {"census": FILE} counts the moments of each kind.
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

KINDS = ("create", "write", "fsync", "read", "rename", "sync", "log", "step", "evaluation", "row")
MOMENT = {"write": "create", "row": "evaluation"}  # the kind whose moments are counted
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
        if kind != self.awaited or self.seen[kind] != self.plan["k"]:
            return
        os.write(2, f"\nstruck {time.time():.3f}\n".encode())  # one call; lab.Child reads it
        if self.plan["kind"] in MOMENT:
            logs = Path(self.out, "logs").glob("*.jsonl") if self.plan["kind"] == "row" else ()
            limit = self.plan["bytes"] + sum(path.stat().st_size for path in logs)
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        else:
            (os.killpg if self.plan["group"] else os.kill)(self.pid, self.plan["signal"])

    def change(self, path=None):
        """Raise the plan's OSError where this change of a file is one that fails."""
        if "errno" not in self.plan or os.getpid() != self.pid:
            return
        self.changes += 1
        if self.plan["k"] <= self.changes < self.plan["until"]:
            raise OSError(self.plan["errno"], os.strerror(self.plan["errno"]), path)

    def audit(self, event, args):
        """Called before every open, mkdir and rename of Python's."""
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

    def install(self):
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook

        fsync, evaluate = os.fsync, torch.nn.Module.eval

        def counted_fsync(file):
            self.moment("fsync")
            self.change()
            fsync(file)

        # A hook of all modules would not do: with it the weights' last digits are others.
        def counted_eval(net):
            self.moment("evaluation")
            return evaluate(net)

        os.fsync, torch.nn.Module.eval = counted_fsync, counted_eval
        sys.addaudithook(self.audit)
        register_optimizer_step_post_hook(lambda *_: self.moment("step"))


def main():
    plan, flags = json.loads(sys.argv[1]), sys.argv[2:]
    victim = Victim(plan, flags[flags.index("--out") + 1])
    victim.install()
    if "limit" in plan:
        resource.setrlimit(resource.RLIMIT_FSIZE, (plan["limit"], plan["limit"]))
    sys.argv = [plan["program"], *flags]
    try:
        runpy.run_path(plan["program"], run_name="__main__")
    finally:
        if "census" in plan and os.getpid() == victim.pid:
            Path(plan["census"]).write_text(json.dumps(victim.seen), encoding="utf-8")


if __name__ == "__main__":
    main()
