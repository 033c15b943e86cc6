"""A run goes on with the images that it was made of, wherever they lie, or says that they differ.
With other classes it does not go on."""

import json
import os
import shutil
import subprocess
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import DATASETS
from runs import images, provenance
from runs.images import Images
from runs.record import read
from tests.conftest import ROOT
from tests.program import QUICK, only, rows, train, weights

LAST_YEAR = 1_760_000_000_123_456_789  # nanoseconds; tar keeps seconds


def pictures(root, classes=("cat", "dog", "eel"), seed=0):
    """Three pictures of noise a class in train/, two in val/, 32 pixels wide."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 3), ("val", 2)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.bmp")
                os.utime(folder / f"{i}.bmp", ns=(LAST_YEAR, LAST_YEAR))
    return root


@pytest.fixture
def go(tmp_path, capfd):
    """f(root, epochs, *flags) -> (exit code, what it printed, its notes on the images) of a run."""

    def go(root, epochs, *flags, out=tmp_path / "out"):
        dataset = root if isinstance(root, str) else f"folder:{root}"
        capfd.readouterr()
        code = train("--dataset", dataset, "--depth", 2, "--width", 4, "--image_size", 32, "--cpu",
                     "--workers", 0, "--train_bs", 4, "--epochs", epochs, "--out", out, *flags)
        printed = "".join(capfd.readouterr())
        return code, printed, [x for x in printed.splitlines() if x.startswith("Note: not the")]

    return go


def first_row(out):
    return rows(out)[0]


def noted(out):
    """The changes of the images that the log's first row has."""
    return [x["image_files"] for x in first_row(out).get("resumed", []) if "image_files" in x]


def renamed(root, old, new):
    for split in ("train", "val"):
        (root / split / old).rename(root / split / new)


def swapped(a, b):
    a.rename(b.with_name("aside")), b.rename(a), b.with_name("aside").rename(b)


def rewritten(root, content=None, times=None):
    """Every file, written anew."""
    for path in root.rglob("*.bmp"):
        old = path.read_bytes()
        path.unlink()
        path.write_bytes(content(old) if content else old)
        if times:
            os.utime(path, (times, times))


def moved(root):
    """A cat becomes a dog and a dog a cat: as many files of each as before."""
    (root / "train/cat/0.bmp").rename(root / "train/dog/9.bmp")
    (root / "train/dog/0.bmp").rename(root / "train/cat/9.bmp")


SAME = {
    "nothing": lambda root: None,
    "the times": lambda root: rewritten(root, times=9),
    "a file that is no image": lambda root: (root / "train/cat/notes.txt").write_text("x"),
    "one file is written anew": lambda root: os.utime(root / "val/dog/1.bmp", (1, 1)),
}
OTHERS = {
    "one is renamed": ("names", lambda r: (r / "train/cat/0.bmp").rename(r / "train/cat/7.bmp")),
    "two change class": ("names", moved),
    "two of the test change class": ("names", lambda r: (
        (r / "val/cat/0.bmp").rename(r / "val/eel/x.bmp"),
        (r / "val/eel/0.bmp").rename(r / "val/cat/x.bmp"))),
    "one is larger": ("sizes", lambda r: Image.new("RGB", (33, 33)).save(r / "train/eel/2.bmp")),
    "all are inverted": ("contents", lambda r: rewritten(
        r, lambda old: old[:54] + bytes(255 - x for x in old[54:]))),
    "two files of two classes are swapped": ("contents", lambda r: swapped(
        r / "train/cat/0.bmp", r / "train/dog/0.bmp")),
    "one of the test is another": ("contents", lambda r: Image.new("RGB", (32, 32)).save(
        r / "val/dog/0.bmp")),
}  # fmt: skip
REFUSED = {
    "labels swap": ("classes cat then, rat now", lambda r: renamed(r, "cat", "rat")),
    "the order stays": ("classes dog then, doe now", lambda r: renamed(r, "dog", "doe")),
    "two change their names": ("classes cat, eel then, a, b now", lambda r: (
        renamed(r, "cat", "b"), renamed(r, "eel", "a"))),
    "one picture less": ("data train 9 then, 8 now", lambda r: (r / "train/cat/0.bmp").unlink()),
    "a class more": ("classes none then, ox now", lambda r: pictures(r, ["ox"])),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME)
def test_the_same_images_go_on_silently(change, go, tmp_path):
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    SAME[change](root)
    code, printed, notes = go(root, 2)
    assert (code, notes, noted(out)) == (0, [], []) and "Going on after epoch 1" in printed


@pytest.mark.parametrize("change", OTHERS)
def test_other_images_are_said_and_noted(change, go, tmp_path):
    what, apply = OTHERS[change]
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    before = first_row(out)["image_files"]
    apply(root)
    code, printed, (note,) = go(root, 1)  # finished as it is
    assert code == 0 and "Already finished" in printed and f"their {what} differ" in note
    for part, epochs in enumerate((2, 3), 1):  # and so in every further part
        code, printed, (note,) = go(root, epochs)
        assert code == 0 and f"Going on after epoch {part}" in printed
        assert f"their {what} differ" in note and str(out / "logs") in note
    (now, again), row = noted(out), first_row(out)
    assert now == again != before == row["image_files"]
    assert now[what if what != "contents" else "times"] != before[what.replace("contents", "times")]
    assert [row["resumed"][i]["after_epoch"] for i in range(2)] == [1, 2]


def test_check_knows_both(go, tmp_path, monkeypatch):
    monkeypatch.setattr("check.resources.seconds_an_epoch", lambda *args: iter(()))
    root = pictures(tmp_path / "pics")
    copied(root, tmp_path / "copy")
    assert "a new run" in go(root, 2, "--check")[1] and not (tmp_path / "out").exists()
    assert go(root, 2)[0] == 0
    moved(root)
    code, printed, _ = go(root, 2, "--check")
    assert code == 0 and "is finished" in printed and "their names differ" in printed
    code, printed, _ = go(tmp_path / "copy", 3, "--check")
    assert code == 0 and "goes on after 2 epochs" in printed and "names differ" not in printed


@pytest.mark.parametrize("change", REFUSED)
def test_other_classes_or_numbers_are_refused(change, go, tmp_path):
    words, apply = REFUSED[change]
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    apply(root)
    for epochs in (1, 2):
        code, printed, _ = go(root, epochs)
        assert code == 2 and words in printed and "another --out keeps it, --fresh" in printed
    assert all(path.read_bytes() == content for path, content in before.items())
    assert go(root, 1, "--fresh")[0] == 0
    assert first_row(out)["settings"]["classes"] == sorted(os.listdir(root / "train"))


def copied(root, to):
    shutil.copytree(root, to, copy_function=shutil.copyfile)


def tarred(root, to):
    to.mkdir(parents=True)
    subprocess.run(["tar", "-cf", to.parent / "x.tar", "-C", root, "."], check=True)
    subprocess.run(["tar", "-xf", to.parent / "x.tar", "-C", to], check=True)


STAGED = {"cp -r": copied, "cp -a": shutil.copytree, "tar": tarred,
          "a link": lambda root, to: (to.parent.mkdir(exist_ok=True), to.symlink_to(root)),
          "links of files": lambda root, to: shutil.copytree(root, to, copy_function=os.symlink),
          "mv": lambda root, to: (to.parent.mkdir(exist_ok=True), root.rename(to))}  # fmt: skip


@pytest.mark.parametrize("place, contents", [("node/pics", True), ("elsewhere", False)])
@pytest.mark.parametrize("way", STAGED)
def test_a_copy_elsewhere_is_the_same_run(place, way, contents, go, tmp_path, monkeypatch):
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    if not contents:  # too many to be read
        monkeypatch.setattr(provenance, "CONTENTS", 0)
    assert go(root, 1)[0] == 0
    STAGED[way](root, tmp_path / place)
    code, printed, notes = go(tmp_path / place, 2)
    assert code == 0 and "Going on after epoch 1" in printed
    assert first_row(out)["flags"]["dataset"].endswith(place)
    (record,) = out.glob("logs/*.run.json")
    assert read(record)["resumed"] == []
    unknown = way == "cp -r" and not contents  # the one that does not keep times
    assert len(notes) == len(noted(out)) == unknown
    assert not unknown or "times" in notes[0] and "copy" in notes[0]
    if way == "cp -r" and contents:
        assert "Already finished" in go(tmp_path / place, 2)[1]
        assert go(root, 2, out=tmp_path / "whole")[0] == 0  # to the bit what one place gives
        ours, theirs = weights(out), weights(tmp_path / "whole")
        assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.mark.parametrize("change", [
    None, "one is renamed", "one is larger", "two files of two classes are swapped", "labels swap",
])  # fmt: skip
def test_another_folder_of_that_name_is_another_run(change, go, tmp_path):
    """Unless it is a copy, to the byte."""
    root, out = pictures(tmp_path / "a" / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    other = shutil.copytree(root, tmp_path / "b" / "pics")
    if change is not None:
        {**OTHERS, **REFUSED}[change][1](other)
    code, printed, notes = go(other, 1)
    assert code == 0 and not notes and ("Already finished" in printed) == (change is None)
    assert len(list(out.glob("logs/*.jsonl"))) == 1 + (change is not None)


def test_a_copy_of_the_last_images_is_the_same_run(go, tmp_path):
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    shutil.copytree(root, tmp_path / "first")
    assert go(root, 1)[0] == 0
    OTHERS["all are inverted"][1](root)
    assert "contents" in go(root, 2)[2][0]
    copied(root, tmp_path / "copy")
    code, printed, notes = go(tmp_path / "copy", 3)
    assert code == 0 and "Going on after epoch 2" in printed and "contents" in notes[0]
    assert [len(x) for x in (noted(out), list(out.glob("logs/*.jsonl")))] == [2, 1]
    assert "Going on" not in go(tmp_path / "first", 3)[1]  # has the first images alone


def test_other_settings_or_logs_are_other_runs_of_a_copy(go, tmp_path):
    """Those of the name, too, which shape no weight."""
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    copied(root, tmp_path / "copy")
    assert go(root, 1)[0] == 0
    for i, flags in enumerate((["--seed", 1], ["--log_steps"], ["--loss", "xent"]), 2):
        code, printed, _ = go(tmp_path / "copy", 1, *flags)
        assert code == 0 and "Already" not in printed
        assert len(list(out.glob("logs/*.jsonl"))) == i
    (out / "logs" / "a.jsonl").write_text("no log")
    os.mkdir(out / "logs" / "b.jsonl")
    assert "Already finished" in go(tmp_path / "copy", 1, "--seed", 0)[1]


def test_a_run_of_an_earlier_version_goes_on(go, tmp_path):
    """Its log has no classes and no summary of files, and its settings have the path."""
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    path = out / "logs" / f"{only(out)}.jsonl"
    first, *rest = rows(out)
    del first["image_files"], first["settings"]["classes"]
    first["settings"]["dataset"] = f"folder:{root}"
    path.write_text("".join(json.dumps(row) + "\n" for row in [first, *rest]))
    code, printed, notes = go(root, 2)
    assert code == 0 and "Going on after epoch 1" in printed and not notes
    moved(root)  # which its record alone knows
    code, _, notes = go(root, 3)
    assert code == 0 and "their contents differ" in notes[0]
    renamed(root, "cat", "rat")  # the checkpoint has them since
    assert "classes cat then, rat now" in go(root, 4)[1]


def test_without_a_record_the_times_decide(go, tmp_path):
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0
    (path,) = out.glob("logs/*.run.json")
    path.unlink()
    assert go(root, 2)[2] == []
    path.write_text("{")
    rewritten(root)
    assert "the times of their files differ" in go(root, 3)[2][0]


def test_imagenet_by_either_way_is_one_run(go, tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "imagenet", DATASETS["imagenet"]._replace(classes=3))
    root, out = pictures(tmp_path / "first"), tmp_path / "out"
    monkeypatch.setenv("IMAGENET_PATH", str(root))
    flags = ["--data_dir", tmp_path]
    assert go("imagenet", 1, *flags)[0] == 0
    monkeypatch.delenv("IMAGENET_PATH")
    copied(root, tmp_path / "imagenet")
    code, printed, notes = go("imagenet", 2, *flags)
    assert code == 0 and "Going on after epoch 1" in printed and not notes
    moved(tmp_path / "imagenet")
    assert "their names differ" in go("imagenet", 3, *flags)[2][0] and len(noted(out)) == 1
    renamed(tmp_path / "imagenet", "cat", "rat")
    assert go("imagenet", 4, *flags)[0] == 2


def test_arrays_are_compared_by_their_checksums(tmp_path, capfd):
    """A file that was made again, or lies elsewhere, is the same; other images are refused."""
    source = np.load(ROOT / "data" / "digits.npz")
    arrays = {key: source[key] for key in source.files}
    np.savez(tmp_path / "set.npz", **arrays)

    def go(file, epochs):
        capfd.readouterr()
        code = train(*QUICK, "--dataset", f"npz:{file}", "--data_dir", tmp_path, "--epochs", epochs,
                     "--out", tmp_path / "out")  # fmt: skip
        return code, "".join(capfd.readouterr())

    assert go("set.npz", 1)[0] == 0
    (tmp_path / "node").mkdir()
    np.savez_compressed(tmp_path / "node" / "set.npz", **arrays)
    code, printed = go("node/set.npz", 2)
    assert code == 0 and "Going on after epoch 1" in printed and "Note: not the" not in printed
    arrays["train_labels"] = arrays["train_labels"][::-1].copy()
    np.savez(tmp_path / "set.npz", **arrays)
    code, printed = go("set.npz", 3)
    assert code == 2 and "data crc32 train_labels" in printed and "train_images" not in printed
    assert zipfile.is_zipfile(tmp_path / "set.npz")


def test_a_folder_elsewhere_replays(go, tmp_path, capfd):
    root, out = pictures(tmp_path / "pics"), tmp_path / "out"
    assert go(root, 1)[0] == 0 and go(root, 2)[0] == 0
    (record,) = out.glob("logs/*.run.json")
    (tmp_path / "x").mkdir()
    copy = root.rename(tmp_path / "x" / "copy")
    for dataset, code, words in (
        (f"folder:{copy}", 0, "The same bits"),
        (f"folder:{pictures(tmp_path / 'other', seed=1)}", 2, "(data): the bits may differ"),
    ):  # fmt: skip
        capfd.readouterr()
        assert train("--replay", record, "--dataset", dataset, "--out", tmp_path / "again") == code
        assert words in "".join(capfd.readouterr())
    with pytest.raises(SystemExit):
        train("--replay", record, "--dataset", "digits")
    assert "leave out --dataset" in capfd.readouterr().err


def test_weights_elsewhere_are_the_same_run_and_replay(tmp_path, capfd):
    out, flags = tmp_path / "out", [*QUICK, "--epochs", 1, "--out", tmp_path / "out", "--weights"]
    assert train(*flags[:-1], "--out", tmp_path / "start") == 0
    (start,) = tmp_path.glob("start/checkpoints/*.pt")
    for i, place in enumerate(("a", "b"), 1):
        (tmp_path / place).mkdir()
        path = start = start.rename(tmp_path / place / "w.pt")
        assert train(*flags, path, "--epochs", i) == 0
    (record,) = out.glob("logs/*.run.json")
    assert read(record)["resumed"] == [] and len(read(record)["results"]) == 2
    path = path.rename(tmp_path / "v.pt")
    capfd.readouterr()
    assert train("--replay", record, "--weights", path, "--out", tmp_path / "again") == 0
    assert "The same bits" in capfd.readouterr().out


def test_a_summary_asks_every_file_and_survives_one_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "CHUNK", 4)
    files = sorted(map(str, pictures(tmp_path / "pics").rglob("*.bmp")))
    whole = Images(tmp_path / "pics", files).summary
    assert whole["count"] == 15 and whole["bytes"] == 15 * os.path.getsize(files[0])
    os.utime(files[14], (9, 9))
    last = Images(tmp_path / "pics", files).summary
    assert {key for key in whole if whole[key] != last[key]} == {"times", "seconds"}
    os.unlink(files[7])
    assert Images(tmp_path / "pics", files).summary is None
    assert Images(tmp_path / "set.npz").summary is None


def test_a_run_in_the_former_default_of_out_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("main.FORMER_OUT", "former")
    flags = [*QUICK, "--epochs", 1]
    for out, said in ((["--out", "former"], 0), ([], 1), ([], 0), (["--out", "third"], 0)):
        capfd.readouterr()
        assert train(*flags, *out) == 0
        assert capfd.readouterr().out.count("--out former goes on with it") == said
