import collections
import errno
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from runs.checkpoint import Checkpoints, Damaged, pack, plain, unpack, validate
from runs.files import write_whole


@pytest.fixture
def checkpoints(tmp_path):
    """Three were written; the last two are there."""
    checkpoints = Checkpoints(tmp_path / "a-lr0.1.pt")
    assert checkpoints.read() == (None, None)
    for n in (1, 2, 3):
        checkpoints.write(content(n))
    return checkpoints


def content(n):
    return {"epoch": n, "net": {"w": torch.full((1000,), float(n))}}


def epoch(checkpoints):
    checkpoint, warning = checkpoints.read()
    return checkpoint["epoch"], warning


def test_the_last_two_are_kept(checkpoints, tmp_path):
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
def test_a_damaged_newest_one_is_set_aside_and_the_one_before_used(how, checkpoints):
    bad = DAMAGE[how](checkpoints.path.read_bytes())
    assert bad != checkpoints.path.read_bytes()
    checkpoints.path.write_bytes(bad)
    number, warning = epoch(checkpoints)
    assert number == 2
    assert all(x in warning for x in (".pt is damaged (", ".pt.damaged", ".pt.previous is used"))
    assert checkpoints.damaged.read_bytes() == bad
    assert epoch(checkpoints) == (2, None)  # said once
    checkpoints.write(content(3))
    assert epoch(checkpoints) == (3, None)


def test_nothing_is_set_aside_where_there_is_nothing_else(checkpoints):
    for path in (checkpoints.path, checkpoints.previous):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"\.pt is damaged.*\.pt\.previous is damaged"):
        checkpoints.read()
    assert checkpoints.path.exists() and checkpoints.previous.exists()


@pytest.mark.parametrize("call", ["open", "fsync", "replace", "a bit"])
def test_what_fails_half_way_leaves_the_last_ones(call, checkpoints, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "a bit":  # which the disk has lost
        monkeypatch.setattr(os, "fsync", lambda handle: os.pwrite(handle, b"?", 200))
    else:
        monkeypatch.setattr("builtins.open" if call == "open" else f"os.{call}", full)
    with pytest.raises(OSError, match="does not read as" if call == "a bit" else "No space"):
        checkpoints.write(content(4))
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == ["a-lr0.1.pt", "a-lr0.1.pt.previous"]
    assert epoch(checkpoints) == (3, None)
    assert unpack(checkpoints.previous.read_bytes())["epoch"] == 2


@pytest.mark.parametrize("data", ["ä\n", b"", bytes(2**22 + 1)], ids=["text", "none", "large"])
def test_a_file_is_written_whole(data, tmp_path):
    write_whole(tmp_path / "a.txt", data)
    assert (tmp_path / "a.txt").read_bytes() == (data if isinstance(data, bytes) else data.encode())
    assert os.listdir(tmp_path) == ["a.txt"]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def archived(data, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, part in (("data.pkl", data), ("version", "3\n"), ("byteorder", "little")):
            archive.writestr(f"a/{name}", part)
    return buffer.getvalue()


@pytest.mark.parametrize("data", [
    pickle.dumps(Evil()),
    archived(pickle.dumps(Evil(), protocol=2)),
    archived(pickle.dumps({"epoch": os.system}, protocol=2)),
    archived(b"\x80\x02" + b"(" * 100_000),
    archived(b"\x00" * 10_000_000, zipfile.ZIP_DEFLATED),
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
    again = unpack(pack(state))
    assert again["a"].tolist() == [0, 1] and again["b"] == [1.5, 2, True, None, "x"]
    assert [type(x) for x in again["b"]] == [float, int, bool, type(None), str]
    assert type(again["c"]) is dict and type(again["c"][0][0]) is torch.Tensor
    assert type(state["version"]) is str
    with pytest.raises(TypeError, match=r"the state\['a'\]\[1\] is a set"):
        plain({"a": [1, {2}]}, "the state")


def test_a_checkpoint_of_earlier_runs_is_completed():
    """The first ones had only what an epoch ends with, later ones no generators."""
    old = {"epoch": 3, "settings": "{}", "net": {}, "optimizer": {}}
    whole = validate(old, 12)
    assert old.items() <= whole.items() and whole["step"] == 0 and whole["totals"] is None
    assert json.loads(whole["bad_images"]) == [] and list(whole["micro_bs"]) == [None, None]
    columns = {key: torch.zeros(5) for key in ("losses", "eta", "update")}
    totals = {**columns, "correct": torch.zeros(5, dtype=torch.int64), "counts": [128] * 5}
    broken = {**old, "step": 5, "totals": totals, "missing": 1, "seconds": 2.5,
              "not_finite": [(3, 4)], "micro_bs": [None, 64], "here": [1, "cpu", "2.6"],
              "bad_images": '[["a.jpg"], []]'}  # fmt: skip
    assert {**validate(broken, 12), "generators": None} == {**broken, "generators": None}
    for odd in ({"step": 13}, {"step": 0}, {"totals": {**totals, "counts": [1]}},
                {"totals": {**totals, "more": columns["eta"]}},
                {"totals": {**totals, "losses": columns["eta"] * 1j}}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(odd))):
            validate({**broken, **odd}, 12)
