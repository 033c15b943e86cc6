"""SpectralAGD: its transcription in float64, its polar factors, modes, states, output layers."""

import copy
import functools
import io
import math

import pytest
import torch
import torch.nn as nn

import agd
from agd import SpectralAGD
from tests import spectral_reference as reference
from tests.reference import bits, near, relative
from tests.spectral_reference import SpectralReference, rho
from tests.stock import INPUTS, Every, gpt2, role_of
from tests.test_agd import through_torchs_checkpoints

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
both_modes = pytest.mark.parametrize("mode", ["train", "eval"])
FREE = {"last.weight", "zero.weight"}


def every(dtype=torch.float32):
    """(an Every, its optimizer) whose blocks have lengths of their own."""
    torch.manual_seed(0)
    net = Every()
    depth = agd.depth(net, INPUTS)
    assert depth.outputs == {"last.weight"}
    net = net.to(dtype)
    return net, SpectralAGD(net, depth=depth)


def cut(name, p, like=None):
    """The blocks of a parameter, or of a tensor like it, in float64."""
    x = (p if like is None else like).detach().double().contiguous()
    return reference.blocks(x, *role_of(name, p)[:2])


def target(net, name):
    """s of a parameter that is free: its layer's, or 1, as the role of `zero` has."""
    name = name.replace("bias", "weight")
    W = net.get_parameter(name)
    if W.ndim < 2:
        return W.detach().double().square().mean().sqrt().item()
    return math.sqrt(sum(rho(x) ** 2 for x in cut(name, W)) / len(cut(name, W))) or 1.0


def twin_of(net, optimizer):
    """The reference of an Every."""
    blocks = []
    for name, p in net.named_parameters():
        held = p.ndim > 1 and name not in FREE
        blocks += [reference.Block(W, rho(W) if held else target(net, name), held)
                   for W in cut(name, p)]  # fmt: skip
    return SpectralReference(blocks, optimizer.L)


def put_gradients(net, generator, scale=0.1):
    """Random gradients: their matrices have no singular values that are noise."""
    for p in net.parameters():
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale
        p.grad = torch.empty_like(p).copy_(g)


def gradients(net):
    return [g for name, p in net.named_parameters()
            for g in ([None] * len(cut(name, p)) if p.grad is None else cut(name, p, p.grad))]


def differences(net, twin, of, tensors=None):
    """{name: relative difference} of a parameter's blocks, or of tensors like it, by its name, from
    `of` each of the twin's."""
    apart, end = {}, 0
    for name, p in net.named_parameters():
        mine = torch.cat([x.flatten() for x in cut(name, p, tensors and tensors[name])])
        start, end = end, end + len(cut(name, p))
        theirs = torch.cat([of(b).flatten() for b in twin.blocks[start:end]])
        apart[name] = (mine - theirs).norm().item() / (theirs.norm().item() or 1.0)
    return apart


def run(net, optimizer, twin, steps, gain=1.0):
    """Steps along random gradients, some of them zero, or missing, or turned."""
    generator = torch.Generator().manual_seed(1)
    optimizer.param_groups[0]["lr"] = gain
    for i in range(steps):
        put_gradients(net, generator)
        net.embedding.weight.grad[[i % 20, 3]] = 0
        if i % 10 == 7:
            net.wide.weight.grad = None
            net.attention.in_proj_weight.grad[24:48] = 0
            net.conv.weight.grad[:6] = 0
        optimizer.step()
        twin.step(gradients(net), [gain] * len(twin.blocks))
        yield


@pytest.mark.parametrize("dtype, steps, gain", [
    (torch.float64, 15, 0.3), (torch.float32, 15, 1.0), (torch.bfloat16, 15, 1.0),
    *[pytest.param(dtype, 100, 1.0, marks=pytest.mark.slow) for dtype in DTYPES],
], ids=str)  # fmt: skip
def test_steps_of_every_role(dtype, steps, gain):
    """To rounding, with the same polynomials: float32 has six digits, of which polar factors of
    small singular values lose some. Z has them in 16 bits too; the clock is that of Z."""
    net, optimizer = every(dtype)
    twin = twin_of(net, optimizer)
    close = 1e-10 if dtype == torch.float64 else 2e-4
    for _ in run(net, optimizer, twin, steps, gain):
        assert optimizer.eta.item() == near(twin.eta, close)
        assert optimizer.G.item() == near(twin.G, close)
    state, end, lengths = {n: optimizer.state[p] for n, p in net.named_parameters()}, 0, []
    for name, p in net.named_parameters():
        own = state[name]
        start, end = end, end + len(cut(name, p))
        theirs = twin.blocks[start:end]
        assert own["z"].shape == own["m"].shape == p.shape and "x" not in own
        assert own["held"].tolist() == [b.held for b in theirs], name
        assert own["t"].tolist() == [b.t for b in theirs], name
        assert own["s"].tolist() == pytest.approx([b.s for b in theirs], rel=max(close, 1e-6))
        if theirs[0].held:
            lengths.append(torch.tensor([rho(b.z) / b.s for b in theirs]).double())
    turns = [twin.eta / twin.L * (1 / x).mean().item() for x in lengths]
    clock = sum(x.mean().item() for x in lengths) / len(lengths), sum(turns) / len(turns)
    assert [x.item() for x in optimizer.clock()] == pytest.approx(clock, rel=1e-3)
    for key, of in (("z", lambda b: b.z), ("m", lambda b: b.m)):
        tensors = {name: own[key] for name, own in state.items()}
        assert max(differences(net, twin, of, tensors).values()) < close
    for mode, of in (("train", lambda b: b.P), ("eval", lambda b: b.at_length(b.x, b.lx)),
                     ("train", lambda b: b.P)):  # fmt: skip
        getattr(optimizer, mode)()
        apart = differences(net, twin, of)
        assert max(apart.values()) < close + torch.finfo(dtype).eps, (mode, apart)
        for W, b in zip((x for n, p in net.named_parameters() for x in cut(n, p)), twin.blocks):
            y = b.lx if mode == "eval" else b.y()
            own = near(b.s * math.exp(y), 1e-5 + torch.finfo(dtype).eps)
            assert not b.held or rho(W) == own
    grown = [b.y() for b in twin.blocks if b.held]
    assert min(grown) < 0 < max(grown) and not any(b.y() for b in twin.blocks if not b.held)


def everything(net, optimizer):
    """Each tensor that a step may change, but for eta, G and skipped: its bits, by a name."""
    kept = {name: bits(x) for name, x in net.state_dict().items()}
    for name, p in net.named_parameters():
        for key, x in optimizer.state[p].items():
            if isinstance(x, torch.Tensor):
                kept[f"{name} {key}"] = bits(x)
    return kept


def changed(before, after):
    """The names whose bits differ; what is new counts too."""
    return {name for name in before.keys() | after.keys()
            if name not in before or name not in after
            or not torch.equal(before[name], after[name])}  # fmt: skip


def stepped(net, optimizer, steps=3, seed=2, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        put_gradients(net, generator, scale)
        optimizer.step()


@pytest.mark.parametrize("gain", [0.0, torch.tensor(0.0), 1.0])
def test_a_gain_of_0_or_a_slope_that_is_not_positive_moves_the_momentum_alone(gain):
    net, optimizer = every()
    stepped(net, optimizer, 1)
    optimizer.param_groups[0]["lr"] = gain
    if gain == 1:
        for p in net.parameters():
            p.grad.mul_(-1e-4)
    else:
        put_gradients(net, torch.Generator().manual_seed(3))
    before = everything(net, optimizer)
    optimizer.step()
    assert {x.split()[-1] for x in changed(before, everything(net, optimizer))} == {"m", "r"}
    assert optimizer.skipped == 0 and (optimizer.eta == optimizer.G == 0) == (gain == 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_without_gradient_keeps_every_bit(dtype):
    """Rows that no batch holds, one part, one group, a layer; also their momentum and counts."""
    net, optimizer = every(dtype)
    stepped(net, optimizer)
    if dtype in (torch.float32, torch.float64):  # of 16 bits there is a copy
        for W in (net.embedding.weight, net.conv.weight, net.wide.weight):
            W.data[0, 0] = -0.0
    put_gradients(net, torch.Generator().manual_seed(3))
    still = {"embedding.weight": [0, 4], "attention.in_proj_weight": [1], "conv.weight": [0],
             "lstm.weight_hh_l0": [3], "tall.bias": [0]}  # fmt: skip
    for name, places in still.items():
        grad = net.get_parameter(name).grad
        zeroed = grad.clone(memory_format=torch.contiguous_format)
        for place in places:
            reference.blocks(zeroed, *role_of(name, grad)[:2])[place].zero_()
        grad.copy_(zeroed)
    net.wide.weight.grad = None
    before = copy.deepcopy([net.state_dict(), optimizer.state_dict()["state"]])
    optimizer.step()
    after = [net.state_dict(), optimizer.state_dict()["state"]]
    for i, (name, p) in enumerate(net.named_parameters()):
        places = [0] if name == "wide.weight" else still.get(name, [])
        number = len(cut(name, p))
        for old, new in ((before[0][name], after[0][name]),
                         *((before[1][i][key], after[1][i][key]) for key in ("z", "m"))):
            same = [torch.equal(x, y) for x, y in zip(cut(name, p, old), cut(name, p, new))]
            assert [j for j in range(number) if same[j]] == places, name
        t = after[1][i]["t"] - before[1][i]["t"]
        assert t.tolist() == [int(j not in places) for j in range(number)]
        for key in ("length", "stretch", "r"):
            assert torch.equal(before[1][i][key][places], after[1][i][key][places]), name


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["embedding.weight", "conv.weight", "last.bias", "last.weight"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(bad, name, steps):
    net, optimizer = every()
    twin, other = every()
    stepped(net, optimizer, steps)
    stepped(twin, other, steps)
    before, length = everything(net, optimizer), optimizer.clock()[0]
    put_gradients(net, torch.Generator().manual_seed(3))
    net.get_parameter(name).grad.view(-1)[5 % net.get_parameter(name).numel()] = bad
    optimizer.step()
    after = everything(net, optimizer)
    assert not changed(before, {k: x for k, x in after.items() if steps or k in before})
    assert optimizer.skipped == 1 and math.isnan(optimizer.eta.item())
    assert steps == 0 or torch.equal(length, optimizer.clock()[0])
    stepped(net, optimizer, 2, seed=4)
    stepped(twin, other, 2, seed=4)
    assert not changed(everything(twin, other), everything(net, optimizer))
    assert optimizer.skipped == 1 and other.skipped == 0


# The polar factor


def directions(xs):
    """What a first step makes of gradients: weights of zeros move along the polar factors alone."""
    weights = [nn.Parameter(torch.zeros_like(x)) for x in xs]
    for W, x in zip(weights, xs):
        W.grad = x.clone()
    optimizer = SpectralAGD(weights)
    optimizer.step()
    state = [optimizer.state[W] for W in weights]
    return [(-x["z"].double() * optimizer.L / (optimizer.eta * x["s"])).cpu() for x in state]


def spectra(rows, columns, seed):
    """Matrices of known singular values, some nearly zero, of random ones, and of low rank."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(random[0], full_matrices=False)
    n = min(rows, columns)
    values = [torch.logspace(-3, 0, n), torch.ones(n), torch.linspace(1e-3, 1, n),
              torch.cat([torch.ones(1), torch.full((n - 1,), 1e-3)])]  # fmt: skip
    half = random[1][:, : n // 2 + 1] @ random[2][: n // 2 + 1]
    return [*(U * x.double() @ Vh for x in values), random[0], random[1][:, :1] @ random[2][:1],
            half]  # fmt: skip


gpu = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.mark.parametrize("device", ["cpu", gpu])
@pytest.mark.parametrize("rows, columns", [(64, 64), (60, 24), (128, 300), (2, 9), (1, 5)])
def test_polar_factors(rows, columns, device):
    """1 to two in a hundred (on a GPU five), of singular values from 1/250 to 1 of the largest; a
    part below. Matrices of all scales in one step do not see each other."""
    room = 0.02 if device == "cpu" else 0.05
    xs = spectra(rows, columns, 0)
    for scales in ([1.0], [1e-13], [1e15], [1e15, 1e-13, 1.0]):
        scaled = [x * scales[i % len(scales)] for i, x in enumerate(xs)]
        for D, x in zip(directions([x.float().to(device) for x in scaled]), xs):
            norm = torch.linalg.matrix_norm(D, 2).item()
            U, S, Vh = torch.linalg.svd(x, full_matrices=False)
            values = (U.mT @ D @ Vh.mT).diagonal()
            assert norm == pytest.approx(1, abs=room) and (D * x).sum() / S.sum() > 0.93
            assert (values[S > S[0] / 250] - 1).abs().max() < room
    assert not directions([torch.zeros(3, 4), torch.ones(3, 4)])[0].any()


@pytest.mark.parametrize("rows, columns", [(24, 60), (128, 300), (150, 140), (257, 300)])
def test_large_matrices_are_cut_into_pieces(rows, columns):
    """Of at most 128 rows of the shorter side, with a polar factor each."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    D = reference.polar(x.double())
    assert relative(directions([x])[0], D) < 1e-3


# Modes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_are_idempotent_and_train_gives_every_bit_back(dtype):
    net, optimizer = every(dtype)
    optimizer.eval()
    start = [bits(p) for p in net.parameters()]
    optimizer.train()
    assert all(torch.equal(bits(p), b) for p, b in zip(net.parameters(), start))
    stepped(net, optimizer, 4)
    before = everything(net, optimizer)
    optimizer.train()
    assert not changed(before, everything(net, optimizer))
    optimizer.eval()
    assert optimizer.param_groups[0]["train_mode"] is False
    average = everything(net, optimizer)
    moved = changed(before, average)
    assert {name for name, p in net.named_parameters()} <= moved
    optimizer.eval()
    assert not changed(average, everything(net, optimizer))
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    assert not changed(average, everything(net, optimizer))
    optimizer.train()
    assert optimizer.param_groups[0]["train_mode"] is True
    assert not changed(before, everything(net, optimizer))
    stepped(net, optimizer, 1)


# States


def reloaded(net, optimizer, order="net agd", dtype=torch.float32, own="train"):
    """(network, optimizer) of another run, in the mode `own`, with what a file kept of these."""
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "agd": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    twin, other = every(dtype)
    stepped(twin, other, 1, seed=7)
    getattr(other, own)()
    for one in order.split():
        (twin if one == "net" else other).load_state_dict(saved[one])
    return twin, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@both_modes
@pytest.mark.parametrize("own", ["train", "eval"])
@pytest.mark.parametrize("order", ["net agd", "agd net"])
def test_a_checkpoint_in_either_mode_goes_on_to_the_bit(dtype, mode, own, order):
    """Also where it is loaded into an optimiser of the other mode, weights first."""
    if (own, order) == ("eval", "agd net"):
        pytest.skip("train() puts weights back")
    net, optimizer = every(dtype)
    for steps in (0, 1, 2):
        stepped(net, optimizer, steps)
        getattr(optimizer, mode)()
        twin, other = reloaded(net, optimizer, order, dtype, own if steps else "train")
        assert other.param_groups[0]["train_mode"] is (mode == "train")
        assert other.L == optimizer.L and other.skipped == optimizer.skipped
        optimizer.train(), other.train()
        assert steps == 0 or not changed(everything(net, optimizer), everything(twin, other))
        for what in (optimizer.eval, other.eval, optimizer.train, other.train):
            what()
        stepped(twin, other, 2, seed=6), stepped(net, optimizer, 2, seed=6)
        assert torch.equal(optimizer.eta, other.eta)
        assert not changed(everything(net, optimizer), everything(twin, other))


def test_a_length_that_its_gradient_pulls_to_zero_comes_back():
    """The gradient of a logarithm grows as the length falls."""
    torch.manual_seed(0)
    rows = nn.Embedding(16, 8)
    goal = 4 * torch.randn(16, 8)
    optimizer = SpectralAGD(nn.Sequential(rows, nn.Linear(8, 8)), depth=2)

    def train(loss_of, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(rows.weight)
            loss.backward()
            optimizer.step()
        return loss.item()

    train(lambda x: x.square().sum(), 300)
    train(lambda x: x.norm(dim=1).log().sum() + (x.sum(0) - 1).square().sum(), 300)
    s = optimizer.state[rows.weight]["s"]
    lengths = rows.weight.detach().norm(dim=1) / s
    assert optimizer.skipped == 0 and (math.exp(-5.1) < lengths).all() and (lengths < 0.1).all()
    train(lambda x: (x - goal).square().sum(1).mean(), 600)
    longer = rows.weight.detach().norm(dim=1) / s / lengths
    assert longer.min() > 1 and longer.mean() > 2


@both_modes
def test_a_state_from_before_lengths_were_trained_goes_on(mode):
    """Its lengths start where its weights are."""
    net, optimizer = every()
    stepped(net, optimizer)
    twin, other = copy.deepcopy((net, optimizer))
    for own in optimizer.state.values():
        own["stretch"].zero_(), own["r"].zero_()
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    assert all(own.pop("stretch") is not None and own.pop("r") is not None
               for own in state["state"].values())  # fmt: skip
    getattr(other, mode)()
    other.load_state_dict(state)
    optimizer.train(), other.train()
    stepped(net, optimizer, 2, seed=6), stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


@pytest.mark.parametrize("flat", [False, True])
def test_torchs_distributed_checkpoints_of_eval_mode(flat, tmp_path):
    """They load what a fresh optimiser has a place for: one in eval mode."""
    (net, optimizer), (twin, other) = every(), every()
    stepped(net, optimizer)
    optimizer.eval()
    save_and_load = through_torchs_checkpoints(tmp_path, flat)
    with pytest.raises((RuntimeError, ValueError), match=r"eval\(\)"):
        save_and_load(net, optimizer, twin, other)
    twin, other = every()
    stepped(twin, other, 1)
    other.eval()
    save_and_load(net, optimizer, twin, other)
    optimizer.train(), other.train()
    stepped(net, optimizer, 2, seed=6), stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16], ids=str)
@both_modes
def test_a_state_goes_to_16_bits_and_back(there, mode):
    """z and the weights' copy keep what 16 bits do not hold; so does a network that changes."""
    net, optimizer = every()
    stepped(net, optimizer)
    getattr(optimizer, mode)()
    half, its = reloaded(net, optimizer, dtype=there)
    for p, q in zip(half.parameters(), net.parameters()):
        assert p.dtype == there and its.state[p]["z"].dtype == torch.float32
        assert torch.equal(its.state[p]["z"], optimizer.state[q]["z"])
    its.train(), optimizer.train()
    stepped(half, its, 2, seed=6)
    back, last = reloaded(half, its)
    stepped(net, optimizer, 2, seed=6)
    for one in (back, half.float()):
        for name, p in one.named_parameters():
            assert relative(p, net.get_parameter(name)) < 0.02, name
    for pair in ((back, last), (half, its)):
        stepped(*pair, 2)
        assert pair[1].skipped == 0 and "weights" not in pair[1].state[pair[0].last.weight]
        assert all(p.isfinite().all() for p in pair[0].parameters())


def test_modes_and_copies_within_inference_mode():
    """Where Lightning calls its hooks of validation."""
    net, optimizer = every()
    stepped(net, optimizer)
    before = everything(net, optimizer)
    with torch.inference_mode():
        optimizer.eval()
    twin, other = copy.deepcopy((net, optimizer))
    for pair in ((net, optimizer), (twin, other)):
        pair[1].train()
        assert not changed(before, everything(*pair))
    with torch.inference_mode():
        optimizer.eval(), optimizer.train()
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(net, optimizer, 2, seed=6), stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


@pytest.mark.parametrize("broken", ["shape", "m", "r", "stretch"])
def test_a_state_of_other_shapes_is_refused(broken):
    net, optimizer = every()
    stepped(net, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    own = state["state"][[name for name, _ in net.named_parameters()].index("last.weight")]
    if broken == "stretch":
        own["stretch"] = own["stretch"][:, 0]
    else:
        own.update(z=own["z"].mT.contiguous()) if broken == "shape" else own.pop(broken)
    with pytest.raises(ValueError, match="not of these parameters"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("through", ["gradients", "network", "state"])
def test_another_memory_format_goes_on(through):
    """Of gradients, of a network that changes it between steps, of a state that is loaded to it."""
    (net, optimizer), (twin, other) = every(), every()
    stepped(net, optimizer), stepped(twin, other)
    if through != "gradients":
        twin.to(memory_format=torch.contiguous_format)
    if through == "state":
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    put_gradients(net, torch.Generator().manual_seed(3))
    for p, q in zip(net.parameters(), twin.parameters()):
        q.grad = p.grad.contiguous() if p.ndim == 4 else p.grad.mT.contiguous().mT \
            if p.ndim == 2 else p.grad.clone()  # fmt: skip
    optimizer.step(), other.step()
    for name, p in net.named_parameters():
        assert relative(twin.get_parameter(name), p) < 1e-4, name


# Layers that come, and output layers


def chain(*sides):
    layers = [x for a, b in zip(sides, sides[1:]) for x in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def train(net, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()


def held(net, optimizer):
    """The names of weights whose blocks are not free."""
    return {name for name, p in net.named_parameters()
            if p in optimizer.state and optimizer.state[p]["held"].any()}  # fmt: skip


@both_modes
def test_layers_that_are_unfrozen_later(mode):
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    net[0].requires_grad_(False)
    optimizer = SpectralAGD(net)
    train(net, optimizer)
    assert optimizer.L == 2 and net[0].weight not in optimizer.state
    getattr(optimizer, mode)()
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": net[0].parameters(), "gain": 0.5})
    before = net[0].weight.detach().clone()
    optimizer.train()
    train(net, optimizer)
    assert optimizer.L == 3 and held(net, optimizer) == {"0.weight", "2.weight"}
    assert [optimizer.state[net[i].weight]["t"].tolist() for i in (0, 2)] == [[2], [4]]
    assert not torch.equal(before, net[0].weight)
    z, x = optimizer.state[net[0].weight]["stretch"][0].tolist()
    assert z != 0 and rho(net[0].weight.detach()) == near(
        rho(before) * math.exp(0.2 * z + 0.8 * x), 1e-5
    )


class Net(nn.Module):
    """forward(layers, x) of layers by name."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.layers, self.of = nn.ModuleDict(layers), forward

    def forward(self, x):
        return self.of(self.layers, x)


def heads():
    return Net(lambda n, x: (n["one"](n["body"](x).relu()), n["two"](n["body"](x).relu())),
               body=chain(8, 8, 8), one=nn.Linear(8, 3), two=nn.Linear(8, 2))  # fmt: skip


def norm_behind():
    """An output that a norm layer with a gain and a bias still changes."""
    return Net(lambda n, x: n["norm"](n["body"](x)).softmax(-1), body=chain(8, 8, 3),
               norm=nn.LayerNorm(3))  # fmt: skip


def stream():
    """The output is a stream and its last branch: both layers are the last on a path."""
    return Net(lambda n, x: n["first"](x) + n["branch"](n["first"](x).relu()),
               first=nn.Linear(8, 8), branch=nn.Linear(8, 8))  # fmt: skip


def frozen_head():
    """Its head is no weight of the optimiser, and the layer before it is not free for that."""
    net = chain(8, 8, 3)
    net[2].requires_grad_(False)
    return net


X, TOKENS = torch.randn(2, 8), torch.arange(8)[None]
tie = {"tie_word_embeddings": False}


@pytest.mark.parametrize("build, x, outputs", [
    (lambda: chain(8, 8, 8, 3), X, {"4.weight"}),
    (lambda: chain(8, 3), X, {"0.weight"}),
    (gpt2, TOKENS, {"transformer.wte.weight"}),
    (functools.partial(gpt2, **tie), TOKENS, {"lm_head.weight"}),
    (heads, X, {"layers.one.weight", "layers.two.weight"}),
    (norm_behind, X, {"layers.body.2.weight"}),
    (stream, X, {"layers.first.weight", "layers.branch.weight"}),
    (frozen_head, X, set()),
])  # fmt: skip
def test_output_layers_are_read_off_the_graph(build, x, outputs):
    """By agd.depth and by the first forward pass; they alone are free, beside vectors."""
    torch.manual_seed(0)
    net = build()
    depth = agd.depth(net, x)
    assert set(depth.outputs) == outputs
    twin = copy.deepcopy(net)
    read, given = SpectralAGD(net), SpectralAGD(twin, depth=depth)
    out = net(x)
    out = out[0] + out[1].sum() if isinstance(out, tuple) else getattr(out, "logits", out)
    out.square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        q.grad = p.grad
    read.step(), given.step()
    assert read.L == pytest.approx(given.L)
    free = {name for name, p in net.named_parameters() if p.ndim > 1 and p.requires_grad} - outputs
    assert held(net, read) == held(twin, given) == free


def test_heads_that_the_first_pass_does_not_reach_and_a_number_for_depth():
    torch.manual_seed(0)
    net = Net(lambda n, x: n["one"](n["body"](x)), body=nn.Linear(8, 8), one=nn.Linear(8, 3),
              two=nn.Linear(8, 2))  # fmt: skip
    optimizer = SpectralAGD(net)
    train(net, optimizer, 1)
    net.of = lambda n, x: n["two"](n["body"](x))
    train(net, optimizer, 1)
    assert held(net, optimizer) == {"layers.body.weight"}
    net = chain(8, 8, 3)
    optimizer = SpectralAGD(net, depth=2)
    train(net, optimizer)
    assert optimizer.L == 2 and held(net, optimizer) == {"0.weight"}


@pytest.mark.parametrize("params", ["tensors", "pairs", "groups"])
def test_parameters_instead_of_a_network(params):
    """Their last weight is the output layer."""
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    given = {"tensors": net.parameters, "pairs": net.named_parameters,
             "groups": lambda: [{"params": net[:3].parameters()},
                                {"params": net[3:].parameters(), "gain": 0.5}]}[params]()
    optimizer = SpectralAGD(given)
    train(net, optimizer, 5)
    assert optimizer.L == 3 and held(net, optimizer) == {"0.weight", "2.weight"}


# Batch norm, and training


@pytest.mark.parametrize("labels", [False, True])
def test_recalibrated_statistics_are_those_of_the_batches(labels):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(144, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Linear(6, 3),
                        nn.Dropout())  # fmt: skip
    inputs = [torch.randn(16, 1, 8, 8) * (i + 1) for i in range(5)]
    net(inputs[0] * 100)
    net.eval()
    net[1].train()
    weights = {name: bits(p) for name, p in net.named_parameters()}
    twin = copy.deepcopy(net)
    torch.optim.swa_utils.update_bn(inputs, twin)
    agd.recalibrate(net, [(x, torch.zeros(16)) if labels else x for x in inputs])
    for x, y in zip(net.buffers(), twin.buffers()):
        assert torch.equal(x, y)
    assert (net[1].momentum, net[5].momentum) == (0.1, 0.3)
    assert not net.training and net[1].training and not net[5].training
    assert all(torch.equal(bits(p), weights[name]) for name, p in net.named_parameters())
    assert all(p.grad is None for p in net.parameters())


def test_what_is_not_recalibrated():
    """Networks without batch norm are not run, and those with it need a batch."""
    net = chain(8, 3)
    net.forward = lambda x: pytest.fail("the network ran")
    agd.recalibrate(net, [torch.randn(2, 8)])
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net(torch.randn(8, 4))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        agd.recalibrate(net, [])
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
