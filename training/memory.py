"""Memory: what is free on a device or to this process, and how much of it torch has missed."""

import math
import re
from contextlib import suppress
from pathlib import Path

import torch

from cli import size

NO_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED",
    "unable to find an engine",  # cuDNN, where no algorithm's workspace fits
)  # fmt: skip


def is_out_of_memory(error):
    """Whether a RuntimeError of torch says that a device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in NO_MEMORY)


# How torch tells what it wanted: on a CPU, and on a GPU.
WANTED = re.compile(r"tried to allocate (\d+) bytes|Tried to allocate ([\d.]+) ([KMGT]?i?B)")
GPU = re.compile(r"total capacity of ([\d.]+) ([KMGT]?i?B) of which ([\d.]+) ([KMGT]?i?B) is free")


def shortage(error):
    """": 8.0 GB more were asked for, and 2.0 GB of 80 GB are free", as far as an out-of-memory
    error of torch tells."""
    wanted, gpu = WANTED.search(str(error)), GPU.search(str(error))
    if wanted is None:
        return ""
    asked = int(wanted[1]) if wanted[1] else _bytes(*wanted.group(2, 3))
    left = bytes_free(torch.device("cpu"))
    left = size(left) if left < math.inf else ""
    if gpu is not None:
        left = f"{size(_bytes(*gpu.group(3, 4)))} of {size(_bytes(*gpu.group(1, 2)))}"
    return f": {size(asked)} more were asked for" + (f", and {left} are free" if left else "")


def does_not_fit(error, net=None):
    """The sentence for torch's out-of-memory error while a network was made; `net`: the network,
    on the meta device too."""
    if net is None:
        return f"the network does not fit into memory{shortage(error)}"
    weights = size(sum(p.numel() * p.element_size() for p in net.parameters()))
    return f"the network does not fit into memory: its weights are {weights}" + (
        shortage(error).replace(":", ";", 1)
    )


def _bytes(number, unit):
    return float(number) * 1024 ** "BKMGT".index(unit[0])


def bytes_free(device, root="/sys/fs/cgroup", groups="/proc/self/cgroup"):
    """Bytes free on a GPU, or to all the processes of this machine, container or job; math.inf
    where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [math.inf]
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        known = dict(line.split(":") for line in lines)
        free.append(int(known["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError):
        for group in Path(groups).read_text(encoding="utf-8").splitlines():
            free += _left_by(*group.split(":", 2), Path(root))
    return min(free)


def _left_by(number, kinds, path, root):
    """Bytes that a control group of this process and those above it leave it, as SLURM and
    containers set them, in their second version and in their first; the cache of files is free."""
    top, names = root, ("memory.max", "memory.current", "inactive_file")
    if number != "0":
        top = root / "memory"
        names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    at = Path(top, path.strip("/"))
    while (number == "0" or "memory" in kinds.split(",")) and (at == top or top in at.parents):
        with suppress(OSError, ValueError):  # no group here, or no limit: "max"
            limit, used = (int((at / name).read_text(encoding="utf-8")) for name in names[:2])
            lines = (at / "memory.stat").read_text(encoding="utf-8").splitlines()
            yield limit - used + int(dict(map(str.split, lines)).get(names[2], 0))
        at = at.parent
