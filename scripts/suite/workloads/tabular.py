"""MLP with layer norm, regression on a generated table"""

import numpy as np
import torch
import torch.nn as nn

METRIC = "squared error, target of variance 1"
BATCH, STEPS = 512, 2200
ROWS, VALIDATION = 2**19, 8192
FACTORS, CORRELATED, HEAVY, UNIFORM, COUNTS, IRRELEVANT = 6, 12, 6, 8, 4, 8  # columns of each kind
CATEGORIES, LEVELS = 4, 8
TREES, DEPTH, PAIRS, NOISE = 24, 4, 12, 0.2
WIDTH, LAYERS = 384, 6


def standardised(x):
    return (x - x.mean(0)) / x.std(0)


def columns(rng, rows):
    """(numbers, categories): (rows, 44) floats, and (rows, CATEGORIES) integers below LEVELS."""
    factors = rng.standard_normal((rows, FACTORS), np.float32)
    numbers = [
        factors @ rng.standard_normal((FACTORS, CORRELATED), np.float32)
        + rng.standard_normal((rows, CORRELATED), np.float32),
        np.exp(rng.standard_normal((rows, HEAVY), np.float32)),
        rng.standard_t(3, (rows, HEAVY)).astype(np.float32),
        rng.random((rows, UNIFORM), np.float32),
        rng.poisson(3, (rows, COUNTS)).astype(np.float32),
        rng.standard_normal((rows, IRRELEVANT), np.float32),
    ]
    return np.concatenate(numbers, 1), rng.integers(0, LEVELS, (rows, CATEGORIES))


def target(rng, numbers, categories):
    """The sum of random trees, products of pairs, sines and slopes by category, each with about a
    quarter of the variance, and of noise with 4 %."""
    rows, relevant = len(numbers), numbers.shape[1] - IRRELEVANT
    trees = np.zeros(rows, np.float32)
    for _ in range(TREES):
        leaf = np.zeros(rows, np.int64)
        for column in rng.choice(relevant, DEPTH, replace=False):
            # A random row's value as threshold splits a heavy-tailed column as well as any other.
            leaf = 2 * leaf + (numbers[:, column] > numbers[rng.integers(rows), column])
        trees += rng.standard_normal(2**DEPTH).astype(np.float32)[leaf]
    bounded = np.tanh(standardised(numbers[:, :relevant]))
    left, right = rng.permutation(relevant)[: 2 * PAIRS].reshape(2, PAIRS)
    products = (bounded[:, left] * bounded[:, right] * rng.standard_normal(PAIRS)).sum(1)
    first = CORRELATED + 2 * HEAVY  # of the uniform columns
    u, v = np.split(numbers[:, first : first + UNIFORM], 2, axis=1)
    sines = np.sin(2 * np.pi * (u + v * [1, 1, 2, 2])).sum(1)
    table = rng.standard_normal((CATEGORIES, LEVELS))
    slopes = sum(table[i, categories[:, i]] * bounded[:, 3 * i] for i in range(CATEGORIES))
    terms = standardised(np.stack([trees, products, sines, slopes], 1))
    return standardised(terms.sum(1) / 2 + NOISE * rng.standard_normal(rows))


def data():
    """(columns, target): standardised numbers and one-hot categories; a standardised number."""
    rng = np.random.default_rng(0)
    numbers, categories = columns(rng, ROWS + VALIDATION)
    y = torch.from_numpy(target(rng, numbers, categories).astype(np.float32))
    one_hot = np.eye(LEVELS, dtype=np.float32)[categories].reshape(len(y), -1)
    x = torch.from_numpy(np.concatenate([standardised(numbers), one_hot], 1))
    return (x[VALIDATION:], y[VALIDATION:]), (x[:VALIDATION], y[:VALIDATION])


def network():
    inputs = CORRELATED + 2 * HEAVY + UNIFORM + COUNTS + IRRELEVANT + CATEGORIES * LEVELS
    sizes = [inputs, *[WIDTH] * LAYERS]
    layers = [(nn.Linear(a, b), nn.LayerNorm(b), nn.GELU()) for a, b in zip(sizes, sizes[1:])]
    return nn.Sequential(*(module for layer in layers for module in layer), nn.Linear(WIDTH, 1))


def score(net, x, y):
    return (net(x).squeeze(1) - y).square()


def loss(net, x, y):
    return score(net, x, y).mean()
