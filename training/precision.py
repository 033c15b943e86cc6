"""How a network computes: in what precision, with what layout of its weights in memory, and whether
with the same bits each time."""

import os

import torch

from cli import UserError


class NotDeterministic(UserError):
    """An operation has no form that gives the same bits each time; the message names it."""

    exit_code = 1


def set_precision(net, precision, device):
    """Have `net` compute in a precision; weights, outputs (float32) and names stay as they are.

    fp32 is the paper's, on GPUs too, where torch would take TF32 for convolutions. tf32 lets GPUs
    multiply with 10 bits of mantissa and add in float32. Both are switches of the process. bf16
    multiplies in bfloat16, under autocast.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "bf16":
        forward = net.forward

        def in_bf16(x):
            # Each weight is cast once a pass: there is nothing to cache, and the cache is shared.
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                outputs = forward(x)
            return outputs.float()

        net.forward = in_bf16


def lacks_tf32(device):
    """Whether a device has no TF32."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) < (8, 0)


def set_channels_last(net, wanted, precision, device):
    """Lay convolutions' weights out with channels last, if `wanted`; returns whether they are.

    "auto" is on for a GPU in tf32 or bf16, and off elsewhere: in fp32 a GPU's kernels are slower,
    and a CPU gains only 3 to 6 %.
    """
    if not any(p.ndim == 4 for p in net.parameters()):
        return False
    if wanted == "auto":
        wanted = "on" if device.type == "cuda" and precision != "fp32" else "off"
    if wanted == "on":
        net.to(memory_format=torch.channels_last)
    return wanted == "on"


def set_deterministic():
    """Have every operation give the same bits each time, or raise an error that `refused` knows: a
    switch of the process. Call it before the process multiplies on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one a stream, kept for it
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory that was not written, so it need not be filled first.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def refused(error):
    """The NotDeterministic for torch's error of an operation without deterministic form, or None
    for another error."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    if "torch.use_deterministic_algorithms(True)" not in text:
        return None
    if "CUBLAS_WORKSPACE_CONFIG" in text:
        return NotDeterministic(
            "--deterministic needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8 before CUDA starts, "
            f"and here it is {os.environ.get('CUBLAS_WORKSPACE_CONFIG')!r}"
        )
    operation = text.split()[0]
    return NotDeterministic(f"{operation} has no deterministic form; leave out --deterministic")
