"""Steps by CUDA graphs, with stand-ins for torch's; whole runs by graphs: test_trainer.py."""

import threading
import time

import pytest
import torch

from agd import AGD, SpectralAGD, init_weights
from architecture import build
from data import load
from tests.program import equal
from tests.test_agd import Reads
from training.cuda_graph import GraphedSteps, cuda_recorder
from training.losses import mse
from training.metrics import Totals
from training.optimizers import set_capturable
from training.step import Step, evaluate, set_training, show_average, train_epoch

SIZES = [128] * 11 + [29]  # of the batches of the digits


class Graph:
    """A CUDA graph's stand-in: recorded work runs when it is replayed, and not before; a replay
    leaves the optimiser's attributes bound to the tensors that they were bound to."""

    def __init__(self, optimizer=None):
        self.recorded = self.replayed = 0
        self.optimizer = optimizer

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            before = dict(vars(self.optimizer))
            work()
            vars(self.optimizer).update(before)

        return replay


def start(rule=AGD):
    """The data, the network and the optimiser of a run."""
    data = load("digits", "", 128, 360, torch.device("cpu"))
    net = build("fcn", data.shape, data.classes, depth=3, width=32)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    optimizer = rule(net.parameters())
    optimizer.fused = False  # a CPU's kernels read their own numbers
    return data, net, optimizer


def epoch_of(graphed):
    """Take the epoch that the batches are set to. Returns its Totals."""
    set_training(graphed.step.net, graphed.step.optimizer)
    list(graphed.steps(Totals()))
    show_average(graphed.step.optimizer)
    return graphed.totals()


@pytest.mark.parametrize("log_updates", [False, True])
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_replayed_steps_are_the_loop_s_and_read_nothing_back(rule, log_updates):
    """Replays write to the same addresses in every epoch."""
    batches, twin, other = start(rule)
    data, net, optimizer = start(rule)
    graph, places = Graph(optimizer), set()
    step = Step(net, mse, optimizer, log_updates=log_updates)
    graphed = GraphedSteps(step, data.train, record=graph.record)
    for epoch in range(1, 6):
        for x in (batches, data):
            x.train.set_epoch(epoch)
        with Reads() as reads:
            totals = epoch_of(graphed)
            expected = train_epoch(twin, batches.train, mse, other, log_updates)
        assert reads.count == 0 and reads.kernels > 600
        metrics = totals.read()
        assert metrics == expected.read() and equal(net.state_dict(), twin.state_dict())
        assert optimizer.eta.float().item() == metrics["steps"]["eta"][-1]
        assert evaluate(net, data.test, mse).read() == evaluate(twin, batches.test, mse).read()
        kept = [x for state in optimizer.state.values() for key, x in state.items()
                if key not in ("weights", "fixed")]  # fmt: skip
        fixed = [graphed.position, graphed.column, graphed.figures, graphed.correct]
        fixed += [data.train.held, *net.parameters(), optimizer.skipped, *kept]
        places.add(tuple(x.data_ptr() for x in fixed))
        assert all(p.grad is None for p in net.parameters())
    assert len(places) == 1
    # Three steps of each size run as they are.
    assert graph.recorded == 2 and graph.replayed == 5 * len(SIZES) - 2 * 3
    assert set(graphed.graphs) == {128, 29}


def test_memory_that_runs_out_in_a_recording_leaves_the_batch_whole(monkeypatch):
    data, net, optimizer = start()

    def none(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def record(work):
        with monkeypatch.context() as patch:
            patch.setattr(net, "forward", none)
            work()

    graphed = GraphedSteps(Step(net, mse, optimizer), data.train, record=record)
    totals = epoch_of(graphed)
    assert graphed.failure == "CUDA out of memory" and graphed.step.gradient.micro_bs is None
    assert totals.read()["examples"] == sum(SIZES)


@pytest.fixture
def events(monkeypatch):
    """Stand-ins for torch's graphs. Returns the list of what happens to them, in order."""
    events = []

    class Graph:
        def capture_begin(self, **options):
            events.append("begin")

        def capture_end(self):
            events.append("end")

        def replay(self):
            events.append("replay")

        def __del__(self):
            events.append("gone")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return events


def test_no_graph_is_replayed_or_dropped_while_another_thread_records_one(events):
    data, net, optimizer = start()
    graphed = GraphedSteps(Step(net, mse, optimizer), data.train)
    graphed.graphs = {i: graphed.record(lambda: None) for i in range(2)}
    events.clear()
    inside, finish = threading.Event(), threading.Event()

    def work():
        inside.set()
        finish.wait(30)

    recording = threading.Thread(target=cuda_recorder(), args=(work,))
    recording.start()
    inside.wait(30)
    others = [threading.Thread(target=x) for x in (graphed.graphs[0], graphed.close)]
    for thread in others:
        thread.start()
    time.sleep(0.2)
    assert events == ["begin"]
    finish.set()
    for thread in (recording, *others):
        thread.join(30)
    assert events[:2] == ["begin", "end"] and "replay" in events and not graphed.graphs


def test_a_state_of_a_graph_goes_on_without_and_the_other_way_round():
    """Adam counts its steps on the device in a graph, and refuses to do so on a CPU."""
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    optimizer = torch.optim.Adam([weight])
    optimizer.step()
    set_capturable(optimizer, True, "meta")
    assert optimizer.param_groups[0]["capturable"]
    assert optimizer.state[weight]["step"].device.type == "meta"
    optimizer.state[weight]["step"] = torch.ones(())
    with pytest.raises(AssertionError):
        optimizer.step()
    set_capturable(optimizer, False, "meta")
    optimizer.step()
    assert optimizer.state[weight]["step"] == 2
    set_capturable(torch.optim.SGD([weight], lr=1), True, "meta")  # which counts nothing
