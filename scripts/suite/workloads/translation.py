"""Encoder-decoder transformer, a synthetic translation"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

METRIC = "validation error rate of tokens"
BATCH, STEPS = 32, 2000
TRAINING, VALIDATION = 50_000, 1024

# A source clause is subject, verb, object: (adjective) (adjective) noun verb (adjective)
# (adjective) noun. Its translation is noun adjective adjective, the same of the object, verb.
KINDS = np.array([0, 0, 1, 2, 0, 0, 1])  # adjective, noun, verb
ORDER = np.array([2, 1, 0, 6, 5, 4, 3])
# A noun has one translation. An adjective and a verb have one of FORMS, drawn for each pair with
# the noun that they describe, or their subject: frequent pairs are learned early, rare ones late.
GOVERNOR = np.array([2, 2, 2, 2, 6, 6, 6])
WORDS, FORMS, CLAUSES = np.array([60, 120, 60]), 3, 2

FIRST = np.cumsum(WORDS) - WORDS  # word of a kind
LENGTH = CLAUSES * len(KINDS) + 1
END, BEGIN, SPECIAL = 0, 1, 2
VOCABULARY = SPECIAL + FORMS * sum(WORDS)


def data():
    """Sentences (N, LENGTH) of up to CLAUSES clauses, and their translations (N, 1 + LENGTH), which
    start with BEGIN. END fills the rest of a row."""
    rng = np.random.default_rng(0)
    n = TRAINING + VALIDATION
    forms = rng.integers(FORMS, size=(sum(WORDS), WORDS[1]))
    forms[FIRST[1] : FIRST[2]] = 0
    ranks = np.empty((n, CLAUSES, len(KINDS)), np.int64)  # of words within their kind
    for place, count in enumerate(WORDS[KINDS]):
        frequency = 1 / np.arange(1, count + 1)  # Zipf's law
        ranks[:, :, place] = rng.choice(count, (n, CLAUSES), p=frequency / frequency.sum())
    present = (KINDS > 0) | (rng.random(ranks.shape) < 0.5)
    present &= (np.arange(CLAUSES) <= rng.integers(CLAUSES, size=(n, 1)))[:, :, None]
    words = FIRST[KINDS] + ranks
    source = SPECIAL + FORMS * words
    target = source + forms[words, ranks[:, :, GOVERNOR]]
    target = _rows(target[:, :, ORDER], present[:, :, ORDER])
    target = np.pad(target, ((0, 0), (1, 0)), constant_values=BEGIN)
    both = torch.from_numpy(_rows(source, present)), torch.from_numpy(target)
    return tuple(x[:TRAINING] for x in both), tuple(x[TRAINING:] for x in both)


def _rows(tokens, present):
    """(N, LENGTH): the tokens that are present, in their order, then END."""
    tokens, present = (x.reshape(len(x), -1) for x in (tokens, present))
    order = np.argsort(~present, axis=1, kind="stable")
    tokens = np.take_along_axis(np.where(present, tokens, END), order, 1)
    return np.pad(tokens, ((0, 0), (0, 1)), constant_values=END)


class Translator(nn.Module):
    """Sentences (B, LENGTH) and translations up to a token (B, LENGTH) to logits of the next token.
    Attention has no padding mask: END is a token like the others."""

    def __init__(self, width=64, heads=4, layers=2):
        super().__init__()
        self.words = nn.ModuleList(nn.Embedding(VOCABULARY, width) for _ in range(2))
        self.positions = nn.ModuleList(nn.Embedding(LENGTH, width) for _ in range(2))
        self.transformer = nn.Transformer(
            width, heads, layers, layers, 4 * width, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(width, VOCABULARY)
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, *sides):
        source, target = (
            words(x) + positions.weight
            for words, positions, x in zip(self.words, self.positions, sides)
        )
        return self.head(self.transformer(source, target, tgt_mask=self.causal, tgt_is_causal=True))


def network():
    return Translator()


def _per_sentence(values, target):
    """(B,): the mean of `values` (B, LENGTH) over the target's tokens up to the first END."""
    counted = F.pad(target[:, :-1] != END, (1, 0), value=True)
    return (values * counted).sum(1) / counted.sum(1)


def loss(net, source, target):
    logits, target = net(source, target[:, :-1]), target[:, 1:]
    nats = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
    return _per_sentence(nats, target).mean()


def score(net, source, target):
    guesses, target = net(source, target[:, :-1]).argmax(2), target[:, 1:]
    return _per_sentence((guesses != target).float(), target)
