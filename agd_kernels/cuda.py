"""The sweeps of AGD's step on a CUDA GPU: five Triton kernels, whatever the number of weights.

    upload      addresses of tensors that have changed since the last step, as kernel arguments
    squares     norms of tiles of tensors, one launch for each (dtype, layout, number of blocks)
    norms       from those the norm of every block
    middle      from those G, eta and the factors of the update
    update      the weights, in the tiles and launches of `squares`

Every sum has a fixed order: no atomics, the same result each time. Nothing waits for the device."""

import functools
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch

UPLOAD = 16  # addresses that one launch of `upload` writes
FIELDS = 7  # of a tile: tensor, start, block, place of its partial norm, rows, columns, stride
CHUNK = 1024  # partial norms that a program of `norms` takes at a time
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Backend:
    """Memory (outer, K, inner), a weight or a part of one, is cut into tiles (rows, columns), a
    program each, in two ways:

        flat    rows follow each other without a gap and are `width` long, a multiple of K: a
                column is of one block. For K = 1 or inner = 1.
        runs    a tile is of one block: rows are (parts of) runs of `inner`, `stride` apart.
    """

    @staticmethod
    def available(device):
        """Whether Triton is installed and knows the GPU."""
        known = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
        return known and _kernels() is not None

    @staticmethod
    def takes(weight, layout):
        _, _, K, inner = layout.dense
        fits = K == 1 or inner > 1 or _width(K, weight.dtype.itemsize) is not None
        return weight.dtype in DTYPES and fits

    def __init__(self, weights, layouts):
        self.device = weights[0].device
        cuda = self.device.type == "cuda"
        self.current = functools.partial(torch.cuda.device, self.device) if cuda else nullcontext
        tiles, segments, self.partials, self.blocks = {}, [], 0, 0
        for tensor, (w, layout) in enumerate(zip(weights, layouts)):
            lead, *dense = layout.dense
            way, cut, parts = _cut(dense, w.dtype.itemsize, lead)
            partials = len(cut) * (way.WIDTH if way.POSITIONS > 1 else 1)
            nth = torch.arange(lead)[:, None]
            cut, parts = cut.repeat(lead, 1, 1), parts.repeat(lead, 1, 1)
            cut[..., 0] = tensor
            cut[..., 1] += nth * math.prod(dense)
            cut[..., 2] += nth * parts.shape[1] + self.blocks
            cut[..., 3] += nth * partials + self.partials
            parts[..., 0] += nth * partials + self.partials
            tiles.setdefault((w.dtype, way), []).append(cut.flatten(0, 1))
            segments.append(parts.flatten(0, 1))
            self.partials += lead * partials
            self.blocks += lead * parts.shape[1]
        self.launches = []
        for (dtype, way), cuts in tiles.items():
            options = {"DTYPE": getattr(_kernels().tl, str(dtype).removeprefix("torch.")),
                       **way._asdict(), "num_warps": way.ROWS * way.COLUMNS // 1024}  # fmt: skip
            cuts = torch.cat(cuts).to(self.device, non_blocking=True)  # without a wait
            self.launches.append((cuts, {**options, **FUSED}))
        self.segments = torch.cat(segments).to(self.device, non_blocking=True)
        self.tables = {}  # by name: (addresses, the same on the device)

    def norms(self, tensors):
        """As TorchBackend.norms."""
        with self.current():
            table = self._table("directions", tensors)
            # Of the step's own, so that a captured graph has it in its own memory.
            scratch = torch.empty(self.partials, dtype=torch.float64, device=self.device)
            out = torch.empty(self.blocks, dtype=torch.float64, device=self.device)
            for tiles, options in self.launches:
                _kernels().squares[(len(tiles),)](table, tiles, scratch, **options)
            options = {"CHUNK": CHUNK, "num_warps": 4, **FUSED}
            _kernels().norms[(self.blocks,)](scratch, self.segments, out, **options)
        return out

    def middle(self, scales, norms):
        """As agd.py's _middle, of one part: its operations would take longer than a small sweep."""
        G, eta, factors = (norms[0].new_empty(n) for n in ((), (), self.blocks))
        with self.current():
            _kernels().middle[(1,)](*scales, *norms, G, eta, factors, self.blocks,
                                    CHUNK=CHUNK, num_warps=4, **FUSED)  # fmt: skip
        return G, eta, [factors]

    def subtract(self, targets, directions, factors):
        """As TorchBackend.subtract."""
        with self.current():
            tables = self._table("directions", directions), self._table("targets", targets)
            for tiles, options in self.launches:
                _kernels().update[(len(tiles),)](*tables, tiles, factors, **options)
        torch.autograd.graph.increment_version(targets)  # the kernels write past autograd

    def _table(self, name, tensors):
        """The addresses of tensors, int64 on the device."""
        entries = [x.data_ptr() for x in tensors]
        entries += [0] * (-len(entries) % UPLOAD)
        # A graph has its arguments by value and writes them at each replay: to a table of its own.
        capturing = _capturing(self.device)
        uploaded, table = (None, None) if capturing else self.tables.get(name, (None, None))
        if table is None:
            table = torch.empty(len(entries), dtype=torch.int64, device=self.device)
        for at in range(0, len(entries), UPLOAD):
            some = entries[at : at + UPLOAD]
            if uploaded is None or uploaded[at : at + UPLOAD] != some:
                _kernels().upload[(1,)](table, at, *some, num_warps=1, **FUSED)
        if not capturing:
            self.tables[name] = entries, table
        return table


FUSED = {"enable_fp_fusion": True}  # one rounding for w - x * y; newer Tritons warn without it


class _Way(NamedTuple):  # of cutting memory into tiles: constants of `squares` and `update`
    RUNS: bool
    POSITIONS: int  # blocks in a tile
    WIDTH: int  # 0 for runs
    ROWS: int
    COLUMNS: int


def _cut(dense, itemsize, lead):
    """(_Way, tiles, segments) of one of `lead` parts of a weight: tiles are int64 (number, FIELDS),
    the segment of a block is (start, number, stride) of its partial norms. Tensor, block and place
    count from 0."""
    outer, positions, inner = dense
    if inner == 1 and positions > 1:
        width, columns = _width(positions, itemsize)
        way = _Way(False, positions, width, 8192 // columns, columns)
        tiles = _flat(0, outer * positions, way.ROWS * width)
        tiles[:, 3] = torch.arange(len(tiles)) * width
        number = len(tiles) * width // positions
        return way, tiles, torch.tensor([(k, number, positions) for k in range(positions)])
    if positions == 1 or outer == 1 or inner >= 4096:  # runs that are long enough on their own
        if positions == 1:
            outer, inner = 1, outer * inner
        rows = 1 if lead > 1 and inner <= 1024 else 4  # many short ones: rows of an embedding
        runs = [_flat(i * inner, inner, 1024 * rows) for i in range(outer * positions)]
        number = len(runs[0])
        for i, run in enumerate(runs):
            run[:, 2] = i % positions
            run[:, 3] = (i % positions * outer + i // positions) * number + torch.arange(number)
        segments = [(k * outer * number, outer * number, 1) for k in range(positions)]
        return _Way(False, 1, 1024, rows, 1024), torch.cat(runs), torch.tensor(segments)
    columns = 64 if inner > 16 else 16
    way = _Way(True, 1, 0, 4096 // columns, columns)
    down, across, stride = -(-outer // way.ROWS), -(-inner // columns), positions * inner
    tiles = torch.zeros(down, positions, across, FIELDS, dtype=torch.int64)  # as in memory
    a, k, b = torch.meshgrid(*map(torch.arange, tiles.shape[:3]), indexing="ij")
    tiles[..., 1] = a * way.ROWS * stride + k * inner + b * columns
    tiles[..., 2] = k
    tiles[..., 3] = (k * down + a) * across + b
    tiles[..., 4] = (outer - a * way.ROWS).clamp_max(way.ROWS)
    tiles[..., 5] = (inner - b * columns).clamp_max(columns)
    tiles[..., 6] = stride
    segments = [(i * down * across, down * across, 1) for i in range(positions)]
    return way, tiles.view(-1, FIELDS), torch.tensor(segments)


def _flat(start, length, size):
    """Tiles of a stretch of memory, of `size` elements each, a number that stands for the rows."""
    starts = torch.arange(0, length, size)
    tiles = torch.zeros(len(starts), FIELDS, dtype=torch.int64)
    tiles[:, 1] = start + starts
    tiles[:, 4] = (length - starts).clamp_max(size)
    return tiles


def _width(K, itemsize):
    """(width, columns) of flat tiles, or None. The width is a multiple of K and of 16 bytes. It
    fills three quarters of the columns, a power of two up to 1024, where that is possible."""
    unit = math.lcm(K, 16 // itemsize)
    sizes = [(2**n // unit * unit, 2**n) for n in range(7, 14) if 2**n >= unit]
    small = [x for x in sizes if x[1] <= 1024] or sizes[:1]
    fullest = max(small, key=lambda x: x[0] / x[1], default=None)
    return next((x for x in small if 4 * x[0] >= 3 * x[1]), fullest)


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _kernels():
    """The kernels by name, or None without Triton. Triton reads globals of this module."""
    global triton, tl, _power, _tile
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

    @triton.jit
    def _tile(
        tile, RUNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        """(start, offsets of the elements, the same by a stride that is visibly a multiple of 16,
        mask of the elements, mask of the columns, whether the tile is full)."""
        rows = tl.load(tile + 4).to(tl.int32)
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
        return tl.load(tile + 1), offsets, straight, mask, inside, whole

    # fmt: off
    @triton.jit(do_not_specialize=["at", *(f"x{i}" for i in range(UPLOAD))])
    def upload(
        table, at,
        x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64, x4: tl.int64, x5: tl.int64,
        x6: tl.int64, x7: tl.int64, x8: tl.int64, x9: tl.int64, x10: tl.int64, x11: tl.int64,
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
    def squares(table, tiles, partials, DTYPE: tl.constexpr, RUNS: tl.constexpr,
               POSITIONS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
        tile = tiles + tl.program_id(0).to(tl.int64) * 7
        address = tl.load(table + tl.load(tile))
        start, offsets, straight, mask, inside, whole = _tile(tile, RUNS, WIDTH, ROWS, COLUMNS)
        place = tl.load(tile + 3)
        # Loads of 16 bytes.
        if whole & (start % 16 == 0) & (address % 16 == 0):
            even = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)
            x = tl.load(even + start // 16 * 16 + straight, mask=inside, other=0)
        else:
            g = address.to(tl.pointer_type(DTYPE)) + start + offsets
            x = tl.load(g, mask=mask, other=0)
        # The square of any number of 32 bits is a float64; numbers of 64 bits need a scale.
        x = x.to(tl.float64)
        power = 1.0
        if POSITIONS == 1:
            if DTYPE == tl.float64:
                power = _power(tl.max(tl.max(tl.abs(x), 1), 0))
                x = x * (1 / power)
            tl.store(partials + place, power * tl.sqrt(tl.sum(tl.sum(x * x, 1), 0)))
        else:
            if DTYPE == tl.float64:
                power = _power(tl.max(tl.abs(x), 0))
                x = x * (1 / power)[None, :]
            column = tl.arange(0, COLUMNS)
            norm = power * tl.sqrt(tl.sum(x * x, 0))
            tl.store(partials + place + column, norm, mask=column < WIDTH)

    @triton.jit
    def norms(partials, segments, out, CHUNK: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        start, stride = tl.load(segments + 3 * block), tl.load(segments + 3 * block + 2)
        number = tl.load(segments + 3 * block + 1).to(tl.int32)
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
        tl.store(out + block, power * tl.sqrt(tl.sum(total, 0)))

    @triton.jit(do_not_specialize=["number"])
    def middle(scales, norms, G, eta, factors, number, CHUNK: tl.constexpr):
        i = tl.arange(0, CHUNK)
        total = tl.zeros((CHUNK,), tl.float64)
        for at in range(0, number, CHUNK):
            inside = at + i < number
            s = tl.load(scales + at + i, mask=inside, other=0)
            total += s * tl.load(norms + at + i, mask=inside, other=0)
        g = tl.sum(total, 0)
        y = g / (tl.sqrt(g + 0.25) + 0.5)
        # log(1 + y) to the last digits: the error of 1 + y is that of its logarithm, too.
        u = 1.0 + y
        rate = tl.where(u == 1.0, y, tl.log(u) * y / tl.where(u == 1.0, 1.0, u - 1.0))
        tl.store(G, g)
        tl.store(eta, rate)
        for at in range(0, number, CHUNK):
            inside = at + i < number
            s = tl.load(scales + at + i, mask=inside, other=0)
            x = tl.load(norms + at + i, mask=inside, other=1)
            tl.store(factors + at + i, s * rate / x, mask=inside)

    @triton.jit
    def update(directions, targets, tiles, factors, DTYPE: tl.constexpr, RUNS: tl.constexpr,
               POSITIONS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
               COLUMNS: tl.constexpr):  # fmt: skip
        WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
        tile = tiles + tl.program_id(0).to(tl.int64) * 7
        tensor = tl.load(tile)
        first, second = tl.load(directions + tensor), tl.load(targets + tensor)
        start, offsets, straight, mask, inside, whole = _tile(tile, RUNS, WIDTH, ROWS, COLUMNS)
        block, column = tl.load(tile + 2), tl.arange(0, COLUMNS)[None, :]
        if POSITIONS == 1:
            factor = tl.load(factors + block)
        else:
            factor = tl.load(factors + block + column % POSITIONS)
        # Two factors in the range of float32: a power of two, and the rest.
        factor = tl.where(factor < float("inf"), factor, 0)
        power = tl.minimum(tl.maximum(_power(factor), 1.1754943508222875e-38), 8.507059173023462e37)
        factor = factor / power
        if WORK == tl.float32:
            factor = tl.minimum(factor, 3.4028234663852886e38)
        power, factor = power.to(WORK), factor.to(WORK)
        if POSITIONS == 1:
            moves = factor != 0
        else:
            moves = tl.max(tl.max(factor, 1), 0) != 0
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

    return SimpleNamespace(tl=tl, upload=upload, squares=squares, norms=norms,
                           middle=middle, update=update)  # fmt: skip
