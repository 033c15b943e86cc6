"""A class folder of images: each one decoded, and written smaller, linked, or only checked.

Run as a file, it reads a task a line and answers in lines; data/imagenet.py starts as many as
there are jobs. Such a process imports nothing but PIL, so it starts at once; a terminal's Ctrl-C
does not reach it; and it ends with its parent, however that ends, because its pipes do.
"""

import contextlib
import glob
import io
import json
import os
import platform
import shutil
import signal
import stat
import sys
import time
import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

# At 256 pixels an image takes 30 to 40 kB at 95, a third more than at 90, and lies 4 dB nearer to
# what was decoded; training decodes it once more, so a second loss should not be one to see.
QUALITY = 95
SECONDS = 0.2  # between two words about progress
# What is decoded, whatever the file is called. PIL knows more, among it PostScript, which is a
# program that Ghostscript would run.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
LARGEST = 2**30  # bytes of an image file


def shrink(content, size=None):
    """The bytes of an image file, as a JPEG (RGB) whose shorter side measures `size` pixels.

    Where the shorter side is no longer than that, or without a size, they are `content` itself,
    decoded all the same. Raises whatever PIL does on a damaged file. Orientation is what PIL
    decodes: the EXIF tag is neither applied nor kept, since training does not apply it either.
    """
    with open_image(content) as file:
        width, height = file.size
        if size is None or min(width, height) <= size:
            file.convert("RGB")
            return content
        scale = size / min(width, height)
        sides = max(size, round(width * scale)), max(size, round(height * scale))
        # A JPEG decoder halves for little; at three times the result that is not to be seen.
        file.draft(None, (3 * sides[0], 3 * sides[1]))
        image = file.convert("RGB").resize(sides, Image.Resampling.LANCZOS)
    image.info.clear()  # comments of the original
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY)
    return made.getvalue()


def open_image(content):
    """PIL's image of the bytes of a file, its header read; raises as PIL does."""
    return Image.open(io.BytesIO(content), formats=FORMATS)


def read_image(path):
    """The bytes of an image file; OSError where it is no file, such as a pipe without an end."""
    with open(path, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError("not a file")
        if found.st_size > LARGEST:
            raise OSError(f"{found.st_size:,} bytes are too many for an image")
        return file.read()


def _open_at_once(path, flags):
    """Without waiting for whoever writes into a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def reason(error):
    """Why an image cannot be decoded, the same words each time."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that PIL knows"
    said = getattr(error, "strerror", None) or str(error)
    return " ".join(said.split()) or type(error).__name__


def do(task, tell):
    """{"images", "resized", "corrupt": [[name, reason], ...]} of the images of one class.

    `task` holds `source`, a folder, and `names` in it; `target`, the folder to make of them or
    None; `size`, see shrink, or None for links; `scratch`, a folder of the same file system. The
    target appears whole or not at all. `tell(n)` hears of n images done. Raises OSError where the
    target cannot be written, and never for a source.
    """
    target, made = task["target"] and Path(task["target"]), None
    if target:
        # Its own name: where the command was given twice, neither writes into the other's.
        made = Path(task["scratch"], f"{target.name}.{platform.node()}-{os.getpid()}.partial")
        for old in made.parent.glob(f"{glob.escape(target.name)}.*.partial"):
            if abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
        made.mkdir()
        if target.parent.is_symlink():  # to the original
            raise OSError(f"{target.parent} is a link")
    resized, corrupt = 0, []
    for name in task["names"]:
        path = os.path.join(task["source"], name)
        try:
            content = read_image(path)
            result = shrink(content, task["size"])
        except Exception as error:  # a damaged file raises whatever its decoder comes upon
            corrupt.append([name, reason(error)])
        else:
            resized += result is not content
            if made and task["size"]:
                (made / name).write_bytes(result)
            elif made:
                (made / name).symlink_to(path)
        tell(1)
    if target:
        if target.exists():
            shutil.rmtree(target)
        made.rename(target)
    return {"images": len(task["names"]) - len(corrupt), "resized": resized, "corrupt": corrupt}


def abandoned(partial):
    """Whether nobody works on a folder any more: its process has ended, or, if it is on another
    machine, has made nothing for ten minutes."""
    node, _, pid = partial.name.removesuffix(".partial").rpartition("-")
    if node.endswith(f".{platform.node()}") and pid.isdecimal():
        return int(pid) == os.getpid() or not is_alive(int(pid))
    try:
        return time.time() - partial.stat().st_mtime > 600
    except OSError:
        return False


def is_alive(pid):
    """Whether there is such a process, and not only its exit code."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another's, or a system without /proc
        return True


def answer(message):
    """One line to the parent; the end of this process where there is none any more."""
    try:
        os.write(1, (json.dumps(message) + "\n").encode())
    except BrokenPipeError:
        os._exit(1)


def main():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of PIL, on EXIF data: thousands
    told, count = time.monotonic(), 0

    def tell(n):
        nonlocal told, count
        count += n
        if time.monotonic() - told > SECONDS:
            answer({"progress": count})
            told, count = time.monotonic(), 0

    for line in sys.stdin:
        task = json.loads(line)
        try:
            result = do(task, tell)
            answer({"progress": count})
            answer({"done": result})
            count = 0
        except OSError as error:
            answer({"error": str(error)})


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # before main has got to its first line
        main()
