"""What the checks share."""

from typing import NamedTuple


class Finding(NamedTuple):
    """`kind` is "ok", "note", or "fault"; `text` says what was seen, and what to do about it."""

    kind: str
    what: str
    text: str


class Facts(NamedTuple):
    """What the checks have learned of the images."""

    shape: tuple  # (channels, height, width)
    classes: int
    train: int
    test: int
    decoding: float | None  # images a second of one process; None for arrays
    source: dict


class Fault(Exception):
    """A check that found one; the message has the remedy."""


def size(n):
    """Bytes in words."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while n >= 1000 and len(units) > 1:
        n /= 1000
        units.pop(0)
    return f"{n:.0f} {units[0]}" if n >= 10 or units[0] == "B" else f"{n:.1f} {units[0]}"


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
