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

# Environment variables that change how something is computed, and not where files are.
VARIABLES = re.compile(
    "(OMP|KMP|GOMP|MKL|ONEDNN|DNNL|OPENBLAS|CUBLAS|CUBLASLT|CUDNN|TORCHINDUCTOR|TRITON)_.*"
    "|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE|ATEN_CPU_CAPABILITY|AGD_NO_COMPILER"
    "|NCCL_(ALGO|PROTO|NTHREADS|MIN_NCHANNELS|MAX_NCHANNELS)"
)


def data_sha256(path, files=None):
    """{"sha256", "files", "bytes", "contents"} of images, wherever they lie. Raises OSError.

    The SHA-256 is that of the file `path`; or, for `files` below a folder `path`, of the name, size
    and content of each in the order of their names, without contents ("contents" is False) where
    these have more than CONTENTS bytes.
    """
    digest = hashlib.sha256()
    if files is None:
        named = [(b"", os.path.getsize(path), path)]
    else:
        named = sorted((os.fsencode(name), os.path.getsize(file), file)
                       for name, file in zip(names_below(path, files), files))  # fmt: skip
    total = sum(size for _, size, _ in named)
    contents = files is None or total <= CONTENTS
    for name, size, file in named:
        digest.update(b"" if files is None else b"%s\0%d\n" % (name, size))
        if contents:
            with open(file, "rb") as content:
                while part := content.read(2**20):
                    digest.update(part)
    return {"sha256": digest.hexdigest(), "files": len(named), "bytes": total,
            "contents": contents}  # fmt: skip


def names_below(path, files):
    """The names of `files` below the folder `path`, with slashes on every system."""
    root = os.path.join(path, "")  # a slice is quicker than relpath, for a million of names
    names = (x[len(root) :] if x.startswith(root) else os.path.relpath(x, path) for x in files)
    return (name.replace(os.sep, "/") for name in names)


def code(root=HERE):
    """{"sha256", "commit", "diff", "untracked"} of the program's own files that a run imports."""
    paths = [*root.glob("*.py"), *(x for name in PACKAGES for x in root.glob(f"{name}/**/*.py"))]
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\n".encode() + content)
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "--no-color", "--no-ext-diff", "HEAD")
    if diff is not None and len(diff) > DIFF:
        diff = diff[:DIFF] + f"\n[cut here: it has {len(diff)} bytes]\n".encode()
    names = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "*.py") or b""
    return {
        "sha256": digest.hexdigest(),
        "commit": commit and commit.decode().strip(),
        "diff": None if diff is None else diff.decode("utf-8", "replace"),
        "untracked": os.fsdecode(names).split("\0")[:-1],
    }


def _git(root, *words):
    """The output of git, in bytes, or None where there is no git or no checkout."""
    try:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, check=True, timeout=20,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None


def variables():
    """The environment variables that change how something is computed."""
    pairs = [(k, tilde(x)) for k, x in sorted(os.environ.items()) if VARIABLES.fullmatch(k)]
    return {key: value for key, value in pairs if os.sep not in value}


def versions(flags, device):
    """Versions of the software that computes with `flags`, a dict; no bit depends on the rest."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    names, cuda = {"numpy"}, device.type == "cuda"
    if flags["image_size"] is not None:  # folders of images alone have a size
        names |= {"torchvision", "PIL"}
    if flags["compile"] or cuda:
        names.add("triton")
    for module in (flags["arch"].rpartition(":")[0], flags["optimizer"].rpartition(".")[0]):
        names.add(module.split(".")[0])
    for name in sorted(names - {"", *versions}):
        versions[name] = getattr(sys.modules.get(name), "__version__", None)  # a user's own module
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version({"PIL": "pillow"}.get(name, name))
    if cuda:
        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
        with suppress(AttributeError, RuntimeError):
            versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with suppress(OSError, AttributeError):
            text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
            versions["driver"] = re.search(r"\d+\.\d+(\.\d+)?", text).group()
    return versions


def hardware(device, ranks=1):
    """The hardware of a rank: "vectors" are the instructions of torch's CPU kernels, "memory" is in
    bytes."""
    memory = None
    with suppress(AttributeError, ValueError, OSError):  # not on every system
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory,
        "ranks": ranks,
    }


def environment(device):
    """Versions, hardware and commit that a result was made with, in short."""
    commit, parts = _git(HERE, "rev-parse", "HEAD"), hardware(device)
    if commit is not None:
        modified = _git(HERE, "diff", "--quiet", "HEAD") is None
        commit = commit.decode().strip() + "-modified" * modified
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
        "device": str(device),
        "device_name": parts["device_name"] or parts["processor"],
        **{key: parts[key] for key in ("threads", "cores")},
        "commit": commit,
    }


def processor():
    """The processor's name, as far as the system has it."""
    name = None
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"(?m)^model name\s*:\s*(.*)", text)
    return name[1] if name else platform.processor() or platform.machine()


def tilde(value):
    """A flag's value, or a word --flag=value, with ~ for the path of the home directory."""
    if not isinstance(value, str):
        return value
    home = re.escape(os.path.expanduser("~").rstrip(os.sep))
    kinds, end = "(folder:|npz:|text:|tokens:)?", f"(?={re.escape(os.sep)}|$)"
    return re.sub(rf"^(--\w+=)?{kinds}{home}{end}", r"\1\2~", value) if home else value
