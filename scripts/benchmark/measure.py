"""Functions that take turns under a clock, and the statistics of their times."""

import random
import statistics
import sys
import time

import torch

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def by_clock(device, clock="wall"):
    """A timer: f(work) -> seconds until `device` has finished it, of the wall, or of the CPU time
    of this process, whatever else the machine does."""
    now = CLOCKS[clock]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(work):
        wait()
        start = now()
        work()
        wait()
        return now() - start

    return seconds


def by_graph(device, calls=20):
    """A timer: f(work) -> seconds of a call on the GPU alone, the mean of the `calls` in a CUDA
    graph. The host launches one graph while the one before runs; launching the kernels of small
    steps one by one would take it longer than they do."""
    graphs = {}

    def captured(work):
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # in which libraries and optimisers set up
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        return graph

    def seconds(work):
        if work not in graphs:
            graphs[work] = captured(work)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for mark in marks:
            graphs[work].replay()
            mark.record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3 / calls

    return seconds


def take_turns(works, repeats, timer, warm=1, say=None):
    """{name: seconds of each of `repeats` rounds} of {name: function}.

    Turns, because a drift of the machine's speed then meets all of them. Each round has an order of
    its own, so that none always meets the caches of the same one; `warm` rounds do not count."""
    seconds, order = {name: [] for name in works}, list(works)
    for i in range(-warm, repeats):
        random.Random(i).shuffle(order)
        for name in order:
            seconds[name].append(timer(works[name]))
            if say:
                note(f"{say}, round {i + 1}/{repeats}: {name} {seconds[name][-1]:.3g} s")
    return {name: taken[warm:] for name, taken in seconds.items()}


def compared(columns, pairs, key="{} / {}"):
    """{"ratios": {"a / b": median}, "quartiles": {"a / b": [lower, upper]}} of the ratios of each
    round, for pairs (a, b); "seconds": the spread of the columns."""
    each = spread({key.format(a, b): [x / y for x, y in zip(columns[a], columns[b])]
                   for a, b in pairs})  # fmt: skip
    return {"ratios": {name: x[0] for name, x in each.items()},
            "quartiles": {name: x[1:] for name, x in each.items()},
            "seconds": spread(columns)}  # fmt: skip


def spread(columns):
    """{name: [median, lower quartile, upper quartile]}."""
    return {name: [statistics.median(x), *statistics.quantiles(x * (len(x) == 1) + x, n=4,
                   method="inclusive")[::2]] for name, x in columns.items()}  # fmt: skip


def note(text):
    print(text, file=sys.stderr, flush=True)
