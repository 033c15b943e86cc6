"""ImageNet prepared by `python -m data.prepare imagenet`: layouts, labels, ends in the middle."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DATASETS, DataError, load
from data.prepare import main
from data.resize import shrink

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["n00000001", "n00000002", "n00000003"]


@pytest.fixture(autouse=True)
def three_classes(monkeypatch):
    classes(monkeypatch, 3)
    monkeypatch.delenv("IMAGENET_PATH", raising=False)


def classes(monkeypatch, n):
    monkeypatch.setitem(DATASETS, "imagenet", DATASETS["imagenet"]._replace(classes=n))


def picture(width=60, height=40, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="JPEG", **options):
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


def opened(content):
    return Image.open(io.BytesIO(content))


def val_name(i, suffix=".JPEG"):
    return f"ILSVRC2012_val_{i:08d}{suffix}"


@pytest.fixture
def tree(tmp_path):
    """DIR of three classes, four images each in train/ and two in a val/ of class folders."""
    root, seed = tmp_path / "original", 0
    for split, count in (("train", 4), ("val", 2)):
        for c, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                seed += 1
                file = f"{name}_{i}.JPEG" if split == "train" else val_name(2 * c + i + 1)
                image = picture(60 + seed, 40 + seed, seed)
                (root / split / name / file).write_bytes(content(image))
    return root


def flatten(root):
    """Make val/ flat; returns {file name: class}."""
    labels = {path.name: path.parent.name for path in sorted(root.glob("val/*/*"))}
    for path in list(root.glob("val/*/*")):
        path.rename(root / "val" / path.name)
    for name in CLASSES:
        (root / "val" / name).rmdir()
    return labels


@pytest.fixture
def command(tmp_path, capsys):
    """f(*flags) -> (exit code, all that was printed) of the command, with one job."""

    def run(*flags, out=tmp_path / "out"):
        try:
            code = main(["imagenet", "--data_dir", str(out), "--jobs", "1", *map(str, flags)])
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    return run


def files(folder):
    """{path below the folder: content}, without the records."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("*/*/*")) if ".prepared" not in path.parts
    }  # fmt: skip


def state(folder):
    """What lies in a folder, with the time of its last change; no folder for unfinished files."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))
            if path.name != ".prepared"}  # fmt: skip


# One image


@pytest.mark.parametrize("mode, kind, width, height", [
    ("RGB", "JPEG", 300, 200), ("RGB", "JPEG", 91, 257), ("CMYK", "JPEG", 300, 200),
    ("L", "JPEG", 1000, 400), ("P", "PNG", 300, 200), ("RGBA", "PNG", 300, 200)])  # fmt: skip
def test_an_image_is_shrunk_to_an_rgb_jpeg(mode, kind, width, height):
    """The shorter side is as asked; orientation and comments are neither applied nor kept."""
    exif = Image.Exif()
    exif[0x0112] = 6
    original = content(picture(width, height).convert(mode), kind, exif=exif, comment=b"c")
    small = opened(shrink(original, 64))
    assert (small.format, small.mode, min(small.size)) == ("JPEG", "RGB", 64)
    assert max(small.size) == round(64 * max(width, height) / min(width, height))
    assert (small.width > small.height) == (width > height)
    assert not small.getexif() and "comment" not in small.info
    seen = opened(original).convert("RGB").resize(small.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, float) - np.asarray(seen, float)).mean() < 4
    longer = min(width, height), 2000, None  # these leave the file as it is, to the byte
    assert all(shrink(original, size) is original for size in longer)


@pytest.mark.parametrize("size", [None, 30])
def test_deep_images_are_scaled_and_floats_are_refused(size):
    ramp = np.linspace(0.1, 0.9, 60) * np.ones((40, 1))
    deep = content(Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG")
    small = opened(shrink(deep, size))
    if size is None:
        assert shrink(deep) is deep
    else:
        expected = np.linspace(0.1, 0.9, small.width) * 255
        assert np.asarray(small)[..., 0] == pytest.approx(expected * np.ones((30, 1)), abs=6)
    with pytest.raises(ValueError, match="floats of no known range"):
        shrink(content(Image.fromarray(ramp.astype(np.float32)), "TIFF"), size)


# The whole command


def test_links(tree, command, tmp_path, monkeypatch):
    assert command()[0] == 2  # neither --from nor $IMAGENET_PATH
    before = state(tree)
    monkeypatch.setenv("IMAGENET_PATH", str(tree))
    code, printed = command()
    out = tmp_path / "out" / "imagenet"
    assert code == 0, printed
    assert "train 3 of 3 classes, 12 of ImageNet's 1,281,167 images" in printed
    assert "val   3 of 3 classes, 6 of" in printed and "left out" not in printed
    assert f"Training takes $IMAGENET_PATH, {tree}; unset it to train on {out}" in printed
    for path in tree.glob("*/*"):
        assert Path(os.readlink(out / path.relative_to(tree))) == path
    assert files(out) == files(tree) and state(tree) == before
    assert not (out / "corrupt.txt").exists()


def test_a_resized_copy(tree, command, tmp_path):
    before, originals = state(tree), files(tree)
    code, printed = command("--from", tree, "--resize", 50)
    out = tmp_path / "out" / "imagenet"
    assert code == 0, printed
    made, resized = files(out), 0
    assert made.keys() == originals.keys() and state(tree) == before
    for name, original in originals.items():
        if min(opened(original).size) <= 50:
            assert made[name] == original
        else:
            assert min(opened(made[name]).size) == 50
            resized += name.startswith("train")
    assert 0 < resized < 12 and f"{resized} resized" in printed
    assert not list(out.rglob("*.partial"))
    # again, nothing is left to do
    before = state(out)
    code, printed = command("--from", tree, "--resize", 50)
    assert (code, state(out)) == (0, before) and "images/s" not in printed
    # without a number, 256; what has changed is done again, and nothing else
    (tree / "train" / CLASSES[2] / "more.JPEG").write_bytes(content(picture(600, 500)))
    (tree / "val" / CLASSES[1] / val_name(3)).unlink()
    code, printed = command("--from", tree, "--resize", 50)
    assert code == 0 and "6 images in" in printed
    assert files(tree).keys() == files(out).keys()
    kept = [path for path in before if path.parent.name == CLASSES[0]]
    assert len(kept) == 6 and all(path.lstat().st_mtime_ns == before[path] for path in kept)
    assert command("--from", tree, "--resize", out=tmp_path / "other")[0] == 0
    made = tmp_path / "other" / "imagenet" / "train" / CLASSES[2] / "more.JPEG"
    assert Image.open(made).size == (307, 256)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("way", ["links", "resized", "flat"])
def test_corrupt_images(split, way, tree, command, tmp_path):
    bad = sorted((tree / split / CLASSES[1]).iterdir())[0]
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    if way == "flat":
        two_columns(tree, flatten(tree))
        bad = bad if split == "train" else tree / "val" / bad.name
    flags = ["--from", tree, *(["--resize", 50] if way == "resized" else [])]
    code, printed = command(*flags)
    out = tmp_path / "out" / "imagenet"
    assert code == 1
    path, why = (out / "corrupt.txt").read_text().rstrip("\n").split("\t")
    assert path == str(bad) and "truncated" in why.lower()
    assert "corrupt: 1" in printed and str(bad) in printed
    assert len(files(out)) == 17 and not (out / split / CLASSES[1] / bad.name).exists()
    # replaced by a good one, it is taken up by the next command
    bad.write_bytes(good)
    assert command(*flags)[0] == 0
    assert len(files(out)) == 18 and not (out / "corrupt.txt").exists()


def test_other_labels_of_as_many_images_are_heeded(tree, command, tmp_path):
    labels = flatten(tree)
    command("--from", tree, "--val_labels", two_columns(tmp_path, labels))
    swapped = {**labels, val_name(1): labels[val_name(3)], val_name(3): labels[val_name(1)]}
    code, printed = command("--from", tree, "--val_labels", two_columns(tmp_path, swapped))
    assert code == 0 and "4 images in" in printed
    out = tmp_path / "out" / "imagenet" / "val"
    assert {path.name: path.parent.name for path in out.glob("*/*")} == swapped


@pytest.mark.parametrize("first, second", [((), ("--resize", 50)),
                                           (("--resize", 50), ("--resize", 40))])  # fmt: skip
def test_other_options_are_refused(first, second, tree, command, tmp_path):
    command("--from", tree, *first)
    before = state(tmp_path)
    code, printed = command("--from", tree, *second)
    assert code == 2 and "was begun with" in printed and "another --data_dir" in printed
    assert state(tmp_path) == before


@pytest.mark.parametrize("flags", [[], ["--resize", 50]])
def test_links_of_earlier_versions_are_taken_up_and_never_written_through(
    flags, tree, command, tmp_path
):
    """They made one link of a whole train/ or val/."""
    assert command("--from", tree)[0] == 0
    out, before = tmp_path / "out" / "imagenet", state(tree)
    shutil.rmtree(out / "train")
    (out / "train").symlink_to(tree / "train")
    for name in CLASSES if flags else CLASSES[:1]:  # with other flags only where none is finished
        for split in ("train", "val"):
            (out / f".prepared/{split}/{name}.json").unlink()
    code, printed = command("--from", tree, *flags)
    assert code == 0 and f"{18 if flags else 6} images in" in printed and state(tree) == before
    assert not (out / "train").is_symlink() and files(out).keys() == files(tree).keys()
    assert {(out / "train" / name).is_symlink() for name in CLASSES} == {not flags}
    # and back: what has no record is replaced
    for record in out.glob(".prepared/*/*.json"):
        record.unlink()
    assert command("--from", tree)[0] == 0 and state(tree) == before and files(out) == files(tree)


def test_a_folder_that_the_command_has_not_made_is_left_alone(tree, command, tmp_path):
    (tmp_path / "out" / "imagenet" / "train").mkdir(parents=True)
    code, printed = command("--from", tree, "--resize", 50)
    assert code == 2 and "not put there" in printed
    shutil.rmtree(tmp_path / "out" / "imagenet")
    (tmp_path / "out" / "imagenet").symlink_to(tree)
    before = state(tree)
    code, printed = command("--from", tree, "--resize", 50)
    assert code == 2 and "in one another" in printed and state(tree) == before
    (tmp_path / "file").write_text("")
    code, printed = command("--from", tree, out=tmp_path / "file")
    assert code == 2 and re.search("cannot be written: .*; give another --data_dir", printed)


def test_shards_together_are_one_run(tree, command, tmp_path):
    command("--from", tree, "--resize", 50, out=tmp_path / "one")
    code, printed = command("--from", tree, "--resize", 50, "--shard", "2/2")
    out = tmp_path / "out" / "imagenet"
    assert code == 0 and "missing: 4 class folders" in printed and "not whole yet" in printed
    assert {path.name for path in out.glob("[tv]*/*")} == {CLASSES[1]}
    code, printed = command("--from", tree, "--resize", 50, "--shard", "1/2", "--jobs", 2)
    assert code == 0 and "missing" not in printed and "is ready" in printed
    assert files(out) == files(tmp_path / "one" / "imagenet") != {}
    records = [{path.relative_to(place): path.read_text() for path in place.rglob("*.json")}
               for place in (out, tmp_path / "one" / "imagenet")]  # fmt: skip
    assert records[0] == records[1] and len(records[0]) == 6


@pytest.mark.parametrize("name, flags", [
    ("imagenet", ["--shard", "0/2"]), ("imagenet", ["--shard", "3/2"]),
    ("imagenet", ["--shard", "2"]), ("cifar10", ["--resize"]), ("cifar10", ["--shard", "1/2"])])
def test_wrong_flags(name, flags, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main([name, "--data_dir", str(tmp_path), "--from", str(tmp_path), *flags])
    assert flags[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


# The layout


@pytest.mark.parametrize("odd", ["notes.md", ".cache/a.jpg", f"{CLASSES[0]}/notes.md",
                                 f"{CLASSES[0]}/thumbs/a.jpg"])  # fmt: skip
def test_what_is_no_image_of_a_class_is_left_out(odd, tree, command, tmp_path):
    """Training takes any folder for a class, and any image below a class for one of its own:
    such a folder is not linked as one."""
    (tree / "train" / odd).parent.mkdir(exist_ok=True)
    (tree / "train" / odd).write_bytes(content(picture()))
    for flags in ([], ["--resize", 50]):
        out = tmp_path / f"out{len(flags)}"
        code, printed = command("--from", tree, *flags, out=out)
        assert code == 0 and f"; 1 left out, since no images of a class: train/{odd}".removesuffix(
            "/a.jpg") in printed  # fmt: skip
        train = out / "imagenet" / "train"
        assert {path.name for path in train.iterdir()} == set(CLASSES)
        assert len([x for x in files(out / "imagenet") if not x.endswith(".md")]) == 18
        whole = not flags and not odd.endswith("/thumbs/a.jpg")
        assert (train / CLASSES[0]).is_symlink() == whole


def packed(tree, name):
    """A tar file in the place of train/ or of its classes."""
    shutil.rmtree(tree / "train")
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_bytes(b"")


def test_the_commands_that_unpack_do(tmp_path, tree, command):
    """The sentence's commands, typed, make the tree from tar files of ImageNet's form."""
    expected, packed = files(tree), tmp_path / "packed"
    (packed / "tars").mkdir(parents=True)
    flatten(tree)
    for source, name in [(tree / "train" / name, f"tars/{name}.tar") for name in CLASSES] + [
        (packed / "tars", "ILSVRC2012_img_train.tar"), (tree / "val", "ILSVRC2012_img_val.tar")]:
        subprocess.run(["tar", "-cf", packed / name, "-C", source, "."], check=True)
    printed = command("--from", packed)[1]
    subprocess.run(["bash", "-ec", printed.split("To unpack:\n")[1]], check=True)
    train = {name: x for name, x in expected.items() if name.startswith("train")}
    assert files(packed) | train == files(packed) and len(list(packed.glob("val/*"))) == 6


def test_an_unreadable_folder_is_named(tree, command, monkeypatch):
    scandir = os.scandir  # root reads all

    def refuse(path):
        if Path(path).name == CLASSES[1]:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, printed = command("--from", tree)
    assert code == 2 and f"{CLASSES[1]} cannot be read: Permission denied" in printed


# The labels of a flat val/


def two_columns(place, labels):
    path = place / "val_labels.txt"
    path.write_text("".join(f"{name} {label}\n" for name, label in labels.items()))
    return path


def kaggle(place, labels):
    rows = [f"{Path(name).stem},{label} 1 2 3 4 {label} 5 6 7 8" for name, label in labels.items()]
    path = place / "LOC_val_solution.csv"
    path.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return path


def annotations(place, labels):
    folder = place / "Annotations" / "CLS-LOC" / "val"
    folder.mkdir(parents=True)
    for name, label in labels.items():
        (folder / f"{Path(name).stem}.xml").write_text(
            f"<annotation><folder>val</folder><object><name>{label}</name></object></annotation>"
        )
    return folder


def devkit(place, labels):
    savemat = pytest.importorskip("scipy.io").savemat
    folder = place / "ILSVRC2012_devkit_t12"
    (folder / "data").mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    ids = {label: 7 - i for i, label in enumerate(CLASSES)}  # not in the order of the names
    rows = [(number, label, 0) for label, number in ids.items()] + [(9, "n00000000", 3)]
    savemat(folder / "data" / "meta.mat", {"synsets": np.array(rows, dtype=kinds)})
    lines = "".join(f"{ids[labels[name]]}\n" for name in sorted(labels))
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return folder


@pytest.mark.parametrize("write, where", [
    *((write, "in") for write in (kaggle, two_columns, annotations, devkit)),
    (kaggle, "beside"), (devkit, "given"), (annotations, "given")])  # fmt: skip
def test_a_flat_val_is_sorted(write, where, tree, command, tmp_path):
    expected, labels = files(tree), flatten(tree)
    (tmp_path / "elsewhere").mkdir()
    path = write({"in": tree, "beside": tmp_path, "given": tmp_path / "elsewhere"}[where], labels)
    before = state(tree)
    flags = ["--val_labels", path] if where == "given" else []
    code, printed = command("--from", tree, *flags)
    out = tmp_path / "out" / "imagenet"
    assert code == 0, printed
    assert files(out) == expected and state(tree) == before
    links = list(out.glob("val/*/*"))
    assert len(links) == 6 and all(os.path.isabs(os.readlink(link)) for link in links)
    if where == "in":
        assert command("--from", tree, "--resize", 1000, out=tmp_path / "copy")[0] == 0
        assert files(tmp_path / "copy" / "imagenet") == expected
        assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


def labelled(**changed):
    """What makes val/ flat and writes its labels, some of them changed or (None) left out."""
    def spoil(tree):
        labels = {**flatten(tree), **{val_name(int(k[1:])): x for k, x in changed.items()}}
        two_columns(tree, {name: label for name, label in labels.items() if label})

    return spoil


def flat_with(name, content):
    """What makes val/ flat and puts a file of that content beside it; None: a pipe."""
    def spoil(tree):
        flatten(tree)
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(tree / name) if content is None else (tree / name).write_bytes(content)

    return spoil


CSV, META = "LOC_val_solution.csv", "ILSVRC2012_devkit_t12/data/meta.mat"
FAULTS = [  # of the layout or the labels: what is wrong, words of the sentence
    (lambda t: shutil.rmtree(t / "train"), ["no train/ in", "train/CLASS/"]),
    (lambda t: packed(t, "ILSVRC2012_img_train.tar"), ["no train/ in", "for f in n*.tar"]),
    (lambda t: packed(t, "train/n01440764.tar"), ["tar files of classes", "for f in n*.tar"]),
    (lambda t: (t / "train/n00000004").mkdir(), ["4 class folders, not ImageNet's 3",
                                                 "--dataset folder:PATH"]),
    (lambda t: (t / "val" / CLASSES[0]).rename(t / "val/n00000009"),
     ["differ in 2 classes: n00000001, n00000009"]),
    (lambda t: [p.unlink() for p in t.glob("val/n00000003/*")], ["without images", "n00000003"]),
    (lambda t: (t / "val" / val_name(7)).write_bytes(b""), ["class folders and, beside them",
                                                            val_name(7)]),
    (lambda t: [shutil.rmtree(t), t.write_text("")], ["there is no folder"]),
    (flatten, ["--val_labels FILE", CSV, "two columns", "Annotations", "ILSVRC2012_devkit_t12"]),
    (labelled(_1=None), ["1 images", "no label", val_name(1)]),
    (labelled(_1="n00000042"), ["no class folder", "n00000042"]),
    (labelled(_1=CLASSES[1], _2=CLASSES[1]), ["without images", CLASSES[0]]),
    (flat_with("val_labels.txt", b"a.JPEG\n"), ["val_labels.txt has a line without two columns"]),
    (flat_with("Annotations/CLS-LOC/val/a.xml", b"<annotation>"), ["a.xml is no whole XML file"]),
    (flat_with(META, b"x" * 500), ["no labels in", "ILSVRC2012_devkit_t12"]),
    (flat_with(META, b""), ["pip install scipy"]),
    *((flat_with(CSV, content), ["no labels in", CSV])
      for content in (b"a,b\0\n\"" + b"x" * 200_000, b"\xff\xfe,", None)),
    (flatten, ["no labels in", "nowhere.txt"]),
    (lambda t: None, ["needs no --val_labels"]),
]  # fmt: skip


@pytest.mark.parametrize("spoil, words", FAULTS)
def test_faults_are_named_before_any_work(spoil, words, tree, command, tmp_path, monkeypatch):
    spoil(tree)
    given = words[-1] in ("nowhere.txt", "needs no --val_labels")
    if words[0] == "pip install scipy":
        for name in ("scipy", "scipy.io"):
            monkeypatch.setitem(sys.modules, name, None)
    code, printed = command("--from", tree, *(["--val_labels", "nowhere.txt"] if given else []))
    assert code == 2 and all(word in printed for word in words), printed
    assert not (tmp_path / "out").exists()


# Ends in the middle


DRIVER = """
import resource, sys
from data import DATASETS
DATASETS["imagenet"] = DATASETS["imagenet"]._replace(classes=int(sys.argv.pop(1)))
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from data.prepare import main
sys.exit(main())
"""


def start(n, *flags, limit=0):
    """The command in a process group of its own, in a tree of n classes."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(n), str(limit), "imagenet", *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_a_full_disk_is_one_sentence(tree, command, tmp_path):
    big = tree / "train" / CLASSES[1] / "big.JPEG"
    big.write_bytes(content(picture(400, 400), quality=100))
    flags = ["--from", tree, "--data_dir", tmp_path / "out", "--resize", 1000, "--jobs", 1]
    process = start(3, *flags, limit=big.stat().st_size - 1)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in printed
    assert re.search(r"error: .*imagenet cannot be written: .*; the same command goes on", printed)
    out = tmp_path / "out" / "imagenet"
    assert not (out / "train" / CLASSES[1]).exists() and not list(out.rglob("*.partial"))
    assert command("--from", tree, "--resize", 1000)[0] == 0
    assert files(out) == files(tree)


def workers_of(pid):
    """The process ids of its workers; it has one child more, which looks after semaphores."""
    pids = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [x for x in pids if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes()]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("end", [
    "Ctrl-C", *(pytest.param(x, marks=pytest.mark.slow) for x in ("killed", "a worker killed"))])
def test_an_end_in_the_middle(end, command, tmp_path, monkeypatch):
    """Whole class folders or none, no process left, and the same command makes it whole."""
    root, names = tmp_path / "original", [f"n{i:08d}" for i in range(10)]
    image = content(picture(600, 500))
    for split, count in (("train", 15), ("val", 1)):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.JPEG").write_bytes(image)
    out = tmp_path / "out" / "imagenet"
    process = start(10, "--from", root, "--data_dir", tmp_path / "out", "--resize", 300,
                    "--jobs", 2)  # fmt: skip
    wait_until(lambda: len(list(out.glob(".prepared/train/*.json"))) >= 2)
    wait_until(lambda: list(out.glob(".prepared/*.partial/*/*")))
    workers = workers_of(process.pid)
    assert len(workers) == 2
    if end == "Ctrl-C":  # reaches all the processes of a terminal
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid if end == "killed" else workers[0], signal.SIGKILL)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == {"Ctrl-C": 130, "killed": -signal.SIGKILL}.get(end, 2)
    assert "Traceback" not in printed
    if end != "killed":
        words = "fewer --jobs" if end == "a worker killed" else "interrupted; the same command goes"
        assert words in printed.splitlines()[-1] and not list(out.rglob("*.partial"))
    wait_until(lambda: all(map(gone, workers)))
    finished = {path: path.stat().st_mtime_ns for path in out.glob(".prepared/*/*.json")}
    assert 2 <= len(finished) < 20
    for folder in out.glob("train/*"):
        assert len(list(folder.iterdir())) == 15
    for path in finished:
        assert json.loads(path.read_text())["images"] in (1, 15)
    for path in out.glob(".prepared/*.partial"):  # what is left is removed after ten minutes
        os.utime(path, (0, 0))
    classes(monkeypatch, 10)
    assert command("--from", root, "--resize", 300)[0] == 0
    assert len(files(out)) == 10 * 16 and set(files(out).values()) == {shrink(image, 300)}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_two_commands_at_once_do_not_hurt_each_other(tree, command, tmp_path):
    flags = ["--from", tree, "--data_dir", tmp_path / "out", "--resize", 50, "--jobs", 2]
    processes = [start(3, *flags, "--shard", shard) for shard in ("1/2", "2/2")]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "is ready" in command("--from", tree, "--resize", 50)[1]
    assert len(files(tmp_path / "out" / "imagenet")) == 18


# Training


def test_training_takes_imagenet_path_then_the_prepared_folder(tree, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(DataError) as error:
        load("imagenet", tmp_path, 4, 4, cpu)
    for word in (str(tmp_path / "imagenet"), "$IMAGENET_PATH",
                 f"data.prepare imagenet --data_dir {tmp_path} --from DIR"):  # fmt: skip
        assert word in str(error.value)
    monkeypatch.setenv("IMAGENET_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which .IMAGENET_PATH names"):
        load("imagenet", tmp_path, 4, 4, cpu)
    monkeypatch.setenv("IMAGENET_PATH", str(tree))
    ours = load("imagenet", tmp_path, 4, 4, cpu, image_size=32)
    assert (ours.files[0], ours.notes) == (tree, ())
    prepared = shutil.copytree(tree, tmp_path / "imagenet")
    ours = load("imagenet", tmp_path, 4, 4, cpu, image_size=32)
    assert ours.files[0] == tree and f"unset it to train on {prepared}" in ours.notes[0]
    monkeypatch.setenv("IMAGENET_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=f"nowhere, which .* or unset it for {prepared}"):
        load("imagenet", tmp_path, 4, 4, cpu)
    for path in ("", str(prepared)):
        monkeypatch.setenv("IMAGENET_PATH", path)
        ours = load("imagenet", tmp_path, 4, 4, cpu, image_size=32)
        assert (ours.files[0], ours.train.examples, ours.notes) == (prepared, 12, ())
