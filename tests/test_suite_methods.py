"""The suite's methods: each trains, has its published setting, and ends its schedule at 0."""

import math
import sys

import pytest
import torch
import torch.nn as nn
import torchvision
from torch.optim.optimizer import register_optimizer_step_post_hook

from architecture.gpt import GPT
from scripts.suite.methods import METHODS, NADAMW, TRIALS, Muon, hidden_weights, missing

INPUTS = torch.arange(32).view(8, 4) * 5 % 11


class Net(nn.Module):
    """(B, 4) tokens to (B, 3), through a layer of each kind whose weight may be hidden."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.tokens = nn.Parameter(torch.randn(4, 16))
        self.conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.batch_norm = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 24, 1)
        self.up = nn.ConvTranspose2d(24, 3, 2, stride=2)
        self.lstm = nn.LSTM(24, 10, batch_first=True)
        self.layer_norm = nn.LayerNorm(10)
        self.tall = nn.Linear(10, 30)
        self.head = nn.Linear(30, 3)

    def forward(self, i):
        x = (self.embedding(i) + self.tokens).view(-1, 4, 4, 4)
        x = self.up(self.expand(self.batch_norm(self.conv(x)).relu()))  # (B, 3, 8, 8)
        x = self.lstm(x.transpose(1, 2).flatten(2))[0].mean(1)
        return self.head(self.tall(self.layer_norm(x)).relu())


HIDDEN = ["conv.weight", "expand.weight", "up.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
          "tall.weight"]  # fmt: skip


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def make(name, net, steps):
    """The method's optimiser; the test is skipped where the machine lacks its package."""
    if lacks := missing(name):
        pytest.skip(f"no {lacks}")
    setting = TRIALS[2] if name == "adamw" else METHODS[name].setting
    return METHODS[name].make(net, steps, **setting)


def weights(net):
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def set_gradients(net):
    """Random gradients; returns them by name."""
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_moves_every_parameter(name, net):
    optimizer, before = make(name, net, 10), weights(net)
    switch = getattr(optimizer, "train", None)
    if switch:
        switch()
    for _ in range(2):
        loss = nn.functional.cross_entropy(net(INPUTS), INPUTS[:, 0] % 3)
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())
        loss.backward()
        optimizer.step()
    if switch:
        optimizer.eval()
    for key, p in net.named_parameters():
        assert p.isfinite().all(), key
        assert not torch.equal(p, before[key]), key


@pytest.fixture
def rates():
    """Of each step of an optimiser from now on: (its class, the rate of each group)."""
    seen = []
    hook = register_optimizer_step_post_hook(
        lambda x, *_: seen.append((type(x).__name__, {group["lr"] for group in x.param_groups}))
    )
    yield seen
    hook.remove()


WARM = [1 / 2, 1, *[(1 + math.cos(math.pi * i / 38)) / 2 for i in range(1, 39)]]
COLD = [(1 + math.cos(math.pi * i / 40)) / 2 for i in range(1, 41)]


@pytest.mark.parametrize("name, of_class, rate, factors", [
    ("adamw", "AdamW", TRIALS[2]["rate"], WARM), ("nadamw", "NAdam", NADAMW["rate"], WARM),
    ("muon", "Muon", 0.02, WARM), ("muon", "AdamW", 3e-4, WARM),
    ("dadaptation", "DAdaptAdam", 1.0, WARM), ("prodigy", "Prodigy", 1.0, COLD),
])  # fmt: skip
def test_a_schedule_warms_up_and_ends_at_0(name, of_class, rate, factors, net, rates):
    """Forty steps, of which two are the warm-up: Prodigy has none."""
    optimizer = make(name, net, 40)
    for _ in range(40):
        set_gradients(net)
        optimizer.step()
    got = [min(group) for kind, group in rates if kind == of_class and len(group) == 1]
    assert got == pytest.approx([rate * factor for factor in factors], abs=1e-15)
    assert got[-1] == 0


@pytest.mark.parametrize("name", ["prodigy", "dadaptation"])
def test_methods_that_find_their_rate_have_no_setting(name, net):
    """That is, the defaults of their class, but for the schedule."""
    (group,) = make(name, net, 40).param_groups
    default = type(make(name, net, 40))(net.parameters()).param_groups[0]
    assert {**group, "params": None} == {**default, "params": None}
    assert group["lr"] == 1 and group["weight_decay"] == 0


def test_schedule_free_has_the_setting_of_its_submission(net):
    (group,) = make("schedule_free", net, 1000).param_groups
    assert group["lr"] == 0.0025 and group["betas"] == (0.9, 0.9955159689799007)
    assert group["weight_decay"] == 0.08121616522670176
    assert group["warmup_steps"] == 15  # 0.02 * 0.75 * 1000
    assert group["r"] == 0 and group["weight_lr_power"] == 2


def test_nadamw_is_algoperfs(net):
    """m = b m + (1 - b) g, then a step of b m + (1 - b) g: torch's class corrects the bias of m as
    that of the step after, and the rest is the formula of arXiv:1910.05446, table 1."""
    steps, b, c = 200, 0.9, 0.999
    optimizer = make("nadamw", net, steps)
    p = net.tall.weight
    want, m, v = p.detach().double(), 0.0, 0.0
    for step in range(1, 31):
        g = set_gradients(net)["tall.weight"].double()
        optimizer.step()
        rate = NADAMW["rate"] * min(1, step / 10)
        rate *= (1 + math.cos(math.pi * max(0, step - 10) / 190)) / 2
        m, v = b * m + (1 - b) * g, c * v + (1 - c) * g * g
        nesterov = b * m / (1 - b ** (step + 1)) + (1 - b) * g / (1 - b**step)
        want = want * (1 - rate * NADAMW["decay"])
        want -= rate * nesterov / ((v / (1 - c**step)).sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), want.float(), rtol=0, atol=1e-6)


muon_of_torch = pytest.mark.skipif(missing("muon") is not None, reason="torch 2.9 or newer")


@muon_of_torch
def test_muon_orthogonalises_the_step_of_a_flattened_weight(net):
    """Newton-Schulz leaves singular values between 0.65 and 1.25 of those that `polar` has."""
    optimizer, before = Muon(net, 20), weights(net)  # the first of 20 steps has the whole rate
    gradients = set_gradients(net)
    optimizer.step()
    for name in HIDDEN:
        W, new, g = (x.flatten(1).double() for x in
                     (before[name], net.get_parameter(name).detach(), gradients[name]))  # fmt: skip
        scale = 0.02 * math.sqrt(max(1, len(W) / W.shape[1]))
        step = (W * (1 - 0.02 * 0.01) - new) / scale
        U, S, V = torch.linalg.svd(g, full_matrices=False)
        inner = U.mT @ step @ V.mT
        assert torch.linalg.norm(step - U @ inner @ V) < 0.05 * torch.linalg.norm(step), name
        assert (inner - inner.diag().diag()).abs().max() < 0.05, name
        large = inner.diag()[S > S[0] / 20]
        assert 0.65 < large.min() and large.max() < 1.25, name


@muon_of_torch
def test_muons_convolution_has_the_step_of_torchs_class(net):
    """On several steps, as a matrix of its own with the same gradients: to the bit."""
    alone = nn.Parameter(net.conv.weight.detach().flatten(1).clone())
    muon = torch.optim.Muon([alone], lr=0.02, momentum=0.95, weight_decay=0.01)
    optimizer = Muon(net, 20)
    for step in range(3):
        alone.grad = set_gradients(net)["conv.weight"].flatten(1)
        muon.param_groups[0]["lr"] = 0.02 * (1 + math.cos(math.pi * step / 19)) / 2
        muon.step()
        optimizer.step()
    assert torch.equal(net.conv.weight.flatten(1), alone)


@muon_of_torch
def test_muon_leaves_the_rest_to_adamw(net):
    """Vectors, tokens, the embedding and the head: the first step of Adam is g / |g|."""
    optimizer, before = Muon(net, 20), weights(net)
    gradients = set_gradients(net)
    optimizer.step()
    rest = [name for name in before if name not in HIDDEN]
    assert {"embedding.weight", "tokens", "batch_norm.weight", "head.weight"} < set(rest)
    for name in rest:
        want = before[name] * (1 - 3e-4 * 0.01) - 3e-4 * gradients[name].sign()
        torch.testing.assert_close(net.get_parameter(name).detach(), want, rtol=0, atol=1e-6)
    adam = optimizer.optimizers[1].param_groups[0]
    assert adam["betas"] == (0.9, 0.95) and adam["eps"] == 1e-10


@muon_of_torch
def test_muon_leaves_weights_without_gradients(net):
    optimizer = Muon(net, 20)
    set_gradients(net)
    optimizer.step()
    before = weights(net)
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def names_of_hidden(net):
    names = {id(p): name for name, p in net.named_parameters()}
    return [names[id(p)] for p in hidden_weights(net)]


def test_hidden_weights_are_between_the_first_and_the_last(net):
    assert names_of_hidden(net) == HIDDEN
    resnet = torchvision.models.resnet18()
    convolutions = [f"{name}.weight" for name, x in resnet.named_modules()
                    if isinstance(x, nn.Conv2d)]  # fmt: skip
    assert names_of_hidden(resnet) == convolutions[1:]
    vit = torchvision.models.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)
    layers = ("self_attention.in_proj_weight", "self_attention.out_proj.weight", "mlp.0.weight",
              "mlp.3.weight")  # fmt: skip
    assert names_of_hidden(vit) == [
        f"encoder.layers.encoder_layer_{i}.{layer}" for i in range(2) for layer in layers
    ]


def test_the_last_weight_of_a_tied_gpt_is_its_embedding():
    gpt = GPT(7, 5, depth=1, width=8, heads=2)
    layers = "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"
    assert names_of_hidden(gpt) == [f"h.0.{layer}.weight" for layer in layers]


def test_what_is_missing_is_named(monkeypatch):
    packages = {name: x.package for name, x in METHODS.items() if x.package}
    assert packages == {"prodigy": "prodigyopt", "schedule_free": "schedulefree",
                        "dadaptation": "dadaptation"}  # fmt: skip
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, package, None)
        assert missing(name) == f"pip install {package}"
    assert missing("adamw") is None
    monkeypatch.setattr(torch.optim, "Muon", None, raising=False)
    assert missing("muon") is None
    monkeypatch.delattr(torch.optim, "Muon")
    assert missing("muon") == "it needs torch 2.9 or newer"


def test_there_are_ten_trials():
    assert len({(trial["rate"], trial["decay"]) for trial in TRIALS}) == len(TRIALS) == 10
