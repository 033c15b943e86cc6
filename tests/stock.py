"""Networks as other libraries build them: what their tests share."""

import itertools
import os

import pytest
import torch
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


def digits(side=32, batch=16, channels=3, start=0):
    """Images (batch, channels, side, side) and labels (batch,) of handwritten digits."""
    data = load("digits", None, batch, batch, torch.device("cpu"))
    images, labels = next(itertools.islice(data.train, start, None))
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
    assert int(optimizer.skipped) == 0 and optimizer.eta > 0 and optimizer.L > 0
