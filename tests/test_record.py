import hashlib
import json
import os
import shlex
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main as program
from data import default_data_dir
from flags import parse, parser
from flags import words as flag_words
from runs import provenance
from runs.images import Images
from runs.log import read_rows
from runs.provenance import code, data_sha256, tilde, variables
from runs.record import (
    Record,
    RecordError,
    comparable,
    deviation,
    log_sha256,
    read,
    result,
    weights_sha256,
)
from tests.conftest import ROOT
from training.losses import LOSSES

RESULT = {"epochs": 2, "weights_sha256": "a", "log_sha256": "b", "epoch_crc32": ["c", "d"],
          "date": "2026-01-01T00:00:00+00:00"}  # fmt: skip
RECORD = {
    "format": 1, "name": "a-run", "command": ["python", "main.py"], "settings": {"seed": 0},
    "flags": {"epochs": 9, "seed": 0, "lr": None, "out": "results"},
    "code": {"sha256": "c0", "commit": "abc", "diff": "", "untracked": []},
    "data": {"sha256": "d0", "files": 1, "bytes": 5, "contents": True},
    "versions": {"torch": "2.9.0"}, "environment": {"OMP_NUM_THREADS": "2", "MKL_CBWR": "AVX2"},
    "hardware": {"device": "cpu", "processor": "P", "threads": 2, "ranks": 1, "memory": 1},
    "counts": {"weights": 3}, "resumed": [], "results": [RESULT],
}  # fmt: skip


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def laid(path, content=RECORD, **parts):
    """A record at `path`, with other entries in its parts."""
    content = json.loads(json.dumps(content))
    for key, part in parts.items():
        content[key] = {**content[key], **part} if isinstance(part, dict) else part
    path.write_text(json.dumps(content))
    return path


def test_the_hash_of_weights_is_what_its_words_say():
    net = {
        "a.weight": torch.tensor([[1.0, -0.0], [float("nan"), 2.5]]),
        "b.count": torch.tensor(7),
        "c.half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "d.none": torch.empty(0, 3),
    }
    words = b"a.weight float32 [2, 2]\n" + struct.pack("<ffff", 1, -0.0, float("nan"), 2.5)
    words += b"b.count int64 []\n" + struct.pack("<q", 7)
    words += b"c.half bfloat16 [2]\n" + bytes([0x80, 0x3F, 0x00, 0x40]) + b"d.none float32 [0, 3]\n"
    assert weights_sha256(net) == sha256(words)
    weight = torch.arange(48.0).view(2, 3, 4, 2)
    last = weight.to(memory_format=torch.channels_last).requires_grad_()
    assert weights_sha256({"w": last}) == weights_sha256({"w": weight})


def log(loss=0.5, seconds=1.0, out="a", seed=0, first_step=0.25):
    flags = {"out": out, "seed": seed, "epochs": 2}
    epoch = {"kind": "epoch", "train_loss": loss, "seconds": seconds, "images_per_second": 9}
    return [
        {"kind": "run", "flags": flags, "date": out, "torch": out, "settings": {"seed": seed}},
        {"kind": "step", "epoch": 1, "step": 1, "loss": first_step},
        {**epoch, "epoch": 1, "train_loss": 0.125},
        {"kind": "step", "epoch": 2, "step": 1, "loss": 0.5},
        {**epoch, "epoch": 2},
        {"kind": "end", "epochs": 2, "seconds": seconds},
    ]


def test_the_hash_of_a_log_leaves_out_what_differs_from_run_to_run():
    first = log_sha256(log())
    unsaved = {"kind": "unsaved", "epoch": 2, "reason": "No space left on device"}
    for same in (log(seconds=2.0, out="b"), [{**row, "resumed": 1} for row in log()],
                 [*log()[:-1], unsaved, log()[-1]]):  # fmt: skip
        assert log_sha256(same) == first
    others = log(loss=0.75), log(seed=1), log(first_step=0.5), log()[:-1]
    assert len({first, *map(log_sha256, others)}) == 5
    assert comparable(log())[0] == {"kind": "run", "flags": {"seed": 0}, "settings": {"seed": 0}}
    lines = [json.dumps(row, sort_keys=True) + "\n" for row in comparable(log())]
    assert first == sha256("".join(lines).encode())


ONES, ZEROS = {"w": torch.ones(2)}, {"w": torch.zeros(2)}


@pytest.mark.parametrize(("net", "rows", "words"), [
    (ONES, log(seconds=3.0), None),
    (ZEROS, log(loss=0.75), "other weights and another log than the record's, from epoch 2 on"),
    (ONES, log(first_step=0.75), "another log than the record's, from epoch 1 on"),
    (ZEROS, log(), "other weights than the record's, with the same rows of all epochs"),
    (ONES, log()[:4], "another log than the record's, from epoch 2 on"),
])  # fmt: skip
def test_a_deviation_names_its_first_epoch(net, rows, words):
    assert deviation(result(ONES, log()), result(net, rows)) == words


@pytest.mark.parametrize(("change", "noun"), [
    ("", "Expecting value"),
    ("{" * 10, "Expecting"),
    ("[" * 100_000, "no record of a run"),
    (" " * (2**26 + 1), "more than"),
    ('{"format": 2}', "its format is 2, and this program reads 1"),
    ('{"format": "\\u001b[2J"}', r"its format is '\x1b[2J', and"),
    ("[]", "it is of the wrong type"),
    ("{}", "it has not the right entries (code, command, counts,"),
    ({"flags": {"seed": [1]}}, "it.flags.seed is of the wrong type"),
    *(({"flags": {"lr": float(x)}}, f"it.flags.lr is {x}, and no finite number")
      for x in ("nan", "inf", "-inf")),
    (json.dumps(RECORD).replace('"lr": null', '"lr": 1e999'), "it.flags.lr is inf"),
    ({"settings": {"data": {"crc32": [1, float("nan")]}}}, "it.settings.data.crc32.1 is nan"),
    ({"command": [1]}, "it.command[0] is of the wrong type"),
    ({"results": [{**RESULT, "epochs": True}]}, "it.results[0].epochs is of"),
    ({"results": [{**RESULT, "more": 1}]}, "entries (more)"),
    ({"code": {"diff": 3}}, "it.code.diff is of the wrong type"),
    ({"environment": {"\x1b": 1}}, r"it.environment.'\x1b' is of the wrong"),
    (b'"\xe9"', "'utf-8' codec"),
    (os.mkfifo, "there is no such file"),  # which would be waited for
    (os.mkdir, "there is no such file"),
    (lambda path: None, "there is no such file"),
])  # fmt: skip
def test_what_is_no_record_is_said_in_a_sentence(change, noun, tmp_path):
    path = tmp_path / "a.run.json"
    assert read(laid(path)) == RECORD
    if isinstance(change, dict):
        laid(path, **change)
    elif isinstance(change, (str, bytes)):
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    else:
        path.unlink()
        change(path)
    with pytest.raises(RecordError) as error:
        read(path)
    words = str(error.value)
    assert noun in words and words.startswith(f"{path} is no record") and words.isprintable()


def tree(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root, [str(path) for path in root.rglob("*.jpg")]


def test_the_hash_of_images(tmp_path, monkeypatch):
    files = {"train/a/1.jpg": b"one", "train/b/2.jpg": b"two", "val/a/3.jpg": b"six"}
    root, paths = tree(tmp_path / "first", files)
    (root / "notes.txt").write_text("not read by a run")
    first = data_sha256(root, paths)
    words = b"".join(b"%s\0003\n%s" % (name.encode(), x) for name, x in sorted(files.items()))
    assert first == {"sha256": sha256(words), "files": 3, "bytes": 9, "contents": True}
    edited = tree(tmp_path / "edited", {**files, "val/a/3.jpg": b"ten"})
    longer = tree(tmp_path / "longer", {**files, "val/a/3.jpg": b"eleven"})
    other = tree(tmp_path / "other", {x.replace("2", "4"): files[x] for x in files})
    same = [tree(tmp_path / "second", files), (root, paths[::-1]), (root / ".." / "first", paths)]
    assert all(data_sha256(*x) == first for x in same)  # wherever it lies
    assert first not in (data_sha256(*edited), data_sha256(*other))

    monkeypatch.setattr(provenance, "CONTENTS", 8)  # too many to be read: names and sizes
    large = data_sha256(root, paths)
    assert large["contents"] is False and large["sha256"] != first["sha256"]
    assert data_sha256(*edited) == large != data_sha256(*longer)
    content = bytes(range(256)) * 10_000  # of several reads
    (tmp_path / "a.npz").write_bytes(content)
    assert data_sha256(tmp_path / "a.npz") == {
        "sha256": sha256(content), "files": 1, "bytes": 2_560_000, "contents": True,
    }  # fmt: skip


def test_the_code_that_counts_and_where_it_comes_from(tmp_path, monkeypatch):
    def now(**files):
        tree(tmp_path, {name.replace("_", "/") + ".py": x.encode() for name, x in files.items()})
        return code(tmp_path)

    bare = now(main="x = 1\n", data_arrays="y = 1\n")
    assert (bare["commit"], bare["diff"], bare["untracked"]) == (None, None, [])
    assert now(tests_main="nothing that a run imports\n") == bare
    for words in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", "-C", str(tmp_path), *words.split()], check=True)
    clean = now()
    assert clean["diff"] == "" and len(clean["commit"]) == 40
    assert clean["sha256"] == bare["sha256"]  # with or without git
    edited = now(data_arrays="y = 2\n", new="z = 1\n")
    assert edited["sha256"] != clean["sha256"] and edited["commit"] == clean["commit"]
    assert "-y = 1\n+y = 2\n" in edited["diff"] and edited["untracked"] == ["new.py"]
    (tmp_path / "new.py").rename(tmp_path / "other.py")
    assert now()["sha256"] != edited["sha256"]
    assert "[cut here: it has " in now(data_arrays="y = 3\n" * 2**16)["diff"][2**18 :]
    monkeypatch.setenv("PATH", "")  # no git
    environment = provenance.environment(torch.device("cpu"))
    assert code()["commit"] is None is environment["commit"]
    assert json.loads(json.dumps(environment))["torch"] == torch.__version__


def test_no_path_of_the_home_directory_and_no_variable_but_those_of_arithmetic(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for word, written in {
        "/home/somebody/data": "~/data", "--data_dir=/home/somebody/x": "--data_dir=~/x",
        "npz:/home/somebody/a.npz": "npz:~/a.npz", "/home/somebody": "~", 3: 3, None: None,
        **{x: x for x in ("/home/somebody2/data", "/mnt/home/somebody/data", "~/data")},
    }.items():  # fmt: skip
        assert tilde(word) == written
    monkeypatch.setenv("HOME", "/")
    assert tilde("/data") == "/data"
    secret = {"A_SECRET_TOKEN": "s3cret", "NCCL_SOCKET_IFNAME": "eth0",
              "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor_somebody"}  # fmt: skip
    for name, value in {**secret, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "3"}.items():
        monkeypatch.setenv(name, value)
    names = set(variables())
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" in names and not {"HOME", *secret} & names


def made(path, seed=0, file=Path(__file__)):
    """A Record at `path`."""
    flags = {"arch": "fcn", "dataset": "digits", "optimizer": "agd", "compile": False, "seed": seed,
             "epochs": 4, "image_size": None, "augment": "default"}  # fmt: skip
    world = SimpleNamespace(device=torch.device("cpu"), size=1)
    facts = {"train_examples": 5, "test_examples": 2, "weights": 7, "layers": 1}
    return Record(path, flags, ["--seed=0"], {"seed": seed}, Images(file), facts, 3, world)


def begun(path, done=None, **options):
    """A Record that is written to `path`, whole."""
    record = made(path, **options)
    record.begin(done)
    record.complete()
    return record


def test_a_run_that_goes_on_with_other_inputs_says_so(tmp_path, monkeypatch):
    path = tmp_path / "a.run.json"
    first = begun(path)
    assert first.problem is None and read(path) == first.content
    assert first.content["counts"]["epoch_steps"] == 3 and read(path)["results"] == []
    first.end(ONES, log())
    assert [x["epochs"] for x in read(path)["results"]] == [2]

    earlier = json.loads(path.read_text())
    del earlier["flags"]["augment"]  # a flag that came later
    path.write_text(json.dumps(earlier))
    assert begun(path, done=2).content["resumed"] == []  # with the same ones
    assert [x["epochs"] for x in read(path)["results"]] == [2]
    again = begun(path, done=3, seed=1).content["resumed"]
    assert again == [{"after_epoch": 3, "changed": {"--seed": [0, 1]}}]
    monkeypatch.setattr(torch, "__version__", "0.1")
    third = begun(path, done=3, seed=1)
    assert [list(x["changed"]) for x in third.content["resumed"]] == [["--seed"], ["torch"]]
    third.end(ONES, [row for row in log() if row.get("epoch") != 2])
    assert [x["epochs"] for x in read(path)["results"]] == [2, 1]

    path.write_text("{")
    assert begun(path, done=3).content["resumed"] == [{"after_epoch": 3, "changed": {}}]
    assert begun(path).content["resumed"] == []  # from the start


def test_a_record_that_cannot_be_made_or_written_is_a_remark(tmp_path):
    lost = begun(tmp_path / "a.run.json", file=tmp_path / "none.npz")
    assert "none.npz" in lost.problem and not list(tmp_path.iterdir())
    nowhere = begun(tmp_path / "none" / "a.run.json")
    assert "cannot be written" in nowhere.problem
    (tmp_path / "none").mkdir()  # and is once it can be
    nowhere.end(ONES, log())
    assert nowhere.problem is None and len(read(nowhere.path)["results"]) == 1


THEN = {"versions": {"torch": "1.0", "gone": "1"}, "hardware": {"threads": 99, "memory": 1}}


@pytest.mark.parametrize(("parts", "names", "advice"), [
    ({"hardware": {"memory": 1}, "counts": {"weights": 4}, "flags": {"seed": 1}}, [], ""),
    ({"environment": {"OMP_NUM_THREADS": "9"}}, [], ""),  # the number of threads says it
    ({**THEN, "environment": {"MKL_CBWR": "X"}}, ["torch", "gone", "threads", "MKL_CBWR"], ""),
    ({"data": {"sha256": "d" * 64}}, ["data"], ""),
    ({"code": {"sha256": "c" * 64, "commit": "abc", "diff": ""}}, ["code"], "git checkout abc."),
    ({"code": {"sha256": "c" * 64, "commit": "abc", "diff": "+"}}, ["code"],
     "git checkout abc and apply the diff"),
    ({"code": {"sha256": "c" * 64, "commit": None, "diff": None}}, ["code"], "no checkout of git"),
    ({"resumed": [{"after_epoch": 1, "changed": {"torch": ["2.6", "2.9.0"]}}]},
     ["up to epoch 1"], ""),
])  # fmt: skip
def test_inputs_that_differ_are_named_with_advice(parts, names, advice, tmp_path, capsys):
    path, tables = tmp_path / "a.run.json", []
    begun(path).end(ONES, log())
    laid(path, read(path), **parts)
    now = made(tmp_path / "b" / "logs" / "a.run.json")
    if not names:
        assert now.promised(path, None) == read(path)["results"][-1]
        return
    with pytest.raises(RecordError, match="the bits may differ") as error:
        now.promised(path, lambda title, rows: tables.extend(rows))
    assert [row[0] for row in tables] == names and ", ".join(names) in str(error.value)
    message = capsys.readouterr().out
    assert advice in message and f"--out={tmp_path / 'b'}" in message


@pytest.mark.parametrize("flags", [
    "",
    "--dataset digits --depth 3 --width 32 --epochs 4 --gain 0 --seed 7 --cpu",
    "--optimizer adam --lr 1e-05 --precision bf16 --train_examples 10 --log_steps",
    "--optimizer torch.optim.SGD --log_steps 3 --log_updates --micro_bs 8 --compile",
    "--arch resnet18 --dataset folder:~/some-where/it's --image_size 64 --skip_bad_images",
    "--arch vgg --dataset npz:a.npz --data_dir /a --deterministic --channels_last on --test_bs 9",
    "--arch resnet18 --sync_bn --distribute --cpu --dataset folder:/x --workers 0",
])  # fmt: skip
def test_the_command_of_a_record_gives_its_flags_again(flags):
    args = parse([*flags.split(), "--out", "o", "--fresh"], check=False)
    words = flag_words(parser(), vars(args))
    again = parse([*words, "--out", "o", "--fresh"], check=False)
    assert {**vars(again), "cpu": args.cpu} == vars(args)
    assert not {"--out=o", "--fresh"} & set(words)


@pytest.mark.parametrize(("parts", "flags", "noun"), [
    ({}, ["--seed", "1"], "leave out --seed"),
    ({}, ["--epochs", "200"], "leave out --epochs"),  # the default, but given
    ({"flags": {"tempo": 3}}, [], "--tempo, which no longer exists; its commit has it: abc"),
    ({"results": []}, [], "has not finished"),
    ({"flags": {"arch": "--check"}}, [], "argument --arch: no '--check' among"),
    ({"flags": {"seed": True}}, [], "argument --seed: expected one argument"),
])  # fmt: skip
def test_what_cannot_be_replayed_is_said_at_once(parts, flags, noun, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--replay", str(laid(tmp_path / "a.run.json", **parts)), *flags])
    assert noun in capsys.readouterr().err.splitlines()[0]


def test_a_flag_that_a_record_lacks_has_its_default(tmp_path):
    args = vars(parse(["--dataset", "digits", "--cpu"], check=False))
    for key in args:
        for flags in ({k: x for k, x in args.items() if k != key}, {**args, key: None}):
            path = laid(tmp_path / "a.run.json", {**RECORD, "flags": flags})
            again = vars(parse(["--replay", str(path)], check=False))
            assert again["epochs"] == 2 and again["train_bs"] == args["train_bs"]
            assert again["dataset"] == ("cifar10" if key == "dataset" else "digits")


def test_a_replay_takes_the_records_flags_and_its_data_where_it_is(tmp_path):
    path = laid(tmp_path / "a.run.json")
    taken = parse(["--replay", str(path), "--out", "o"], check=False)
    assert (taken.seed, taken.epochs, taken.out, taken.fresh) == (0, 2, "o", True)
    assert parse(["--replay", str(path)], check=False).out == "replayed"
    for there, expected in ((str(tmp_path), str(tmp_path)), ("/nowhere", default_data_dir())):
        laid(path, flags={"data_dir": there})
        assert parse(["--replay", str(path)], check=False).data_dir == expected


QUICK = ["--dataset", "digits", "--depth", "3", "--width", "32", "--epochs", "2"]
NAME = "fcn3x32-digits-mse-bs128-agd-seed0"


def call(*flags):
    return program.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of a data set in a file of its own: (its record's path, that file)."""
    out = tmp_path_factory.mktemp("finished")
    shutil.copy(ROOT / "data" / "digits.npz", out / "mine.npz")
    flags = ["--dataset", "npz:mine.npz", "--data_dir", out, "--out", out]
    assert call(*QUICK, *flags, "--log_steps") == 0
    (path,) = (out / "logs").glob("*.run.json")
    return path, out / "mine.npz"


def test_a_run_leaves_its_record(finished):
    path, file = finished
    record, (end,) = read(path), read(path)["results"]
    assert record["flags"]["dataset"] == "npz:mine.npz" and record["flags"]["log_steps"] == "all"
    assert record["data"]["sha256"] == sha256(file.read_bytes())
    assert record["code"] == json.loads(json.dumps(code()))
    assert record["counts"] == {"train_examples": 1437, "test_examples": 360, "weights": 3392,
                                "layers": 3, "epoch_steps": 12}  # fmt: skip
    assert record["versions"]["torch"] == torch.__version__ and "numpy" in record["versions"]
    assert record["hardware"]["threads"] == torch.get_num_threads()
    (checkpoint,), (log,) = file.parent.glob("checkpoints/*.pt"), path.parent.glob("*.jsonl")
    net = torch.load(checkpoint, weights_only=True)["net"]
    assert end["epochs"] == 2 and end["weights_sha256"] == weights_sha256(net)
    assert end["log_sha256"] == log_sha256(read_rows(log))
    assert record["resumed"] == [] and not list(path.parent.glob("*.partial"))


def test_a_run_in_parts_has_the_record_of_a_whole_one(finished, tmp_path):
    path, file = finished
    flags = ["--dataset", "npz:mine.npz", "--data_dir", file.parent, "--out", tmp_path]
    for epochs in (1, 2):
        assert call(*QUICK, *flags, "--log_steps", "--epochs", epochs) == 0
    (whole,), parts = read(path)["results"], read(tmp_path / "logs" / path.name)
    one, two = parts["results"]
    assert parts["resumed"] == [] and two == {**whole, "date": two["date"]}
    assert (one["epochs"], one["epoch_crc32"]) == (1, whole["epoch_crc32"][:1])


def test_a_replay_has_the_same_bits(finished, tmp_path, capsys):
    assert call(*QUICK, "--optimizer", "spectral", "--bias", "--out", tmp_path / "first") == 0
    (spectral,) = (tmp_path / "first" / "logs").glob("*.run.json")
    for path in (finished[0], finished[0], spectral):  # always from the start
        assert call("--replay", path, "--out", tmp_path / "again") == 0
        assert "The same bits" in capsys.readouterr().out
        (end,) = read(tmp_path / "again" / "logs" / path.name)["results"]
        assert end["weights_sha256"] == read(path)["results"][0]["weights_sha256"]


def test_other_data_is_named_and_nothing_is_run(finished, tmp_path, capsys):
    path, file = finished
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as copy, zipfile.ZipFile(file) as archive:
        for item in archive.infolist():
            copy.writestr(item.filename, archive.read(item.filename))
        copy.comment = b"touched"  # the same images, in other bytes
    assert call("--replay", path, "--data_dir", tmp_path, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    table = [line.split()[0] for line in printed.out.split("Input ")[1].splitlines()[2:3]]
    assert table == ["data"]
    assert f"error: other inputs than those of {path} (data): the bits may differ" in printed.err
    anyway = printed.out.split("To run it all the same: ")[1].splitlines()[0]
    assert not list(tmp_path.glob("out/logs/*"))
    words = shlex.split(anyway)
    assert words[:2] == ["python", "main.py"] and call(*words[2:]) == 0
    assert list(tmp_path.glob("out/logs/*.run.json"))


def test_other_bits_are_said_with_their_first_epoch(finished, tmp_path, capsys):
    record = read(finished[0])
    (end,), crc = record["results"], [record["results"][0]["epoch_crc32"][0], "00000000"]
    forged = [{**end, "weights_sha256": "0" * 64, "log_sha256": "0" * 64, "epoch_crc32": crc}]
    path = laid(tmp_path / "a.run.json", record, results=forged)
    assert call("--replay", path, "--out", tmp_path / "out") == 1
    assert "other weights and another log than the record's, from epoch 2 on" in (
        capsys.readouterr().err
    )


def test_a_replay_does_not_overwrite_what_it_repeats(finished, capsys):
    path, _ = finished
    before = {file: file.read_bytes() for file in path.parent.parent.rglob("*.*") if file.is_file()}
    assert call("--replay", path, "--out", path.parent.parent) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert all(file.read_bytes() == content for file, content in before.items())


def test_an_operation_without_a_deterministic_form_is_one_sentence(tmp_path, capsys, monkeypatch):
    filled = torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")

    def loss(outputs, labels):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return LOSSES["mse"](outputs, labels)

    monkeypatch.setitem(LOSSES, "xent", loss)
    try:
        assert call(*QUICK, "--out", tmp_path, "--deterministic") == 0
        assert read_rows(tmp_path / "logs" / f"{NAME}.jsonl")[0]["deterministic"] is True
        assert call(*QUICK, "--loss", "xent", "--out", tmp_path, "--deterministic") == 1
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.backends.cudnn.deterministic = False
    printed = capsys.readouterr()
    assert "put_ has no deterministic form; leave out --deterministic" in printed.out
    assert "Traceback" not in printed.err
