"""Compiled backends of AGD: C for a CPU, Triton for CUDA GPUs. Each has the two sweeps of agd.py's
TorchBackend, and has to agree with it before it is used."""

import importlib
import os
import threading
import warnings

import torch

MODULES = {"cpu": "cpu", "cuda": "cuda"}  # by type of device
TOLERANCE = 1e-5  # relative, of float32
TRUSTED, TRYING = {}, threading.RLock()  # by device; one thread at a time


def backend(device, reference, layout, rule):
    """The backend class of a torch.device, or None: without a compiler, with AGD_NO_COMPILER set,
    or where it disagrees with `reference`. They are compared once in a process; a failure warns.
    `reference`, `layout` and `rule` are TorchBackend, Layout and Rule of agd.py."""
    if os.environ.get("AGD_NO_COMPILER", "0") not in ("", "0") or device.type not in MODULES:
        return None
    kind = importlib.import_module(f".{MODULES[device.type]}", __name__).Backend
    with TRYING:
        if device not in TRUSTED:
            TRUSTED[device] = kind.available(device) and _agrees(
                kind, device, reference, layout, rule)  # fmt: skip
    return kind if TRUSTED[device] else None


def _agrees(kind, device, *reference):
    try:
        worst = disagreement(kind, device, *reference)
        if worst < TOLERANCE:
            return True
        reason = f"they disagree with torch's operations by {worst:.1e}"
    except Exception as error:  # no compiler, an unknown GPU: whatever Triton raises
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"AGD does without its kernels on {device}: {reason}", stacklevel=2)
    return False


def disagreement(kind, device, reference, layout, rule):
    """The largest relative difference of all that a backend computes from the reference's, for
    small weights of every layout. Reads the device."""
    generator, weights, grads = torch.Generator().manual_seed(0), [], []
    rules = {(260, 270): rule("matrix"), (24, 10, 3, 3): rule("kernel"), (70, 50): rule("rows"),
             (24, 35, 3, 3): rule("kernel"), (24, 5, 3, 3): rule("kernel", 4),
             (16, 90): rule("stacked", 3, True), (30,): rule("bias")}  # fmt: skip
    for shape in rules:
        for out in (weights, grads):
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            form = torch.channels_last if shape == (24, 35, 3, 3) else torch.contiguous_format
            out.append(x.to(device, memory_format=form))
    twins, results = [w.clone() for w in weights], []
    for backend_class, targets in ((kind, weights), (reference, twins)):
        sweeps = backend_class(targets, [layout(w, x) for w, x in zip(targets, rules.values())])
        norms = sweeps.norms(grads)
        G, eta, (factors,) = sweeps.middle([norms], [norms])
        sweeps.subtract(targets, grads, factors)
        results.append([norms, G, eta, factors, *targets])
    differences = [((a - b).norm() / b.norm()).double() for a, b in zip(*results)]
    return torch.stack(differences).max().item()
