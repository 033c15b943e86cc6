"""What every command line shares: a parser that suggests what was meant, types of arguments, and
errors whose message is all that a user needs."""

import argparse
import difflib
import math
import sys


class UserError(RuntimeError):
    """An error whose message says what is wrong and what to do about it: printed as one line, with
    no traceback. `exit_code` is the process's: 2 for input that cannot be used, else 1."""

    exit_code = 2

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """`text` with each unprintable character as a backslash escape: control characters, and the
    bytes of a file name that is not UTF-8."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def size(n):
    """Bytes in words."""
    power = next((k for k in range(4) if n < 1000 ** (k + 1)), 4)
    n, unit = n / 1000**power, ("B", "kB", "MB", "GB", "TB")[power]
    return f"{n:.0f} {unit}" if n >= 10 or unit == "B" else f"{n:.1f} {unit}"


LONGEST = 250  # characters of a message, whatever was given


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests what was meant; `silent` where another rank prints it."""

    silent = False

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            what = "flag" if flag.startswith("-") else "place for"
            self.error(f"there is no {what} {flag}{near(flag, self._option_string_actions)}")
        return args

    def error(self, message):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        if self.silent:
            self.exit(2)
        self.exit(2, f"error: {message}\n       {self.prog} --help lists the flags\n")


def near(word, words):
    """A suggestion, or nothing."""
    by_lower = {x.lower(): x for x in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def one_of(names, *prefixes, rest="PATH"):
    """An argument type: one of `names`, or one of `prefixes` with `rest` behind it."""

    def check(value):
        if value in names or any(value.startswith(x) and value != x for x in prefixes):
            return value
        listed = ", ".join([*names, *(f"{prefix}{rest}" for prefix in prefixes)])
        near_one = near(value, [*names, *prefixes])
        raise argparse.ArgumentTypeError(f"no {value!r} among {listed}{near_one}")

    return check


def number(kind, least, most=None):
    """An argument type: an int that fits in 63 bits or a finite float, from `least` to `most`."""
    what = "a whole number" if kind is int else "a finite number"
    what += f" from {least}" + ("" if most is None else f" to {most}")
    if most is None:
        most = 2**63 - 1 if kind is int else sys.float_info.max

    def check(value):
        try:
            x = abs(kind(value)) if kind(value) == 0 else kind(value)  # -0.0 is 0.0
        except ValueError:
            x = math.nan
        if not least <= x <= most:
            raise argparse.ArgumentTypeError(f"{value!r} is not {what}")
        return x

    return check


def every(value):
    """An argument type: 500 steps, or 90s, 10m, 2h; returns ("steps", n) or ("seconds", s)."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(value[-1:])
    try:
        least = float(value[:-1]) * unit if unit else int(value)
    except ValueError:
        least = 0
    if not 0 < least < 2**31:
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither a number of steps, as 500, nor a time, as 90s, 10m or 2h"
        )
    return ("seconds", least) if unit else ("steps", least)


def checked(kind):
    """An argument type: the text itself, where `kind` takes it."""
    return lambda value: (kind(value), value)[1]


class Joined(argparse.Action):
    """A flag that may be given several times: one text, the parts separated by commas, so that it
    stands in logs and records as any other value."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest)
        parts = [*(before.split(",") if isinstance(before, str) else []), *value.split(",")]
        setattr(namespace, self.dest, ",".join(dict.fromkeys(filter(None, parts))) or None)


def all_or(kind):
    """An argument type: the word all, or what `kind` takes."""
    return lambda value: value if value == "all" else kind(value)
