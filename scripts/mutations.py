"""Inputs for scripts/fuzz.py: whole files, and what damage and forgery make of them.

Everything is drawn from the generator that is passed, so an input is a function of its seed.
"""

import io
import json
import os
import pickle
import re
import socket
import warnings
import zipfile
from pathlib import Path

import numpy as np

RAN = []  # filled by a pickle that was let run


def canary():
    RAN.append(True)


class Canary:
    def __reduce__(self):
        return canary, ()


NUMBERS = (0, 1, 2, 3, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63)
# Words of the formats, and what others have fallen over.
TOKENS = {
    "npz": [b"'|O'", b"'<i8'", b"'|u1'", b"True", b"(9999999999, 9, 9, 3)", b"()", b"PK\1\2",
            b"PK\3\4", b"PK\5\6", b"\x93NUMPY\2\0", b"[" * 400, b"-1", b"9" * 4400],
    "jsonl": [b"{", b"}", b"[", b"]", b'"kind"', b'"run"', b"null", b"NaN", b"-Infinity", b"1e999",
              b'"\\ud800"', b"\n", b"\r", b"\0", b"\xff", b"\xe2\x80\xa8", b",", b":", b"[" * 3000,
              b'{"a":' * 3000, b"9" * 4400, b"\xef\xbb\xbf"],
    "checkpoint": [b"cos\nsystem\n", b"cbuiltins\neval\n", b"cscripts.mutations\ncanary\n)R",
                   b"R", b"\x81", b"b", b"Q", b"0", b"2", b"}", b"]", b")", b"(", b"t", b"u", b".",
                   b"]2a", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nTensor\n",
                   b"\x8e" + b"\xff" * 8, b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"K\xff",
                   b"J\xff\xff\xff\x7f",
                   b"X\xff\xff\xff\x7f", b"ctorch\nFloatStorage\n", b"PK\5\6", b"PK\6\6"],
    "folder": [b"IHDR", b"IDAT", b"IEND", b"\xff\xd8", b"\xff\xda", b"\xff\xc0", b"\xff\xc2",
               b"\xff\xd9", b"GIF89a", b"II*\0", b"MM\0*", b"RIFF", b"WEBP", b"BM", b"P6\n",
               b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"],
}  # fmt: skip


def damaged(rng, data, tokens):
    """`data` with up to four changes that know nothing of its format."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.3:  # where headers are
            at = min(at, rng.randrange(128))
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 30, 200, 2000)))
        what = rng.randrange(9)
        if what == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 127, 128, 254, 255, rng.randrange(256)))
        elif what == 2:
            del data[at:end]
        elif what == 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 30))
        elif what == 4:
            other = rng.randrange(len(data) + 1)
            data[other : other + end - at] = data[at:end]
        elif what == 5:
            size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice((*NUMBERS, len(data))) % 256**size
            data[at : at + size] = number.to_bytes(size, order)
        elif what == 6:
            token = rng.choice(tokens)
            data[at : at + len(token) * rng.randrange(2)] = token
        elif what == 7:
            found = list(re.finditer(rb"\d+", data[at : at + 4096]))
            if found:
                a, b = rng.choice(found).span()
                data[at + a : at + b] = str(rng.choice(NUMBERS)).encode()
        else:
            del data[at:]
    return bytes(data)


def forged(rng, data, tokens):
    """A zip file with some records changed, their lengths and checksums right again."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(x.filename, archive.read(x)) for x in archive.infolist()[:20]
                       if x.file_size < 1e6]  # fmt: skip
    except Exception:  # no zip any more
        return damaged(rng, data, tokens)
    for _ in range(rng.randint(1, 3)):
        if not records:
            break
        i, what = rng.randrange(len(records)), rng.randrange(10)
        name, content = records[i]
        if what == 0:
            del records[i]
        elif what == 1:
            records.append(records[i])
        elif what == 2:
            name = rng.choice((f"../{name}", f"/{name}", name.upper(), " ", name * 40, "a/.npy"))
            records[i] = name[:1000], content
        elif what == 3:
            records[i] = name, rng.choice(records)[1]
        else:
            # Mostly the first record of a checkpoint: its pickle.
            i = 0 if rng.random() < 0.4 else i
            records[i] = records[i][0], damaged(rng, records[i][1], tokens)
    made = io.BytesIO()
    way = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(made, "w", way) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, way)  # without the time of day
    return made.getvalue() if rng.random() < 0.8 else damaged(rng, made.getvalue(), tokens)


def mutated(rng, target, seeds):
    """An input for `target` made of one of `seeds`, and now and then of two."""
    data, tokens = rng.choice(seeds), TOKENS[target]
    if target == "folder" and data[:1] == b"T":
        return b"T" + bytes(rng.randrange(256) for _ in range(3 * rng.randint(1, 20)))
    if rng.random() < 0.05:
        other = rng.choice(seeds)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
    if target in ("npz", "checkpoint") and rng.random() < 0.7:
        return forged(rng, data, tokens)
    if target == "folder":
        return b"I" + damaged(rng, data[1:], tokens)
    return damaged(rng, data, tokens)


def seeds(target):
    """Whole files of a reader's kind, and some that were made to run code."""
    return {"npz": _npz, "jsonl": _jsonl, "checkpoint": _checkpoints, "folder": _images}[target]()


def _npz():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    whole = {f"{s}_{k}": v for s in ("train", "test")
             for k, v in (("images", images), ("labels", np.arange(6) % 3))}  # fmt: skip
    kinds = [(np.savez, whole), (np.savez_compressed, whole)]
    kinds.append((np.savez, {**whole, "train_images": np.asfortranarray(images)}))
    kinds.append((np.savez, {**whole, "train_images": np.array([Canary()] * 6, dtype=object)}))
    return [_written(write, **arrays) for write, arrays in kinds]


def _written(write, *args, **options):
    made = io.BytesIO()
    write(made, *args, **options)
    return made.getvalue()


def _jsonl():
    rows = [{"kind": "run", "flags": {"seed": 0}, "settings": {"a": [1, 2.5, None]}, "date": "é"},
            {"kind": "epoch", "epoch": 1, "train_loss": 0.5, "train_acc": 0.2, "test_loss": None,
             "test_acc": 0.1, "eta_min": 1e-7, "eta_mean": 0.1, "seconds": 2},
            {"kind": "step", "epoch": 1, "step": 1, "loss": None},
            {"kind": "end", "final": True, "stopped": None}]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    return ["\n".join(lines[:n] + [""]).encode() for n in (1, 2, 4)] + ["\n".join(lines).encode()]


def _checkpoints():
    import torch

    from runs.checkpoint import pack

    net = {"0.weight": torch.ones(3, 4), "1.running_mean": torch.zeros(3),
           "1.num_batches_tracked": torch.tensor(5), "2.weight": torch.ones(2, 2).bfloat16()}
    content = {"epoch": 1, "step": 2, "totals": [1.5, 3], "net": net, "settings": '{"a": 1}',
               "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{}]}}
    return 4 * [pack(content)] + [pack({"epoch": 0}), _written(lambda f: torch.save(Canary(), f)),
            pickle.dumps({"epoch": 1, "net": Canary()})]  # fmt: skip


def _images():
    from PIL import Image

    y, x = np.mgrid[:20, :30]
    image = Image.fromarray(np.stack([8 * x, 12 * y, x * y % 256], 2).astype(np.uint8))
    grey, palette = image.convert("L"), image.quantize(16)
    alpha, four = image.convert("RGBA"), image.convert("CMYK")
    kinds = [(image, "JPEG", {}), (image, "JPEG", {"progressive": True}), (grey, "JPEG", {}),
             (four, "JPEG", {}), (image, "JPEG", {"restart_marker_blocks": 2}), (image, "PNG", {}),
             (palette, "PNG", {"transparency": 3}), (alpha, "PNG", {}), (palette, "GIF", {}),
             (palette, "GIF", {"save_all": True, "append_images": [palette]}), (image, "BMP", {}),
             (image, "PPM", {}), (image, "WEBP", {}), (alpha, "WEBP", {"lossless": True}),
             (image, "TIFF", {}), (image, "TIFF", {"compression": "tiff_lzw"}),
             (image.convert("1"), "TIFF", {"compression": "group4"}),
             (image, "TIFF", {"compression": "jpeg"}),
             (image, "MPO", {"save_all": True, "append_images": [image]}),
             (image, "EPS", {})]  # fmt: skip
    files = [b"I" + _written(x.save, kind, **options) for x, kind, options in kinds]
    return files + [b"T"] * (len(files) // 3)  # three in four are images, the rest whole folders


NAMES = [b"a", b"b", b"a.jpg", b"b.PNG", b".jpg", b"\xff.jpg", b"\xfe\xff", b"c\nd.jpg", b" ",
         b"notes.txt", b".hidden", b"\x1b[2J.jpeg", "é.webp".encode(), b"x" * 251 + b".jpg",
         b"%s.gif", b"'\".jpg"]  # fmt: skip


def lay_out(program, root, image):
    """train/ and val/ below `root` of what `program`, triples of bytes, says: a thing, a place
    among the folders so far, a name. `image` is the content of whole ones."""
    root = os.fsencode(root)
    folders = [os.path.join(root, part) for part in (b"train", b"val", b"train/a", b"train/b",
                                                     b"val/a", b"val/b")]  # fmt: skip
    for folder in folders:
        os.makedirs(folder)
    paths = list(folders)
    for i in range(0, len(program) - 2, 3):
        thing, place, name = program[i : i + 3]
        path = os.path.join(folders[place % len(folders)], NAMES[name % len(NAMES)])
        if os.path.lexists(path) or len(path) > 2000:
            continue
        thing %= 9
        if thing in (0, 1):
            os.mkdir(path)
            folders.append(path)
        elif thing in (2, 3):
            Path(os.fsdecode(path)).write_bytes(image[: None if place % 8 else 40])
        elif thing in (4, 5):
            goal = (path, b"..", b"nowhere", b"/dev/zero", *paths)
            os.symlink(goal[place % len(goal)], path)
        elif thing == 6:
            os.mkfifo(path)
        elif thing == 7 and len(path) < 100:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(path)
        else:
            Path(os.fsdecode(path)).write_bytes(b"")
        paths.append(path)
