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

A weight of shape (out, in, *kernel) is one of the L layers. It counts as K = prod(kernel) blocks,
matrices of shape (out, in), each with its own norm and s_k = sqrt(out / in / K).

The size of a step follows from the size of the gradient, so the gradient must be that of the mean:
unscale it after mixed precision, average it after accumulation and over devices, before `step`.

A step is two sweeps over memory, by `TorchBackend` or the compiled ones of agd_kernels, a package
beside this file, with the mathematics in between: `_middle`.
"""

import importlib
import math

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["AGD", "init_weights"]


class AGD(torch.optim.Optimizer):
    """Automatic Gradient Descent, arXiv 2304.05187.

    Args:
        params: in any form of torch's optimisers: an iterable of tensors, of (name, tensor) pairs,
            or of group dicts. Each weight has the shape (out, in, *kernel): linear, convolutional
            in any number of dimensions, grouped or depthwise; any memory format and float dtype.
        gain: multiplies the update and nothing else; a number or a 0-dim tensor, finite and not
            negative. It is the group key `lr`, so that torch's schedulers work and 0 freezes a
            group (which still counts in L and G). Under torch.compile, let a scheduler change a
            tensor: a number that changes compiles the step again.
        fused: None: compiled kernels for the weights that they support (float32 on a CPU, any
            dtype on a CUDA GPU), torch's operations for the others. False: torch's operations.
            True: raise ValueError for a weight that no kernel supports. All agree to rounding.

    L counts every tensor of every group; G and eta are one for all groups. A tensor without a
    gradient is skipped: it adds nothing to G and still counts in L.

    Attributes, 0-dim tensors on the device of the first weight:
        eta: the automatic learning rate of the last step; NaN before the first and if skipped.
        G: the gradient summary of the last step.
        skipped: int64, the number of steps that changed no weight because a gradient held a NaN
            or an infinity.

    A weight may be sharded, a DTensor of torch's fully_shard: norms are of whole matrices, from
    1e-150 to 1e150, for one small all-reduce a step. Every device has shards of all weights.

    A zero gradient, of a matrix or of one kernel position, leaves those weights bit for bit. A step
    needs one scratch tensor: with kernels some kB on a CPU and 3 % of the weights' memory on a GPU,
    else half a megabyte (float32 on a CPU) or, for other weights or factors of 0, a copy of one
    weight. A gradient whose strides differ from its weight's is copied. `skipped` is all its state.

    Raises:
        ValueError: in the constructor, for an empty list, a gain out of range, or a tensor that
            has fewer than two dimensions, no elements, or is not real floating point, or is sharded
            along its kernel, or with fused=True has no kernel; at a step, for a sparse or complex
            gradient. The message names the tensor and the way out.
    """

    _key = _parts = None  # the parts of the last step, and the key that they depend on

    def __init__(self, params, gain=1.0, fused=None):
        self.fused = fused
        super().__init__(_listed(params), {"lr": gain})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(EMPTY)
        device = next(p for group in self.param_groups for p in group["params"]).device
        self.eta = torch.full((), math.nan, dtype=_wide(device), device=device)
        self.G = torch.full_like(self.eta, math.nan)
        self.param_groups[0]["skipped"] = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def skipped(self):
        """Number of skipped steps, int64, 0-dim: an entry of the first group, which is saved."""
        return self.param_groups[0]["skipped"]

    def add_param_group(self, param_group):
        """Add a group, {"params": ..., "lr": gain}, checked as in the constructor."""
        group = {"lr": self.defaults["lr"], **param_group}
        group["lr"] = group.pop("gain", group["lr"])
        _check_gain(group["lr"])
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # a set has no order: torch refuses it
            # A tied weight is one layer, however often it is listed, in its first place.
            tensors = {}
            for x in params:
                tensors.setdefault(id(x[1] if isinstance(x, tuple) else x), x)
            params = list(tensors.values())
        group["params"] = params
        for name, p in _named([group]):
            _check(name, p)
            if self.fused and _backend(p, Layout(p)) is TorchBackend:
                raise ValueError(f"there is no fused step for {_label(name, p)}, {p.dtype} on "
                                 f"{p.device}: fused=None takes it where there is one")
        super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every weight that has a gradient. Returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        parts, targets, grads = self._prepare()
        middle = getattr(parts[0].backend, "middle", _middle) if len(parts) == 1 else _middle
        norms = [part.norms(grads) for part in parts]
        G, eta, factors = middle([part.scales for part in parts], norms) if parts else (
            torch.zeros_like(self.G), torch.zeros_like(self.G), [])  # fmt: skip
        for part, x in zip(parts, factors):
            for group, blocks in part.groups:
                gain = self.param_groups[group]["lr"]
                if isinstance(gain, Tensor):  # not read: out of range, it moves nothing
                    gain = gain.detach().reshape(()).clamp_min(0)
                    x[blocks] *= gain if gain.device.type == "cpu" else gain.to(x.device)
                elif gain != 1:
                    x[blocks] *= gain
        for part, x in zip(parts, factors):
            part.subtract(targets, grads, x)

        if not torch.compiler.is_compiling():
            self.G, self.eta = G, eta
        elif self.G.device == G.device:  # torch.compile sets no attribute of an optimiser
            self.G.copy_(G), self.eta.copy_(eta)
        skipped = self.skipped
        if skipped.device != G.device:  # the network has moved, or a state was loaded
            skipped = self.param_groups[0]["skipped"] = skipped.to(G.device)
        if not _on_host(eta) or math.isnan(eta.item()):  # a CPU's number is read without a wait
            skipped.add_(eta.isnan())
        return loss

    def _prepare(self):
        """Parts, targets and gradients of the weights that have a gradient. A target is the weight
        or, of a sharded one, the local tensor. A gradient has the strides of a dense weight."""
        targets, grads, L = [], [], sum(len(group["params"]) for group in self.param_groups)
        key = [L, self.fused]
        for i, group in enumerate(self.param_groups):
            if not isinstance(group["lr"], Tensor):
                _check_gain(group["lr"])  # a scheduler may have changed it
            for j, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided or grad.is_complex():
                    label = _label(group["param_names"][j] if "param_names" in group else None, p)
                    kind = "complex" if grad.is_complex() else "sparse"
                    raise ValueError(f"the gradient of {label} is {kind}, and AGD needs a dense, "
                                     "real one: build the layer with sparse=False and real weights")
                if _is_dtensor(p):
                    grad = grad.redistribute(p.device_mesh, p.placements).to_local()
                    key.append((p.shape, p.device_mesh, p.placements))
                    p = p.to_local()
                stride = p.stride()
                if type(grad) is not Tensor or grad.stride() != stride:
                    grad = _like(grad, p)
                targets.append(p)
                grads.append(grad)
                key.append((i, p.shape, stride, p.dtype, grad.dtype, p.device))
        compiling = torch.compiler.is_compiling()
        capturing = not compiling and bool(grads) and _capturing(grads[0])
        if not compiling and key == self._key:
            if capturing:  # a graph reads the parts' tables for as long as its weights live
                CAPTURED.setdefault(targets[0], {})[id(self._parts)] = self._parts
            return self._parts, targets, grads
        moving = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]
                  if p.grad is not None]  # fmt: skip
        if compiling or capturing:  # the graph's own
            return _Part.split(moving, L, fused=False), targets, grads
        with torch.inference_mode(False), torch.device("cpu"):  # whatever the defaults are now
            self._key, self._parts = key, _Part.split(moving, L, self.fused)
        return self._parts, targets, grads

    def state_dict(self):
        """As torch's method, with a copy of `skipped`."""
        state = super().state_dict()
        state["param_groups"][0]["skipped"] = self.skipped.clone()
        return state

    def load_state_dict(self, state_dict):
        """As torch's method. `skipped` stays as it is where the state has none."""
        skipped, older = self.skipped, state_dict.get("skipped", self.skipped)
        super().load_state_dict(state_dict)
        skipped.copy_(self.param_groups[0].get("skipped", older))
        self.param_groups[0]["skipped"] = skipped  # the same tensor: a CUDA graph may count in it

    def __getstate__(self):
        return {**super().__getstate__(), "eta": self.eta, "G": self.G, "fused": self.fused}


CAPTURED = WeakTensorKeyDictionary()  # parts by the first of their weights


def _capturing(x):
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _middle(scales, norms):
    """The mathematics between the sweeps. From s / L and the norm of each block, (blocks,) of each
    part, follow G, eta and the factors of the update, infinite or NaN for a zero gradient."""
    slopes = [(s * x).sum() for s, x in zip(scales, norms)]
    G = slopes[0]
    for x in slopes[1:]:
        G = G + x.to(G)
    # log((1 + sqrt(1 + 4 G)) / 2), without cancellation or overflow; NaN for an infinite G
    eta = (G / (G + 0.25).sqrt_().add_(0.5)).log1p_()
    return G, eta, [s * eta.to(x) / x for s, x in zip(scales, norms)]


# Geometry, by role: the dimensions of a weight that number its blocks, and s, the norm of a block.
ROLES = {
    "matrix": (lambda x: (), lambda x: math.sqrt(x[0] / x[1])),
    "kernel": (lambda x: range(2, len(x)), lambda x: math.sqrt(x[0] / x[1] / math.prod(x[2:]))),
}


class Layout:
    """The blocks of a weight, and their order in memory (of a sharded weight: on this device).

    Attributes:
        K, s: the number of blocks, and the norm of one.
        dense: (outer, K, inner), the shape in the order of memory, where there is one without gaps:
            inner is 1 in a contiguous convolution and `in` in channels_last. Else None.
        dims: the dimensions of `view` inside a block.
    """

    def __init__(self, weight):
        numbering, scale = ROLES["matrix" if weight.ndim == 2 else "kernel"]
        self.s, p, self.dense = scale(weight.shape), _local(weight), None
        blocks, dims = numbering(p.shape), list(range(p.ndim))
        self.K = math.prod([p.shape[i] for i in blocks])
        self.dims = tuple([i for i in dims if i not in blocks])
        self.shape = [p.shape[i] if i in blocks else 1 for i in dims]  # of factors
        self.order = sorted(dims, key=lambda i: -p.stride(i))
        if p.numel() and p.detach().permute(self.order).is_contiguous():
            sides = [i for i in self.order if p.shape[i] > 1]
            places = [n for n, i in enumerate(sides) if i in blocks] or [len(sides)]
            if places[-1] - places[0] < len(places):
                outer = math.prod([p.shape[i] for i in sides[: places[0]]])
                inner = math.prod([p.shape[i] for i in sides[places[-1] + 1 :]])
                self.dense, self.dims = (outer, self.K, inner), DENSE
                # Rows of m * K numbers: long enough for a loop, short enough for float32's sums.
                self.m = math.gcd(outer, 1024 if self.K == 1 else 64) if inner == 1 else 1

    def view(self, x):
        """A tensor like the weight as (outer / m, m, K, inner); with gaps, the tensor itself."""
        if self.dense is None:
            return x
        outer, K, inner = self.dense
        return x.permute(self.order).view(outer // self.m, self.m, K, inner)

    def spread(self, factors):
        """Factors (K,) in a shape that broadcasts with `view`."""
        if self.dense is None:
            return factors.view(self.shape)
        factors = factors.view(self.K, 1)
        return factors if 1 in (self.m, self.K) else factors.repeat(self.m, 1, 1)


class _Part:
    """The weights of one backend on one device, sharded alike.

    Attributes:
        scales: s / L of each block, (blocks,) float64.
        groups: (index of a group, slice of its blocks) pairs.
    """

    @classmethod
    def split(cls, weights, L, fused):
        """The parts of weights, given as (index of a group, weight) pairs."""
        alike = {}
        for i, (group, p) in enumerate(weights):
            layout = Layout(p)
            kind = TorchBackend if fused is False else _backend(p, layout)
            shards = (p.device_mesh, p.placements) if _is_dtensor(p) else None
            alike.setdefault((kind, p.device, shards), []).append((i, p, layout, group))
        return [cls(*key, L, *zip(*members)) for key, members in alike.items()]

    def __init__(self, kind, device, shards, L, indices, weights, layouts, groups):
        self.shards, self.indices, self.groups = shards, indices, []
        self.backend = kind([_local(p) for p in weights], layouts)
        wide = {"dtype": _wide(device), "device": device}
        self.scales = torch.cat([torch.full((x.K,), x.s / L, **wide) for x in layouts])
        end = 0
        for group, layout in zip(groups, layouts):
            start, end = end, end + layout.K
            if self.groups and self.groups[-1][0] == group:
                start = self.groups.pop()[1].start
            self.groups.append((group, slice(start, end)))

    def norms(self, grads):
        """Frobenius norms of the gradients' blocks, like `scales`."""
        norms = self.backend.norms([grads[i] for i in self.indices])
        if self.shards is None:
            return norms
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, placements = self.shards
        parts = [Replicate() if x.is_replicate() else Partial("sum") for x in placements]
        whole = DTensor.from_local(norms.square_(), mesh, parts, run_check=False)
        return whole.full_tensor().sqrt_()

    def subtract(self, targets, grads, factors):
        """targets -= factors * grads, with factors like `scales`."""
        targets, grads = ([tensors[i] for i in self.indices] for tensors in (targets, grads))
        self.backend.subtract(targets, grads, factors)


class TorchBackend:
    """The sweeps by torch's operations, for weights of one device and their Layouts. Other backends
    have the same methods, for weights that keep shape, strides and dtype; `middle` is optional."""

    middle = staticmethod(_middle)

    def __init__(self, weights, layouts):
        self.layouts = layouts

    def norms(self, tensors):
        """Frobenius norms of the blocks of tensors like the weights, (blocks,) float64. No square
        over- or underflows."""
        return torch.cat([_norms(y.view(x), y.dims) for y, x in zip(self.layouts, tensors)])

    def subtract(self, targets, directions, factors):
        """targets -= factors * directions. A factor of 0, infinity or NaN leaves every bit.

        Args:
            targets, directions: tensors like the weights.
            factors: (blocks,) float64, not negative.
        """
        factors = factors.nan_to_num(0, 0, 0)
        known = factors.tolist() if _on_host(factors) else [math.inf] * len(factors)
        single, end = factors.float(), 0
        for layout, t, d in zip(self.layouts, targets, directions):
            blocks = slice(end, end + layout.K)
            end, some = blocks.stop, known[blocks]
            if not any(some):
                continue
            t, d = layout.view(t), layout.view(d)
            in_range = all(LOWEST < x < HIGHEST or x == 0 for x in some)
            f = single if in_range and d.dtype != torch.float64 else factors
            f = layout.spread(f[blocks])
            if in_range and all(some) and f.dtype == d.dtype:
                t.addcmul_(d, f, value=-1)
            else:
                work = torch.promote_types(d.dtype, torch.float32)
                update = torch.mul(d, f, out=torch.empty_like(d, dtype=work))
                t.sub_(update.masked_fill_(f == 0, 0))  # NaN * 0 is NaN, and -0 - -0 is 0


DENSE = (0, 1, 3)  # the dimensions of a block in the view of a dense weight
LOWEST, HIGHEST = 2.0**-100, 2.0**100  # float32 loses no digit of factors between them
LEAST = 2.0**-30  # a norm whose square float32 holds, with all the squares that matter to it
CHUNK = 2**17  # numbers: half a megabyte stays in a processor's cache


def _on_host(x):
    """Whether a number is read without a wait: of a CPU's memory, and while nothing is traced."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _norms(x, dims):
    """Norms over dimensions of a Layout's view, (blocks,) float64."""
    wide = _wide(x.device)
    if x.dtype == torch.float32 and dims == DENSE and _on_host(x):
        norms = _norms_in_float32(x)
        if all(LEAST < norm < math.inf for norm in norms.tolist()):
            return norms
    if wide == torch.float64 != x.dtype or not x.numel():  # float64 holds their squares
        return vector_norm(x, 2, dims, dtype=wide).flatten()
    x = x.to(wide)
    largest = vector_norm(x, math.inf, dims, keepdim=True).clamp_min_(torch.finfo(wide).tiny)
    return vector_norm(x / largest, 2, dims).flatten() * largest.flatten()


def _norms_in_float32(x):
    """As _norms, of a dense view, with CHUNK squares at a time; 0 or infinite out of range."""
    if x.shape[1] >= 32 and x.shape[2] == 1:
        return vector_norm(vector_norm(x.flatten(1), 2, 1).double()).view(1)
    rows, total = min(len(x), max(1, CHUNK // x[0].numel())), 0
    squares = torch.empty_like(x[:rows])
    for some in x.split(32 * rows):  # few enough sums in float32 to be exact to 1e-6
        first, *others = some.split(rows)
        torch.mul(first, first, out=squares[: len(first)])
        for part in others:
            squares[: len(part)].addcmul_(part, part)
        total += squares[: len(first)].sum((0, 3)).double().sum(0)
    return total.sqrt_()


def _backend(p, layout):
    """The backend class of a weight: from agd_kernels, beside this file, if that takes it."""
    try:
        kernels = importlib.import_module(f"{__name__}_kernels")
    except ImportError:
        return TorchBackend
    same = p.grad is None or p.grad.dtype == p.dtype
    if layout.dense is None or not same or type(p) not in (Tensor, torch.nn.Parameter):
        return TorchBackend
    found = kernels.backend(p.device, TorchBackend, Layout)
    return found if found is not None and found.takes(p, layout) else TorchBackend


def _like(grad, p):
    """A gradient with the strides of its weight: itself, or a copy."""
    same = all(n == 1 or a == b for n, a, b in zip(p.shape, p.stride(), grad.stride()))
    same = same and type(grad) is Tensor
    return grad if same else torch.empty_like(p, dtype=grad.dtype).copy_(grad)


def _is_dtensor(p):
    return hasattr(p, "to_local")  # without an import of torch.distributed.tensor


def _local(p):
    return p.to_local() if _is_dtensor(p) else p


@torch.no_grad()
def init_weights(params, generator=None):
    """Draw every weight anew, in place: each block uniform (Haar) semi-orthogonal, times its s.

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
    params = list(_named(_listed(params)))
    if not params:
        raise ValueError(EMPTY)
    for name, p in params:
        _check(name, p)
    sizes, drawn, wide = {}, 0, {"dtype": torch.float64, "device": "cpu"}
    for p in {id(p): p for _, p in params}.values():
        size = math.prod(p.shape[2:]), max(p.shape[:2]), min(p.shape[:2])
        z = torch.randn(size, generator=generator, **wide)
        sizes.setdefault(size[1:], []).append((p, z))
        drawn += z.numel()
        if drawn > 2**26:  # half a gigabyte
            _orthogonalise(sizes)
            drawn = 0
    _orthogonalise(sizes)


def _orthogonalise(sizes):
    """Fill weights from their draws, [(weight, draw)] by size, and empty the dict."""
    for size in list(sizes):
        weights, draws = zip(*sizes.pop(size))
        Q, R = torch.linalg.qr(torch.cat(draws))
        # Haar measure needs the factorisation that has a positive diagonal in R.
        Q.mul_(R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
        for p, q in zip(weights, Q.split([len(z) for z in draws])):
            q = q if p.shape[0] >= p.shape[1] else q.mT
            q = q.unflatten(0, p.shape[2:]) if p.ndim > 2 else q.squeeze(0)
            _fill(p, q.movedim((-2, -1), (0, 1)) * Layout(p).s)


def _fill(p, whole):
    """Copy `whole` to a weight, or its part to the local tensor of a sharded one."""
    if not _is_dtensor(p):
        p.copy_(whole)
        return
    from torch.distributed.tensor import DTensor, Replicate

    part, mesh = p.to_local(), p.device_mesh
    whole = whole.to(part.device, part.dtype)
    whole = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part.copy_(whole.redistribute(mesh, p.placements).to_local())


def _wide(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPU has none


EMPTY = "AGD got an empty parameter list: pass net.parameters(), and a generator only once"


def _listed(params):
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
    rule = f"AGD has no rule for {_label(name, p)}"
    if not p.is_floating_point() or p.dtype.itemsize < 2:
        raise ValueError(f"{rule}, of dtype {p.dtype}: make it real floating point of 16 bits or "
                         "more, or leave it out")
    if p.ndim < 2:
        raise ValueError(f"{rule}: it takes weights of two or more dimensions; build the layer "
                         "without this one (bias=False, affine=False)")
    if p.numel() == 0:
        raise ValueError(f"{rule}: it has no elements; leave it out")
    if _is_dtensor(p) and any(getattr(x, "dim", 0) not in (0, 1) for x in p.placements):
        raise ValueError(f"{rule}, sharded along its kernel: shard it along its first or second "
                         "dimension")  # fmt: skip


def _check_gain(gain):
    """Reads a tensor: for the constructor and add_param_group, never for a step."""
    number = isinstance(gain, (int, float)) or (isinstance(gain, Tensor) and gain.numel() == 1)
    if not (number and 0 <= gain < math.inf):
        raise ValueError(f"the gain must be a number, finite and not negative, not {gain!r}")
