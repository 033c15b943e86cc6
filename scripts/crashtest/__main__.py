"""Break runs of main.py, and compare what they end with: `python -m scripts.crashtest`.

Every case is run unbroken; then the same command is broken at moments that --seed draws, started
again, and so on, until it has been hit --kills times; a run that came to its end before that is
followed by a fresh one. Each has to end with the unbroken run's weights, optimiser and log, to the
last bit, and to leave no other files. Three moments in ten are so many seconds after the start, by
a signal from outside; the rest are aimed, see scripts/crashtest/victim.py: while a checkpoint or a
row is written, between two renames, in evaluation, while the log is cut.

--disk breaks the disk instead: see scripts/crashtest/disk.py.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from runs.provenance import environment
from scripts.crashtest import disk
from scripts.crashtest.breaking import SIGNALS, Lab, Report, break_runs, draw
from scripts.crashtest.cases import SAVE_EVERY, make_cases, make_images
from scripts.crashtest.child import ROOT, end_all
from training.display import table


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.crashtest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--kills", type=int, default=20, help="of each case by each signal (default: 20)")
    add("--signal", choices=[*SIGNALS, "all"], default="KILL", help="(default: KILL)")
    add(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 3],
        help="of the image folder (default: 0 1 3)",
    )
    add("--cases", nargs="+", metavar="WORD", help="only cases with one of these in their names")
    add("--device", default="cpu", help="on a GPU, --deterministic (default: cpu)")
    add("--disk", action="store_true", help="a disk that fills, a folder that is read-only, ...")
    add("--seed", type=int, default=0, help="of the images and the moments (default: 0)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing more after so many")
    add("--out", type=Path, help="write the counts to this file, as JSON")
    add("--keep", action="store_true", help="leave the folders of the runs, and say where")
    args = parser.parse_args(argv)
    if args.kills < 1 or min(args.workers) < 0:
        parser.error("--kills is 1 or more, --workers are 0 or more")
    return args


def main(argv=None):
    """Run the command line; returns the exit code: 1 where anything differed."""
    args = parse(argv)
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="crashtest-"))
    reports, code = [], 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        reports = list(run_all(args, folder, lambda: time.monotonic() - began < args.seconds))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    finally:
        end_all()
        if args.keep:
            print(f"The runs lie in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if code:
        return code
    show(reports)
    if args.out:
        write(args, reports, time.monotonic() - began)
    return 1 if any(report.faults for report in reports) else 0


def run_all(args, folder, more):
    """The Report of every case and way to break it."""
    images = folder / "images"
    make_images(images, args.seed)
    save_every = SAVE_EVERY if "--save_every" in (ROOT / "flags.py").read_text() else None
    cases = [
        case for case in make_cases(args.workers, images)
        if not args.cases or any(word in case.name for word in args.cases)
    ]  # fmt: skip
    if args.disk:
        yield from disk.break_disks(cases[0], folder, args.kills, args.seed, save_every, more, say)
        return
    names = list(SIGNALS) if args.signal == "all" else [args.signal]
    for i, case in enumerate(cases):
        if not more():
            yield Report(case.name, names[0], note="the time was up")
            continue
        lab = Lab(case, folder / f"case{i}", save_every, say=say, device=args.device)
        unbroken = lab.run_unbroken()
        lab.count_moments()
        say(f"{case.name}: unbroken in {lab.seconds:.1f} s, weights {unbroken.sha256()[:16]}")
        for name in names:
            rng = random.Random(f"{args.seed} {case.name} {name}")
            yield break_runs(lab, name, args.kills, partial(draw, lab, name, rng), more)
        if not args.keep:
            shutil.rmtree(lab.folder)


def say(line):
    print(line, flush=True)


def show(reports):
    """Every case in a row, then what was wrong."""
    print()
    header = ("Case", "By", "Hits", "Equal ends", "Longest to save", "Steps lost")
    rows = [
        (r.case, r.how, str(r.hits), f"{r.equal} of {r.rounds}",
         f"{r.longest:.1f} s" if r.longest else "", str(r.lost) if r.longest else "")
        for r in reports
    ]  # fmt: skip
    columns = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, columns)).rstrip())
    moments = {}
    for report in reports:
        for kind, hits in report.kinds.items():
            moments[kind] = moments.get(kind, 0) + hits
    table(("Moment", "Hits"), sorted(moments.items()))
    for report in reports:
        if report.note:
            print(f"{report.case}, {report.how}: {report.note}")
        for fault in report.faults:
            print(f"FAULT: {report.case}: {fault}")
    equal, rounds = (sum(getattr(r, key) for r in reports) for key in ("equal", "rounds"))
    print(f"{sum(r.hits for r in reports)} hits, {equal} of {rounds} ends equal")


def write(args, reports, seconds):
    flags = {k: str(x) if isinstance(x, Path) else x for k, x in vars(args).items() if k != "out"}
    flags["seconds"] = None if args.seconds == float("inf") else args.seconds
    found = {
        "command": "python -m scripts.crashtest",
        "flags": flags,
        "environment": environment(torch.device(args.device)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "took_seconds": round(seconds, 1),
        "reports": [{**asdict(report), "longest": round(report.longest, 2)} for report in reports],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".partial")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, args.out)


if __name__ == "__main__":
    sys.exit(main())
