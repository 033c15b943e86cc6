"""A run on disk: from a word of the command line to its log, its checkpoint, its network, and to
the numbers of an evaluation."""

import math
import os
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import agd
from architecture import build
from architecture.weights import freeze
from cli import UserError, near
from runs.checkpoint import Damaged, settings_of, unpack, validate
from runs.files import reason
from runs.log import RunError, differences, disk_errors, read_first_row
from training.foreign import load_state, optimizer_class
from training.gradient import Gradient
from training.losses import xent
from training.memory import is_out_of_memory
from training.metrics import bits_a_byte
from training.optimizers import make_optimizer
from training.step import evaluate, show_average
from training.trainer import check_every_image_seen, recalibrate

BEST, CHECKPOINTS = ".best.pt", (".best.pt", ".pt.previous", ".pt")
SUFFIXES = (".run.json", ".jsonl", *CHECKPOINTS)  # of the files of a run
SCALAR = (str, int, float, bool, type(None))
MOST = 4  # runs that a message names


class Saved(NamedTuple):
    """A run on disk, and one of its checkpoints.

    log, path: of the log and the checkpoint. first: the log's first row; first["flags"] are those
    of main.py, by name. checkpoint: its content, of validate(); its "net" is what the optimiser
    evaluates at the end of an epoch, and what it trains in the middle of one.
    """

    log: Path
    path: Path
    first: dict
    checkpoint: dict

    def network(self):
        """The network, with the weights to evaluate, on the CPU, in evaluation mode; in fp32,
        whatever the run had. The run's data are not needed. Raises RunError."""
        first, flags = self.first, self.first["flags"]
        if not {"shape", "classes"} <= first.keys():
            raise RunError(f"{self.log} is of an earlier version, which did not log the shape that "
                           "its network takes")  # fmt: skip
        own = ("depth", "width", "bias", "affine")
        with self._fitting():
            sizes = first.get("network") or {key: flags[key] for key in own if key in flags}
            net = build(flags["arch"], tuple(first["shape"]), first["classes"], **sizes)
            if flags.get("freeze"):
                freeze(net, flags["freeze"].split(","))
        self.load(net, first["shape"])
        return net.eval()

    def load(self, net, shape):
        """Load the weights to evaluate into `net`, of inputs of `shape`: between epochs those of
        the checkpoint, in the middle of one those that the optimiser shows. Returns whether batch
        norm has no statistics of them yet. Raises RunError where they do not fit."""
        checkpoint, flags, optimizer = self.checkpoint, self.first["flags"], None
        shows = checkpoint["step"] and has_modes(flags["optimizer"])
        with self._fitting():
            if shows:  # before the weights: to read L, which no step will use, changes batch norm
                optimizer = make_optimizer(flags["optimizer"], net, shape, lr=flags.get("lr"),
                                           weight_decay=flags.get("weight_decay"))  # fmt: skip
            net.load_state_dict(checkpoint["net"])
            if optimizer is not None:
                load_state(optimizer, checkpoint["optimizer"])
                show_average(optimizer)
        return isinstance(optimizer, agd.SpectralAGD)

    def evaluate(self, net, data, loss_fn, world, progress):
        """The metrics of `net`, with these weights, on the test examples of `data`, as the end of
        an epoch measures them: {"test_loss", "test_acc"}, and "test_bits" of a text whose bytes
        are known. Every rank of `world` calls it."""
        whole, step, done = self.checkpoint["epoch"], self.checkpoint["step"], count(1)
        epoch, (_, micro_bs) = whole + (step > 0), self.checkpoint["micro_bs"]
        if self.load(net, data.shape):
            recalibrate(net, data.train, Gradient(net, loss_fn, world, micro_bs), world, epoch)
        progress.begin(whole, step)
        tested = evaluate(net, data.test, loss_fn, micro_bs,
                          lambda: progress.testing(epoch, next(done), len(data.test)))  # fmt: skip
        tested = tested.read(world.all_reduce_in_order, data.positions)
        check_every_image_seen(tested, data.test, world)
        row = {"test_loss": tested["loss"], "test_acc": tested["acc"]}
        if data.bytes_a_token and loss_fn is xent:
            row["test_bits"] = bits_a_byte(tested["loss"], data.bytes_a_token[1])
        return row

    def remarks(self, data):
        """Sentences about the Data of an evaluation: the data's own, and how it differs from the
        run's."""
        now = {"data": data.source}
        now |= {} if data.class_names is None else {"classes": list(data.class_names)}
        odd = ", ".join(differences(self.first["settings"], now))
        return [*data.notes, *([f"not the data of the run ({odd})"] if odd else [])]

    @contextmanager
    def _fitting(self):
        """A context in which what a network or an optimiser raises becomes RunError."""
        try:
            yield
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError,
                OverflowError) as error:  # fmt: skip
            if is_out_of_memory(error):
                raise
            lines = reason(error).splitlines()
            raise RunError(f"{self.path} does not fit the network of {self.log} "
                           f"({lines[min(1, len(lines) - 1)].strip()[:150]})") from error


def open_run(run, out="output"):
    """The Saved of a run; see `find`. Raises RunError."""
    log, path = find(run, out)
    first = first_row(log)
    with disk_errors(path, "read"):
        try:
            checkpoint = unpack(path.read_bytes())
        except Damaged as error:
            before = path.with_name(f"{path.name}.previous")
            other = f"; {before} is the one before" if before.exists() else ""
            raise RunError(f"{path} is damaged: {error}{other}") from error
    settings = settings_of(checkpoint)
    if settings is None:
        raise RunError(f"{path} is no checkpoint of a run")
    odd = list(differences(first["settings"], settings))
    if odd:
        raise RunError(f"{path} is of another run than {log} ({', '.join(odd[:MOST])})")
    try:
        return Saved(log, path, first, validate(checkpoint, math.inf))
    except ValueError as error:
        raise RunError(f"{path} is no checkpoint of a run: {error}") from error


def first_row(log):
    """The first row of a log, with the flags of its run. Raises RunError."""
    first = read_first_row(log)
    odd = [key for key, x in first["flags"].items() if not isinstance(x, SCALAR)]
    odd += [key for key in ("arch", "dataset", "loss", "optimizer")
            if not isinstance(first["flags"].get(key), str)]  # fmt: skip
    if odd:
        raise RunError(f"{log} is no log of a run: its flags have no {odd[0]} that can be used")
    return first


def find(run, out="output"):
    """(the log, the checkpoint) of RUN: a log, a record, a checkpoint, a folder with one run, or
    the name of a run, or of one of its files, below the folder `out`. The path of a file may lack
    its suffix. The checkpoint is the newest one, unless RUN is another. Raises RunError."""
    path = Path(run)
    if os.path.isdir(path):
        path = _only(path)
    elif not os.path.exists(path):
        path = _named(run, Path(out))
    name, suffix = split(path.name)
    if not suffix:
        raise RunError(f"{path} is no file of a run: those are NAME.jsonl, NAME.run.json, NAME.pt "
                       "and NAME.best.pt")  # fmt: skip
    log = path if suffix == ".jsonl" else _beside(path, "logs", f"{name}.jsonl")
    if not log.exists():
        raise RunError(f"there is no log {log}, which has the flags of {path.name}")
    if suffix in CHECKPOINTS:
        return log, path
    newest = _beside(path, "checkpoints", f"{name}.pt")
    before = newest.with_name(f"{newest.name}.previous")
    if not newest.exists() and not before.exists():
        raise RunError(f"there is no {newest}: the run of this log has no checkpoint")
    return log, newest if newest.exists() else before  # between two renames


def has_modes(optimizer):
    """Whether an optimiser, by its name, evaluates other weights than it trains. Raises RunError
    where its class is not here."""
    try:
        own = "." in optimizer and hasattr(optimizer_class(optimizer), "eval")
    except ValueError as error:
        raise RunError(str(error)) from error
    return own or optimizer == "spectral"


def split(name):
    """(the name of a run, the suffix) of the name of one of its files; other names have none."""
    suffix = next((x for x in SUFFIXES if name.endswith(x)), "")
    return name.removesuffix(suffix), suffix


def _beside(path, folder, name):
    """The file `name` beside `path`, or in `folder` beside its folder, as a run has them."""
    here = path.with_name(name)
    parent = path.parent.parent if path.parent.name not in ("", "..") else path.parent / ".."
    return here if here.exists() else parent / folder / name


def _only(folder):
    """The log of the only run in a folder."""
    logs = [*folder.glob("*.jsonl"), *folder.glob("logs/*.jsonl")]
    if not logs and folder.name == "checkpoints":
        logs = (folder.parent / "logs").glob("*.jsonl")
    logs = sorted(logs)
    if not logs:
        raise RunError(f"{folder} holds no logs, nor does its logs/")
    if len(logs) > 1:
        raise RunError(f"{folder} has {len(logs)} runs: {_some(x.stem for x in logs)}; name one")
    return logs[0]


def _named(run, out):
    """The file of a run that `run` names: a path, or a name in `out`."""
    name, suffix = split(os.path.basename(run))
    if os.path.dirname(run):  # of a file, whose suffix may be left out
        own = (f"{run}{x}" for x in (".pt", ".jsonl", ".pt.previous"))
        path = Path(next(filter(os.path.exists, own), run))
    elif suffix in CHECKPOINTS:
        path = out / "checkpoints" / run
    else:
        path = out / "logs" / f"{name}.jsonl"
    if os.path.exists(path):
        return path
    folder = path.parent
    names = sorted({split(x)[0] for x in os.listdir(folder) if split(x)[1]}
                   if os.path.isdir(folder) else ())  # fmt: skip
    if suffix == BEST and name in names:
        raise RunError(f"there is no {path}: a run keeps it with --keep_best")
    others = near(name, names) or (f", which has {_some(names)}" if names else ", nor any other")
    raise RunError(f"there is no run {name} in {folder}{others}")


def _some(names):
    names = list(names)
    return ", ".join(names[:MOST]) + (f" and {len(names) - MOST} more" if names[MOST:] else "")
