"""Optimisers of any class of torch's form, by name: whether one trains here, and how it goes on
from a checkpoint to the bit."""

import importlib
import inspect
import numbers
import os
import re
import sys
import threading
import traceback
from collections import deque
from contextlib import contextmanager, suppress

import numpy as np
import torch

import agd
from cli import UserError, near
from runs.checkpoint import pack, plain, unpack
from training.choices import AUTOMATIC
from training.step import set_training, show_average

LARGEST = 96  # the sides of a weight in the trial; what splits weights, splits by such numbers
EPOCH = 8  # the steps of its two epochs
SEEDING = threading.Lock()  # all threads share the global generator


class Unusable(UserError):
    """An optimiser cannot train these weights here, or not go on; the message says why."""


def optimizer_class(dotted):
    """The optimiser class package.Class, of an installed package or of a file in the current
    folder. Raises ValueError, with the reason, where it is none."""
    module, _, name = dotted.rpartition(".")
    try:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # behind all else
        package = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # of a file of the user's
        kind = "" if isinstance(error, (ImportError, SyntaxError)) else f"{type(error).__name__}: "
        meant = f"; did you mean torch.{dotted}?" if module == "optim" else ""
        raise ValueError(f"no optimiser {dotted}: {kind}{error}".splitlines()[0] + meant) from error
    cls = getattr(package, name, None)
    if not _is_optimizer(cls):
        meant = near(name, [x for x, kind in vars(package).items() if _is_optimizer(kind)])
        if module in ("torch", "timm"):
            own = importlib.import_module(f"{module}.optim")
            meant = f"; did you mean {module}.optim.{name}?" if hasattr(own, name) else meant
        raise ValueError(f"{dotted} is no optimiser{meant or '; torch.optim.AdamW is one'}")
    _, *takes = inspect.signature(cls.step).parameters.values()
    if any(x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD for x in takes):
        raise ValueError(f"{dotted} wants to make several passes a step, and gets one")
    for own, rule in AUTOMATIC.items():
        if cls is getattr(agd, rule):
            raise ValueError(f"--optimizer {own} is {name}, with its own initialisation")
    return cls


def _is_optimizer(kind):
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def construct(cls, parameters, lr=None, weight_decay=None):
    """An optimiser of a class with these settings; None is the class's own, for all parameters.
    A `weight_decay` is that of tensors of two or more dimensions: biases and gains have 0."""
    given = {"lr": lr, "weight_decay": weight_decay}
    if weight_decay is not None:
        decayed, others = ([p for p in parameters if (p.ndim > 1) is yes] for yes in (True, False))
        groups = {"params": decayed}, {"params": others, "weight_decay": 0.0}
        parameters = [group for group in groups if group["params"]]
    return cls(parameters, **{key: x for key, x in given.items() if x is not None})


def foreign(dotted, parameters, lr=None, weight_decay=None):
    """An optimiser of the class package.Class, of these parameters, as `construct` makes it.

    On small weights it has shown that gradients are all it needs, and that it goes on from a
    checkpoint to the bit. Raises Unusable, with the reason, where it has not.
    """
    cls, settings = optimizer_class(dotted), {"--lr": lr, "--weight_decay": weight_decay}
    given = [flag for flag, x in settings.items() if x is not None]

    def make(weights):
        return construct(cls, weights, lr, weight_decay)

    @contextmanager
    def blame(words, remedy="choose another, as torch.optim.AdamW"):
        try:
            yield
        except Unusable:
            raise
        except (Exception, SystemExit) as error:  # anything, of foreign code
            reason = _reason(error, cls)
            way_out = "give --lr" if lr is None and re.search(r"\blr\b", reason) else remedy
            raise Unusable(f"--optimizer {dotted} {words}: {reason}; {way_out}") from error

    takes = ", ".join(["params", "lr", "weight_decay"][: 2 if weight_decay is None else 3])
    with blame(" and ".join(["does not take these weights", *given]),
               f"choose another, or a subclass whose constructor takes ({takes})"):  # fmt: skip
        optimizer = make(parameters)
    if weight_decay is not None and "weight_decay" not in optimizer.defaults:
        raise Unusable(
            f"--weight_decay: {dotted} has one for all its weights, and biases and gains have none "
            "here: leave it out"
        )
    with SEEDING:
        lacking = _try_out(make, parameters, blame)
    if lacking is not None:
        raise Unusable(
            f"--optimizer {dotted} would not go on from a checkpoint as it stopped: its "
            f"state_dict() lacks {', '.join(lacking) or 'something'}; the state, the groups and "
            "torch's generators are what is saved"
        )
    return optimizer


def _try_out(make, parameters, blame):
    """Have the optimiser make(parameters) train on small weights of the same shapes, and go on from
    checkpoints within an epoch and between two. torch's generators stay as they are.

    Returns None where the weights and the numbers among its attributes are the same to the bit,
    else the names of the attributes that differ. What the class raises is raised in a context
    blame(words).
    """
    device = parameters[0].device
    device = torch.device("cpu") if device.type == "meta" else device
    shapes = dict.fromkeys(tuple(min(n, LARGEST) for n in p.shape) for p in parameters)
    draw = torch.Generator().manual_seed(0)

    def noise():
        return [(torch.randn(shape, generator=draw) / LARGEST).to(device) for shape in shapes]

    def begin():
        set_generators(before, device)
        net = torch.nn.ParameterList(x.clone() for x in start)
        return net, make(list(net))

    def train(net, optimizer, done=0, saves=()):
        for step in range(done, 2 * EPOCH):
            if step % EPOCH == 0 or step == done:
                set_training(net, optimizer)
            for p, x in zip(net, gradients[step % len(gradients)]):
                p.grad = x.clone()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % EPOCH == 0:
                show_average(optimizer)
            if step + 1 in saves:
                with blame("cannot be saved as numbers, strings and tensors"):
                    state = unpack(pack(plain(optimizer.state_dict(), "state_dict()")))
                    weights = [p.detach().clone() for p in net]
                    yield step + 1, state, weights, generators(device)

    start, gradients = noise(), [noise() for _ in range(3)]
    before = generators(device)
    try:
        with blame("cannot train by gradients alone"):
            net, optimizer = begin()
            saved = list(train(net, optimizer, saves=(EPOCH // 2, EPOCH)))
        for done, state, weights, then in saved:
            with blame("cannot go on from a checkpoint"):
                again, resumed = begin()
                with torch.no_grad():
                    torch._foreach_copy_(list(again), weights)
                load_state(resumed, state)
                set_generators(then, device)
                deque(train(again, resumed, done), 0)
            same = all(torch.equal(*(x.detach().nan_to_num() for x in pair))
                       for pair in zip(net, again))  # fmt: skip
            odd = [x for x in vars(optimizer) if _differs(vars(optimizer), vars(resumed), x)]
            # A count may change the weights in a later step; words, and longer lists, are a diary.
            counts = [x for x in odd if _counts(vars(optimizer)[x], vars(resumed).get(x))]
            if counts or not same:
                return counts or odd
    finally:
        set_generators(before, device)
    return None


def _differs(one, other, key):
    """Whether an attribute of plain values, outside of state_dict(), differs."""
    a, b = (x.tolist() if isinstance(x, np.ndarray) else x for x in (one[key], other.get(key)))
    try:
        return key not in ("state", "param_groups", "defaults") and pack(plain(a)) != pack(plain(b))
    except Exception:  # no plain value
        return False


def _counts(one, other):
    """Whether two values hold numbers, as many in both."""
    if isinstance(one, dict) and isinstance(other, dict):
        one, other = [*one.values()], [*other.values()]
    if isinstance(one, (list, tuple)):
        return isinstance(other, type(one)) and len(one) == len(other) and (
            any(map(_counts, one, other)))  # fmt: skip
    return isinstance(one, (numbers.Number, np.ndarray, torch.Tensor))


def _reason(error, cls):
    """An exception in a few words, with the line of the class's file."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if "does not have a grad_fn" in text:
        text = f"it differentiates gradients, of which no graph is kept ({text})"
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    own = [x for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
    return f"{text} ({os.path.basename(file)}, line {own[-1].lineno})" if own else text


def load_state(optimizer, state):
    """Load a state_dict() of another process into an optimiser, to the bit.

    torch's own load_state_dict gives all tensors but "step" the dtype of their weight, and takes
    strings apart: what has changed so is put back.
    """
    optimizer.load_state_dict(state)
    for group, saved in zip(optimizer.param_groups, state["param_groups"]):
        for p, number in zip(group["params"], saved["params"]):
            if p in optimizer.state and number in state["state"]:
                optimizer.state[p] = _as_saved(optimizer.state[p], state["state"][number])


def _as_saved(now, then):
    if isinstance(then, torch.Tensor) and isinstance(now, torch.Tensor):
        if now.dtype != then.dtype:
            with suppress(TypeError):  # Apple's GPUs have no float64
                return then.to(now.device)
        return now
    if isinstance(then, dict) and isinstance(now, dict):
        return now | {key: _as_saved(now[key], then[key]) for key in now if key in then}
    if isinstance(then, list) and isinstance(now, list) and len(now) == len(then):
        return [_as_saved(*pair) for pair in zip(now, then)]
    return then if isinstance(then, str) else now


def generators(device):
    """The states of the generators that an optimiser may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_generators(states, device):
    """Set those generators to what `generators` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
