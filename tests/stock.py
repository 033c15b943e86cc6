"""Networks as other libraries build them: what their tests share."""

import math
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import load

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is downloaded
TEXT = """
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and
see the watery part of the world. It is a way I have of driving off the spleen and regulating the
circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly
November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into
the street, and methodically knocking people's hats off; then, I account it high time to get to sea
as soon as I can. This is my substitute for pistol and ball.
"""  # Herman Melville, Moby-Dick, 1851
VOCABULARY = 128


def digits(side=32, batch=16, channels=3):
    """Images (batch, channels, side, side) and labels (batch,) of handwritten digits."""
    data = load("digits", None, batch, batch, torch.device("cpu"))
    images, labels = next(iter(data.train))
    images = F.interpolate(images, size=(side, side), mode="bilinear")
    return images.repeat(1, channels, 1, 1), labels


def characters(length=32, batch=8):
    """ASCII codes (batch, length), one piece of the text after the other."""
    codes = torch.tensor(list(TEXT.encode("ascii")))
    return codes[: batch * length].view(batch, length)


SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def gpt2(layers=2, **changes):
    """A small GPT-2 of transformers, which is skipped where that is not installed."""
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=layers, n_head=4, **SPECIAL,
        **changes))  # fmt: skip


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
        self.lstm, self.gru = nn.LSTM(36, 12, proj_size=10), nn.GRU(10, 10)
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
        x = self.gru(self.lstm(self.norm(x))[0])[0]
        x = self.wide(self.tall(x).relu())
        x = self.depthwise(self.last_conv(self.conv(x.view(-1, 2, 6, 6)).relu()))
        x = self.slope(self.batch_norm(self.up(x))).mean((2, 3))
        return self.last(x + self.zero(x)) * self.temperature


INPUTS = torch.arange(24).view(4, 6) * 5 % 17
# Of each weight of Every: its role and number of parts, and s.
ROLES = {
    "embedding": ("rows", 1, 24), "pos": ("rows", 1, 24), "attention.in_proj": ("stacked", 3, 1),
    "attention.out_proj": ("matrix", 1, 1), "c_attn": ("transposed", 1, 36 / 24),
    "lstm.weight_ih_l0": ("stacked", 4, 12 / 36), "lstm.weight_hh_l0": ("stacked", 4, 12 / 10),
    "lstm.weight_hr_l0": ("matrix", 1, 10 / 12), "gru.weight_ih_l0": ("stacked", 3, 1),
    "gru.weight_hh_l0": ("stacked", 3, 1), "tall": ("matrix", 1, 60 / 10),
    "wide": ("matrix", 1, 12 / 60), "conv": ("kernel", 2, 6 / 1 / 9),
    "last_conv": ("kernel", 1, 6 / 12 / 9), "depthwise": ("kernel", 6, 1 / 9),
    "up": ("kernel", 2, 4 / 3),  # one of its four positions meets an output
    "zero": ("matrix", 1, 1), "last": ("matrix", 1, 5 / 8),
}  # fmt: skip


def role_of(name, p):
    """(role, parts, s by the table) of a parameter of Every."""
    own = name.replace("bias", "weight").removesuffix(".weight").removesuffix("_weight")
    role, parts, square = ROLES.get(own, ("gain", 1, 1))
    return ("bias" if p.ndim < 2 else role), parts, math.sqrt(square)


def logits(output):
    """The network's own output: some add those of auxiliary heads, in training."""
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def classify(net, batch):
    """Cross-entropy of a classifier, auxiliary heads included."""
    output = net(batch[0])
    heads = output if isinstance(output, (tuple, list)) else [logits(output)]
    heads = [x for x in heads if x is not None]
    return sum(F.cross_entropy(x, batch[1]) for x in heads) / len(heads)


def train(net, optimizer, batch, loss=classify, steps=20):
    """The loss of each step on one batch."""
    losses = []
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(net, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def assert_all_taken(net, optimizer):
    """Every trainable parameter stands in the optimiser's groups, once."""
    taken = [id(p) for group in optimizer.param_groups for p in group["params"]]
    trainable = [id(p) for p in net.parameters() if p.requires_grad]
    assert sorted(taken) == sorted(trainable)


def assert_falls(losses):
    """From the first five to the last five."""
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.97 * first, [round(x, 3) for x in losses]


def assert_trains(net, optimizer, batch, loss=classify, steps=20):
    """The loss of a batch falls, by every trainable parameter, and the weights stay finite."""
    assert_all_taken(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    assert_falls(train(net, optimizer, batch, loss, steps))
    for (name, p), was in zip(net.named_parameters(), before):
        assert p.isfinite().all(), name
        assert p.requires_grad or torch.equal(p, was), name
    # eta is 0 where the slope along an older momentum is not positive: with a batch that is learnt.
    assert int(optimizer.skipped) == 0 and optimizer.eta >= 0 and optimizer.L > 0
