"""Training steps as CUDA graphs: each size of batch is recorded once, and then replayed whole.

A step of a small network is a hundred kernels of a few microseconds, and launching them one by one
takes longer than they do. A graph holds them all, from the batch to the sums of its losses.
"""

import functools
from collections import Counter
from contextlib import suppress

import torch

from cli import UserError
from training.gradient import RECORDING
from training.metrics import Totals, sums

FAILURES = []  # why recordings in this process have failed
EAGER = 3  # steps of a size before it is recorded, in which libraries and optimisers set up


class RecordingError(UserError):
    """A step cannot be recorded; the message says why."""

    exit_code = 1


class GraphedSteps:
    """The steps of an epoch of array batches, by the graphs of one `step` for each size of batch.

    Every step is the next one of the training: the first `eager` of a size run as they are, and
    the first `after` of all; recording one does not run it. Nothing is read from the device.

    Where a step cannot be recorded, `failure` says why and all steps run as they are; or, if
    `required`, RecordingError does. So they do, without a failure, once memory has run out and
    batches go through in parts.

    `record(work)` returns a function that does what work() would do, without doing it yet; None
    makes it a CUDA graph of the current stream, which must not be the default one.
    """

    def __init__(self, step, batches, required=False, eager=EAGER, after=0, record=None):
        self.step, self.batches, self.required = step, batches, required
        self.eager, self.after = eager, after
        self.record = record or cuda_recorder()
        device, examples, size = batches.device, batches.examples, batches.batch_size
        self.sizes = [min(size, examples - i) for i in range(0, examples, size)]
        # On the device: where the next batch starts, the number of the next step, and of each step
        # the sum of losses, eta and the relative update, and how many outputs were right.
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.figures = torch.zeros(3, len(self.sizes), device=device)
        self.correct = torch.zeros(len(self.sizes), dtype=torch.int64, device=device)
        self.seen, self.graphs, self.results, self.failure = Counter(), {}, {}, None

    def epoch(self, on_step=None, totals=None):
        """Take the steps of the epoch that the batches are set to; returns its Totals. Where the
        batches begin later, `totals` are those of the steps before."""
        self.batches.hold()
        done = self.batches.position
        self.position.fill_(sum(self.sizes[:done]))
        self.column.fill_(done)
        if done:
            self._begin(totals)
        for size in self.sizes[done:]:
            self.batches.position += 1
            if self._ready(size):
                self._record(size)
            if size in self.graphs:
                self.graphs[size]()
                if self.step.agd:
                    self.step.optimizer.eta, self.step.optimizer.G = self.results[size]
            else:
                self._take(size, self.step)
                self.seen[size] += 1
            if on_step is not None:
                on_step(self.step.optimizer.eta if self.step.agd else None, self._totals)
        return self._totals()

    def close(self):
        """Drop the graphs, while no other thread records one: torch keeps a list of them all."""
        with RECORDING:
            self.graphs.clear()

    def _ready(self, size):
        if size in self.graphs or self.failure or self.step.gradient.micro_bs is not None:
            return False
        return self.seen[size] >= self.eager and self.seen.total() >= self.after

    def _record(self, size):
        try:
            # Other threads replay again only once a failure is known.
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
            self.step.optimizer.zero_grad()  # which would be of the recording

    def _take(self, size, step):
        """One step with the next `size` images, every place in memory but theirs a fixed one."""
        with self.step.span("data"):
            inputs, labels = self.batches.at(self.position, size)
        losses, outputs, extras = step(inputs, labels)
        with self.step.span("sums"):
            loss, correct = sums(losses, outputs, labels)
            figures = [loss, extras["eta"], extras["update"]]
            figures = [x if x is None else x.to(self.figures) for x in figures]
            figures = torch.stack([loss.new_zeros(()) if x is None else x for x in figures])
            self.figures.index_copy_(1, self.column, figures[:, None])
            self.correct.index_copy_(0, self.column, correct[None])
            self.position += size
            self.column += 1
        if self.step.agd:  # what a replay overwrites stays allocated
            self.results[size] = self.step.optimizer.eta, self.step.optimizer.G

    def _begin(self, totals):
        losses, correct, counts = zip(*totals.columns)
        eta, update = totals.extras["eta"], totals.extras["update"]
        self.correct[: len(counts)] = torch.stack(correct)
        for row, column in zip(self.figures, (losses, eta, update)):
            if column:
                row[: len(counts)] = torch.stack(column)

    def _totals(self):
        """Those of the steps so far."""
        done = self.batches.position
        totals, (loss, eta, update) = Totals(), self.figures[:, :done].clone().unbind()
        correct = self.correct[:done].clone().unbind()
        totals.columns = list(zip(loss.unbind(), correct, self.sizes))
        if self.step.agd:
            totals.extras["eta"] = list(eta.unbind())
        if self.step.before is not None:
            totals.extras["update"] = list(update.unbind())
        return totals


def cuda_recorder():
    """record(work) of GraphedSteps, with CUDA graphs that share their memory: each is replayed from its
    first kernel to its last, and only what GraphedSteps holds outlives that."""
    pool = torch.cuda.graph_pool_handle()

    def record(work):
        graph = torch.cuda.CUDAGraph()
        with RECORDING:
            torch.cuda.empty_cache()  # a recording cannot make room for itself
            # Other threads may train on streams of their own meanwhile.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(RuntimeError):  # it says that the recording is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        return functools.partial(replayed, graph)

    return record


def replayed(graph):
    """GraphedSteps a graph while no other thread records one: torch before 2.12 counts a replay's random
    numbers, of which there are none, in the generator that a recording has taken for itself."""
    with RECORDING:
        graph.replay()
