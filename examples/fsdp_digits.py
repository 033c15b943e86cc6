"""AGD on a network that torch's fully_shard (FSDP2) divides among processes, on GPUs or on CPUs:

    torchrun --nproc_per_node 2 -m examples.fsdp_digits

`python -m examples.fsdp_digits` is one process alone. On CPUs torch 2.6 cannot shard; 2.14 can.
Needs nothing beyond requirements.txt. 99 % of the test digits after a few seconds on a CPU.
"""

import os
import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from agd import AGD, depth
from data import load


def sharded(device):
    """(network in shards, its optimiser)."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU(),
        nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10),
    ).to(device)  # fmt: skip
    L = depth(net, torch.zeros(2, 64, device=device))  # shards do not show how layers are joined
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (net[1], net[4], net):
        fully_shard(part, mesh=mesh)
    return net, AGD(net, depth=L)


def train(net, optimizer, data, epoch):
    """Returns (mean loss, test accuracy, eta)."""
    data.train.set_epoch(epoch)
    losses = []
    for images, labels in data.train:  # this process has its share of the batch
        loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()  # averages the gradients of all processes
        optimizer.step()
        losses.append(loss.detach())
    images, labels = next(iter(data.test))
    with torch.no_grad():
        accuracy = (net(images).argmax(1) == labels).float().mean()
    means = torch.stack([torch.stack(losses).mean(), accuracy]) / dist.get_world_size()
    dist.all_reduce(means)
    return *means.tolist(), optimizer.eta.item()


def state(net, optimizer):
    return dict(zip(("net", "optimizer"), get_state_dict(net, optimizer)))


def main(epochs=6, folder=None):
    """Saves a checkpoint in `folder` before the last epoch, and goes on from it in another network.
    Returns (mean loss, test accuracy, eta) of each epoch."""
    gpu, place = torch.cuda.is_available(), os.environ.get("LOCAL_RANK", 0)
    device = torch.device(f"cuda:{place}" if gpu else "cpu")
    if gpu:
        torch.cuda.set_device(device)
    # Without torchrun: a group of this process.
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", **alone)
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # every process draws the same weights
    # Of 1,408 images: each batch is one of 64, and each process has as many of them.
    data = load("digits", None, 64, 360, device, rank=rank, size=size, train_examples=1408)
    (net, optimizer), rows = sharded(device), []
    with tempfile.TemporaryDirectory() as own:
        paths = [folder or own]
        dist.broadcast_object_list(paths)  # one folder, which all see
        for epoch in range(1, epochs + 1):
            if epoch == epochs:
                dcp.save(state(net, optimizer), checkpoint_id=paths[0])
                net, optimizer = sharded(device)
                saved = state(net, optimizer)
                dcp.load(saved, checkpoint_id=paths[0])
                set_state_dict(net, optimizer, model_state_dict=saved["net"],
                               optim_state_dict=saved["optimizer"])  # fmt: skip
            rows.append(train(net, optimizer, data, epoch))
            if rank == 0:
                print("epoch {}: loss {:.3f}, test accuracy {:.1%}, eta {:.3f}".format(
                    epoch, *rows[-1]), flush=True)  # fmt: skip
    dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
