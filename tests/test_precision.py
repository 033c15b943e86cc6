"""--deterministic: torch's switches, and the sentence for an operation without such a form."""

import os

import pytest
import torch

from training import precision


@pytest.fixture
def restored(monkeypatch):
    """Restore the process's switches after the test."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before after the test
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


@pytest.mark.parametrize("workspace, expected", [(None, ":4096:8"), (":16:8", ":16:8")])
def test_deterministic_sets_every_switch_and_fills_no_memory(
    workspace, expected, restored, monkeypatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    if workspace is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", workspace)
    torch.backends.cudnn.benchmark = True
    precision.set_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected


def test_an_operation_that_torch_refuses_is_named_in_one_sentence(restored):
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
