"""Several runs in one process, as on a GPU, beside processes of their own."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from scripts import results, runner
from scripts.results import Results
from tests.conftest import ROOT
from tests.test_reproduce import DIGITS, call, lasting, logs, small_table, start, wait_for


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # their number has a say in the last digits


def test_runs_that_share_a_process_come_out_as_alone(one_thread, monkeypatch, tmp_path, capsys):
    """To the bit, weights included, one of them wrong and four of them at once."""
    (tmp_path / "broken.npz").write_bytes(b"no archive")

    def table(scale):
        rows = small_table(scale)
        words = [*rows[0].flags[:-1], "1"]
        words[words.index("digits")] = "npz:broken.npz"
        odd = rows[0]._replace(flags=tuple(words))
        return [*rows, odd, *(row._replace(flags=(*row.flags[:-1], "1")) for row in rows)]

    monkeypatch.setattr(results, "experiments", table)
    found = []
    for together in ("on", "off"):
        out = tmp_path / together
        how = ["--jobs", "4", "--together", together, "--device", "cpu", "--data_dir", tmp_path]
        assert call("fig5", "--out", out, *how) == 1
        said = capsys.readouterr()
        assert "broken.npz is damaged" in said.err and "Traceback" not in said.err
        found.append({name: lasting(rows) for name, rows in logs(out).items()})
        found[-1]["weights"] = [
            torch.load(path, weights_only=True)["net"]
            for path in sorted((out / "quick" / "checkpoints").glob("*.pt"))
        ]
        assert (out / "quick" / "output" / "worker.txt").exists() == (together == "on")
    assert len(found[0]) == 9 and found[0].keys() == found[1].keys()
    mine, theirs = (one.pop("weights") for one in found)
    assert found[0] == found[1]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(mine, theirs, strict=True) for k in a)


UNRECORDABLE = """
import sys
sys.path.insert(0, ROOT)
import training.cuda_graph as replay
from importlib.util import module_from_spec, spec_from_file_location

recorded, broken = [], []

def record(work):
    # The third recording fails, and from then on no replay works.
    recorded.append(work)
    if len(recorded) > 2:
        broken.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    def replayed():
        with replay.RECORDING:
            if broken:
                raise RuntimeError("Offset increment outside graph capture encountered")
            work()

    return replayed

replay.cuda_recorder = lambda: record
flags.no_graph = lambda args: None if args.optimizer == "agd" else "another"
spec = spec_from_file_location("program", ROOT + "/main.py")
program = module_from_spec(spec)
spec.loader.exec_module(program)
main = program.main
"""


def test_runs_whose_process_cannot_record_a_graph_start_again_without(
    one_thread, monkeypatch, tmp_path, capsys
):
    """With torch before 2.12 no other run of the process could replay its graphs."""
    (tmp_path / "main.py").write_text(UNRECORDABLE.replace("ROOT", repr(str(ROOT))))

    def table(scale):
        agd, adam, *_ = small_table(scale, 12)
        seeds = (agd._replace(flags=(*agd.flags[:-1], str(seed))) for seed in range(3))
        return [*seeds, adam]

    monkeypatch.setattr(results, "experiments", table)
    found = []
    for out, where in (("broken", tmp_path), ("whole", ROOT)):
        monkeypatch.chdir(where)  # whose main.py the process takes
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        how = ["--jobs", "4", "--together", "on", "--device", "cpu", "--fresh"]
        assert call("fig5", "--out", tmp_path / out, *how) == 0, capsys.readouterr()
        found.append(logs(tmp_path / out))
    broken, whole = found
    first = broken["fcn3x16-digits-mse-bs128-agd-seed0-updates"][0]
    assert first["no_cuda_graph"] == "--cuda_graph off"
    assert broken.keys() == whole.keys() and len(whole) == 4
    for name, rows in broken.items():
        assert lasting(rows)[1:] == lasting(whole[name])[1:]


def test_what_they_print_stays_apart(one_thread, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "experiments", small_table)
    how = ["--jobs", "4", "--together", "on", "--device", "cpu"]
    assert call("fig5", "--out", tmp_path, *how) == 0
    folder = tmp_path / "quick" / "output"
    texts = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    assert texts.pop("worker") == ""
    assert texts.keys() == logs(tmp_path).keys()
    for name, text in texts.items():
        assert text.count("Finished 3 epochs") == text.count("epoch 3/3") == 1
        assert [line for line in text.splitlines() if line.startswith("Log ")][0].endswith(
            f"{name}.jsonl"
        )


def test_a_time_limit_stops_all_of_them_and_the_command_goes_on(one_thread, tmp_path):
    how = ["--jobs", "2", "--together", "on", "--time_limit", "20s"]
    process = start(tmp_path, *how, epochs=10**5)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "Traceback" not in said, said
    first = logs(tmp_path)
    assert {rows[-1]["stopped"] for rows in first.values()} == {"interrupted"} and len(first) == 2
    done = {name: rows[-1]["epochs"] for name, rows in first.items()}
    assert all(done.values())


def test_killed_it_takes_its_runs_along(tmp_path):
    process = start(tmp_path, "--jobs", "4", "--together", "on", epochs=100000)
    there = tmp_path / "quick" / "logs"
    wait_for(lambda: there.exists() and sum(map(results.epochs_done, there.glob("*.jsonl"))) > 4)
    process.kill()
    process.wait()
    process.stdout.close()
    time.sleep(2)
    sizes = [path.stat().st_size for path in there.glob("*.jsonl")]
    time.sleep(1)
    assert sizes == [path.stat().st_size for path in there.glob("*.jsonl")]


def test_a_host_that_dies_fails_its_runs_and_the_others_get_a_new_one(one_thread, tmp_path):
    there = Results(tmp_path, "quick")
    some = runner.Runner(there, 1, ["--device", "cpu"], None, "fig5", together=True)
    long = [runner.Task(f"long{i}", (*DIGITS.split(), "--seed", str(i)), 100000) for i in (1, 2)]
    try:
        some._start(long[0])
        ((first, _),) = some.running.items()
        assert first.poll() is None
        first.host.process.kill()
        assert first.wait(20) and first.poll() == -9
        some.running.clear()
        some._start(long[1])
        ((second, _),) = some.running.items()
        assert second.host is not first.host and second.poll() is None
        wait_for(lambda: list(tmp_path.glob("quick/logs/*.jsonl")))
    finally:
        began = time.monotonic()
        some.stop()
    assert second.poll() == 130 and time.monotonic() - began < runner.GRACE
    assert some.host is None and second.host.process.returncode == 0


def test_what_a_library_prints_does_not_come_between(one_thread, monkeypatch, tmp_path):
    def table(scale):
        rows = [list(row.flags) for row in small_table(scale)[:2]]
        for words in rows:  # wide enough for oneDNN, which prints what it does
            words[words.index("16")] = "128"
        return [x._replace(flags=tuple(f)) for x, f in zip(small_table(scale), rows)]

    monkeypatch.setattr(results, "experiments", table)
    monkeypatch.setenv("ONEDNN_VERBOSE", "1")
    how = ["--jobs", "2", "--together", "on", "--device", "cpu"]
    assert call("fig5", "--out", tmp_path, *how) == 0


def test_a_worker_without_runs_ends_with_its_input():
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.worker"], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    order = {"run": 7, "flags": ["--arch", "fnc"], "output": os.devnull}
    said = process.communicate(json.dumps({"stop": True}) + "\n" + json.dumps(order) + "\n", 60)[0]
    assert process.returncode in (0, 1)  # the input may end before the run has
    assert said in ("", '{"run": 7, "code": 2}\n')
