"""One image file: read, decoded by PIL, and shrunk to a JPEG.

Imports PIL alone, so that a process which prepares ImageNet starts in a tenth of a second.
"""

import io
import os
import stat

from PIL import Image, UnidentifiedImageError

# At 256 pixels and quality 95 an image takes 30 to 40 kB, a third more than at 90, and is 4 dB
# nearer to the original. Training decodes it once more, so a second loss should not be visible.
QUALITY = 95
# The formats that are decoded, whatever the file is called. PIL knows more, among them PostScript,
# a program that Ghostscript would run.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
LARGEST = 2**30  # bytes of an image file
NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # for whoever writes into a pipe


def shrink(content, size=None):
    """The bytes of an image file as a JPEG (RGB) whose shorter side has `size` pixels.

    Returns `content` itself, decoded all the same, where the shorter side is no longer than that,
    or without a size. Raises whatever PIL raises on a damaged file. The EXIF orientation is neither
    applied nor kept, since training does not apply it either.
    """
    with open_image(content) as file:
        short = min(file.size)
        if size is None or short <= size:
            file.convert("RGB")
            return content
        sides = [max(size, round(side * size / short)) for side in file.size]
        # A JPEG decoder halves at little cost; at three times the result that is invisible.
        file.draft(None, (3 * sides[0], 3 * sides[1]))
        image = file.convert("RGB").resize(sides, Image.Resampling.LANCZOS)
    image.info.clear()  # comments of the original
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY)
    return made.getvalue()


def open_image(content):
    """PIL's image of the bytes of a file, its header read. Raises what PIL raises."""
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # PIL's words hold an address in memory
        raise UnidentifiedImageError("not an image that PIL knows") from None


def read_image(path):
    """The bytes of an image file. OSError if it is no file, such as a pipe, or too long."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a file")
        if status.st_size > LARGEST:
            raise OSError(f"{status.st_size:,} bytes are too many for an image")
        return file.read()
