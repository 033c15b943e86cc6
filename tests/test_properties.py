"""What the mathematics of a step says of every net, over shapes, strides, dtypes, scales, zeros,
missing gradients and gains that hypothesis chooses, for each backend of tests/test_backends.py."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from agd import AGD, init_weights
from tests.reference import matrices, reference_step
from tests.test_backends import BACKENDS, INTERPRETED, TORCH, select

# The same examples each time: what fails here fails everywhere, and nothing is kept on the disk.
PROPERTY = settings(
    derandomize=True, deadline=None, print_blob=True, max_examples=10 if INTERPRETED else 100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
WIDE, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(scope="module", params=BACKENDS)
def fused(request):
    """What AGD's `fused` has to be for each backend."""
    with pytest.MonkeyPatch.context() as patch:
        select(request.param, patch)
        yield False if request.param in TORCH else None


@dataclasses.dataclass
class Lying:
    """How a tensor lies in memory: its dimensions from the outermost, the distance of neighbours,
    and where its storage's first element is."""

    order: tuple
    step: int = 1
    start: int = 0

    def lay(self, x):
        """A copy of x that lies so, among NaN."""
        x = x.permute(self.order)
        room = torch.full((self.start + x.numel() * self.step,), math.nan, dtype=x.dtype)
        y = room[self.start :].view(*x.shape, self.step)[..., 0].copy_(x)
        return y.permute([self.order.index(i) for i in range(y.ndim)])


@dataclasses.dataclass(repr=False)
class Layer:
    """A weight and its gradient or None, how either lies, and the group that it is of."""

    W: torch.Tensor
    grad: torch.Tensor | None
    lying: Lying
    of_grad: Lying
    group: int

    def __repr__(self):
        size = self.grad if self.grad is None else f"up to {self.grad.abs().max():.0e}"
        return (f"Layer({tuple(self.W.shape)}, {self.W.dtype}, gradient {size}, {self.lying}, "
                f"{self.of_grad}, group {self.group})")  # fmt: skip

    def parameter(self):
        p = nn.Parameter(self.lying.lay(self.W))
        if self.grad is not None:
            p.grad = self.of_grad.lay(self.grad)
        return p


@dataclasses.dataclass
class Net:
    layers: list
    gains: list  # of the groups

    def optimizer(self, fused):
        """Over new parameters, those of the first group first."""
        groups = [
            {"params": [x.parameter() for x in self.layers if x.group == i],
             "gain": copy.copy(gain)} for i, gain in enumerate(self.gains)
        ]  # fmt: skip
        return AGD([group for group in groups if group["params"]], fused=fused)

    def replaced(self, **changes):
        """Another net, each layer with the fields f(layer)."""
        return Net([dataclasses.replace(x, **{name: f(x) for name, f in changes.items()})
                    for x in self.layers], self.gains)  # fmt: skip


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
def layings(draw, ndim, gaps=True):
    plain, last = tuple(range(ndim)), (0, *range(2, ndim), 1)
    order = draw(st.sampled_from([plain, plain, last, plain[::-1]]) | st.permutations(plain))
    step, start = draw(st.sampled_from([1, 1, 2] if gaps else [1])), draw(st.sampled_from([0, 3]))
    return Lying(tuple(order), step, start)


@st.composite
def tensors(draw, shape, dtype, exponents, kinds):
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
    if kind == "positions":
        x[..., torch.rand(shape[2:], generator=generator) < 0.5] *= 0
    lowest, highest = exponents
    if dtype == torch.float16:
        lowest, highest = max(lowest, -7), min(highest, 4)
    largest = torch.finfo(dtype).max
    scale = 10.0 ** draw(st.just(0) | st.integers(lowest, highest))
    return x.mul_(scale).clamp_(-largest, largest).to(dtype)


KINDS = ("normal", "normal", "constant", "sparse", "wide", "zero", "positions")
GAINS = (1.0, 1, 0.3, 0.0, 1e-30, 17.0, 1e20)


@st.composite
def nets(draw, dtypes=(*WIDE, *HALF), kinds=KINDS, gains=GAINS, exponents=(-38, 38), missing=True,
         largest=4, of=shapes):  # fmt: skip
    """A net of some layers in one or two groups. Half of them are such as kernels take: of float32
    without gaps, gradients that lie as their weights, gains that are numbers."""
    fast, layers = torch.float32 in dtypes and draw(st.booleans()), []
    usual = torch.float32 if fast else draw(st.sampled_from(dtypes))
    dtypes = st.sampled_from([usual] if fast or draw(st.booleans()) else dtypes)
    for _ in range(draw(st.integers(1, largest))):
        shape, dtype = draw(of), draw(dtypes)
        if layers and draw(st.booleans()):  # several of one shape
            shape = layers[-1].W.shape
        W = draw(tensors(shape, dtype, (-3, 3), ("normal", "zero", "positions")))
        none = missing and draw(st.integers(0, 7)) == 7
        grad = None if none else draw(tensors(shape, dtype, exponents, kinds))
        lying = draw(layings(len(shape), gaps=not fast))
        other = not fast and draw(st.booleans())
        of_grad = draw(layings(len(shape))) if other else lying
        layers.append(Layer(W, grad, lying, of_grad, draw(st.sampled_from([0, 0, 1]))))
    # A weight of float16 ends at 65504.
    gains = [x for x in gains if x < 100] if any(x.W.dtype in HALF for x in layers) else gains
    gains = st.sampled_from(gains)
    if not fast:
        gains |= gains.map(lambda x: torch.tensor(x, dtype=torch.float64))
    return Net(layers, [draw(gains), draw(gains)])


def everything(optimizer):
    """(weight, gain) for each weight of an optimiser."""
    return [(p, group["lr"]) for group in optimizer.param_groups for p in group["params"]]


def weights_of(optimizer):
    return [p for p, _ in everything(optimizer)]


def copies(optimizer):
    return [p.detach().clone() for p in weights_of(optimizer)]


def same(a, b):
    """Whether tensors, or lists of them, are the same to the bit."""
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    a, b = (x.detach().clone(memory_format=torch.contiguous_format) for x in (a, b))
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8),
                                              b.flatten().view(torch.uint8))  # fmt: skip


def near(a, b, rtol, atol=0.0):
    return abs(a - b) <= rtol * abs(b) + atol


def scale(shape):
    return math.sqrt(shape[0] / shape[1]) / math.sqrt(math.prod(shape[2:]))


def oracle(grads, gains):
    """(updates, G, eta) in float64: the mathematics, with eta in a form that keeps its digits."""
    norms = [g if g is None else torch.stack([m.norm() for m in matrices(g.double())])
             .view(g.shape[2:]) for g in grads]  # fmt: skip
    G = sum(scale(g.shape) * n.sum().item() for g, n in zip(grads, norms) if g is not None)
    G /= len(grads)
    eta = math.log1p(2 * G / (1 + math.sqrt(1 + 4 * G)))
    updates = []
    for g, n, gain in zip(grads, norms, gains):
        if g is not None:
            direction = torch.where(n > 0, g.double() / torch.where(n > 0, n, 1), 0)
            g = float(gain) * eta / len(grads) * scale(g.shape) * direction
        updates.append(g)
    return updates, G, eta


def step_and_check(optimizer):
    """A step, held to all that is promised of it."""
    pairs = everything(optimizer)
    before, grads = copies(optimizer), [p.grad for p, _ in pairs]
    kept = [g if g is None else g.clone() for g in grads]
    strides, skipped = [p.stride() for p, _ in pairs], optimizer.skipped.item()
    finite = all(g.isfinite().all() for g in grads if g is not None)
    optimizer.step()

    assert [p.stride() for p, _ in pairs] == strides
    assert all(g is None or same(g, k) for g, k in zip(grads, kept))
    assert optimizer.skipped.item() == skipped + (not finite)
    eta = optimizer.eta.item()
    if not finite:
        assert math.isnan(eta)
        assert same(copies(optimizer), before)
        return
    updates, G, exact = oracle(grads, [gain for _, gain in pairs])
    double = all(p.dtype == torch.float64 for p, _ in pairs)
    rtol = 1e-12 if double else 1e-6  # eta is one for all layers
    assert near(optimizer.G.item(), G, rtol)
    assert near(eta, exact, rtol)
    if exact > 0:  # each update to the precision of its own dtype, at the eta that was taken
        updates = [x if x is None else x * (eta / exact) for x in updates]
    # log((1 + sqrt(1 + 4G)) / 2) is the root of exp(eta) (exp(eta) - 1) = G
    assert eta >= 0 and near(math.exp(eta) * math.expm1(eta), optimizer.G.item(), 1e-12)
    for (p, gain), old, update in zip(pairs, before, updates):
        still = torch.ones(p.shape[2:], dtype=torch.bool)
        if update is not None and gain > 0:
            still = (update == 0).all(0).all(0)  # a zero gradient, or a step too small for float64
        assert same(p[..., still], old[..., still])
        if update is None:
            continue
        # The update is right to its working precision, which has a smallest number, and then the
        # new weight is rounded.
        work = torch.finfo(torch.promote_types(p.dtype, torch.float32))
        smallest = work.tiny * work.eps
        factor = float(gain) * exact * scale(p.shape)
        new = old.double() - update
        bound = (2e-12 if p.dtype == torch.float64 else 2e-6) * update.abs()
        bound += torch.finfo(p.dtype).eps * new.abs() + smallest * (2 + factor)
        bound += torch.finfo(p.dtype).tiny * torch.finfo(p.dtype).eps
        wrong = (p.double() - new).abs() > bound
        assert not wrong.any(), (p.double()[wrong], new[wrong], update[wrong])


@PROPERTY
@given(nets(dtypes=WIDE, kinds=("normal", "sparse"), gains=(0.3,), exponents=(0, 3)))
def test_the_oracle_is_the_transcribed_paper(net):
    grads = [x.grad for x in net.layers]
    updates, G, eta = oracle(grads, [0.3] * len(grads))
    theirs, their_eta, their_G = reference_step([torch.zeros_like(x.W) for x in net.layers], grads,
                                                gain=0.3)  # fmt: skip
    assert near(G, their_G, 1e-12) and near(eta, their_eta, 1e-12)
    for update, V in zip(updates, theirs):
        torch.testing.assert_close(torch.zeros_like(V) if update is None else -update, V,
                                   rtol=1e-11, atol=0)  # fmt: skip


@PROPERTY
@given(net=nets())
def test_a_step_is_that_of_the_mathematics(fused, net):
    step_and_check(net.optimizer(fused))


EVENTS = ("nothing", "gradients", "expanded", "bad", "lose", "gain", "move", "turn", "weight")


@PROPERTY
@given(net=nets(), data=st.data())
def test_so_is_every_step_of_any_sequence(fused, net, data):
    """Gradients, gains, storage and layouts change between steps, and some gradients are bad."""
    optimizer = net.optimizer(fused)
    step_and_check(optimizer)
    gains = [x for x in GAINS if x < 100]
    for event in data.draw(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=5)):
        p = data.draw(st.sampled_from(weights_of(optimizer)))
        if event == "gradients":
            for p in weights_of(optimizer):
                p.grad = data.draw(tensors(p.shape, p.dtype, (-38, 38), KINDS))
        elif event == "expanded":  # one number, with strides of 0
            p.grad = torch.full((), 0.5, dtype=p.dtype).expand(p.shape)
        elif event == "bad":
            g = p.grad = torch.ones_like(p)
            where = [data.draw(st.integers(0, n - 1)) for n in g.shape]
            g[tuple(where)] = data.draw(st.sampled_from(BAD))
        elif event == "lose":
            p.grad = None
        elif event == "gain":
            group = data.draw(st.sampled_from(optimizer.param_groups))
            group["lr"] = data.draw(st.sampled_from(gains))
        elif event in ("move", "turn"):
            grad, p.grad = p.grad, None
            there = data.draw(layings(p.ndim, gaps=event == "move")).lay(p.detach())
            whole = p.numel() == 1 + sum((n - 1) * k for n, k in zip(p.shape, p.stride()))
            if event == "turn" and whole:  # the same memory, read in another order
                there = p.detach().as_strided(p.shape, there.stride())
            p.data, p.grad = there, grad
        elif event == "weight":
            p.data.mul_(0.5)
        step_and_check(optimizer)


@PROPERTY
@given(net=nets(dtypes=WIDE))
def test_an_update_is_as_large_as_eta_says(fused, net):
    """Its Frobenius norm is eta/L s gain sqrt(positions that move), whatever the gradient's."""
    optimizer = net.replaced(W=lambda x: torch.zeros_like(x.W)).optimizer(fused)
    optimizer.step()
    L = len(net.layers)
    for p, gain in everything(optimizer):
        moving = 0 if p.grad is None else sum(bool(m.any()) for m in matrices(p.grad))
        size = optimizer.eta.item() / L * scale(p.shape) * float(gain) * math.sqrt(moving)
        smallest = torch.finfo(p.dtype).tiny * torch.finfo(p.dtype).eps
        rtol = 1e-6 if p.dtype == torch.float32 else 1e-12  # to the eta that was taken
        room = math.sqrt(p.numel()) * smallest * (2 + size)
        assert near(p.double().norm().item(), size, rtol, room)


@PROPERTY
@given(
    net=nets(WIDE, ("normal", "constant", "positions"), gains=(1.0,), exponents=(-9, 9)),
    exponent=st.floats(-12, 12),
)
def test_a_scale_of_all_gradients_is_that_of_G_and_no_direction(fused, net, exponent):
    c = 10.0**exponent
    net = net.replaced(W=lambda x: torch.zeros_like(x.W))
    scaled = net.replaced(grad=lambda x: None if x.grad is None else x.grad * c)
    one, other = net.optimizer(fused), scaled.optimizer(fused)
    one.step()
    other.step()
    assert near(other.G.item(), c * one.G.item(), 2e-6)
    if abs(exponent) > 1e-3 and one.G > 0:
        assert (other.eta > one.eta) == (c > 1)
    for p, q in zip(weights_of(one), weights_of(other)):
        p, q = p.double() / one.eta.clamp_min(1e-99), q.double() / other.eta.clamp_min(1e-99)
        assert (p - q).norm() <= 4e-6 * p.norm()


@PROPERTY
@given(net=nets(dtypes=WIDE), data=st.data())
def test_order_groups_memory_and_the_names_of_positions_change_nothing(fused, net, data):
    """The layers in another order, in groups of their own, lying otherwise, kernels transposed."""
    net = net.replaced(W=lambda x: torch.zeros_like(x.W))
    turned, turns = [], []
    for i, x in enumerate(net.layers):
        turn = (0, 1, *data.draw(st.permutations(range(2, x.W.ndim))))
        turns.append(turn)
        turned.append(Layer(
            x.W.permute(turn), x.grad if x.grad is None else x.grad.permute(turn),
            data.draw(layings(x.W.ndim)), data.draw(layings(x.W.ndim)), i,
        ))  # fmt: skip
    order = data.draw(st.permutations(range(len(turned))))
    gains = [float(net.gains[x.group]) for x in net.layers]
    one, other = net.optimizer(fused), Net(turned, gains)
    other = Net([dataclasses.replace(turned[i], group=j) for j, i in enumerate(order)],
                [gains[i] for i in order]).optimizer(fused)  # fmt: skip
    one.step()
    other.step()
    tolerance = {"rtol": 2e-6, "atol": 0}
    torch.testing.assert_close(one.G, other.G, **tolerance)
    torch.testing.assert_close(one.eta, other.eta, **tolerance)
    # The first lists the layers by their groups.
    first = sorted(range(len(order)), key=lambda i: net.layers[i].group)
    ours, theirs = dict(zip(first, weights_of(one))), dict(zip(order, weights_of(other)))
    for i, turn in enumerate(turns):
        W = ours[i].permute(turn)
        smallest = torch.finfo(W.dtype).tiny * torch.finfo(W.dtype).eps
        largest = one.eta.item() * scale(W.shape) * gains[i]
        torch.testing.assert_close(theirs[i], W, rtol=2e-6, atol=smallest * (2 + largest))


def tied(draw, params):
    """A list of the same tensors, some of them again behind their first place."""
    listed = list(params)
    for p in draw(st.lists(st.sampled_from(params), max_size=3)):
        first = next(i for i, x in enumerate(listed) if x is p)
        listed.insert(draw(st.integers(first + 1, len(listed))), p)
    return listed


def copied(p):
    """The same weight and gradient in other memory, lying as they do."""
    twin = nn.Parameter(torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(p))
    twin.grad = p.grad
    return twin


@PROPERTY
@given(net=nets(gains=(1.0, 0.3)), data=st.data())
def test_a_weight_that_is_listed_often_is_one_layer(fused, net, data):
    """Where it is first, with one draw."""
    once = net.optimizer(fused)
    groups = [{"params": tied(data.draw, [copied(p) for p in group["params"]]),
               "gain": group["lr"]} for group in once.param_groups]  # fmt: skip
    often = AGD(groups, fused=fused)
    for optimizer in (often, once):
        optimizer.step()
    assert same([*copies(often), often.G, often.eta], [*copies(once), once.G, once.eta])
    for params in (tied(data.draw, weights_of(often)), weights_of(once)):
        init_weights(params, torch.Generator().manual_seed(0))
    assert same(copies(often), copies(once))


@PROPERTY
@given(net=nets(missing=False), data=st.data())
def test_a_bad_value_anywhere_changes_no_bit_and_nothing_later(fused, net, data):
    optimizer, twin = net.optimizer(fused), net.optimizer(fused)
    if data.draw(st.booleans()):
        optimizer.step()  # with a plan of before
        twin.step()
    before, gradients = copies(optimizer), [p.grad for p in weights_of(optimizer)]
    for _ in range(2):
        p = data.draw(st.sampled_from(weights_of(optimizer)))
        p.grad = p.grad.clone()
        where = [data.draw(st.integers(0, n - 1)) for n in p.shape]
        p.grad[tuple(where)] = data.draw(st.sampled_from(BAD))
    optimizer.step()
    assert same(copies(optimizer), before)
    assert math.isnan(optimizer.eta.item())
    assert optimizer.skipped.item() == 1
    for p, g in zip(weights_of(optimizer), gradients):
        p.grad = g
    optimizer.step()
    twin.step()
    assert same([*copies(optimizer), optimizer.G, optimizer.eta], [*copies(twin), twin.G, twin.eta])
    assert optimizer.skipped.item() == 1


@PROPERTY
@given(net=nets(gains=(1.0, 0.3)), tensor=st.booleans())
def test_a_gain_of_nothing_freezes_every_bit_and_still_counts(fused, net, tensor):
    other = dataclasses.replace(net, gains=[torch.tensor(0.0) if tensor else 0.0, net.gains[1]])
    free, frozen = net.optimizer(fused), other.optimizer(fused)
    assume(len(frozen.param_groups) == 2 or net.layers[0].group == 0)
    before = copies(frozen)
    free.step()
    frozen.step()
    torch.testing.assert_close([frozen.G, frozen.eta], [free.G, free.eta], rtol=1e-6, atol=0)
    n = len(frozen.param_groups[0]["params"])
    assert same(copies(frozen)[:n], before[:n])
    for W, V, old in zip(copies(frozen)[n:], copies(free)[n:], before[n:]):
        eps = torch.finfo(W.dtype).eps
        bound = 2e-6 * (V.double() - old.double()).abs() + 2 * eps * (V.double().abs() + 1e-30)
        assert ((W.double() - V.double()).abs() <= bound).all()


@PROPERTY
@given(net=nets(), way=st.sampled_from(["state", "deepcopy", "pickle"]), bad=st.booleans())
def test_saved_and_copied_optimisers_go_on_to_the_same_bits(fused, net, way, bad):
    if way == "deepcopy":  # torch closes the gaps in a copied weight, which may then go faster
        net = net.replaced(lying=lambda x: dataclasses.replace(x.lying, step=1))
    optimizer = net.optimizer(fused)
    if bad:
        optimizer.param_groups[0]["params"][0].grad = None
        optimizer.step()
        optimizer.param_groups[0]["params"][0].grad = torch.full_like(
            optimizer.param_groups[0]["params"][0], math.nan)  # fmt: skip
    optimizer.step()
    if way == "state":
        file = io.BytesIO()
        torch.save([optimizer.state_dict(), copies(optimizer)], file)
        state, values = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        other = net.optimizer(fused)
        other.load_state_dict(state)
        with torch.no_grad():
            for p, x in zip(weights_of(other), values):
                p.copy_(x)
    else:
        other = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(
            pickle.dumps(optimizer))  # fmt: skip
        assert same([other.G, other.eta], [optimizer.G, optimizer.eta])
    assert other.skipped.item() == optimizer.skipped.item() == bad
    for i in range(3):
        for p, q in zip(weights_of(optimizer), weights_of(other)):
            generator = torch.Generator().manual_seed(i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert same([*copies(optimizer), optimizer.eta], [*copies(other), other.eta])
    assert other.skipped.item() == optimizer.skipped.item() == bad


@PROPERTY
@given(net=nets(), start=st.integers(1, 9))
def test_the_same_inputs_give_the_same_bits(fused, net, start):
    """Wherever their storage begins."""

    def moved(lying):
        return dataclasses.replace(lying, start=lying.start + start)

    one = net.optimizer(fused)
    other = net.replaced(lying=lambda x: moved(x.lying), of_grad=lambda x: moved(x.of_grad))
    other = other.optimizer(fused)
    one.step()
    other.step()
    assert same([*copies(one), one.G, one.eta], [*copies(other), other.G, other.eta])


@st.composite
def blanks(draw):
    """Weights that are to be drawn: (shape, dtype, how it lies) each."""
    drawn = [(draw(shapes), draw(st.sampled_from([*WIDE, *HALF])))
             for _ in range(draw(st.integers(1, 4)))]  # fmt: skip
    return [(shape, dtype, draw(layings(len(shape)))) for shape, dtype in drawn]


@PROPERTY
@given(blanks(), st.integers(0, 2**40), st.data())
def test_a_draw_is_semi_orthogonal_and_its_generators_alone(drawn, seed, data):
    """Also whatever the dtype, but for its rounding, the layout and what is listed behind."""

    def draw(drawn, dtype=None):
        empty = [lying.lay(torch.full(shape, math.nan, dtype=dtype or own))
                 for shape, own, lying in drawn]  # fmt: skip
        init_weights(empty, torch.Generator().manual_seed(seed))
        return empty

    exact, state = draw(drawn, torch.float64), torch.get_rng_state()
    for W in exact:
        s, (outputs, inputs) = scale(W.shape), W.shape[:2]
        for m in matrices(W)[:40]:
            gram = m @ m.mT if outputs < inputs else m.mT @ m
            torch.testing.assert_close(gram, s * s * torch.eye(len(gram), dtype=torch.float64),
                                       rtol=0, atol=1e-11 * s * s)  # fmt: skip
            if len(gram) <= 16:
                values = torch.linalg.svdvals(m)
                torch.testing.assert_close(values, torch.full_like(values, s), rtol=1e-11, atol=0)
    assert same(draw(drawn), [W.to(dtype) for W, (_, dtype, _) in zip(exact, drawn)])
    dense = [(shape, dtype, Lying(tuple(range(len(shape))))) for shape, dtype, _ in drawn]
    assert same(draw(dense, torch.float64), exact)
    n = data.draw(st.integers(1, len(drawn)))
    for W, V in zip(draw(drawn[:n], torch.float64), exact):
        torch.testing.assert_close(W, V, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
