"""The house: which room may import which, and what users and their files rely on."""

import ast
import inspect
import json
import re
import subprocess
import sys

import pytest

import agd
import flags
import main as program
from tests.conftest import ROOT

# A room may import the rooms below it, and no other beside it.
LEVELS = [
    {"cli", "agd_kernels"}, {"agd"}, {"architecture", "data", "distributed", "runs"}, {"training"},
    {"flags"}, {"check"}, {"main"}, {"examples", "scripts", "tests"},
]  # fmt: skip
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(
    path for room in LEVEL for path in (*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py"))
)
FLAGS = (
    "affine arch augment bias channels_last check compile context cpu cuda_graph data_dir dataset "
    "depth deterministic device distribute dropout epoch_steps epochs evaluate freeze fresh gain "
    "heads help image_size keep_best layers log_steps log_updates loss lr micro_bs optimizer out "
    "precision profile replay save_every schedule seed skip_bad_images sync_bn test_bs "
    "test_examples tied track train_bs train_examples vocab warmup weight_decay weights width "
    "workers"
).split()
COMMANDS = {
    "data.prepare": "--data_dir --from --jobs --encoding --resize --shard",
    "scripts.plot": "-o", "scripts.watch": "--port --open --html",
    "scripts.any_model": "--only",
    "scripts.spectral": "--only", "scripts.sample": "--prompt --tokens --temperature --top_k --out",
    "scripts.reproduce": "--scale --jobs --list --draw --epochs --submit --together",
    "scripts.benchmark": "--out", "scripts.gpu_checks": "--plan --work --out",
    "scripts.publish": "--out",
    "scripts.suite": "--methods --jobs --time_limit --out --list --draw --time --quick",
    "scripts.scaling": "", "tests.crash": "", "tests.fuzz": "",
}  # fmt: skip
ROWS = {
    "run": "kind name flags settings python torch platform device device_name threads cores commit "
    "ranks launcher data weights layers shape classes train_examples test_examples precision "
    "compile deterministic channels_last cuda_graph no_cuda_graph test_bs date",
    "step": "kind epoch step loss acc eta",
    "epoch": "kind epoch train_loss train_acc test_loss test_acc eta_min eta_mean eta_max seconds "
    "images_per_second",
    "end": "kind epochs train_loss train_acc test_loss test_acc stopped final skipped_steps "
    "bad_images seconds saving_seconds",
}


def imported_rooms(path):
    """The rooms that a file imports, inside functions too, with the line of each."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            if name.split(".")[0] in LEVEL:
                yield name.split(".")[0], node.lineno


def test_imports_go_down():
    """agd.py works alone, and finds its kernels by name."""
    wrong = []
    for path in FILES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for room, line in imported_rooms(path):
            if own in ("agd", "agd_kernels"):
                allowed = room in ("agd_kernels", own)
            else:
                allowed = room == own or LEVEL[room] < LEVEL[own] or own in LEVELS[-1]
            wrong += [] if allowed else [f"{path.relative_to(ROOT)}:{line} imports {room}"]
    assert not wrong


def test_signals_are_handled_before_torch_is_imported():
    """Its import takes a second, in which a signal would leave a traceback, or kill the run."""
    code = "import sys, training.control; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_root_has_four_modules():
    """And hatch_build.py, for pip alone."""
    names = {path.stem for path in ROOT.glob("*.py")}
    assert names == {"agd", "cli", "flags", "main", "hatch_build"}


def test_flags_and_commands_are_the_promised_ones():
    assert sorted(action.dest for action in flags.parser()._actions) == sorted(FLAGS)
    for module in COMMANDS:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


@pytest.mark.slow
@pytest.mark.parametrize("module", COMMANDS)
def test_each_command_has_its_flags(module):
    done = subprocess.run(["python", "-m", module, "--help"], cwd=ROOT, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0 and not re.search("Traceback", done.stderr)
    for flag in COMMANDS[module].split():
        assert flag in done.stdout, flag


def test_the_log_has_the_promised_keys(tmp_path):
    assert program.main(["--dataset", "digits", "--depth", "2", "--width", "8", "--epochs", "1",
                         "--train_examples", "256", "--cpu", "--log_steps", "1",
                         "--out", str(tmp_path)]) == 0  # fmt: skip
    (log,) = (tmp_path / "logs").glob("*.jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", "step", "step", "epoch", "end"]
    for row in rows:
        assert sorted(row) == sorted(ROWS[row["kind"]].split()), row["kind"]


def test_the_optimisers_keep_their_signatures():
    rule = list(inspect.signature(agd.AGD).parameters)
    assert rule == ["params", "gain", "fused", "depth", "roles", "foreign"]
    spectral = list(inspect.signature(agd.SpectralAGD).parameters)
    assert spectral == ["params", "gain", "depth", "roles", "process_group", "foreign"]
    start = list(inspect.signature(agd.init_weights).parameters)
    assert start == ["params", "generator", "inputs", "roles"]
