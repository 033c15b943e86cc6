"""The data sets by name, as batches of (inputs, labels) on the device.

`load` returns a Data. Its `train` and `test` are Batches: ArrayBatches, FolderBatches or
TextBatches, with

    len(batches)                 the number of batches of an epoch
    set_epoch(epoch, start=0)    choose the next pass: that epoch, from batch `start` on
    iteration                    (inputs float32 (n, *shape), normalised, labels int64 (n,));
                                 of a text (tokens, the ones that follow), both int64 (n, T)
    position                     batches of the epoch that have begun, those before `start` included
    advance()                    position += 1: for CUDA graphs, which take batches by `at`
    examples, batch_size         the number of images or windows of text in an epoch, and how many
                                 a batch of all ranks has
    missing                      images of the last pass that could not be decoded
    order()                      the indices of the images, or the places of the windows in the
                                 text, in the order of the epoch, int64 array
    workers, close()             the number of worker processes, if any; end them
    unshared                     batches that found no room in shared memory, and took longer

Order, crops, flips and windows are functions of (seed, epoch, index): no generator lives from batch
to batch, so a resumed run and any number of ranks see the same examples. Each of several ranks
yields every batch, even if it has no example of it.
"""

from pathlib import Path
from typing import NamedTuple

from cli import command, expand
from data import workers
from data.common import DataError, data_folder, default_data_dir

__all__ = [
    "AUGMENTATIONS", "DATASETS", "Data", "DataError", "data_folder", "default_data_dir",
    "is_folder", "is_text", "load",
]  # fmt: skip


# In training: the crops and flips of the data set; crops alone; images as in testing.
AUGMENTATIONS = ("default", "crop", "none")


class Spec(NamedTuple):
    """The constants of a data set; mean and deviation of a channel in units of 0..1."""

    shape: tuple  # of an image as stored, (H, W, C)
    classes: int
    mean: tuple = None  # None: measured on the training images
    std: tuple = None
    pad: int = 0  # zero padding before a random crop of the original size, in training
    flip: bool = False  # random horizontal flip, in training


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    "digits": Spec((8, 8, 1), 10),
    "mnist": Spec((28, 28, 1), 10, (0.1307,), (0.3081,)),
    "cifar10": Spec(
        (32, 32, 3), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), pad=4, flip=True
    ),
    "cifar100": Spec(
        (32, 32, 3), 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), pad=4, flip=True
    ),
    "imagenet": Spec((None, None, 3), 1000, IMAGENET_MEAN, IMAGENET_STD, flip=True),
}


TEXTS = ("shakespeare", "text:", "tokens:")  # names of texts, or how they begin


class Data(NamedTuple):
    train: object  # Batches
    test: object
    shape: tuple  # (channels, height, width), or of a text (context,)
    classes: int  # of a text, the tokens in the vocabulary
    source: dict  # identifies the images or the text
    files: tuple = ()  # (the file), or (the folder, the paths of the files below it)
    class_names: list | None = None  # of a folder, in the order of the labels
    notes: tuple = ()  # sentences for the user
    positions: int = 1  # the labels of an example: of a text the context
    bytes_a_token: list | None = None  # [in training, in validation] of a text, where known

    @property
    def noun(self):
        """What an example is."""
        return "window" if len(self.shape) == 1 else "image"

    def start(self, neighbours=1):
        """Start the worker processes; `neighbours`: ranks that do so on this node. Returns
        sentences about what the machine has too little of. Raises DataError where that is not
        enough for one."""
        parts = [part for part in (self.train, self.test) if part.workers]
        return workers.start(parts, self.shape, neighbours) if parts else []

    def close(self):
        """End the worker processes."""
        for part in (self.train, self.test):
            part.close()


def load(
    name, data_dir, train_bs, test_bs, device, seed=0, workers=0, image_size=None,
    skip_bad_images=False, rank=0, size=1, train_examples=None, test_examples=None,
    augment="default", context=64, epoch_steps=250, vocabulary=None,
):  # fmt: skip
    """The Data of `name`: one of DATASETS, "folder:PATH", "npz:FILE", a prepared file of any
    classes and side in `data_dir`, augmented like CIFAR's if it has colours, or a text, of which
    text.open_text has the names and `context`, `epoch_steps` and `vocabulary`.

    `augment` is one of AUGMENTATIONS. Of arrays, `train_examples` and `test_examples` take the
    first so many; of a text the latter is the number of windows. Batch sizes are global: of each
    batch this rank gets every `size`-th example from `rank` on. Raises DataError, with what to do
    about it, if the data are missing or damaged.
    """
    # torch is imported here, and torchvision for folders alone: they take seconds.
    if is_text(name):
        from data.text import open_text

        return Data(**open_text(name, train_bs, test_bs, device, context, epoch_steps, vocabulary,
                                test_examples, seed, rank, size))  # fmt: skip
    if is_folder(name):
        from data.folders import open_folders
        from data.imagenet import find, passed_over

        root = find(data_dir) if name == "imagenet" else Path(expand(name[len("folder:") :]))
        note = passed_over(data_dir) if name == "imagenet" else None
        data = Data(*open_folders(
            root, DATASETS[name].classes if name in DATASETS else None, train_bs, test_bs,
            image_size=image_size or 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device,
            seed=seed, workers=workers, skip_bad_images=skip_bad_images, rank=rank, size=size,
            augment=augment,
        ))  # fmt: skip
        return data._replace(notes=(note, *data.notes)) if note else data

    from data.arrays import ArrayBatches, channel_statistics, load_arrays

    spec, remedy = DATASETS.get(name, Spec(None, None)), None
    if name == "digits":
        path = Path(__file__).with_name("digits.npz")
        remedy = "It is part of this repository: `git checkout data/digits.npz`."
    elif name.startswith("npz:"):
        file = Path(expand(name[len("npz:") :]))
        path = file if file.is_absolute() else data_folder(data_dir) / file
        remedy = f"What such a file holds: `{command('data.prepare', '--help')}`."
        if not path.exists():
            raise DataError(f"there is no {path}")
    else:
        from data.prepare import prepare

        path = prepare(name, data_dir)
    arrays, source = load_arrays(path, spec.shape, spec.classes, remedy)
    images, labels = arrays["train_images"], arrays["train_labels"]
    height, side, channels = images.shape[1:]
    if spec.shape is None:
        colours = channels == 3
        spec = Spec(images.shape[1:], int(labels.max()) + 1, pad=height // 8 if colours else 0,
                    flip=colours)  # fmt: skip
    mean, std = (spec.mean, spec.std) if spec.mean else channel_statistics(images)
    if augment != "default" and not spec.flip or augment == "crop" and not spec.pad:
        raise DataError(f"{name} is not augmented: leave out --augment {augment}")
    pad, flip = 0 if augment == "none" else spec.pad, spec.flip and augment == "default"
    batches = []
    for split, batch_size, count, augmentation in (
        ("train", train_bs, train_examples, {"shuffle": True, "pad": pad, "flip": flip}),
        ("test", test_bs, test_examples, {}),
    ):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if count is not None and count > len(labels):
            raise DataError(f"{name} has {len(labels)} images for --{split}_examples, not {count}")
        batches.append(ArrayBatches(
            images[:count], labels[:count], mean, std, batch_size, device, **augmentation,
            seed=seed, rank=rank, size=size,
        ))  # fmt: skip
    return Data(*batches, (channels, height, side), spec.classes, source, (path,))


def is_folder(name):
    """Whether the data set `name` is a folder of images, and not arrays."""
    return name == "imagenet" or name.startswith("folder:")


def is_text(name):
    """Whether the data set `name` is a text."""
    return name == TEXTS[0] or name.startswith(TEXTS[1:])
