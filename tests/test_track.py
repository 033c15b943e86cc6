"""--track: what a tracker has is the log, once; a tracker that fails ends no run."""

import importlib.machinery
import importlib.util
import json
import math
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import types

import numpy
import pytest
from PIL import Image

from runs.log import RunLog
from tests.conftest import ROOT
from tests.program import NAME, QUICK, SMALL, only, rows, train

KINDS = ["tensorboard", "wandb", "trackio", "mlflow"]
FLAGS = ["--cpu", "--dataset", "digits", "--train_examples", "90", "--test_examples", "60",
         "--train_bs", "25", "--depth", "2", "--width", "8"]  # fmt: skip
BATCHES = 4  # of an epoch of SMALL and of FLAGS


@pytest.fixture(autouse=True)
def of_a_machine_without_settings(monkeypatch, tmp_path):
    """None of the trackers' own variables, and no login."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "TRACKIO", "MLFLOW"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def other_picture(monkeypatch):
    """A picture that takes no seconds; test_tensorboard_has_every_number_of_the_log has the own."""
    def draw(log, folder):
        path = os.path.join(folder, "a.png")
        Image.new("RGB", (4, 4)).save(path)
        return path

    monkeypatch.setattr("runs.track.draw", draw)


def logged(out):
    """{name: [(x, value)]} of a log: every number under its name, and eta as lr."""
    curves, rated = {}, set()
    for row in rows(out):
        if row["kind"] not in ("step", "epoch"):
            continue
        x = (row["epoch"] - 1) * BATCHES + row.get("step", BATCHES)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        if "lr" not in numbers and x not in rated:
            eta = row["eta"] if row["kind"] == "step" else row["eta_mean"]
            numbers |= {} if eta is None else {"lr": eta}
        rated |= {x} if "lr" in numbers else set()
        for name, value in numbers.items():
            curves.setdefault(name, {})[x] = value
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def tensorboard(out, name=None):
    """The EventAccumulator of a run, and its {name: [(x, value)]}."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = out / "tensorboard" / (name or only(out))
    reader = events.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    return reader, {tag: [(event.step, event.value) for event in reader.Scalars(tag)]
                    for tag in reader.Tags()["scalars"]}  # fmt: skip


def in_float32(curves):
    return {name: [(x, float(numpy.float32(value))) for x, value in curve]
            for name, curve in curves.items()}  # fmt: skip


def test_tensorboard_has_every_number_of_the_log(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    assert train(*SMALL, "--cpu", "--track", "tensorboard", "--out", tmp_path) == 0
    reader, curves = tensorboard(tmp_path)
    assert curves == in_float32(logged(tmp_path))
    assert {"train_loss", "test_acc", "eta_min", "loss", "acc", "update", "lr"} <= curves.keys()
    assert [x for x, _ in curves["lr"]] == [x for x, _ in curves["eta"]] == [*range(1, 9)]
    (image,) = reader.Images("curves")
    assert image.step == 8 and len(image.encoded_image_string) > 5000
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert data["width"].number_value == 16 and data["optimizer"].string_value == "agd"
    assert data["weights"].number_value == rows(tmp_path)[0]["weights"]
    where = f"Tracker  tensorboard --logdir {tmp_path}/tensorboard"
    assert capsys.readouterr().out.count(where) == 2  # as it begins, and as it ends


def test_a_rate_of_its_own_stays_what_it_is(tmp_path, other_picture):
    pytest.importorskip("tensorboard")
    flags = ["--optimizer", "adam", "--schedule", "cosine", "--epochs", 2]
    assert train(*FLAGS, *flags, "--track", "tensorboard", "--out", tmp_path) == 0
    _, curves = tensorboard(tmp_path)
    rates = [row["lr"] for row in rows(tmp_path) if row["kind"] == "epoch"]
    assert curves == in_float32(logged(tmp_path)) and "eta_mean" not in curves
    assert curves["lr"] == in_float32({"lr": [*zip((4, 8), rates)]})["lr"] and rates[0] > 0


def test_without_rows_of_steps_lr_is_the_mean_of_eta(tmp_path, other_picture):
    pytest.importorskip("tensorboard")
    assert train(*FLAGS, "--epochs", 3, "--track", "tensorboard", "--out", tmp_path) == 0
    _, curves = tensorboard(tmp_path)
    assert curves["lr"] == curves["eta_mean"] and [x for x, _ in curves["lr"]] == [4, 8, 12]


def as_after_a_crash(out, main):
    """Two epochs, then a third whose checkpoint is lost, then four in all: by main(*flags)."""
    assert main("--epochs", 2) == 0
    path = out / "checkpoints" / f"{only(out)}.pt"
    saved = path.read_bytes()
    assert main("--epochs", 3) == 0
    path.write_bytes(saved)
    assert main("--epochs", 4) == 0
    assert [row["epoch"] for row in rows(out) if row["kind"] == "epoch"] == [1, 2, 3, 4]


def test_tensorboard_of_a_run_that_resumes(tmp_path, other_picture):
    """A repeated epoch is there once, as the log has it; --fresh has its own epochs alone."""
    pytest.importorskip("tensorboard")
    flags = [*FLAGS, "--log_steps", "--track", "tensorboard", "--out", tmp_path]
    as_after_a_crash(tmp_path, lambda *more: train(*flags, *more))
    reader, curves = tensorboard(tmp_path)
    assert curves == in_float32(logged(tmp_path))
    assert len(curves["loss"]) == 16 and len(curves["train_loss"]) == 4
    assert train(*flags, "--epochs", 1, "--fresh") == 0
    assert tensorboard(tmp_path)[1] == in_float32(logged(tmp_path))


def test_a_run_that_began_without_a_tracker(tmp_path, other_picture):
    """Its log is sent from the first row on; one whose flags are of an earlier version, too."""
    pytest.importorskip("tensorboard")
    assert train(*FLAGS, "--epochs", 2, "--out", tmp_path) == 0
    path = tmp_path / "logs" / f"{only(tmp_path)}.jsonl"
    first, *rest = rows(tmp_path)
    assert first["flags"].pop("track", 0) is None
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)))
    assert train(*FLAGS, "--epochs", 3, "--track", "tensorboard", "--out", tmp_path) == 0
    assert tensorboard(tmp_path)[1] == in_float32(logged(tmp_path))


def test_a_finished_run_is_sent_once(tmp_path, other_picture, capsys):
    pytest.importorskip("tensorboard")
    flags = [*FLAGS, "--epochs", 2, "--out", tmp_path]
    assert train(*flags) == 0
    for _ in range(2):
        assert train(*flags, "--track", "tensorboard") == 0
        lines = capsys.readouterr().out.splitlines()
        assert len([line for line in lines if line.startswith("Tracker  ")]) == 1
        reader, curves = tensorboard(tmp_path)
        assert curves == in_float32(logged(tmp_path)) and reader.Tags()["images"] == ["curves"]


def records(path):
    """The records of a .wandb file: a log as LevelDB's, in blocks of 32 KiB, after 7 bytes."""
    data, place, whole = path.read_bytes(), 7, b""
    while place < len(data):
        if -place % 2**15 < 7:  # no room for the head of a part
            place += -place % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def of_wandb(path):
    """(run records, {x: {name: value}}, summary) of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    runs, points, summary = [], {}, {}
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            runs.append(record.run)
        for item in record.history.item:
            key = item.key or ".".join(item.nested_key)
            points.setdefault(record.history.step.num, {})[key] = json.loads(item.value_json)
        for item in record.summary.update:
            key = item.key or ".".join(item.nested_key)
            summary[key] = json.loads(item.value_json)
    return runs, points, summary


def curves_of(points):
    curves = {}
    for x, point in sorted(points.items()):
        for name, value in point.items():
            if isinstance(value, (int, float)) and not name.startswith(("_", "curves")):
                curves.setdefault(name, []).append((x, value))
    return curves


def timeless(curves):
    """Without the times, which a repeated epoch has had before."""
    assert {"seconds", "images_per_second"} <= curves.keys()
    return {k: v for k, v in curves.items() if k not in ("seconds", "images_per_second")}


@pytest.mark.slow
def test_wandb_has_every_number_of_the_log(tmp_path, run_main):
    """Offline: a file a command, all of one run; together they are the log."""
    pytest.importorskip("wandb")
    flags = [*FLAGS, "--log_steps", "--log_updates", "--track", "wandb"]
    for epochs in (2, 4):
        done = run_main(*flags, "--epochs", epochs)
        assert done.returncode == 0 and "wandb:" not in done.stdout + done.stderr
        assert f"Tracker  wandb sync {tmp_path}/wandb/*-" in done.stdout
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda x: x.stat().st_mtime)
    (runs, before, _), (more, after, summary) = map(of_wandb, files)
    assert len({run.run_id for run in (*runs, *more)}) == 1 and not before.keys() & after.keys()
    assert curves_of(before | after) == logged(tmp_path)
    assert {(run.project, run.display_name) for run in runs} == {("agd", only(tmp_path))}
    end = rows(tmp_path)[-1]
    assert summary["epochs"] == 4 and summary["test_acc"] == end["test_acc"]
    assert list(tmp_path.glob("wandb/*/files/media/images/curves_16_*.png"))
    done = run_main(*flags, "--epochs", 1, "--fresh")
    files = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert len({run.run_id for file in files for run in of_wandb(file)[0]}) == 2


@pytest.mark.slow
def test_without_a_login_wandb_is_offline(tmp_path, run_main, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE")
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "no")}
    done = run_main(*FLAGS, "--epochs", 1, "--track", "wandb", env=env)
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_trackio_has_every_number_of_the_log(tmp_path, run_main):
    pytest.importorskip("trackio")
    flags = [*FLAGS, "--log_steps", "--log_updates", "--track", "trackio"]

    def main(*more):
        done = run_main(*flags, *more)
        assert "* " not in done.stdout and "Warning" not in done.stdout + done.stderr
        return done.returncode

    as_after_a_crash(tmp_path, main)
    (path,) = tmp_path.glob("trackio/agd*.db")
    with sqlite3.connect(path) as database:
        found = database.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    (name,) = {name for name, *_ in found}
    assert name.startswith(only(tmp_path))
    points, pictures = {}, 0
    for _, x, text in found:
        metrics = json.loads(text)
        pictures += metrics.pop("curves", None) is not None
        assert not metrics or x not in points
        points |= {x: metrics} if metrics else {}
    assert timeless(curves_of(points)) == timeless(logged(tmp_path)) and pictures == 3


@pytest.mark.slow
def test_a_folder_that_trackio_cannot_write_to(tmp_path, run_main):
    """It would say so in a thread, or not at all."""
    pytest.importorskip("trackio")
    (tmp_path / "file").touch()
    env = {"TRACKIO_DIR": str(tmp_path / "file" / "trackio")}
    done = run_main(*FLAGS, "--epochs", 1, "--track", "trackio", env=env)
    assert done.returncode == 0 and "Tracker" not in done.stdout
    assert done.stdout.count("Warning: trackio failed: ") == 1


@pytest.mark.slow
def test_mlflow_has_every_number_of_the_log(tmp_path, run_main):
    mlflow = pytest.importorskip("mlflow")
    flags = [*FLAGS, "--log_steps", "--log_updates", "--track", "mlflow"]

    def main(*more):
        done = run_main(*flags, *more)
        assert "INFO" not in done.stderr and "Warning" not in done.stdout + done.stderr
        return done.returncode

    as_after_a_crash(tmp_path, main)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("agd").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == only(tmp_path) and run.info.status == "FINISHED"
    curves = {name: [(x.step, x.value) for x in client.get_metric_history(run.info.run_id, name)]
              for name in run.data.metrics}  # fmt: skip
    assert timeless(curves) == timeless(logged(tmp_path))
    assert (run.data.params["width"], run.data.params["epochs"]) == ("8", "2")
    assert run.data.tags["end.epochs"] == "4" and run.data.tags["end.final"] == "True"
    assert [x.path for x in client.list_artifacts(run.info.run_id)] == ["curves.png"]
    assert list(tmp_path.glob("mlruns/artifacts/*/artifacts/curves.png"))
    assert main("--epochs", 1, "--fresh") == 0
    assert len(client.search_runs([experiment])) == 2


@pytest.mark.slow
def test_mlflow_of_runs_that_begin_at_once(tmp_path):
    """All of them are in the one database that the first makes."""
    mlflow = pytest.importorskip("mlflow")
    command = [sys.executable, "main.py", *FLAGS, "--epochs", "1", "--track", "mlflow", "--out",
               str(tmp_path)]  # fmt: skip
    runs = [subprocess.Popen([*command, "--seed", str(seed)], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for seed in range(3)]  # fmt: skip
    printed = [run.communicate(timeout=300)[0] for run in runs]
    assert not any(run.returncode for run in runs) and "Warning" not in "".join(printed)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'agd'")
    assert len(client.search_runs([experiment.experiment_id])) == 3


class Fake:
    """A wandb that does what is told: f(what) is called for each of its calls."""

    def __init__(self, monkeypatch, act):
        self.calls, self.points, self.act = [], {}, act
        module = types.ModuleType("wandb")
        module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        module.Settings, module.errors = dict, types.SimpleNamespace(UsageError=ZeroDivisionError)
        module.Image = lambda path: self.did("Image")
        monkeypatch.setattr("runs.track.draw", lambda *args: self.did("picture"))
        module.init = self.init
        monkeypatch.setitem(sys.modules, "wandb", module)

    def did(self, what):
        self.calls.append(what)
        return self.act(what)

    def init(self, **options):
        self.did("init")
        config, summary = (types.SimpleNamespace(update=lambda *args, what=what, **kwargs:
                                                 self.did(what))
                           for what in ("config", "summary"))  # fmt: skip
        return types.SimpleNamespace(
            config=config, summary=summary, dir="/x/y", offline=False, url="https://here",
            resumed=False, finish=lambda exit_code: self.did("finish"), log=self.log,
        )  # fmt: skip

    def log(self, point, step):
        self.did("log")
        self.points.setdefault(step, {}).update(point)


class Odd(BaseException):
    """What is neither an Exception nor Ctrl-C."""


@pytest.mark.parametrize("error", [RuntimeError("no\nroute"), SystemExit(3), Odd("of its own")])
@pytest.mark.parametrize("point", ["init", "config", "log", "Image", "summary", "finish"])
def test_a_tracker_that_fails_ends_no_run(point, error, tmp_path, monkeypatch, capsys):
    def act(what):
        print(f"chatter of {what}")
        print(f"chatter of {what}", file=sys.stderr)
        if what == point:
            raise error

    fake = Fake(monkeypatch, act)
    assert train(*FLAGS, "--epochs", 2, "--track", "wandb", "--out", tmp_path) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in out.splitlines() if line.startswith("Warning")]
    name = type(error).__name__
    assert line == f"Warning: wandb failed: {name}: {' '.join(str(error).split())}; going on " \
                   "without it"  # fmt: skip
    assert "chatter" not in out + err and "Finished 2 epochs" in out
    assert fake.calls.count(point) == 1 and fake.calls[-1] in (point, "finish")
    assert [row["kind"] for row in rows(tmp_path)] == ["run", "epoch", "epoch", "end"]
    assert fake.points.keys() == {"init": set(), "config": set(), "log": set()}.get(point, {4, 8})


def test_a_picture_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    """The tracker has the end all the same."""
    def act(what):
        if what == "picture":
            raise FileNotFoundError("no program")

    fake = Fake(monkeypatch, act)
    assert train(*FLAGS, "--epochs", 1, "--track", "wandb", "--out", tmp_path) == 0
    assert "Warning: wandb failed: FileNotFoundError" in capsys.readouterr().out
    assert fake.calls[-2:] == ["summary", "finish"] and "Image" not in fake.calls


def test_ctrl_c_in_a_tracker_interrupts(tmp_path, monkeypatch, capsys):
    """While rows are sent, as anywhere; once the log has ended it is the tracker's end alone."""
    interrupting = {"log"}

    def act(what):
        if what in interrupting:
            raise KeyboardInterrupt

    fake = Fake(monkeypatch, act)
    flags = [*FLAGS, "--track", "wandb", "--out", tmp_path]
    assert train(*flags, "--epochs", 1) == 130
    interrupting.clear()
    assert train(*flags, "--epochs", 1) == 0
    assert fake.points.keys() == {4}
    interrupting.add("finish")
    capsys.readouterr()
    assert train(*flags, "--epochs", 2) == 0
    assert "Warning: wandb failed: it was interrupted" in capsys.readouterr().out


def test_the_end_of_a_run_that_stops(tmp_path, monkeypatch):
    """No picture of a run that goes on later: a queue leaves seconds."""
    fake = Fake(monkeypatch, lambda what: None)
    flags = [*QUICK, "--cpu", "--track", "wandb", "--out", tmp_path]
    from training.control import STOP

    assert train(*flags, asked={20: STOP}) == 130
    assert fake.calls[-2:] == ["summary", "finish"] and "Image" not in fake.calls
    assert train(*flags) == 0
    assert "Image" in fake.calls and list(fake.points) == [12, 24, 36, 48]


def test_numbers_that_are_not_finite_are_left_out(tmp_path, monkeypatch):
    fake = Fake(monkeypatch, lambda what: None)
    flags = ["--optimizer", "sgd", "--lr", "1e20", "--log_steps", "--epochs", 1]
    assert train(*FLAGS, *flags, "--track", "wandb", "--out", tmp_path) == 1
    assert rows(tmp_path)[-2]["train_loss"] is None and "stopped" in rows(tmp_path)[-1]
    numbers = [x for point in fake.points.values() for k, x in point.items() if k != "curves"]
    assert numbers and all(map(math.isfinite, numbers)) and "train_loss" not in fake.points[4]
    assert fake.calls[-2:] == ["summary", "finish"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_that_is_not_installed(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(SystemExit) as end:
        train(*FLAGS, "--track", kind, "--out", tmp_path)
    assert end.value.code == 2 and not list(tmp_path.iterdir())
    assert f"--track {kind} takes the package {kind}, which is not installed: pip install " \
           f"{kind}, or \".[track]\" for all trackers" in capsys.readouterr().err  # fmt: skip


def test_the_flag_is_no_setting_and_no_part_of_what_is_repeated(tmp_path, monkeypatch, capsys):
    """A replay has the same bits, an evaluation the same numbers, and neither is tracked."""
    fake = Fake(monkeypatch, lambda what: None)
    assert train(*QUICK, "--cpu", "--track", "wandb", "--out", tmp_path) == 0
    first, calls = rows(tmp_path, NAME)[0], list(fake.calls)
    assert first["flags"]["track"] == "wandb" and "track" not in first["settings"]
    record = tmp_path / "logs" / f"{NAME}.run.json"
    assert not any("track" in word for word in json.loads(record.read_text())["command"])
    monkeypatch.setitem(sys.modules, "wandb", None)  # nor is the package asked for
    assert train("--replay", record, "--out", tmp_path / "again") == 0
    assert train("--evaluate", tmp_path / "logs" / f"{NAME}.jsonl") == 0
    assert rows(tmp_path / "again")[0]["flags"]["track"] is None and fake.calls == calls


def test_a_record_of_an_earlier_version_is_replayed(tmp_path):
    assert train(*FLAGS, "--epochs", 1, "--out", tmp_path) == 0
    path = tmp_path / "logs" / f"{only(tmp_path)}.run.json"
    record = json.loads(path.read_text())
    del record["flags"]["track"]
    path.write_text(json.dumps(record))
    assert train("--replay", path, "--out", tmp_path / "again") == 0


def test_an_ordinary_run_loads_none_of_it(tmp_path):
    code = ("import sys, main; main.main(sys.argv[1:]); print(sorted({'runs.track', "
            f"'torch.utils.tensorboard', *{KINDS}}} & sys.modules.keys()))")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *FLAGS, "--epochs", "1", "--out", tmp_path],
                          cwd=ROOT, capture_output=True, text=True)  # fmt: skip
    assert done.stdout.endswith("\n[]\n"), done.stdout + done.stderr


def test_what_waits_for_a_full_disk_is_sent_at_once(tmp_path, monkeypatch):
    """A tracker needs no log on the disk."""
    fake = Fake(monkeypatch, lambda what: None)
    monkeypatch.setattr(RunLog, "_append", lambda self, rows: "no space")
    train(*FLAGS, "--epochs", 2, "--track", "wandb", "--out", tmp_path)
    assert fake.points.keys() >= {4, 8}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_of_a_terminal(kind, tmp_path):
    """It goes to all processes of the group, and the run saves and goes on, with its tracker."""
    pytest.importorskip(kind)
    command = [sys.executable, "main.py", *FLAGS, "--track", kind, "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--epochs", "100000", "--save_every", "1h"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Tracker  " in text and "Warning" not in text
    assert "Traceback" not in text and "goes on from the last checkpoint" in text
    epochs = sum(row["kind"] == "epoch" for row in rows(tmp_path))
    done = subprocess.run([*command, "--epochs", str(epochs + 1)], cwd=ROOT, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0 and "Warning" not in done.stdout + done.stderr
    if kind == "tensorboard":
        assert tensorboard(tmp_path)[1] == in_float32(logged(tmp_path))


@pytest.mark.slow
def test_one_rank_tracks(tmp_path, run_main):
    pytest.importorskip("tensorboard")
    flags = [*FLAGS, "--distribute", "--epochs", 2, "--track", "tensorboard"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = run_main(*flags, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("tensorboard/*/*tfevents*"))) == 1
    assert tensorboard(tmp_path)[1] == in_float32(logged(tmp_path))
