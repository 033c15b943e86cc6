"""The kernels of a GPU in Triton's interpreter, on the CPU: tests/test_cuda.py runs this
file in a process of its own, which has TRITON_INTERPRET=1 from its start."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import agd
import agd_cuda
from agd import AGD
from agd_cuda import Plan
from tests.test_properties import PROPERTY, Lying, nets, small, step_and_check, weights_of

# Linear, 1x1, 3x3, 5x5, 7x7, conv1d, conv3d, depthwise, one element a matrix, more than a tile of
# each kind.
SHAPES = [
    (10, 7), (97, 89), (33, 20, 1, 1), (24, 10, 3, 3), (61, 29, 3, 3), (8, 6, 5, 5), (6, 3, 7, 7),
    (9, 4, 3), (5, 4, 3, 2, 3), (12, 1, 3, 3), (1, 1, 3),
]  # fmt: skip
CHANNELS_LAST = [(24, 3, 3, 3), (24, 16, 3, 3), (70, 70, 3, 3), (5, 1, 3, 3), (1, 40, 3, 3)]
TOLERANCE = {torch.float64: 1e-12}


def weights(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    ws = [draw(shape) for shape in SHAPES]
    ws += [draw(shape).to(memory_format=torch.channels_last) for shape in CHANNELS_LAST]
    ws.append(draw((30, 20)).t())
    ws.append(draw((3, 3, 40, 6)).permute(2, 3, 0, 1))  # positions outermost
    ws.append(draw((2, 3, 4100)).permute(0, 2, 1))  # runs of more than a tile
    return ws


def scale(w):
    return math.sqrt(w.shape[0] / w.shape[1] / math.prod(w.shape[2:]))


def plan_of(ws, L=None, groups=None):
    return Plan.of(ws, [scale(w) for w in ws], L or len(ws), groups or [0] * len(ws))


def exact_step(ws, grads, gains=(1.0,), groups=None, L=None):
    """(new weights, G, eta) of the plain path in float64, to which every dtype here is exact."""
    groups = groups or [0] * len(ws)
    params = [torch.nn.Parameter(w.double().clone()) for w in ws]
    for p, g in zip(params, grads):
        p.grad = g.double()
    rest = [torch.nn.Parameter(torch.ones(1, 1)) for _ in range((L or len(ws)) - len(ws))]
    lists = [[p for p, group in zip(params, groups) if group == i] for i in range(len(gains))]
    lists[0] += rest
    optimizer = AGD([{"params": ps, "lr": float(g)} for ps, g in zip(lists, gains) if ps])
    optimizer.step()
    return [p.detach() for p in params], optimizer.G, optimizer.eta


def check(ws, before, exact):
    """Each weight is the exact one, rounded once, but for the update's own rounding."""
    for w, old, new in zip(ws, before, exact):
        info = torch.finfo(w.dtype)
        bound = (new - old.double()).abs() * TOLERANCE.get(w.dtype, 1e-6)
        # In float64 the exact one is rounded too. The interpreter cuts digits off where it converts
        # to bfloat16; a GPU rounds.
        ulps = 1 if w.dtype in (torch.float64, torch.bfloat16) else 0.5
        bound += new.abs() * info.eps * ulps + info.smallest_normal * info.eps
        assert ((w.double() - new).abs() <= bound).all(), (w.shape, w.stride())


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_step(ws, plan, grads, gains=(1.0,), groups=None, L=None):
    skipped = torch.zeros((), dtype=torch.int64)
    before = [w.clone() for w in ws]
    exact, exact_G, exact_eta = exact_step(ws, grads, gains, groups, L)
    G, eta = plan.step(grads, list(gains), skipped)
    assert G.dtype == eta.dtype == torch.float64 and G.ndim == eta.ndim == 0
    torch.testing.assert_close(G, exact_G, rtol=1e-12, atol=0)
    torch.testing.assert_close(eta, exact_eta.detach(), rtol=1e-12, atol=0)
    assert skipped == 0
    check(ws, before, exact)


@pytest.mark.parametrize("dtype", agd_cuda.DTYPES, ids=str)
def test_every_shape_and_layout_takes_the_plain_paths_step(dtype):
    ws = weights(dtype, 0.01)
    groups = [i % 2 for i in range(len(ws))]
    plan = plan_of(ws, len(ws) + 3, groups)
    assert plan.fits(ws)
    for step in range(2):
        grads = [torch.randn_like(w) * 100.0**step for w in ws]
        if step == 1:  # strides of its own
            grads = [g.contiguous() for g in grads]
        gains = (1.0, torch.tensor(0.5)) if step else (0.25, 3)
        check_step(ws, plan, grads, gains, groups, len(ws) + 3)


def test_more_matrices_than_are_taken_at_a_time(monkeypatch):
    monkeypatch.setattr(agd_cuda, "CHUNK", 16)
    ws = [torch.zeros(2, 3, 150), torch.zeros(6, 5), torch.zeros(3, 2, 7)]  # one wide tile
    for _ in range(2):
        check_step(ws, plan_of(ws), [torch.randn_like(w) for w in ws])


def test_mixed_dtypes_take_one_step():
    ws = [torch.randn(9, 5).to(dtype) for dtype in agd_cuda.DTYPES]
    check_step(ws, plan_of(ws), [torch.randn_like(w) for w in ws])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_scale(dtype):
    # Without bfloat16's subnormals, which the interpreter does not convert.
    exponents = [-30 if dtype == torch.bfloat16 else -44, -20, 0, 20, 37]
    if dtype == torch.float64:
        exponents += [-310, 150, 300]
    shapes = [(33, 20), (24, 10, 3, 3), (24, 18, 3, 3)]
    for exponent in exponents:
        ws = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        ws[2] = ws[2].to(memory_format=torch.channels_last)
        grads = [(torch.randn_like(w).double().clamp(-3, 3) * 10.0**exponent).to(dtype) for w in ws]
        check_step(ws, plan_of(ws), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_positions_of_any_two_scales(dtype, memory_format):
    large, small = {
        torch.float32: (1e10, 1e-42), torch.float64: (1e200, 1e-250), torch.bfloat16: (1e10, 1e-30)
    }[dtype]  # fmt: skip
    w = torch.zeros(24, 18, 3, 3, dtype=dtype).to(memory_format=memory_format)
    g = torch.randn_like(w)
    g[:, :, 0, 1] *= large
    g[:, :, 2, 2] *= small
    check_step([w], plan_of([w]), [g])


def test_zero_gradients_leave_the_weights_as_they_were():
    ws = [torch.full(s, -0.0) for s in [(9, 5), (24, 10, 3, 3), (24, 18, 3, 3), (9, 5)]]
    ws[2] = ws[2].to(memory_format=torch.channels_last)
    plan = plan_of(ws)
    before = [w.clone() for w in ws]
    zeros = [torch.zeros_like(w) for w in ws]
    G, eta = plan.step(zeros, [1.0], torch.zeros((), dtype=torch.int64))
    assert G == 0 and eta == 0
    assert all(map(same_bits, ws, before))
    grads = [torch.randn_like(w) for w in ws]
    grads[0].zero_()
    grads[1][:, :, 1, 2] = -0.0
    grads[2][:, :, 2, 0] = -0.0
    check_step(ws, plan, grads)
    assert same_bits(ws[0], before[0])
    assert same_bits(ws[1][:, :, 1, 2], before[1][:, :, 1, 2])
    assert same_bits(ws[2][:, :, 2, 0], before[2][:, :, 2, 0])
    assert all((w != 0).any() for w in ws[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted(dtype, value):
    ws = [torch.randn(s).to(dtype) for s in [(9, 5), (24, 10, 3, 3), (24, 18, 3, 3)]]
    ws[2] = ws[2].to(memory_format=torch.channels_last)
    ws[0][0, 0] = -0.0
    plan, skipped = plan_of(ws), torch.tensor(4)
    for bad in range(3):
        before = [w.clone() for w in ws]
        grads = [torch.randn_like(w) for w in ws]
        grads[bad][(3, 2, 1, 1)[: grads[bad].ndim]] = value
        G, eta = plan.step(grads, [1.0], skipped)
        assert not G.isfinite() and eta.isnan() and skipped == 5 + bad
        assert all(map(same_bits, ws, before))
    check_step(ws, plan, [torch.randn_like(w) for w in ws])


def test_gains():
    ws = [torch.randn(9, 5) for _ in range(7)]
    out = [torch.tensor(x) for x in (math.nan, math.inf, -1.0)]
    gains = [0.3, 0, torch.tensor(1e-5, dtype=torch.float64), torch.tensor(2.0).bfloat16(), *out]
    groups = list(range(7))
    plan = plan_of(ws, 7, groups)
    before = [w.clone() for w in ws]
    grads = [torch.randn_like(w) for w in ws]
    check_step(ws, plan, grads, [*gains[:4], 0, 0, 0], groups)
    for w, old in zip(ws, before):
        w.copy_(old)
    exact, _, _ = exact_step(ws, grads, [*gains[:4], 0, 0, 0], groups)
    plan.step(grads, gains, torch.zeros((), dtype=torch.int64))
    check(ws, before, exact)
    assert all(same_bits(ws[i], before[i]) for i in (1, 4, 5, 6))
    assert not any(same_bits(ws[i], before[i]) for i in (0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_that_are_no_multiple_of_16(dtype):
    """As of gradients that are views of one flat tensor; a weight and its gradient differ."""
    shapes = [(70, 64), (64, 12, 3, 3), (65, 64, 3, 3)]
    for shift_w, shift_g in [(0, 1), (1, 0), (3, 3)]:
        ws, grads = [], []
        for i, shape in enumerate(shapes):
            strides = torch.empty(shape)
            if i == 2:
                strides = strides.to(memory_format=torch.channels_last)
            for out, shift in ((ws, shift_w), (grads, shift_g)):
                flat = torch.randn(math.prod(shape) + 8).to(dtype)
                out.append(flat[shift:].as_strided(shape, strides.stride(), shift))
        check_step(ws, plan_of(ws), grads)


def test_new_addresses_every_step():
    ws = [torch.randn(5, 3) for _ in range(20)]
    plan, kept = plan_of(ws), []
    for _ in range(3):
        kept.append([torch.randn_like(w) for w in ws])
        check_step(ws, plan, kept[-1])
    check_step(ws, plan, kept[0])
    with torch.no_grad():
        ws[7].set_(torch.randn(5, 3))  # the weights may move too
    check_step(ws, plan, kept[0])


@pytest.mark.parametrize("exponent", [-300, -17, -16, -8, -3, 0, 2, 17, 300])
def test_eta_to_the_last_digits(exponent):
    k = agd_cuda._kernels()
    table = torch.tensor([[0, 1, 1, 0]])
    one = torch.ones(1, dtype=torch.float64)
    for digits in (1.0, 1.7, 3.3, 9.9):
        norm = one * (digits * 10.0**exponent)
        G, eta = torch.empty((), dtype=torch.float64), torch.empty((), dtype=torch.float64)
        k.summarise[(1,)](
            norm, one, one.view(torch.int64), table, torch.empty(2, dtype=torch.float64), G, eta,
            torch.zeros((), dtype=torch.int64), 1, 1, CHUNK=8,
        )  # fmt: skip
        x = norm.item()
        assert x == G.item()
        expected = math.log1p(x / (math.sqrt(x + 0.25) + 0.5))
        assert math.isclose(eta.item(), expected, rel_tol=1e-15)


def test_a_norm_of_more_partial_norms_than_are_taken_at_a_time():
    k = agd_cuda._kernels()
    x = torch.rand(3, 50, dtype=torch.float64)
    x[1] *= 1e-200
    x[2] *= 1e300
    segments = torch.tensor([[i * 50, 50, 1, 0] for i in range(3)] + [[1, 25, 2, 0]])
    out = torch.empty(4, dtype=torch.float64)
    k.norms[(4,)](x, segments, out, CHUNK=16)
    expected = [*(x / x.amax(1, True)).norm(dim=1).mul(x.amax(1)), x[0, 1::2].norm()]
    torch.testing.assert_close(out, torch.stack(expected), rtol=1e-14, atol=0)


def test_what_has_no_plan():
    w = torch.zeros(6, 5, 3, 3)
    for other in [
        w[:, ::2], w[:1].expand(6, 5, 3, 3), torch.zeros(6, 8)[:, :5],
        torch.zeros(3, 6, 3, 5).permute(1, 3, 0, 2), torch.zeros(6, 5, dtype=torch.float8_e5m2),
    ]:  # fmt: skip
        assert plan_of([w, other]) is None
    plan = plan_of([w])
    skipped = torch.zeros((), dtype=torch.int64)
    assert plan.step([torch.zeros_like(w).half()], [1.0], skipped) is None
    assert plan.fits([w]) and not plan.fits([w, w]) and not plan.fits([w.clone()])
    w.data = w.data.to(memory_format=torch.channels_last)
    assert not plan.fits([w])


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The CPU counts as a GPU, its kernels interpreted."""
    monkeypatch.setattr(agd, "GPUS", ("cpu",))
    monkeypatch.setattr(agd_cuda, "TRUSTED", {})


def test_the_optimiser_takes_the_kernels(on_a_gpu):
    """20 steps beside the plain ones: groups, tensor gains, a gradient that is missing for a while,
    weights that move, and autograd that sees a weight change."""
    shapes = [(10, 7), (24, 10, 3, 3), (9, 5), (9, 4, 3)]
    ws = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    twins = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    kernels, plain = (
        AGD([{"params": x[:2]}, {"params": x[2:], "lr": torch.tensor(0.5)}], fused=fused)
        for x, fused in ((ws, True), (twins, False))
    )
    plans = set()
    for step in range(20):
        for i, (w, twin) in enumerate(zip(ws, twins)):
            w.grad = torch.randn_like(w) * 10.0 ** (step % 5 - 3)
            w.grad = None if i == 2 and step in (3, 4) else w.grad
            twin.grad = w.grad
        if step == 10:
            ws[1].data = ws[1].data.to(memory_format=torch.channels_last)
            kernels.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.3
        product = (ws[0] * ws[0]).sum()
        kernels.step()
        plain.step()
        plans.add(kernels._plan)
        with pytest.raises(RuntimeError, match="in-?place"):
            product.backward()
        torch.testing.assert_close(kernels.G, plain.G, rtol=1e-6, atol=0)
        torch.testing.assert_close(kernels.eta, plain.eta, rtol=1e-6, atol=0)
    assert len(plans) == 4 and all(isinstance(plan, Plan) for plan in plans)
    for w, twin in zip(ws, twins):
        assert (w - twin).norm() < 1e-6 * twin.norm()
    ws[3].grad[0] = math.nan
    before = [w.clone() for w in ws]
    kernels.step()
    assert all(map(same_bits, ws, before))
    assert kernels.skipped == 1 and kernels.eta.isnan()
    assert isinstance(copy.deepcopy(kernels), AGD)  # tables of a device stay behind


@settings(PROPERTY, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(net=nets((torch.float64, torch.float32, torch.float16), largest=3, of=small))
def test_a_step_of_any_net_is_that_of_the_mathematics(on_a_gpu, net):
    optimizer = net.replaced(lying=lambda x: Lying(tuple(range(x.W.ndim)))).optimizer(None)
    step_and_check(optimizer)
    assert optimizer.plain == all(w.grad is None for w in weights_of(optimizer))


def test_kernels_that_do_not_agree_are_not_taken(on_a_gpu, monkeypatch):
    w = torch.nn.Parameter(torch.randn(5, 4))
    w.grad = torch.randn(5, 4)
    step = Plan.step

    def wrong(self, *args):
        G, eta = step(self, *args)
        return G * 1.001, eta

    monkeypatch.setattr(Plan, "step", wrong)
    with pytest.warns(UserWarning, match="disagree"):
        AGD([w]).step()
    optimizer = AGD([w])
    optimizer.step()  # tried once, said once
    assert optimizer._plan is None and optimizer.eta > 0
    with pytest.raises(ValueError, match="no fused step for a tensor of shape"):
        AGD([w], fused=True)

    def broken(self, *args):
        raise OSError("no C compiler")

    monkeypatch.setattr(Plan, "step", broken)
    monkeypatch.setattr(agd_cuda, "TRUSTED", {})
    with pytest.warns(UserWarning, match="no C compiler"):
        AGD([w]).step()


def test_kernels_that_are_forbidden_are_not_taken(on_a_gpu, monkeypatch):
    monkeypatch.setenv("AGD_NO_COMPILER", "1")
    w = torch.nn.Parameter(torch.randn(5, 4))
    w.grad = torch.randn(5, 4)
    optimizer = AGD([w])
    optimizer.step()
    assert optimizer._plan is None and optimizer.eta > 0
    with pytest.raises(ValueError, match="no fused step for a tensor of shape"):
        AGD([w], fused=True)


def test_a_gain_that_was_on_the_device_and_then_is_0(monkeypatch):
    monkeypatch.setattr(agd_cuda, "HOST", ())
    w = torch.randn(5, 4)
    plan, skipped = plan_of([w]), torch.zeros((), dtype=torch.int64)
    plan.step([torch.randn(5, 4)], [torch.tensor(1.0)], skipped)
    before = w.clone()
    plan.step([torch.randn(5, 4)], [0.0], skipped)
    assert same_bits(w, before)
    plan.step([torch.randn(5, 4)], [torch.tensor(0.5)], skipped)
    assert not same_bits(w, before)
