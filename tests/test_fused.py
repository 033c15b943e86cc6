"""The step in few passes on the CPU, compiled and as sweeps, beside the plain one."""

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import agd
import agd_cpu
from agd import AGD
from architecture import build
from tests.reference import reference_step
from tests.test_agd import SHAPES, bits, near, relative, weights_with_grads

# Rows that are split, rows with a rest, kernels that do not fit the scratch memory in one piece.
LONG = {
    "long rows": (3, 5000),
    "a prime number of weights": (1, 1009),
    "a row and a bit": (5, 409),
    "tall": (2048, 3),
    "1x1 of many": (64, 65, 1, 1),
    "3x3 in several pieces": (70, 512, 3, 3),
    "wide 3x3": (3, 1152, 3, 3),
    "5x7": (6, 30, 5, 7),
}


@pytest.fixture(params=[True, False], ids=["compiled", "sweeps"], autouse=True)
def compiled(request, monkeypatch):
    """Either form of the step for each test; whether it is the compiled one."""
    monkeypatch.setenv("AGD_NO_COMPILER", "0" if request.param else "1")
    if request.param and agd_cpu._library() is None:
        pytest.skip("no C compiler here")
    return request.param


def channels_last(weights):
    for W in weights:
        if W.ndim in (4, 5):
            form = torch.channels_last if W.ndim == 4 else torch.channels_last_3d
            W.data = W.data.to(memory_format=form)
            W.grad = W.grad.to(memory_format=form)


@pytest.mark.parametrize("last", [False, True])
def test_twenty_steps_agree_with_the_plain_ones(last, compiled):
    weights = weights_with_grads([*SHAPES.values(), *LONG.values()])
    if last:
        channels_last(weights)
    for W in weights:
        W.data.zero_()  # so that the weights are the updates, without their rounding
    twins = copy.deepcopy(weights)
    fused, plain = AGD(weights), AGD(twins, fused=False)
    for step in range(20):
        for W, V in zip(weights, twins):
            W.grad.normal_().mul_(10.0 ** (step % 6 - 2))
            V.grad = W.grad.clone()
        fused.step()
        plain.step()
        assert isinstance(fused._plan, agd_cpu.Plan if compiled else agd._Sweeps)
        assert fused.G.item() == near(plain.G.item(), rel=1e-6)
        assert fused.eta.item() == near(plain.eta.item(), rel=1e-6)
        assert fused.G.dtype == plain.G.dtype == torch.float64
    assert max(relative(W, V) for W, V in zip(weights, twins)) < 1e-6
    assert plain._plan is None


@pytest.mark.parametrize("shape", LONG.values(), ids=LONG)
@pytest.mark.parametrize("last", [False, True])
def test_every_form_of_memory_matches_the_paper(shape, last):
    weights = weights_with_grads([shape, (7, 5)])
    if last:
        channels_last(weights)
    strides = [W.stride() for W in weights]
    theirs, eta, G = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights)
    optimizer.step()
    assert optimizer._plan is not None
    assert optimizer.G.item() == near(G, rel=1e-6)
    assert optimizer.eta.item() == near(eta, rel=1e-6)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-6
    assert [W.stride() for W in weights] == strides


class Allocations(TorchDispatchMode):
    """The bytes of the new tensors that live at a time, at most."""

    def __init__(self):
        super().__init__()
        self.largest, self.kernels = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.kernels += not func.is_view
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if "out" in (kwargs or {}):
            given.add(kwargs["out"].untyped_storage().data_ptr())
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("last", [False, True])
def test_a_step_allocates_next_to_nothing(last, compiled):
    with torch.device("meta"):
        net = build("resnet18", (3, 32, 32), 10)
    weights = weights_with_grads([p.shape for p in net.parameters()])
    if last:
        channels_last(weights)
    optimizer = AGD(weights)
    optimizer.step()
    with Allocations() as allocations:
        optimizer.step()
    assert optimizer._plan is not None
    assert compiled or allocations.kernels > 20  # the mode saw the step
    assert allocations.largest <= 4096  # of 45 megabytes of weights


def test_what_the_fast_steps_do_not_take_is_left_to_the_plain_one(compiled):
    def planned(*weights, **options):
        optimizer = AGD(weights, **options)
        optimizer.step()
        return optimizer._plan is not None

    for dtype in (torch.float64, torch.bfloat16):
        (W,) = weights_with_grads([(7, 5)], dtype)
        assert not planned(W)
    (W,) = weights_with_grads([(2, 1031, 3, 3)])
    channels_last([W])  # rows of a prime length
    assert planned(W) == compiled
    W, V = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    assert planned(W, V)
    assert not planned(W, V, gain=torch.tensor(1.0))
    assert not planned(W, V, fused=False)
    V.data = torch.randn(6, 16, 3, 3)[:, ::2]  # with gaps
    assert not planned(W, V)


def test_gradients_that_lie_otherwise_give_the_same_step():
    weights = weights_with_grads([(6, 8, 3, 3), (9, 9), (6, 8, 1, 1)])
    weights[0].grad = weights[0].grad.contiguous(memory_format=torch.channels_last)
    weights[1].grad = weights[1].grad.t().contiguous().t()
    weights[2].grad = weights[2].grad.to(memory_format=torch.channels_last)
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights)
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-6)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-25, 1e25, 3e38, math.nan, math.inf])
@pytest.mark.parametrize("where", [(), (slice(None), slice(None), 1, 1)])
def test_the_plain_step_takes_over_to_the_bit(value, where, compiled):
    """Where the squares of a matrix, or of all, leave float32's range; compiled, where an update's
    factor does."""
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3)])
    weights[1].grad[where] = value
    weights[1].data[0] = -0.0
    twins = copy.deepcopy(weights)
    for W, V in zip(weights, twins):
        V.grad = W.grad.clone()
    fused, plain = AGD(weights), AGD(twins, fused=False)
    fused.step()
    plain.step()
    assert fused._plan is not None
    in_range = compiled and value in (0.0, 1e-25, 1e25)
    for W, V in zip(weights, twins):
        assert in_range or torch.equal(bits(W), bits(V))
        torch.testing.assert_close(W, V, rtol=1e-6, atol=5e-7)  # one rounding or two
        assert torch.equal(W.signbit(), V.signbit())
    assert in_range == (fused._plan.step([W.grad for W in weights]) is not None)
    assert fused.skipped.item() == plain.skipped.item() == (not math.isfinite(value))
    rtol = 1e-6 if in_range else 0
    torch.testing.assert_close(fused.eta, plain.eta, rtol=rtol, atol=0, equal_nan=True)


@pytest.mark.parametrize("gain, size, other", [(1e-30, 1e15, 1.0), (1e32, 1e-8, 1e17)])
def test_a_gain_far_from_1_keeps_its_digits(gain, size, other):
    """Also where gain and norm together leave float32's range, but not the update."""
    weights = weights_with_grads([(8, 8), (8, 8)], scale=1.0)
    for W, scale in zip(weights, (size, other)):
        W.data.zero_()
        W.grad.mul_(scale / W.grad.norm())
    expected, _, _ = reference_step(weights, [W.grad for W in weights], gain)
    optimizer = AGD(weights, gain=gain)
    optimizer.step()
    assert max(relative(W, V) for W, V in zip(weights, expected)) < 1e-6


def test_a_plan_is_made_anew_where_the_weights_change():
    """Other gradients, gains, storage, layout, weights: each step is that of the plain one."""
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3), (9, 9), (4, 4)])
    twins = copy.deepcopy(weights)
    for V in twins:
        V.grad = torch.zeros_like(V)
    fused, plain = AGD(weights[:3]), AGD(twins[:3], fused=False)
    plans = []

    def both(*change):
        for params, optimizer in ((weights, fused), (twins, plain)):
            for one in change:
                one(params, optimizer)
            for i, W in enumerate(params):
                if W.grad is not None or change == (restore,):
                    W.grad = torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
            if change and change[0] is transpose:
                params[2].grad = params[2].grad.t().contiguous().t()
            optimizer.step()
        plans.append(id(fused._plan))
        assert fused.G.item() == near(plain.G.item(), rel=1e-6)
        assert max(relative(W, V) for W, V in zip(weights, twins)) < 1e-6

    def lose(params, optimizer):
        params[1].grad = None

    def restore(params, optimizer):
        pass

    def freeze(params, optimizer):
        optimizer.param_groups[0]["lr"] = 0.25

    def move(params, optimizer):
        params[0].data = params[0].data.clone()

    def transpose(params, optimizer):
        params[2].data = params[2].data.t().contiguous().t()

    def add(params, optimizer):
        optimizer.add_param_group({"params": params[3], "lr": 0.0})

    both()
    both()
    assert plans[0] == plans[1]
    for change in (lose, restore, freeze, move, transpose, add):
        before = fused._plan
        both(change)
        assert fused._plan is not before
    frozen = bits(weights[3])
    both()
    assert torch.equal(bits(weights[3]), frozen)


def test_in_place_changes_are_seen_by_autograd():
    (W,) = weights_with_grads([(5, 5)])
    y = (W * W).sum()
    AGD([W]).step()
    with pytest.raises(RuntimeError, match="in-?place"):
        y.backward()


def test_a_loaded_state_leaves_the_choice_of_step():
    weights = weights_with_grads([(7, 5)])
    optimizer = AGD(weights, fused=False)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer.fused is False and optimizer._plan is None


def test_weights_that_shrink_in_place():
    """The same memory, of another shape."""
    for shape in ((40, 4), (40, 128)):
        (W,) = weights_with_grads([shape])
        optimizer = AGD([W])
        optimizer.step()
        W.grad, W.data = None, W.data[:20]
        W.grad = torch.ones(20, shape[1])
        theirs, _, _ = reference_step([W], [W.grad])
        optimizer.step()
        assert relative(W, theirs[0]) < 1e-6


def test_defaults_of_the_moment_do_not_matter():
    """A default dtype, a default device, inference mode: where the plan happens to be made."""
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    theirs = [W.detach().double() for W in weights]
    try:
        torch.set_default_dtype(torch.float64)
        optimizer = AGD(weights)
        for context in (torch.inference_mode(), torch.device("meta"), torch.no_grad()):
            with context:
                optimizer._key = None  # a plan made here
                theirs, _, _ = reference_step(theirs, [W.grad for W in weights])
                optimizer.step()
            optimizer.step()
            theirs, _, _ = reference_step(theirs, [W.grad for W in weights])
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer._plan is not None and optimizer.eta.device.type == "cpu"
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-6


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_weights_of_their_own(way):
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    optimizer = AGD(weights)
    optimizer.step()
    other = way(optimizer)
    theirs = other.param_groups[0]["params"]
    before = [bits(W) for W in weights]
    for W, V in zip(weights, theirs):
        V.grad = W.grad.clone()
    other.step()
    assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))
    optimizer.step()
    assert all(torch.equal(bits(W), bits(V)) for W, V in zip(weights, theirs))


def test_a_network_trains_alike():
    """20 steps of a real network by either step."""
    nets = []
    for fused in (None, False):
        torch.manual_seed(0)
        net = build("resnet18", (3, 8, 8), 10).eval()
        optimizer = AGD(net.parameters(), gain=0.1, fused=fused)
        x = torch.randn(4, 3, 8, 8)
        for _ in range(3):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
        nets.append(net)
    assert isinstance(nets[0], nn.Module)
    worst = max(relative(W, V) for W, V in zip(nets[0].parameters(), nets[1].parameters()))
    assert 0 < worst < 1e-5


def test_fused_true_is_a_promise():
    weights = weights_with_grads([(7, 5), (6, 8, 3, 3)])
    optimizer = AGD(weights, fused=True)
    optimizer.step()
    assert optimizer._plan is not None
    with pytest.raises(ValueError, match="no fused step for .*torch.float64"):
        AGD(weights_with_grads([(7, 5)], torch.float64), fused=True)
    with pytest.raises(ValueError, match="fused=None"):
        optimizer.add_param_group({"params": torch.randn(6, 16, 3, 3)[:, ::2].requires_grad_()})


def test_the_file_alone_is_the_whole_optimiser(tmp_path):
    """Copied elsewhere, without its neighbour, under another name, and in a package."""
    source = Path(agd.__file__).read_text()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for place in ("other.py", "package/agd.py"):
        (tmp_path / place).write_text(source)
    code = (
        "import torch; from other import AGD; from package import agd\n"
        "for one in (AGD, agd.AGD):\n"
        "    W = torch.ones(3, 3, requires_grad=True); W.grad = torch.ones(3, 3)\n"
        "    one([W]).step(); assert W[0, 0] < 1\n"
        "assert agd._kernels('cpu') is agd._kernels('cuda') is None\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
