"""One image file: its name, how it is read and decoded by PIL, and shrunk to a JPEG.

Imports PIL alone, so that a process which prepares ImageNet starts in a tenth of a second.
"""

import io
import os
import stat

from PIL import Image, UnidentifiedImageError

# At 256 pixels and quality 95 an image takes 30 to 40 kB, a third more than at 90, and is 4 dB
# nearer to the original. Training decodes it once more, so a second loss should not be visible.
QUALITY = 95
# The formats that are decoded, whatever the file is called, and the suffixes by which a file is
# taken for an image: the same on every machine, also where PIL lacks a decoder. These are what PIL
# both reads and writes (the fuzzer damages one of each). It opens more, among them PostScript, a
# program that Ghostscript would run, and files whose content it cannot decode by itself (.wmf).
FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif .mpo", "PNG": ".png .apng", "GIF": ".gif", "WEBP": ".webp",
    "TIFF": ".tif .tiff", "BMP": ".bmp", "DIB": ".dib", "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "JPEG2000": ".jp2 .j2k .jpc .jpf .jpx .j2c", "AVIF": ".avif .avifs", "DDS": ".dds",
    "SGI": ".sgi .rgb .rgba .bw", "PCX": ".pcx", "QOI": ".qoi", "ICO": ".ico", "ICNS": ".icns",
    "BLP": ".blp", "MSP": ".msp", "XBM": ".xbm",
    "TGA": ".tga .icb .vda .vst",  # the last, since nothing marks such a file
}
SUFFIXES = frozenset(" ".join(FORMATS.values()).split())
LARGEST = 2**30  # bytes of an image file
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the second
SAMPLE_FORMAT, SIGNED = 339, 2  # the same
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
            to_rgb(file)
            return content
        sides = [max(size, round(side * size / short)) for side in file.size]
        # A JPEG decoder halves at little cost; at three times the result that is invisible.
        file.draft(None, (3 * sides[0], 3 * sides[1]))
        image = to_rgb(file).resize(sides, Image.Resampling.LANCZOS)
    image.info.clear()  # comments of the original
    made = io.BytesIO()
    image.save(made, "JPEG", quality=QUALITY)
    return made.getvalue()


def suffix(name):
    """The suffix of a file name, as ".jpg", or nothing."""
    at = name.rfind(".")
    return name[at:].lower() if at >= 0 else ""


def is_image(name):
    """Whether a file of this name is taken for an image."""
    return suffix(name) in SUFFIXES and not name.startswith("._")  # macOS's, beside an image


def is_deep(image):
    """Whether the pixels of PIL's image are grey values of 12 or 16 bits."""
    # In some versions the mode of a grey PNG or PGM of 16 bits is I.
    return image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")


def has_deep_colours(image):
    """Whether PIL's image has 8 bits of the file's samples of 12 or 16."""
    codec, _, _, args = image.tile[0] if image.tile else ("", 0, 0, "")
    mode, *rest = [args] if isinstance(args, str) else args or [""]
    return codec == "SGI16" or ";16" in str(mode) or image.format == "PPM" and rest[:1] > [255]


def to_rgb(image):
    """PIL's image as one of 8-bit RGB, by its `convert`.

    That would saturate deep grey values, so these are scaled by the range of their type. Raises
    ValueError for other integers and for floats, whose range nothing declares.
    """
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if is_deep(image):
        scale, offset = 255 / (2 ** tags.get(BITS, (16,))[0] - 1), 0.5
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # PIL inverts 8 bits alone
            scale, offset = -scale, 255.5
        image = image.convert("I").point(lambda x: x * scale + offset).convert("L")
    elif image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"its pixels are {kind} of no known range (PIL's mode {image.mode}), to "
                         "be saved scaled to 8 or 16 bits")  # fmt: skip
    elif tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED:
        raise ValueError("its pixels are integers with a sign, to be saved without")
    return image.convert("RGB")


def open_image(content):
    """PIL's image of the bytes of a file, its header read. Raises what PIL raises."""
    Image.init()  # `open` takes no format that PIL has not loaded, or was built without
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(content), formats=formats)
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
