"""What a type checker sees of an installed agd. Nothing runs this file: tests/test_package.py has
`mypy --strict` read it, where a comment that ignores no error is one."""

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import agd
from agd import AGD, SpectralAGD, depth, init_weights, recalibrate

first, last = nn.Linear(8, 4), nn.Linear(4, 2)
net = nn.Sequential(first, nn.BatchNorm1d(4), last)
images, labels = torch.randn(6, 8), torch.randint(2, (6,))
batches = DataLoader(TensorDataset(images, labels), batch_size=3)


def closure() -> Tensor:
    loss = nn.functional.cross_entropy(net(images), labels)
    torch.autograd.backward(loss)
    return loss


init_weights(net)
init_weights(net.parameters(), torch.Generator().manual_seed(0))
init_weights(net, inputs=images, roles={"2.weight": "matrix"})
init_weights(net, inputs=(images,))
init_weights(net, inputs={"input": images})

shares = depth(net, images)
assert_type(shares["0.weight"], float)
assert_type(shares.outputs, frozenset[str])

optimizer = AGD(net)
AGD(list(net.parameters()))
AGD(net.named_parameters(), gain=torch.tensor(0.5))
AGD([{"params": [first.weight], "gain": 0.5}, {"params": [last.weight], "gain": 1}], fused=False)
AGD(net, gain=1, fused=None, depth=3, roles={"*.bias": "gain"})
AGD(net, depth=shares)
assert_type(optimizer.step(), None)
assert_type(optimizer.step(closure), Tensor)
assert_type(optimizer.step(lambda: float(closure())), float)
assert_type(optimizer.eta, Tensor)
assert_type(optimizer.G, Tensor)
assert_type(optimizer.skipped, Tensor)
assert_type(optimizer.L, float)
assert_type(optimizer.table(), str)
optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))], "gain": 0.0})
optimizer.load_state_dict(optimizer.state_dict())
optimizer.zero_grad(set_to_none=True)
LambdaLR(optimizer, lambda epoch: 1.0)
any_optimizer: torch.optim.Optimizer = optimizer

spectral = SpectralAGD(net, gain=0.5, depth=shares, process_group=None)
assert_type(spectral.step(closure), Tensor)
assert_type(spectral.eta, Tensor)
assert_type(spectral.clock(), tuple[Tensor, Tensor])
spectral.eval()
recalibrate(net, batches)
recalibrate(net, [images])
spectral.train()
assert_type(agd.__version__, str)

AGD()  # type: ignore[call-arg]
AGD(net, 0.5)  # type: ignore[call-arg]
AGD(net, gian=2.0)  # type: ignore[arg-type]
AGD(net, lr=0.1)  # type: ignore[arg-type]
AGD(net, gain="1")  # type: ignore[arg-type]
AGD(net, fused="yes")  # type: ignore[arg-type]
AGD(net, depth="3")  # type: ignore[arg-type]
AGD(net, roles=["matrix"])  # type: ignore[arg-type]
AGD(3)  # type: ignore[arg-type]
SpectralAGD(net, fused=True)  # type: ignore[arg-type]
optimizer.eval()  # type: ignore[attr-defined]
optimizer.skipped = torch.tensor(0)  # type: ignore[misc]
optimizer.step(images)  # type: ignore[call-overload]
init_weights(net, generator=0)  # type: ignore[arg-type]
init_weights(net, input=images)  # type: ignore[call-arg]
recalibrate(net)  # type: ignore[call-arg]
depth([first.weight])  # type: ignore[arg-type]
agd.adg(net)  # type: ignore[attr-defined]
