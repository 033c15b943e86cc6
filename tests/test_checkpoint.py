import collections
import errno
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from runs import checkpoint
from runs.checkpoint import Checkpoints, Damaged, pack, plain, unpack
from runs.log import RunError, RunLog
from tests.test_run import epoch_row


def content(n):
    return {"epoch": n, "net": {"w": torch.full((1000,), float(n))}}


def epoch(checkpoints):
    found, warning = checkpoints.read()
    return found and found["epoch"], warning


def test_the_last_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a-lr0.1.pt")
    assert checkpoints.read() == (None, None)
    for n in (1, 2, 3):
        checkpoints.write(content(n))
    assert sorted(os.listdir(tmp_path)) == ["a-lr0.1.pt", "a-lr0.1.pt.previous"]
    assert epoch(checkpoints) == (3, None)
    os.unlink(checkpoints.path)  # killed between the two renamings
    assert epoch(checkpoints) == (2, None)
    checkpoints.write(content(4))
    assert epoch(checkpoints) == (4, None)
    assert unpack(checkpoints.previous.read_bytes())["epoch"] == 2
    checkpoints.discard()
    assert os.listdir(tmp_path) == []


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a bit": lambda data: data.replace(b"\x00\x00\x40\x40", b"\x00\x00\x41\x40", 1),
    "zeros": lambda data: data[:-4096] + bytes(4096),
    "text": lambda data: b"<html>not found</html>",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_newest_one_is_set_aside_and_the_one_before_used(how, tmp_path):
    checkpoints = Checkpoints(tmp_path / "a.pt")
    for n in (1, 2, 3):
        checkpoints.write(content(n))
    bad = DAMAGE[how](checkpoints.path.read_bytes())
    assert bad != checkpoints.path.read_bytes()
    checkpoints.path.write_bytes(bad)
    found, warning = epoch(checkpoints)
    assert found == 2
    assert "a.pt is damaged (" in warning
    assert "set aside as a.pt.damaged, and a.pt.previous is used" in warning
    assert (tmp_path / "a.pt.damaged").read_bytes() == bad
    assert epoch(checkpoints) == (2, None)  # said once
    checkpoints.write(content(3))
    assert epoch(checkpoints) == (3, None)


def test_nothing_is_set_aside_where_there_is_nothing_else(tmp_path):
    checkpoints = Checkpoints(tmp_path / "a.pt")
    for n in (1, 2):
        checkpoints.write(content(n))
    for path in (checkpoints.path, checkpoints.previous):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"a\.pt is damaged.*a\.pt\.previous is damaged"):
        checkpoints.read()
    assert checkpoints.path.exists() and checkpoints.previous.exists()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "read back"])
def test_what_fails_half_way_leaves_the_last_ones(call, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "a.pt")
    for n in (1, 2):
        checkpoints.write(content(n))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "read back":
        monkeypatch.setattr(checkpoint, "_holds", lambda path, data: False)
    elif call == "open":
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="does not read as" if call == "read back" else "No space"):
        checkpoints.write(content(3))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "a.pt.previous"]
    assert epoch(checkpoints) == (2, None)
    assert unpack(checkpoints.previous.read_bytes())["epoch"] == 1


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def archived(name, data, compression=zipfile.ZIP_STORED, times=1):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for i in range(times):
            archive.writestr(f"a/{name}{i or ''}", data)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", "little")
    return buffer.getvalue()


@pytest.mark.parametrize("data", [
    pickle.dumps(Evil()),
    archived("data.pkl", pickle.dumps(Evil(), protocol=2)),
    archived("data.pkl", pickle.dumps({"epoch": os.system}, protocol=2)),
    archived("data.pkl", b"\x80\x02" + b"(" * 100_000),
    archived("data.pkl", b"\x00" * 10_000_000, zipfile.ZIP_DEFLATED),
], ids=["pickle", "code", "class", "deep", "bomb"])  # fmt: skip
def test_a_forged_file_runs_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Damaged) as error:
        unpack(data)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_plain_types_alone_and_nothing_but_the_elements():
    large = torch.arange(1000.0)
    state = plain({
        "a": large[:2], "b": [np.float64(1.5), np.int64(2), True, None, "x"],
        "c": collections.defaultdict(dict, {0: (torch.nn.Parameter(large[:3]),)}),
        "version": torch.__version__,
    })  # fmt: skip
    assert len(pack(state)) < 3000
    found = unpack(pack(state))
    assert found["a"].tolist() == [0, 1] and found["b"] == [1.5, 2, True, None, "x"]
    assert type(found["c"]) is dict and type(found["c"][0][0]) is torch.Tensor
    assert type(state["version"]) is str
    with pytest.raises(TypeError, match=r"the state\['a'\]\[1\] is a set"):
        plain({"a": [1, {2}]}, "the state")


def test_what_cannot_be_a_checkpoint_is_said(tmp_path):
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {}})
    with pytest.raises(RunError, match=r"the state\['optimizer'\] is a function, which"):
        run.save({"epoch": 1, "net": {}, "optimizer": lambda: 0})
    assert not run.checkpoint_path.exists()


def test_no_checkpoint_is_ahead_of_the_log(tmp_path):
    """What a full disk does not take waits, and no half line is left of it."""
    run = RunLog(tmp_path, "a", {})
    run.start({"kind": "run", "flags": {}})
    file, state = run.file, {"epoch": 1, "net": {}, "optimizer": {}}

    class Full:
        def __init__(self, room):
            self.room = room

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written, self.room = file.write(data[: self.room]), 0
            return written

        def truncate(self, length):
            return file.truncate(length)

    before = run.log_path.read_bytes()
    run.file = Full(10)
    assert "No space" in str(run.log(epoch_row(1)))
    assert len(run.log_path.read_bytes()) == len(before) + 10
    assert "No space" in str(run.save(state)) and not run.checkpoint_path.exists()
    assert run.log_path.read_bytes() == before
    run.file = file
    assert run.log(epoch_row(2)) is None
    assert [row["epoch"] for row in run.epochs()] == [1, 2]
    assert run.save(state) is None and run.checkpoint_path.exists()
