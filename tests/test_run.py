import json
import math
import re

import pytest
import torch

from runs.log import RunError, RunLog
from runs.name import run_name


def state(epoch):
    net = {"w": torch.full((2,), float(epoch))}
    return {"epoch": epoch, "net": net, "optimizer": {"param_groups": []}}


FIGURES = {"train_loss": 1.0, "train_acc": 0.5, "test_loss": 1.0, "test_acc": 0.5, "eta_mean": None,
           "seconds": 1.0}  # fmt: skip


def epoch_row(epoch):
    return {"kind": "epoch", "epoch": epoch, **FIGURES, "train_loss": 1 / epoch}


def written(run, epochs):
    run.start({"kind": "run", "flags": {"epochs": 9}})
    for epoch in epochs:
        run.log(epoch_row(epoch))
        run.save(state(epoch))
    run.release()


def test_a_cut_log_is_mended_at_the_checkpoint(tmp_path):
    written(RunLog(tmp_path, "a", {"seed": 0}), [1, 2])
    with open(tmp_path / "logs" / "a.jsonl", "a") as file:
        file.write(json.dumps(epoch_row(3)) + '\n{"kind": "epoch", "epo')
    run = RunLog(tmp_path, "a", {"seed": 0})
    checkpoint, _ = run.start({"kind": "run", "flags": {"epochs": 20}})
    assert checkpoint["epoch"] == 2 and checkpoint["net"]["w"].tolist() == [2, 2]
    first, *epochs = run.rows()
    assert first["flags"]["epochs"] == 20
    assert [row["epoch"] for row in epochs] == [1, 2]


def test_another_runs_checkpoint_is_refused(tmp_path):
    written(RunLog(tmp_path, "a", {"seed": 0}), [1])
    with pytest.raises(RunError, match="seed 0 then, 1 now"):
        RunLog(tmp_path, "a", {"seed": 1}).start({"kind": "run", "flags": {}})


def test_without_a_checkpoint_the_log_starts_anew(tmp_path):
    """One epoch may have been logged before its checkpoint; more are not thrown away."""
    run = RunLog(tmp_path, "a", {})
    written(run, [1])
    run.checkpoints.discard()
    assert RunLog(tmp_path, "a", {}).start({"kind": "run", "flags": {}}) == (None, None)
    assert [row["kind"] for row in run.rows()] == ["run"]
    run = RunLog(tmp_path, "b", {})
    written(run, [1, 2])
    run.checkpoints.discard()
    before = run.log_path.read_bytes()
    with pytest.raises(RunError, match=r"2 epochs.*--fresh"):
        RunLog(tmp_path, "b", {}).start({"kind": "run", "flags": {}})
    assert run.log_path.read_bytes() == before


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path):
    run = RunLog(tmp_path, "a", {"dataset": "x"})
    written(run, [1, 2])
    run.log({"kind": "end", "epochs": 2, "stopped": None, "final": True})
    assert RunLog(tmp_path, "a", {"dataset": "x"}).finished(2)[0] == 2
    run.log({"kind": "end"})  # cut down by somebody's hand
    assert RunLog(tmp_path, "a", {"dataset": "x"}).finished(2) is None
    with pytest.raises(RunError, match="dataset x then, y now"):
        RunLog(tmp_path, "a", {"dataset": "y"}).finished(2)


@pytest.mark.parametrize("fault", ["foreign checkpoint", "binary log", "list", "folder"])
def test_foreign_files_are_named(fault, tmp_path):
    run = RunLog(tmp_path, "a", {})
    if fault == "foreign checkpoint":
        torch.save({"model": 1}, run.checkpoint_path)
    elif fault == "folder":
        run.log_path.mkdir()
    else:
        run.log_path.write_bytes(b"\xff\xfe\n\n" if fault == "binary log" else b"[1]\n")
    with pytest.raises(RunError, match=r"a\.(pt|jsonl)"):
        run.start({"kind": "run", "flags": {}})


def test_another_environment_is_noted_on_resuming(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {}, "torch": "1", "date": "then"})
    run.log(epoch_row(1))
    run.save(state(1))
    run.release()
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {}, "torch": "2", "date": "now"})
    first = run.rows()[0]
    assert (first["torch"], first["date"]) == ("1", "then")
    assert first["resumed"] == [{"after_epoch": 1, "date": "now", "torch": "2"}]


def test_a_run_is_made_by_one_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    run, other = RunLog(tmp_path, "a", {}), RunLog(tmp_path, "a", {})
    first = {"kind": "run", "flags": {}}
    run.start(first)
    with pytest.raises(RunError, match="another process is making"):
        other.start(first)
    RunLog(tmp_path, "b", {}).start(first)
    run.release()
    other.start(first)


def test_rows_are_strict_json(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {"lr": math.inf}})
    row = {**epoch_row(1), "train_loss": math.nan, "list": [1.0, -math.inf]}
    run.log(row)
    text = run.log_path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.rows()[1] == {**row, "train_loss": None, "list": [1.0, None]}


def test_names_are_portable_and_stay_apart():
    assert run_name("fcn", "cifar10", None, "bs128", 0) == "fcn-cifar10-bs128-0"
    odd = ["a b", "a_b", "a:b", "ä", "ö", "A/b", "x" * 300 + "a", "x" * 300 + "b", "lr1e-05"]
    names = [run_name("fcn", part) for part in odd]
    assert len({name.lower() for name in names}) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,120}", name) for name in names)
