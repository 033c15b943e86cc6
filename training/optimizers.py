"""The optimisers, by name: of agd.py, baselines, and those of foreign classes."""

import torch

import agd
from agd import AGD, SpectralAGD, init_weights
from architecture import sample
from training.choices import AUTOMATIC, BASELINES
from training.foreign import construct, foreign

# The first call of some methods of torch.optim.Optimizer imports torch's compiler, only to exclude
# them from compilation: more than a second of every start.
for method in vars(torch.optim.Optimizer).values():
    if hasattr(method, "__wrapped__"):
        method.__wrapped__.__dynamo_disable = method.__wrapped__


def make_optimizer(
    name, net, shape=None, *, lr=None, weight_decay=None, gain=1.0, layers="count", drawn=True,
    seed=None, process_group=None,
):  # fmt: skip
    """The optimiser `name` of what is not frozen in `net`, a network for inputs of `shape`.

    lr, weight_decay: of a baseline, as in `construct`. gain: of an AUTOMATIC one. `layers`: "count"
    for the paper's L, the number of weights, or "paths" for the mean number on a path. `drawn`: the
    weights start from the method's own distribution, so their norms are known; False for weights of
    a file or a library. `seed`: of the draw; None draws nothing. Ranks of a `process_group` share
    the work of a step. Raises TypeError or ValueError where AGD has no rule for a weight, Unusable
    where a foreign class cannot train here.
    """
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if name in AUTOMATIC:
        if drawn and seed is not None:
            # Of a text the embeddings are rows, which shapes do not tell.
            params = net if len(shape or ()) == 1 else net.named_parameters()
            init_weights(params, torch.Generator().manual_seed(seed))
        return automatic(name, net, trained, shape, gain, layers, drawn, process_group)
    parameters = [p for _, p in trained]
    if name in BASELINES:
        own, rate = BASELINES[name]
        lr = rate if lr is None else lr
        return construct(getattr(torch.optim, own), parameters, lr, weight_decay)
    return foreign(name, parameters, lr, weight_decay)


def automatic(optimizer, net, trained, shape, gain, layers, drawn, process_group=None):
    """One of AUTOMATIC, of `trained`, the (name, parameter) pairs of `net` that are not frozen.

    Weights that are drawn here have the sizes of the method's table; AGD measures those of others,
    and the spectral rule all. The paths through the network are read here: its first forward pass
    may be that of a compiler, or of a rank without images.
    """
    count, spectral = layers == "count", optimizer == "spectral"
    if count and not spectral:
        if drawn and not (shape and len(shape) == 1):  # else shapes do not tell the roles
            return AGD(trained, gain=gain)
        return AGD(net, gain=gain, depth=max(1, sum(p.ndim > 1 for _, p in trained)))
    depth = agd.depth(net, sample(shape, trained[0][1].device))
    if not spectral:
        return AGD(net, gain=gain, depth=depth)
    if count:  # what else was read, the output layers, stays
        depth.update({name: 1.0 for name, p in trained if p.ndim > 1})
    return SpectralAGD(net, gain=gain, depth=depth, process_group=process_group)


def set_capturable(optimizer, yes, device):
    """Have a baseline count its steps on the device, as a CUDA graph needs it, or on the CPU; also
    after a state of the other kind was loaded."""
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = yes
        optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are, on purpose
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "step" in state:
                state["step"] = state["step"].to(device if yes else "cpu")
