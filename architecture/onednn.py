"""The hidden layers of the fully connected network by oneDNN.

Torch leaves float32 products to MKL, which takes AVX-512 on Intel's processors alone. oneDNN, which
torch has for convolutions, takes it wherever it is: twice as fast on AMD's.
`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.nn.modules import module

AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
)
HOOKS = ("forward", "forward_pre", "backward", "backward_pre")


def takes(x, layers):
    """Whether oneDNN can compute these layers, is faster, and no hook or transform looks on."""
    if not (AVAILABLE and torch.backends.mkldnn.enabled) or torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    hooked = any(getattr(module, f"_global_{kind}_hooks") for kind in HOOKS)
    if len(x) < 16 or torch.is_autocast_enabled("cpu") or transformed or hooked:
        return False
    tensors = [x, *(layer.weight for layer in layers)]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) and all(
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and min(layer.weight.shape) >= 64
        and layer.bias is None
        and "forward" not in vars(layer)
        and not any(getattr(layer, f"_{kind}_hooks") for kind in HOOKS)
        for layer in layers
    )


def sqrt2_relu(x):
    """sqrt(2) relu(x), in place: 6 % of a pass on a CPU."""
    return x.mul_(math.sqrt(2)).relu_()


def product(a, b):
    """a b^T for matrices (m, k) and (n, k)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


class HiddenLayers(torch.autograd.Function):
    """All the hidden layers at once: (B, in), weights (out, in), ... -> (B, out)."""

    @staticmethod
    def forward(ctx, x, *weights):
        ys = [x]
        for W in weights:
            ys.append(sqrt2_relu(product(ys[-1], W)))  # oneDNN's own relu makes 0 of NaN
        ctx.save_for_backward(*weights, *ys)
        return ys[-1]

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors  # once: a checkpoint unpacks them
        L = len(saved) // 2
        weights, (*xs, y) = saved[:L], saved[L:]
        if torch.is_grad_enabled():  # second derivatives: by layers that have one
            y = xs[0]
            for W in weights:
                y = sqrt2_relu(F.linear(y, W))
            inputs = [t for t, needed in zip((xs[0], *weights), ctx.needs_input_grad) if needed]
            grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
        to_x, *to_weights = ctx.needs_input_grad
        grads = [None] * L
        for i in reversed(range(L)):
            grad = torch.ops.aten.threshold_backward(grad, y, 0).mul_(math.sqrt(2))
            if to_weights[i]:
                grads[i] = product(grad.t(), xs[i].t())
            if not i and not to_x:
                return None, *grads
            grad, y = product(grad, weights[i].t()), xs[i]
        return grad, *grads
