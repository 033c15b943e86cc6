"""Runs from the command line: what they log, save, print and return, and how they resume."""

import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import distributed
import main as program
from data import load
from flags import no_graph, parse, read
from runs.checkpoint import Checkpoints
from runs.log import RunLog
from runs.name import name_and_settings
from tests.conftest import ROOT, with_norms
from tests.program import NAME, QUICK, comparable, equal, only, rows, same, train, weights
from training.losses import mse
from training.step import evaluate


def same_from_the_first_row(one, other):
    """Assert `same`, and that the first rows differ in --out alone."""
    same(one, other)
    first, expected = (comparable(rows(out))[0] for out in (one, other))
    expected["flags"]["out"] = str(one)
    assert first == expected


def test_readme_first_command_reaches_97_percent(run_main, tmp_path):
    """As README prints it, in a process without sockets."""
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^pip install .* && python main.py$", readme, re.M)
    blocker = tmp_path / "site" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    env = {**os.environ, "PYTHONPATH": str(blocker.parent)}
    done = subprocess.run([sys.executable, ROOT / "main.py"], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    tmp_path /= "output"
    last = rows(tmp_path)[-1]
    assert last["kind"] == "end" and last["stopped"] is None
    assert last["test_acc"] >= 0.97
    assert "layers.0.weight" in done.stdout and "Curves" in done.stdout
    assert f"Without flags: python {ROOT}/main.py --dataset digits --epochs 20" in done.stdout
    assert len(rows(tmp_path)) == 22
    steps = done.stdout.partition("To try next\n")[2].splitlines()
    assert len(steps) == 6
    for line in steps:
        python, path, *words = shlex.split(line[9:])
        assert python == "python" and os.path.exists(path)
        if path.endswith("main.py") and "--help" not in words:
            read(words)  # exits at a mistake


def test_the_rows_of_epochs_are_the_means_of_their_steps(tmp_path):
    """In the two epochs whose steps are logged; logging changes no weight."""
    name = "fcn3x32-digits-mse-bs128-agd-seed3"
    flags = [*QUICK, "--seed", 3, "--out", tmp_path]
    assert train(*flags) == 0
    assert train(*flags, "--log_steps", 2, "--log_updates") == 0
    first, *middle, end = rows(tmp_path, f"{name}-steps2-updates")
    assert first["kind"] == "run" and first["flags"]["epochs"] == 4
    assert first["settings"]["data"]["crc32"]["train_images"]
    epochs = [row for row in middle if row["kind"] == "epoch"]
    steps = [row for row in middle if row["kind"] == "step"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    places = [(epoch, step) for epoch in (1, 2) for step in range(1, 13)]
    assert [(row["epoch"], row["step"]) for row in steps] == places
    for row in epochs[:2]:
        assert 0 <= row["test_acc"] <= 1 and round(row["test_acc"] * 360, 6).is_integer()
        mine = [step for step in steps if step["epoch"] == row["epoch"]]
        for key in ("loss", "acc"):
            mean = np.average([step[key] for step in mine], weights=[128] * 11 + [29])
            assert row[f"train_{key}"] == pytest.approx(mean, rel=1e-9)
        for key in ("eta", "update"):
            x = [step[key] for step in mine]
            spread = [row[f"{key}_{part}"] for part in ("min", "mean", "max")]
            assert spread == pytest.approx([min(x), np.mean(x), max(x)]) and 0 < min(x)
        assert row["update_max"] < 0.1
    losses = [row["train_loss"] for row in epochs]
    assert losses == sorted(losses, reverse=True)
    assert end["kind"] == "end" and end["stopped"] is None and end["epochs"] == 4
    assert end["final"] and end["skipped_steps"] == end["bad_images"] == 0
    assert end["test_acc"] == epochs[-1]["test_acc"]
    plain = rows(tmp_path, name)[1:-1]
    assert [row["train_loss"] for row in plain] == losses and "update_mean" not in plain[0]
    assert equal(weights(tmp_path, name), weights(tmp_path, first["name"]))


@pytest.mark.parametrize("optimizer", [
    "agd", "spectral", "adam", "torch.optim.SGD", "tests.reference.Averaging",
])  # fmt: skip
def test_a_longer_run_goes_on_bit_for_bit(optimizer, tmp_path):
    """Two epochs and then four leave what four at once leave."""
    flags = [*QUICK, "--optimizer", optimizer]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    for epochs in (2, 4):
        assert train(*flags, "--epochs", epochs, "--out", tmp_path / "parts") == 0
    same_from_the_first_row(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "vgg"])
def test_convolutional_networks_learn_real_images_and_go_on_bit_for_bit(arch, samples, tmp_path):
    """With crops, flips and batch norm. The loss of 96 CIFAR images falls, epoch by epoch."""
    with np.load(samples("cifar10") / "cifar10.npz") as file:
        np.savez(tmp_path / "cifar10.npz", **{key: file[key][:96] for key in file})
    flags = ["--arch", arch, "--train_bs", 16, "--data_dir", tmp_path, "--log_steps"]
    assert train(*flags, "--epochs", 3, "--out", tmp_path / "whole") == 0
    for epochs in (1, 3):
        assert train(*flags, "--epochs", epochs, "--out", tmp_path / "parts") == 0
    same(tmp_path / "parts", tmp_path / "whole")
    losses = [x["train_loss"] for x in rows(tmp_path / "whole") if x["kind"] == "epoch"]
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)


def test_an_interrupt_before_the_checkpoint_counts_what_is_saved(tmp_path, monkeypatch, capsys):
    save = RunLog.save

    def interrupted(run, checkpoint):
        if checkpoint["epoch"] == 3:
            raise KeyboardInterrupt
        return save(run, checkpoint)

    monkeypatch.setattr(RunLog, "save", interrupted)
    assert train(*QUICK, "--out", tmp_path) == 130
    assert "Interrupted after 3 whole epochs" in capsys.readouterr().out
    monkeypatch.undo()
    assert train(*QUICK, "--out", tmp_path) == 0
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert [row["kind"] for row in rows(tmp_path)] == ["run", *["epoch"] * 4, "end"]


@pytest.mark.parametrize("full_from", [1, 3])
def test_a_run_goes_on_with_a_full_disk_and_after_it(full_from, tmp_path, monkeypatch, capsys):
    write, last = Checkpoints.write, tmp_path / "checkpoints" / f"{NAME}.pt"

    def full(checkpoints, content):
        if content["epoch"] >= full_from:
            raise OSError("No space left on device")
        write(checkpoints, content)

    assert train(*QUICK, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(Checkpoints, "write", full)
    assert train(*QUICK, "--out", tmp_path) == 1
    printed = capsys.readouterr().out
    assert printed.count(f"No checkpoint: {last} cannot be written: No space left on") == 1
    assert "epoch 4/4" in printed and "Stopped: all 4 epochs are done, but not saved: " in printed
    assert "No space left" in rows(tmp_path)[-1]["stopped"] and not rows(tmp_path)[-1]["final"]
    assert last.exists() == (full_from > 1)
    monkeypatch.undo()
    assert train(*QUICK, "--out", tmp_path) == 0
    same(tmp_path, tmp_path / "whole")


def start(*flags, out):
    """`python main.py` outside of any SLURM job, with pipes for its output."""
    return subprocess.Popen(
        [sys.executable, "main.py", *map(str, flags), "--out", str(out)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"},
    )  # fmt: skip


def wait_for(process, text):
    """Read the output up to a line that starts with `text`."""
    if not any(line.startswith(text) for line in process.stdout):
        pytest.fail(process.stderr.read())


@pytest.mark.parametrize("how", [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_broken_run_goes_on_bit_for_bit(how, tmp_path):
    """SIGUSR1 and SIGUSR2 have it save and go on, before `how` ends it."""
    flags, whole, broken = [*QUICK[:-1], 100], tmp_path / "whole", tmp_path / "broken"
    assert train(*flags, "--out", whole) == 0
    process = start(*flags, out=broken)
    wait_for(process, "epoch 7/")
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        wait_for(process, "Saved in epoch")
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert err == "" and "Interrupted after" in out
        assert rows(broken)[-1]["stopped"] == "interrupted"
    assert 7 <= [row["kind"] for row in rows(broken)].count("epoch") < 100
    again = start(*flags, out=broken)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and re.search(r"Going on after epoch \d+", out)
    same_from_the_first_row(broken, whole)


def test_ctrl_c_before_the_first_epoch_is_clean_too(tmp_path):
    process = start(*QUICK[:-1], 1000, out=tmp_path)
    wait_for(process, "Setting")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err and "nterrupted" in out + err


def test_a_finished_run_says_so_and_fresh_starts_over(tmp_path, capsys):
    assert train(*QUICK, "--out", tmp_path) == 0
    before = rows(tmp_path)
    for epochs in (4, 2):
        assert train(*QUICK, "--epochs", epochs, "--out", tmp_path) == 0
        assert "Already finished: 4 epochs" in capsys.readouterr().out
        assert rows(tmp_path) == before
    assert train(*QUICK, "--epochs", 2, "--out", tmp_path, "--fresh") == 0
    assert len(rows(tmp_path)) == 4


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    flags = [*QUICK, "--epochs", 50, "--optimizer", "sgd", "--lr", 1e6, "--out", tmp_path]
    assert train(*flags) == 1
    out = capsys.readouterr().out
    assert re.search(r"Stopped: the loss was (nan|inf) at epoch 1, step \d+; try a smaller", out)
    _, epoch, end = rows(tmp_path, "fcn3x32-digits-mse-bs128-sgd-lr1000000.0-seed0")
    assert epoch["train_loss"] is None and end["stopped"].startswith("the loss was")
    assert not (tmp_path / "checkpoints" / f"{only(tmp_path)}.pt").exists()
    assert train(*flags) == 1
    assert "Already ended: the loss was" in capsys.readouterr().out


def test_settings_change_the_name_and_the_result(tmp_path):
    variants = [[], ["--seed", 1], ["--gain", 0.5], ["--loss", "xent"], ["--train_bs", 64]]
    for flags in variants:
        assert train(*QUICK, "--epochs", 1, *flags, "--out", tmp_path) == 0
    names = [path.stem for path in (tmp_path / "logs").glob("*.jsonl")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,120}", name) for name in names)
    results = {rows(tmp_path, name)[-1]["train_loss"] for name in names}
    assert len(results) == len(names) == len(variants)


def test_names_have_rates_without_exponents_and_the_part_of_the_data():
    def name(*flags):
        return name_and_settings(vars(parse([*map(str, flags), "--cpu"])))[0]

    assert name("--optimizer", "adam", "--lr", "1e-7").endswith("-adam-lr0.0000001-seed0")
    assert name("--optimizer", "sgd", "--lr", "10").endswith("-sgd-lr10.0-seed0")
    assert "-train500-test10-mse-" in name("--train_examples", 500, "--test_examples", 10)
    assert name("--dataset", "npz:a/tiny.npz") == name("--dataset", "npz:tiny.npz")
    assert name("--dataset", "npz:tiny.npz").startswith("fcn10x256-npz_tiny-mse")
    assert name("--dataset", "npz:cifar10.npz") != name("--dataset", "cifar10")
    assert name("--augment", "default") == name()
    assert "-cifar10-augment_crop-mse-" in name("--augment", "crop")
    assert name("--log_steps").endswith("-steps") and name("--log_steps", 3).endswith("-steps3")


def test_a_resumed_run_prints_plain_text_and_imports_no_compiler(run_main, tmp_path):
    """Plain text where the encoding lacks eta."""
    assert train(*QUICK, "--epochs", 1, "--out", tmp_path) == 0
    done = run_main(*QUICK, "--epochs", 2, env={"PYTHONIOENCODING": "ascii"},
                    launcher=["-X", "importtime"])  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 2/2  loss .* eta \d", done.stdout)
    assert " torch.optim\n" in done.stderr and "torch._dynamo" not in done.stderr


@pytest.mark.slow
def test_one_epoch_of_cifar_stays_where_it_was(samples, tmp_path):
    """Loss and eta of the default network, within the spread of seeds."""
    assert train("--epochs", 1, "--data_dir", samples("cifar10"), "--out", tmp_path) == 0
    row = rows(tmp_path, "fcn10x256-cifar10-mse-bs128-agd-seed0")[1]
    assert row["train_loss"] == pytest.approx(0.839, abs=0.01)
    assert row["eta_mean"] == pytest.approx(0.17, abs=0.02)


def test_a_spectral_run_is_tested_and_saved_at_its_average(tmp_path, monkeypatch):
    """Batch norm has its statistics there, too. The log has the length of Z, and the angle by which
    the last step has turned it."""
    monkeypatch.setattr(program, "build", with_norms)
    flags = ["--dataset", "digits", "--optimizer", "spectral", "--epochs", 3, "--log_steps"]
    assert train(*flags, "--out", tmp_path) == 0
    *_, last, row, _ = rows(tmp_path)
    assert (last["kind"], row["kind"], row["epoch"]) == ("step", "epoch", 3)
    path = tmp_path / "checkpoints" / f"{only(tmp_path)}.pt"
    saved = torch.load(path, weights_only=True)
    data = load("digits", "", 128, 1000, torch.device("cpu"))
    net = with_norms()
    net.load_state_dict(saved["net"])
    assert row["test_loss"] == pytest.approx(evaluate(net, data.test, mse).read()["loss"], rel=1e-6)
    data.train.set_epoch(3)
    with torch.no_grad():
        batches = [inputs for inputs, _ in data.train][:8]
        mean = sum(net[0](inputs).mean((0, 2, 3)) for inputs in batches) / 8
    assert torch.allclose(saved["net"]["1.running_mean"], mean, atol=1e-6)
    assert saved["net"]["1.num_batches_tracked"] == 8
    assert not saved["optimizer"]["param_groups"][0]["train_mode"]
    lengths = []
    for p, entry in zip(net.parameters(), saved["optimizer"]["state"].values()):
        assert not torch.equal(p, entry["weights"])  # the weights that train
        rho = entry["z"].flatten(1).norm() / min(p.flatten(1).shape) ** 0.5
        lengths.append((rho / entry["s"]).item())
    lengths.pop()  # of the output layer, which has none
    assert len(lengths) == 2 and row["length"] == pytest.approx(np.mean(lengths), rel=1e-5)
    turn = np.mean([last["eta"] / 3 / length for length in lengths])
    assert row["turn"] == pytest.approx(turn, rel=1e-5)


def test_a_test_part_of_an_image_folder_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        train("--dataset", "folder:pictures", "--test_examples", 5)
    assert exit.value.code == 2 and "--test_examples is for" in capsys.readouterr().err


def test_the_default_directory_of_data_names_no_home(monkeypatch):
    monkeypatch.delenv("AGD_DATA", raising=False)
    assert parse(["--cpu"]).data_dir == "~/.cache/agd"


def test_the_first_row_has_what_makes_a_run_fast_and_the_name_its_precision(tmp_path):
    assert train(*QUICK, "--out", tmp_path) == 0
    assert train(*QUICK, "--precision", "bf16", "--cuda_graph", "off", "--out", tmp_path) == 0
    plain, bf16 = rows(tmp_path, NAME), rows(tmp_path, f"{NAME}-bf16")
    expected = {"precision": "fp32", "compile": False, "channels_last": False, "cuda_graph": False,
                "no_cuda_graph": "it takes a CUDA device", "test_bs": 1000}  # fmt: skip
    assert {key: plain[0][key] for key in expected} == expected
    assert bf16[0]["precision"] == bf16[0]["settings"]["precision"] == "bf16"
    assert bf16[0]["no_cuda_graph"] == "--cuda_graph off"
    assert "precision" not in plain[0]["settings"]  # earlier runs go on
    losses = [row["train_loss"] for row in bf16[1:-1]]
    fp32 = [row["train_loss"] for row in plain[1:-1]]
    assert losses == pytest.approx(fp32, rel=0.02) and losses != fp32
    assert weights(tmp_path, f"{NAME}-bf16")["layers.0.weight"].dtype == torch.float32


@pytest.mark.parametrize("fails", [1, 2])
def test_a_graph_that_fails_is_noted_once_and_the_run_goes_on(
    fails, replays, tmp_path, monkeypatch, capsys
):
    """Where the second graph fails, of the ragged batch, the first one is dropped, too."""

    def recorder():
        recorded = []

        def record(work):
            recorded.append(1)
            if len(recorded) == fails:
                raise RuntimeError("operation not permitted when stream is capturing")
            return lambda: (replays.append(1), work())

        return record

    monkeypatch.setattr("training.cuda_graph.cuda_recorder", recorder)
    flags = [*QUICK, "--epochs", 5]
    assert train(*flags, "--cuda_graph", "off", "--out", tmp_path / "plain") == 0
    assert train(*flags, "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("No CUDA graph of a step: operation not permitted") == 1
    assert len(replays) == (0 if fails == 1 else 4 * 11 - 3)
    expected = [row["train_loss"] for row in rows(tmp_path / "plain")[1:-1]]
    assert [row["train_loss"] for row in rows(tmp_path)[1:-1]] == expected
    assert rows(tmp_path)[4]["no_cuda_graph"].startswith("operation not permitted")
    assert train(*flags, "--cuda_graph", "on", "--fresh", "--out", tmp_path) == 1
    assert "start again with --cuda_graph off" in rows(tmp_path)[-1]["stopped"]


def test_compilation_happens_once_and_leaves_the_names(tmp_path, monkeypatch):
    """The ragged last batch and the test set go through the network itself."""
    compiled, compile_ = [], torch.compile

    def set_backend(backend):
        monkeypatch.setattr(
            torch, "compile", lambda net, **options: compile_(net, backend=backend, **options)
        )

    def no_compiler(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    assert train(*QUICK, "--out", tmp_path / "plain") == 0
    set_backend(lambda graph, inputs: compiled.append(len(inputs)) or graph)
    assert train(*QUICK, "--compile", "--precision", "bf16", "--out", tmp_path / "bf16") == 0
    assert train(*QUICK, "--compile", "--out", tmp_path) == 0
    assert len(compiled) == 2
    assert rows(tmp_path)[0]["compile"] is True
    assert equal(weights(tmp_path), weights(tmp_path / "plain"))
    set_backend(no_compiler)
    assert train(*QUICK, "--compile", "--fresh", "--out", tmp_path) == 1
    assert re.search(r"cannot be compiled here \(.*C\+\+", rows(tmp_path)[-1]["stopped"])


@pytest.mark.slow
def test_channels_last_weights_are_saved_and_go_on_in_either_layout(tmp_path):
    flags = ["--dataset", "digits", "--train_examples", 24, "--test_examples", 8, "--arch", "vgg",
             "--train_bs", 8, "--gain", 0.001, "--out", tmp_path]  # fmt: skip
    assert train(*flags, "--epochs", 1, "--channels_last", "on") == 0
    last = weights(tmp_path)
    assert last["features.3.weight"].is_contiguous(memory_format=torch.channels_last)
    assert rows(tmp_path)[0]["channels_last"] is True
    assert train(*flags, "--epochs", 2) == 0
    assert rows(tmp_path)[0]["resumed"][0]["channels_last"] is False
    assert weights(tmp_path).keys() == last.keys()
    assert weights(tmp_path)["features.3.weight"].is_contiguous()
    assert train(*flags, "--epochs", 1, "--fresh", "--channels_last", "off") == 0
    first = weights(tmp_path)
    for key in last:
        difference = (first[key] - last[key]).double().norm() / last[key].double().norm()
        assert difference < 1e-3, key


@pytest.mark.parametrize("bs, recorded", [(128, 12), (14, 30)])
def test_a_profile_shows_where_the_time_goes(bs, recorded, tmp_path, capsys):
    flags, name = [*QUICK, "--train_bs", bs], NAME.replace("128", str(bs))
    assert train(*flags, "--out", tmp_path / "plain") == 0
    capsys.readouterr()
    assert train(*flags, "--profile", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    table = re.findall(r"^(\S.*?) +(\d+\.\d)% +(\d+\.\d+) ms (?:a step|an epoch)$", printed, re.M)
    parts = ["data", "forward", "backward", "optimiser", "sums", "the rest", "evaluation"]
    assert [part for part, _, _ in table] == parts
    assert sum(float(share) for _, share, _ in table) == pytest.approx(100, abs=0.5)

    def events(name):
        with gzip.open(tmp_path / "profiles" / f"{name}.json.gz", "rt") as file:
            return [event.get("name") for event in json.load(file)["traceEvents"]]

    names = events(name)
    assert [names.count(part) for part in parts[:5]] == [recorded] * 5
    assert "aten::mm" in events(f"{name}-test")
    assert comparable(rows(tmp_path)[1:]) == comparable(rows(tmp_path / "plain")[1:])


def test_graphs_begin_after_the_steps_of_a_profile(replays, tmp_path, capsys):
    flags = [*QUICK, "--train_bs", 14, "--epochs", 1, "--profile", "--out", tmp_path]
    assert train(*flags) == 0
    assert len(replays) == 103 - 40 - 1  # the ragged batch waits for its fourth
    assert "one kernel at a time, without a CUDA graph" in capsys.readouterr().out


@pytest.mark.parametrize("device, flags, expected", [
    ("cpu", [], 1000), ("cpu", ["--arch", "vgg"], 64), ("cuda", [], 10_000),
    ("cuda:1", ["--dataset", "folder:x", "--train_bs", "256"], 1024),
    ("cuda", ["--test_bs", "7"], 7),
    ("cpu", ["--dataset", "shakespeare", "--arch", "gpt"], 16),
    ("cuda", ["--dataset", "shakespeare", "--arch", "gpt"], 64),
])  # fmt: skip
def test_the_batch_of_a_test_is_what_pays_on_the_device(device, flags, expected):
    assert parse(["--device", device, *flags], check=False).test_bs == expected


@pytest.mark.parametrize("flags, words", [
    (["--distribute"], "single process"), (["--dataset", "folder:x"], "arrays"),
    (["--micro_bs", "8"], "whole batches"), (["--optimizer", "no_such.Optimizer"], "may read"),
    (["--device", "cpu"], "CUDA device"), (["--optimizer", "adam"], None), ([], None),
])  # fmt: skip
def test_where_a_graph_is_possible(flags, words):
    """Unchecked flags: devices and packages may be another machine's."""
    reason = no_graph(parse(["--device", "cuda", *flags], check=False))
    assert reason is None if words is None else words in reason


def test_runs_at_once_have_streams_of_their_own_that_later_ones_take_over(monkeypatch):
    """With stand-ins for torch's streams, of which there are 32: the 33rd run takes a free one."""
    made, now = [], []

    @contextmanager
    def inside(stream):
        now.append(stream)
        yield
        now.pop()

    monkeypatch.setattr(program, "IDLE_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(object()) or made[-1])
    monkeypatch.setattr(torch.cuda, "stream", inside)
    world = distributed.World(torch.device("cuda", 0))
    for _ in range(40):
        with program.stream_of_its_own(world), program.stream_of_its_own(world):
            assert len(set(now)) == 2
    assert len(made) == 2 and not now
