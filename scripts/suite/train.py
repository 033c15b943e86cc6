"""One run of the suite: a workload, a method, a seed."""

import math
import time
from importlib import import_module
from itertools import islice

import torch
import torch.nn as nn

from agd import AGD, recalibrate
from scripts.suite.methods import METHODS

EVALUATIONS = 32  # of a run, at equal distances, beside the one before the first step
CALIBRATION = 50  # batches from which batch norm's statistics of averaged weights are taken
VALIDATION_BATCH = 256


def workload(name):
    """The module of a workload; scripts/suite/workloads says what it holds."""
    return import_module(f"scripts.suite.workloads.{name}")


def order(examples, size, seed):
    """The indices (size,) of batch after batch, shuffled anew in every epoch; the rest of an epoch
    that is smaller is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(examples, generator=generator).split(size):
            if len(rows) == size:
                yield rows


@torch.no_grad()
def evaluate(work, net, valid):
    """The mean score of the validation examples."""
    net.eval()
    parts = zip(*(x.split(VALIDATION_BATCH) for x in valid))
    result = torch.cat([work.score(net, *part) for part in parts]).double().mean().item()
    net.train()
    return result


class Loss(nn.Module):
    """The loss of `examples` at the indices `rows`, as a module that `recalibrate` can run."""

    def __init__(self, work, net, examples):
        super().__init__()
        self.net, self.loss, self.examples = net, work.loss, examples

    def forward(self, rows):
        return self.loss(self.net, *(x[rows] for x in self.examples))


def step(loss_of, optimizer, rows):
    """Train on a batch; returns its loss, a float."""
    loss = loss_of(rows)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def run(name, method, seed, setting=None, steps=None, deadline=math.inf):
    """The row of a run, or None if time.time() passes `deadline` before its end:

        workload, method, seed, setting   as given; a setting is a method's keyword arguments
        steps                             of the budget
        curve                             [step, CPU seconds of training, score, mean training loss]
                                          at each evaluation, the first before the first step
        agd                               [G, eta] after each evaluation's last step, and L
        failed                            why the run ended early, else None
    """
    torch.set_num_threads(1)
    work, setting = workload(name), setting or {}
    steps = steps or work.STEPS
    train, valid = work.data()
    torch.manual_seed(seed)
    net = work.network()
    optimizer = METHODS[method].make(net, steps, **setting)
    averages = callable(getattr(optimizer, "eval", None))
    loss_of = Loss(work, net, train)
    stream, others = (order(len(train[0]), work.BATCH, x) for x in (seed, seed + 1))
    if averages:
        optimizer.train()
    curve, summaries = [[0, 0.0, evaluate(work, net, valid), None]], []
    row = {"workload": name, "method": method, "seed": seed, "setting": setting, "steps": steps,
           "curve": curve, "failed": None}  # fmt: skip
    seconds = 0.0
    marks = sorted({round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)} - {0})
    for done, mark in zip([0, *marks], marks):
        if time.time() > deadline:
            return None
        begun, total = time.process_time(), 0.0
        for number in range(done + 1, mark + 1):
            try:
                total += step(loss_of, optimizer, next(stream))
            except (RuntimeError, ValueError) as error:  # of the method: the suite goes on
                row["failed"] = f"step {number}: {error}".splitlines()[0]
                return row
            if not math.isfinite(total):
                row["failed"] = f"step {number}: the loss is not finite"
                return row
        seconds += time.process_time() - begun
        if averages:
            optimizer.eval()
            recalibrate(loss_of, islice(others, CALIBRATION))
        curve.append([mark, round(seconds, 3), evaluate(work, net, valid), total / (mark - done)])
        if averages:
            optimizer.train()
        if isinstance(optimizer, AGD):
            summaries.append([optimizer.G.item(), optimizer.eta.item()])
            row["agd"] = {"L": float(optimizer.L), "G, eta": summaries}
        if not math.isfinite(curve[-1][2]):
            row["failed"] = f"step {mark}: the score is not finite"
            return row
    return row
