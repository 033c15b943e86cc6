"""What people start runs with, for real: SLURM's batch scripts and srun, mpirun, torchrun."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scripts import reproduce
from tests.conftest import ROOT
from tests.test_distributed import FOLDER, TORCHRUN, VARIABLES, folders, outcome
from tests.test_main import comparable
from tests.test_reproduce import small  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow
LOCAL = ROOT.parent / "shared" / "slurm" / "local.sh"  # a SLURM of one node, where it lies there
FLAGS = ["--cpu", "--dataset", "digits", "--train_examples", "300", "--test_examples", "77",
         "--depth", "3", "--width", "16", "--train_bs", "100"]  # fmt: skip
LAUNCH = {
    "srun": ["srun", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable],
    "mpirun": ["mpirun", "--oversubscribe", "-np", "2", sys.executable],
    "torchrun": [sys.executable, *TORCHRUN, "2"],
}
RANK = {"srun": "SLURM_PROCID", "mpirun": "OMPI_COMM_WORLD_RANK", "torchrun": "RANK"}
OWN = """#!/bin/sh
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --open-mode=append
#SBATCH --oversubscribe
#SBATCH --mem=1000
srun "$AGD_PYTHON" main.py "$@"
"""


def wait_for(condition, seconds, what):
    """What `condition` returns, once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what()}")


def call(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A cluster that is started on this machine for these tests; with AGD_TEST_CLUSTER set, the one
    that answers."""
    if not all(map(shutil.which, ("sbatch", "srun", "scontrol"))):
        pytest.skip("SLURM is not installed")
    if os.environ.get("AGD_TEST_CLUSTER"):
        yield
        return
    if not (LOCAL.exists() and shutil.which("slurmctld") and os.getuid() == 0):
        pytest.skip("SLURM is installed, and cannot be started here; AGD_TEST_CLUSTER=1 uses yours")
    folder = tmp_path_factory.mktemp("slurm")
    munged = subprocess.run(["munge", "-n"], capture_output=True, timeout=60).returncode == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run(
                ["bash", LOCAL, "start", folder], check=True, timeout=120,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            yield
            call("scancel", "--full", "--user", str(os.getuid()))
            wait_for(lambda: not call("squeue", "-h", "--me"), 60, lambda: call("squeue"))
        finally:
            pids = [int(path.read_text()) for path in folder.glob("slurm*.pid")]
            subprocess.run(["bash", LOCAL, "stop", folder], timeout=60)
            if not munged:
                pids.append(int(Path("/run/munge/munged.pid").read_text()))
                os.kill(pids[-1], signal.SIGTERM)
            left = [Path(f"/proc/{pid}") for pid in pids]
            wait_for(lambda: not any(path.exists() for path in left), 60, lambda: left)


class Job:
    """A batch script in the queue, on CPUs; `two`: of two tasks."""

    def __init__(self, script, out, *flags, two=False, options=()):
        out.mkdir(exist_ok=True)  # SLURM makes no folders
        self.out, self.path = out, out / "output.txt"
        if script == "one.sh":
            options = ["--cpus-per-task=2"]
        elif two:
            options = ["--ntasks-per-node=2"]
        path = script if isinstance(script, Path) else ROOT / "scripts" / "slurm" / script
        environment = {**os.environ, "AGD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.id = subprocess.run(
            ["sbatch", "--parsable", "--gpus-per-node=0", f"--output={self.path}", *options,
             path, *map(str, flags), "--out", out],
            cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def facts(self):
        words = call("scontrol", "show", "job", "-o", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self):
        return self.path.read_text() if self.path.exists() else ""

    def trains(self):
        """Wait for a few epochs."""
        wait_for(lambda: epochs(self.out) > 3, 100, self.output)
        return self

    def comes_to(self, state, restarts=0):
        """Wait until the job is in that state; returns its output."""
        wait_for(lambda: self.facts()["JobState"] == state, 180, lambda: f"{self.facts()} {self}")
        assert self.facts()["Restarts"] == str(restarts), self
        return self.output()

    def starts_again(self):
        call("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def __repr__(self):
        return f"job {self.id}:\n{self.output()}"


def start(launcher, *flags):
    """main.py as two ranks."""
    if launcher != "srun" and not shutil.which(LAUNCH[launcher][0]):
        pytest.skip(f"{launcher} is not installed")
    plain = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.Popen(
        [*LAUNCH[launcher], "main.py", "--distribute", *map(str, flags)],
        cwd=ROOT, env={**plain, **root, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ranks(out, variable):
    """rank -> process id of main.py, of the runs that write to `out`."""
    running = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            values = dict(
                x.split("=", 1) for x in (process / "environ").read_text().split("\0") if "=" in x
            )
        except OSError:
            continue
        if str(out) in words and "main.py" in words and variable in values:
            if "python" in words[0] and "torch.distributed.run" not in words:
                running[int(values[variable])] = int(process.name)
    return running


def epochs(out):
    return sum(p.read_text().count('"kind": "epoch"') for p in out.glob("logs/*.jsonl"))


def went_on(output):
    """The epoch after which a run went on: its last, or the one before, if its row was in the log
    and its checkpoint not yet written."""
    return int(re.search(r"Going on after epoch (\d+)", output)[1])


def same(one, two, ranks):
    """Whether the weights and the numbers of two runs agree; returns the launcher of the second."""
    (rows, weights), (others, copies) = outcome(one), outcome(two)
    assert others[0]["ranks"] == ranks and others[-1]["final"]
    assert all(torch.allclose(weights[k], copies[k], atol=1e-5) for k in weights)
    for key in ("train_loss", "test_loss", "test_acc"):
        assert others[-1][key] == pytest.approx(rows[-1][key], rel=1e-4)
    return others[0]["launcher"]


def same_bits(whole, parts):
    (rows, weights), (others, copies) = outcome(whole), outcome(parts)
    assert weights.keys() == copies.keys()
    assert all(torch.equal(x, copies[name]) for name, x in weights.items())
    assert comparable(rows)[1:] == comparable(others)[1:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "main.py", *FLAGS, "--epochs", "2", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return out


@pytest.fixture
def own(tmp_path):
    """A user's batch script, which knows nothing of signals."""
    path = tmp_path / "own.sh"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("script, launcher", [
    ("one.sh", None), ("srun.sh", "srun"), ("torchrun.sh", "torchrun"),
])  # fmt: skip
def test_a_batch_script_trains_as_one_process(script, launcher, slurm, alone, tmp_path):
    job = Job(script, tmp_path, *FLAGS, "--epochs", 2, two=True)
    output = job.comes_to("COMPLETED")
    assert output.count("epoch 2/2") == 1 and "rror" not in output, job
    assert same(alone, tmp_path, 2 if launcher else 1) == launcher


@pytest.mark.parametrize("launcher, killed", [
    ("srun", 1), ("srun", 0), ("mpirun", 1), ("mpirun", 0), ("torchrun", 1),
])  # fmt: skip
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(
    launcher, killed, alone, tmp_path, request
):
    """And comes to the result of one process."""
    if launcher == "srun":
        request.getfixturevalue("slurm")
    process = start(launcher, *FLAGS, "--epochs", 100000, "--out", tmp_path)
    try:
        wait_for(lambda: epochs(tmp_path) > 3 or process.poll(), 100, lambda: "no epochs")
        running = ranks(tmp_path, RANK[launcher])
        assert set(running) == {0, 1}
        os.kill(running[killed], signal.SIGKILL)
        output = process.communicate(timeout=60)[0]
        wait_for(lambda: not ranks(tmp_path, RANK[launcher]), 10, lambda: "ranks are left")
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert output.count("another rank is gone") == 1 and "frame #" not in output, output
    done = epochs(tmp_path)
    again = start(launcher, *FLAGS, "--epochs", done + 2, "--out", tmp_path)
    try:
        output = again.communicate(timeout=100)[0]
    finally:
        again.kill()
    assert again.returncode == 0 and went_on(output) in (done - 1, done), output
    rows, _ = outcome(tmp_path)
    assert epochs(tmp_path) == done + 2 and rows[0]["launcher"] == launcher
    for a, b in zip(outcome(alone)[0][1:3], [row for row in rows if row["kind"] == "epoch"]):
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-4)


def test_an_error_of_one_rank_is_shown_once_and_not_tried_again(slurm, tmp_path):
    folders(tmp_path / "set", bad=[3])
    flags = [*FOLDER, "--cpu", "--dataset", f"folder:{tmp_path / 'set'}"]
    output = Job("srun.sh", tmp_path, *flags, two=True).comes_to("FAILED")
    assert output.count("3.png cannot be decoded") == 1 and "Traceback" not in output, output


def test_when_the_time_is_up_a_job_goes_back_to_the_queue_and_on(slurm, own, run_main, tmp_path):
    """With one.sh, whose shell the signal reaches, as SLURM sends it before the limit; and with a
    plain script, whose step it reaches: one process and two ranks."""
    long = [*FLAGS, "--epochs", "400", "--save_every", "1h", "--log_steps"]
    several = ["--distribute", *long]
    jobs = {"script": Job("one.sh", tmp_path / "script", *long),
            "one": Job(own, tmp_path / "one", *long),
            "two": Job(own, tmp_path / "two", *several, options=["--ntasks=2"])}  # fmt: skip
    for name, job in jobs.items():
        job.trains()
        call("scancel", *(["--batch"] if name == "script" else []), "--signal=USR1", job.id)
        output = job.comes_to("PENDING", restarts=1)
        announced = "Interrupted after" if name == "script" else "The job is back in the queue"
        assert output.count(announced) == 1 and "Traceback" not in output, job
        assert "\nerror:" not in output, job
    # SLURM itself waits two minutes. A job that starts while the node still clears up after its
    # first start is failed by SLURM, without a word of its script.
    time.sleep(10)
    for job in jobs.values():
        job.starts_again()
    threads = {"OMP_NUM_THREADS": "1"}
    for out, flags, launcher in (("whole", long, []), ("both", several, [*TORCHRUN, "2"])):
        whole = run_main(*flags, out=tmp_path / out, env=threads, launcher=launcher)
        assert whole.returncode == 0, whole.stderr
    for name, job in jobs.items():
        output = job.comes_to("COMPLETED", restarts=1)
        assert went_on(output) == int(re.search(r"after (\d+) whole epochs", output)[1]), job
        same_bits(tmp_path / ("both" if name == "two" else "whole"), job.out)


def test_at_its_time_limit_a_job_saves_where_it_is(slurm, own, tmp_path):
    """Without a signal before: SIGTERM, and SIGKILL half a minute later."""
    own.write_text(OWN.replace("#SBATCH --signal=USR1@60\n", ""))
    flags = [*FLAGS, "--epochs", 1000000, "--save_every", "1h"]
    output = Job(own, tmp_path, *flags, options=["--time=1"]).trains().comes_to("TIMEOUT")
    assert output.count("Interrupted after") == 1, output
    rows, _ = outcome(tmp_path)
    (saved,) = (tmp_path / "checkpoints").glob("*.pt")
    assert rows[-1]["stopped"] == "interrupted"
    assert torch.load(saved, weights_only=True)["epoch"] == rows[-1]["epochs"]


@pytest.mark.parametrize("script", ["srun.sh", "torchrun.sh"])
def test_ranks_stop_together_when_the_time_is_up(script, slurm, tmp_path):
    job = Job(script, tmp_path, *FLAGS, "--epochs", 100000, two=True).trains()
    call("scancel", "--batch", "--signal=USR1", job.id)
    output = job.comes_to("PENDING", restarts=1)
    assert output.count("Interrupted after") == 1 and 'main.py", line' not in output, job
    call("scancel", job.id)
    job.comes_to("CANCELLED", restarts=1)


@pytest.mark.parametrize("script", ["one.sh", "own.sh"])
def test_a_job_that_is_cancelled_stays_so(script, slurm, own, tmp_path):
    flags = [*FLAGS, "--epochs", 100000]
    job = Job(own if script == "own.sh" else script, tmp_path, *flags).trains()
    call("scancel", job.id)
    job.comes_to("CANCELLED")
    wait_for(lambda: "Interrupted after" in job.output(), 30, job.output)
    wait_for(lambda: not ranks(tmp_path, "SLURM_PROCID"), 60, lambda: "it runs on")


def test_submit_runs_the_table_and_draws(slurm, small, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Four runs of digits in place of the table, in the jobs too."""
    python = tmp_path / "python"
    code = (
        "import sys; from scripts import results; from tests import test_reproduce as t; "
        "results.experiments = t.small_table; "
        "from scripts import reproduce; sys.exit(reproduce.main(sys.argv[3:]))"
    )
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("AGD_PYTHON", str(python))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--out", str(tmp_path / "out"), "--device", "cpu", "--submit", "slurm"]
    assert reproduce.main(["fig5", *flags, "--sbatch=--comment=test"]) == 0
    assert "an array of 4 runs" in capsys.readouterr().out
    quick = tmp_path / "out" / "quick"

    def state():
        return "\n".join(p.read_text() for p in quick.glob("output/slurm-*.txt")) + call("squeue")

    wait_for((tmp_path / "out" / "README.md").exists, 200, state)
    wait_for(lambda: not call("squeue", "-h", "--me", "--name=agd,agd-draw"), 60, state)
    assert len(list(quick.glob("logs/*.jsonl"))) == 4
    assert len(list(quick.glob("output/slurm-*_*.txt"))) == 4, state()
    assert (quick / "figures" / "fig5.png").exists()
