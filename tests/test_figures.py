import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from agd import AGD, init_weights
from architecture import build
from runs.log import RunError
from scripts import claims, figures, majorisation, report
from scripts.experiments import FIGURES, SCALES, SPECTRAL, Experiment, experiments
from scripts.results import Result, Results, data_name, log_name, tuned
from tests.conftest import ROOT

PUBLISHED = Results(ROOT / "results", "quick")
DRAWN = sorted((ROOT / "results").glob("*/figures/*.png"))


def words_in(path):
    """The Matplotlib that wrote a PNG, and the fingerprint of what it shows."""
    with Image.open(path) as picture:
        return picture.info["Software"], picture.info["Source"]


@pytest.mark.parametrize("path", DRAWN, ids=lambda p: f"{p.parent.parent.name}-{p.stem}")
def test_a_published_figure_is_drawn_again_from_its_logs(path, tmp_path):
    """To the pixel with the same Matplotlib, to the last point and word with any."""
    folder = path.parent.parent
    there = tmp_path / folder.name
    there.mkdir()
    (there / "logs").symlink_to(folder / "logs")
    if (folder / "fig3.json").exists():
        shutil.copy(folder / "fig3.json", there)
    png, pdf = figures.save(path.stem, Results(tmp_path, folder.name))
    (software, drawn), (then, published) = words_in(png), words_in(path)
    assert drawn == published
    if software == then:
        with Image.open(png) as ours, Image.open(path) as theirs:
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert pdf.exists() and path.with_suffix(".pdf").exists()


def test_every_figure_with_runs_is_published():
    with_runs = {f for f in FIGURES if f in ("fig2", "fig3") or PUBLISHED.of(f)}
    assert {path.stem for path in DRAWN if path.parent.parent.name == "quick"} == with_runs
    assert {"fig1", "fig2", "fig3", "fig5", "fig6", "fig7", "fig8"} <= with_runs


def test_the_published_page_is_what_its_logs_say(tmp_path):
    out = tmp_path / "results"
    shutil.copytree(ROOT / "results", out, ignore=shutil.ignore_patterns("checkpoints", "output"))
    assert report.write(out).read_text() == (ROOT / "results" / "README.md").read_text()


def test_published_logs_are_runs_of_the_table_and_small():
    paths = []
    for folder in sorted((ROOT / "results").glob("*/logs")):
        if folder.parent.name in SCALES:
            names = {log_name(row.flags) for row in experiments(folder.parent.name)}
            paths += folder.glob("*.jsonl")
            assert {path.stem for path in folder.iterdir()} <= names
    assert sum(path.stat().st_size for path in paths) < 3e6
    for path in paths:
        first = path.read_text().split("\n", 1)[0]
        assert not json.loads(first)["flags"]["data_dir"].startswith("/")
        assert "modified" not in first


# A table in memory.


def row(epoch, **values):
    fields = {"train_loss": 1 / epoch, "test_loss": 1.0, "train_acc": 0.5, "test_acc": 0.4}
    spread = {f"{k}_{s}": 0.1 for k in ("eta", "update") for s in ("min", "mean", "max")}
    clock = {"length": 1.0 + epoch, "turn": 0.1 / epoch}
    return {"kind": "epoch", "epoch": epoch, **fields, **spread, **clock, "seconds": 2.0, **values}


class Made(Results):
    """Every run of the table with made-up epochs: `change(experiment, row)` edits them."""

    def __init__(self, scale="quick", change=lambda x, r: None, cut=lambda x: x.epochs, out="o"):
        super().__init__(out, scale)
        self.change, self.cut = change, cut

    def find(self, x):
        rows = []
        for epoch in range(1, min(self.cut(x), 12) + 1):
            rows.append(row(epoch))
            self.change(x, rows[-1])
        x = x._replace(epochs=min(x.epochs, 12))
        first = {"name": x.panel, "settings": {"dataset": x.flag("--dataset")}, "data": {},
                 "device": "cpu", "train_examples": 1000, "paths": 8.0,
                 "device_name": "a processor", "threads": 1, "torch": "2", "date": "2026-01-01"}
        steps = [{"kind": "step", "epoch": 1, "step": i, "loss": 1.0, "acc": 0.1, "eta": 0.2}
                 for i in range(1, 9)]
        return Result(x, first, rows, steps, None, len(rows) >= x.epochs) if rows else None


@pytest.mark.parametrize("scale", ["quick", "full"])
@pytest.mark.parametrize("figure", sorted(set(FIGURES) - {"fig3"}))
def test_figures_are_drawn_at_both_scales(figure, scale):
    made = Made(scale)
    picture = figures.draw(figure, made)
    panels = {"fig1": 2 if scale == "quick" else 3, "fig2": 3, "fig5": 3, "fig8": 4, "phases": 2,
              "fig11": 3,
              "fig4": 6 if scale == "quick" else 8, "fig6": 40 if scale == "quick" else 60,
              "fig7": 8}  # fmt: skip
    assert len(picture.axes) == panels[figure]
    assert all(ax.has_data() for ax in picture.axes)
    figures.plt.close(picture)


def test_a_figure_with_nothing_to_draw_is_none_and_a_part_says_not_run():
    assert figures.draw("fig5", Made(cut=lambda x: 0)) is None
    picture = figures.draw("fig6", Made(cut=lambda x: 5 if x.panel == "4x128" else 0))
    words = [text.get_text() for ax in picture.axes for text in ax.texts]
    assert words.count("not run") == 19
    figures.plt.close(picture)


@pytest.mark.parametrize("figure", ["fig6", "fig7"])
def test_runs_of_another_seed_alone_are_drawn(figure):
    made = Made(cut=lambda x: x.epochs if "1" in x.flag("--seed") or figure == "fig6" else 0)
    figures.plt.close(figures.draw(figure, made))


def test_a_panel_without_runs_leaves_the_others_their_axes():
    picture = figures.draw("fig7", Made(cut=lambda x: 0 if x.panel == "batch 4096" else 5))
    assert all(len(ax.get_yticks()) > 2 for ax in picture.axes[:4])
    figures.plt.close(picture)


def test_figure_8_leaves_out_what_has_diverged():
    made = Made(change=by(lambda x, n: {"train_loss": None} if x.curve == "Prodigy" else {}))
    picture = figures.draw("fig8", made)
    words = [text.get_text() for text in picture.legends[0].get_texts()]
    assert "Prodigy: not finished" in words and len(picture.axes[0].lines) == 6
    figures.plt.close(picture)


def test_figure_8_counts_epochs_and_seconds():
    made = Made(change=by(lambda x, n: {"seconds": 7.0} if x.curve == SPECTRAL else {}))
    picture = figures.draw("fig8", made)
    words = [text.get_text() for text in picture.legends[0].get_texts()]
    assert words[:2] == ["AGD", SPECTRAL]
    epochs, seconds = ([line.get_xdata()[-1] for line in ax.lines] for ax in picture.axes[:2])
    assert epochs == [12, 12, 12, 12, 12, 60, 60]
    assert seconds == [24, 84, 24, 24, 24, 120, 120]
    figures.plt.close(picture)


def test_figure_11_draws_the_clock_beside_what_is_predicted():
    """8 steps an epoch, η 0.1, 8 layers: 1 / 80 of a weight a step."""
    picture = figures.draw("fig11", Made())
    length, turn, eta = picture.axes
    measured, predicted = (line.get_ydata() for line in length.lines)
    assert list(measured) == [2.0 + n for n in range(12)]
    assert predicted[4] == pytest.approx(math.sqrt(1 + 3 * 40 / 80**2))
    measured, predicted = (line.get_ydata() for line in turn.lines)
    assert measured[4] == pytest.approx(0.02) and predicted[4] == pytest.approx(120**-0.5)
    assert len(eta.lines) == 1 and len(eta.collections) == 1
    assert "8 steps an epoch" in picture._supxlabel.get_text()
    figures.plt.close(picture)


def test_a_figure_without_the_spectral_runs_is_drawn_as_before():
    made = Made(cut=lambda x: 0 if x.curve == SPECTRAL else 99)
    for figure in ("fig1", "fig5", "fig8"):
        picture = figures.draw(figure, made)
        words = [text.get_text() for text in picture.legends[0].get_texts()]
        assert "AGD" in words and not any(SPECTRAL in x for x in words)
        figures.plt.close(picture)
    assert figures.draw("fig11", made) is None


def test_a_search_under_way_is_not_drawn_as_tuned():
    made = Made(cut=lambda x: 3 if x.flag("--lr") == "1e-3" else 99)
    picture = figures.draw("fig5", made)
    words = [text.get_text() for text in picture.legends[0].get_texts()]
    assert words[:4] == ["AGD", SPECTRAL, "Adam: search not finished", "SGD: search not finished"]
    figures.plt.close(picture)


def test_figure_5_shows_the_tuned_rates():
    def change(x, r):
        best = {"Adam": "1e-4", "SGD": "1e-1"}.get(x.curve)
        r["train_loss"] = 0.5 if x.flag("--lr") == best else 0.9

    picture = figures.draw("fig5", Made(change=change))
    words = [text.get_text() for text in picture.legends[0].get_texts()]
    assert words[:4] == ["AGD", SPECTRAL, "Adam, rate 1e-4", "SGD, rate 1e-1"]
    figures.plt.close(picture)


def grid_of(*losses, stopped=None):
    found = []
    for i, values in enumerate(losses):
        rows = [row(n, train_loss=v) for n, v in enumerate(values, 1)]
        x = Experiment("fig5", "fcn", "Adam", 9, ("--lr", f"1e-{i}"))
        found.append(Result(x, {}, rows, [], None if stopped != i else "nan", True))
    return found


def test_tuned_is_the_least_final_train_loss_of_the_runs_that_came_to_the_end():
    assert tuned(grid_of([3, 2], [1, 4], [3, 3]), 3).experiment.flag("--lr") == "1e-0"
    broken = grid_of([3, 2], [1, None, None], [3, 1.5], stopped=1)
    assert tuned(broken, 3).experiment.flag("--lr") == "1e-2"
    assert tuned(grid_of([3, None], [3, 2]), 2).experiment.flag("--lr") == "1e-1"
    assert tuned(grid_of([None], [None]), 2) is None


def test_nothing_is_tuned_while_the_search_is_under_way():
    assert tuned(grid_of([3, 2], [1], [3, 1.5]), 3) is None  # the second has not come as far
    assert tuned(grid_of([3, 2], [3, 1.5]), 3) is None  # nor has the third begun
    assert tuned([], 3) is None


def test_a_search_pays_for_all_its_points():
    spent = list(figures.searched(grid_of([3, 2, 1], [1, 4, 4], [2], stopped=2)))
    assert [(n, s, r["train_loss"]) for n, s, r in spent] == [(3, 6, 1), (5, 10, 2), (7, 14, 1)]
    # As far as all go that did not break off; and past epochs in which none was finite.
    assert len(list(figures.searched(grid_of([3, 2, 1], [1])))) == 1
    assert [n for n, *_ in figures.searched(grid_of([None, 2]))] == [2]
    assert list(figures.searched(grid_of([None]))) == []


@pytest.mark.parametrize("count", [1, 2, 13, 49, 391, 1563])
def test_bins_take_every_step_once(count):
    parts = figures.bins(count)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(part.stop > part.start for part in parts)


def test_descent_is_gradient_descent():
    w = figures.descent(0.5, start=1.0, steps=3)
    assert list(w) == [1.0, 0.5, 0.25, 0.125]
    assert abs(figures.descent(2.07)[-1]) > abs(figures.descent(2.07)[0])


# The verdicts: each on runs for which it holds, and on runs for which it does not.


def by(function):
    def change(x, r):
        r.update(function(x, r["epoch"]))

    return change


def chance(x, n):
    return {"train_acc": 0.4 if x.curve == "AGD" else 0.1}


def failed_in_the_end(x, n):
    return {"train_acc": 0.4 if x.curve == "AGD" or n == 1 else 0.1}


def rates(best):
    def values(x, n):
        good = x.flag("--lr") == best.get(x.curve)
        return {"train_loss": {"AGD": 0.4, "Adam": 0.3, "SGD": 0.5}.get(x.curve, 1) + (not good)
                if x.curve in best else 0.4}

    return values


def edge(x, n):
    """As in the paper on its grid, while a wider one has something better."""
    found = rates({"Adam": "1e-4", "SGD": "1e-1"})(x, n)
    return {"train_loss": 0.1} if x[:3] == ("fig1", "rates", "SGD") and "1e0" in x.flags else found


def size(x, n):
    if x.figure != "fig6":
        return {}
    depth, width = map(int, x.panel.split("x"))
    return {"train_loss": 1 / width + depth / 1e4}


def batch(x, n):
    return {"test_acc": 0.3 + int(x.flag("--train_bs", 128)) / 1e5}


def rise_and_fall(x, n):
    return {"train_acc": n / 12, "eta_mean": 0.1 + 0.1 * min(n, 14 - n)}


HOLDS = [
    (claims.deep, chance, lambda x, n: {"train_acc": 0.4}),
    (claims.deep, chance, failed_in_the_end),
    (claims.best_rates, rates({"Adam": "1e-4", "SGD": "1e-1"}),
     rates({"Adam": "1e-3", "SGD": "1e-1"})),
    (claims.smaller_objective, rates({"Adam": "1e-4", "SGD": "1e-1"}),
     lambda x, n: {"train_loss": 0.5}),
    (claims.wider, size, lambda x, n: {"train_loss": 0.5}),
    (claims.depth_32, size, lambda x, n: {"train_loss": 0.5}),
    (claims.best_rates, rates({"Adam": "1e-4", "SGD": "1e-1"}), edge),
    (claims.batches, lambda x, n: {}, lambda x, n: {"train_loss": float(n)}),
    (claims.batches, lambda x, n: {}, lambda x, n: {"train_loss": 1 - n / 1e5, "train_acc": 0.1}),
    (claims.batches, lambda x, n: {},
     lambda x, n: {"train_loss": float(n)} if x.flag("--seed") == "2" else {}),
    (claims.larger_batches, batch, lambda x, n: {}),
    (claims.two_phases, rise_and_fall, lambda x, n: {"train_acc": n / 12}),
    (claims.two_phases, rise_and_fall,
     lambda x, n: {**rise_and_fall(x, n), "train_acc": 0.2 if n < 12 else 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("claim, good, bad", HOLDS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_verdict_is_what_the_runs_say(claim, good, bad):
    assert claims.judge(claim, Made(change=by(good)))[0] == "holds"
    verdict, said = claims.judge(claim, Made(change=by(bad)))
    assert verdict == "does not hold" and said
    assert claims.judge(claim, Made(cut=lambda x: 0)) == ("not run", "")


def test_comparable_is_judged_on_resnet_18():
    claim = claims.comparable
    assert claims.judge(claim, Made("quick"))[0] == "not run"  # there it is another network
    assert claims.judge(claim, Made("full"))[0] == "holds"
    far = by(lambda x, n: {"test_acc": 0.9 if x.curve == "AGD" else 0.93})
    assert claims.judge(claim, Made("full", far))[0] == "does not hold"


def test_runs_under_way_judge_nothing_and_tell_how_it_stands():
    made = Made(change=by(size), cut=lambda x: 3)
    verdict, said = claims.judge(claims.wider, made)
    assert verdict == "not run" and said.startswith("so far, 3 of 6 epochs: 15 of 15")
    made.cut = lambda x: 3 if x.panel == "2x64" else 4
    assert claims.judge(claims.wider, made) == ("not run", "")


def test_a_run_that_was_looked_at_and_left_aside_does_not_count():
    made = Made("full", by(rise_and_fall), cut=lambda x: 3 if x.figure == "phases" else 12)
    assert claims.judge(claims.two_phases, made)[0] == "holds"


def test_phases_that_were_not_fitted_are_no_evidence():
    low = by(lambda x, n: {"train_acc": 0.9})
    assert claims.judge(claims.two_phases, Made(change=low))[0] == "not run"


def bound_at(tmp_path, loss, epochs=14, states=("before", "after")):
    made = Made(out=tmp_path)
    made.folder.mkdir()
    bound = majorisation.majorisation(1.0, 0.5, [0, 0.4])
    state = {"L": 1.0, "G": 0.5, "eta": 0.4, "t": [0, 0.4], "loss": [1.0, loss], "bound": bound}
    what = {"run": {"epochs": epochs}, "states": dict.fromkeys(states, state)}
    (made.folder / "fig3.json").write_text(json.dumps(what))
    return claims.judge(claims.bound, made)


@pytest.mark.parametrize("loss, verdict", [(0.8, "holds"), (0.95, "does not hold")])
def test_the_bound_is_judged_at_every_point(loss, verdict, tmp_path):
    least = 1 - 0.4 * 0.5 + 0.5 * (math.exp(0.4) - 1) ** 2
    assert 0.8 < least < 0.95
    assert bound_at(tmp_path, loss)[0] == verdict


@pytest.mark.parametrize("part", [{"epochs": 4}, {"states": ("before",)}])
def test_half_a_measurement_of_the_bound_is_none(part, tmp_path):
    assert bound_at(tmp_path, 0.8, **part) == ("not run", "")


# The page.


def test_the_page_has_numbers_spread_grids_and_what_is_missing(tmp_path):
    def values(x, n):
        seed = int(x.flag("--seed"))
        return {"test_acc": 0.40 + seed / 100, "train_loss": 0.5 if x.flag("--lr") else 0.4}

    made = Made(change=by(values), cut=lambda x: 0 if x.figure == "fig7" else x.epochs)
    page = report.numbers(made)
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if "|" in line}
    assert "41.0 (40.0 to 42.0, 3 seeds)" in lines["fig. 5, FCN 8×256, CIFAR-10, AGD"]
    sixteen = lines["fig. 4, FCN 16×512, CIFAR-10, AGD"]
    assert "| 52.7 | 40.0 |" in sixteen
    assert "| 55.0 | not run |" in lines["fig. 7, FCN 4×256, CIFAR-10, batch 32, AGD"]
    assert "`python main.py --arch fcn --depth 16" in sixteen
    assert "a processor, 1 thread a run, torch 2; 2026-01-01" in sixteen
    assert "| at 1e-4 | 40.0 |" in lines["fig. 5, FCN 8×256, CIFAR-10, Adam at 1e-5"]
    assert any("tiny100" in line for line in lines)
    grids = report.rates(made)
    assert "**0.5000, 40.0 %**" in grids and "1e-7" in grids
    assert "| fig7 | 0 of 12 |" in report.extent(made)
    assert "| fig6 | 20 of 20 |" in report.extent(made)


def test_runs_that_are_cut_are_marked_and_seeds_of_other_lengths_left_out():
    made = Made(cut=lambda x: 2 if x.flag("--seed") == "1" or x.panel == "2x64" else 99)
    page = report.numbers(made)
    assert "2 seeds" in page and "3 seeds" not in page
    assert "(2 of 6 epochs)" in report.widths_and_depths(made)
    assert "not run (5 of 5 runs begun)" not in page
    made.cut = lambda x: 2 if x.flag("--lr") == "1e-3" else 99
    assert "not run (5 of 5 runs begun)" in report.numbers(made)
    assert "**" not in report.rates(made).split("### The searches")[1].split("|", 1)[1]


def test_runs_on_different_images_are_not_put_together():
    made = Made()
    find = made.find

    def other(x):
        found = find(x)
        return found._replace(first={**found.first, "data": {"crc32": x.flag("--seed")}})

    made.find = other
    with pytest.raises(RunError, match="different images"):
        made.of("fig5")
    with pytest.raises(RunError, match="different images"):
        claims.judge(claims.larger_batches, made)


def test_hardware_that_a_run_went_on_with_is_named():
    first = Made().find(experiments("quick")[0]).first
    later = {"after_epoch": 3, "device": "cuda", "device_name": "a GPU", "threads": 1}
    words = report.made_with({**first, "resumed": [later]})
    assert words.endswith("2026-01-01, from epoch 4 a GPU, torch 2")


def test_a_run_that_broke_off_stays_in_its_grid():
    made = Made(change=by(lambda x, n: {"train_loss": None if x.flag("--lr") == "1e-1" else 0.5}))
    find = made.find

    def broken(x):
        found = find(x)
        lost = x.flag("--lr") == "1e-1"
        return found._replace(stopped="the loss was nan at epoch 2; try") if lost else found

    made.find = broken
    assert "stopped in epoch 12: the loss was nan |" in report.rates(made)


def test_jpeg_images_are_called_so():
    crc = {"crc32": {"train_images": "2926c671"}}
    assert data_name("cifar10", crc) == "JPEG CIFAR-10"
    assert data_name("cifar10", {}) == "CIFAR-10"
    assert data_name("tiny100", {}) == "tiny100"


# Figure 3's measurement.


def chunks(count=30, classes=4):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 12, dtype=torch.float64, generator=generator)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(12)
    y = torch.randint(classes, (count,), generator=generator)
    return list(zip(x.split(7), y.split(7)))


def test_the_curve_starts_at_the_objective_with_slope_minus_G_and_ends_where_AGD_goes():
    net = build("fcn", (3, 2, 2), 4, depth=3, width=16).double()
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    start = [p.detach().clone() for p in net.parameters()]
    state = majorisation.along(net, chunks())
    for p, w in zip(net.parameters(), start):
        p.data.copy_(w)
    x, y = (torch.cat(parts) for parts in zip(*chunks()))
    onehot = torch.nn.functional.one_hot(y, 4) * 2.0
    loss = (net(x) - onehot).square().mean() / 2  # |f - y|^2 / (2 d_L), a mean over images
    optimizer = AGD(net.parameters())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert state["L"] == pytest.approx(loss.item(), rel=1e-12)
    assert state["G"] == pytest.approx(float(optimizer.G), rel=1e-12)
    assert state["eta"] == pytest.approx(float(optimizer.eta), rel=1e-12)
    t, curve = state["t"], state["loss"]
    assert t[0] == 0 and curve[0] == pytest.approx(state["L"], rel=1e-12)
    assert (curve[1] - curve[0]) / t[1] == pytest.approx(-state["G"], rel=0.1)
    with torch.no_grad():
        there = ((net(x) - onehot).square().mean() / 2).item()
    assert np.interp(state["eta"], t, curve) == pytest.approx(there, rel=1e-3)
    assert state["chain"]["dL"] == pytest.approx(there - state["L"], rel=1e-9)


def test_the_majorisation_is_least_at_eta():
    G = 0.7
    eta = math.log((1 + math.sqrt(1 + 4 * G)) / 2)
    ts = [eta * i / 100 for i in range(250)]
    bound = majorisation.majorisation(1.0, G, ts)
    assert bound[0] == 1.0 and bound.index(min(bound)) == 100


def test_a_damaged_measurement_is_named(tmp_path):
    there = Results(tmp_path, "quick")
    there.folder.mkdir()
    (there.folder / "fig3.json").write_text("{")
    with pytest.raises(RunError, match="fig3.json is damaged"):
        figures.draw("fig3", there)


def test_measuring_wants_the_trained_weights(tmp_path):
    with pytest.raises(RunError, match="there is no"):
        majorisation.measure(Results(tmp_path, "quick"), tmp_path)


def test_measuring_is_done_once(samples, tmp_path, monkeypatch):
    """On a network that has stood still."""
    import main as program

    data_dir = samples("cifar10")
    words = "--arch fcn --depth 3 --width 16 --dataset cifar10 --train_examples 64 " \
            "--test_examples 10 --optimizer agd --seed 0"
    table = [Experiment("fig3", "majorisation", "AGD", 1, tuple(words.split()))]
    there = Results(tmp_path, "quick")
    there.table = table
    monkeypatch.setattr(majorisation, "IMAGES", 500)
    out = str(there.folder)
    program.main([*words.split(), "--epochs", "1", "--out", out, "--device", "cpu",
                  "--data_dir", str(data_dir)])
    path = majorisation.measure(there, data_dir)
    what = json.loads(path.read_text())
    assert what["images"] == 500 and list(what["states"]) == ["at initialisation", "after 1 epochs"]
    at_start, later = what["states"].values()
    assert at_start["L"] != later["L"] and len(at_start["t"]) == len(at_start["loss"])
    stamp = path.stat().st_mtime_ns
    assert majorisation.measure(there, data_dir) == path and path.stat().st_mtime_ns == stamp
    picture = figures.draw("fig3", there)
    assert len(picture.axes) == 3
    figures.plt.close(picture)
