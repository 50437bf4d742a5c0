"""Numbers and names of requests: no two requests of a capture may be taken for one."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from expert_lens.errors import OptionError

__all__ = ["RequestNames", "next_number"]

MAX_NAME_BYTES = 200
HASH_DIGITS = 16
"""Of the hash that stands for the rest of an id that is too long."""
MAX_REMEMBERED_NAMES = 65536
"""Names whose use is remembered, so that a name used again gets `#2`; the oldest are forgotten."""

_numbers = itertools.count(1)
_current_names: ContextVar[dict[int, str] | None] = ContextVar("expert_lens_request_names", default=None)


def next_number() -> int:
    """A request number that no other request of this process has."""
    return next(_numbers)


class RequestNames:
    """The ids of one capture's requests: `"{call}.{row}"`, or from the name given by `named`."""

    def __init__(self) -> None:
        self._calls = itertools.count()
        self._uses: OrderedDict[str, Iterator[int]] = OrderedDict()
        """For each id that was given, what counts its uses: a counter, because several threads may ask at once."""

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Calls of this thread (and asyncio task) inside the block are named `name`.

        Raises OptionError for a name that is empty, too long, or looks like one that is made.
        """
        if not _can_name(name):
            raise OptionError(
                f"a request cannot be named {name!r}: a name is text of 1 to {MAX_NAME_BYTES} bytes in UTF-8, and "
                "not of the form '0.3', which is made for requests without a name."
            )
        token = _current_names.set({**(_current_names.get() or {}), id(self): name})
        try:
            yield
        finally:
            _current_names.reset(token)

    def current(self) -> str | None:
        """The name that holds here, if any."""
        names = _current_names.get()
        return names.get(id(self)) if names else None

    def make(self, num_rows: int) -> list[str]:
        """The ids of a call with so many rows."""
        name = self.current()
        if name is None:
            call = next(self._calls)
            return [self.unique(f"{call}.{row}") for row in range(num_rows)]
        if num_rows == 1:
            return [self.unique(name)]
        return [self.unique(f"{name}.{row}") for row in range(num_rows)]

    def unique(self, name: str) -> str:
        """This id, or with `#2`, `#3`, ... appended if a request has it: no two requests may be taken for one.

        An id of an engine that no record could hold becomes one that it can, see `_storable`.
        """
        name = _storable(name)
        counter = self._uses.setdefault(name, itertools.count(1))
        request = name
        if (uses := next(counter)) > 1:
            mine = itertools.count(2)
            while self._uses.setdefault(request := f"{name}#{uses}", mine) is not mine:
                uses = next(counter)
            with suppress(KeyError):
                self._uses.move_to_end(name)
        while len(self._uses) > MAX_REMEMBERED_NAMES:
            self._uses.popitem(last=False)
        return request


def _can_name(name: object) -> bool:
    return isinstance(name, str) and name == _storable(name) and bool(name) and not re.fullmatch(r"\d+\.\d+", name)


def _storable(request: str) -> str:
    """The id itself, or, if it is longer than MAX_NAME_BYTES or no valid Unicode, its beginning and its hash."""
    written = request.encode(errors="surrogatepass")
    if len(written) <= MAX_NAME_BYTES and not any("\ud800" <= char <= "\udfff" for char in request):
        return request
    digest = hashlib.sha256(written).hexdigest()[:HASH_DIGITS]
    beginning = written[: MAX_NAME_BYTES - HASH_DIGITS - 1].decode(errors="ignore")
    return f"{beginning}~{digest}"
