"""AGD(net) for networks as torchvision builds them, and for every kind of layer that torch has."""

import math

import pytest
import torch
import torch.nn as nn
from torchvision import models

import agd
from agd import AGD, init_weights
from architecture import build
from tests.stock import assert_all_taken, assert_trains, digits, train

# The smallest side of an image that each takes, and fewer steps of the largest. Other arguments
# make the same network quicker.
FAMILIES = {
    "alexnet": {"side": 64},
    "convnext_tiny": {},
    "densenet121": {},
    "efficientnet_b0": {},
    "efficientnet_v2_s": {},
    "googlenet": {"init_weights": False},  # its own draw, by SciPy, takes half a minute
    "inception_v3": {"side": 75, "init_weights": False, "aux_logits": False},
    "maxvit_t": {"build": lambda: models.MaxVit(
        input_size=(32, 32), stem_channels=32, partition_size=1, block_channels=[32, 64],
        block_layers=[1, 1], head_dim=16, stochastic_depth_prob=0.1, num_classes=10)},
    "mnasnet0_5": {},
    "mobilenet_v2": {},
    "mobilenet_v3_small": {},
    "regnet_x_400mf": {},
    "regnet_y_400mf": {},
    "resnet18": {},
    "resnet50": {},
    "resnext50_32x4d": {},
    "shufflenet_v2_x0_5": {},
    "squeezenet1_0": {},
    "swin_t": {"build": lambda: models.SwinTransformer(
        [4, 4], 48, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=10)},
    "swin_v2_t": {"build": lambda: models.SwinTransformer(
        [4, 4], 48, [2, 2], [3, 6], [4, 4], stochastic_depth_prob=0.1, num_classes=10,
        block=models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=models.swin_transformer.PatchMergingV2)},
    "vgg11": {"steps": 10},
    "vgg11_bn": {"steps": 10},
    "vit_b_16": {"build": lambda: models.VisionTransformer(32, 8, 4, 4, 96, 384, num_classes=10)},
    "wide_resnet50_2": {},
}  # fmt: skip


def construct(name, side=32, steps=20, build=None, **arguments):
    """The network `name` of torchvision, drawn from a fixed seed."""
    torch.manual_seed(0)
    return build() if build else models.get_model(name, num_classes=10, **arguments)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_torchvision_trains_as_it_is(name):
    net, family = construct(name, **FAMILIES[name]), FAMILIES[name]
    assert_trains(net, AGD(net), digits(family.get("side", 32)), steps=family.get("steps", 20))


DEPTHS = {
    "alexnet": 8, "convnext_tiny": 20.54, "densenet121": 23.06, "efficientnet_b0": 45.00,
    "googlenet": 17.50, "mobilenet_v3_small": 32.17, "resnet18": 10.17, "resnet50": 19.13,
    "squeezenet1_0": 18.00, "swin_t": 11.64, "vit_b_16": 6.71,
}  # fmt: skip


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_is_the_mean_number_of_weights_on_a_path(name):
    arguments = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 64}}
    # In evaluation: in training googlenet has three outputs, and blocks are dropped at random.
    net = construct(name, **arguments.get(name, {})).eval()
    shares = agd.depth(net, torch.randn(2, 3, 64, 64))
    assert sum(shares.values()) == pytest.approx(DEPTHS[name], abs=0.01)
    assert set(shares) <= {name for name, p in net.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("arch, depth", [("fcn", 10), ("vgg", 14)])
def test_depth_of_a_chain_counts_its_weights(arch, depth):
    net = build(arch, (1, 8, 8), 10, width=32)
    shares = agd.depth(net, torch.randn(2, 1, 8, 8))
    assert shares == {name: pytest.approx(1) for name, _ in net.named_parameters()}
    assert sum(shares.values()) == pytest.approx(depth)


class States(nn.Module):
    """Of a recurrent network, the states at every time; its last ones are part of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)[0]


def test_depth_of_an_lstm_counts_both_weights_of_a_layer():
    shares = agd.depth(States(nn.LSTM(8, 8, num_layers=2)), torch.randn(5, 2, 8))
    assert sum(shares.values()) == pytest.approx(4, abs=0.01) and len(shares) == 4


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_depth_of_an_unrolled_recurrent_network_is_nearly_that(kind):
    """Its first state is no function of a weight, so a few paths end early."""
    shares = agd.depth(States(kind(8, 8, num_layers=2)), torch.randn(50, 2, 8))
    assert 3.8 < sum(shares.values()) < 4 and len(shares) == 4


class Standardised(nn.Conv2d):
    """Its weight is normalised in the forward pass, as in nets without batch norm."""

    def forward(self, x):
        rows = self.weight.flatten(1).unsqueeze(0)
        weight = nn.functional.batch_norm(rows, None, None, training=True).view_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias)


class Centred(nn.Conv2d):
    """As Standardised, by elementary operations."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return nn.functional.conv2d(x, weight, self.bias)


class TwoBiases(nn.Conv2d):
    """Its bias is put together from two, as those of some attention layers."""

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, side, bias=False)
        self.first, self.second = (nn.Parameter(torch.zeros(outputs // 2)) for _ in range(2))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, torch.cat([self.first, self.second]))


@pytest.mark.parametrize("kind", [nn.Conv2d, Standardised, Centred, TwoBiases])
def test_a_weight_that_is_changed_before_its_use_is_one_weight(kind):
    net = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 8, 3), nn.ReLU(), kind(8, 4, 3))
    shares = agd.depth(net, torch.randn(2, 3, 8, 8))
    assert shares == {f"{i}.weight": pytest.approx(1) for i in (0, 2, 4)}


def test_the_optimiser_reads_the_depth_in_the_first_pass():
    net = construct("resnet18")
    optimizer = AGD(net)
    train(net, optimizer, digits(), steps=1)
    assert optimizer.L == pytest.approx(10.17, abs=0.01)


@pytest.mark.parametrize("arch", ["fcn", "vgg"])
def test_a_chain_of_the_paper_is_the_paper_either_way(arch):
    """Of weights at their table's scale AGD(net) measures that scale, and the depth is the count:
    the steps are those of AGD(net.parameters())."""
    runs = []
    for argument in (lambda net: net, lambda net: net.parameters()):
        net = build(arch, (1, 8, 8), 10, depth=6, width=32)
        init_weights(argument(net), torch.Generator().manual_seed(0))
        optimizer = AGD(argument(net))
        losses = train(net, optimizer, digits(8, channels=1), steps=5)
        runs.append((losses, optimizer.eta.item(), [p.detach() for p in net.parameters()]))
    (losses, eta, weights), (theirs, their_eta, their_weights) = runs
    assert losses == pytest.approx(theirs, rel=1e-5) and eta == pytest.approx(their_eta, rel=1e-5)
    for p, q in zip(weights, their_weights):
        assert (p - q).norm() < 1e-5 * q.norm()


class EveryRole(nn.Module):
    """A layer of every kind, one after the other."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.grouped = nn.Conv1d(8, 16, 3, padding=1, groups=4)
        self.batch_norm = nn.BatchNorm1d(16)
        self.transposed = nn.ConvTranspose1d(16, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer_norm = nn.LayerNorm(8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.gru = nn.GRU(6, 10, batch_first=True)
        self.head = nn.Linear(10, 12)

    def forward(self, codes):
        x = self.embedding(codes).mT
        x = self.transposed(self.batch_norm(self.grouped(x)).relu()).mT
        x = self.layer_norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.gru(self.lstm(x)[0])[0])


def test_measured_scales_are_the_tables_after_init_weights():
    torch.manual_seed(0)
    net = EveryRole()
    init_weights(net)
    optimizer, names = AGD(net), dict(net.named_parameters())
    state = optimizer.state_dict()["state"]
    s = {name: state[i]["s"] for i, name in enumerate(optimizer.param_groups[0]["param_names"])}
    expected = {
        "embedding.weight": math.sqrt(8),
        "grouped.weight": math.sqrt(4 / 2 / 3),  # of a group
        "transposed.weight": math.sqrt(8 / 16 / 3),
        "attention.in_proj_weight": 1,  # each of query, key and value
        "attention.out_proj.weight": 1,
        "lstm.weight_ih_l0": math.sqrt(6 / 8),  # each of the gates
        "lstm.weight_hh_l0": 1,
        "gru.weight_ih_l0": math.sqrt(10 / 6),
        "gru.weight_hh_l0": 1,
        "head.weight": math.sqrt(12 / 10),
        "batch_norm.weight": 1, "batch_norm.bias": 1, "layer_norm.weight": 1, "layer_norm.bias": 1,
        "grouped.bias": math.sqrt(4 / 2 / 3), "transposed.bias": math.sqrt(8 / 16 / 3),
        "attention.in_proj_bias": 1, "attention.out_proj.bias": 1, "head.bias": math.sqrt(12 / 10),
        "lstm.bias_ih_l0": math.sqrt(6 / 8), "lstm.bias_hh_l0": 1,
        "gru.bias_ih_l0": math.sqrt(10 / 6), "gru.bias_hh_l0": 1,
    }  # fmt: skip
    assert set(expected) == set(names)
    assert s == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}


def test_a_network_of_every_role_trains():
    torch.manual_seed(0)
    net, codes = EveryRole(), torch.arange(12).repeat(8, 2)
    init_weights(net)

    def loss(net, codes):  # each code is followed by the next
        return nn.functional.cross_entropy(net(codes).mT, (codes + 1) % 12)

    assert_trains(net, AGD(net), codes, loss)


def test_what_is_frozen_stays_and_a_tied_weight_stands_once():
    net = construct("resnet18")
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(("layer4", "fc")))
    assert_trains(net, AGD(net), digits())

    tied = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    tied[1].weight = tied[0].weight
    assert_all_taken(tied, AGD(tied))
