"""What would stop a run, found before it waits in a queue: `python main.py --check ...`."""

import os
import socket
import sys
import time

import torch

import distributed
from architecture import Unfit
from check import resources, surroundings
from check.common import Fault, Finding
from cli import printable
from data import DataError
from runs.log import RunError

MEETING = 60  # seconds for the ranks to meet: torch is imported at different speeds


def main(args):
    """Check the command, print what was found; returns 1 if something would stop the run."""
    began = time.perf_counter()
    launched = any(name in os.environ for name in distributed.VARIABLES)
    world, findings = distributed.World(torch.device(args.device)), []
    if args.distribute and not launched:
        watched("ranks", surroundings.no_launcher, findings)
    elif args.distribute:
        try:
            world = distributed.start(world.device, True, MEETING)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except distributed.LaunchError as error:
            if not str(error):  # another rank says it
                return 1
            findings.append(Finding("fault", "ranks", str(error)))
        else:
            watched("ranks", lambda: surroundings.ranks(args, world), findings)
    try:
        if world.size > 1 or not findings or findings[-1].kind != "fault":
            on_this_rank(args, world, findings)
        code = report(findings, world, time.perf_counter() - began)
    except (Exception, KeyboardInterrupt) as error:
        reason, trace, first = world.failed(error)
        if first:
            said = reason if reason == "interrupted" else f"error: {reason}"
            print(f"{trace or ''}{said}", file=sys.stderr)
        code = 130 if reason == "interrupted" else 1
    return world.leave(code)


def on_this_rank(args, world, found):
    """Add the findings of everything but the ranks' meeting."""
    facts = watched("data", lambda: surroundings.images(args), found)
    shape, classes = (facts.shape, facts.classes) if facts else surroundings.fixed(args)
    net, nodes = None, world.all_gather_object(socket.gethostname())
    neighbours = nodes.count(nodes[world.rank])
    if shape is not None:
        net = watched("network", lambda: resources.network(args, shape, classes), found)
    if world.rank == 0:  # which alone writes
        watched("results", lambda: surroundings.results(args, net, facts), found)
    if facts is not None and net is not None:
        watched("memory", lambda: resources.memory(args, world, neighbours, net, facts), found)
        watched("workers", lambda: surroundings.workers(args, world, neighbours, facts), found)
    faults = sum(world.all_gather_object(sum(x.kind == "fault" for x in found)))
    if not faults:
        watched("time", lambda: resources.seconds_an_epoch(args, world, facts), found)


def watched(what, check, found):
    """Add the findings of `check`, which makes a generator of (kind, text); returns what that
    returns, or None where it raises: that is a fault."""

    def follow():
        value = yield from check()
        return value

    steps = follow()
    while True:
        try:
            kind, text = next(steps)
        except StopIteration as end:
            return end.value
        except (Fault, DataError, RunError, Unfit) as error:
            kind, text, steps = "fault", str(error), iter(())
        except Exception as error:  # a check that fails for a reason of its own has found one, too
            kind, text, steps = "fault", f"{type(error).__name__}: {error}", iter(())
        found.append(Finding(kind, what, text))


def report(findings, world, seconds):
    """Print the findings of this rank, and the faults of the others; returns the exit code."""
    every = world.all_gather_object((socket.gethostname(), findings))
    faults = [x for _, of_rank in every for x in of_rank if x.kind == "fault"]
    if world.rank == 0:
        lines, seen = list(findings), {(x.what, x.text) for x in findings}
        for rank, (node, of_rank) in enumerate(every):
            for x in of_rank:
                if x.kind == "fault" and (x.what, x.text) not in seen:
                    seen.add((x.what, x.text))
                    lines.append(Finding("fault", x.what, f"rank {rank} on {node}: {x.text}"))
        for x in lines:
            print(f"{x.kind:<6} {x.what:<8} {printable(x.text)}")
        shown = sum(x.kind == "fault" for x in lines)
        if shown:
            print(f"\n{shown} fault{'s' if shown > 1 else ''} in {seconds:.1f} s")
        else:
            print(f"\nNo fault found in {seconds:.1f} s; nothing was trained")
        sys.stdout.flush()
    return 1 if faults else 0
