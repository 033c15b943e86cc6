"""Click model with embedding tables (a small DLRM)"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METRIC = "log loss, nats"
BATCH, STEPS = 384, 2700
ROWS, VALIDATION = 2**20, 16384  # an epoch outlasts the budget: rare ids would be overfitted
FIELDS = (200, 300, 500, 500, 1000, 1000, 2000, 2000, 4000, 4000)  # ids of a field
NUMBERS, DIMENSION, WIDTH = 8, 16, 512
LATENT, DEVIATION, OFFSET = 4, 3.0, -2.2  # of the logits: vectors, spread, mean


def zipf(rng, ids, rows):
    """(rows,) ids with a frequency inversely proportional to their rank, in a random order of
    ranks."""
    edges = np.cumsum(1 / np.arange(1, ids + 1))
    drawn = np.searchsorted(edges, rng.random(rows) * edges[-1]).clip(max=ids - 1)
    return rng.permutation(ids)[drawn]


def data():
    """(numbers, ids, clicks): 8 floats, an id of each field, and 0 or 1. An id has a bias and a
    latent vector. A click's logit sums, with equal variances, the biases, the inner products of
    every two vectors, and the inner products of the vectors with a function of the numbers."""
    rng = np.random.default_rng(0)
    rows = ROWS + VALIDATION
    numbers = rng.standard_normal((rows, NUMBERS), np.float32)
    ids = np.stack([zipf(rng, count, rows) for count in FIELDS], 1)
    total = np.zeros((rows, LATENT), np.float32)
    squares, bias = np.zeros_like(total), np.zeros(rows, np.float32)
    for field, count in enumerate(FIELDS):
        vectors = rng.standard_normal((count, LATENT), np.float32)[ids[:, field]]
        total += vectors
        squares += vectors**2
        bias += rng.standard_normal(count, np.float32)[ids[:, field]]
    pairs = (total**2 - squares).sum(1)
    context = np.tanh(numbers @ rng.standard_normal((NUMBERS, LATENT), np.float32))
    terms = [bias, pairs, (context * total).sum(1)]
    logit = sum(x / x.std() for x in terms)
    logit = OFFSET + DEVIATION * logit / logit.std()
    clicks = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    parts = [torch.from_numpy(x) for x in (numbers, ids, clicks)]
    return tuple(x[VALIDATION:] for x in parts), tuple(x[:VALIDATION] for x in parts)


def mlp(*sizes):
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Clicks(nn.Module):
    """A vector of each id, and one of the numbers by an MLP; an MLP on the vectors and the inner
    products of every two of them gives one logit."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(count, DIMENSION) for count in FIELDS)
        self.bottom = mlp(NUMBERS, WIDTH, DIMENSION)
        vectors = len(FIELDS) + 1
        self.register_buffer("pairs", torch.triu_indices(vectors, vectors, 1), persistent=False)
        products = self.pairs.shape[1]
        self.top = mlp(products + vectors * DIMENSION, WIDTH, WIDTH, WIDTH, 1)

    def forward(self, numbers, ids):
        vectors = [table(x) for table, x in zip(self.tables, ids.unbind(1))]
        vectors = torch.stack([self.bottom(numbers), *vectors], 1)
        # As in attention: the inner products have the order of the vectors' entries.
        products = (vectors @ vectors.mT)[:, self.pairs[0], self.pairs[1]] / DIMENSION**0.5
        return self.top(torch.cat([products, vectors.flatten(1)], 1)).squeeze(1)


network = Clicks


def score(net, numbers, ids, clicks):
    return F.binary_cross_entropy_with_logits(net(numbers, ids), clicks, reduction="none")


def loss(net, *batch):
    return score(net, *batch).mean()
