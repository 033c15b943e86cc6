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

import functools
import importlib
import math

import torch
from torch import Tensor
from torch.linalg import vector_norm

__all__ = ["AGD", "init_weights"]

GPUS = ("cuda",)  # the devices whose step is that of agd_cuda.py; the CPU's is in agd_cpu.py


class AGD(torch.optim.Optimizer):
    """Automatic Gradient Descent, arXiv 2304.05187.

    Args:
        params: what every torch optimiser takes: an iterable of tensors, of (name, tensor) pairs,
            or of group dicts. Each weight has the shape (out, in, *kernel): linear, convolutional
            in any number of dimensions, grouped or depthwise; any memory format and float dtype.
        gain: multiplies the update and nothing else; a number or a 0-dim tensor, finite and not
            negative. It is the group key `lr`, so that torch's schedulers work and 0 freezes a
            group (which still counts in L and G). Under torch.compile, let a scheduler change a
            tensor: a number is compiled in.
        fused: whether a step takes few passes over memory. None: where there is such a step (for
            float32 weights on a CPU; for any on a CUDA GPU with Triton and agd_cuda.py) and these
            gradients allow it, else the plain step. False: the plain step. True: as None, but
            weights that have no other than the plain step are refused. All agree to rounding.

    L counts every tensor of every group; G and eta are one for all groups. A tensor without a
    gradient is skipped: it adds nothing to G and still counts in L.

    Attributes, 0-dim tensors on the device of the first weight, where the optimiser leaves them:
        eta: the automatic learning rate of the last step; NaN before the first one, and for a
            step that was skipped.
        G: the gradient summary of the last step.
        skipped: int64, the number of steps so far that changed no weight because a gradient held
            a NaN or an infinity.

    A weight may be sharded over devices, a DTensor as of torch's fully_shard: its norms are those
    of the whole matrix, for two small all-reduces a step. Every device has shards of all weights.

    A zero gradient, of a matrix or of one kernel position, leaves those weights as they were. A
    fused step needs a megabyte of scratch memory at most (on a GPU 3 % of the weights'), the plain
    one a copy of the gradients (float32 at least) and another of those of one shape at a time. The
    optimiser keeps no state; what was counted in `skipped` is part of the state dict.

    Raises:
        ValueError: in the constructor, for an empty list, a gain out of range, or a tensor that
            has fewer than two dimensions, no elements, or is not real floating point, or is sharded
            along its kernel, or with fused=True has no fused step; at a step, for a sparse or
            complex gradient. The message names the tensor and the way out.
    """

    def __init__(self, params, gain=1.0, fused=None):
        self.fused, self._key, self._plan = fused, None, None
        super().__init__(_listed(params), {"lr": gain})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(EMPTY)
        device = next(p for group in self.param_groups for p in group["params"]).device
        self.eta = torch.full((), math.nan, dtype=_wide(device), device=device)
        self.G = torch.full_like(self.eta, math.nan)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def add_param_group(self, param_group):
        """Add a group, {"params": ..., "lr": gain}, checked as in the constructor."""
        group = {"lr": self.defaults["lr"], **param_group}
        group["lr"] = group.pop("gain", group["lr"])
        _check_gain(group["lr"])
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # a set has no order: torch refuses it
            params = list(params)
            # A tied weight is one layer, however often it is listed, and is where it is first.
            tensors = {}
            for x in params:
                tensors.setdefault(id(x[1] if isinstance(x, tuple) else x), x)
            params = list(tensors.values())
        group["params"] = params
        for name, p in _named([group]):
            _check(name, p)
            if self.fused and not _has_fast_step(p):
                raise ValueError(f"there is no fused step for {_label(name, p)}, {p.dtype} on "
                                 f"{p.device}: fused=None takes it where there is one")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every weight that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        L = sum(len(group["params"]) for group in self.param_groups)
        found = None if self.fused is False else self._fused_step(L)
        self.G, self.eta = found or self._plain_step(L)
        return loss

    def _fused_step(self, L):
        """(G, eta) after a step in few passes over memory; None, and nothing has changed, where
        these weights or these gradients need the plain step."""
        if torch.compiler.is_compiling():
            return None
        weights, grads, gains, groups = [], [], [], []
        for i, group in enumerate(self.param_groups):
            gain = group["lr"]
            if not isinstance(gain, Tensor):
                _check_gain(gain)  # a scheduler may have changed it
            here = [p for p in group["params"] if p.grad is not None]
            weights += here
            grads += [p.grad for p in here]
            groups += [i] * len(here)
            gains.append(gain)
        if not weights:
            return None
        if weights[0].device.type in GPUS:
            return self._step_on_a_gpu(weights, grads, gains, groups, L)
        if any(isinstance(gain, Tensor) for gain in gains):
            return None
        gains = [gains[i] for i in groups]
        # A plan keeps the storage of its weights, so that an address is that of one weight.
        key = [L, gains, [(p.data_ptr(), p.shape, p.stride(), p.dtype) for p in weights]]
        if key != self._key:
            # Of ordinary tensors on the CPU, whatever the defaults are just now.
            with torch.inference_mode(False), torch.device("cpu"):
                self._key, self._plan = key, _plan_on_the_cpu(weights, gains, L)
        return None if self._plan is None else self._plan.step(grads)

    def _step_on_a_gpu(self, weights, grads, gains, groups, L):
        kernels, device = _kernels("cuda"), weights[0].device
        if kernels is None or not kernels.trusted(device, AGD):
            return None
        if not all(_is_plain(x) and x.device == device for x in (*weights, *grads)):
            return None
        if self._key != [L, groups] or not self._plan.fits(weights):
            scales = [_scale(p.shape) for p in weights]
            with torch.inference_mode(False), torch.device("cpu"):
                self._plan = kernels.Plan.of(weights, scales, L, groups)
            self._key = None if self._plan is None else [L, groups]
        if self._plan is None:
            return None
        if self.skipped.device != device:  # the network has moved since
            self.skipped = self.skipped.to(device)
        found = self._plan.step(grads, gains, self.skipped)
        if found is not None:  # the kernels write past autograd, which has to know
            torch.autograd.graph.increment_version(weights)
        return found

    def _plain_step(self, L):
        """(G, eta) after a step of any weights and gradients."""
        buckets = self._buckets()
        if not buckets:
            return torch.zeros_like(self.G), torch.zeros_like(self.eta)
        home = buckets[0].weights[0].device
        wide = _wide(home)
        if self.skipped.device != home:  # the network has moved since
            self.skipped = self.skipped.to(home)

        # Each gradient as u = grad / m, m the largest magnitude in its matrix: no square over- or
        # underflows, whatever the scale. One tensor (layers, *shape) a bucket, so that the number
        # of kernels grows with the number of distinct shapes and not with L; m and the squared
        # norm of u have 1 in the place of a matrix's dimensions.
        ms = _over_shards(buckets, [b.largest() for b in buckets], "max")
        us, squares = zip(*[b.normalise(m) for b, m in zip(buckets, ms)])
        squares = _over_shards(buckets, squares, "sum")
        shapes, sizes = [m.shape for m in ms], [m.numel() for m in ms]
        flat = [x.flatten() for x in (*squares, *ms)]
        if any(x.device != home for x in flat):
            flat = [x.to(home) for x in flat]
        squares, ms = torch.cat(flat).to(wide).chunk(2)  # an entry a matrix
        norms = squares.sqrt()
        torch._foreach_mul_(ms.split(sizes), [b.s for b in buckets])
        G = torch.dot(norms, ms) / L
        # log((1 + sqrt(1 + 4G)) / 2), without the cancellation at small G or the overflow at large
        eta = (G / (G + 0.25).sqrt_().add_(0.5)).log1p_()
        finite = eta < math.inf

        moves = (norms > 0) & finite
        factors = (eta / L / norms).masked_fill_(~moves, 0).split(sizes)
        # All ones where the weight moves, else all zeros. Where it stays, the update is +0, bit
        # for bit, whatever the gradient held: NaN * 0 is NaN, and -0 would change a weight of -0.
        keeps = moves.to(torch.int32).neg_().split(sizes)
        weights, updates = [], []
        for b, u, shape, factor, keep in zip(buckets, us, shapes, factors, keeps):
            gain = b.gain
            if isinstance(gain, Tensor):  # checked without a read: out of range, it is 0
                gain = gain.detach().nan_to_num(0, 0, 0).clamp_min(0)
                keep = keep * (gain > 0)
            elif gain == 0:
                continue
            bits = u.view(torch.int64 if u.dtype == torch.float64 else torch.int32)
            bits.bitwise_and_(keep.view(shape).to(bits))
            u.mul_((factor * (b.s * gain)).view(shape).to(u))
            weights += b.weights
            updates += u.unbind()
        if weights:
            torch._foreach_sub_(weights, updates)

        self.skipped += ~finite
        return G, eta.masked_fill_(~finite, math.nan)

    def _buckets(self):
        """The weights that have a gradient, by shape, layout, dtype, device and gain."""
        buckets = {}
        for group in self.param_groups:
            gain = group["lr"]
            if not isinstance(gain, Tensor):
                _check_gain(gain)  # a scheduler may have changed it
            kind = id(gain) if isinstance(gain, Tensor) else gain
            for i, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided or grad.is_complex():
                    name = group["param_names"][i] if "param_names" in group else None
                    raise ValueError(
                        f"the gradient of {_label(name, p)} is "
                        f"{'complex' if grad.is_complex() else 'sparse'}, and AGD needs a dense, "
                        "real one: build the layer with sparse=False and real weights"
                    )
                shape, shards = p.shape, None
                if _is_dtensor(p):
                    shards = p.device_mesh, p.placements
                    grad = grad.redistribute(*shards).to_local()
                    p = p.to_local()
                layout = p.stride() if shards is None else None
                key = (shape, p.shape, layout, p.dtype, p.device, kind, shards)
                bucket = buckets.get(key)
                if bucket is None:
                    bucket = buckets[key] = _Bucket(p, gain, shape, shards)
                bucket.add(p, grad)
        return list(buckets.values())

    def state_dict(self):
        """torch's, and the count of skipped steps."""
        return {**super().state_dict(), "skipped": self.skipped.clone()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        if "skipped" in state_dict:
            self.skipped.copy_(state_dict["skipped"])

    def __getstate__(self):
        own = {"eta": self.eta, "G": self.G, "skipped": self.skipped, "fused": self.fused}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state):
        # load_state_dict comes by here too, with the groups alone
        fused = self.__dict__.get("fused")
        super().__setstate__({"fused": fused, **state, "_key": None, "_plan": None})


class _Sweeps:
    """The step of float32 weights in the CPU's memory where agd_cpu.py has none, for want of a C
    compiler: in four passes over them, gradients are read for their norms, then gradients and
    weights are read and weights written.

    Squares are summed as they are, without the plain step's division by the largest magnitude;
    that step takes over where a norm is too small or too large for it, 0, NaN and infinity
    included.
    """

    @classmethod
    def plan(cls, weights, gains, L):
        """The sweeps over these weights, or None where one of them lies in another way, or has a
        gain so far from 1 that float32 may not hold what its gradient is multiplied with."""
        lying = []
        for p, gain in zip(weights, gains):
            fits = _is_plain(p) and p.device.type == "cpu" and p.dtype == torch.float32
            fits = fits and (gain == 0 or LOWEST < gain * _scale(p.shape) / L < HIGHEST)
            kind = _kind(p) if fits else None
            if kind is None:
                return None
            lying.append(kind)
        return cls(weights, lying, gains, L)

    def __init__(self, weights, lying, gains, L):
        self.lying = lying
        scratch = torch.empty(SCRATCH, dtype=torch.float32)
        # An entry a matrix: s / L, and what the update multiplies the gradient with.
        K = [math.prod(p.shape[2:]) for p in weights]
        s = [x for p, n in zip(weights, K) for x in [_scale(p.shape) / L] * n]
        gain = [x for x, n in zip(gains, K) for x in [x] * n]
        self.s = torch.tensor(s, dtype=torch.float64)
        self.coefficients = self.s * -torch.tensor(gain, dtype=torch.float64)
        self.sums, self.quotients = torch.empty_like(self.s), torch.empty_like(self.s)
        self.factors = torch.empty(len(s), dtype=torch.float32)

        # What the first sweep leaves: norms of runs of memory, then sums of squares, and the
        # matrix that each is of.
        index = [x.index + start for x, start in zip(lying, _starts(K))]
        order = sorted(range(len(lying)), key=lambda i: lying[i].squared)
        self.index = torch.cat([index[i] for i in order])
        self.partial = torch.empty(len(self.index), dtype=torch.float32)
        self.wide = torch.empty_like(self.partial, dtype=torch.float64)
        self.norms = self.wide[: sum(len(x.index) for x in lying if not x.squared)]
        for i, slot in zip(order, self.partial.split([len(index[i]) for i in order])):
            lying[i].slot, lying[i].scratch = slot, scratch
        self.measures = [x.measure for x in lying]

        # Backwards, so that the gradients that were read last are still in the cache.
        self.moving = [i for i in reversed(range(len(gains))) if gains[i] != 0]
        self.weights = [lying[i].view(weights[i].detach()) for i in self.moving]
        parts = self.factors.split(K)
        multipliers, sources = zip(*[x.multiplier(part) for x, part in zip(lying, parts)])
        self.multipliers = [multipliers[i] for i in self.moving]
        # Factors that are repeated, so that the processor runs on without a break.
        self.tiles, self.sources = [], []
        for tile, source in zip(multipliers, sources):
            if source is not None:
                self.tiles.append(tile.view_as(source))
                self.sources.append(source)

    def step(self, grads):
        """(G, eta), the weights being updated; None, with weights as they were, where the squares
        of these gradients cannot be summed as they are."""
        views = []
        for measure, grad in zip(self.measures, grads):
            view = measure(grad)
            if view is None:
                return None
            views.append(view)
        self.wide.copy_(self.partial)
        self.norms.square_()
        norms = self.sums.zero_().index_add_(0, self.index, self.wide)
        # A number read on the CPU keeps nobody waiting. A sum that overflowed leaves G infinite.
        if not norms.amin().item() >= LEAST:
            return None
        G = torch.dot(norms.sqrt_(), self.s).item()
        if G == math.inf:
            return None
        eta = math.log1p(G / (math.sqrt(G + 0.25) + 0.5))
        torch.div(self.coefficients, norms, out=self.quotients)
        torch.mul(self.quotients, eta, out=self.factors)
        if self.tiles:
            torch._foreach_copy_(self.tiles, self.sources)
        if self.moving:
            views = [views[i] for i in self.moving]
            torch._foreach_addcmul_(self.weights, views, self.multipliers)
        return [torch.scalar_tensor(x, dtype=torch.float64, device="cpu") for x in (G, eta)]


LEAST = 2.0**-60  # a squared norm of which float32 loses nothing
LOWEST, HIGHEST = 2.0**-40, 2.0**60  # times eta over any norm that is swept, within float32
SCRATCH = 2**18  # float32 numbers, a megabyte: what stays in a processor's cache
ROW = 1024  # the length up to which a float32 norm along memory is exact to 1e-6


class _Flat:
    """How a weight lies in memory: one matrix, in rows of at most ROW."""

    squared = False  # whether `measure` leaves squares, else norms

    def __init__(self, p, order):
        self.stride, n = p.stride(), p.numel()
        self.order = None if order == sorted(order) else order
        self.form = None  # what its view is, or None for itself
        self.rest = n % ROW
        if self.order is not None or p.ndim > 2 or not 64 <= p.shape[1] <= ROW:
            self.form = (n,) if self.rest else (n // ROW, ROW)
        rows = p.shape[0] if self.form is None else -(-n // ROW)
        self.index = torch.zeros(rows, dtype=torch.int64)  # the matrix of each result

    def lies(self, x):
        """Whether a tensor lies as the weight does, whatever its strides along sides of 1."""
        return (x if self.order is None else x.permute(self.order)).is_contiguous()

    def view(self, x):
        """A tensor that lies as the weight does, in the form in which it is swept."""
        if self.order is not None:
            x = x.permute(self.order)
        return x if self.form is None else x.view(self.form)

    def measure(self, grad):
        """The view of a gradient, after its norms or sums of squares have gone to `slot`; None
        for one that does not lie as the weight does."""
        if grad.dtype is not torch.float32 or grad.layout is not torch.strided:
            return None
        if grad.stride() != self.stride and not self.lies(grad):
            return None
        view = grad if self.form is None else self.view(grad)
        self.sweep(view)
        return view

    def sweep(self, g):
        if g.ndim == 2:
            vector_norm(g, 2, 1, out=self.slot)
            return
        if len(self.slot) > 1:
            vector_norm(g[: -self.rest].view(-1, ROW), 2, 1, out=self.slot[:-1])
        vector_norm(g[-self.rest :], 2, 0, True, out=self.slot[-1:])

    def multiplier(self, factors):
        """(what a gradient is multiplied with, what has to be copied there first or None), given
        the static tensor of factors, one a matrix."""
        return factors[0], None


class _Runs(_Flat):
    """A row of each of the K matrices, then the next rows, as in channels_last."""

    def __init__(self, p, order, rows, K, row):
        super().__init__(p, order)
        self.form, self.run = (rows, K, row), _run(row)
        self.index = torch.arange(K).view(K, 1).repeat(rows, 1, row // self.run).flatten()

    def sweep(self, g):
        vector_norm(g.view(-1, self.run), 2, 1, out=self.slot)

    def multiplier(self, factors):
        return factors.unsqueeze(1), None


class _Period(_Flat):
    """An element of each of the K matrices, then the next elements, as in a contiguous kernel."""

    squared = True

    def __init__(self, p, order, rows, K, width):
        super().__init__(p, order)
        self.form, self.K, self.width = (rows, width), K, width
        self.index = torch.arange(K).repeat(width // K)

    def sweep(self, g):
        n = min(len(g), SCRATCH // self.width)
        scratch = self.scratch[: n * self.width].view(n, self.width)
        first, *others = g.split(n)
        torch.mul(first, first, out=scratch)
        for part in others:
            (scratch if len(part) == n else scratch[: len(part)]).addcmul_(part, part)
        torch.sum(scratch, 0, out=self.slot)

    def multiplier(self, factors):
        return factors.new_empty(self.width), factors.expand(self.width // self.K, self.K)


def _kind(p):
    """How a weight lies in memory, or None for a way that has no sweeps."""
    order = sorted(range(p.ndim), key=lambda i: -p.stride(i))
    if not p.detach().permute(order).is_contiguous():
        return None
    K = math.prod(p.shape[2:])
    if K == 1:
        return _Flat(p, order)
    # Matrices and kernel, without sides of 1: M before, K between, M after.
    sides = [(i < 2, p.shape[i]) for i in order if p.shape[i] > 1]
    kernel = [i for i, (matrix, _) in enumerate(sides) if not matrix]
    if kernel[-1] - kernel[0] >= len(kernel):
        return None
    before = [n for _, n in sides[: kernel[0]]]
    after = math.prod(n for _, n in sides[kernel[-1] + 1 :])
    if after > 1:
        return _Runs(p, order, math.prod(before), K, after) if _run(after) else None
    width = before[-1] * K if before else K
    return _Period(p, order, math.prod(before[:-1]), K, width) if width <= SCRATCH else None


def _plan_on_the_cpu(weights, gains, L):
    """The compiled step where there is one, else the sweeps, or None."""
    kernels = _kernels("cpu")
    if kernels is not None:
        plan = kernels.Plan.of(weights, [_scale(p.shape) for p in weights], L, gains)
        if plan is not None and kernels.trusted(AGD):
            return plan
    return _Sweeps.plan(weights, gains, L)


@functools.cache
def _kernels(device):
    """The module of kernels for "cuda" or "cpu", which lies beside this one, or None."""
    try:
        return importlib.import_module(f"{__name__}_{device}")
    except ImportError:
        return None


def _has_fast_step(p):
    """Whether `fused=True` can be had for a weight."""
    if p.device.type in GPUS:
        kernels = _kernels("cuda")
        return _is_plain(p) and kernels is not None and kernels.trusted(p.device, AGD)
    return _plan_on_the_cpu([p], [1.0], 1) is not None


def _is_plain(x):
    """Whether a tensor is one of torch's own, dense, and nothing that wraps one."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided


def _starts(sizes):
    """Where each of consecutive parts begins."""
    return [sum(sizes[:i]) for i in range(len(sizes))]


class _Bucket:
    """Weights of one shape and layout, and what AGD derives from them; those that are sharded, as
    (mesh, placements) say, by their parts on this device."""

    def __init__(self, p, gain, shape, shards):
        self.weights, self.grads, self.gain, self.s = [], [], gain, _scale(shape)
        self.dtype = torch.promote_types(p.dtype, torch.float32)
        self.shards, self.empty = shards, p.numel() == 0  # a shard may be
        # Dimensions in the order in which they lie in memory, so that any format is as fast; those
        # of a shard in the one order that every device knows.
        self.order = list(range(p.ndim))
        if shards is None:
            self.order.sort(key=lambda i: -p.stride(i))
        self.in_order = self.order == list(range(p.ndim))
        # The two of a matrix in (layers, *dimensions). The one that is contiguous is reduced
        # first, else the outermost: both sweeps run along memory.
        outer, inner = sorted((1 + self.order.index(0), 1 + self.order.index(1)))
        contiguous = inner == p.ndim
        self.first, self.second = (inner, outer) if contiguous else (outer, inner)
        # The length of runs in which a float32 norm along memory is exact to 1e-6, the fastest
        # way; where rows do not divide into such runs, a pairwise sum of squares takes its place.
        self.run = _run(p.shape[self.order[-1]]) if contiguous else None

    def add(self, p, grad):
        if not self.in_order:
            p, grad = p.permute(self.order), grad.permute(self.order)
        self.weights.append(p)
        self.grads.append(grad)

    def largest(self):
        """The gradients as x (layers, *dimensions), and returned the largest magnitude of each of
        their matrices, with 1 for a matrix's dimensions."""
        alone = len(self.grads) == 1
        x = (self.grads[0].unsqueeze(0) if alone else torch.stack(self.grads)).to(self.dtype)
        # What may be written to: neither the gradient itself nor a view of it.
        self.x, self.own = x, not alone
        if self.empty:
            return self._zeros(x)
        top, bottom = x.amax(self.first, keepdim=True), x.amin(self.first, keepdim=True)
        return torch.maximum(top, bottom.neg_()).amax(self.second, keepdim=True)

    def normalise(self, m):
        """(u = grad / m (layers, *dimensions), the sum of squares of each matrix of u)."""
        # Not 0 / 0, and no subnormal divisor: some devices have none.
        m.clamp_min_(torch.finfo(self.dtype).tiny)
        u = self.x.div_(m) if self.own else self.x / m
        self.x = None
        if self.empty:
            return u, self._zeros(u)
        if self.run is None:
            rows = u.square().sum(self.first, keepdim=True)
        elif self.run == u.shape[-1]:
            rows = vector_norm(u, dim=-1, keepdim=True).square_()
        else:
            runs = vector_norm(u.unflatten(-1, (-1, self.run)), dim=-1).square_()
            rows = runs.sum(-1, keepdim=True)
        return u, rows.sum(self.second, keepdim=True)

    def _zeros(self, x):
        matrix = (self.first, self.second)
        return x.new_zeros([1 if i in matrix else n for i, n in enumerate(x.shape)])


def _run(row):
    """The longest equal parts of a row, up to ROW, or None where there are none worth it."""
    runs = [row] if row <= ROW else [n for n in range(ROW, 31, -32) if row % n == 0]
    return runs[0] if runs else None


def _is_dtensor(p):
    """Whether a tensor is a torch.distributed.tensor.DTensor, without importing that."""
    return hasattr(p, "to_local")


def _over_shards(buckets, values, op):
    """A tensor a bucket, "sum" or "max" over the shards of those that are sharded: one all-reduce
    for all that are so in the same way."""
    values, alike = list(values), {}
    for i, b in enumerate(buckets):
        if b.shards is not None:
            alike.setdefault(b.shards, []).append(i)
    for (mesh, placements), indices in alike.items():
        from torch.distributed.tensor import DTensor, Partial, Replicate

        parts = [Replicate() if x.is_replicate() else Partial(op) for x in placements]
        flat = torch.cat([values[i].flatten() for i in indices])
        flat = DTensor.from_local(flat, mesh, parts, run_check=False).full_tensor()
        for i, x in zip(indices, flat.split([values[i].numel() for i in indices])):
            values[i] = x.view(values[i].shape)
    return values


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
    sizes, seen, drawn = {}, set(), 0
    params = list(_named(_listed(params)))
    if not params:
        raise ValueError(EMPTY)
    for name, p in params:
        _check(name, p)
        if id(p) not in seen:
            seen.add(id(p))
            rows, columns = max(p.shape[:2]), min(p.shape[:2])
            positions = math.prod(p.shape[2:])
            z = torch.randn(
                positions, rows, columns, dtype=torch.float64, device="cpu", generator=generator
            )
            sizes.setdefault((rows, columns), []).append((p, z))
            drawn += z.numel()
            if drawn > AT_ONCE:
                _orthogonalise(sizes)
                drawn = 0
    _orthogonalise(sizes)


AT_ONCE = 2**26  # float64 numbers drawn at a time, half a gigabyte, or a single weight


def _orthogonalise(sizes):
    """Fill weights from their draws, [(weight, draw)] by size, which is emptied."""
    for size in list(sizes):
        weights, draws = zip(*sizes.pop(size))
        Q, R = torch.linalg.qr(torch.cat(draws))
        # Haar measure needs the factorisation that has a positive diagonal in R.
        Q.mul_(R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
        for p, q in zip(weights, Q.split([len(z) for z in draws])):
            q = q if p.shape[0] >= p.shape[1] else q.mT
            q = q.unflatten(0, p.shape[2:]) if p.ndim > 2 else q.squeeze(0)
            _fill(p, q.movedim((-2, -1), (0, 1)) * _scale(p.shape))


def _fill(p, whole):
    """Copy `whole` to a weight, or to the part of it that lies on this device."""
    if not _is_dtensor(p):
        p.copy_(whole)
        return
    from torch.distributed.tensor import DTensor, Replicate

    part, mesh = p.to_local(), p.device_mesh
    whole = whole.to(part.device, part.dtype)
    whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part.copy_(whole.redistribute(mesh, p.placements).to_local())


def _wide(device):
    """The dtype of G and eta; Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _scale(shape):
    """s of a weight of shape (out, in, *kernel)."""
    return math.sqrt(shape[0] / shape[1] / math.prod(shape[2:]))


EMPTY = "AGD got an empty parameter list: pass net.parameters(), and a generator only once"


def _listed(params):
    """What a torch optimiser takes, as a list if it is an iterable."""
    if hasattr(params, "named_parameters"):
        raise TypeError("AGD takes net.parameters() or net.named_parameters(), not the network")
    if isinstance(params, Tensor):
        return params
    params = list(params)
    if not params:
        raise ValueError(EMPTY)
    return params


def _named(params):
    """(name or None, tensor) for each tensor in a list of tensors, pairs or groups."""
    for entry in [params] if isinstance(params, Tensor) else params:
        if isinstance(entry, dict):
            yield from _named(entry["params"])
        else:
            yield entry if isinstance(entry, tuple) else (None, entry)


def _label(name, p):
    return f"{name or 'a tensor'} of shape {tuple(p.shape)}"


def _check(name, p):
    if not isinstance(p, Tensor):
        raise TypeError(f"AGD takes tensors or (name, tensor) pairs, not {type(p).__name__}")
    if not p.is_floating_point() or p.dtype.itemsize < 2:
        raise ValueError(f"AGD has no rule for {_label(name, p)}, of dtype {p.dtype}: make it real "
                         "floating point of 16 bits or more, or leave it out")
    if p.ndim < 2:
        raise ValueError(f"AGD has no rule for {_label(name, p)}: it takes weights of two or more "
                         "dimensions; build the layer without this one (bias=False, affine=False)")
    if p.numel() == 0:
        raise ValueError(f"AGD has no rule for {_label(name, p)}: it has no elements; leave it out")
    if _is_dtensor(p) and any(getattr(x, "dim", 0) not in (0, 1) for x in p.placements):
        raise ValueError(f"AGD has no rule for {_label(name, p)}, sharded along its kernel: shard "
                         "it along its first or second dimension")


def _check_gain(gain):
    """Reads a tensor: for the constructor and add_param_group, never for a step."""
    number = isinstance(gain, (int, float)) or (isinstance(gain, Tensor) and gain.numel() == 1)
    if not (number and 0 <= gain < math.inf):
        raise ValueError(f"the gain must be a number, finite and not negative, not {gain!r}")
