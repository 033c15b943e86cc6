"""The learning rates of a baseline's steps: a function of the step's number.

torch's schedulers count the steps themselves: a checkpoint would have to hold that state beside the
optimiser's, and the place of the run would be known twice.
"""

import itertools
import math

import torch

from cli import UserError

SHARE = 20  # a warm-up is a twentieth of the run


def make_schedule(name, optimizer, steps, warmup=None):
    """The Cosine of an optimiser over a run of `steps`; None of a "constant" rate."""
    return None if name == "constant" else Cosine(optimizer, steps, warmup)


class Cosine:
    """Sets the rates of an optimiser in a run of `steps`: those that it has now, times `cosine`.

    `warmup`: steps; None is a twentieth of the run. Raises UserError where fewer than two steps
    follow the warm-up, and for an optimiser without a rate.
    """

    def __init__(self, optimizer, steps, warmup=None):
        warmup = steps // SHARE if warmup is None else warmup
        if steps - warmup < 2:
            raise UserError(
                f"--schedule cosine takes two steps after the warm-up, and the run has {steps} "
                f"with a --warmup of {warmup}: train longer or warm up less"
            )
        rates = [group.get("lr") for group in optimizer.param_groups]
        if None in rates:
            raise UserError(
                f"--schedule cosine: {type(optimizer).__name__} finds its rate itself: give --lr, "
                "or leave --schedule out"
            )
        # A class may change its tensor of a rate in place.
        self.start = [x.clone() if isinstance(x, torch.Tensor) else x for x in rates]
        self.optimizer, self.steps, self.warmup = optimizer, steps, warmup

    def set(self, step):
        """Give the optimiser the rates of `step`, from 0 over all epochs."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(step)):
            group["lr"] = rate

    def rates(self, step):
        """The rate of each group in `step`."""
        factor = cosine(step, self.steps, self.warmup)
        return [rate * factor for rate in self.start]


def scheduled(optimizer, steps, warmup=None):
    """The optimiser itself, which sets the rates of a Cosine before each of its steps."""
    schedule, count = Cosine(optimizer, steps, warmup), itertools.count()
    optimizer.register_step_pre_hook(lambda *_: schedule.set(next(count)))
    return optimizer


def cosine(step, steps, warmup):
    """The factor of a rate in `step`, counted from 0: it rises in equal parts to 1 in the last of
    `warmup` steps, and falls along half a cosine to 0 in the last of `steps`."""
    done = max(0, step + 1 - warmup) / (steps - warmup)
    rise = min(1, (step + 1) / max(warmup, 1))
    return rise * (1 + math.cos(math.pi * min(1, done))) / 2
