"""--profile: where the time of a run goes, as a table and as traces to look at."""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

FIRST, STEPS = 10, 30  # steps before the profile, and in it
PARTS = ("data", "forward", "backward", "optimiser", "sums")


class Profile:
    """A profile of some steps of an epoch, and of the evaluation after it.

    `steps` is the number of steps of an epoch; of fewer than FIRST + STEPS the last ones are
    profiled. On a GPU, times are between events on the device. `paths`: the traces, for
    chrome://tracing or ui.perfetto.dev.
    """

    def __init__(self, folder, name, device, steps):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.paths = [Path(folder) / f"{name}{part}.json.gz" for part in ("", "-test")]
        self.device, self.steps, self.count = device, steps, 0
        self.last = min(FIRST + STEPS, steps)
        self.first = max(0, self.last - STEPS)
        self.profiler, self.profilers, self.spans = None, [], []

    def span(self, name):
        """A context whose time counts as the part `name`."""
        return self._timed(name) if self.profiler is not None else nullcontext()

    @contextmanager
    def _timed(self, name):
        with record_function(name):
            start = self._now()
            yield
            self.spans.append((name, start, self._now()))

    def step(self):
        """Call it before the first step of the epoch and after each step."""
        if self.count == self.first:
            self._start()
        elif self.count == self.last:
            self._stop("step")
        self.count += 1

    @contextmanager
    def evaluation(self):
        """The context of the evaluation."""
        self._start()
        yield
        self._stop("evaluation")

    def write(self):
        """Write the traces; that takes longer than the steps did."""
        for profiler, path in zip(self.profilers, self.paths):
            profiler.export_chrome_trace(str(path))
        self.profilers = []

    def shares(self):
        """Rows (part, share of an epoch's time, time of a step or of an epoch), in words."""
        seconds = {}
        for name, start, end in self.spans:
            seconds[name] = seconds.get(name, 0.0) + self._between(start, end)
        recorded = self.last - self.first
        step, test = seconds["step"] / recorded, seconds["evaluation"]
        epoch = step * self.steps + test
        rows = [(name, seconds.get(name, 0.0) / recorded) for name in PARTS]
        rows.append(("the rest", step - sum(each for _, each in rows)))
        return [
            *((name, f"{each * self.steps / epoch:6.1%}", f"{each * 1e3:9.3f} ms a step")
              for name, each in rows),
            ("evaluation", f"{test / epoch:6.1%}", f"{test * 1e3:9.1f} ms an epoch"),
        ]  # fmt: skip

    def _start(self):
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(activities=activities)
        self.profiler.start()
        self.began = self._now()

    def _stop(self, name):
        self.spans.append((name, self.began, self._now()))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.profiler.stop()
        self.profilers.append(self.profiler)
        self.profiler = None

    def _now(self):
        if self.device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end):
        """Seconds."""
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3
