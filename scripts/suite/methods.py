"""The methods that the suite compares, each with the one setting that it has on all workloads."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from agd import AGD, SpectralAGD
from training.schedule import Cosine


class Method(NamedTuple):
    """`make(net, steps, **setting)` returns the optimiser of a run of `steps`."""

    title: str
    make: Callable


def scheduled(optimizer, steps):
    """The optimiser with a warm-up of a twentieth of the steps and a cosine to 0."""
    schedule, count = Cosine(optimizer, steps), itertools.count()
    optimizer.register_step_pre_hook(lambda *_: schedule.set(next(count)))
    return optimizer


def adamw(net, steps, rate, decay):
    return scheduled(torch.optim.AdamW(net.parameters(), rate, weight_decay=decay), steps)


METHODS = {
    "agd": Method("AGD", lambda net, steps: AGD(net)),
    "spectral": Method("Spectral AGD", lambda net, steps: SpectralAGD(net)),
    "adamw": Method("AdamW, tuned", adamw),
}
