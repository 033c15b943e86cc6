"""Files that are whole at every moment, or not there."""

import contextlib
import os
from pathlib import Path


def write_whole(path, content):
    """Write str (as UTF-8) or bytes to `path` by way of <path>.partial: what stood there before
    stays until all of it is on the disk. Raises OSError, and leaves no partial file then."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def sync_folder(folder):
    """Have the names in a folder outlive a power cut, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
