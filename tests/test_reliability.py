"""docs/reliability.md says what the tests and the runs say."""

import ast
import json
import re

from scripts.reliability import BEGIN, END, FOLDER, PAGE, figures
from tests.conftest import ROOT


def test_every_promise_names_tests_that_are_there():
    there = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        there[path.name] = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
    named = 0
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        file = None
        for name, test in re.findall(r"`(?:(test_\w+\.py)(?:::)?)?(test_\w+(?!\.py))?`", line):
            file = name or file
            assert file in there, line
            assert not test or test in there[file], f"{file}::{test}"
            named += 1
    assert named > 40


def test_the_figures_are_those_of_the_runs():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == figures()
    told = [json.loads((FOLDER / f"{x}.json").read_text()) for x in ("kill", "term", "disk")]
    assert all(r["equal"] == r["rounds"] and not r["faults"] for x in told for r in x["reports"])
    fuzz = json.loads((FOLDER / "fuzz.json").read_text())["rows"]
    assert sum(r["inputs"] for r in fuzz) >= 100_000 and not any(r["findings"] for r in fuzz)
