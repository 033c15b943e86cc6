"""The paper in float64, line by line: slow, literal, and what the fast code must match."""

import math

import pytest
import torch


def near(x, rel):
    """Equal up to a relative error, however small x is."""
    return pytest.approx(x, rel=rel, abs=0)


def relative(a, b):
    """Norm of the difference over the norm of b, both float64."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def bits(x):
    """The bytes of a tensor, in the order of its indices."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    return x.view(-1).view(torch.uint8)


def same(xs, ys):
    """Whether lists of tensors agree to the bit."""
    return len(xs) == len(ys) and all(map(torch.equal, map(bits, xs), map(bits, ys)))


def matrices(tensor):
    """The (out, in) matrices of a weight (out, in, *kernel): one a kernel position."""
    return list(tensor.reshape(*tensor.shape[:2], -1).movedim(2, 0).contiguous())


def frobenius(g):
    """Scaled, as the squares of a float64 need not be one."""
    m = g.abs().max().item()
    return m and m * (g / m).square().sum().sqrt().item()


def eta_of(G):
    """log((1 + sqrt(1 + 4 G)) / 2), in a form that keeps its digits at both ends of float64."""
    return math.log1p(G / (0.5 + math.sqrt(G + 0.25)))


def scale_of(shape):
    return math.sqrt(shape[0] / shape[1]) / math.sqrt(math.prod(shape[2:]))


def reference_step(weights, grads, gain=1.0):
    """(new weights, eta, G), everything float64; a gradient of None counts in L alone. `gain` may
    be a list, of each weight."""
    L, G, new = len(weights), 0.0, []
    for W, grad in zip(weights, grads):
        if grad is not None:
            G += sum(scale_of(W.shape) * frobenius(g) for g in matrices(grad.double())) / L
    eta = eta_of(G)
    for W, grad, own in zip(weights, grads, gain if isinstance(gain, list) else [gain] * L):
        W = W.double().clone()
        if grad is not None:
            columns = []
            for w, g in zip(matrices(W), matrices(grad.double())):
                norm = frobenius(g)
                s = scale_of(W.shape)
                columns.append(w if norm == 0 else w - own * eta / L * s * (g / norm))
            W = torch.stack(columns, dim=2).reshape(W.shape)
        new.append(W)
    return new, eta, G


class Averaging(torch.optim.SGD):
    """An optimiser that answers with other weights than it trains, as the schedule-free ones do:
    in evaluation each weight is half of what is trained."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.modes = []
        for group in self.param_groups:
            group["halved"] = False

    def train(self):
        self._turn("train", False, 2.0)

    def eval(self):
        self._turn("eval", True, 0.5)

    @torch.no_grad()
    def _turn(self, mode, halved, factor):
        self.modes.append(mode)
        for group in self.param_groups:
            if group["halved"] != halved:
                group["halved"] = halved
                for p in group["params"]:
                    p.mul_(factor)

    def step(self, closure=None):
        assert not any(group["halved"] for group in self.param_groups)
        return super().step(closure)
