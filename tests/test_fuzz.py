"""scripts/fuzz.py notices what it is there to notice; the readers stand a few hundred inputs."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts import fuzz, mutations
from scripts.fuzz import Guard, reader, rng_of
from scripts.mutations import mutated, seeds


@pytest.fixture(scope="module")
def guard():
    return Guard(2**28, seconds=20)  # the machine may be busy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_no_input_does_harm(target, guard, tmp_path):
    lay, read = reader(target, tmp_path)
    known, outcomes = seeds(target), set()
    for data in known:
        read(lay(data))

    @settings(max_examples=200, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.randoms(use_true_random=False))
    def search(rng):
        accepted, said = guard(read, lay(mutated(rng, target, known)))
        assert said is None, said
        outcomes.add(accepted)

    search()
    for index in range(100):
        accepted, said = guard(read, lay(mutated(rng_of(0, target, index), target, known)))
        assert said is None, (index, said)
        outcomes.add(accepted)
    assert outcomes == {True, False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_whole_files_are_accepted_and_hostile_ones_refused(target, guard, tmp_path):
    lay, read = reader(target, tmp_path)
    found = [guard(read, lay(data)) for data in seeds(target)]
    assert not mutations.RAN and not any(said for _, said in found)
    # Pickles that would run, PostScript, and folders without images.
    hostile = {"npz": [3], "jsonl": [], "checkpoint": [5, 6], "folder": range(19, 26)}[target]
    assert [i for i, (accepted, _) in enumerate(found) if not accepted] == list(hostile)


def test_an_input_is_a_function_of_seed_and_index(monkeypatch):
    def some():
        return [mutated(rng_of(3, target, i), target, seeds(target))
                for target in fuzz.TARGETS for i in range(60)]  # fmt: skip

    first = some()
    monkeypatch.setattr(zipfile.time, "localtime", lambda *args: time.gmtime(10**9))
    assert some() == first and len(set(first)) > 150


def forever(path):
    while True:
        try:
            time.sleep(60)
        except Exception:  # as readers have it
            pass


def unpickling(path):
    import pickle

    return pickle.loads(pickle.dumps(mutations.Canary())) is None


def quietly(path):
    mutations.canary()
    return True


def greedy(path):
    return len(np.ones(2**28, np.uint8)) > 0


@pytest.mark.parametrize("read, said", [
    (forever, "more than 1 s"),
    (unpickling, "it ran: pickle.find_class"),
    (quietly, "it ran: a pickle"),
    (greedy, "MB"),
    (lambda path: {}[path], "KeyError"),
    (lambda path: os.system("true"), "it ran: os.system"),
    (lambda path: subprocess.run(["true"]), "it ran: subprocess.Popen"),
    (lambda path: open(f"{path}.new", "w"), "it ran: open"),
    (lambda path: os.remove(path), "it ran: os.remove"),
    (lambda path: eval("1 + 1"), "it ran: compile"),
    (lambda path: sys.exit(0), "SystemExit"),
    (lambda path: Path(path).read_bytes() == b"", None),
])  # fmt: skip
def test_what_a_reader_must_not_do_is_found(read, said, tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"")
    accepted, found = Guard(2**26, seconds=1)(read, path)
    assert (accepted, found) == (True, None) if said is None else said in found
    assert path.exists() and not (tmp_path / "input.new").exists() and not mutations.RAN


def ends(target, engine, seed, first, inputs, seconds, scratch, counts):
    """As fuzz.work, with two inputs that end the process."""
    for index in range(first, inputs):
        counts[0] = index + 1
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5:
            os._exit(7)
        counts[1] += 1


def test_an_input_that_ends_the_process_is_found_and_the_rest_is_fed():
    row = fuzz.fuzz("jsonl", "mutate", 0, 0, 9, 100, task=ends)
    assert (row["inputs"], row["refused"]) == (9, 7)
    assert row["findings"] == [
        {"index": 3, "said": "it ended the process, signal 9"},
        {"index": 5, "said": "it ended the process, exit code 7"},
    ]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "fuzz.json"
    flags = ["--target", "npz", "--inputs", "60", "--first", "10", "--out", str(out)]
    assert fuzz.main(flags) == 0
    assert "npz" in capsys.readouterr().out
    content = json.loads(out.read_text())
    (row,) = content["rows"]
    assert row["inputs"] == 60 == row["refused"] + row["accepted"] and row["findings"] == []
    assert content["command"].endswith(" ".join(flags)) and "torch" in content["versions"]


def test_an_engine_that_is_not_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(fuzz.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        fuzz.main(["--engine", "atheris"])
    assert end.value.code == 2
    assert "error: --engine atheris: pip install atheris" in capsys.readouterr().err
