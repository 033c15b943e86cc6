"""Epochs a second of 1, 2, 4, ... small runs of main.py at once: case `many`."""

import contextlib
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from runs.log import RunError, read_rows
from scripts import reproduce
from scripts.benchmark.measure import compared, note, take_turns
from scripts.experiments import Experiment
from scripts.results import Results, log_name
from scripts.runner import tasks
from training.memory import bytes_free

A_RUN = 6e8  # bytes of a process


def runs_at_once(commands, epochs, device, args):
    """The seconds of the epochs of each run, by its own clock, of runs with these lists of flags at
    once, as by `scripts.reproduce --jobs`. RunError where one fails: its output is then under
    <out>/output."""
    with tempfile.TemporaryDirectory() as out:
        results = Results(out, "many")
        results.table = [Experiment("many", "", "AGD", epochs, tuple(x)) for x in commands]
        todo = tasks(results, ["many"])
        how = Namespace(jobs=len(todo), device=str(device), data_dir=str(args.data_dir),
                        fresh=False, figures=["many"], time_limit=None,
                        together=args.together)  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            code = reproduce.run(how, todo, results)
        if code:
            kept = Path(args.out, "output")
            shutil.copytree(results.folder / "output", kept, dirs_exist_ok=True)
            raise RunError(f"runs at once did not finish; their output is in {kept}")
        logs = [read_rows(results.log(log_name(task))) for task in todo]
    return [[row["seconds"] for row in x if row["kind"] == "epoch"] for x in logs]


def commands(args, count):
    """The flags of `count` runs that differ by their seed."""
    images = ["--dataset", "digits" if args.quick else args.dataset]
    if args.device == "cpu" and not args.quick:
        images += ["--train_examples", "4096", "--test_examples", "1024"]
    size = ["--depth", str(args.depth), "--width", str(args.width)]
    return [["--arch", "fcn", *size, *images, "--seed", str(seed)] for seed in range(count)]


def case(args, device):
    """The sum of the rates of the runs from their second epoch on."""
    epochs, counts = 2 if args.quick else 10, [2**k for k in range(2 if args.quick else 6)]
    counts = sorted({1, *args.counts}) if args.counts else counts
    if device.type == "cpu":
        counts = [k for k in counts if k * A_RUN < bytes_free(device)]

    def rate(k):
        runs = runs_at_once(commands(args, k), epochs, device, args)
        each = sum((epochs - 1) / sum(run[1:]) for run in runs)
        note(f"many: {each:.3g} epochs a second of {k} at once")
        return each

    rates = take_turns({str(k): k for k in counts}, args.repeats, rate, warm=0)
    rates = compared(rates, [(str(k), "1") for k in counts[1:]], "{} at once / one")
    return {"ratios": rates["ratios"], "quartiles": rates["quartiles"],
            "epochs a second": rates["seconds"], "epochs of a run": epochs,
            "command": " ".join(commands(args, 1)[0])}  # fmt: skip
