"""The compiled step on the CPU: where it comes from, and what it leaves alone."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import agd
import agd_cpu
from agd import AGD
from tests.test_agd import bits, weights_with_grads

ROOT = Path(__file__).resolve().parent.parent
STEP = """
import torch
from agd import AGD
W = torch.ones(200, 200, requires_grad=True)
W.grad = torch.ones(200, 200)
optimizer = AGD([W])
optimizer.step()
assert W[0, 0] < 1
print(type(optimizer._plan).__name__)
"""


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.setenv("AGD_NO_COMPILER", "0")
    if agd_cpu._library() is None:
        pytest.skip("no C compiler here")


def start(code=STEP, **env):
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def printed(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err, err
    return out.strip()


def test_without_a_compiler_the_sweeps_are_taken_without_a_word(tmp_path):
    cache = str(tmp_path)
    assert printed(start(CC="/nonexistent", PATH="", XDG_CACHE_HOME=cache)) == "_Sweeps"
    assert printed(start(CC="", PATH="", XDG_CACHE_HOME=cache)) == "_Sweeps"
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_is_passed_over(tmp_path):
    assert printed(start(CC="false", XDG_CACHE_HOME=str(tmp_path))) == "Plan"
    (library,) = (tmp_path / "agd" / "kernels").iterdir()  # no draft is left
    assert library.suffix == ".so"


def test_processes_that_compile_at_once_share_one_file(tmp_path):
    processes = [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    assert [printed(x) for x in processes] == ["Plan", "Plan"]
    kept = tmp_path / "agd" / "kernels"
    (library,) = kept.iterdir()  # no drafts
    assert kept.stat().st_mode & 0o777 == 0o700
    before = library.stat()
    assert printed(start(XDG_CACHE_HOME=str(tmp_path))) == "Plan"
    assert library.stat().st_ino == before.st_ino  # not compiled again


@pytest.mark.parametrize("obstacle", ["a file", "open to all"])
def test_without_a_cache_of_ones_own_a_directory_serves_for_the_moment(tmp_path, obstacle):
    home, passing = tmp_path / "home", tmp_path / "passing"
    passing.mkdir()
    if obstacle == "a file":
        home.write_text("")
    else:
        (home / "agd" / "kernels").mkdir(parents=True)
        (home / "agd" / "kernels").chmod(0o777)
    assert printed(start(XDG_CACHE_HOME=str(home), TMPDIR=str(passing))) == "Plan"
    assert not list(passing.rglob("*.so"))
    assert not list(home.rglob("*.so"))


def test_the_threads_are_those_of_torch():
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
assert optimizer._plan.struct.threads == 2
assert state() == before, (state(), before)
"""
    assert printed(start(STEP + code)) == "Plan"


@pytest.mark.parametrize("last", [False, True])
def test_any_number_of_threads_gives_the_same_bits(last):
    weights = weights_with_grads([(300, 257), (64, 37, 3, 3), (70, 129, 1, 3), (3, 5, 7, 7)])
    if last:
        for W in weights[1:]:
            W.data = W.data.to(memory_format=torch.channels_last)
            W.grad = W.grad.to(memory_format=torch.channels_last)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3, 7):
            torch.set_num_threads(n)
            own = copy.deepcopy(weights)
            for W, V in zip(weights, own):
                V.grad = W.grad
            optimizer = AGD(own)
            optimizer.step()
            assert optimizer._plan.struct.threads == n
            results.append([optimizer.G.view(1), optimizer.eta.view(1), *own])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(results[0], other))


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("last", [False, True])
def test_a_zero_gradient_leaves_every_bit(zero, last):
    """Also that of a weight that is -0, in whole periods and the rest of one."""
    weights = weights_with_grads([(33, 21), (23, 41, 3, 3), (40, 31, 2), (3, 2, 11, 11)])
    for W in weights:
        if last and W.ndim == 4:
            W.data = W.data.to(memory_format=torch.channels_last)
            W.grad = W.grad.to(memory_format=torch.channels_last)
        W.data[::2] = -0.0
    still = [(0,), (1, ..., 1, 1), (2, ..., 0), (3, ..., 5, 10)]
    before = [bits(weights[i][tuple(where)]).clone() for i, *where in still]
    for i, *where in still:
        weights[i].grad[tuple(where)] = zero
    rest = weights[1][..., 0, 0].clone()
    optimizer = AGD(weights)
    optimizer.step()
    assert isinstance(optimizer._plan, agd_cpu.Plan)
    assert optimizer._plan.step([W.grad for W in weights]) is not None
    for (i, *where), b in zip(still, before):
        assert torch.equal(bits(weights[i][tuple(where)]), b)
    assert not (weights[1][..., 0, 0] == rest).any()


def test_a_gradient_elsewhere_or_of_another_kind_is_refused():
    (W,) = weights_with_grads([(6, 8, 3, 3)])
    plan = agd_cpu.Plan.of([W], [1.0], 1, [1.0])
    before = bits(W)
    for g in (W.grad.double(), W.grad.to(memory_format=torch.channels_last), W.grad.to("meta"),
              W.grad.to_sparse()):  # fmt: skip
        assert plan.step([g]) is None
    assert torch.equal(bits(W), before)
    assert plan.step([W.grad]) is not None


def test_a_step_that_does_not_agree_is_not_taken(monkeypatch):
    (W,) = weights_with_grads([(5, 4)])
    step = agd_cpu.Plan.step

    def wrong(self, grads):
        G, eta = step(self, grads)
        return G * 1.001, eta

    monkeypatch.setattr(agd_cpu.Plan, "step", wrong)
    monkeypatch.setattr(agd_cpu, "TRUSTED", [])
    with pytest.warns(UserWarning, match="disagrees"):
        AGD([W]).step()
    optimizer = AGD([W])
    optimizer.step()  # tried once, said once
    assert isinstance(optimizer._plan, agd._Sweeps)
