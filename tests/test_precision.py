"""--deterministic: torch's switches, and the sentence for an operation without such a form."""

import os

import pytest
import torch

from training import precision


@pytest.fixture
def switches(monkeypatch):
    """Turn all switches off, and restore them after the test."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # which monkeypatch restores, if it is unset
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("workspace, expected", [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_sets_every_switch_and_fills_no_memory(
    workspace, expected, switches, monkeypatch
):
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    precision.set_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


def test_an_operation_that_torch_refuses_is_named_in_one_sentence(switches):
    precision.set_deterministic()
    with pytest.raises(RuntimeError) as error:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    refusal = precision.refused(error.value)
    assert isinstance(refusal, precision.NotDeterministic)
    assert str(refusal) == "put_ has no deterministic form; leave out --deterministic"
    cublas = RuntimeError(  # torch's words, in short
        "Deterministic behavior was enabled with `torch.use_deterministic_algorithms(True)`, but "
        "this operation uses CuBLAS: set CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8"
    )
    assert "needs CUBLAS_WORKSPACE_CONFIG" in str(precision.refused(cublas))
    assert precision.refused(RuntimeError("out of memory")) is None
    assert precision.refused(ValueError("torch.use_deterministic_algorithms(True)")) is None
