"""A step is that of the mathematics for every net: over shapes, strides, dtypes, scales, zeros,
missing gradients and gains that hypothesis chooses, for each backend of tests/test_backends.py."""

import copy
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agd import AGD, init_weights
from tests.conftest import ROOT
from tests.reference import matrices, same, scale_of, step_and_check
from tests.test_backends import BACKENDS, INTERPRETED, TORCH, select

# The same examples each time: what fails here fails everywhere, and nothing is kept on the disk.
PROPERTY = settings(
    derandomize=True, deadline=None, print_blob=True,
    max_examples=int(os.environ.get("AGD_EXAMPLES", 10 if INTERPRETED else 20)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
WIDE, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="it takes minutes")
def test_a_sweep():
    """The properties below, of ten times as many examples."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not sweep"]
    subprocess.run([*command, __file__], env={**os.environ, "AGD_EXAMPLES": "200"}, cwd=ROOT,
                   check=True, timeout=900)  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def fused(request):
    """What AGD's `fused` has to be for each backend."""
    with pytest.MonkeyPatch.context() as patch:
        select(request.param, patch)
        yield False if request.param in TORCH else None


@dataclasses.dataclass
class Placed:
    """How a tensor is placed in memory: its dimensions from the outermost, the distance of
    neighbours, and where its storage's first element is."""

    order: tuple
    step: int = 1
    start: int = 0

    def __call__(self, x):
        """A copy of x that is placed so, among NaN."""
        x = x.permute(self.order)
        room = torch.full((self.start + x.numel() * self.step,), math.nan, dtype=x.dtype)
        y = room[self.start :].view(*x.shape, self.step)[..., 0].copy_(x)
        return y.permute([self.order.index(i) for i in range(y.ndim)])


@dataclasses.dataclass
class Layer:
    """A weight and its gradient or None, how either is placed, and the number of its group."""

    W: torch.Tensor
    grad: torch.Tensor | None
    placed: Placed
    of_grad: Placed
    group: int

    def parameter(self):
        p = nn.Parameter(self.placed(self.W))
        p.grad = None if self.grad is None else self.of_grad(self.grad)
        return p


def optimizer_of(layers, gains, fused):
    """Over new parameters, those of the first group first."""
    groups = [{"params": [x.parameter() for x in layers if x.group == i], "gain": copy.copy(gain)}
              for i, gain in enumerate(gains)]  # fmt: skip
    return AGD([group for group in groups if group["params"]], fused=fused)


sides = st.one_of(st.just(1), st.integers(1, 9), st.sampled_from([16, 33, 64]))
kernels = st.lists(st.integers(1, 4), max_size=3)
small = st.tuples(sides, sides, kernels).map(lambda x: (*x[:2], *x[2]))
shapes = small if INTERPRETED else st.one_of(
    small,
    # Long rows, primes, more than a chunk or a piece of scratch memory, more positions than a
    # period of the compiled step holds.
    st.sampled_from([(3, 1500), (1, 1009), (5, 409), (700, 2), (131, 127), (3, 2, 33, 32),
                     (2, 1031, 3), (19, 104, 3, 3)]),
)  # fmt: skip


@st.composite
def places(draw, ndim, gaps=True):
    plain, last = tuple(range(ndim)), (0, *range(2, ndim), 1)
    order = draw(st.sampled_from([plain, plain, last, plain[::-1]]) | st.permutations(plain))
    step, start = draw(st.sampled_from([1, 1, 2] if gaps else [1])), draw(st.sampled_from([0, 3]))
    return Placed(tuple(order), step, start)


KINDS = ("normal", "normal", "constant", "sparse", "wide", "zero", "positions", "scales")
GAINS = (1.0, 1, 0.3, 0.0, 1e-30, 17.0, 1e20)


@st.composite
def tensors(draw, shape, dtype, exponents=(-38, 38), kinds=KINDS):
    """A tensor of finite values, about 10 ** exponent large, some kernel positions of it zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(kinds))
    if kind == "zero":
        x.mul_(0)  # of either sign
    elif kind == "constant":
        x.fill_(-1)
    elif kind == "sparse":
        x[torch.rand(shape, generator=generator) < 0.8] = 0
    elif kind == "wide":
        x.mul_(10 ** torch.empty_like(x).uniform_(-40, 0, generator=generator))
    elif kind == "scales":  # a scale of its own for each position
        x.mul_(10 ** torch.empty(shape[2:]).double().uniform_(-40, 0, generator=generator))
    elif kind == "positions":
        x[..., torch.rand(shape[2:], generator=generator) < 0.5] *= 0
    lowest, highest = (-7, 4) if dtype == torch.float16 else exponents
    largest = torch.finfo(dtype).max
    scale = 10.0 ** draw(st.just(0) | st.integers(lowest, highest))
    return x.mul_(scale).clamp_(-largest, largest).to(dtype)


@st.composite
def nets(draw):
    """(Layers, gains of their two groups). Half of the nets are such as kernels take: of float32
    without gaps, gradients placed as their weights, gains that are numbers."""
    fast, layers = draw(st.booleans()), []
    usual = torch.float32 if fast else draw(st.sampled_from([*WIDE, *HALF]))
    dtypes = st.sampled_from([usual] if fast or draw(st.booleans()) else [*WIDE, *HALF])
    for _ in range(draw(st.integers(1, 4))):
        shape, dtype = draw(shapes), draw(dtypes)
        if layers and draw(st.booleans()):  # several of one shape
            shape = layers[-1].W.shape
        W = draw(tensors(shape, dtype, (-3, 3), ("normal", "zero", "positions")))
        grad = None if draw(st.integers(0, 7)) == 7 else draw(tensors(shape, dtype))
        placed = draw(places(len(shape), gaps=not fast))
        other = not fast and draw(st.booleans())
        of_grad = draw(places(len(shape))) if other else placed
        layers.append(Layer(W, grad, placed, of_grad, draw(st.sampled_from([0, 0, 1]))))
    # A weight of float16 ends at 65504.
    half = any(x.W.dtype in HALF for x in layers)
    gains = st.sampled_from([x for x in GAINS if x < 100] if half else GAINS)
    if not fast:
        gains |= gains.map(lambda x: torch.tensor(x, dtype=torch.float64))
    return layers, [draw(gains), draw(gains)]


def weights_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def copies(optimizer):
    return [p.detach().clone() for p in weights_of(optimizer)]


EVENTS = ("gradients", "expanded", "bad", "lose", "gain", "move", "turn", "weight")


@PROPERTY
@given(net=nets(), data=st.data())
def test_every_step_of_any_sequence_is_that_of_the_mathematics(fused, net, data):
    """Gradients, gains, storage and layouts change between steps, and some gradients are bad."""
    optimizer = optimizer_of(*net, fused)
    step_and_check(optimizer)
    for event in data.draw(st.lists(st.sampled_from(EVENTS), max_size=5)):
        p = data.draw(st.sampled_from(weights_of(optimizer)))
        if event == "gradients":
            for p in weights_of(optimizer):
                p.grad = data.draw(tensors(p.shape, p.dtype))
        elif event == "expanded":  # one number, with strides of 0
            p.grad = torch.full((), 0.5, dtype=p.dtype).expand(p.shape)
        elif event == "bad":
            p.grad = torch.ones_like(p)
            where = [data.draw(st.integers(0, n - 1)) for n in p.shape]
            p.grad[tuple(where)] = data.draw(st.sampled_from(BAD))
        elif event == "lose":
            p.grad = None
        elif event == "gain":
            group = data.draw(st.sampled_from(optimizer.param_groups))
            group["lr"] = data.draw(st.sampled_from([x for x in GAINS if x < 100]))
        elif event in ("move", "turn"):
            grad, p.grad = p.grad, None
            there = data.draw(places(p.ndim, gaps=event == "move"))(p.detach())
            whole = p.numel() == 1 + sum((n - 1) * k for n, k in zip(p.shape, p.stride()))
            if event == "turn" and whole:  # the same memory, read in another order
                there = p.detach().as_strided(p.shape, there.stride())
            p.data, p.grad = there, grad
        elif event == "weight":
            p.data.mul_(0.5)
        step_and_check(optimizer)


@PROPERTY
@given(net=nets(), start=st.integers(1, 9), copied=st.booleans())
def test_the_same_inputs_give_the_same_bits(fused, net, start, copied):
    """Wherever their storage begins, and whatever steps came before a saved state was loaded."""
    layers, gains = net

    def moved(x):
        return dataclasses.replace(x, start=x.start + start)

    one = optimizer_of(layers, gains, fused)
    other = optimizer_of([dataclasses.replace(x, placed=moved(x.placed), of_grad=moved(x.of_grad))
                          for x in layers], gains, fused)  # fmt: skip
    if copied:
        one.step()
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for p, q in zip(weights_of(one), weights_of(other)):
            q.data.copy_(p.data)
    one.step(), other.step()
    assert same([*copies(one), one.G, one.eta], [*copies(other), other.G, other.eta])


@st.composite
def blanks(draw):
    """Weights that are to be drawn: (shape, dtype, Placed) each."""
    drawn = [(draw(shapes), draw(st.sampled_from([*WIDE, *HALF])))
             for _ in range(draw(st.integers(1, 4)))]  # fmt: skip
    return [(shape, dtype, draw(places(len(shape)))) for shape, dtype in drawn]


@PROPERTY
@given(blanks(), st.integers(0, 2**40), st.data())
def test_a_draw_is_semi_orthogonal_and_its_generators_alone(drawn, seed, data):
    """In every dtype, up to its rounding, in every layout, and whatever is listed behind."""

    def draw(drawn, dtype=None):
        empty = [placed(torch.full(shape, math.nan, dtype=dtype or own))
                 for shape, own, placed in drawn]  # fmt: skip
        init_weights(empty, torch.Generator().manual_seed(seed))
        return empty

    exact, state = draw(drawn, torch.float64), torch.get_rng_state()
    for W in exact:
        s = scale_of(W.shape)
        for m in matrices(W)[:40]:
            gram = m @ m.mT if len(m) < len(m.mT) else m.mT @ m
            torch.testing.assert_close(gram, s * s * torch.eye(len(gram), dtype=torch.float64),
                                       rtol=0, atol=1e-11 * s * s)  # fmt: skip
    assert same(draw(drawn), [W.to(dtype) for W, (_, dtype, _) in zip(exact, drawn)])
    dense = [(shape, dtype, Placed(tuple(range(len(shape))))) for shape, dtype, _ in drawn]
    assert same(draw(dense, torch.float64), exact)
    n = data.draw(st.integers(1, len(drawn)))
    for W, V in zip(draw(drawn[:n], torch.float64), exact):
        torch.testing.assert_close(W, V, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
