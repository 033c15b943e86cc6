"""Optimisers of any class: each class of torch.optim and timm.optim trains and goes on to the bit,
or is refused in one sentence before the first step; so does each of a user's own."""

import importlib
import inspect
import re
import sys

import pytest
import torch

from architecture.gpt import GPT
from runs.checkpoint import pack, unpack
from tests.conftest import ROOT
from tests.program import SMALL, alike, only, same, train, weights
from training.choices import OF_TORCH, OPTIMIZERS
from training.control import STOP
from training.foreign import Unusable, foreign, load_state
from training.optimizers import make_optimizer

FLAGS = [*SMALL, "--cpu"]
# What the sentence says of a class that cannot train here.
REFUSED = {
    "torch.optim.LBFGS": "several passes a step",
    "torch.optim.Optimizer": "missing 1 required positional argument: 'defaults'",
    "torch.optim.SparseAdam": "does not support dense gradients",
    "timm.optim.Adahessian": "it differentiates gradients",
    "timm.optim.Lookahead": "a subclass whose constructor takes (params, lr)",
    "timm.optim.SGDP": "give --lr",
}


def classes(package):
    """The names package.Class of all its optimisers; none where it is not installed."""
    try:
        members = vars(importlib.import_module(package))
    except ImportError:
        return []
    return [f"{package}.{name}" for name, kind in members.items()
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]  # fmt: skip


@pytest.fixture
def trains(tmp_path, capsys):
    """f(*flags): the run is the same to the bit where it has been broken within an epoch and
    between two. f(*flags, refused=words): it is refused, with these words."""

    def trains(*flags, refused=None):
        flags = [*FLAGS, *flags, "--out"]
        capsys.readouterr()
        if refused is not None:
            try:
                code = train(*flags, tmp_path / "refused")
            except SystemExit as end:  # from the command line
                code = end.code
            error = capsys.readouterr().err
            error = re.sub("       python .* --help lists the flags\n", "", error)
            assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            assert refused in error, error
            assert not list(tmp_path.rglob("*.pt"))
            return
        assert train(*flags, tmp_path / "whole") == 0
        for epochs, asked, code in ((2, {2: STOP}, 130), (1, {}, 0), (2, {}, 0)):
            assert train(*flags, tmp_path / "parts", "--epochs", epochs, asked=asked) == code
        error = capsys.readouterr().err
        assert "error" not in error, error
        same(tmp_path / "parts", tmp_path / "whole")
        return tmp_path / "whole"

    return trains


@pytest.mark.parametrize("name", classes("torch.optim"))
def test_every_class_of_torch_trains_and_resumes_or_is_refused(name, trains):
    trains("--optimizer", name, refused=REFUSED.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", classes("timm.optim"))  # none, and a skip, without timm
def test_every_class_of_timm_trains_and_resumes_or_is_refused(name, trains):
    trains("--optimizer", name, refused=REFUSED.get(name))


@pytest.mark.slow
def test_a_class_of_timm_that_needs_a_rate_takes_one(trains):
    pytest.importorskip("timm")
    trains("--optimizer", "timm.optim.SGDP", "--lr", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*classes("torch.optim"), *classes("timm.optim")])
def test_every_class_takes_a_decay_of_matrices_or_is_refused(name, trains):
    """torch's Muon takes matrices alone."""
    package, _, own = name.rpartition(".")
    takes = inspect.signature(getattr(importlib.import_module(package), own)).parameters
    refused = {"torch.optim.Muon": "2D"}.get(name, REFUSED.get(name))
    if not {"weight_decay", "kwargs"} & takes.keys() and "lbfgs" not in name.lower():
        refused = f"--weight_decay: {name} has no weight decay"
    trains("--optimizer", name, "--weight_decay", 0.01, "--bias", refused=refused)


def test_a_decay_is_of_matrices_and_nothing_changes_without_one():
    """To the bit the steps of torch's class with groups made by hand, a tied weight once."""
    def net():
        torch.manual_seed(0)
        return GPT(11, 8, 2, 12, 2, tied=True)

    def steps(net, optimizer):
        draw = torch.Generator().manual_seed(1)
        for _ in range(3):
            net(torch.randint(11, (4, 8), generator=draw)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def groups(net):
        decays = {name: "ln_" not in name and "bias" not in name
                  for name, _ in net.named_parameters()}  # fmt: skip
        return [{"params": [p for name, p in net.named_parameters() if decays[name] is yes],
                 "weight_decay": decay} for yes, decay in ((True, 0.3), (False, 0.0))]  # fmt: skip

    for name, cls in (("torch.optim.AdamW", "AdamW"), ("adam", "Adam"), ("sgd", "SGD")):
        for decay in (0.3, None):
            one, other = net(), net()
            ours = make_optimizer(name, one, (8,), lr=1e-3, weight_decay=decay)
            parameters = groups(other) if decay else other.parameters()
            hand = getattr(torch.optim, cls)(parameters, lr=1e-3)
            steps(one, ours)
            steps(other, hand)
            assert alike(one.state_dict(), other.state_dict())
            assert alike(ours.state_dict(), hand.state_dict())
            assert len(ours.param_groups) == (2 if decay else 1)


OWN = '''
import collections, random
import numpy, torch

class Own(torch.optim.Optimizer):
    """Descent, by a factor that f(group, p, state) gives."""

    def __init__(self, params, lr=0.05, **more):
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p -= self.f(group, p, self.state[p]) * p.grad
'''


def own(body, init=""):
    """The text of a file own.py with a class X of this `f`, and of these further groups' values."""
    more = f"    def __init__(self, params, lr=0.05):\n        {init}\n" if init else ""
    lines = "\n".join(f"        {line}" for line in body.strip().splitlines())
    return f"{OWN}\nclass X(Own):\n{more}    def f(self, group, p, state):\n{lines}\n"


MODES = """
import torch

class X(torch.optim.SGD):
    def __init__(self, params, lr=0.05):
        super().__init__(params, lr)
        MODE = False

    def train(self):
        self.swap(True, 0.5)

    def eval(self):
        self.swap(False, -1)

    @torch.no_grad()
    def swap(self, training, weight):
        if MODE != training:
            MODE = training
            for p in self.param_groups[0]["params"]:
                p.lerp_(self.state[p].setdefault("z", p.clone()), weight)

    def step(self):
        super().step()
"""


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """f(text): own.py of this text lies in the current folder, which Python does not search."""

    def write(text):
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "own.py").write_text(text)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [str(ROOT), *(x for x in sys.path if x)])
        monkeypatch.delitem(sys.modules, "own", raising=False)

    yield write
    sys.modules.pop("own", None)


@pytest.mark.parametrize("text", [
    pytest.param(own('group["lr"] = float(p.norm()) / 100\nreturn group["lr"]',
                     "super().__init__(params, None)"), id="no rate at first"),
    pytest.param(own('group["lr"] *= 0.99\nreturn group["lr"]',
                     "super().__init__(params, torch.tensor(lr))"), id="a tensor for a rate"),
    pytest.param(own('state["t"] = state.get("t", 0) + 1\ngroup["lr"] = min(1, state["t"] / 9) / 20'
                     '\nreturn group["lr"]'), id="a rate that rises"),
    pytest.param(own('return group["lr"]', 'super().__init__(params, lr, a=torch.bfloat16, '
                     'b=torch.device("cpu"), c=1j, d=numpy.float32(1), e=numpy.bool_(True))'),
                 id="dtypes, devices, numpy's numbers"),
    pytest.param(own("""
if not state:
    state.update(seen=p > 0, n=torch.zeros((), dtype=torch.int64), kind="fast",
                 parts=[torch.zeros_like(p, dtype=torch.float64)])
state["n"] += 1
state["parts"][0].mul_(0.9).add_(p.grad.double() / 3)
p[state["seen"]] *= 0.999
return group["lr"] * state["parts"][0].norm().float() * (1 if state["kind"] == "fast" else 9)
"""), id="masks, counts, float64"),
    pytest.param(own('return group["lr"] * torch.rand(())'), id="torch's generator"),
    pytest.param(own('self.state["all"]["t"] = self.state["all"].get("t", 0) + 1\n'
                     'return group["lr"] / self.state["all"]["t"]'), id="a state of all weights"),
    pytest.param(own('return group["lr"]', "super().__init__(params, lr); self.clock = 7; "
                     "self.eta = torch.ones(3)"), id="attributes that AGD has"),
    pytest.param(own('state["step"] = state.get("step", 0) + 1\nreturn group["lr"] / state["step"]',
                     "super().__init__(params, lr, capturable=False)"), id="a step that is an int"),
    pytest.param(MODES.replace("MODE", "self.param_groups[0]['on']"), id="train() and eval()"),
    pytest.param(f"{OWN}\nclass X(torch.optim.SGD):\n    def zero_grad(self):\n"
                 "        for p in self.param_groups[0]['params']:\n            p.grad.zero_()\n",
                 id="gradients of zero"),
])  # fmt: skip
def test_a_class_of_a_users_own_goes_on_to_the_bit(text, in_folder, trains):
    in_folder(text)
    trains("--optimizer", "own.X")


@pytest.mark.parametrize("text, words", [
    ("class X(", "own.py, line 1"),
    ("import sys; sys.exit('no')", "SystemExit: no"),
    ("import no_such_module", "no_such_module"),
    ("X = 3", "is no optimiser; torch.optim.AdamW is one"),
    ("from torch.optim.lr_scheduler import StepLR as X", "is no optimiser; torch.optim.AdamW"),
    (own("raise KeyError(3)"), "cannot train by gradients alone: KeyError: 3 (own.py, line 19)"),
    (own("raise SystemExit(3)"), "SystemExit: 3"),
    (own("assert None, 'a closure'"), "AssertionError: a closure"),
    (own("return 1", "self.weight = dict(params)"), "does not take these weights"),
    (own("state['x'] = {1}; return 1"), "['x'] is a set"),
    (own("return 1", "super().__init__(params, lr, f=len)"), "['f'] is a builtin_function"),
    (own("state['x'] = numpy.zeros(3); return 1"), "['x'] is a ndarray"),
    (own("state['x'] = [state]; return 1"), "cannot be saved"),
    (own("P = collections.namedtuple('P', 'x')\nstate['p'] = P(state['p'].x / 2 if state else 1)\n"
         "return state['p'].x"), "cannot go on from a checkpoint: AttributeError"),
    (own("self.t = getattr(self, 't', 0) + 1\nreturn 1 / self.t"), "its state_dict() lacks t;"),
    (own("self.t = getattr(self, 't', 0) + 1\nreturn 2 if self.t % 4000 == 0 else 1"), "lacks t;"),
    *((own(f"self.t = getattr(self, 't', {t})\nself.t[0] += 1\nreturn 2 if self.t[0] % 4000 == 0 "
           "else 1"), "lacks t;") for t in ("[0]", "{0: 0}", "numpy.zeros(1)")),
    (MODES.replace("MODE", "self.on"), "its state_dict() lacks"),
    (own("return random.random()"), "its state_dict() lacks something"),
    (own("return 1").replace("step(self)", "step(self, closure)"), "several passes"),
])  # fmt: skip
def test_a_class_of_a_users_own_is_refused(text, words, in_folder, trains):
    in_folder(text)
    trains("--optimizer", "own.X", refused=words)


@pytest.mark.parametrize("takes, init, flags, words", [
    ("lr=1, weight_decay=0", "super().__init__(params, lr); self.decay = weight_decay",
     ["--weight_decay", 0.1], "--weight_decay: own.X has one for all its weights"),
    ("lr=None", "super().__init__(params, None)", ["--schedule", "cosine"],
     "X finds its rate itself: give --lr"),
])  # fmt: skip
def test_a_setting_that_a_class_does_not_keep_in_its_groups_is_refused(
    takes, init, flags, words, in_folder, trains
):
    text = own("return 0.1", init)
    in_folder(text.replace(f"lr=0.05):\n        {init}", f"{takes}):\n        {init}"))
    trains("--optimizer", "own.X", *flags, refused=words)


def test_bare_names_are_those_of_torch():
    """In any case, and each under one name in settings and files: adam and sgd keep theirs."""
    assert {f"torch.optim.{name}" for name in OF_TORCH} >= {*classes("torch.optim")} - {
        "torch.optim.Optimizer"}  # fmt: skip
    parse = importlib.import_module("flags").parse
    for given, name in (
        ("adamw", "torch.optim.AdamW"), ("AdamW", "torch.optim.AdamW"), ("Adam", "adam"),
        ("SGD", "sgd"), ("RMSPROP", "torch.optim.RMSprop"), ("AGD", "agd"), ("agd", "agd"),
        ("torch.optim.Adam", "torch.optim.Adam"),
    ):  # fmt: skip
        assert parse(["--optimizer", given, "--cpu"]).optimizer == name
    assert OPTIMIZERS["lbfgs"] == "torch.optim.LBFGS"


def test_a_bare_name_is_the_run_of_the_class(tmp_path):
    """What began under one spelling goes on under the other."""
    for name, epochs in (("torch.optim.RAdam", 1), ("radam", 2)):
        assert train(*FLAGS, "--optimizer", name, "--epochs", epochs, "--out", tmp_path) == 0
    assert "-torch.optim.RAdam-" in only(tmp_path)
    assert train(*FLAGS, "--optimizer", "RADAM", "--out", tmp_path / "whole") == 0
    assert all(map(torch.equal, weights(tmp_path).values(), weights(tmp_path / "whole").values()))


def test_the_trial_leaves_no_trace(in_folder):
    """Neither in torch's generators, nor in the weights or the state of the optimiser."""
    in_folder(own('return group["lr"] * torch.rand(())'))
    p = torch.nn.Parameter(torch.ones(3, 3))
    before = torch.get_rng_state()
    optimizer = foreign("own.X", [p], lr=0.5)
    assert torch.equal(torch.get_rng_state(), before) and not optimizer.state
    assert p.grad is None and bool((p == 1).all()) and optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(Unusable, match=r"and --lr: TypeError.*or a subclass"):
        foreign("torch.optim.Optimizer", [p], lr=0.5)


def test_a_loaded_state_is_that_of_the_file():
    """torch's load_state_dict alone gives the moments of these weights another dtype."""
    p = torch.nn.Parameter(torch.ones(3))
    saved, loaded = torch.optim.SGD([p]), torch.optim.SGD([p])
    saved.state[p] = {"m": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(2**60 + 1),
                      "mask": [torch.tensor([True, False, True])], "step": torch.tensor(3.0),
                      "kind": "x"}  # fmt: skip
    load_state(loaded, unpack(pack(saved.state_dict())))
    assert alike(loaded.state_dict(), saved.state_dict())


def test_a_baselines_rate_is_compared(tmp_path, capsys):
    """A checkpoint of another rate than the flags' is none of this run."""
    assert train(*FLAGS, "--optimizer", "sgd", "--epochs", 1, "--out", tmp_path) == 0
    (path,) = (tmp_path / "checkpoints").glob("*.pt")
    checkpoint = unpack(path.read_bytes())
    checkpoint["optimizer"]["param_groups"][0]["lr"] = 7.0
    path.write_bytes(pack(checkpoint))
    assert train(*FLAGS, "--optimizer", "sgd", "--out", tmp_path) == 2
    assert "lr [7.0] there, and [0.1] here" in capsys.readouterr().err
