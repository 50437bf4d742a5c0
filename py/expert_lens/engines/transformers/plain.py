"""Following plain forwards: `model(...)` called by the user, once or in a loop of their own with a cache."""

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_lens.engines.names import RequestNames
from expert_lens.engines.transformers.generate import Columns
from expert_lens.engines.transformers.requests import Sequences, real_tokens
from expert_lens.steps import Step
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens.types import Phase

__all__ = ["PlainForwards"]


@dataclass(slots=True)
class _Cached:
    """A cache that was filled while we looked: by which sequences, and whether a plain forward goes on with them."""

    ref: weakref.ref[Any]
    sequences: Sequences
    goes_on: bool
    whole: bool = True
    """False once a forward over it could not be followed: what it holds since is not known."""


class PlainForwards:
    """A forward without a cache is a call of its own; one over a cache goes on with the call that filled the cache.

    Its requests end when the cache is gone, or another call takes it over.
    """

    def __init__(self, tap: Tap, names: RequestNames) -> None:
        self._tap = tap
        self._names = names
        self._caches: dict[int, _Cached] = {}

    def forwarded(self, step: Step, columns: Columns, mask: Any, before: Any, after: Any) -> bool:
        """Publish a forward's rows; False, and none, if its mask does not say which tokens are padding.

        `before`: the cache that it was given; `after`: the one that it returned.
        """
        known = self._caches.get(id(before)) if before is not None else None
        told = real_tokens(mask, columns.past, columns.width)
        if told is None or (known is not None and not known.whole and told[0] is None and columns.past):
            if known is not None:
                known.whole = False
            return False
        sequences = self._sequences(columns, known)
        if told[0] is not None:
            first_position = told[0]
        elif known is not None and len(known.sequences) == columns.batch and columns.past:
            first_position = columns.past - known.sequences.padding
        else:
            first_position = np.full(columns.batch, columns.past)
        sequences.move(columns.past, first_position)
        phase: Phase = "decode" if columns.past and columns.width == 1 else "prefill"
        rows = sequences.take(told[1], columns.tokens, columns.width, phase)
        self._tap.publish(*self._tap.pack(step, columns.batch * columns.width), rows)
        cache = after if after is not None else before
        if cache is None:
            sequences.finish(self._tap, "finished")
        elif known is None or known.sequences is not sequences:
            self.hold(cache, sequences, goes_on=True)
        return True

    def hold(self, cache: Any, sequences: Sequences, *, goes_on: bool) -> None:
        """From now on the cache holds these sequences; `goes_on`: a plain forward over it continues them."""
        key = id(cache)
        self._forget(key)
        self._caches[key] = _Cached(weakref.ref(cache, lambda _: self._forget(key)), sequences, goes_on)

    def close(self) -> None:
        """State the end of what could still have gone on."""
        for key in list(self._caches):
            self._forget(key)

    def _sequences(self, columns: Columns, known: _Cached | None) -> Sequences:
        if known is not None and known.goes_on and columns.past and len(known.sequences) == columns.batch:
            return known.sequences
        return Sequences(self._names.make(columns.batch), np.zeros(columns.batch, dtype=np.int64), columns.past)

    def _forget(self, key: int) -> None:
        cached = self._caches.pop(key, None)
        if cached is not None and cached.goes_on:
            cached.sequences.finish(self._tap, "finished")
