"""Helpers of the tests that run main.py: flags, requests at given steps, what a run leaves."""

import json
import threading
from pathlib import Path

import torch

import main as program
from runs.checkpoint import unpack
from runs.record import THREAD
from training.control import NOTHING, Requests

QUICK = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "4"]
NAME = "fcn3x32-digits-mse-bs128-agd-seed0"
STEPS = 12  # of an epoch of QUICK
SMALL = ["--dataset", "digits", "--train_examples", "90", "--test_examples", "60", "--train_bs",
         "25", "--test_bs", "25", "--depth", "3", "--width", "16", "--epochs", "2",
         "--log_steps", "--log_updates"]  # fmt: skip
LOOKS = 2 * (4 + 3)  # of SMALL at the requests, after every batch of training and testing


class Plan(Requests):
    """Requests that come at given looks, counted from 1."""

    def __init__(self, asked):
        super().__init__()
        self.asked, self.looks = asked, 0

    def take(self):
        self.looks += 1
        return self.asked.get(self.looks, NOTHING)


def call(*flags, asked=None):
    """main() in this process. Returns its exit code and the Plan of its requests."""
    plan = Plan(asked or {})
    try:
        return program.main([str(flag) for flag in flags], plan), plan
    finally:
        for thread in threading.enumerate():  # an interrupted run does not wait for its record
            if thread.name == THREAD:
                thread.join()


def train(*flags, asked=None):
    """main() in this process. Returns its exit code."""
    return call(*flags, asked=asked)[0]


def only(out):
    """The name of the only run in `out`."""
    (name,) = [path.stem for path in (Path(out) / "logs").glob("*.jsonl")]
    return name


def rows(out, name=None):
    """The rows of a log; of the only run in `out` without a name."""
    text = (Path(out) / "logs" / f"{name or only(out)}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def comparable(rows):
    """The rows without times and dates, which differ from run to run."""
    drop = ("seconds", "images_per_second", "tokens_per_second", "date", "saving_seconds")
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def weights(out, name=None):
    """The weights of a checkpoint; of the only run in `out` without a name."""
    path = Path(out) / "checkpoints" / f"{name or only(out)}.pt"
    return torch.load(path, weights_only=True)["net"]


def equal(state, other):
    """Whether two state_dicts agree to the bit."""
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in other)


def same(one, other):
    """Assert that the only runs in two directories agree to the bit, in all rows after the first,
    weights and optimiser. Returns the checkpoint of the first."""
    name = only(one)
    assert comparable(rows(one, name))[1:] == comparable(rows(other, name))[1:]
    a, b = (unpack((out / "checkpoints" / f"{name}.pt").read_bytes()) for out in (one, other))
    assert equal(a["net"], b["net"])
    assert alike(a["optimizer"], b["optimizer"])
    return a


def alike(a, b):
    """Whether two plain values agree in types and, to the bit, in tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b
