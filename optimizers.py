"""The optimisers, by name: AGD, the baselines of the paper, and any other class of torch's form."""

import importlib
import inspect

import torch

import flags
from agd import AGD, init_weights

# The first call of some methods that AGD inherits imports torch's compiler, only to say that they
# are not to be compiled: more than a second of every start. They run as they are instead.
for method in vars(torch.optim.Optimizer).values():
    if hasattr(method, "__wrapped__"):
        method.__wrapped__.__dynamo_disable = method.__wrapped__

BASELINES = {"adam": (torch.optim.Adam, 1e-3), "sgd": (torch.optim.SGD, 0.1)}  # and default rates


def make_optimizer(args, net, draw=True):
    """The optimiser; for AGD the weights are drawn anew, if any are: baselines keep PyTorch's."""
    if args.optimizer == "agd":
        if draw:
            init_weights(net.named_parameters(), torch.Generator().manual_seed(args.seed))
        return AGD(net.named_parameters(), gain=args.gain)
    if args.optimizer in BASELINES:
        return BASELINES[args.optimizer][0](net.parameters(), lr=args.lr)
    rate = {} if args.lr is None else {"lr": args.lr}
    return optimizer_class(args.optimizer)(net.parameters(), **rate)


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
    if found is AGD:
        raise ValueError("--optimizer agd is AGD, with its own initialisation")
    return found
