"""Small runs at once: how many epochs a second come of 1, 2, 4, ... runs on one machine."""

import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from check.resources import free_memory
from runs.log import RunError, read_rows
from scripts import reproduce
from scripts.benchmark.measure import (
    medians,
    note,
    quartiles,
    ratios,
    spread,
    take_turns,
)
from scripts.experiments import Experiment
from scripts.results import Results, log_name
from scripts.runner import Task

A_RUN = 6e8  # bytes that a process of its own takes


def runs_at_once(commands, epochs, device, args):
    """Seconds until all of these runs of main.py, lists of flags, have come to their end, their
    start included; and of each run the seconds of its epochs, by its own clock.

    They run as those of `scripts.reproduce --jobs` do; where one fails, RunError, and what they
    said is under <out>/output.
    """
    with tempfile.TemporaryDirectory() as out:
        results = Results(out, "many")
        results.table = [Experiment("many", "", "AGD", epochs, tuple(x)) for x in commands]
        todo = [Task(log_name(row.flags), row.flags, epochs) for row in results.table]
        how = Namespace(jobs=len(todo), device=str(device), data_dir=str(args.data_dir),
                        fresh=False, figures=["many"], time_limit=None,
                        together=args.together)  # fmt: skip
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            code = reproduce.run(how, todo, results)
        seconds = time.perf_counter() - start
        if code:
            kept = Path(args.out, "output")
            shutil.copytree(results.folder / "output", kept, dirs_exist_ok=True)
            raise RunError(f"runs at once did not come to their end; what they said is in {kept}")
        logs = [read_rows(results.folder / "logs" / f"{task.name}.jsonl") for task in todo]
    return seconds, [[row["seconds"] for row in x if row["kind"] == "epoch"] for x in logs]


def commands(args, count):
    """The flags of `count` runs, alike but for their seed."""
    size = ["--depth", str(args.depth), "--width", str(args.width)]
    if args.quick:
        images = ["--dataset", "digits"]
    elif args.device == "cpu":
        images = ["--dataset", args.dataset, "--train_examples", "4096", "--test_examples", "1024"]
    else:
        images = ["--dataset", args.dataset]
    return [["--arch", "fcn", *size, *images, "--seed", str(seed)] for seed in range(count)]


def case(args, device):
    """Two rates, in epochs a second: in training, the sum over the runs by their own clocks from
    the second epoch on; and with the start, all epochs by the time until the last run has ended."""
    epochs = 2 if args.quick else 10
    training, whole = {}, {}

    def timer(count):
        seconds, runs = runs_at_once(commands(args, count), epochs, device, args)
        rate = sum((epochs - 1) / sum(run[1:]) for run in runs)
        measured.append((count, rate, count * epochs / seconds))
        note(f"many: {rate:.3g} epochs a second of {count} at once")
        return seconds

    measured, counts = [], [2**k for k in range(2 if args.quick else 6)]
    if args.counts:
        counts = sorted({1, *args.counts})
    if device.type == "cpu":
        counts = [k for k in counts if k * A_RUN < free_memory(device)]
    seconds = take_turns({str(k): k for k in counts}, args.repeats, timer, warm=0, say="many")
    for count, rate, with_start in measured:
        training.setdefault(str(count), []).append(rate)
        whole.setdefault(str(count), []).append(with_start)
    pairs = [(str(k), "1") for k in counts[1:]]
    each, each_whole = (
        {f"{key.split()[0]} at once / one": x for key, x in ratios(rates, pairs).items()}
        for rates in (training, whole)
    )
    note(f"many: {statistics.median(training['1']):.3g} epochs a second of one run alone")
    return {
        "ratios": medians(each),
        "ratios with the start": medians(each_whole),
        "quartiles": quartiles(each),
        "quartiles with the start": quartiles(each_whole),
        "epochs a second": spread(training),
        "epochs a second with the start": spread(whole),
        "seconds": spread(seconds),
        "epochs of a run": epochs,
        "command": " ".join(commands(args, 1)[0]),
    }
