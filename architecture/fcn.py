"""The fully connected network."""

import math
from itertools import pairwise

import torch
import torch.nn as nn
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
        x, (*hidden, last) = x.flatten(1), self.layers
        if ONEDNN and is_fast(x, hidden):
            return last(_Hidden.apply(x, *[layer.weight for layer in hidden]))
        for layer in hidden:
            # In place, 6 % of a pass on a CPU; relu(sqrt(2) x) is sqrt(2) relu(x), to the bit.
            x = layer(x).mul_(math.sqrt(2)).relu_()
        return last(x)


# Torch leaves float32 products to MKL, which takes AVX-512 on Intel's processors alone. oneDNN,
# which torch has for convolutions, takes it wherever it is: twice as fast on AMD's.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)


def is_fast(x, hidden):
    """Whether oneDNN can take these layers, gains by it, and nobody watches them one by one."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or len(x) < 16:
        return False
    tensors = [x, *(layer.weight for layer in hidden)]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and all(
        type(layer.weight) is nn.Parameter
        and min(layer.weight.shape) >= 64
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        for layer in hidden
    )


def product(a, b, then="none"):
    """a b^T for matrices (m, k) and (n, k), then nothing or "relu"."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, then, [], "")


class _Hidden(torch.autograd.Function):
    """All the hidden layers at once: (B, in), weights (out, in), ... -> (B, out)."""

    @staticmethod
    def forward(ctx, x, *weights):
        ys = [x]
        for W in weights:
            ys.append(product(ys[-1], W, "relu").mul_(math.sqrt(2)))
        ctx.save_for_backward(*weights, *ys)
        return ys[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        L = len(ctx.saved_tensors) // 2
        weights, (*xs, y) = ctx.saved_tensors[:L], ctx.saved_tensors[L:]
        to_x, *to_weights = ctx.needs_input_grad
        grads = [None] * L
        for i in reversed(range(L)):
            # sqrt(2) grad where y is positive, else 0, in one pass: that of elu for alpha = 0.
            grad = torch.ops.aten.elu_backward(grad, 0, math.sqrt(2), 1, True, y)
            if to_weights[i]:
                grads[i] = product(grad.t(), xs[i].t())
            if not i and not to_x:
                return None, *grads
            grad, y = product(grad, weights[i].t()), xs[i]
        return grad, *grads
