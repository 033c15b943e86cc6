"""Each backend against the paper's transcription in float64: a table of layouts, dtypes and scales,
and the other promises of a step. "elsewhere" is torch's operations as on a device whose numbers are
not read. With TRITON_INTERPRET=1 in the environment of the process the backend is the kernels of a
GPU, in Triton's interpreter (tests/test_cuda.py)."""

import copy
import math
import os

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import agd
import agd_kernels.cpu
import agd_kernels.cuda
from agd import AGD, Layout, Rule, TorchBackend
from architecture import build
from tests.reference import matrices, reference_step

TORCH = ("torch", "elsewhere")
BACKENDS = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else [*TORCH, "c"]
INTERPRETED = BACKENDS == ["triton"]
SEAM = TorchBackend, Layout, Rule
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


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """The name of a backend that AGD takes for float32 weights on the CPU."""
    select(request.param, monkeypatch)
    return request.param


def select(backend, monkeypatch):
    """Have AGD take a backend; skips without a C compiler."""
    monkeypatch.setenv("AGD_NO_COMPILER", "1" if backend in TORCH else "0")
    if backend == "elsewhere":
        monkeypatch.setattr(agd, "_on_host", lambda x: False)
    monkeypatch.setattr(agd_kernels, "TRUSTED", {})
    if backend == "triton":
        monkeypatch.setattr(agd_kernels, "MODULES", {"cpu": "cuda"})
    if backend == "c":
        try:
            AGD([torch.zeros(2, 2)], fused=True)
        except ValueError:
            pytest.skip("no C compiler here")


def laid(x, order):
    """x with its dimensions in this order in memory."""
    back = [order.index(i) for i in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


def weights_with_grads(shapes, dtype=torch.float32, scale=1e-2, order="contiguous", seed=0):
    generator, weights = torch.Generator().manual_seed(seed), []
    for shape in shapes:
        x, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        W = nn.Parameter(laid(x.to(dtype), ORDERS[order](len(shape))))
        W.grad = laid((g * scale).to(dtype), ORDERS[order](len(shape)))
        weights.append(W)
    return weights


def near(x, rel):
    """Equal up to a relative error, however small x is."""
    return pytest.approx(x, rel=rel, abs=0)


def relative(a, b):
    """Norm of the difference over the norm of b, both float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bits(W):
    return W.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def step_and_check(optimizer, weights, bound, gain=1.0):
    theirs, eta, G = reference_step(weights, [W.grad for W in weights], gain)
    strides, grads = [W.stride() for W in weights], [W.grad.clone() for W in weights]
    optimizer.step()
    rel = 1e-12 if bound < 1e-9 else 1e-6  # the norms are not in half precision
    assert optimizer.G.item() == near(G, rel=rel)
    assert optimizer.eta.item() == near(eta, rel=rel)
    for W, V, grad, stride in zip(weights, theirs, grads, strides):
        info = torch.finfo(W.dtype)  # whose least digit is of that size near 0
        room = info.tiny * info.eps * math.sqrt(W.numel())
        assert (W.double() - V).norm() < bound * V.norm() + room, (W.shape, W.stride())
        assert torch.equal(W.grad, grad) and W.stride() == stride


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_every_layout_and_dtype(backend, order, dtype):
    """The weights after a step; then those of a step from 0, which are the update alone."""
    weights = weights_with_grads(SHAPES if INTERPRETED else SHAPES + LONG, dtype, order=order)
    optimizer = AGD(weights)
    step_and_check(optimizer, weights, DTYPES[dtype])
    for W in weights:
        W.data.zero_()
    step_and_check(optimizer, weights, DTYPES[dtype])


def test_kernels_take_what_they_support(backend):
    """fused=True is a promise: what it takes is stepped by the backend that a test names."""
    for dtype in DTYPES:
        for order in ORDERS:
            for shape in SHAPES + LONG[:-1]:
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


def test_mixed_dtypes_and_gaps_take_one_step(backend):
    weights = [nn.Parameter(torch.randn(9, 5).to(dtype)) for dtype in DTYPES]
    weights += [nn.Parameter(torch.randn(6, 16, 3, 3)[:, ::2]), nn.Parameter(torch.randn(7, 5))]
    for W in weights:
        W.grad = torch.randn(W.shape).to(W.dtype)
    step_and_check(AGD(weights), weights, 8e-3)


@pytest.mark.parametrize("k", [-44, -37, -20, 0, 20, 37] if INTERPRETED else range(-37, 38))
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_direction_at_every_scale(backend, k, order):
    """Of weights at 10^k beside one at 1."""
    weights = weights_with_grads([(64, 32), (16, 8, 3, 3), (64, 32)], scale=1.0, order=order)
    for W in weights:
        W.data.zero_()
    for W in weights[1:]:
        W.grad.clamp_(-3, 3).mul_(10.0**k)
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights)
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-6)
    for W, V in zip(weights, theirs):
        for w, v in zip(matrices(W), matrices(V)):
            assert relative(w, v) < 1e-6


@pytest.mark.parametrize("large, small, dtype", [
    (1e10, 1e-42, torch.float32), (1e200, 1e-250, torch.float64), (1e10, 1e-30, torch.bfloat16)
])  # fmt: skip
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_blocks_of_two_scales(backend, large, small, dtype, order):
    weights = weights_with_grads([(24, 18, 3, 3)], dtype, 1.0, order)
    weights[0].data.zero_()
    weights[0].grad[:, :, 0, 1] *= large
    weights[0].grad[:, :, 2, 2] *= small
    (theirs,), eta, _ = reference_step(weights, [weights[0].grad])
    optimizer = AGD(weights)
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-6)
    for w, v in zip(matrices(weights[0]), matrices(theirs)):
        assert relative(w, v) < DTYPES[dtype]


@pytest.mark.parametrize("shape", [(256, 1), (1024, 1, 3, 3), (1, 1024)])
@pytest.mark.parametrize("k", [-37, 37])
def test_extreme_gradients_of_extreme_shapes(backend, shape, k):
    (W,) = weights_with_grads([shape], scale=10.0**k)
    W.data.zero_()
    expected, eta, G = reference_step([W], [W.grad])
    optimizer = AGD([W])
    optimizer.step()
    assert optimizer.G.item() == near(G, rel=1e-6)
    if k > 0:
        assert optimizer.eta.item() == near(eta, rel=1e-6)
        assert relative(W, expected[0]) < 1e-6
    assert optimizer.skipped.item() == 0


@pytest.mark.parametrize("size", [1e-310, 1e200, 5e307, 1.5e308])
def test_the_ends_of_float64(backend, size):
    W = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    W.grad = torch.full_like(W, size)
    optimizer = AGD([W])
    optimizer.step()
    # eta -> log(G) / 2 for large G, and G for small G
    assert optimizer.eta.item() == near(math.log(size) / 2 if size > 1 else size, rel=1e-12)
    assert W.item() == near(-optimizer.eta.item(), rel=1e-12)


@pytest.mark.parametrize("shape", [
    (256, 3072), (16, 150528), (8, 50257), (3072, 64, 1, 1), (2, 1031, 3, 3), (512, 1100, 3, 3)
])  # fmt: skip
def test_norms_of_long_rows(backend, shape, monkeypatch):
    """A constant with larger columns here and there: what a naive float32 sum gets wrong."""
    if INTERPRETED:
        if math.prod(shape) > 2**22:
            pytest.skip("it takes minutes")
        monkeypatch.setattr(agd_kernels.cuda, "CHUNK", 16)  # several pieces of partial norms
    W = nn.Parameter(torch.zeros(shape))
    W.grad = torch.full(shape, 0.1)
    W.grad[:, ::1000] = 1.0
    step_and_check(AGD([W]), [W], 1e-6)


@pytest.mark.parametrize("gain, size, other", [(1e-30, 1e15, 1.0), (1e32, 1e-8, 1e17)])
def test_a_gain_far_from_1_keeps_its_digits(backend, gain, size, other):
    """Also where gain and norm together leave float32's range, but not the update."""
    weights = weights_with_grads([(8, 8), (8, 8), (8, 8, 3)], scale=1.0)
    for W, scale in zip(weights, (size, other, size)):
        W.data.zero_()
        W.grad.mul_(scale / W.grad.norm())
    step_and_check(AGD(weights, gain=gain), weights, 1e-6, gain)


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_a_zero_gradient_leaves_every_bit(backend, zero, order):
    """Also of a weight of -0, in whole periods and the rest of one, and where nothing moves."""
    weights = weights_with_grads([(33, 21), (23, 41, 3, 3), (40, 31, 2), (3, 2, 11, 11)],
                                 order=order)  # fmt: skip
    for W in weights:
        W.data[::2] = -0.0
    still = [(0,), (1, ..., 1, 1), (2, ..., 0), (3, ..., 5, 10)]
    for i, *where in still:
        weights[i].grad[tuple(where)] = zero
    before = [bits(W) for W in weights]
    AGD(weights).step()
    for W, b in zip(weights, before):
        moved = (bits(W) != b).view(*W.shape, -1).any(-1)
        for w, g in zip(matrices(moved), matrices(W.grad)):
            assert w.any() == (g != 0).any() and (not w.any() or w.float().mean() > 0.9)
    optimizer = AGD(weights)
    before = [bits(W) for W in weights]
    for W in weights:
        W.grad.fill_(zero)
    optimizer.step()
    assert optimizer.G == optimizer.eta == optimizer.skipped == 0
    assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_one_value_that_is_not_finite_leaves_every_weight(backend, bad, layer, dtype):
    weights = weights_with_grads([(7, 5), (24, 10, 3, 3), (7, 5)], dtype)
    weights[2] = weights_with_grads([(24, 18, 3, 3)], dtype, order="channels last")[0]
    weights[0].data[0] = -0.0
    kept = weights[layer].grad.clone()
    weights[layer].grad[(3, 2, 1, 1)[: kept.ndim]] = bad
    before = [bits(W) for W in weights]
    optimizer = AGD(weights)
    for n in (1, 2):
        optimizer.step()
        assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))
        assert math.isnan(optimizer.eta.item()) and not optimizer.G.isfinite()
        assert optimizer.skipped.item() == n
    weights[layer].grad = kept
    optimizer.step()
    assert all((bits(W) != b).any() for W, b in zip(weights, before))
    assert optimizer.skipped.item() == 2 and math.isfinite(optimizer.eta.item())


def test_gains_of_groups(backend):
    """Numbers and tensors of any dtype; a tensor out of range freezes every bit."""
    out_of_range = [torch.tensor(x) for x in (math.nan, math.inf, -1.0)]
    gains = [0.3, 0, torch.tensor(1e-5, dtype=torch.float64), torch.tensor(2.0).bfloat16(),
             *out_of_range, torch.tensor([0.5])]  # fmt: skip
    weights = weights_with_grads([(9, 5)] * len(gains))
    for W in weights:
        W.data[0] = -0.0
    groups = [{"params": [W]} for W in weights]
    optimizer = AGD(groups, fused=backend not in TORCH)
    before = [W.detach().clone() for W in weights]
    for group, gain in zip(optimizer.param_groups, gains):
        group["lr"] = gain
    _, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer.step()
    for W, old, gain in zip(weights, before, [0.3, 0, 1e-5, 2.0, 0, 0, 0, 0.5]):
        update = gain * eta / len(gains) * math.sqrt(9 / 5) * W.grad / W.grad.norm()
        assert gain or torch.equal(bits(W), bits(old))
        torch.testing.assert_close(W.detach(), old - update, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shift_w, shift_g", [(0, 1), (1, 0), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_no_multiple_of_16(backend, dtype, shift_w, shift_g):
    """As of gradients that are views of one flat tensor."""
    weights = weights_with_grads([(70, 64), (64, 12, 3, 3)], dtype)
    weights += weights_with_grads([(65, 64, 3, 3)], dtype, order="channels last")

    def shifted(x, n):
        flat = torch.empty(x.numel() + 8, dtype=dtype)[n:]
        return flat.as_strided(x.shape, x.stride(), n).copy_(x)

    for W in weights:
        grad, W.grad = W.grad, None
        W.data = shifted(W.data, shift_w)
        W.grad = shifted(grad, shift_g)
    step_and_check(AGD(weights), weights, DTYPES[dtype])


def test_gradients_of_other_strides(backend):
    weights = weights_with_grads([(6, 8, 3, 3), (9, 9), (6, 8, 1, 1), (5, 5)])
    weights[0].grad = weights[0].grad.contiguous(memory_format=torch.channels_last)
    weights[1].grad = weights[1].grad.t().contiguous().t()
    weights[2].grad = weights[2].grad.to(memory_format=torch.channels_last)
    weights[3].grad = torch.tensor(0.5).expand(5, 5)
    step_and_check(AGD(weights, fused=backend not in TORCH), weights, 1e-6)


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_gradients_of_a_wider_dtype(backend, size):
    """float16 holds neither of these."""
    (W,) = weights_with_grads([(4, 4)], torch.float16)
    if not hasattr(W, "grad_dtype"):
        pytest.skip("this torch has gradients of the weight's dtype alone")
    W.grad, W.grad_dtype = None, torch.float32
    W.grad = torch.full((4, 4), size)
    W.data.zero_()
    optimizer = AGD([W])
    optimizer.step()
    assert optimizer.G.item() == near(4 * size, rel=1e-6) and optimizer.skipped == 0
    assert W.mean().item() == near(-optimizer.eta.item() / 4, rel=1e-3) or size < 1
    optimizer.param_groups[0]["lr"] = 0.0
    before = bits(W)
    optimizer.step()
    assert torch.equal(bits(W), before)


def test_weights_that_change_between_steps(backend):
    """Gradients that come and go, gains, storage, layout, shape, another group: each step is the
    paper's."""
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3), (9, 9), (4, 4)])
    optimizer = AGD(weights[:3], fused=backend not in TORCH)

    def step(gain=1.0):
        for i, W in enumerate(weights):
            grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
            W.grad = torch.empty_like(W).copy_(grad) if W.requires_grad else None
        used = [W for group in optimizer.param_groups for W in group["params"]]
        theirs, eta, G = reference_step(used, [W.grad for W in used], gain)
        optimizer.step()
        assert optimizer.eta.item() == near(eta, rel=1e-6)
        assert max(relative(W, V) for W, V in zip(used, theirs)) < 1e-6

    step(), step()
    weights[1].requires_grad = False  # no gradient
    step()
    weights[1].requires_grad = True
    step()
    weights[0].grad, weights[0].data = None, weights[0].data.clone()
    step()
    weights[2].grad, weights[2].data = None, weights[2].data.t().contiguous().t()
    step()
    weights[1].grad = None
    weights[1].data = weights[1].data.to(memory_format=torch.channels_last)
    step()
    for W in weights:  # the same memory, of another shape
        W.grad, W.data = None, W.data[: len(W) // 2]
    step()
    optimizer.param_groups[0]["lr"] = 0.25
    step(0.25)
    optimizer.add_param_group({"params": weights[3], "gain": 0.25})
    step(0.25)
    with torch.no_grad():
        weights[0].set_(torch.randn(7, 5))
    step(0.25)


def test_many_weights_and_gradients_at_other_addresses(backend):
    """More than one upload's; kept gradients come again."""
    weights = weights_with_grads([(5, 3)] * 37)
    optimizer, kept = AGD(weights), [[W.grad for W in weights]]
    for seed in (1, 2):
        kept.append([W.grad for W in weights_with_grads([(5, 3)] * 37, seed=seed)])
    for change in (0, 1, 2, 0, 1):
        for i, W in enumerate(weights):
            W.grad = kept[change][i] if i % 20 == 3 or change else W.grad
        step_and_check(optimizer, weights, 1e-6)


def test_groups_and_layers_without_a_gradient_are_seen(backend):
    """Weights of one shape in groups of two gains: which of them moves changes, and then L."""
    W, V, U = weights = weights_with_grads([(5, 5)] * 3)
    optimizer, grad = AGD([{"params": [W]}, {"params": [V], "gain": 0.5}]), W.grad
    for moving, gain, layers in ((W, 1, 2), (V, 0.5, 2), (V, 0.5, 3), (W, 1, 3)):
        if layers == 3 and len(optimizer.param_groups) == 2:
            optimizer.add_param_group({"params": [U]})
        for X in weights:
            X.grad = grad if X is moving else None
            X.data.zero_()
        (theirs, *_), eta, _ = reference_step([moving, V, U][:layers], [grad, None, None][:layers],
                                              gain)  # fmt: skip
        optimizer.step()
        assert optimizer.eta.item() == near(eta, rel=1e-6) and relative(moving, theirs) < 1e-6


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
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_a_step_allocates_next_to_nothing(backend, order):
    with torch.device("meta"):
        net = build("resnet18", (3, 32, 32), 10)
    weights = weights_with_grads([p.shape for p in net.parameters()], order=order)
    optimizer = AGD(weights)
    optimizer.step()
    with Allocations() as allocations:
        optimizer.step()
    # Of 45 megabytes of weights, the largest of 9,437,184 bytes.
    assert 0 < allocations.largest <= {"torch": 2**20, "elsewhere": 9_437_184, "c": 4096}[backend]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_the_moment_do_not_matter(backend, dtype, monkeypatch):
    """A default dtype, a default device, inference mode, where the first step of its kind is, and
    the trial of the kernels."""
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    monkeypatch.setattr(agd_kernels, "TRUSTED", {})
    try:
        torch.set_default_dtype(dtype)
        for context in (torch.inference_mode(), torch.device("meta"), torch.no_grad()):
            optimizer = AGD(weights)
            with context:
                optimizer.step()
            step_and_check(optimizer, weights, 1e-6)
            assert optimizer.eta.device.type == "cpu" and optimizer.eta.dtype == torch.float64
        AGD(weights, fused=backend not in TORCH)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copy_steps_weights_of_its_own(backend):
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    optimizer = AGD(weights)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    theirs = other.param_groups[0]["params"]
    before = [bits(W) for W in weights]
    for W, V in zip(weights, theirs):
        V.grad = W.grad.clone()
    other.step()
    assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))
    optimizer.step()
    assert all(torch.equal(bits(W), bits(V)) for W, V in zip(weights, theirs))


@pytest.mark.skipif(INTERPRETED, reason="it takes minutes")
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("arch, shape", [
    ("fcn", (3, 32, 32)), ("vgg", (3, 32, 32)), ("resnet18", (3, 32, 32)),
    ("resnet50", (3, 64, 64)),  # with the stem of large images
])  # fmt: skip
def test_twenty_steps_of_each_network(backend, arch, shape, dtype, bound):
    if backend == "c" and dtype == torch.float64:
        pytest.skip("C is of float32")
    torch.manual_seed(0)
    net = build(arch, shape, 10, depth=4, width=64).to(dtype)
    weights = list(net.parameters())
    optimizer = AGD(weights)
    theirs = [W.detach().double() for W in weights]
    inputs = torch.randn(2, *shape, dtype=dtype)
    # The gradients of a real loss twice, then draws: 20 backward passes would cost a minute.
    for step in range(20):
        if step < 2:
            optimizer.zero_grad()
            (net(inputs) - 1).square().mean().backward()
        else:
            for W in weights:
                W.grad.normal_().mul_(10.0 ** (step % 7 - 3))
        theirs, eta, G = reference_step(theirs, [W.grad for W in weights])
        optimizer.step()
        assert optimizer.eta.item() == near(eta, rel=bound)
        assert optimizer.G.item() == near(G, rel=bound)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < bound


@pytest.mark.skipif(INTERPRETED, reason="it has no threads")
@pytest.mark.parametrize("order", ["contiguous", "channels last"])
def test_any_number_of_threads_gives_the_same_bits(backend, order):
    if backend in TORCH:
        pytest.skip("torch's sums are in the order of its threads")
    weights = weights_with_grads([(300, 257), (64, 37, 3, 3), (70, 129, 1, 3), (3, 5, 7, 7)],
                                 order=order)  # fmt: skip
    results = []
    for n in (1, 1, 2, 3, 7):
        torch.set_num_threads(n)
        own = copy.deepcopy(weights)
        for W, V in zip(weights, own):
            V.grad = W.grad
        optimizer = AGD(own)
        optimizer.step()
        rules = [rule for rules in optimizer.rules for rule in rules]
        kernels = agd_kernels.cpu.Backend(own, list(map(Layout, own, rules)))
        kernels.norms(own)
        assert kernels.plan.threads == n
        results.append([optimizer.G.view(1), optimizer.eta.view(1), *own])
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other))


@pytest.mark.parametrize("fault", ["disagree", "no C compiler"])
def test_kernels_that_do_not_work_are_not_taken(backend, monkeypatch, fault):
    if backend in TORCH:
        pytest.skip("which has nothing to be compared with")
    kind, weights = agd_kernels.backend(torch.device("cpu"), *SEAM), weights_with_grads([(5, 4)])
    norms = kind.norms

    def wrong(self, tensors):
        if fault == "no C compiler":
            raise OSError(fault)
        return norms(self, tensors) * 1.001

    monkeypatch.setattr(kind, "norms", wrong)
    monkeypatch.setattr(agd_kernels, "TRUSTED", {})
    with pytest.warns(UserWarning, match=fault):
        step_and_check(AGD(weights), weights, 1e-6)
    step_and_check(AGD(weights), weights, 1e-6)  # tried once, said once
    with pytest.raises(ValueError, match="no fused step for a tensor of shape"):
        AGD(weights, fused=True)


def test_kernels_that_are_forbidden_are_not_taken(backend, monkeypatch):
    monkeypatch.setenv("AGD_NO_COMPILER", "1")
    weights = weights_with_grads([(5, 4)])
    step_and_check(AGD(weights), weights, 1e-6)
    with pytest.raises(ValueError, match="no fused step for a tensor of shape"):
        AGD(weights, fused=True)
