import json
import math

import pytest
import torch

from run import Run, RunError, environment, run_name


def state(epoch):
    return epoch, {"w": torch.full((2,), float(epoch))}, {"param_groups": []}


def epoch_row(epoch):
    return {"kind": "epoch", "epoch": epoch, "train_loss": 1 / epoch}


def written(run, epochs):
    run.start({"kind": "run", "flags": {"epochs": 9}}, torch.device("cpu"))
    for epoch in epochs:
        run.log(epoch_row(epoch))
        run.save(*state(epoch))


def test_a_cut_log_is_mended_at_the_checkpoint(tmp_path):
    written(Run(tmp_path, "a", {"seed": 0}), [1, 2])
    with open(tmp_path / "logs" / "a.jsonl", "a") as file:
        file.write(json.dumps(epoch_row(3)) + '\n{"kind": "epoch", "epo')
    run = Run(tmp_path, "a", {"seed": 0})
    checkpoint = run.start({"kind": "run", "flags": {"epochs": 20}}, torch.device("cpu"))
    assert checkpoint["epoch"] == 2 and checkpoint["net"]["w"].tolist() == [2, 2]
    first, *epochs = run.rows()
    assert first["flags"]["epochs"] == 20
    assert [row["epoch"] for row in epochs] == [1, 2]


def test_another_runs_checkpoint_is_refused(tmp_path):
    written(Run(tmp_path, "a", {"seed": 0}), [1])
    with pytest.raises(RunError, match="seed 0 then, 1 now"):
        Run(tmp_path, "a", {"seed": 1}).start({"kind": "run", "flags": {}}, torch.device("cpu"))


def test_without_a_checkpoint_the_log_starts_anew(tmp_path):
    run = Run(tmp_path, "a", {})
    written(run, [1, 2])
    run.checkpoint_path.unlink()
    assert Run(tmp_path, "a", {}).start({"kind": "run", "flags": {}}, torch.device("cpu")) is None
    assert [row["kind"] for row in run.rows()] == ["run"]


def test_rows_are_strict_json(tmp_path):
    run = Run(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {"lr": math.inf}}, torch.device("cpu"))
    run.log({"kind": "epoch", "loss": math.nan, "list": [1.0, -math.inf]})
    text = run.log_path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.rows()[1] == {"kind": "epoch", "loss": None, "list": [1.0, None]}


@pytest.mark.parametrize(
    "parts, name",
    [
        (("fcn", "cifar10", None, "bs128"), "fcn-cifar10-bs128"),
        (("fcn", "folder:/data/My images/ä"), "fcn-folder_data_My_images"),
        (("lr1e-05", "a:b"), "lr1e_05-a_b"),
    ],
)
def test_names_are_portable(parts, name):
    assert run_name(*parts) == name


def test_long_names_stay_apart():
    a, b = run_name("x" * 300 + "a"), run_name("x" * 300 + "b")
    assert a != b and len(a) == len(b) <= 120


def test_environment_is_plain_json():
    assert json.loads(json.dumps(environment(torch.device("cpu"))))["torch"] == torch.__version__
