"""Published figures and page follow from the logs; figures, verdicts, page of made-up runs."""

import json
import math
import shutil
from statistics import fmean

import numpy as np
import pytest
import torch
from PIL import Image

import main as program
from agd import AGD, init_weights
from architecture import build
from runs.log import RunError
from scripts import bigram, claims, figures, majorisation, publish, report, style
from scripts.claims import CLAIMS, at_one_loss, judge
from scripts.experiments import (
    BASELINES,
    BATCHES,
    FIGURES,
    PEERS,
    RULES,
    SCALES,
    SPECTRAL,
    Experiment,
    experiments,
)
from scripts.results import Result, Results, log_name, searched
from scripts.words import data_name
from tests.conftest import ROOT

PUBLISHED = Results(ROOT / "results", "quick")
DRAWN = sorted((ROOT / "results").glob("*/figures/*.png"))
CLAIM = {claim.evidence.__name__: claim for claim in CLAIMS}


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
    with Image.open(png) as ours, Image.open(path) as theirs:
        assert ours.info["Source"] == theirs.info["Source"]
        if ours.info["Software"] == theirs.info["Software"]:
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert pdf.exists() and path.with_suffix(".pdf").exists()


@pytest.mark.parametrize("scale", SCALES)
def test_every_figure_with_runs_is_published(scale):
    results = Results(ROOT / "results", scale)
    with_runs = {f for f in FIGURES if results.of(f)}
    with_runs |= {"fig2"} if scale == "quick" else set()  # it has no runs, nor a length
    with_runs |= {"fig3"} if (results.folder / "fig3.json").exists() else set()
    assert {path.stem for path in DRAWN if path.parent.parent.name == scale} == with_runs
    assert {"fig1", "fig3", "fig5", "fig6", "fig7", "fig8"} <= with_runs


def test_the_published_page_is_what_its_logs_say(tmp_path):
    out = tmp_path / "results"
    shutil.copytree(ROOT / "results", out, ignore=shutil.ignore_patterns("checkpoints", "output"))
    assert report.write(out).read_text() == (ROOT / "results" / "README.md").read_text()


def test_readme_counts_the_verdicts_on_the_papers_claims():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def counts(scale):
        verdicts = [judge(claim, Results(ROOT / "results", scale))[0] for claim in CLAIMS[:-2]]
        count = [sum(x.startswith(y) for x in verdicts) for y in ("hold", "does not", "not run")]
        words = zip(count, ("holds", "does not", "is not judged"),
                    ("hold", "do not", "are not judged"))  # fmt: skip
        return "{}, {} and {}".format(*(f"{n} {one if n == 1 else more}" for n, one, more in words))

    assert (f"each of the paper's {len(CLAIMS) - 2} claims. In the short versions "
            f"{counts('quick')}; in the long runs, so far, {counts('full')}.") in readme


def test_readme_shows_figure_8_as_its_logs_have_it():
    """The table of train losses and test accuracies, after two lengths."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "train loss, 14 epochs" in line)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    rows = rows[2 : rows.index([""])]
    assert len(rows) == len(RULES) + len(PEERS) + len(BASELINES)
    for name, _, *cells in rows:
        curve = {"SpectralAGD": SPECTRAL, "Schedule-Free AdamW": "Schedule-free AdamW"}
        curve = next((y for x, y in curve.items() if name.startswith(x)), name.split(",")[0])
        expected = []
        for scale, epochs in (("quick", 14), ("full", 100)):
            runs = Results(ROOT / "results", scale)
            runs = runs.tuned_seeds if curve in BASELINES else runs.of
            runs = [run.until(epochs) for run in runs("fig8", "fcn", curve)]
            loss, acc = (fmean(run.last[key] for run in runs) for key in ("train_loss", "test_acc"))
            expected += [f"{loss:.3f}", f"{100 * acc:.1f} %"]
        assert cells == expected, name


def test_publishing_takes_ended_runs_without_what_is_of_this_machine(tmp_path):
    """A longer log replaces a shorter one; one that is still written, was interrupted or has no
    commit does not, nor does one that the table does not have."""
    here, there = Results(tmp_path / "here", "full"), tmp_path / "there"
    names = [log_name(row) for row in here.table[:6]]
    end = {"kind": "end", "epochs": 2, "final": True}
    (here.folder / "logs").mkdir(parents=True)

    def write(name, *rows, **first):
        flags = {"data_dir": "/home/me", "out": str(tmp_path)}
        run = {"kind": "run", "name": name, "settings": {}, "commit": "a", "flags": flags, **first}
        here.log(name).write_text("\n".join(json.dumps(x) for x in (run, *rows)) + "\n")

    write(names[0], row(1), row(2, train_loss=0.123456789, images_per_second=9.0), end)
    write(names[1], row(1))
    write(names[2], row(1), end, commit="a-modified")
    write(names[3], row(1), {**end, "final": False})
    here.log(names[4]).touch()
    write(names[5], row(1), end, resumed=[{"after_epoch": 1, "commit": "b-modified"}])
    write("another", row(1), end)
    assert publish.main([str(here.out), "--out", str(there)]) is None
    (path,) = there.rglob("*.jsonl")
    first, *_, last, _ = map(json.loads, path.read_text().splitlines())
    assert path == there / f"full/logs/{names[0]}.jsonl" and last["train_loss"] == 0.123457
    assert "images_per_second" not in last
    assert first["flags"] == {"data_dir": "~/.cache/agd", "out": "results/full"}
    write(names[0], row(1), end)
    assert not list(publish.publish(here.out, there))
    write(names[0], row(1), row(2), row(3), end)
    assert list(publish.publish(here.out, there)) == [path] and '"epoch": 3' in path.read_text()

    # Figure 3's measurement, where it is of a longer run.
    mine, theirs = here.folder / "fig3.json", there / "full" / "fig3.json"
    for epochs, copied in ((2, True), (1, False), (3, True)):
        mine.write_text(json.dumps({"run": {"epochs": epochs}, "states": {}}))
        assert list(publish.publish(here.out, there)) == [theirs] * copied
    assert theirs.read_bytes() == mine.read_bytes()


def test_published_logs_are_runs_of_the_table_and_small():
    paths = []
    for scale in SCALES:
        names = {log_name(row) for row in experiments(scale)}
        logs = list((ROOT / "results" / scale / "logs").glob("*.jsonl"))
        assert {path.stem for path in logs} <= names
        paths += logs
    assert sum(path.stat().st_size for path in paths) < 5e6
    for path in paths:
        assert path.stat().st_size < 500 * path.read_bytes().count(b"\n") + 4e3, path
    for path in paths:
        first = path.read_text().split("\n", 1)[0]
        assert not json.loads(first)["flags"]["data_dir"].startswith("/")
        assert "modified" not in first


def row(epoch, **values):
    fields = {"train_loss": 1 / epoch, "test_loss": 1.0, "train_acc": 0.5, "test_acc": 0.4,
              "test_bits": 1.5}  # fmt: skip
    spread = {f"{k}_{s}": 0.1 for k in ("eta", "update") for s in ("min", "mean", "max")}
    clock = {"length": 1.0 + epoch, "turn": 0.1 / epoch}
    return {"kind": "epoch", "epoch": epoch, **fields, **spread, **clock, "seconds": 2.0, **values}


class Made(Results):
    """Every run of the table with at most 12 made-up epochs: `change(experiment, epoch)` gives
    their values, `cut` their number, `first` and `stopped` what differs in a run."""

    def __init__(self, scale="quick", change=lambda x, n: {}, cut=lambda x: x.epochs, out="o",
                 first=lambda x: {}, stopped=lambda x: None):  # fmt: skip
        super().__init__(out, scale)
        self.change, self.cut, self.first, self.stopped = change, cut, first, stopped

    def find(self, x):
        x = x._replace(epochs=min(x.epochs, 12))
        rows = [row(n, **self.change(x, n)) for n in range(1, min(self.cut(x), x.epochs) + 1)]
        settings = {"dataset": x.flag("--dataset"), "train_bs": int(x.flag("--train_bs", 128))}
        first = {"name": x.panel, "settings": settings, "data": {},
                 "device": "cpu", "train_examples": 1000, "paths": 8.0, "threads": 1, "torch": "2",
                 "device_name": "a processor", "date": "2026-01-01", **self.first(x)}
        steps = [{"kind": "step", "epoch": 1, "step": i, "loss": 1.0, "acc": 0.1, "eta": 0.2}
                 for i in range(1, 9)]
        stopped = self.stopped(x)
        finished = stopped is not None or len(rows) >= x.epochs
        return Result(x, first, rows, steps, stopped, finished) if rows else None


@pytest.fixture
def drawn():
    """f(figure, made) -> its picture, and the words of its legend."""
    pictures = []

    def draw(figure, made):
        pictures.append(figures.draw(figure, made))
        return pictures[-1], [text.get_text() for text in pictures[-1].legends[0].get_texts()]

    yield draw
    for picture in pictures:
        figures.plt.close(picture)


@pytest.mark.parametrize("figure, axes", [
    ("fig1", 3), ("fig4", 12), ("fig5", 3), ("fig6", 18), ("fig7", 3), ("fig8", 4), ("fig10", 2),
    ("fig11", 3), ("phases", 2),
])  # fmt: skip
def test_figures_are_drawn_at_the_full_scale(figure, axes, drawn):
    picture, _ = drawn(figure, Made("full"))
    assert len(picture.axes) == axes and all(ax.has_data() for ax in picture.axes)


def test_a_figure_without_runs_is_none_and_a_part_of_it_is_drawn(drawn):
    assert figures.draw("fig5", Made(cut=lambda x: 0)) is None
    for figure, panel, axes in (("fig6", "4x128", 6), ("fig1", "deep", 1), ("fig4", "fcn", 3)):
        picture, _ = drawn(figure, Made(cut=lambda x, panel=panel: 5 if x.panel == panel else 0))
        assert len(picture.axes) == axes
        words = [text.get_text() for ax in picture.axes for text in ax.texts]
        assert "not run" not in words
    sizes = {"2x64": 5, "8x512": 3}  # after the 3 epochs that both have; their squares are empty
    picture, _ = drawn("fig6", Made(cut=lambda x: sizes.get(x.panel, 0)))
    assert [text.get_text() for text in picture.axes[0].texts] == ["0.333", "0.333"]
    assert picture.axes[0].get_title() == "train loss, epoch 3"
    # Nor does one that has only begun, of which the table says so.
    begun = Made(cut=lambda x: 1 if x.panel == "4x64" else 4)
    begun.find = lambda x, find=begun.find: find(x)._replace(
        experiment=x._replace(epochs=41 if x.panel == "4x64" else 4))  # fmt: skip
    assert drawn("fig6", begun)[0].axes[0].get_title() == "train loss, epoch 4"
    assert "| depth 4 | begun | 0.2500, 40.0 % |" in report.sizes(begun)
    words = drawn("fig7", Made(cut=lambda x: 0 if x.panel == "batch 4096" else 5))[1]
    assert words == ["batch size 32", "batch size 128", "batch size 1,024"]
    drawn("fig7", Made(cut=lambda x: x.epochs if "1" in x.flag("--seed") else 0))
    made = Made(cut=lambda x: 0 if x.curve == SPECTRAL else 99)
    for figure in ("fig1", "fig5", "fig8", "fig10"):
        words = drawn(figure, made)[1]
        assert "AGD" in words and not any(SPECTRAL in x for x in words)
    assert figures.draw("fig11", made) is None


def test_figure_4_takes_what_stands_in_for_a_panel_that_was_not_run(drawn):
    stand_in = "resnet18, 5,000 images"
    made = Made("full", cut=lambda x: 0 if x.panel.startswith("vgg") else 9)
    picture, words = drawn("fig4", made)
    assert len(picture.axes) == 9 and words == ["AGD", "Adam", "SGD", "train", "test"]
    assert [ax.texts[0].get_text() for ax in picture.axes[:3]] == [
        "Adam, rate 1e-5", "Adam, rate 1e-5", "SGD, rate 1e-1"]  # fmt: skip
    # A run of the panel itself that says nothing yet; a grid without one of its runs.
    made.cut = lambda x: 9 if (x.panel in ("fcn", stand_in) and x.flag("--lr") != "1e-2"
                               or x.panel == "resnet18" and "1e-3" in x.flags) else 0  # fmt: skip
    picture, words = drawn("fig4", made)
    assert len(picture.axes) == 6 and words == ["AGD", SPECTRAL, "Adam", "train", "test"]
    assert picture.axes[1].get_title() == "ResNet-18\nCIFAR-10, 5,000 images"
    assert [ax.texts[0].get_text() for ax in picture.axes[:2]] == [
        "Adam: search not finished", "Adam, rate 1e-4"]  # fmt: skip
    made.cut = lambda x: 9 if x.panel == "imagenet" and x.curve == "SGD" else 0
    picture, words = drawn("fig4", made)
    assert [ax.texts[0].get_text() for ax in picture.axes[::2]] == ["SGD, rate 1e-1", "not run"]


def test_a_long_line_goes_through_means_and_ends_with_the_run():
    x, y = style.binned(list(range(1000)))
    assert x[:3] == [1, 2, 3] and y[:3] == [0, 1, 2] and x[-1] == y[-1] + 1 > 900 and len(x) < 60
    assert style.binned([5, 6])[1] == [5, 6]
    # Markers between those of another line.
    x = np.arange(1, 101)
    assert [x[i] for i in style.spaced(x, 3)] == [1, 10, 100]
    assert [x[i] for i in style.spaced(x, 3, 0.5)] == [3, 32]
    assert style.spaced(x[:5], 3) == [0, 1, 2, 3, 4]


def test_the_legend_says_when_a_rate_was_chosen(drawn):
    made = Made("full", PAPERS, cut=lambda x: 3 if x.flag("--lr") == "1e-5" else 9)
    words = drawn("fig5", made)[1]
    assert words[2:] == [f"{name} (chosen after 3 epochs)"
                         for name in ("Adam, rate 1e-4", "SGD, rate 1e-1")]  # fmt: skip


def test_the_steps_of_figure_7_go_on_as_epochs_without_a_break():
    """Eight steps, then the second epoch of 1,000 images in batches of 128 at its middle."""
    result = Made().only("fig7", "batch 128", "AGD")
    steps, loss, low, mean, high = figures._iterations(result)
    assert list(steps[-12:-8]) == [7.5, 12, 20, 28] and np.all(np.diff(steps) > 0)
    assert loss[-12:-9] == pytest.approx([1, 1 / 2, 1 / 3])
    assert mean[-12:-10] == pytest.approx([0.2, 0.1]) and len(low) == len(high) == len(steps)


def tuned_at(**rates):
    """Train losses that are least at these rates; AGD's is 0.4."""
    losses = {"AGD": 0.4, "Adam": 0.3, "SGD": 0.5}

    def values(x, n):
        good = x.flag("--lr") == rates.get(x.curve)
        return {"train_loss": losses[x.curve] + (not good) if x.curve in rates else 0.4}

    return values


PAPERS = tuned_at(Adam="1e-4", SGD="1e-1")


def on_text(ours, adamw, spread=0.0, best="3e-3"):
    """Validation losses of a text: of both rules, and of AdamW at its best rate, to which every
    seed adds `spread`; elsewhere train and validation losses are larger by 1."""

    def values(x, n):
        off = x.curve == "AdamW" and x.flag("--lr") != best
        loss = (adamw if x.curve == "AdamW" else ours) + spread * int(x.flag("--seed")) + off
        return {"train_loss": loss, "test_loss": loss}

    return values


def test_figure_10_has_seeds_as_bands_and_the_tuned_rate(drawn):
    """The x of its curves is steps; what has not finished has no last loss."""
    picture, words = drawn("fig10", Made(change=on_text(1.7, 1.6, 0.01)))
    steps, rates = picture.axes
    assert words[:3] == ["AGD", SPECTRAL, "AdamW, rate 3e-3"]
    assert words[-1] == "a bigram's loss, 2.48"
    assert list(steps.lines[0].get_xdata()) == [8 * n for n in range(1, 7)]  # of 1,000 examples
    assert steps.lines[0].get_ydata() == pytest.approx([1.71] * 6)
    band = steps.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((1.7, 1.72))
    thin = [line for line in steps.lines if line.get_linewidth() == 0.6]
    assert len(thin) == 4 and len(steps.lines) == 4 + 5 + 1
    assert rates.lines[2].get_ydata() == pytest.approx([2.61, 2.61, 1.61, 2.61, 2.61])
    made = Made(change=on_text(1.7, 1.6), cut=lambda x: 5 if x.flag("--lr") == "1e-2" else 6)
    picture, words = drawn("fig10", made)
    assert "AdamW: not finished" in words and len(picture.axes[1].lines[2].get_xdata()) == 4
    assert len([x for x in picture.axes[0].lines if x.get_linewidth() == 0.6]) == 5


def test_a_bigram_knows_the_frequencies_of_pairs():
    train, pairs = np.array([0, 1, 0, 1, 0, 2]), np.array([[0, 1], [2, 2]])
    # After 0 came 1 twice and 2 once; after 2 nothing; one is added to each count.
    assert bigram.loss(train, pairs, 3) == pytest.approx(-(math.log(3 / 6) + math.log(1 / 3)) / 2)
    assert 2.45 < bigram.bigram_loss() < 2.5


def grid_of(*losses, stopped=None):
    """A grid of three runs, begun with these train losses."""
    made = Made()
    made.table = [Experiment("fig5", "fcn", "Adam", 9, ("--lr", f"1e-{i}")) for i in range(3)]

    def find(x):
        i = made.table.index(x)
        rows = [row(n, train_loss=v) for n, v in enumerate([*losses, [], [], []][i], 1)]
        return Result(x, {"data": {}}, rows, [], "nan" if i == stopped else None, True)

    made.find = lambda x: find(x) if find(x).epochs else None
    return made


@pytest.mark.parametrize("losses, stopped, best", [
    ([[3, 2], [1, 4], [3, 3]], None, "1e-0"),
    ([[3, 2], [1, None, None], [3, 1.5]], 1, "1e-2"),
    ([[3, None], [3, 2], [3, 4]], None, "1e-1"),
    ([[None], [None], [None]], None, None),
    ([[3, 2], [4], [2, 5]], None, "1e-2"),  # the second has not come as far
    ([[3, 2], [3, 1.5]], None, None),  # nor has the third begun
    ([], None, None),
])  # fmt: skip
def test_tuned_is_the_least_train_loss_where_the_whole_grid_is(losses, stopped, best):
    """The run of the rate is as long as it went on."""
    made = grid_of(*losses, stopped=stopped)
    result = made.tuned("fig5", "fcn", "Adam")
    assert (result and result.experiment.flag("--lr")) == best
    if best:
        assert len(result.epochs) == len(losses[int(best[-1])])
        assert made.searched_epochs("fig5", "fcn", "Adam") == min(map(len, losses))


def test_a_rate_with_seeds_is_tuned_by_their_mean():
    """One of them that broke off spoils it."""

    def losses(x, n):
        best = {"3e-3": [1.0, 1.0, 1.6], "1e-2": [1.1, 1.1, 1.1]}.get(x.flag("--lr"), [2.0] * 3)
        return {"train_loss": best[int(x.flag("--seed"))]}

    key = "fig10", "gpt", "AdamW"
    runs = Made(change=losses).tuned_seeds(*key)
    assert [x.experiment.flag("--lr") for x in runs] == ["1e-2"] * 3
    assert [x.experiment.flag("--seed") for x in runs] == ["0", "1", "2"]
    one = "1e-2", "--seed", "1"
    broken = Made(change=losses, stopped=lambda x: "nan" if x.flags[-3:] == one else None)
    assert broken.tuned(*key).experiment.flag("--lr") == "3e-3"


def test_a_search_pays_for_all_its_points():
    def spent(*losses, stopped=None):
        grid = grid_of(*losses, stopped=stopped).of("fig5")
        return [(n, s, r["train_loss"]) for n, s, r in searched(grid)]

    assert spent([3, 2, 1], [1, 4, 4], [2], stopped=2) == [(3, 6, 1), (5, 10, 2), (7, 14, 1)]
    # As far as all go that did not break off; and past epochs in which none was finite.
    assert len(spent([3, 2, 1], [1])) == 1
    assert spent([None, 2]) == [(2, 4, 2)] and spent([None]) == []


@pytest.mark.parametrize("count", [1, 2, 13, 49, 391, 1563])
def test_bins_take_every_step_once(count):
    parts = style.bins(count, 12)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(part.stop > part.start for part in parts)


# The verdicts: each on runs for which it holds, and on runs for which it does not.


def constant(**values):
    return lambda x, n: values


def size(x, n):
    if x.figure != "fig6":
        return {}
    depth, width = map(int, x.panel.split("x"))
    return {"train_loss": 1 / width + depth / 1e4}


def rise_and_fall(x, n):
    return {"train_acc": n / 12, "eta_mean": 0.1 + 0.1 * min(n, 14 - n)}


def chance(x, n):
    return {"train_acc": 0.4 if x.curve == "AGD" else 0.1}


HOLDS = [
    ("deep", chance, constant(train_acc=0.4)),
    ("deep", chance, lambda x, n: {"train_acc": 0.4 if x.curve == "AGD" or n == 1 else 0.1}),
    ("best_rates", PAPERS, tuned_at(Adam="1e-3", SGD="1e-1")),
    ("best_rates", PAPERS,  # as in the paper on its grid, while the wider one has something better
     lambda x, n: {"train_loss": 0.1} if x[:3] == ("fig1", "rates", "SGD") and "1e0" in x.flags
     else PAPERS(x, n)),
    ("smaller_objective", PAPERS, constant(train_loss=0.5)),
    ("level_on_images", lambda x, n: {**PAPERS(x, n), "test_acc": 0.5}, lambda x, n: {
        **PAPERS(x, n), "test_acc": 0.5 if x.figure == "fig4" or x.curve == "AGD" else 0.53}),
    ("wider", size, constant(train_loss=0.5)),
    ("depth_32", size, constant(train_loss=0.5)),
    ("batches", constant(), lambda x, n: {"train_loss": float(n)}),
    ("batches", constant(), lambda x, n: {"train_loss": 1 - n / 1e5, "train_acc": 0.1}),
    ("batches", constant(),
     lambda x, n: {"train_loss": float(n)} if x.flag("--seed") == "2" else {}),
    ("larger_batches", lambda x, n: {"test_acc": 0.3 + int(x.flag("--train_bs", 128)) / 1e5},
     constant()),
    ("two_phases", rise_and_fall, lambda x, n: {"train_acc": n / 12}),
    ("two_phases", rise_and_fall,
     lambda x, n: {**rise_and_fall(x, n), "train_acc": 0.2 if n < 12 else 1.0}),
    ("transformer", on_text(2.4, 1), on_text(2.47, 1, 0.01)),  # of which two seeds are below
    ("transformer", on_text(1, 1), lambda x, n: {"test_loss": None if x.flag("--seed") == "1"
                                                 else 1.0}),
    ("level_on_text", on_text(1.71, 1.71), on_text(1.72, 1.71)),
    ("level_on_text", on_text(1.71, 1.7, 0.01), on_text(1.712, 1.7, 0.01)),  # at most 1.72
]  # fmt: skip


@pytest.mark.parametrize("name, good, bad", HOLDS)
def test_a_verdict_follows_from_the_runs(name, good, bad):
    assert judge(CLAIM[name], Made(change=good))[0] == "holds"
    verdict, words = judge(CLAIM[name], Made(change=bad))
    assert verdict == "does not hold" and words
    assert judge(CLAIM[name], Made(cut=lambda x: 0)) == ("not run", "")


def test_the_accuracies_of_batch_sizes_are_shown_at_one_train_loss_too():
    def slower(x, n):
        """A batch of 4,096 trains half as fast; accuracy follows the loss."""
        loss = 1 - 0.01003 * (n / 2 if x.flag("--train_bs") == "4096" else n)
        return {"train_loss": loss, "test_acc": 1 - loss}

    claim, level = CLAIM["larger_batches"], ", ".join(f"{x}: {{0}} %" for x in BATCHES)
    verdict, words = judge(claim, Made(change=slower))
    assert verdict == "does not hold"
    assert words == ("32: 12.0 %, 128: 12.0 %, 1024: 12.0 %, 4096: 6.0 %; at a train loss of "
                     f"0.940, {level.format('6.0')}")  # fmt: skip
    # Those with more epochs than all have count to their ends, there.
    made = Made("full", slower, lambda x: 8 if x.flag("--train_bs") == "32" else 12)
    verdict, words = judge(claim, made)
    assert verdict == "does not hold so far" and words.startswith("8 of 12 epochs, 32: 8.0 %")
    assert words.endswith(f"at a train loss of 0.940, {level.format('6.0')}")
    never = Made(change=lambda x, n: {"train_loss": None})
    assert "loss" not in judge(claim, never)[1]


def test_the_accuracy_at_a_train_loss_lies_between_two_epochs():
    """Of means over seeds and windows; a loss may rise again, or be missing before."""
    assert claims.at_loss([0.9, 0.7, 0.8, 0.6], [0.1, 0.3, 0.5, 0.2], 0.75) == pytest.approx(0.25)
    assert claims.at_loss([0.7, 0.6], [0.1, 0.3], 0.75) == 0.1
    assert claims.at_loss([math.nan, 0.7], [0.1, 0.3], 0.75) == 0.3
    seeds = [Made(change=lambda x, n: {"test_acc": n}).find(Made().table[0]),
             Made(change=lambda x, n: {"test_acc": n * 3}).find(Made().table[0])]  # fmt: skip
    assert claims.smoothed(seeds, "test_acc", 3) == [2 * n for n in range(2, 12)]


def test_the_least_train_loss_of_a_curve_is_one_that_it_comes_to():
    """Whose three digits may be less, by the last bit."""
    loss = 0.46900000000000003
    assert math.ceil(1000 * loss) / 1000 < loss

    class Run:
        experiment = Experiment("fig5", "fcn", "AGD", 1, ())

        def __init__(self, loss):
            self.values = {"train_loss": [loss], "test_acc": [0.5]}

        def column(self, key):
            return self.values[key]

    assert at_one_loss([[Run(loss)], [Run(0.3)]]) == ("at a train loss of 0.469", [0.5, 0.5])


def test_comparable_is_judged_on_resnet_18():
    claim = CLAIM["comparable"]
    assert judge(claim, Made("quick"))[0] == "not run"  # there it is another network
    assert judge(claim, Made("full"))[0] == "holds"
    far = Made("full", lambda x, n: {"test_acc": 0.9 if x.curve == "AGD" else 0.93})
    assert judge(claim, far)[0] == "does not hold"


def test_a_verdict_on_unfinished_runs_is_one_so_far():
    """After as many epochs as all of them have, whatever came later."""
    verdict, words = judge(CLAIM["wider"], Made(change=size, cut=lambda x: 3))
    assert verdict == "holds so far" and words.startswith("3 of 6 epochs, 15 of 15")

    def later(x, n):
        return {"train_loss": 9.0} if n > 3 and x.panel == "4x512" else size(x, n)

    uneven = Made(change=later, cut=lambda x: 3 if x.panel == "2x64" else 4)
    verdict, words = judge(CLAIM["wider"], uneven)
    assert verdict == "holds so far" and words.startswith("3 of 6 epochs, 15 of 15")
    uneven.cut = lambda x: 4
    assert judge(CLAIM["wider"], uneven)[0] == "does not hold so far"

    # On the widths that were run at all depths, if there are two to compare; the others do not
    # shorten them.
    cut = {64: 4, 128: 4, 256: 1, 512: 5}
    wide = Made("full", size, cut=lambda x: x.figure == "fig6" and cut.get(
        int(x.panel.split("x")[1]), 0) * (x.panel != "8x256"))  # fmt: skip
    assert judge(CLAIM["wider"], wide) == (
        "holds so far", "4 of 12 epochs, widths 64, 128, 512: 10 of 10 steps in width")
    # Nor does one that has only begun.
    begun = Made("full", size)
    begun.find = lambda x, find=begun.find: (
        find(x).until(1)._replace(experiment=x._replace(epochs=21))
        if x.panel.endswith("x128") else find(x))  # fmt: skip
    assert judge(CLAIM["wider"], begun) == (
        "holds so far", "widths 64, 256, 512, 1024, 2048: 20 of 20 steps in width")
    cut.update({128: 0, 512: 0})
    assert judge(CLAIM["wider"], wide) == ("not run", "")
    assert judge(CLAIM["depth_32"], wide)[1] == "4 of 12 epochs, width 64: 2 of 2 comparisons"

    # Of a grid the tuned rate alone goes on; where it is chosen is said.
    made = Made("full", PAPERS)
    cut = {("Adam", "1e-4"): 4, ("SGD", "1e-1"): 12, ("AGD", None): 12}
    made.cut = lambda x: cut.get((x.curve, x.flag("--lr")), 2 + (x.curve == "SGD"))
    verdict, words = judge(CLAIM["smaller_objective"], made)
    assert verdict == "holds so far"
    assert words == ("4 of 12 epochs, AGD 0.4000, Adam 0.3000, SGD 0.5000; chosen: Adam's rate "
                     "after 2 epochs, SGD's rate after 3 epochs")  # fmt: skip
    made.cut = lambda x: 12 if x.flag("--lr") in (None, "1e-4", "1e-1") else 2
    assert judge(CLAIM["smaller_objective"], made)[0] == "holds so far"
    made.cut = lambda x: 0 if x.flag("--lr") == "1e-3" else 12
    assert judge(CLAIM["smaller_objective"], made) == ("not run", "")

    # At its common length a rate is chosen by what was known there: 1e-3 until epoch 2.
    def turns(x, n):
        return {"train_loss": 0.5 + (n > 2) if x.flags[-3] == "1e-3" else PAPERS(x, n)["train_loss"]
                + (x.curve == "Adam" and n < 3)}  # fmt: skip

    made = Made("full", turns, cut=lambda x: 2 if x.curve == "SGD" else 10)
    verdict, words = judge(CLAIM["best_rates"], made)
    assert verdict == "does not hold so far" and "Adam 1e-3" in words
    # A finished figure does not cut another one short.
    rise = Made(change=lambda x, n: {**PAPERS(x, n), "test_acc": 0.5 + 0.1 * (
        x.curve == "Adam" and n > 3)}, cut=lambda x: 11)  # fmt: skip
    assert judge(CLAIM["level_on_images"], rise)[0] == "does not hold so far"
    # Of several figures each has its own length, and its own choice.
    two = Made("full", PAPERS, cut=lambda x: (4 if x.figure == "fig4" else 6) if x.flag("--lr")
               in (None, "1e-4") else 3)  # fmt: skip
    words = judge(CLAIM["level_on_images"], two)[1]
    assert words.startswith("4 of 12 epochs of fig. 4, 6 of 12 epochs of fig. 5, FCN 16×512: ")
    assert words.endswith("Adam's rate of fig. 4 after 3 epochs, Adam's rate of fig. 5 after 3 "
                          "epochs")  # fmt: skip
    # A slow optimiser is compared at one train loss, too, from all epochs.
    def slow(x, n):
        n = n // 2 if x.curve == "AGD" else n
        return {"train_loss": 1 - n / 20 + (x.flag("--lr") not in (None, "1e-4")),
                "test_acc": 0.3 + n / 50}  # fmt: skip

    verdict, words = judge(CLAIM["level_on_images"], Made("quick", slow))
    assert verdict == "does not hold"
    assert words.endswith("FCN 8×256: AGD 42.0 %, Adam at 1e-4 54.0 % (at a train loss of 0.700, "
                          "42.0 % and 42.0 %)")  # fmt: skip
    # A network that was not run is left out, and so is what it has.
    rise.cut = lambda x: 0 if x.figure == "fig4" and x.curve == "Adam" else 12
    verdict, words = judge(CLAIM["level_on_images"], rise)
    assert verdict == "does not hold" and "16×512" not in words and "8×256" in words
    # A run with a schedule is not judged in its middle.
    text = Made(change=on_text(1.7, 1.6), cut=lambda x: 3 if x.curve == SPECTRAL else 6)
    assert judge(CLAIM["level_on_text"], text) == ("not run", "")
    # Nor anything in its first twentieth.
    early = Made("full", cut=lambda x: 3)
    assert judge(CLAIM["wider"], early)[0] == "does not hold so far"
    early.find = lambda x, find=early.find: find(x)._replace(experiment=x._replace(epochs=61))
    assert judge(CLAIM["wider"], early) == ("not run", "")

    # A run that was looked at and left aside does not count; a set that is not fitted is none.
    made = Made("full", rise_and_fall, cut=lambda x: 3 if x.figure == "phases" else 12)
    assert judge(CLAIM["two_phases"], made)[0] == "holds"
    made.cut = lambda x: 12 if x.figure == "fig5" else 0
    assert judge(CLAIM["two_phases"], made)[0] == "holds"
    assert judge(CLAIM["two_phases"], Made(change=constant(train_acc=0.9)))[0] == "not run"


@pytest.mark.parametrize("loss, epochs, states, verdict", [
    (0.8, 14, ("before", "after"), "holds"), (0.95, 14, ("before", "after"), "does not hold"),
    (0.8, 1, ("before", "after"), "holds so far"), (0.8, 0, ("before", "after"), "not run"),
    (0.8, 14, ("before",), "not run"),
])  # fmt: skip
def test_the_bound_is_judged_at_every_point(loss, epochs, states, verdict, tmp_path):
    made = Made(out=tmp_path)
    made.folder.mkdir()
    state = {"eta": 0.4, "t": [0, 0.4], "loss": [1.0, loss], "bound": [1.0, 0.92]}
    measured = {"run": {"epochs": epochs}, "states": dict.fromkeys(states, state)}
    (made.folder / "fig3.json").write_text(json.dumps(measured))
    assert judge(CLAIM["bound"], made)[0] == verdict


def test_the_page_marks_cut_runs_and_leaves_out_seeds_of_other_lengths():
    """What the published page has no case of."""
    later = {"after_epoch": 3, "device": "cuda", "device_name": "a GPU", "threads": 1}
    made = Made(cut=lambda x: 2 if x.flag("--seed") == "1" or x.panel == "2x64" else 99,
                first=lambda x: {"resumed": [later]} if x.figure == "phases" else {})  # fmt: skip
    page = report.numbers(made)
    assert "2 seeds" in page and "3 seeds" not in page
    assert "a processor, 1 thread a run, torch 2; 2026-01-01, from epoch 4 a GPU, torch 2 |" in page
    assert "after 2 of 6 epochs |" in report.sizes(made)
    made.cut = lambda x: 2 if x.flag("--lr") == "1e-3" else 99
    assert "Adam at 1e-5, chosen after 2 |" in report.numbers(made)
    fig5 = report.searches(made).split("fig. 5, ")[1]
    assert fig5.startswith("FCN 8×256, CIFAR-10, Adam, after 2 epochs |")
    assert "| **0.5000, 40.0 %** | 0.5000, 40.0 % |" in fig5
    made.cut = lambda x: 0 if x.flag("--lr") == "1e-3" else 99
    assert "not run (4 of 5 runs begun)" in report.numbers(made)
    assert "**" not in report.searches(made).split("fig. 5, ")[1].split("fig. 10")[0]
    # Not finished, and one broke off later than the others are.
    made = Made(cut=lambda x: 9 if x.flag("--lr") == "1e-2" else 2,
                stopped=lambda x: "nan" if x.flag("--lr") == "1e-2" else None)  # fmt: skip
    assert "| **0.5000, 40.0 %** | 0.5000, 40.0 % | 0.5000, 40.0 % | stopped in epoch 9: nan |" in (
        report.searches(made).split("fig. 5, ")[1])  # fmt: skip


def test_runs_on_different_images_are_not_put_together():
    made = Made(first=lambda x: {"data": {"crc32": x.flag("--seed")}})
    for use in (lambda: figures.draw("fig5", made), lambda: judge(CLAIM["larger_batches"], made)):
        with pytest.raises(RunError, match="different images"):
            use()
    crc = {"crc32": {"train_images": "2926c671"}}
    assert data_name("cifar10", crc) == "JPEG CIFAR-10" and data_name("npz:a.npz") == "a"


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

    def objective():
        return (net(x) - onehot).square().mean() / 2  # |f - y|^2 / (2 d_L), a mean over images

    loss, optimizer = objective(), AGD(net.parameters())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    there = objective().item()
    for key, value in (("L", loss), ("G", optimizer.G), ("eta", optimizer.eta)):
        assert state[key] == pytest.approx(value.item(), rel=1e-12)
    t, curve = state["t"], state["loss"]
    assert t[0] == 0 and curve[0] == pytest.approx(state["L"], rel=1e-12)
    assert (curve[1] - curve[0]) / t[1] == pytest.approx(-state["G"], rel=0.1)
    assert np.interp(state["eta"], t, curve) == pytest.approx(there, rel=1e-3)
    assert state["chain"]["dL"] == pytest.approx(there - state["L"], rel=1e-9)
    bound = state["bound"]  # it touches the objective, and is least where AGD goes
    assert bound[0] == state["L"] and t[np.argmin(bound)] == pytest.approx(state["eta"])


def test_measuring_wants_the_trained_weights_and_names_damage(tmp_path):
    there = Results(tmp_path, "quick")
    with pytest.raises(RunError, match="there is no"):
        majorisation.measure(there, tmp_path)
    there.folder.mkdir()
    (there.folder / "fig3.json").write_text("{")
    with pytest.raises(RunError, match="fig3.json is damaged"):
        figures.draw("fig3", there)


@pytest.mark.slow
def test_measuring_is_done_once(samples, tmp_path, monkeypatch):
    """On a network that has stood still."""
    data_dir = samples("cifar10")
    words = ("--arch fcn --depth 3 --width 16 --dataset cifar10 --train_examples 64 "
             "--test_examples 10 --optimizer agd --seed 0").split()  # fmt: skip
    there = Results(tmp_path, "quick")
    there.table = [Experiment("fig3", "majorisation", "AGD", 1, tuple(words))]
    monkeypatch.setattr(majorisation, "IMAGES", 500)
    program.main([*words, "--epochs", "1", "--out", str(there.folder), "--device", "cpu",
                  "--data_dir", str(data_dir)])  # fmt: skip
    path = majorisation.measure(there, data_dir)
    measured = json.loads(path.read_text())
    assert measured["images"] == 500
    assert list(measured["states"]) == ["at initialisation", "after 1 epochs"]
    at_start, later = measured["states"].values()
    assert at_start["L"] != later["L"] and len(at_start["t"]) == len(at_start["loss"])
    stamp = path.stat().st_mtime_ns
    assert majorisation.measure(there, data_dir) == path and path.stat().st_mtime_ns == stamp
    picture = figures.draw("fig3", there)
    assert len(picture.axes) == 3
    figures.plt.close(picture)
