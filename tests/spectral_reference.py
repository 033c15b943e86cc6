"""The spectral rule in float64, line by line: slow, literal, and what SpectralAGD must match. Every
block keeps z, x, m and the weights P; its polar factors are made of singular values."""

import math

import torch

MU, BETA, STRETCH = 0.5, 0.8, 5


def blocks(W, role, parts=1):
    """The blocks of a contiguous tensor, as views of it (rows, columns); a vector is a column."""
    if role in ("bias", "gain"):
        return [W.view(-1, 1)]
    if role == "rows":
        return list(W.view(-1, W.shape[-1], 1))
    if role == "transposed":
        return list(W.chunk(parts, 1))
    return list(W.view(parts, len(W) // parts, -1))  # of a convolution im2col matrices


def rho(W):  # the RMS singular value
    return (W.norm() / math.sqrt(min(W.shape))).item()


def polar(m, rows=128):
    """The factor of m, or of each of the fewest pieces of at most so many rows of m, its shorter
    side."""
    if m.shape[0] > m.shape[1]:
        return polar(m.mT, rows).mT
    if len(m) == 1:
        return m / m.norm()
    size = math.ceil(len(m) / math.ceil(len(m) / rows))
    return torch.cat([polynomials(piece) for piece in m.split(size)])


# Odd polynomials a x + b x^3 + c x^5 (arXiv 2505.16932), the first one first.
POLAR = [
    (8.321959, -24.119952, 17.530393), (4.038903, -2.947851, 0.544847),
    (3.581888, -2.630861, 0.509978), (2.617569, -1.910364, 0.431976),
    (1.959180, -1.346912, 0.389642),
]  # fmt: skip


def polynomials(m):
    """U p(S / |S|_8) V^T, which is nearly the polar factor where S / |S|_8 is over 0.0025."""
    U, S, Vh = torch.linalg.svd(m, full_matrices=False)
    S = S / S.pow(8).sum().pow(1 / 8) if S[0] else S
    for a, b, c in POLAR:
        S = a * S + b * S**3 + c * S**5
    return U * S @ Vh


class Block:
    """z, x, m and P of one block, which start at W; s, its length at the start; held, whether it
    has a length apart from Y's, s exp(y), with the numbers lz, lx and r of y."""

    def __init__(self, W, s, held):
        self.z, self.x, self.P, self.m = W.clone(), W.clone(), W.clone(), torch.zeros_like(W)
        self.s, self.held, self.t = s, held, 0
        self.lz = self.lx = self.r = 0.0

    def Y(self):
        return (1 - BETA) * self.z + BETA * self.x

    def y(self):
        return (1 - BETA) * self.lz + BETA * self.lx

    def at_length(self, Y, y):
        return self.s * math.exp(y) * Y / rho(Y) if self.held else Y


class SpectralReference:
    """The rule for a list of Blocks."""

    def __init__(self, blocks, L):
        self.blocks, self.L, self.eta, self.G = blocks, L, math.nan, math.nan

    def step(self, grads, gains=None):
        """A step with a gradient and a gain a block; a gradient of None or zero leaves a block."""
        if not all(g is None or g.isfinite().all() for g in grads):
            return
        moves, G = [], 0.0
        for b, g, gain in zip(self.blocks, grads, gains or [1.0] * len(grads)):
            if g is None or not g.any():
                continue
            size = b.s
            if b.held:  # the length has a gradient of its own
                size, along = rho(b.P), (g * b.P).sum()
                g = g - b.P * along / (b.P * b.P).sum()
                b.r = (1 - MU) * along.item() + MU * b.r
            b.m = (1 - MU) * g + MU * b.m
            D = polar(b.m)
            G += size * (g * D).sum().item()
            moves.append((b, D, gain))
        self.G = max(0.0, G / self.L)
        self.eta = math.log((1 + math.sqrt(1 + 4 * self.G)) / 2)
        for b, D, gain in moves:
            if gain * self.eta > 0:
                b.t += 1
                if b.held:
                    c = b.r / (rho(b.P) * (b.m * D).sum().item())
                    c = min(max(c, -1.0), 1.0)
                    b.lz -= gain * self.eta / self.L * b.s / rho(b.Y()) * c
                    b.lz = min(max(b.lz, -STRETCH), STRETCH)
                    b.lx += 2 / (b.t + 1) * (b.lz - b.lx)
                b.z = b.z - gain * self.eta / self.L * b.s * D
                b.x = b.x + 2 / (b.t + 1) * (b.z - b.x)
                b.P = b.at_length(b.Y(), b.y())
