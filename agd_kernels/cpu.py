"""The sweeps of AGD's step for float32 weights in a CPU's memory: compiled C.

cpu.c is compiled at the first use, in a second, by the system's C compiler ($CC, cc, gcc or clang),
and kept in $XDG_CACHE_HOME/agd/kernels (~/.cache/...). Linux only. The threads are torch's own."""

import bisect
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cpu.c")
CHUNK = 2**14  # numbers that a thread takes at a time: they and their weights fit its own cache
ALONE = 2**15  # numbers up to which waking a second thread is not worth it
WIDEST = 1024  # blocks of a weight at most, as in cpu.c


class _Plan(ctypes.Structure):
    """struct plan of cpu.c: addresses and int64."""

    _fields_ = [(name, ctypes.c_int64) for name in (
        "tensors chunks targets directions partials factors bounds threads blocks updating "
        "parallel thread team").split()]  # fmt: skip


class Backend:
    @staticmethod
    def available(device):
        return _library() is not None

    @staticmethod
    def takes(weight, layout):
        return weight.dtype is torch.float32 and layout.dense[2] <= WIDEST

    def __init__(self, weights, layouts):
        self.compiled, *calls = _library()
        tensors, chunks, self.starts, blocks, places, self.size = [], [], [], 0, 0, 0
        for i, layout in enumerate(layouts):
            lead, outer, K, inner = layout.dense
            n = outer * K * inner
            if K == 1:
                inner = max(2, n)  # a single run
            # Periods of some hundred numbers, a multiple of 16, where K is small enough: loops over
            # whole vectors, where no addition waits for the one before.
            period = K * 16 * max(1, 32 // K) if K <= WIDEST // 16 else K
            length = CHUNK // period * period if inner == 1 else CHUNK
            for first in range(0, lead * n, n):
                for start in range(0, n, length):
                    end = min(start + length, n)
                    chunks.append((len(tensors), start, end, places))
                    self.starts.append(self.size + start)  # as if the tensors followed each other
                    places += K
                tensors.append((i, first, K, inner, period, blocks))
                self.size += n
                blocks += K
        self.tables = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (tensors, chunks)]
        self.tables.append(torch.empty(places, dtype=torch.float64, device="cpu"))
        self.targets, self.directions = ((ctypes.c_int64 * len(layouts))() for _ in range(2))
        lists = [ctypes.addressof(x) for x in (self.targets, self.directions)]
        tables = [x.data_ptr() for x in self.tables]
        self.plan = _Plan(*tables[:2], *lists, tables[2], 0, 0, 0, blocks, 0, *calls)

    def norms(self, tensors):
        """As TorchBackend.norms."""
        self._prepare(tensors)
        out = self.tables[2].new_empty(self.plan.blocks)
        self.compiled.norms(ctypes.byref(self.plan), ctypes.c_void_p(out.data_ptr()))
        return out

    def middle(self, scales, norms):
        """As TorchBackend.middle, of one part."""
        G, eta, factors = (norms[0].new_empty(n) for n in ((), (), self.plan.blocks))
        tensors = [ctypes.c_void_p(x.data_ptr()) for x in (*scales, *norms, G, eta, factors)]
        self.compiled.middle(ctypes.c_int64(self.plan.blocks), *tensors)
        return G, eta, [factors]

    def subtract(self, targets, directions, factors):
        """As TorchBackend.subtract."""
        self._prepare(directions)
        self.targets[:] = [x.data_ptr() for x in targets]
        self.plan.factors = factors.data_ptr()
        self.compiled.subtract(ctypes.byref(self.plan))
        torch.autograd.graph.increment_version(targets)  # C writes past autograd

    def _prepare(self, directions):
        """Point to the directions, and cut the chunks into a part of equal size a thread."""
        self.directions[:] = [x.data_ptr() for x in directions]
        threads = torch.get_num_threads() if self.size > ALONE else 1
        if threads != self.plan.threads:
            ends = [bisect.bisect_left(self.starts, self.size * i / threads)
                    for i in range(threads)]  # fmt: skip
            self.bounds = (ctypes.c_int64 * (threads + 1))(*ends, len(self.starts))
            self.plan.bounds, self.plan.threads = ctypes.addressof(self.bounds), threads


@functools.cache
def _library():
    """(the compiled library, addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads),
    or None without a compiler or without torch's OpenMP."""
    if sys.platform != "linux":
        return None
    try:
        # The OpenMP that torch has loaded: the threads of a second one would spin, waiting for the
        # processors of the first.
        torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        openmp = ctypes.CDLL(str(torch_cpu), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        calls = [openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads]
    except (OSError, AttributeError):
        return None
    library = _compiled()
    return library and (library, *[ctypes.cast(x, ctypes.c_void_p).value for x in calls])


def _compiled():
    """The library, from the cache or compiled now; None without a compiler that can do it."""
    own = {  # no -march=native: machines may share a cache
        "AVX512": "-mavx512f -mavx512dq -mavx512vl -mavx512bw -mfma -mprefer-vector-width=512",
        "AVX2": "-mavx2 -mfma",
    }.get(torch.backends.cpu.get_cpu_capability(), "")
    # Vector code may compute values that nothing uses; NaN and infinity stay what they are.
    flags = "-O3 -std=c11 -shared -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math -w"
    for compiler in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(compiler)
        if not command or not shutil.which(command[0]):
            continue
        command += [*flags.split(), *own.split(), str(SOURCE), "-lm"]
        try:
            source = SOURCE.read_text(encoding="utf-8")
            text = [source, platform.machine(), shutil.which(command[0]), *command]
            name = f"{hashlib.sha256(chr(0).join(text).encode()).hexdigest()[:24]}.so"
            with _directory() as directory:
                path = Path(directory, name)
                if not path.exists():
                    _compile(command, path)
                return ctypes.CDLL(str(path))  # stays mapped when the file is removed
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _compile(command, path):
    handle, draft = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    try:
        subprocess.run([*command, "-o", draft], check=True, timeout=60, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.replace(draft, path)  # whole at once: other processes may open it at any time
    finally:
        Path(draft).unlink(missing_ok=True)


def _directory():
    """A context of the cache, if nobody else can write to it, or of a temporary directory."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        (kept := home / "agd" / "kernels").mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = kept.stat()
        if stat.st_uid == os.getuid() and not stat.st_mode & 0o022 and os.access(kept, os.W_OK):
            return contextlib.nullcontext(kept)
    except (OSError, RuntimeError):  # no home at all
        pass
    return tempfile.TemporaryDirectory()
