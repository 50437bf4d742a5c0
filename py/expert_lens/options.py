"""Options that users give in their own words, checked and turned into numbers."""

import math
import os
import re

from expert_lens.errors import OptionError

__all__ = ["check_capture_name", "check_count", "check_flag", "check_folder_path", "check_seconds", "parse_bytes"]

MAX_BYTES = 2**62
"""More than any machine has, and less than what overflows on the way."""

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes of `size`: a number, or text such as "1GiB" or "512 MB" (KiB, MiB, GiB are powers of 1024).

    Raises OptionError, naming the option, for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size <= MAX_BYTES:
        return size
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    number = int(float(match[1]) * unit) if match and unit else 0
    if not 1 <= number <= MAX_BYTES:
        raise OptionError(f"{name} is {size!r}; give a number of bytes, or text such as '512MiB' or '1GiB'.")
    return number


def check_capture_name(name: object) -> str:
    """`name`, which becomes a folder: 1 to 64 letters, digits, "-", "_" and ".". Raises OptionError for another."""
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name):
        return name
    raise OptionError(
        f"{name!r} cannot name a capture; use 1 to 64 letters, digits, '-', '_' and '.', not beginning with '.'."
    )


def check_count(name: str, value: object, meaning: str) -> int:
    """`value` as an int between 1 and 2**62; `meaning` says in the error what it counts.

    Raises OptionError, naming the option, for anything else, a bool or a float too.
    """
    if not isinstance(value, bool) and hasattr(value, "__index__") and 1 <= (number := value.__index__()) <= MAX_BYTES:
        return int(number)
    raise OptionError(f"{name} is {value!r}; give {meaning}, at least 1.")


def check_seconds(name: str, value: object) -> float:
    """`value` as a finite float, not negative. Raises OptionError, naming the option, for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
        return float(value)
    raise OptionError(f"{name} is {value!r}; give a number of seconds, at least 0.")


def check_flag(name: str, value: object) -> bool:
    """`value`, which must be True or False. Raises OptionError, naming the option, for anything else."""
    if isinstance(value, bool):
        return value
    raise OptionError(f"{name} is {value!r}; give True or False.")


def check_folder_path(name: str, value: object) -> str:
    """`value` as the text of a path. Raises OptionError, naming the option, for what is none."""
    if isinstance(value, str | os.PathLike):
        path = os.fspath(value)
        if isinstance(path, str) and path and "\0" not in path:
            return path
    raise OptionError(f"{name} is {value!r}; give the path of a folder.")
