"""Functions that tests run as the ranks of a group: python -m tests.ranks FUNCTION OUT [JSON]."""

import json
import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.nn as nn

import agd
import distributed
import main as program
from agd import AGD, depth, init_weights
from data import load
from runs.name import name_and_settings
from training import epochs
from training.control import Requests
from training.gradient import Gradient
from training.losses import mse
from training.step import evaluate, train_epoch

CPU = torch.device("cpu")


def net_of(norms=False, dtype=torch.float64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, bias=False)]
    layers += [nn.BatchNorm2d(6, affine=False)] if norms else []
    layers += [nn.ReLU(), nn.Flatten(), nn.Linear(216, 10, bias=False)]
    net = nn.Sequential(*layers).to(dtype)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    return net


class As:
    """Batches with inputs of another dtype, a pass after the other."""

    def __init__(self, batches, dtype):
        self.batches, self.dtype = batches, dtype
        self.batch_size, self.size = batches.batch_size, batches.size
        self.examples = batches.examples

    @property
    def position(self):
        return self.batches.position

    def __iter__(self):
        for inputs, labels in self.batches:
            yield inputs.to(self.dtype), labels


def digits(world, train_bs=100):
    data = load("digits", "", train_bs, 77, CPU, rank=world.rank, size=world.size)
    return As(data.train, torch.float64), As(data.test, torch.float64)


def train(world, net, gradient, epochs, train_bs=100):
    """The loss of each step, and what the test set gives."""
    batches, test = digits(world, train_bs)
    optimizer, losses = AGD(net.parameters()), []
    for epoch in range(1, epochs + 1):
        batches.batches.set_epoch(epoch)
        totals = train_epoch(gradient.net, batches, mse, optimizer, gradient)
        losses += totals.read(world.all_reduce)["steps"]["loss"]
    world.broadcast(net.buffers())
    tested = evaluate(net, test, mse).read(world.all_reduce)
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
    found = {}
    for parts in micro_batches:
        net = net_of()
        gradient = Gradient(world.wrap(net), mse, world, -(-100 // world.size // parts))
        found[parts] = train(world, net, gradient, epochs)
    return found


def norms(world, sync, train_bs=100, micro_bs=None, epochs=2):
    """The same of a net with batch norm."""
    net = net_of(norms=True)
    gradient = Gradient(world.wrap(net, sync_bn=sync), mse, world, micro_bs, sync_bn=sync)
    return train(world, net, gradient, epochs, train_bs)


def statistics(world, sync, micro_bs):
    """The buffers of a network after an epoch, and after recalibration with other weights; and
    where the training data stand before and after that."""
    net, data = net_of(norms=True, dtype=torch.float32), load(
        "digits", "", 100, 77, CPU, rank=world.rank, size=world.size)  # fmt: skip
    gradient = Gradient(world.wrap(net, sync_bn=sync), mse, world, micro_bs, sync_bn=sync)
    data.train.set_epoch(3)
    train_epoch(gradient.net, data.train, mse, AGD(net.parameters(), gain=0), gradient)
    found = {"trained": net[1].running_mean.clone()}
    with torch.no_grad():
        net[0].weight.mul_(2)
    for when in ("before", "after"):
        train = data.train
        found[when] = train.position, train.epoch, train.missing, train.order().tolist()
        if when == "before":
            net.train()
            course = SimpleNamespace(net=net, gradient=gradient, world=world, data=data)
            epochs.recalibrate(course, 3)
    return {**found, "buffers": dict(net.named_buffers())}


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
        found = train(world, net, gradient, 2)
    except Exception as error:
        return {"error": world.failed(error)[0]}
    return {**found, "micro_bs": gradient.micro_bs}


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


def runs(world, several, norms=False):
    """(exit code, looks, whether the log was at its end) of runs of main.py in this group, one
    after the other: of each the flags and, for each rank, the Signalled's numbers. With `norms` the
    network has batch norm. Rank 0's disk is slow."""
    found, log = [], program.RunLog.log
    if world.rank == 0:
        program.RunLog.log = lambda run, *rows: time.sleep(0.03) or log(run, *rows)
    if norms:
        program.build = lambda *args: net_of(norms=True, dtype=torch.float32)
    for flags, numbers in several:
        requests = Signalled(numbers.get(str(world.rank), {}))
        args = flags.parse(["--cpu", "--distribute", *flags])
        code = program.train(args, world, requests)
        path = program.RunLog(args.out, name_and_settings(vars(args))[0], {}).log_path
        found.append((code, requests.looks, '{"kind": "end"' in path.read_text()))
    return found


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


def hang(world):
    """Rank 1 fails by itself, the others wait for it in a collective."""
    if world.rank == 1:
        world.failed(ValueError("lost my way"))
        time.sleep(1)
        os._exit(1)
    try:
        world.broadcast_object()
    except RuntimeError as error:
        return world.failed(error)[0]


class Net(nn.Module):
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


def every_role(world, how, steps=6):
    """As `sharded`, of a network with every role: by fully_shard, or with all weights in shards of
    rows, or "dense"."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.manual_seed(0)
    net, twin = Every().double(), Every().double()
    init_weights(net, torch.Generator().manual_seed(1))
    x = torch.arange(24).view(3, 8) % 11
    shares = depth(net, x)
    mesh = init_device_mesh("cpu", (world.size,))
    if how == "fsdp":
        fully_shard(net, mesh=mesh)
    elif how == "rows":
        for layer in list(net.modules()):
            for name, p in list(layer.named_parameters(recurse=False)):
                p = nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
                setattr(layer, name, p)
    optimizer, etas = AGD(net, depth=shares), []
    for i in range(steps):
        whole = [p.detach() if how == "dense" else p.full_tensor() for p in net.parameters()]
        for p, q in zip(twin.parameters(), whole):
            p.data.copy_(q)
            p.grad = None
        (twin((x + i) % 11) - 1).square().mean().backward()
        for p, q in zip(twin.parameters(), net.parameters()):
            q.grad = p.grad.clone() if how == "dense" else distribute_tensor(
                p.grad, q.device_mesh, q.placements)  # fmt: skip
        optimizer.step()
        etas.append(optimizer.eta.item())
    whole = [p.detach() if how == "dense" else p.full_tensor() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    return outcome(optimizer, names, whole, etas)


def whole(p):
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone()


def spectral(world, how, rows=4, steps=8):
    """What SpectralAGD gives for a network with every role, its polar factors in pieces of so many
    rows: on one device ("dense"), on ranks that hold all and share the polar factors, by "ddp" or
    by a "group", or with the weights in shards, by "fsdp" or in "rows". A NaN comes in between."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    agd.ROWS = rows
    torch.manual_seed(0)
    net, twin = Every().double(), Every().double()
    init_weights(net, torch.Generator().manual_seed(1))
    x, y = torch.arange(24).view(4, 6) % 11, torch.arange(20.0).view(4, 5).sin().double() * 5
    shares, names = depth(net, x), [name for name, _ in net.named_parameters()]
    mesh, model = init_device_mesh("cpu", (world.size,)), net
    if how == "fsdp":
        fully_shard(net, mesh=mesh)
    elif how == "rows":
        for layer in list(net.modules()):
            for name, p in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
    elif how == "ddp":
        model = nn.parallel.DistributedDataParallel(net)
    group = torch.distributed.group.WORLD if how == "group" else None
    optimizer = agd.SpectralAGD(model, depth=shares, process_group=group)
    etas, split = [], how in ("ddp", "group", "fsdp")
    for i in range(steps):
        batch = (x + i) % 11
        optimizer.zero_grad()
        if split:
            own = slice(world.rank, None, world.size)
            (model(batch[own]) - y[own]).square().mean().backward()
            for p in net.parameters() if how == "group" else ():
                world.all_reduce(p.grad)
                p.grad /= world.size
        else:
            for p, q in zip(twin.parameters(), net.parameters()):
                p.data.copy_(whole(q))
                p.grad = None
            (twin(batch) - y).square().mean().backward()
            for p, q in zip(twin.parameters(), net.parameters()):
                q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements) \
                    if how == "rows" else p.grad.clone()  # fmt: skip
        if i == steps // 2:
            before = [whole(p) for p in net.parameters()]
            optimizer.eval(), optimizer.train()
            assert all(torch.equal(a, whole(p)) for a, p in zip(before, net.parameters()))
            kept = [p.grad.clone() for p in net.parameters()]
            bad = net.last.weight.grad
            bad = bad.to_local() if hasattr(bad, "to_local") else bad
            if bad.numel() and (how != "rows" or world.rank == 0):
                bad.view(-1)[0] = float("nan")
            optimizer.step()
            assert int(optimizer.skipped) == 1
            assert all(torch.equal(a, whole(p)) for a, p in zip(before, net.parameters()))
            for p, g in zip(net.parameters(), kept):
                p.grad = g
        optimizer.step()
        etas.append(optimizer.eta.item())
    weights, clock = [whole(p) for p in net.parameters()], [t.item() for t in optimizer.clock()]
    optimizer.eval()
    return {"names": names, "weights": weights, "average": [whole(p) for p in net.parameters()],
            "eta": etas, "clock": clock, "L": optimizer.L,
            "drifted": [] if how in ("fsdp", "rows") else world.ranks_that_differ(net.parameters())}


def outcome(optimizer, names, weights, etas):
    s = [x.blocks(p.shape)[2] if x.s is None else x.s
         for x, p in zip(optimizer.rules[0], optimizer.param_groups[0]["params"])]  # fmt: skip
    return {"names": names, "weights": weights, "eta": etas, "s": s, "L": optimizer.L}


def sharded(world, how, steps=10):
    """Weights after steps of AGD: "dense" on every rank, or sharded by "fsdp", or by "rows",
    "columns" or "both" of a mesh, without a change of the network's code."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    net = Net().double()
    names = [name for name, _ in net.named_parameters()]
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (world.size,))
        for layer in net.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif how == "kernel":
        mesh = init_device_mesh("cpu", (world.size,))
        w = nn.Parameter(distribute_tensor(net.conv.weight.detach(), mesh, [Shard(2)]))
        try:
            AGD([("conv.weight", w)])
        except ValueError as error:
            return str(error)
    elif how != "dense":
        shape = (2, world.size // 2) if how == "both" else (world.size,)
        mesh = init_device_mesh("cpu", shape)
        places = {"rows": [Shard(0)], "columns": [Shard(1)], "both": [Replicate(), Shard(0)]}[how]
        for layer in net.children():
            w = distribute_tensor(layer.weight.detach(), mesh, places)
            layer.weight = nn.Parameter(w)
    init_weights(net.parameters(), torch.Generator().manual_seed(1))
    optimizer, etas = AGD(net.named_parameters()), []
    generator = torch.Generator().manual_seed(2)
    for i in range(steps):
        x = torch.randn(12, 1, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (12,), generator=generator)
        if how in ("dense", "fsdp"):
            x, y = x[world.rank :: world.size], y[world.rank :: world.size]
            mse(net(x), y).mean().backward()
            if how == "dense":
                for p in net.parameters():
                    world.all_reduce(p.grad)
                    p.grad /= world.size
        else:  # gradients from a dense copy: what is tested is the step
            dense = Net().double()
            for p, q in zip(dense.parameters(), net.parameters()):
                p.data.copy_(q.full_tensor())
            mse(dense(x), y).mean().backward()
            for p, q in zip(dense.parameters(), net.parameters()):
                q.grad = distribute_tensor(p.grad, q.device_mesh, q.placements)
        if i == steps // 2 and how != "dense":  # a NaN in one shard stops every shard
            weights = [p.to_local().clone() for p in net.parameters()]
            spoilt = net.same.weight.grad.to_local()
            kept = spoilt.clone()
            if world.rank % (world.size // 2 if how == "both" else world.size) == 0:
                spoilt.view(-1)[0] = float("nan")
            optimizer.step()
            assert all(torch.equal(w, p.to_local()) for w, p in zip(weights, net.parameters()))
            assert int(optimizer.skipped) == 1
            spoilt.copy_(kept)
        optimizer.step()
        optimizer.zero_grad()
        etas.append(optimizer.eta.item())
    whole = [p.detach() if how == "dense" else p.full_tensor() for p in net.parameters()]
    return outcome(optimizer, names, whole, etas)


def main():
    function, out, kwargs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    seconds = kwargs.pop("seconds", 60)
    try:
        world = distributed.start(CPU, "--distribute" in sys.argv, seconds)
    except distributed.LaunchError as error:
        sys.exit(f"error: {error}")
    found = globals()[function](world, **kwargs)
    torch.save(found, os.path.join(out, f"{world.rank}.pt"))
    world.stop()


if __name__ == "__main__":
    main()
