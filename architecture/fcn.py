"""The fully connected network."""

from itertools import pairwise

import torch.nn as nn

from architecture import onednn


class FCN(nn.Module):
    """`depth` linear layers, `width` wide, each but the last followed by sqrt(2) relu.

    The factor keeps the size of the activations: relu halves the second moment.
    Inputs of any shape (batch, ...) are flattened to (batch, inputs); outputs are (batch, classes).
    """

    def __init__(self, depth, width, inputs, classes):
        super().__init__()
        if depth < 2:
            raise ValueError(f"a fully connected network has a depth of 2 or more, not {depth}")
        sizes = [inputs] + [width] * (depth - 1) + [classes]
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, fan_out, bias=False) for fan_in, fan_out in pairwise(sizes)
        )

    def forward(self, x):
        x, (*hidden, last) = x.flatten(1), self.layers
        if onednn.takes(x, hidden):
            return last(onednn.HiddenLayers.apply(x, *[layer.weight for layer in hidden]))
        for layer in hidden:
            x = onednn.sqrt2_relu(layer(x))
        return last(x)
