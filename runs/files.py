"""Write files that are whole at every moment, or not there; the wording of what fails."""

import contextlib
import errno
import os
from pathlib import Path

CHUNK = 1 << 22  # bytes that are compared at a time


def write_whole(path, content, previous=None):
    """Write str (as UTF-8) or bytes to `path` by way of <path>.partial.

    The new file is flushed, read back and renamed. The old one stays until then; it is renamed to
    `previous` if that is given. Raises OSError, and then leaves no partial file.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with open(partial, "rb") as file:
            parts = range(0, len(data) + 1, CHUNK)  # one more byte than there should be
            if not all(file.read(CHUNK) == data[i : i + CHUNK] for i in parts):
                raise OSError(errno.EIO, f"{partial} does not read as it was written")
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def cannot(path, what, error):
    """The message of an error whose own may repeat the path: `path` cannot be `what`."""
    return f"{path} cannot be {what}: {reason(error)}"


def reason(error):
    """The message of an error, without the path that an OSError repeats."""
    return getattr(error, "strerror", None) or str(error).strip() or type(error).__name__


def shown(value):
    """A value out of a file in a few words that no terminal takes for more than words."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sync_folder(folder):
    """Make the names in a folder outlive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
