"""Any network: blocks and s of every role, what is measured, L, what is refused, the warnings."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrizations

from agd import AGD, depth, init_weights
from architecture import build
from tests.test_backends import BACKENDS, DTYPES, bits, near, relative, select
from training.losses import mse


class Every(nn.Module):
    """A parameter of every role."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 36)
        self.pos = nn.Parameter(torch.randn(1, 7, 36))
        self.attention = nn.MultiheadAttention(36, 3, batch_first=True)
        self.norm = nn.LayerNorm(36)
        self.lstm = nn.LSTM(36, 10, proj_size=6)
        self.gru = nn.GRU(6, 8)
        self.conv = nn.Conv1d(8, 12, 3, groups=4)
        self.depthwise = nn.Conv1d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose1d(12, 6, 4, stride=2, groups=2)
        self.batch_norm = nn.BatchNorm1d(6)
        self.slope = nn.PReLU()
        self.last = nn.Linear(6, 5)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, i):
        x = self.embedding(i) + self.pos
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.gru(self.lstm(x)[0])[0].mT
        x = self.slope(self.batch_norm(self.up(self.depthwise(self.conv(x)))))
        return self.last(x.mean(-1)) * self.temperature


INPUTS = torch.arange(21).view(3, 7) * 5 % 31


def blocks_of(net):
    """{name: (list of the views that are blocks, s by the table)}, line by line."""
    found = {}

    def put(name, views, s):
        found[name] = list(views), s

    put("embedding.weight", net.embedding.weight, 6.0)
    put("pos", net.pos[0], 6.0)
    put("attention.in_proj_weight", net.attention.in_proj_weight.split(36), 1.0)
    put("attention.in_proj_bias", [net.attention.in_proj_bias], 1.0)
    put("attention.out_proj.weight", [net.attention.out_proj.weight], 1.0)
    put("attention.out_proj.bias", [net.attention.out_proj.bias], 1.0)
    for layer in ("norm", "batch_norm"):
        put(f"{layer}.weight", [getattr(net, layer).weight], 1.0)
        put(f"{layer}.bias", [getattr(net, layer).bias], 1.0)
    lstm, gru = net.lstm, net.gru
    for name, inputs in (("ih", 36), ("hh", 6)):
        put(f"lstm.weight_{name}_l0", getattr(lstm, f"weight_{name}_l0").split(10),
            math.sqrt(10 / inputs))  # fmt: skip
        put(f"lstm.bias_{name}_l0", [getattr(lstm, f"bias_{name}_l0")], math.sqrt(10 / inputs))
    put("lstm.weight_hr_l0", [lstm.weight_hr_l0], math.sqrt(6 / 10))
    for name, inputs in (("ih", 6), ("hh", 8)):
        put(f"gru.weight_{name}_l0", getattr(gru, f"weight_{name}_l0").split(8),
            math.sqrt(8 / inputs))  # fmt: skip
        put(f"gru.bias_{name}_l0", [getattr(gru, f"bias_{name}_l0")], math.sqrt(8 / inputs))
    for layer, groups, s in (("conv", 4, (3 / 2 / 3) ** 0.5), ("depthwise", 12, (1 / 3) ** 0.5)):
        weight = getattr(net, layer).weight
        size = len(weight) // groups
        put(f"{layer}.weight", [weight[g * size : (g + 1) * size, :, k]
                                for g in range(groups) for k in range(3)], s)  # fmt: skip
        put(f"{layer}.bias", [getattr(net, layer).bias], s)
    # (in, out / groups, positions); two of the four positions meet in an output
    s = math.sqrt(3 / 6 / 2)
    halves = net.up.weight.split(6)
    put("up.weight", [half[:, :, k] for half in halves for k in range(4)], s)
    put("up.bias", [net.up.bias], s)
    put("slope.weight", [net.slope.weight], 0.25)
    put("last.weight", [net.last.weight], math.sqrt(5 / 6))
    put("last.bias", [net.last.bias], math.sqrt(5 / 6))
    put("temperature", [net.temperature], 2.0)
    return found


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    select(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_every_role(backend, dtype):
    """Each block moves by eta / L times s along its gradient; a zero one keeps every bit."""
    torch.manual_seed(0)
    net = Every().to(dtype)
    init_weights(net, torch.Generator().manual_seed(1))
    blocks, weights = blocks_of(net), dict(net.named_parameters())
    assert blocks.keys() == weights.keys()
    optimizer = AGD(net, depth=7)
    for p in weights.values():
        p.grad = torch.randn(p.shape, dtype=torch.float64).mul(0.1).to(dtype)
    net.embedding.weight.grad[5:40] = 0
    net.conv.weight.grad[3:6, :, 1] = 0
    before = {name: p.detach().clone() for name, p in weights.items()}
    table = dict(zip(weights, optimizer.rules[0]))
    G, expected = 0.0, {}
    for name, (views, s) in blocks.items():
        s = s if name not in ("slope.weight", "temperature") else table[name].s
        assert table[name].s == near(s, rel=DTYPES[dtype] if dtype == torch.bfloat16 else 1e-6)
        twin = weights[name].grad.double()
        gradients = blocks_of_like(net, name, twin)
        assert len(gradients) == len(views)
        G += sum(table[name].s * g.norm().item() for g in gradients) / 7
    eta = math.log((1 + math.sqrt(1 + 4 * G)) / 2)
    for name, (_, _) in blocks.items():
        moved = before[name].double().clone()
        grads = blocks_of_like(net, name, weights[name].grad.double())
        for block, g in zip(blocks_of_like(net, name, moved), grads):
            if g.norm():
                block -= eta / 7 * table[name].s * g / g.norm()
        expected[name] = moved
    optimizer.step()
    assert optimizer.G.item() == near(G, rel=1e-6) and optimizer.eta.item() == near(eta, rel=1e-6)
    for name, p in weights.items():
        assert relative(p.detach(), expected[name]) < DTYPES[dtype], name
    for part in (slice(5, 40),):
        assert torch.equal(bits(net.embedding.weight[part]), bits(before["embedding.weight"][part]))
    assert torch.equal(bits(net.conv.weight[3:6, :, 1]), bits(before["conv.weight"][3:6, :, 1]))


def blocks_of_like(net, name, x):
    """The blocks of a tensor like a parameter, as views of it."""
    twin = copy.copy(net)
    twin._modules = {key: copy.copy(module) for key, module in net._modules.items()}
    holder, _, own = name.rpartition(".")
    module = twin
    for part in holder.split(".") if holder else []:
        child = copy.copy(getattr(module, part))
        child._modules = dict(child._modules)
        module._modules[part] = child
        module = child
    module._parameters = {**module._parameters, own: x}
    return blocks_of(twin)[name][0]


def test_measured_and_table_agree_after_init_weights():
    """But for gains outside of norm layers, which keep what they have."""
    net = Every()
    init_weights(net, torch.Generator().manual_seed(0))
    for (name, p), rule in zip(net.named_parameters(), AGD(net).rules[0]):
        if name not in ("slope.weight", "temperature"):
            s = blocks_of(net)[name][1]
            assert rule.s == near(s, rel=1e-5), name
            again = rule.blocks(p.shape)[2]
            assert rule.role == "bias" or again == near(s, rel=1e-5)
        else:
            assert rule.s == near(p.item(), rel=1e-6)
    assert net.slope.weight.item() == 0.25 and (net.norm.weight == 1).all()
    assert not net.norm.bias.any() and not net.last.bias.any()


def test_s_is_measured_from_kept_weights_and_zero_takes_the_roles():
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[1].weight.fill_(0.5)
        net[2].weight.zero_()
    s = [rule.s for rule in AGD(net).rules[0]]
    spectrum = torch.linalg.svdvals(net[0].weight.detach())
    measured = spectrum.square().mean().sqrt().item()
    assert s == pytest.approx([measured, measured, 0.5, 0.5, (4 / 6) ** 0.5, (4 / 6) ** 0.5])


@pytest.mark.parametrize("arch", ["fcn", "vgg"])
def test_a_network_is_its_parameters_where_it_is_a_chain_without_biases(arch):
    torch.manual_seed(0)
    net = build(arch, (3, 32, 32), 10, depth=4, width=64)
    init_weights(net, torch.Generator().manual_seed(0))
    twin = copy.deepcopy(net)
    init_weights(twin.parameters(), torch.Generator().manual_seed(0))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))
    one, other = AGD(net), AGD(twin.parameters())
    x = torch.randn(4, 3, 32, 32)
    for _ in range(3):
        for n, optimizer in ((net, one), (twin, other)):
            optimizer.zero_grad()
            (n(x) - 1).square().mean().backward()
            optimizer.step()
        assert one.L == other.L == len(list(net.parameters()))
        assert one.eta.item() == near(other.eta.item(), rel=1e-5)
    assert all(relative(p, q) < 1e-5 for p, q in zip(net.parameters(), twin.parameters()))


def test_one_dimensional_tensors_by_name_and_by_place():
    """The bias of a layer has its s; others are gains; none counts in L."""
    net = nn.Sequential(nn.Linear(8, 2), nn.LayerNorm(2), nn.Conv1d(2, 2, 3), nn.PReLU())
    s = (2 / 8) ** 0.5, (2 / 2 / 3) ** 0.5
    roles = ["matrix", "bias", "gain", "gain", "kernel", "bias", "gain"]
    for params in (net.named_parameters(), net.parameters()):
        optimizer = AGD(params)
        (rules,) = optimizer.rules
        assert [x.role for x in rules] == roles and optimizer.L == 2
        assert [rules[1].s, rules[5].s] == pytest.approx(s)
    (rules,) = AGD([net[2].bias, net[0].weight, net[2].weight, net[0].bias]).rules
    assert [x.role for x in rules] == ["gain", "matrix", "kernel", "bias"]
    assert rules[3].s == pytest.approx(s[1])  # of the weight right in front of it


class Residual(nn.Module):
    def __init__(self, branches, width=8):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList(nn.Linear(width, width) for _ in range(branches))

    def forward(self, x):
        x = self.first(x)
        for branch in self.branches:
            x = x + branch(x.relu())
        return self.last(x)


def test_depth_is_the_mean_number_of_weights_on_a_path():
    """The nth branch on a stream has 1 / (n + 1) of it, beside the first layer and the last."""
    x = torch.randn(4, 8)
    for R in (1, 3, 7):
        net = Residual(R)
        shares = depth(net, x)
        assert sum(shares.values()) == pytest.approx(2 + sum(1 / n for n in range(2, R + 2)))
        assert shares[f"branches.{R - 1}.weight"] == pytest.approx(1 / (R + 1))
        assert not any("bias" in name for name in shares)
    tied = Residual(1)
    tied.branches[0].weight = tied.first.weight
    assert depth(tied, x) == pytest.approx({"first.weight": 1.5, "last.weight": 1.0})
    net = Residual(3)
    for p in net.branches.parameters():
        p.requires_grad_(False)
    assert sum(depth(net, x).values()) == pytest.approx(2)
    with pytest.raises(ValueError, match="no depth"):
        depth(nn.Flatten(), x)


def test_depth_through_parametrizations():
    """A weight that is made of others, their norms or their products, is one weight."""
    for kind in (parametrizations.weight_norm, parametrizations.spectral_norm,
                 parametrizations.orthogonal):  # fmt: skip
        net = nn.Sequential(kind(nn.Linear(6, 6)), nn.ReLU(), kind(nn.Linear(6, 6)))
        assert sum(depth(net, torch.randn(2, 6)).values()) == pytest.approx(2), kind


def test_depth_keeps_the_network():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    depth(net, torch.randn(8, 4, generator=torch.Generator()))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert torch.equal(random, torch.get_rng_state())


def stepped(net, optimizer, x=None):
    optimizer.zero_grad()
    net(torch.randn(4, 8) if x is None else x).square().mean().backward()
    optimizer.step()


def test_depth_is_read_from_the_first_forward_pass_with_a_graph():
    net = Residual(3)
    optimizer = AGD(net)
    assert optimizer.L == 5 and "not read yet" in optimizer.table()
    with torch.no_grad():
        net(torch.randn(4, 8))
    assert optimizer.L == 5
    stepped(net, optimizer)
    assert optimizer.L == pytest.approx(2 + 1 / 2 + 1 / 3 + 1 / 4) and not net._forward_hooks
    assert "not read yet" not in repr(optimizer)
    other = AGD(net, depth=depth(net, torch.randn(4, 8)))
    assert other.L == optimizer.L and not net._forward_hooks
    assert AGD(net, depth=3.5).L == 3.5
    for wrong in (0, -1, math.inf, "deep"):
        with pytest.raises(ValueError, match="depth"):
            AGD(net, depth=wrong)


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "no forward pass"])
def test_a_depth_that_cannot_be_read_is_the_count_and_said_once(how):
    net = model = Residual(2)
    if how == "compiled":
        model = torch.compile(net, backend="aot_eager")
    elif how == "checkpointed":
        from torch.utils.checkpoint import checkpoint

        forward = net.branches[0].forward
        net.branches[0].forward = lambda x: checkpoint(forward, x, use_reentrant=True)
    else:
        net(torch.randn(4, 8)).square().mean().backward()
    optimizer = AGD(model)
    with pytest.warns(UserWarning, match=r"agd\.depth"):
        optimizer.step() if how == "no forward pass" else stepped(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.L == 4
    torch._dynamo.reset()


def test_copies_of_a_network_that_is_waited_for():
    net = Residual(1)
    optimizer = AGD(net)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    twin(torch.randn(4, 8)).sum().backward()
    assert optimizer.L == 3
    net(torch.randn(4, 8))
    assert optimizer.L == pytest.approx(2.5)


def test_frozen_layers_and_those_that_are_unfrozen_later():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    optimizer = AGD(net)
    stepped(net, optimizer)
    assert optimizer.L == 1 and len(optimizer.rules[0]) == 2
    net[2].requires_grad_(True)
    optimizer.add_param_group({"params": net[2].parameters(), "gain": 0.5})
    assert [x.role for x in optimizer.rules[1]] == ["matrix", "bias"]
    assert optimizer.rules[1][0].s != near(1.0, rel=1e-3)  # measured, as of the others
    stepped(net, optimizer)
    assert optimizer.L == 2
    net[4].weight.grad = None
    optimizer.step()
    G = optimizer.G.item()
    net[4].requires_grad_(False)
    optimizer.step()
    assert optimizer.L == 1  # frozen later: left out with its share
    assert optimizer.G.item() == pytest.approx(2 * G)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_s_and_shares_go_with_the_state(way):
    """They are of the weights at the start, and those have moved since."""
    torch.manual_seed(0)
    net = Every()
    optimizer = AGD(net)
    for _ in range(3):
        stepped(net, optimizer, INPUTS)
    if way == "state_dict":
        twin = copy.deepcopy(net)
        other = AGD(twin)
        assert other.rules != optimizer.rules
        other.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    else:
        pair = net, optimizer
        twin, other = copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.rules == optimizer.rules and other.L == optimizer.L
    net.eval(), twin.eval()
    stepped(net, optimizer, INPUTS), stepped(twin, other, INPUTS)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters()))


def test_the_state_of_another_optimiser_is_refused():
    net = Residual(1)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        other = kind(net.parameters(), lr=0.1)
        stepped(net, other)
        with pytest.raises(ValueError, match="another optimiser"):
            AGD(net).load_state_dict(other.state_dict())


def test_what_has_no_place_in_the_signature_is_named():
    net = Residual(1)
    with pytest.raises(TypeError, match="2 positional"):
        AGD(net, 1e-3)
    with pytest.raises(TypeError, match="no learning rate; gain"):
        AGD(net, lr=0.1)
    with pytest.raises(TypeError, match="weight_decay"):
        AGD(net, weight_decay=0.1)
    for key, word in (("lr", "no learning rate"), ("betas", "betas"), ("momentum", "momentum")):
        with pytest.raises(ValueError, match=word):
            AGD([{"params": net.parameters(), key: 0.1}])


def test_roles_by_pattern():
    net = Every()
    optimizer = AGD(net, roles={"pos": "gain", "last.*": "rows", "gru.weight_ih*": "matrix",
                                "attention.in_proj_weight": "stacked 2"} | {"last.bias": "gain"})
    rules = dict(zip(dict(net.named_parameters()), optimizer.rules[0]))
    assert rules["pos"].role == "gain" and rules["last.weight"].role == "rows"
    assert rules["gru.weight_ih_l0"].parts == 1 and rules["attention.in_proj_weight"].parts == 2
    stepped(net, optimizer, INPUTS)
    for roles, word in (
        ({"poss": "rows"}, "poss"),
        ({"pos": "row"}, "matrix, stacked, kernel, rows"),
        ({"last.weight": "stacked 4"}, "last.weight"),
        ({"last.bias": "matrix"}, "last.bias"),
    ):
        with pytest.raises(ValueError, match=word):
            AGD(net, roles=roles)
    raw = nn.Module()
    raw.w = nn.Parameter(torch.randn(3, 5))
    (rule,) = AGD(raw, roles={"w": "transposed"}).rules[0]
    assert rule.blocks((3, 5))[2] == pytest.approx((5 / 3) ** 0.5)


def test_fused_qkv_is_three_matrices_where_it_is():
    net = nn.Module()
    net.qkv, net.other = nn.Linear(8, 24), nn.Linear(8, 24)
    rules = dict(zip(dict(net.named_parameters()), AGD(net).rules[0]))
    assert rules["qkv.weight"].parts == 3 and rules["other.weight"].parts == 1


def test_the_table_has_every_trainable_parameter_once():
    net = Every()
    net.last.requires_grad_(False)
    text = AGD(net, depth=6).table()
    assert text.splitlines()[0].split() == ["parameter", "shape", "role", "s", "share", "of", "L"]
    for word in ("embedding.weight", "stacked 3", "kernel 12", "transposed", "rows", "L = 6"):
        assert word in text
    number = len(list(net.parameters())) - 2
    assert "last.weight" not in text and f"{number} parameters" in text


def test_refusals_list_the_kinds_and_names():
    net = nn.Module()
    net.a, net.b = nn.Parameter(torch.zeros(3, 0)), nn.Parameter(torch.zeros(2, dtype=torch.cfloat))
    net.c = nn.LazyLinear(3)
    with pytest.raises(ValueError) as error:
        AGD(net)
    for word in ("4 tensors", "a of shape (3, 0), which has no elements", "b of shape (2,)",
                 "complex64", "c.weight, c.bias, which has no shape yet"):  # fmt: skip
        assert word in str(error.value), error.value


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_init_weights_scales_every_layer_to_an_output_of_rms_1(activation):
    torch.manual_seed(0)
    acts = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}[activation]
    layers = [nn.Conv2d(1, 4, 3), acts(), nn.Flatten()]
    for n in (144, 32, 32, 32):
        layers += [nn.Linear(n, 32), acts()]
    net, x = nn.Sequential(*layers, nn.BatchNorm1d(32), nn.Linear(32, 3)), torch.randn(64, 1, 8, 8)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    init_weights(net, torch.Generator().manual_seed(0), inputs=x)
    outputs = []
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(
                lambda m, i, out: outputs.append(out.square().mean().sqrt().item()))  # fmt: skip
    assert all(torch.equal(buffers[name], b) for name, b in net.named_buffers())
    net(x)
    assert outputs == pytest.approx([1.0] * 6, rel=1e-3)
    s = AGD(net).rules[0][0].s
    spectrum = net[0].weight.detach().square().sum().sqrt() / math.sqrt(9 * 1)
    assert s == pytest.approx(spectrum.item(), rel=1e-5)
    with pytest.raises(ValueError, match="pass it"):
        init_weights(net.parameters(), inputs=x)


def guarded(change, steps=40, net=None, loss=None, **options):
    """The warnings of a training of a small network, whose gradients are changed before a step."""
    torch.manual_seed(0)
    net = net or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, labels = AGD(net, **options), torch.arange(32) % 3
    scheduler = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            (loss or F.cross_entropy)(net(x), labels).backward()
            scheduler = change(net, optimizer, i, scheduler) or scheduler
            optimizer.step()
    return [str(x.message) for x in caught if "G" in str(x.message) or "lr" in str(x.message)]


def test_guards_say_once_what_the_gradients_show(backend):
    def nothing(net, optimizer, i, scheduler):
        return None

    def clip(net, optimizer, i, scheduler):
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)

    def schedule(net, optimizer, i, scheduler):
        if i == 3:
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1)
        elif i > 4:
            scheduler.step()
        return scheduler

    reads = backend != "elsewhere"  # a device without a way to read without a wait is not read
    assert guarded(nothing) == []
    said = guarded(clip)
    assert len(said) == reads and all("clipped" in x for x in said)
    (said,) = guarded(schedule)
    assert "scheduler has changed lr" in said
    said = guarded(nothing, loss=lambda y, t: F.cross_entropy(y, t, reduction="sum") * 1000)
    assert len(said) == reads and all("sum" in x for x in said)
    dead = nn.Sequential(*[x for _ in range(30) for x in (nn.Linear(8, 8, bias=False), nn.GELU())])
    init_weights(dead)
    said = guarded(nothing, net=dead, loss=lambda y, t: mse(y, t).mean())
    assert len(said) == reads and all("inputs=batch" in x for x in said)


def test_the_same_gradient_again_is_not_clipped():
    net = nn.Linear(8, 3)
    optimizer = AGD(net, depth=1)
    net(torch.randn(4, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(40):
            optimizer.step()


def test_weights_of_one_shape_that_take_turns_keep_their_roles():
    net = nn.ModuleDict({"e": nn.Embedding(8, 8), "l": nn.Linear(8, 8, bias=False)})
    one, grad = AGD(net, depth=2), torch.randn(8, 8)
    for moving, other in (("e", "l"), ("l", "e"), ("e", "l")):
        net[other].weight.grad, net[moving].weight.grad = None, grad
        one.step()
        fresh = AGD(net, depth=2, fused=False)
        s = one.rules[0][moving == "l"].s
        norms = grad.norm(dim=1).sum() if moving == "e" else grad.norm()
        assert one.G.item() == pytest.approx(s * norms.item() / 2, rel=1e-6) and fresh.L == 2


def test_a_state_of_before_the_first_forward_pass_says_nothing_of_L():
    """As Accelerate takes one, when it is given the optimiser."""
    net = Residual(1)
    optimizer = AGD(net)
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(net, optimizer)
    assert optimizer.L == pytest.approx(2.5)


def test_shares_by_name_and_through_wrappers():
    net = Residual(1)
    shares = depth(net, torch.randn(4, 8))
    wrapped = nn.DataParallel(net)
    assert AGD(wrapped, depth=shares).L == AGD(net.named_parameters(), depth=shares).L == 2.5
    for params in (net, net.named_parameters(), net.parameters()):
        with pytest.raises(ValueError, match="typo"):
            AGD(params, depth={"typo": 3})
    optimizer = AGD(net)
    net.last = nn.Sequential(net.last)  # another name by the time that it runs
    stepped(net, optimizer)
    assert optimizer.L == 2.5


def test_layers_that_the_network_gets_later():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    optimizer = AGD(net)
    stepped(net, optimizer)
    net.append(nn.Embedding(4, 8))
    net.append(nn.Linear(8, 3))
    optimizer.add_param_group({"params": net[2:].parameters()})
    assert [x.role for x in optimizer.rules[1]] == ["rows", "matrix", "bias"]
    del net[2]
    stepped(net, optimizer)
    assert optimizer.L == 2


def test_unnamed_vectors_that_are_constant_are_not_drawn():
    """A gain behind a convolution without a bias looks like its bias."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8))
    init_weights(net.parameters())
    assert (net[1].weight == 1).all() and not net[1].bias.any() and not net[2].bias.any()


def test_parametrizations_of_the_root_and_with_parameters_of_their_own():
    net = parametrizations.weight_norm(nn.Linear(4, 8))
    assert [x.role for x in AGD(net).rules[0]] == ["bias", "gain", "matrix"]

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 4))

        def forward(self, W):
            return W + self.A @ self.B

    net = nn.Sequential(nn.Linear(4, 8))
    nn.utils.parametrize.register_parametrization(net[0], "weight", LowRank())
    assert [x.role for x in AGD(net).rules[0]] == ["bias", "matrix", "rows", "rows"]


def test_made_in_inference_mode():
    net = Residual(1)
    with torch.inference_mode():
        optimizer = AGD(net)
    optimizer.load_state_dict(optimizer.state_dict())
    stepped(net, optimizer)
    net.last.weight.grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped == 1


def test_as_good_as_zero_is_zero():
    net = nn.Linear(8, 4)
    with torch.no_grad():
        net.weight.mul_(1e-4)
    assert AGD(net).rules[0][0].s == pytest.approx(0.5**0.5)


def test_a_module_without_a_forward_of_its_own_is_read_through_its_network():
    holder = nn.Module()
    holder.net = Residual(1)
    optimizer = AGD(holder)
    stepped(holder.net, optimizer)
    assert optimizer.L == 2.5


def test_init_weights_keeps_buffers_and_modes():
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    net[1].eval()
    init_weights(net, inputs=torch.randn(16, 8))
    assert net.training and not net[1].training and net[1].num_batches_tracked == 0
