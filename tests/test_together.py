"""Several runs in one process, as on a GPU, beside processes of their own: --together."""

import pytest
import torch

import main as program
from scripts import results, together
from scripts.together import Host
from tests.conftest import ROOT
from tests.test_reproduce import DIGITS, call, lasting, logs, small_table, wait_for


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # their number has a say in the last digits


def with_seed(row, seed, **words):
    flags = [words.get(x, x) for x in row.flags[:-1]]
    return row._replace(flags=(*flags, str(seed)))


ON = ["--jobs", "4", "--device", "cpu", "--together", "on"]


def test_runs_that_share_a_process_come_out_as_alone(monkeypatch, tmp_path, capsys):
    """To the bit, weights included, one of them broken; their output and a library's stays apart.
    """
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    rows = small_table("")  # of 128 units, wide enough for oneDNN, which prints its work
    table = [with_seed(row, 0, **{"16": "128"}) for row in rows]
    bad = with_seed(rows[0], 1, digits="npz:broken.npz")
    monkeypatch.setattr(results, "experiments", lambda scale: [*table, bad])
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    assert call("fig5", "--out", tmp_path, *ON, "--data_dir", tmp_path) == 1
    error = capsys.readouterr().err
    assert "broken.npz is damaged" in error and "Traceback" not in error
    assert "onednn" in (tmp_path / "quick" / "output" / "worker.txt").read_text()
    assert len(logs(tmp_path)) == 4
    torch.set_num_threads(1)
    for row in table:
        program.main([*row.flags, "--epochs", "3", "--out", str(tmp_path / "alone")])
    for name, alone in logs(tmp_path, "alone").items():
        assert lasting(logs(tmp_path)[name]) == lasting(alone)
        text = (tmp_path / "quick" / "output" / f"{name}.txt").read_text()
        assert text.count("Finished 3 epochs") == 1 and "onednn" not in text
        ours, theirs = (
            torch.load(tmp_path / folder / "checkpoints" / f"{name}.pt", weights_only=True)["net"]
            for folder in ("quick", "alone")
        )
        assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


UNRECORDABLE = """
import sys
sys.path.insert(0, ROOT)
from importlib.util import module_from_spec, spec_from_file_location
from scripts import together
from training.cuda_graph import FAILURES
spec = spec_from_file_location("program", ROOT + "/main.py")
program = module_from_spec(spec)
spec.loader.exec_module(program)

def main(flags, requests):
    if "--cuda_graph" in flags:
        return program.main(flags, requests)
    program.main([*flags, "--epochs", "1"], requests)
    FAILURES.append("a graph could not be recorded")
    return 1

sys.modules["main"] = sys.modules["__main__"]
together.serve()
"""


@pytest.mark.slow
def test_runs_whose_process_cannot_record_a_graph_go_on_without(monkeypatch, tmp_path):
    """With torch before 2.12 no other run of the process could replay its graphs. --fresh does not
    start them over once more."""
    host = tmp_path / "host.py"
    host.write_text(UNRECORDABLE.replace("ROOT", repr(str(ROOT))))
    monkeypatch.setattr(together, "__file__", str(host))
    monkeypatch.setattr(results, "experiments", small_table)
    monkeypatch.chdir(tmp_path)
    assert call("fig5", "--out", tmp_path, *ON, "--fresh") == 0
    assert [rows[-1]["epochs"] for rows in logs(tmp_path).values()] == [3] * 4
    output = (tmp_path / "quick" / "output").glob("fcn*.txt")
    assert "Going on after epoch 1" in "".join(path.read_text() for path in output)


@pytest.mark.slow
def test_a_host_that_dies_fails_its_runs_and_the_next_gets_another(monkeypatch, tmp_path):
    def run(seed):
        words = [*DIGITS.split(), "--epochs", "100000", "--device", "cpu", "--seed", seed]
        return start([*words, "--out", str(tmp_path)], tmp_path / f"{seed}.txt", {})

    monkeypatch.chdir(ROOT)
    with Host() as start:
        first = run("1")
        assert first.poll() is None
        first.kill()
        assert first.poll() == -9
        second, wrong = run("2"), run("x")
        wait_for(lambda: list(tmp_path.glob("logs/*.jsonl")))
        wait_for(lambda: wrong.poll() == 2, 20)
        assert second.poll() is None
        second.stop()
        wait_for(lambda: second.poll() == 130, 30)
