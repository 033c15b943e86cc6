"""An Apple GPU that isn't there: tensors that say they are on mps, whose numbers a CPU holds, and
that refuse what such a GPU refuses."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

MPS = torch.device("mps")
# Operations that take tensors of several devices, or indices of another one.
BETWEEN = {"copy_", "_to_copy", "index", "index_put_", "_foreach_copy_"}


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` has its numbers."""

    device = MPS

    @staticmethod
    def __new__(cls, inner):
        return cls._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype,
            device="cpu", requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"OnDevice({self.inner!r})"

    def tolist(self):
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Moves between devices, which torch's own code takes for moves within the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cpu:
            return moved(args[0], torch.device("cpu"), None)
        if function is torch.Tensor.to:
            x, *rest = args
            if rest and isinstance(rest[0], torch.Tensor):
                return moved(x, rest[0].device, rest[0].dtype)
            copy = kwargs.pop("copy", False)
            device, dtype, _, form = torch._C._nn._parse_to(*rest, **kwargs)
            return moved(x, device, dtype, form, copy)
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = torch.device(kwargs.pop("device"))
            return moved(function(*args, **kwargs), device, None)
        return function(*args, **kwargs)


def moved(x, device, dtype, form=None, copy=False):
    device, dtype = device or x.device, dtype or x.dtype
    if x.device.type == device.type and x.dtype == dtype and form is None and not copy:
        return x
    return torch.ops.aten._to_copy(x, device=device, dtype=dtype, memory_format=form)


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return computed(function, args, kwargs or {})


@contextlib.contextmanager
def pretended_mps():
    """A context in which device="mps" is an OnDevice."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # net.to(): other parameters
    try:
        with Calls(), Operations():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def computed(function, args, kwargs):
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = {id(x.inner): x for x in given if isinstance(x, OnDevice)}
    device = kwargs.get("device")
    name = function.overloadpacket.__name__
    if ours and name not in BETWEEN:
        if odd := [x for x in given if not isinstance(x, OnDevice) and x.ndim]:
            raise RuntimeError(f"{name}: tensors on cpu and mps: {[tuple(x.shape) for x in odd]}")
    here = bool(ours) if device is None else torch.device(device).type == "mps"
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnDevice) else x, (args, kwargs))
    if name == "copy_" and given:  # to the device of the first
        here = isinstance(given[0], OnDevice)

    def wrapped(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnDevice):
            return x
        if id(x) in ours:
            return ours[id(x)]
        if x.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{name}: mps has no {x.dtype}")
        return OnDevice(x)

    with torch.inference_mode(False), torch.no_grad():
        result = function(*args, **kwargs)
        return tree_map(wrapped, result) if here else result
