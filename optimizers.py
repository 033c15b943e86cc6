"""The optimisers, by name: of agd.py, baselines, and any other class of torch's form."""

import importlib
import inspect

import torch

import agd
import flags
from agd import AGD, SpectralAGD, init_weights
from architecture import is_library

# The first call of some methods that AGD inherits imports torch's compiler, only to say that they
# are not to be compiled: more than a second of every start. They run as they are instead.
for method in vars(torch.optim.Optimizer).values():
    if hasattr(method, "__wrapped__"):
        method.__wrapped__.__dynamo_disable = method.__wrapped__

AUTOMATIC = {"agd": AGD, "spectral": SpectralAGD}  # they have no learning rate, and `gain`
BASELINES = {"adam": (torch.optim.Adam, 1e-3), "sgd": (torch.optim.SGD, 0.1)}  # and default rates


def make_optimizer(args, net, shape=None, draw=True, process_group=None):
    """The optimiser of what is not frozen, of a network for images of `shape`. For AUTOMATIC ones
    the weights of the paper's networks are drawn anew, if any are; those of a file, of libraries,
    and of baselines stay as they are. Ranks of a `process_group` share the work of a step."""
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    if args.optimizer in AUTOMATIC:
        return automatic(args, net, trained, shape, draw, process_group)
    parameters = [p for _, p in trained]
    if args.optimizer in BASELINES:
        return BASELINES[args.optimizer][0](parameters, lr=args.lr)
    rate = {} if args.lr is None else {"lr": args.lr}
    return optimizer_class(args.optimizer)(parameters, **rate)


def automatic(args, net, trained, shape, draw, process_group=None):
    """One of AUTOMATIC, of `trained`, the (name, parameter) pairs of `net` that are not frozen.

    Weights that are drawn here have the sizes of the method's table; AGD measures those of others,
    and the spectral rule all. The paths through the network are read here: its first forward pass
    may be that of a compiler, or of a rank without images.
    """
    drawn = not is_library(args.arch) and args.weights is None
    count = flags.layers(args) == "count"
    if drawn and draw:
        init_weights(net.named_parameters(), torch.Generator().manual_seed(args.seed))
    spectral = args.optimizer == "spectral"
    if drawn and count and not spectral:
        return AGD(trained, gain=args.gain)
    if count and not spectral:
        return AGD(net, gain=args.gain, depth=max(1, sum(p.ndim > 1 for _, p in trained)))
    depth = agd.depth(net, torch.zeros(2, *shape, device=trained[0][1].device))
    if not spectral:
        return AGD(net, gain=args.gain, depth=depth)
    if count:  # what else was read, the output layers, stays
        depth.update({name: 1.0 for name, p in trained if p.ndim > 1})
    return SpectralAGD(net, gain=args.gain, depth=depth, process_group=process_group)


def set_capturable(optimizer, yes, device):
    """Have a baseline count its steps where a CUDA graph can, or where any device can: after a
    state was loaded, which may be of the other kind."""
    for group in optimizer.param_groups:
        if "capturable" not in group:
            continue
        group["capturable"] = yes
        optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are, on purpose
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "step" in state:
                state["step"] = state["step"].to(device if yes else "cpu")


def optimizer_class(dotted):
    """The optimiser that package.Class names; ValueError, with what is wrong, where it is none."""
    module, _, name = dotted.rpartition(".")
    try:
        package = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(f"no optimiser {dotted}: {error}") from error
    found = getattr(package, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        near = flags.near(name, [x for x in dir(package) if x[:1].isupper()])
        raise ValueError(f"{dotted} is no optimiser{near}")
    _, *takes = inspect.signature(found.step).parameters.values()
    if any(x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD for x in takes):
        raise ValueError(f"{dotted} wants to make several passes a step, and gets one")
    for own, rule in AUTOMATIC.items():
        if found is rule:
            raise ValueError(f"--optimizer {own} is {name}, with its own initialisation")
    return found
