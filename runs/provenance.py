"""What a result is made with: data, code, versions, hardware."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent.parent
# which a run imports, beside the files at the root
PACKAGES = ("agd_kernels", "architecture", "data", "distributed", "runs", "training")
DIFF = 2**18  # bytes of a diff that are kept
CONTENTS = 2**30  # bytes of images up to which their contents are read

# Variables that change how something is computed, and not where something lies.
VARIABLES = re.compile(
    "(OMP|KMP|GOMP|MKL|ONEDNN|DNNL|OPENBLAS|CUBLAS|CUBLASLT|CUDNN|TORCHINDUCTOR|TRITON)_.*"
    "|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|ATEN_CPU_CAPABILITY|AGD_NO_COMPILER"
    "|NCCL_(ALGO|PROTO|NTHREADS|MIN_NCHANNELS|MAX_NCHANNELS)"
)


def data_sha256(path, files=None):
    """What identifies the images: the SHA-256 of the file `path`; or, of `files` below a folder
    `path`, that of each one's name, size and content in the order of their names, and without the
    contents where there are more than CONTENTS bytes of them. Raises OSError."""
    found = hashlib.sha256()
    if files is None:
        _add(found, path)
        return {"sha256": found.hexdigest(), "files": 1, "bytes": os.path.getsize(path),
                "contents": True}  # fmt: skip
    root = os.path.join(path, "")
    names = [x[len(root) :] if x.startswith(root) else os.path.relpath(x, path) for x in files]
    names = [os.fsencode(name.replace(os.sep, "/")) for name in names]
    files = sorted((name, os.path.getsize(file), file) for name, file in zip(names, files))
    total = sum(size for _, size, _ in files)
    for name, size, file in files:
        found.update(b"%s\0%d\n" % (name, size))
        if total <= CONTENTS:
            _add(found, file)
    return {"sha256": found.hexdigest(), "files": len(files), "bytes": total,
            "contents": total <= CONTENTS}  # fmt: skip


def _add(found, path):
    with open(path, "rb") as file:
        while part := file.read(2**20):
            found.update(part)


def code(root=HERE):
    """The program's own files that a run imports, and where they come from."""
    paths = [*root.glob("*.py"), *(x for name in PACKAGES for x in root.glob(f"{name}/**/*.py"))]
    found = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        content = path.read_bytes()
        found.update(f"{name}\0{len(content)}\n".encode() + content)
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "--no-color", "--no-ext-diff", "HEAD")
    if diff is not None and len(diff) > DIFF:
        diff = diff[:DIFF] + f"\n[cut here: it has {len(diff)} bytes]\n".encode()
    names = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "*.py") or b""
    return {
        "sha256": found.hexdigest(),
        "commit": commit and commit.decode().strip(),
        "diff": None if diff is None else diff.decode("utf-8", "replace"),
        "untracked": os.fsdecode(names).split("\0")[:-1],
    }


def _git(root, *words):
    """What git answers, in bytes, or None where there is no git or no checkout."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=True, timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def variables():
    """The variables of the environment that change how something is computed."""
    found = sorted(os.environ.items())
    found = [(key, tilde(value)) for key, value in found if VARIABLES.fullmatch(key)]
    return {key: value for key, value in found if os.sep not in value}


def versions(args, device):
    """Versions of what computes: of the rest of what is installed, no bit depends."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    packages = {"numpy": "numpy"}
    if args.dataset == "imagenet" or args.dataset.startswith("folder:"):
        packages |= {"torchvision": "torchvision", "PIL": "pillow"}
    library = args.arch.partition(":")[0]
    if library != args.arch:
        packages[library] = library
    if args.compile or device.type == "cuda":
        packages["triton"] = "triton"
    if "." in args.optimizer:
        packages.setdefault(*2 * [args.optimizer.split(".")[0]])
    for name, package in packages.items():
        try:
            found.setdefault(name, metadata.version(package))
        except metadata.PackageNotFoundError:  # a module of the user's own may have none
            found[name] = getattr(sys.modules.get(name), "__version__", None)
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
        with suppress(AttributeError, RuntimeError):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with suppress(OSError, AttributeError):
            text = Path("/proc/driver/nvidia/version").read_text()
            found["driver"] = re.search(r"\d+\.\d+(\.\d+)?", text).group()
    return found


def hardware(device, ranks=1):
    """What a rank runs on; "vectors" are the instructions that torch's CPU kernels use, "memory" is
    the machine's, in bytes."""
    memory = None
    with suppress(AttributeError, ValueError, OSError):  # not on every system
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": device.type,
        "device_name": name,
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "ranks": ranks,
    }


def environment(device):
    """Versions, hardware and commit that a result was made with, in a few words."""
    commit = _git(HERE, "rev-parse", "HEAD")
    if commit is not None:
        changed = _git(HERE, "diff", "--quiet", "HEAD") is None
        commit = commit.decode().strip() + "-modified" * changed
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": commit,
    }


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except (OSError, IndexError):
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def tilde(value):
    """A flag's value, or a word --flag=value, in which the path of the home directory is ~."""
    if not isinstance(value, str):
        return value
    home = re.escape(os.path.expanduser("~").rstrip(os.sep))
    return re.sub(rf"^(--\w+=)?(folder:|npz:)?{home}(?=/|$)", r"\1\2~", value) if home else value
