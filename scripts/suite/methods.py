"""The methods that the suite compares, each with the one setting that it has on all workloads."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn as nn

from agd import AGD, SpectralAGD
from training.schedule import scheduled


class Method(NamedTuple):
    """`make(net, steps, **setting)` returns the optimiser of a run of `steps`.

    `words` describe the setting. `package` is the name on PyPI of an optional package that `make`
    imports. `setting` are keyword arguments of every run.
    """

    title: str
    make: Callable
    words: str
    package: str | None = None
    setting: dict = {}


def missing(name):
    """Why METHODS[name] cannot run here, or None."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        return "it needs torch 2.9 or newer"
    package = METHODS[name].package
    return f"pip install {package}" if package and not find_spec(package) else None


def adamw(net, steps, rate, decay):
    return scheduled(torch.optim.AdamW(net.parameters(), rate, weight_decay=decay), steps)


# AdamW's trials on each workload: every rate, half a decade apart, with a small and a large decay.
TRIALS = tuple(
    {"rate": rate, "decay": decay}
    for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2) for decay in (0.01, 0.3)
)  # fmt: skip

# One setting for all workloads: scripts.suite.protocol.calibrated chooses it among the trials.
NADAMW = {"rate": 3e-3, "decay": 0.01}


def nadamw(net, steps, rate, decay):
    """AlgoPerf's baseline, mlcommons/algorithmic-efficiency,
    reference_algorithms/paper_baselines/nadamw: without torch's slow rise of Nesterov's momentum,
    which a large `momentum_decay` ends before the first step."""
    return scheduled(
        torch.optim.NAdam(
            net.parameters(), rate, weight_decay=decay, momentum_decay=1e6,
            decoupled_weight_decay=True,
        ),
        steps,
    )  # fmt: skip


def prodigy(net, steps):
    """konstmish/prodigy, README.md: lr 1 for all networks; cosine annealing, and no warm-up, in
    which the method might overestimate its rate."""
    from prodigyopt import Prodigy

    return scheduled(Prodigy(net.parameters(), lr=1.0), steps, warmup=0)


def dadaptation(net, steps):
    """facebookresearch/dadaptation, README.md: lr 1, and the schedule that Adam would have. The
    default decay is 0, for which `decouple` changes nothing."""
    from dadaptation import DAdaptAdam

    return scheduled(DAdaptAdam(net.parameters(), lr=1.0), steps)


def schedule_free(net, steps):
    """The one setting of AlgoPerf's winner of the self-tuning rules: mlcommons/
    submissions_algorithms, submissions/self_tuning/schedule_free_adamw_v2/submission.py. Its
    step_hint, a baseline's budget, is `steps` here. Its code scales the decay with the bias
    correction of the second moment; the package's class, which is newer, does not."""
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(
        net.parameters(), lr=0.0025, betas=(1 - 0.1, 0.9955159689799007),
        weight_decay=0.08121616522670176, warmup_steps=int(0.02 * steps * 0.75),
    )  # fmt: skip


class Muon:
    """Muon for the hidden weights, convolutions flattened to (out, in * K), and AdamW for the rest.

    The setting is that of KellerJordan/Muon, README.md (eps: muon.py). `adjust_lr_fn="original"`
    is that repository's scale of a step, sqrt(max(1, rows / columns)).
    """

    def __init__(self, net, steps):
        hidden = hidden_weights(net)
        # torch's class takes matrices alone: each is a view of a weight, and shares its memory.
        self.matrices = [(p, nn.Parameter(p.detach().view(len(p), -1))) for p in hidden]
        self.rest = [p for p in net.parameters() if not any(p is q for q in hidden)]
        muon = torch.optim.Muon(
            [matrix for _, matrix in self.matrices], lr=0.02, momentum=0.95, weight_decay=0.01,
            adjust_lr_fn="original",
        )  # fmt: skip
        adam = torch.optim.AdamW(self.rest, 3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.01)
        self.optimizers = [scheduled(x, steps) for x in (muon, adam)]

    def zero_grad(self):
        for p in [p for p, _ in self.matrices] + self.rest:
            p.grad = None

    def step(self):
        for p, matrix in self.matrices:
            matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        for optimizer in self.optimizers:
            optimizer.step()


def hidden_weights(net):
    """The weights of layers, in the order of the modules, without embeddings, the first and the
    last: these, vectors, tokens and positions are AdamW's by KellerJordan/Muon, README.md."""
    weights, embeddings = [], []
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            if "weight" in name and p.ndim > 1:
                weights.append(p)
                if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                    embeddings.append(p)
    outer = {id(p) for p in (weights[0], weights[-1], *embeddings)}
    return list({id(p): p for p in weights if id(p) not in outer}.values())


METHODS = {
    "agd": Method("AGD", lambda net, steps: AGD(net), "none"),
    "spectral": Method("Spectral AGD", lambda net, steps: SpectralAGD(net), "none"),
    "prodigy": Method("Prodigy", prodigy, "lr 1, cosine", "prodigyopt"),
    "schedule_free": Method("Schedule-free AdamW", schedule_free, "AlgoPerf's", "schedulefree"),
    "dadaptation": Method("D-Adapted Adam", dadaptation, "lr 1, cosine", "dadaptation"),
    "muon": Method("Muon, AdamW", Muon, "lr 0.02 and 3e-4, cosine"),
    "nadamw": Method("NAdamW", nadamw, "calibrated, cosine", setting=NADAMW),
    "adamw": Method("AdamW, tuned", adamw, "tuned for each, cosine"),
}
