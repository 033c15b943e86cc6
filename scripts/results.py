"""The logs of the runs in the table, found by the table's rows."""

import json
import math
import statistics
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import flags as command_line
from data import is_text
from runs.log import RunError, RunLog, read_rows
from runs.name import name_and_settings
from scripts.experiments import experiments
from scripts.words import data_name

LEAST = 0.01  # of the length of a run: no rate is chosen before
BEGINNING = 0.05  # of the length of a run: nothing is judged or compared before


class Result(NamedTuple):
    """The logged part of an experiment's run."""

    experiment: object
    first: dict  # the log's first row
    epochs: list  # its epoch rows, up to the last one that the figure reads
    steps: list  # its step rows
    stopped: str  # why it ended early, or None
    finished: bool  # nothing is left to run

    def column(self, key):
        """A value an epoch, NaN where it was not finite or not measured."""
        return [math.nan if row.get(key) is None else row[key] for row in self.epochs]

    @property
    def last(self):
        """The last epoch row."""
        return self.epochs[-1]

    @property
    def loss(self):
        """The last train loss, NaN where it was not finite."""
        return self.column("train_loss")[-1]

    @property
    def test_loss(self):
        """The last loss in testing, of a text in validation, NaN where it was not finite."""
        return self.column("test_loss")[-1]

    @property
    def only_begun(self):
        """Whether it is too short yet to be judged or compared."""
        return not self.finished and len(self.epochs) < BEGINNING * self.experiment.epochs

    def until(self, epochs):
        """The run as it stood after so many epochs, or itself where it has no more."""
        if epochs is None or len(self.epochs) <= epochs:
            return self
        return self._replace(epochs=self.epochs[:epochs], stopped=None, finished=False)

    @property
    def seconds(self):
        """The seconds of its epochs, training and test."""
        return sum(row["seconds"] for row in self.epochs)

    @property
    def epoch_steps(self):
        """The steps of an epoch."""
        return math.ceil(self.first["train_examples"] / self.first["settings"]["train_bs"])

    @property
    def is_text(self):
        return is_text(self.first["settings"]["dataset"])

    @property
    def data(self):
        """The name of its images or its text."""
        return data_name(self.first["settings"]["dataset"], self.first["data"])


class Results:
    """The runs of one scale under `<out>/<scale>`."""

    def __init__(self, out, scale):
        self.out, self.scale, self.folder = Path(out), scale, Path(out, scale)
        self.rows = {}  # of each log that was read

    @cached_property
    def table(self):
        return experiments(self.scale)

    def log(self, name):
        """The path of a run's log."""
        return self.folder / "logs" / f"{name}.jsonl"

    def planned(self, figure, panel=None, curve=None):
        """The rows of the table of a figure, a panel or a curve: a run, its seeds or its grid."""
        return [row for row in self.table if row.figure == figure
                and panel in (None, row.panel) and curve in (None, row.curve)]  # fmt: skip

    def find(self, experiment):
        """The Result of an experiment, or None before its first epoch. Raises RunError where the
        log is that of another run."""
        name, settings = identity(experiment)
        path = self.log(name)
        if not path.exists() or path.stat().st_size == 0:
            return None
        state = path, path.stat().st_mtime_ns, path.stat().st_size
        if state not in self.rows:
            self.rows[state] = read_rows(path)
        rows = self.rows[state]
        RunLog.compare(settings, rows[0]["settings"], path)
        epochs = [row for row in rows if row["kind"] == "epoch"]
        if not epochs:
            return None
        end = rows[-1] if rows[-1]["kind"] == "end" else {}
        stopped = end.get("stopped") if end.get("final") else None
        # A last epoch counts with the end row behind it: its checkpoint is written before that row.
        enough = len(epochs) + bool(end.get("final")) > experiment.epochs
        finished = enough or stopped is not None
        if len(epochs) > experiment.epochs:
            stopped = None  # after the last epoch that this figure reads
        steps = [row for row in rows if row["kind"] == "step"]
        return Result(experiment, rows[0], epochs[: experiment.epochs], steps, stopped, finished)

    def of(self, figure, panel=None, curve=None):
        """The Results of a figure, a panel or a curve, in the table's order. Raises RunError where
        runs of one panel saw different images."""
        rows, seen = self.planned(figure, panel, curve), {}
        results = [result for result in map(self.find, rows) if result is not None]
        for result in results:
            other = seen.setdefault(result.experiment.panel, result)
            if result.first["data"] != other.first["data"]:
                raise RunError(
                    f"{result.first['name']} and {other.first['name']} in {self.folder}/logs were "
                    "run on different images; keep them apart with --out"
                )
        return results

    def only(self, figure, panel, curve):
        """The run of a curve that a picture shows: the first seed, or None."""
        return next(iter(self.of(figure, panel, curve)), None)

    def tuned(self, figure, panel, curve):
        """The run of `tuned_seeds` with the first seed, or None."""
        return next(iter(self.tuned_seeds(figure, panel, curve)), None)

    def by_rate(self, figure, panel, curve):
        """{learning rate: its Results, one a seed} of a grid, in the table's order."""
        rates = {}
        for result in self.of(figure, panel, curve):
            rates.setdefault(result.experiment.flag("--lr"), []).append(result)
        return rates

    def searched_epochs(self, figure, panel, curve):
        """The epochs that all runs of a grid have which did not break off. 0 while a run is missing
        or has less than LEAST of its length, or all of it where its schedule depends on that."""
        grid = self.of(figure, panel, curve)
        alive = [result for result in grid if not result.stopped]
        if (len(grid) < len(self.planned(figure, panel, curve))
                or any(x.experiment.scheduled and not x.finished for x in alive)):  # fmt: skip
            return 0
        epochs = min((len(x.epochs) for x in alive or grid), default=0)
        return epochs if grid and epochs >= LEAST * grid[0].experiment.epochs else 0

    def tuned_seeds(self, figure, panel, curve, most=math.inf):
        """The runs, one a seed, of the rate of a grid with the least train loss, a mean over the
        seeds, after the `searched_epochs` or `most`; they may go on from there. [] where there are
        none, or no rate has finite losses."""
        epochs = min(self.searched_epochs(figure, panel, curve), most)

        def mean(runs):
            return sum(x.until(epochs).loss for x in runs) / len(runs)

        rates = self.by_rate(figure, panel, curve).values() if epochs else ()
        finite = [runs for runs in rates
                  if not any(x.stopped for x in runs) and math.isfinite(mean(runs))]  # fmt: skip
        return min(finite, key=mean, default=[])

    def title(self, *key):
        """Network, data and number of images of a figure's panel, of its first row; the data are
        named by the logs where there are any."""
        row, result = self.planned(*key)[0], next(iter(self.of(*key)), None)
        data, part = row.flag("--dataset"), row.flag("--train_examples")
        words = f"{row.network}, {result.data if result else data_name(data)}"
        return words + (f", {int(part):,} images" if part else "")


def common_epochs(runs):
    """The last epoch that all runs have which did not break off, nor have only begun."""
    runs = list(runs)
    alive = [len(x.epochs) for x in runs if not x.stopped and not x.only_begun]
    return min(alive, default=max(len(x.epochs) for x in runs))


def searched(grid):
    """The progress of a grid search: after each epoch of all its points (epochs spent, seconds
    spent, row of the point with the least train loss), as far as every unbroken point goes."""
    alive = [len(result.epochs) for result in grid if not result.stopped]
    for n in range(1, min(alive, default=0) + 1):
        rows = [result.epochs[n - 1] for result in grid if len(result.epochs) >= n]
        finite = [row for row in rows if row["train_loss"] is not None]
        if finite:
            spent = [row["seconds"] for result in grid for row in result.epochs[:n]]
            yield len(spent), sum(spent), min(finite, key=lambda row: row["train_loss"])


@cache
def identity(experiment):
    """Name and settings of an experiment's run."""
    words = [*experiment.flags, "--epochs", str(experiment.epochs), "--device", "cpu"]
    return name_and_settings(vars(command_line.parse(words, check=False)))


def log_name(experiment):
    """The name of the files of an experiment's run."""
    return identity(experiment)[0]


def epochs_done(path):
    """The number of epoch rows in a log that may be growing."""
    with suppress(OSError):
        return path.read_bytes().count(b'{"kind": "epoch"')
    return 0


def findings(folder):
    """Numbers from any files in a folder: properties of tests (XML), the last epoch of runs
    (JSONL), ratios of times (JSON)."""
    numbers = {}
    for path in sorted(folder.rglob("*")):
        with suppress(Exception):  # a killed process leaves files of any form
            if path.suffix == ".xml":
                properties = ElementTree.parse(path).iter("property")
                numbers |= {x.get("name"): json.loads(x.get("value")) for x in properties}
            elif path.suffix == ".jsonl":
                first, *rows = read_rows(path)
                epochs = [row for row in rows if row["kind"] == "epoch"]
                seconds = statistics.median([row["seconds"] for row in epochs][-5:])
                graph = {"cuda_graph": first.get("cuda_graph"), **epochs[-1]}
                numbers[path.stem] = {**graph, "seconds": seconds}
            elif path.suffix == ".json":
                kinds = "ratios", "bytes a", "epochs a", "reports"
                content = json.loads(path.read_text(encoding="utf-8"))
                numbers |= {key: x for key, x in content.items() if key.startswith(kinds)}
    return numbers
