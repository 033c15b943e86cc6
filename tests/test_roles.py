"""Any network: blocks and s of every role, what is measured, L, and the start of its weights."""

import copy
import math
import pickle
import re
import warnings

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrizations

from agd import AGD, SpectralAGD, depth, init_weights
from architecture import build
from tests.reference import eta_of, near, relative, same
from tests.stock import INPUTS, Every, role_of
from tests.test_backends import BACKENDS, DTYPES, select


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    select(request.param, monkeypatch)
    return request.param


def table(optimizer):
    """(name, role) of each line of str(optimizer), the names with * for numbers."""
    header, *rows, _ = str(optimizer).splitlines()[1:]
    start, end = header.index("role"), header.index(" s ")
    return [(row.split()[0], row[start:end].strip()) for row in rows]


def s_of(optimizer):
    """{name: s}, as the optimizer's state has it."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    return dict(zip(names, [x["s"] for x in optimizer.state_dict()["state"].values()]))


def blocks(x, role, parts):
    """The blocks of a parameter, as views of it."""
    if role == "rows":
        return list(x.view(-1, x.shape[-1]))
    if role == "kernel":
        return [part[..., k] for part in x.chunk(parts) for part in [part.flatten(2)]
                for k in range(part.shape[-1])]  # fmt: skip
    return list(x.chunk(parts)) if role == "stacked" else [x]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_every_role(backend, dtype):
    """Each block moves by eta / L times s along its gradient; a zero one keeps every bit. s is that
    of the table, after init_weights; gains outside of norm layers keep what they have."""
    torch.manual_seed(0)
    net = Every().to(memory_format=torch.contiguous_format).to(dtype)
    net.tall.weight.data = net.tall.weight.data.contiguous()
    init_weights(net, torch.Generator().manual_seed(1))
    assert net.slope.weight == 0.25 and net.temperature == 2 and (net.norm.weight == 1).all()
    assert not net.norm.bias.any() and not net.last.bias.any()
    optimizer, weights = AGD(net, depth=7), dict(net.named_parameters())
    scales, G, moved = s_of(optimizer), 0.0, {}
    for name, p in weights.items():
        own = {"slope.weight": 0.25, "temperature": 2.0}.get(name, role_of(name, p)[2])
        assert scales[name] == near(own, DTYPES[dtype] if dtype == torch.bfloat16 else 1e-5), name
        p.grad = torch.randn(p.shape, dtype=torch.float64).mul(0.1).to(dtype)
    net.embedding.weight.grad[5:15] = 0
    net.conv.weight.grad[6:, :, 1, 1] = 0
    cut = {name: role_of(name, p)[:2] for name, p in weights.items()}
    for name, p in weights.items():
        moved[name] = p.detach().double().clone()
        G += sum(scales[name] * g.norm().item() / 7 for g in blocks(p.grad.double(), *cut[name]))
    for name, p in weights.items():
        for block, g in zip(*(blocks(x, *cut[name]) for x in (moved[name], p.grad.double()))):
            block -= eta_of(G) / 7 * scales[name] * g / (g.norm() or 1)
    still = [net.embedding.weight[5:15].clone(), net.conv.weight[6:, :, 1, 1].clone()]
    optimizer.step()
    assert optimizer.G.item() == near(G, 1e-6) and optimizer.eta.item() == near(eta_of(G), 1e-6)
    for name, p in weights.items():
        assert relative(p.detach(), moved[name]) < DTYPES[dtype], name
    assert same(still, [net.embedding.weight[5:15], net.conv.weight[6:, :, 1, 1]])


def test_s_is_measured_from_kept_weights():
    """Of those at zero, or as good as zero, it is the role's; a bias has its layer's."""
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.mul_(3)
        net[1].weight.fill_(0.5)
        net[2].weight.zero_()
        net[3].weight.mul_(1e-4)
    measured = torch.linalg.svdvals(net[0].weight.detach()).square().mean().sqrt().item()
    s = [measured] * 2 + [0.5] * 2 + [(4 / 6) ** 0.5] * 2 + [(2 / 4) ** 0.5] * 2
    assert list(s_of(AGD(net)).values()) == pytest.approx(s)


@pytest.mark.parametrize("arch", ["fcn", pytest.param("vgg", marks=pytest.mark.slow)])
def test_a_chain_without_biases_is_its_parameters(arch):
    """The paper's rule either way: the same draw, depth and steps."""
    nets = [build(arch, (3, 32, 32), 10, depth=4, width=64) for _ in range(2)]
    init_weights(nets[0], torch.Generator().manual_seed(0))
    init_weights(nets[1].parameters(), torch.Generator().manual_seed(0))
    assert same(list(nets[0].parameters()), list(nets[1].parameters()))
    one, other, x = AGD(nets[0]), AGD(nets[1].parameters()), torch.randn(2, 3, 32, 32)
    for _ in range(2):
        for net, optimizer in zip(nets, (one, other)):
            optimizer.zero_grad()
            (net(x) - 1).square().mean().backward()
            optimizer.step()
        assert one.L == other.L == len(list(nets[0].parameters()))
        assert one.eta.item() == near(other.eta.item(), 1e-5)
    assert all(relative(p, q) < 1e-5 for p, q in zip(*(net.parameters() for net in nets)))


def test_vectors_by_name_and_by_place():
    """The bias of a layer has its s; others are gains; none counts in L."""
    net = nn.Sequential(nn.Linear(8, 2), nn.LayerNorm(2), nn.Conv1d(2, 2, 3), nn.PReLU())
    for params in (net.named_parameters(), net.parameters()):
        optimizer = AGD(params)
        roles = {role for _, role in table(optimizer)}
        assert optimizer.L == 2 and roles == {"matrix", "bias", "gain", "kernel"}
        assert re.search(r" bias +0\.5 to 0\.5774 +× 2", str(optimizer))
    # of the weight right in front of it, the kernel
    text = str(AGD([net[2].bias, net[0].weight, net[2].weight, net[0].bias]))
    assert re.search(r" bias +0\.5774", text) and re.search(r" gain +1", text)


def test_names_tell_what_is_no_weight():
    """Tensors that no layer calls a weight have the role that a network's would have; without names
    all have the paper's rule, and so have weights."""
    shapes = {"block.layer_scale": (96, 1, 1), "cls_token": (1, 1, 192), "logit_scale": (3, 1, 1),
              "pos_embedding": (1, 197, 192), "positions": (197, 192), "stacked": (5, 4, 8),
              "fc.parametrizations.weight.original0": (8, 1), "old.weight_g": (8, 1, 1),
              "fc.parametrizations.weight.original1": (8, 16), "old.weight_v": (8, 4, 3),
              "conv.weight": (4, 1, 1), "W": (4, 8)}  # fmt: skip
    pairs = [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]
    expected = ("gain rows gain rows rows rows gain gain matrix kernel kernel matrix").split()
    roles = [rule.role for _, _, rule in AGD(pairs)._each()]
    assert roles == expected
    net = nn.Module()
    for name, p in pairs:
        if "." not in name and name != "W":
            net.register_parameter(name, p)
    own = dict(table(AGD(net)))
    assert all(own[name] == dict(zip(shapes, expected))[name] for name in own)
    unnamed = {rule.role for _, _, rule in AGD([p for _, p in pairs])._each()}
    assert unnamed == {"matrix", "kernel"}


# Depth


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


def step(net, optimizer, x=None):
    optimizer.zero_grad()
    net(torch.randn(4, 8) if x is None else x).square().mean().backward()
    optimizer.step()


def test_depth_is_the_mean_number_of_weights_on_a_path():
    """The nth branch on a stream has 1 / (n + 1) of it, beside the first layer and the last."""
    x = torch.randn(4, 8)
    for R in (1, 3, 7):
        shares = depth(Residual(R), x)
        assert sum(shares.values()) == pytest.approx(2 + sum(1 / n for n in range(2, R + 2)))
        assert shares[f"branches.{R - 1}.weight"] == pytest.approx(1 / (R + 1))
        assert not any("bias" in name for name in shares)
    tied = Residual(1)
    tied.branches[0].weight = tied.first.weight
    assert depth(tied, x) == pytest.approx({"first.weight": 1.5, "last.weight": 1.0})
    net = Residual(3)
    net.branches.requires_grad_(False)
    assert sum(depth(net, x).values()) == pytest.approx(2)
    with pytest.raises(ValueError, match="no depth"):
        depth(nn.Flatten(), x)


def test_parametrizations_are_one_weight():
    for kind in (parametrizations.weight_norm, parametrizations.spectral_norm,
                 parametrizations.orthogonal):  # fmt: skip
        net = nn.Sequential(kind(nn.Linear(6, 6)), nn.ReLU(), kind(nn.Linear(6, 6)))
        assert sum(depth(net, torch.randn(2, 6)).values()) == pytest.approx(2), kind
    roles = [role for _, role in table(AGD(parametrizations.weight_norm(nn.Linear(4, 8))))]
    assert roles == ["bias", "gain", "matrix"]

    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.A, self.B = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.zeros(2, 4))

        def forward(self, W):
            return W + self.A @ self.B

    net = nn.Sequential(nn.Linear(4, 8))
    nn.utils.parametrize.register_parametrization(net[0], "weight", LowRank())
    assert [role for _, role in table(AGD(net))] == ["bias", "matrix", "rows", "rows"]


def test_depth_keeps_the_network():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    depth(net, torch.randn(8, 4, generator=torch.Generator()))
    assert same(list(before.values()), list(net.state_dict().values()))
    assert torch.equal(random, torch.get_rng_state())


def test_depth_is_read_from_the_first_forward_pass_with_a_graph():
    net = Residual(3)
    optimizer = AGD(net)
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate does: it says nothing of L
    assert optimizer.L == 5 and "not read yet" in str(optimizer)
    with torch.no_grad():
        net(torch.randn(4, 8))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))  # which is not waited for
    twin(torch.randn(4, 8)).sum().backward()
    assert optimizer.L == 5
    step(net, optimizer)
    assert optimizer.L == pytest.approx(2 + 1 / 2 + 1 / 3 + 1 / 4)
    assert "not read yet" not in str(optimizer)
    holder = nn.Module()  # without a forward of its own
    holder.net = Residual(1)
    optimizer = AGD(holder)
    holder.net.last = nn.Sequential(holder.net.last)  # another name by the time that it runs
    step(holder.net, optimizer)
    assert optimizer.L == 2.5


def test_depth_that_is_given():
    """As a number, or as shares by name, which those of wrappers are too."""
    net = Residual(1)
    shares = depth(net, torch.randn(4, 8))
    for params in (net, nn.DataParallel(net), net.named_parameters()):
        assert AGD(params, depth=shares).L == 2.5
    assert AGD(net, depth=3.5).L == 3.5
    for wrong in (0, -1, math.inf, "deep"):
        with pytest.raises(ValueError, match="depth"):
            AGD(net, depth=wrong)
    for params in (net, net.named_parameters(), net.parameters()):
        with pytest.raises(ValueError, match="typo"):
            AGD(params, depth={"typo": 3})


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
        optimizer.step() if how == "no forward pass" else step(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.L == 4
    torch._dynamo.reset()


def test_layers_that_are_frozen_unfrozen_and_added():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].requires_grad_(False)
    net[2].requires_grad_(False)
    optimizer = AGD(net)
    step(net, optimizer)
    assert optimizer.L == 1 and len(table(optimizer)) == 2
    net[2].requires_grad_(True)
    optimizer.add_param_group({"params": net[2].parameters(), "gain": 0.5})
    assert s_of(optimizer)["2.weight"] != near(1.0, 1e-3)  # measured, as of the others
    step(net, optimizer)
    assert optimizer.L == 2 and dict(table(optimizer))["*.weight"] == "matrix"
    net[4].weight.grad = None
    optimizer.step()
    G = optimizer.G.item()
    net[4].requires_grad_(False)
    optimizer.step()
    assert optimizer.L == 1 and optimizer.G.item() == pytest.approx(2 * G)  # out with its share
    for layer in (nn.Embedding(4, 8), nn.Linear(3, 3)):
        net.append(layer)
    optimizer.add_param_group({"params": net[5:].parameters()})
    assert {"rows", "matrix"} <= {x for line in str(optimizer).splitlines() for x in line.split()}
    del net[5]
    step(net, optimizer)
    assert optimizer.L == 2


# Roles


def test_roles_by_pattern():
    net = Every()
    optimizer = AGD(net, roles={"pos": "gain", "last.*": "rows", "gru.weight_ih*": "matrix",
                                "attention.in_proj_weight": "stacked 2", "last.bias": "gain"})
    roles = dict(table(optimizer))
    assert roles["pos"] == roles["last.bias"] == "gain" and roles["last.weight"] == "rows"
    assert roles["gru.weight_ih_l*"] == "matrix"
    assert roles["attention.in_proj_weight"] == "stacked 2"
    step(net, optimizer, INPUTS)
    for wrong, word in (
        ({"poss": "rows"}, "poss"), ({"pos": "row"}, "matrix, stacked, kernel, rows"),
        ({"last.weight": "stacked 4"}, "last.weight"), ({"last.bias": "matrix"}, "last.bias"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            AGD(net, roles=wrong)
    raw = nn.Module()
    raw.w = nn.Parameter(torch.zeros(3, 5))
    assert s_of(AGD(raw, roles={"w": "transposed"}))["w"] == pytest.approx((5 / 3) ** 0.5)


def test_the_table_has_every_trainable_parameter_once():
    """Its roles are those of the layers; a fused qkv is three matrices where it is named so."""
    net = Every()
    net.qkv, net.other = nn.Linear(8, 24), nn.Linear(8, 24)
    net.wide.requires_grad_(False)
    for rule in (AGD, SpectralAGD):
        optimizer = rule(net, depth=6)
        lines, roles = str(optimizer).splitlines(), dict(table(optimizer))
        assert lines[0] == rule.__name__
        assert lines[1].split() == ["parameter", "shape", "role", "s", "share", "of", "L"]
        assert "L = 6" in lines[-1] and "wide.weight" not in str(optimizer)
        assert f"{len(list(net.parameters())) - 2} parameters" in lines[-1]
        assert roles["qkv.weight"] == "stacked 3" and roles["other.weight"] == "matrix"
        for name, p in net.named_parameters():
            if not name.startswith(("qkv", "other", "wide")):
                role, parts, _ = role_of(name, p)
                role = {"transposed": "matrix, transposed"}.get(role, role)
                role = f"{role} {parts}" if parts > 1 and p.ndim > 1 else role
                own = roles[re.sub(r"\d+", "*", name)]
                assert own.removesuffix(", output").replace("gain", "bias").startswith(
                    role.replace("gain", "bias")), name


def test_weights_of_one_shape_that_take_turns_keep_their_roles():
    net = nn.ModuleDict({"e": nn.Embedding(8, 8), "l": nn.Linear(8, 8, bias=False)})
    optimizer, grad = AGD(net, depth=2), torch.randn(8, 8)
    for moving, other in (("e", "l"), ("l", "e"), ("e", "l")):
        net[other].weight.grad, net[moving].weight.grad = None, grad
        optimizer.step()
        norms = grad.norm(dim=1).sum() if moving == "e" else grad.norm()
        G = s_of(optimizer)[f"{moving}.weight"] * norms.item() / 2
        assert optimizer.G.item() == pytest.approx(G, rel=1e-6)


# The start


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh])
def test_init_weights_scales_every_layer_to_an_output_of_rms_1(activation):
    """Buffers and modes stay as they are; the s that follow are measured."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), activation(), nn.Flatten()]
    for n in (144, 32, 32, 32):
        layers += [nn.Linear(n, 32), activation()]
    net, x = nn.Sequential(*layers, nn.BatchNorm1d(32), nn.Linear(32, 3)), torch.randn(64, 1, 8, 8)
    net[-2].eval()
    buffers = copy.deepcopy(list(net.buffers()))
    init_weights(net, torch.Generator().manual_seed(0), inputs=x)
    assert same(buffers, list(net.buffers())) and net.training and not net[-2].training
    net.train()
    outputs = []
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.register_forward_hook(
                lambda m, i, out: outputs.append(out.square().mean().sqrt().item()))  # fmt: skip
    net(x)
    assert outputs == pytest.approx([1.0] * 6, rel=1e-3)
    spectrum = net[0].weight.detach().square().sum().sqrt() / math.sqrt(9 * 1)
    assert s_of(AGD(net))["0.weight"] == pytest.approx(spectrum.item(), rel=1e-5)
    with pytest.raises(ValueError, match="pass it"):
        init_weights(net.parameters(), inputs=x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("kind, s", [
    (parametrizations.weight_norm, 0.5**0.5), (nn.utils.weight_norm, 0.5**0.5),
    (lambda layer: parametrizations.weight_norm(layer, dim=None), 0.5**0.5),
    (parametrizations.spectral_norm, 1), (parametrizations.orthogonal, 1),
])  # fmt: skip
def test_init_weights_draws_what_a_parametrization_makes(kind, s):
    """weight_norm's magnitudes are those of the rows that are drawn; an orthogonal weight stays
    one. The generator alone draws."""
    random = torch.get_rng_state()
    for named in (False, True):
        if named and s == 1:
            continue  # names do not tell which parametrization it is
        layer = kind(nn.Linear(16, 8, bias=False))
        before = torch.get_rng_state()
        init_weights(layer.named_parameters() if named else layer, torch.Generator())
        assert torch.equal(torch.get_rng_state(), before)
        layer(torch.ones(1, 16))  # the older weight_norm makes its weight in the forward pass
        assert torch.linalg.svdvals(layer.weight.detach()) == near(torch.full((8,), s), 1e-5)
    torch.set_rng_state(random)
    layer = parametrizations.orthogonal(nn.Linear(16, 8, bias=False))
    weight = layer.weight.detach().clone()
    init_weights(layer.named_parameters())
    assert torch.equal(layer.weight, weight)  # drawn, its parameter would make a weight of zeros


def test_unnamed_vectors_that_are_constant_are_not_drawn():
    """A gain behind a convolution without a bias looks like its bias."""
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 8))
    init_weights(net.parameters())
    assert (net[1].weight == 1).all() and not net[1].bias.any() and not net[2].bias.any()
