import json

import numpy as np
import pytest
from PIL import Image

from scripts import any_model, any_model_report


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.mark.parametrize("case", any_model.CASES)
def test_a_case_runs_and_writes_its_file(case, noise, out, capsys):
    if case in ("gpt2", "families"):
        pytest.importorskip({"gpt2": "transformers", "families": "torchvision"}[case])
    any_model.main([case, "--quick", "--data_dir", str(noise), "--out", str(out)])
    found = json.loads((out / "any_model" / f"{case}.json").read_text())
    assert found["command"] == f"python -m scripts.any_model {case} --quick"
    assert found["settings"].keys() == any_model.SETTINGS[case].keys()
    assert found["versions"]["torch"] and found["date"] and found["environment"]["commit"] != ""
    assert all(np.isfinite(list(row["numbers"].values())).all() for row in found["rows"])
    assert bool(found["bounds"]) == (case not in ("finetune", "families"))
    printed = capsys.readouterr().out
    assert all(f"| {row['run']} |" in printed for row in found["rows"])
    assert printed.count("hold") == len(found["bounds"])


def test_the_images_are_of_all_classes(noise):
    args = any_model.argparse.Namespace(data_dir=noise, images=50, test=20, batch=10)
    old, tests = any_model.cifar(args, 0, slice(25))
    new, _ = any_model.cifar(args, 0, slice(25, None))
    assert [x.examples for x in (old, new, tests)] == [25, 25, 20]
    assert min(len(set(x.labels)) for x in (old, new, tests)) >= 8
    both = np.concatenate([x.images.flatten(1).sum(1) for x in (old, new)])
    assert len(set(both)) == 50  # the halves share no image
    assert [len(y) for _, y in any_model.whole(old)] == [10, 10]


def test_the_report_keeps_what_stands_around_the_tables(out):
    path = out / "any_model" / "README.md"
    cases = any_model_report.read(path.parent, any_model.CASES)
    if not cases:
        pytest.skip("no case was run before")
    any_model.main(["report", "--out", str(out)])
    once = path.read_text()
    assert all(once.count(f"<!-- {case} -->") == 1 for case in cases)
    path.write_text(once.replace("## stacks\n", "## stacks\n\nA word.\n"))
    any_model.main(["report", "--out", str(out)])
    assert path.read_text() == once.replace("## stacks\n", "## stacks\n\nA word.\n")


@pytest.mark.parametrize("found, least, word", [
    (93.0, True, "**holds**, by 0"), (92.5, True, "**does not hold**, by 0.5"),
    (92.5, False, "**holds**, by 0.5"), (93.5, False, "**does not hold**, by 0.5"),
])  # fmt: skip
def test_a_verdict(found, least, word):
    bound = {"what": "x", "found": found, "limit": 93, "least": least}
    assert any_model_report.verdict(bound)[3] == word


def test_figure_9_is_drawn(out):
    names = {"biases", "affine", "families"}
    if not names <= any_model_report.read(out / "any_model", any_model.CASES).keys():
        pytest.skip("its cases were not run before")
    any_model.main(["draw", "--out", str(out)])
    with Image.open(out / "any_model" / "fig9.png") as picture:
        assert picture.width == 2160 and picture.height > 900
