"""The examples and the notebook: they train, as started by a user; η is where loggers show a
learning rate; what each asks to install is what it imports."""

import ast
import csv
import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

import agd
from agd import AGD, SpectralAGD
from tests.conftest import ROOT
from tests.stock import digits

# An example does nothing that the optimiser warns of.
pytestmark = [pytest.mark.filterwarnings(f"error:{re.escape(text[:30].strip())}")
              for text in agd.WARNINGS.values()]  # fmt: skip

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# What an example needs beyond requirements.txt: the modules that it imports, by packages of PyPI.
NEEDS = {"accelerate": ["accelerate"], "finetune": [], "fsdp": [], "lightning": ["lightning"],
         "lora": ["peft", "transformers"], "plain": [], "spectral": [], "timm": ["timm"],
         "trainer": ["transformers"]}  # fmt: skip
FILES = {path.stem.split("_")[0]: path for path in ROOT.glob("examples/*.py")}


@pytest.fixture
def example():
    """f(name) -> the module of an example; skips where its packages are missing."""

    def find(name):
        for package in NEEDS[name]:
            pytest.importorskip(package)
        if name == "trainer":
            pytest.importorskip("accelerate")
        if name == "fsdp" and not hasattr(torch.cpu.current_stream(), "record_event"):
            pytest.skip("fully_shard of this torch has no CPUs")
        return importlib.import_module(f"examples.{FILES[name].stem}")

    return find


def recording(rule):
    """(a class of the rule, the eta of each of its steps)."""
    etas = []

    class Recording(rule):
        def step(self, closure=None):
            loss = super().step(closure)
            etas.append(self.eta.item())
            return loss

    Recording.__name__ = rule.__name__
    return Recording, etas


def lines(text):
    """[(loss, accuracy, eta)] of the lines that an example prints of its epochs."""
    line = r"(?:epoch|step) \d+: loss ([\d.]+), test accuracy ([\d.]+)%.*? eta ([\d.]+)"
    return [tuple(map(float, numbers)) for numbers in re.findall(line, text)]


def promised(name):
    """The accuracy in percent that its docstring names."""
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return int(re.search(r"(\d+) %\s+of\s+the", text).group(1))


def test_every_example_is_here():
    assert FILES.keys() == NEEDS.keys()


@pytest.mark.parametrize("name", [
    pytest.param(x, marks=[] if x in ("plain", "finetune", "fsdp") else pytest.mark.slow)
    for x in NEEDS
])  # fmt: skip
def test_an_example_trains(name, example, capsys):
    """To the accuracy that its docstring names, within five points."""
    example(name).main()
    out = capsys.readouterr().out
    rows = lines(out)
    assert len(rows) >= 5
    assert rows[-1][0] < 0.7 * rows[0][0] and min(eta for *_, eta in rows) > 0
    assert rows[-1][1] == pytest.approx(promised(name), abs=5)
    if name == "finetune":
        assert rows[-1][1] - 3 > float(re.findall(r"from scratch ([\d.]+)%", out)[-1])
    if name == "spectral":
        assert float(re.search(r"saved network: test accuracy ([\d.]+)%", out)[1]) == rows[-1][1]
    if name == "lora":  # the network below is as it was, and the merged one as the adapted one
        upright = lines("\n".join(re.findall(r"upright, epoch.*", out)))[-1][1]
        assert float(re.search(r"no adapters: test accuracy ([\d.]+)%", out)[1]) < 50
        assert float(re.search(r"adapters off.*accuracy ([\d.]+)%", out)[1]) == upright
        assert float(re.search(r"merged.*accuracy ([\d.]+)%", out)[1]) == pytest.approx(
            rows[-1][1], abs=0.3)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "path"])
@pytest.mark.parametrize("name, launcher", [
    ("plain", []), ("fsdp", []),
    ("fsdp", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
])  # fmt: skip
def test_an_example_is_started_by_name_and_by_path(name, launcher, how, example, tmp_path):
    """A path works from any folder. Two processes print what one does: once."""
    example(name)
    what = ["-m", f"examples.{FILES[name].stem}"] if how == "module" else [str(FILES[name])]
    done = subprocess.run([sys.executable, *launcher, *what], capture_output=True, text=True,
                          cwd=ROOT if how == "module" else tmp_path, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = lines(done.stdout)
    assert len(rows) == len(done.stdout.splitlines()) >= 6
    assert rows[-1][1] == pytest.approx(promised(name), abs=5)


def test_sharding_and_a_checkpoint_change_nothing(example, monkeypatch, capsys):
    """Another network goes on from the checkpoint as the first one would have."""
    module = example("fsdp")
    rows = module.main(epochs=2)
    made, own = [], module.sharded

    def once(device):
        made.extend([] if made else [own(device)])
        return made[0]

    monkeypatch.setattr(module, "sharded", once)
    monkeypatch.setattr(module.dcp, "load", lambda *args, **options: None)
    assert module.main(epochs=2) == rows


# eta in the loggers


def test_a_loop_hands_eta_to_its_logger(example, monkeypatch):
    module, logged = example("plain"), []
    rule, etas = recording(AGD)
    monkeypatch.setattr(module, "AGD", rule)
    module.main(epochs=2, log=lambda numbers, step: logged.append((step, numbers["lr"])))
    assert logged == [(step, etas[step - 1]) for step in (20, 40)]


def test_accelerates_trackers_get_eta(example, monkeypatch):
    module, logged = example("accelerate"), []
    rule, etas = recording(AGD)
    monkeypatch.setattr(module, "AGD", rule)

    class Tracker(module.GeneralTracker):
        name, requires_logging_directory, tracker = "test", False, None

        def log(self, values, step=None, **others):
            logged.append((step, values["lr"]))

    module.main(epochs=2, tracker=Tracker())
    steps = len(etas) // 2
    assert steps == 22 and logged == [(1, etas[steps - 1]), (2, etas[-1])]


def test_timms_summary_has_eta(example, monkeypatch, tmp_path):
    module = example("timm")
    rule, etas = recording(AGD)
    monkeypatch.setattr(module, "AGD", rule)
    module.main(epochs=2, folder=tmp_path)
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lr"]) for row in rows] == [etas[21], etas[43]]


@pytest.mark.slow
@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_the_trainers_log_and_its_integrations_have_eta(rule, example, monkeypatch, tmp_path):
    module = example("trainer")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path))
    rule, etas = recording(rule)
    log = module.main(steps=100, report_to="tensorboard", rule=rule, out=str(tmp_path))
    logged = {row["step"]: row["learning_rate"] for row in log if "learning_rate" in row}
    assert logged == {step: etas[step - 1] for step in (50, 100)}
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events)).Reload().Scalars("train/learning_rate")
    assert {x.step: x.value for x in shown} == pytest.approx(logged)


def metrics(folder):
    """{name: {step: number}} of CSVLogger's file."""
    found = {}
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, number in row.items():
                if number:
                    found.setdefault(name, {})[int(row["step"])] = float(number)
    return found


@pytest.mark.parametrize("rule", [AGD, SpectralAGD])
def test_lightnings_logger_has_eta_and_its_checkpoint_the_average(rule, example, tmp_path):
    module = example("lightning")
    recorded, etas = recording(rule)
    trainer = module.main(epochs=2, rule=recorded, folder=tmp_path)
    logged = metrics(tmp_path)
    assert logged["lr"] == pytest.approx({step: etas[step] for step in (9, 19, 29, 39)})
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    net = trainer.lightning_module.net
    assert all(torch.equal(x, saved["state_dict"][f"net.{key}"])
               for key, x in net.state_dict().items())  # fmt: skip
    if rule is SpectralAGD:
        assert saved["optimizer_states"][0]["param_groups"][0]["train_mode"] is False
        average = net[0].weight.clone()
        trainer.optimizers[0].train()
        assert not torch.equal(net[0].weight, average)


def test_a_run_of_lightning_goes_on_from_the_average_to_the_bit(example, tmp_path):
    """The optimiser of the checkpoint is between eval() and train()."""
    module = example("lightning")
    batches = DataLoader(TensorDataset(*digits(8, 128, channels=1)), batch_size=16)

    def run(epochs, seed, path=None):
        torch.manual_seed(seed)
        classifier = module.Classifier()
        saver = module.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        trainer = module.lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[module.Average(), saver] if path is None else
            [module.Average()], enable_checkpointing=path is None)  # fmt: skip
        trainer.fit(classifier, batches, batches, ckpt_path=path, weights_only=False)
        return classifier.net.state_dict()

    whole = run(3, 0)
    resumed = run(3, 1, tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(x, resumed[key]) for key, x in whole.items())


@pytest.mark.parametrize("second", [AGD, torch.optim.Adam])
def test_eta_of_several_optimisers_beside_the_monitor_of_rates(second, example, tmp_path):
    """LearningRateMonitor logs AGD's gain."""
    module = example("lightning")
    lightning = module.lightning
    rule, etas = recording(AGD)

    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.parts = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])

        def training_step(self, batch):
            for optimizer, part in zip(self.optimizers(), self.parts):
                loss = nn.functional.cross_entropy(part(batch[0].flatten(1)), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [rule(self.parts[0]), second(self.parts[1].parameters())]

    logger = module.CSVLogger(tmp_path, name=None, version="")
    monitor = lightning.pytorch.callbacks.LearningRateMonitor("step", log_momentum=True)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=logger, log_every_n_steps=4,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[module.LogEta(), monitor])  # fmt: skip
    trainer.fit(Two(), DataLoader(TensorDataset(*digits(8, 128, channels=1)), batch_size=16))
    logged = metrics(tmp_path)
    own = logged["lr-0" if second is AGD else "lr"]
    assert list(own.values()) == pytest.approx([etas[3], etas[7]])
    assert ("lr-1" in logged) == (second is AGD)
    gains = [x for name, numbers in logged.items() if name in ("lr-AGD", "lr-AGD-1")
             for x in numbers.values()]  # fmt: skip
    assert gains and set(gains) == {1.0}


# What they ask to install


def imported(path):
    """The packages that a file imports, without ours, the standard library's and those of
    requirements.txt."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    ours = {path.stem for path in ROOT.iterdir() if path.suffix in ("", ".py")}
    there = set(re.findall(r"^\w+", (ROOT / "requirements.txt").read_text(), re.M))
    return names - ours - there - sys.stdlib_module_names


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_names_what_it_imports(name):
    text = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    packages = imported(FILES[name])
    assert packages == set(NEEDS[name])
    asked = re.search(r"Needs\s+`pip\s+install\s+([^`]+)`", text)
    named = set(re.sub(r'"|\[\w+\]', "", asked.group(1)).split()) if asked else set()
    assert named == packages
    assert bool(asked) != bool(re.search(r"Needs\s+nothing\s+beyond\s+requirements.txt", text))


# The notebook


def printed(cells):
    return "".join("".join(output.get("text", "")) for cell in cells
                   for output in cell.get("outputs", ()))  # fmt: skip


def assert_trained(cells):
    """Both rules, to the accuracy that a reader should see."""
    text = printed(cells)
    assert len(lines(text)) == 12
    assert float(re.search(r"at the average: test accuracy ([\d.]+)%", text)[1]) > 95


def test_the_notebook_was_run_and_is_small():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert_trained(cells)
    pictures = [x for cell in cells for x in cell["outputs"] if "image/png" in x.get("data", {})]
    assert len(pictures) == 2 and len(text) < 150_000
    assert not [x for cell in cells for x in cell["outputs"] if x["output_type"] == "error"]
    words = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.findall(r"(?<![\w.:])/(?:home|root|work|tmp|usr|Users|opt|var|mnt)/", words)


def test_the_notebook_is_valid():
    pytest.importorskip("nbformat").validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["examples", "."])
def test_the_notebook_runs(folder, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(ROOT / folder)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
    assert_trained(notebook.cells)
