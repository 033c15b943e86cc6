"""Ranks on CPUs: one process's numbers, how they meet, how they fail, what launchers tell them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from distributed import LaunchError, _count_on_node, fingerprint, start
from distributed import launch as launching
from distributed.launch import PLANS, check_alone, is_first, read
from distributed.slurm import first_node
from tests import ranks
from tests.conftest import ROOT

slow = pytest.mark.slow
FLAGS = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "2",
         "--train_bs", "100", "--test_bs", "77", "--cpu"]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
VARIABLES = {x for kinds in launching.LAUNCHERS.values() for names in kinds for x in names}
VARIABLES |= {name for names in launching.JOB.values() for name in names}
VARIABLES |= {*launching.NODES, *launching.NODE_COUNTS, *PLANS, "MASTER_ADDR", "MASTER_PORT",
              "SLURM_STEP_NODELIST", "TORCHELASTIC_USE_AGENT_STORE"}  # fmt: skip


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


def by_mpi(rank, size, local_rank, local_size):
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size),
            "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
            "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size)}  # fmt: skip


def launch(command, variables):
    """A process for each of `variables`, without those of another launcher."""
    plain = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return [
        subprocess.Popen(
            command, cwd=ROOT, env={**plain, "OMP_NUM_THREADS": "1", **extra}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for extra in variables
    ]  # fmt: skip


def group(folder, size, function, variables=by_hand, started=None, **arguments):
    """What a function of tests/ranks.py returned on each rank, None where it did not, and what the
    ranks wrote to stderr."""
    more = (free_port(),) if variables is by_hand else ()
    command = [sys.executable, "-m", "tests.ranks", function, str(folder), json.dumps(arguments),
               "--distribute"]  # fmt: skip
    processes = launch(command, [variables(i, size, *more) for i in range(started or size)])
    errors = [p.communicate(timeout=200)[1] for p in processes]
    saved = [folder / f"{i}.pt" for i in range(len(processes))]
    return [torch.load(p) if p.exists() else None for p in saved], errors


@pytest.fixture
def run_ranks(tmp_path):
    return lambda *args, **options: group(tmp_path, *args, **options)


def one_process(function, **arguments):
    return getattr(ranks, function)(start(torch.device("cpu")), **arguments)


def outcome(out):
    (log,) = (out / "logs").glob("*.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    (saved,) = (out / "checkpoints").glob("*.pt")
    return rows, torch.load(saved, weights_only=True)["net"]


def close(ours, theirs):
    assert len(ours) == len(theirs)
    return all((p - q).abs().max() < 1e-10 for p, q in zip(ours, theirs))


def test_three_ranks_are_one_process(run_ranks):
    """Batches that do not divide, whole and in micro-batches; batch norm over all the ranks; a rank
    that drifts in one bit. The quick form of the slow tests below."""
    cases = [["agreement", {"micro_batches": [1, 2], "epochs": 1}],
             ["norms", {"sync": True, "epochs": 1}], ["drift", {"rank": 1}]]  # fmt: skip
    per_rank, errors = run_ranks(3, "several", cases=cases)
    assert None not in per_rank, errors
    reference = one_process("agreement", micro_batches=[1], epochs=1)[1]
    normed = one_process("norms", sync=False, epochs=1)
    for agreement, norms, drift in per_rank:
        for run in agreement.values():
            assert close(reference["weights"], run["weights"])
            assert run["loss"] == pytest.approx(reference["loss"], rel=1e-10)
            assert (run["examples"], run["correct"]) == (360, reference["correct"])
        assert close(normed["weights"], norms["weights"])
        assert drift == [[], [1]]


@slow
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
    assert three.stdout.count("epoch 1/2") == 1  # one rank prints
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


@slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_and_micro_batches_gives_the_same_weights(size, reference, run_ranks):
    """105 steps in float64; the test set (360 images in batches of 77) does not divide."""
    if size == 1:
        per_rank = [one_process("agreement", micro_batches=[2, 4])]
    else:
        per_rank, errors = run_ranks(size, "agreement", micro_batches=[1, 2, 4])
        assert None not in per_rank, errors
    for of_rank in per_rank:
        for run in of_rank.values():
            assert len(run["loss"]) == 105
            assert close(reference["weights"], run["weights"])
            assert run["loss"] == pytest.approx(reference["loss"], rel=1e-10)
            assert (run["examples"], run["correct"]) == (360, reference["correct"])


@slow
def test_batch_norm_over_ranks(run_ranks):
    """With --sync_bn the statistics of the whole batch; of 359 images the last batch has one, which
    two of three ranks have no share of. Without it a rank may have no image of a batch."""
    cases = [["norms", {"sync": True}], ["norms", {"sync": True, "train_bs": 359, "micro_bs": 50}],
             ["norms", {"sync": False, "train_bs": 718}]]  # fmt: skip
    one = one_process("norms", sync=False)
    per_rank, errors = run_ranks(3, "several", cases=cases)
    assert None not in per_rank, errors
    for whole, parts, own in per_rank:
        assert close(one["weights"], whole["weights"]) and whole["correct"] == one["correct"]
        for key, x in one["buffers"].items():
            assert torch.allclose(x, whole["buffers"][key], rtol=1e-10), key
        assert parts["correct"] == per_rank[0][1]["correct"]
        assert not own["drifted"] and own["examples"] == 360
        for run in (parts, own):
            assert all(x.isfinite().all() for x in [*run["weights"], *run["buffers"].values()])


@slow
@pytest.mark.parametrize("sync", [False, True])
def test_statistics_that_are_taken_anew_are_those_of_all_ranks(sync, run_ranks):
    """And the training data stand where they stood."""
    sizes = [None, 25]
    cases = [["statistics", {"sync": sync, "micro_bs": size}] for size in sizes]
    per_rank, errors = run_ranks(2, "several", cases=cases)
    assert None not in per_rank, errors
    for micro_bs, first, second in zip(sizes, *per_rank):
        one = one_process("statistics", sync=False, micro_bs=micro_bs and 2 * micro_bs)
        assert one["before"] == one["after"] and second["before"] == second["after"]
        for key, x in one["buffers"].items():
            assert torch.equal(first["buffers"][key], second["buffers"][key]), key
            if "tracked" not in key:  # of halves of a batch the variances differ from those of all
                rtol = 0.05 if "var" in key and not sync else 1e-5
                assert torch.allclose(x, first["buffers"][key], rtol=rtol, atol=1e-6), key
        assert not torch.allclose(one["buffers"]["2.running_mean"], one["trained"], rtol=1e-3)


@pytest.mark.parametrize("norms", [False, True])
def test_a_batch_that_does_not_fit_is_halved_and_repeated(norms):
    """100 images, room for 30 at a time: 25, whenever it comes; the same step is made."""
    whole = one_process("memory", rooms=[1000], norms=norms)
    assert whole["micro_bs"] is None
    halved = one_process("memory", rooms=[30], norms=norms)
    late = one_process("memory", rooms=[30], norms=norms, calls=20)
    assert halved["micro_bs"] == late["micro_bs"] == 25
    if norms:  # statistics are those of each pass, and a pass that failed leaves none
        tracked = "net.2.num_batches_tracked"
        assert halved["buffers"][tracked] == 2 * (14 * 4 + 2)
        assert late["buffers"][tracked] == 20 + 9 * 4 + 2  # 20 whole ones, the last was ragged
        return
    assert close(whole["weights"], halved["weights"]) and close(whole["weights"], late["weights"])
    assert "single example" in one_process("memory", rooms=[0])["error"]


@slow
def test_ranks_agree_on_what_fits(run_ranks):
    """And memory that runs out later ends every rank with the remedy."""
    whole = one_process("memory", rooms=[1000])
    cases = [["memory", {"rooms": [1000, 10, 1000]}],
             ["memory", {"rooms": [1000, 10, 1000], "calls": 5}]]  # fmt: skip
    per_rank, errors = run_ranks(3, "several", cases=cases)
    assert None not in per_rank, errors
    for first, later in per_rank:
        assert first["micro_bs"] == 9 and close(whole["weights"], first["weights"])  # 34, 17, 9
        assert later["error"].startswith("rank 1: out of memory with 33 examples at a time")
        assert later["error"].endswith("start again with --micro_bs 16")


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


MOVED = {
    2: [("plain", "agd", "fsdp"), ("plain", "agd", "columns"), ("roles", "agd", "fsdp"),
        ("roles", "agd", "rows"), ("roles", "spectral", "ddp"), ("roles", "spectral", "group"),
        ("roles", "spectral", "fsdp"), ("roles", "spectral", "rows"), ("gpt", "agd", "fsdp"),
        ("gpt", "spectral", "fsdp"), ("tied", "agd", "fsdp"), ("tied", "spectral", "fsdp")],
    3: [("plain", "agd", "rows")],
    4: [("plain", "agd", "both"), ("roles", "agd", "rows"), ("roles", "spectral", "group"),
        ("roles", "spectral", "rows")],
}  # fmt: skip


@slow
@pytest.mark.parametrize("size", MOVED)
def test_weights_on_ranks_take_the_steps_of_one_process(size, run_ranks):
    """Drawn, normed over the whole matrix, and moved alike; some shards are empty, some cut a block
    or hold many, and some ranks have no polar factor to compute."""

    def cases(several):
        return [["moved", dict(zip(("net", "rule", "how"), case))] for case in several]

    dense = {case[:2]: (*case[:2], "dense") for case in MOVED[size]}
    (references,), errors = run_ranks(1, "several", cases=cases(dense.values()))
    per_rank, more = run_ranks(size, "several", cases=cases(MOVED[size]))
    assert references is not None and None not in per_rank, errors + more
    references = dict(zip(dense, references))
    for of_rank in per_rank:
        for case, run in zip(MOVED[size], of_rank):
            one, rel = references[case[:2]], 1e-12 if case[1] == "agd" else 1e-6
            assert run["drifted"] == [] and run["L"] == one["L"], case
            assert run["eta"] == pytest.approx(one["eta"], rel=rel), case
            assert run.get("clock", []) == pytest.approx(one.get("clock", []), rel=rel), case
            for kind in ("weights", "average") if "average" in one else ("weights",):
                for name, p in one[kind].items():
                    assert (p - run[kind][name]).norm() <= rel * p.norm(), (case, kind, name)


@slow
def test_weights_sharded_along_their_kernel_are_refused(run_ranks):
    per_rank, errors = run_ranks(2, "along_kernel")
    assert all("conv.weight of shape (6, 1, 3, 3), sharded along its kernel" in x for x in per_rank)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_the_others_and_is_heard(failing, run_ranks):
    """Also that of rank 0, for which the others wait and whose store has the reason."""
    per_rank, errors = run_ranks(3, "fail", rank=failing)
    reason = "ValueError: lost my way" if failing == 0 else "rank 1: ValueError: lost my way"
    assert [x[::2] for x in per_rank] == [[reason, rank == failing] for rank in range(3)], errors
    assert "ValueError" in per_rank[failing][1] and not any("frame #" in x for x in errors)


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
    return launch(command, [by_hand(i, size, port) for i in range(size)])


FOLDER = ["--arch", "fcn", "--depth", 2, "--width", 8, "--image_size", 32, "--workers", 0,
          "--epochs", 2]  # fmt: skip


def test_a_bad_image_on_one_rank_is_shown_once(tmp_path):
    folders(tmp_path / "set", bad=[3])
    processes = main_by_hand(
        2, *FOLDER, "--dataset", f"folder:{tmp_path / 'set'}", "--out", tmp_path
    )
    printed = [p.communicate(timeout=100) for p in processes]
    # The rank that came upon it says 2, for bad input.
    assert sorted(p.returncode for p in processes) == [1, 2]
    everything = "".join(part for pair in printed for part in pair)
    assert everything.count("3.png cannot be decoded") == 1, everything
    assert "Traceback" not in everything
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    end = json.loads(log.read_text().splitlines()[-1])
    assert not end["final"] and "3.png" in end["stopped"]


@slow
def test_images_that_are_left_out_may_be_all_of_a_rank(tmp_path):
    """Batches of two over two ranks: some rank has nothing, some batch nobody."""
    folders(tmp_path / "set", bad=range(1, 8))
    processes = main_by_hand(
        2, *FOLDER, "--dataset", f"folder:{tmp_path / 'set'}", "--out", tmp_path,
        "--skip_bad_images", "--train_bs", 2,
    )  # fmt: skip
    printed = [p.communicate(timeout=100) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], printed
    assert "7 images could not be decoded" in printed[0][0]


@slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_all_and_the_same_command_goes_on(killed, tmp_path):
    """By variables alone: no launcher that would end the others."""
    flags = [*FLAGS, "--out", tmp_path, "--epochs"]
    processes = main_by_hand(3, *flags, 100000)
    log = None
    end = time.monotonic() + 100
    while time.monotonic() < end and not (log and log.read_text().count("epoch") > 40):
        log = next(iter((tmp_path / "logs").glob("*.jsonl")), None)
        time.sleep(0.1)
    processes[killed].send_signal(signal.SIGKILL)
    printed = [p.communicate(timeout=60) for p in processes]
    assert all(p.returncode not in (0, None) for p in processes)
    everything = "".join(part for pair in printed for part in pair)
    assert everything.count("another rank is gone") == 1, everything
    assert "Traceback" not in everything and "frame #" not in everything
    done = sum('"kind": "epoch"' in line for line in log.read_text().splitlines())
    again = main_by_hand(3, *flags, done + 2)
    printed = [p.communicate(timeout=100) for p in again]
    assert [p.returncode for p in again] == [0, 0, 0], printed
    assert "Going on after epoch" in printed[0][0]


def over_two_nodes(rank, size):
    """mpirun on two nodes of a task each; both are this one."""
    # The daemon of the second node was started by srun, and its ranks inherit that.
    daemon = {"SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "elsewhere"} if rank else {}
    return {**by_mpi(rank, size, 0, 1), "PMIX_NAMESPACE": str(os.getpid()), "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "localhost,elsewhere", **daemon}  # fmt: skip


@slow
def test_ranks_on_two_nodes_meet(run_ranks):
    per_rank, errors = run_ranks(2, "meeting", over_two_nodes, seconds=40)
    assert per_rank == [[0, 1], [0, 1]], errors


def test_a_port_that_is_taken_is_named(run_ranks):
    """The one that stands for the job: two jobs in 10,000 share theirs."""
    job = str(os.getpid())
    port = read(by_srun(0, 2, job)).port
    with socket.create_server(("", port)):
        per_rank, (errors,) = run_ranks(
            2, "meeting", lambda i, n: by_srun(i, n, job), started=1, seconds=10
        )
    assert per_rank == [None] and "Traceback" not in errors
    assert f"MASTER_PORT {port}" in errors and "in use" in errors


def test_a_rank_that_does_not_come_is_named(run_ranks):
    per_rank, errors = run_ranks(3, "meeting", started=2, seconds=8)
    assert per_rank == [None, None]
    assert "".join(errors).count("1 of 3 ranks did not come: 2") == 1, errors
    assert "Traceback" not in "".join(errors)


def test_pods_with_other_commands_say_so(tmp_path):
    """Each of them, and at once; rank 0 listens whether or not it can reach its own address."""
    port, processes = str(free_port()), []
    for rank, address in enumerate(("1.5", "127.0.0.1")):
        command = [sys.executable, "main.py", "--distribute", "--cpu", *FLAGS, "--out",
                   str(tmp_path / str(rank))]  # fmt: skip
        processes += launch(command, [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port,
                                       "MASTER_ADDR": address}])  # fmt: skip
    for process in processes:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and "frame #" not in errors
        assert errors.count("error: rank 1 has another command than rank 0: ") == 1, errors
    assert not list(tmp_path.iterdir())


SRUN_4 = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "12",
          "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[3-4]"}  # fmt: skip
HAND = by_hand(0, 2, 1)
# What Kubernetes' PyTorchJob sets in the second of two pods.
POD = {k: v for k, v in by_hand(1, 2, 5).items() if k != "LOCAL_RANK"}


@pytest.mark.parametrize("variables, words", [
    ({}, "torchrun.*srun or mpirun"),
    ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "srun.*SLURM_NTASKS"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "by RANK and WORLD_SIZE needs the variable MASTER_ADDR"),
    ({"RANK": "0"}, "by RANK and WORLD_SIZE needs the variable WORLD_SIZE"),
    ({"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "2"}, "torchrun.*MASTER_ADDR"),
    # within sbatch, and within salloc
    ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}, "start with `srun"),
    ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "4"}, "start with `srun"),
    ({**HAND, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({**HAND, "RANK": "-1"}, "RANK is '-1'"),
    (by_hand(2, 2, 1), "RANK is 2 and WORLD_SIZE is 2"),
    (by_hand(0, 2, 70000), "MASTER_PORT is '70000'"),
    ({k: v for k, v in HAND.items() if k != "MASTER_PORT"}, "MASTER_PORT"),
    ({k: v for k, v in HAND.items() if k != "MASTER_ADDR"}, "MASTER_ADDR"),
    # variables left over in the shell, the same for every task
    ({**HAND, **by_srun(1, 2)}, "RANK is 0 and SLURM_PROCID is 1.*unset"),
    ({**by_hand(0, 4, 1), **by_srun(0, 2)}, "WORLD_SIZE is 4 and SLURM_NTASKS is 2"),
    (by_mpi(1, 2, 0, 1), "mpirun.*MASTER_ADDR"),  # over two nodes, without a batch job
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MASTER_ADDR": "here"},
     "mpiexec.*MASTER_PORT"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "mpiexec.*MASTER_ADDR"),
    ({**HAND, "MASTER_PORT": "tcp://10.0.3.4:23456"}, "MASTER_PORT is 'tcp.*Kubernetes"),
    # torchrun's flags as variables, and no torchrun
    ({"PET_NNODES": "2", "PET_NODE_RANK": "1"}, "PET_NNODES is 2.*`torchrun main.py"),
    ({**HAND, "PET_NNODES": "2", "PET_NPROC_PER_NODE": "gpu"}, "PET_NPROC_PER_NODE is gpu"),
    # a shell's leftovers, under MPI
    ({"RANK": "0", "WORLD_SIZE": "1", "PMI_RANK": "1", "PMI_SIZE": "2"}, "to run under mpiexec"),
])  # fmt: skip
def test_missing_and_contradictory_variables_are_named(variables, words):
    with pytest.raises(LaunchError, match=words):
        read(variables)


@pytest.mark.parametrize("variables, launcher, numbers, address", [
    (by_hand(1, 2, 5), "variables", (1, 2, 1), "127.0.0.1"),
    (POD, "variables", (1, 2, None), "127.0.0.1"),
    ({**POD, "LOCAL_RANK": "", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "variables",
     (1, 2, None), "127.0.0.1"),
    # of one process there is no more to say
    ({"RANK": "0", "WORLD_SIZE": "1"}, "variables", (0, 1, None), "127.0.0.1"),
    # one variable that is left over does not make another launcher
    ({**by_mpi(1, 2, 1, 2), "LOCAL_RANK": "0", "RANK": ""}, "mpirun", (1, 2, 1), "127.0.0.1"),
    ({**by_srun(1, 2), "WORLD_SIZE": "4"}, "srun", (1, 2, 1), "127.0.0.1"),
    (by_srun(1, 2), "srun", (1, 2, 1), "127.0.0.1"),
    (SRUN_4, "srun", (5, 8, 1), "gpu3"),
    ({**SRUN_4, "MASTER_ADDR": "login"}, "srun", (5, 8, 1), "login"),
    ({**SRUN_4, "PMI_RANK": "5", "PMI_SIZE": "8"}, "srun", (5, 8, 1), "gpu3"),
    # torchrun, one a node, started by srun
    ({**SRUN_4, **by_hand(3, 4, 6), "TORCHELASTIC_RUN_ID": "1",
      "TORCHELASTIC_USE_AGENT_STORE": "True"}, "torchrun", (3, 4, 3), "127.0.0.1"),
    # mpirun within a batch job, whose own variables say task 0 of 1 everywhere
    ({**by_srun(0, 1), **by_mpi(1, 2, 1, 2)}, "mpirun", (1, 2, 1), "127.0.0.1"),
    ({**SRUN_4, **by_mpi(1, 2, 0, 1)}, "mpirun", (1, 2, 0), "gpu3"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
     "mpiexec", (1, 2, 1), "127.0.0.1"),
])  # fmt: skip
def test_variables_describe_a_launch(variables, launcher, numbers, address):
    per_rank = read(variables)
    assert per_rank.launcher == launcher
    assert (per_rank.rank, per_rank.size, per_rank.local_rank) == numbers
    assert per_rank.address == address
    assert per_rank.agent == ("TORCHELASTIC_RUN_ID" in variables)


def test_jobs_have_ports_of_their_own():
    ports = [read(by_srun(i % 2, 2, str(i // 2))).port for i in range(40)]
    assert ports[::2] == ports[1::2]  # the ranks of one job agree
    assert len(set(ports)) == 20 and 20000 <= min(ports) <= max(ports) < 30000


@pytest.mark.parametrize("nodes, first", [
    ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[003-007,12],cpu1", "gpu003"),
    ("r[1-2]n[7,9]-ib", "r1n7-ib"), ("a-b[10]", "a-b10"),
])  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


TORCHRUNS = {**HAND, "TORCHELASTIC_RUN_ID": "1"}
HYDRA = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize("variables, words", [
    (TORCHRUNS, "unset WORLD_SIZE"), (by_mpi(0, 2, 0, 2), "unset OMPI_COMM_WORLD_SIZE"),
    (HYDRA, "unset PMI_SIZE"), (POD, "unset WORLD_SIZE"), ({**POD, "RANK": "0"}, "WORLD_SIZE"),
    (HAND, "WORLD_SIZE"), ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI"), ({"PMI_SIZE": "2"}, "PMI_SIZE"),
    ({k: v for k, v in POD.items() if k != "RANK"}, "WORLD_SIZE"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "unset WORLD_SIZE"),  # a notebook's
    ({"RANK": "0", "WORLD_SIZE": "1", **by_mpi(0, 2, 0, 2)}, "OMPI_COMM_WORLD_SIZE"),
    # another process of the node prints it
    ({**TORCHRUNS, "RANK": "1", "LOCAL_RANK": "1"}, None), (by_mpi(1, 2, 1, 2), None),
    ({**HYDRA, "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, None),
    # torchrun's flags as variables, for which no torchrun was started
    ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, "`torchrun main.py --distribute"),
    ({"PET_NNODES": "1:4"}, "PET_NNODES is 1:4"), ({"PET_NPROC_PER_NODE": "8"}, "NODE is 8"),
    ({"PET_NPROC_PER_NODE": "auto"}, "NODE is auto"), ({"PET_NPROC_PER_NODE": "gpu"}, "is gpu"),
])  # fmt: skip
def test_several_processes_of_one_command_need_the_flag(variables, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(LaunchError) as caught:
        check_alone(variables)
    assert (words or "") in str(caught.value) and bool(words) == bool(str(caught.value))
    assert ("torchrun" in str(caught.value)) == any(x in variables for x in PLANS)


def test_a_launcher_is_named_with_the_path_of_the_program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variables in ({}, {"PET_NNODES": "2"}, {"SLURM_NTASKS": "2"}):
        with pytest.raises(LaunchError, match=f" {ROOT / 'main.py'} --distribute"):
            read(variables)


LAUNCHES = {"torchrun": TORCHRUNS, "pod": POD, "mpirun": by_mpi(0, 2, 0, 2), "mpiexec": HYDRA,
            "srun": by_srun(1, 2), "plans": {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}}


@pytest.mark.parametrize("variables", [
    {}, {"RANK": "0"}, {"RANK": "1"}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"},
    {"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
    by_hand(0, 1, 1), {"RANK": "3", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "two"},
    {"MASTER_ADDR": "here", "MASTER_PORT": "tcp://1.2.3.4:5"}, {"MASTER_PORT": "x", "RANK": "y"},
    by_mpi(0, 1, 0, 1), {"OMPI_COMM_WORLD_SIZE": "many"}, {"PMI_RANK": "0", "PMI_SIZE": "1"},
    {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "gpu"}, {"PET_NNODES": "1:1"},
    by_srun(1, 4), {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},
    {**by_srun(1, 4), "PMI_RANK": "1", "PMI_SIZE": "4"},  # srun --mpi=pmi2
    *(dict.fromkeys(launch, "") for launch in LAUNCHES.values()),
])  # fmt: skip
def test_a_run_of_its_own_needs_no_variable(variables, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_alone(variables)
    assert is_first(variables) or variables.get("SLURM_PROCID") == "1"


@pytest.mark.parametrize("launcher", LAUNCHES)
def test_each_variable_of_a_launcher_may_be_missing(launcher):
    """Then the others do, or a sentence names a variable; nor is torchrun named where it is not."""
    numbers, whole = (int(launcher in ("pod", "srun")), 2), LAUNCHES[launcher]
    for gone in whole:
        for value in (None, "", "x"):
            variables = {k: v for k, v in whole.items() if k != gone}
            variables |= {gone: value} if value is not None else {}
            for function in (read, check_alone):
                try:
                    launch = function(variables)
                    assert function is check_alone or (launch.rank, launch.size) == numbers
                except LaunchError as error:
                    assert function is check_alone or any(
                        x in str(error) for x in (gone, "MASTER_", "srun", "PET_NNODES")
                    ), (variables, str(error))
                    assert launcher in ("torchrun", "plans") or "torchrun" not in str(error)


def test_ranks_without_a_local_rank_count_themselves():
    store, pods = dist.HashStore(), [b"here", b"there", b"here", b"here"]
    pods = [socket.gethostname().encode() if pod == b"here" else pod for pod in pods]
    for rank, pod in enumerate(pods):
        store.set(f"here/{rank}", pod)
    launch = read(POD)
    counted = [_count_on_node(launch._replace(rank=rank), store) for rank in (0, 2, 3)]
    assert counted == [0, 1, 2]


def test_ctrl_c_ends_a_rank_that_waits_for_others(tmp_path):
    """At once, by the signal: a shell has 130 for it."""
    variables = by_srun(0, 2, f"{os.getpid()}-alone")
    command = [sys.executable, "main.py", "--distribute", "--cpu", *FLAGS, "--out", str(tmp_path)]
    (process,), end = launch(command, [variables]), time.monotonic() + 60
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", read(variables).port), 1).close()
            break
        except OSError:
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=10)[1]
    assert process.returncode == -signal.SIGINT


def test_one_process_needs_no_launcher():
    world = start(torch.device("cpu"))
    assert (world.rank, world.size) == (0, 1)
    x = torch.ones(2)
    world.all_reduce(x)
    world.all_reduce_max(x)
    world.all_reduce_async(x)()
    assert x.tolist() == [1, 1]
    assert world.broadcast_object({"a": 1}) == {"a": 1} and world.all_gather_object(3) == [3]
    assert world.ranks_that_differ([x]) == []
    assert world.failed(LaunchError("no")) == ("no", None, True)
