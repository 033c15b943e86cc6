import copy
import math
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

import agd
from agd import AGD, init_weights
from architecture import build
from tests.conftest import ROOT
from tests.reference import matrices, reference_step
from tests.test_backends import SHAPES, bits, near, relative, weights_with_grads


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device, on whatever device it runs. AGD reads a
    number where that waits for nothing; meanwhile it takes no device for such a one."""

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
        self.on_host, agd._on_host = agd._on_host, lambda x: False
        self.methods = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name, method in self.methods.items():

            def counted(*args, method=method, **kwargs):
                self.count += 1
                return method(*args, **kwargs)

            setattr(torch.Tensor, name, counted)
        return super().__enter__()

    def __exit__(self, *error):
        agd._on_host = self.on_host
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)


def test_eta_of_a_tiny_gradient_keeps_its_digits():
    (W,) = weights_with_grads([(4, 4)], torch.float64, scale=1e-20)
    optimizer = AGD([W])
    optimizer.step()
    # log((1 + sqrt(1 + 4G)) / 2) = G - 3/2 G^2 + ...
    assert optimizer.eta.item() == near(optimizer.G.item(), rel=1e-12)
    assert optimizer.G.item() > 0


@pytest.mark.parametrize("gain", [1.0, 0.5, "tensor"])
def test_a_step_reads_nothing(gain):
    """Tensors without numbers: whatever asks for one raises."""
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(shape)) for shape in [(7, 5), (6, 4, 3, 3), (2, 2)]]
        weights.append(nn.Parameter(torch.empty(7, 5, dtype=torch.float64)))
        for W in weights[:2] + weights[3:]:
            W.grad = torch.empty_like(W)
        optimizer = AGD([{"params": weights[:1]}, {"params": weights[1:]}])
        optimizer.param_groups[0]["lr"] = torch.ones(()) if gain == "tensor" else gain
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0 and reads.kernels > 20
    assert optimizer.eta.is_meta and optimizer.eta.dtype == torch.float64


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
    plain, compiled = AGD(weights, gain=gain), AGD(twin, gain=gain if scheduled else 1.0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend=backend, fullgraph=True)
    for _ in range(6):
        for W, V in zip(weights, twin):
            W.grad.mul_(1.7)
            V.grad.copy_(W.grad)
        if scheduled:
            gain.mul_(0.9)
        plain.step()
        step()
        assert len(graphs) == 1
        assert torch.allclose(compiled.eta, plain.eta, rtol=1e-6, atol=0)
    assert all(torch.allclose(W, V, rtol=1e-6) for W, V in zip(weights, twin))
    torch._dynamo.reset()


def test_groups_share_L_G_and_eta():
    shapes = [(7, 5), (6, 4, 3, 3), (7, 5), (4, 4)]
    weights, twin = weights_with_grads(shapes), weights_with_grads(shapes)
    one = AGD(weights)
    several = AGD([{"params": twin[:1]}, {"params": twin[1:3], "gain": 0.5}])
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
    again = AGD([{"params": list(net.named_parameters()), "gain": 0.5}])
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
        (lambda: [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], ["(2, 2)", "complex"]),
        (lambda: [nn.Parameter(torch.zeros(0, 3))], ["(0, 3)", "no elements"]),
        (lambda: [{"params": [torch.zeros(0), torch.zeros(2, dtype=torch.int8)]}],
         ["2 tensors", "(0,)", "no elements", "(2,)", "torch.int8"]),
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
        AGD([{"params": [W], "gain": gain}])


def test_other_refusals():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AGD(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) is sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)
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


def test_a_state_of_before_has_its_count_beside_the_groups():
    weights = weights_with_grads([(7, 5)])
    optimizer = AGD(weights, fused=False)
    state = optimizer.state_dict()
    del state["param_groups"][0]["skipped"]
    counted = optimizer.skipped
    optimizer.load_state_dict({**state, "skipped": torch.tensor(3)})
    optimizer.step()
    assert optimizer.skipped == 3 and optimizer.skipped is counted
    optimizer.load_state_dict(state)  # of another optimiser: it has no such count
    assert optimizer.skipped == 3 and optimizer.fused is False
    state = optimizer.state_dict()
    weights[0].grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 4 and state["param_groups"][0]["skipped"] == 3


@pytest.mark.parametrize("named", [False, True])
def test_torchs_distributed_checkpoints_hold_all(named, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    nets = [nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
            for _ in range(2)]  # fmt: skip
    ours, theirs = [AGD(net.named_parameters() if named else net.parameters()) for net in nets]
    ours.param_groups[0]["lr"] = 0.5
    nets[0](torch.full((2, 5), math.nan)).sum().backward()
    ours.step()
    ours.zero_grad()
    state = dict(zip(("net", "optimizer"), get_state_dict(nets[0], ours)))
    checkpoint.save(state, checkpoint_id=tmp_path)
    state = dict(zip(("net", "optimizer"), get_state_dict(nets[1], theirs)))
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(nets[1], theirs, model_state_dict=state["net"],
                   optim_state_dict=state["optimizer"])  # fmt: skip
    assert theirs.skipped == ours.skipped == 1
    assert theirs.param_groups[0]["lr"] == 0.5
    results = [trained(x, list(net.parameters())) for x, net in zip((ours, theirs), nets)]
    assert all(map(torch.equal, *results))


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


@pytest.mark.parametrize("shape", SHAPES)
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


def test_the_file_alone_is_the_whole_optimiser(tmp_path):
    """Copied elsewhere, without the kernels, under another name, and in a package."""
    source = Path(agd.__file__).read_text()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for place in ("other.py", "package/agd.py"):
        (tmp_path / place).write_text(source)
    code = (
        "import sys, torch; from other import AGD; from package import agd\n"
        "for one in (AGD, agd.AGD):\n"
        "    W = torch.ones(3, 3, requires_grad=True); W.grad = torch.ones(3, 3)\n"
        "    one([W]).step(); assert W[0, 0] < 1\n"
        "assert not any('kernels' in x for x in sys.modules if 'agd' in x)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_a_wheel_has_the_kernels(tmp_path):
    """cpu.c as well, which is compiled where the wheel was installed."""
    pytest.importorskip("setuptools", "61", reason="what builds wheels")
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for name in ("agd.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "agd_kernels", source / "agd_kernels")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    code = (
        "import torch, agd, agd_kernels.cpu as cpu, sys\n"
        "assert all(x.__file__.startswith(sys.argv[1]) for x in (agd, cpu))\n"
        "if cpu.Backend.available('cpu'): agd.AGD([torch.ones(3, 3)], fused=True)\n"
    )
    there = {"PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(cache),
             "AGD_NO_COMPILER": "0"}  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "installed")], cwd=tmp_path,
                   env={**os.environ, **there}, check=True)  # fmt: skip
