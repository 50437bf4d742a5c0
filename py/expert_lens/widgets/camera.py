"""Takes snapshots of a source, and remembers the last one for the time after the source is gone."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from expert_lens.types import Phase
from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.source import HeatmapSource

__all__ = ["Camera", "Moment", "Shot"]

STATS_EVERY: Final = 0.2
"""Seconds for which the source's stats count as new: they may cost more than a frame."""

NO_STATS: Final = {"tokens": 0, "steps": 0, "dropped_tokens": 0, "missing_tokens": 0, "lag_s": 0.0, "state": "closed"}

PLANES: Final[Mapping[str, Phase | None]] = {"both": None, "prefill": "prefill", "decode": "decode"}
"""Names of a snapshot's planes, and the phase that a source is asked for. The last N tokens of both phases need not be
the last N of each together, so none is made from the others."""

Moment = tuple[Any, ...]
"""What a snapshot would show; two that are equal need no second snapshot."""


class Shot(NamedTuple):
    """A snapshot, and the moment that it shows."""

    moment: Moment
    snapshot: Snapshot


class Camera:
    """Looks at a source that it does not keep alive. Any thread may use it."""

    def __init__(self, source: HeatmapSource) -> None:
        self.layers = [int(layer) for layer in source.layers]
        self.num_experts = int(source.num_experts)
        self.top_k = int(source.top_k)
        self.title = str(source.title)
        self._source: Callable[[], HeatmapSource | None] = weakref.ref(source)
        self._lock = threading.Lock()
        self._stats: Mapping[str, Any] = {}
        self._stats_at = 0.0
        nothing = np.zeros((len(self.layers), self.num_experts), np.uint64)
        self._last = Snapshot(dict.fromkeys(PLANES, nothing), _facts(NO_STATS, None))

    def moment(self, window: int | None) -> Moment:
        """The moment that `take` would show now, with the stats of now, not of a moment ago."""
        with self._lock:
            self._stats = {}
            return self._moment(self._source(), window)

    def take(self, window: int | None, phase: str | None = None) -> Shot:
        """The counts of all tokens, or of the last `window`, and the facts beside them.

        phase: "both", "prefill" or "decode" for this plane alone; None for all of them. A source that is gone leaves
        its last picture, with the planes that this had and state "closed".
        """
        shot = self.take_unless(None, window, phase)
        assert shot is not None
        return shot

    def take_unless(self, moment: Moment | None, window: int | None, phase: str | None) -> Shot | None:
        """As `take`, and None if this is still the moment."""
        with self._lock:
            source = self._source()
            now = self._moment(source, window)
            if now == moment:
                return None
            if source is None:
                if self._last.facts["state"] == "running":
                    self._last = Snapshot(self._last.planes, {**self._last.facts, "state": "closed"})
            else:
                planes = {name: source.counts(PLANES[name], window) for name in (PLANES if phase is None else (phase,))}
                self._last = Snapshot(planes, _facts(self._stats, window))
            return Shot(now, self._last)

    @property
    def running(self) -> bool:
        """Whether tokens may still come, as far as was known at the last look."""
        return self._source() is not None and self._stats.get("state", "running") == "running"

    def _moment(self, source: HeatmapSource | None, window: int | None) -> Moment:
        if source is None:
            return ("closed",)
        seen = source.tokens_seen()
        now = time.monotonic()
        if not self._stats or now - self._stats_at >= STATS_EVERY:
            self._stats, self._stats_at = source.stats, now
        told = (
            self._stats.get(key)
            for key in ("tokens", "dropped_tokens", "missing_tokens", "lost_tokens", "state", "error")
        )
        return (seen, *told, window)


def _facts(stats: Mapping[str, Any], window: int | None) -> dict[str, Any]:
    return {
        "window": window,
        "tokens": int(stats["tokens"]),
        "steps": int(stats["steps"]),
        "dropped": int(stats["dropped_tokens"]),
        "missing": int(stats["missing_tokens"]),
        "lost": int(stats.get("lost_tokens", 0)),
        "lag": round(float(stats["lag_s"]), 6),
        "state": str(stats["state"]),
        "error": stats.get("error"),
        "seconds": round(time.monotonic(), 4),
    }
