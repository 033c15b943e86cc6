"""GPT, characters of Shakespeare"""

import numpy as np
import torch
import torch.nn.functional as F

from architecture.gpt import GPT
from data import load

METRIC = "validation loss, nats"
BATCH, STEPS = 16, 1500
CONTEXT, LETTERS, VALIDATION = 64, 65, 256


def data():
    """Windows of CONTEXT + 1 characters: at every place of the first nine tenths of the plays, and
    at VALIDATION places of the rest."""
    parts = load("shakespeare", None, 1, 1, torch.device("cpu"), context=CONTEXT)[:2]
    train, rest = (torch.from_numpy(x.tokens.ids.astype(np.int64)) for x in parts)
    places = torch.linspace(0, len(rest) - CONTEXT - 1, VALIDATION).long()
    train, rest = (x.unfold(0, CONTEXT + 1, 1) for x in (train, rest))
    return (train,), (rest[places],)


def network():
    return GPT(LETTERS, CONTEXT, depth=4, width=64, heads=4)


def losses(net, windows):
    """(B,): the mean of a window's nats."""
    logits = net(windows[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)


def loss(net, windows):
    return losses(net, windows).mean()


score = losses
