import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed
import main as program
from data import load
from flags import no_graph, parse
from runs.log import RunLog
from runs.name import name_and_settings
from tests.conftest import ROOT, with_norms
from training.losses import mse
from training.step import evaluate

QUICK = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "4"]
NAME = "fcn3x32-digits-mse-bs128-agd-seed0"


def rows(out, name=NAME):
    text = (Path(out) / "logs" / f"{name}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def comparable(rows):
    """The rows without what differs from run to run: times and date."""
    drop = ("seconds", "images_per_second", "date", "saving_seconds")
    return [{k: v for k, v in row.items() if k not in drop} for row in rows]


def weights(out, name=NAME):
    path = Path(out) / "checkpoints" / f"{name}.pt"
    return torch.load(path, weights_only=True)["net"]


def call(*flags):
    """main() in this process, quickly; returns its exit code."""
    return program.main([str(flag) for flag in flags])


def test_readme_first_command_reaches_97_percent(run_main, tmp_path):
    """The command as README prints it, without a network: sockets are off in that process."""
    readme = (ROOT / "README.md").read_text()
    command = re.search(r"^pip install .* && python main.py (--dataset digits.*)$", readme, re.M)
    blocker = tmp_path / "site" / "sitecustomize.py"
    blocker.parent.mkdir()
    blocker.write_text(
        "import socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    done = run_main(*command.group(1).split(), env={"PYTHONPATH": str(blocker.parent)})
    assert done.returncode == 0, done.stderr
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    last = [json.loads(line) for line in log.read_text().splitlines()][-1]
    assert last["kind"] == "end" and last["stopped"] is None
    assert last["test_acc"] >= 0.97
    assert "layers.0.weight" in done.stdout and "Curves" in done.stdout


def test_log_has_the_rows_that_others_read(tmp_path):
    assert call(*QUICK, "--out", tmp_path, "--log_steps", "--seed", 3) == 0
    first, *middle, end = rows(tmp_path, "fcn3x32-digits-mse-bs128-agd-seed3-steps")
    assert first["kind"] == "run" and first["flags"]["epochs"] == 4
    for key in ("torch", "python", "device", "commit", "data", "weights", "date"):
        assert key in first
    epochs = [row for row in middle if row["kind"] == "epoch"]
    steps = [row for row in middle if row["kind"] == "step"]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert set(epochs[0]) == {
        "kind", "epoch", "train_loss", "train_acc", "test_loss", "test_acc", "eta_min", "eta_mean",
        "eta_max", "seconds", "images_per_second",
    }  # fmt: skip
    assert [(row["epoch"], row["step"]) for row in steps] == [
        (e, s) for e in range(1, 5) for s in range(1, 13)
    ]
    counts = [128] * 11 + [29]
    for row in epochs:
        assert 0 <= row["test_acc"] <= 1 and round(row["test_acc"] * 360, 6).is_integer()
        mine = [step for step in steps if step["epoch"] == row["epoch"]]
        loss = np.average([step["loss"] for step in mine], weights=counts)
        acc = np.average([step["acc"] for step in mine], weights=counts)
        etas = [step["eta"] for step in mine]
        assert row["train_loss"] == pytest.approx(loss, rel=1e-9)
        assert row["train_acc"] == pytest.approx(acc, rel=1e-9)
        expected = [min(etas), np.mean(etas), max(etas)]
        assert [row["eta_min"], row["eta_mean"], row["eta_max"]] == pytest.approx(expected)
    assert end["kind"] == "end" and end["stopped"] is None and end["epochs"] == 4
    assert end["final"] and end["skipped_steps"] == end["bad_images"] == 0
    assert end["test_acc"] == epochs[-1]["test_acc"]


@pytest.mark.parametrize("optimizer", [
    "agd", "spectral", "adam", "torch.optim.SGD", "tests.reference.Averaging",
])  # fmt: skip
def test_a_longer_run_goes_on_bit_for_bit(optimizer, tmp_path):
    """Two epochs and then four leave what four at once leave."""
    flags = [*QUICK, "--optimizer", optimizer]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(*flags, "--out", whole) == 0
    assert call(*flags, "--epochs", 2, "--out", parts) == 0
    assert call(*flags, "--out", parts) == 0
    (name,) = [path.stem for path in (whole / "logs").glob("*.jsonl")]
    ours, theirs = weights(parts, name), weights(whole, name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    expected = comparable(rows(whole, name))
    expected[0]["flags"]["out"] = str(parts)
    assert comparable(rows(parts, name)) == expected


@pytest.mark.slow
def test_augmented_images_and_batch_norm_go_on_bit_for_bit(samples, tmp_path):
    with np.load(samples("cifar10") / "cifar10.npz") as file:
        np.savez(tmp_path / "cifar10.npz", **{key: file[key][:96] for key in file})
    flags = ["--arch", "vgg", "--train_bs", 40, "--data_dir", tmp_path, "--log_steps"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(*flags, "--epochs", 2, "--out", whole) == 0
    for epochs in (1, 2):
        assert call(*flags, "--epochs", epochs, "--out", parts) == 0
    name = "vgg-cifar10-mse-bs40-agd-seed0-steps"
    assert all(torch.equal(weights(parts, name)[k], v) for k, v in weights(whole, name).items())
    assert comparable(rows(parts, name)[1:]) == comparable(rows(whole, name)[1:])


def test_an_interrupt_before_the_checkpoint_counts_what_is_saved(tmp_path, monkeypatch, capsys):

    save = RunLog.save

    def interrupted(run, checkpoint):
        if checkpoint["epoch"] == 3:
            raise KeyboardInterrupt
        return save(run, checkpoint)

    monkeypatch.setattr(RunLog, "save", interrupted)
    assert call(*QUICK, "--out", tmp_path) == 130
    assert "Interrupted after 3 whole epochs" in capsys.readouterr().out
    monkeypatch.undo()
    assert call(*QUICK, "--out", tmp_path) == 0
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert [row["kind"] for row in rows(tmp_path)] == ["run", *["epoch"] * 4, "end"]


@pytest.mark.parametrize("full_from", [1, 3])
def test_a_full_disk_is_said_and_the_run_goes_on_now_and_later(
    full_from, tmp_path, monkeypatch, capsys
):
    from runs.checkpoint import Checkpoints

    write, last = Checkpoints.write, tmp_path / "checkpoints" / f"{NAME}.pt"

    def full(checkpoints, content):
        if content["epoch"] >= full_from:
            raise OSError("No space left on device")
        write(checkpoints, content)

    assert call(*QUICK, "--out", tmp_path / "whole") == 0
    monkeypatch.setattr(Checkpoints, "write", full)
    assert call(*QUICK, "--out", tmp_path) == 1
    said = capsys.readouterr().out
    assert said.count(f"No checkpoint: {last} cannot be written: No space left on") == 1
    assert "epoch 4/4" in said and "Stopped: all 4 epochs are done, but not saved: " in said
    assert "No space left" in rows(tmp_path)[-1]["stopped"] and not rows(tmp_path)[-1]["final"]
    assert last.exists() == (full_from > 1)
    monkeypatch.undo()
    assert call(*QUICK, "--out", tmp_path) == 0
    assert comparable(rows(tmp_path))[1:] == comparable(rows(tmp_path / "whole"))[1:]
    state = weights(tmp_path / "whole")
    assert all(torch.equal(weights(tmp_path)[key], state[key]) for key in state)


def start(*flags, out):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *map(str, flags), "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_epoch(process, epoch):
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    pytest.fail(process.stderr.read())


def kill(process, how):
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    return out, err


@pytest.mark.parametrize("how", [
    signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_broken_run_goes_on_bit_for_bit(how, tmp_path):
    flags = [*QUICK[:-1], 60]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call(*flags, "--out", whole) == 0
    process = start(*flags, out=broken)
    wait_for_epoch(process, 7)
    out, err = kill(process, how)
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert "Traceback" not in err and "Interrupted after" in out
        assert rows(broken)[-1]["stopped"] == "interrupted"
    done = len([row for row in rows(broken) if row["kind"] == "epoch"])
    assert 7 <= done < 60
    again = start(*flags, out=broken)
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and re.search(r"Going on after epoch \d+", out)
    assert all(torch.equal(weights(broken)[k], v) for k, v in weights(whole).items())
    expected = comparable(rows(whole))
    expected[0]["flags"]["out"] = str(broken)
    assert comparable(rows(broken)) == expected


def test_ctrl_c_before_the_first_epoch_is_clean_too(tmp_path):
    process = start(*QUICK[:-1], 1000, out=tmp_path)
    assert process.stdout.readline().startswith("Setting")
    out, err = kill(process, signal.SIGINT)
    assert process.returncode == 130
    assert "Traceback" not in err and "nterrupted" in out + err


def test_a_finished_run_says_so_and_fresh_starts_over(tmp_path, capsys):
    assert call(*QUICK, "--out", tmp_path) == 0
    before = (tmp_path / "logs" / f"{NAME}.jsonl").read_bytes()
    capsys.readouterr()
    assert call(*QUICK, "--out", tmp_path) == 0
    assert "Already finished: 4 epochs" in capsys.readouterr().out
    assert call(*QUICK, "--epochs", 2, "--out", tmp_path) == 0
    assert (tmp_path / "logs" / f"{NAME}.jsonl").read_bytes() == before
    assert call(*QUICK, "--epochs", 2, "--out", tmp_path, "--fresh") == 0
    assert len(rows(tmp_path)) == 4


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    flags = [*QUICK, "--epochs", 50, "--optimizer", "sgd", "--lr", 1e6, "--out", tmp_path]
    assert call(*flags) == 1
    out = capsys.readouterr().out
    assert re.search(r"Stopped: the loss was (nan|inf) at epoch 1, step \d+; try a smaller", out)
    _, epoch, end = rows(tmp_path, "fcn3x32-digits-mse-bs128-sgd-lr1000000.0-seed0")
    assert epoch["train_loss"] is None and end["stopped"].startswith("the loss was")
    assert call(*flags) == 1
    assert "Already ended: the loss was" in capsys.readouterr().out


def test_what_does_not_belong_to_the_run_is_refused(tmp_path, capsys):
    assert call(*QUICK, "--out", tmp_path) == 0
    log, checkpoint = tmp_path / "logs" / f"{NAME}.jsonl", tmp_path / "checkpoints" / f"{NAME}.pt"
    text, state = log.read_text(), checkpoint.read_bytes()
    log.write_text("".join(text.splitlines(keepends=True)[:2]))
    capsys.readouterr()
    assert call(*QUICK, "--epochs", 9, "--out", tmp_path) == 2
    assert "lacks epochs" in capsys.readouterr().err
    log.write_text(text)
    checkpoint.write_bytes(state[:1000])
    checkpoint.with_name(f"{NAME}.pt.previous").unlink()
    assert call(*QUICK, "--epochs", 9, "--out", tmp_path) == 2
    assert re.search("is damaged.*--fresh", capsys.readouterr().err)
    checkpoint.unlink()
    assert call(*QUICK, "--epochs", 9, "--out", tmp_path) == 2
    assert re.search("4 epochs.*no checkpoint.*--fresh", capsys.readouterr().err)
    assert log.read_text() == text
    checkpoint.write_bytes(state)
    first = json.loads(text.splitlines()[0])
    first["settings"]["data"]["crc32"]["train_images"] = "00000000"
    log.write_text("\n".join([json.dumps(first), *text.splitlines()[1:]]) + "\n")
    assert call(*QUICK, "--out", tmp_path) == 2  # finished, but on other images
    assert "is of another run of this name (data" in capsys.readouterr().err


def test_seeds_gain_and_losses_change_the_run(tmp_path):
    variants = [[], ["--seed", 1], ["--gain", 0.5], ["--loss", "xent"], ["--train_bs", 64]]
    finals = set()
    for flags in variants:
        assert call(*QUICK, "--epochs", 1, *flags, "--out", tmp_path) == 0
    names = [path.stem for path in (tmp_path / "logs").glob("*.jsonl")]
    assert len(names) == len(variants)
    assert all(re.fullmatch(r"[A-Za-z0-9_.+-]{1,120}", name) for name in names)
    for name in names:
        finals.add(rows(tmp_path, name)[-1]["train_loss"])
    assert len(finals) == len(variants)


def test_an_image_folder_by_main(samples, tmp_path):
    root = samples("tiny-imagenet-20") / "tiny-imagenet-20"
    small = tmp_path / "små images"  # a name that needs care
    for split, count in (("train", 12), ("val", 5)):
        for folder in sorted((root / split).iterdir())[:3]:
            (small / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                (small / split / folder.name / image.name).symlink_to(image)
    bad = small / "train" / folder.name / "zz.JPEG"
    bad.write_bytes(b"no image")
    flags = ["--dataset", f"folder:{small}", "--image_size", 32, "--arch", "fcn", "--depth", 3,
             "--train_bs", 10, "--epochs", 2, "--out", tmp_path, "--workers", 2]  # fmt: skip
    assert call(*flags) == 2
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    end = json.loads(log.read_text().splitlines()[-1])
    assert "zz.JPEG" in end["stopped"] and not end["final"]
    assert call(*flags) == 2  # the run is not over: it tries again
    assert call(*flags, "--skip_bad_images") == 0
    (log,) = (tmp_path / "logs").glob("*skip*.jsonl")
    first, *epochs, end = [json.loads(line) for line in log.read_text().splitlines()]
    assert first["train_examples"] == 37 and len(epochs) == 2 and end["bad_images"] == 1
    assert round(end["test_acc"] * 15, 6).is_integer()
    assert round(end["train_acc"] * 36, 6).is_integer()


def test_an_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(*QUICK, "--out", tmp_path / "file") == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer, last", [
    ("agd", r"\d+k? img/s 00:00 left █{6}"),
    pytest.param("spectral", r"turn 0\.\d+ 00:00 left █{6}", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_bar_fits_80_columns(optimizer, last, tmp_path):
    """On a terminal: a bar with the figures, one line, no wider than the terminal."""
    controller, terminal = pty.openpty()
    subprocess.run(["stty", "rows", "24", "cols", "80"], stdin=terminal, check=True)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *QUICK, "--epochs", "120", "--out", str(tmp_path),
         "--optimizer", optimizer],
        cwd=ROOT, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE,
    )  # fmt: skip
    os.close(terminal)
    seen = b""
    while True:
        try:
            seen += os.read(controller, 1 << 16)
        except OSError:
            break
        if process.poll() is not None and not seen:
            break
    assert process.wait(60) == 0, process.stderr.read()
    lines = [line for line in re.split(r"[\r\n]+", seen.decode()) if re.match(r"\d+/120 ", line)]
    assert len(lines) > 5
    assert max(map(len, lines)) <= 80
    assert re.match(
        r"120/120 loss \d\.\d{3} train \d+\.\d% test \d+\.\d% η \d\.\d{3} " + last, lines[-1]
    )


def test_plain_output_where_the_encoding_lacks_eta(run_main):
    done = run_main(*QUICK, "--epochs", 1, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert re.search(r"epoch 1/1  loss .* eta \d", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet18", "vgg"])
def test_convolutional_networks_learn_real_images(arch, samples, tmp_path):
    """The loss of the same 96 CIFAR images falls, epoch by epoch."""
    with np.load(samples("cifar10") / "cifar10.npz") as file:
        np.savez(tmp_path / "cifar10.npz", **{key: file[key][:96] for key in file})
    flags = ["--arch", arch, "--epochs", 3, "--train_bs", 16, "--data_dir", tmp_path]
    assert call(*flags, "--out", tmp_path) == 0
    _, *epochs, _ = rows(tmp_path, f"{arch}-cifar10-mse-bs16-agd-seed0")
    losses = [row["train_loss"] for row in epochs]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_one_epoch_of_cifar_stays_where_it_was(samples, tmp_path):
    """Loss and eta of the default network, within the spread of seeds."""
    out = samples("cifar10")
    assert call("--epochs", 1, "--data_dir", out, "--out", tmp_path) == 0
    row = rows(tmp_path, "fcn10x256-cifar10-mse-bs128-agd-seed0")[1]
    assert row["train_loss"] == pytest.approx(0.839, abs=0.01)
    assert row["eta_mean"] == pytest.approx(0.17, abs=0.02)


def test_steps_of_the_first_epochs_and_updates_are_logged_when_asked(tmp_path):
    flags = [*QUICK, "--out", tmp_path]
    assert call(*flags) == 0
    assert call(*flags, "--log_steps", 2, "--log_updates") == 0
    name = f"{NAME}-steps2-updates"
    found = rows(tmp_path, name)
    assert {row["epoch"] for row in found if row["kind"] == "step"} == {1, 2}
    steps = [row for row in found if row["kind"] == "step" and row["epoch"] == 2]
    epoch = next(row for row in found if row["kind"] == "epoch" and row["epoch"] == 2)
    sizes = [row["update"] for row in steps]
    assert all(0 < size < 0.1 for size in sizes)
    assert [epoch["update_min"], epoch["update_mean"], epoch["update_max"]] == pytest.approx(
        [min(sizes), np.mean(sizes), max(sizes)]
    )
    assert "update_mean" not in rows(tmp_path)[1]  # nor without --log_updates
    assert all(torch.equal(weights(tmp_path, name)[k], v) for k, v in weights(tmp_path).items())
    plain = [row["train_loss"] for row in rows(tmp_path) if row["kind"] == "epoch"]
    assert plain == [row["train_loss"] for row in found if row["kind"] == "epoch"]


def test_a_spectral_run_is_tested_and_saved_at_its_average(tmp_path, monkeypatch):
    """With the statistics of batch norm that its first batches give there; the log has the length
    of Z, and the angle by which the last step has turned it."""
    monkeypatch.setattr(program, "build", with_norms)
    flags = ["--dataset", "digits", "--optimizer", "spectral", "--epochs", 3, "--out", tmp_path]
    assert call(*flags, "--log_steps") == 0
    (name,) = [path.stem for path in (tmp_path / "logs").glob("*.jsonl")]
    found = rows(tmp_path, name)
    row = next(x for x in found if x["kind"] == "epoch" and x["epoch"] == 3)
    last = [x for x in found if x["kind"] == "step"][-1]
    saved = torch.load(tmp_path / "checkpoints" / f"{name}.pt", weights_only=True)
    data = load("digits", "", 128, 1000, torch.device("cpu"))
    net = with_norms()
    net.load_state_dict(saved["net"])
    assert row["test_loss"] == pytest.approx(evaluate(net, data.test, mse).read()["loss"], rel=1e-6)
    data.train.set_epoch(3)
    with torch.no_grad():
        sums, batches = 0, [inputs for inputs, _ in data.train][:8]
        for inputs in batches:
            sums = sums + net[0](inputs).mean((0, 2, 3))
    assert torch.allclose(saved["net"]["1.running_mean"], sums / 8, atol=1e-6)
    assert saved["net"]["1.num_batches_tracked"] == 8
    state = list(saved["optimizer"]["state"].values())
    assert not saved["optimizer"]["param_groups"][0]["train_mode"]
    lengths = []
    for held, p, entry in zip((True, True, False), net.parameters(), state):
        if p.ndim > 1:
            assert not torch.equal(p, entry["weights"])  # which are those that train
            rho = entry["z"].flatten(1).norm() / min(p.flatten(1).shape) ** 0.5
            lengths += [(rho / entry["s"]).item()] if held else []
    assert len(lengths) == 2  # without the output layer
    assert row["length"] == pytest.approx(np.mean(lengths), rel=1e-5)
    turn = np.mean([last["eta"] / 3 / length for length in lengths])
    assert row["turn"] == pytest.approx(turn, rel=1e-5)


def test_names_have_rates_without_exponents_and_say_what_part_was_trained_on():
    def name(*flags):
        args = parse([*map(str, flags), "--cpu"])
        return name_and_settings(args)[0]

    assert name("--optimizer", "adam", "--lr", "1e-7").endswith("-adam-lr0.0000001-seed0")
    assert name("--optimizer", "sgd", "--lr", "10").endswith("-sgd-lr10.0-seed0")
    assert "-train500-test10-mse-" in name("--train_examples", 500, "--test_examples", 10)
    assert name("--dataset", "npz:a/tiny.npz") == name("--dataset", "npz:tiny.npz")
    assert name("--dataset", "npz:tiny.npz").startswith("fcn10x256-npz_tiny-mse")
    assert name("--dataset", "npz:cifar10.npz") != name("--dataset", "cifar10")
    assert name("--log_steps").endswith("-steps") and name("--log_steps", 3).endswith("-steps3")


@pytest.mark.parametrize("flag", ["--train_examples", "--test_examples"])
def test_a_part_of_an_image_folder_is_refused(flag, capsys):
    with pytest.raises(SystemExit) as exit:
        call("--dataset", "folder:pictures", flag, 5)
    assert exit.value.code == 2 and f"{flag} is for the prepared sets" in capsys.readouterr().err


def test_a_log_names_no_home(monkeypatch):
    monkeypatch.delenv("AGD_DATA", raising=False)
    assert parse(["--cpu"]).data_dir == "~/.cache/agd"


def test_what_depends_on_the_machine_can_be_left_unchecked():
    flags = ["--optimizer", "no_such_package.Optimizer", "--device", "cuda:99"]
    with pytest.raises(SystemExit):
        parse(flags)
    assert parse(flags, check=False).optimizer == "no_such_package.Optimizer"


def test_a_start_does_not_import_the_compiler():
    command = (
        "import sys, torch; from training import optimizers; from agd import AGD\n"
        "net = torch.nn.Linear(2, 2, bias=False)\n"
        "optimizer = AGD(net.parameters())\n"
        "net(torch.ones(1, 2)).sum().backward(); optimizer.step(); optimizer.zero_grad()\n"
        "optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_what_makes_a_run_fast_is_in_the_first_row_and_precision_in_the_name(tmp_path):
    assert call(*QUICK, "--out", tmp_path) == 0
    assert call(*QUICK, "--precision", "bf16", "--cuda_graph", "off", "--out", tmp_path) == 0
    plain, bf16 = rows(tmp_path), rows(tmp_path, f"{NAME}-bf16")
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


def test_a_graph_that_fails_is_noted_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def broken():
        def record(work):
            raise RuntimeError("operation not permitted when stream is capturing")

        return record

    assert call(*QUICK, "--out", tmp_path / "plain") == 0
    monkeypatch.setattr("flags.no_graph", lambda args: None)
    monkeypatch.setattr("training.cuda_graph.cuda_recorder", broken)
    assert call(*QUICK, "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("No CUDA graph of a step: operation not permitted") == 1
    expected = [row["train_loss"] for row in rows(tmp_path / "plain")[1:-1]]
    assert [row["train_loss"] for row in rows(tmp_path)[1:-1]] == expected
    assert rows(tmp_path)[1]["no_cuda_graph"].startswith("operation not permitted")
    assert call(*QUICK, "--cuda_graph", "on", "--fresh", "--out", tmp_path) == 1
    assert "start again with --cuda_graph off" in rows(tmp_path)[-1]["stopped"]


def test_compilation_happens_once_and_leaves_the_names(tmp_path, monkeypatch):
    """For training; the ragged last batch and the test set go through the network itself."""
    compiled, compile_ = [], torch.compile

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph

    def by_backend(net, **options):
        return compile_(net, backend=backend, **options)

    assert call(*QUICK, "--out", tmp_path / "plain") == 0
    monkeypatch.setattr(torch, "compile", by_backend)
    assert call(*QUICK, "--compile", "--precision", "bf16", "--out", tmp_path) == 0
    assert call(*QUICK, "--compile", "--out", tmp_path) == 0
    assert len(compiled) == 2
    assert rows(tmp_path)[0]["compile"] is True
    state = weights(tmp_path / "plain")
    assert all(torch.equal(weights(tmp_path)[key], state[key]) for key in state)

    def no_compiler(graph, inputs):
        raise RuntimeError("no working C++ compiler")

    def by_none(net, **options):
        return compile_(net, backend=no_compiler, **options)

    monkeypatch.setattr(torch, "compile", by_none)
    assert call(*QUICK, "--compile", "--fresh", "--out", tmp_path) == 1
    assert re.search(r"cannot be compiled here \(.*C\+\+", rows(tmp_path)[-1]["stopped"])


@pytest.mark.slow
def test_channels_last_weights_are_saved_and_go_on_in_either_layout(tmp_path):
    flags = ["--dataset", "digits", "--train_examples", 24, "--test_examples", 8, "--arch", "vgg",
             "--train_bs", 8, "--gain", 0.001, "--out", tmp_path]  # fmt: skip
    assert call(*flags, "--epochs", 1, "--channels_last", "on") == 0
    (name,) = [path.stem for path in (tmp_path / "logs").glob("*.jsonl")]
    last = weights(tmp_path, name)
    assert last["features.3.weight"].is_contiguous(memory_format=torch.channels_last)
    assert rows(tmp_path, name)[0]["channels_last"] is True
    assert call(*flags, "--epochs", 2) == 0
    assert rows(tmp_path, name)[0]["resumed"][0]["channels_last"] is False
    assert weights(tmp_path, name).keys() == last.keys()
    assert weights(tmp_path, name)["features.3.weight"].is_contiguous()
    assert call(*flags, "--epochs", 1, "--fresh", "--channels_last", "off") == 0
    first = weights(tmp_path, name)
    for key in last:
        difference = (first[key] - last[key]).double().norm() / last[key].double().norm()
        assert difference < 1e-3, key


@pytest.mark.parametrize("bs, recorded", [(128, 12), (14, 30)])
def test_a_profile_shows_where_the_time_goes(bs, recorded, tmp_path, capsys):
    assert call(*QUICK, "--out", tmp_path / "plain", "--train_bs", bs) == 0
    capsys.readouterr()
    assert call(*QUICK, "--profile", "--out", tmp_path, "--train_bs", bs) == 0
    printed = capsys.readouterr().out
    found = re.findall(r"^(\S.*?) +(\d+\.\d)% +(\d+\.\d+) ms (?:a step|an epoch)$", printed, re.M)
    parts = ["data", "forward", "backward", "optimiser", "sums", "the rest", "evaluation"]
    assert [part for part, _, _ in found] == parts
    assert sum(float(share) for _, share, _ in found) == pytest.approx(100, abs=0.5)
    name = NAME.replace("128", str(bs))
    with gzip.open(tmp_path / "profiles" / f"{name}.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    for part in parts[:5]:
        assert names.count(part) == recorded
    with gzip.open(tmp_path / "profiles" / f"{name}-test.json.gz", "rt") as file:
        assert "aten::mm" in {event.get("name") for event in json.load(file)["traceEvents"]}
    assert comparable(rows(tmp_path, name)[1:]) == comparable(rows(tmp_path / "plain", name)[1:])


def test_graphs_begin_after_the_steps_of_a_profile(tmp_path, monkeypatch, capsys):
    replayed = []
    monkeypatch.setattr("flags.no_graph", lambda args: None)
    recorder = lambda: lambda work: lambda: (replayed.append(1), work())  # noqa: E731
    monkeypatch.setattr("training.cuda_graph.cuda_recorder", recorder)
    flags = [*QUICK, "--train_bs", 14, "--epochs", 1, "--profile", "--out", tmp_path]
    assert call(*flags) == 0
    assert len(replayed) == 103 - 40 - 1  # the ragged batch waits for its fourth
    assert "one kernel at a time, without a CUDA graph" in capsys.readouterr().out


@pytest.mark.parametrize("device, flags, expected", [
    ("cpu", [], 1000), ("cpu", ["--arch", "vgg"], 64), ("cuda", [], 10_000),
    ("cuda:1", ["--dataset", "folder:x", "--train_bs", 256], 1024), ("cuda", ["--test_bs", 7], 7),
])  # fmt: skip
def test_the_batch_of_a_test_is_what_pays_on_the_device(device, flags, expected):
    args = ["--device", device, *map(str, flags)]
    assert parse(args, check=False).test_bs == expected


@pytest.mark.parametrize("flags, words", [
    (["--distribute"], "single process"), (["--dataset", "folder:x"], "arrays"),
    (["--micro_bs", "8"], "whole batches"), (["--optimizer", "torch.optim.Adagrad"], "may read"),
    (["--cpu"], "CUDA device"), (["--optimizer", "adam"], None), ([], None),
])  # fmt: skip
def test_where_a_graph_is_possible(flags, words):
    device = [] if "--cpu" in flags else ["--device", "cuda"]
    found = no_graph(parse([*device, *flags], check=False))
    assert found is None if words is None else words in found


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
