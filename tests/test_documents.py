"""Every command that a page names is one that the program takes; links lead to files.

Pages are Markdown, the docstrings of commands, which --help prints, and the comments of the batch
scripts. A command is a line of a ```bash block, an indented line of a docstring or a comment, or
words in backquotes that start with a program. Its flags go to the parser of its program, in this
process; those that take a second are run.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import flags
import main as program
from data import DATASETS
from scripts import plot
from tests.conftest import ROOT
from tests.program import train

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")),
         *sorted(ROOT.glob("data/*.md")), *sorted(ROOT.glob("results/**/*.md"))]  # fmt: skip
SCRIPTS = sorted(ROOT.glob("scripts/slurm/*.sh"))
SOURCES = [path for room in ("scripts", "data", "examples")
           for path in sorted((ROOT / room).rglob("*.py"))]  # fmt: skip
SOURCES += [ROOT / "main.py", ROOT / "tests" / "fuzz.py", ROOT / "tests" / "crash" / "__main__.py"]
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:python|torchrun|sbatch|srun|mpirun|mpiexec|pip)\s"
# A page that names an old commit speaks of that commit's commands.
OLD = re.compile(r"`[^`]*`\s+of\s+commit\s+[0-9a-f]{7}")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}(?:_[A-Z]+)*\b|\.\.\.")
MEANING = {"CASE": None, "FIGURE": "fig5", "TEXT": "a", "N": "2", "MODE": "auto", "PATTERN": "a.*",
           "WORKLOAD": "gpt", "METHOD": "agd"}  # fmt: skip
OTHERS = {"--nproc_per_node", "--bind-to", "--requeue", "--signal", "--kill-on-bad-exit", "--time",
          "--gres", "--array", "--nodes", "--gpus-per-node", "--ntasks-per-node", "--exclusive",
          "--cpus-per-task"}  # fmt: skip


class Parsed(BaseException):
    """The arguments were taken."""


def documents():
    """{page: its text, code of other languages left out}."""
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES}
    for path in SCRIPTS:
        lines = path.read_text(encoding="utf-8").splitlines()
        texts[path] = "\n".join(f" {line[1:]}" for line in lines if line.startswith("#"))
    for path in SOURCES:
        texts[path] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return {path.relative_to(ROOT): text for path, text in texts.items()}


def commands(text):
    """The commands of a text, a list of words each, without those of old commits."""
    text = re.sub(r"```(?!bash)\w+\n.*?```", "", OLD.sub("", text), flags=re.S)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    indented = re.findall(rf"^ {{4,}}({PROGRAMS}(?:.*\\\n)*.*)", text, re.M)
    inline = re.findall(rf"`({PROGRAMS}[^`]*)`", text)
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join([*blocks, *indented])).splitlines()
    lines = [part.strip() for line in lines for part in line.split("&&")]
    lines = [re.split(r"\s{2,}", line)[0] for line in lines]  # a description may stand beside it
    for line in [*lines, *inline]:
        words = shlex.split(re.sub(r"[\[\]]|\|\S+", " ", line), comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            del words[0]
        if words and re.match(PROGRAMS, words[0] + " "):
            yield [x for x in words if x != "..."]


def each_command():
    """{words of a command: the first page that names it}, without repetitions."""
    found = {}
    for page, text in documents().items():
        for words in commands(text):
            found.setdefault(tuple(words), page)
    return found


def program_of(words):
    """(name, arguments) of what a command starts: main, a module, or "" for programs of others.
    Launchers and batch scripts hand the rest of their line on."""
    words = list(words)
    for i, word in enumerate(words):
        if word.endswith(".sh"):
            assert (ROOT / word).is_file(), f"there is no {word}"
            rest = words[i + 1 :]
            return ("scripts.reproduce" if word.endswith("array.sh") else "main"), rest
        if word.endswith(".py"):
            assert (ROOT / word).is_file(), f"there is no {word}"
            return word.removesuffix(".py").replace("/", "."), words[i + 1 :]
        if word == "-m" and words[0] == "python":
            return words[i + 1], words[i + 2 :]
    return "", []


def parse(name, argv):
    """Hand the arguments to the program's own parser. SystemExit where it refuses them."""
    if name == "main":
        if {"--replay", "--evaluate"} & {*argv}:  # whose files there are none of
            flags.parser().parse_args(argv)
        else:
            flags.parse(argv, check=False)
        return
    module = importlib.import_module(name)
    module = importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
    if name == "scripts.experiments":
        assert all(word in module.SCALES for word in argv)
    elif name == "scripts.reproduce":
        module.parse(argv)
    else:
        cases = [*getattr(module, "CASES", [""])]
        with pytest.raises(Parsed):
            module.main([cases[0] if word == "CASE" else word for word in argv])


@pytest.fixture
def parse_alone(monkeypatch):
    """Have the commands end when their arguments are taken; returns the set of the flags seen."""
    import argparse

    seen = set()

    def stop(parse_args):
        def wrapper(self, args=None, namespace=None):
            result = parse_args(self, args, namespace)
            seen.update(self._option_string_actions)
            if not self.prog.endswith("main.py") and "reproduce" not in self.prog:
                raise Parsed
            return result

        return wrapper

    for parser in (argparse.ArgumentParser, cli.Parser):
        monkeypatch.setattr(parser, "parse_args", stop(parser.parse_args))
    return seen


def check(words):
    """Assert that a command can be given; what stands for something else is filled in."""
    name, argv = program_of(words)
    if name == "pytest":
        files = [word for word in argv if word.startswith("tests/") and "FILE" not in word]
        assert all((ROOT / file).exists() for file in files)
    elif words[0] == "pip" and "-r" in words:
        assert (ROOT / words[words.index("-r") + 1]).is_file()
    elif name and not PLACEHOLDER.search(name):
        filled = [MEANING.get(word) or word for word in argv]
        assert importlib.util.find_spec(name), f"there is no {name}"
        if filled and filled != ["--help"]:  # else it is a mention of the command
            parse(name, filled)


COMMANDS = each_command()
FOUND = set()  # (program, flag) whose misspelling is known to be refused


@pytest.mark.parametrize("words, page", [
    pytest.param(words, page, id=f"{page}: {shlex.join(words)[:60]}")
    for words, page in COMMANDS.items()
])  # fmt: skip
def test_a_command_of_a_page_is_taken(words, page, parse_alone, capsys):
    try:
        check(words)
    except SystemExit:
        pytest.fail(f"{page}: {shlex.join(words)}\n{capsys.readouterr().err}")


def test_the_commands_of_all_pages_are_found():
    """Most pages name one; and those that README opens with are among them."""
    assert len(COMMANDS) > 60 and len(set(COMMANDS.values())) > 20
    lines = {shlex.join(words) for words in COMMANDS}
    assert {"python main.py --dataset digits --epochs 50", "python -m pytest",
            "python -m scripts.plot output -o curves.png"} <= lines  # fmt: skip


@pytest.mark.parametrize("page", documents(), ids=str)
def test_a_misspelt_flag_in_any_page_is_found(page, parse_alone):
    """Every flag of every command of the page, with a letter more."""
    for words in commands(documents()[page]):
        name, argv = program_of(words)
        if not name or name == "pytest" or PLACEHOLDER.search(name) or argv == ["--help"]:
            continue
        for i, word in enumerate(argv):
            if word.startswith("--") and (name, word) not in FOUND:
                wrong = argv[:i] + [word.replace("--", "--q")] + argv[i + 1 :]
                with pytest.raises(SystemExit):
                    check(["python", "-m", name, *wrong])
                FOUND.add((name, word))


def test_flags_in_backquotes_are_those_of_a_command(parse_alone):
    for name in ("data.prepare", "scripts.plot", "scripts.reproduce", "scripts.benchmark", "main",
                 "scripts.gpu_checks", "scripts.sample", "scripts.scaling", "scripts.spectral",
                 "scripts.suite", "scripts.watch", "tests.crash", "tests.fuzz"):  # fmt: skip
        argv = {"data.prepare": ["cifar10"], "scripts.plot": ["a"], "scripts.reproduce": ["fig1"],
                "scripts.sample": ["a"], "scripts.spectral": ["CASE"]}  # fmt: skip
        parse(name, argv.get(name, []))
    for page, text in documents().items():
        text = re.sub(r"```.*?```", "", OLD.sub("", text), flags=re.S)
        if page.name == "from-the-authors-code.md":  # whose left column has the authors' flags
            text = re.sub(r"^\|[^|]*\|", "", text, flags=re.M)
        for words in re.findall(r"`(--\w[^`]*)`", text):
            for flag in re.findall(r"(?<![\w=])--[a-z][\w-]*", words):
                assert flag in parse_alone | OTHERS, f"{page}: {words}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        link = next(filter(None, link))
        if "://" in link:
            continue
        place, _, heading = link.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in anchors, link
    for name in re.findall(r"\b(?:test_\w+|crash|fuzz)\.py\b", text):
        assert (ROOT / "tests" / name).exists(), name


def test_the_first_commands_of_readme_work_as_they_stand(tmp_path, monkeypatch):
    """The run for an epoch, in a folder of its own; it leaves its log where the next one reads."""
    monkeypatch.chdir(tmp_path)
    here = [list(words) for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))]
    assert ["python", "main.py"] in here
    (draw,) = [words for words in here if "-o" in words]
    monkeypatch.setattr(flags, "ALONE", [*flags.ALONE[:-1], "1"])
    assert program.main([]) == 0
    plot.main(draw[3:])
    assert Path("curves.png").stat().st_size > 5000 and not Path("results").exists()
    ignored = subprocess.run(["git", "check-ignore", "output/logs", "curves.png"], cwd=ROOT,
                             capture_output=True, text=True)  # fmt: skip
    assert ignored.stdout.split() == ["output/logs", "curves.png"]


@pytest.mark.slow
def test_the_commands_that_renew_the_pages_leave_them_as_they_are(tmp_path):
    """On a copy of results/, from another folder."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    for line in ("reproduce all --draw", "spectral report", "any_model report", "benchmark draw"):
        name, *words = line.split()
        path = ROOT / "scripts" / (name if name == "benchmark" else f"{name}.py")
        subprocess.run([sys.executable, path, *words, "--out", "results"], cwd=tmp_path, check=True)
    for page in ROOT.glob("results/**/*.md"):
        copy = tmp_path / page.relative_to(ROOT)
        assert copy.read_bytes() == page.read_bytes(), page


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    words for words in COMMANDS
    if words[:2] == ("python", "-m") and words[2] in ("scripts.scaling", "scripts.experiments")
    and "--write" not in words or "--help" in words or "--list" in words
], ids=" ".join)  # fmt: skip
def test_commands_that_only_print_are_run_as_they_stand(words):
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout and not done.stderr


# What this machine may lack, or takes the name of another run.
ELSEWHERE = {"--distribute", "--replay", "--evaluate", "--device", "--compile", "--weights", "tf32"}


def small(words, tmp):
    """The arguments of a command of main.py, with few images of the same form; None where it cannot
    be run here."""
    name, argv = program_of(words)
    dataset = next((b for a, b in zip(argv, argv[1:]) if a == "--dataset"), "cifar10")
    elsewhere = "imagenet", "npz:", "tokens:"
    if name != "main" or dataset.startswith(elsewhere) or ELSEWHERE & {*argv}:
        return None
    if argv in ([], ["--help"]) or any(map(PLACEHOLDER.search, argv)):
        return None
    argv = [f"folder:{tmp}/pictures" if word.startswith("folder:") else word for word in argv]
    argv += ["--cpu", "--epochs", "1", "--train_bs", "8", "--data_dir", tmp, "--out", tmp / "out"]
    few = ["--epoch_steps" if dataset == "shakespeare" else "--train_examples", "16",
           "--test_examples", "8"]  # fmt: skip
    return argv + (["--workers", "0", "--image_size", "64"] if "folder:" in dataset else few)


RUN = [pytest.param(words, id=shlex.join(words)[:70]) for words in COMMANDS if small(words, ROOT)]


@pytest.mark.slow
@pytest.mark.parametrize("words", RUN)
def test_a_command_of_a_page_runs(words, tmp_path):
    for package in ("dadaptation", "prodigyopt", "schedulefree", "timm"):
        if any(package in word for word in words):
            pytest.importorskip(package)
    rng = np.random.default_rng(0)
    for name in ("mnist", "cifar10", "cifar100"):
        shape, classes = DATASETS[name].shape, DATASETS[name].classes
        np.savez(tmp_path / f"{name}.npz", **{
            key: value for part in ("train", "test") for key, value in (
                (f"{part}_images", rng.integers(0, 256, (200, *shape), np.uint8)),
                (f"{part}_labels", np.arange(200) % classes))})  # fmt: skip
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "pictures" / place).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (70, 70, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / place / f"{i}.png")
    assert train(*small(words, tmp_path)) == 0
