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

Any other parameter is a stack of blocks, each with its own norm, and one s (ROLES). `AGD(net)`
reads the roles from the network's modules, s from the weights that stand there, and L, the mean
number of weights on a path, from the first forward pass. `AGD(net.parameters())` is the paper's
rule: roles from the shapes, L the number of weights.

The size of a step follows from the size of the gradient, so the gradient must be that of the mean:
unscale it after mixed precision, average it after accumulation and over devices, before `step`; do
not clip it.

A step is two sweeps over memory, by `TorchBackend` or the compiled ones of agd_kernels, a package
beside this file, with the mathematics in between: `_middle`.
"""

import copy
import fnmatch
import importlib
import math
import re
import warnings
import weakref
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.linalg import vector_norm
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["AGD", "SpectralAGD", "depth", "init_weights", "recalibrate"]


class AGD(torch.optim.Optimizer):
    """Automatic Gradient Descent, arXiv 2304.05187, for every parameter of any network.

    Args:
        params: a network, `torch.nn.Module`: every parameter that requires a gradient, with the
            role that its layer gives it. Or as torch's optimisers have it, an iterable of tensors,
            of (name, tensor) pairs, or of group dicts: roles by shape. Any memory format and float
            dtype.
        gain: multiplies the update and nothing else; a number or a 0-dim tensor, finite and not
            negative. In `param_groups` it is the key `lr`, so that torch's schedulers work and 0
            freezes a group (which still counts in L and G). Under torch.compile, let a scheduler
            change a tensor: a number that changes compiles the step again.
        fused: None: compiled kernels for the weights that they support (float32 on a CPU, any
            dtype on a CUDA GPU), torch's operations for the others. False: torch's operations.
            True: raise ValueError for a weight that no kernel supports. All agree to rounding.
        depth: L, a number, or the dict that `agd.depth` returns. None: of a network, read from its
            first forward pass; else the number of weights.
        roles: {pattern of names: role}, for parameters that ROLES, by its own, takes for others.
            A role is a key of ROLES, "transposed" (a matrix (in, out)), or "stacked 3", "kernel 8"
            with a number of parts, or of groups.

    Of a network, s is the RMS singular value of the blocks that stand there (the role's, where they
    are zero), and L the mean number of weights on a path from its outputs to its inputs; both are
    in `state_dict`. Else s is the role's, and L counts every tensor of two or more dimensions. G
    and eta are one for all groups. A tensor without a gradient is skipped: it adds nothing to G and
    still counts in L. A parameter of the network that is frozen does not.

    Attributes, 0-dim tensors on the device of the first weight:
        eta: the automatic learning rate of the last step; NaN before the first and if skipped.
        G: the gradient summary of the last step.
        skipped: int64, the number of steps that changed no weight because a gradient held a NaN
            or an infinity.

    A weight may be sharded, a DTensor of torch's fully_shard: norms are of whole matrices, from
    1e-150 to 1e150, for one small all-reduce a step. Every device has shards of all weights.

    A zero gradient, of a matrix or of another block, leaves those weights bit for bit. A step needs
    one scratch tensor: with kernels some kB on a CPU and 3 % of the weights' memory on a GPU, else
    half a megabyte (float32 on a CPU) or, for other weights or factors of 0, a copy of one weight.
    A gradient whose strides differ from its weight's is copied.

    It warns, once, of what it can tell from the size of gradients: that they are clipped, or a sum
    where a mean is meant, or that none reaches the weights; of a scheduler; of an unknown L.

    Raises:
        ValueError: in the constructor, for an empty list, a gain out of range, an unknown key of a
            group, a role or pattern that nothing has, or tensors that have no elements, are not
            real floating point, or are sharded along their kernel, or with fused=True have no
            kernel; at a step, for a sparse or complex gradient; for the state of another optimiser.
            The message names the tensors and the way out.
    """

    _key = _parts = None  # the parts of the last step, and the key that they depend on
    _net = _known = None  # a weak reference to the network; its parameters' names and rules
    _hook = None  # which waits for its first forward pass
    _outputs = False  # whether the output layers have been read
    _spectral = False  # whether a kernel is one matrix a group, and output layers are told apart

    def __init__(self, params, *, gain=1.0, fused=None, depth=None, roles=None, **foreign):
        if foreign:
            raise TypeError(NO_RATE if "lr" in foreign else f"{type(self).__name__} has no "
                            f"{', '.join(foreign)}: there is nothing to set")  # fmt: skip
        self.fused, self.rules, self.roles = fused, [], dict(roles or {})
        self.depth = depth if depth is None or isinstance(depth, Mapping) else _number(depth)
        self._watch, self._recent, self._said = _Watch(self._spectral), [], set()
        # Whether L is of paths, and has been read.
        self._paths, self._read = isinstance(params, nn.Module), False
        if self._paths:
            net = getattr(params, "_orig_mod", params)  # of torch.compile
            self._net, self._known = weakref.ref(net), self._rules_of(net)
            params = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
            if not params:
                raise ValueError("AGD got a network without a parameter that requires a gradient")
        super().__init__(_listed(params), {"lr": gain})
        if not any(group["params"] for group in self.param_groups):
            raise ValueError(EMPTY)
        listed = [id(p) for group in self.param_groups for p in group["params"]]
        assert len(set(listed)) == len(listed) == sum(map(len, self.rules))
        assert not self._paths or {id(p) for _, p in params} == set(listed)
        unused = [x for x in self.roles if not self._named(x)]
        if unused:
            raise ValueError(f"no parameter has a name like {', '.join(unused)}, of roles=")
        device = next(p for group in self.param_groups for p in group["params"]).device
        with torch.inference_mode(False):  # they are written to later
            self.eta = torch.full((), math.nan, dtype=_wide(device), device=device)
            self.G = torch.full_like(self.eta, math.nan)
            self.param_groups[0]["skipped"] = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def skipped(self):
        """Number of skipped steps, int64, 0-dim: an entry of the first group, which is saved."""
        return self.param_groups[0]["skipped"]

    @property
    def L(self):
        """The depth: a number, the mean number of weights on a path, or their count."""
        if isinstance(self.depth, float):
            return self.depth
        shares = [rule.share for group, rules in zip(self.param_groups, self.rules)
                  for p, rule in zip(group["params"], rules)
                  if rule.role not in VECTORS and (p.requires_grad or not self._paths)]
        return sum(shares) or 1.0  # of vectors alone: one layer

    def _rules_of(self, net):
        return _rules_of(net, self.roles, im2col=self._spectral)

    def _named(self, pattern):
        """Whether a parameter has a name that matches a pattern."""
        names = [name for name, _ in self._known.values()] if self._known else [
            name for group in self.param_groups for name in group.get("param_names", ())]
        return fnmatch.filter(names, pattern)

    def add_param_group(self, param_group):
        """Add a group, {"params": ..., "gain": ...}, checked as in the constructor. Parameters of
        the network that were frozen have their layer's role; L is read again."""
        group = {"lr": self.defaults["lr"], **param_group}
        foreign = sorted(set(param_group) - {"params", "param_names", "gain", "name"})
        if foreign:
            raise ValueError(NO_RATE if "lr" in foreign else "AGD has no " + ", ".join(foreign)
                             + ": a group has params and, if any, gain")  # fmt: skip
        group["lr"] = group.pop("gain", group["lr"])
        _check_gain(group["lr"])
        params = group["params"]
        if isinstance(params, nn.Module):
            params = [(name, p) for name, p in params.named_parameters() if p.requires_grad]
        if not isinstance(params, (Tensor, set)):  # a set has no order: torch refuses it
            # A tied weight is one layer, however often it is listed, in its first place.
            tensors = {}
            for x in params:
                tensors.setdefault(id(x[1] if isinstance(x, tuple) else x), x)
            params = list(tensors.values())
            if self._known:
                net = self._net()
                if net is not None and any(id(p) not in self._known for _, p in _named(params)):
                    self._known |= self._rules_of(net)  # layers that came later
                params = [(x if isinstance(x, tuple) or id(x) not in self._known
                           else (self._known[id(x)][0], x)) for x in params]  # fmt: skip
        group["params"] = params
        listed = list(_named([group]))
        _check(listed)
        known = self._known or {}
        rules = _rules_by_shape(listed, {} if self._known else self.roles, self._spectral)
        rules = [known[id(p)][1] if id(p) in known else x for (_, p), x in zip(listed, rules)]
        for (name, p), rule in zip(listed, rules):
            if self.fused and _backend(p, Layout(p, rule)) is TorchBackend:
                raise ValueError(f"there is no fused step for {_label(name, p)}, {p.dtype} on "
                                 f"{p.device}: fused=None takes it where there is one")
        super().add_param_group(group)
        self.rules.append(rules)
        self._read_depth()

    def _read_depth(self):
        """Take the shares of L from `depth`, or from the network's next forward pass."""
        self._changed()
        if isinstance(self.depth, Mapping):
            shares = {_unwrapped(name): share for name, share in self.depth.items()}
            named = {_unwrapped(name): id(p) for group in self.param_groups
                     for name, p in zip(group.get("param_names", ()), group["params"])}
            known = {_unwrapped(name): key for key, (name, _) in (self._known or {}).items()}
            if unknown := shares.keys() - named.keys() - known.keys():
                raise ValueError(f"depth= has shares of {', '.join(sorted(unknown)[:5])}, and no "
                                 "parameter has that name")  # fmt: skip
            outputs = [_unwrapped(name) for name in getattr(self.depth, "outputs", ())]
            self._outputs = hasattr(self.depth, "outputs")
            self._set_shares(Depth({named[name]: x for name, x in shares.items() if name in named},
                                   {named[name] for name in outputs if name in named}))
        elif self._reads and (net := self._net and self._net()) is not None:
            self._read = False
            if self._hook is None:
                self._hook = _FirstForward(self, net)

    def _set_shares(self, shares):
        """Take shares of L, a Depth by ids of parameters; a weight that is not there has none, and
        is free as an output layer is: the pass did not reach it."""
        for group, rules in zip(self.param_groups, self.rules):
            rules[:] = [x if x.role in VECTORS else x._replace(
                            share=float(shares.get(id(p), 0)),
                            output=self._spectral and self._outputs
                            and (id(p) in shares.outputs or id(p) not in shares))
                        for p, x in zip(group["params"], rules)]  # fmt: skip
        self._read = True
        self._changed()

    @property
    def _reads(self):
        """Whether the network's graph says what is not given."""
        return self._paths and (self.depth is None
                                or self._spectral and isinstance(self.depth, float))

    @property
    def _listening(self):
        return self._reads and not self._read

    def _changed(self):
        self._key, self._recent = None, []

    def _warn(self, kind, text, level=5):
        """Warn once of a kind, at the place that called `step`, through torch's two wrappers."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(text, stacklevel=level)

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

        self._finish(G, eta, norms)
        return loss

    def _finish(self, G, eta, norms):
        """Take the results of a step: eta is NaN where it was skipped, `norms` are of gradients."""
        if not torch.compiler.is_compiling():
            self.G, self.eta = G, eta
        elif self.G.device == G.device:  # torch.compile sets no attribute of an optimiser
            self.G.copy_(G), self.eta.copy_(eta)
        skipped = self.skipped
        if skipped.device != G.device:  # the network has moved, or a state was loaded
            skipped = self.param_groups[0]["skipped"] = skipped.to(G.device)
        if not _on_host(eta) or math.isnan(eta.item()):  # a CPU's number is read without a wait
            skipped.add_(eta.isnan())
        if not torch.compiler.is_compiling() and self._watch.looks() and not _capturing(G):
            for kind in self._watch.see(G, norms):
                self._warn(kind, GUARDS[kind], 6)

    def _prepare(self):
        """Parts, targets and gradients of the weights that have a gradient. A target is the weight
        or, of a sharded one, the local tensor. A gradient has the strides of a dense weight."""
        targets, grads = [], []
        key = [self.fused, sum(len(group["params"]) for group in self.param_groups)]
        self._check_gains()
        for i, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                grad = p.grad
                if grad is None:
                    if self._paths:  # frozen, it leaves L
                        key.append(p.requires_grad)
                    continue
                grad = self._dense(grad, p, group, j)
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
        if not compiling and key == self._key:
            if capturing:  # a graph reads the parts' tables for as long as its weights live
                CAPTURED.setdefault(targets[0], {})[id(self._parts)] = self._parts
            return self._parts, targets, grads
        if self._listening and not compiling and self.depth is None:
            self._warn("depth", UNREAD, 6)
        L = self.L
        moving = [(i, p, rule) for i, group in enumerate(self.param_groups)
                  for p, rule in zip(group["params"], self.rules[i])
                  if p.grad is not None]  # fmt: skip
        if compiling or capturing:  # the graph's own
            return _Part.split(moving, L, fused=False), targets, grads
        if key in (x for x, _ in self._recent):  # of layers that take turns
            (self._parts,) = (parts for x, parts in self._recent if x == key)
        else:
            with torch.inference_mode(False), torch.device("cpu"):  # whatever the defaults are now
                self._parts = _Part.split(moving, L, self.fused)
            self._recent = [*self._recent[-3:], (key, self._parts)]
        self._key = key
        return self._parts, targets, grads

    def _check_gains(self):
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):
                _check_gain(group["lr"])  # a scheduler may have changed it
                if group.get("initial_lr", group["lr"]) != group["lr"]:
                    self._warn("scheduled", GUARDS["scheduled"], 7)

    @staticmethod
    def _dense(grad, p, group, j):
        """The gradient of the weight p, number j of its group: of a sharded one, the local part."""
        if grad.layout != torch.strided or grad.is_complex():
            label = _label(group["param_names"][j] if "param_names" in group else None, p)
            kind = "complex" if grad.is_complex() else "sparse"
            raise ValueError(f"the gradient of {label} is {kind}, and AGD needs a dense, "
                             "real one: build the layer with sparse=False and real weights")
        if _is_dtensor(p):
            grad = grad.redistribute(p.device_mesh, p.placements).to_local()
        return grad

    def state_dict(self):
        """As torch's method, with a copy of `skipped` and, of a network, s and share of each
        parameter."""
        state = super().state_dict()
        state["param_groups"][0]["skipped"] = self.skipped.clone()
        if self._paths:
            rules = [rule for rules in self.rules for rule in rules]
            state["state"] = {i: {"s": x.s, "share": x.share} if self._read else {"s": x.s}
                              for i, x in enumerate(rules)}
        return state

    def load_state_dict(self, state_dict):
        """As torch's method. `skipped` stays as it is where the state has none. Raises ValueError
        for the state of another optimiser."""
        entries = {key for x in state_dict["state"].values() for key in x} - {"s", "share"}
        entries |= FOREIGN.intersection(*[group.keys() for group in state_dict["param_groups"]])
        if entries:
            raise ValueError(f"this is the state of another optimiser: it has {min(entries)}, and "
                             "AGD has nothing of the kind; start without it")
        skipped, older = self.skipped, state_dict.get("skipped", self.skipped)
        super().load_state_dict(state_dict)
        skipped.copy_(self.param_groups[0].get("skipped", older))
        self.param_groups[0]["skipped"] = skipped  # the same tensor: a CUDA graph may count in it
        state = dict(self.state)
        self.state.clear()
        for group, rules in zip(self.param_groups, self.rules):
            for i, p in enumerate(group["params"]):
                rules[i] = rules[i]._replace(**state.get(p, {}))
                self._read = self._read or "share" in state.get(p, {})
        self._changed()

    def __getstate__(self):
        kept = ("eta", "G", "fused", "rules", "roles", "depth", "_paths", "_read", "_said",
                "_outputs")  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._watch, self._recent = _Watch(self._spectral), []

    def table(self):
        """Every parameter's name, shape, role, s and share of L, as text. Parameters that differ in
        numbers of their names alone share a line."""
        lines = {}
        for group, rules in zip(self.param_groups, self.rules):
            names = group.get("param_names") or [""] * len(rules)
            for name, p, rule in zip(names, group["params"], rules):
                s = rule.blocks(p.shape)[2] if rule.s is None else rule.s
                share = 0.0 if rule.role in VECTORS else rule.share
                if isinstance(self.depth, float) and share:
                    share = self.depth / max(1, sum(
                        x.role not in VECTORS for rules in self.rules for x in rules))
                role = rule.role + (f" {rule.parts}" if rule.parts > 1 else "")
                role += ", transposed" if rule.transposed else ""
                role += ", output" if rule.output else ""
                row = re.sub(r"\d+", "*", name), role
                lines.setdefault(row, []).append((tuple(p.shape), s, share))
        rows = [("parameter", "shape", "role", "s", "share of L", "")]
        for (name, role), found in lines.items():
            shapes, sizes, shares = zip(*found)
            s = " to ".join(dict.fromkeys(f"{x:.4g}" for x in (min(sizes), max(sizes))))
            shape = str(shapes[0]) if len(set(shapes)) == 1 else f"{len(set(shapes))} shapes"
            share = sum(shares)
            rows.append((name or "-", shape, role, s, f"{share:.4g}" if share else "",
                         f"× {len(found)}" if len(found) > 1 else ""))  # fmt: skip
        wide = [max(map(len, column)) for column in zip(*rows)]
        text = [" ".join(x.ljust(n) for x, n in zip(row, wide)).rstrip() for row in rows]
        number = sum(map(len, self.rules))
        end = "; not read yet: the number of weights" if self._listening else ""
        return "\n".join([*text, f"{number} parameters, L = {self.L:.4g}{end}"])

    def __repr__(self):
        return f"{type(self).__name__}\n{self.table()}"


MU, BETA = 0.5, 0.8  # of the momentum; of the average in the weights that a network holds
ROWS = 128  # of the blocks that have a polar factor of their own; None: whole matrices
MOMENT = torch.float32  # the dtype of the momentum
TINY = 1e-36  # squares of the numbers of a block that add up to less are no gradient in float32


class SpectralAGD(AGD):
    """AGD with the spectral norm, averaged: a faster rule that has nothing to set either.

    Of each hidden block, a matrix W_k with RMS singular value rho(W_k) = |W_k|_F / sqrt(rank), the
    rank being its smaller side, s_k is rho(W_k) at the start. The network holds P; at first Z = X =
    P, m = 0. At step t, with g the gradient at P, and m / |m|_F for polar(m) of vectors and rows:

        g   <- g - P <g, P> / <P, P>                 no change of length is asked for
        m   <- (m + g) / 2
        G   =  max(0, 1/L sum_k s_k <g_k, polar(m_k)>)
        eta =  log((1 + sqrt(1 + 4 G)) / 2)
        Z   <- Z - eta/L s_k polar(m_k)              its length grows: that is the clock
        X   <- X + 2 / (t + 1) (Z - X)               with t the steps that have moved the block
        Y   =  0.2 Z + 0.8 X,   P = s_k Y / rho(Y)

    `eval()` puts X, at length s_k, in the place of P, for evaluation and for use; `train()` puts P
    back. Free blocks have no projection and no fixed length: vectors, blocks that start at zero or
    are single numbers, and the output layers, from which the network's output is reached through
    no other weight. A convolution is one matrix a group, (out, in * K). Every ROWS rows of a
    matrix, of its shorter side, have a polar factor of their own.

    Others of the kind have a rate to tune: SF-NorMuon (arXiv 2605.23061), AMUSE (2605.22432),
    ScheduleFree+ (2605.19095); Hyperball (2606.16899) has weights on spheres.

    Args:
        params, gain, depth, roles: as of `AGD`. s is always measured, of each block. The output
            layers are read from the network's first forward pass, or are the `outputs` of what
            `agd.depth` returns; else the last weight is the one.
        process_group: of torch.distributed, whose ranks hold the same weights and gradients, None
            where one has None: each computes a share of the polar factors, and all gather them. A
            DistributedDataParallel network brings its own. Copies of the optimiser have none.

    Attributes: `eta`, `G`, `skipped` and `L`, as of `AGD`. A block whose gradient is zero, such as
    a row of an embedding that a batch does not touch, keeps P, Z, X and m bit for bit, and a
    gradient that is not finite, or over 1e18, changes nothing.

    `state` holds for a weight Z ("z") and m ("m"), together 8 bytes a number, as AdamW's: X follows
    from P, Z and rho(Y). Weights of 16 bits have a float32 copy ("weights"), from which a step
    starts whatever was written into them since; between `eval()` and `train()` all have a copy. A
    step takes 4 more bytes a number for the directions, and up to 8 where most have one shape.

    Raises:
        ValueError: as `AGD`.
        RuntimeError: from `step` between `eval()` and `train()`.
    """

    _spectral = True

    def __init__(self, params, *, gain=1.0, depth=None, roles=None, process_group=None, **foreign):
        if isinstance(params, nn.parallel.DistributedDataParallel):
            process_group = process_group or params.process_group
            params = params.module
        self.process_group, self._made = process_group, {}
        super().__init__(params, gain=gain, fused=False, depth=depth, roles=roles, **foreign)
        self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def step(self, closure=None):
        """Update every weight that has a gradient. Returns the closure's loss, if one is given."""
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("the network holds the average, since optimizer.eval(): call "
                               "optimizer.train() before the forward pass of a training step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = self._prepare()
        norms = [part.read() for part in parts]
        device = parts[0].s.device if parts else self.G.device  # the network may have moved
        zero = torch.zeros((), dtype=_wide(device), device=device)
        finite = sum((x.sum().to(zero) for x in norms), zero).isfinite()
        known = _on_host(finite)
        if known and not finite:
            for part in parts:
                part.forget()
            self._finish(zero * math.nan, zero * math.nan, norms)
            return loss
        for part in parts:
            part.update_momentum(None if known else finite.to(part.s.device))
        _directions(parts, self.process_group)
        G = sum((part.slopes().sum().to(zero) for part in parts), zero)
        G = (G / self._made["L"]).clamp_min(0)
        eta = _eta(G)
        for part in parts:
            part.move(eta / self._made["L"], self.param_groups)
        if not known:
            G, eta = (torch.where(finite, x, math.nan) for x in (G, eta))
        self._finish(G, eta, norms)
        return loss

    def _prepare(self):
        """The _MatrixParts, with the gradients of the weights that have one."""
        self._check_gains()
        if self._listening and not torch.compiler.is_compiling() and self.depth is None:
            self._warn("depth", UNREAD, 6)
        parts = self._whole()
        for part in parts:
            for x in part.weights:
                p, group = x.p, self.param_groups[x.group]
                x.grad = None if p.grad is None else self._dense(p.grad, p, group, x.place)
            part.begin(self.state)
        return parts

    def _whole(self):
        """The _MatrixParts of all parameters; made anew if these have moved or changed dtype."""
        listed = [p for group in self.param_groups for p in group["params"]]
        key = [(p.device, p.dtype, p.requires_grad, _local(p).stride()) for p in listed]
        if self._made.get("key") != key:
            rules = [rule for rules in self.rules for rule in rules]
            if not self._outputs:  # no graph was read
                last = max((i for i, x in enumerate(rules) if x.role not in VECTORS), default=-1)
                rules = [x._replace(output=i == last) for i, x in enumerate(rules)]
            with torch.inference_mode(False):
                parts = _MatrixPart.split(self, listed, rules)
            # A dict that is filled: torch.compile before 2.14 sets no attribute of an optimiser.
            self._made.update({"parts": parts, "key": key, "L": self.L})
        return self._made["parts"]

    def _changed(self):
        self._made.clear()

    @torch.no_grad()
    def eval(self):
        """Have the network hold the average X."""
        if self.param_groups[0]["train_mode"]:
            for part in self._whole():
                part.show_average(self.state)
            self.param_groups[0]["train_mode"] = False

    @torch.no_grad()
    def train(self):
        """Have the network hold P again, bit for bit."""
        if not self.param_groups[0]["train_mode"]:
            for part in self._whole():
                part.show_weights(self.state)
            self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def clock(self):
        """(length, turn): rho(Z) / s, and eta / L s / rho(Z), the angle by which the last step has
        turned Z: means over the blocks of a weight and then over the weights of a fixed length.
        0-dim tensors; NaN before the first step, and where there is no such weight."""
        lengths = [x for part in self._whole() for x in part.lengths(self.state)]
        lengths = lengths or [(torch.full_like(self.G, math.nan),) * 2]
        length, turn = (torch.stack([x.to(self.G) for x in xs]).nanmean() for xs in zip(*lengths))
        return length, turn * self.eta / self.L

    def state_dict(self):
        """As torch's method, with a copy of `skipped`, and of each parameter s, its share of L and
        whether it is of an output layer."""
        state = torch.optim.Optimizer.state_dict(self)
        state["param_groups"][0]["skipped"] = self.skipped.clone()
        rules = [rule for rules in self.rules for rule in rules]
        state["state"] = {i: {**state["state"].get(i, {}), "scale": x.s, "output": x.output,
                              **({"share": x.share} if self._read or not self._paths else {})}
                          for i, x in enumerate(rules)}  # fmt: skip
        return state

    def load_state_dict(self, state_dict):
        """As torch's method; tensors keep the dtypes that they are saved with. Raises ValueError
        for the state of another optimiser."""
        foreign = {key for x in state_dict["state"].values() for key in x} - STATE - RULE
        foreign |= FOREIGN.intersection(*[group.keys() for group in state_dict["param_groups"]])
        if foreign or "train_mode" not in state_dict["param_groups"][0]:
            raise ValueError("this is the state of another optimiser"
                             + (f": it has {min(foreign)}, and SpectralAGD has nothing of the kind"
                                if foreign else "") + "; start without it")  # fmt: skip
        averaged = not state_dict["param_groups"][0]["train_mode"]
        if averaged and any("z" in x and "weights" not in x for x in state_dict["state"].values()):
            raise ValueError("the state was taken between eval() and train(), and the weights to "
                             "train are missing: take it after optimizer.train(), or call "
                             "optimizer.eval() before it is loaded into a template")
        saved = [x for group in state_dict["param_groups"] for x in group["params"]]
        own = [(rules, i, p) for group, rules in zip(self.param_groups, self.rules)
               for i, p in enumerate(group["params"])]  # fmt: skip
        for number, (_, _, p) in zip(saved, own):
            x = state_dict["state"].get(number, {})
            shapes = [tuple(x[key].shape) for key in ("z", "m", "weights") if key in x]
            if ("z" in x) != ("m" in x) or any(shape != p.shape for shape in shapes):
                raise ValueError(f"the state is not of these parameters: number {number} has shape "
                                 f"{tuple(p.shape)}, and its z and m {shapes}")
        skipped = self.skipped
        torch.optim.Optimizer.load_state_dict(self, state_dict)
        skipped.copy_(self.param_groups[0]["skipped"])
        self.param_groups[0]["skipped"] = skipped
        self.state.clear()
        for number, (rules, i, p) in zip(saved, own):
            entries = state_dict["state"].get(number, {})
            found = {key: entries[key] for key in RULE & entries.keys()}
            self._read = self._read or "share" in found
            found["s"] = found.pop("scale", rules[i].s)
            rules[i] = rules[i]._replace(**found)
            wide = p.dtype.itemsize >= 4 and self.param_groups[0]["train_mode"]
            tensors = {key: x.detach().to(p.device, copy=True) if isinstance(x, Tensor) else x
                       for key, x in entries.items()
                       if key in STATE and not (wide and key == "weights")}  # fmt: skip
            if tensors:
                self.state[p] = tensors
        self._changed()

    def __getstate__(self):
        return {**super().__getstate__(), "process_group": None, "_made": {}}


STATE = {"z", "m", "weights", "s", "held", "t", "length", "fixed"}
RULE = {"scale", "share", "output"}


class _MatrixPart:
    """The parameters of one device, sharded alike, as stacks of matrices. Of each block of all:

    s: the target of rho; held: whether P has that length; t: the steps that have moved it;
    length: rho(Y) / s, or 1 of a free block. Tensors (blocks,), of which `state` has views.
    """

    @classmethod
    def split(cls, optimizer, listed, rules):
        alike, places = {}, [(i, j) for i, group in enumerate(optimizer.param_groups)
                             for j in range(len(group["params"]))]  # fmt: skip
        for p, rule, place in zip(listed, rules, places):
            shards = (p.device_mesh, p.placements) if _is_dtensor(p) else None
            alike.setdefault((p.device, shards), []).append(_Matrices(p, rule, *place))
        training = optimizer.param_groups[0].get("train_mode", True)
        return [cls(optimizer.state, training, *key, xs) for key, xs in alike.items()]

    def __init__(self, state, training, device, shards, weights):
        self.weights, self.shards, self.training = weights, shards, training
        wide = {"dtype": _wide(device), "device": device}
        end = 0
        for x in weights:
            x.blocks = slice(end, end + x.number)
            end = x.blocks.stop
        self.s, self.length = torch.ones(end, **wide), torch.ones(end, **wide)
        self.held = torch.zeros(end, dtype=torch.bool, device=device)
        self.t = torch.zeros(end, dtype=torch.int64, device=device)
        self.rank = torch.cat([torch.full((x.number,), x.rank, **wide) for x in weights])
        self.polar = torch.cat([torch.full((x.number,), x.polar, device=device) for x in weights])
        for x in weights:
            if x.p in state:
                x.bind(self, state[x.p])

    def begin(self, state):
        """Start the weights that have their first gradient; `active` are those that have one."""
        self.active, self.training = [x for x in self.weights if x.grad is not None], True
        new = [x for x in self.active if "z" not in state[x.p]]
        if not new:
            return
        kept, self.active = self.active, new
        rho = (self.total([x.squares(x.view(_local(x.p))) for x in new]) / self.rank).sqrt()
        for x in new:
            own, s = rho[x.blocks], x.rule.s or x.rule.blocks(x.p.shape)[2]
            there = (own > s / 500) & own.isfinite() & (x.rule.role not in VECTORS)
            self.s[x.blocks] = torch.where(there, own, s)
            self.held[x.blocks] = there & x.fixed
            self.t[x.blocks], self.length[x.blocks] = 0, 1
            x.start(state[x.p])
            x.bind(self, state[x.p])
        self.active = kept

    def total(self, sums):
        """Sums of the blocks of the active weights, of what this device holds, over all devices:
        (blocks,), 0 of the others, and of a weight that has None."""
        out = torch.zeros_like(self.s)
        for x, values in zip(self.active, sums):
            if values is not None and x.index is not None:
                out.index_add_(0, (x.blocks.start + x.index).to(out.device), values.to(out))
            elif values is not None:
                out[x.blocks] = values.to(out)
        if self.shards is None:
            return out
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, placements = self.shards
        parts = [Replicate() if x.is_replicate() else Partial("sum") for x in placements]
        return DTensor.from_local(out, mesh, parts, run_check=False).full_tensor()

    def each(self, values):
        """For each active weight its blocks' values: a number, or a tensor that broadcasts."""
        known = values.tolist() if _on_host(values) else None
        for x in self.active:
            if known is not None and x.number == 1:
                yield known[x.blocks.start]
            else:
                own = values[x.blocks]
                own = own if x.index is None else own[x.index.to(own.device)]
                yield own.to(x.dtype).view(-1, 1, 1)

    def read(self):
        """Take the gradients in. Returns their norms, (blocks,)."""
        for x in self.active:
            x.g = x.view(x.grad).to(x.dtype)
        squares = self.total([x.squares(x.g) for x in self.active])
        dots = self.total([_dots(x.g, x.weights()) if x.fixed else None for x in self.active])
        self.along = torch.where(self.held, dots / (self.s.square() * self.rank), 0)
        self.moves = squares > TINY
        return squares.sqrt()  # infinite where float32 has no square of an element

    def update_momentum(self, finite):
        """Average the gradients, without their parts along the weights, into the momentum."""
        if finite is not None:
            self.moves, self.along = self.moves & finite, torch.where(finite, self.along, 0)
        part = (1 - MU) * self.moves.to(self.s)
        for x, a, b in zip(self.active, self.each(part), self.each(part * self.along)):
            x.g = x.g if finite is None else torch.where(finite, x.g, 0)
            x.M = x.m.to(x.dtype).lerp_(x.g, a)
            if x.fixed:
                _add(x.M, x.weights(), b, -1)
            if x.M is not x.m:
                x.m.copy_(x.M)

    def slopes(self):
        """s <g, D> of each block, (blocks,), with D the direction."""
        slopes = self.total([_dots(x.g, x.D) for x in self.active])
        along = self.total([_dots(x.weights(), x.D) if x.fixed else None for x in self.active])
        squares = self.total([None if x.polar else x.squares(x.D) for x in self.active])
        # Directions without a polar factor are not yet of norm 1.
        norm = torch.where(squares > TINY, squares.sqrt(), math.inf).masked_fill_(self.polar, 1)
        self.factor = self.s / norm
        return self.factor * (slopes - self.along * along)

    def move(self, step, groups):
        """Move Z, X and P by `step`, eta / L."""
        step = step.to(self.factor)
        factor, moves = self.factor * step * self.moves, self.moves & (step > 0)
        for x in self.active:
            gain = groups[x.group]["lr"]
            if isinstance(gain, Tensor):
                gain = gain.detach().reshape(()).clamp_min(0).to(factor)
            elif gain == 1:
                continue
            factor[x.blocks] *= gain
            moves[x.blocks] &= gain > 0
        self.t += moves
        w = moves.to(factor) * 2 / (self.t + 1)
        keep = (1 - w) * torch.where(moves, self.length, 1)
        both = zip(self.active, *map(self.each, (factor, w, keep, (1 - BETA + BETA * w) * factor)))
        for x, f, w, keep, c in both:
            x.W = x.weights().mul_(keep)
            _add(x.W, x.z, w)
            _add(x.W, x.D, c, -1)
            _add(x.z, x.D, f, -1)
        squares = self.total([x.squares(x.W) if x.fixed else None for x in self.active])
        moves = moves & self.held
        length = (squares / self.rank).sqrt() / self.s
        self.length.copy_(torch.where(moves, length, self.length))
        for x, n in zip(self.active, self.each(torch.where(moves, length, 1))):
            if x.fixed:
                x.W.div_(n)
            if x.copy is not None or not x.view.dense:
                x.view.write(_local(x.p).detach(), x.W)
        self.forget()

    def forget(self):
        """Let go of what a step has made, and of its gradients."""
        for x in self.active:
            x.g = x.M = x.D = x.W = x.grad = None

    def show_average(self, state):
        self.training = False
        self.active = [x for x in self.weights if "z" in state[x.p]]
        lengths = zip(self.active, self.each(self.length / BETA))
        averages = [(x.weights() * a).sub_(x.z, alpha=(1 - BETA) / BETA) for x, a in lengths]
        squares = self.total([x.squares(X) for x, X in zip(self.active, averages)])
        rho = (squares / self.rank).sqrt()
        for x, X, n in zip(self.active, averages, self.each(torch.where(
                self.held & (rho > 0), self.s / rho, 1))):  # fmt: skip
            if x.copy is None:
                state[x.p]["weights"] = x.p.detach().clone()
            x.view.write(_local(x.p).detach(), X.mul_(n))

    def show_weights(self, state):
        for x in self.weights:
            if "weights" in state[x.p]:
                x.p.detach().copy_(state[x.p]["weights"])
                if x.copy is None:
                    del state[x.p]["weights"]

    def lengths(self, state):
        """The means of rho(Z) / s, and of its inverse, over the blocks that have a fixed length,
        for each weight that may have such; NaN where it has none."""
        self.active = [x for x in self.weights if x.fixed and "z" in state[x.p]]
        lengths = (self.total([x.squares(x.z) for x in self.active]) / self.rank).sqrt() / self.s
        lengths = torch.where(self.held, lengths, math.nan)
        own = [lengths[x.blocks] for x in self.active]
        return [(x.nanmean(), (1 / x).nanmean()) for x in own]


class _Matrices:
    """A parameter as a stack of matrices, (number, rows, cols); a vector and a row are (1, cols).

    Attributes:
        p, rule, group, place: the parameter, its Rule, its group and its place there.
        number, rank: of the blocks, and the smaller side of one.
        index: of a weight that is sharded through its blocks, the block of each row here.
        polar: whether a direction is a polar factor.
        fixed: whether blocks that do not start at zero have a fixed length.
        dtype: of the arithmetic.
    """

    def __init__(self, p, rule, group, place):
        self.p, self.rule, self.group, self.place = p, rule, group, place
        self.number, self.rank, _ = rule.blocks(p.shape)
        self.index, self.copy, local = None, None, _local(p).detach()
        self.polar = self.rank > 1 and rule.role not in VECTORS
        self.fixed = rule.role not in VECTORS and not rule.output and p.numel() > self.number
        self.dtype = torch.promote_types(p.dtype, torch.float32)
        self.moment = self.dtype if MOMENT is torch.float32 else MOMENT
        sharded, by_rows = _is_dtensor(p), False
        if sharded:
            self.whole = _MatrixView(torch.empty(p.shape, device="meta"), rule)
            by_rows = 0 in rule.numbering(p.shape)
            self.index = _block_indices(p, rule) if by_rows else None
        self.view = _MatrixView(local, rule, by_rows)
        self.form = torch.preserve_format if self.view.dense else torch.contiguous_format
        if self.polar:
            n, rows, cols = (self.whole if sharded else self.view).size
            rows, cols = min(rows, cols), max(rows, cols)
            self.cuts = 1 if ROWS is None else -(-rows // ROWS)
            self.piece = -(-rows // self.cuts), cols
            self.pieces = n * self.cuts

    def start(self, state):
        """Z = P and m = 0."""
        p = self.p.detach()
        state["z"] = p.to(self.dtype, copy=True, memory_format=self.form)
        state["m"] = torch.zeros_like(state["z"], dtype=self.moment)
        if p.dtype != self.dtype:
            state["weights"] = state["z"].clone()

    def bind(self, part, state):
        """Take the tensors of `state`, and give it views of those of all blocks."""
        if "z" not in state:
            return
        for key in ("s", "held", "t", "length"):
            of_all = getattr(part, key)
            if key in state:
                of_all[self.blocks] = state[key].to(of_all)
            state[key] = of_all[self.blocks]
        if part.training and self.p.dtype == self.dtype:
            state.pop("weights", None)  # of a time when the parameter had 16 bits
        self.fixed = state["fixed"] = state.get("fixed", self.fixed)  # whatever L is read again
        like = torch.empty_like(_local(self.p), device="meta", memory_format=self.form).stride()
        for key, dtype in (("z", self.dtype), ("m", self.moment), ("weights", self.dtype)):
            if key in state:
                x = state[key].to(self.p.device, dtype)
                if _local(x).stride() != like:  # of another memory format
                    x = torch.empty_like(self.p, dtype=dtype, memory_format=self.form).copy_(x)
                state[key] = x.detach()
        if self.p.dtype != self.dtype and "weights" not in state:
            state["weights"] = self.p.detach().to(self.dtype)
        self.z, self.m = (self.view(_local(state[key])) for key in ("z", "m"))
        self.copy = state.get("weights") if self.p.dtype != self.dtype else None

    def weights(self):
        """P in full precision."""
        return self.view(_local(self.p if self.copy is None else self.copy).detach())

    @staticmethod
    def squares(x):
        """Sums of squares of matrices, (number,), of short sums in float32."""
        short = vector_norm(x, 2, 2, dtype=torch.promote_types(x.dtype, torch.float32))
        return short.to(_wide(x.device)).square_().sum(1)

    def cut(self, m):
        """Matrices (number, rows, cols) in `pieces`, (pieces, *piece), the shorter side first."""
        m = m.mT if m.shape[1] > m.shape[2] else m
        rows, cols = self.piece
        missing = rows * self.cuts - m.shape[1]
        m = nn.functional.pad(m, (0, 0, 0, missing)) if missing else m
        return m.reshape(-1, rows, cols)

    def joined(self, D, size):
        """The matrices, of a size, that `cut` made pieces of."""
        n, rows, cols = size
        D = D.reshape(n, -1, self.piece[1])[:, : min(rows, cols)]
        return D.mT if rows > cols else D


class _MatrixView:
    """A tensor of a shape as matrices (number, rows, cols): a view, where its strides allow it."""

    def __init__(self, p, rule, by_rows=False):
        self.split, self.order, self.dense = None, list(range(p.ndim)), True
        if rule.role in VECTORS:
            self.size = 1, 1, p.numel()
        elif rule.role == "rows":
            self.size = p.numel() // max(p.shape[-1], 1), 1, p.shape[-1]
        elif by_rows:
            self.size = len(p), 1, p.numel() // max(len(p), 1)
        else:
            cut = rule.cut(p.shape)
            first = []
            if rule.parts > 1:
                self.split, first = (cut, (rule.parts, -1)), [cut]
                p = p.unflatten(*self.split)
            row, *cols = [i for i in range(p.ndim) if i not in first]
            self.size = rule.parts, p.shape[row], math.prod([p.shape[i] for i in cols])
            # In the order of memory, but where columns are cut into pieces.
            cut_columns = self.size[1] > self.size[2]
            by_stride = cols if cut_columns else sorted(cols, key=lambda i: -p.stride(i))
            self.order = [*first, row, *by_stride]
            self.dense = self._views(p)
            if not self.dense:
                self.order = [*first, row, *cols]
        self.shape = p.shape

    def _views(self, p):
        try:
            p.permute(self.order).view(self.size)
        except RuntimeError:
            return False
        return True

    def __call__(self, x):
        x = x if self.split is None else x.unflatten(*self.split)
        return x.permute(self.order).reshape(self.size)

    def write(self, x, matrices):
        """Copy matrices into a tensor."""
        x = x if self.split is None else x.unflatten(*self.split)
        x = x.permute(self.order)
        x.copy_(matrices.reshape(x.shape))

    def back(self, matrices):
        """Matrices in the shape of the tensor, contiguous."""
        places = [self.order.index(i) for i in range(len(self.order))]
        x = matrices.reshape([self.shape[i] for i in self.order]).permute(places)
        return x if self.split is None else x.flatten(self.split[0], self.split[0] + 1)


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


def _directions(parts, group=None):
    """Set the direction D of every weight that has a gradient: the polar factors of the momentum's
    matrices, one shape at a time; M itself of vectors and rows."""
    sizes = {}
    for part in parts:
        for x in part.active:
            x.D = x.M
            if x.polar:
                sizes.setdefault((x.M.device, x.dtype, x.piece), []).append(x)
    share = None
    if group is not None and torch.distributed.get_world_size(group) > 1:
        share = _Share(group)
    for members in sizes.values():
        if share and not any(_is_dtensor(x.p) for x in members):
            share.compute(members)
        else:
            pieces = torch.cat([x.cut(_gathered(x)) for x in members])
            _give(members, _polar(pieces))
    if share:
        share.gather()


def _gathered(x):
    """The momentum's matrices; of a sharded weight, gathered from all devices."""
    if not _is_dtensor(x.p):
        return x.M
    from torch.distributed.tensor import DTensor

    local = torch.empty_like(_local(x.p), dtype=x.M.dtype)
    x.view.write(local, x.M)
    m = DTensor.from_local(local, x.p.device_mesh, x.p.placements, run_check=False,
                           shape=x.p.shape, stride=x.p.stride())  # fmt: skip
    return x.whole(m.full_tensor())


def _give(members, D):
    """Hand each weight the polar factors of its pieces, or its device's part of them."""
    for x, own in zip(members, D.split([x.pieces for x in members])):
        if _is_dtensor(x.p):
            local = torch.empty_like(x.p.detach(), dtype=own.dtype)
            _fill(local, x.whole.back(x.joined(own, x.whole.size)))
            x.D = x.view(_local(local))
        else:
            x.D = x.joined(own, x.view.size)


class _Share:
    """The polar factors of all, computed by the ranks of a group in equal shares, and gathered in
    one message."""

    def __init__(self, group):
        self.group, self.sizes = group, []
        self.rank, self.number = (f(group) for f in (torch.distributed.get_rank,
                                                     torch.distributed.get_world_size))  # fmt: skip

    def compute(self, members):
        self.sizes.append((members, torch.cat([x.cut(x.M) for x in members])))

    def gather(self):
        if not self.sizes:
            return
        loads = [0] * self.number
        order = sorted(range(len(self.sizes)), key=lambda i: -self.sizes[i][1][0].numel())
        owners = [None] * len(self.sizes)
        for i in order:  # the largest first, each to the rank that has the least
            owners[i] = [[] for _ in loads]
            for j in range(len(self.sizes[i][1])):
                rank = loads.index(min(loads))
                loads[rank] += self.sizes[i][1][0].numel()
                owners[i][rank].append(j)
        own = [_polar(pieces[mine[self.rank]]).flatten()
               for (_, pieces), mine in zip(self.sizes, owners) if mine[self.rank]]  # fmt: skip
        dtypes = [pieces.dtype for _, pieces in self.sizes]
        wide = torch.bfloat16 if self.sizes[0][1].is_cuda else max(dtypes, key=lambda x: x.itemsize)
        buffer = self.sizes[0][1].new_zeros(max(loads), dtype=wide)  # what _polar has in bfloat16
        if own:
            own = torch.cat(own)
            buffer[: len(own)] = own
        out = buffer.new_empty(self.number, max(loads))
        torch.distributed.all_gather(list(out.unbind()), buffer, group=self.group)
        starts = [0] * self.number
        for (members, pieces), ranks in zip(self.sizes, owners):
            for rank, mine in enumerate(ranks):
                if mine:
                    size = len(mine) * pieces[0].numel()
                    some = out[rank, starts[rank] : starts[rank] + size]
                    pieces[mine] = some.view(len(mine), *pieces.shape[1:]).to(pieces.dtype)
                    starts[rank] += size
            _give(members, pieces)


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
    """Matrices over their Frobenius norms, in place; those of zeros stay."""
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


NO_RATE = ("AGD has no learning rate; gain multiplies its update, and is what a scheduler changes "
           "(the key lr of a group of param_groups)")  # fmt: skip
# Keys of the groups of other optimisers.
FOREIGN = {"betas", "momentum", "weight_decay", "dampening", "eps", "rho", "alpha", "lr_decay",
           "etas", "step_sizes", "max_iter", "history_size", "lambd"}  # fmt: skip
UNREAD = (
    "AGD could not read its depth L from the network's first forward pass, and takes the number of "
    "weights, which is right for a chain alone. Pass the module that is called; before "
    "torch.compile, fully_shard and checkpoints, AGD(net, depth=agd.depth(net, *inputs))"
)
GUARDS = {
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
            if shares is not None:
                optimizer._outputs = True
                optimizer._set_shares(shares)
        if optimizer is not None:
            optimizer._hook = None
        if self.handle is not None:
            self.handle.remove()

    def __getstate__(self):
        return {"optimizer": None, "handle": None}  # a copy of the network has no optimiser


class _Watch:
    """Looks at the gradients of BURST steps in a row, the first ones and then of every EVERY, and
    reads a GPU's numbers when they have come, without a wait."""

    BURST, EVERY = 16, 1024

    def __init__(self, spectral=False):
        self.step, self.seen, self.reading, self.spectral = -1, [], None, spectral

    def looks(self):
        self.step += 1
        return self.step % self.EVERY < self.BURST or self.reading is not None

    def see(self, G, norms):
        """The kinds of GUARDS that the last steps gave reason for."""
        if self.reading is not None:
            copy, event = self.reading
            if not event.query():
                return []
            self.reading = None
            return self._judge(copy)
        self.seen.append(torch.stack([G, *[x.square().sum().to(G) for x in norms]]))
        if len(self.seen) < self.BURST:
            return []
        seen, self.seen = self.seen, []
        if any(len(x) != len(seen[0]) for x in seen):
            return []
        seen = torch.stack(seen)
        if _on_host(seen):
            return self._judge(seen)
        if seen.is_cuda:
            copy = torch.empty(seen.shape, dtype=seen.dtype, device="cpu", pin_memory=True)
            copy.copy_(seen, non_blocking=True)
            self.reading = copy, torch.cuda.Event()
            self.reading[1].record()
        return []

    def _judge(self, seen):
        G, norm = seen[:, 0], seen[:, 1:].sum(1).sqrt()
        if not seen.isfinite().all():
            return []
        same = (norm[1:] - norm[:-1]).abs() < 1e-5 * norm[1:]
        moved = (G[1:] - G[:-1]).abs() > 1e-4 * G[1:]  # the same gradient again is not clipped
        dead = self.step < self.EVERY and G.max() < 1e-6
        kinds = {"clipped": (same & moved).sum() >= 10, "sum": G.min() > 1000, "dead": dead,
                 "small": self.spectral and self.step < self.EVERY and not dead
                 and G.max() < 1e-2}  # fmt: skip
        return [kind for kind, yes in kinds.items() if yes]


CAPTURED = WeakTensorKeyDictionary()  # parts by the first of their weights


def _capturing(x):
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _eta(G):
    """log((1 + sqrt(1 + 4 G)) / 2), without cancellation or overflow; NaN for an infinite G."""
    return (G / (G + 0.25).sqrt_().add_(0.5)).log1p_()


def _middle(scales, norms):
    """The mathematics between the sweeps. From s / L and the norm of each block, (blocks,) of each
    part, follow G, eta and the factors of the update, infinite or NaN for a zero gradient."""
    slopes = [(s * x).sum() for s, x in zip(scales, norms)]
    G = slopes[0]
    for x in slopes[1:]:
        G = G + x.to(G)
    eta = _eta(G)
    return G, eta, [s * eta.to(x) / x for s, x in zip(scales, norms)]


# role -> which parameters, and the norm s of a block. A vector (bias, gain) is a single block and
# takes no share of L.
ROLES = {
    "matrix": "(out, in): one block, s = sqrt(out / in); transposed: (in, out)",
    "stacked": "matrices beside each other, qkv or gates: one block a part, s of a part",
    "kernel": "(out, in / groups, *kernel): one block a position and group, s = sqrt(out / in / K)",
    "rows": "embeddings, tokens, positions: one block a row, s = sqrt(length of a row)",
    "bias": "of a layer with a weight: s of that weight",
    "gain": "of a norm layer, and any other vector: s = 1",
}
VECTORS = ("bias", "gain")


class Rule(NamedTuple):
    """What AGD knows of one parameter.

    Attributes:
        parts: the matrices of a stacked weight, the groups of a convolution.
        transposed: whether the input's dimension comes first.
        stride: of a transposed convolution, the product over its dimensions: that many of the
            kernel's positions do not meet in an output.
        s: the norm of a block. None: the role's.
        share: of L.
        start: of a vector, the value that `init_weights` gives it. None: as it is.
        im2col: whether a kernel is one matrix a group, (out, in * K), instead of K.
        output: whether the network's output is reached from it through no other weight.
    """

    role: str
    parts: int = 1
    transposed: bool = False
    stride: int = 1
    s: float | None = None
    share: float = 1.0
    start: float | None = None
    im2col: bool = False
    output: bool = False

    def blocks(self, shape):
        """(number of blocks, the smaller side of one, the role's s) of a weight of this shape."""
        size = math.prod(shape)
        if self.role in VECTORS:
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

    def cut(self, shape):
        """The dimension along which the parts follow each other."""
        return 1 if self.transposed and len(shape) == 2 else 0

    def numbering(self, shape):
        """The dimensions that number blocks, of a weight whose parts have a dimension of their own
        in front of the one that they cut."""
        if self.role == "rows":
            return range(len(shape) - 1)
        cut = [self.cut(shape)] if self.parts > 1 else []
        if self.role == "kernel" and not self.im2col:
            cut += range(2 + len(cut), len(shape) + len(cut))
        return cut


class Layout:
    """The blocks of a weight, and their order in memory (of a sharded weight: on this device).

    Attributes:
        K: the number of blocks.
        index: of a weight that is sharded through its blocks, the place of each block among all,
            int64. Else None.
        dense: (lead, outer, K, inner), the shape in the order of memory, where there is one without
            gaps: `lead` times K blocks. In a convolution inner is 1, and `in` in channels_last; in
            an embedding lead is the number of rows. Else None.
        dims: the dimensions of `view` inside a block.
    """

    def __init__(self, weight, rule):
        p, self.dense, self.index = _local(weight).detach(), None, None
        self.split = rule.parts > 1 and (rule.cut(p.shape), rule.parts)
        blocks = list(rule.numbering(p.shape))
        if _is_dtensor(weight) and 0 in blocks:
            self.split, self.index = False, _block_indices(weight, rule)
            blocks = [0, *(i - (rule.role == "kernel") for i in blocks[1:])]
        p = self._parted(p)
        dims = list(range(p.ndim))
        self.K = math.prod([p.shape[i] for i in blocks])
        self.dims = tuple([i for i in dims if i not in blocks])
        self.shape = [p.shape[i] if i in blocks else 1 for i in dims]  # of factors
        self.order = sorted(dims, key=lambda i: -p.stride(i))
        if self.index is not None and self.order[0] != 0:
            return  # `index` is in the order of the rows
        if p.numel() and p.permute(self.order).is_contiguous():
            sides = [i for i in self.order if p.shape[i] > 1]
            first = 0
            while first < len(sides) and sides[first] in blocks:
                first += 1
            places = [n for n, i in enumerate(sides) if i in blocks and n >= first] or [len(sides)]
            if places[-1] - places[0] < len(places):
                self.dims, lead = DENSE, math.prod([p.shape[i] for i in sides[:first]])
                K = self.K // lead
                outer = math.prod([p.shape[i] for i in sides[first : places[0]]])
                inner = math.prod([p.shape[i] for i in sides[places[-1] + 1 :]])
                self.dense = lead, outer, K, inner
                # Rows of m * K numbers: long enough for a loop, short enough for float32's sums.
                self.m = math.gcd(outer, 1024 if K == 1 else 64) if inner == 1 else 1

    def _parted(self, x):
        return x.unflatten(self.split[0], (self.split[1], -1)) if self.split else x

    def view(self, x):
        """A tensor like the weight as (lead, outer / m, m, K, inner); with gaps, as it is, with a
        dimension for its parts."""
        x = self._parted(x)
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


def _block_indices(weight, rule):
    """The place among all blocks of the blocks of a local tensor, for a weight that is sharded
    along the dimension that numbers them: a row at a time."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )
    rows = torch.arange(offset[0], offset[0] + shape[0]) if shape[0] else torch.arange(0)
    positions = weight.shape[1:-1] if rule.role == "rows" else weight.shape[2:]
    several = rule.role == "rows" or rule.role == "kernel" and not rule.im2col
    positions = math.prod(positions) if several else 1
    part = rows if rule.role == "rows" else rows // (weight.shape[0] // rule.parts)
    return (part[:, None] * positions + torch.arange(positions)).flatten()


class _Part:
    """The weights of one backend on one device, sharded alike.

    Attributes:
        scales: s / L of each block, (blocks,) float64.
        groups: (index of a group, slice of its blocks) pairs.
        index: of weights that are sharded through their blocks, the places of the local blocks.
    """

    @classmethod
    def split(cls, weights, L, fused):
        """The parts of weights, given as (index of a group, weight, Rule) triples."""
        alike = {}
        for i, (group, p, rule) in enumerate(weights):
            layout = Layout(p, rule)
            kind = TorchBackend if fused is False else _backend(p, layout)
            shards = (p.device_mesh, p.placements) if _is_dtensor(p) else None
            key = kind, p.device, shards
            alike.setdefault(key, []).append((i, p, layout, group, rule))
        return [cls(*key, L, *zip(*members)) for key, members in alike.items()]

    def __init__(self, kind, device, shards, L, indices, weights, layouts, groups, rules):
        self.shards, self.indices, self.groups, self.index = shards, indices, [], None
        self.backend = kind([_local(p) for p in weights], layouts)
        wide, scales, places = {"dtype": _wide(device), "device": device}, [], []
        end = 0
        for p, group, rule in zip(weights, groups, rules):
            number, _, s = rule.blocks(p.shape)
            scales.append(torch.full((number,), (s if rule.s is None else rule.s) / L, **wide))
            start, end = end, end + number
            places.append((start, number))
            if self.groups and self.groups[-1][0] == group:
                start = self.groups.pop()[1].start
            self.groups.append((group, slice(start, end)))
        self.scales = torch.cat(scales)
        if any(layout.index is not None for layout in layouts):
            own = [torch.arange(n) if x.index is None else x.index
                   for x, (_, n) in zip(layouts, places)]  # fmt: skip
            self.index = torch.cat([start + x for x, (start, _) in zip(own, places)]).to(device)

    def norms(self, grads):
        """Frobenius norms of the gradients' blocks, like `scales`."""
        norms = self.backend.norms([grads[i] for i in self.indices])
        if self.shards is None:
            return norms
        from torch.distributed.tensor import DTensor, Partial, Replicate

        mesh, placements = self.shards
        norms = norms.square_()
        if self.index is not None:
            norms = torch.zeros_like(self.scales).index_add_(0, self.index, norms)
        parts = [Replicate() if x.is_replicate() else Partial("sum") for x in placements]
        whole = DTensor.from_local(norms, mesh, parts, run_check=False)
        return whole.full_tensor().sqrt_()

    def subtract(self, targets, grads, factors):
        """targets -= factors * grads, with factors like `scales`."""
        targets, grads = ([tensors[i] for i in self.indices] for tensors in (targets, grads))
        if self.index is not None:
            factors = factors[self.index]
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
        known = factors.tolist() if _on_host(factors) else None
        single, end = factors.float(), 0
        for layout, t, d in zip(self.layouts, targets, directions):
            blocks = slice(end, end + layout.K)
            end = blocks.stop
            # Whether a factor, and every factor, is not 0, and float32 has the digits of each.
            moves, every, in_range = True, False, False
            if known is not None:
                some = set(known[blocks])
                moves, every = bool(some - {0.0}), 0.0 not in some
                in_range = all(LOWEST < x < HIGHEST or x == 0 for x in some)
            if not moves:
                continue
            t, d = layout.view(t), layout.view(d)
            f = single if in_range and d.dtype != torch.float64 else factors
            f = layout.spread(f[blocks])
            if in_range and every and f.dtype == d.dtype:
                t.addcmul_(d, f, value=-1)
            else:
                work = torch.promote_types(d.dtype, torch.float32)
                update = torch.mul(d, f, out=torch.empty_like(d, dtype=work))
                t.sub_(update.masked_fill_(f == 0, 0))  # NaN * 0 is NaN, and -0 - -0 is 0


DENSE = (1, 2, 4)  # the dimensions of a block in the view of a dense weight
LOWEST, HIGHEST = 2.0**-100, 2.0**100  # float32 loses no digit of factors between them
LEAST = 2.0**-30  # a norm whose square float32 holds, with all the squares that matter to it
CHUNK = 2**17  # numbers: half a megabyte stays in a processor's cache


def _on_host(x):
    """Whether a number is read without a wait: of a CPU's memory, and while nothing is traced."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


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
    """As _norms, of a dense view without `lead`, with CHUNK squares at a time; 0 or infinite out
    of range."""
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
    found = kernels.backend(p.device, TorchBackend, Layout, Rule)
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


# Linear layers of this name are three matrices beside each other where their shape is that.
QKV = ("qkv", "c_attn", "qkv_proj", "query_key_value", "Wqkv", "to_qkv", "in_proj")
TOKEN = re.compile("token|pos|embed|query|queries|latent|bias_[kv]$")  # names of rows


def _rules_of(net, roles, measure=True, im2col=False):
    """{id: (name, Rule)} of all parameters of a network, with s of what stands there; `im2col`
    takes a kernel for one matrix a group."""
    modules, places, found = dict(net.named_modules()), {}, {}
    parameters = [(name, p) for name, p in net.named_parameters()
                  if p.requires_grad or nn.parameter.is_lazy(p) or p.numel()]  # fmt: skip
    _check([(name, p) for name, p in parameters if p.requires_grad])
    for name, p in parameters:
        owner, tensor, magnitude = _owner(name, p)
        module = modules[owner]
        rule = _role(module, owner.rpartition(".")[2], tensor, p.shape)
        rule = Rule("gain") if magnitude else rule
        rule = _overridden(name, p, rule, roles)
        rule = rule._replace(im2col=im2col and rule.role == "kernel")
        found[name] = p, rule, (owner, tensor)
        if not magnitude:
            places[owner, tensor] = name
    scales = _measured([(p, rule) for p, rule, _ in found.values()]) if measure else {}
    known = {}
    for name, (p, rule, (owner, tensor)) in found.items():
        s = scales.get(id(p))
        if "bias" in tensor and rule.role in VECTORS and not (
            rule.role == "gain" and any(fnmatch.fnmatchcase(name, x) for x in roles)
        ):
            layer = places.get((owner, tensor.replace("bias", "weight")))
            if layer is not None and layer != name:
                W, its, _ = found[layer]
                vector = its.role in VECTORS
                rule = rule._replace(role="gain" if vector else "bias")
                s = scales.get(id(W)) if measure else None
                s = its.blocks(W.shape)[2] if s is None else s
            else:
                rule = rule._replace(role="gain")
        if measure and s is None:
            s = rule.blocks(p.shape)[2]
        known[id(p)] = name, rule._replace(s=s)
    return known


def _owner(name, p):
    """(the module's name, the tensor's name in it, whether it is the magnitude of weight_norm) of a
    parameter; one of a parametrization stands for the weight that it makes."""
    own = re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\.original(\d?)", name)
    if own:
        magnitude = own[3] == "0" and p.ndim > 1 and sum(n > 1 for n in p.shape) < 2
        return own[1] or "", own[2], magnitude
    owner, _, tensor = name.rpartition(".")
    if tensor in ("weight_g", "weight_v", "weight_orig"):  # of the older torch.nn.utils
        return owner, "weight", tensor == "weight_g"
    return owner, tensor, False


def _role(module, attribute, tensor, shape):
    """The Rule of a parameter, by the class of its module, and the module's own name."""
    norm = "Norm" in type(module).__name__
    if len(shape) < 2:
        bias = tensor == "bias" or tensor.startswith("bias_") or tensor.endswith("_bias")
        return Rule("bias", start=0.0) if bias else Rule("gain", start=1.0 if norm else None)
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
    return Rule("gain", start=1.0 if norm else None) if vector else Rule("rows")


def _rules_by_shape(params, roles, spectral=False):
    """A Rule for each (name, tensor): a matrix or kernel, or, of a single dimension, the bias of
    the weight of its name, or of the weight in front of it that has as many rows, or a gain.
    `spectral`: a kernel is one matrix a group, and s is measured."""
    weights, rules, before = {name: p for name, p in params if name}, [], None

    def of(p):
        return Rule("matrix") if p.ndim == 2 else Rule("kernel", im2col=spectral)

    for name, p in params:
        if p.ndim > 1:
            rule = of(p)
        else:
            rule, layer = Rule("gain", start=1.0), before
            if name is not None:
                owner, _, own = name.rpartition(".")
                its = own.replace("bias", "weight")
                layer = weights.get(f"{owner}.{its}" if owner else its) if its != own else None
                rule = rule._replace(start=0.0 if "bias" in own else 1.0)
            if layer is not None and layer.ndim > 1 and p.ndim and len(layer) == len(p):
                s = spectral and _measured([(layer, of(layer))]).get(id(layer))
                rule = Rule("bias", s=s or of(layer).blocks(layer.shape)[2], start=0.0)
        rule = _overridden(name, p, rule, roles)
        rules.append(rule._replace(im2col=spectral and rule.role == "kernel"))
        before = p
    if spectral:
        scales = _measured([(p, x) for (_, p), x in zip(params, rules)])
        rules = [x if x.s is not None else x._replace(s=scales.get(id(p)))
                 for (_, p), x in zip(params, rules)]  # fmt: skip
    return rules


def _overridden(name, p, rule, roles):
    """A Rule, or what the last pattern of roles= that matches says of a parameter of this name."""
    found = [x for pattern, x in roles.items() if name and fnmatch.fnmatchcase(name, pattern)]
    for text in found[-1:]:
        role, _, parts = text.partition(" ")
        transposed, role = role == "transposed", "matrix" if role == "transposed" else role
        if role not in ROLES or (parts and not parts.isdecimal()):
            raise ValueError(f"no role {text!r} among {', '.join(ROLES)}, transposed, and those "
                             "with a number of parts, as stacked 3")  # fmt: skip
        rule = Rule(role, int(parts or (3 if role == "stacked" else 1)), transposed)
        whole = p.ndim > 1 and rule.parts and p.shape[rule.cut(p.shape)] % rule.parts == 0
        if role not in VECTORS and not whole:
            raise ValueError(f"{_label(name, p)} cannot be {text!r}, of roles=")
    return rule


@torch.no_grad()
def _measured(weights):
    """{id: RMS singular value of the blocks} of (weight, Rule) pairs, where it is not zero, nor as
    good as zero: under 1/500 of the role's s, as some heads and layer scales start."""
    norms, kept = [], []
    for p, rule in weights:
        if p.is_floating_point() and not p.is_meta and p.numel():
            norm = vector_norm(p.detach(), dtype=_wide(p.device))
            norm = norm.full_tensor() if _is_dtensor(norm) else norm
            number, rank, s = rule.blocks(p.shape)
            kept.append((p, math.sqrt(number * rank), s))
            norms.append(norm)
    found, devices = {}, {}
    for entry, norm in zip(kept, norms):
        devices.setdefault(norm.device, []).append((*entry, norm))
    for some in devices.values():
        for (p, n, s, _), norm in zip(some, torch.stack([x for *_, x in some]).tolist()):
            if s / 500 < norm / n < math.inf:
                found[id(p)] = norm / n
    return found


# Nodes that only rearrange a parameter: transposes, parts of a fused weight, casts of autocast.
REARRANGE = {
    "T", "View", "Permute", "Transpose", "Unsqueeze", "Squeeze", "Expand", "ToCopy", "Split",
    "SplitWithSizes", "Slice", "Select", "Unbind", "Chunk", "UnsafeView", "ReshapeAlias", "Clone",
    "Alias", "AsStrided",
}  # fmt: skip
NORMS = {"NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "FusedRmsNorm",
         "NativeGroupNorm", "RmsNorm"}  # fmt: skip
ADD = {"Add", "Sub"}
LAYERS = {"Addmm", "Mm", "Bmm", "Convolution", "Embedding", "EmbeddingBag"}
# Nodes that make weights of parameters: standardised ones, exponents of gains, biases side by side.
FUNCTIONS = {
    "Abs", "Add", "Cat", "Clamp", "ClampMax", "ClampMin", "CopySlices", "Div", "Exp", "Log",
    "LinalgVectorNorm", "Mean", "Mul", "NativeBatchNorm", "CudnnBatchNorm", "Neg", "Norm", "Pow",
    "Relu", "Rsqrt", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Stack", "Std", "StdMean", "Sub",
    "Sum", "Tanh", "Var", "VarMean", "Zero",
}  # fmt: skip
HIDDEN = {"CompiledFunction", "CheckpointFunction", "Broadcast"}  # nodes that have others inside


def depth(net, *inputs, **kwargs):
    """The share of L of each weight of a network, {name: share}; L is their sum, the mean number of
    weights on a path from the outputs to the inputs: for a chain the number of its layers. The
    attribute `outputs` names the weights that come last on a path.

    One unit of share flows back from the outputs. An operation with a weight takes what flows
    through it as the weight's share, and hands it on. A sum divides it in proportion to the units
    of signal in its addends: the output of a weight or of a norm layer is one, a sum has those of
    its addends. A product of activations divides it equally, and so does a concatenation. All else
    hands it on. Frozen weights and vectors have no share.

    Args:
        net: before torch.compile and fully_shard, without reentrant checkpoints.
        inputs, kwargs: of its forward pass, which is run once; buffers stay as they are.

    Raises:
        ValueError: where the graph hides weights, or none has a gradient.
    """
    with _Untouched(net), torch.enable_grad():
        shares = _shares(net, net(*inputs, **kwargs), {})
    if not shares:
        raise ValueError("no depth can be read: the graph of the network's output has no weight "
                         "that requires a gradient, or hides some in a compiled or checkpointed "
                         "part")  # fmt: skip
    named = [(name, id(p)) for name, p in net.named_parameters()]
    return Depth({name: shares[x] for name, x in named if x in shares},
                 {name for name, x in named if x in shares.outputs})  # fmt: skip


class Depth(dict):
    """{name of a weight: share of L}, and `outputs`, the names of those from which the outputs are
    reached through no other weight."""

    def __init__(self, shares, outputs=()):
        super().__init__(shares)
        self.outputs = frozenset(outputs)


class _Untouched:
    """A context that leaves a network's buffers and torch's generators as they were."""

    def __init__(self, net):
        self.net = net

    def __enter__(self):
        self.buffers = [(module, dict(module._buffers)) for module in self.net.modules()]
        twins = {id(x): x.clone() for x in self.net.buffers()}
        for module, buffers in self.buffers:
            module._buffers.update({k: twins.get(id(x), x) for k, x in buffers.items()})
        devices = {p.device for p in self.net.parameters() if p.is_cuda}
        self.fork = torch.random.fork_rng(list(devices))
        self.fork.__enter__()

    def __exit__(self, *error):
        self.fork.__exit__(*error)
        for module, buffers in self.buffers:
            module._buffers.update(buffers)


def _shares(net, output, roles):
    """The Depth of an output, by ids of the weights that it was computed from. Empty: it has no
    gradient. None: weights are hidden. Reads the names of autograd's nodes, never their values."""
    roots = [t.grad_fn for t in _outputs(output) if t.grad_fn is not None]
    if not roots:
        return Depth({})
    known = _rules_of(net, roles, measure=False)
    weights = {key for key, (_, rule) in known.items() if rule.role not in VECTORS}
    modules = dict(net.named_modules())
    # A weight that torch's parametrizations make of others: its shape, by those others.
    made = {}
    for name, p in net.named_parameters():
        if own := re.fullmatch(r"(?:(.*)\.)?parametrizations\.(\w+)\..*", name):
            made[id(p)] = getattr(modules[own[1] or ""], own[2]).shape
    nodes = _inputs_first(roots)
    parameter, units = {}, {}  # node -> the parameters it is a function of; units of signal in it
    hides = HIDDEN.intersection(map(_kind, nodes))
    for node in nodes:
        kind, inputs = _kind(node), [n for n, _ in node.next_functions if n is not None]
        if kind == "AccumulateGrad":
            parameter[node] = [node.variable]
        elif inputs and all(n in parameter for n in inputs) and _rearranges(
            node, kind, [p for n in inputs for p in parameter[n]], made
        ):
            parameter[node] = list({id(p): p for n in inputs for p in parameter[n]}.values())
        else:
            matrices, signals = _split(node, parameter, weights)
            if kind in ADD:
                units[node] = sum(units[n] for n, _ in signals) + len(matrices)
            elif matrices or kind in NORMS:
                units[node] = 1.0
            else:
                units[node] = max((units[n] for n, _ in signals), default=1.0)
    flow, shares, outputs = dict.fromkeys(units, 0.0), {}, set()
    last = {root for root in roots if root in flow}  # nodes that no weight follows on some path
    some_frozen = any(p.ndim > 1 and not p.requires_grad for p in net.parameters())
    for root in roots:
        if root in flow:
            flow[root] += 1.0 / len(roots)
    for node in reversed(nodes):
        if node in parameter:
            continue
        kind, (matrices, signals) = _kind(node), _split(node, parameter, weights)
        parts, whole, each = [1.0] * len(signals), float(len(signals)), flow[node]
        own = [each] * len(matrices)
        if kind in ADD:
            parts, whole = [units[n] for n, _ in signals], units[node]
            own = [each / max(whole, 1.0)] * len(matrices)
        elif kind in ("Cat", "Stack"):
            whole += len(matrices)
            own = [each / max(whole, 1.0)] * len(matrices)
        for p, share in zip(matrices, own):
            shares[id(p)] = shares.get(id(p), 0.0) + share
        if node in last:
            outputs.update(map(id, matrices))
            frozen = some_frozen and kind in LAYERS and len(signals) == 1  # its weight: no node
            if kind in ADD | {"Cat", "Stack"} or not (matrices or frozen):
                last.update(n for n, _ in signals)
        for (n, _), part in zip(signals, parts):
            flow[n] += each * part / whole
    missing = any(p.requires_grad and id(p) in weights.difference(shares) for p in net.parameters())
    hidden = hides and (missing or hides != {"CheckpointFunction"})
    return None if hidden else Depth(shares, outputs)


def _rearranges(node, kind, parameters, made):
    """Whether a node whose inputs are parameters makes another form of them, no signal. Its inputs
    that have no gradient are not seen: data, in the first layer."""
    if kind in REARRANGE:
        return True
    shape = _shape(node)
    shapes = [made[id(p)] for p in parameters if id(p) in made]
    if shapes:
        return kind not in LAYERS or shape in shapes
    small = shape is not None and shape.numel() <= sum(p.numel() for p in parameters)
    return kind in FUNCTIONS and small


def _split(node, parameter, weights):
    """(the weights that go into a node, [(node, output index)] of the activations that do)."""
    matrices, signals = [], []
    for n, i in node.next_functions:
        if n is not None and n in parameter:
            matrices += [p for p in parameter[n] if id(p) in weights]
        elif n is not None:
            signals.append((n, i))
    return matrices, signals


def _kind(node):
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward")


def _shape(node):
    try:
        return torch.Size(node._input_metadata[0].shape)
    except (AttributeError, IndexError, TypeError):
        return None


def _outputs(output):
    """The tensors of an output. A loss among named ones stands for the others, of which it is."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        loss = output.get("loss")
        for x in [loss] if isinstance(loss, Tensor) else output.values():
            yield from _outputs(x)
    elif isinstance(output, (list, tuple)):
        for x in output:
            yield from _outputs(x)


def _inputs_first(roots):
    order, seen, stack = [], set(), [(n, False) for n in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(n, False) for n, _ in node.next_functions if n is not None]
    return order


def recalibrate(net, batches):
    """Recompute the running statistics of all batch norms of a network, as means over `batches`: of
    inputs, or (inputs, labels). After `SpectralAGD.eval()`, whose weights it has not run with.
    Raises ValueError where a network with batch norm gets no batch."""
    device = next((p.device for p in net.parameters()), None)
    kept = [(x, x.training, getattr(x, "momentum", None)) for x in net.modules()]
    seen = []

    def counted():
        for batch in batches:
            seen.append(1)
            yield batch

    norms = [x for x in net.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    before = [(x, copy.deepcopy(x._buffers)) for x in norms]
    try:
        torch.optim.swa_utils.update_bn(counted(), net, device)
        if norms and not seen:
            for x, buffers in before:
                x._buffers.update(buffers)
            raise ValueError("recalibrate got no batch: batch norm takes its statistics from some")
    finally:
        for module, training, momentum in kept:
            module.training = training
            if momentum is not None:
                module.momentum = momentum


@torch.no_grad()
def init_weights(params, generator=None, inputs=None, roles=None):
    """Draw every parameter anew, in place: blocks uniform (Haar) semi-orthogonal, times s; rows of
    Gaussian direction and length s; biases 0, gains of norm layers 1.

    Args:
        params: a network, whose frozen parameters stay as they are, and so do gains outside of norm
            layers (slopes, layer scales, temperatures); or anything else that `AGD` takes. A tensor
            listed twice is drawn once.
        generator: a CPU `torch.Generator`; None is torch's default one. The draw is made on the
            CPU in float64, tensor by tensor in the order given, then cast and copied: a seed means
            the same weights on every device and, up to rounding, in every dtype.
        inputs: of a network, a batch: a tensor, a tuple or a dict. Each linear, convolutional or
            embedding layer is then scaled, from input to output, to outputs of RMS 1, whatever
            activation stands between them; `AGD(net)` measures the s that follow. Without it, and
            without norm layers, √2 relu keeps the signal; with plain relu, gelu or silu it fades
            out in deep networks.
        roles: as of `AGD`.

    Raises:
        ValueError: for what the constructor of `AGD` refuses, and for a generator of a GPU.
    """
    if generator is not None and generator.device.type != "cpu":
        raise ValueError("init_weights draws on the CPU: pass torch.Generator(), without a device")
    roles, net = roles or {}, params if isinstance(params, nn.Module) else None
    if net is not None:
        known = _rules_of(net, roles, measure=False)
        params = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
        rules = [known[id(p)][1] for _, p in params]
    elif inputs is not None:
        raise ValueError("init_weights scales a network to inputs: pass it, not its parameters")
    else:
        params = list(_named(_listed(params)))
        _check(params)
        rules = _rules_by_shape(params, roles)
    if not params:
        raise ValueError(EMPTY)
    # Without a name a constant vector is of a norm layer: its gain or its bias.
    named = all(name for name, _ in params)
    sizes, drawn, wide = {}, 0, {"dtype": torch.float64, "device": "cpu"}
    for p, rule in {id(p): (p, rule) for (_, p), rule in zip(params, rules)}.values():
        number, rank, s = rule.blocks(p.shape)
        if rule.role in VECTORS:
            if rule.start is not None and (named or p.max() > p.min()):
                p.fill_(rule.start)
        elif rule.role == "rows":
            z = torch.randn(p.shape, generator=generator, **wide)
            _fill(p, z * (s / vector_norm(z, 2, -1, keepdim=True)))
        else:
            size = number, p.numel() // number // rank, rank
            z = torch.randn(size, generator=generator, **wide)
            sizes.setdefault(size[1:], []).append((p, rule, z))
            drawn += z.numel()
        if drawn > 2**26:  # half a gigabyte
            _orthogonalise(sizes)
            drawn = 0
    _orthogonalise(sizes)
    if inputs is not None:
        _scale(net, inputs)


def _orthogonalise(sizes):
    """Fill weights from their draws, [(weight, Rule, draw)] by size, and empty the dict."""
    for size in list(sizes):
        weights, rules, draws = zip(*sizes.pop(size))
        Q, R = torch.linalg.qr(torch.cat(draws))
        # Haar measure needs the factorisation that has a positive diagonal in R.
        Q.mul_(R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
        for p, rule, q in zip(weights, rules, Q.split([len(z) for z in draws])):
            shape, numbering = list(p.shape), list(rule.numbering(p.shape))
            if rule.parts > 1:
                cut = rule.cut(shape)
                shape[cut : cut + 1] = [rule.parts, shape[cut] // rule.parts]
            others = [i for i in range(len(shape)) if i not in numbering]
            q = q if shape[others[0]] >= p.numel() // len(q) // shape[others[0]] else q.mT
            q = q.reshape([shape[i] for i in numbering + others])
            back = [(numbering + others).index(i) for i in range(len(shape))]
            _fill(p, q.permute(back).reshape(p.shape) * rule.blocks(p.shape)[2])


def _scale(net, inputs):
    """Divide each layer's weight by the RMS of its output, in the order of the forward pass."""
    kinds = nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.Embedding, nn.EmbeddingBag
    done = set()

    def hook(layer, args, kwargs, output):
        weight = layer._parameters.get("weight")
        if weight is None or not weight.requires_grad or id(weight) in done:
            return None
        done.add(id(weight))  # a tied weight is scaled where it is used first
        rms = vector_norm(output.detach(), dtype=_wide(output.device)) / math.sqrt(output.numel())
        if not 0 < rms < math.inf:
            return None
        weight.div_(rms.to(weight))
        return layer.forward(*args, **kwargs)

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in net.modules()
               if isinstance(layer, kinds) or type(layer).__name__ == "Conv1D"]  # fmt: skip
    training = [(module, module.training) for module in net.modules()]
    try:
        with _Untouched(net):
            net.train()
            if isinstance(inputs, Mapping):
                net(**inputs)
            else:
                net(*(inputs if isinstance(inputs, (tuple, list)) else [inputs]))
    finally:
        for module, mode in training:
            module.training = mode
        for handle in handles:
            handle.remove()


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


def _unwrapped(name):
    """A parameter's name without those of wrappers: DDP, torch.compile, checkpoints."""
    return re.sub(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module)\.", "", name)


def _listed(params):
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


def _check(params):
    """Raise one error for all tensors, of (name, tensor) pairs, that AGD has no rule for."""
    found = {}
    for name, p in params:
        if not isinstance(p, Tensor):
            raise TypeError(f"AGD takes tensors or (name, tensor) pairs, not {type(p).__name__}")
        if nn.parameter.is_lazy(p):
            kind = "which has no shape yet: run a batch through the network first"
            found.setdefault(kind, []).append(name or "a tensor")
            continue
        kind = None
        if not p.is_floating_point() or p.dtype.itemsize < 2:
            kind = f"of dtype {p.dtype}: make it real floating point of 16 bits, or leave it out"
        elif p.numel() == 0:
            kind = "which has no elements: leave it out"
        elif _is_dtensor(p) and any(getattr(x, "dim", 0) not in (0, 1) for x in p.placements):
            kind = "sharded along its kernel: shard it along its first or second dimension"
        if kind:
            found.setdefault(kind, []).append(_label(name, p))
    if found:
        kinds = [f"{', '.join(x[:5])}{f' and {len(x) - 5} more' * (len(x) > 5)}, {kind}"
                 for kind, x in found.items()]  # fmt: skip
        number = sum(map(len, found.values()))
        number = f"{number} tensors: " if number > 1 else ""
        raise ValueError(f"AGD has no rule for {number}{'; '.join(kinds)}")


def _number(depth):
    if not (isinstance(depth, (int, float)) and 0 < depth < math.inf):
        raise ValueError(f"depth is a positive number, or what agd.depth returns, not {depth!r}")
    return float(depth)


def _check_gain(gain):
    """Reads a tensor: for the constructor and add_param_group, never for a step."""
    number = isinstance(gain, (int, float)) or (isinstance(gain, Tensor) and gain.numel() == 1)
    if not (number and 0 <= gain < math.inf):
        raise ValueError(f"the gain must be a number, finite and not negative, not {gain!r}")
