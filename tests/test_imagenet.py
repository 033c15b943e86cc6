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

import data.imagenet
import data.imagenet_layout
from data import DataError, load
from data.prepare import main
from data.common import reason
from data.resize import shrink

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ["n00000001", "n00000002", "n00000003"]


@pytest.fixture(autouse=True)
def three_classes(monkeypatch):
    classes(monkeypatch, 3)
    monkeypatch.delenv("IMAGENET_PATH", raising=False)


def classes(monkeypatch, n):
    monkeypatch.setattr(data.imagenet, "CLASSES", n)
    monkeypatch.setattr(data.imagenet_layout, "CLASSES", n)


def picture(width=60, height=40, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="JPEG", **options):
    made = io.BytesIO()
    image.save(made, kind, **options)
    return made.getvalue()


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


def val_name(i, suffix=".JPEG"):
    return f"ILSVRC2012_val_{i:08d}{suffix}"


def flatten(root):
    """A flat val/; {file name: class}."""
    labels = {path.name: path.parent.name for path in sorted(root.glob("val/*/*"))}
    for path in list(root.glob("val/*/*")):
        path.rename(root / "val" / path.name)
    for name in CLASSES:
        (root / "val" / name).rmdir()
    return labels


def two_columns(root, labels):
    path = root / "val_labels.txt"
    path.write_text("".join(f"{name} {label}\n" for name, label in labels.items()))
    return path


@pytest.fixture
def command(tmp_path, capsys):
    """f(*flags) -> (exit code, all that was printed) of the command, with one job."""

    def run(*flags, name="imagenet", out=tmp_path / "out"):
        try:
            code = main([name, "--data_dir", str(out), "--jobs", "1", *map(str, flags)])
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
    """What lies in a folder, with the time of its last change."""
    return {path: path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


# One image


@pytest.mark.parametrize("width, height", [(300, 200), (200, 300), (1000, 400), (257, 91)])
def test_the_shorter_side_is_as_asked_and_the_picture_the_same(width, height):
    image = picture(width, height)
    small = Image.open(io.BytesIO(shrink(content(image, quality=100), 64)))
    assert (small.format, small.mode, min(small.size)) == ("JPEG", "RGB", 64)
    assert max(small.size) == round(64 * max(width, height) / min(width, height))
    exact = image.resize(small.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(small, float) - np.asarray(exact, float)).mean() < 3


def test_fine_lines_become_grey_not_stripes():
    lines = np.tile(np.array([0, 255], np.uint8)[None, :, None], (600, 300, 3))
    small = np.asarray(Image.open(io.BytesIO(shrink(content(Image.fromarray(lines), "PNG"), 50))))
    assert small.std() < 3 and small.mean() == pytest.approx(127, abs=4)


@pytest.mark.parametrize("size", [None, 40, 300])
def test_what_is_small_enough_stays_byte_for_byte(size):
    original = content(picture(60, 40), quality=30)
    assert shrink(original, size) is original


@pytest.mark.parametrize("kind", ["PNG", "CMYK", "grey", "palette", "alpha"])
def test_kinds_of_image_that_are_not_rgb_jpegs(kind):
    image = picture(90, 60)
    mode = {"CMYK": "CMYK", "grey": "L", "palette": "P", "alpha": "RGBA"}.get(kind, "RGB")
    original = content(image.convert(mode), "JPEG" if mode in ("CMYK", "L") else "PNG")
    small = Image.open(io.BytesIO(shrink(original, 30)))
    assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (45, 30))
    seen = Image.open(io.BytesIO(original)).convert("RGB").resize((45, 30))  # as training does
    assert np.abs(np.asarray(small, float) - np.asarray(seen, float)).mean() < 4
    assert shrink(original) is original


def test_orientation_is_as_decoded_and_its_tag_is_gone():
    exif = Image.Exif()
    exif[0x0112] = 6
    small = Image.open(io.BytesIO(shrink(content(picture(90, 60), exif=exif, comment=b"c"), 30)))
    assert small.size == (45, 30)
    assert not small.getexif() and "comment" not in small.info


@pytest.mark.parametrize("size", [None, 20])
@pytest.mark.parametrize("fault", ["cut", "text", "empty"])
def test_damage_is_told_in_the_same_words_each_time(fault, size):
    whole = content(picture(300, 300))
    damaged = {"cut": whole[: len(whole) // 2], "text": b"<html>", "empty": b""}[fault]
    said = set()
    for _ in range(2):
        with pytest.raises(OSError) as error:
            shrink(damaged, size)
        said.add(reason(error.value))
    assert len(said) == 1
    assert re.search("truncated" if fault == "cut" else "not an image", said.pop())


# The whole command


def test_links(tree, command, tmp_path):
    before = state(tree)
    code, said = command("--from", tree)
    out = tmp_path / "out" / "imagenet"
    assert code == 0, said
    assert "train 3 of 3 classes, 12 of ImageNet's 1,281,167 images" in said
    assert "val   3 of 3 classes, 6 of ImageNet's 50,000 images" in said
    assert "Not the whole of ImageNet: train/ holds 12 images, not 1,281,167" in said
    for split in ("train", "val"):
        assert Path(os.readlink(out / split)) == tree / split
    assert files(out) == files(tree) and state(tree) == before
    assert not (out / "corrupt.txt").exists()


def test_official_counts_are_not_remarked_upon(tree, command, monkeypatch):
    monkeypatch.setitem(data.imagenet_layout.OFFICIAL, "train", 12)
    code, said = command("--from", tree)
    assert "train/ holds" not in said and "val/ holds 6 images, not 50,000" in said


def test_a_resized_copy(tree, command, tmp_path):
    before, originals = state(tree), files(tree)
    code, said = command("--from", tree, "--resize", 50)
    out = tmp_path / "out" / "imagenet"
    assert code == 0, said
    assert state(tree) == before
    made = files(out)
    assert made.keys() == originals.keys()
    resized = 0
    for name, original in originals.items():
        side = min(Image.open(io.BytesIO(original)).size)
        if side <= 50:
            assert made[name] == original
        else:
            assert min(Image.open(io.BytesIO(made[name])).size) == 50
            resized += name.startswith("train")
    assert 0 < resized < 12 and f"{resized} resized" in said
    assert not list(out.rglob("*.partial"))
    # again, nothing is left to do
    before = state(out)
    code, said = command("--from", tree, "--resize", 50)
    assert (code, state(out)) == (0, before) and "images/s" not in said


def test_resize_without_a_number_is_256(tree, command, tmp_path):
    big = tree / "train" / CLASSES[0] / "big.JPEG"
    big.write_bytes(content(picture(600, 500)))
    assert command("--from", tree, "--resize")[0] == 0
    made = Image.open(tmp_path / "out" / "imagenet" / "train" / CLASSES[0] / "big.JPEG")
    assert made.size == (307, 256)


def test_imagenet_path_stands_in_for_from(tree, command, monkeypatch):
    assert command()[0] == 2
    monkeypatch.setenv("IMAGENET_PATH", str(tree))
    assert command()[0] == 0


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
    code, said = command(*flags)
    out = tmp_path / "out" / "imagenet"
    assert code == 1
    path, why = (out / "corrupt.txt").read_text().rstrip("\n").split("\t")
    assert path == str(bad) and "truncated" in why.lower()
    assert "corrupt: 1" in said and str(bad) in said
    stays = way == "links" or way == "flat" and split == "train"
    assert (out / split / CLASSES[1] / bad.name).exists() == stays
    assert ("--skip_bad_images" in said) == stays
    assert len(files(out)) == 17 + stays
    # replaced by a good one, it is taken up by the next command
    bad.write_bytes(good)
    assert command(*flags)[0] == 0
    assert len(files(out)) == 18 and not (out / "corrupt.txt").exists()


def test_a_source_that_changed_is_done_again(tree, command, tmp_path):
    command("--from", tree, "--resize", 50)
    kept = tmp_path / "out" / "imagenet" / "train" / CLASSES[0]
    before = state(kept)
    (tree / "train" / CLASSES[2] / "more.JPEG").write_bytes(content(picture()))
    (tree / "val" / CLASSES[1] / val_name(3)).unlink()
    code, said = command("--from", tree, "--resize", 50)
    assert code == 0 and "6 images in" in said
    assert files(tree).keys() == files(tmp_path / "out" / "imagenet").keys()
    assert state(kept) == before


def test_other_labels_of_as_many_images_are_heeded(tree, command, tmp_path):
    labels = flatten(tree)
    command("--from", tree, "--val_labels", two_columns(tmp_path, labels))
    swapped = {**labels, val_name(1): labels[val_name(3)], val_name(3): labels[val_name(1)]}
    code, said = command("--from", tree, "--val_labels", two_columns(tmp_path, swapped))
    assert code == 0 and "4 images in" in said
    out = tmp_path / "out" / "imagenet" / "val"
    assert {path.name: path.parent.name for path in out.glob("*/*")} == swapped


@pytest.mark.parametrize("first, second", [((), ("--resize", 50)), (("--resize", 50), ()),
                                           (("--resize", 50), ("--resize", 40))])  # fmt: skip
def test_other_options_are_refused(first, second, tree, command, tmp_path):
    command("--from", tree, *first)
    before = state(tmp_path)
    code, said = command("--from", tree, *second)
    assert code == 2 and "was begun with" in said and "another --data_dir" in said
    assert state(tmp_path) == before


def test_links_that_were_only_begun_are_never_written_through(tree, command, tmp_path):
    command("--from", tree)
    out = tmp_path / "out" / "imagenet"
    for record in out.glob(".prepared/*/*.json"):
        record.unlink()
    before = state(tree)
    assert command("--from", tree, "--resize", 50)[0] == 0
    assert state(tree) == before and not (out / "train").is_symlink()
    for record in out.glob(".prepared/*/*.json"):
        record.unlink()
    code, said = command("--from", tree)
    assert code == 2 and "cannot be written" in said  # a folder that is not empty is not removed


def test_a_folder_that_the_command_has_not_made_is_left_alone(tree, command, tmp_path):
    (tmp_path / "out" / "imagenet" / "train").mkdir(parents=True)
    code, said = command("--from", tree, "--resize", 50)
    assert code == 2 and "not put there" in said
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "imagenet").symlink_to(tree)
    before = state(tree)
    code, said = command("--from", tree, "--resize", 50)
    assert code == 2 and "in one another" in said and state(tree) == before


def test_shards_together_are_one_run(tree, command, tmp_path):
    command("--from", tree, "--resize", 50, out=tmp_path / "one")
    code, said = command("--from", tree, "--resize", 50, "--shard", "2/2")
    out = tmp_path / "out" / "imagenet"
    assert code == 0 and "missing: 4 class folders" in said and "not whole yet" in said
    assert {path.name for path in out.glob("[tv]*/*")} == {CLASSES[1]}
    code, said = command("--from", tree, "--resize", 50, "--shard", "1/2", "--jobs", 2)
    assert code == 0 and "missing" not in said and "is ready" in said
    assert files(out) == files(tmp_path / "one" / "imagenet") != {}
    records = [{path.relative_to(place): path.read_text() for path in place.rglob("*.json")}
               for place in (out, tmp_path / "one" / "imagenet")]  # fmt: skip
    assert records[0] == records[1] and len(records[0]) == 6


# The layout


def test_files_that_are_no_images_are_named_and_left_out(tree, command, tmp_path):
    (tree / "train" / "README.txt").write_text("x")
    (tree / "train" / CLASSES[0] / "notes.md").write_text("x")
    for flags in ([], ["--resize", 50]):
        code, said = command("--from", tree, *flags, out=tmp_path / f"out{len(flags)}")
        assert code == 0 and "train/README.txt" in said and f"{CLASSES[0]}/notes.md" in said
    assert (tmp_path / "out0" / "imagenet" / "train").is_symlink()
    assert len(files(tmp_path / "out2" / "imagenet")) == 18


@pytest.mark.parametrize("folder", [".cache", f"{CLASSES[0]}/thumbs"])
def test_folders_that_training_would_read_are_not_linked(folder, tree, command, tmp_path):
    """It takes any folder for a class, and any image below a class for one of its own."""
    (tree / "train" / folder).mkdir()
    (tree / "train" / folder / "a.jpg").write_bytes(content(picture()))
    code, said = command("--from", tree)
    assert code == 0 and f"train/{folder}" in said
    out = tmp_path / "out" / "imagenet"
    assert not (out / "train").is_symlink() and (out / "val").is_symlink()
    assert {path.name for path in (out / "train").iterdir()} == set(CLASSES)
    assert len(files(out)) == 18 and not (out / "train" / folder).exists()


def layout_fault(fault, tree):
    if fault == "no train":
        shutil.rmtree(tree / "train")
    elif fault == "tar":
        shutil.rmtree(tree / "train")
        (tree / "ILSVRC2012_img_train.tar").write_bytes(b"")
    elif fault == "class tars":
        shutil.rmtree(tree / "train")
        (tree / "train").mkdir()
        (tree / "train" / "n01440764.tar").write_bytes(b"")
    elif fault == "classes":
        (tree / "train" / "n00000004").mkdir()
    elif fault == "val differs":
        (tree / "val" / CLASSES[0]).rename(tree / "val" / "n00000009")
    elif fault == "empty":
        for path in (tree / "val" / CLASSES[2]).iterdir():
            path.unlink()
    elif fault == "mixed":
        (tree / "val" / val_name(7)).write_bytes(content(picture()))
    elif fault == "file":
        shutil.rmtree(tree)
        tree.write_text("")


@pytest.mark.parametrize("fault, words", [
    ("no train", ["no train/ in", "train/CLASS/"]),
    ("tar", ["mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train", "for f in n*.tar"]),
    ("class tars", ["1 tar files", "for f in n*.tar"]),
    ("classes", ["4 class folders, not ImageNet's 3", "--dataset folder:PATH"]),
    ("val differs", ["differ in 2 classes: n00000001, n00000009"]),
    ("empty", ["without images", "n00000003"]),
    ("mixed", ["class folders and, beside them, images", val_name(7)]),
    ("file", ["there is no folder"]),
])  # fmt: skip
def test_faults_of_the_layout_are_named_before_any_work(fault, words, tree, command, tmp_path):
    layout_fault(fault, tree)
    code, said = command("--from", tree)
    assert code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_the_commands_that_unpack_do(tmp_path, tree, command):
    """What the sentence says, typed, yields the tree from tar files of ImageNet's form."""
    expected = files(tree)
    packed = tmp_path / "packed"
    (packed / "tars").mkdir(parents=True)
    flatten(tree)
    for name in CLASSES:
        subprocess.run(["tar", "-cf", packed / "tars" / f"{name}.tar", "-C",
                        tree / "train" / name, "."], check=True)  # fmt: skip
    for split, folder in (("train", packed / "tars"), ("val", tree / "val")):
        subprocess.run(["tar", "-cf", packed / f"ILSVRC2012_img_{split}.tar", "-C", folder, "."],
                       check=True)  # fmt: skip
    said = command("--from", packed)[1]
    subprocess.run(["bash", "-ec", said.split("To unpack:\n")[1]], check=True)
    train = {name: x for name, x in expected.items() if name.startswith("train")}
    assert files(packed) | train == files(packed) and len(list(packed.glob("val/*"))) == 6


def test_an_unreadable_folder_is_named(tree, command, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == CLASSES[1]:
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    code, said = command("--from", tree)
    assert code == 2 and f"{CLASSES[1]} cannot be read: Permission denied" in said


# The labels of a flat val/


def kaggle(place, labels):
    rows = [f"{Path(name).stem},{label} 1 2 3 4 {label} 5 6 7 8" for name, label in labels.items()]
    place.mkdir(exist_ok=True)
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


@pytest.mark.parametrize("where", ["in", "beside", "given"])
@pytest.mark.parametrize("write", [kaggle, two_columns, annotations, devkit])
def test_a_flat_val_is_sorted(write, where, tree, command, tmp_path):
    expected = files(tree)
    labels = flatten(tree)
    (tmp_path / "elsewhere").mkdir()
    place = {"in": tree, "beside": tmp_path, "given": tmp_path / "elsewhere"}[where]
    path = write(place, labels)
    before = state(tree)
    flags = ["--val_labels", path] if where == "given" else []
    code, said = command("--from", tree, *flags)
    out = tmp_path / "out" / "imagenet"
    assert code == 0, said
    assert files(out) == expected and state(tree) == before
    assert (out / "train").is_symlink()
    links = list(out.glob("val/*/*"))
    assert len(links) == 6 and all(os.path.isabs(os.readlink(link)) for link in links)
    code, said = command("--from", tree, *flags, "--resize", 1000, out=tmp_path / "copy")
    assert code == 0 and files(tmp_path / "copy" / "imagenet") == expected
    assert not any(path.is_symlink() for path in (tmp_path / "copy").rglob("*"))


@pytest.mark.parametrize("fault", ["none", "unlabelled", "unknown", "class without", "one column",
                                   "missing file", "sorted", "xml", "devkit", "scipy"])  # fmt: skip
def test_faults_of_the_labels_are_named(fault, tree, command, tmp_path, monkeypatch):
    labels = {} if fault == "sorted" else flatten(tree)
    first, flags = val_name(1), []
    if fault == "unlabelled":
        two_columns(tree, {k: v for k, v in labels.items() if k != first})
    elif fault == "unknown":
        two_columns(tree, {**labels, first: "n00000042"})
    elif fault == "class without":
        two_columns(tree, dict.fromkeys(labels, CLASSES[0]))
    elif fault == "one column":
        (tree / "val_labels.txt").write_text(first + "\n")
    elif fault in ("missing file", "sorted"):
        flags = ["--val_labels", tmp_path / "nowhere.txt"]
    elif fault == "xml":
        next(annotations(tree, labels).iterdir()).write_text("<annotation>")
    elif fault in ("devkit", "scipy"):
        if fault == "devkit":
            (devkit(tree, labels) / "data" / "meta.mat").write_bytes(b"x" * 500)
        else:
            (tree / "ILSVRC2012_devkit_t12" / "data").mkdir(parents=True)
            monkeypatch.setitem(sys.modules, "scipy", None)
            monkeypatch.setitem(sys.modules, "scipy.io", None)
    code, said = command("--from", tree, *flags)
    words = {
        "none": ["--val_labels FILE", "LOC_val_solution.csv", "two columns", "Annotations",
                 "ILSVRC2012_devkit_t12"],
        "unlabelled": ["1 images", "no label", first],
        "unknown": ["no class folder", "n00000042"],
        "class without": ["without images", CLASSES[1], CLASSES[2]],
        "one column": ["val_labels.txt has a line without two columns"],
        "missing file": ["no labels in", "nowhere.txt"],
        "sorted": ["needs no --val_labels"],
        "xml": [".xml is no whole XML file"],
        "devkit": ["no whole ILSVRC2012_devkit_t12"],
        "scipy": ["pip install scipy"],
    }  # fmt: skip
    assert code == 2 and all(word in said for word in words[fault]), said
    assert not (tmp_path / "out").exists()


# Flags, ends in the middle, and what cannot be written


@pytest.mark.parametrize("flags", [["--resize", "0"], ["--resize", "x"], ["--jobs", "0"],
                                   ["--shard", "0/2"], ["--shard", "3/2"], ["--shard", "2"],
                                   ["--val_label"], ["--size", "3"]])  # fmt: skip
def test_wrong_flags(flags, tree, command):
    code, said = command("--from", tree, *flags)
    assert code == 2 and "error:" in said


@pytest.mark.parametrize("flag", [["--resize"], ["--shard", "1/2"], ["--val_labels", "x"]])
def test_flags_of_imagenet_are_not_for_other_sets(flag, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["cifar10", "--data_dir", str(tmp_path), *flag])
    assert end.value.code == 2
    assert f"{flag[0]} is for imagenet, not cifar10" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_one_sentence(tree, command, tmp_path):
    (tmp_path / "out").write_text("")
    code, said = command("--from", tree)
    assert code == 2 and re.search(r"error: .*imagenet cannot be written", said)


DRIVER = """
import resource, sys
import data.imagenet, data.imagenet_layout
data.imagenet.CLASSES = data.imagenet_layout.CLASSES = int(sys.argv.pop(1))
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import sys
from data.prepare import main
sys.exit(main())
"""


def start(n, *flags, limit=0):
    """The command in a process of its own, in a tree of n classes."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(n), str(limit), "imagenet", *map(str, flags)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_a_full_disk_is_one_sentence(tree, command, tmp_path):
    big = tree / "train" / CLASSES[1] / "big.JPEG"
    big.write_bytes(content(picture(400, 400), quality=100))
    flags = ["--from", tree, "--data_dir", tmp_path / "out", "--resize", 1000, "--jobs", 1]
    process = start(3, *flags, limit=big.stat().st_size - 1)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "Traceback" not in said
    assert re.search(r"error: .*imagenet cannot be written: .*; the same command goes on", said)
    out = tmp_path / "out" / "imagenet"
    assert {path.name for path in out.glob("train/*")} == {CLASSES[0]}
    assert command("--from", tree, "--resize", 1000)[0] == 0
    assert files(out) == files(tree) and not list(out.rglob("*.partial"))


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, "a worker killed"])
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
    wait_until(lambda: list(out.glob(".prepared/train/*.partial/*")))
    workers = children(process.pid)
    assert len(workers) == 2
    if end == signal.SIGINT:
        for pid in workers:  # they do not hear it
            os.kill(pid, end)
        wait_until(lambda: len(list(out.glob(".prepared/train/*.json"))) >= 4)
    if end in (signal.SIGKILL, signal.SIGINT):
        process.send_signal(end)
    else:
        os.kill(workers[0], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}
    assert process.returncode == codes.get(end, 2)
    if end not in codes:
        assert "ended with -9" in said and "fewer --jobs" in said and "Traceback" not in said
    if end == signal.SIGINT:
        assert said.endswith("interrupted; the same command goes on\n") and "Traceback" not in said
    wait_until(lambda: all(map(gone, workers)))
    finished = {path: path.stat().st_mtime_ns for path in out.glob(".prepared/*/*.json")}
    assert 2 <= len(finished) < 20
    for folder in out.glob("train/*"):
        assert len(list(folder.iterdir())) == 15
    for path in finished:
        assert json.loads(path.read_text())["images"] in (1, 15)
    classes(monkeypatch, 10)
    code, said = command("--from", root, "--resize", 300)
    assert code == 0 and len(files(out)) == 10 * 16
    assert set(files(out).values()) == {shrink(image, 300)}
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert not list(out.rglob("*.partial"))


def test_a_process_that_has_ended_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_until(lambda: gone(process.pid))  # and its exit code is not asked for
    assert not is_alive(process.pid) and is_alive(os.getpid())
    process.wait()
    assert not is_alive(process.pid)


# Training


def test_training_takes_the_prepared_folder_then_imagenet_path(tree, tmp_path, monkeypatch):
    with pytest.raises(DataError) as error:
        data.imagenet.find(tmp_path)
    for word in (str(tmp_path / "imagenet"), "$IMAGENET_PATH",
                 "python -m data.prepare imagenet --from DIR"):  # fmt: skip
        assert word in str(error.value)
    monkeypatch.setenv("IMAGENET_PATH", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere, which .IMAGENET_PATH names"):
        load("imagenet", tmp_path, 4, 4, torch.device("cpu"))
    monkeypatch.setenv("IMAGENET_PATH", str(tree))
    spec = data.DATASETS["imagenet"]._replace(classes=3)
    monkeypatch.setitem(data.DATASETS, "imagenet", spec)
    found = load("imagenet", tmp_path, 4, 4, torch.device("cpu"), image_size=32)
    assert (found.train.examples, found.train.root) == (12, tree / "train")
    shutil.copytree(tree, tmp_path / "imagenet")
    found = load("imagenet", tmp_path, 4, 4, torch.device("cpu"), image_size=32)
    assert found.train.root == tmp_path / "imagenet" / "train"


def test_the_imagenet_sample(samples, command, tmp_path, monkeypatch):
    classes(monkeypatch, 1000)
    train = samples("imagenet1k-sample") / "imagenet1k-sample" / "train"
    root = tmp_path / "original"
    (root / "val").mkdir(parents=True)
    (root / "train").symlink_to(train)
    labels = {}
    for i, path in enumerate(sorted(train.glob("*/*")), 1):
        (root / "val" / val_name(i)).symlink_to(path)
        labels[val_name(i)] = path.parent.name
    path = two_columns(tmp_path, labels)
    code, said = command("--from", root, "--resize", 64, "--val_labels", path, "--jobs", 2)
    assert code == 0 and "train 1,000 of 1,000 classes, 1,000 of" in said, said
    found = load("imagenet", tmp_path / "out", 50, 50, torch.device("cpu"), image_size=64)
    assert (found.train.examples, found.test.examples, found.classes) == (1000, 1000, 1000)
    inputs, targets = next(iter(found.test))
    assert inputs.shape == (50, 3, 64, 64) and targets.tolist() == list(range(50))
    assert inputs.mean().abs() < 0.7 and 0.5 < inputs.std() < 2
