"""tests/fuzz.py finds what a reader must not do, and the readers stand its inputs."""

import os
import pickle
import subprocess
import time

import numpy as np
import pytest

from tests.fuzz import READERS, Harm, Reader, fuzz, main, make_seeds


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    return make_seeds(str(tmp_path_factory.mktemp("seeds")))


@pytest.mark.parametrize("name", READERS)
def test_no_input_does_harm(name, seeds, tmp_path):
    counts, finding = fuzz(READERS[name], seeds[name], 200, tmp_path, 0, 30)
    assert not finding and counts[0] == 200 == counts[1] + counts[2] and min(counts) > 0


@pytest.mark.slow
def test_the_command(capsys):
    assert main(["--inputs", "6000", "--seed", "1"]) == 0
    assert capsys.readouterr().out.count("| 1,000 |") == len(READERS)


def forever(path):
    while True:
        try:
            time.sleep(60)
        except Exception:  # as readers have it
            pass


@pytest.mark.parametrize(("read", "message"), [
    (forever, "Timeout"),
    (lambda path: pickle.loads(pickle.dumps(Harm())), "it ran pickle.find_class"),
    (lambda path: np.ones(2**29, np.uint8), "MemoryError"),
    (lambda path: {}[path], "KeyError"),
    (lambda path: subprocess.run(["true"]), "it ran subprocess.Popen"),
    (lambda path: open(f"{path}.new", "w"), "it ran open"),
    (lambda path: os.remove(path), "it ran os.remove"),
    (lambda path: eval("1 + 1"), "it ran compile"),
    (lambda path: os.abort(), "exit code -6"),
])  # fmt: skip
def test_what_a_reader_must_not_do_is_found(read, message, tmp_path):
    def reader(path):
        if path.read_bytes() != b"whole":  # which is read before the watch
            read(path)

    counts, finding = fuzz(Reader(reader), [b"whole"], 50, tmp_path, 0, 1)
    assert message in finding and 0 < counts[0] < 50
    assert not (tmp_path / "input.new").exists() and (tmp_path / "input").exists()
