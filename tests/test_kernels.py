"""Where the compiled C comes from, and what it leaves alone in the process; the kernels of a GPU,
without one: their results in Triton's interpreter, their machine code from Triton's compiler, their
number and what they move from recorded launches."""

import gc
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import agd_kernels
from agd import AGD
from agd_kernels import cuda
from architecture import build
from tests.conftest import ROOT, interpreter_fails
from tests.reference import reference_step, relative
from tests.test_agd import Reads
from tests.test_backends import select

STEP = """
import torch
from agd import AGD
W = torch.ones(200, 200, requires_grad=True)
W.grad = torch.ones(200, 200)
optimizer = AGD([W])
optimizer.step()
assert W[0, 0] < 1
try:
    AGD([W], fused=True)
    print("C")
except ValueError:
    print("torch")
"""


@pytest.fixture
def compiler(monkeypatch):
    select("c", monkeypatch)


def start(home, code=STEP, **env):
    env = {**os.environ, "XDG_CACHE_HOME": str(home), **env}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def printed(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    return out.strip()


@pytest.mark.slow
def test_without_a_compiler_torch_does_it_without_a_word(compiler, tmp_path):
    for env in ({"CC": "/nonexistent", "PATH": ""}, {"CC": "", "PATH": ""},
                {"AGD_NO_COMPILER": "1"}):  # fmt: skip
        assert printed(start(tmp_path, **env)) == "torch"
    assert not list(tmp_path.rglob("*.so"))
    assert printed(start(tmp_path, CC="false")) == "C"  # a compiler that fails is passed over


@pytest.mark.slow
def test_processes_that_compile_at_once_share_one_file(compiler, tmp_path):
    assert [printed(x) for x in [start(tmp_path) for _ in range(2)]] == ["C", "C"]
    kept = tmp_path / "agd" / "kernels"
    (library,) = kept.iterdir()  # no drafts
    assert library.suffix == ".so" and kept.stat().st_mode & 0o777 == 0o700
    before = library.stat()
    assert printed(start(tmp_path)) == "C"
    assert library.stat().st_ino == before.st_ino  # not compiled again


@pytest.mark.slow
@pytest.mark.parametrize("obstacle", ["a file", "open to all"])
def test_without_a_cache_a_temporary_directory_serves(compiler, tmp_path, obstacle):
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    temporary.mkdir()
    if obstacle == "a file":
        home.write_text("")
    else:
        (home / "agd" / "kernels").mkdir(parents=True)
        (home / "agd" / "kernels").chmod(0o777)
    assert printed(start(home, TMPDIR=str(temporary))) == "C"
    assert not list(temporary.rglob("*.so")) and not list(home.rglob("*.so"))


@pytest.mark.slow
def test_the_threads_are_those_of_torch(compiler, tmp_path):
    """One OpenMP in the process, and as many threads of it after AGD's step as before."""
    code = """
import os
torch.set_num_threads(2)
torch.randn(2**20).exp()
def state():
    with open("/proc/self/maps") as f:
        return {x.split()[-1] for x in f if "omp" in x}, len(os.listdir("/proc/self/task"))
before = state()
optimizer.step()
assert state() == before and before[1] > 1, (state(), before)
"""
    assert printed(start(tmp_path, STEP + code)) == "C"


needs_triton = pytest.mark.skipif(not cuda.Backend.available(torch.device("cpu")),
                                  reason="Triton is not installed")  # fmt: skip


@pytest.mark.skipif(bool(interpreter_fails()), reason=str(interpreter_fails()))
@pytest.mark.parametrize("tests, least", [
    (["tests/test_backends.py::test_gains_of_groups"], 1),
    pytest.param(["tests/test_backends.py", "tests/test_properties.py",
                  "tests/test_roles.py::test_a_step_of_every_role"], 70, marks=pytest.mark.slow),
], ids=["few", "all"])  # fmt: skip
def test_the_kernels_in_the_interpreter(tests, least):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=ROOT, text=True,
        capture_output=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= least


@pytest.fixture
def launched(monkeypatch):
    """f(call): AGD takes the kernels of GPUs for the CPU, and a launch is call(name, arguments,
    constants, compile), which may call `compile`."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is set to interpret")
    run = triton.runtime.JITFunction.run
    options = {"num_warps", "enable_fp_fusion"}

    def stand_in(call):
        def launch(kernel, *args, grid, warmup, **constants):
            names = [x for x in kernel.arg_names if x not in constants]
            own = {**dict(zip(names, args)), **constants, "grid": grid}
            assert options <= constants.keys()
            call(kernel.fn.__name__, own,
                 lambda: run(kernel, *args, grid=grid, warmup=True, **constants))  # fmt: skip

        monkeypatch.setattr(triton.runtime.JITFunction, "run", launch)
        monkeypatch.setenv("AGD_NO_COMPILER", "0")
        monkeypatch.setattr(agd_kernels, "MODULES", {"cpu": "cuda"})
        monkeypatch.setattr(agd_kernels, "TRUSTED", {torch.device("cpu"): True})

    return stand_in


def weights_like(tensors, offset=0):
    """Weights with gradients of their strides, whose storage begins somewhere."""
    weights = []
    for x in tensors:
        W = nn.Parameter(x)
        flat = torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:]
        W.grad = flat.as_strided(x.shape, x.stride(), offset)
        weights.append(W)
    return weights


@needs_triton
@pytest.mark.parametrize("capability, dtype", [
    (90, torch.float32), *[pytest.param(capability, dtype, marks=pytest.mark.slow)
                           for capability in (80, 90) for dtype in cuda.DTYPES],
], ids=str)  # fmt: skip
def test_machine_code(launched, monkeypatch, tmp_path, capability, dtype):
    """Every kernel of a step compiles, once, whatever changes from step to step; it reads and
    writes 16 bytes at a time, has float64 to the last digit, and rounds to the nearest."""
    import triton
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    device = SimpleNamespace(
        get_current_device=lambda: capability,  # Triton keeps what it compiled by device
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )
    driver, code = triton.runtime.driver, {}  # by name and compiled variant
    monkeypatch.setattr(driver, "_active" if hasattr(driver, "_active") else "active", device)

    def compile_only(name, arguments, compile):
        compiled = compile()
        code[name, compiled.hash] = compiled.asm["ptx"]

    launched(compile_only)
    tensors = [torch.zeros(s, dtype=dtype) for s in [(64, 64), (64, 64, 3, 3), (64, 64, 3, 3)]]
    tensors[2] = tensors[2].to(memory_format=torch.channels_last)
    tensors.append(torch.zeros(9, 3, dtype=dtype))
    AGD(weights_like(tensors), fused=True).step()
    ways = Counter(name for name, _ in code)
    assert ways == {"upload": 1, "squares": 3, "norms": 1, "middle": 1, "update": 3}
    for gain in (0.0, 0.5, torch.tensor(1.0)):  # other addresses and gains, and another number
        AGD(weights_like(tensors, offset=1), gain=gain).step()
        AGD(weights_like([x.clone() for x in tensors for _ in range(5)])).step()
    assert Counter(name for name, _ in code) == ways
    wide = "v2.b64" if dtype == torch.float64 else "v4.b32"
    for (name, _), ptx in code.items():
        assert ".local" not in ptx and not re.search(r"(sqrt|lg2|ex2|div)\.(approx|full)", ptx)
        if name in ("squares", "update"):
            loads, stores = (ptx.count(f"{op}.global.{wide}") for op in ("ld", "st"))
            assert loads and stores == (loads // 2 if name == "update" else 0)
        if name == "update" and dtype.itemsize == 2:
            kind = {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
            assert re.search(rf"cvt\.rn\.{kind}", ptx)


@needs_triton
@pytest.mark.parametrize("arch, side, form, weights, launches, uploads, partials", [
    ("fcn", 32, torch.contiguous_format, 10, 4, 2, 0.0006),
    ("resnet18", 32, torch.contiguous_format, 21, 6, 4, 0.032),
    ("resnet50", 224, torch.contiguous_format, 54, 8, 8, 0.016),
    ("resnet50", 224, torch.channels_last, 54, 8, 8, 0.001),
])  # fmt: skip
def test_launches_and_bytes(launched, arch, side, form, weights, launches, uploads, partials):
    """Of a step: how many kernels, how often each element is read or written, and the partial norms
    as a part of the weights' bytes. Of the first one: the uploads besides. No number is read."""
    calls, touched, scratch = [], Counter(), set()

    def record(name, x, compile):
        calls.append(name)
        if name in ("squares", "update"):
            assert x["grid"] == (len(x["tiles"]),)
            sizes = x["tiles"][:, 4] * (x["tiles"][:, 5] if x["RUNS"] else 1)
            touched[name] += sizes.sum()
        if name == "squares":
            scratch.add(x["partials"].numel() * 8)

    launched(record)
    net = build(arch, (3, side, side), 10 if side == 32 else 1000)
    net = net.to(memory_format=form) if arch != "fcn" else net
    ws = weights_like([w.detach() for w in net.parameters()])
    assert len(ws) == weights
    optimizer = AGD(ws, fused=True)
    optimizer.step()
    assert calls.count("upload") == uploads
    calls.clear(), touched.clear()
    with Reads() as reads:
        optimizer.step()
    assert reads.count == 0 and len(calls) == launches
    # `squares` reads a gradient; `update` reads it again, reads the weight and writes it.
    elements = sum(w.numel() for w in ws)
    assert touched == {"squares": elements, "update": elements}
    assert len(scratch) == 1 and scratch.pop() <= partials * 4 * elements


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are of GPUs")
def test_a_captured_step_outlives_its_optimiser():
    """It has addresses and tables of its own, which steps outside of it leave alone, and which last
    as long as its weights."""
    shapes, generator = [(40, 30), (24, 10, 3, 3)], torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(s, generator=generator).cuda()) for s in shapes]
    static = [torch.randn(s, generator=generator).cuda() for s in shapes]
    optimizer, graph = AGD(weights, fused=True), torch.cuda.CUDAGraph()

    def step(optimizer, grads):
        for W, g in zip(weights, grads):
            W.grad = g
        optimizer.step()

    step(optimizer, static)
    with torch.cuda.graph(graph):
        step(optimizer, static)
    step(optimizer, [torch.randn_like(g) for g in static])
    del optimizer
    gc.collect()
    kept = [torch.full((2**16,), 7.0, device="cuda") for _ in range(64)]  # what was freed is filled
    theirs, *_ = reference_step([W.detach().cpu() for W in weights], [g.cpu() for g in static])
    graph.replay()
    torch.cuda.synchronize()
    assert kept and all(relative(W.cpu(), V) < 1e-6 for W, V in zip(weights, theirs))
