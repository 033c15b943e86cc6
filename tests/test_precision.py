import os

import pytest
import torch

import training.precision as arithmetic


@pytest.fixture
def restored(monkeypatch):
    """The switches of the process, as they were, after the test."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def test_deterministic_sets_every_switch_and_fills_no_memory(restored):
    torch.backends.cudnn.benchmark = True
    arithmetic.set_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_was_chosen_stays(restored, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    arithmetic.set_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_what_torch_refuses_is_one_sentence(restored):
    arithmetic.set_deterministic()
    with pytest.raises(RuntimeError) as error:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    said = arithmetic.refused(error.value)
    assert isinstance(said, arithmetic.NotDeterministic)
    assert str(said) == "put_ has no deterministic form; leave out --deterministic"
    cublas = RuntimeError(  # torch's words
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` "
        "or `at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable deterministic "
        "behavior in this case, you must set an environment variable before running your PyTorch "
        "application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
    )
    assert "needs CUBLAS_WORKSPACE_CONFIG" in str(arithmetic.refused(cublas))
    assert arithmetic.refused(RuntimeError("out of memory")) is None
    assert arithmetic.refused(ValueError("torch.use_deterministic_algorithms(True)")) is None
