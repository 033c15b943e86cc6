"""Automatic Gradient Descent (AGD): an optimiser without a learning rate, in one file.

    import torch
    from agd import AGD, init_weights

    init_weights(net)              # orthogonal, once, before training; pretrained weights stay
    optimizer = AGD(net)           # any network, every trainable parameter, nothing to tune

Source: Bernstein, Mingard, Huang, Azizan, Yue, "Automatic Gradient Descent: Deep Learning without
Hyperparameters", arXiv 2304.05187. For L weight matrices W_k of shape (d_k, d_{k-1}), an objective
that is a *mean* over examples, and s_k = sqrt(d_k / d_{k-1}):

    initialise    W_k   uniform semi-orthogonal, times s_k
    summarise     G   = 1/L sum_k s_k |grad W_k|_F
    automatic     eta = log((1 + sqrt(1 + 4 G)) / 2)
    update        W_k <- W_k - eta/L s_k grad W_k / |grad W_k|_F

Any other parameter is a stack of blocks, each with its own norm, and one s (ROLES). The size of a
step follows from the size of the gradient, so the gradient must be that of the mean: unscale it
after mixed precision, average it after accumulation and over devices; do not clip it.
"""

import contextlib
import fnmatch
import importlib
import itertools
import math
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar, overload

import torch
import torch.nn as nn
from torch import Tensor
from torch.linalg import vector_norm
from torch.optim.optimizer import ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

__version__ = "0.1.0"
__all__ = ["AGD", "SpectralAGD", "depth", "init_weights", "recalibrate"]

Params = nn.Module | ParamsT
Loss = TypeVar("Loss")


class AGD(torch.optim.Optimizer):
    """Automatic Gradient Descent, arXiv 2304.05187. docs/optimiser.md has roles, s, L and memory.

    Args:
        params: a network, `torch.nn.Module`: every parameter that requires a gradient, with the
            role that its layer gives it. Or an iterable of tensors, of (name, tensor) pairs, or of
            group dicts, the paper's rule: roles by shape. Any memory format and float dtype.
        gain: multiplies the update; a real number or a 0-dim tensor, finite and not negative
            (within rounding of 0 it is 0); the key `lr` of `param_groups`. 0 freezes a group. Under
            torch.compile a scheduler needs a tensor: a new number compiles the step again.
        fused: None: compiled kernels for the weights that they support (float32 on a CPU, any
            dtype on a CUDA GPU), torch's operations for the others. False: torch's operations.
            True: raise ValueError for a weight that no kernel supports. All agree to rounding.
        depth: L, a number, or the dict that `agd.depth` returns. None: of a network, read from its
            first forward pass; else the number of weights.
        roles: {pattern of names: role}, overrides the role that AGD reads. A role is one of ROLES,
            "transposed" (a matrix (in, out)), or "stacked 3", "kernel 8" with a number of parts,
            or of groups.

    Attributes, 0-dim tensors on the device of the first weight:
        eta: the automatic learning rate of the last step; NaN before the first and if skipped.
        G: the gradient summary of the last step.
        skipped: int64, the number of steps that a NaN or an infinity in a gradient prevented.

    All groups share G and eta. A tensor without a gradient adds nothing to G and still counts in L;
    a frozen parameter of the network does not. A block whose gradient is zero keeps its weights bit
    for bit. Weights may be DTensors of torch's fully_shard, with shards on every device.

    Raises:
        ValueError: for arguments out of range, names that nothing has, and tensors without a rule
            or, with fused=True, without a kernel; at a step, for a sparse or complex gradient; for
            the state of another optimiser; for a wrapper that shows it a part of the weights, whose
            G and L are not the network's. The message names the tensors and the way out.
    """

    _spectral = False  # whether a kernel is one matrix a group, and output layers differ
    _saved = {"s": "s", "share": "share"}  # keys of a parameter in `state_dict`: fields of its Rule
    _tensors = frozenset({"numel"})  # its other keys
    _net: Any = None  # a weak reference to the network
    _known: Any = None  # {id: (name, Rule)} of its parameters
    _hook = _parts = None  # for the network's first forward pass; of the last step
    _outputs = _read = False  # whether the output layers, and the shares of L, are known

    eta: Tensor
    G: Tensor
    rules: "list[list[Rule]]"
    _made: list[Any]
    _warned: set[str]

    def __init__(self, params: Params, *, gain: float | Tensor = 1.0, fused: bool | None = None,
                 depth: float | Mapping[str, float] | None = None,
                 roles: Mapping[str, str] | None = None, **foreign: NoReturn) -> None:  # fmt: skip
        if foreign:
            raise TypeError(NO_RATE if "lr" in foreign else f"{type(self).__name__} has no "
                            f"{', '.join(foreign)}: there is nothing to set")
        _refuse_wrappers(type(self).__name__)
        self.fused, self.rules, self.roles = fused, [], dict(roles or {})
        self.depth = float(depth) if isinstance(depth, (int, float)) else depth
        known = depth is None or isinstance(depth, Mapping)
        if not known and not (isinstance(self.depth, float) and 0 < self.depth < math.inf):
            raise ValueError(f"depth is a positive number, or of agd.depth, not {depth!r}")
        self._watch, self._made, self._warned = _Watch(self._spectral), [], set()
        self._paths = isinstance(params, nn.Module)  # L is of paths
        if self._paths:
            net = getattr(params, "_orig_mod", params)  # of torch.compile
            self._net, self._known = weakref.ref(net), _rules(net, self.roles, self._spectral)
            params = _trainable(net)
        super().__init__(_listed(params), {"lr": gain})
        if not any(self.rules):
            raise ValueError(EMPTY)
        names = {name or "" for name, *_ in [*self._each(), *(self._known or {}).values()]}
        if unused := [x for x in self.roles if not fnmatch.filter(names, x)]:
            raise ValueError(f"no parameter has a name like {', '.join(unused)}, of roles=")
        device = next(self._each())[1].device
        with torch.inference_mode(False):  # they are written to later
            self.eta = torch.full((), math.nan, dtype=_wide(device), device=device)
            self.G = torch.full_like(self.eta, math.nan)
            self.param_groups[0]["skipped"] = torch.zeros_like(self.eta, dtype=torch.int64)

    @property
    def skipped(self) -> Tensor:
        """Number of skipped steps, int64, 0-dim: an entry of the first group, which is saved."""
        return self.param_groups[0]["skipped"]

    @property
    def L(self) -> float:
        """The depth: a number, the mean number of weights on a path, or their count."""
        if isinstance(self.depth, float):
            return self.depth
        return sum(rule.share for _, p, rule in self._each() if not rule.is_vector
                   and (p.requires_grad or not self._paths)) or 1.0  # fmt: skip

    def _each(self):
        """(name or None, tensor, Rule) of each parameter, group after group."""
        for group, rules in zip(self.param_groups, self.rules):
            names = group.get("param_names") or [None] * len(rules)
            yield from zip(names, group["params"], rules)

    def _change_rules(self, fields):
        """Replace the fields of each Rule by fields(p, rule), a dict."""
        for group, rules in zip(self.param_groups, self.rules):
            rules[:] = [x._replace(**fields(p, x)) for p, x in zip(group["params"], rules)]
        self._made.clear()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, {"params": ..., "gain": ...}, checked as in the constructor. Parameters of
        the network that were frozen take their layer's role; L is read again."""
        foreign = sorted(set(param_group) - {"params", "param_names", "gain", "name"})
        if foreign:
            raise ValueError(NO_RATE if "lr" in foreign else "AGD has no " + ", ".join(foreign)
                             + ": a group has params and, if any, gain. Where a library makes "
                             "the groups, hand it the optimiser, AGD(net)")  # fmt: skip
        group = dict(param_group)
        group["lr"] = _checked_gain(group.pop("gain", self.defaults["lr"]))
        params, known = group["params"], self._known or {}
        if isinstance(params, nn.Module):
            params = _trainable(params)
        if not isinstance(params, (Tensor, set)):  # a set has no order: torch refuses it
            # A tied weight is one layer, however often it is listed, in its first place.
            tensors: dict[int, Any] = {}
            for x in params:
                tensors.setdefault(id(x[1] if isinstance(x, tuple) else x), x)
            net = known and self._net()
            if net and tensors.keys() - known.keys():  # layers that came later
                known |= _rules(net, self.roles, self._spectral)
            params = [(known[key][0], x) if key in known and not isinstance(x, tuple) else x
                      for key, x in tensors.items()]  # fmt: skip
        group["params"] = params
        listed = list(_named([group]))
        by_shape = _rules(listed, {} if known else self.roles, self._spectral, self._spectral)
        rules = [{**by_shape, **known}[id(p)][1] for _, p in listed]
        for (name, p), rule in zip(listed, rules):
            if self.fused and _backend(p, Layout(p, rule)) is TorchBackend:
                raise ValueError(f"there is no fused step for {_label(name, p)}, {p.dtype} on "
                                 f"{p.device}: fused=None takes it where there is one")
        super().add_param_group(group)
        self.rules.append(rules)
        self._read_depth()

    def _read_depth(self):
        """Take the shares of L from `depth`, or from the network's next forward pass."""
        self._made.clear()
        if isinstance(self.depth, Mapping):
            ids = {_unwrapped(name): key for key, (name, _) in (self._known or {}).items()}
            ids |= {_unwrapped(name): id(p) for name, p, _ in self._each() if name}
            shares = {_unwrapped(name): share for name, share in self.depth.items()}
            if unknown := shares.keys() - ids.keys():
                raise ValueError(f"depth= has shares of {', '.join(sorted(unknown)[:5])}, and no "
                                 "parameter has that name")  # fmt: skip
            outputs = getattr(self.depth, "outputs", None)
            self._outputs = outputs is not None
            self._set_shares(Depth({ids[name]: share for name, share in shares.items()},
                                   [ids.get(_unwrapped(name)) for name in outputs or ()]))
        elif (net := self._net and self._net()) is not None:
            self._read = False
            if self._listening and self._hook is None:
                self._hook = _FirstForward(self, net)

    def _set_shares(self, shares):
        """Take shares of L, a Depth by ids of parameters. A weight without one is free, as an
        output layer is: the pass did not reach it."""
        self._change_rules(lambda p, rule: {} if rule.is_vector else {
            "share": float(shares.get(id(p), 0)), "output": self._spectral and self._outputs
            and (id(p) in shares.outputs or id(p) not in shares)})  # fmt: skip
        self._read = True

    @property
    def _listening(self):
        """Whether the network's graph has yet to give what the arguments do not."""
        missing = self.depth is None or self._spectral and isinstance(self.depth, float)
        return self._paths and missing and not self._read

    def _warn(self, kind):
        """Warn once of a kind, at the line that called `step`: two wrappers of torch and our caller
        are in between."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(WARNINGS[kind], stacklevel=6)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every weight that has a gradient. Returns the closure's loss, if one is given."""
        if not self.param_groups[0].get("train_mode", True):
            raise RuntimeError("the network holds the average, since optimizer.eval(): call "
                               "optimizer.train() before the forward pass of a training step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gains()
        self._finish(*self._update(*self._prepare()))
        return loss

    def _check_gains(self):
        """Check the gains, which a scheduler may have changed; warn of it, and of an unread L."""
        for group in self.param_groups:
            gain = group["lr"]
            number = not isinstance(gain, Tensor)
            if type(gain) is not float or not 0 <= gain < math.inf:
                gain = _checked_gain(gain, group.get("initial_lr"), read=False)
                if number:  # a graph of torch.compile would hold what it sets
                    group["lr"] = gain
            if number and group.get("initial_lr", gain) != gain:
                self._warn("scheduled")
        if self._listening and self.depth is None and not torch.compiler.is_compiling():
            self._warn("depth")

    def _prepare(self):
        """(parts, targets, gradients) of the weights that have a gradient. A target is the weight
        or, of a sharded one, the local tensor. A gradient has the strides of a dense weight."""
        targets, grads = [], []
        key = [self.fused, sum(len(group["params"]) for group in self.param_groups)]
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    if self._paths:  # frozen, it leaves L
                        key.append(p.requires_grad)
                    continue
                grad = _dense(p, group)
                if _is_dtensor(p):
                    key.append((p.shape, p.device_mesh, p.placements))
                    p = p.to_local()
                stride = p.stride()
                if type(grad) is not Tensor or grad.stride() != stride:
                    grad = _like(grad, p)
                targets.append(p)
                grads.append(grad)
                key.append((i, j, p.shape, stride, p.dtype, grad.dtype, p.device))
        compiling = torch.compiler.is_compiling()
        capturing = not compiling and bool(grads) and _capturing(grads[0])
        for known, parts in [] if compiling else self._made:  # of layers that take turns
            if known == key:
                if capturing:  # a graph reads the parts' tables for as long as its weights live
                    CAPTURED.setdefault(targets[0], {})[id(parts)] = parts
                self._parts = parts
                return parts, targets, grads
        self._check_whole()
        moving = [(i, p, rule) for i, group in enumerate(self.param_groups)
                  for p, rule in zip(group["params"], self.rules[i])
                  if p.grad is not None]  # fmt: skip
        if compiling or capturing:  # the graph's own
            return _Part.split(moving, self.L, fused=False), targets, grads
        with torch.inference_mode(False), torch.device("cpu"):  # whatever the defaults are now
            self._parts = _Part.split(moving, self.L, self.fused)
        self._made[:] = (key, self._parts), *self._made[:3]
        return self._parts, targets, grads

    def _check_whole(self):
        """Refuse flat tensors in the weights' places, and steps of one weight each in backward."""
        pairs = [(p, x) for group, rules in zip(self.param_groups, self.rules)
                 for p, x in itertools.zip_longest(group["params"], rules)]  # fmt: skip
        flat = any(p is None or x is None or p.ndim < 2 and not x.is_vector for p, x in pairs)
        within = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0
        if flat or within and len(pairs) == 1:
            how = "flattened" if flat else "in the backward pass"
            raise ValueError(PARTS.format(type(self).__name__, how))

    def _update(self, parts, targets, grads):
        """Move the weights. Returns G, eta and, of each part, the norms of its gradients' blocks;
        eta is NaN where the step is skipped."""
        norms = [part.norms(grads) for part in parts]
        middle = parts[0].backend.middle if len(parts) == 1 else _middle
        G, eta, factors = middle([part.scales for part in parts], norms) if parts else (
            torch.zeros_like(self.G), torch.zeros_like(self.G), [])  # fmt: skip
        for part, x in zip(parts, factors):
            for group, blocks in part.groups.items():
                gain = _gain(self.param_groups[group], x)
                if isinstance(gain, Tensor) or gain != 1:
                    x[blocks] *= gain
        for part, x in zip(parts, factors):
            part.subtract(targets, grads, x)
        return G, eta, norms

    def _finish(self, G, eta, norms):
        """Keep the results of a step, count it where it was skipped, and watch the gradients."""
        if not torch.compiler.is_compiling():
            self.G, self.eta = G, eta
        elif self.G.device == G.device:  # torch.compile sets no attribute of an optimiser
            self.G.copy_(G), self.eta.copy_(eta)
        skipped = self.skipped
        if skipped.device != G.device:  # the network has moved, or a state was loaded
            skipped = self.param_groups[0]["skipped"] = skipped.to(G.device)
        if not _on_host(eta) or math.isnan(eta.item()):  # a CPU's number is read without a wait
            skipped.add_(eta.isnan())
        for kind in [] if torch.compiler.is_compiling() else self._watch.see(G, norms):
            self._warn(kind)

    def state_dict(self) -> dict[str, Any]:
        """As torch's method, with a copy of `skipped` and, of a network, s and share of each
        parameter."""
        state = super().state_dict()
        state["param_groups"][0]["skipped"] = self.skipped.clone()
        for group in state["param_groups"]:
            if hasattr(group["lr"], "item") and not isinstance(group["lr"], Tensor):
                group["lr"] = float(group["lr"])  # torch.load takes no numbers of numpy
        if self._paths or self._spectral:
            fields = [(key, field) for key, field in self._saved.items()
                      if field != "share" or self._read or not self._paths]  # fmt: skip
            state["state"] = {i: {**state["state"].get(i, {}), "numel": p.numel(),
                                  **{key: getattr(rule, field) for key, field in fields}}
                              for i, (_, p, rule) in enumerate(self._each())}  # fmt: skip
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's method, but tensors keep their dtypes, and `skipped` stays as it is where the
        state has none. Raises ValueError, and changes nothing, for the state of another optimiser
        or network."""
        given, name = state_dict if isinstance(state_dict, Mapping) else {}, type(self).__name__
        groups, state = given.get("param_groups") or [{}], given.get("state") or {}
        if not all(isinstance(x, Mapping) for x in (*groups, *state.values())):
            groups, state, given = [{}], {}, {}
        own = KEYS.union(*self.param_groups)  # a scheduler keeps initial_lr, swa_lr beside them
        foreign = {key for x in groups for key in x if not key.endswith("lr")} - own
        foreign |= {key for x in state.values() for key in x} - self._tensors - self._saved.keys()
        missing = {key for x in groups for key in ("params", "lr") if x.get(key) is None}
        missing |= ({"train_mode"} if self._spectral else set()) - groups[0].keys()
        missing = {"param_groups", "state"} - given.keys() or missing
        if foreign or missing:
            odd = f"{min(foreign)}, and" if foreign else f"no {min(missing)}, unlike"
            raise ValueError("this is the state of another optimiser, or of none: it has "
                             f"{odd} {name}'s{' has not' * bool(foreign)}; start without it")
        for group in groups:
            _checked_gain(group["lr"], group.get("initial_lr"))
        there, here = ([len(x["params"]) for x in some] for some in (groups, self.param_groups))
        odd = f"its groups have {there} parameters, not {here}" if there != here else ""
        numbers = [i for group in groups for i in group["params"]]
        saved = {p: state.get(i, {}) for i, (_, p, _) in zip(numbers, self._each())}
        for label, p, _ in () if odd else self._each():
            if (number := saved[p].get("numel", p.numel())) != p.numel():
                odd = f"{_label(label, p)} has {number} elements there"
        if odd:
            raise ValueError(f"this is the state of another network: {odd}; start without it")
        tensors = self._tensors_of(saved, groups[0])
        skipped, older = self.skipped, state_dict.get("skipped", self.skipped)
        super().load_state_dict(state_dict)
        skipped.copy_(torch.as_tensor(self.param_groups[0].get("skipped", older)))
        self.param_groups[0]["skipped"] = skipped  # the same tensor: a CUDA graph may count in it
        self.state.clear()
        self.state.update(tensors)
        self._read = self._read or any("share" in x for x in saved.values())
        self._change_rules(lambda p, rule: {
            field: saved[p][key] for key, field in self._saved.items() if key in saved[p]})

    def _tensors_of(self, saved, group):
        """The `state` of {weight: its saved entries}."""
        return {}

    def __getstate__(self):
        kept = ("eta", "G", "fused", "rules", "roles", "depth", "_paths", "_read", "_warned",
                "_outputs")  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._watch, self._made = _Watch(self._spectral), []

    def table(self) -> str:
        """Every parameter's name, shape, role, s and share of L, as text. Parameters whose names
        differ in numbers alone share a line."""
        weights = sum(not rule.is_vector for *_, rule in self._each())
        alike: dict[tuple[str, str], list[Any]] = {}
        for name, p, rule in self._each():
            share = 0.0 if rule.is_vector else rule.share
            if isinstance(self.depth, float) and share:
                share = self.depth / weights
            role = rule.role + f" {rule.parts}" * (rule.parts > 1)
            role += ", transposed" * rule.transposed + ", output" * rule.output
            row = re.sub(r"\d+", "*", name or "-"), role
            alike.setdefault(row, []).append((tuple(p.shape), rule.norm(p.shape), share))
        rows = [("parameter", "shape", "role", "s", "share of L", "")]
        for (name, role), several in alike.items():
            shapes, sizes, shares = map(list, zip(*several))
            s = " to ".join(dict.fromkeys(f"{x:.4g}" for x in (min(sizes), max(sizes))))
            shape = str(shapes[0]) if len(set(shapes)) == 1 else f"{len(set(shapes))} shapes"
            share = f"{sum(shares):.4g}" if sum(shares) else ""
            rows.append((name, shape, role, s, share, f"× {len(several)}" * (len(several) > 1)))
        wide = [max(map(len, column)) for column in zip(*rows)]
        text = [" ".join(x.ljust(n) for x, n in zip(row, wide)).rstrip() for row in rows]
        end = "; not read yet: the number of weights" if self._listening else ""
        return "\n".join([*text, f"{sum(map(len, self.rules))} parameters, L = {self.L:.4g}{end}"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}\n{self.table()}"


class SpectralAGD(AGD):
    """AGD with the spectral norm, averaged: a faster rule that has nothing to set either.

    Of each hidden block, a matrix W_k with RMS singular value rho(W_k) = |W_k|_F / sqrt(rank), the
    rank being its smaller side, s_k is rho(W_k) at the start. The network holds P; at first Z = X =
    P, m = 0. At step t, with g the gradient at P, and m / |m|_F for polar(m) of vectors and rows:

        r   <- (r + <g, P>) / 2                      for the length of P
        m   <- (m + g - P <g, P> / <P, P>) / 2       for its direction
        G   =  max(0, 1/L sum_k rho(P_k) <g_k - P_k <g_k, P_k> / <P_k, P_k>, polar(m_k)>)
        eta =  log((1 + sqrt(1 + 4 G)) / 2)
        z   <- z - eta/L s_k / rho(Y_k) c_k          c = r / (rho(P) <m, polar(m)>) within [-1, 1],
                                                     and z within [-5, 5]
        Z   <- Z - eta/L s_k polar(m_k)              its length grows: that is the clock
        x   <- x + 2 / (t + 1) (z - x)               with t the steps that have moved the block
        X   <- X + 2 / (t + 1) (Z - X)
        y   =  0.2 z + 0.8 x
        Y   =  0.2 Z + 0.8 X,   P = s_k exp(y) Y / rho(Y)

    The numbers z = x = r = 0 at first. `eval()` puts X, at length s_k exp(x), in the place of P;
    `train()` puts P back. Free blocks have no projection and no length of their own, P = Y:
    vectors, blocks that start at zero or are single numbers, and the output layers, from which the
    network's output is reached through no other weight. A convolution is one matrix a group,
    (out, in * K). Every ROWS rows of a matrix, of its shorter side, have a polar factor of their
    own. docs/optimiser.md has memory, time and sources.

    Args:
        params, gain, depth, roles: as of `AGD`. s is always measured, of each block. The output
            layers are read from the network's first forward pass, or are the `outputs` of what
            `agd.depth` returns; else the last weight is the one.
        process_group: of torch.distributed, whose ranks hold the same weights and gradients: each
            computes a share of the polar factors, and all gather them. A DistributedDataParallel
            network brings its own. Copies of the optimiser have none.

    Attributes: `eta`, `G`, `skipped` and `L`, as of `AGD`. A block whose gradient is zero keeps P
    and all of the above bit for bit, and a gradient that is not finite, or over 1e18, changes
    nothing. `state` holds Z ("z"), m ("m"), z and x ("stretch"), r ("r") and, for weights of 16
    bits and between `eval()` and `train()`, P ("weights"), from which a step starts whatever was
    written into the parameter.

    Raises:
        ValueError: as `AGD`.
        RuntimeError: from `step` between `eval()` and `train()`.
    """

    _spectral = True
    _saved = {"scale": "s", "output": "output", "share": "share"}
    _tensors = frozenset(
        {"numel", "z", "m", "weights", "s", "held", "t", "length", "stretch", "r", "fixed"}
    )
    process_group = None

    def __init__(self, params: Params, *, gain: float | Tensor = 1.0,
                 depth: float | Mapping[str, float] | None = None,
                 roles: Mapping[str, str] | None = None,
                 process_group: "torch.distributed.ProcessGroup | None" = None,
                 **foreign: NoReturn) -> None:  # fmt: skip
        if isinstance(params, nn.parallel.DistributedDataParallel):
            process_group = process_group or params.process_group
            params = params.module
        super().__init__(params, gain=gain, fused=False, depth=depth, roles=roles, **foreign)
        self.process_group = process_group
        self.param_groups[0]["train_mode"] = True

    def _prepare(self):
        """The _MatrixParts, with the gradients of the weights that have one."""
        parts = self._whole()
        for part in parts:
            for x in part.weights:
                x.grad = None if x.p.grad is None else _dense(x.p, self.param_groups[x.group])
            part.begin(self.state)
        return (parts,)

    def _update(self, parts):
        """As AGD's."""
        norms = [part.read() for part in parts]
        device = parts[0].s.device if parts else self.G.device  # the network may have moved
        zero = torch.zeros((), dtype=_wide(device), device=device)
        finite = sum((x.sum().to(zero) for x in norms), zero).isfinite()
        known = _on_host(finite)
        if known and not finite:
            for part in parts:
                part.forget()
            return zero * math.nan, zero * math.nan, norms
        for part in parts:
            part.update_momentum(None if known else finite.to(part.s.device))
        _directions(parts, self.process_group)
        L = self._made[2]
        G = (sum((part.slopes().sum().to(zero) for part in parts), zero) / L).clamp_min(0)
        eta = _eta(G)
        for part in parts:
            part.move(eta / L, self.param_groups)
        if not known:
            G, eta = (torch.where(finite, x, math.nan) for x in (G, eta))
        return G, eta, norms

    def _whole(self):
        """The _MatrixParts of all parameters; made anew if these have moved or changed dtype."""
        listed = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]]
        key = [(p.device, p.dtype, p.requires_grad, _local(p).stride()) for _, p in listed]
        if not self._made or self._made[0] != key:
            self._check_whole()
            rules = [rule for _, _, rule in self._each()]
            if not self._outputs:  # no graph was read
                last = max((i for i, x in enumerate(rules) if not x.is_vector), default=-1)
                rules = [x._replace(output=i == last) for i, x in enumerate(rules)]
            training = self.param_groups[0].get("train_mode", True)
            with torch.inference_mode(False):
                alike = _grouped(((p.device, _shards(p)), _Matrices(p, rule, group))
                                 for (group, p), rule in zip(listed, rules))  # fmt: skip
                parts = [_MatrixPart(self.state, training, *key, xs) for key, xs in alike.items()]
            # A list that is filled: torch.compile before 2.14 sets no attribute of an optimiser.
            self._made[:] = [key, parts, self.L]
        return self._made[1]

    @torch.no_grad()
    def eval(self) -> None:
        """Have the network hold the average X."""
        if self.param_groups[0]["train_mode"]:
            for part in self._whole():
                part.show_average(self.state)
            self.param_groups[0]["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Have the network hold P again, bit for bit."""
        if not self.param_groups[0]["train_mode"]:
            for part in self._whole():
                part.show_weights(self.state)
            self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def clock(self) -> tuple[Tensor, Tensor]:
        """(length, turn): rho(Z) / s, and eta / L s / rho(Z), the angle by which the last step has
        turned Z: means over the blocks of a weight and then over the weights that are not free.
        0-dim tensors; NaN before the first step, and where there is no such weight."""
        lengths = [x for part in self._whole() for x in part.lengths(self.state)]
        lengths = lengths or [(torch.full_like(self.G, math.nan),) * 2]
        length, turn = (torch.stack([x.to(self.G) for x in xs]).nanmean() for xs in zip(*lengths))
        return length, turn * self.eta / self.L

    def _tensors_of(self, saved, group):
        training, state = group["train_mode"], {}
        if not training and any("z" in x and "weights" not in x for x in saved.values()):
            raise ValueError("the state was taken between eval() and train(), and the weights to "
                             "train are missing: take it after optimizer.train(), or call "
                             "optimizer.eval() before it is loaded into a template")
        for i, (p, entries) in enumerate(saved.items()):
            shapes = [tuple(entries[key].shape) for key in ("z", "m", "weights") if key in entries]
            there = {"z", "m", "s", "held", "t", "length"} & entries.keys()
            lengths = [tuple(entries[key].shape) for key in ("stretch", "r") if key in entries]
            blocks = tuple(entries["s"].shape) if "s" in there else ()
            if (len(there) not in (0, 6) or any(shape != p.shape for shape in shapes)
                    or lengths not in ([], [(*blocks, 2), blocks])):  # fmt: skip
                raise ValueError(f"the state is not of these parameters: number {i} has shape "
                                 f"{tuple(p.shape)}, and there {', '.join(sorted(there))} {shapes}")
            unused = {"numel", "weights" if training and p.dtype.itemsize >= 4 else ""}
            state[p] = {key: _copied(x, p.device) if isinstance(x, Tensor) else x
                        for key, x in entries.items() if key in self._tensors - unused}
        return {p: tensors for p, tensors in state.items() if tensors}


# What a parameter is, with its blocks and their norm s: the table of docs/optimiser.md. A vector
# (bias, gain) is a single block and takes no share of L.
ROLES = "matrix", "stacked", "kernel", "rows", "bias", "gain"


class Rule(NamedTuple):
    """What AGD knows of one parameter."""

    role: str
    parts: int = 1  # matrices of a stacked weight, groups of a convolution
    transposed: bool = False  # whether the input's dimension comes first
    stride: int = 1  # of a transposed convolution: K / stride positions meet in an output
    s: float | None = None  # the norm of a block; None: the role's
    share: float = 1.0  # of L
    start: float | None = None  # of a vector, the value that `init_weights` gives it; None: kept
    im2col: bool = False  # whether a kernel is one matrix a group, (out, in * K), instead of K
    output: bool = False  # whether the network's output is reached through no other weight

    @property
    def is_vector(self):
        return self.role in ("bias", "gain")

    def blocks(self, shape):
        """(number of blocks, the smaller side of one, the role's s) of a weight of this shape."""
        size = math.prod(shape)
        if self.is_vector:
            return 1, size, 1.0
        if self.role == "rows":
            return size // shape[-1], 1, math.sqrt(shape[-1])
        sides, positions = [shape[0], shape[1]], math.prod(shape[2:])
        sides[self.cut(shape)] //= self.parts
        if self.role != "kernel":
            sides[1], positions = sides[1] * positions, 1
        outputs, inputs = reversed(sides) if self.transposed else sides
        s = math.sqrt(outputs * self.stride / inputs / positions)
        if self.im2col:
            return self.parts, min(sides[0], sides[1] * positions), s
        return self.parts * positions, min(sides), s

    def norm(self, shape):
        """s of a weight of this shape."""
        return self.blocks(shape)[2] if self.s is None else self.s

    def cut(self, shape):
        """The dimension along which the parts follow each other."""
        return 1 if self.transposed and len(shape) == 2 else 0

    def parted(self, x):
        """A view of a weight with a dimension for its parts, in front of the one they cut."""
        return x.unflatten(self.cut(x.shape), (self.parts, -1)) if self.parts > 1 else x

    def numbering(self, shape):
        """The dimensions of `parted` that number the blocks of a weight of this shape."""
        if self.role == "rows":
            return [*range(len(shape) - 1)]
        cut = [self.cut(shape)] if self.parts > 1 else []
        if self.role == "kernel" and not self.im2col:
            cut += range(2 + len(cut), len(shape) + len(cut))
        return cut


# Linear layers of this name are three matrices beside each other where their shape is that.
QKV = ("qkv", "c_attn", "qkv_proj", "query_key_value", "Wqkv", "to_qkv", "in_proj")
TOKEN = re.compile("token|pos|embed|query|queries|latent|bias_[kv]$")  # names of rows


def _rules(params, roles, im2col=False, measure=True):
    """{id: (name or None, Rule)} of all parameters of a network, by its layers; or of (name or
    None, tensor) pairs, by shape: a matrix or kernel, or, of a single dimension, the bias of the
    weight of its name, or of the weight in front of it that has as many rows, or a gain. Names
    tell tokens, positions, layer scales and the magnitudes of weight_norm from weights.
    `im2col`: a kernel is one matrix a group. `measure`: s is that of the weights."""
    net = params if isinstance(params, nn.Module) else None
    _check(params if net is None else _trainable(net))
    if net is not None:
        params = [(name, p) for name, p in net.named_parameters()
                  if nn.parameter.is_lazy(p) or p.numel()]  # fmt: skip
    known, layers, before = {}, {}, None
    for name, p in params:
        owner, tensor, magnitude = _owner(name or "", p)
        rule = Rule("matrix" if p.ndim == 2 else "kernel")
        if magnitude:
            rule = Rule("gain")
        elif net is not None:
            rule = _role(net.get_submodule(owner), owner.rpartition(".")[2], tensor, p.shape)
        elif name and "weight" not in tensor and 1 + (not TOKEN.search(tensor)) < p.ndim < 4:
            rule = _role(None, "", tensor, p.shape)  # as a network's tensor that is of no layer
        elif p.ndim < 2:
            rule = Rule("gain", start=0.0 if "bias" in tensor else 1.0)
        layer = before if name is None else None
        if name and "bias" in tensor:
            layer = owner, tensor.replace("bias", "weight")
        known[id(p)] = name, p, _overridden(name, p, rule, roles, im2col), layer
        before = (owner, tensor) if name else id(p)
        if not magnitude:
            layers[before] = p
    scales = _measured([(p, rule) for _, p, rule, _ in known.values()]) if measure else {}
    rules = {}
    for key, (name, p, rule, layer) in known.items():
        s, W = scales.get(key), layers.get(layer)
        given = rule.role == "gain" and _matching(name, roles)
        fits = W is not None and (net is not None or W.ndim > 1 and p.shape == W.shape[:1])
        if layer is not None and rule.is_vector and not given:
            rule = rule._replace(role="gain")
            if fits and W is not p:
                its = known[id(W)][2]
                rule = rule._replace(role="gain" if its.is_vector else "bias", start=0.0)
                s = scales.get(id(W), its.blocks(W.shape)[2])
        if measure and s is None:
            s = rule.blocks(p.shape)[2]
        rules[key] = name, rule._replace(s=s)
    return rules


def _owner(name, p):
    """(the module's name, the tensor's name in it, whether it is the magnitude of weight_norm) of a
    parameter; one of a parametrization stands for the weight that it makes."""
    if own := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\.original(\d?)", name):
        vector = p.ndim != 1 and sum(n > 1 for n in p.shape) < 2
        return own[1] or "", own[2], own[3] == "0" and vector
    owner, _, tensor = name.rpartition(".")
    if tensor in ("weight_g", "weight_v", "weight_orig"):  # of the older torch.nn.utils
        return owner, "weight", tensor == "weight_g"
    return owner, tensor, False


def _role(module, attribute, tensor, shape):
    """The Rule of a parameter, by the class of its module, and the module's own name."""
    gain = Rule("gain", start=1.0 if "Norm" in type(module).__name__ else None)
    if len(shape) < 2:
        bias = tensor == "bias" or tensor.startswith("bias_") or tensor.endswith("_bias")
        return Rule("bias", start=0.0) if bias else gain
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):  # 4 gates of LSTM, 3 of GRU
        gates = 1 if tensor.startswith("weight_hr") else shape[0] // module.hidden_size
        return Rule("stacked", gates) if gates > 1 else Rule("matrix")
    if isinstance(module, nn.MultiheadAttention) and tensor.endswith("proj_weight"):
        return Rule("stacked", 3) if tensor == "in_proj_weight" else Rule("matrix")
    if tensor == "weight":
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return Rule("kernel", module.groups, True, math.prod(module.stride))
        if isinstance(module, nn.modules.conv._ConvNd):
            return Rule("kernel", module.groups)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return Rule("rows")
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers'
        if transposed or isinstance(module, (nn.Linear, nn.Bilinear)):
            sides = shape[::-1] if transposed else shape
            three = attribute in QKV and len(shape) == 2 and sides[0] == 3 * sides[1]
            return Rule("stacked", 3, transposed) if three else Rule("matrix", 1, transposed)
    vector = sum(n > 1 for n in shape) < 2 and not TOKEN.search(tensor)
    return gain if vector else Rule("rows")


def _matching(name, roles):
    """The roles of all patterns of roles= that match a parameter's name."""
    return [x for pattern, x in roles.items() if name and fnmatch.fnmatchcase(name, pattern)]


def _overridden(name, p, rule, roles, im2col):
    """The Rule of the last pattern of roles= that matches a parameter's name; else `rule`."""
    for text in _matching(name, roles)[-1:]:
        role, _, parts = text.partition(" ")
        transposed, role = role == "transposed", "matrix" if role == "transposed" else role
        if role not in ROLES or (parts and not parts.isdecimal()):
            raise ValueError(f"no role {text!r} among {', '.join(ROLES)}, transposed, and those "
                             "with a number of parts, as stacked 3")  # fmt: skip
        rule = Rule(role, int(parts or (3 if role == "stacked" else 1)), transposed)
        whole = p.ndim > 1 and rule.parts and p.shape[rule.cut(p.shape)] % rule.parts == 0
        if not (rule.is_vector or whole):
            raise ValueError(f"{_label(name, p)} cannot be {text!r}, of roles=")
    return rule._replace(im2col=im2col and rule.role == "kernel")


@torch.no_grad()
def _measured(weights):
    """{id: RMS singular value of the blocks} of (weight, Rule) pairs, where it is not zero, nor as
    good as zero: under 1/500 of the role's s, as some heads and layer scales start."""
    norms, scales = [], {}
    for p, rule in weights:
        if p.is_floating_point() and not p.is_meta and p.numel():
            norm = vector_norm(p.detach(), dtype=_wide(p.device))
            norm = norm.full_tensor() if _is_dtensor(norm) else norm
            number, rank, s = rule.blocks(p.shape)
            norms.append((norm.device, (id(p), math.sqrt(number * rank), s, norm)))
    for some in _grouped(norms).values():  # one read a device
        for (key, n, s, _), norm in zip(some, torch.stack([x for *_, x in some]).tolist()):
            if s / 500 < norm / n < math.inf:
                scales[key] = norm / n
    return scales


# The step of AGD: two sweeps over memory.


def _eta(G):
    """log((1 + sqrt(1 + 4 G)) / 2), without cancellation or overflow; NaN for an infinite G."""
    return (G / (G + 0.25).sqrt_().add_(0.5)).log1p_()


def _middle(scales, norms):
    """The mathematics between the sweeps. From s / L and the norm of each block, (blocks,) of each
    part, follow G, eta and the factors of the update, infinite or NaN for a zero gradient."""
    G, *others = [(s * x).sum() for s, x in zip(scales, norms)]
    eta = _eta(G := sum((x.to(G) for x in others), G))
    return G, eta, [s * eta.to(x) / x for s, x in zip(scales, norms)]


class _Part:
    """The weights of one backend on one device, sharded alike: `scales`, s / L of each block,
    (blocks,) float64; `groups`, {index of a group: slice of its blocks}; `index`, where weights are
    sharded through their blocks, the places of the local ones."""

    @classmethod
    def split(cls, weights, L, fused):
        """The parts of weights, given as (index of a group, weight, Rule) triples."""
        members = []
        for i, (group, p, rule) in enumerate(weights):
            layout = Layout(p, rule)
            kind = TorchBackend if fused is False else _backend(p, layout)
            members.append(((kind, p.device, _shards(p)), (i, p, layout, group, rule)))
        return [cls(*key, L, *zip(*some)) for key, some in _grouped(members).items()]

    def __init__(self, kind, device, shards, L, indices, weights, layouts, groups, rules):
        self.shards, self.indices, self.groups, self.index = shards, indices, {}, None
        self.backend = kind([_local(p) for p in weights], layouts)
        scales, places, end = [], [], 0
        for p, layout, group, rule in zip(weights, layouts, groups, rules):
            number, s = rule.blocks(p.shape)[0], rule.norm(p.shape)
            scales.append(torch.full((number,), s / L, dtype=_wide(device), device=device))
            own = torch.arange(number, device=device) if layout.index is None else layout.index
            places.append(end + own)
            end += number
            first = self.groups.get(group, slice(end - number, end)).start
            self.groups[group] = slice(first, end)
        self.scales = torch.cat(scales)
        if any(layout.index is not None for layout in layouts):
            self.index = torch.cat(places)

    def norms(self, grads):
        """Frobenius norms of the gradients' blocks, like `scales`."""
        norms = self.backend.norms([grads[i] for i in self.indices])
        if self.shards is None:
            return norms
        squares = norms.square_()
        if self.index is not None:
            squares = torch.zeros_like(self.scales).index_add_(0, self.index, squares)
        return _over_ranks(squares, self.shards).sqrt_()

    def subtract(self, targets, grads, factors):
        """targets -= factors * grads, with factors like `scales`."""
        targets, grads = ([tensors[i] for i in self.indices] for tensors in (targets, grads))
        self.backend.subtract(targets, grads,
                              factors if self.index is None else factors[self.index])  # fmt: skip


class Layout:
    """The blocks of a weight, and their order in memory (of a sharded weight: on this device).

    Attributes:
        K: the number of blocks.
        index: None, or of a weight that is sharded through its blocks, the place of each among all.
        dense: (lead, outer, K, inner), the shape in the order of memory: `lead` times K blocks. In
            a convolution inner is 1, and `in` in channels_last; in an embedding lead is the number
            of rows. None where memory has gaps, or blocks are no single dimension.
        dims: the dimensions of `view` inside a block.
    """

    def __init__(self, weight, rule):
        p, self.dense, self.index, self.rule = _local(weight).detach(), None, None, rule
        blocks = rule.numbering(p.shape)
        if _is_dtensor(weight) and 0 in blocks:  # the rows of a shard may end within a part
            self.index = _block_indices(weight, rule)
            blocks = [0, *(i - (rule.role == "kernel") for i in blocks[1:])]
            self.rule = rule._replace(parts=1)
        p = self.rule.parted(p)
        dims = range(p.ndim)
        self.K = math.prod([p.shape[i] for i in blocks])
        self.dims = tuple([i for i in dims if i not in blocks])
        self.shape = [p.shape[i] if i in blocks else 1 for i in dims]  # of factors
        self.order = sorted(dims, key=lambda i: -p.stride(i))
        if self.index is not None and self.order[0] != 0:
            return  # `index` is in the order of the rows
        if p.numel() and p.permute(self.order).is_contiguous():
            sides = [i for i in self.order if p.shape[i] > 1]
            lead = [*itertools.takewhile(blocks.__contains__, sides)]
            sides = sides[len(lead) :]
            places = [n for n, i in enumerate(sides) if i in blocks] or [len(sides)]
            if places[-1] - places[0] < len(places):
                lead, outer, inner = (math.prod([p.shape[i] for i in some]) for some in (
                    lead, sides[: places[0]], sides[places[-1] + 1 :]))  # fmt: skip
                self.dims, K = DENSE, self.K // lead
                self.dense = lead, outer, K, inner
                # Rows of m * K numbers: long enough for a loop, short enough for float32's sums.
                self.m = math.gcd(outer, 1024 if K == 1 else 64) if inner == 1 else 1

    def view(self, x):
        """A tensor like the weight as (lead, outer / m, m, K, inner), or `parted` if not dense."""
        x = self.rule.parted(x)
        if self.dense is None:
            return x
        lead, outer, K, inner = self.dense
        return x.permute(self.order).view(lead, outer // self.m, self.m, K, inner)

    def spread(self, factors):
        """Factors, one a block, in a shape that broadcasts with `view`."""
        if self.dense is None:
            return factors.view(self.shape)
        lead, _, K, _ = self.dense
        if lead > 1:
            return factors.view(lead, 1, 1, K, 1)
        factors = factors.view(K, 1)
        return factors if 1 in (self.m, K) else factors.repeat(self.m, 1, 1)


class TorchBackend:
    """The sweeps by torch's operations, for weights of one device and their Layouts. Other backends
    have the same methods, for weights that keep shape, strides and dtype."""

    middle = staticmethod(_middle)

    def __init__(self, weights, layouts):
        self.layouts = layouts

    def norms(self, tensors):
        """Frobenius norms of the blocks of tensors like the weights, (blocks,) float64."""
        return torch.cat([_norms(y.view(x), y.dims) for y, x in zip(self.layouts, tensors)])

    def subtract(self, targets, directions, factors):
        """targets -= factors * directions, tensors like the weights, with factors (blocks,)
        float64, not negative. A factor of 0, infinity or NaN leaves every bit."""
        factors = factors.nan_to_num(0, 0, 0)
        known = factors.tolist() if _on_host(factors) else None
        single, end = factors.float(), 0
        for layout, t, d in zip(self.layouts, targets, directions):
            blocks = slice(end, end + layout.K)
            end = blocks.stop
            some = known and set(known[blocks])
            if some is not None and not any(some):
                continue
            # Whether float32 has the digits of every factor that is not 0, and whether none is 0.
            in_range = known and all(LOWEST < x < HIGHEST or x == 0 for x in some)
            t, d = layout.view(t), layout.view(d)
            f = single if in_range and d.dtype != torch.float64 else factors
            f = layout.spread(f[blocks])
            if in_range and 0.0 not in some and f.dtype == d.dtype:
                t.addcmul_(d, f, value=-1)
            else:
                work = torch.promote_types(d.dtype, torch.float32)
                update = torch.mul(d, f, out=torch.empty_like(d, dtype=work))
                t.sub_(update.masked_fill_(f == 0, 0))  # NaN * 0 is NaN, and -0 - -0 is 0


DENSE = (1, 2, 4)  # the dimensions inside a block, in the view of a dense weight
LOWEST, HIGHEST = 2.0**-100, 2.0**100  # float32 loses no digit of factors between them
LEAST = 2.0**-30  # a norm whose square float32 holds, with all the squares that matter to it
CHUNK = 2**17  # numbers: half a megabyte stays in a processor's cache


def _norms(x, dims):
    """Norms over dimensions of a Layout's view, (blocks,) float64."""
    wide = _wide(x.device)
    if x.dtype == torch.float32 and dims == DENSE and len(x) == 1 and _on_host(x):
        norms = _norms_in_float32(x[0])
        if all(LEAST < norm < math.inf for norm in norms.tolist()):
            return norms
    if wide == torch.float64 != x.dtype or not x.numel():  # float64 holds their squares
        return vector_norm(x, 2, dims, dtype=wide).flatten()
    x = x.to(wide)
    largest = vector_norm(x, math.inf, dims, keepdim=True).clamp_min_(torch.finfo(wide).tiny)
    return vector_norm(x / largest, 2, dims).flatten() * largest.flatten()


def _norms_in_float32(x):
    """As _norms, of a dense view without `lead`, with CHUNK squares at a time, which stay in the
    cache; 0 or infinite out of range."""
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
    if layout.dense is None or not same or type(p) not in (Tensor, nn.Parameter):
        return TorchBackend
    kind = kernels.backend(p.device, TorchBackend, Layout, Rule)
    return kind if kind is not None and kind.takes(p, layout) else TorchBackend


CAPTURED = WeakTensorKeyDictionary()  # parts that CUDA graphs read, by the first of their weights


def _capturing(x):
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _on_host(x):
    """Whether a number is read without a wait: of a CPU's memory, and while nothing is traced."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _wide(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPU has none


def _copied(x, device):
    """A copy of a tensor on a device; float64 becomes the widest dtype that the device has."""
    return x.detach().to(device, _wide(device) if x.dtype == torch.float64 else x.dtype, copy=True)


def _gain(group, factors):
    """The gain of a group: a number, or a 0-dim tensor that is not read, 0 where it is negative."""
    if not isinstance(gain := group["lr"], Tensor):
        return gain
    gain = gain.detach().reshape(()).clamp_min(0)
    return gain if gain.device.type == "cpu" else gain.to(factors.device)


def _dense(p, group):
    """The gradient of a weight of a group: of a sharded one, the local part."""
    grad = p.grad
    if grad.layout != torch.strided or grad.is_complex():
        names = [x for x, q in zip(group.get("param_names", ()), group["params"]) if q is p]
        kind = "complex" if grad.is_complex() else "sparse"
        raise ValueError(f"the gradient of {_label(*names or [None], p)} is {kind}, and AGD needs "
                         "a dense, real one: build the layer with sparse=False and real weights")
    return grad.redistribute(p.device_mesh, p.placements).to_local() if _is_dtensor(p) else grad


def _like(grad, p):
    """A gradient with the strides of its weight: itself, or a copy."""
    same = all(n == 1 or a == b for n, a, b in zip(p.shape, p.stride(), grad.stride()))
    same = same and type(grad) is Tensor
    return grad if same else torch.empty_like(p, dtype=grad.dtype).copy_(grad)


# DTensors, without an import of torch.distributed.tensor before there is one.


def _is_dtensor(p):
    return hasattr(p, "to_local")


def _local(p):
    return p.to_local() if _is_dtensor(p) else p


def _shards(p):
    return (p.device_mesh, p.placements) if _is_dtensor(p) else None


def _over_ranks(sums, shards):
    """Sums of blocks over all devices that have shards of them, (blocks,)."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, placements = shards
    parts = [Replicate() if x.is_replicate() else Partial("sum") for x in placements]
    return DTensor.from_local(sums, mesh, parts, run_check=False).full_tensor()


def _block_indices(weight, rule):
    """The place among all blocks of the blocks of a local tensor, for a weight that is sharded
    along the dimension that numbers them: a row at a time."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, (first, *_) = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements)  # fmt: skip
    shape = rule.parted(torch.empty(weight.shape, device="meta")).shape
    parts, *positions = [shape[i] for i in rule.numbering(weight.shape)]
    rows = first + torch.arange(len(_local(weight)), device=weight.device)
    positions = torch.arange(math.prod(positions), device=weight.device)
    return (rows[:, None] // (len(weight) // parts) * len(positions) + positions).flatten()


class _Watch:
    """Looks at the gradients of BURST steps in a row, the first ones and then of every EVERY, and
    reads a GPU's numbers when they have come, without a wait."""

    BURST, EVERY = 16, 1024

    def __init__(self, spectral=False):
        self.step, self.seen, self.reading, self.spectral = -1, [], None, spectral

    def see(self, G, norms):
        """The kinds of WARNINGS that the last steps gave reason for."""
        self.step += 1
        if _capturing(G):
            return []
        if self.reading is None and self.step % self.EVERY < self.BURST:
            squares = sum((x.square().sum().to(G) for x in norms), torch.zeros_like(G))
            self.seen.append(torch.stack([G, squares]))
            if len(self.seen) == self.BURST:
                seen, self.seen = torch.stack(self.seen), []
                if _on_host(seen):
                    return self._judge(seen)
                if seen.is_cuda:  # the copy is to pinned memory
                    self.reading = seen.to("cpu", non_blocking=True), torch.cuda.Event()
                    self.reading[1].record()
        elif self.reading is not None and self.reading[1].query():
            seen, self.reading = self.reading[0], None
            return self._judge(seen)
        return []

    def _judge(self, seen):
        if not seen.isfinite().all():
            return []
        G, norm = seen[:, 0], seen[:, 1].sqrt()
        same = (norm[1:] - norm[:-1]).abs() < 1e-5 * norm[1:]
        moved = (G[1:] - G[:-1]).abs() > 1e-4 * G[1:]  # the same gradient again is not clipped
        first = self.step < self.EVERY
        kinds = {"clipped": (same & moved).sum() >= 10, "sum": G.min() > 1000,
                 "dead": first and G.max() < 1e-6,
                 "small": self.spectral and first and 1e-6 <= G.max() < 1e-2}  # fmt: skip
        return [kind for kind, yes in kinds.items() if yes]


# The step of SpectralAGD: parameters as stacks of matrices.

MU, BETA = 0.5, 0.8  # of the momentum; of the average in the weights that a network holds
ROWS = 128  # of the blocks that have a polar factor of their own; None: whole matrices
STRETCH = 5  # the largest |z|: a length stays within a factor of 150, from which it comes back
TINY = 1e-36  # squares of the numbers of a block that add up to less are no gradient in float32


class _MatrixPart:
    """The parameters of one device, sharded alike, as stacks of matrices. Of each block, (blocks,)
    tensors of which `state` has views: s, rho at the start; held, whether P has a length apart from
    Y's; t, the steps that have moved it; length, rho(Y) / rho(P), or 1 of a free block; r, and
    stretch, (blocks, 2), the numbers z and x, or 0 of a free block."""

    def __init__(self, state, training, device, shards, weights):
        self.weights, self.shards, self.training = weights, shards, training
        wide, end = {"dtype": _wide(device), "device": device}, 0
        for x in weights:
            x.blocks = slice(end, end + x.number)
            end = x.blocks.stop
        self.s, self.length = torch.ones(end, **wide), torch.ones(end, **wide)
        self.stretch, self.r = torch.zeros(end, 2, **wide), torch.zeros(end, **wide)
        self.held = torch.zeros(end, dtype=torch.bool, device=device)
        self.t = torch.zeros(end, dtype=torch.int64, device=device)
        self.rank = torch.cat([torch.full((x.number,), x.rank, **wide) for x in weights])
        self.polar = torch.cat([torch.full((x.number,), x.polar, device=device) for x in weights])
        for x in weights:
            if "z" in state.get(x.p, ()):
                x.bind(self, state[x.p])

    def begin(self, state):
        """Start the weights that have their first gradient; `active` are those that have one."""
        self.active, self.training = [x for x in self.weights if x.grad is not None], True
        new = [x for x in self.active if "z" not in state[x.p]]
        if not new:
            return
        rho = (self.total(lambda x: x.squares(x.view(_local(x.p))), new) / self.rank).sqrt()
        for x in new:
            own, s = rho[x.blocks], x.rule.norm(x.p.shape)
            there = (own > s / 500) & own.isfinite() & (not x.rule.is_vector)
            self.s[x.blocks] = torch.where(there, own, s)
            self.held[x.blocks] = there & x.fixed
            self.t[x.blocks], self.length[x.blocks] = 0, 1
            self.stretch[x.blocks], self.r[x.blocks] = 0, 0
            state[x.p].update(z=x.p.detach(), m=torch.zeros_like(x.p))
            x.bind(self, state[x.p])

    def total(self, sums, weights=None):
        """Sums of blocks over all devices, (blocks,). sums(x) has those of a weight on this device,
        or None, which is 0, as it is outside of `weights`: the active ones by default."""
        out = torch.zeros_like(self.s)
        for x in self.active if weights is None else weights:
            values = sums(x)
            if values is not None and x.index is not None:
                out.index_add_(0, x.blocks.start + x.index, values.to(out))
            elif values is not None:
                out[x.blocks] = values.to(out)
        return out if self.shards is None else _over_ranks(out, self.shards)

    def each(self, *values, weights=None):
        """(x, its blocks' part of each of `values`, a number or a tensor that broadcasts), of the
        active weights."""
        known = [v.tolist() if _on_host(v) else None for v in values]
        for x in self.active if weights is None else weights:
            yield x, *[x.own(v) if k is None or x.number > 1 else k[x.blocks.start]
                       for v, k in zip(values, known)]  # fmt: skip

    def read(self):
        """Take the gradients in. Returns their norms, (blocks,)."""
        for x in self.active:
            x.g = x.view(x.grad).to(x.dtype)
        squares = self.total(lambda x: x.squares(x.g))
        dots = self.total(lambda x: _dots(x.g, x.weights()) if x.fixed else None)
        self.rho = self.rho_of_weights()
        self.along = torch.where(self.held, dots / (self.rho.square() * self.rank), 0)
        self.moves = squares > TINY
        return squares.sqrt()  # infinite where float32 has no square of an element

    def rho_of_weights(self):
        """rho(P), (blocks,)."""
        return self.s * self.stretch[:, 0].lerp(self.stretch[:, 1], BETA).exp()

    def update_momentum(self, finite):
        """Average the gradients, without their parts along the weights, into the momentum."""
        if finite is not None:
            self.moves, self.along = self.moves & finite, torch.where(finite, self.along, 0)
        part = (1 - MU) * self.moves.to(self.s)
        self.r.lerp_(self.along * self.rho.square() * self.rank, part)
        for x, a, b in self.each(part, part * self.along):
            x.g = x.g if finite is None else torch.where(finite, x.g, 0)
            x.m.lerp_(x.g, a)
            if x.fixed:
                _add(x.m, x.weights(), b, -1)

    def slopes(self):
        """rho(P) <g, D> of each block, (blocks,), with D the direction."""
        slopes = self.total(lambda x: _dots(x.g, x.D))
        along = self.total(lambda x: _dots(x.weights(), x.D) if x.fixed else None)
        dual = self.total(lambda x: _dots(x.m, x.D) if x.fixed else None)
        squares = self.total(lambda x: None if x.polar else x.squares(x.D))
        # Directions without a polar factor are not yet of norm 1.
        norm = torch.where(squares > TINY, squares.sqrt(), math.inf).masked_fill_(self.polar, 1)
        self.factor = self.s / norm
        c = self.r / (self.rho * dual / norm).clamp_min(TINY)
        self.c = torch.where(self.held, c.clamp(-1, 1), 0)
        return self.rho / norm * (slopes - self.along * along)

    def move(self, step, groups):
        """Move Z, X and P, and the numbers of its length, by `step`, eta / L."""
        step = step.to(self.factor) * self.moves
        for x in self.active:
            gain = _gain(groups[x.group], step)
            if isinstance(gain, Tensor) or gain != 1:
                step[x.blocks] *= gain
        factor, moves = self.factor * step, step > 0
        self.t += moves
        w = moves.to(factor) * 2 / (self.t + 1)
        z, average = self.stretch.unbind(1)
        z -= step * self.s / (self.length * self.rho) * self.c
        z.clamp_(-STRETCH, STRETCH)
        average.lerp_(z, w)
        keep = (1 - w) * torch.where(moves, self.length, 1)
        for x, a, b, c, d in self.each(keep, w, (1 - BETA + BETA * w) * factor, factor):
            x.W = x.weights().mul_(a)
            _add(x.W, x.z, b)
            _add(x.W, x.D, c, -1)
            _add(x.z, x.D, d, -1)
        length = self.total(lambda x: x.squares(x.W) if x.fixed else None)
        length, moves = (length / self.rank).sqrt() / self.rho_of_weights(), moves & self.held
        self.length.copy_(torch.where(moves, length, self.length))
        for x, n in self.each(torch.where(moves, length, 1)):
            if x.fixed:
                x.W.div_(n)
            if x.copy is not None or not x.view.dense:
                x.view.write(_local(x.p).detach(), x.W)
        self.forget()

    def forget(self):
        """Let go of what a step has made, and of its gradients."""
        for x in self.active:
            x.g = x.D = x.W = x.grad = None

    def show_average(self, state):
        self.training, started = False, [x for x in self.weights if "z" in state[x.p]]
        for x, a in self.each(self.length / BETA, weights=started):
            x.W = (x.weights() * a).sub_(x.z, alpha=(1 - BETA) / BETA)
        rho = (self.total(lambda x: x.squares(x.W), started) / self.rank).sqrt()
        lengths = self.s * self.stretch[:, 1].exp() / rho
        lengths = torch.where(self.held & (rho > 0), lengths, 1)
        for x, n in self.each(lengths, weights=started):
            if x.copy is None:
                state[x.p]["weights"] = x.p.detach().clone()
            x.view.write(_local(x.p).detach(), x.W.mul_(n))
            x.W = None

    def show_weights(self, state):
        for x in self.weights:
            if "weights" in state[x.p]:
                x.p.detach().copy_(state[x.p]["weights"])
                if x.copy is None:
                    del state[x.p]["weights"]

    def lengths(self, state):
        """The means of rho(Z) / s, and of its inverse, over the blocks that are not free,
        for each weight that may have such; NaN where it has none."""
        fixed = [x for x in self.weights if x.fixed and "z" in state[x.p]]
        lengths = (self.total(lambda x: x.squares(x.z), fixed) / self.rank).sqrt() / self.s
        lengths = torch.where(self.held, lengths, math.nan)
        return [(x.nanmean(), (1 / x).nanmean()) for x in (lengths[x.blocks] for x in fixed)]


class _Matrices:
    """A parameter as matrices, (number, rows, cols); a vector and a row are (1, cols)."""

    def __init__(self, p, rule, group):
        self.p, self.rule, self.group, self.copy = p, rule, group, None
        self.number, self.rank, _ = rule.blocks(p.shape)  # of blocks, and the smaller side of one
        self.polar = self.rank > 1 and not rule.is_vector  # a direction is a polar factor
        # Whether blocks that do not start at zero have a length apart from Y's.
        self.fixed = not (rule.is_vector or rule.output) and p.numel() > self.number
        self.dtype = torch.promote_types(p.dtype, torch.float32)  # of arithmetic and state
        # A shard may end within a block: its matrices are then rows, `index` the block of each.
        by_rows = _is_dtensor(p) and 0 in rule.numbering(p.shape)
        self.index = _block_indices(p, rule) if by_rows else None
        self.view = self.whole = _View(_local(p).detach(), rule, by_rows)
        if _is_dtensor(p):
            self.whole = _View(torch.empty(p.shape, device="meta"), rule)
        self.form = torch.preserve_format if self.view.dense else torch.contiguous_format
        if self.polar:
            n, *sides = self.whole.size
            rows, cols = sorted(sides)
            self.cuts = 1 if ROWS is None else -(-rows // ROWS)
            self.piece, self.pieces = (-(-rows // self.cuts), cols), n * self.cuts

    def bind(self, part, state):
        """Copy the tensors of `state`, in the weight's order of memory, and give it views of those
        of all blocks."""
        narrow = self.p.dtype != self.dtype
        if narrow:
            state.setdefault("weights", self.p.detach())
        elif part.training:
            state.pop("weights", None)  # of a time when the parameter had 16 bits
        for key in [key for key in ("z", "m", "weights") if key in state]:
            like = torch.empty_like(self.p, dtype=self.dtype, memory_format=self.form)
            state[key] = like.copy_(state[key]).detach()
        for key in ("s", "held", "t", "length", "stretch", "r"):
            of_all = getattr(part, key)
            if key in state:
                of_all[self.blocks] = state[key].to(of_all)
            state[key] = of_all[self.blocks]
        self.fixed = state["fixed"] = state.get("fixed", self.fixed)  # whatever L is read again
        self.momentum, self.copy = state["m"], state["weights"] if narrow else None
        self.z, self.m = (self.view(_local(state[key])) for key in ("z", "m"))

    def weights(self):
        """P in full precision."""
        return self.view(_local(self.p if self.copy is None else self.copy).detach())

    def own(self, values):
        """The part of `values`, (blocks,) of all, in a shape that broadcasts with the matrices."""
        own = values[self.blocks]
        return (own if self.index is None else own[self.index]).to(self.dtype).view(-1, 1, 1)

    @staticmethod
    def squares(x):
        """Sums of squares of matrices, (number,), of short sums in float32."""
        short = vector_norm(x, 2, 2, dtype=torch.promote_types(x.dtype, torch.float32))
        return short.to(_wide(x.device)).square_().sum(1)

    def cut(self):
        """The momentum, gathered from all devices, in `pieces`, (pieces, *piece), the shorter side
        first."""
        sharded = _is_dtensor(self.momentum)
        m = self.whole(self.momentum.full_tensor()) if sharded else self.m
        m = m.mT if m.shape[1] > m.shape[2] else m
        rows, cols = self.piece
        missing = rows * self.cuts - m.shape[1]
        m = nn.functional.pad(m, (0, 0, 0, missing)) if missing else m
        return m.reshape(-1, rows, cols)

    def direct(self, pieces):
        """Take as direction the polar factors of the pieces, or this device's part of them."""
        n, rows, cols = self.whole.size
        D = pieces.reshape(n, -1, self.piece[1])[:, : min(rows, cols)]
        self.D = D.mT if rows > cols else D
        if _is_dtensor(self.p):
            whole = D.new_empty(self.p.shape)
            self.whole.write(whole, self.D)
            local = torch.empty_like(self.p.detach(), dtype=D.dtype)
            _fill(local, whole)
            self.D = self.view(_local(local))


class _View:
    """A tensor of a Rule as matrices (number, rows, cols), a row being (1, cols): a view, where
    its strides allow it. `by_rows`: each row of a local tensor is one."""

    def __init__(self, p, rule, by_rows=False):
        self.rule = rule._replace(parts=1) if by_rows else rule
        first = [0] if by_rows else rule.numbering(p.shape)
        p = self.rule.parted(p)
        cols = [i for i in range(p.ndim) if i not in first]
        row = [] if by_rows or rule.is_vector or rule.role == "rows" else [cols.pop(0)]
        self.size = [math.prod([p.shape[i] for i in dims]) for dims in (first, row, cols)]
        self.order = [*first, *row, *cols]
        by_stride = [*first, *row, *sorted(cols, key=lambda i: -p.stride(i))]
        # In the order of memory, except where columns are cut into pieces.
        order = self.order if self.size[1] > self.size[2] else by_stride
        try:
            p.permute(order).view(self.size)
            self.order, self.dense = order, True
        except RuntimeError:
            self.dense = False

    def __call__(self, x):
        return self.rule.parted(x).permute(self.order).reshape(self.size)

    def write(self, x, matrices):
        """Copy matrices into a tensor."""
        x = self.rule.parted(x).permute(self.order)
        x.copy_(matrices.reshape(x.shape))


def _add(target, x, factor, sign=1):
    """target += sign * factor * x, the factor a number or a tensor."""
    if isinstance(factor, Tensor):
        target.addcmul_(x, factor, value=sign)
    else:
        target.add_(x, alpha=sign * factor)


def _dots(a, b):
    """Inner products of matrices, (number,)."""
    if len(a) == 1 and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1)).view(1)
    return (a * b).sum((1, 2))


def _directions(parts, group):
    """Set the direction D of every weight that has a gradient: the polar factors of the momentum's
    matrices, one shape at a time; m itself of vectors and rows."""
    polar, own, shared = [], [], []
    for x in [x for part in parts for x in part.active]:
        x.D = x.m
        if x.polar:
            polar.append(((x.m.device, x.dtype, x.piece), x))
    several = group is not None and torch.distributed.get_world_size(group) > 1
    for members in _grouped(polar).values():
        pieces = torch.cat([x.cut() for x in members])
        if several and not any(_is_dtensor(x.p) for x in members):
            shared.append((members, pieces))
        else:
            own.append((members, _polar(pieces)))
    if shared:
        _share([pieces for _, pieces in shared], group)
    for members, D in own + shared:
        for x, factors in zip(members, D.split([x.pieces for x in members])):
            x.direct(factors)


def _share(sizes, group):
    """Replace matrices, one tensor (B, rows, cols) a size, by their polar factors: the ranks of a
    group take turns, and gather them in one message."""
    number, me = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    places = [0, *itertools.accumulate(map(len, sizes))]
    shares = [[x[(rank - i) % number :: number] for x, i in zip(sizes, places)]
              for rank in range(number)]  # fmt: skip
    loads = [[x.numel() for x in share] for share in shares]
    wide = max((x.dtype for x in sizes), key=lambda x: x.itemsize)
    wide = torch.bfloat16 if sizes[0].is_cuda else wide  # which _polar has on a GPU
    buffer = sizes[0].new_zeros(max(map(sum, loads)), dtype=wide)
    for to, x in zip(buffer[: sum(loads[me])].split(loads[me]), shares[me]):
        if len(x):
            to.copy_(_polar(x.clone()).flatten())
    out = buffer.new_empty(number, len(buffer))
    torch.distributed.all_gather(list(out.unbind()), buffer, group=group)
    for values, share, load in zip(out, shares, loads):
        for x, factors in zip(share, values[: sum(load)].split(load)):
            x.copy_(factors.view(x.shape))


# Odd polynomials a x + b x^3 + c x^5, each the best for what those before it leave of [0.0025, 1],
# with 1 % to spare, as of "The Polar Express", arXiv 2505.16932: they end within 0.012 of 1.
POLAR = (
    (8.321959, -24.119952, 17.530393),
    (4.038903, -2.947851, 0.544847),
    (3.581888, -2.630861, 0.509978),
    (2.617569, -1.910364, 0.431976),
    (1.959180, -1.346912, 0.389642),
)


def _polar(x):
    """The polar factors U V^T of matrices U S V^T, (B, rows, cols) with rows <= cols; of singular
    values under 1/400 of the largest a part. Overwrites x."""
    if x.is_cuda:
        return _polar_bf16(x)
    x = _of_norm_1(x)
    R = x @ x.mT
    S = R @ R
    scale = vector_norm(S, 2, (1, 2), keepdim=True).clamp_min_(1e-30).sqrt_()  # over the largest
    R, S, Q = R.div_(scale), S.div_(scale.square()), None
    for i, (a, b, c) in enumerate(POLAR):
        if i:
            S = R @ R
        p = S.mul_(c).add_(R, alpha=b)
        p.diagonal(dim1=1, dim2=2).add_(a)
        Q = p if Q is None else p @ Q
        if i < len(POLAR) - 1:
            R = (p @ R) @ p
    return Q.div_(scale.sqrt_()) @ x


def _of_norm_1(x):
    """Matrices over their Frobenius norms, in place; zero matrices stay."""
    tiny = torch.finfo(x.dtype).tiny
    x.div_(vector_norm(x, math.inf, (1, 2), keepdim=True).clamp_min_(tiny))
    return x.div_(vector_norm(x, 2, (1, 2), keepdim=True).clamp_min_(tiny))


def _polar_bf16(x):
    """The same in bfloat16, whose products GPUs add up in float32; on x itself, since the squares
    of its singular values would not survive. Returns x's dtype."""
    dtype = x.dtype
    x = _of_norm_1(x).bfloat16()
    scale = vector_norm(x @ x.mT, 2, (1, 2), keepdim=True, dtype=torch.float32).clamp_min_(1e-30)
    x = (x / scale.sqrt_()).bfloat16()
    for a, b, c in POLAR:
        R = x @ x.mT
        p = torch.baddbmm(R, R, R, beta=b, alpha=c)
        x = torch.baddbmm(x, p, x, beta=a)
    return x.to(dtype)


# The depth L: shares of it, read off the graph that autograd keeps of a forward pass.


def depth(net: nn.Module, *inputs: Any, **kwargs: Any) -> "Depth":
    """The share of L of each weight of a network, {name: share}; L is their sum, the mean number of
    weights on a path from the outputs to the inputs: for a chain the number of its layers. The
    attribute `outputs` names the weights that come last on a path.

    One unit flows back from the outputs. An operation with a weight takes what flows through it as
    the weight's share, and hands it on. A sum divides it in proportion to the units of signal in
    its addends: the output of a weight or of a norm layer is one, a sum has those of its addends.
    A product of activations and a concatenation divide it equally. Frozen weights and vectors have
    no share.

    Args:
        net: before torch.compile and fully_shard, without reentrant checkpoints.
        inputs, kwargs: of its forward pass, which is run once; buffers stay as they are.

    Raises:
        ValueError: where the graph hides weights, or none has a gradient.
    """
    with _untouched(net), torch.enable_grad():
        shares = _shares(net, net(*inputs, **kwargs), {})
    if not shares:
        raise ValueError("no depth can be read: the output's graph has no weight that requires a "
                         "gradient, or hides some in a compiled or checkpointed part")
    names = {name: id(p) for name, p in net.named_parameters() if id(p) in shares}
    return Depth({name: shares[key] for name, key in names.items()},
                 [name for name, key in names.items() if key in shares.outputs])  # fmt: skip


class Depth(dict[str, float]):
    """{name of a weight: share of L}, and `outputs`, the names of those from which the outputs are
    reached through no other weight."""

    def __init__(self, shares: Mapping[str, float], outputs: Iterable[str] = ()) -> None:
        super().__init__(shares)
        self.outputs = frozenset(outputs)


class _FirstForward:
    """A forward hook of a network, which reads the shares of L for its optimiser, and goes."""

    def __init__(self, optimizer, net):
        self.optimizer = weakref.ref(optimizer)
        # A LightningModule has a net, and no forward of its own.
        children = [x for x in net.children() if any(True for _ in x.parameters())]
        owner = getattr(net.forward, "__module__", None) or ""
        missing = owner.startswith(("torch.nn.modules.module", "lightning", "pytorch_lightning"))
        called = children[0] if missing and len(children) == 1 else net
        self.handle = called.register_forward_hook(self)

    def __call__(self, net, inputs, output):
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        optimizer = self.optimizer and self.optimizer()
        if optimizer is not None and optimizer._listening:
            shares = _shares(net, output, optimizer.roles)
            if shares == {}:
                return  # no gradient in it: the next one, then
            # fully_shard computes with other tensors than those that it shards.
            weights = [p for _, p, rule in optimizer._each() if not rule.is_vector]
            sharded = [p for p in weights if _is_dtensor(p) and p.requires_grad]
            if shares is not None and all(id(p) in shares for p in sharded):
                optimizer._outputs = True
                optimizer._set_shares(shares)
        if optimizer is not None:
            optimizer._hook = None
        if self.handle is not None:
            self.handle.remove()

    def __getstate__(self):
        return {"optimizer": None, "handle": None}  # a copy of the network has no optimiser


@contextlib.contextmanager
def _untouched(net):
    """Leave a network's buffers and modes, and torch's generators, as they were."""
    modules = [(module, dict(module._buffers), module.training) for module in net.modules()]
    twins = {id(x): x.clone() for x in net.buffers()}
    for module, buffers, _ in modules:
        module._buffers.update({key: twins.get(id(x), x) for key, x in buffers.items()})
    try:
        with torch.random.fork_rng(list({p.device for p in net.parameters() if p.is_cuda})):
            yield
    finally:
        for module, buffers, module.training in modules:
            module._buffers.update(buffers)


# Autograd's nodes by name. REARRANGE only rearrange a parameter: transposes, parts, casts of
# autocast. FUNCTIONS make weights of parameters: standardised ones, exponents of gains, biases side
# by side. HIDDEN have others inside, or weights of their own, PARTLY where some weight is missing.
REARRANGE = set("T View Permute Transpose Unsqueeze Squeeze Expand ToCopy Split SplitWithSizes "
                "Slice Select Unbind Chunk UnsafeView ReshapeAlias Clone Alias AsStrided".split())
FUNCTIONS = set("Abs Add Cat Clamp ClampMax ClampMin CopySlices Div Exp Log LinalgVectorNorm Mean "
                "Mul NativeBatchNorm CudnnBatchNorm Neg Norm Pow Relu Rsqrt Sigmoid Softmax "
                "Softplus Sqrt Stack Std StdMean Sub Sum Tanh Var VarMean Zero".split())
NORMS = set("NativeLayerNorm NativeBatchNorm CudnnBatchNorm MiopenBatchNorm FusedRmsNorm "
            "NativeGroupNorm RmsNorm".split())
LAYERS = {"Addmm", "Mm", "Bmm", "Convolution", "Embedding", "EmbeddingBag"}
ADD, JOIN = {"Add", "Sub"}, {"Cat", "Stack"}
PARTLY = {"CheckpointFunction", "RegisterPostBackwardFunction"}  # the latter of fully_shard
HIDDEN = {"CompiledFunction", "Broadcast"} | PARTLY


def _shares(net, output, roles):
    """The Depth of an output, by ids of the weights that it was computed from. Empty: it has no
    gradient. None: weights are hidden. Reads the names of autograd's nodes, never their values."""
    roots = [t.grad_fn for t in _outputs(output) if t.grad_fn is not None]
    if not roots:
        return Depth({})
    known = _rules(net, roles, measure=False)
    weights = {key for key, (_, rule) in known.items() if not rule.is_vector}
    # A weight that torch's parametrizations make of others: its shape, by those others.
    made = {}
    for name, p in net.named_parameters():
        if own := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\..*", name):
            made[id(p)] = getattr(net.get_submodule(own[1] or ""), own[2]).shape
    nodes, number = _inputs_first(roots), len(roots)
    parameters = {}  # node -> {id: parameter} of those that it is a function of
    inputs, units = {}, {}  # of other nodes: (its weights, its activations); units of signal
    for node in nodes:
        kind, before = _kind(node), [n for n, _ in node.next_functions if n is not None]
        own = {key: p for n in before for key, p in parameters.get(n, {}).items()}
        if kind == "AccumulateGrad":
            parameters[node] = {id(node.variable): node.variable}
        elif before and all(n in parameters for n in before) and _rearranges(node, own, made):
            parameters[node] = own
        else:
            signals = [n for n in before if n not in parameters]
            matrices = [key for n in before for key in parameters.get(n, ()) if key in weights]
            inputs[node] = matrices, signals
            units[node] = max((units[n] for n in signals), default=1.0)
            if kind in ADD:
                units[node] = sum(units[n] for n in signals) + len(matrices)
            elif matrices or kind in NORMS:
                units[node] = 1.0
    roots = [root for root in roots if root in inputs]
    flow, shares, outputs = dict.fromkeys(inputs, 0.0), {}, set()
    last = set(roots)  # nodes that no weight follows on some path
    some_frozen = any(p.ndim > 1 and not p.requires_grad for p in net.parameters())
    for root in roots:
        flow[root] += 1.0 / number
    for node in reversed(inputs):
        kind, (matrices, signals), each = _kind(node), inputs[node], flow[node]
        parts = [units[n] if kind in ADD else 1.0 for n in signals]
        whole = units[node] if kind in ADD else len(signals) + len(matrices) * (kind in JOIN)
        own = each / max(whole, 1.0) if kind in ADD | JOIN else each
        for key in matrices:
            shares[key] = shares.get(key, 0.0) + own
        if node in last:
            outputs.update(matrices)
            frozen = some_frozen and kind in LAYERS and len(signals) == 1  # its weight: no node
            if kind in ADD | JOIN or not (matrices or frozen):
                last.update(signals)
        for n, part in zip(signals, parts):
            flow[n] += each * part / whole
    missing = any(p.requires_grad and id(p) in weights - shares.keys() for p in net.parameters())
    hides = HIDDEN.intersection(map(_kind, nodes))
    hidden = hides and (missing or hides - PARTLY)
    return None if hidden else Depth(shares, outputs)


def _rearranges(node, parameters, made):
    """Whether a node whose inputs are parameters makes another form of them, no signal. Its inputs
    that have no gradient are not seen: data, in the first layer."""
    try:
        shape = torch.Size(node._input_metadata[0].shape)
    except (AttributeError, IndexError, TypeError):
        shape = None
    kind, shapes = _kind(node), [made[key] for key in parameters if key in made]
    if kind in REARRANGE:
        return True
    if shapes:
        return kind not in LAYERS or shape in shapes
    numbers = sum(p.numel() for p in parameters.values())
    return kind in FUNCTIONS and shape is not None and shape.numel() <= numbers


def _kind(node):
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _outputs(output):
    """The tensors of an output. A loss among named ones stands for the others, of which it is."""
    if isinstance(output, Mapping):
        loss = output.get("loss")
        output = [loss] if isinstance(loss, Tensor) else [*output.values()]
    if isinstance(output, Tensor):
        return [output]
    several = output if isinstance(output, (list, tuple)) else []
    return [tensor for x in several for tensor in _outputs(x)]


def _inputs_first(roots):
    """The nodes of a graph, each behind those that it takes its inputs from."""
    order, seen, stack = [], set(), [(n, False) for n in roots]
    while stack:
        node, complete = stack.pop()
        if complete:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return order


# The start.


@torch.no_grad()
def init_weights(params: Params, generator: torch.Generator | None = None, inputs: Any = None,
                 roles: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """Draw every parameter anew, in place: blocks uniform (Haar) semi-orthogonal, times s; rows of
    Gaussian direction and length s; biases 0, gains of norm layers 1.

    Args:
        params: a network, whose frozen parameters stay as they are, and so do gains outside of norm
            layers (slopes, layer scales, temperatures); or anything else that `AGD` takes. A tensor
            listed twice is drawn once.
        generator: a CPU `torch.Generator`; None is torch's default one. It draws on the CPU in
            float64, tensor by tensor: a seed means the same weights on every device and, up to
            rounding, in every dtype.
        inputs: of a network, a batch: a tensor, a tuple or a dict. Each linear, convolutional or
            embedding layer is then scaled, from input to output, to outputs of RMS 1. Deep plain
            relu, gelu or silu without norm layers need it.
        roles: as of `AGD`.

    Raises:
        ValueError: for what the constructor of `AGD` refuses, and for a generator of a GPU.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError("init_weights draws on the CPU: pass torch.Generator(), without a device")
    is_net = isinstance(params, nn.Module)
    if inputs is not None and not is_net:
        raise ValueError("init_weights scales a network to inputs: pass it, not its parameters")
    listed = _trainable(params) if is_net else [*_named(_listed(params))]
    if not listed:
        raise ValueError(EMPTY)
    rules = _rules(params if is_net else listed, roles or {}, measure=False)
    # Without a name a constant vector is of a norm layer: its gain or its bias.
    named = all(name for name, _ in listed)
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    weights, magnitudes = {}, []
    for key, p in {id(p): p for _, p in listed}.items():
        name, rule = rules[key]
        *made, magnitude = _owner(name or "", p)
        number, rank, s = rule.blocks(p.shape)
        if magnitude:
            magnitudes.append((p, *made))
        elif rule.is_vector:
            if rule.start is not None and (named or p.max() > p.min()):
                p.fill_(rule.start)
        elif rule.role == "rows":
            z = torch.randn(p.shape, generator=generator, **wide)
            _fill(p, z * (s / vector_norm(z, 2, -1, keepdim=True)))
        else:
            z = torch.randn(number, p.numel() // number // rank, rank, generator=generator, **wide)
            Q, R = torch.linalg.qr(z)
            # Haar measure needs the factorisation that has a positive diagonal in R.
            Q.mul_(R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
            numbering, whole = rule.numbering(p.shape), torch.empty(p.shape, **wide)
            blocks = rule.parted(whole).movedim(numbering, [*range(len(numbering))])
            tall = blocks.shape[len(numbering)] ** 2 >= Q[0].numel()
            blocks.copy_((Q if tall else Q.mT).reshape(blocks.shape))
            if not (name or "").endswith(".original") or (
                    is_net and not _assign(params, made, p, whole * s)):  # fmt: skip
                _fill(p, whole * s)
            weights[tuple(made)] = p
    for p, *made in magnitudes:  # of weight_norm: the weight is then the one that was drawn
        if (v := weights.get(tuple(made))) is not None:
            dims = [i for i in range(v.ndim) if p.ndim == 0 or p.shape[i] == 1]
            p.copy_(vector_norm(v, 2, dims).reshape(p.shape))
    if inputs is not None:
        _scale(params, inputs)


def _scale(net, inputs):
    """Divide each layer's weight by the RMS of its output, in the order of the forward pass."""
    kinds = nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag
    scaled = set()

    def hook(layer, args, kwargs, output):
        weight = layer._parameters.get("weight")
        if weight is None or not weight.requires_grad or id(weight) in scaled:
            return None
        scaled.add(id(weight))  # a tied weight is scaled where it is used first
        rms = vector_norm(output.detach(), dtype=_wide(output.device)) / math.sqrt(output.numel())
        if not 0 < rms < math.inf:
            return None
        weight.div_(rms.to(weight))
        return layer.forward(*args, **kwargs)

    with contextlib.ExitStack() as hooks, _untouched(net):
        for layer in net.modules():
            if isinstance(layer, kinds) or type(layer).__name__ == "Conv1D":
                hooks.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        net.train()
        named = inputs if isinstance(inputs, Mapping) else {}
        listed = inputs if isinstance(inputs, (tuple, list)) else [inputs]
        net(*([] if named else listed), **named)


def _assign(net, made, p, whole):
    """Draw a weight that torch's parametrization makes of p. False where that has no inverse."""
    try:
        with torch.random.fork_rng([p.device] if p.is_cuda else []):
            setattr(net.get_submodule(made[0]), made[1], whole.to(p))
    except RuntimeError:
        return False
    return True


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


def recalibrate(net: nn.Module, batches: Iterable[Any]) -> None:
    """Recompute the running statistics of all batch norms of a network, as means over `batches`: of
    inputs, or (inputs, labels). After `SpectralAGD.eval()`, whose weights it has not run with, and
    before a test of AGD's weights, of which running statistics trail behind while η is large.
    Raises ValueError where a network with batch norm gets no batch."""
    if not any(isinstance(x, nn.modules.batchnorm._BatchNorm) for x in net.modules()):
        return
    batches, device = iter(batches), next((p.device for p in net.parameters()), None)
    first = [*itertools.islice(batches, 1)]
    if not first:
        raise ValueError("recalibrate got no batch: batch norm takes its statistics from some")
    kept = [(x, x.training, getattr(x, "momentum", None)) for x in net.modules()]
    try:
        torch.optim.swa_utils.update_bn(itertools.chain(first, batches), net, device)
    finally:
        for module, training, momentum in kept:
            module.training = training
            if momentum is not None:
                module.momentum = momentum


# Arguments and messages.

EMPTY = ("AGD got an empty list of parameters that require a gradient: pass a network or "
         "net.parameters(), and a generator only once")  # fmt: skip
NO_RATE = ("AGD has no learning rate; gain multiplies its update, and is what a scheduler changes "
           "(the key lr of a group of param_groups)")  # fmt: skip
KEYS = {"params", "param_names", "name", "lr", "skipped"}  # of groups, in a state
PARTS = ("{} sees a part of the weights, {}, and its G and L are of all: give it the network, on "
         "every rank, and call step() after backward(); to shard, take torch's fully_shard")
WARNINGS = {
    "depth": "AGD could not read its depth L from the network's first forward pass, and takes the "
    "number of weights, which is right for a chain alone. Pass the module that is called; before "
    "torch.compile, fully_shard and checkpoints, AGD(net, depth=agd.depth(net, *inputs))",
    "clipped": "the norm of all gradients together is the same in step after step: they are "
    "clipped. AGD takes the size of its step from theirs: leave clipping out (max_grad_norm=0, "
    "gradient_clip_val=None)",
    "sum": "the gradient summary G is over 1,000; of a mean over the batch it is 0.1 to 100: "
    "is the loss a sum, are gradients still scaled, or added up without being averaged?",
    "dead": "the gradient summary G is below 1e-6 from the first steps on: unless the loss is at "
    "its floor, no signal reaches the weights: agd.init_weights(net, inputs=batch) mends that",
    "small": "the gradient summary G is below 0.01 from the first steps on, and so the steps are "
    "short: of a mean loss of about 1 an example it is 0.1 to 100: is the loss divided by more?",
    "scheduled": "a scheduler has changed lr, which is AGD's gain: AGD needs no schedule, and a "
    "decay or a warm-up makes its steps smaller than they should be",
}


def _grouped(pairs):
    """{key: its values} of (key, value) pairs."""
    groups = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def _trainable(net):
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def _unwrapped(name):
    """A parameter's name without those of wrappers: DDP, torch.compile, checkpoints."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def _listed(params):
    params = params if isinstance(params, Tensor) else list(params)
    if isinstance(params, list) and not params:
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
    shape = "" if nn.parameter.is_lazy(p) else f" of shape {tuple(p.shape)}"
    return (name or "a tensor") + shape


def _check(params):
    """Raise one error for all tensors, of (name, tensor) pairs, that AGD has no rule for."""
    refused = {}
    for name, p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"AGD takes tensors or (name, tensor) pairs, not {type(p).__name__}")
        if nn.parameter.is_lazy(p):
            reason = "which has no shape yet: run a batch through the network first"
        elif getattr(p, "_fsdp_flattened", False) and p.ndim < 2:
            reason = "flattened by FSDP: shard with torch's fully_shard instead"
        elif not p.is_floating_point() or p.dtype.itemsize < 2:
            reason = f"of dtype {p.dtype}: make it real floating point of 16 bits, or leave it out"
        elif p.numel() == 0:
            reason = "which has no elements: leave it out"
        elif _is_dtensor(p) and any(getattr(x, "dim", 0) not in (0, 1) for x in p.placements):
            reason = "sharded along its kernel: shard it along its first or second dimension"
        else:
            continue
        refused.setdefault(reason, []).append(_label(name, p))
    if refused:
        number = sum(map(len, refused.values()))
        kinds = [f"{', '.join(x[:5])}{f' and {len(x) - 5} more' * (len(x) > 5)}, {reason}"
                 for reason, x in refused.items()]  # fmt: skip
        several = f"{number} tensors: " * (number > 1)
        raise ValueError(f"AGD has no rule for {several}{'; '.join(kinds)}")


ROUNDING = 2.0**-21  # of the gain at the start: 4 units of float32 in the last place


def _checked_gain(gain, start=None, read=True):
    """A gain as a float, 0 where it is negative by rounding, `start` being the first one; a tensor
    as it is, of which a step (`read` False) reads no number."""
    known = start is not None and (read or not isinstance(start, Tensor))
    least = -ROUNDING * max(1.0, start if known else 0.0)
    if isinstance(gain, Tensor):
        number = gain.numel() == 1 and gain.dtype != torch.bool and not gain.is_complex()
        if number and (not read or least <= gain < math.inf):
            return gain
    else:
        x = gain.item() if getattr(gain, "shape", None) == () else gain  # of numpy
        if hasattr(x, "__float__") and not (isinstance(x, bool) or getattr(x, "shape", ())):
            with contextlib.suppress(ArithmeticError, ValueError):
                if least <= float(x) < math.inf:
                    return max(float(x), 0.0)
    raise ValueError(f"the gain must be a number, finite and not negative, not {gain!r}")


# Callers that make an optimiser of a part of the weights, and tell it nothing of that.
WRAPPERS = {f"torch.distributed.optim.{name}" for name in (
    "zero_redundancy_optimizer", "optimizer", "apply_optimizer_in_backward")}  # fmt: skip
WRAPPERS.add("fairscale.optim.oss")


def _refuse_wrappers(name):
    """Raise ValueError where one of WRAPPERS makes an optimiser."""
    frame = sys._getframe(1) if WRAPPERS & sys.modules.keys() else None
    while frame is not None:
        if (caller := frame.f_globals.get("__name__")) in WRAPPERS:
            raise ValueError(PARTS.format(name, f"in {caller}"))
        frame = frame.f_back
