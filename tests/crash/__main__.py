"""Break runs of main.py, and compare their ends: `python -m tests.crash`.

Every case is run unbroken; then the same command is broken at moments that --seed draws, started
again, and so on, until it has been hit --kills times; a run that finishes before that is followed
by a fresh one. Each has to end with the unbroken run's weights, optimiser and log, to the last bit,
and to leave no other files. Three moments in ten are a number of seconds after the start, for a
signal from outside; the rest are aimed, see tests/crash/victim.py: while a checkpoint or a row is
written, between two renames, in an evaluation, while the log is truncated.

--disk breaks the disk instead, see tests/crash/ways.py. Exit code: 0 where all ends are equal, 1
where one differs or a process ended as it must not, 2 for a wrong flag, 130 interrupted.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import shlex
import shutil
import signal
import tempfile
import time
from collections import Counter
from datetime import date

import torch

from tests.crash import ways
from tests.crash.lab import Lab, Report, end_all


def parse(argv=None):
    parser = argparse.ArgumentParser("python -m tests.crash", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--kills", type=int, default=20, help="of each case by each signal (default: 20)")
    add("--signal", choices=[*ways.SIGNALS, "all"], default="KILL", help="(default: KILL)")
    add("--workers", type=int, nargs="+", default=[0, 1, 3], help="of the folder (default: 0 1 3)")
    add("--cases", nargs="+", metavar="WORD", help="only cases with one of these in their names")
    add("--device", default="cpu", help="on a GPU, --deterministic (default: cpu)")
    add("--disk", action="store_true", help="a disk that fills, a folder that is read-only, ...")
    add("--seed", type=int, default=0, help="of the images and the moments (default: 0)")
    add("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    add("--keep", action="store_true", help="leave the folders of the runs, and print where")
    args = parser.parse_args(argv)
    if args.kills < 1 or min(args.workers) < 0:
        parser.error("--kills is 1 or more, --workers are 0 or more")
    return args


def main(argv=None):
    """Run the command line and print its result in Markdown; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args, began = parse(argv), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="crash-"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        reports = list(run_all(args, folder, lambda: time.monotonic() - began < args.seconds))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        end_all()
        if args.keep:
            print(f"The runs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    moments = sorted(sum((Counter(x.kinds) for x in reports), Counter()).items())
    hits, equal, rounds = (sum(getattr(x, k) for x in reports) for k in ("hits", "equal", "rounds"))
    print(
        f"\n`{shlex.join(['python', '-m', 'tests.crash', *argv])}`: **{hits} hits, {equal} of "
        f"{rounds} ends equal**, torch {torch.__version__}, {date.today()}, "
        f"{time.monotonic() - began:.0f} s. "
        f"Moments: {', '.join(f'{kind} {number}' for kind, number in moments)}.\n\n"
        "| case | by | hits | equal ends | longest save |\n| --- | --- | --- | --- | --- |"
    )
    for x in reports:
        print(f"| {x.case} | {x.how} | {x.hits} | {x.equal} of {x.rounds} | {x.longest:.1f} s |")
    for x in reports:
        for line in [*filter(None, [x.note]), *(f"FAULT: {fault}" for fault in x.faults)]:
            print(f"{x.case}, {x.how}: {line}")
    return int(any(x.faults for x in reports))


def run_all(args, folder, more):
    """The Report of every case and way to break it."""
    ways.make_images(folder / "images", args.seed)
    cases = [case for case in ways.make_cases(args.workers, folder / "images")
             if not args.cases or any(word in case.name for word in args.cases)]  # fmt: skip
    hows = [args.signal] if args.signal != "all" else ways.SIGNALS
    if args.disk:
        cases, hows = cases[:1], ways.DISKS
    for i, case in enumerate(cases):
        if not more():
            yield Report(case.name, "", note="the time was up")
            continue
        lab = Lab(case, folder / f"case{i}", device=args.device)
        lab.run_unbroken()
        for how in hows:
            yield ways.break_case(lab, how, args.kills, args.seed, more)
        if not args.keep:
            shutil.rmtree(lab.folder)


if __name__ == "__main__":
    sys.exit(main())
