"""What lies in a folder of ImageNet: its classes, their images, and the labels of a flat val/."""

import csv
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from cli import printable
from data import DATASETS
from data.common import DataError, reason
from data.resize import is_image

# ILSVRC 2012: the contents of the official archives
OFFICIAL = {"train": 1_281_167, "val": 50_000}

UNPACK = """ImageNet is a folder with train/CLASS/ and val/, which hold the images. To unpack:
  cd {root}
  mkdir -p train && tar -xf ILSVRC2012_img_train.tar -C train
  (cd train && for f in n*.tar; do mkdir -p "${{f%.tar}}" && tar -xf "$f" -C "${{f%.tar}}"; done)
  mkdir -p val && tar -xf ILSVRC2012_img_val.tar -C val"""
LABELS = ("LOC_val_solution.csv", "val_labels.txt", "Annotations/CLS-LOC/val",
          "ILSVRC2012_devkit_t12")  # fmt: skip


class Split(NamedTuple):
    """train/ or val/: `classes` maps a class to (its folder, [names of its images])."""

    root: Path
    classes: dict
    flat: bool  # images side by side rather than in class folders
    left_out: list  # paths of files and folders that are no images of a class
    strays: set  # the folders with another folder in them: training takes that for a class's

    @property
    def images(self):
        return sum(len(names) for _, names in self.classes.values())

    def tidy(self, name=None):
        """Whether training can read the folder of the class `name`, or of all, as it is."""
        return not self.flat and not (self.root / name in self.strays if name else self.strays)


def read_layout(root, val_labels=None):
    """{"train": Split, "val": Split} of the folder `root`, with ImageNet's number of classes.

    Raises DataError with what is wrong, and the commands that unpack what was not unpacked."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    unpack = UNPACK.format(root=shlex.quote(str(root)))
    if missing := [f"{split}/" for split in OFFICIAL if not (root / split).is_dir()]:
        raise DataError(f"there is no {' or '.join(missing)} in {root}: {unpack}")
    train, val = _sorted_split(root / "train"), _sorted_split(root / "val")
    wanted, number = DATASETS["imagenet"].classes, len(train.classes)
    if number != wanted and any(re.fullmatch(r"n\d+\.tar", path.name) for path in train.left_out):
        raise DataError(f"{train.root} holds tar files of classes: {unpack}")
    if number != wanted:
        raise DataError(f"{train.root} holds {number} class folders, not ImageNet's {wanted:,}; "
                        "train on another set with main.py --dataset folder:PATH, as it is")
    loose = [path.name for path in val.left_out if is_image(path.name) and path.parent == val.root]
    if loose and val.classes:
        raise DataError(f"{val.root} holds class folders and, beside them, images: {few(loose)}")
    if loose:
        val = _flat_split(val, loose, train.classes, labels_of(root, val_labels))
    elif val_labels:
        raise DataError(f"{val.root} is sorted into class folders: it needs no --val_labels")
    odd = sorted(set(train.classes) ^ set(val.classes))
    if odd:
        raise DataError(f"train/ and val/ of {root} differ in {len(odd)} classes: {few(odd)}")
    for split in (train, val):
        empty = [name for name, (_, names) in split.classes.items() if not names]
        if empty:
            raise DataError(f"without images in {split.root}: {few(empty)}")
    return {"train": train, "val": val}


def _sorted_split(root):
    """The Split of the class folders of `root`."""
    classes, left_out, strays = {}, [], set()
    for name, is_folder in entries_of(root):
        if not is_folder or name.startswith("."):
            left_out.append(root / name)
            strays |= {root} if is_folder else set()
            continue
        inside = entries_of(root / name)
        classes[name] = root / name, [n for n, folder in inside if not folder and is_image(n)]
        left_out += [root / name / n for n, folder in inside if folder or not is_image(n)]
        strays |= {root / name} if any(folder for _, folder in inside) else set()
    return Split(root, classes, False, left_out, strays)


def _flat_split(val, names, classes, labels):
    """The Split of a val/ whose images `names` lie side by side; `labels` {stem: class}."""
    without = [name for name in names if Path(name).stem not in labels]
    if without:
        raise DataError(f"{len(without)} images of {val.root} have no label: {few(without)}")
    unknown = sorted({labels[Path(name).stem] for name in names} - set(classes))
    if unknown:
        raise DataError(f"labels that are no class folder of train/: {few(unknown)}")
    images = {name: (val.root, []) for name in classes}
    for name in names:
        images[labels[Path(name).stem]][1].append(name)
    left_out = [path for path in val.left_out if path.name not in set(names)]
    return Split(val.root, images, True, left_out, val.strays)


def labels_of(root, path=None):
    """{stem of a file name: class} of a flat val/, from `path` or from files in or above `root`."""
    if path is None:
        places = [root, *root.parents][:4]  # Kaggle's copy has its images three folders deep
        paths = [place / name for place in places for name in LABELS if (place / name).exists()]
        if not paths:
            raise DataError(
                f"{root / 'val'} is not sorted into class folders: its images get their classes "
                f"from --val_labels FILE, or from {', '.join(LABELS)} in or beside {root}. "
                "val_labels.txt has two columns, a file name and its class"
            )
        path = paths[0]
    path = Path(path)
    print(f"The classes of {root / 'val'} from {path}", file=sys.stderr)
    try:
        labels = _from_devkit(path / "data") if (path / "data").is_dir() else (
            _from_xml(path) if path.is_dir() else _from_columns(path))  # fmt: skip
    except ImportError as error:
        raise DataError(f"{path}/data/meta.mat is read with scipy: pip install scipy") from error
    except Exception as error:  # a damaged file raises whatever its reader comes upon
        raise DataError(f"no labels in {path}, missing or damaged: {reason(error)}") from error
    if not all(labels.values()):
        raise DataError(f"{path} has a line without two columns, a file name and its class")
    return labels


def _from_columns(path):
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise OSError("it is no file")
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = csv.reader(lines) if any("," in line for line in lines) else map(str.split, lines)
    cells = [[*row, ""][:2] for row in rows if row and row[0] != "ImageId"]
    return {Path(name.strip()).stem: "".join(label.split()[:1]) for name, label in cells}


def _from_xml(folder):
    labels = {}
    for file in sorted(folder.glob("*.xml")):
        try:
            labels[file.stem] = ElementTree.parse(file).findtext("object/name").strip()
        except (ElementTree.ParseError, AttributeError) as error:
            raise ValueError(f"{file.name} is no whole XML file that names an object") from error
    return labels


def _from_devkit(folder):
    """Line i of the ground truth is the ILSVRC2012_ID of image i; meta.mat has its class."""
    from scipy.io import loadmat

    synsets = loadmat(folder / "meta.mat", squeeze_me=True)["synsets"]
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    lines = truth.read_text(encoding="utf-8").split()
    names = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    return {f"ILSVRC2012_val_{i:08d}": names[int(x)] for i, x in enumerate(lines, 1)}


def entries_of(folder):
    """[(name, whether it is a folder)], sorted, of what lies in `folder`."""
    try:
        with os.scandir(folder) as entries:
            return sorted((e.name, e.is_dir(follow_symlinks=False) or
                           e.is_symlink() and os.path.isdir(e)) for e in entries)  # fmt: skip
    except OSError as error:
        unreadable(error)


def unreadable(error):
    """Raise the DataError of a folder that cannot be listed; an `onerror` of os.walk."""
    raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error


def few(names):
    """The first of some names, for a sentence."""
    return ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
