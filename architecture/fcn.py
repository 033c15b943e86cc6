"""The fully connected network."""

import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules import module


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
            x = sqrt2_relu(layer(x))
        return last(x)


def sqrt2_relu(x):
    """sqrt(2) relu(x), in place: 6 % of a pass on a CPU."""
    return x.mul_(math.sqrt(2)).relu_()


# Torch leaves float32 products to MKL, which takes AVX-512 on Intel's processors alone. oneDNN,
# which torch has for convolutions, takes it wherever it is: twice as fast on AMD's.
ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)


def is_fast(x, hidden):
    """Whether oneDNN can take these layers, gains by it, and nobody looks into them."""
    if len(x) < 16 or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if transformed or any(getattr(module, f"_global_{kind}_hooks") for kind in HOOKS):
        return False
    tensors = [x, *(layer.weight for layer in hidden)]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and all(
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and min(layer.weight.shape) >= 64
        and layer.bias is None
        and "forward" not in vars(layer)
        and not any(getattr(layer, f"_{kind}_hooks") for kind in HOOKS)
        for layer in hidden
    )


HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def product(a, b):
    """a b^T for matrices (m, k) and (n, k)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class _Hidden(torch.autograd.Function):
    """All the hidden layers at once: (B, in), weights (out, in), ... -> (B, out)."""

    @staticmethod
    def forward(ctx, x, *weights):
        ys = [x]
        for W in weights:
            # relu by torch: oneDNN's makes 0 of what is not a number
            ys.append(sqrt2_relu(product(ys[-1], W)))
        ctx.save_for_backward(*weights, *ys)
        return ys[-1]

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        L = len(saved) // 2
        weights, (*xs, y) = saved[:L], saved[L:]
        to_x, *to_weights = ctx.needs_input_grad
        if torch.is_grad_enabled():  # with a derivative of its own, by layers that have one
            y = xs[0]
            for W in weights:
                y = sqrt2_relu(F.linear(y, W))
            wanted = [t for t, asked in zip((xs[0], *weights), ctx.needs_input_grad) if asked]
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)
        grads = [None] * L
        for i in reversed(range(L)):
            grad = torch.ops.aten.threshold_backward(grad, y, 0).mul_(math.sqrt(2))
            if to_weights[i]:
                grads[i] = product(grad.t(), xs[i].t())
            if not i and not to_x:
                return None, *grads
            grad, y = product(grad, weights[i].t()), xs[i]
        return grad, *grads
