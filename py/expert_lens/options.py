"""Options that users give in their own words, checked and turned into numbers."""

import re

from expert_lens.errors import OptionError

__all__ = ["parse_bytes"]

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(name: str, size: int | str) -> int:
    """Bytes of `size`: a number, or text such as "1GiB" or "512 MB" (KiB, MiB, GiB are powers of 1024).

    Raises OptionError, naming the option, for anything else.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    number = int(float(match[1]) * unit) if match and unit else 0
    if number < 1:
        raise OptionError(f"{name} is {size!r}; give a number of bytes, or text such as '512MiB' or '1GiB'.")
    return number
