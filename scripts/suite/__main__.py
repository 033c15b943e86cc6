"""Optimisers at one setting each, on nine kinds of work: `python -m scripts.suite [WORKLOAD ...]`.

A run is a workload, a method and one of three seeds, a minute or two on one core. Runs that are
there are skipped, so that the same command, again and again, ends with all of them; one that is cut
starts over. AdamW, tuned for each workload by ten trials, sets the target. Under --out:

    <out>/suite/*.jsonl         a row a run, a file a workload
    <out>/suite/seconds.json    the seconds of a step, by --time
    <out>/suite/profile.png     the performance profiles
    <out>/suite.md              the scores, the targets, the steps and seconds to them, the rules

Exit code: 0 when all that was asked for is there, 75 when --time_limit came first, 130 after
Ctrl-C, 1 when a method's package is missing or there is nothing to draw, 2 for a command that makes
no sense, or rows of another suite.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import signal
import time

BEGAN = time.time()  # what a time limit counts from, the imports included
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of half an import

import argparse
import io

from tqdm import tqdm

from cli import (
    TIME_IS_UP,
    Parser,
    UserError,
    a_path,
    command,
    duration,
    interruptible,
    number,
    one_of,
)
from data.workers import usable_cores, work
from scripts.suite import page, protocol, timing, train
from scripts.suite.methods import METHODS, missing
from scripts.suite.rows import Rows
from scripts.suite.workloads import NAMES as WORKLOADS

DRAWING = 5  # seconds of a time limit that are left for the page
STEPS = 32  # of a run of --quick


def parse(argv=None):
    """(the parser, the arguments)."""
    parser = Parser(prog=command("scripts.suite"), description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog=f"workloads: {', '.join(WORKLOADS)}\n"
                    f"methods:   {', '.join(METHODS)}")  # fmt: skip
    add = parser.add_argument
    add("workloads", nargs="*", metavar="WORKLOAD", type=one_of(WORKLOADS), help="(default: all)")
    add("--methods", nargs="+", metavar="METHOD", type=one_of(METHODS), default=list(METHODS),
        help="(default: all)")
    add("--jobs", type=number(int, 1), metavar="K",
        help="runs at once, a core each (default: one a core, 8 at most)")
    add("--time_limit", type=duration, metavar="TIME",
        help="stop within 90s, 9m, 1h30m; the same command goes on")
    add("--out", default="reproduced", type=a_path,
        help="(default: %(default)s; results holds the published ones)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--list", action="store_true", help="list the runs with their states, and stop")
    instead("--draw", action="store_true", help="run nothing, write the page of what is there")
    instead("--time", action="store_true",
            help="run nothing, time a step of all methods, in turns, on a quiet machine")
    add("--quick", action="store_true", help=f"{STEPS} steps a run, to see that it runs")
    args = parser.parse_args(argv)
    alone = {"list": args.list, "draw": args.draw, "time": args.time}
    for name in (name for name, given in alone.items() if given):
        unused = dict.fromkeys(("jobs", "time_limit"), f"is of runs, and --{name} runs none")
        parser.refuse(argv, unused)
    if args.time:
        parser.refuse(argv, {"methods": "picks methods, and --time has all of them take turns",
                             "quick": "is of runs, and --time runs none"})  # fmt: skip
    args.out = Path(args.out)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file")
    args.workloads = [x for x in WORKLOADS if x in (args.workloads or WORKLOADS)]
    args.methods = [x for x in METHODS if x in args.methods]
    return parser, args


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser, args = parse(argv)
    try:
        return suite(args)
    except KeyboardInterrupt:
        kept = "the workloads that were timed are kept" if args.time else "the same command goes on"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def suite(args):
    """List, run or draw what the arguments ask for; returns the exit code."""
    rows = Rows(args.out / "suite", STEPS if args.quick else None)
    todo = protocol.needed(rows.read(), args.workloads, args.methods)
    lacking = {x: reason for x in {task.method for task in todo} if (reason := missing(x))}
    if args.list:
        show(rows.read(), args.workloads, args.methods, lacking)
        return 0
    code = 0
    if args.time:
        lacking = {x: reason for x in METHODS if (reason := missing(x))}
        for name in args.workloads:
            seconds, failed = timing.measure(name, [x for x in METHODS if x not in lacking])
            rows.add_timed(name, seconds)
            print(f"{name:12}", *(f"{x} {1000 * s:.3g} ms" for x, s in seconds.items()), sep="  ")
            lacking |= {f"{method} on {name}": reason for method, reason in failed.items()}
    elif not args.draw:
        code = run(args, rows, [x for x in args.methods if x not in lacking])
    lacking = {} if args.draw else lacking
    for method, reason in sorted(lacking.items()):
        print(f"left out: {method} ({reason})", file=sys.stderr)
    path = page.write(args.out, rows.read(), rows.timed())
    print(path or "There is nothing to draw yet")
    return code or int(bool(lacking) or not path)


def show(rows, workloads, methods, lacking):
    """Print the tasks of these rows that are done and the tasks that are next."""
    done = {protocol.task_of(row): row for row in rows}
    for task in [x for x in done if x.workload in workloads and x.method in methods]:
        print(f"{words(task):60} {done[task]['failed'] or 'finished'}")
    for task in protocol.needed(rows, workloads, methods):
        print(f"{words(task):60} {'to do' if task.method not in lacking else lacking[task.method]}")


def words(task):
    """A task in a few words: vit adamw rate=0.001 decay=0.01 seed 0."""
    setting = [f"{name}={value:g}" for name, value in task.setting]
    return " ".join([task.workload, task.method, *setting, f"seed {task.seed}"])


def run(args, rows, methods):
    """Run what is left to do; returns the exit code."""
    deadline = BEGAN + args.time_limit - DRAWING if args.time_limit else float("inf")
    jobs, ended, late = args.jobs or min(usable_cores(), 8), 0, False
    bar = tqdm(total=1, smoothing=0, dynamic_ncols=True, bar_format="{desc} {bar} {remaining} left",
               file=sys.stdout if sys.stdout.isatty() else io.StringIO())  # fmt: skip
    try:
        # A tuned method's seeds are known after its trials: these are rounds, two at most.
        while todo := protocol.needed(rows.read(), args.workloads, methods):
            bar.total = ended + len(todo)
            bar.set_description_str(f"{ended} of {bar.total} runs")
            tasks = {x: (x.workload, x.method, x.seed, dict(x.setting), rows.steps, deadline)
                     for x in todo}  # fmt: skip
            for task, row in work(train.run, tasks, jobs):
                if row is None:
                    late = True
                    continue
                rows.add(row)
                ended += 1
                bar.set_description_str(f"{ended} of {bar.total} runs, {words(task)}", False)
                bar.update()
                if not sys.stdout.isatty():
                    print(f"{ended} of {bar.total}  {words(task)}  {page.outcome(row)}")
            if late:
                goes_on = "the same command goes on" if ended else "give it a longer one"
                print(f"The time is up: {ended} runs have ended; {goes_on}")
                return TIME_IS_UP
        return 0
    finally:
        bar.close()


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
