"""The loss of a bigram: what the last token alone tells of the next one."""

from functools import cache

import numpy as np
import torch

from data import load


@cache
def bigram_loss(dataset="shakespeare", context=64):
    """The validation loss of a bigram on a text in nats a token, on the windows of a run's."""
    data = load(dataset, None, 1, 64, torch.device("cpu"), context=context, epoch_steps=1)
    windows = [np.stack([x.numpy() for x in batch], -1).reshape(-1, 2) for batch in data.test]
    return loss(data.train.tokens.ids, np.concatenate(windows), data.classes)


def loss(train, pairs, vocabulary):
    """The mean of -log p in nats over `pairs` (N, 2), of a token and the next one. p: from the
    counts of the pairs in `train` (M,), one added to each."""
    counts = np.ones((vocabulary, vocabulary))
    np.add.at(counts, (train[:-1], train[1:]), 1)
    p = counts / counts.sum(1, keepdims=True)
    return float(-np.log(p[tuple(pairs.T)]).mean())
