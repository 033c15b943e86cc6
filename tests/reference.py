"""The paper in float64, line by line: slow, literal, and what the fast code must match.

Eta is as the paper writes it, so its digits are good from G of about 1e-4 on."""

import math

import torch


def matrices(tensor):
    """The (out, in) matrices of a weight (out, in, *kernel): one a kernel position."""
    return list(tensor.reshape(*tensor.shape[:2], -1).movedim(2, 0).contiguous())


def frobenius(g):
    """Scaled, as the squares of a float64 need not be one."""
    m = g.abs().max().item()
    return m and m * (g / m).square().sum().sqrt().item()


def reference_step(weights, grads, gain=1.0):
    """(new weights, eta, G), everything float64; a gradient of None counts in L alone."""
    L = len(weights)
    G = 0.0
    for W, grad in zip(weights, grads):
        if grad is not None:
            d_out, d_in = W.shape[:2]
            s = math.sqrt(d_out / d_in) / math.sqrt(math.prod(W.shape[2:]))
            for g in matrices(grad.double()):
                G += s * frobenius(g)
    G /= L
    eta = math.log((1 + math.sqrt(1 + 4 * G)) / 2)
    new = []
    for W, grad in zip(weights, grads):
        W = W.double().clone()
        if grad is not None:
            d_out, d_in = W.shape[:2]
            s = math.sqrt(d_out / d_in) / math.sqrt(math.prod(W.shape[2:]))
            columns = []
            for w, g in zip(matrices(W), matrices(grad.double())):
                norm = frobenius(g)
                columns.append(w if norm == 0 else w - gain * eta / L * s * g / norm)
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
