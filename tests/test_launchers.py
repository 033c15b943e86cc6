"""What people start runs with, for real: SLURM's batch scripts and srun, mpirun, torchrun."""

import hashlib
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

LOCAL = ROOT.parent / "shared" / "slurm" / "local.sh"  # a SLURM of one node, where it lies there
SCRIPTS = ROOT / "scripts" / "slurm"
FLAGS = ["--cpu", "--dataset", "digits", "--train_examples", "300", "--test_examples", "77",
         "--depth", "3", "--width", "16", "--train_bs", "100"]  # fmt: skip
LAUNCH = {
    "srun": ["srun", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable],
    "mpirun": ["mpirun", "--oversubscribe", "-np", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", "2"],
}  # fmt: skip
OWN = """#!/bin/sh
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --open-mode=append
#SBATCH --oversubscribe
#SBATCH --mem=1000
srun "$AGD_PYTHON" main.py "$@"
"""
RANK = {"srun": "SLURM_PROCID", "mpirun": "OMPI_COMM_WORLD_RANK", "torchrun": "RANK"}


def wait_for(condition, seconds, what):
    """What `condition` returns, once that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what()}")


def finish(process, seconds):
    """What it said; it is ended if it takes longer."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def say(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def answers(*command):
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


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
    folder, munged = tmp_path_factory.mktemp("slurm"), answers("munge", "-n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            subprocess.run(
                ["bash", LOCAL, "start", folder], check=True, timeout=120,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            yield
            say("scancel", "--full", "--user", str(os.getuid()))
            wait_for(lambda: not say("squeue", "-h", "--me"), 60, lambda: say("squeue"))
        finally:
            pids = [int(path.read_text()) for path in folder.glob("slurm*.pid")]
            subprocess.run(["bash", LOCAL, "stop", folder], timeout=60)
            if not munged:
                pids.append(int(Path("/run/munge/munged.pid").read_text()))
                os.kill(pids[-1], signal.SIGTERM)
            left = [Path(f"/proc/{pid}") for pid in pids]
            wait_for(lambda: not any(path.exists() for path in left), 60, lambda: left)


class Job:
    """A batch script in the queue, on CPUs."""

    def __init__(self, script, out, *flags, options=()):
        out.mkdir(exist_ok=True)  # SLURM makes no folders
        self.output = out / "said.txt"
        options = ["--cpus-per-task=2"] if script == "one.sh" else options
        environment = {**os.environ, "AGD_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        self.id = subprocess.run(
            ["sbatch", "--parsable", "--gpus-per-node=0", f"--output={self.output}", *options,
             str(SCRIPTS / script), *map(str, flags), "--out", str(out)],
            cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def facts(self):
        words = say("scontrol", "show", "job", "-o", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def comes_to(self, state, restarts=0):
        """Wait until the job is in that state."""
        wait_for(lambda: self.facts()["JobState"] == state, 100, lambda: f"{self.facts()} {self}")
        assert self.facts()["Restarts"] == str(restarts), self
        return self.said()

    def __repr__(self):
        return f"job {self.id}:\n{self.said()}"


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
    """rank -> process id, of those of main.py that write to `out`."""
    found = {}
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
                found[int(values[variable])] = int(process.name)
    return found


def epochs(out):
    return sum(p.read_text().count('"kind": "epoch"') for p in out.glob("logs/*.jsonl"))


def went_on(said):
    """The epoch after which a run went on: its last, or the one before, if its row was in the log
    and its checkpoint not yet written."""
    return int(re.search(r"Going on after epoch (\d+)", said)[1])


def same(one, two, out_of=2):
    """Whether the weights and the numbers of two runs agree; the second is of as many ranks."""
    (rows, weights), (others, copies) = outcome(one), outcome(two)
    assert others[0]["ranks"] == out_of
    assert all(torch.allclose(weights[k], copies[k], atol=1e-5) for k in weights)
    for key in ("train_loss", "test_loss", "test_acc"):
        assert others[-1][key] == pytest.approx(rows[-1][key], rel=1e-4)
    assert others[-1]["final"]
    return others[0]["launcher"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    command = [sys.executable, "main.py", *FLAGS, "--epochs", "2", "--out", str(out)]
    subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return out


@pytest.mark.parametrize("script", ["one.sh", "srun.sh", "torchrun.sh"])
def test_a_batch_script_trains_as_one_process(script, slurm, alone, tmp_path):
    job = Job(script, tmp_path, *FLAGS, "--epochs", 2, options=["--ntasks-per-node=2"])
    said = job.comes_to("COMPLETED")
    assert said.count("epoch 2/2") == 1 and "rror" not in said, job
    launcher = same(alone, tmp_path, 1 if script == "one.sh" else 2)
    assert launcher == {"srun.sh": "srun", "torchrun.sh": "torchrun"}.get(script)


@pytest.mark.parametrize("launcher", ["mpirun", "torchrun"])
def test_two_ranks_train_as_one_process(launcher, alone, tmp_path):
    process = start(launcher, *FLAGS, "--epochs", 2, "--out", tmp_path)
    said = finish(process, 100)
    assert process.returncode == 0, said
    assert same(alone, tmp_path) == launcher


@pytest.mark.parametrize("launcher", ["srun", "mpirun", "torchrun"])
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(launcher, tmp_path, request):
    if launcher == "srun":
        request.getfixturevalue("slurm")
    process = start(launcher, *FLAGS, "--epochs", 100000, "--out", tmp_path)
    try:
        wait_for(lambda: epochs(tmp_path) > 3 or process.poll(), 100, lambda: "no epochs")
        running = ranks(tmp_path, RANK[launcher])
        assert set(running) == {0, 1}
        os.kill(running[1], signal.SIGKILL)
        began = time.monotonic()
        said = process.communicate(timeout=60)[0]
        wait_for(lambda: not ranks(tmp_path, RANK[launcher]), 10, lambda: "ranks are left")
        print(f"{launcher} {time.monotonic() - began:.1f} s", said[-1800:])
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert said.count("another rank is gone") == 1, said
    done = epochs(tmp_path)
    again = start(launcher, *FLAGS, "--epochs", done + 2, "--out", tmp_path)
    said = finish(again, 100)
    assert again.returncode == 0 and went_on(said) in (done - 1, done), said
    assert epochs(tmp_path) == done + 2


def test_an_error_of_one_rank_is_shown_once_and_not_tried_again(slurm, tmp_path):
    folders(tmp_path / "set", bad=[3])
    flags = [*FOLDER, "--cpu", "--dataset", f"folder:{tmp_path / 'set'}"]
    job = Job("srun.sh", tmp_path, *flags, options=["--ntasks-per-node=2"])
    said = job.comes_to("FAILED")
    assert said.count("3.png cannot be decoded") == 1 and "Traceback" not in said, job


def test_when_the_time_is_up_the_job_is_queued_again_and_goes_on(slurm, run_main, tmp_path):
    """The signal comes as SLURM sends it before the limit; --signal itself is SLURM's affair."""
    long = [*FLAGS, "--epochs", "400"]
    one = Job("one.sh", tmp_path / "one", *long)
    wait_for(lambda: epochs(tmp_path / "one") > 3, 100, one.said)
    say("scancel", "--batch", "--signal=USR1", one.id)
    one.comes_to("PENDING", restarts=1)
    done = epochs(tmp_path / "one")
    assert 3 < done < 400 and "Interrupted after" in one.said(), one
    # SLURM itself waits two minutes. A job that starts while the node still clears up after its
    # first start is failed by SLURM, without a word of its script.
    time.sleep(10)
    say("scontrol", "update", f"JobId={one.id}", "StartTime=now")
    said = one.comes_to("COMPLETED", restarts=1)
    assert went_on(said) in (done - 1, done), one
    whole = run_main(*long, out=tmp_path / "whole", env={"OMP_NUM_THREADS": "1"})
    assert whole.returncode == 0, whole.stderr
    same_bits(tmp_path / "whole", tmp_path / "one")


def same_bits(whole, parts):
    (rows, weights), (others, copies) = outcome(whole), outcome(parts)
    assert digest(weights) == digest(copies)
    assert comparable(rows)[1:] == comparable(others)[1:]


def digest(weights):
    """SHA-256 over the names and the bytes."""
    found = hashlib.sha256()
    for name, x in sorted(weights.items()):
        found.update(name.encode() + b"\0" + x.numpy().tobytes())
    return found.hexdigest()


@pytest.fixture
def own(tmp_path):
    """A user's batch script, which knows nothing of signals."""
    path = tmp_path / "own.sh"
    path.write_text(OWN)
    return path


def test_a_plain_batch_script_goes_back_to_the_queue_by_itself(slurm, own, run_main, tmp_path):
    """USR1 reaches the processes of the step alone, as SLURM sends it without B: before the limit;
    of one process and of two ranks."""
    flags = [*FLAGS, "--epochs", "400", "--log_steps", "--save_every", "1h"]
    several = ["--distribute", *flags]
    jobs = {"one": Job(own, tmp_path / "one", *flags),
            "two": Job(own, tmp_path / "two", *several, options=["--ntasks=2"])}  # fmt: skip
    for job in jobs.values():
        wait_for(lambda job=job: epochs(job.output.parent) > 3, 100, job.said)
        say("scancel", "--signal=USR1", job.id)
    for job in jobs.values():
        said = job.comes_to("PENDING", restarts=1)
        assert said.count("The job is back in the queue after ") == 1, job
        assert "Traceback" not in said and "\nerror:" not in said, job
    time.sleep(10)  # see above
    for job in jobs.values():
        say("scontrol", "update", f"JobId={job.id}", "StartTime=now")
    environment = {"OMP_NUM_THREADS": "1"}
    whole = run_main(*flags, out=tmp_path / "whole", env=environment)
    assert whole.returncode == 0, whole.stderr
    whole = run_main(
        *several, out=tmp_path / "both", env=environment, launcher=[*TORCHRUN, "2"]
    )
    assert whole.returncode == 0, whole.stderr
    for job in jobs.values():
        said = job.comes_to("COMPLETED", restarts=1)
        back = re.search(r"The job is back in the queue after (\d+) whole epochs", said)
        assert went_on(said) == int(back[1]), job
    same_bits(tmp_path / "whole", tmp_path / "one")
    same_bits(tmp_path / "both", tmp_path / "two")


def test_at_its_time_limit_a_job_saves_where_it_is(slurm, own, tmp_path):
    """Without a signal before: SIGTERM, and SIGKILL half a minute later."""
    flags = [*FLAGS, "--epochs", 1000000, "--save_every", "1h"]
    own.write_text(OWN.replace("#SBATCH --signal=USR1@60\n", ""))
    job = Job(own, tmp_path, *flags, options=["--time=1"])
    wait_for(lambda: epochs(tmp_path) > 3, 100, job.said)
    wait_for(lambda: job.facts()["JobState"] == "TIMEOUT", 180, lambda: job)
    assert job.said().count("Interrupted after") == 1, job
    rows, _ = outcome(tmp_path)
    (saved,) = (tmp_path / "checkpoints").glob("*.pt")
    assert rows[-1]["stopped"] == "interrupted"
    assert torch.load(saved, weights_only=True)["epoch"] == rows[-1]["epochs"]


@pytest.mark.parametrize("script", ["srun.sh", "torchrun.sh"])
def test_ranks_stop_together_when_the_time_is_up(script, slurm, tmp_path):
    job = Job(script, tmp_path, *FLAGS, "--epochs", 100000, options=["--ntasks-per-node=2"])
    wait_for(lambda: epochs(tmp_path) > 3, 100, job.said)
    say("scancel", "--batch", "--signal=USR1", job.id)
    said = job.comes_to("PENDING", restarts=1)
    assert said.count("Interrupted after") == 1 and 'main.py", line' not in said, job
    say("scancel", job.id)
    job.comes_to("CANCELLED", restarts=1)


@pytest.mark.parametrize("script", ["one.sh", "own.sh"])
def test_a_job_that_is_cancelled_stays_so(script, slurm, own, tmp_path):
    job = Job(own if script == "own.sh" else script, tmp_path, *FLAGS, "--epochs", 100000)
    wait_for(lambda: epochs(tmp_path) > 3, 100, job.said)
    say("scancel", job.id)
    job.comes_to("CANCELLED")
    wait_for(lambda: "Interrupted after" in job.said(), 30, job.said)
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
    page = tmp_path / "out" / "README.md"
    output = tmp_path / "out" / "quick" / "output"

    def state():
        return "\n".join(p.read_text() for p in [*output.glob("slurm-*.txt")]) + say("squeue")

    wait_for(page.exists, 200, state)
    wait_for(lambda: not say("squeue", "-h", "--me", "--name=agd,agd-draw"), 60, state)
    assert len(list((tmp_path / "out" / "quick" / "logs").glob("*.jsonl"))) == 4
    assert len(list(output.glob("slurm-*_*.txt"))) == 4, state()
    assert (tmp_path / "out" / "quick" / "figures" / "fig5.png").exists()
