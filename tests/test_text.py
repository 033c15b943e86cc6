"""Texts: their windows, and what a run of one promises, by the commands of a user."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import main as program
from data import load
from runs.checkpoint import unpack
from scripts import plot
from tests.conftest import ROOT
from tests.crash.remains import saved
from tests.fuzz import Reader, fuzz, write_file
from tests.program import Plan, rows, same, train, weights
from tests.test_distributed import group
from training.control import STOP

slow = pytest.mark.slow
CPU = torch.device("cpu")
SMALL = ["--cpu", "--arch", "gpt", "--depth", "1", "--width", "16", "--heads", "2", "--context",
         "16", "--train_bs", "8", "--epoch_steps", "6", "--epochs", "2", "--test_examples", "20",
         "--test_bs", "8", "--log_steps", "--log_updates"]  # fmt: skip
PLAYS = ["--dataset", "shakespeare", *SMALL]
LOOKS = 6 + 3  # of an epoch of SMALL: batches of training and of validation


def lay(folder, ids, validation=None, dtype="uint16", **meta):
    """A folder of tokens; `meta`: entries of its meta.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, x in (("train", ids), ("val", ids if validation is None else validation)):
        np.asarray(x, dtype).tofile(folder / f"{name}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps({"dtype": dtype, **meta}))
    return folder


@pytest.fixture
def places(tmp_path):
    """f(tokens of training, of validation, **options) -> the Data of tokens that are their own
    places, those of validation after those of training."""

    def of(train=1000, val=500, **options):
        ids = np.arange(train + val, dtype="<u4")
        lay(tmp_path, ids[:train], ids[train:], "uint32", vocab_size=train + val)
        options = {"context": 7, "epoch_steps": 9, **options}
        return load(f"tokens:{tmp_path}", "", 10, 8, CPU, **options)

    return of


def windows(batches, epoch=1, start=0):
    """The inputs of an epoch, (n, T), after their labels have been looked at."""
    batches.set_epoch(epoch, start)
    inputs, labels = map(torch.cat, zip(*batches))
    assert inputs.dtype == labels.dtype == torch.int64
    assert torch.equal(labels, inputs + 1)  # the tokens that follow
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(inputs.shape[1]))
    return inputs


def test_training_windows_are_functions_of_seed_epoch_and_index(places):
    data = places()
    first = windows(data.train)
    assert first.shape == (90, 7) and len(data.train) == 9
    assert torch.equal(first, windows(places().train))
    assert torch.equal(first[40:], windows(data.train, start=4))
    others = windows(data.train, 2), windows(places(seed=1).train)
    assert not any(torch.equal(first, x) for x in others)
    shares = [windows(places(rank=i, size=3).train) for i in range(3)]
    assert torch.equal(first.view(9, 10, 7)[:, 1::3].flatten(0, 1), shares[1])
    assert torch.equal(first.sort(0)[0], torch.cat(shares).sort(0)[0])
    # All of the training part, and nothing of the other: its first token is the last label.
    seen = torch.cat([windows(data.train, epoch) for epoch in range(1, 60)])
    assert seen.min() == 0 and seen.max() == 1000 - 2 and len(seen.unique()) == 1000 - 1


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
def test_validation_windows_are_the_same_every_time(places, rank, size):
    def starts(**options):
        data = places(rank=rank, size=size, **options)
        first = windows(data.test)
        for epoch, other in ((5, data), (1, places(rank=rank, size=size, seed=9, **options))):
            assert torch.equal(first, windows(other.test, epoch))
        return first[:, 0].numpy() - 1000

    whole = np.arange(0, 500 - 7, 7)
    assert np.array_equal(starts(), whole[rank::size])  # side by side
    assert np.array_equal(starts(test_examples=len(whole)), whole[rank::size])
    few = starts(test_examples=10)  # spread
    assert len(few) == 10 // size and not any(few % 7) and set(np.diff(few)) <= {
        *range(49 * size, 49 * size + 8)}  # fmt: skip
    many = starts(val=7 * 3001 + 1)
    assert len(many) == 2000 // size and many.max() > 7 * 2990 and np.diff(many).min() >= 7


def test_the_plays_are_whole_and_characters():
    data = load("shakespeare", "", 4, 50, CPU, context=64, test_examples=1742)
    assert (data.classes, data.bytes_a_token, data.positions) == (65, [1, 1], 64)
    assert (data.source["train"]["tokens"], data.source["val"]["tokens"]) == (1003854, 111540)
    letters = data.source["encoding"]["letters"]
    text = "".join(letters[i] for i in torch.cat([x for x, _ in data.test]).flatten())
    assert text.startswith("?\n\nGREMIO:\nGood morrow, neighbour Baptista.\n")
    assert len(text) == 1742 * 64


@pytest.mark.parametrize("letters", ["abc ", "äöü€", "a😀b€cä"])
def test_a_text_by_bytes_is_cut_between_characters(letters, tmp_path):
    path, text = tmp_path / "a text.txt", letters * 101 + letters[0]
    path.write_text(text, encoding="utf-8")
    data = load(f"text:{path}", "", 4, 1000, CPU, context=1)
    (validation, follow), whole = next(iter(data.test)), text.encode()
    end = bytes([*validation.flatten().tolist(), follow[-1, -1]])
    assert whole.endswith(end) and len(end) == data.source["val"]["tokens"] == pytest.approx(
        len(whole) / 10, abs=4)  # fmt: skip
    end.decode()
    assert data.source["train"]["tokens"] + len(end) == len(whole) and data.classes == 256


@pytest.mark.parametrize("names", [("train.txt", "val.txt"), ("train.md", "valid.md")])
def test_a_text_beside_one_called_train_is_its_validation(names, tmp_path, capfd):
    for name, letter in zip(names, "ab"):
        (tmp_path / name).write_text(letter * 500)
    data = load(f"text:{tmp_path / names[0]}", "", 4, 4, CPU, context=8)
    assert {*torch.cat([x for x, _ in data.train]).flatten().tolist()} == {ord("a")}
    assert {*torch.cat([x for x, _ in data.test]).flatten().tolist()} == {ord("b")}
    assert str(tmp_path / names[1]) in data.notes[0]


# Runs.


@pytest.mark.parametrize("rule, more", [
    ("agd", []), ("spectral", ["--dropout", "0.2", "--tied"]),
    pytest.param("adam", [], marks=slow), pytest.param("spectral", [], marks=slow),
])  # fmt: skip
def test_a_run_that_stops_in_an_epoch_goes_on_to_the_bit(rule, more, tmp_path):
    flags = [*PLAYS, "--optimizer", rule, *more]
    assert train(*flags, "--out", tmp_path / "whole") == 0
    for look in (4, 5):  # of each command: in training, in validation
        assert train(*flags, "--out", tmp_path / "broken", asked={look: STOP}) == 130
    assert train(*flags, "--out", tmp_path / "broken") == 0
    same(tmp_path / "whole", tmp_path / "broken")


def test_steps_by_graphs_are_the_eager_ones(replays, tmp_path):
    off, flags = ["--cuda_graph", "off"], [*PLAYS, "--optimizer", "spectral"]
    assert train(*flags, *off, "--out", tmp_path / "eager") == 0 and not replays
    assert train(*flags, "--out", tmp_path / "graph") == 0
    assert len(replays) == 2 * 6 - 3
    assert train(*flags, "--out", tmp_path / "both", asked={LOOKS + 4: STOP}) == 130
    assert train(*flags, *off, "--out", tmp_path / "both") == 0
    for out in ("graph", "both"):
        same(tmp_path / out, tmp_path / "eager")


FIFTY = ["--cpu", "--arch", "gpt", "--dataset", "shakespeare", "--depth", "1", "--width", "32",
         "--context", "16", "--epochs", "2", "--epoch_steps", "25", "--test_examples", "40",
         "--train_bs", "10"]  # fmt: skip


# In float32 a polar factor takes small singular values, and their rounding, for as much as large
# ones; in float64 that rounding is small, too.
AGREE = [("agd", torch.float32, 1e-5), ("spectral", torch.float32, 2e-3),
         ("spectral", torch.float64, 1e-9)]  # fmt: skip


@pytest.fixture
def dtype():
    """f(dtype): have main() train in it."""
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def agree(one, other, least):
    a, b = (weights(out) for out in (one, other))
    assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max().item() for k in a) < least
    for x, y in zip(rows(one), rows(other), strict=True):
        for key in ("train_loss", "test_loss", "test_acc", "test_bits"):
            assert x.get(key) == pytest.approx(y.get(key), abs=10 * least)


@pytest.mark.parametrize("rule, kind, least", AGREE[::2])
def test_micro_batches_agree_after_fifty_steps(rule, kind, least, dtype, tmp_path):
    dtype(kind)
    for out, more in (("whole", []), ("parts", ["--micro_bs", "3"])):
        assert train(*FIFTY, "--optimizer", rule, *more, "--out", tmp_path / out) == 0
    agree(tmp_path / "whole", tmp_path / "parts", least)


@slow
@pytest.mark.parametrize("rule, kind, least", AGREE)
def test_two_ranks_agree_after_fifty_steps(rule, kind, least, dtype, tmp_path):
    """Whole batches; and micro-batches of a run that a signal to one rank stops in the middle, and
    that goes on in a single process."""
    run = [*FIFTY, "--optimizer", rule, "--out"]
    few = [*run, str(tmp_path / "few"), "--micro_bs", "2"]
    several = [[[*run, str(tmp_path / "ranks")], {}], [few, {"1": {"33": int(signal.SIGTERM)}}]]
    (tmp_path / "group").mkdir()
    ended, errors = group(tmp_path / "group", 2, "runs", several=several,
                          dtype=str(kind).removeprefix("torch."))  # fmt: skip
    assert None not in ended, errors
    assert [[x[0] for x in rank] for rank in ended] == [[0, 130]] * 2
    dtype(kind)
    for words in (few, [*run, tmp_path / "one"]):
        assert train(*words) == 0
    for other in ("ranks", "few"):
        agree(tmp_path / "one", tmp_path / other, least)


@slow
def test_a_killed_run_goes_on_to_the_same_sum_of_weights(tmp_path):
    flags = ["--cpu", "--arch", "gpt", "--dataset", "shakespeare", "--depth", "2", "--width", "32",
             "--epoch_steps", "60", "--epochs", "3", "--dropout", "0.1", "--optimizer", "spectral",
             "--test_examples", "100", "--save_every", "20"]  # fmt: skip
    sums = []
    for out, kills in (("whole", []), ("killed", [(0, 20), (1, 40)])):
        command = [sys.executable, "main.py", *flags, "--out", str(tmp_path / out)]
        for place in [*kills, None]:
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
                while place and process.poll() is None:
                    if saved(tmp_path / out) >= place:
                        process.kill()
                        break
                    time.sleep(0.01)
            assert process.returncode == (-signal.SIGKILL if place else 0)
        (record,) = (tmp_path / out / "logs").glob("*.run.json")
        sums.append(json.loads(record.read_text())["results"][0]["weights_sha256"])
    assert sums[0] == sums[1]
    same(tmp_path / "whole", tmp_path / "killed")


LINES = "".join(f"{i}: a line of some length, which is not like the one before.\n"
                for i in range(300))  # fmt: skip


def test_a_text_that_has_moved_is_the_same_run_and_a_changed_one_is_not(tmp_path, capfd):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(LINES)
    out = ["--out", tmp_path / "out"]
    here, there = ([f"--dataset=text:{tmp_path / x}/a.txt", *SMALL, *out]
                   for x in ("here", "there"))  # fmt: skip
    assert train(*here, asked={LOOKS + 3: STOP}) == 130
    assert train(*there) == 0 and len(list((tmp_path / "out/logs").glob("*.jsonl"))) == 1
    assert sum(row["kind"] == "epoch" for row in rows(tmp_path / "out")) == 2
    (record,) = (tmp_path / "out" / "logs").glob("*.run.json")
    again = ["--replay", record, "--out", tmp_path / "again"]
    assert train(*again) == 0 and "The same bits" in capfd.readouterr().out
    (tmp_path / "there" / "a.txt").write_text(LINES.replace("9", "8"))
    shutil.rmtree(tmp_path / "here")
    assert train(*again, f"--dataset=text:{tmp_path}/there/a.txt") == 2
    assert "other inputs" in capfd.readouterr().err
    assert train(*there, "--epochs", 3) == 2
    assert "data" in capfd.readouterr().err


def test_tokens_that_have_moved_are_the_same_run_and_changed_ones_are_named(tmp_path, capfd):
    ids = np.random.default_rng(0).integers(0, 50, 900)
    lay(tmp_path / "here", ids, vocab_size=50)
    run = [*SMALL, "--out", tmp_path / "out"]
    assert train(f"--dataset=tokens:{tmp_path / 'here'}", *run, asked={LOOKS + 3: STOP}) == 130
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = [f"--dataset=tokens:{tmp_path / 'there'}", *run]
    assert train(*there) == 0 and len(list((tmp_path / "out/logs").glob("*.jsonl"))) == 1
    (record,) = (tmp_path / "out" / "logs").glob("*.run.json")
    again = ["--replay", record, "--out", tmp_path / "again", there[0]]
    assert train(*again) == 0 and "The same bits" in capfd.readouterr().out
    lay(tmp_path / "there", ids[::-1].copy(), vocab_size=50)
    assert train(*again, "--out", tmp_path / "third") == 2
    shutil.move(tmp_path / "there", tmp_path / "here")
    capfd.readouterr()
    assert train(f"--dataset=tokens:{tmp_path / 'here'}", *run, "--epochs", 3) == 0
    assert "not the text that" in (out := capfd.readouterr().out) and "its contents differ" in out


@pytest.mark.parametrize("flags", [
    ["--precision", "bf16"], ["--loss", "mse"], pytest.param(["--profile"], marks=slow),
    pytest.param(["--compile"], marks=slow),
])  # fmt: skip
def test_what_images_have_texts_have_too(flags, tmp_path):
    assert train(*PLAYS, *flags, "--out", tmp_path, "--optimizer", "spectral") == 0
    steps = [row for row in rows(tmp_path) if row["kind"] == "step"]
    epochs = [row for row in rows(tmp_path) if row["kind"] == "epoch"]
    assert len(steps) == 12 and all(0 <= row["acc"] < 1 for row in steps)
    assert all(row["acc"] * 8 * 16 == pytest.approx(round(row["acc"] * 8 * 16)) for row in steps)
    for row in epochs:
        mine = [x["acc"] for x in steps if x["epoch"] == row["epoch"]]
        assert row["train_acc"] == pytest.approx(np.mean(mine)) and 0 < row["test_acc"] < 1
        assert ("test_bits" in row) == ("mse" not in flags)
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    assert any((tmp_path / "profiles").iterdir()) if "--profile" in flags else True


@pytest.mark.parametrize("first, train_part, sizes", [
    (0, {}, None), (0, {"tokens": 600, "bytes": 2400}, (4, 3)),
    (70_000, {"tokens": 600, "bytes": 1500}, (2.5, 3)), (0, {"tokens": 601, "bytes": 2400}, None),
])  # fmt: skip
def test_bits_a_byte_are_those_of_the_counts(first, train_part, sizes, tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, 600) + first
    lay(tmp_path / "x", ids, ids[:300], "uint32" if first else "uint16", vocab_size=first + 50,
        train=train_part, val={"tokens": 300, "bytes": 900})  # fmt: skip
    flags = [f"--dataset=tokens:{tmp_path / 'x'}", *SMALL, "--test_examples", 3]
    assert train(*flags, "--epochs", 1, "--out", tmp_path / "out") == 0
    row = rows(tmp_path / "out")[-2]
    for part, size in zip(("train", "test"), sizes or (None, None)):
        expected = size and row[f"{part}_loss"] / np.log(2) / size
        assert row.get(f"{part}_bits") == (expected and pytest.approx(expected))
    assert row["tokens_per_second"] > 0 and "images_per_second" not in row


def test_a_check_counts_windows_and_says_what_does_not_fit(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("check.resources.TIMING", 0.1)
    flags = [*PLAYS, "--out", tmp_path, "--check"]
    assert train(*flags) == 0
    printed = capfd.readouterr().out
    assert "48 training and 20 validation windows of 16 tokens" in printed
    assert "image" not in printed and "an epoch on this device; 2 epochs" in printed
    assert train(*flags, "--context", 10**6) == 1
    assert "give a smaller --context" in capfd.readouterr().out
    assert train(*flags, "--context", 60_000, "--train_bs", 10**6, "--test_examples", 1) == 1
    assert "windows at a time" in capfd.readouterr().out
    lay(tmp_path, np.arange(900) % 50, vocab_size=49)
    assert train(f"--dataset=tokens:{tmp_path}", *flags[2:]) == 1
    assert "train.bin has the token 49" in capfd.readouterr().out


def test_a_run_of_a_text_is_drawn(tmp_path):
    assert train(*PLAYS, "--out", tmp_path) == 0
    for path in (tmp_path, next((tmp_path / "logs").glob("*.jsonl"))):
        assert not plot.main([str(path), "-o", str(tmp_path / "x.png")])
        assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_run_of_a_text_speaks_of_no_images(tmp_path, capfd):
    ids = np.random.default_rng(0).integers(0, 50, 900)
    lay(tmp_path / "x", ids, vocab_size=50)
    flags = [f"--dataset=tokens:{tmp_path / 'x'}", *SMALL, "--micro_bs", 2, "--out", tmp_path]
    for more in ([], ["--epochs", 3], ["--epochs", 3]):
        assert train(*flags, *more) == 0
    out, err = capfd.readouterr()
    assert "image" not in out + err and "img" not in out + err and "tok/s" in out


# Faults in the middle of a run.


class Meanwhile(Plan):
    """Does something at a look."""

    def __init__(self, look, deed):
        super().__init__({})
        self.look, self.deed = look, deed

    def take(self):
        if self.looks == self.look:
            self.deed()
        return super().take()


@pytest.mark.parametrize("fault, where, noun", [
    ("id", "train", "train.bin has the token 50, and a vocabulary of 50"),
    ("id", "val", "val.bin has the token 50, and a vocabulary of 50"),
    ("cut", "train", "train.bin has been cut while it was read"),
    ("cut", "val", "val.bin has been cut while it was read"),
])  # fmt: skip
def test_a_fault_in_the_middle_is_one_sentence_and_the_checkpoint_stays(
    fault, where, noun, tmp_path, capfd
):
    ids = np.random.default_rng(0).integers(0, 50, 900)
    folder = lay(tmp_path / "x", ids, vocab_size=50)
    path, flags = folder / f"{where}.bin", [f"--dataset=tokens:{folder}", *SMALL, "--out", tmp_path]

    def deed():
        with open(path, "r+b") as file:
            file.truncate(40) if fault == "cut" else file.write(np.full(900, 50, "<u2").tobytes())

    assert program.main([str(x) for x in flags], Meanwhile(LOOKS + 1, deed)) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and noun in message
    state = unpack(next((tmp_path / "checkpoints").glob("*.pt")).read_bytes())
    assert (state["epoch"], state["step"]) == (1, 0)
    lay(folder, ids, vocab_size=50)
    assert train(*flags) == 0


def test_no_meta_json_does_harm(tmp_path):
    lay(tmp_path, np.arange(40) % 9)
    whole = {"vocab_size": 9, "encoding": {"kind": "characters", "letters": "abcdefghi"},
             "dtype": "uint16", "train": {"tokens": 40, "bytes": 40}, "val": {}}  # fmt: skip

    def write(path, data, program):
        write_file(path.with_name("meta.json"), data, program)

    def read(path):
        data = load(f"tokens:{path.parent}", "", 4, 4, CPU, context=8)
        json.dumps(data.source)
        next(iter(data.train))

    seeds = [json.dumps(whole).encode(), b"{}", b'{"vocab_size": 9}']
    counts, finding = fuzz(Reader(read, write), seeds, 200, tmp_path, 0, 30)
    assert not finding and counts[0] == 200 and min(counts) > 0


PEAK = """
import resource, sys, time
import main
import main as program
from data import load
import torch
began = time.perf_counter()
load(sys.argv[1].split("=")[1], "", 4, 4, torch.device("cpu"), vocabulary=50)
opened = time.perf_counter() - began
assert main.main(sys.argv[1:]) == 0
print("", opened, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@slow
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_gigabyte_of_tokens_opens_at_once_and_takes_no_memory(dtype, tmp_path):
    """Windows from all over both parts, whose pages the system has in memory."""
    peaks, ids = {}, np.arange(2**20, dtype=dtype) % 50
    for name, times in (("small", 1), ("large", 2**30 // ids.nbytes)):
        folder = lay(tmp_path / name, ids[:1000])
        for part in ("train", "val"):
            with open(folder / f"{part}.bin", "wb") as file:
                for _ in range(times):
                    file.write(ids.tobytes())
        meta = {"dtype": dtype, "vocab_size": 50}
        (folder / "meta.json").write_text(json.dumps(meta))
        flags = [f"--dataset=tokens:{folder}", "--cpu", "--arch", "gpt", "--depth", "1", "--width",
                 "8", "--heads", "1", "--train_bs", "500", "--epoch_steps", "40", "--epochs", "1",
                 "--test_examples", "10000", "--test_bs", "500", "--out", tmp_path]  # fmt: skip
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, flags)], cwd=ROOT, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        opened, peaks[name] = map(float, done.stdout.splitlines()[-1].split())
        assert opened < 1
    assert peaks["large"] - peaks["small"] < 200_000  # kB
