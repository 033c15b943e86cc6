"""What both optimisers promise: gains, refusals, warnings, states; the draw of the weights."""

import contextlib
import copy
import fractions
import inspect
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import agd
from agd import AGD, SpectralAGD, init_weights
from tests.reference import near, reference_step, relative, same
from tests.test_backends import weights_with_grads

both = pytest.mark.parametrize("rule", [AGD, SpectralAGD])


class Reads(TorchDispatchMode):
    """Counts what would make the host wait for a device, on whatever device it runs. AGD reads a
    number of a CPU, which waits for nothing: its own reads are not counted, and a step on the meta
    device (below) shows that it takes no other device for a CPU."""

    BLOCKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
    METHODS = ("tolist", "numpy", "cpu")  # of a tensor on the host the dispatcher sees none

    def __init__(self):
        super().__init__()
        self.count = self.kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        mask = any(x is not None and x.dtype == torch.bool for x in indices)
        if name in self.BLOCKING or mask:
            self.count += not self.by_agd()
        self.kernels += not func.is_view
        return func(*args, **(kwargs or {}))

    @staticmethod
    def by_agd():
        """Whether agd.py itself, and no backend, calls torch."""
        frame = sys._getframe(2)
        while frame is not None and f"{os.sep}torch{os.sep}" in frame.f_code.co_filename:
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename == agd.__file__

    def __enter__(self):
        self.methods = {name: getattr(torch.Tensor, name) for name in self.METHODS}
        for name, method in self.methods.items():

            def counted(*args, method=method, **kwargs):
                self.count += not self.by_agd()
                return method(*args, **kwargs)

            setattr(torch.Tensor, name, counted)
        return super().__enter__()

    def __exit__(self, *error):
        for name, method in self.methods.items():
            setattr(torch.Tensor, name, method)
        return super().__exit__(*error)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8),
                         nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))  # fmt: skip


def train(net, optimizer, steps=3, seed=1):
    """The losses of some steps of `small`."""
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (net(torch.randn(16, 1, 8, generator=generator)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# The step


@both
@pytest.mark.parametrize("gain", [1.0, 0.5, "tensor"])
def test_a_step_reads_nothing(rule, gain):
    """Tensors without numbers: whatever asks for one raises."""
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(s)) for s in [(7, 5), (6, 4, 3, 3), (9,), (2, 2)]]
        weights.append(nn.Parameter(torch.empty(7, 5, dtype=torch.float64)))
        for W in weights[:3] + weights[4:]:
            W.grad = torch.empty_like(W)
        optimizer = rule([{"params": weights[:1]}, {"params": weights[1:]}])
        gain = torch.ones(()) if gain == "tensor" else gain
        optimizer.param_groups[0].update(lr=gain, initial_lr=gain)  # as a scheduler does
    for _ in range(20):  # as long as it looks at gradients
        optimizer.step()
    assert optimizer.eta.is_meta and optimizer.eta.dtype == torch.float64


@both
def test_the_gradients_stay_as_they_are_and_results_are_0_dim(rule):
    weights = weights_with_grads([(7, 5), (6, 4, 3, 3)])
    before, optimizer = [W.grad.clone() for W in weights], rule(weights)
    assert math.isnan(optimizer.eta)
    optimizer.step()
    assert same([W.grad for W in weights], before)
    assert optimizer.eta.shape == optimizer.G.shape == optimizer.skipped.shape == ()
    assert rule is SpectralAGD or not optimizer.state


@pytest.mark.slow
@pytest.mark.parametrize("rule, scheduled", [(AGD, False), (AGD, True), (SpectralAGD, False)])
def test_a_compiled_step_agrees_and_compiles_once(rule, scheduled):
    """Of SpectralAGD the first step, which makes the state, is another graph. A gain that changes
    each step is a tensor."""
    net, gain, graphs = small(), torch.tensor(1.0), []
    twin = copy.deepcopy(net)
    plain, other = (rule(x.parameters(), gain=gain if scheduled else 1.0) for x in (net, twin))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(other.step, backend=backend, fullgraph=True)
    for seed in range(6):
        for p, q in zip(net.parameters(), twin.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            q.grad = p.grad.clone()
        gain.mul_(0.9)
        plain.step()
        try:
            step()
        except Exception as error:
            if rule is AGD or "setattr" not in str(error):
                raise
            pytest.skip("a graph of this torch sets no attribute of an optimiser")
        assert torch.allclose(other.eta, plain.eta, rtol=1e-5, atol=0)
    assert len(graphs) <= 1 + (rule is SpectralAGD)
    assert all(relative(p, q) < 1e-4 for p, q in zip(twin.parameters(), net.parameters()))
    torch._dynamo.reset()


@both
def test_gains_that_change(rule):
    """By a scheduler, which is warned of, and in a tensor; a number out of range is refused."""
    nets = [small(), small()]
    one, other = rule(nets[0]), rule(nets[1], gain=torch.tensor(1.0))
    scheduler = torch.optim.lr_scheduler.LinearLR(one, 1.0, 0.5, total_iters=1)
    train(nets[0], one, 1), train(nets[1], other, 1)
    scheduler.step()
    other.param_groups[0]["lr"].mul_(0.5)
    with pytest.warns(UserWarning, match="scheduler has changed lr"):
        train(nets[0], one, 1, seed=2)
    train(nets[1], other, 1, seed=2)
    assert one.param_groups[0]["lr"] == 0.5
    assert all(relative(p, q) < 1e-6 for p, q in zip(*(net.parameters() for net in nets)))
    for gain in (-1.0, math.nan, math.inf):
        one.param_groups[0]["lr"] = gain
        with pytest.raises(ValueError, match="gain"):
            one.step()


S = torch.optim.lr_scheduler
SCHEDULERS = {  # arguments, where a class needs some or ends elsewhere than at 0
    "LambdaLR": {"lr_lambda": lambda epoch: np.float32(1 - min(epoch, 6) / 6)},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: np.float64(0.5)},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "LinearLR": {"start_factor": 0.3, "end_factor": 0.0, "total_iters": 6},
    "PolynomialLR": {"total_iters": 6, "power": 0.7},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.0, "max_lr": 1.0, "step_size_up": 3, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 12, "cycle_momentum": False},
    "SWALR": {"swa_lr": 0.0, "anneal_epochs": 6, "anneal_strategy": "linear"},
    "ExponentialLR": {"gamma": 0.1},
    "ReduceLROnPlateau": {"patience": 1},
}


def schedule(kind, optimizer):
    """A scheduler of a class of torch, or None where it needs arguments that SCHEDULERS lacks."""
    if kind.__name__ in ("SequentialLR", "ChainedScheduler"):
        several = [S.ConstantLR(optimizer, 0.5, 2), S.LinearLR(optimizer, 0.3, 0.0, 6)]
        more = {"milestones": [2]} if kind is S.SequentialLR else {}
        return kind(optimizer, several, **more) if more else kind(several)
    own, needed = SCHEDULERS.get(kind.__name__), inspect.signature(kind).parameters.values()
    if own is None and sum(x.default is x.empty for x in needed) > 1:
        return None
    return kind(optimizer, **own or {})


@pytest.mark.filterwarnings("ignore")  # of AGD, that it needs none; of torch, of its own
@pytest.mark.parametrize("rule, gain", [
    (AGD, 1.0), (AGD, torch.tensor(1.0)), (SpectralAGD, np.float32(0.7))])  # fmt: skip
def test_every_scheduler_of_torch_goes_to_its_end_and_past_it(rule, gain, tmp_path):
    """Its numbers may be of numpy, or negative by rounding; a state may be saved at any time, and
    the scheduler's keys of the groups are part of it."""
    kinds = [x for x in vars(S).values() if isinstance(x, type) and x.__name__[0] != "_"
             and issubclass(x, (S.LRScheduler, S.ReduceLROnPlateau)) and x is not S.LRScheduler]
    negative = 0
    for kind in [*kinds, torch.optim.swa_utils.SWALR]:
        net = nn.Linear(4, 2)
        optimizer = rule(net, gain=copy.copy(gain))
        scheduler = schedule(kind, optimizer)
        for _ in range(10 if scheduler else 0):
            optimizer.zero_grad()
            (net(torch.ones(3, 4)) - 1).square().mean().backward()
            optimizer.step()
            scheduler.step(*[1.0] * (kind is S.ReduceLROnPlateau))
            negative += optimizer.param_groups[0]["lr"] < 0
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        other = rule(nn.Linear(4, 2))
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()
        assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"], kind
    assert len(kinds) > 12 and (negative or isinstance(gain, torch.Tensor))


@both
def test_any_real_number_is_a_gain(rule):
    """Of numpy too. What is negative by rounding is 0, and moves nothing."""
    (W,) = weights_with_grads([(5, 5)])
    kinds = [np.float16, np.float32, np.float64, np.longdouble, np.array]
    halves = [*[kind(0.5) for kind in kinds], fractions.Fraction(1, 2), torch.tensor([0.5])]
    for gain in [1, np.int8(1), np.uint64(1), np.array(1), *halves, -1e-18, np.float32(-6e-8)]:
        written = rule([W])
        written.param_groups[0]["lr"] = gain
        for optimizer in (rule([W], gain=gain), rule([{"params": [W], "gain": gain}]), written):
            before = W.detach().clone()
            optimizer.step()
            assert optimizer.param_groups[0]["lr"] == max(gain, 0)
            assert torch.equal(W, before) == (gain < 0)
            assert isinstance(optimizer.param_groups[0]["lr"], (float, torch.Tensor))


@both
def test_without_a_gradient_nothing_moves(rule):
    net = small()
    optimizer = rule(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert optimizer.eta == optimizer.G == optimizer.skipped == 0
    assert same(list(net.parameters()), before)


def test_tied_weights_are_one_layer():
    (W,) = weights_with_grads([(5, 5)], torch.float64)
    optimizer = AGD([W, W])
    assert len(optimizer.param_groups[0]["params"]) == 1
    theirs, eta, _ = reference_step([W], [W.grad])
    optimizer.step()
    assert optimizer.eta.item() == near(eta, 1e-12) and relative(W, theirs[0]) < 1e-12
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


@both
def test_a_closure_returns_its_loss_with_gradients_enabled(rule):
    net, x = small(), torch.randn(16, 1, 8)
    optimizer = rule(net)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@both
def test_names_pairs_and_generators(rule):
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(3)])
    names = ["0.weight", "1.weight", "2.weight"]
    assert rule(net.named_parameters()).param_groups[0]["param_names"] == names
    (group,) = rule([{"params": list(net.named_parameters()), "gain": 0.5}]).param_groups
    assert group["lr"] == 0.5 and group["param_names"] == names
    for params in (net.parameters(), [{"params": net.parameters()}]):
        assert [len(group["params"]) for group in rule(params).param_groups] == [3]
    with pytest.raises(ValueError, match="param"):  # torch: all named, or none
        rule([{"params": net[0].parameters()}, {"params": net[1:].named_parameters()}])
    init_weights([{"params": net.parameters()}], torch.Generator().manual_seed(0))
    drawn = [p.detach().clone() for p in net.parameters()]
    init_weights(net.named_parameters(), torch.Generator().manual_seed(0))
    assert same(drawn, list(net.parameters()))


# Refusals


@pytest.mark.parametrize("params, words", [
    (lambda: [], ["empty", "net.parameters()", "once"]),
    (lambda: iter([]), ["empty", "once"]),
    (lambda: [{"params": []}], ["empty"]),
    (lambda: [torch.zeros(2, 2, dtype=torch.float8_e4m3fn)], ["(2, 2)", "16 bits"]),
    (lambda: [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], ["(2, 2)", "complex"]),
    (lambda: [nn.Parameter(torch.zeros(0, 3))], ["(0, 3)", "no elements"]),
    (lambda: [{"params": [torch.zeros(0), torch.zeros(2, dtype=torch.int8)]}],
     ["2 tensors", "(0,)", "no elements", "(2,)", "torch.int8"]),
    (lambda: nn.ModuleList([nn.LazyLinear(3), nn.Linear(3, 0)]),
     ["4 tensors", "0.weight, 0.bias, which has no shape yet", "1.weight of shape (0, 3)"]),
])  # fmt: skip
def test_refusals_name_the_tensors_and_the_way_out(params, words):
    for call in (AGD, SpectralAGD, init_weights):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, of empty layers
            given = params()
        with pytest.raises(ValueError) as error:
            call(given)
        assert all(word in str(error.value) for word in words), error.value


@both
def test_gains_out_of_range_and_what_has_no_place_in_the_signature(rule):
    (W,) = weights_with_grads([(5, 5)])
    numbers = [-1.0, -1e-6, math.nan, math.inf, 10**400, np.float32(-0.1), fractions.Fraction(-1)]
    others = ["1", None, True, np.bool_(True), np.array(True), 1j, np.complex64(1), [1.0],
              np.array([0.5]), np.datetime64("2020"), torch.ones(2), torch.tensor(True)]
    for gain in [*numbers, *others, torch.tensor(-1.0), torch.tensor(math.nan)]:
        with pytest.raises(ValueError, match="gain"):
            rule([W], gain=gain)
        with pytest.raises(ValueError, match="gain"):
            rule([{"params": [W], "gain": gain}])
    W.grad = torch.ones_like(W)
    for gain in [*numbers, *others]:  # a tensor's number is not read in a step
        optimizer = rule([W])
        optimizer.param_groups[0]["lr"] = gain
        with pytest.raises(ValueError, match="gain"):
            optimizer.step()
    for options, words in (({"lr": 0.1}, "no learning rate; gain"), ({"eps": 0.1}, "eps")):
        with pytest.raises(TypeError, match=words):
            rule([W], **options)
        with pytest.raises(ValueError, match=words.split(";")[0]):
            rule([{"params": [W], **options}])
    for params in (W, ["weight"]):
        with pytest.raises(TypeError):
            rule(params)
    with pytest.raises(TypeError, match="2 positional"):
        rule([W], 1e-3)
    elsewhere = type("Generator", (), {"device": torch.device("cuda")})()
    with pytest.raises(ValueError, match=r"torch\.Generator\(\)"):
        init_weights([W], elsewhere)


@both
def test_sparse_gradients_are_refused(rule):
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = rule(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) is sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


# Warnings


@pytest.mark.parametrize("rule, kind, words", [
    *[(rule, kind, words) for rule in (AGD, SpectralAGD) for kind, words in (
        (None, None), ("clip", "clipped"), ("sum", "over 1,000"), ("dead", "inputs=batch"))],
    (SpectralAGD, "small", "divided by more"), (AGD, "again", None),
])  # fmt: skip
def test_guards_say_once_what_the_gradients_show(rule, kind, words):
    """A loss of another unit trains all the same. The same gradient again is not clipped."""
    torch.manual_seed(0)
    net, losses = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), []
    if kind == "dead":
        layers = [x for _ in range(30) for x in (nn.Linear(8, 8, bias=False), nn.GELU())]
        net = nn.Sequential(*layers)
        init_weights(net)
    unit = {"sum": 1e5, "small": 1e-3}.get(kind, 1.0)
    optimizer, x, labels = rule(net), torch.randn(32, 8), torch.arange(32) % 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(40):
            if kind != "again" or not i:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x + 0.1 * torch.randn(32, 8)), labels) * unit
                loss.backward()
            if kind == "clip":
                nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
            losses.append(loss.item())
    texts = [str(x.message) for x in caught]
    assert len(texts) == (words is not None) and all(words in x for x in texts), texts
    if kind is None or (rule, kind) == (SpectralAGD, "sum"):
        assert losses[-1] < 0.9 * losses[0]


# States and copies


@both
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "file", "distributed"])
def test_copies_and_saved_states_go_on_as_the_original(rule, way, tmp_path):
    net = small()
    net[0].to(memory_format=torch.contiguous_format).double().float()
    optimizer = rule(net, gain=0.7)
    train(net, optimizer)
    net[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    if way in ("deepcopy", "pickle"):
        pair = net, optimizer
        twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
        assert same([other.eta, other.G], [optimizer.eta, optimizer.G])
        assert type(other) is rule and str(other) == str(optimizer)
    else:
        twin = small(seed=5)
        other = rule(twin)
        if way == "distributed":
            through_torchs_checkpoints(tmp_path)(net, optimizer, twin, other)
        else:
            state = [net.state_dict(), optimizer.state_dict()]
            if way == "file":
                torch.save(state, tmp_path / "state.pt")
                state = torch.load(tmp_path / "state.pt", weights_only=True)
            twin.load_state_dict(state[0]), other.load_state_dict(state[1])
        assert other.param_groups[0]["lr"] == 0.7
    assert other.skipped == 1 and other.L == near(optimizer.L, 1e-12)
    before = [p.detach().clone() for p in twin.parameters()]
    train(net, optimizer, seed=2)
    assert same(before, list(twin.parameters()))  # of memory of its own
    train(twin, other, seed=2)
    assert same([*net.parameters(), optimizer.eta], [*twin.parameters(), other.eta])


def through_torchs_checkpoints(path, flat=False):
    """f(net, optimizer, twin, other): the state of two goes to the others in a checkpoint."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(flatten_optimizer_state_dict=flat)

    def state(*pair):
        return dict(zip(("net", "agd"), of.get_state_dict(*pair, options=options)))

    def save_and_load(net, optimizer, twin, other):
        optimizer.zero_grad()
        checkpoint.save(state(net, optimizer), checkpoint_id=path)
        saved = state(twin, other)
        checkpoint.load(saved, checkpoint_id=path)
        of.set_state_dict(twin, other, model_state_dict=saved["net"],
                          optim_state_dict=saved["agd"], options=options)  # fmt: skip

    return save_and_load


def test_a_state_of_before_has_its_count_beside_the_groups():
    weights = weights_with_grads([(7, 5)])
    optimizer = AGD(weights, fused=False)
    state = optimizer.state_dict()
    del state["param_groups"][0]["skipped"]
    counted = optimizer.skipped
    optimizer.load_state_dict({**state, "skipped": torch.tensor(3)})
    optimizer.step()
    assert optimizer.skipped == 3 and optimizer.skipped is counted  # a CUDA graph counts in it
    optimizer.load_state_dict(state)  # of a time before it was counted
    assert optimizer.skipped == 3 and optimizer.fused is False
    state = optimizer.state_dict()
    weights[0].grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 4 and state["param_groups"][0]["skipped"] == 3


def flat_net(width=8, bias=False):
    layers = nn.Linear(8, width, bias=bias), nn.ReLU(), nn.Linear(width, 3, bias=bias)
    return nn.Sequential(nn.Flatten(), *layers)


def optimizers_of(*modules):
    """The classes of optimisers in modules, those that are installed."""
    found = [pytest.importorskip(x) if x == "torch.optim" else sys.modules.get(x) for x in modules]
    kinds = [x for module in found if module for x in vars(module).values()]
    return {x for x in kinds if isinstance(x, type) and issubclass(x, torch.optim.Optimizer)}


def every_state():
    """(name, state) of each optimiser of torch and of the libraries at hand, after a step."""
    for module in ("timm.optim", "schedulefree", "prodigyopt"):
        try:
            __import__(module)
        except ImportError:
            pass
    kinds = optimizers_of("torch.optim", "timm.optim", "schedulefree", "prodigyopt")
    for kind in sorted(kinds - {torch.optim.Optimizer}, key=str):
        net = flat_net()
        try:
            optimizer = kind(net.parameters(), lr=0.01)
        except (TypeError, ValueError, AttributeError, KeyError):
            continue  # one that wraps another
        with contextlib.suppress(Exception):  # those that need a closure, or sparse gradients
            train(net, optimizer, 1)
        yield kind.__name__, optimizer.state_dict()


def fingerprint(optimizer):
    return str([optimizer.state_dict(), optimizer.rules, *optimizer.param_groups, optimizer.L])


@both
@pytest.mark.parametrize("by_name", [True, False])
def test_the_state_of_another_optimiser_is_refused(rule, by_name):
    """By the name of what it has or lacks; nothing is changed."""
    net = flat_net()
    mine = rule(net if by_name else net.parameters())
    train(net, mine, 1)
    before, names = fingerprint(mine), []
    other = {AGD: SpectralAGD, SpectralAGD: AGD}[rule](flat_net())
    for name, state in [*every_state(), (other, other.state_dict())]:
        keys = set(state["param_groups"][0]).union(*state["state"].values(), {"train_mode"})
        for given in (state, {**state, "state": {}}):
            with pytest.raises(ValueError, match="another optimiser") as error:
                mine.load_state_dict(given)
            assert str(error.value).split("it has ")[1].removeprefix("no ").split(",")[0] in keys
        names.append(name)
    assert fingerprint(mine) == before and len(names) > 12 and {"Adam", "SGD", "LBFGS"} <= {*names}


@both
@pytest.mark.parametrize("change, words", [
    (lambda state: {}, "no param_groups"),
    (lambda state: None, "no param_groups"),
    (lambda state: {**state, "param_groups": [None]}, "no param_groups"),
    (lambda state: {**state, "state": {0: 5}}, "no param_groups"),
    (lambda state: state["param_groups"][1].update(params=None) or state, "no params"),
    (lambda state: {"net": {}, "optimizer": state}, "no param_groups"),
    (lambda state: {"param_groups": [], "state": {}}, "no lr"),
    (lambda state: {"param_groups": state["param_groups"]}, "no state"),
    (lambda state: state["param_groups"][1].pop("lr") and state, "no lr"),
    (lambda state: state["param_groups"][1].pop("params") and state, "no params"),
    (lambda state: state["param_groups"][1].update(momentum=0.9) or state, "momentum"),
    (lambda state: state["state"][1].update(exp_avg=torch.zeros(3, 8)) or state, "exp_avg"),
    (lambda state: state["param_groups"][0].update(lr=math.nan) or state, "gain"),
    (lambda state: state["param_groups"][0]["params"].clear() or state, r"\[0, 1\]"),
    (lambda state: {**state, "param_groups": state["param_groups"][:1]}, r"\[1\]"),
])  # fmt: skip
def test_a_broken_state_is_refused(rule, change, words):
    net = flat_net()
    mine = rule([{"params": [net[1].weight]}, {"params": [net[3].weight]}])
    train(net, mine, 1)
    state = mine.state_dict()
    state["state"].setdefault(1, {})
    before = fingerprint(mine)
    with pytest.raises(ValueError, match=words):
        mine.load_state_dict(change(copy.deepcopy(state)))
    assert fingerprint(mine) == before
    mine.param_groups[1]["momentum"] = 0.9  # a key of one's own goes with the state
    mine.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert mine.param_groups[1]["momentum"] == 0.9


@both
def test_the_state_of_a_network_of_other_shapes_is_refused(rule):
    wide, net = flat_net(9), flat_net()
    states = [rule(wide).state_dict()]
    other, mine = rule(wide), rule(net)
    train(wide, other, 1), train(net, mine, 1)
    before = fingerprint(mine)
    for state in [*states, other.state_dict()]:
        with pytest.raises(ValueError, match=r"3.weight of shape \(3, 8\) has 27"):
            mine.load_state_dict(state)
    assert fingerprint(mine) == before
    state = mine.state_dict()
    for entries in state["state"].values():  # of a time before it was kept
        del entries["numel"]
    mine.load_state_dict(state)
    assert str(mine.rules) in before


# Wrappers


@both
def test_wrappers_that_take_the_network_apart_are_refused(rule):
    """G and L are of all weights: an optimiser of some of them is another one."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward

    def refused(words):
        return pytest.raises(ValueError, match=rf"{words}.*fully_shard")

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # fmt: skip
    try:
        net = flat_net()
        for kind in (rule, lambda params, **options: rule(params, **options)):
            with refused("zero_redundancy_optimizer"):
                ZeroRedundancyOptimizer(net.parameters(), optimizer_class=kind)
        ZeroRedundancyOptimizer(net.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
        train(net, rule(net), 1)  # beside it
        with refused("apply_optimizer_in_backward"):
            _apply_optimizer_in_backward(rule, net.parameters(), {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of one rank, and of FSDP's end
            flat = FullyShardedDataParallel(flat_net(), device_id=torch.device("cpu"))
        for params in (flat, flat.parameters()):
            with refused("flattened by FSDP"):
                rule(params)
    finally:
        torch.distributed.destroy_process_group()


@both
def test_steps_on_parts_of_the_weights_are_refused(rule):
    """One weight each within the backward pass, as it has not all gradients; flat parts of weights
    in the groups, as DeepSpeed puts them there. A step of the whole network may be in a hook."""
    net, x = flat_net(), torch.randn(4, 8)
    own = {p: rule([p]) for p in net.parameters()}
    hooks = [p.register_post_accumulate_grad_hook(lambda p: own[p].step()) for p in own]
    with pytest.raises(ValueError, match="in the backward pass"):
        net(x).square().mean().backward()
    for hook in hooks:
        hook.remove()
    optimizer = rule(net)
    hook = net[1].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    net(x).square().mean().backward()
    hook.remove()
    assert optimizer.G > 0
    for params in (net.parameters(), [net[1].weight]):
        optimizer, flat = rule(params), nn.Parameter(torch.ones(30))
        flat.grad, optimizer.param_groups[0]["params"] = torch.ones(30), [flat]
        with pytest.raises(ValueError, match="flattened"):
            optimizer.step()


@both
def test_grad_scaler_gives_the_same_step_and_survives_an_overflow(rule):
    weights, twin = weights_with_grads([(7, 5), (4, 3, 3)]), weights_with_grads([(7, 5), (4, 3, 3)])
    plain, scaled = rule(weights), rule(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    for V in twin:
        V.grad.mul_(2.0**10)
    plain.step()
    scaler.step(scaled)
    scaler.update()
    assert same([*weights, plain.eta], [*twin, scaled.eta])
    twin[0].grad.fill_(math.inf)
    scaler.step(scaled)
    assert same(weights, twin)


@both
def test_made_in_inference_mode(rule):
    net = small()
    with torch.inference_mode():
        optimizer = rule(net)
    optimizer.load_state_dict(optimizer.state_dict())
    train(net, optimizer)
    net[0].weight.grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 1


# The draw


def test_init_is_haar():
    """Entries of a Haar matrix have mean 0; without the sign of R's diagonal the QR's have not."""
    draws = [torch.empty(3, 3, dtype=torch.float64) for _ in range(20000)]
    init_weights(draws, torch.Generator().manual_seed(0))
    Q = torch.stack(draws)
    assert Q.mean(0).abs().max() < 5 / math.sqrt(3 * 20000)
    # The second and fourth moments of an entry: 1/n and 3 / (n (n + 2)).
    assert Q.square().mean().item() == near(1 / 3, 1e-10)
    assert Q.pow(4).mean().item() == near(3 / 15, 0.02)
    assert (torch.linalg.det(Q) > 0).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_init_draws_by_the_generator_alone():
    """Torch's own where none is given; never by the default device."""

    def draw(seed):
        weights = [torch.empty(7, 5), torch.empty(6, 4, 3, 3), torch.empty(7, 5)]
        with torch.device("meta"):
            init_weights(weights, seed if seed is None else torch.Generator().manual_seed(seed))
        return weights

    assert same(draw(0), draw(0)) and not same(draw(0), draw(1))
    assert not torch.equal(draw(0)[0], draw(0)[2])
    own = [torch.manual_seed(3) and draw(None) for _ in range(2)]
    assert same(*own)


def test_the_constructor_does_not_draw():
    net = small()
    before = [p.detach().clone() for p in net.parameters()]
    AGD(net), SpectralAGD(net), AGD(net.parameters())
    assert same(before, list(net.parameters()))


# Where it is installed


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
