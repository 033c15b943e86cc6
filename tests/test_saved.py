"""A run on disk: its best checkpoint, its evaluation alone, its network without its data."""

import errno
import os
import re
import shutil

import pytest
import torch

import main as program
from agd import SpectralAGD
from data import load
from runs.checkpoint import Checkpoints, unpack
from tests.conftest import with_norms
from tests.program import QUICK, SMALL, call, only, rows, train
from training.control import STOP
from training.losses import mse
from training.saved import find, open_run
from training.step import evaluate

GPT = ["--arch", "gpt", "--dataset", "shakespeare", "--depth", "1", "--width", "8", "--heads", "2",
       "--context", "8", "--epoch_steps", "6", "--test_examples", "80", "--test_bs", "64"]
KEEP = [*QUICK[:-2], "--keep_best"]


def file(out, suffix=".best.pt"):
    return out / "checkpoints" / f"{only(out)}{suffix}"


def epoch(path):
    return unpack(path.read_bytes())["epoch"]


def set_losses(monkeypatch, values):
    """Have the tests of the epochs measure these losses, from the first on."""
    real, values = program.Trainer._run_epoch.__globals__["evaluate"], iter(values)

    def evaluate(*args):
        totals, loss = real(*args), next(values)
        totals.columns = [(torch.full_like(x, loss * n), y, n) for x, y, n in totals.columns]
        return totals

    monkeypatch.setattr("training.trainer.evaluate", evaluate)


@pytest.mark.parametrize("links", [True, False])
def test_the_best_checkpoint_is_of_the_epoch_with_the_least_test_loss(
    links, tmp_path, monkeypatch, capsys
):
    """NaN is never the least, and of equal ones the first counts. It is another name of the same
    file, or a copy."""
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    values = [float("nan"), 3.0, 1.0, 2.0, float("nan"), 1.0]
    for done, epochs, best in ((0, 1, None), (1, 2, 2), (2, 3, 3), (3, 4, 3), (4, 6, 3)):
        set_losses(monkeypatch, values[done:])
        assert train(*KEEP, "--epochs", epochs, "--out", tmp_path) == 0
        printed = capsys.readouterr().out
        monkeypatch.undo() if links else monkeypatch.setattr(os, "link", no_links)
        if best is None:
            assert not file(tmp_path).exists() and "Best  " not in printed
            continue
        assert epoch(file(tmp_path)) == best
        assert re.search(rf"\nBest     .*{only(tmp_path)}\.best\.pt, of epoch {best}\n", printed)
        assert os.path.samefile(file(tmp_path), file(tmp_path, ".pt")) == (links and epochs == best)
    assert not [x for x in os.listdir(file(tmp_path).parent) if x.endswith("partial")]
    first = rows(tmp_path)[0]
    assert first["flags"]["keep_best"] and "keep_best" not in first["settings"]


def test_a_best_epoch_whose_file_was_not_linked_yet_is_kept_by_the_same_command(
    tmp_path, monkeypatch, capsys
):
    """A kill between the checkpoint and its second name. --fresh removes it."""
    def killed(checkpoints):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep_best", killed)
        assert train(*KEEP, "--epochs", 3, "--out", tmp_path) == 130
    assert not file(tmp_path).exists()
    assert train(*KEEP, "--epochs", 1, "--out", tmp_path) == 0  # no epoch is trained
    assert epoch(file(tmp_path)) == 1
    assert train(*KEEP, "--epochs", 2, "--out", tmp_path) == 0
    assert train(*KEEP, "--epochs", 2, "--out", tmp_path) == 0 and epoch(file(tmp_path)) == 2
    capsys.readouterr()
    assert train(*KEEP, "--epochs", 1, "--fresh", "--out", tmp_path) == 0
    assert epoch(file(tmp_path)) == 1
    assert train(*QUICK[:-2], "--epochs", 1, "--fresh", "--out", tmp_path) == 0
    assert not file(tmp_path).exists()


@pytest.mark.parametrize("losses, kept", [([2.0, 1.0], True), ([1.0, 2.0], False)])
def test_a_finished_run_keeps_its_newest_checkpoint_where_that_is_the_best(
    losses, kept, tmp_path, monkeypatch, capsys
):
    set_losses(monkeypatch, losses)
    assert train(*QUICK[:-2], "--epochs", 2, "--out", tmp_path) == 0
    for _ in range(2):
        capsys.readouterr()
        assert train(*KEEP, "--epochs", 2, "--out", tmp_path) == 0
        out = capsys.readouterr().out
        assert "Already finished: 2 epochs" in out and file(tmp_path).exists() == kept
        assert (f"{only(tmp_path)}.best.pt, of epoch 2\n" if kept else
                "Best     none: epoch 1 has the least test loss, and its checkpoint was not") in out
    assert not kept or epoch(file(tmp_path)) == 2


def test_with_a_full_disk_the_run_goes_on_without_its_best_checkpoint(
    tmp_path, monkeypatch, capsys
):
    def full(checkpoints):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "keep_best", full)
    set_losses(monkeypatch, [3.0, 2.0, 1.0, 4.0])
    assert train(*KEEP, "--epochs", 4, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.count("The best checkpoint is not kept: ") == 1
    assert ".best.pt cannot be written: No space left on device. Going on\n" in printed
    assert "Best     none: epoch 3 has the least test loss, and its checkpoint was not" in printed


def numbers(text):
    """(the loss, the accuracy) as --evaluate prints them."""
    return re.search(r"(?:Test|Validation) loss ([\d.]+).*?([\d.]+)%", text).groups()


def expected(row):
    return f"{row['test_loss']:.4f}", f"{row['test_acc']:.2%}"[:-1]


@pytest.mark.parametrize("flags", [
    SMALL, [*SMALL, "--optimizer", "adam", "--precision", "bf16"],
    [*SMALL, "--optimizer", "spectral"],
    [*SMALL, "--optimizer", "tests.reference.Averaging", "--micro_bs", 7],
    GPT, [*GPT, "--optimizer", "spectral", "--dropout", 0.1, "--loss", "mse"],
], ids=["agd", "adam", "spectral", "averaging", "gpt", "gpt spectral"])  # fmt: skip
def test_an_evaluation_has_the_numbers_of_the_log(flags, tmp_path, capsys):
    """Of a whole epoch, and of one that was interrupted after its last step, whose checkpoint has
    the weights that train: the average is evaluated, as the epoch's row has it."""
    steps, looks = (6, 8) if "gpt" in flags else (4, 7)  # of an epoch; with the test's batches
    assert call(*flags, "--epochs", 2, "--keep_best", "--out", tmp_path)[0] == 0
    *_, one, last, _ = [x for x in rows(tmp_path) if x["kind"] != "step"]
    before = sorted((x, x.stat().st_mtime_ns) for x in tmp_path.rglob("*"))
    capsys.readouterr()
    assert train("--evaluate", tmp_path, "--cpu") == 0
    out, err = capsys.readouterr()
    assert numbers(out) == expected(last) and "After epoch 2 of" in out and not err
    if "test_bits" in last:
        assert f", {last['test_bits']:.4f} bits a byte, " in out
    assert "bits" not in out or "test_bits" in last
    best = min((one, last), key=lambda row: row["test_loss"])
    assert train("--evaluate", file(tmp_path).name, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert numbers(out) == expected(best) and f"After epoch {best['epoch']} of" in out
    assert before == sorted((x, x.stat().st_mtime_ns) for x in tmp_path.rglob("*"))

    shutil.rmtree(tmp_path)
    assert call(*flags, "--epochs", 2, "--out", tmp_path, asked={looks + steps: STOP})[0] == 130
    assert unpack(file(tmp_path, ".pt").read_bytes())["step"] == steps
    capsys.readouterr()
    assert train("--evaluate", only(tmp_path), "--out", tmp_path, "--test_bs", 9) == 0
    out = capsys.readouterr().out
    assert numbers(out) == expected(last) and f"In epoch 2, after step {steps} of" in out


def test_batch_norm_gets_statistics_of_the_average(tmp_path, monkeypatch, capsys):
    """Of spectral AGD, in the middle of an epoch, as at its end."""
    monkeypatch.setattr(program, "build", with_norms)
    flags = [*SMALL[:-2], "--optimizer", "spectral", "--epochs", 2, "--arch", "resnet18"]
    flags = [x for x in flags if x not in ("--depth", "3", "--width", "16")]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    *_, last, _ = rows(tmp_path / "whole")
    assert call(*flags, "--out", tmp_path, asked={7 + 4: STOP})[0] == 130
    shown = []
    monkeypatch.setattr(SpectralAGD, "eval", lambda self, real=SpectralAGD.eval: shown.append(
        real(self)))  # fmt: skip
    for out in (tmp_path / "whole", tmp_path):
        capsys.readouterr()
        assert train("--evaluate", only(out), "--out", out) == 0
        assert numbers(capsys.readouterr().out) == expected(last)
        assert len(shown) == (out == tmp_path)


@pytest.mark.parametrize("flags", [[*SMALL, "--bias"], GPT], ids=["fcn", "gpt"])
def test_a_network_comes_back_without_its_data(flags, tmp_path, monkeypatch):
    assert train(*flags, "--optimizer", "spectral", "--epochs", 1, "--out", tmp_path) == 0
    monkeypatch.setattr("data.load", None)
    name = only(tmp_path)
    log, newest = tmp_path / "logs" / f"{name}.jsonl", file(tmp_path, ".pt")
    for run in (tmp_path, tmp_path / "logs", log, log.with_name(f"{name}.run.json"), newest, name,
                f"{name}.pt", f"{name}.run.json", newest.parent, newest.with_name(name),
                log.with_name(name)):  # fmt: skip
        assert find(str(run), tmp_path) == (log, newest)
    shutil.copy(log, tmp_path / "x.jsonl")
    shutil.copy(newest, tmp_path / "x.pt")
    assert find(str(tmp_path / "x.pt")) == (tmp_path / "x.jsonl", tmp_path / "x.pt")
    monkeypatch.chdir(tmp_path / "logs")
    assert find(log.name)[1].resolve() == newest.resolve()
    newest.rename(file(tmp_path, ".pt.previous"))
    assert find(str(newest.with_name(name)))[1] == file(tmp_path, ".pt.previous")
    saved = open_run(str(tmp_path / "logs"))
    net = saved.network()
    assert not net.training
    state = net.state_dict()
    assert state.keys() == saved.checkpoint["net"].keys()
    assert all(torch.equal(x, saved.checkpoint["net"][key]) for key, x in state.items())
    encoding = saved.first["data"].get("encoding")
    assert (encoding or {}).get("kind") == ("characters" if flags is GPT else None)


@pytest.mark.parametrize("change", [
    {"shape": [10**6, 10**6, 10**6]}, {"shape": "wide"}, {"shape": [3]}, {"classes": -1},
    {"classes": 11}, {"network": 3},
])  # fmt: skip
def test_a_forged_log_is_refused(change, tmp_path):
    assert train(*SMALL, "--epochs", 1, "--out", tmp_path) == 0
    saved = open_run(str(tmp_path))
    with pytest.raises(program.RunError, match="does not fit the network of"):
        saved._replace(first=saved.first | change).network()
    with pytest.raises(program.RunError, match="no optimiser nowhere.Class"):
        odd = saved.first["flags"] | {"optimizer": "nowhere.Class"}
        saved._replace(first=saved.first | {"flags": odd},
                       checkpoint=saved.checkpoint | {"step": 1}).network()
    with pytest.raises(program.RunError, match="is of an earlier version"):
        saved._replace(first={"flags": saved.first["flags"]}).network()


def test_what_a_run_started_from_is_not_needed(tmp_path, capsys):
    """Neither the file of --weights nor, of frozen parameters, a state in the optimiser."""
    assert train(*SMALL, "--epochs", 1, "--out", tmp_path / "start") == 0
    start = file(tmp_path / "start", ".pt").rename(tmp_path / "start.pt")
    flags = [*SMALL, "--weights", start, "--freeze", "layers.0.*", "--optimizer", "spectral"]
    assert call(*flags, "--out", tmp_path, asked={2: STOP})[0] == 130
    start.unlink()
    assert train("--evaluate", tmp_path, "--cpu") == 0
    printed = numbers(capsys.readouterr().out)
    net, data = open_run(str(tmp_path)).network(), load("digits", "", 25, 25, torch.device("cpu"),
                                                       test_examples=60)  # fmt: skip
    tested = evaluate(net, data.test, mse).read()
    assert printed == expected({"test_loss": tested["loss"], "test_acc": tested["acc"]})


def test_other_data_are_noted(tmp_path, capsys):
    """A text beside the log's: what is evaluated are its numbers."""
    text = tmp_path / "a.txt"
    flags = [x for x in GPT if x not in ("--dataset", "shakespeare")]
    text.write_text("To be, or not to be: that is the question.\n" * 500)
    assert train(*flags, "--dataset", f"text:{text}", "--epochs", 1, "--out", tmp_path) == 0
    *_, row, _ = rows(tmp_path)
    (tmp_path / "b").mkdir()
    other = text.rename(tmp_path / "b" / "a.txt")
    capsys.readouterr()
    evaluate = ["--evaluate", tmp_path, "--cpu", "--dataset", f"text:{other}"]
    assert train(*evaluate) == 0
    out, err = capsys.readouterr()
    assert numbers(out) == expected(row) and not err
    other.write_text("Whether 'tis nobler in the mind to suffer\n" * 500)
    assert train(*evaluate) == 0
    out, err = capsys.readouterr()
    assert numbers(out) != expected(row) and "Note: not the data of the run (data crc32 " in err


@pytest.mark.slow
def test_two_ranks_evaluate_what_one_does(run_main, tmp_path):
    flags = [*SMALL, "--optimizer", "spectral", "--cpu"]
    assert call(*flags, "--out", tmp_path, asked={7 + 2: STOP})[0] == 130
    one = run_main("--evaluate", tmp_path)
    two = run_main("--evaluate", tmp_path, "--distribute",
                   launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2"))
    assert one.returncode == two.returncode == 0, two.stderr
    assert numbers(one.stdout) == numbers(two.stdout)
