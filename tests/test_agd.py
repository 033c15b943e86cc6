import copy
import math
import pickle

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from agd import AGD, init_weights
from architecture import build
from tests.reference import matrices, reference_step

SHAPES = {
    "linear": (7, 5),
    "wide linear": (5, 40),
    "conv1d": (6, 4, 3),
    "conv2d": (6, 4, 3, 5),
    "conv3d": (4, 3, 2, 3, 2),
    "grouped": (8, 2, 3, 3),
    "depthwise": (8, 1, 3, 3),
    "1x1": (6, 4, 1, 1),
}


def weights_with_grads(shapes, dtype=torch.float32, scale=1e-2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for shape in shapes:
        W = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        W.grad = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        weights.append(W)
    return weights


def near(x, rel):
    """Equal up to a relative error, however small x is."""
    return pytest.approx(x, rel=rel, abs=0)


def relative(a, b):
    """Norm of the difference over the norm of b, both float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device, on whatever device it runs."""

    BLOCKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
    METHODS = ("tolist", "numpy", "cpu")  # of a tensor on the host the dispatcher sees none

    def __init__(self):
        super().__init__()
        self.count = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        mask = any(x is not None and x.dtype == torch.bool for x in indices)
        self.count += name in self.BLOCKING or mask
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.methods = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name, method in self.methods.items():

            def counted(*args, method=method, **kwargs):
                self.count += 1
                return method(*args, **kwargs)

            setattr(torch.Tensor, name, counted)
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "arch, shape, classes",
    [
        ("fcn", (3, 32, 32), 10),
        ("vgg", (3, 32, 32), 10),
        ("resnet18", (3, 32, 32), 10),
        ("resnet50", (3, 64, 64), 10),  # with the stem of large images
    ],
)
def test_twenty_steps_match_the_transcribed_paper(arch, shape, classes, dtype, bound):
    torch.manual_seed(0)
    net = build(arch, shape, classes, depth=4, width=64).to(dtype)
    weights = list(net.parameters())
    init_weights(weights, torch.Generator().manual_seed(1))
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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("fused", [None, False])
def test_every_layout_matches_the_paper(layout, dtype, channels_last, fused):
    weights = weights_with_grads([SHAPES[layout]] * 2, dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if channels_last and weights[0].ndim in formats:
        for W in weights:
            W.data = W.data.to(memory_format=formats[W.ndim])
        weights[0].grad = weights[0].grad.to(memory_format=formats[weights[0].ndim])
    strides = [W.stride() for W in weights]
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights, fused=fused)
    optimizer.step()
    bound = 1e-12 if dtype == torch.float64 else 1e-6
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < bound
    assert optimizer.eta.item() == near(eta, rel=bound)
    assert [W.stride() for W in weights] == strides


def test_transposed_and_mixed_weights():
    weights = weights_with_grads([(7, 5), (7, 5), (6, 4, 3), (7, 5)])
    weights[1] = nn.Parameter(weights[1].data.double())
    weights[1].grad = torch.randn(7, 5, dtype=torch.float64)
    weights[3].data = weights[3].data.t().contiguous().t()
    theirs, _, _ = reference_step(weights, [W.grad for W in weights])
    AGD(weights).step()
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-6


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_half_precision_weights(dtype, bound):
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3)], dtype)
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights)
    optimizer.step()
    assert all(W.dtype == dtype for W in weights)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < bound
    assert optimizer.eta.item() == near(eta, rel=1e-6)  # the norms are not in half


@pytest.mark.parametrize("k", range(-37, 38))
@pytest.mark.parametrize("fused", [None, False])
def test_direction_at_every_scale(k, fused):
    weights = weights_with_grads([(64, 32), (16, 8, 3, 3), (64, 32)], scale=1.0)
    for W in weights:
        W.data.zero_()  # the weight after the step is the update
    weights[1].grad.mul_(10.0**k)
    weights[2].grad.mul_(10.0**k)
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights, fused=fused)
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-6)
    for W, V in zip(weights, theirs):
        for w, v in zip(matrices(W), matrices(V)):
            assert relative(w, v) < 1e-6


@pytest.mark.parametrize("shape", [(256, 1), (1024, 1, 3, 3), (1, 1024)])
@pytest.mark.parametrize("k", [-37, 37])
def test_extreme_gradients_of_extreme_shapes(shape, k):
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


@pytest.mark.parametrize("size", [1e200, 5e307, 1.5e308])
def test_the_largest_float64_gradients(size):
    W = nn.Parameter(torch.ones(1, 1, dtype=torch.float64))
    W.grad = torch.full_like(W, size)
    optimizer = AGD([W])
    optimizer.step()
    # eta -> log(G) / 2 for large G
    assert optimizer.eta.item() == near(math.log(size) / 2, rel=1e-12)
    assert W.item() == near(1 - math.log(size) / 2, rel=1e-12)


@pytest.mark.parametrize("shape", [(256, 3072), (16, 150528), (8, 50257), (3072, 64, 1, 1)])
@pytest.mark.parametrize("fused", [None, False])
def test_norms_of_long_rows(shape, fused):
    """A constant with larger columns here and there: what a naive float32 sum gets wrong."""
    W = nn.Parameter(torch.zeros(shape))
    W.grad = torch.full(shape, 0.1)
    W.grad[:, ::1000] = 1.0
    expected, _, G = reference_step([W], [W.grad])
    optimizer = AGD([W], fused=fused)
    optimizer.step()
    assert optimizer.G.item() == near(G, rel=1e-6)
    assert relative(W, expected[0]) < 1e-6


def test_eta_of_a_tiny_gradient_keeps_its_digits():
    (W,) = weights_with_grads([(4, 4)], torch.float64, scale=1e-20)
    optimizer = AGD([W])
    optimizer.step()
    # log((1 + sqrt(1 + 4G)) / 2) = G - 3/2 G^2 + ...
    assert optimizer.eta.item() == near(optimizer.G.item(), rel=1e-12)
    assert optimizer.G.item() > 0


def bits(W):
    return W.detach().clone().view(torch.int32)


def test_a_zero_gradient_leaves_those_weights_bit_for_bit():
    weights = weights_with_grads([(7, 5), (7, 5), (6, 4, 3, 3)])
    weights[0].grad.zero_()
    weights[0].grad[1] = -0.0
    weights[0].data[:, 0] = -0.0
    weights[2].grad[:, :, 1, 2] = 0
    before = [bits(W) for W in weights]
    optimizer = AGD(weights)
    optimizer.step()
    assert torch.equal(bits(weights[0]), before[0])
    assert (bits(weights[1]) != before[1]).all()
    moved = bits(weights[2]) != before[2]
    assert not moved[:, :, 1, 2].any()
    assert moved.float().mean() > 0.8
    assert optimizer.skipped.item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fused", [None, False])
def test_one_value_that_is_not_finite_leaves_every_weight(bad, layer, fused):
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3), (7, 5)])
    weights[0].data[0] = -0.0
    weights[layer].grad.view(-1)[3] = bad
    before = [bits(W) for W in weights]
    optimizer = AGD(weights, fused=fused)
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0 or fused is None  # which reads where there is nothing to wait for
    assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))
    assert math.isnan(optimizer.eta.item())
    assert optimizer.skipped.item() == 1
    for W in weights:
        W.grad = torch.ones_like(W)
    optimizer.step()
    assert all((bits(W) != b).any() for W, b in zip(weights, before))
    assert optimizer.skipped.item() == 1
    assert math.isfinite(optimizer.eta.item())


def test_a_step_reads_nothing_and_its_kernels_do_not_grow_with_depth():
    counts = []
    for depth in (4, 32):
        shapes = [(16, 8)] + [(16, 16)] * (depth - 2) + [(4, 16)]
        optimizer = AGD(weights_with_grads(shapes), fused=False)
        with Reads() as reads:
            optimizer.step()
        assert reads.count == 0
        counts.append(reads.kernels)
    assert counts[0] == counts[1]


def test_no_state_and_the_gradients_stay_as_they_are():
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3)])
    before = [W.grad.clone() for W in weights]
    optimizer = AGD(weights)
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(W.grad, g) for W, g in zip(weights, before))
    assert optimizer.eta.shape == optimizer.G.shape == optimizer.skipped.shape == ()


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_compiled_step_compiles_once_and_agrees(scheduled):
    """Also under a gain that changes each step, as a tensor."""
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3), (7, 5)])
    gain = torch.tensor(1.0)
    twin = copy.deepcopy(weights)
    for W, V in zip(weights, twin):
        V.grad = W.grad.clone()
    plain, compiled = AGD(weights, gain), AGD(twin, gain if scheduled else 1.0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend=backend)
    for i in range(6):
        for W, V in zip(weights, twin):
            W.grad.mul_(1.7)
            V.grad.copy_(W.grad)
        if scheduled:
            gain.mul_(0.9)
        plain.step()
        step()
        if i == 0:
            first = len(graphs)
    assert len(graphs) == first >= 1
    assert all(torch.allclose(W, V, rtol=1e-6) for W, V in zip(weights, twin))
    torch._dynamo.reset()


def test_groups_share_L_G_and_eta():
    shapes = [(7, 5), (6, 4, 3, 3), (7, 5), (4, 4)]
    weights, twin = weights_with_grads(shapes), weights_with_grads(shapes)
    one = AGD(weights)
    several = AGD([{"params": twin[:1]}, {"params": twin[1:3], "lr": 0.5}])
    several.add_param_group({"params": twin[3], "gain": 0})
    weights[3].data[0] = twin[3].data[0] = -0.0  # frozen means every bit
    before = [W.detach().clone() for W in weights]
    one.step()
    several.step()
    assert one.eta.item() == near(several.eta.item(), rel=1e-14)
    for W, V, b, gain in zip(weights, twin, before, (1, 0.5, 0.5, 0)):
        assert torch.allclose(V - b, gain * (W - b), atol=1e-6)
    assert torch.equal(bits(twin[3]), bits(before[3]))


def test_gain_multiplies_the_update_and_nothing_else():
    weights = weights_with_grads([(7, 5), (6, 4, 3)], torch.float64)
    theirs, eta, _ = reference_step(weights, [W.grad for W in weights], gain=0.3)
    optimizer = AGD(weights, gain=0.3)
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-12)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-12


def test_schedulers_and_tensor_gains():
    weights, twin = weights_with_grads([(7, 5)] * 2), weights_with_grads([(7, 5)] * 2)
    optimizer = AGD(weights)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    optimizer.step()
    tensor = AGD(twin, gain=torch.tensor(1.0))
    tensor.step()
    tensor.param_groups[0]["lr"].mul_(0.5)
    tensor.step()
    assert all(torch.allclose(W, V, atol=1e-7) for W, V in zip(weights, twin))


@pytest.mark.parametrize("gain", [-1.0, math.nan, math.inf])
def test_a_gain_that_becomes_wrong_moves_nothing(gain):
    weights = weights_with_grads([(7, 5), (4, 3, 3)])
    weights[0].data[0] = -0.0
    before = [bits(W) for W in weights]
    optimizer = AGD(weights)
    optimizer.param_groups[0]["lr"] = gain
    with pytest.raises(ValueError, match="gain"):
        optimizer.step()
    optimizer = AGD(weights, gain=torch.tensor(1.0))
    for wrong in (gain, 0.0):  # a tensor is not read: it freezes
        optimizer.param_groups[0]["lr"].fill_(wrong)
        optimizer.step()
        assert all(torch.equal(bits(W), b) for W, b in zip(weights, before))


def test_a_missing_gradient_is_skipped_and_counts_in_L():
    weights = weights_with_grads([(7, 5), (4, 4), (6, 4, 3)], torch.float64)
    weights[1].grad = None
    before = weights[1].detach().clone()
    theirs, eta, G = reference_step(weights, [W.grad for W in weights])
    optimizer = AGD(weights)
    optimizer.step()
    assert torch.equal(weights[1], before)
    assert optimizer.G.item() == near(G, rel=1e-12)
    assert max(relative(W, V) for W, V in zip(weights, theirs)) < 1e-12
    for W in weights:
        W.grad = None
    optimizer.step()
    assert optimizer.eta.item() == optimizer.G.item() == 0


def test_tied_weights_are_one_layer():
    (W,) = weights_with_grads([(5, 5)], torch.float64)
    optimizer = AGD([W, W])
    assert len(optimizer.param_groups[0]["params"]) == 1
    theirs, eta, _ = reference_step([W], [W.grad])
    optimizer.step()
    assert optimizer.eta.item() == near(eta, rel=1e-12)
    assert relative(W, theirs[0]) < 1e-12
    with pytest.raises(ValueError):
        AGD([{"params": [W]}, {"params": [W]}])
    # drawn once: the second entry takes nothing from the generator
    init_weights([W, W], torch.Generator().manual_seed(0))
    once = W.detach().clone()
    init_weights([W], torch.Generator().manual_seed(0))
    assert torch.equal(W, once)
    V = torch.zeros(3, 3)  # net.parameters() lists a weight where it is first, too
    (group,) = AGD([("a", W), ("b", V), ("c", W)]).param_groups
    assert group["param_names"] == ["a", "b"] and group["params"][0] is W


def test_closure_returns_its_loss_with_gradients_enabled():
    (W,) = weights_with_grads([(5, 5)])
    optimizer = AGD([W])

    def closure():
        optimizer.zero_grad()
        loss = W.square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


def test_named_parameters():
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Conv1d(3, 3, 1, bias=False))
    optimizer = AGD(net.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "1.weight"]
    init_weights(net.named_parameters(), torch.Generator().manual_seed(0))
    again = AGD([{"params": list(net.named_parameters()), "lr": 0.5}])
    assert again.param_groups[0]["lr"] == 0.5


def test_generators_lose_nothing():
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
    groups = [[net.parameters()], [net[0].parameters(), net[1:].named_parameters()]]
    assert [len(g["params"]) for g in AGD(net.parameters()).param_groups] == [3]
    one, two = ([{"params": g} for g in group] for group in groups)
    assert [len(g["params"]) for g in AGD(one).param_groups] == [3]
    with pytest.raises(ValueError, match="param"):  # torch: all named, or none
        AGD(two)
    init_weights([{"params": net.parameters()}], torch.Generator().manual_seed(0))
    drawn = [p.detach().clone() for p in net.parameters()]
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(drawn, net.parameters()))


@pytest.mark.parametrize(
    "params, words",
    [
        (lambda: [], ["empty", "net.parameters()"]),
        (lambda: iter([]), ["empty", "once"]),
        (lambda: [torch.zeros(2, 2, dtype=torch.float8_e4m3fn)], ["(2, 2)", "16 bits"]),
        (lambda: [{"params": []}], ["empty"]),
        (lambda: nn.Linear(3, 2).named_parameters(), ["bias", "(2,)", "bias=False"]),
        (lambda: nn.BatchNorm2d(3).parameters(), ["(3,)", "affine=False"]),
        (lambda: [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], ["(2, 2)", "complex"]),
        (lambda: [nn.Parameter(torch.zeros(0, 3))], ["(0, 3)", "no elements"]),
        (lambda: [{"params": [nn.Parameter(torch.zeros(3))]}], ["(3,)"]),
    ],
)
def test_refusals_name_the_tensor_and_the_way_out(params, words):
    with pytest.raises(ValueError) as error:
        AGD(params())
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(ValueError) as error:
        init_weights(params())
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "gain", [-1.0, math.nan, math.inf, torch.tensor(-1.0), torch.ones(2), "1", None]
)
def test_a_gain_out_of_range_is_refused(gain):
    (W,) = weights_with_grads([(5, 5)])
    with pytest.raises(ValueError, match="gain"):
        AGD([W], gain=gain)
    with pytest.raises(ValueError, match="gain"):
        AGD([{"params": [W], "lr": gain}])


def test_other_refusals():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AGD(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) is sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
    for take in (AGD, init_weights):
        with pytest.raises(TypeError, match=r"net\.parameters"):
            take(nn.Sequential(nn.Linear(2, 2, bias=False)))
    elsewhere = type("Generator", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match=r"torch\.Generator\(\)"):
        init_weights([torch.zeros(2, 2)], elsewhere)
    with pytest.raises(TypeError):
        AGD(torch.zeros(2, 2, requires_grad=True))
    with pytest.raises(TypeError):
        AGD(["weight"])


def trained(optimizer, weights):
    for i in range(3):
        for W in weights:
            W.grad = torch.full_like(W, 0.1 + i) + W.detach()
        optimizer.step()
    return [W.detach().clone() for W in weights]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "file"])
def test_copies_and_saved_states_go_on_as_the_original(way, tmp_path):
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3)])
    optimizer = AGD([("a", weights[0]), ("b", weights[1])], gain=0.7)
    first = weights[0].grad[0, 0].item()
    weights[0].grad[0, 0] = math.nan
    optimizer.step()
    weights[0].grad[0, 0] = first
    optimizer.step()
    assert math.isfinite(optimizer.eta.item())
    if way in ("deepcopy", "pickle"):
        pair = (weights, optimizer)
        pair = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        twin, other = pair
        assert torch.equal(other.eta, optimizer.eta) and torch.equal(other.G, optimizer.G)
    else:
        twin = [nn.Parameter(W.detach().clone()) for W in weights]
        other = AGD([("a", twin[0]), ("b", twin[1])])
        state = optimizer.state_dict()
        if way == "file":
            torch.save(state, tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        other.load_state_dict(state)
        assert other.param_groups[0]["lr"] == 0.7
    assert other.skipped.item() == 1
    ours, theirs = trained(optimizer, weights), trained(other, twin)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_grad_scaler_gives_the_same_step_and_survives_an_overflow():
    weights, twin = weights_with_grads([(7, 5), (4, 3, 3)]), weights_with_grads([(7, 5), (4, 3, 3)])
    plain, scaled = AGD(weights), AGD(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for V in twin:
        V.grad.mul_(2.0**10)
    plain.step()
    scaler.step(scaled)
    scaler.update()
    assert all(torch.equal(W, V) for W, V in zip(weights, twin))
    assert torch.equal(plain.eta, scaled.eta)
    twin[0].grad.fill_(math.inf)
    scaler.step(scaled)
    assert all(torch.equal(W, V) for W, V in zip(weights, twin))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_init_is_semi_orthogonal_at_the_papers_scale(shape):
    W = torch.empty(shape, dtype=torch.float64)
    init_weights([W])
    out, fan_in = shape[:2]
    s = math.sqrt(out / fan_in) / math.sqrt(math.prod(shape[2:]))
    for w in matrices(W):
        values = torch.linalg.svdvals(w)
        assert torch.allclose(values, torch.full_like(values, s), rtol=1e-12)


def test_init_is_haar():
    """Entries of a Haar matrix have mean 0; without the sign of R's diagonal the QR's have not."""
    draws = [torch.empty(3, 3, dtype=torch.float64) for _ in range(20000)]
    init_weights(draws, torch.Generator().manual_seed(0))
    Q = torch.stack(draws)
    assert Q.mean(0).abs().max() < 5 / math.sqrt(3 * 20000)
    # The second and fourth moments of an entry: 1/n and 3 / (n (n + 2)).
    assert Q.square().mean().item() == near(1 / 3, rel=1e-10)
    assert Q.pow(4).mean().item() == near(3 / 15, rel=0.02)
    assert (torch.linalg.det(Q) > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_init_draws_by_the_generator_alone():
    shapes = [(7, 5), (6, 4, 3, 3), (7, 5), (5, 7)]

    def draw(dtype, seed, shapes=shapes):
        weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
        init_weights(weights, torch.Generator().manual_seed(seed))
        return weights

    a = draw(torch.float32, 0)
    torch.rand(3)
    assert all(torch.equal(x, y) for x, y in zip(a, draw(torch.float32, 0)))
    assert not torch.equal(a[0], draw(torch.float32, 1)[0])
    assert not torch.equal(a[0], a[2])
    # A layer's draw does not depend on those behind it, nor on the dtype but for rounding.
    assert torch.allclose(a[0], draw(torch.float32, 0, shapes[:1])[0])
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for x, y in zip(a, draw(dtype, 0)):
            assert y.dtype == dtype
            assert torch.allclose(x.to(dtype).double(), y.double(), rtol=0.01, atol=1e-3)
    torch.manual_seed(3)
    b = [torch.empty(4, 4)]
    init_weights(b)
    torch.manual_seed(3)
    c = [torch.empty(4, 4)]
    init_weights(c)
    assert torch.equal(b[0], c[0])


def test_init_draws_on_the_cpu_whatever_the_default_device():
    W, V = torch.empty(3, 4), torch.empty(3, 4)
    init_weights([W], torch.Generator().manual_seed(0))
    with torch.device("meta"):
        init_weights([V], torch.Generator().manual_seed(0))
    assert torch.equal(W, V)


def test_init_takes_groups_and_channels_last():
    W = torch.empty(6, 4, 3, 3).to(memory_format=torch.channels_last)
    V = torch.empty(6, 4, 3, 3)
    init_weights([{"params": [W]}], torch.Generator().manual_seed(0))
    init_weights([V], torch.Generator().manual_seed(0))
    assert torch.equal(W, V)
    assert W.is_contiguous(memory_format=torch.channels_last)


def test_the_constructor_does_not_draw():
    weights = weights_with_grads([(7, 5)])
    before = weights[0].detach().clone()
    AGD(weights)
    assert torch.equal(weights[0], before)


def test_init_of_resnet50_takes_the_batched_way():
    """One factorisation a size of matrix, not one a position: 54 layers, 216 positions."""
    weights = list(build("resnet50", (3, 64, 64), 1000).parameters())
    calls = []
    qr = torch.linalg.qr

    def counted(x):
        calls.append(x.shape)
        return qr(x)

    torch.linalg.qr = counted
    try:
        init_weights(weights)
    finally:
        torch.linalg.qr = qr
    sizes = {(max(p.shape[:2]), min(p.shape[:2])) for p in weights}
    assert len(calls) == len(sizes) < 25
