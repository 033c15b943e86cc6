"""The fully connected network."""

import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


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
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = hidden(x, layer.weight)
        return self.layers[-1](x)


def hidden(x, W):
    """sqrt(2) relu(x W^T), (B, out), for x (B, in) and W (out, in)."""
    if ONEDNN and is_fast(x, W):
        return _Hidden.apply(x, W)
    # In place, 6 % of a pass on a CPU; relu(sqrt(2) x) is sqrt(2) relu(x), to the bit.
    return F.linear(x, W).mul_(math.sqrt(2)).relu_()


# Torch leaves float32 products to MKL, which takes AVX-512 on Intel's processors alone. oneDNN,
# which torch has for convolutions, takes it wherever it is: twice as fast on AMD's.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)


def is_fast(x, W):
    """Whether oneDNN can take these, and gains by it."""
    float32 = x.dtype == W.dtype == torch.float32 and x.device.type == W.device.type == "cpu"
    ordinary = not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    return float32 and ordinary and min(W.shape) >= 64 and len(x) >= 16


def product(a, b, then="none"):
    """a b^T for matrices (m, k) and (n, k), then nothing or "relu"."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, then, [], "")


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W):
        y = product(x, W, "relu").mul_(math.sqrt(2))
        ctx.save_for_backward(x, W, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W, y = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0).mul_(math.sqrt(2))
        to_x, to_W = ctx.needs_input_grad
        return product(grad, W.t()) if to_x else None, product(grad.t(), x.t()) if to_W else None
