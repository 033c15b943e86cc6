"""Forwards the rows of a run's log to an experiment tracker. Trackers, and the callbacks of other
libraries for them, know nothing of checkpoints: this file finds the tracker's run of a log again,
and sends it each row once. A tracker that fails does not end the run."""

import hashlib
import io
import math
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

from cli import printable
from runs.provenance import tilde

ROOT = Path(__file__).resolve().parents[1]
PROJECT = "agd"
RESULTS = ("train_loss", "train_acc", "test_loss", "test_acc")


class Tracker:
    """The run of a RunLog in the tracker of the name `kind`.

    batches: of an epoch. note: f(text) prints a line. What the tracker raises, except Ctrl-C,
    becomes a line, and it is sent nothing more.
    """

    def __init__(self, kind, log, batches, note):
        self.kind, self.log, self.batches, self.note = kind, log, batches, note
        self.there, self.failed, self.last = None, False, 0
        first, *rows = log.rows()
        self._do(self._open, first, sum(row["kind"] == "epoch" for row in rows))
        self.rows(rows)
        self._say_where()

    def rows(self, rows):
        """Forward the rows of epochs and steps that the tracker has not: every finite number under
        its own name, and eta as "lr", too, where a row has no rate. x is the number of steps; the
        last step of an epoch and the epoch share one."""
        points = {}
        for row in rows:
            if row["kind"] in ("epoch", "step"):
                x = (row["epoch"] - 1) * self.batches + row.get("step", self.batches)
                new = {k: v for k, v in row.items() if k != "step" and _is_number(v)}
                eta = new.get("eta", new.get("eta_mean"))
                rate = {} if eta is None else {"lr": eta}
                points[x] = {**rate, **new, **points.get(x, {})}
                self.last = x
        if points and not self.failed:
            self._do(self.there.add, {x: p for x, p in points.items() if x > self.there.seen})

    def finish(self, end):
        """Send the last row of the log, and of a final one the curves of the run as a picture."""
        if not self.failed:
            try:
                self._do(self._close, end)
            except KeyboardInterrupt:  # the log has ended: it has what is not sent
                self._fail("it was interrupted")
            self._say_where()

    def _open(self, first, epochs):
        path = os.path.abspath(self.log.log_path)
        # The same for each command of a run, and another after --fresh.
        key = hashlib.sha256(f"{path} {first.get('date')}".encode()).hexdigest()[:12]
        config = {**first, **{k: v for k, v in first["flags"].items() if v is not None}}
        config = {k: tilde(v) for k, v in config.items()
                  if isinstance(v, (str, int, float)) and k != "kind"}  # fmt: skip
        self.there = KINDS[self.kind](self.log.name, key, Path(path).parents[1], config,
                                      epochs * self.batches)  # fmt: skip

    def _close(self, end):
        try:
            if end["final"] and self.last:
                with tempfile.TemporaryDirectory() as folder:
                    self.there.picture(draw(self.log.log_path, folder), self.last)
        finally:
            results = {k: v for k, v in end.items() if isinstance(v, (str, int, float))}
            self.there.close(results, end["stopped"] is None)

    def _do(self, work, *args):
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                work(*args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why):
        self.failed = True
        why = textwrap.shorten(printable(why), 200, placeholder=" ...").rstrip(".: ")
        self.note(f"Warning: {self.kind} failed: {why}; going on without it")

    def _say_where(self):
        if not self.failed:
            self.note(f"Tracker  {self.there.where}")


# `seen`: the x of the last row that the tracker has; `done`: of the last one that the log had when
# the command began. `where`: how to see it. add: {x: {name: number}}, x growing.


class TensorBoard:
    """Points that the log has lost in a crash are purged. HPARAMS has the config, and the last
    values as results."""

    def __init__(self, name, key, out, config, done):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = out / "tensorboard" / name
        self.seen = done if any(folder.glob("*tfevents*")) else 0
        self.where = shlex.join(["tensorboard", "--logdir", str(folder.parent)])
        self.form = Summary
        self.writer = SummaryWriter(str(folder), purge_step=self.seen and self.seen + 1)
        for part in hparams(config, dict.fromkeys(RESULTS, 0)):
            self.writer.file_writer.add_summary(part)

    def add(self, points):
        for x, point in points.items():
            values = [self.form.Value(tag=k, simple_value=v) for k, v in point.items()]
            self.writer.file_writer.add_summary(self.form(value=values), x)
        self.writer.flush()

    def picture(self, path, x):
        import numpy
        from PIL import Image

        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        self.writer.add_image("curves", pixels, x, dataformats="HWC")

    def close(self, results, well):
        self.writer.close()


class Wandb:
    """Without a login, the files wait for `wandb sync`."""

    def __init__(self, name, key, out, config, done):
        # A minute for a server that is away, while other ranks wait, and Ctrl-C at the exit.
        for variable, value in (("INIT_TIMEOUT", "60"), ("FINISH_TIMEOUT", "60"),
                                ("FINISH_TIMEOUT_RAISES", "true")):  # fmt: skip
            os.environ.setdefault(f"WANDB_{variable}", value)
        import wandb

        def init(**mode):
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or PROJECT, id=key, name=name,
                dir=os.environ.get("WANDB_DIR") or str(out), resume="allow", reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", **mode),
            )  # fmt: skip

        try:
            self.run = init()
        except wandb.errors.UsageError:  # it would ask for a key
            self.run = init(mode="offline")
        self.run.config.update(config, allow_val_change=True)
        self.image, here = wandb.Image, Path(self.run.dir).parent
        if self.run.offline:
            self.where = f"wandb sync {shlex.quote(str(here.parent))}/*-{key}"
            self.seen = done if len([*here.parent.glob(f"*-{key}")]) > 1 else 0
        else:
            self.where = self.run.url or "wandb, which is disabled"
            self.seen = self.run.step - 1 if self.run.resumed else 0

    def add(self, points):
        for x, point in points.items():
            self.run.log(point, step=x)

    def picture(self, path, x):
        self.run.log({"curves": self.image(path)}, step=x)

    def close(self, results, well):
        self.run.summary.update(results)
        self.run.finish(exit_code=int(not well))


class Trackio(Wandb):
    """It has wandb's calls, no summary, and finds a run by its name alone."""

    def __init__(self, name, key, out, config, done):
        os.environ.setdefault("TRACKIO_DIR", str(out / "trackio"))
        folder = Path(os.environ["TRACKIO_DIR"])
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # it would warn in a thread, or not at all
            pass
        import trackio

        self.run = trackio.init(PROJECT, f"{name}-{key}", config=config, resume="allow",
                                embed=False)  # fmt: skip
        self.image, self.end = trackio.Image, trackio.finish
        self.seen = getattr(self.run, "_next_step", done + 1) - 1
        place = f"TRACKIO_DIR={shlex.quote(os.environ['TRACKIO_DIR'])}"
        self.where = self.run.url or f"{place} trackio show --project {PROJECT}"

    def close(self, results, well):
        self.end()


class MLflow:
    """Parameters stay as the first command of a run has set them."""

    def __init__(self, name, key, out, config, done):
        # A minute for a server that is away, two for one that does not answer; by default four and
        # twenty, while the GPU waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "5")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from filelock import FileLock  # torch needs it
        from mlflow import MlflowClient, entities

        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        self.entities, self.where, lock = entities, "mlflow, at $MLFLOW_TRACKING_URI", nullcontext()
        if not uri:
            folder = out / "mlruns"
            folder.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
            self.where = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
            # Two that make the database at once leave one that nobody can open.
            lock = FileLock(folder / "mlflow.lock", timeout=60)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        with lock:
            self.client = client = MlflowClient(uri)
            found = client.get_experiment_by_name(project)
            experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or (
                found.experiment_id if found else client.create_experiment(project, artifacts))
        runs = client.search_runs([experiment], f"tags.agd_run = '{key}'")
        run = runs[0] if runs else client.create_run(experiment, None, {"agd_run": key}, name)
        self.id = run.info.run_id
        client.update_run(self.id, "RUNNING")
        self._send("params", [entities.Param(k, str(v)) for k, v in config.items()
                              if k not in run.data.params], 100)  # fmt: skip
        # Rows of epochs alone have it: the history of the steps is not read.
        history = client.get_metric_history(self.id, RESULTS[0]) if runs else ()
        self.seen = max((point.step for point in history), default=0)

    def _send(self, what, parts, most):
        for i in range(0, len(parts), most):
            self.client.log_batch(self.id, **{what: parts[i : i + most]})

    def add(self, points):
        now = int(1000 * time.time())
        self._send("metrics", [self.entities.Metric(name, value, now, x)
                               for x, point in points.items()
                               for name, value in point.items()], 1000)  # fmt: skip

    def picture(self, path, x):
        self.client.log_artifact(self.id, path)

    def close(self, results, well):
        for name, value in results.items():
            self.client.set_tag(self.id, f"end.{name}", value)
        self.client.set_terminated(self.id, "FINISHED" if well else "FAILED")


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


def draw(log, folder):
    """The path of a picture of a log, in `folder`: scripts are above this room."""
    path = os.path.join(folder, "curves.png")
    subprocess.run(
        [sys.executable, "-m", "scripts.plot", os.path.abspath(log), "-o", path], cwd=ROOT,
        stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=300,
        start_new_session=True,  # Ctrl-C is for this process
    )
    return path


def _is_number(x):
    return type(x) in (int, float) and math.isfinite(x)
