"""Functions that tests run as the ranks of a group: python -m tests.ranks FUNCTION OUT [JSON]."""

import json
import os
import sys
import time
from functools import partial

import torch
import torch.nn as nn

import agd
import distributed
import main as program
from agd import AGD, depth, init_weights
from architecture.gpt import GPT
from data import load
from flags import parse
from runs.log import RunLog
from runs.name import name_and_settings
from training import trainer
from training.control import Requests
from training.gradient import Gradient
from training.losses import mse
from training.metrics import Totals
from training.step import Step, evaluate, set_training, take_steps

CPU = torch.device("cpu")


class To(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def net_of(norms=False, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [To(dtype), nn.Conv2d(1, 6, 3, bias=False)]
    layers += [nn.BatchNorm2d(6, affine=False)] if norms else []
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(216, 10, bias=False)]
    net = nn.Sequential(*layers).to(dtype)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return net


def digits(world, train_bs=100):
    return load("digits", "", train_bs, 77, CPU, rank=world.rank, size=world.size)


def one_epoch(step, batches):
    totals = Totals()
    set_training(step.net, step.optimizer)
    list(take_steps(step, batches, totals))
    return totals


def train(world, net, gradient, epochs, train_bs=100):
    """The loss of each step, and what the test set gives."""
    data, optimizer, losses = digits(world, train_bs), AGD(net.parameters()), []
    step = Step(gradient.net, mse, optimizer, gradient)
    for epoch in range(1, epochs + 1):
        data.train.set_epoch(epoch)
        totals = one_epoch(step, data.train)
        losses += totals.read(world.all_reduce)["steps"]["loss"]
    world.broadcast(net.buffers())
    tested = evaluate(net, data.test, mse).read(world.all_reduce)
    return {
        "weights": [p.detach().clone() for p in net.parameters()],
        "buffers": dict(net.named_buffers()),
        "loss": losses,
        "examples": tested["examples"],
        "correct": round(tested["acc"] * tested["examples"]),
        "drifted": world.ranks_that_differ(net.parameters()),
    }


def agreement(world, micro_batches, epochs=7):
    """What 7 epochs of 15 steps, the last one ragged, give for each number of micro-batches."""
    given = {}
    for parts in micro_batches:
        net = net_of()
        gradient = Gradient(world.wrap(net), mse, world, -(-100 // world.size // parts))
        given[parts] = train(world, net, gradient, epochs)
    return given


def norms(world, sync, train_bs=100, micro_bs=None, epochs=2):
    """The same of a net with batch norm."""
    net = net_of(norms=True)
    gradient = Gradient(world.wrap(net, sync_bn=sync), mse, world, micro_bs, sync_bn=sync)
    return train(world, net, gradient, epochs, train_bs)


def statistics(world, sync, micro_bs):
    """The buffers of a network after an epoch, and after recalibration with other weights; and
    where the training data stand before and after that."""
    net, data = net_of(norms=True, dtype=torch.float32), digits(world)
    gradient = Gradient(world.wrap(net, sync_bn=sync), mse, world, micro_bs, sync_bn=sync)
    data.train.set_epoch(3)
    one_epoch(Step(gradient.net, mse, AGD(net.parameters(), gain=0), gradient), data.train)
    given = {"trained": net[2].running_mean.clone()}
    with torch.no_grad():
        net[1].weight.mul_(2)
    for when in ("before", "after"):
        train = data.train
        given[when] = train.position, train.epoch, train.missing, train.order().tolist()
        if when == "before":
            net.train()
            trainer.recalibrate(net, data.train, gradient, world, 3)
    return {**given, "buffers": dict(net.named_buffers())}


class Small(nn.Module):
    """A net that has no memory for more than `room` images at a time, from a call on."""

    def __init__(self, net, room, calls=0):
        super().__init__()
        self.net, self.room, self.calls = net, room, calls

    def forward(self, x):
        x = self.net(x)  # statistics are gathered before it fails
        if not self.training:
            return x
        self.calls -= 1
        if len(x) > self.room and self.calls < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return x


def memory(world, rooms, calls=0, norms=False):
    """Rank i has room for rooms[i] images, after so many calls that have."""
    net = Small(net_of(norms), rooms[world.rank], calls)
    gradient = Gradient(world.wrap(net), mse, world)
    try:
        given = train(world, net, gradient, 2)
    except Exception as error:
        return {"error": world.failed(error).reason}
    return {**given, "micro_bs": gradient.micro_bs}


class Signalled(Requests):
    """Requests of a process that sends itself signals, {look: number}; looks count from 1."""

    def __init__(self, numbers):
        super().__init__()
        self.numbers, self.looks = numbers, 0
        self.install()

    def take(self):
        self.looks += 1
        if str(self.looks) in self.numbers:
            os.kill(os.getpid(), self.numbers[str(self.looks)])
        return super().take()


def runs(world, several, norms=False, dtype="float32"):
    """(exit code, looks, whether the log was at its end) of runs of main.py in this group, one
    after the other: of each the flags and, for each rank, the Signalled's numbers. With `norms` the
    network has batch norm. Rank 0's disk is slow."""
    given, log = [], RunLog.log
    torch.set_default_dtype(getattr(torch, dtype))
    if world.rank == 0:
        RunLog.log = lambda run, *rows: time.sleep(0.03) or log(run, *rows)
    if norms:
        program.build = lambda *args, **sizes: net_of(norms=True, dtype=torch.float32)
    for flags, numbers in several:
        requests = Signalled(numbers.get(str(world.rank), {}))
        args = parse(["--cpu", "--distribute", *flags])
        code = program.train(args, world, requests)
        path = RunLog(args.out, name_and_settings(vars(args))[0], {}).log_path
        given.append((code, requests.looks, '{"kind": "end"' in path.read_text()))
    return given


def drift(world, rank):
    net = net_of()
    world.wrap(net)
    before = world.ranks_that_differ(net.parameters())
    if world.rank == rank:
        with torch.no_grad():
            w = next(net.parameters()).view(-1)
            w[3] = torch.nextafter(w[3], torch.tensor(9.0, dtype=w.dtype))
    return [before, world.ranks_that_differ(net.parameters())]


def meeting(world):
    return world.all_gather_object(world.rank)


def fail(world, rank):
    """One rank fails by itself, the others wait for rank 0 in a collective."""
    try:
        if world.rank == rank:
            raise ValueError("lost my way")
        world.broadcast_object()
        world.broadcast_object(world.all_gather_object(0))
    except (RuntimeError, ValueError) as error:
        return list(world.failed(error))


class Plain(nn.Module):
    """Convolutions and linear layers whose outputs do not divide by the ranks, some fewer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, bias=False)
        self.same = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.twin = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.narrow = nn.Linear(216, 1, bias=False)
        self.wide = nn.Linear(1, 7, bias=False)
        self.last = nn.Linear(7, 10, bias=False)

    def forward(self, x):
        x = self.twin(torch.relu(self.same(torch.relu(self.conv(x)))))
        return self.last(torch.relu(self.wide(self.narrow(x.flatten(1)))))

    @staticmethod
    def batch(i):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64)
        return x, torch.randn(12, 10, generator=generator, dtype=torch.float64)


class Every(nn.Module):
    """A parameter of every role; the parts of stacked weights, groups and rows do not divide by the
    ranks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.conv = nn.Conv1d(6, 9, 3, padding=1, groups=3)
        self.last = nn.Linear(9, 5)

    def forward(self, x):
        x = self.embedding(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.conv(self.lstm(x)[0].mT).relu().mean(-1)
        return self.last(x)

    @staticmethod
    def batch(i):
        return (torch.arange(24).view(4, 6) + i) % 11, torch.arange(20.0).view(4, 5).sin().double()


class Text(GPT):
    """A GPT whose vocabulary, and the rows of its positions, do not divide by the ranks."""

    def __init__(self, tied=False):
        super().__init__(13, 7, depth=2, width=12, heads=3, tied=tied)

    @staticmethod
    def batch(i):
        target = torch.arange(4 * 7 * 13.0).view(4, 7, 13).sin().double()
        return (torch.arange(28).view(4, 7) ** 2 + i) % 13, target


def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()


def shard(net, how, size):
    """`net` wrapped by "ddp" or "fsdp" (the blocks of a GPT one by one), or with its weights in
    shards: "rows", "columns" or "both" of a mesh; as it is for "dense" and "group"."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if how == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    if how == "fsdp":
        for part in (*getattr(net, "h", ()), net):
            fully_shard(part, mesh=init_device_mesh("cpu", (size,)))
    if how not in ("rows", "columns", "both"):
        return net
    mesh = init_device_mesh("cpu", (2, size // 2) if how == "both" else (size,))
    places = {"rows": [Shard(0)], "columns": [Shard(1)], "both": [Replicate(), Shard(0)]}[how]
    for layer in list(net.modules()):
        for name, p in list(layer.named_parameters(recurse=False)):
            setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, places)))
    return net


def moved(world, net, rule, how, steps=8):
    """Weights after steps of a rule on ranks that hold all of them, or shards. A NaN in one shard
    comes in between, and stops every shard. "dense" is the step of one process."""
    from torch.distributed.tensor import distribute_tensor

    agd.ROWS = 4  # of a polar factor: the ranks share them
    torch.manual_seed(0)
    kind = {"plain": Plain, "roles": Every, "gpt": Text, "tied": partial(Text, tied=True)}[net]
    net, twin = kind().double(), kind().double()
    names, split = [name for name, _ in net.named_parameters()], how in ("ddp", "group", "fsdp")
    if kind is not Plain:
        init_weights(net, torch.Generator().manual_seed(1))
        shares = {"depth": depth(net, net.batch(0)[0])}
        model = shard(net, how, world.size)
        params = model
    else:  # drawn as shards, and known by their names alone
        shares, model = {}, shard(net, how, world.size)
        init_weights(net.parameters(), torch.Generator().manual_seed(1))
        params = net.named_parameters()
    if rule == "spectral":
        group = torch.distributed.group.WORLD if how == "group" else None
        optimizer = agd.SpectralAGD(params, process_group=group, **shares)
    else:
        optimizer = AGD(params, **shares)
    etas = []
    for i in range(steps):
        x, y = net.batch(i)
        optimizer.zero_grad()
        if split:
            own = slice(world.rank, None, world.size)
            (model(x[own]) - y[own]).square().mean().backward()
            for p in net.parameters() if how == "group" else ():
                world.all_reduce(p.grad)
                p.grad /= world.size
        else:
            for p, q in zip(twin.parameters(), net.parameters()):
                p.data.copy_(whole(q))
                p.grad = None
            (twin(x) - y).square().mean().backward()
            for p, q in zip(twin.parameters(), net.parameters()):
                q.grad = p.grad.clone() if how == "dense" else distribute_tensor(
                    p.grad, q.device_mesh, q.placements)  # fmt: skip
        if i == steps // 2:
            before = [whole(p) for p in net.parameters()]
            if rule == "spectral":
                optimizer.eval()
                optimizer.train()
            kept = [p.grad.clone() for p in net.parameters()]
            bad = next(iter(net.parameters())).grad
            bad = bad.to_local() if hasattr(bad, "to_local") else bad
            period = {"both": world.size // 2, "ddp": 1, "group": 1}.get(how, world.size)
            if world.rank % period == 0:
                bad.view(-1)[0] = float("nan")
            optimizer.step()
            assert int(optimizer.skipped) == 1
            assert all(torch.equal(a, whole(p)) for a, p in zip(before, net.parameters()))
            for p, g in zip(net.parameters(), kept):
                p.grad = g
        optimizer.step()
        etas.append(optimizer.eta.item())
    given = {"eta": etas, "L": optimizer.L, "drifted": []}
    given["weights"] = dict(zip(names, map(whole, net.parameters())))
    if how in ("ddp", "group"):
        given["drifted"] = world.ranks_that_differ(net.parameters())
    if rule == "spectral":
        given["clock"] = [t.item() for t in optimizer.clock()]
        optimizer.eval()
        given["average"] = dict(zip(names, map(whole, net.parameters())))
    return given


def along_kernel(world):
    """How AGD refuses a weight that is sharded along its kernel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    w = torch.zeros(6, 1, 3, 3)
    w = distribute_tensor(w, init_device_mesh("cpu", (world.size,)), [Shard(2)])
    try:
        AGD([("conv.weight", nn.Parameter(w))])
    except ValueError as error:
        return str(error)


def several(world, cases):
    """What these functions return, [name, arguments] each, one after the other."""
    return [globals()[name](world, **arguments) for name, arguments in cases]


def main():
    function, out, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    seconds = kwargs.pop("seconds", 60)
    try:
        world = distributed.start(CPU, "--distribute" in sys.argv, seconds)
    except distributed.LaunchError as error:
        sys.exit(f"error: {error}")
    given = globals()[function](world, **kwargs)
    torch.save(given, os.path.join(out, f"{world.rank}.pt"))
    world.leave(0)


if __name__ == "__main__":
    main()
