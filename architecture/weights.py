"""What a network starts from: weights of a file, and which parameters stay as they are."""

import difflib
import fnmatch
import pickle

import torch

from architecture.libraries import Unfit

SUFFIXES = (".safetensors", ".pt", ".pth")
WITHIN = ("net", "state_dict", "model")  # what checkpoints call the weights; the first is ours


def start(net, weights=None, frozen=None):
    """Load the file `weights` into `net`, and freeze the parameters that `frozen` names, patterns
    separated by commas; returns sentences about what was loaded. Raises Unfit."""
    said = [] if weights is None else load_weights(net, weights)
    if frozen is not None:
        freeze(net, frozen.split(","))
    return said


def freeze(net, patterns):
    """Have the parameters whose names match one of `patterns`, as a shell's, stay as they are.

    Raises Unfit for a pattern that matches none, and where nothing is left to train.
    """
    parameters = dict(net.named_parameters())
    for pattern in patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            near = difflib.get_close_matches(pattern, parameters, n=3, cutoff=0.3)
            near = f"near it are {', '.join(near)}" if near else f"there are {_some(parameters)}"
            raise Unfit(f"--freeze {pattern} matches no parameter; {near}")
        for name in found:
            parameters[name].requires_grad_(False)
    if not any(p.requires_grad for p in parameters.values()):
        raise Unfit(f"--freeze {','.join(patterns)} leaves no parameter to train")


def load_weights(net, path):
    """Put the tensors of a file into `net`, those whose name and shape fit; returns sentences that
    say how many did and which did not.

    path: .safetensors, or .pt or .pth, a state dict or a checkpoint that holds one; nothing in it
    is run. Tensors of another shape, as a head for other classes, are left as they are in `net`.
    Raises Unfit where the file cannot be read, or no parameter fits.
    """
    there, now = _read(path), net.state_dict()
    parameters = dict(net.named_parameters())
    other = [name for name in now if name in there and there[name].shape != now[name].shape]
    fitting = {name: there[name] for name in now if name in there and name not in other}
    if not parameters.keys() & fitting.keys():
        raise Unfit(f"nothing in {path} fits the network: it has {_some(there)}, and the network "
                    f"{_some(parameters)}")  # fmt: skip
    for name, x in fitting.items():
        if not x.isfinite().all():
            raise Unfit(f"{path} has numbers that are not finite in {name}")
    net.load_state_dict(fitting, strict=False)
    said = [f"{len(fitting)} of {len(now)} tensors are those of {path}"]
    if other:
        said.append(f"of another shape there, and drawn anew: {_some(other)}")
    missing, unexpected = now.keys() - there.keys(), there.keys() - now.keys()
    if missing:
        said.append(f"not there, and drawn anew: {_some(x for x in now if x in missing)}")
    if unexpected:
        said.append(f"not in the network: {_some(x for x in there if x in unexpected)}")
    return said


def _read(path):
    """The tensors of a file, by name."""
    try:
        if str(path).endswith(".safetensors"):
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise Unfit(f"{path} takes the package safetensors to read ({error}): pip install "
                            "safetensors") from error  # fmt: skip
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (Unfit, MemoryError):
        raise
    except pickle.UnpicklingError as error:  # torch's message is how to load it all the same
        raise Unfit(f"{path} holds other things than weights, or is damaged") from error
    except Exception as error:  # both packages raise whatever they come upon
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unfit(f"{path} cannot be read: {lines[0]}") from error
    for key in WITHIN:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = content.items() if isinstance(content, dict) else ()
    tensors = {name: x for name, x in tensors if isinstance(x, torch.Tensor)}
    if not tensors:
        raise Unfit(f"{path} holds no weights by name")
    if all(name.startswith("module.") for name in tensors):  # saved of a DistributedDataParallel
        tensors = {name.removeprefix("module."): x for name, x in tensors.items()}
    return tensors


def _some(names, most=4):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
