import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from distributed import LaunchError, fingerprint, start
from distributed.launch import JOB, LAUNCHERS, NODE_COUNTS, NODES, first_node, read
from tests import ranks

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "2",
         "--train_bs", "100", "--test_bs", "77", "--cpu"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
VARIABLES = {name for kinds in LAUNCHERS.values() for names in kinds for name in names}
VARIABLES |= {name for names in JOB.values() for name in names}
VARIABLES |= {*NODES, *NODE_COUNTS, "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
              "SLURM_STEP_NODELIST"}  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_hand(rank, size, port):
    """What a launcher that only sets variables would set."""
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip


def by_srun(rank, size, job="77"):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size), "SLURM_LOCALID": str(rank),
            "SLURM_JOB_ID": job, "SLURM_STEP_ID": "0", "SLURM_NNODES": "1"}  # fmt: skip


def launch(commands, variables):
    """The processes, with each its variables and no other launcher's."""
    plain = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return [
        subprocess.Popen(
            command, cwd=ROOT, env={**plain, "OMP_NUM_THREADS": "1", **extra}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command, extra in zip(commands, variables)
    ]  # fmt: skip


@pytest.fixture
def run_ranks(tmp_path):
    """f(size, function, variables, **arguments) -> what that function of tests/ranks.py returned on
    each rank, None where it did not, and what the ranks wrote to stderr."""

    def run(size, function, variables=by_hand, started=None, **arguments):
        port = free_port()
        command = [sys.executable, "-m", "tests.ranks", function, str(tmp_path),
                   json.dumps(arguments), "--distribute"]  # fmt: skip
        several = range(size if started is None else started)
        given = [variables(i, size, port) if variables is by_hand else variables(i, size)
                 for i in several]  # fmt: skip
        processes = launch([command] * len(given), given)
        errors = [p.communicate(timeout=200)[1] for p in processes]
        saved = [tmp_path / f"{i}.pt" for i in several]
        return [torch.load(p) if p.exists() else None for p in saved], errors

    return run


def one_process(function, **arguments):
    return getattr(ranks, function)(start(torch.device("cpu")), **arguments)


def outcome(out):
    (log,) = (out / "logs").glob("*.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (saved,) = (out / "checkpoints").glob("*.pt")
    return rows, torch.load(saved, weights_only=True)["net"]


@pytest.mark.parametrize("flags", [[], ["--micro_bs", "7"]])
@pytest.mark.parametrize("optimizer", ["agd", "spectral"])
def test_ranks_train_as_one_process(optimizer, flags, run_main, tmp_path):
    """Batches that do not divide, the last one ragged: the mean is over the global batch. Of the
    spectral rule the ranks share the matrices of a step."""
    rule = ["--optimizer", optimizer]
    one = run_main(*FLAGS, *rule, out=tmp_path / "one")
    three = run_main(
        *FLAGS, *rule, *flags, "--distribute", out=tmp_path / "three", launcher=[*TORCHRUN, "3"]
    )
    assert one.returncode == 0, one.stderr
    assert three.returncode == 0, three.stderr
    assert three.stdout.count("epoch 1/2") == 1  # one rank speaks
    rows, weights = outcome(tmp_path / "one")
    others, copies = outcome(tmp_path / "three")
    assert others[0]["ranks"] == 3 and others[0]["launcher"] == "torchrun"
    # A polar factor takes small singular values, and their rounding, for as much as large ones.
    atol, rel = (1e-5, 1e-4) if optimizer == "agd" else (2e-2, 1e-2)
    assert all(torch.allclose(weights[k], copies[k], atol=atol) for k in weights)
    for a, b in zip(rows[1:3], others[1:3]):
        assert b["test_acc"] == pytest.approx(a["test_acc"], abs=1.5 / 360)
        clock = ("length", "turn") if optimizer == "spectral" else ()
        for key in ("train_loss", "test_loss", "eta_mean", *clock):
            assert b[key] == pytest.approx(a[key], rel=rel)
        assert round(b["test_acc"] * 360, 6).is_integer()
        assert b.get("micro_bs") == (7 if flags else None)


@pytest.fixture(scope="module")
def reference():
    return one_process("agreement", micro_batches=[1])[1]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_and_micro_batches_gives_the_same_weights(size, reference, run_ranks):
    """105 steps in float64; the test set (360 images in batches of 77) does not divide."""
    if size == 1:
        found = [one_process("agreement", micro_batches=[2, 4])]
    else:
        found, errors = run_ranks(size, "agreement", micro_batches=[1, 2, 4])
        assert None not in found, errors
    for of_rank in found:
        for run in of_rank.values():
            assert len(run["loss"]) == 105
            for p, q in zip(reference["weights"], run["weights"]):
                assert (p - q).abs().max() < 1e-10
            assert run["loss"] == pytest.approx(reference["loss"], rel=1e-10)
            assert (run["examples"], run["correct"]) == (360, reference["correct"])


@pytest.mark.parametrize("train_bs, micro_bs", [(100, None), (359, 50)])
def test_sync_bn_takes_the_statistics_of_the_whole_batch(train_bs, micro_bs, run_ranks):
    """359 leaves a last batch of one image, which two of the three ranks have no share of."""
    one = one_process("norms", sync=False, train_bs=train_bs)
    found, errors = run_ranks(3, "norms", sync=True, train_bs=train_bs, micro_bs=micro_bs)
    assert None not in found, errors
    for run in found:
        if micro_bs is not None:  # statistics of each pass, over the ranks
            assert run["correct"] == found[0]["correct"]
            assert all(x.isfinite().all() for x in run["weights"])
            continue
        for p, q in zip(one["weights"], run["weights"]):
            assert (p - q).abs().max() < 1e-10
        for key, x in one["buffers"].items():
            assert torch.allclose(x, run["buffers"][key], rtol=1e-10), key
        assert run["correct"] == one["correct"]


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("micro_bs", [None, 25])
def test_statistics_that_are_taken_anew_are_those_of_all_ranks(sync, micro_bs, run_ranks):
    """And the training data stand where they stood."""
    one = one_process("statistics", sync=False, micro_bs=micro_bs and 2 * micro_bs)
    found, errors = run_ranks(2, "statistics", sync=sync, micro_bs=micro_bs)
    assert None not in found, errors
    assert one["before"] == one["after"] and found[1]["before"] == found[1]["after"]
    for key, x in one["buffers"].items():
        assert torch.equal(found[0]["buffers"][key], found[1]["buffers"][key]), key
        if "tracked" not in key:  # of halves of a batch the variances differ from those of all
            rtol = 0.05 if "var" in key and not sync else 1e-5
            assert torch.allclose(x, found[0]["buffers"][key], rtol=rtol, atol=1e-6), key
    assert not torch.allclose(one["buffers"]["1.running_mean"], one["trained"], rtol=1e-3)


def test_a_rank_without_an_image_of_a_batch_takes_part_in_it(run_ranks):
    """A last batch of one image, plain batch norm: its statistics rest on the ranks without."""
    found, errors = run_ranks(3, "norms", sync=False, train_bs=718)
    assert None not in found, errors
    assert not any(run["drifted"] for run in found)
    assert all(x.isfinite().all() for x in [*found[0]["weights"], *found[2]["buffers"].values()])
    assert all(run["examples"] == 360 for run in found)


@pytest.mark.parametrize("norms", [False, True])
def test_a_batch_that_does_not_fit_is_halved_and_repeated(norms):
    """100 images, room for 30 at a time: 25, whenever it comes; the same step is made."""
    whole = one_process("memory", rooms=[1000], norms=norms)
    assert whole["micro_bs"] is None
    halved = one_process("memory", rooms=[30], norms=norms)
    assert halved["micro_bs"] == 25
    if norms:  # statistics are those of each pass, and a pass that failed leaves none
        tracked = "net.1.num_batches_tracked"
        assert halved["buffers"][tracked] == 2 * (14 * 4 + 2)
        late = one_process("memory", rooms=[30], norms=True, calls=20)
        assert late["buffers"][tracked] == 20 + 9 * 4 + 2  # 20 whole ones, the last was ragged
        return
    late = one_process("memory", rooms=[30], calls=20)
    assert late["micro_bs"] == 25
    for run in (halved, late):
        for p, q in zip(whole["weights"], run["weights"]):
            assert (p - q).abs().max() < 1e-10
    assert "single image" in one_process("memory", rooms=[0])["error"]


def test_ranks_agree_on_what_fits(run_ranks):
    whole = one_process("memory", rooms=[1000])
    found, errors = run_ranks(3, "memory", rooms=[1000, 10, 1000])
    assert None not in found, errors
    assert [run["micro_bs"] for run in found] == [9, 9, 9]  # 34, 17, 9
    for run in found:
        for p, q in zip(whole["weights"], run["weights"]):
            assert (p - q).abs().max() < 1e-10


def test_memory_that_runs_out_later_ends_every_rank_with_the_remedy(run_ranks):
    found, errors = run_ranks(2, "memory", rooms=[1000, 10], calls=5)
    assert None not in found, errors
    assert found[1]["error"].endswith("start again with --micro_bs 25")
    assert found[0]["error"] == f"rank 1: {found[1]['error']}"


def test_a_rank_that_drifts_is_named(run_ranks):
    found, errors = run_ranks(3, "drift", rank=1)
    assert found == [[[], [1]]] * 3, errors


def test_the_fingerprint_sees_every_bit_and_no_layout():
    x = torch.randn(4, 3, 2, 2)
    assert fingerprint([x]) == fingerprint([x.to(memory_format=torch.channels_last)])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for i in (0, 17, 47):
            y = x.to(dtype)
            z = y.clone()
            z.view(-1)[i] = torch.nextafter(z.view(-1)[i], torch.tensor(9, dtype=dtype))
            assert fingerprint([y]) != fingerprint([z])
    assert fingerprint([x, x * 2]) != fingerprint([x * 2, x])


def test_an_error_of_one_rank_ends_the_others_and_is_heard(run_ranks):
    found, errors = run_ranks(3, "hang")
    assert found[0] == found[2] == "rank 1: ValueError: lost my way", errors


def folders(root, bad=()):
    """Two classes of four images a split; those numbered in `bad` are damaged in training."""
    for split in ("train", "val"):
        for i in range(8):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (30 * i, 0, 0)).save(path)
            if split == "train" and i in bad:
                path.write_bytes(b"no image")


def main_by_hand(size, *flags):
    port = free_port()
    command = [sys.executable, "main.py", "--distribute", "--cpu", *map(str, flags)]
    return launch([command] * size, [by_hand(i, size, port) for i in range(size)])


FOLDER = ["--arch", "fcn", "--depth", 2, "--width", 8, "--image_size", 32, "--workers", 0,
          "--epochs", 2]  # fmt: skip


def test_a_bad_image_on_one_rank_is_shown_once(tmp_path):
    folders(tmp_path / "set", bad=[3])
    processes = main_by_hand(
        2, *FOLDER, "--dataset", f"folder:{tmp_path / 'set'}", "--out", tmp_path
    )
    said = [p.communicate(timeout=100) for p in processes]
    # The rank that came upon it says 2, for bad input.
    assert sorted(p.returncode for p in processes) == [1, 2]
    everything = "".join(part for pair in said for part in pair)
    assert everything.count("3.png cannot be decoded") == 1, everything
    assert "Traceback" not in everything
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    end = json.loads(log.read_text().splitlines()[-1])
    assert not end["final"] and "3.png" in end["stopped"]


def test_images_that_are_left_out_may_be_all_of_a_rank(tmp_path):
    """Batches of two over two ranks: some rank has nothing, some batch nobody."""
    folders(tmp_path / "set", bad=range(1, 8))
    processes = main_by_hand(
        2, *FOLDER, "--dataset", f"folder:{tmp_path / 'set'}", "--out", tmp_path,
        "--skip_bad_images", "--train_bs", 2,
    )  # fmt: skip
    said = [p.communicate(timeout=100) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert "7 images could not be decoded" in said[0][0]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(killed, tmp_path):
    """By variables alone: no launcher that would end the others."""
    flags = [*FLAGS, "--epochs", "100000", "--out", str(tmp_path)]
    processes = main_by_hand(3, *flags)
    log = None
    end = time.monotonic() + 100
    while time.monotonic() < end and not (log and log.read_text().count("epoch") > 40):
        log = next(iter((tmp_path / "logs").glob("*.jsonl")), None)
        time.sleep(0.1)
    processes[killed].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said = [p.communicate(timeout=60) for p in processes]
    assert time.monotonic() - began < 60
    assert all(p.returncode not in (0, None) for p in processes)
    everything = "".join(part for pair in said for part in pair)
    assert everything.count(f"rank {killed} is gone") == 1, everything
    assert "Traceback" not in everything
    done = sum('"kind": "epoch"' in line for line in log.read_text().splitlines())
    again = main_by_hand(3, *flags[:-3], str(done + 2), "--out", str(tmp_path))
    said = [p.communicate(timeout=100) for p in again]
    assert [p.returncode for p in again] == [0, 0, 0], said
    assert "Going on after epoch" in said[0][0]


def test_ranks_meet_at_the_next_port_where_one_is_taken(run_ranks, monkeypatch):
    job = str(os.getpid())
    ports = read({**by_srun(0, 2, job)}).ports
    with socket.create_server(("127.0.0.1", ports[0])):  # it listens and never answers
        found, errors = run_ranks(2, "meeting", lambda i, n: by_srun(i, n, job))
    assert found == [[0, 1], [0, 1]], errors


def over_two_nodes(launcher):
    """Variables as on two nodes of a task each; both are this one."""

    def mpiexec(rank, size):
        return {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": "0",
                "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(PORT)}  # fmt: skip

    def mpirun(rank, size):
        # The daemon of the second node was started by srun, and its ranks inherit that.
        daemon = {"SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "elsewhere"} if rank else {}
        return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size),
                "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                "PMIX_NAMESPACE": str(os.getpid()), "SLURM_JOB_ID": "5",
                "SLURM_JOB_NODELIST": "localhost,elsewhere", **daemon}  # fmt: skip

    return {"mpiexec": mpiexec, "mpirun": mpirun}[launcher]


PORT = free_port()


@pytest.mark.parametrize("launcher", ["mpiexec", "mpirun"])
def test_ranks_on_two_nodes_meet(launcher, run_ranks):
    found, errors = run_ranks(2, "meeting", over_two_nodes(launcher), seconds=40)
    assert found == [[0, 1], [0, 1]], errors


def test_a_port_that_was_asked_for_and_is_taken_is_named(run_ranks):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        found, errors = run_ranks(
            1, "meeting", lambda i, n: by_hand(i, n, port), seconds=10
        )  # fmt: skip
    assert found == [None]
    assert f"MASTER_PORT {port}" in errors[0] and "Traceback" not in errors[0]


def test_a_rank_that_does_not_come_is_named(run_ranks):
    found, errors = run_ranks(3, "meeting", started=2, seconds=8)
    assert found == [None, None]
    assert "".join(errors).count("1 of 3 ranks did not come: 2") == 1, errors
    assert "Traceback" not in "".join(errors)


@pytest.mark.parametrize(
    "variables, words",
    [
        ({}, "torchrun.*srun or mpirun"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun.*SLURM_NTASKS"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun.*LOCAL_RANK"),
        # within sbatch, and within salloc
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}, "start with `srun"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4"}, "start with `srun"),
        ({**by_hand(0, 2, 1), "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**by_hand(0, 2, 1), "RANK": "-1"}, "RANK is '-1'"),
        (by_hand(2, 2, 1), "RANK is 2 and WORLD_SIZE is 2"),
        ({**by_hand(0, 2, 1), "LOCAL_RANK": "1"}, "LOCAL_RANK is 1 and RANK only 0"),
        ({**by_hand(1, 2, 1), "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4"),
        (by_hand(0, 2, 70000), "MASTER_PORT is '70000'"),
        ({k: v for k, v in by_hand(0, 2, 1).items() if k != "MASTER_PORT"}, "MASTER_PORT"),
        ({k: v for k, v in by_hand(0, 2, 1).items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
        # variables left over in the shell, the same for every task
        ({**by_hand(0, 2, 1), **by_srun(1, 2)}, "RANK is 0 and SLURM_PROCID is 1.*unset"),
        ({**by_hand(0, 4, 1), **by_srun(0, 2)}, "WORLD_SIZE is 4 and SLURM_NTASKS is 2"),
        # mpirun over two nodes, without a batch job
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
         "mpirun.*MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "here"},
         "mpiexec.*MASTER_PORT"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec.*MPI_LOCALRANKID or PMI_LOCAL_RANK"),
    ],
)  # fmt: skip
def test_missing_and_contradictory_variables_are_named(variables, words, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=words):
        start(torch.device("cpu"), distribute=True)


SRUN_4 = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12",
          "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[3-4]"}  # fmt: skip


@pytest.mark.parametrize(
    "variables, launcher, numbers, address",
    [
        (by_hand(1, 2, 5), "torchrun", (1, 2, 1), "127.0.0.1"),
        (by_srun(1, 2), "srun", (1, 2, 1), "127.0.0.1"),
        (SRUN_4, "srun", (5, 8, 1), "gpu3"),
        ({**SRUN_4, "MASTER_ADDR": "login"}, "srun", (5, 8, 1), "login"),
        ({**SRUN_4, "PMI_RANK": "5", "PMI_SIZE": "8"}, "srun", (5, 8, 1), "gpu3"),
        # torchrun, one a node, started by srun
        ({**SRUN_4, **by_hand(3, 4, 6), "TORCHELASTIC_RUN_ID": "1"}, "torchrun", (3, 4, 3),
         "127.0.0.1"),
        # mpirun within a batch job, whose own variables say task 0 of 1 everywhere
        ({**by_srun(0, 1), "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun",
         (1, 2, 1), "127.0.0.1"),
        ({**SRUN_4, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
          "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun",
         (1, 2, 0), "gpu3"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
         "mpiexec", (1, 2, 1), "127.0.0.1"),
    ],
)  # fmt: skip
def test_variables_describe_a_launch(variables, launcher, numbers, address):
    found = read(variables)
    assert found.launcher == launcher
    assert (found.rank, found.size, found.local_rank) == numbers
    assert found.address == address
    assert found.agent == ("TORCHELASTIC_RUN_ID" in variables)


def test_jobs_have_ports_of_their_own():
    ports = [read(by_srun(i % 2, 2, str(i // 2))).ports for i in range(40)]
    assert all(a == b for a, b in zip(ports[::2], ports[1::2]))  # the ranks of one job agree
    assert len({p[0] for p in ports}) == 20
    assert all(len(set(p)) == len(p) > 4 and 1024 < min(p) < max(p) < 32768 for p in ports)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[003-007,12],cpu1", "gpu003"),
        ("r[1-2]n[7,9]-ib", "r1n7-ib"),
        ("a-b[10]", "a-b10"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize("variables", [
    {**by_hand(0, 2, 1), "TORCHELASTIC_RUN_ID": "1"}, {"OMPI_COMM_WORLD_SIZE": "2"},
])  # fmt: skip
def test_several_processes_of_one_command_need_the_flag(variables, monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match="2 processes were started.*--distribute"):
        start(torch.device("cpu"))


def test_ctrl_c_is_heard_while_ranks_wait_for_one_another(tmp_path):
    command = [sys.executable, "main.py", "--distribute", "--cpu", *FLAGS, "--out", str(tmp_path)]
    variables = by_srun(0, 2, f"{os.getpid()}-alone")
    (process,), ports = launch([command], [variables]), read(variables).ports
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", ports[0]), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1].endswith("interrupted\n")
    assert process.returncode == 130


def test_one_process_needs_no_launcher():
    world = start(torch.device("cpu"))
    assert (world.rank, world.size) == (0, 1)
    x = torch.ones(2)
    world.all_reduce(x)
    world.all_reduce_max(x)
    world.all_reduce_async(x)()
    assert x.tolist() == [1, 1]
    assert world.broadcast_object({"a": 1}) == {"a": 1} and world.all_gather_object(3) == [3]
    assert world.ranks_that_differ([x]) == [] and world.speaks


@pytest.mark.parametrize("case, how, size", [
    ("sharded", "fsdp", 2), ("sharded", "rows", 3), ("sharded", "columns", 2),
    ("sharded", "both", 4), ("every_role", "fsdp", 2), ("every_role", "rows", 2),
    ("every_role", "rows", 4),
])  # fmt: skip
def test_sharded_weights_take_the_steps_of_dense_ones(case, how, size, run_ranks):
    """Drawn, normed over the whole matrix, and moved alike; some shards are empty, and some cut a
    block, or hold many."""
    (dense, *_), errors = run_ranks(2, case, how="dense")
    found, more = run_ranks(size, case, how=how)
    assert dense is not None and None not in found, errors + more
    for of_rank in found:
        assert of_rank["eta"] == pytest.approx(dense["eta"], rel=1e-12)
        assert of_rank["s"] == pytest.approx(dense["s"], rel=1e-12) and of_rank["L"] == dense["L"]
        for name, p, q in zip(dense["names"], dense["weights"], of_rank["weights"]):
            assert (p - q).abs().max() < 1e-12, name


@pytest.mark.parametrize("how, size", [
    ("ddp", 2), ("group", 2), ("group", 4), ("fsdp", 2), ("rows", 2), ("rows", 4),
])  # fmt: skip
def test_the_spectral_rule_on_ranks_is_that_of_one_process(how, size, run_ranks):
    """Some ranks have no polar factor to compute, and some no row of a weight."""
    (dense,), errors = run_ranks(1, "spectral", how="dense")
    found, more = run_ranks(size, "spectral", how=how)
    assert dense is not None and None not in found, errors + more
    for of_rank in found:
        assert of_rank["drifted"] == [] and of_rank["L"] == dense["L"]
        assert of_rank["eta"] == pytest.approx(dense["eta"], rel=1e-6)
        assert of_rank["clock"] == pytest.approx(dense["clock"], rel=1e-6)
        for kind in ("weights", "average"):
            for name, p, q in zip(dense["names"], dense[kind], of_rank[kind]):
                assert (p - q).norm() < 1e-6 * p.norm(), (kind, name)


def test_weights_sharded_along_their_kernel_are_refused(run_ranks):
    found, errors = run_ranks(2, "sharded", how="kernel")
    assert all("conv.weight of shape (6, 1, 3, 3), sharded along its kernel" in x for x in found)
