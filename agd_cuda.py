"""AGD's step on a GPU: a handful of Triton kernels, whatever the number of weights.

`agd.py` takes them where this file lies beside it. By themselves:

    plan = Plan.of(weights, scales, L, groups)       # None where the plain path has to do it
    G, eta = plan.step(grads, gains, skipped)        # or None, as above

A step reads every gradient twice, every weight once, and writes every weight once:

    upload      addresses and gains that have changed since the last step, as kernel arguments
    squares     norms of tiles of the gradients, one launch for each (dtype, layout, kernel size)
    norms       from those the norm of every matrix
    summarise   G, eta, the count of skipped steps, two factors for every matrix
    update      the weights, in the tiles and launches of `squares`

Every sum has a fixed order: no atomics, the same result each time. Nothing waits for the device.
"""

import contextlib
import functools
import math
import os
import struct
import threading
import warnings
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Plan", "trusted"]

UPLOAD = 16  # table entries that one launch of `upload` writes
FIELDS = 7  # of a tile: tensor, start, matrix, place of its partial norm, rows, columns, stride
CHUNK = 1024  # matrices, or partial norms, that a program of `norms` or `summarise` takes at a time


class Plan:
    """What is the same at every step for one list of weights, in tables on their device.

    A weight (out, in, *kernel) lies in memory as (outer, positions, inner): positions is
    prod(kernel), outer * inner is out * in. Inner is 1 in a contiguous convolution and `in` in
    channels_last. Memory is cut into tiles (rows, columns), a program each, in one of two ways:

        flat    rows follow each other without a gap and are `width` long, a multiple of the number
                of positions: a column is of one position. For one position, or inner = 1.
        runs    a tile is of one position: rows are (parts of) runs of `inner`, `stride` apart.
    """

    @classmethod
    def of(cls, weights, scales, L, groups):
        """The plan, or None where there is none: without Triton or on a GPU that it does not know,
        while a CUDA graph is captured, for weights with gaps or in an order that is not
        (outer, positions, inner).

        Args:
            weights: tensors of one device, of shape (out, in, *kernel).
            scales: s of each, a number.
            L: number of layers that G and the update are divided by.
            groups: for each weight the index of its gain in what `step` is given.
        """
        layouts = [_layout(w) for w in weights]
        device = weights[0].device
        if None in layouts or _capturing(device) or _kernels() is None:
            return None
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return None
        return cls(weights, layouts, scales, L, groups)

    def __init__(self, weights, layouts, scales, L, groups):
        self.weights, self.L, self.groups = list(weights), L, list(groups)
        self.device = self.weights[0].device
        self.key = [_key(w) for w in self.weights]
        tiles, segments, matrix_scales = {}, [], []
        self.partials = 0
        for tensor, (w, layout, scale) in enumerate(zip(self.weights, layouts, scales)):
            way, cut, parts = _cut(layout, w.dtype.itemsize)
            cut[:, 0] = tensor
            cut[:, 2] += len(segments)
            cut[:, 3] += self.partials
            tiles.setdefault((w.dtype, way), []).append(cut)
            slot = 2 * len(self.weights) + self.groups[tensor]  # of the gain in the table
            segments += [(self.partials + start, *rest, slot) for start, *rest in parts]
            matrix_scales += [scale] * len(parts)
            self.partials += len(cut) * (way.width if way.positions > 1 else 1)
        self.matrices = len(segments)
        # Copies that do not wait for the device.
        self.launches = [
            (torch.cat(cuts).to(self.device, non_blocking=True), _options(*kind))
            for kind, cuts in tiles.items()
        ]
        self.segments = torch.tensor(segments).to(self.device, non_blocking=True)
        scales = torch.tensor(matrix_scales, dtype=torch.float64)
        self.scales = scales.to(self.device, non_blocking=True)
        self.table, self.uploaded = None, []

    def fits(self, weights):
        """Whether the plan is of these weights, still of the shapes and layouts that they had."""
        return len(weights) == len(self.weights) and all(
            w is mine and _key(w) == key for w, mine, key in zip(weights, self.weights, self.key)
        )

    @torch.no_grad()
    def step(self, grads, gains, skipped):
        """Update the weights.

        Args:
            grads: a gradient for each weight, of its shape and device.
            gains: numbers or 0-dim tensors, as `groups` counts them. One that is not finite or
                is negative counts as 0.
            skipped: int64, 0-dim, on the device: 1 is added where a gradient is not finite.

        Returns:
            (G, eta), new 0-dim float64 tensors; or None, and nothing was done: a gradient of
            another dtype, or the first step of all inside a CUDA graph's capture, where no kernel
            can be loaded.
        """
        if any(g.dtype != w.dtype for w, g in zip(self.weights, grads)):
            return None
        capturing = _capturing(self.device)
        if capturing and self.table is None:
            return None
        grads = [_like(g, w) for w, g in zip(self.weights, grads)]
        cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if cuda else contextlib.nullcontext():
            return self._launch(grads, gains, skipped, capturing)

    def _launch(self, grads, gains, skipped, capturing):
        k = _kernels()
        table = self._upload(grads, gains, capturing)
        sizes = [_padded(n, 16) for n in (self.partials, self.matrices, 2 * self.matrices)]
        # Of the step's own, so that a captured graph has it in its own memory.
        scratch = torch.empty(sum(sizes), dtype=torch.float64, device=self.device)
        partials, norms, factors = scratch.split(sizes)
        G, eta = (torch.empty((), dtype=torch.float64, device=self.device) for _ in range(2))
        n, m = len(grads), self.matrices
        for tiles, options in self.launches:
            k.squares[(len(tiles),)](table, tiles, partials, **options)
        k.norms[(m,)](partials, self.segments, norms, CHUNK=CHUNK, num_warps=4, **FUSED)
        k.summarise[(1,)](
            norms, self.scales, table, self.segments, factors, G, eta, skipped, m, self.L,
            CHUNK=CHUNK, num_warps=4, **FUSED,
        )  # fmt: skip
        for tiles, options in self.launches:
            k.update[(len(tiles),)](table, tiles, factors, n, m, **options)
        return G, eta

    def _upload(self, grads, gains, capturing):
        """The table on the device, int64: addresses of the gradients, of the weights, then the bits
        of the gains in float64."""
        held = {}  # by entry: gains that are on the device
        entries = [g.data_ptr() for g in grads] + [w.data_ptr() for w in self.weights]
        for gain in gains:
            if isinstance(gain, torch.Tensor) and gain.device.type not in HOST:
                held[len(entries)], gain = gain, 0.0
            entries.append(struct.unpack("<q", struct.pack("<d", float(gain)))[0])
        entries += [0] * (_padded(len(entries), UPLOAD) - len(entries))
        # A graph has its arguments by value and writes them at every replay: to a table of its own.
        table, uploaded = (None, []) if capturing else (self.table, self.uploaded)
        if table is None or len(uploaded) != len(entries):
            table, uploaded = torch.empty(len(entries), dtype=torch.int64, device=self.device), None
        for at in range(0, len(entries), UPLOAD):
            some = entries[at : at + UPLOAD]
            if uploaded is None or uploaded[at : at + UPLOAD] != some:
                _kernels().upload[(1,)](table, at, *some, num_warps=1, **FUSED)
        if held:
            numbers = table.view(torch.float64)
            for at, gain in held.items():
                numbers[at].copy_(gain.detach().view(()))
                entries[at] = None  # whatever comes next is another
        if capturing:
            of_graph = [self.segments, self.scales, *(tiles for tiles, _ in self.launches)]
            CAPTURED.setdefault(self.weights[0], []).append(of_graph)
        else:
            self.table, self.uploaded = table, entries
        return table


# Tables that some CUDA graph reads: they stay for as long as the first of the weights, without
# which it cannot be replayed.
CAPTURED = WeakTensorKeyDictionary()
# Said, because newer Tritons warn where it is not: w - x * y in one rounding.
FUSED = {"enable_fp_fusion": True}


class _Way(NamedTuple):
    """How a weight is cut into tiles; the width is 0 for runs."""

    runs: bool
    positions: int  # in a tile
    width: int
    rows: int
    columns: int


def _options(dtype, way):
    """The constants of a launch of `squares` or `update`: 32 elements for each thread."""
    return {
        "DTYPE": getattr(_kernels().tl, str(dtype).removeprefix("torch.")),
        **{name.upper(): value for name, value in way._asdict().items()},
        "num_warps": way.rows * way.columns // 1024, **FUSED,
    }  # fmt: skip


def _cut(layout, itemsize):
    """(_Way, tiles, segments) of one weight: tiles int64 (number, FIELDS), and for each matrix a
    segment (start, number, stride), which says where its partial norms are. Tensor, matrix and
    place count from 0."""
    outer, positions, inner = layout
    if inner == 1 and positions > 1:
        width, columns = _width(positions, itemsize)
        way = _Way(False, positions, width, 8192 // columns, columns)
        tiles = _flat(0, outer * positions, way.rows * width)
        tiles[:, 3] = torch.arange(len(tiles)) * width
        number = len(tiles) * width // positions
        return way, tiles, [(k, number, positions) for k in range(positions)]
    if positions == 1 or outer == 1 or inner >= 4096:  # runs that are long enough on their own
        if positions == 1:
            outer, inner = 1, outer * inner
        runs = [_flat(i * inner, inner, 4096) for i in range(outer * positions)]
        number = len(runs[0])
        for i, run in enumerate(runs):
            run[:, 2] = i % positions
            run[:, 3] = (i % positions * outer + i // positions) * number + torch.arange(number)
        segments = [(k * outer * number, outer * number, 1) for k in range(positions)]
        return _Way(False, 1, 1024, 4, 1024), torch.cat(runs), segments
    columns = 64 if inner > 16 else 16
    way = _Way(True, 1, 0, 4096 // columns, columns)
    down, across = -(-outer // way.rows), -(-inner // columns)
    # In the order of memory: neighbours run at the same time.
    a, k, b = torch.meshgrid(*map(torch.arange, (down, positions, across)), indexing="ij")
    stride = positions * inner
    fields = [
        torch.zeros_like(a),
        a * way.rows * stride + k * inner + b * columns,
        k,
        (k * down + a) * across + b,
        (outer - a * way.rows).clamp_max(way.rows),
        (inner - b * columns).clamp_max(columns),
        torch.full_like(a, stride),
    ]
    segments = [(i * down * across, down * across, 1) for i in range(positions)]
    return way, torch.stack([x.flatten() for x in fields], 1), segments


def _flat(start, length, size):
    """Tiles of a stretch of memory, of `size` elements each, a number that stands for the rows."""
    starts = torch.arange(0, length, size)
    tiles = torch.zeros(len(starts), FIELDS, dtype=torch.int64)
    tiles[:, 1] = start + starts
    tiles[:, 4] = (length - starts).clamp_max(size)
    return tiles


def _width(positions, itemsize):
    """(width, columns) of flat tiles: the width is a multiple of the positions and of 16 bytes and
    fills the columns, a power of two, to three quarters if any number of them up to 1024 does."""
    unit = math.lcm(positions, 16 // itemsize)
    best = None
    columns = 128
    while columns <= 1024 or best is None:
        width = columns // unit * unit
        if best is None or width * best[1] > best[0] * columns:
            best = (width, columns) if width else None
        if best and 4 * best[0] >= 3 * best[1]:
            break
        columns *= 2
    return best


def _layout(w):
    """(outer, positions, inner) of a weight as it lies in memory, or None."""
    if w.layout != torch.strided or w.dtype not in DTYPES:
        return None
    stride, kinds = 1, []
    for i in sorted((i for i in range(w.ndim) if w.shape[i] > 1), key=w.stride):
        if w.stride(i) != stride:
            return None
        stride *= w.shape[i]
        if not kinds or kinds[0] != (i > 1):
            kinds.insert(0, i > 1)
    positions = math.prod(w.shape[2:])
    matrix = w.numel() // positions
    if kinds in ([], [False], [True], [False, True]):  # from the outermost; True: a kernel's
        # A wider tile than 8192 has no room.
        fits = positions == 1 or _width(positions, w.dtype.itemsize)[1] <= 8192
        return (matrix, positions, 1) if fits else None
    if kinds == [True, False]:
        return 1, positions, matrix
    if kinds == [False, True, False]:
        inner = min((0, 1), key=lambda i: (w.shape[i] == 1, w.stride(i)))
        return matrix // w.shape[inner], positions, w.shape[inner]
    return None


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _like(g, w):
    """The gradient in the weight's layout."""
    if all(n == 1 or a == b for n, a, b in zip(w.shape, g.stride(), w.stride())):
        return g
    return torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device).copy_(g)


def _key(w):
    return w.shape, w.stride(), w.dtype, w.device


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _padded(n, unit):
    return -(-n // unit) * unit


TRUSTED, TRYING = {}, threading.Lock()  # by device; a thread at a time
HOST = ("cpu",)  # where a tensor is a number
TOLERANCE = 1e-5  # of float32 kernels, relative, in `disagreement`


def trusted(device, AGD):
    """Whether the kernels run on this device and agree with the plain step of `AGD`, the optimiser
    of agd.py. Tried once in a process, on small weights; says so, once, where they do not."""
    with TRYING:
        if device not in TRUSTED and not _capturing(device):  # when no kernel can be loaded
            TRUSTED[device] = _tried(device, AGD)
        return TRUSTED.get(device, False)


def _tried(device, AGD):
    if os.environ.get("AGD_NO_COMPILER", "0") not in ("", "0") or _kernels() is None:
        return False
    try:
        worst = disagreement(device, AGD)
        if worst is None:
            return False
        if worst < TOLERANCE:
            return True
        reason = f"they disagree with the plain step by {worst:.1e}"
    except Exception as error:  # no compiler, an unknown GPU: whatever Triton comes upon
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(f"AGD takes its plain step on {device}, as its kernels do not work there "
                  f"({reason})", stacklevel=2)  # fmt: skip
    return False


def disagreement(device, AGD):
    """The largest relative difference of the weights, G and eta after two steps of small weights of
    every layout from those of the plain step; None where there is no plan for them."""
    generator = torch.Generator().manual_seed(0)
    weights, twins = [], []
    for shape in [(130, 70), (24, 10, 3, 3), (24, 18, 3, 3)]:
        w = torch.randn(shape, generator=generator, device="cpu").to(device)
        if shape[1] == 18:
            w = w.to(memory_format=torch.channels_last)
        w.grad = torch.randn(shape, generator=generator, device="cpu").to(device)
        twin = w.detach().clone()
        twin.grad = w.grad
        weights.append(w)
        twins.append(twin)
    optimizer = AGD(twins, fused=False)
    scales = [math.sqrt(w.shape[0] / w.shape[1] / math.prod(w.shape[2:])) for w in weights]
    plan = Plan.of(weights, scales, len(weights), [0] * len(weights))
    if plan is None:
        return None
    skipped = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(2):
        G, eta = plan.step([w.grad for w in weights], [1.0], skipped)
        optimizer.step()
    pairs = [(G, optimizer.G), (eta, optimizer.eta), *zip(weights, twins)]
    worst = torch.stack([((a - b).norm() / b.norm()).double() for a, b in pairs]).max()
    return worst.item() if skipped.item() == 0 else math.inf


@functools.cache
def _kernels():
    """The kernels by name, or None without Triton. Triton reads globals of this module."""
    global triton, tl, _power
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit
    def _power(x):
        """The power of two at or below a positive float64, and the smallest for 0; infinity for
        what is not finite. A quotient by it is exact."""
        power = (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        return tl.maximum(power, 2.2250738585072014e-308)

    names = ["at", *(f"x{i}" for i in range(UPLOAD))]

    # fmt: off
    @triton.jit(do_not_specialize=names)
    def upload(
        table, at,
        x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64,
        x4: tl.int64, x5: tl.int64, x6: tl.int64, x7: tl.int64,
        x8: tl.int64, x9: tl.int64, x10: tl.int64, x11: tl.int64,
        x12: tl.int64, x13: tl.int64, x14: tl.int64, x15: tl.int64,
    ):
        to = table + at
        tl.store(to, x0), tl.store(to + 1, x1), tl.store(to + 2, x2), tl.store(to + 3, x3)
        tl.store(to + 4, x4), tl.store(to + 5, x5), tl.store(to + 6, x6), tl.store(to + 7, x7)
        tl.store(to + 8, x8), tl.store(to + 9, x9), tl.store(to + 10, x10), tl.store(to + 11, x11)
        tl.store(to + 12, x12), tl.store(to + 13, x13)
        tl.store(to + 14, x14), tl.store(to + 15, x15)
    # fmt: on

    @triton.jit
    def squares(
        table, tiles, partials,
        DTYPE: tl.constexpr, RUNS: tl.constexpr, POSITIONS: tl.constexpr,
        WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        tile = tiles + tl.program_id(0).to(tl.int64) * 7
        address = tl.load(table + tl.load(tile))
        start, place, rows = tl.load(tile + 1), tl.load(tile + 3), tl.load(tile + 4).to(tl.int32)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        if RUNS:
            columns, stride = tl.load(tile + 5).to(tl.int32), tl.load(tile + 6)
            whole = (rows == ROWS) & (columns == COLUMNS) & (stride % 16 == 0)
            offsets, straight = row * stride + column, row * (stride // 16 * 16) + column
            mask = (row < rows) & (column < columns)
            inside = column < COLUMNS
        else:
            whole = rows == ROWS * WIDTH
            offsets = row * WIDTH + column
            straight = offsets
            inside = column < WIDTH
            mask = inside & (offsets < rows)
        # Multiples of 16 that the compiler sees to be so: loads of 16 bytes.
        if whole & (start % 16 == 0) & (address % 16 == 0):
            even = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
            x = tl.load(even + start // 16 * 16 + straight, mask=inside, other=0)
        else:
            g = address.to(tl.pointer_type(DTYPE)) + start + offsets
            x = tl.load(g, mask=mask, other=0)
        # The square of any number of 32 bits is a float64; those of 64 bits need a scale.
        x = x.to(tl.float64)
        if POSITIONS == 1:
            if DTYPE == tl.float64:
                power = _power(tl.max(tl.max(tl.abs(x), 1), 0))
                x = x * (1 / power)
                tl.store(partials + place, power * tl.sqrt(tl.sum(tl.sum(x * x, 1), 0)))
            else:
                tl.store(partials + place, tl.sqrt(tl.sum(tl.sum(x * x, 1), 0)))
        else:
            to = partials + place + tl.arange(0, COLUMNS)
            if DTYPE == tl.float64:
                power = _power(tl.max(tl.abs(x), 0))
                x = x * (1 / power)[None, :]
                norm = power * tl.sqrt(tl.sum(x * x, 0))
            else:
                norm = tl.sqrt(tl.sum(x * x, 0))
            tl.store(to, norm, mask=tl.arange(0, COLUMNS) < WIDTH)

    @triton.jit
    def norms(partials, segments, out, CHUNK: tl.constexpr):
        matrix = tl.program_id(0).to(tl.int64)
        start, stride = tl.load(segments + 4 * matrix), tl.load(segments + 4 * matrix + 2)
        number = tl.load(segments + 4 * matrix + 1).to(tl.int32)
        i = tl.arange(0, CHUNK)
        top = tl.zeros((CHUNK,), tl.float64)
        for at in range(0, number, CHUNK):
            x = tl.load(partials + start + (at + i) * stride, mask=at + i < number, other=0)
            top = tl.maximum(top, x)
        power = _power(tl.max(top, 0))
        scale = 1 / power
        total = tl.zeros((CHUNK,), tl.float64)
        for at in range(0, number, CHUNK):
            x = tl.load(partials + start + (at + i) * stride, mask=at + i < number, other=0)
            total += x * scale * (x * scale)
        tl.store(out + matrix, power * tl.sqrt(tl.sum(total, 0)))

    @triton.jit(do_not_specialize=["matrices", "L"])
    def summarise(
        norms, scales, table, segments, factors, G, eta, skipped, matrices, L, CHUNK: tl.constexpr
    ):
        i = tl.arange(0, CHUNK)
        total = tl.zeros((CHUNK,), tl.float64)
        for at in range(0, matrices, CHUNK):
            mask = at + i < matrices
            norm = tl.load(norms + at + i, mask=mask, other=0)
            total += norm * tl.load(scales + at + i, mask=mask, other=0)
        layers = tl.zeros((), tl.float64) + L
        summary = tl.sum(total, 0) / layers
        # log1p(x), to the last digits: the rounding of 1 + x is the same above and below.
        x = summary / (tl.sqrt(summary + 0.25) + 0.5)
        y = x + 1
        rate = tl.where(y == 1, x, x * (tl.log(y) / (y - 1)))
        finite = rate < float("inf")
        tl.store(G, summary)
        tl.store(eta, tl.where(finite, rate, float("nan")))
        tl.store(skipped, tl.load(skipped) + tl.where(finite, 0, 1))
        for at in range(0, matrices, CHUNK):
            mask = at + i < matrices
            norm = tl.load(norms + at + i, mask=mask, other=0)
            scale = tl.load(scales + at + i, mask=mask, other=0)
            slot = tl.load(segments + 4 * (at + i) + 3, mask=mask, other=0)
            gain = tl.load(table + slot, mask=mask, other=0).to(tl.float64, bitcast=True)
            # Two factors, both in the range of float32: a power of two that takes the gradient to
            # the scale of 1, and the rest.
            power = tl.maximum(_power(norm), 1.1754943508222875e-38)
            power = tl.minimum(power, 8.507059173023462e37)
            factor = rate / layers * scale * gain / (norm / power)
            # Not so for a norm of 0, a gain out of range, or a gradient that is not finite.
            moves = (factor > 0) & (factor < float("inf"))
            tl.store(factors + at + i, 1 / power, mask=mask)
            tl.store(factors + matrices + at + i, tl.where(moves, factor, 0), mask=mask)

    @triton.jit(do_not_specialize=["tensors", "matrices"])
    def update(
        table, tiles, factors, tensors, matrices,
        DTYPE: tl.constexpr, RUNS: tl.constexpr, POSITIONS: tl.constexpr,
        WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
        tile = tiles + tl.program_id(0).to(tl.int64) * 7
        tensor = tl.load(tile)
        first = tl.load(table + tensor)
        second = tl.load(table + tensors + tensor)
        start, matrix, rows = tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 4).to(tl.int32)
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        if POSITIONS == 1:
            power = tl.load(factors + matrix).to(WORK)
            factor = tl.load(factors + matrices + matrix).to(WORK)
            moves = factor != 0
        else:
            power = tl.load(factors + matrix + column % POSITIONS).to(WORK)
            factor = tl.load(factors + matrices + matrix + column % POSITIONS).to(WORK)
            moves = tl.max(tl.max(tl.abs(factor), 1), 0) != 0
        if RUNS:
            columns, stride = tl.load(tile + 5).to(tl.int32), tl.load(tile + 6)
            whole = (rows == ROWS) & (columns == COLUMNS) & (stride % 16 == 0)
            offsets, straight = row * stride + column, row * (stride // 16 * 16) + column
            mask = (row < rows) & (column < columns)
            inside = column < COLUMNS
        else:
            whole = rows == ROWS * WIDTH
            offsets = row * WIDTH + column
            straight = offsets
            inside = column < WIDTH
            mask = inside & (offsets < rows)
        if moves:
            if whole & (start % 16 == 0) & ((first | second) % 16 == 0):
                source = tl.multiple_of((first // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
                target = tl.multiple_of((second // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
                to = target + start // 16 * 16 + straight
                g = tl.load(source + start // 16 * 16 + straight, mask=inside)
                w = tl.load(to, mask=inside)
                new = (w.to(WORK) - g.to(WORK) * power * factor).to(DTYPE)
                tl.store(to, tl.where(factor != 0, new, w), mask=inside)
            else:
                g = tl.load(first.to(tl.pointer_type(DTYPE)) + start + offsets, mask=mask)
                to = second.to(tl.pointer_type(DTYPE)) + start + offsets
                w = tl.load(to, mask=mask)
                new = (w.to(WORK) - g.to(WORK) * power * factor).to(DTYPE)
                # Written as it was where the factor is 0: a mask by columns would split the stores.
                tl.store(to, tl.where(factor != 0, new, w), mask=mask)

    return SimpleNamespace(
        tl=tl, upload=upload, squares=squares, norms=norms, summarise=summarise, update=update
    )
