"""SpectralAGD: its transcription in float64, its figures, modes, states, output layers, guards."""

import copy
import functools
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import agd
from agd import AGD, SpectralAGD
from data import load
from tests import spectral_reference as reference
from tests.spectral_reference import SpectralReference, rho
from tests.test_agd import Reads
from tests.test_backends import near, relative

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Conv1D(nn.Module):
    """A linear layer with a weight (in, out), by the name and attribute that transformers has."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


class Every(nn.Module):
    """A parameter of every role."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 24)
        self.pos = nn.Parameter(torch.randn(1, 6, 24))
        self.attention = nn.MultiheadAttention(24, 3, batch_first=True)
        self.c_attn = Conv1D(36, 24)
        self.norm = nn.LayerNorm(36)
        self.lstm = nn.LSTM(36, 10)
        self.tall, self.wide = nn.Linear(10, 60), nn.Linear(60, 12)
        self.conv = nn.Conv2d(2, 12, 3, groups=2, padding=1)
        self.last_conv = nn.Conv2d(12, 6, 3, bias=False, padding=1)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.batch_norm = nn.BatchNorm2d(8)
        self.slope = nn.PReLU()
        self.zero = nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)
        self.temperature = nn.Parameter(torch.tensor(2.0))
        nn.init.zeros_(self.zero.weight)
        self.tall.weight.data = self.tall.weight.data.mT.contiguous().mT
        self.to(memory_format=torch.channels_last)

    def forward(self, i):
        x = self.embedding(i) + self.pos
        x = self.c_attn(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.wide(self.tall(self.lstm(self.norm(x))[0]).relu())
        x = self.depthwise(self.last_conv(self.conv(x.view(-1, 2, 6, 6)).relu()))
        x = self.slope(self.batch_norm(self.up(x))).mean((2, 3))
        return self.last(x + self.zero(x)) * self.temperature


INPUTS = torch.arange(24).view(4, 6) * 5 % 17
# The roles of other than matrices (of one part), biases and gains.
ROLES = {
    "embedding.weight": ("rows",), "pos": ("rows",), "attention.in_proj_weight": ("stacked", 3),
    "c_attn.weight": ("transposed",), "lstm.weight_ih_l0": ("stacked", 4),
    "lstm.weight_hh_l0": ("stacked", 4), "conv.weight": ("kernel", 2),
    "depthwise.weight": ("kernel", 6), "up.weight": ("kernel", 2),
}  # fmt: skip
FREE = {"last.weight", "zero.weight"}


def every(dtype=torch.float32):
    """(an Every, its optimizer) whose blocks have lengths of their own."""
    torch.manual_seed(0)
    net = Every()
    depth = agd.depth(net, INPUTS)
    assert depth.outputs == {"last.weight"}
    net = net.to(dtype)
    return net, SpectralAGD(net, depth=depth)


def role_of(name, p):
    return ROLES.get(name) or ("bias" if p.ndim < 2 else "matrix",)


def cut(name, p, like=None):
    """The blocks of a parameter, or of a tensor like it, in float64."""
    x = (p if like is None else like).detach().double().contiguous()
    return reference.blocks(x, *role_of(name, p))


def target(net, name):
    """s of a parameter that is not on its sphere: its layer's, or 1, as the role of `zero` has."""
    name = name.replace("bias", "weight")
    W = net.get_parameter(name)
    if W.ndim < 2:
        return W.detach().double().square().mean().sqrt().item()
    return math.sqrt(sum(rho(x) ** 2 for x in cut(name, W)) / len(cut(name, W))) or 1.0


def twin_of(net, optimizer, rows=128, free=FREE):
    """The reference of a network with the roles above."""
    found = []
    for name, p in net.named_parameters():
        held = p.ndim > 1 and name not in free
        found += [reference.Block(W, rho(W) if held else target(net, name), held)
                  for W in cut(name, p)]  # fmt: skip
    return SpectralReference(found, optimizer.L, rows)


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
    found, end = {}, 0
    for name, p in net.named_parameters():
        mine = cut(name, p, tensors and tensors[name])
        start, end = end, end + len(mine)
        theirs = [of(b) for b in twin.blocks[start:end]]
        whole = math.sqrt(sum(x.square().sum().item() for x in theirs))
        apart = math.sqrt(sum((x - y).square().sum().item() for x, y in zip(mine, theirs)))
        found[name] = apart / whole if whole else apart
    return found


def run(net, optimizer, twin, steps, seed=1):
    """Steps along random gradients, some of them zero, or missing."""
    generator = torch.Generator().manual_seed(seed)
    for i in range(steps):
        put_gradients(net, generator)
        net.embedding.weight.grad[[i % 20, 3]] = 0
        if i % 10 == 7:
            net.wide.weight.grad = None
            net.attention.in_proj_weight.grad[24:48] = 0
            net.conv.weight.grad[:6] = 0
        optimizer.step()
        twin.step(gradients(net))
        yield


@pytest.fixture
def polynomials(monkeypatch):
    """Have the twin take agd's polar factors, whose singular values are 1 to 0.012."""
    exact = reference.exact
    monkeypatch.setattr(reference, "exact", lambda m: agd._polar(m[None].clone())[0])
    return exact


@pytest.mark.parametrize("dtype, rows", [
    (torch.float64, 5), (torch.float32, None), (torch.bfloat16, 128), (torch.float16, 5),
], ids=str)  # fmt: skip
def test_a_hundred_steps_of_every_role(dtype, rows, polynomials, monkeypatch):
    """To rounding, with the same polynomials: float32 has six digits, of which polar factors of
    small singular values lose some. Z has them in 16 bits too."""
    monkeypatch.setattr(agd, "ROWS", rows)
    net, optimizer = every(dtype)
    twin = twin_of(net, optimizer, rows)
    close = 1e-11 if dtype == torch.float64 else 2e-4
    for _ in run(net, optimizer, twin, 100):
        assert optimizer.eta.item() == near(twin.eta, rel=close)
        assert optimizer.G.item() == near(twin.G, rel=close)
    z = {name: optimizer.state[p]["z"] for name, p in net.named_parameters()}
    assert max(differences(net, twin, lambda b: b.z, z).values()) < close
    found = differences(net, twin, lambda b: b.P)
    assert max(found.values()) < close + torch.finfo(dtype).eps, found
    optimizer.eval()
    found = differences(net, twin, lambda b: b.on_sphere(b.x))
    assert max(found.values()) < close + torch.finfo(dtype).eps, found
    optimizer.train()
    assert max(differences(net, twin, lambda b: b.P).values()) < close + torch.finfo(dtype).eps


# Square ones, with singular values that are noise; the worst of a hundred 8 by 8 is 1e-3 or so.
SQUARE = {"zero.weight", "attention.in_proj_weight", "attention.out_proj.weight",
          "lstm.weight_hh_l0"}  # fmt: skip


def test_a_hundred_steps_with_exact_polar_factors():
    """The polynomials end within 0.012 of 1 where a singular value is over 1/400 of the largest, as
    those of a random matrix are, unless it is square: then the least one may not be."""
    net, optimizer = every()
    twin = twin_of(net, optimizer)
    for _ in run(net, optimizer, twin, 100):
        assert optimizer.eta.item() == near(twin.eta, rel=0.002)
    found = differences(net, twin, lambda b: b.P)
    optimizer.eval()
    average = differences(net, twin, lambda b: b.on_sphere(b.x))
    for name in found:
        bound = 0.06 if name in SQUARE else 0.01
        assert max(found[name], average[name]) < bound, name


def test_eta_of_the_gradients_of_a_network():
    """Whose matrices have singular values that are rounding, which exact factors turn into moves:
    to G, and so to eta, they are nothing."""
    net, optimizer = every()
    twin = twin_of(net, optimizer)
    torch.manual_seed(1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randint(17, (16, 6))), torch.arange(16) % 5).backward()
        optimizer.step()
        twin.step(gradients(net))
        assert optimizer.eta.item() == near(twin.eta, rel=0.02)


def bits(x):
    return x.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def everything(net, optimizer):
    """Each tensor that a step may change, but for eta, G and skipped: its bits, by a name."""
    found = {name: bits(x) for name, x in net.state_dict().items()}
    for name, p in net.named_parameters():
        for key, x in optimizer.state[p].items():
            if isinstance(x, torch.Tensor):
                found[f"{name} {key}"] = bits(x)
    return found


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


# The figures of spectral.md, section 8


def test_held_blocks_keep_their_length_after_every_step():
    net, optimizer = every()
    twin = twin_of(net, optimizer)
    generator = torch.Generator().manual_seed(2)
    for i in range(40):
        put_gradients(net, generator, 10.0 ** (i % 7 - 3))
        optimizer.step()
        mine = [W for name, p in net.named_parameters() for W in cut(name, p)]
        for W, b in zip(mine, twin.blocks):
            assert not b.held or rho(W) == near(b.s, rel=1e-5)
    optimizer.eval()
    mine = [W for name, p in net.named_parameters() for W in cut(name, p)]
    assert all(not b.held or rho(W) == near(b.s, rel=1e-5) for W, b in zip(mine, twin.blocks))


def test_the_state_says_which_blocks_are_held_and_what_moved_them(polynomials):
    net, optimizer = every()
    twin = twin_of(net, optimizer)
    net.embedding.weight.grad = None
    generator = torch.Generator().manual_seed(2)
    for i in range(3):
        put_gradients(net, generator)
        net.embedding.weight.grad[i] = 0
        optimizer.step()
        twin.step(gradients(net))
    end = 0
    for name, p in net.named_parameters():
        state, number = optimizer.state[p], len(cut(name, p))
        of, end = twin.blocks[end : end + number], end + number
        assert state["z"].shape == state["m"].shape == p.shape and "x" not in state, name
        assert state["held"].tolist() == [b.held for b in of], name
        assert state["t"].tolist() == [b.t for b in of] and state["t"].dtype == torch.int64, name
        assert state["s"].tolist() == pytest.approx([b.s for b in of], rel=1e-6), name
        for length, b in zip(state["length"].tolist(), of):
            y = (1 - reference.BETA) * b.z + reference.BETA * b.x
            assert not b.held or length == near(rho(y) / b.s, rel=1e-5), name


def test_only_the_directions_of_z_and_x_matter():
    """With a step of no length, which still moves X towards Z."""
    net, optimizer = every()
    stepped(net, optimizer)
    found = []
    for c in (1.0, 7.0):
        twin, other = copy.deepcopy((net, optimizer))
        for state in other.state.values():
            held = state["held"].all()
            for key in ("z", "length") if held else ():
                state[key].mul_(c)
        other.param_groups[0]["lr"] = 1e-30
        stepped(twin, other, 1)
        other.eval()
        x = {name: p.detach().clone() for name, p in twin.named_parameters()}
        other.train()
        found.append((dict(twin.named_parameters()), x))
    for one, scaled in zip(*found):
        for name, W in one.items():
            assert relative(scaled[name], W) < 1e-5, name


def table(rows=200, width=64):
    """A network of a table of hidden rows and an output layer, and their gradients' generator."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(rows, width), nn.Linear(width, 3, bias=False)).double()
    optimizer = SpectralAGD(net, depth=agd.depth(net, torch.arange(9)))
    return net, optimizer, torch.Generator().manual_seed(2)


def test_the_clock_of_steps_orthogonal_to_z(monkeypatch):
    """rho(Z)^2 = 1 + sum (eta / L)^2 without momentum and interpolation: then P is Z's direction,
    and a row's step is orthogonal to it."""
    monkeypatch.setattr(agd, "MU", 0.0)
    monkeypatch.setattr(agd, "BETA", 0.0)
    net, optimizer, generator = table()
    sum_of_squares = 0.0
    for _ in range(50):
        put_gradients(net, generator)
        optimizer.step()
        turn = optimizer.eta.item() / optimizer.L
        sum_of_squares += turn**2
        length = math.sqrt(1 + sum_of_squares)
        state = optimizer.state[net[0].weight]
        lengths = state["z"].norm(dim=1) / state["s"]
        assert lengths.tolist() == pytest.approx([length] * 200, rel=1e-9)
        clock = optimizer.clock()
        assert clock[0].shape == clock[1].shape == ()
        assert [x.item() for x in clock] == pytest.approx([length, turn / length], rel=1e-6)
    assert length > 1.2


def test_the_clock_of_random_gradients_counts_momentum_thrice():
    """rho(Z)^2 = 1 + (1 + mu) / (1 - mu) sum (eta / L)^2, of a random walk."""
    net, optimizer, generator = table()
    sum_of_squares = 0.0
    for _ in range(200):
        put_gradients(net, generator)
        optimizer.step()
        sum_of_squares += (optimizer.eta.item() / optimizer.L) ** 2
    length, turn = (x.item() for x in optimizer.clock())
    assert length**2 == near(1 + 3 * sum_of_squares, rel=0.1)
    assert turn == near(optimizer.eta.item() / optimizer.L / length, rel=0.05)


def test_without_momentum_average_and_sphere_it_is_a_spectral_step(monkeypatch):
    """W - eta / L s U V^T, with G of nuclear norms."""
    monkeypatch.setattr(agd, "MU", 0.0)
    monkeypatch.setattr(agd, "BETA", 0.0)
    torch.manual_seed(0)
    net = nn.Linear(40, 12, bias=False).double()
    optimizer = SpectralAGD(net, depth=agd.depth(net, torch.randn(2, 40).double()))
    s, generator = rho(net.weight.detach()), torch.Generator().manual_seed(2)
    for _ in range(5):
        W = net.weight.detach().clone()
        put_gradients(net, generator)
        optimizer.step()
        U, S, Vh = torch.linalg.svd(net.weight.grad, full_matrices=False)
        assert optimizer.G.item() == near(s * S.sum().item(), rel=0.012)
        G = optimizer.G.item()
        assert optimizer.eta.item() == near(math.log((1 + math.sqrt(1 + 4 * G)) / 2), rel=1e-12)
        assert relative(W - net.weight, optimizer.eta * s * U @ Vh) < 0.012


def test_the_average_weighs_step_t_by_t():
    net, optimizer, generator = table()
    (embedding, last), sums, total = net.parameters(), [0.0, 0.0], 0
    for t in range(1, 21):
        put_gradients(net, generator)
        optimizer.step()
        sums = [x + t * optimizer.state[p]["z"] for x, p in zip(sums, (embedding, last))]
        total += t
    X = [x / total for x in sums]
    optimizer.eval()
    s = optimizer.state[embedding]["s"][:, None]
    assert relative(last, X[1]) < 1e-12
    assert relative(embedding, X[0] * s / X[0].norm(dim=1, keepdim=True)) < 1e-12


def test_a_slope_that_is_not_positive_moves_nothing():
    net, optimizer = every()
    stepped(net, optimizer, 1)
    for p in net.parameters():
        p.grad.mul_(-1e-4)
    before = everything(net, optimizer)
    optimizer.step()
    assert optimizer.G.item() == optimizer.eta.item() == 0
    moved = changed(before, everything(net, optimizer))
    assert {x.split()[-1] for x in moved} == {"m"}
    assert optimizer.skipped == 0


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
            reference.blocks(zeroed, *role_of(name, grad))[place].zero_()
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
        kept = torch.equal(before[1][i]["length"][places], after[1][i]["length"][places])
        assert kept, name


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


@pytest.mark.parametrize("tensor", [False, True])
def test_a_gain_of_zero_freezes_all_but_the_momentum(tensor):
    net, optimizer = every()
    stepped(net, optimizer)
    before = everything(net, optimizer)
    zero = torch.tensor(0.0) if tensor else 0.0
    optimizer.param_groups[0]["lr"] = zero
    stepped(net, optimizer, 2)
    moved = changed(before, everything(net, optimizer))
    assert {x.split()[-1] for x in moved} == {"m"}
    assert optimizer.eta > 0


def test_a_gain_multiplies_the_step(polynomials):
    net, optimizer = every(torch.float64)
    optimizer.param_groups[0]["lr"] = 0.3
    twin = twin_of(net, optimizer)
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        put_gradients(net, generator)
        optimizer.step()
        twin.step(gradients(net), [0.3] * len(twin.blocks))
        assert optimizer.eta.item() == near(twin.eta, rel=1e-11)
    assert max(differences(net, twin, lambda b: b.P).values()) < 1e-11


# The polar factor


def spectra(rows, columns, values, seed=0):
    """A matrix of these singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, rows, generator=generator, dtype=torch.float64))[0]
            for n in (rows, columns))  # fmt: skip
    return U * values.double() @ V.mT


def captured(D, x):
    """(the operator norm of D, its share of the nuclear norm of x)."""
    D, x = D.double(), x.double()
    return (torch.linalg.matrix_norm(D, 2).item(),
            ((D * x).sum() / torch.linalg.svdvals(x).sum()).item())  # fmt: skip


SIDES = [(64, 64), (24, 60), (128, 300), (2, 9), (1, 5)]


@pytest.mark.parametrize("rows, columns", SIDES)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e17])
def test_the_polar_factor_of_known_spectra(rows, columns, scale):
    """1 to two in a hundred, of singular values from 1/250 to 1 of the largest; a part below."""
    several = [torch.logspace(-3, 0, rows), torch.ones(rows), torch.linspace(1e-3, 1, rows),
               torch.cat([torch.ones(1), torch.full((rows - 1,), 1e-3)])]  # fmt: skip
    x = torch.stack([spectra(rows, columns, v, i) for i, v in enumerate(several)])
    D = agd._polar((x * scale).float())
    assert D.shape == x.shape and D.isfinite().all()
    for one, exact in zip(D, x):
        norm, share = captured(one, exact)
        assert norm == pytest.approx(1, abs=0.02) and share > 0.93
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        values = (U.mT @ one.double() @ Vh.mT).diagonal()
        assert (values[S > S[0] / 250] - 1).abs().max() < 0.02 and values.min() > 0.3


@pytest.mark.parametrize("rows, columns", SIDES)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e15])
def test_the_polar_factor_of_random_and_low_rank_matrices(rows, columns, scale):
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(3, rows, columns, generator=generator)
    low = torch.randn(3, rows, 1, generator=generator) @ torch.randn(3, 1, columns,
                                                                     generator=generator)
    half = torch.randn(3, rows, rows // 2 + 1, generator=generator)
    half = half @ torch.randn(3, rows // 2 + 1, columns, generator=generator)
    for x in (random, low, half):
        D = agd._polar(x * scale)
        for one, exact in zip(D, x):
            norm, share = captured(one, exact)
            assert norm < 1.02 and share > 0.98, (norm, share)
    assert captured(agd._polar(random * scale)[0], random[0])[0] > 0.98


def test_the_polar_factor_of_zero_is_zero():
    x = torch.zeros(3, 8, 20)
    x[1] = torch.randn(8, 20)
    D = agd._polar(x)
    assert not D[0].any() and not D[2].any()
    assert torch.linalg.matrix_norm(D[1], 2) == pytest.approx(1, abs=0.02)


def test_matrices_of_a_batch_do_not_see_each_other():
    """One of 1e15 beside one of 1e-20."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 40, generator=generator)
    scaled = x * torch.tensor([1e15, 1e-15, 1.0, 1e-20])[:, None, None]
    assert relative(agd._polar(scaled), agd._polar(x)) < 1e-4


@pytest.mark.parametrize("rows, columns", [(32, 32), (24, 60), (2, 9), (1, 5)])
def test_the_polar_factor_of_gpus(rows, columns):
    """In bfloat16: each product rounds to three digits."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-20, 1.0, 1e15):
        x = torch.randn(3, rows, columns, generator=generator)
        D = agd._polar_bf16(x * scale)
        for one, exact in zip(D, x):
            norm, share = captured(one, exact)
            assert norm == pytest.approx(1, abs=0.05) and share > 0.93
    assert not agd._polar_bf16(torch.zeros(2, rows, columns)).any()


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
        optimizer.step()
    optimizer.train()
    assert optimizer.param_groups[0]["train_mode"] is True
    assert not changed(before, everything(net, optimizer))
    stepped(net, optimizer, 1)


def test_a_step_in_eval_mode_changes_nothing_and_runs_no_closure():
    net, optimizer = every()
    stepped(net, optimizer)
    optimizer.eval()
    before = everything(net, optimizer)
    with pytest.raises(RuntimeError):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    assert not changed(before, everything(net, optimizer))


def test_the_average_in_memory_is_that_of_the_weights_file():
    """A network that is saved after eval() answers as the one in memory."""
    net, optimizer = every()
    stepped(net, optimizer)
    optimizer.eval()
    net.eval()
    twin = Every().eval()
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net(INPUTS), twin(INPUTS))
    optimizer.train()
    assert not torch.equal(net(INPUTS), twin(INPUTS))


# Copies and states


def reloaded(net, optimizer, order, dtype=torch.float32, seed=5):
    """(network, optimizer) of a new draw with what a file kept of these."""
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "agd": optimizer.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    torch.manual_seed(seed)
    twin = Every()
    depth = agd.depth(twin, INPUTS)
    twin = twin.to(dtype)
    other = SpectralAGD(twin, depth=depth)
    for one in order.split():
        if one == "net":
            twin.load_state_dict(saved["net"])
        else:
            other.load_state_dict(saved["agd"])
    return twin, other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("order", ["net agd", "agd net"])
def test_a_checkpoint_in_either_mode_goes_on_to_the_bit(dtype, mode, order):
    net, optimizer = every(dtype)
    for steps in (0, 1, 3):
        stepped(net, optimizer, steps)
        getattr(optimizer, mode)()
        twin, other = reloaded(net, optimizer, order, dtype)
        assert other.param_groups[0]["train_mode"] is (mode == "train")
        assert not changed(everything(net, optimizer), everything(twin, other))
        assert other.L == optimizer.L and other.skipped == optimizer.skipped
        optimizer.train(), other.train()
        assert not changed(everything(net, optimizer), everything(twin, other))
        stepped(twin, other, 3, seed=6)
        stepped(net, optimizer, 3, seed=6)
        assert torch.equal(optimizer.eta, other.eta)
        assert not changed(everything(net, optimizer), everything(twin, other))
        optimizer.eval(), other.eval()
        assert not changed(everything(net, optimizer), everything(twin, other))
        optimizer.train()


def test_a_state_of_the_other_mode_is_of_the_weights_that_come_with_it():
    """An optimiser in eval mode takes a checkpoint of train mode, and the other way round."""
    for mode, own in (("train", "eval"), ("eval", "train")):
        net, optimizer = every()
        stepped(net, optimizer)
        getattr(optimizer, mode)()
        twin, other = every()
        stepped(twin, other, 2, seed=7)
        getattr(other, own)()
        twin.load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.train(), other.train()
        assert not changed(everything(net, optimizer), everything(twin, other))
        stepped(twin, other, 2, seed=6)
        stepped(net, optimizer, 2, seed=6)
        assert not changed(everything(net, optimizer), everything(twin, other))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(way, mode):
    net, optimizer = every()
    stepped(net, optimizer)
    getattr(optimizer, mode)()
    pair = net, optimizer
    twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert isinstance(other, SpectralAGD) and repr(other) == repr(optimizer)
    before = everything(twin, other)
    optimizer.train()
    stepped(net, optimizer, 2, seed=6)
    assert not changed(before, everything(twin, other))
    other.train()
    stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


@pytest.mark.parametrize("there", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_state_goes_to_16_bits_and_back(there, mode):
    """z and the weights' copy keep what 16 bits do not hold."""
    net, optimizer = every()
    stepped(net, optimizer)
    getattr(optimizer, mode)()
    half, its = reloaded(net, optimizer, "net agd", there)
    for (name, p), q in zip(half.named_parameters(), net.parameters()):
        assert p.dtype == there and its.state[p]["z"].dtype == torch.float32, name
        assert torch.equal(its.state[p]["z"], optimizer.state[q]["z"]), name
    its.train(), optimizer.train()
    stepped(half, its, 2, seed=6)
    back, last = reloaded(half, its, "net agd", torch.float32)
    stepped(net, optimizer, 2, seed=6)
    for name, p in back.named_parameters():
        assert relative(p, net.get_parameter(name)) < 0.02, name
        assert last.state[p]["z"].dtype == torch.float32
    stepped(back, last, 2)
    assert last.skipped == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_network_changes_its_dtype_under_the_optimizer(mode):
    net, optimizer = every()
    stepped(net, optimizer)
    getattr(optimizer, mode)()
    net.bfloat16()
    optimizer.train()
    stepped(net, optimizer)
    assert optimizer.skipped == 0 and all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flat", [False, True])
def test_torchs_distributed_checkpoints(flat, mode, tmp_path):
    """They load what a fresh optimiser has a place for: of eval mode that is one in eval mode."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as of

    options = of.StateDictOptions(flatten_optimizer_state_dict=flat)
    (net, optimizer), (twin, other) = every(), every()
    stepped(net, optimizer)
    getattr(optimizer, mode)()
    saved = dict(zip(("net", "agd"), of.get_state_dict(net, optimizer, options=options)))
    checkpoint.save(saved, checkpoint_id=tmp_path)

    def load():
        state = dict(zip(("net", "agd"), of.get_state_dict(twin, other, options=options)))
        checkpoint.load(state, checkpoint_id=tmp_path)
        of.set_state_dict(twin, other, model_state_dict=state["net"],
                          optim_state_dict=state["agd"], options=options)  # fmt: skip
        other.train()

    if mode == "eval":
        with pytest.raises((RuntimeError, ValueError), match=r"eval\(\)"):
            load()
        twin, other = every()
        stepped(twin, other, 1)
        other.eval()
    load()
    optimizer.train()
    assert not changed(everything(net, optimizer), everything(twin, other))
    stepped(net, optimizer, 2, seed=6), stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


def test_modes_within_inference_mode():
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
        optimizer.eval()
        optimizer.train()
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(net, optimizer, 2, seed=6), stepped(twin, other, 2, seed=6)
    assert not changed(everything(net, optimizer), everything(twin, other))


OTHERS = {
    "AGD": AGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_states_of_other_optimisers_are_refused_and_this_one_by_them(kind):
    nets = [nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
            for _ in range(2)]  # fmt: skip
    if kind == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    ours = SpectralAGD(nets[0])
    theirs = OTHERS[kind](nets[1] if kind == "AGD" else nets[1].parameters())
    for net, optimizer in zip(nets, (ours, theirs)):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    with pytest.raises(ValueError, match="another optimiser"):
        ours.load_state_dict(theirs.state_dict())
    if kind == "AGD":
        with pytest.raises(ValueError, match="another optimiser"):
            theirs.load_state_dict(ours.state_dict())


# Layers that come, and gradients that do not


def chain(*sides):
    layers = [x for a, b in zip(sides, sides[1:]) for x in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def trained(net, optimizer, steps=2, x=None):
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(16, 8) if x is None else x).square().mean().backward()
        optimizer.step()


def test_layers_that_are_unfrozen_later():
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    net[0].requires_grad_(False)
    optimizer = SpectralAGD(net)
    trained(net, optimizer)
    assert optimizer.L == 2 and net[0].weight not in optimizer.state
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": net[0].parameters(), "gain": 0.5})
    before = net[0].weight.detach().clone()
    trained(net, optimizer)
    assert optimizer.L == 3 and optimizer.state[net[0].weight]["held"].all()
    assert optimizer.state[net[0].weight]["t"].tolist() == [2]
    assert optimizer.state[net[2].weight]["t"].tolist() == [4]
    assert not torch.equal(before, net[0].weight)
    assert rho(net[0].weight.detach()) == near(rho(before), rel=1e-5)
    twin, other = copy.deepcopy((net, optimizer))
    assert not changed(everything(net, optimizer), everything(twin, other))


def test_a_group_that_is_added_in_eval_mode_waits_for_train():
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    net[0].requires_grad_(False)
    optimizer = SpectralAGD(net)
    trained(net, optimizer)
    optimizer.eval()
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": net[0].parameters()})
    with pytest.raises(RuntimeError):
        optimizer.step()
    optimizer.train()
    trained(net, optimizer)
    assert optimizer.skipped == 0 and optimizer.state[net[0].weight]["t"].tolist() == [2]


def test_a_layer_that_is_frozen_later_stays():
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    optimizer = SpectralAGD(net)
    trained(net, optimizer)
    net[2].requires_grad_(False)
    before = {k: bits(x) for k, x in net[2].state_dict().items()}
    optimizer.zero_grad()
    trained(net, optimizer, 3)
    assert all(torch.equal(bits(x), before[k]) for k, x in net[2].state_dict().items())
    assert optimizer.L == 2
    optimizer.eval()
    optimizer.train()
    assert all(torch.equal(bits(x), before[k]) for k, x in net[2].state_dict().items())


def test_parameters_without_a_gradient():
    net, optimizer = every()
    before = everything(net, optimizer)
    optimizer.step()
    assert optimizer.eta == optimizer.G == 0 and optimizer.skipped == 0
    after = everything(net, optimizer)
    assert not changed(before, {k: x for k, x in after.items() if k in before})
    optimizer.eval()
    optimizer.train()
    assert not changed(before, {k: x for k, x in everything(net, optimizer).items() if k in before})


# Output layers


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = chain(8, 8, 8)
        self.one, self.two = nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        x = self.body(x).relu()
        return self.one(x), self.two(x)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 12, 2, batch_first=True)
        self.last = nn.Linear(12, 11)

    def forward(self, i):
        return self.last(self.lstm(self.embedding(i))[0])


class Scaled(nn.Module):
    """An output that a norm layer, a gain and a bias still change."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = chain(8, 8, 3), nn.LayerNorm(3)
        self.scale, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.norm(self.body(x)).softmax(-1) * self.scale + self.bias


class Stream(nn.Module):
    """The output is a stream and its last branch: both layers are the last on a path."""

    def __init__(self):
        super().__init__()
        self.first, self.branch = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        return x + self.branch(x.relu())


def resnet():
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def gpt2(**changes):
    from tests.test_any_library import gpt2

    return gpt2(**changes)


@pytest.mark.parametrize(
    "build, x, outputs",
    [
        (lambda: chain(8, 8, 8, 3), torch.randn(2, 8), {"4.weight"}),
        (lambda: chain(8, 3), torch.randn(2, 8), {"0.weight"}),
        (resnet, torch.randn(2, 3, 32, 32), {"fc.weight"}),
        (gpt2, torch.arange(8)[None], {"transformer.wte.weight"}),
        (functools.partial(gpt2, tie_word_embeddings=False), torch.arange(8)[None],
         {"lm_head.weight"}),
        (Heads, torch.randn(2, 8), {"one.weight", "two.weight"}),
        (Text, torch.arange(6)[None], {"last.weight"}),
        (Scaled, torch.randn(2, 8), {"body.2.weight"}),
        (Stream, torch.randn(2, 8), {"first.weight", "branch.weight"}),
    ],
    ids=["chain", "one layer", "resnet", "gpt2 tied", "gpt2 untied", "two heads", "lstm",
         "a norm behind", "stream"],
)  # fmt: skip
def test_output_layers_are_read_off_the_graph(build, x, outputs):
    torch.manual_seed(0)
    net = build()
    depth = agd.depth(net, x)
    assert set(depth.outputs) == outputs
    # From the first forward pass too; they alone are free, beside vectors.
    twin = copy.deepcopy(net)
    read, given = SpectralAGD(net), SpectralAGD(twin, depth=depth)
    out = net(x)
    out = out[0] + out[1].sum() if isinstance(out, tuple) else getattr(out, "logits", out)
    out.square().mean().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        q.grad = p.grad
    read.step(), given.step()
    assert read.L == pytest.approx(given.L)
    for its, optimizer in ((net, read), (twin, given)):
        free = {name for name, p in its.named_parameters()
                if p.ndim > 1 and p in optimizer.state and not optimizer.state[p]["held"].any()}
        assert free == outputs


def test_a_number_for_depth_leaves_the_outputs_to_the_graph():
    torch.manual_seed(0)
    net = chain(8, 8, 3)
    optimizer = SpectralAGD(net, depth=2)
    trained(net, optimizer)
    assert optimizer.L == 2
    assert [optimizer.state[net[i].weight]["held"].all().item() for i in (0, 2)] == [True, False]


# Manners


def test_it_is_an_agd():
    net, optimizer = every()
    assert isinstance(optimizer, AGD) and optimizer.L > 5
    assert "stacked 4" in optimizer.table() and "SpectralAGD" in repr(optimizer)
    with pytest.raises(TypeError, match="no learning rate"):
        SpectralAGD(net, lr=0.1)
    with pytest.raises(TypeError, match="weight_decay"):
        SpectralAGD(net, weight_decay=0.1)
    with pytest.raises(ValueError, match="gain"):
        SpectralAGD(net, gain=-1)
    with pytest.raises(ValueError, match="empty"):
        SpectralAGD([])


@pytest.mark.parametrize("params", ["tensors", "pairs", "groups"])
def test_parameters_instead_of_a_network(params):
    torch.manual_seed(0)
    net = chain(8, 8, 8, 3)
    given = {"tensors": net.parameters, "pairs": net.named_parameters,
             "groups": lambda: [{"params": net[:3].parameters()},
                                {"params": net[3:].parameters(), "gain": 0.5}]}[params]()
    optimizer = SpectralAGD(given)
    trained(net, optimizer, 30, torch.randn(16, 8))
    assert optimizer.L == 3 and optimizer.skipped == 0
    before = everything(net, optimizer)
    optimizer.eval()
    optimizer.train()
    assert not changed(before, everything(net, optimizer))


def test_a_closure_returns_its_loss():
    torch.manual_seed(0)
    net, x = chain(8, 16, 3), torch.randn(16, 8)
    optimizer = SpectralAGD(net)

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_stay_as_they_are():
    net, optimizer = every()
    put_gradients(net, torch.Generator().manual_seed(0))
    before = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before))


def test_weights_and_gradients_in_other_orders_of_memory():
    """A gradient that is laid out otherwise than its weight gives the same step."""
    net, optimizer = every(torch.float64)
    twin, other = every(torch.float64)
    for _ in range(2):
        generator = torch.Generator().manual_seed(2)
        put_gradients(net, generator)
        for p, q in zip(net.parameters(), twin.parameters()):
            q.grad = p.grad.contiguous() if p.ndim == 4 else p.grad.mT.contiguous().mT \
                if p.ndim == 2 else p.grad.clone()
        optimizer.step()
        other.step()
    assert all(relative(p, q) < 1e-11 for p, q in zip(net.parameters(), twin.parameters()))


def test_a_step_reads_nothing():
    """Tensors without numbers: whatever asks for one raises."""
    with torch.device("meta"):
        weights = [nn.Parameter(torch.empty(s)) for s in [(7, 5), (6, 4, 3, 3), (2, 2), (9,)]]
        for W in weights:
            W.grad = torch.empty_like(W)
        optimizer = SpectralAGD(weights)
    optimizer.step()  # which makes its state
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0 and reads.kernels > 20
    assert optimizer.eta.is_meta


def test_a_compiled_step_agrees_and_compiles_twice_at_most():
    """The first step, which makes the state, and the others."""
    net, optimizer = every()
    twin, other = every()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(other.step, backend=backend, fullgraph=True)
    for i in range(4):
        put_gradients(net, torch.Generator().manual_seed(i))
        put_gradients(twin, torch.Generator().manual_seed(i))
        optimizer.step()
        try:
            step()
        except Exception as error:
            if "setattr" not in str(error):
                raise
            pytest.skip("a graph of this torch sets no attribute of an optimiser")
        assert torch.allclose(optimizer.eta, other.eta, rtol=1e-5, atol=0)
    assert len(graphs) <= 2
    assert all(relative(p, q) < 1e-4 for p, q in zip(twin.parameters(), net.parameters()))
    torch._dynamo.reset()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SpectralAGD(embedding.named_parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"weight of shape \(5, 3\) is sparse"):
        optimizer.step()
    assert not optimizer.state


def test_a_grad_scaler_finds_the_overflow():
    net, optimizer = every()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    stepped(net, optimizer, 1)
    before = everything(net, optimizer)
    put_gradients(net, torch.Generator().manual_seed(3))
    net.last.bias.grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert not changed(before, everything(net, optimizer))


def test_schedulers_change_the_gain_and_are_warned_of():
    net, optimizer = every()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=1)
    stepped(net, optimizer, 1)
    scheduler.step()
    with pytest.warns(UserWarning, match="scheduler has changed lr"):
        stepped(net, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0.5


def warned(change, loss=F.cross_entropy, steps=40):
    """(the warnings of a training whose gradients are changed before a step, its losses)."""
    torch.manual_seed(0)
    net, labels = chain(8, 16, 3), torch.arange(32) % 3
    optimizer, losses = SpectralAGD(net), []
    x = torch.randn(32, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss(net(x + 0.1 * torch.randn(32, 8)), labels)
            value.backward()
            change(net)
            optimizer.step()
            losses.append(value.item())
    return [str(x.message) for x in caught], losses


def test_guards():
    """A loss of another unit trains all the same; each is said once."""
    said, losses = warned(lambda net: None)
    assert said == [] and losses[-1] < 0.9 * losses[0]
    said, losses = warned(lambda net: None, lambda y, t: 1e5 * F.cross_entropy(y, t))
    assert len(said) == 1 and "over 1,000" in said[0]
    assert losses[-1] < 0.9 * losses[0] and math.isfinite(losses[-1])
    said, _ = warned(lambda net: None, lambda y, t: F.cross_entropy(y, t) / 1e3)
    assert len(said) == 1 and "divided by more" in said[0]
    said, _ = warned(lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.05))
    assert len(said) == 1 and "clipped" in said[0]


# Batch norm


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


def test_a_network_without_batch_norm_is_not_run():
    net = chain(8, 3)
    net.forward = lambda x: pytest.fail("the network ran")
    agd.recalibrate(net, [torch.randn(2, 8)])


# It trains


def test_its_average_beats_adam_on_digits():
    """Loss at X after three epochs, and Adam's at the better of two rates on the same batches."""
    data = load("digits", None, 64, 400, torch.device("cpu"))
    (images, labels), *_ = data.test

    def run(make):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), *chain(64, 64, 64, 64, 10))
        optimizer = make(net)
        for epoch in (1, 2, 3):
            data.train.set_epoch(epoch)
            for x, y in data.train:
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        if isinstance(optimizer, SpectralAGD):
            optimizer.eval()
        with torch.no_grad():
            return F.cross_entropy(net(images), labels).item()

    adam = [run(lambda net, lr=lr: torch.optim.Adam(net.parameters(), lr=lr))
            for lr in (3e-3, 1e-2)]  # fmt: skip
    assert run(SpectralAGD) < min(adam)


@pytest.mark.parametrize("broken", ["shape", "missing"])
def test_a_state_of_other_shapes_is_refused(broken):
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = SpectralAGD(net, depth=2)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    if broken == "shape":
        state["state"][0]["z"] = state["state"][0]["z"].T.contiguous()
    else:
        del state["state"][0]["m"]
    with pytest.raises(ValueError, match="not of these parameters"):
        SpectralAGD(net, depth=2).load_state_dict(state)


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                         nn.Linear(128, 5))  # fmt: skip


def steps_of(net, optimizer, count, x):
    for _ in range(count):
        optimizer.zero_grad()
        (net(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("through", ["network", "state"])
def test_another_memory_format_goes_on(through):
    """Of a network that changes it between steps, or that a state of the other one is loaded to."""
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net, twin = convolutional(), convolutional()
    optimizer, other = SpectralAGD(net), SpectralAGD(twin)
    steps_of(net, optimizer, 3, x)
    if through == "network":
        steps_of(twin, other, 3, x)
        twin.to(memory_format=torch.channels_last)
    else:
        twin.to(memory_format=torch.channels_last).load_state_dict(net.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = twin[2].weight.detach().clone()
    steps_of(net, optimizer, 5, x), steps_of(twin, other, 5, x)
    assert not torch.equal(twin[2].weight, before)
    for p, q in zip(net.parameters(), twin.parameters()):
        assert torch.allclose(p, q, atol=1e-5)
        for key in ("z", "m"):
            assert torch.allclose(optimizer.state[p][key], other.state[q][key], atol=1e-5)


def test_a_frozen_head_leaves_the_layers_before_it_held():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[4].requires_grad_(False)
    optimizer = SpectralAGD(net)
    steps_of(net, optimizer, 2, torch.randn(4, 6))
    assert all(optimizer.state[net[i].weight]["held"].all() for i in (0, 2))


def test_a_product_with_a_constant_is_no_layer():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(16, 4), nn.Linear(8, 16)
            self.register_buffer("D", torch.eye(4))

        def forward(self, x):
            return self.head(self.body(x).relu()) @ self.D

    net = Fixed()
    optimizer = SpectralAGD(net)
    steps_of(net, optimizer, 1, torch.randn(4, 8))
    assert not optimizer.state[net.head.weight]["held"].any()
    assert optimizer.state[net.body.weight]["held"].all()


def test_a_head_that_the_first_pass_does_not_reach_is_free():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x, head="a"):
            return getattr(self, head)(self.body(x).relu())

    net = Heads()
    optimizer = SpectralAGD(net)
    steps_of(net, optimizer, 1, torch.randn(4, 8))
    net(torch.randn(4, 8), "b").square().mean().backward()
    optimizer.step()
    assert not optimizer.state[net.b.weight]["held"].any()


def test_the_copy_of_16_bits_goes_with_them():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16()
    optimizer, x = SpectralAGD(net, depth=2), torch.randn(4, 8)
    steps_of(net, optimizer, 2, x.bfloat16())
    steps_of(net.float(), optimizer, 20, x)
    assert "weights" not in optimizer.state[net[0].weight]
    before = net.bfloat16()[0].weight.detach().clone()
    steps_of(net, optimizer, 1, x.bfloat16())
    assert (net[0].weight - before).abs().max() < 0.05


def test_without_a_batch_nothing_is_recalibrated():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net(torch.randn(8, 4))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        agd.recalibrate(net, [])
    assert all(torch.equal(x, before[key]) for key, x in net.state_dict().items())
