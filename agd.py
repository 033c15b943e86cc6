"""Automatic Gradient Descent (AGD): an optimiser without a learning rate, in one file.

    import torch
    from agd import AGD, init_weights

    init_weights(net.parameters())              # orthogonal, once, before training
    optimizer = AGD(net.parameters())           # nothing to tune

Source: Bernstein, Mingard, Huang, Azizan, Yue, "Automatic Gradient Descent: Deep Learning without
Hyperparameters", arXiv 2304.05187. For L weight matrices W_k of shape (d_k, d_{k-1}), an objective
that is a *mean* over examples, and s_k = sqrt(d_k / d_{k-1}):

    initialise    W_k   uniform semi-orthogonal, times s_k
    summarise     G   = 1/L sum_k s_k |grad W_k|_F
    automatic     eta = log((1 + sqrt(1 + 4 G)) / 2)
    update        W_k <- W_k - eta/L s_k grad W_k / |grad W_k|_F

A weight of shape (out, in, *kernel) is one of the L layers and counts as prod(kernel) matrices of
shape (out, in), each with its own norm, with s_k = sqrt(out / in) / sqrt(prod(kernel)).

The size of a step follows from the size of the gradient, so the gradient must be that of the mean:
unscale it after mixed precision, average it after accumulation and over devices, before `step`.
"""

import math

import torch
from torch import Tensor

__all__ = ["AGD", "init_weights"]


class AGD(torch.optim.Optimizer):
    """Automatic Gradient Descent, arXiv 2304.05187.

    Args:
        params: what every torch optimiser takes: an iterable of tensors, of (name, tensor) pairs,
            or of group dicts. Each weight has the shape (out, in, *kernel): linear, convolutional
            in any number of dimensions, grouped or depthwise; any memory format and float dtype.
        gain: multiplies the update and nothing else; a number or a 0-dim tensor, finite and not
            negative. It is the group key `lr`, so that torch's schedulers work and 0 freezes a
            group (which still counts in L and G).

    L counts every tensor of every group; G and eta are one for all groups. A tensor without a
    gradient is skipped: it adds nothing to G and still counts in L.

    Attributes, 0-dim tensors on the device of the first weight, never read by the optimiser:
        eta: the automatic learning rate of the last step; NaN before the first one, and for a
            step that was skipped.
        G: the gradient summary of the last step.
        skipped: int64, the number of steps so far that changed no weight because a gradient held
            a NaN or an infinity.

    A zero gradient, of a matrix or of one kernel position, leaves those weights as they were. A
    step needs one scratch copy of the gradients (float32 at least) and keeps no state.

    Raises:
        ValueError: in the constructor, for an empty list, a gain out of range, or a tensor that
            has fewer than two dimensions, no elements, or is not real floating point; at a step,
            for a sparse or complex gradient. The message names the tensor and the way out.
    """

    def __init__(self, params, gain=1.0):
        if hasattr(params, "named_parameters"):
            raise TypeError("AGD takes net.parameters() or net.named_parameters(), not the network")
        if not isinstance(params, Tensor):
            params = list(params)
            if not any(True for _ in _named(params)):
                raise ValueError("AGD got an empty parameter list: pass net.parameters()")
        super().__init__(params, {"lr": gain})
        device = next(p for _, p in _named(self.param_groups)).device
        self.eta = torch.full((), math.nan, dtype=_wide(device), device=device)
        self.G = torch.full_like(self.eta, math.nan)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group):
        """Add a group, {"params": ..., "lr": gain}, checked as in the constructor."""
        if isinstance(param_group, dict) and not isinstance(param_group["params"], (Tensor, set)):
            group = {"lr": self.defaults["lr"], **param_group, "params": list(param_group["params"])}
            if "gain" in group:
                group["lr"] = group.pop("gain")
            if not 0 <= group["lr"] < math.inf:
                raise ValueError(f"the gain must be finite and not negative, not {group['lr']}")
            # A tied weight is one layer, however often it is listed.
            entries = {id(_tensor(entry)): entry for entry in group["params"]}
            group["params"] = list(entries.values())
            for name, p in _named([group]):
                _check(name, p)
            param_group = group
        elif isinstance(param_group, dict) and isinstance(param_group["params"], Tensor):
            return self.add_param_group({**param_group, "params": [param_group["params"]]})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every weight that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        L = sum(len(group["params"]) for group in self.param_groups)
        buckets = self._buckets()
        if not buckets:
            self.G, self.eta = torch.zeros_like(self.G), torch.zeros_like(self.eta)
            return loss
        home = self.skipped.device

        # One scratch tensor a bucket, (layers, *shape), so that the number of kernels grows with
        # the number of distinct shapes and not with L; one norm a matrix, (layers, 1, 1, *kernel).
        scratch = [torch.stack(b.grads).to(b.dtype) for b in buckets]
        norms = [
            torch.linalg.vector_norm(u, dim=b.matrix, keepdim=True, dtype=_wide(u.device))
            for b, u in zip(buckets, scratch)
        ]
        scaled = torch._foreach_mul(norms, [b.s for b in buckets])
        G = torch.cat([x.flatten().to(home) for x in scaled]).sum() / L
        # log((1 + sqrt(1 + 4G)) / 2), without the cancellation at small G
        eta = torch.log1p(2 * G / (1 + torch.sqrt(1 + 4 * G)))
        finite = torch.isfinite(G)

        # The factor eta / (L norm) of a float32 gradient can lie outside float32's range, though
        # the update never does: so it is applied as a division and a product that both lie inside.
        n = torch.cat([x.flatten().to(home) for x in norms])
        moves = (n > 0) & finite
        divisor = n.clamp(2.0**-126, 2.0**126)
        factor = (eta / L * divisor / n).masked_fill(~moves, 0)
        # All ones where the weight moves, else all zeros. Where it stays, the update is to be +0
        # bit for bit, whatever the gradient held: NaN * 0 is NaN, and -0 would change a weight of -0.
        keep = moves.to(torch.int32).neg()

        counts = [x.numel() for x in norms]
        weights, updates = [], []
        for b, u, norm, d, c, k in zip(
            buckets, scratch, norms, divisor.split(counts), factor.split(counts), keep.split(counts)
        ):
            if isinstance(b.gain, (int, float)) and b.gain == 0:
                continue
            u.div_(d.view_as(norm).to(u))
            bits = u.view(torch.int64 if u.dtype == torch.float64 else torch.int32)
            bits.bitwise_and_(k.view_as(norm).to(bits))
            u.mul_((c * (b.s * b.gain)).view_as(norm).to(u))
            weights += b.weights
            updates += u.unbind()
        if weights:
            torch._foreach_sub_(weights, updates)

        self.G, self.eta = G, eta.masked_fill(~finite, math.nan)
        self.skipped += ~finite
        return loss

    def _buckets(self):
        """The weights that have a gradient, in buckets of one shape, layout, dtype, device, gain."""
        buckets = {}
        for group in self.param_groups:
            gain = group["lr"]
            names = group.get("param_names", [None] * len(group["params"]))
            for name, p in zip(names, group["params"]):
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    kind = "complex" if p.grad.is_complex() else "sparse"
                    raise ValueError(
                        f"the gradient of {_label(name, p)} is {kind}, and AGD needs a dense, real "
                        "one: build the layer with sparse=False and real weights"
                    )
                # Dimensions as they lie in memory, so that channels_last weights are as fast.
                order = tuple(sorted(range(p.ndim), key=lambda i: -p.stride(i)))
                key = (p.shape, order, p.dtype, p.grad.dtype, p.device)
                key += (id(gain) if isinstance(gain, Tensor) else gain,)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(p, order, gain)
                bucket.weights.append(p.permute(order))
                bucket.grads.append(p.grad.permute(order))
        return list(buckets.values())

    def __getstate__(self):
        return {**super().__getstate__(), "eta": self.eta, "G": self.G, "skipped": self.skipped}


class _Bucket:
    """Weights of one shape, and what AGD derives from that shape."""

    def __init__(self, p, order, gain):
        self.weights, self.grads, self.gain = [], [], gain
        self.s = _scale(p.shape)
        self.dtype = torch.promote_types(p.dtype, torch.float32)
        self.matrix = (1 + order.index(0), 1 + order.index(1))


@torch.no_grad()
def init_weights(params, generator=None):
    """Draw every weight anew, in place: uniform (Haar) semi-orthogonal times sqrt(out / in).

    A weight of shape (out, in, *kernel) holds prod(kernel) matrices, each drawn on its own and
    divided by sqrt(prod(kernel)).

    Args:
        params: anything that `AGD` takes. A tensor listed twice is drawn once.
        generator: a CPU `torch.Generator`; None is torch's default one. The draw is made on the
            CPU in float64, tensor by tensor in the order given, then cast and copied: a seed means
            the same weights on every device and, up to rounding, in every dtype.

    Raises:
        ValueError: for what the constructor of `AGD` refuses, and for a generator of a GPU.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError("init_weights draws on the CPU: pass torch.Generator(), without a device")
    sizes, seen = {}, set()
    for name, p in _named(params):
        _check(name, p)
        if id(p) not in seen:
            seen.add(id(p))
            rows, columns = max(p.shape[:2]), min(p.shape[:2])
            positions = math.prod(p.shape[2:])
            z = torch.randn(positions, rows, columns, dtype=torch.float64, generator=generator)
            sizes.setdefault((rows, columns), []).append((p, z))
    for size in list(sizes):
        weights, draws = zip(*sizes.pop(size))
        Q, R = torch.linalg.qr(torch.cat(draws))
        # Haar measure needs the factorisation that has a positive diagonal in R.
        Q.mul_(R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
        for p, q in zip(weights, Q.split([len(z) for z in draws])):
            q = q if p.shape[0] >= p.shape[1] else q.mT
            q = q.unflatten(0, p.shape[2:]) if p.ndim > 2 else q.squeeze(0)
            p.copy_(q.movedim((-2, -1), (0, 1)) * _scale(p.shape))


def _scale(shape):
    """s of a weight of shape (out, in, *kernel)."""
    return math.sqrt(shape[0] / shape[1] / math.prod(shape[2:]))


def _wide(device):
    """Norms accumulate in float64: no square of a float32 over- or underflows in it.

    Apple's GPU has float32 alone: there a norm below about 1e-19 counts as zero and one above
    about 1e19 as infinite, which leaves the weights as they were.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def _tensor(entry):
    return entry[1] if isinstance(entry, tuple) else entry


def _named(params):
    """(name or None, tensor) for each tensor in what a torch optimiser takes."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            names = entry.get("param_names", [])
            for i, (name, p) in enumerate(_named(entry["params"])):
                yield names[i] if i < len(names) else name, p
        elif isinstance(entry, tuple):
            yield entry
        else:
            yield None, entry


def _label(name, p):
    return f"{name or 'a tensor'} of shape {tuple(p.shape)}"


def _check(name, p):
    if not isinstance(p, Tensor):
        raise TypeError(f"AGD takes tensors or (name, tensor) pairs, not {type(p).__name__}")
    if not p.is_floating_point():
        raise ValueError(f"AGD has no rule for {_label(name, p)}, of dtype {p.dtype}: make it real "
                         "and floating point, or leave it out")
    if p.ndim < 2:
        raise ValueError(f"AGD has no rule for {_label(name, p)}: it takes weights of two or more "
                         "dimensions; build the layer without this one (bias=False, affine=False)")
    if p.numel() == 0:
        raise ValueError(f"AGD has no rule for {_label(name, p)}, which has no elements: leave it out")
