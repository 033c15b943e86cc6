"""Run what a figure of the paper needs, and draw it: `python -m scripts.reproduce fig5`.

Runs that are finished are skipped, runs that were cut go on from their last checkpoint: the same
command, again and again, ends with the figure. `all` is every figure. Data sets are fetched as by
main.py; runs whose data or packages cannot be had are left out and named. The result lies under
--out:

    <out>/<scale>/logs/*.jsonl       a log a run
    <out>/<scale>/figures/*.png      and .pdf
    <out>/README.md                  the paper's numbers beside these, and a verdict on each claim

Exit code: 0 when every run and every figure that was asked for is there, 75 when --time_limit came
first, 130 after Ctrl-C, 1 when a run failed or something was left out, 2 for a command that makes
no sense, or logs of other runs.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import signal
import time

BEGAN = time.monotonic()  # what a time limit counts from, the imports included
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of half an import

import argparse
import contextlib
import os
import re
import shlex
import subprocess

import flags
from cli import (
    TIME_IS_UP,
    Parser,
    UserError,
    a_path,
    command,
    device,
    duration,
    interruptible,
    number,
    one_of,
)
from data import default_data_dir
from scripts.experiments import FIGURES, SCALES

ROOT = Path(__file__).resolve().parent.parent


def figure(text):
    """An argument type: a figure, also as figure5, fig.5 or 5, or all."""
    number = re.fullmatch(r"(?i)(fig(?:ure)?s?)?[\s._-]*0*(\d*)", text)
    name = f"fig{number[2]}" if number else text
    if number and name not in FIGURES and name != "fig":  # no other number is meant
        raise argparse.ArgumentTypeError(f"no {name!r} among {', '.join([*FIGURES, 'all'])}")
    return name if name == "fig" else one_of([*FIGURES, "all"])(name)


def chosen_runs(text):
    """An argument type: a function of the tasks that returns the numbers that --runs names."""
    if re.search("[A-Za-z]", text):
        return lambda tasks: [i for i, x in enumerate(tasks) if text in log_name(x)]
    try:
        numbers = sorted({int(number) for number in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers: 0,2,5") from None
    return lambda tasks: numbers


def parse(argv=None):
    """(the parser, the arguments)."""
    parser = Parser(
        prog=command("scripts.reproduce"), description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="figures:\n" + "\n".join(f"  {k:8}{what}" for k, what in FIGURES.items()),
    )  # fmt: skip
    alone = "a figure stands alone, as in " + command("scripts.reproduce", "fig5")
    parser.absent = dict.fromkeys(("fig", "figure", "figures", "plot", "run"), alone)
    add = parser.add_argument
    add("figures", nargs="+", metavar="FIGURE", type=figure,
        help="fig1 to fig8, fig10, fig11, phases, or all")
    add("--scale", type=one_of(SCALES), default="quick", metavar="quick|full",
        help="(default: quick)")
    add("--jobs", type=number(int, 1), metavar="K",
        help="runs at once (default: one a core, 8 at most; 1 on a GPU)")
    add("--together", choices=["auto", "on", "off"], default="auto",
        help="whether runs at once share a process, on a GPU each in a stream of its own "
        "(default: auto, on a GPU)")
    add("--time_limit", type=duration, metavar="TIME",
        help="stop cleanly within 90s, 9m, 1h30m; the same command goes on")
    add("--epochs", type=number(int, 1), metavar="N",
        help="stop every run at N epochs at most; a later command goes on from there (runs with a "
        "schedule, which is laid out for their length, are left whole)")
    add("--out", default="reproduced", type=a_path,
        help="(default: %(default)s; results holds the published ones)")
    add("--data_dir", default=default_data_dir(), help="as main.py's")
    add("--device", type=device, help="as main.py's")
    add("--draw", action="store_true", help="run nothing, draw what is there")
    add("--list", action="store_true", help="list the runs by number, with their state, and stop")
    add("--fresh", action="store_true", help="start the runs that are not finished over")
    add("--runs", metavar="N,N|WORD", type=chosen_runs,
        help="these runs of the list alone, or those with WORD in their names, without drawing")
    add("--submit", choices=["slurm"], help="send the runs to a queue as an array job, --jobs of "
        "them at once, and the drawing after them")
    add("--sbatch", default=[], metavar="OPTIONS", type=shlex.split,
        help="options of sbatch: --sbatch='--gres=gpu:1 --time=4:00:00'")
    args = parser.parse_args(argv)
    parser.refuse(argv, without_effect(args))
    args.out = Path(args.out)
    if set(args.figures) == {"fig"}:
        parser.error("argument FIGURE: fig lacks its number, as fig5")
    args.figures = [x for x in FIGURES if x in args.figures or "all" in args.figures]
    if args.submit and (args.draw or args.runs or args.time_limit):
        parser.error("--submit sends whole runs: leave out --draw, --runs and --time_limit")
    if args.sbatch and not args.submit:
        parser.error("--sbatch goes with --submit slurm")
    if args.fresh and args.submit:
        parser.error("--fresh would start a run over whenever the queue does; leave it out")
    if args.device and not (args.submit or args.draw or args.list):
        flags.parse(["--dataset", "digits", "--device", args.device])  # exits where there is none
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file")
    return parser, args


def without_effect(args):
    """{name: reason} of the flags that ask for something that the command does not do."""
    how = "jobs", "together", "fresh", "runs"
    if args.list:
        return dict.fromkeys((*how, "time_limit", "draw", "submit", "sbatch"),
                             "is not for --list, which shows all the runs and runs none")
    if args.draw:
        return dict.fromkeys((*how, "epochs"), "is of runs, and --draw runs none") | (
            {"runs": "goes without drawing: leave out --draw"})
    if args.submit:
        return {"together": "is of runs on this machine, not of those in a queue"}
    return {}


if __name__ == "__main__":
    parse()  # a mistake is refused before torch is imported, which takes seconds

import torch

from data import data_folder
from data.workers import usable_cores
from runs.log import RunError
from scripts.results import Results, epochs_done, log_name
from scripts.runner import ITSELF, Process, Runner, availability, file_to_fetch, is_finished, tasks
from scripts.together import STREAMS, Host


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser, args = parse(argv)
    try:
        return reproduce(parser, args)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def reproduce(parser, args):
    """List, run, submit or draw what the arguments ask for; returns the exit code."""
    results, code, left_out = Results(args.out, args.scale), 0, {}
    every = tasks(results, args.figures, args.epochs)
    if args.list:
        show(args, every, results)
        return 0
    chosen = range(len(every)) if args.runs is None else args.runs(every)
    if args.runs and not chosen:
        parser.error("--runs: there is no run of that name; --list shows them")
    if any(not 0 <= i < len(every) for i in chosen):
        parser.error(f"--runs: the list has the numbers 0 to {len(every) - 1}")
    if not args.draw:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--out {args.out} cannot be made: {error.strerror}")
        todo, left_out = left_to_do(args, every, chosen, results)
        if args.submit and todo:
            submit(args, todo, results)
            return lacks(left_out)
        code = run(args, [every[i] for i in todo], results) if todo else 0
    if args.runs is None and not args.submit:
        code = max(code, draw(args, results))
    return max(code, lacks(left_out))


def show(args, every, results):
    """Print the table of the runs with their states."""
    lacking, absent = availability(args.data_dir, fetch=False), {}
    for i, task in enumerate(every):
        name = log_name(task)
        done = min(task.epochs, epochs_done(results.log(name)))
        state = f"{done}/{task.epochs} epochs"
        if is_finished(results, task):
            state = "finished" if done == task.epochs else f"stopped after {done} epochs"
        elif reason := lacking(task):
            state += f", left out: {reason}"
        else:
            absent[file_to_fetch(task, args.data_dir)] = None
        print(f"{i:3}  {name}  {state}")
    for path in filter(None, absent):
        print(f"There is no {path} yet: the first run fetches it")


def left_to_do(args, every, chosen, results):
    """(the numbers of the unfinished runs that can be run here, {reason: words about the others});
    prints both."""
    lacking, todo, left_out = availability(args.data_dir, fetch=True), [], {}
    unfinished = [i for i in chosen if not is_finished(results, every[i])]
    for i in unfinished:
        if reason := lacking(every[i]):
            left_out.setdefault(reason, []).append(every[i].flags)
        else:
            todo.append(i)
    lost = len(unfinished) - len(todo)
    print(f"{count(len(chosen))}: {len(chosen) - len(unfinished)} finished, {len(todo)} to do"
          + (f", {lost} left out" if lost else ""))  # fmt: skip
    for reason, lost in left_out.items():
        shown = dict.fromkeys(row.figure for row in results.table if row.flags in lost)
        of = ", ".join(figure for figure in shown if figure in args.figures)
        left_out[reason] = f"{count(len(lost))} of {of}"
        if todo:  # else the command ends with it
            print(f"  left out, {left_out[reason]}: {reason}")
    return todo, left_out


def lacks(left_out):
    """Print the runs that were left out, to the standard error; returns the exit code."""
    left_out.pop(ITSELF, None)
    if not left_out:
        return 0
    parts = [f"{runs} ({reason})" for reason, runs in left_out.items()]
    print(f"error: left out: {', '.join(parts)}", file=sys.stderr)
    return 1


def count(n):
    return f"{n} run" if n == 1 else f"{n} runs"


def submit(args, numbers, results):
    """Send the runs to SLURM as an array job, and the drawing after them."""
    again = [*args.figures, "--scale", args.scale, "--out", args.out.absolute(),
             "--data_dir", data_folder(args.data_dir).absolute()]  # fmt: skip
    again += ["--device", args.device] if args.device else []
    again += ["--epochs", str(args.epochs)] if args.epochs else []
    folder = results.folder.absolute() / "output"
    folder.mkdir(parents=True, exist_ok=True)

    def sbatch(*options, last=()):
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", *args.sbatch, *options, ROOT / "scripts/slurm/array.sh",
                 *again, *last],
                cwd=ROOT, encoding="utf-8", capture_output=True, stdin=subprocess.DEVNULL,
                env={"AGD_PYTHON": sys.executable, "AGD_REPO": str(ROOT), **os.environ},
            )  # fmt: skip
        except FileNotFoundError:
            words = "there is no sbatch here: --submit slurm is for a SLURM cluster"
            raise RunError(words) from None
        if done.returncode:
            reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            raise RunError(f"the queue refused the job: {reason}")
        return done.stdout.strip().split(";")[0]

    tickets = ",".join(map(str, numbers)) + (f"%{args.jobs}" if args.jobs else "")
    array = sbatch(f"--array={tickets}", f"--output={folder}/slurm-%A_%a.txt")
    print(f"Job {array}, an array of {count(len(numbers))}; their output: {folder}")
    after = sbatch(f"--dependency=afterany:{array}", "--job-name=agd-draw",
                   f"--output={folder}/slurm-%j.txt", last=["--draw"])  # fmt: skip
    print(f"Job {after} draws when they have ended")


def run(args, todo, results):
    """Run the tasks; returns the exit code."""
    cpu = args.device == "cpu" or (args.device is None and not torch.cuda.is_available())
    jobs = min(args.jobs or (min(usable_cores(), 8) if cpu else 1), len(todo))
    together = args.together == "on" or (args.together == "auto" and not cpu and jobs > 1)
    place = ["--data_dir", str(args.data_dir)] + (["--fresh"] if args.fresh else [])
    place += ["--device", args.device] if args.device else []
    with Host() if together else contextlib.nullcontext(Process) as start:
        jobs = min(jobs, STREAMS) if together else jobs
        runner = Runner(results, todo, jobs, place, deadline(args), start)
        in_time = runner.run(" ".join(args.figures[:3]))
    for name, reason in runner.failed.items():
        print(f"{name} {reason}", file=sys.stderr)
    if in_time:
        return 1 if runner.failed else 0
    words = f"{len(runner.ended)} of {count(len(todo))} have ended; the same command goes on"
    if runner.left() == runner.work:
        words = "no run has finished an epoch in it, and none would: give it a longer one"
    print(f"The time is up: {words}")
    return TIME_IS_UP


def deadline(args):
    """When the runs have to end, or None; the rest of the time is for stopping and for drawing."""
    if args.time_limit is None:
        return None
    return BEGAN + args.time_limit - min(8 + 3 * len(args.figures), args.time_limit / 3)


def draw(args, results):
    """Draw the figures that have runs, and write the page that shows them; returns the exit code,
    1 where one of them has none."""
    from scripts import figures, majorisation, report

    if args.time_limit is not None and time.monotonic() > BEGAN + args.time_limit:
        return TIME_IS_UP
    report.page(args.out)
    code, missing = 0, 0
    if "fig3" in args.figures:
        try:
            majorisation.measure(results, args.data_dir, deadline(args))
        except (UserError, TimeoutError) as error:
            print(f"fig3: not measured, {error}")
            code = TIME_IS_UP if isinstance(error, TimeoutError) else 0
    for figure in args.figures:
        try:
            paths = figures.save(figure, results)
            print(f"{figure}: {paths[0]}" if paths else f"{figure}: nothing to draw yet")
            missing += not paths
        except RunError as error:
            print(f"{figure}: not drawn, {error}")
            code = max(code, 1)
    if missing < len(args.figures):
        print(f"All of it: {report.write(args.out)}")
    if missing and args.draw:
        print("error: not all is drawn: the same command without --draw runs what is missing",
              file=sys.stderr)  # fmt: skip
    return max(code, 1) if missing else code


if __name__ == "__main__":
    interruptible()
    sys.exit(main())
