"""What checkpoints take of a run: their share of an epoch's time."""

import tempfile
from argparse import Namespace
from pathlib import Path

import torch

import cli
from architecture import build
from data import load
from distributed import World
from flags import parse, test_batch
from runs.log import RunLog
from scripts.benchmark.measure import by_clock, medians, note, quartiles, spread, take_turns
from training.control import Requests
from training.course import Course
from training.gradient import Gradient
from training.losses import mse
from training.optimizers import make_optimizer
from training.step import evaluate, train_epoch

RUNS = {  # network, optimiser, steps and images of the test that stand for an epoch (None: all)
    "FCN 10×256, AGD": ("fcn", "agd", None, None),
    "ResNet-18, AGD": ("resnet18", "agd", 2, 128),
    "ResNet-18, Adam": ("resnet18", "adam", 2, 128),  # which has two numbers a weight beside it
}
PERCENT = "ratios in percent of an epoch"  # the key of what is told


class Failed(OSError):
    """A checkpoint was not written: what was timed is none."""


def works(args, device, arch, optimizer, steps, test_examples, out):
    """({"training", "test", "checkpoint": functions} of a run as main.py makes it; the part of an
    epoch's images that the first two go through, {name: part}; the Run)."""
    test_bs = test_batch(Namespace(device=args.device, arch=arch, dataset=args.dataset,
                                         train_bs=args.batch_size))  # fmt: skip
    sizes = args.dataset, args.data_dir, args.batch_size, test_bs, device
    whole = load(*sizes)
    few = {"train_examples": steps and steps * args.batch_size, "test_examples": test_examples}
    data = load(*sizes, **few)
    torch.manual_seed(0)
    net = build(arch, data.shape, data.classes, args.depth, args.width).to(device)
    optimizer = make_optimizer(
        optimizer, net, lr=1e-3, seed=0
    )
    run = RunLog(out, "run", {})
    run.start({"kind": "run", "flags": {}})
    course = Course(World(device), run, data, net, optimizer, mse, Requests(),
                    ("seconds", every()), note)  # fmt: skip
    course.gradient, epochs = Gradient(net, mse), iter(range(1, 1000))

    def training():
        data.train.set_epoch(next(epochs))
        train_epoch(net, data.train, mse, optimizer, course.gradient).read()

    def checkpoint():
        course.save(None)
        if course.failure is not None:
            raise Failed(f"no checkpoint: {course.failure}")

    parts = {"training": data.train.examples / whole.train.examples,
             "test": data.test.examples / whole.test.examples}  # fmt: skip
    training()  # the optimiser has all its numbers from its first step on
    found = {"training": training, "test": lambda: evaluate(net, data.test, mse).read(),
             "checkpoint": checkpoint}  # fmt: skip
    return found, parts, run


def every():
    """The seconds between two checkpoints that main.py takes by itself, beside one an epoch."""
    return cli.every(parse(["--cpu"]).save_every)[1]


def shares(seconds, parts):
    """The share of the time of a run's epochs that goes to checkpoints, of each round, and the
    seconds of such an epoch: one checkpoint at its end, and one whenever the time between two has
    passed."""
    names = ("training", "test")
    epochs = [sum(x / parts[name] for name, x in zip(names, each))
              for each in zip(*(seconds[name] for name in names))]  # fmt: skip
    count = [1 + epoch / every() for epoch in epochs]
    return [n * x / epoch for n, x, epoch in zip(count, seconds["checkpoint"], epochs)], epochs


def case(args, device):
    """Wall-clock time, the only one that waits for a disk: that of --out."""
    percent, times, sizes = {}, {}, {}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for label, (arch, optimizer, steps, test_examples) in RUNS.items():
        if args.quick:
            steps, test_examples = 1, 64
        with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=args.out) as out:
            turns, parts, run = works(args, device, arch, optimizer, steps, test_examples, out)
            seconds = take_turns(turns, args.repeats, by_clock(device), say=label)
            sizes[label] = run.checkpoint_path.stat().st_size
            run.release()
        each, epochs = shares(seconds, parts)
        percent[label] = [100 * x for x in each]
        times[label] = spread({"checkpoint": seconds["checkpoint"], "epoch": epochs})
    return {
        PERCENT: medians(percent),
        "quartiles": quartiles(percent),
        "seconds": times,
        "bytes": sizes,
        "seconds between two in a long epoch": every(),
    }
