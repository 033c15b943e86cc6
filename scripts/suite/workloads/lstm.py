"""LSTM, characters of Shakespeare"""

import torch.nn as nn

from scripts.suite.workloads.gpt import LETTERS, METRIC, data, loss, score  # noqa: F401

BATCH, STEPS = 16, 3500
WIDTH, LAYERS = 128, 2


class LSTM(nn.Module):
    """Logits (B, T, LETTERS) of the characters after each of (B, T)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True)
        self.head = nn.Linear(WIDTH, LETTERS)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0])


def network():
    return LSTM()
