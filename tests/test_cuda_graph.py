import math
import threading
import time

import pytest
import torch

from agd import AGD, SpectralAGD, init_weights
from architecture import build
from data import load
from tests.test_agd import Reads
from training.cuda_graph import GraphedSteps, RecordingError, cuda_recorder
from training.losses import mse
from training.metrics import Totals
from training.optimizers import set_capturable
from training.step import Step, evaluate, set_training, show_average, steps

CPU = torch.device("cpu")
SIZES = [128] * 11 + [29]  # of the batches of the digits


class Graph:
    """A CUDA graph's stand-in: what is recorded runs when it is replayed, and not before; a replay
    leaves an optimiser the tensors that it has. From the recording `fails` on there is an error."""

    def __init__(self, fails=math.inf):
        self.recorded, self.replayed, self.fails = 0, 0, fails
        self.optimizer = None

    def record(self, work):
        self.recorded += 1
        if self.recorded >= self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay():
            self.replayed += 1
            before = dict(vars(self.optimizer))
            work()
            vars(self.optimizer).update(before)

        return replay


OPTIMIZERS = {
    "agd": AGD,
    "spectral": SpectralAGD,
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=1e-3),
}


def start(arch="fcn", optimizer="agd", **options):
    data = load("digits", "", 128, 360, CPU, **options)
    torch.manual_seed(0)
    net = build(arch, data.shape, data.classes, depth=3, width=32)
    if optimizer in ("agd", "spectral"):
        init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return data, net, OPTIMIZERS[optimizer](net.parameters())


def run(data, net, optimizer, epochs, graph=None, log_updates=False, **options):
    """The figures of the epochs, by graphs or without."""
    step = Step(net, mse, optimizer, log_updates=log_updates)
    if graph:
        graph.optimizer = optimizer
    replay = graph and GraphedSteps(step, data.train, record=graph.record, **options)
    found = []
    for epoch in epochs:
        data.train.set_epoch(epoch)
        if replay:
            totals = epoch_of(replay)
        else:
            totals = Totals()
            set_training(net, optimizer)
            list(steps(step, data.train, totals))
            show_average(optimizer)
        found.append((totals.read(), evaluate(net, data.test, mse).read()))
        if isinstance(optimizer, AGD):
            last = torch.tensor(totals.read()["steps"]["eta"][-1])
            assert torch.equal(optimizer.eta.float(), last)
    return found, replay


def epoch_of(graphed):
    """The Totals of the epoch that the batches are set to."""
    set_training(graphed.step.net, graphed.step.optimizer)
    list(graphed.steps(Totals()))
    show_average(graphed.step.optimizer)
    return graphed.totals()


def same_weights(net, other):
    ours, theirs = net.state_dict(), other.state_dict()
    return all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("log_updates", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replayed_steps_are_those_of_the_loop_to_the_bit(optimizer, log_updates):
    plain, replayed = start(optimizer=optimizer), start(optimizer=optimizer)
    expected, _ = run(*plain, range(1, 6), log_updates=log_updates)
    graph = Graph()
    found, replay = run(*replayed, range(1, 6), graph, log_updates)
    assert found == expected
    assert same_weights(plain[1], replayed[1])
    # Of five epochs, three steps of each size run as they are.
    assert graph.recorded == 2 and graph.replayed == 5 * len(SIZES) - 2 * 3
    assert set(replay.graphs) == {128, 29}
    steps = found[0][0]["steps"]
    assert (steps["eta"] is None) == (optimizer not in ("agd", "spectral"))
    assert (steps["update"] is None) == (not log_updates)


def test_batch_norm_is_replayed():
    """A network with buffers, in training and in evaluation between the epochs."""
    plain, replayed = [start("vgg", train_examples=20, test_examples=8) for _ in range(2)]
    for data, *_ in (plain, replayed):
        data.train.batch_size = 8
    expected, _ = run(*plain, range(1, 5))
    graph = Graph()
    found, _ = run(*replayed, range(1, 5), graph, eager=1)
    assert found == expected and same_weights(plain[1], replayed[1]) and graph.recorded == 2


def test_a_run_goes_on_from_a_state_with_graphs_of_its_own():
    whole, parts = start(), start()
    expected, _ = run(*whole, range(1, 7), Graph())
    first, _ = run(*parts, range(1, 4), Graph())
    data, net, optimizer = start()
    net.load_state_dict(parts[1].state_dict())
    optimizer.load_state_dict(parts[2].state_dict())
    second, _ = run(data, net, optimizer, range(4, 7))
    assert first + second == expected and same_weights(whole[1], net)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_step_that_cannot_be_recorded_runs_as_it_is_unless_graphs_are_required(fails):
    plain, other = start(), start()
    graph = Graph(fails)
    expected, _ = run(*plain, range(1, 6))
    found, replay = run(*other, range(1, 6), graph)
    assert found == expected and same_weights(plain[1], other[1])
    assert replay.failure == "operation not permitted when stream is capturing"
    assert graph.recorded == fails and not replay.graphs
    with pytest.raises(RecordingError, match="not permitted.*--cuda_graph off"):
        run(*start(), range(1, 6), Graph(fails), required=True)


def test_memory_that_runs_out_in_a_recording_leaves_the_batch_whole():
    data, net, optimizer = start()

    def record(work):
        forward = net.forward

        def none(x):
            raise torch.OutOfMemoryError("CUDA out of memory")

        net.forward = none
        try:
            work()
        finally:
            net.forward = forward

    replay = GraphedSteps(Step(net, mse, optimizer), data.train, record=record)
    totals = epoch_of(replay)
    assert replay.failure == "CUDA out of memory" and replay.step.gradient.micro_bs is None
    assert totals.read()["examples"] == 1437


def test_memory_that_runs_out_before_the_recording_halves_the_batch():
    data, net, optimizer = start()
    forward, graph = net.forward, Graph()

    def small(x):
        if net.training and len(x) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x)

    net.forward = small
    found, replay = run(data, net, optimizer, [1, 2, 3, 4], graph)
    assert replay.step.gradient.micro_bs == 64 and graph.recorded == 0
    assert found[0][0]["examples"] == 1437 and found[3][0]["loss"] < found[0][0]["loss"]


def test_replays_read_nothing_back():
    data, net, optimizer = start()
    optimizer.fused = False  # a CPU's fast step reads what is its own
    graph = Graph()
    graph.optimizer = optimizer
    replay = GraphedSteps(Step(net, mse, optimizer), data.train, record=graph.record, eager=1)
    for epoch in (1, 2):
        data.train.set_epoch(epoch)
        with Reads() as reads:
            epoch_of(replay)
    assert reads.count == 0 and reads.kernels > 300


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for torch's graphs: what they did, with the number of the thread, in order."""
    done = []

    class Graph:
        def capture_begin(self, **options):
            done.append("begin")

        def capture_end(self):
            done.append("end")

        def replay(self):
            done.append("replay")

        def __del__(self):
            done.append("gone")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return done


def test_no_graph_is_replayed_or_dropped_while_another_thread_records_one(graphs):
    data, net, optimizer = start()
    replay = GraphedSteps(Step(net, mse, optimizer), data.train, record=cuda_recorder())
    replay.graphs = {i: replay.record(lambda: None) for i in range(2)}
    graphs.clear()
    inside, finish = threading.Event(), threading.Event()

    def work():
        inside.set()
        finish.wait(30)

    recording = threading.Thread(target=cuda_recorder(), args=(work,))
    recording.start()
    inside.wait(30)
    others = [threading.Thread(target=x) for x in (replay.graphs[0], replay.close)]
    for thread in others:
        thread.start()
    time.sleep(0.2)
    assert graphs == ["begin"]
    finish.set()
    for thread in (recording, *others):
        thread.join(30)
    del others
    assert graphs[:2] == ["begin", "end"] and "replay" in graphs and not replay.graphs


@pytest.mark.parametrize("optimizer", ["agd", "spectral"])
def test_a_graph_writes_to_the_same_places_whatever_the_epoch(optimizer):
    """What is not made anew in a step keeps its memory: a graph knows nothing else."""
    data, net, optimizer = start(optimizer=optimizer)
    graph = Graph()
    graph.optimizer = optimizer
    replay = GraphedSteps(Step(net, mse, optimizer), data.train, record=graph.record, eager=1)
    places = set()
    for epoch in (1, 2, 3):
        data.train.set_epoch(epoch)
        epoch_of(replay)
        kept = [x for state in optimizer.state.values() for key, x in state.items()
                if key not in ("weights", "fixed")]  # fmt: skip
        fixed = [replay.position, replay.column, replay.figures, replay.correct, data.train.held]
        fixed += [*net.parameters(), optimizer.skipped, *kept]
        places.add(tuple(x.data_ptr() for x in fixed))
        assert all(p.grad is None for p in net.parameters())
    assert len(places) == 1


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
