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


def step_and_check(optimizer, zeroed=False):
    """A step of AGD on tensors, held to the reference to the last digits, and to every bit of what
    does not move. `zeroed` weights are the update alone."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    gains = [float(group["lr"]) for group in optimizer.param_groups for _ in group["params"]]
    gains = [gain if 0 <= gain < math.inf else 0.0 for gain in gains]  # a tensor is not refused
    for p in weights if zeroed else []:
        p.data.zero_()
    before, grads = [p.detach().clone() for p in weights], [p.grad for p in weights]
    kept = [g.clone() for g in grads if g is not None]
    strides, skipped = [p.stride() for p in weights], optimizer.skipped.item()
    finite = all(g.isfinite().all() for g in kept)
    optimizer.step()

    assert [p.stride() for p in weights] == strides
    assert all(p.grad is g for p, g in zip(weights, grads))
    assert same([g for g in grads if g is not None], kept)
    assert optimizer.skipped.item() == skipped + (not finite)
    G, eta = optimizer.G.item(), optimizer.eta.item()
    if not finite:
        assert math.isnan(eta) and not math.isfinite(G) and same(weights, before)
        return
    rel = 1e-12 if all(p.dtype == torch.float64 for p in weights) else 1e-6  # eta is one for all
    updates, exact, their_G = reference_step([torch.zeros_like(p) for p in weights], grads, gains)
    assert G == near(their_G, rel) and eta == near(exact, rel)
    # log((1 + sqrt(1 + 4G)) / 2) is the root of exp(eta) (exp(eta) - 1) = G
    assert eta >= 0 and math.exp(eta) * math.expm1(eta) == near(G, 1e-12)
    for p, gain, old, update in zip(weights, gains, before, updates):
        still = torch.ones(p.shape[2:], dtype=torch.bool)
        if p.grad is not None and gain > 0:
            still = (update == 0).all(0).all(0)  # a zero gradient, or a step too small for float64
        assert same([p[..., still]], [old[..., still]])
        # The update is right to its working precision, at the eta that was taken, and that has a
        # smallest number; then the new weight is rounded.
        new = old.double() + update * (eta / exact if exact > 0 else 1)
        own = torch.finfo(p.dtype)
        work = torch.finfo(torch.promote_types(p.dtype, torch.float32))
        bound = (2e-12 if p.dtype == torch.float64 else 2e-6) * (new - old.double()).abs()
        bound += own.eps * new.abs() + own.tiny * own.eps
        bound += work.tiny * work.eps * (2 + gain * exact * scale_of(p.shape))
        wrong = (p.double() - new).abs() > bound
        assert not wrong.any(), (p.shape, p.stride(), p.double()[wrong], new[wrong])


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
