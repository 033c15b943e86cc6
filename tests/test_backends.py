"""Each backend against the paper in float64: every layout, dtype and scale, and the other promises
of a step. "traced" is torch's operations as for a device whose numbers are not read. With
TRITON_INTERPRET=1 in the environment of the process the backend is the kernels of a GPU, in
Triton's interpreter (tests/test_kernels.py)."""

import math
import os
import warnings

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import agd_kernels.cpu
import agd_kernels.cuda
from agd import AGD
from architecture import build
from tests.reference import bits, same, step_and_check

TORCH = ("torch", "traced")
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [*TORCH, "c"]
INTERPRETED = BACKENDS == ["triton"]
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

SHAPES = [
    (7, 5), (5, 40), (6, 4, 3), (6, 4, 3, 5), (4, 3, 2, 3, 2), (8, 2, 3, 3), (8, 1, 3, 3),
    (6, 4, 1, 1), (1, 1, 3), (6, 3, 7, 7), (61, 29, 3, 3), (97, 89), (70, 70, 3, 3), (2, 4100, 3),
]  # fmt: skip
# Long rows, rows with a rest, more than a piece of scratch memory, more blocks than C takes.
LONG = [
    (3, 5000), (1, 1009), (5, 409), (2048, 3), (64, 65, 1, 1), (70, 512, 3, 3), (3, 1152, 3, 3),
    (6, 30, 5, 7), (2, 1031, 3, 3), (3, 2, 33, 32),
]  # fmt: skip
ORDERS = {  # the dimensions from the outermost in memory
    "contiguous": lambda n: (0, 1, *range(2, n)),
    "channels last": lambda n: (0, *range(2, n), 1),
    "kernel first": lambda n: (*range(2, n), 0, 1),
    "transposed": lambda n: tuple(reversed(range(n))),
    "a position first": lambda n: (n - 1, 0, *range(2, n - 1), 1) if n > 3 else (0, *range(1, n)),
    "positions apart": lambda n: (0, 2, 1, *range(3, n)) if n > 3 else (0, *range(1, n)),
}
two_orders = pytest.mark.parametrize("order", ["contiguous", "channels last"])


def select(backend, monkeypatch):
    """Have AGD take a backend for weights on the CPU; skips without a C compiler."""
    monkeypatch.setenv("AGD_NO_COMPILER", "1" if backend in TORCH else "0")
    monkeypatch.setattr(agd_kernels, "TRUSTED", {})
    if backend == "traced":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if backend == "triton":
        monkeypatch.setattr(agd_kernels, "MODULES", {"cpu": "cuda"})
    if backend == "c":
        try:
            AGD([torch.zeros(2, 2)], fused=True)
        except ValueError:
            pytest.skip("no C compiler here")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of a backend that AGD takes for float32 weights on the CPU."""
    select(request.param, monkeypatch)
    return request.param


def permuted(x, order):
    """x with its dimensions in this order in memory."""
    return x.permute(order).contiguous().permute([order.index(i) for i in range(x.ndim)])


def weights_with_grads(shapes, dtype=torch.float32, scale=1e-2, order="contiguous", seed=0):
    generator, weights = torch.Generator().manual_seed(seed), []
    for shape in shapes:
        x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        W = nn.Parameter(permuted(x.to(dtype), ORDERS[order](len(shape))))
        W.grad = permuted((g * scale).to(dtype), ORDERS[order](len(shape)))
        weights.append(W)
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_every_layout_and_dtype(backend, order, dtype):
    optimizer = AGD(weights_with_grads(SHAPES + LONG * (not INTERPRETED), dtype, order=order))
    step_and_check(optimizer)
    step_and_check(optimizer, zeroed=True)


def test_kernels_take_what_they_support(backend):
    """fused=True is a promise: what it takes is stepped by the backend that a test names."""
    cases = [(shape, order, dtype) for shape in SHAPES + LONG[:-1] for order in ORDERS
             for dtype in DTYPES]  # fmt: skip
    for shape, order, dtype in cases:
        (W,) = weights_with_grads([shape], dtype, order=order)
        sides = [i > 1 for i in ORDERS[order](len(shape)) if shape[i] > 1]
        sides = sides[sides.index(False) :] if False in sides else []
        apart = (True, False, True) in zip(sides, sides[1:], sides[2:])
        if not apart and (backend == "triton" or (backend, dtype) == ("c", torch.float32)):
            AGD([W], fused=True)
        else:
            with pytest.raises(ValueError, match="no fused step for .*fused=None"):
                AGD([W], fused=True)
    W = torch.randn(6, 16, 3, 3)[:, ::2]  # with gaps
    with pytest.raises(ValueError, match=r"no fused step for a tensor of shape \(6, 8, 3, 3\)"):
        AGD([W], fused=True)


def test_gradients_of_other_strides_than_their_weights(backend):
    weights = weights_with_grads([(6, 8, 3, 3), (9, 9), (6, 8, 1, 1), (5, 5)])
    weights[0].grad = weights[0].grad.contiguous(memory_format=torch.channels_last)
    weights[1].grad = weights[1].grad.t().contiguous().t()
    weights[2].grad = weights[2].grad.to(memory_format=torch.channels_last)
    weights[3].grad = torch.tensor(0.5).expand(5, 5)
    step_and_check(AGD(weights, fused=backend not in TORCH))


@two_orders
def test_direction_at_every_scale(backend, order):
    """Of weights at 10^k beside one at 1."""
    for k in [-44, -37, -20, 0, 20, 37] if INTERPRETED else range(-37, 38):
        weights = weights_with_grads([(64, 32), (16, 8, 3, 3), (64, 32)], scale=1.0, order=order)
        for W in weights[1:]:
            W.grad.clamp_(-3, 3).mul_(10.0**k)
        step_and_check(AGD(weights), zeroed=True)


@pytest.mark.parametrize("shape, dtype, sizes, gain", [
    *[(shape, torch.float32, [10.0**k], 1.0) for shape in [(256, 1), (1024, 1, 3, 3), (1, 1024)]
      for k in (-37, 37)],
    *[((1, 1), torch.float64, [size], 1.0) for size in (1e-310, 1e-20, 1e200, 5e307, 1.5e308)],
    # gain and norm together leave float32's range, but not the update
    ((8, 8), torch.float32, [1e15, 1.0, 1e15], 1e-30),
    ((8, 8, 3), torch.float32, [1e-8, 1e17], 1e32),
], ids=str)  # fmt: skip
def test_extreme_gradients_and_gains(backend, shape, dtype, sizes, gain):
    weights = weights_with_grads([shape] * len(sizes), dtype, 1.0)
    for W, size in zip(weights, sizes):
        if W.numel() == 1:
            W.grad.fill_(size)
        else:
            W.grad.mul_(size / (W.grad.norm() if gain != 1 else 1))
    step_and_check(AGD(weights, gain=gain), zeroed=True)


@pytest.mark.parametrize("shape", [
    (256, 3072), (16, 150528), (8, 50257), (3072, 64, 1, 1), (2, 1031, 3, 3), (512, 1100, 3, 3)
])  # fmt: skip
def test_norms_of_long_rows(backend, shape):
    """A constant with larger columns here and there: what a naive float32 sum gets wrong."""
    if INTERPRETED and math.prod(shape) > 2**22:
        pytest.skip("it takes minutes")
    W = nn.Parameter(torch.zeros(shape))
    W.grad = torch.full(shape, 0.1)
    W.grad[:, ::1000] = 1.0
    step_and_check(AGD([W]), zeroed=True)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_one_value_that_is_not_finite_leaves_every_weight(backend, layer, dtype):
    weights = weights_with_grads([(7, 5), (24, 10, 3, 3)], dtype)
    weights += weights_with_grads([(24, 18, 3, 3)], dtype, order="channels last")
    weights[0].data[0] = -0.0
    optimizer, grad = AGD(weights), weights[layer].grad
    for bad in (math.nan, math.inf, -math.inf, 1.0):
        grad[(3, 2, 1, 1)[: grad.ndim]] = bad
        step_and_check(optimizer)
    assert optimizer.skipped == 3


def test_gains_of_groups(backend):
    """Numbers and tensors of any dtype; a tensor out of range, or 0, freezes every bit."""
    gains = [0.3, 0, torch.tensor(1e-5, dtype=torch.float64), torch.tensor(2.0).bfloat16(),
             *[torch.tensor(x) for x in (math.nan, math.inf, -1.0, 0.0)],
             torch.tensor([0.5])]  # fmt: skip
    weights = weights_with_grads([(9, 5)] * len(gains))
    for W in weights:
        W.data[0] = -0.0
    optimizer = AGD([{"params": [W]} for W in weights], fused=backend not in TORCH)
    before = [W.detach().clone() for W in weights]
    for group, gain in zip(optimizer.param_groups, gains):
        group["lr"] = gain
    step_and_check(optimizer)
    assert [not same([W], [b]) for W, b in zip(weights, before)] == [1, 0, 1, 1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_gradients_of_a_wider_dtype(backend, size):
    """float16 holds neither of these."""
    (W,) = weights_with_grads([(4, 4)], torch.float16)
    if not hasattr(W, "grad_dtype"):
        pytest.skip("this torch has gradients of the weight's dtype alone")
    W.grad, W.grad_dtype = None, torch.float32
    W.grad = torch.full((4, 4), size)
    optimizer = AGD([W])
    step_and_check(optimizer, zeroed=True)
    optimizer.param_groups[0]["lr"], before = 0.0, bits(W)
    optimizer.step()
    assert torch.equal(bits(W), before)


def test_weights_that_change_between_steps(backend):
    """Requirements of gradients, the shape, another group, storage."""
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3), (9, 9), (4, 4)])
    optimizer = AGD(weights[:3], fused=backend not in TORCH)

    def step():
        for i, W in enumerate(weights):
            grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
            W.grad = torch.empty_like(W).copy_(grad) if W.requires_grad else None
        step_and_check(optimizer)

    for required in (True, False, True):
        weights[1].requires_grad = required
        step()
    for W in weights:  # the same memory, of another shape
        W.grad, W.data = None, W.data[: len(W) // 2]
    step()
    optimizer.add_param_group({"params": weights[3], "gain": 0.25})
    with torch.no_grad():
        weights[0].set_(torch.randn(7, 5))
    step()


def test_many_weights_and_gradients_at_other_addresses(backend):
    """More than one upload's; kept gradients come again."""
    weights = weights_with_grads([(5, 3)] * 37)
    optimizer, kept = AGD(weights), [[W.grad for W in weights]]
    for seed in (1, 2):
        kept.append([W.grad for W in weights_with_grads([(5, 3)] * 37, seed=seed)])
    for change in (0, 1, 2, 0, 1):
        for i, W in enumerate(weights):
            W.grad = kept[change][i] if i % 20 == 3 or change else W.grad
        step_and_check(optimizer)


def test_weights_that_take_turns_keep_their_group_and_L(backend):
    """Weights of one shape in groups of two gains: which of them moves changes, and then L."""
    W, V, U = weights_with_grads([(5, 5)] * 3)
    optimizer, grad = AGD([{"params": [W]}, {"params": [V], "gain": 0.5}]), W.grad
    for moving, added in ((W, 0), (V, 0), (V, 1), (W, 0)):
        if added:
            optimizer.add_param_group({"params": [U]})
        for X in (W, V, U):
            X.grad = grad if X is moving else None
        step_and_check(optimizer, zeroed=True)


def test_in_place_changes_are_seen_by_autograd(backend):
    weights = weights_with_grads([(5, 5), (3, 4, 3, 3)])
    y = sum((W * W).sum() for W in weights)
    AGD(weights).step()
    with pytest.raises(RuntimeError, match="in-?place"):
        y.backward()


class Allocations(TorchDispatchMode):
    """The largest storage that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.skipif(INTERPRETED, reason="the interpreter allocates")
@two_orders
def test_a_step_allocates_next_to_nothing(backend, order):
    with torch.device("meta"):
        net = build("resnet18", (3, 32, 32), 10)
    weights = weights_with_grads([p.shape for p in net.parameters()], order=order)
    optimizer = AGD(weights)
    optimizer.step()
    with Allocations() as allocations:
        optimizer.step()
    # Of 45 megabytes of weights, the largest of 9,437,184 bytes.
    assert 0 < allocations.largest <= {"torch": 2**20, "traced": 9_437_184, "c": 4096}[backend]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_the_moment_do_not_matter(backend, dtype):
    """A default dtype, a default device, inference mode, where the first step of its kind is, and
    the trial of the kernels."""
    if backend == "traced":
        pytest.skip("a graph is made where it is compiled")
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    agd_kernels.TRUSTED.clear()
    try:
        torch.set_default_dtype(dtype)
        for context in (torch.inference_mode(), torch.device("meta"), torch.no_grad()):
            optimizer = AGD(weights)
            with context:
                optimizer.step()
            step_and_check(optimizer)
            assert optimizer.eta.device.type == "cpu" and optimizer.eta.dtype == torch.float64
        AGD(weights, fused=backend not in TORCH)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="it has no threads")
@two_orders
def test_any_number_of_threads_gives_the_same_bits(backend, order):
    if backend in TORCH:
        pytest.skip("torch's sums are in the order of its threads")
    shapes = [(300, 257), (64, 37, 3, 3), (70, 129, 1, 3), (3, 5, 7, 7)]
    results = []
    for n in (1, 1, 2, 3, 7):
        torch.set_num_threads(n)
        weights = weights_with_grads(shapes, order=order)
        optimizer = AGD(weights, fused=True)
        optimizer.step()
        results.append([optimizer.G, optimizer.eta, *weights])
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("fault", ["disagree", "no C compiler", "forbidden"])
def test_kernels_that_do_not_work_are_not_taken(backend, monkeypatch, fault):
    """Tried once, warned of once; not a word where they are forbidden."""
    if backend in TORCH:
        pytest.skip("which has nothing to be compared with")
    kind = agd_kernels.cuda.Backend if backend == "triton" else agd_kernels.cpu.Backend
    norms = kind.norms

    def wrong(self, tensors):
        if fault == "no C compiler":
            raise OSError(fault)
        return norms(self, tensors) * 1.001

    if fault == "forbidden":
        monkeypatch.setenv("AGD_NO_COMPILER", "1")
    else:
        monkeypatch.setattr(kind, "norms", wrong)
    agd_kernels.TRUSTED.clear()
    weights = weights_with_grads([(5, 4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_and_check(AGD(weights)), step_and_check(AGD(weights))
    assert [fault in str(x.message) for x in caught] == [True] * (fault != "forbidden")
    with pytest.raises(ValueError, match="no fused step for a tensor of shape"):
        AGD(weights, fused=True)
