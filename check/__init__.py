"""Find what would stop a run, before it waits in a queue: `python main.py --check ...`."""

import socket
import sys
import time
from typing import NamedTuple

import torch

import distributed
from check import resources, surroundings
from cli import UserError, printable
from distributed.launch import is_launched

MEETING = 60  # seconds for the ranks to meet: torch is imported at different speeds


class Finding(NamedTuple):
    """kind: "ok", "note" or "fault". text: what was seen, and what to do about it."""

    kind: str
    what: str
    text: str


def main(args):
    """Check the command line and print the findings. Returns the exit code: 1 after a fault."""
    began, findings, world = time.perf_counter(), [], None
    if args.distribute:
        ranks = surroundings.ranks(args, MEETING) if is_launched() else surroundings.no_launcher()
    else:
        ranks = surroundings.alone()
    world = collect("ranks", ranks, findings)
    if Finding("fault", "ranks", "") in findings:  # another rank says it
        return 1
    failed = world is None and findings and findings[-1].kind == "fault"
    world = world or distributed.World(torch.device(args.device))
    try:
        if not failed:
            on_this_rank(args, world, findings)
        code = report(findings, world, time.perf_counter() - began)
    except (Exception, KeyboardInterrupt) as error:
        reason, trace, first = world.failed(error)
        if first:
            message = reason if reason == "interrupted" else f"error: {reason}"
            print(f"{trace or ''}{message}", file=sys.stderr)
        code = 130 if reason == "interrupted" else 1
    return world.leave(code)


def on_this_rank(args, world, findings):
    """Run all checks except the one of the ranks."""

    def check(what, function, *more):
        return collect(what, function(args, *more), findings)

    facts = check("data", surroundings.images)
    shape, classes = (facts.shape, facts.classes) if facts else surroundings.fixed(args)
    nodes = world.all_gather_object(socket.gethostname())
    neighbours = nodes.count(nodes[world.rank])
    net = None if shape is None else check("network", resources.network, shape, classes)
    if world.rank == 0:  # which alone writes
        check("results", surroundings.results, net, facts)
    if facts is not None and net is not None:
        check("memory", resources.memory, world, neighbours, net, facts)
        check("workers", surroundings.workers, world, neighbours, facts)
    if not any(world.all_gather_object(any(x.kind == "fault" for x in findings))):
        check("time", resources.seconds_an_epoch, world, facts)


def collect(what, check, findings):
    """Run a check, a generator of (kind, text), and add its findings; an exception is a fault.
    Returns the generator's value, None after an exception."""
    while True:
        try:
            kind, text = next(check)
        except StopIteration as end:
            return end.value
        except UserError as error:
            kind, text = "fault", str(error)
        except Exception as error:
            kind, text = "fault", f"{type(error).__name__}: {error}"
        findings.append(Finding(kind, what, text))


def report(findings, world, seconds):
    """Print the findings of rank 0 and the faults of the others. Returns the exit code."""
    lines = {(x.what, x.text): x for x in findings}
    ranks = world.all_gather_object((socket.gethostname(), findings))
    for rank, (node, theirs) in enumerate(ranks):
        for x in theirs:
            if x.kind == "fault":
                fault = x._replace(text=f"rank {rank} on {node}: {x.text}")
                lines.setdefault((x.what, x.text), fault)
    faults = sum(x.kind == "fault" for x in lines.values())
    if world.rank == 0:
        for x in lines.values():
            print(f"{x.kind:<6} {x.what:<8} {printable(x.text)}")
        count = f"{faults or 'No'} fault{'s' if faults > 1 else ''}"
        more = "" if faults else "; nothing was trained"
        print(f"\n{count} found in {seconds:.1f} s{more}", flush=True)
    return 1 if faults else 0
