import errno
import json
import math
import re

import pytest
import torch

from runs.log import RunError, RunLog, read_rows
from runs.name import run_name

FIRST = {"kind": "run", "flags": {"epochs": 9}}
ROW = {"kind": "epoch", "train_loss": 1.0, "train_acc": 0.5, "test_loss": 1.0, "test_acc": 0.5,
       "eta_mean": None, "seconds": 1.0}  # fmt: skip


def written(out, name="a", settings=None, epochs=(1, 2)):
    """A run of these epochs, each of them logged and saved."""
    run = RunLog(out, name, settings or {"seed": 0})
    run.start(FIRST)
    for epoch in epochs:
        run.log({**ROW, "epoch": epoch})
        net = {"w": torch.full((2,), float(epoch))}
        assert run.save({"epoch": epoch, "net": net, "optimizer": {}}) is None
    run.release()
    return run


def test_a_cut_log_is_mended_at_the_checkpoint(tmp_path):
    path = written(tmp_path).log_path
    with open(path, "a") as file:
        file.write(json.dumps({**ROW, "epoch": 3}) + '\n{"kind": "epoch", "epo')
    run = RunLog(tmp_path, "a", {"seed": 0})
    checkpoint, warning = run.start({**FIRST, "flags": {"epochs": 20}})
    assert checkpoint["epoch"] == 2 and checkpoint["net"]["w"].tolist() == [2, 2]
    assert warning is None and run.saved == (2, 0)
    first, *epochs = read_rows(path)
    assert first["flags"]["epochs"] == 20 and first["settings"] == {"seed": 0}
    assert [row["epoch"] for row in epochs] == [1, 2] and epochs == run.epochs()


def test_other_settings_are_another_run(tmp_path):
    run = written(tmp_path)
    run.log({"kind": "end", "epochs": 2, "stopped": None, "final": True})
    assert RunLog(tmp_path, "a", {"seed": 0}).finished(2)[::2] == (2, None)
    assert RunLog(tmp_path, "a", {"seed": 0}).finished(3) is None
    run.log({"kind": "end"})  # cut down by somebody's hand
    assert RunLog(tmp_path, "a", {"seed": 0}).finished(2) is None
    other = RunLog(tmp_path, "a", {"seed": 1})
    for call in (lambda: other.finished(2), lambda: other.start(FIRST)):
        with pytest.raises(RunError, match="seed 0 then, 1 now"):
            call()
    run.log_path.unlink()
    with pytest.raises(RunError, match=r"a\.pt is of another run .*seed 0 then, 1 now"):
        other.start(FIRST)


def test_without_a_checkpoint_the_log_starts_anew(tmp_path):
    """One epoch may have been logged before its checkpoint; more are not thrown away."""
    run = written(tmp_path, "a", epochs=[1])
    run.checkpoints.discard()
    assert RunLog(tmp_path, "a", {"seed": 0}).start(FIRST) == (None, None)
    assert [row["kind"] for row in run.rows()] == ["run"]
    run = written(tmp_path, "b")
    run.checkpoints.discard()
    before = run.log_path.read_bytes()
    with pytest.raises(RunError, match=r"2 epochs.*--fresh"):
        RunLog(tmp_path, "b", {"seed": 0}).start(FIRST)
    assert run.log_path.read_bytes() == before


def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "b").write_text("")
    with pytest.raises(RunError, match="choose --out"):
        RunLog(tmp_path / "b", "a", {}).start(FIRST)


def test_another_environment_is_noted_on_resuming(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start({**FIRST, "flags": {"test_bs": 3}, "torch": "1", "date": "then"})
    run.log({**ROW, "epoch": 1})
    run.save({"epoch": 1, "step": 7, "net": {}, "optimizer": {}})
    run.release()
    run = RunLog(tmp_path, "a", {})
    run.start({**FIRST, "flags": {"test_bs": 4}, "torch": "2", "date": "now"})
    assert run.changed == {"torch": "2", "flags": {"test_bs": 4}}
    first = run.rows()[0]
    assert (first["torch"], first["date"]) == ("1", "then")
    assert first["resumed"] == [{"after_epoch": 1, "step": 7, "date": "now", **run.changed}]


def test_a_run_is_made_by_one_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    run, other = RunLog(tmp_path, "a", {}), RunLog(tmp_path, "a", {})
    run.start(FIRST)
    with pytest.raises(RunError, match="another process is making"):
        other.start(FIRST)
    RunLog(tmp_path, "b", {}).start(FIRST)
    run.release()
    other.start(FIRST)


def test_rows_are_strict_json(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {"lr": math.inf}})
    row = {**ROW, "epoch": 1, "train_loss": math.nan, "list": [0.1, -math.inf]}
    run.log(row)
    text = run.log_path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert run.rows()[1] == {**row, "train_loss": None, "list": [0.1, None]}


def test_no_checkpoint_is_ahead_of_the_log(tmp_path):
    """What a full disk does not take waits, and no half line is left of it."""
    run, state = RunLog(tmp_path, "a", {}), {"epoch": 1, "net": {}, "optimizer": {}}
    run.start(FIRST)
    file = run.file

    class Full:
        room, truncate = 10, file.truncate

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = file.write(data[: self.room]), 0
            return written

    before = run.log_path.read_bytes()
    run.file = Full()
    assert "No space" in run.log({**ROW, "epoch": 1})
    assert len(run.log_path.read_bytes()) == len(before) + 10
    assert "No space" in run.save(state) and not run.checkpoint_path.exists()
    assert run.log_path.read_bytes() == before
    run.file = file
    assert run.log({**ROW, "epoch": 2}) is None
    assert [row["epoch"] for row in run.epochs()] == [1, 2]
    assert run.save(state) is None and run.checkpoint_path.exists()


def test_what_cannot_be_a_checkpoint_is_said(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start(FIRST)
    with pytest.raises(RunError, match=r"\['optimizer'\] is a function"):
        run.save({"epoch": 1, "net": {}, "optimizer": lambda: 0})
    assert not run.checkpoint_path.exists()


def test_names_are_portable_and_stay_apart():
    assert run_name("fcn", "cifar10", "bs128") == "fcn-cifar10-bs128"
    odd = ["a b", "a_b", "a:b", "ä", "ö", "A/b", "x" * 300 + "a", "x" * 300 + "b", "lr1e-05"]
    names = [run_name("fcn", part) for part in odd]
    assert len({name.lower() for name in names}) == len(odd)
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,120}", name) for name in names)
