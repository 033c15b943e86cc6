"""scripts.any_model and scripts.spectral, by their commands; their published pages."""

import argparse
import json
import shutil

import numpy as np
import pytest

from scripts import any_model, spectral
from scripts.comparisons import Limit, cifar, judged, verdict, whole
from tests.conftest import ROOT

SCRIPTS = {"any_model": any_model, "spectral": spectral}
LIBRARIES = {"gpt2": "transformers", "stock": "timm", "families": "torchvision"}
ALL = [(script, case) for script, module in SCRIPTS.items() for case in module.CASES]


def measure(script, case, data, out, *flags):
    where = ["--data_dir", str(data), "--out", str(out)]
    SCRIPTS[script].main([case, "--quick", *where, *flags])
    return json.loads((out / script / f"{case}.json").read_text())


@pytest.mark.parametrize(("script", "case"), [
    pytest.param(*x, marks=[pytest.mark.slow] * (x[1] in LIBRARIES)) for x in ALL
])  # fmt: skip
def test_a_case_runs_and_writes_its_file(script, case, noise, tmp_path, capsys):
    if case in LIBRARIES:
        pytest.importorskip("transformers" if case == "stock" else LIBRARIES[case])
        pytest.importorskip(LIBRARIES[case])
    result = measure(script, case, noise, tmp_path)
    assert result["command"] == f"python -m scripts.{script} {case} --quick"
    assert result["settings"] and result["versions"]["torch"] and result["environment"]["commit"]
    assert {x["part"] for x in result["rows"]} == result["parts"].keys()
    assert all(np.isfinite(list(x["numbers"].values())).all() for x in result["rows"])
    assert bool(result["bounds"]) == (case not in ("adapt", "finetune", "families"))
    printed = capsys.readouterr().out
    assert all(f"| {x['run']} |" in printed for x in result["rows"])


def test_a_part_runs_by_its_name_and_once(noise, tmp_path, capsys):
    first = measure("spectral", "fcn", noise, tmp_path, "--only", "seed 1")
    assert list(first["parts"]) == ["SpectralAGD, 1 epochs, seed 1", "AdamW 0.0003, 1 epochs, "
                                    "seed 1", "AdamW 0.001, 1 epochs, seed 1"]  # fmt: skip
    assert len(first["bounds"]) == 3  # those whose runs are all there
    both = measure("spectral", "fcn", noise, tmp_path, "--only", "SpectralAGD")
    runs = [x["run"] for x in both["rows"]]
    assert runs[:4] == [f"SpectralAGD, {n} epochs" for n in (1, 2, 3, 1)]
    assert first["rows"] == both["rows"][3:]
    capsys.readouterr()
    spectral.main(["fcn", "--quick", "--list", "--out", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()
    assert sum("(done)" in x for x in listed) == 4 < len(listed)
    with pytest.raises(SystemExit, match="other settings"):
        spectral.main(["fcn", "--list", "--out", str(tmp_path)])


def test_images_are_of_all_classes(noise):
    args = argparse.Namespace(data_dir=noise, images=50, test=20, batch=10)
    old, tests = cifar(args, 0, slice(25))
    new, _ = cifar(args, 0, slice(25, None))
    assert [x.examples for x in (old, new, tests)] == [25, 25, 20]
    assert min(len(set(x.labels)) for x in (old, new, tests)) >= 8
    both = np.concatenate([x.images.flatten(1).sum(1) for x in (old, new)])
    assert len(set(both)) == 50  # the halves share no image
    assert [len(y) for _, y in whole(old)] == [10, 10]


@pytest.mark.parametrize(("least", "than", "number", "word"), [
    (False, None, 3, "**does not hold**, by 1"), (True, None, 1, "**does not hold**, by 1"),
    (False, "b", 3 - 1.5, "**holds**, by 0.5"), (True, "a", 0, "**does not hold**, by 2"),
])  # fmt: skip
def test_a_bound_is_on_the_worst_seed(least, than, number, word):
    rows = [{"run": run, "seed": seed, "numbers": {"loss": x}}
            for run, seed, x in (("a", 0, 1), ("a", 1, 3), ("b", 0, 2.5), ("b", 1, 1.5))]
    not_run = [Limit("c", "loss", 2), Limit("a", "loss", 2, than="c")]
    (bound,) = judged(rows, [Limit("a", "loss", 2, least, than), *not_run])
    assert bound["found"] == number and verdict(bound)[3] == word
    assert verdict({**bound, "found": 2})[3] == "**holds**, by 0"


@pytest.mark.parametrize("script", SCRIPTS)
def test_published_pages_come_of_the_committed_rows(script, tmp_path, capsys):
    shutil.copytree(ROOT / "results" / script, tmp_path / script)
    page = tmp_path / script / "README.md"
    SCRIPTS[script].main(["report", "--out", str(tmp_path)])
    assert page.read_text() == (ROOT / "results" / script / "README.md").read_text()
    for case in SCRIPTS[script].CASES:  # and the committed rows are of today's settings
        SCRIPTS[script].main([case, "--list", "--out", str(tmp_path)])
    assert "(done)" in capsys.readouterr().out
