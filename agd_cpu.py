"""AGD's step on the CPU: compiled C, whatever the number of weights.

`agd.py` takes it where this file lies beside it. By itself:

    plan = Plan.of(weights, scales, L, gains)        # None where another step has to do it
    G, eta = plan.step(grads)                        # or None, as above

A step is four passes over memory: every gradient is read for its squares, then gradients and
weights are read and weights written. SOURCE is compiled at the first use, in a second, by the
system's C compiler ($CC, cc, gcc or clang), and kept in $XDG_CACHE_HOME/agd/kernels (~/.cache/...).
For Linux; AGD_NO_COMPILER=1 in the environment switches it off.

Every sum has a fixed order: the same result each time, with any number of threads.
"""

import bisect
import contextlib
import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import torch

__all__ = ["Plan", "trusted"]

CHUNK = 2**14  # weights that a thread takes at a time: they and their gradients fit its own cache
ALONE = 2**15  # weights up to which a second thread is not worth waking
WIDEST = 1024  # positions of a kernel, or weights of a period: as in SOURCE

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

/* Vectors as wide as the processor's: compilers make much less of wider ones. */
#if defined(__AVX512F__)
enum { LANES = 8 };
#define WIDENED(g) _mm512_cvtps_pd(_mm256_loadu_ps(g))
#elif defined(__AVX2__)
enum { LANES = 4 };
#define WIDENED(g) _mm256_cvtps_pd(_mm_loadu_ps(g))
#else
enum { LANES = 2 };
#define WIDENED(g) (doubles){(g)[0], (g)[1]}
#endif
enum { WIDEST = 1024, AHEAD = 2048 };
typedef double doubles __attribute__((vector_size(8 * LANES), may_alias));

/* A tensor is (outer, K, inner) in memory. Where inner is 1 it is cut into periods, multiples of K;
   else into runs of inner, each of one position. */
struct tensor { int64_t K, inner, period, first; };    /* first: its first matrix */
struct chunk { int64_t tensor, start, end, partial; }; /* partial: the place of its K sums */

struct plan {
    const struct tensor *tensors;
    const struct chunk *chunks;
    float *const *weights;
    const float *const *grads;
    const double *scales, *coefficients; /* of a matrix: s / L, and that times the gain */
    double *partials, *sums;
    float *factors;
    const int64_t *bounds; /* chunks bounds[i] to bounds[i + 1] are those of thread i */
    int64_t matrices, threads;
    double G, eta;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*thread)(void), (*team)(void);
};

/* Squares in double: none over- or underflows, and their sum is exact to float32's precision. A
   thread that only reads waits for memory, so that it asks for what is AHEAD. */
static void squares_of_a_run(const float *g, int64_t n, doubles *sum)
{
    doubles s[32 / LANES] = {*sum};
    for (; n >= 32; n -= 32, g += 32) {
        __builtin_prefetch(g + AHEAD);
        __builtin_prefetch(g + AHEAD + 16);
        for (int i = 0; i < 32 / LANES; i++) {
            doubles x = WIDENED(g + LANES * i);
            s[i] += x * x;
        }
    }
    for (int i = 1; i < 32 / LANES; i++)
        s[0] += s[i];
    for (int i = 0; n > 0; n--, g++, i = (i + 1) % LANES)
        s[0][i] += (double)*g * *g;
    *sum = s[0];
}

static void squares_of_periods(const float *g, int64_t n, int64_t period, double *sum)
{
    for (; n > 0; n -= period, g += period) {
        int64_t m = n < period ? n : period, j = 0;
        for (; j <= m - 16; j += 16) {
            __builtin_prefetch(g + AHEAD + j);
            for (int i = 0; i < 16; i += LANES) {
                doubles x = WIDENED(g + j + i);
                *(doubles *)(sum + j + i) += x * x;
            }
        }
        for (; j < m; j++)
            sum[j] += (double)g[j] * g[j];
    }
}

static void squares(const struct plan *p, const struct chunk *c)
{
    const struct tensor *t = p->tensors + c->tensor;
    const float *g = p->grads[c->tensor];
    double *out = p->partials + c->partial;
    if (t->inner == 1) {
        _Alignas(64) double sum[WIDEST] = {0};
        squares_of_periods(g + c->start, c->end - c->start, t->period, sum);
        for (int64_t k = 0; k < t->K; k++) {
            out[k] = 0;
            for (int64_t j = k; j < t->period; j += t->K)
                out[k] += sum[j];
        }
        return;
    }
    doubles sum[WIDEST];
    memset(sum, 0, t->K * sizeof *sum);
    for (int64_t i = c->start, end; i < c->end; i = end) {
        end = (i / t->inner + 1) * t->inner;
        end = end < c->end ? end : c->end;
        squares_of_a_run(g + i, end - i, sum + i / t->inner % t->K);
    }
    for (int64_t k = 0; k < t->K; k++) {
        out[k] = 0;
        for (int j = 0; j < LANES; j++)
            out[k] += sum[k][j];
    }
}

/* A factor of 0 leaves a weight as it was, bit for bit: -0 - -0 would be 0. */
static void update_periods(float *restrict w, const float *restrict g, int64_t n, int64_t period,
                           const float *restrict factors, int all_move)
{
    for (; n > 0; n -= period, w += period, g += period) {
        int64_t m = n < period ? n : period;
        if (all_move)
            for (int64_t j = 0; j < m; j++)
                w[j] -= factors[j] * g[j];
        else
            for (int64_t j = 0; j < m; j++)
                w[j] = factors[j] != 0 ? w[j] - factors[j] * g[j] : w[j];
    }
}

static void update(const struct plan *p, const struct chunk *c)
{
    const struct tensor *t = p->tensors + c->tensor;
    const float *g = p->grads[c->tensor], *factors = p->factors + t->first;
    float *w = p->weights[c->tensor];
    if (t->inner == 1) {
        float repeated[WIDEST];
        int all_move = 1;
        for (int64_t k = 0; k < t->K; k++) {
            all_move &= factors[k] != 0;
            for (int64_t j = k; j < t->period; j += t->K)
                repeated[j] = factors[k];
        }
        update_periods(w + c->start, g + c->start, c->end - c->start, t->period, repeated,
                       all_move);
        return;
    }
    for (int64_t i = c->start, end; i < c->end; i = end) {
        float factor = factors[i / t->inner % t->K];
        end = (i / t->inner + 1) * t->inner;
        end = end < c->end ? end : c->end;
        if (factor != 0)
            for (int64_t j = i; j < end; j++)
                w[j] -= factor * g[j];
    }
}

/* A team may be smaller than was asked for. */
static void all_squares(void *plan)
{
    const struct plan *p = plan;
    int team = p->threads > 1 ? p->team() : 1;
    for (int64_t i = p->threads > 1 ? p->thread() : 0; i < p->threads; i += team)
        for (int64_t c = p->bounds[i]; c < p->bounds[i + 1]; c++)
            squares(p, p->chunks + c);
}

static void all_updates(void *plan)
{
    const struct plan *p = plan;
    int team = p->threads > 1 ? p->team() : 1;
    for (int64_t i = p->threads > 1 ? p->thread() : 0; i < p->threads; i += team)
        for (int64_t c = p->bounds[i]; c < p->bounds[i + 1]; c++)
            update(p, p->chunks + c);
}

/* G, eta and the factors; 0 where one of them is out of float32's range. */
static int summarise(struct plan *p)
{
    memset(p->sums, 0, p->matrices * sizeof *p->sums);
    for (const struct chunk *c = p->chunks; c < p->chunks + p->bounds[p->threads]; c++)
        for (int64_t k = 0; k < p->tensors[c->tensor].K; k++)
            p->sums[p->tensors[c->tensor].first + k] += p->partials[c->partial + k];
    p->G = 0;
    for (int64_t i = 0; i < p->matrices; i++)
        p->G += p->scales[i] * sqrt(p->sums[i]);
    if (!isfinite(p->G))
        return 0;
    p->eta = log1p(p->G / (sqrt(p->G + 0.25) + 0.5));
    for (int64_t i = 0; i < p->matrices; i++) {
        int moves = p->sums[i] > 0 && p->coefficients[i] > 0;
        double factor = moves ? p->eta * p->coefficients[i] / sqrt(p->sums[i]) : 0;
        if (moves && !(factor > 0x1p-100 && factor < 0x1p100))
            return 0;
        p->factors[i] = (float)factor;
    }
    return 1;
}

static void together(struct plan *p, void (*work)(void *))
{
    if (p->threads > 1)
        p->parallel(work, p, p->threads, 0);
    else
        work(p);
}

/* 1, or 0 and no weight has changed. */
int step(struct plan *p)
{
    together(p, all_squares);
    if (!summarise(p))
        return 0;
    together(p, all_updates);
    return 1;
}
"""


class _Struct(ctypes.Structure):
    """struct plan of SOURCE."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("tensors", "chunks", "weights", "grads", "scales",
                                               "coefficients", "partials", "sums", "factors",
                                               "bounds")],
        ("matrices", ctypes.c_int64), ("threads", ctypes.c_int64),
        ("G", ctypes.c_double), ("eta", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("parallel", "thread", "team")],
    ]  # fmt: skip


class Plan:
    """What is the same at every step for one list of weights, for as long as they stay where they
    are. A weight (out, in, *kernel) lies in memory as (outer, positions, inner): positions is
    prod(kernel), outer * inner is out * in. Inner is 1 in a contiguous convolution and `in` in
    channels_last."""

    @classmethod
    def of(cls, weights, scales, L, gains):
        """The plan, or None where there is none: without a compiler or torch's own threads, for
        weights that are not float32 on the CPU, with gaps, in an order that is not (outer,
        positions, inner), or of more than WIDEST positions.

        Args:
            weights: tensors of shape (out, in, *kernel).
            scales: s of each, a number.
            L: number of layers that G and the update are divided by.
            gains: a number for each, not negative.
        """
        layouts = [_layout(w) for w in weights]
        if None in layouts or _library() is None:
            return None
        return cls(weights, layouts, scales, L, gains)

    def __init__(self, weights, layouts, scales, L, gains):
        library, parallel, thread, team = _library()
        self.run = library.step
        self.weights = [w.detach() for w in weights]  # which keep the storage
        self.forms = [(w.shape, w.stride()) for w in weights]
        tensors, chunks, starts, s, coefficients = [], [], [], [], []
        places, self.size = 0, 0
        for i, (w, (K, inner), scale, gain) in enumerate(zip(weights, layouts, scales, gains)):
            # Periods of some hundred weights, a multiple of 16, where one is short enough: loops
            # over them run on in whole vectors, and no sum is needed again before it is there.
            period = K * 16 * max(1, 32 // K) if K <= WIDEST // 16 else K
            tensors.append((K, inner, period, len(s)))
            n, length = w.numel(), CHUNK // period * period if inner == 1 else CHUNK
            for start in range(0, n, length):
                chunks.append((i, start, min(start + length, n), places))
                starts.append(self.size + start)
                places += K
            self.size += n
            s += [scale / L] * K
            coefficients += [scale * gain / L] * K
        self.starts = starts  # of the chunks, all tensors one after the other
        self.grads = (ctypes.c_int64 * len(weights))()
        wide, whole = torch.float64, torch.int64
        self.tables = {  # the device is said: there may be another default
            "tensors": torch.tensor(tensors, dtype=whole, device="cpu"),
            "chunks": torch.tensor(chunks, dtype=whole, device="cpu"),
            "weights": torch.tensor([w.data_ptr() for w in weights], dtype=whole, device="cpu"),
            "scales": torch.tensor(s, dtype=wide, device="cpu"),
            "coefficients": torch.tensor(coefficients, dtype=wide, device="cpu"),
            "partials": torch.empty(places, dtype=wide, device="cpu"),
            "sums": torch.empty(len(s), dtype=wide, device="cpu"),
            "factors": torch.empty(len(s), dtype=torch.float32, device="cpu"),
        }
        self.struct = _Struct(
            grads=ctypes.addressof(self.grads), matrices=len(s),
            parallel=parallel, thread=thread, team=team,
            **{name: x.data_ptr() for name, x in self.tables.items()},
        )  # fmt: skip
        self.address = ctypes.byref(self.struct)

    @torch.no_grad()
    def step(self, grads):
        """Update the weights, given a gradient for each, of its shape.

        Returns:
            (G, eta), new 0-dim float64 tensors; or None, and nothing was done: a gradient that is
            of another dtype or lies otherwise than its weight, that holds a NaN or an infinity, or
            an update whose factor float32 cannot hold.
        """
        for g, (shape, stride) in zip(grads, self.forms):
            if not _is_plain(g) or g.dtype is not torch.float32 or not g.is_cpu:
                return None
            if g.stride() != stride and not _same(shape, g.stride(), stride):
                return None
        self.grads[:] = [g.data_ptr() for g in grads]
        threads = torch.get_num_threads() if self.size > ALONE else 1
        if threads != self.struct.threads:
            self._share(threads)
        if not self.run(self.address):
            return None
        torch.autograd.graph.increment_version(self.weights)  # C writes past autograd
        found = self.struct.G, self.struct.eta
        return [torch.scalar_tensor(x, dtype=torch.float64, device="cpu") for x in found]

    def _share(self, threads):
        """Cut the chunks into as many parts of about the same number of weights."""
        ends = [bisect.bisect_left(self.starts, self.size * i / threads) for i in range(threads)]
        self.bounds = (ctypes.c_int64 * (threads + 1))(*ends, len(self.starts))
        self.struct.bounds, self.struct.threads = ctypes.addressof(self.bounds), threads


def _layout(w):
    """(positions, inner) of a weight as it lies in memory, or None. One position is a single run,
    with inner the number of weights."""
    if not (_is_plain(w) and w.is_cpu and w.dtype is torch.float32):
        return None
    K, inner, stride, kinds = math.prod(w.shape[2:]), 1, 1, []
    for i in sorted((i for i in range(w.ndim) if w.shape[i] > 1), key=w.stride):
        if w.stride(i) != stride:
            return None
        stride *= w.shape[i]
        if not kinds or kinds[-1] != (i > 1):  # from the innermost; True: a kernel's
            kinds.append(i > 1)
        if kinds == [False]:
            inner = stride
    if K > WIDEST or kinds.count(True) > 1:
        return None
    return (1, max(2, w.numel())) if K == 1 else (K, inner)


def _is_plain(x):
    """Whether a tensor is one of torch's own, dense, and nothing that wraps one."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout is torch.strided


def _same(shape, stride, other):
    """Whether strides are the same, but for those along sides of 1."""
    return all(n == 1 or a == b for n, a, b in zip(shape, stride, other))


TRUSTED, TRYING = [], threading.RLock()  # whether, once it is known; a thread at a time


def trusted(AGD):
    """Whether the compiled step agrees with the plain one of `AGD`, the optimiser of agd.py. Tried
    once in a process, on small weights; says so, once, where it does not."""
    with TRYING:
        if not TRUSTED:
            TRUSTED.append(_agree(AGD))
            if not TRUSTED[0]:
                warnings.warn("AGD does without its compiled step, as it disagrees with the plain "
                              "one", stacklevel=2)  # fmt: skip
        return TRUSTED[0]


def _agree(AGD):
    """Whether two steps of small weights of every layout come out as those of the plain step."""
    generator = torch.Generator().manual_seed(0)
    weights, twins = [], []
    for shape in [(260, 270), (24, 10, 3, 3), (24, 35, 3, 3)]:
        w, g = (torch.randn(shape, generator=generator, device="cpu") for _ in range(2))
        if shape[1] == 35:
            w, g = (x.to(memory_format=torch.channels_last) for x in (w, g))
        w.grad, twin = g, w.clone()
        twin.grad = g
        weights.append(w)
        twins.append(twin)
    optimizer = AGD(twins, fused=False)
    scales = [math.sqrt(w.shape[0] / w.shape[1] / math.prod(w.shape[2:])) for w in weights]
    plan = Plan.of(weights, scales, len(weights), [1.0] * len(weights))
    for _ in range(2):
        found = plan.step([w.grad for w in weights])
        if found is None:
            return False
        optimizer.step()
    pairs = [*zip(found, (optimizer.G, optimizer.eta)), *zip(weights, twins)]
    return all(((a - b).norm() / b.norm()).item() < 1e-5 for a, b in pairs)


def _library():
    """(the compiled library, addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads),
    or None where there is none."""
    return None if os.environ.get("AGD_NO_COMPILER", "0") not in ("", "0") else _built()


@functools.cache
def _built():
    if sys.platform != "linux":
        return None
    try:
        # The OpenMP that torch itself runs on, already loaded and found through torch: the threads
        # of a second one would wait, spinning, for the processors of the first.
        at = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        openmp = ctypes.CDLL(str(at), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        calls = [openmp.GOMP_parallel, openmp.omp_get_thread_num, openmp.omp_get_num_threads]
    except (OSError, AttributeError):
        return None
    library = _compiled()
    return library and (library, *[ctypes.cast(x, ctypes.c_void_p).value for x in calls])


def _compiled():
    """The library, compiled if it was not before, or None without a compiler that can do it."""
    # Not the very processor's own: machines may share what is kept.
    own = {
        "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma",
                   "-mprefer-vector-width=512"],
        "AVX2": ["-mavx2", "-mfma"],
    }.get(torch.backends.cpu.get_cpu_capability(), [])  # fmt: skip
    # FP operations may be done in vain, as a vector's are; NaN and infinity stay what they are.
    flags = ["-O3", "-std=c11", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno",
             "-fno-trapping-math", "-w", *own]  # fmt: skip
    for compiler in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(compiler)
        if not command or not shutil.which(command[0]):
            continue
        command = [*command, *flags, "-x", "c", "-", "-lm"]
        text = "\0".join([SOURCE, platform.machine(), shutil.which(command[0]), *command])
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
        try:
            with _directory() as directory:
                path = directory / name
                if not path.exists():
                    _compile(command, path)
                return ctypes.CDLL(str(path))  # stays where it is mapped, should the file go
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def _compile(command, path):
    handle, draft = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    try:
        subprocess.run([*command, "-o", draft], input=SOURCE.encode(), check=True, timeout=60,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        os.replace(draft, path)  # whole at once: other processes may be at it, too
    finally:
        Path(draft).unlink(missing_ok=True)


@contextlib.contextmanager
def _directory():
    """Where the library is kept: a directory that nobody else can write to, else a new one that is
    removed again."""
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        kept = Path(home) / "agd" / "kernels"
        kept.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = kept.stat()
        mine = found.st_uid == os.getuid() and not found.st_mode & 0o022
        if not mine or not os.access(kept, os.W_OK):
            kept = None
    except (OSError, RuntimeError):  # no home at all
        kept = None
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as new:
        yield Path(new)
