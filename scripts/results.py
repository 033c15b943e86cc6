"""The logs of the runs in the table, found by the table's rows, and the figures in other files."""

import json
import math
import statistics
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import flags
from runs.log import RunError, RunLog, read_rows
from runs.name import name_and_settings
from scripts.experiments import experiments


class Result(NamedTuple):
    """What is there of an experiment's run."""

    experiment: object
    first: dict  # the log's first row
    epochs: list  # its epoch rows, up to those that the figure reads
    steps: list  # its step rows
    stopped: str  # why it ended before its time, or None
    finished: bool  # there is nothing left to run

    def column(self, key):
        """A value an epoch, NaN where it was not finite or not measured."""
        return [float("nan") if row.get(key) is None else row[key] for row in self.epochs]

    @property
    def loss(self):
        """The last train loss, NaN where it was not finite."""
        return self.column("train_loss")[-1]

    @property
    def data(self):
        """What its images are, in words."""
        return data_name(self.first["settings"]["dataset"], self.first["data"])

    @property
    def last(self):
        """The last epoch row."""
        return self.epochs[-1]


class Results:
    """The runs of one scale under `<out>/<scale>`."""

    def __init__(self, out, scale):
        self.out, self.scale, self.folder = Path(out), scale, Path(out, scale)
        self.rows = {}  # of the logs that were read

    @cached_property
    def table(self):
        return experiments(self.scale)

    def planned(self, figure, panel, curve):
        """The rows of the table that are a run, its seeds or its grid."""
        return [row for row in self.table if row[:3] == (figure, panel, curve)]

    def find(self, experiment):
        """The Result of an experiment, or None where no epoch of it has been run.

        Raises RunError where something else lies in its place.
        """
        name, settings = identity(experiment.flags)
        path = self.folder / "logs" / f"{name}.jsonl"
        if not path.exists() or path.stat().st_size == 0:
            return None
        rows = self._read(path)
        RunLog.compare(settings, rows[0]["settings"], path)
        epochs = [row for row in rows if row["kind"] == "epoch"]
        if not epochs:
            return None
        end = rows[-1] if rows[-1]["kind"] == "end" else {}
        stopped = end.get("stopped") if end.get("final") else None
        # A last epoch counts with the end behind it: its checkpoint is written then.
        enough = len(epochs) + bool(end.get("final")) > experiment.epochs
        finished = enough or stopped is not None
        if len(epochs) > experiment.epochs:
            stopped = None  # that was later than this figure reads
        steps = [row for row in rows if row["kind"] == "step"]
        return Result(experiment, rows[0], epochs[: experiment.epochs], steps, stopped, finished)

    def _read(self, path):
        """The rows of a log, read once as long as it does not change."""
        state = path.stat()
        key = (path, state.st_mtime_ns, state.st_size)
        if key not in self.rows:
            self.rows[key] = read_rows(path)
        return self.rows[key]

    def of(self, figure, panel=None, curve=None):
        """The Results of a figure, of one panel, of one curve; those that are there, in the order
        of the table. Raises RunError where those of one panel saw different images."""
        rows = [row for row in self.table if row.figure == figure]
        rows = [row for row in rows if panel in (None, row.panel) and curve in (None, row.curve)]
        every = [found for found in map(self.find, rows) if found is not None]
        seen = {}
        for found in every:
            other = seen.setdefault(found.experiment.panel, found)
            if found.first["data"] != other.first["data"]:
                raise RunError(
                    f"{found.first['name']} and {other.first['name']} in {self.folder}/logs were "
                    "run on different images; keep them apart with --out"
                )
        return every

    def tuned(self, figure, panel, curve):
        """The run of a grid with the least final train loss; None while the search is under way,
        or where no run came to the end with a finite loss."""
        return tuned(self.of(figure, panel, curve), len(self.planned(figure, panel, curve)))


def tuned(grid, planned):
    """The run with the least final train loss among `planned` ones, of which those that did not
    break off have to be equally long; None while that is not so."""
    alive = [found for found in grid if not found.stopped]
    if len(grid) < planned or len({len(found.epochs) for found in alive}) != 1:
        return None
    finite = [found for found in alive if math.isfinite(found.loss)]
    return min(finite, key=lambda found: found.loss, default=None)


@cache
def identity(words):
    """Name and settings of the run that these flags of main.py make."""
    return name_and_settings(vars(flags.parse([*words, "--device", "cpu"], check=False)))


def log_name(flags):
    """The name of their run's files."""
    return identity(flags)[0]


def epochs_done(path):
    """The number of epoch rows in a log that may be growing."""
    try:
        return path.read_bytes().count(b'{"kind": "epoch"')
    except OSError:
        return 0


def read_measurement(path):
    """What scripts.majorisation wrote for figure 3; RunError where that is damaged."""
    try:
        what = json.loads(path.read_text(encoding="utf-8"))
        what["run"]["epochs"], what["states"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged; remove it, and figure 3 is measured anew") from error
    return what


def network_name(experiment):
    """What a run trains, in words."""
    flag = experiment.flag
    if flag("--arch") == "fcn":
        return f"FCN {flag('--depth')}×{flag('--width')}"
    return {"vgg": "VGG-16", "resnet18": "ResNet-18", "resnet50": "ResNet-50"}[flag("--arch")]


# Images that are not what their file's name says, by the checksum of the training images.
JPEG = {"2926c671": "JPEG CIFAR-10"}
NAMES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet": "ImageNet"}


def data_name(dataset, source):
    """What the images are, from the name of the set and what identifies them in a log."""
    crc = source.get("crc32", {}).get("train_images")
    return JPEG.get(crc, NAMES.get(dataset, dataset.removeprefix("npz:").removesuffix(".npz")))


def findings(folder):
    """Properties of tests, the last epoch of runs, ratios of times: from any files in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(Exception):  # a killed process leaves files of any form
            if path.suffix == ".xml":
                properties = ElementTree.parse(path).iter("property")
                found |= {x.get("name"): json.loads(x.get("value")) for x in properties}
            elif path.suffix == ".jsonl":
                first, *rows = read_rows(path)
                epochs = [row for row in rows if row["kind"] == "epoch"]
                seconds = statistics.median([row["seconds"] for row in epochs][-5:])
                graph = {"cuda_graph": first.get("cuda_graph"), **epochs[-1]}
                found[path.stem] = {**graph, "seconds": seconds}
            elif path.suffix == ".json":
                kinds, told = ("ratios", "bytes a", "epochs a", "reports"), path.read_text()
                found |= {k: x for k, x in json.loads(told).items() if k.startswith(kinds)}
    return found
