"""What only a GPU can show, marked `gpu`: `python -m scripts.gpu_checks` runs these tests with time
limits. AGD_TEST_DEVICE=cpu rehearses them without a GPU."""

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.distributed as dist

import agd
import agd_kernels
from agd import AGD, Layout, Rule, SpectralAGD, TorchBackend, init_weights
from agd_kernels import cuda
from architecture import GPTS, build
from data import default_data_dir, load
from distributed.delayed import Glance
from runs.log import read_rows
from runs.provenance import environment
from scripts.benchmark.measure import by_clock, take_turns
from tests.conftest import ROOT, interpreter_fails
from tests.test_cuda_graph import Graph, epoch_of
from training.cuda_graph import GraphedSteps
from training.gradient import Gradient, compile_network
from training.losses import mse, xent
from training.metrics import Totals
from training.optimizers import make_optimizer
from training.precision import set_precision
from training.step import (
    Step,
    evaluate,
    set_training,
    show_average,
    take_steps,
    train_epoch,
)

CPU = torch.device("cpu")
WANTED = os.environ.get("AGD_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else None)
GPU = WANTED == "cuda"
DEVICE = torch.device("cuda", 0) if GPU else CPU
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WANTED is None, reason="there is no GPU here")]
needs_a_gpu = pytest.mark.skipif(not GPU, reason="a CPU has nothing like it")


@pytest.fixture
def record(record_property):
    """f(name, value) keeps a number, in the report of --junitxml."""

    def keep(name, value):
        print(f"{name}: {value}")
        record_property(name, json.dumps(value))

    return keep


def network(arch, shape=(3, 32, 32), classes=10, device=DEVICE):
    """Drawn on the CPU; in fp32 throughout, as main.py has it."""
    torch.manual_seed(0)
    net = build(arch, shape, classes)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    net.to(device)
    set_precision(net, "fp32", DEVICE)
    return net


def worst(ours, theirs):
    """The largest relative difference of two lists of tensors; NaN where there is one."""
    pairs = zip(ours, theirs, strict=True)
    return torch.stack([((a - b).norm() / b.norm()).double().cpu() for a, b in pairs]).max().item()


def test_machine(record):
    assert torch.zeros(3, device=DEVICE).sum() == 0
    for name, value in environment(DEVICE).items():
        record(name, value)
    if GPU and shutil.which("nvidia-smi"):
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30)
        print(smi.stdout)


@pytest.mark.skipif(not GPU and bool(interpreter_fails()), reason=str(interpreter_fails()))
@pytest.mark.skipif(not (GPU or INTERPRETED), reason="on a CPU, TRITON_INTERPRET=1 does it")
def test_kernels(record):
    """What AGD asks of them before it takes them: small weights of every layout."""
    difference = agd_kernels.disagreement(cuda.Backend, DEVICE, TorchBackend, Layout, Rule)
    record("largest relative difference", difference)
    assert difference < agd_kernels.TOLERANCE


def test_step_is_that_of_the_cpu(record):
    """By kernels and by torch's operations, of whole networks, in both layouts of weights."""
    differences = {"kernels": [], "torch": []}
    for arch in ("fcn", "resnet18", "vgg") if GPU else ("fcn",):
        drawn = network(arch, device=CPU)
        for layout, kind in product((torch.contiguous_format, torch.channels_last), differences):
            nets = [copy.deepcopy(drawn).to(x).to(memory_format=layout) for x in (CPU, DEVICE)]
            ours, theirs = (list(net.parameters()) for net in nets)
            for p, q in zip(ours, theirs):
                p.grad = torch.randn_like(p) * 1e-3
                q.grad = p.grad.to(DEVICE)
            before, updates = [p.detach().clone() for p in ours], []
            AGD(ours, fused=False).step()
            AGD(theirs, fused=None if kind == "kernels" else False).step()
            for weights in (ours, theirs):
                updates.append([p.detach().to(CPU) - w for p, w in zip(weights, before)])
            differences[kind].append(worst(*reversed(updates)))
    record("relative differences of the updates of networks", differences)
    assert all(x < 1e-5 for values in differences.values() for x in values)


def test_step_of_any_scale_and_without_a_finite_gradient():
    """Gradients from 1e-37 to 1e37 keep their direction; a NaN leaves every weight."""
    for k in range(-37, 38):
        p = torch.zeros(64, 32, device=DEVICE, requires_grad=True)
        p.grad = torch.randn(64, 32, device=DEVICE) * 10.0**k
        AGD([p]).step()
        g = -p.grad.double() / p.grad.double().norm()
        assert worst([p.double() / p.double().norm()], [g]) < 1e-6
    p = torch.randn(64, 32, device=DEVICE, requires_grad=True)
    p.grad = torch.randn_like(p)
    p.grad[3, 3] = float("nan")
    before, optimizer = p.detach().clone(), AGD([p])
    optimizer.step()
    assert torch.equal(p, before) and optimizer.skipped == 1


def test_spectral_polar_factor(record):
    """In bfloat16, as a GPU takes it: of operator norm 1, with nearly all of the nuclear norm."""
    x = torch.randn(8, 128, 384, device=DEVICE)
    x *= torch.logspace(0, -1.5, 384, device=DEVICE)
    D = agd._polar_bf16(x.clone())
    values = torch.linalg.svdvals(D.cpu().double())
    share = (x * D).sum((1, 2)).cpu() / torch.linalg.svdvals(x.cpu().double()).sum(1)
    record("operator norms", [values.min().item(), values.max().item()])
    record("share of the nuclear norm", share.min().item())
    assert 0.97 < values.max() < 1.03 and share.min() > 0.97


def test_spectral_step_is_that_of_the_cpu(record):
    """Of whole networks, to what bfloat16 lets through; and no step of it reads the device."""
    differences = {}
    for arch in ("fcn", "resnet18") if GPU else ("fcn",):
        nets = [network(arch, device=CPU)]
        nets.append(copy.deepcopy(nets[0]).to(DEVICE))
        optimizers = [SpectralAGD(net, depth=10.0) for net in nets]
        for i in range(4):
            for p, q in zip(*(net.parameters() for net in nets)):
                p.grad = torch.randn_like(p) * 1e-3
                q.grad = p.grad.to(DEVICE)
            optimizers[0].step()
            with watched(i > 1):
                optimizers[1].step()
        for optimizer in optimizers:
            optimizer.eval()
        weights = [[p.detach().cpu() for p in net.parameters()] for net in nets]
        etas = [optimizer.eta.item() for optimizer in optimizers]
        differences[arch] = worst(*weights), abs(etas[0] / etas[1] - 1)
    record("relative differences of the weights and of eta", differences)
    assert all(x < 0.02 for values in differences.values() for x in values)


@pytest.mark.parametrize(
    ("rule", "arch", "epochs", "part"),
    [(AGD, "fcn", 5, None), (SpectralAGD, "fcn", 3, 6400),
     *([(AGD, "resnet18", 2, 12_800)] if GPU else [])],
)  # fmt: skip
def test_graphs_are_the_loop(rule, arch, epochs, part, record):
    """Epochs by CUDA graphs and by the loop; in the last one CUDA watches for reads of the host."""
    trained, ms = [], []
    with torch.cuda.stream(torch.cuda.Stream(DEVICE)) if GPU else nullcontext():
        for by_graph in (False, True):
            images = part if GPU else None
            data = load("cifar10", default_data_dir(), 128, 10_000, DEVICE, train_examples=images)
            net = network(arch)
            optimizer, graph = rule(net.named_parameters()), Graph()
            graph.optimizer = optimizer
            how = {"required": True, "record": None if GPU else graph.record}
            graphed = GraphedSteps(Step(net, mse, optimizer), data.train, **how)
            for epoch in range(1, epochs + 1):
                data.train.set_epoch(epoch)
                wait_for_the_device()
                start = time.perf_counter()
                with watched(epoch == epochs):
                    totals = (epoch_of(graphed) if by_graph else
                              train_epoch(net, data.train, mse, optimizer))  # fmt: skip
                wait_for_the_device()
                seconds = time.perf_counter() - start
                assert totals.read()["loss"] < 2
            trained.append([p.detach().double() for p in net.parameters()])
            ms.append(seconds / len(data.train) * 1e3)
    difference = worst(*trained)
    figures = {"largest difference": difference, "ms, loop": ms[0], "ms, graph": ms[1]}
    record(f"{arch}, {rule.__name__}", figures)
    assert arch != "fcn" or difference < 1e-6  # sums of cuDNN's gradients have no fixed order


def text_run(rule, how, steps):
    """(The losses of the first steps of a GPT on characters, the weights after them). `how`:
    "eager", "graph" or "compiled"."""
    data = load("shakespeare", None, 16, 64, DEVICE, context=64, epoch_steps=steps)
    torch.manual_seed(0)
    sizes = {"depth": 4, "width": 128} if GPU else {"depth": 1, "width": 32}
    net = build("gpt", data.shape, data.classes, **sizes).to(DEVICE)
    set_precision(net, "fp32", DEVICE)
    optimizer = make_optimizer(rule, net, data.shape, layers="paths", seed=0)
    compiled = compile_network(net) if how == "compiled" else None
    step = Step(net, xent, optimizer, Gradient(net, xent, compiled=compiled))
    data.train.set_epoch(1)
    if how == "graph":
        record = None if GPU else Graph(optimizer).record
        totals = epoch_of(GraphedSteps(step, data.train, required=True, record=record))
    else:
        totals = Totals()
        set_training(net, optimizer)
        for _ in take_steps(step, data.train, totals):
            pass
        show_average(optimizer)
    weights = [p.detach().double() for p in net.parameters()]
    return totals.read(positions=64)["steps"]["loss"], weights


def test_text_is_the_same_eager_by_graph_and_compiled(record):
    """Up to rounding, which steps of the spectral rule in bfloat16 enlarge."""
    steps = 60 if GPU else 6
    for rule in ("agd", "spectral"):
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)) if GPU else nullcontext():
            eager, weights = text_run(rule, "eager", steps)
            assert eager[-1] < eager[0]
            for how, bound in (("graph", 1e-3), ("compiled", 1e-2)):
                if how == "compiled" and rule == "spectral" and not GPU:
                    continue  # a CPU compiles for half a minute
                losses, others = text_run(rule, how, steps)
                apart = [abs(a / b - 1) for a, b in zip(losses, eager, strict=True)]
                record(f"{rule}, {how}", {"first loss": apart[0], "losses": max(apart),
                                          "weights": worst(others, weights)})  # fmt: skip
                assert apart[0] < 1e-5 and max(apart) < bound


def test_text_speed(record):
    """GPT-2 small in bf16, eager: tokens a second and the greatest memory, for each optimiser."""
    context, batch, vocabulary = (1024, 32, 50257) if GPU else (32, 2, 300)
    sizes = GPTS["gpt2"]._asdict() if GPU else {"depth": 1, "width": 32, "heads": 2, "tied": True}
    sizes.pop("context", None)
    x = torch.randint(vocabulary, (batch, context), device=DEVICE)
    for name in ("agd", "spectral", "torch.optim.AdamW"):
        net = build("gpt2", (context,), vocabulary, **sizes).to(DEVICE)
        set_precision(net, "bf16", DEVICE)
        step = Step(net, xent, make_optimizer(name, net, (context,), layers="paths", drawn=False))
        if GPU:
            torch.cuda.reset_peak_memory_stats(DEVICE)
        works = {"step": lambda step=step: step(x, x)}
        seconds = min(take_turns(works, 10 if GPU else 1, by_clock(DEVICE), 2)["step"])
        figures = {"tokens per second": batch * context / seconds}
        if GPU:
            figures["GB"] = torch.cuda.max_memory_allocated(DEVICE) / 1e9
        record(name, figures)
        del net, step, works


def wait_for_the_device():
    if GPU:
        torch.cuda.synchronize()


class watched:
    """A context in which CUDA's own check raises when the host waits for the device, if `yes`."""

    def __init__(self, yes=True):
        self.yes = yes and GPU

    def __enter__(self):
        if self.yes:
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_):
        if self.yes:
            torch.cuda.set_sync_debug_mode("default")


@needs_a_gpu
def test_no_host_read_in_an_epoch():
    data = load("cifar10", default_data_dir(), 128, 1000, DEVICE)
    net = network("fcn")
    optimizer = AGD(net.parameters())
    train_epoch(net, data.train, mse, optimizer).read()
    evaluate(net, data.test, mse).read()
    data.train.set_epoch(1)
    train, test = iter(data.train), iter(data.test)
    next(train), next(test)  # the epoch's draws have gone to the device with the first batch
    with watched():
        totals = train_epoch(net, train, mse, optimizer)
        totals.means()
        tested = evaluate(net, test, mse)
    assert totals.read()["loss"] < 2 and tested.read()["acc"] >= 0


@needs_a_gpu
def test_a_glance_waits_for_nothing():
    glance, x = Glance(DEVICE), torch.arange(2.0, device=DEVICE)
    glance.ask(x)  # takes the memory on the host
    torch.cuda.synchronize()
    assert glance.answer() == [0.0, 1.0] and glance.answer() is None
    torch.cuda._sleep(1_000_000_000)  # cycles, some half a second
    began = time.perf_counter()
    with watched():
        glance.ask(x + 1)
        glance.ask(x + 2)  # one is on its way
        assert glance.answer() is None
    assert time.perf_counter() - began < 0.2
    torch.cuda.synchronize()
    assert glance.answer() == [1.0, 2.0] and glance.answer() is None


@needs_a_gpu
def test_memory_that_runs_out(record):
    """A batch that does not fit is halved and repeated: the gradient is that of small passes."""
    results = []
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(DEVICE)[1]
    images, labels = torch.randn(4096, 3, 32, 32, device=DEVICE), torch.arange(4096) % 10
    labels = labels.to(DEVICE)
    try:
        for fraction, micro_bs in ((min(1.0, 4e9 / total), None), (1.0, 64)):
            torch.cuda.set_per_process_memory_fraction(fraction, DEVICE)
            net = wide_network()
            gradient = Gradient(net, mse, micro_bs=micro_bs)
            gradient(images, labels)
            results.append(([p.grad.double() for p in net.parameters()], gradient.micro_bs))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    (halved, micro_bs), (small, _) = results
    record("micro_bs", micro_bs)
    record("largest relative difference of a gradient", worst(halved, small))
    assert micro_bs is not None and worst(halved, small) < 1e-3


def wide_network():
    """Without batch norm, whose statistics are those of each pass."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 256, 3, bias=False), torch.nn.ReLU(),
        torch.nn.Conv2d(256, 64, 3, bias=False), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False),
    ).to(DEVICE)  # fmt: skip
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    set_precision(net, "fp32", DEVICE)
    return net


@needs_a_gpu
def test_resnet50_rate(record):
    """Images a second at 224 pixels in TF32, forward, backward and step, by batch size."""
    net, rates = network("resnet50", (3, 224, 224), 1000), {}
    set_precision(torch.nn.Module(), "tf32", DEVICE)  # which is the process's
    step = Step(net, mse, AGD(net.parameters()))
    for batch in [2**k for k in range(3, 10)]:
        try:
            x = torch.randn(batch, 3, 224, 224, device=DEVICE)
            y = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
            works = {"step": lambda x=x, y=y: step(x, y)}
            rates[batch] = batch / min(take_turns(works, 15, by_clock(DEVICE), 2)["step"])
        except torch.OutOfMemoryError:
            break
    record("device_name", environment(DEVICE)["device_name"])
    record("images per second", rates)


def test_collectives_of_one_rank():
    """The collectives of main.py where no second GPU is: NCCL takes them."""
    dist.init_process_group("nccl" if GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for dtype, op in ((torch.int32, dist.ReduceOp.MAX), (torch.float32, dist.ReduceOp.SUM)):
            x = torch.full((), 3, dtype=dtype, device=DEVICE)
            dist.all_reduce(x, op, async_op=True).wait()
            parts = [torch.zeros_like(x)]
            dist.all_gather(parts, x)
            assert x == 3 and parts == [x]
        box, gathered = [{"epoch": 3}], [None]
        dist.broadcast_object_list(box, 0, device=DEVICE)
        dist.all_gather_object(gathered, "here")
        assert box == [{"epoch": 3}] and gathered == ["here"]
        net = network("fcn")
        model = torch.nn.parallel.DistributedDataParallel(net, device_ids=[DEVICE] if GPU else None)
        x, y = torch.randn(8, 3, 32, 32, device=DEVICE), torch.arange(8, device=DEVICE)
        loss, _ = Gradient(model, mse)(x, y)
        assert loss.isfinite().all() and all(p.grad is not None for p in net.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="it takes two GPUs")
def test_ranks_of_nccl_are_one_process(record, tmp_path):
    """The losses of two epochs of main.py with a rank a GPU."""
    losses, ranks = [], str(torch.cuda.device_count())
    flags = ["main.py", "--dataset", "digits", "--arch", "resnet18", "--epochs", "2"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    for launcher, more in (([], []), (torchrun, ["--distribute", "--sync_bn"])):
        out = tmp_path / str(len(launcher))
        subprocess.run([sys.executable, *launcher, *flags, "--device", "cuda", *more, "--out", out],
                       check=True, cwd=ROOT, stdout=subprocess.DEVNULL)  # fmt: skip
        (log,) = (out / "logs").glob("*.jsonl")
        losses.append([row["train_loss"] for row in read_rows(log) if row["kind"] == "epoch"])
    difference = max(abs(a - b) / a for a, b in zip(*losses, strict=True))
    record("largest relative difference of a loss", difference)
    assert difference < 1e-3
