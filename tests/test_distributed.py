import json

import pytest
import torch

from distributed import LAUNCHERS, LaunchError, start

FLAGS = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "2",
         "--train_bs", "100", "--test_bs", "77", "--cpu"]  # fmt: skip


def outcome(out):
    (log,) = (out / "logs").iterdir()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (saved,) = (out / "checkpoints").glob("*.pt")
    return rows, torch.load(saved, weights_only=True)["net"]


def test_ranks_train_as_one_process(run_main, tmp_path):
    """Batches that do not divide, the last one ragged: the mean is over the global batch."""
    one = run_main(*FLAGS, out=tmp_path / "one")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    three = run_main(*FLAGS, "--distribute", out=tmp_path / "three", launcher=launcher)
    assert one.returncode == 0, one.stderr
    assert three.returncode == 0, three.stderr
    assert three.stdout.count("epoch 1/2") == 1  # one rank speaks
    rows, weights = outcome(tmp_path / "one")
    others, copies = outcome(tmp_path / "three")
    assert others[0]["ranks"] == 3
    assert all(torch.allclose(weights[k], copies[k], atol=1e-5) for k in weights)
    for a, b in zip(rows[1:3], others[1:3]):
        assert b["test_acc"] == pytest.approx(a["test_acc"], abs=1.5 / 360)
        for key in ("train_loss", "test_loss", "eta_mean"):
            assert b[key] == pytest.approx(a[key], rel=1e-4)
        assert round(b["test_acc"] * 360, 6).is_integer()


@pytest.mark.parametrize(
    "variables, words",
    [
        ({}, "torchrun.*srun or mpirun"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun.*SLURM_NTASKS"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun.*LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
          "MASTER_PORT": "1"}, "RANK.*whole numbers"),
        # an mpirun within a SLURM job, whose variables say rank 0 everywhere
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0",
          "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "mpirun.*MASTER_ADDR"),
    ],
)  # fmt: skip
def test_missing_launcher_variables_are_named(variables, words, monkeypatch):
    for name in [n for names in LAUNCHERS.values() for n in names] + ["MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=words):
        start(torch.device("cpu"), distribute=True)


def test_one_process_needs_no_launcher():
    world = start(torch.device("cpu"))
    assert (world.rank, world.size) == (0, 1)
    x = torch.ones(2)
    world.sum(x)
    assert x.tolist() == [1, 1]
    assert world.agree({"a": 1}) == {"a": 1}
