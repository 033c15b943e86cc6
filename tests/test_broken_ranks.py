"""Runs of several ranks that a signal breaks, wherever it comes and to whichever rank."""

import signal

import pytest
import torch

from tests.test_course import LOOKS, SMALL, only, same
from tests.test_distributed import run_ranks  # noqa: F401 (a fixture)
from tests.test_main import rows

TERM, INT, USR1 = int(signal.SIGTERM), int(signal.SIGINT), int(signal.SIGUSR1)


def words(*flags):
    return [str(flag) for flag in flags]


def broken(run, size, cases, *flags, folder):
    """Have `size` ranks make an unbroken run in `folder`/whole and, of {name: numbers} of tests.
    ranks.runs, each run that is broken and goes on; returns (code, looks) of the broken ones."""
    several = [(words(*SMALL, *flags, "--out", folder / "whole"), {})]
    for name, numbers in cases.items():
        command = words(*SMALL, *flags, "--out", folder / name)
        several += [(command, numbers), (command, {})]
    found, errors = run(size, "runs", several=several)
    assert None not in found, errors
    for rank in found:
        assert rank == found[0]  # they end in the same step
        assert [code for code, _ in rank[::2]] == [0] * (len(cases) + 1)
    return dict(zip(cases, found[0][1::2]))


def test_a_signal_to_one_rank_breaks_all_in_the_same_step(run_ranks, tmp_path):  # noqa: F811
    """At every look of the rank; all know of it at the next one. The state goes on to the bit."""
    cases = {str(k): {"1": {k: TERM}} for k in range(1, LOOKS + 1)}
    ended = broken(run_ranks, 2, cases, folder=tmp_path)
    for k in range(1, LOOKS):
        assert ended[str(k)] == (130, k + 1)
    assert ended[str(LOOKS)] == (0, LOOKS)  # too late to be of use
    for name in cases:
        same(tmp_path / name, tmp_path / "whole")
