"""Works that take turns, and what is told of their times."""

import json
import random
import statistics
import sys
import time

import torch

from scripts.links import synchronise

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def by_clock(device, clock="wall"):
    """A timer, f(work) -> seconds until `device` has done it too, by one of CLOCKS: the time that
    passes, or that of all the processor's cores for this process, whatever else they do."""
    now = CLOCKS[clock]

    def seconds(work):
        synchronise(device)
        start = now()
        work()
        synchronise(device)
        return now() - start

    return seconds


def by_graph(device, calls=20):
    """A timer, f(work) -> seconds of a call on the GPU alone: the mean of the `calls` that a CUDA
    graph holds, as a step of training is one. The host launches one graph while the one before
    runs; launching the kernels of small steps one by one takes it longer than they do."""
    graphs = {}

    def recorded(work):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # in which libraries and optimisers set up
                work()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        return graph

    def seconds(work):
        if work not in graphs:
            graphs[work] = recorded(work)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for mark in marks:
            graphs[work].replay()
            mark.record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) / 1e3 / calls

    return seconds


def take_turns(works, repeats, timer, warm=1, say=None):
    """{name: seconds of each of `repeats` rounds} of {name: function}.

    A drift of the machine's speed meets all of them. Each round has an order of its own, so that
    none always meets the caches as the same one left them; `warm` rounds before do not count.
    """
    seconds, order = {name: [] for name in works}, list(works)
    for i in range(-warm, repeats):
        random.Random(i).shuffle(order)
        for name in order:
            taken = timer(works[name])
            if i >= 0:
                seconds[name].append(taken)
            if say:
                note(f"{say}, round {i + 1}/{repeats}: {name} {taken:.3g} s")
    return seconds


def ratios(seconds, pairs):
    """{"a / b": the ratio of each round} for pairs (a, b): a round lies within seconds."""
    return {f"{a} / {b}": [x / y for x, y in zip(seconds[a], seconds[b])] for a, b in pairs}


def medians(columns):
    return {name: statistics.median(values) for name, values in columns.items()}


def quartiles(columns):
    """{name: [lower, upper]}."""
    return {name: _quartiles(values) for name, values in columns.items()}


def spread(columns):
    """{name: [median, lower quartile, upper quartile]}."""
    return {name: [statistics.median(x), *_quartiles(x)] for name, x in columns.items()}


def _quartiles(values):
    if len(values) == 1:
        return values * 2
    lower, _, upper = statistics.quantiles(values, method="inclusive")
    return [lower, upper]


def rounded(value):
    """`value`, for JSON: four figures are more than a clock tells."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def as_json(value, indent=""):
    """JSON with a line an entry, of which lists and the innermost dicts are one."""
    inner = value.values() if isinstance(value, dict) else ()
    if not any(isinstance(item, (dict, list)) for item in inner):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    lines = [f"{indent} {json.dumps(key, ensure_ascii=False)}: {as_json(item, indent + ' ')}"
             for key, item in value.items()]  # fmt: skip
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def note(text):
    print(text, file=sys.stderr, flush=True)
