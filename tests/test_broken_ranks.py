"""Runs of several ranks that a signal breaks, wherever it comes and to whichever rank."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from distributed.delayed import DelayedReads
from tests.conftest import ROOT
from tests.test_distributed import TORCHRUN, VARIABLES, outcome, run_ranks  # noqa: F401
from tests.test_launchers import epochs, ranks, wait_for
from tests.test_main import rows
from tests.test_trainer import LOOKS, SMALL, call, only, same

slow = pytest.mark.slow

TERM, INT, USR1 = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGUSR1)
STOP = 3  # of interrupt, for one process
WIDE = ["--width", "600"]  # so that gradients take more than one message


def words(*flags):
    return [str(flag) for flag in flags]


@pytest.fixture
def broken(run_ranks, tmp_path):  # noqa: F811
    """f(size, cases, *flags): `size` ranks make an unbroken run, and for each of {name: numbers}
    (see ranks.runs) one that is broken and goes on, to the same bits; returns what the broken ones
    returned."""

    def run(size, cases, *flags, **options):
        several = [(words(*SMALL, *flags, "--out", tmp_path / "whole"), {})]
        for name, numbers in cases.items():
            command = words(*SMALL, *flags, "--out", tmp_path / name)
            several += [(command, numbers), (command, {})]
        per_rank, errors = run_ranks(size, "runs", several=several, **options)
        assert None not in per_rank, errors
        for rank in per_rank:
            assert rank == per_rank[0]  # they end in the same step
            assert all(ended for _, _, ended in rank)  # and none before all is written
            assert [code for code, *_ in rank[::2]] == [0] * (len(cases) + 1)
        for name in cases:
            same(tmp_path / name, tmp_path / "whole")
        return {name: pair[:2] for name, pair in zip(cases, per_rank[0][1::2])}

    return run


@pytest.mark.parametrize("looks", [
    (3,), pytest.param((1, 4, 6, 7, LOOKS - 1, LOOKS), marks=slow),
])  # fmt: skip
def test_a_signal_to_one_rank_breaks_all_in_the_same_step(looks, broken, tmp_path):
    """All know of it at the next look: in an epoch, between two, in a test."""
    ended = broken(2, {**{str(k): {"1": {k: TERM}} for k in looks}, "saved": {"1": {2: USR1}}})
    late = {str(LOOKS): (0, LOOKS)} if LOOKS in looks else {}  # too late to be of use
    assert ended == {**{str(k): (130, k + 1) for k in looks}, **late, "saved": (0, LOOKS)}
    out = tmp_path / "saved"
    assert rows(out, only(out))[0]["ranks"] == 2


@slow
def test_three_ranks_go_on_to_the_bit(broken):
    """Whose numbers are added in an order that the places in a message decide."""
    one, all_of_them = {"2": {9: TERM}}, {str(rank): {3: INT} for rank in range(3)}
    cases = {"first": {"1": {1: TERM}}, "third": all_of_them, "ninth": one}
    ended = broken(3, cases, *WIDE)
    assert ended == {"first": (130, 2), "third": (130, 4), "ninth": (130, 10)}


@slow
@pytest.mark.parametrize("flags", [[], ["--sync_bn"]])
@pytest.mark.parametrize("optimizer", ["agd", "spectral"])
def test_networks_with_batch_norm_go_on_to_the_bit(optimizer, flags, broken):
    """Each rank's running statistics are lost with it; rank 0's count, or for the test all ranks
    take them anew."""
    cases = {str(k): {"1": {k: TERM}} for k in (2, 5, 9)}
    broken(3, cases, *flags, "--optimizer", optimizer, norms=True)


@slow
def test_a_run_goes_on_with_another_number_of_ranks(run_ranks, tmp_path, capsys):  # noqa: F811
    assert call(*SMALL, "--out", tmp_path / "whole")[0] == 0
    assert call(*SMALL, "--out", tmp_path / "three", asked={9: STOP})[0] == 130
    several = [(words(*SMALL, "--out", tmp_path / "three"), {}),
               (words(*SMALL, "--out", tmp_path / "two"), {"2": {9: TERM}})]  # fmt: skip
    per_rank, errors = run_ranks(3, "runs", several=several)
    assert None not in per_rank, errors
    assert [x[:2] for x in per_rank[0]] == [(0, 5), (130, 10)]
    assert call(*SMALL, "--out", tmp_path / "two")[0] == 0
    weights = outcome(tmp_path / "whole")[1]
    for name in ("three", "two"):
        copies = outcome(tmp_path / name)[1]
        assert all(torch.allclose(weights[k], copies[k], atol=1e-5) for k in weights)
        a, b = (rows(tmp_path / x, only(tmp_path / x)) for x in ("whole", name))
        for key, kind in (("loss", "step"), ("test_loss", "epoch"), ("test_acc", "epoch")):
            x, y = ([row[key] for row in log if row["kind"] == kind] for log in (a, b))
            assert x == pytest.approx(y, rel=1e-4)
        assert b[0]["resumed"][0]["ranks"] == (3 if name == "three" else 1)


@slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the ranks in /proc")
def test_signals_under_torchrun(run_main, tmp_path):
    """From outside, in the long test of an epoch: to one rank, and to all of them and to torchrun,
    as from a terminal, which torchrun passes on to ranks that have it already."""
    flags = words(*SMALL, "--distribute", "--cpu", "--epochs", 30, "--test_bs", 1)
    parts = tmp_path / "parts"

    def interrupt(signalled, least):
        plain = {k: v for k, v in os.environ.items() if k not in VARIABLES | {"SLURM_JOB_ID"}}
        process = subprocess.Popen(
            [sys.executable, *TORCHRUN, "2", "main.py", *flags, "--out", str(parts)],
            cwd=ROOT, env={**plain, "OMP_NUM_THREADS": "1"}, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            wait_for(lambda: epochs(parts) >= least or process.poll(), 100, lambda: "no epochs")
            signalled(process)
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert out.count("Interrupted after") == 1, out + errors
        assert rows(parts, only(parts))[-1]["stopped"] == "interrupted"
        return errors

    errors = interrupt(lambda process: os.kill(ranks(parts, "RANK")[1], TERM), 3)
    assert "exitcode  : 130" in errors and "-15" not in errors  # both ended by themselves
    interrupt(lambda process: os.killpg(process.pid, INT), 7)
    for name in ("parts", "whole"):
        done = run_main(*flags, out=tmp_path / name, launcher=[*TORCHRUN, "2"])
        assert done.returncode == 0, done.stderr
    same(parts, tmp_path / "whole")


def test_what_an_evaluation_has_read_training_reads_again(monkeypatch):
    """A GPU's votes, with stand-ins for what only a GPU has."""

    class Event:
        def __init__(self, blocking):
            assert blocking  # a wait that spins would take the core of another run

        def record(self):
            pass

        synchronize = record

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *x, pin_memory, **options: empty(*x, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    later = DelayedReads(torch.device("cuda"), lag=0)
    with torch.inference_mode():
        assert later.put(torch.tensor(3)) == [3]
    assert later.put(torch.tensor(4)) == [4]
