import json

import numpy as np
import pytest
from PIL import Image

from scripts import any_model_report, spectral
from scripts.spectral_report import Limit, judged

LIBRARIES = {"stock": ("timm", "transformers", "torchvision")}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


def measure(case, folder, out, *flags):
    spectral.main([case, "--quick", "--data_dir", str(folder), "--out", str(out), *flags])
    return json.loads((out / "spectral" / f"{case}.json").read_text())


@pytest.mark.parametrize("case", spectral.CASES)
def test_a_case_runs_and_writes_its_file(case, noise, out, capsys):
    for library in LIBRARIES.get(case, ()):
        pytest.importorskip(library)
    found = measure(case, noise, out)
    assert found["settings"].keys() == spectral.SETTINGS[case].keys()
    assert spectral.QUICK[case].keys() <= spectral.SETTINGS[case].keys()
    assert all(np.isfinite(list(x["numbers"].values())).all() for x in found["rows"])
    assert {x["part"] for x in found["rows"]} == found["parts"].keys()
    assert bool(found["bounds"]) == (case != "adapt")
    assert found["data"] or case in ("gpt", "adapt")
    printed = capsys.readouterr().out
    assert all(f"| {x['run']} |" in printed for x in found["rows"])


def test_a_part_is_run_by_its_name_and_once(noise, tmp_path, capsys):
    first = measure("fcn", noise, tmp_path, "--only", "seed 1")
    assert list(first["parts"]) == ["SpectralAGD, 1 epochs, seed 1", "AdamW 0.0003, 1 epochs, "
                                    "seed 1", "AdamW 0.001, 1 epochs, seed 1"]  # fmt: skip
    assert len(first["bounds"]) == 3  # of those of which all runs are there
    both = measure("fcn", noise, tmp_path, "--only", "SpectralAGD")
    assert [x["run"] for x in both["rows"]][:4] == [f"SpectralAGD, {n} epochs"
                                                    for n in (1, 2, 3, 1)]  # fmt: skip
    assert first["rows"] == both["rows"][3:]  # as they were
    capsys.readouterr()
    spectral.main(["fcn", "--quick", "--list", "--out", str(tmp_path)])
    listed = capsys.readouterr().out.splitlines()
    assert sum("(done)" in x for x in listed) == 4 < len(listed)
    with pytest.raises(SystemExit, match="other settings"):
        spectral.main(["fcn", "--list", "--out", str(tmp_path)])


def test_blocks_of_rows_are_compared_where_they_differ(noise):
    args = spectral.argparse.Namespace(**spectral.SETTINGS["rows"])
    parts, limits = spectral.rows(args)
    assert [x for x in parts if "128," in x] == [
        f"{kind} 128, {x}" for kind in ("FCN", "GPT") for x in ("whole matrices",
                                                                "blocks of 64 rows")]  # fmt: skip
    assert all("blocks" in x.run and "whole" in x.than for x in limits)


@pytest.mark.parametrize("least, than, found", [
    (False, None, 3), (True, None, 1), (False, "b", 3 - 1.5), (True, "b", 1 - 2.5),
])  # fmt: skip
def test_a_bound_is_on_the_worst_seed(least, than, found):
    rows = [{"run": run, "numbers": {"loss": x}}
            for run, x in (("a", 1), ("a", 3), ("b", 2.5), ("b", 1.5))]  # fmt: skip
    (bound,) = judged(rows, [Limit("a", "loss", 2, least, than), Limit("c", "loss", 2)])
    assert bound["found"] == found and bound["limit"] == 2 and bound["least"] == least


def test_the_report_and_the_figure(out):
    folder = out / "spectral"
    cases = any_model_report.read(folder, spectral.CASES)
    if not {"fcn", "gpt"} <= cases.keys():
        pytest.skip("their cases were not run before")
    spectral.main(["report", "--out", str(out)])
    text = (folder / "README.md").read_text()
    assert text.startswith("# SpectralAGD")
    assert all(text.count(f"<!-- {case} -->") == 1 for case in cases)
    spectral.main(["draw", "--out", str(out)])
    with Image.open(folder / "spectral.png") as picture:
        assert picture.width == 2160 and picture.height > 900
