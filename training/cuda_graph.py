"""Training steps as CUDA graphs: each batch size is captured once, then a step is one launch.

A step of a small network is a hundred kernels of a few microseconds, and launching them one by one
takes longer than they do. torch's make_graphed_callables ends before the optimiser and the sums.
"""

import functools
import math
from collections import Counter
from contextlib import suppress

import torch

from cli import UserError
from training.gradient import RECORDING
from training.metrics import Totals

FAILURES = []  # why captures in this process have failed
EAGER = 3  # eager steps of a batch size before its capture, in which libraries set themselves up


class RecordingError(UserError):
    """A step cannot be captured; the message says why."""

    exit_code = 1


class GraphedSteps:
    """The steps of an epoch of arrays or a text, by one CUDA graph of `step` for each batch size.

    Runs the first `eager` steps of each batch size eagerly, and the first `after` steps of all;
    then captures. Capturing does not execute the step. Nothing is read from the device.

    Where a step cannot be captured, `failure` says why and all steps run eagerly; if `required`,
    RecordingError is raised. Once memory has run out and batches go through in micro-batches, steps
    run eagerly without a failure.

    `record(work)` returns a function that repeats work() without having run it; None captures a
    CUDA graph of the current stream, which must not be the default one.
    """

    def __init__(self, step, batches, required=False, eager=EAGER, after=0, record=None):
        self.step, self.batches, self.required = step, batches, required
        self.eager, self.after = eager, after
        self.record = record or cuda_recorder()
        device, examples, size = batches.device, batches.examples, batches.batch_size
        self.sizes = [min(size, examples - i) for i in range(0, examples, size)]
        # On the device: where the next batch starts, the number of the next step, and of each step
        # the sum of losses, eta and the relative update, and how many outputs were correct.
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.figures = torch.zeros(3, len(self.sizes), device=device)
        self.correct = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        self.seen, self.graphs, self.results, self.failure = Counter(), {}, {}, None

    def steps(self, totals):
        """Take the steps of the epoch from the batches' position on, yielding eta (None of a
        baseline) after each. `totals`: the Totals of the steps before."""
        self.batches.hold()
        done = self.batches.position
        self.position.fill_(sum(self.sizes[:done]))
        self.column.fill_(done)
        if done:
            self._begin(totals)
        for size in self.sizes[done:]:
            self.batches.advance()
            if self._ready(size):
                self._capture(size)
            if size in self.graphs:
                self.graphs[size]()
                if self.step.automatic:
                    self.step.optimizer.eta, self.step.optimizer.G = self.results[size]
            else:
                self._take(size, self.step)
                self.seen[size] += 1
            yield self.step.optimizer.eta if self.step.automatic else None

    def close(self):
        """Drop the graphs, while no other thread captures one: torch keeps a list of them all."""
        with RECORDING:
            self.graphs.clear()

    def _ready(self, size):
        if size in self.graphs or self.failure or self.step.gradient.micro_bs is not None:
            return False
        return self.seen[size] >= self.eager and self.seen.total() >= self.after

    def _capture(self, size):
        try:
            # Other threads replay again only after a failure is noted.
            with RECORDING:
                try:
                    self.graphs[size] = self.record(lambda: self._take(size, self.step.once))
                except RuntimeError as error:
                    self.failure = (str(error).strip() or type(error).__name__).splitlines()[0]
                    FAILURES.append(self.failure)
                    raise
        except RuntimeError as error:
            if self.required:
                raise RecordingError(
                    f"the step cannot be a CUDA graph here ({self.failure}); start again with "
                    "--cuda_graph off"
                ) from error
            self.close()
            self.step.optimizer.zero_grad()  # the capture has left gradients

    def _take(self, size, step):
        """Take one step with the next `size` examples; all other places in memory are fixed."""
        with self.step.span("data"):
            inputs, labels = self.batches.at(self.position, size)
        losses, correct, extras = step(inputs, labels)
        with self.step.span("sums"):
            loss, correct = losses.sum(), correct.sum()
            figures = [loss, extras["eta"], extras["update"]]
            figures = [x if x is None else x.to(self.figures) for x in figures]
            figures = torch.stack([loss.new_zeros(()) if x is None else x for x in figures])
            self.figures.index_copy_(1, self.column, figures[:, None])
            self.correct.index_copy_(0, self.column, correct[None])
            self.position += size
            self.column += 1
        if self.step.automatic:  # a replay overwrites them: they stay allocated
            self.results[size] = self.step.optimizer.eta, self.step.optimizer.G

    def _begin(self, totals):
        losses, correct, counts = zip(*totals.columns)
        eta, update = totals.extras["eta"], totals.extras["update"]
        self.correct[: len(counts)] = torch.stack(correct)
        for row, column in zip(self.figures, (losses, eta, update)):
            if column:
                row[: len(counts)] = torch.stack(column)

    def totals(self):
        """The Totals of the epoch so far."""
        done = self.batches.position
        totals, (loss, eta, update) = Totals(), self.figures[:, :done].clone().unbind()
        correct = self.correct[:done].clone().unbind()
        totals.columns = list(zip(loss.unbind(), correct, self.sizes))
        if self.step.automatic:
            totals.extras["eta"] = list(eta.unbind())
        if self.step.before is not None:
            totals.extras["update"] = list(update.unbind())
        return totals


    def means(self):
        """As Totals.means, of the steps of the epoch so far."""
        done = self.batches.position
        losses, etas = self.figures[:2, :done]
        examples = sum(self.sizes[:done])
        etas = etas if self.step.automatic else etas * math.nan
        return torch.stack([losses.sum() / examples, etas.nanmean()])


def cuda_recorder():
    """record(work) of GraphedSteps by CUDA graphs that share their memory: each is replayed as a
    whole, and only what GraphedSteps holds outlives that."""
    pool = torch.cuda.graph_pool_handle()

    def record(work):
        graph = torch.cuda.CUDAGraph()
        with RECORDING:
            torch.cuda.empty_cache()  # a capture cannot make room for itself
            # Other threads may train on streams of their own meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        return functools.partial(replayed, graph)

    return record


def replayed(graph):
    """Replay a graph while no other thread captures one: torch before 2.12 updates the random
    generator at every replay, which a capture in another thread holds."""
    with RECORDING:
        graph.replay()
