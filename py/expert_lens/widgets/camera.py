"""Takes snapshots of a source, and remembers the last one for the time after the source is gone."""

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

import numpy as np

from expert_lens.types import Phase
from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.source import HeatmapSource

__all__ = ["Camera", "Moment"]

STATS_EVERY: Final = 0.2
"""Seconds for which the source's stats count as new: they may cost more than a frame."""

Moment = tuple[Any, ...]
"""What a snapshot would show; two that are equal need no second snapshot."""


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
        self._last = Snapshot({"prefill": nothing, "decode": nothing}, {"state": "closed"})

    def moment(self, window: int | None) -> Moment:
        """The moment that `take` would show now."""
        with self._lock:
            return self._moment(self._source(), window)

    def take(self, window: int | None) -> tuple[Moment, Snapshot]:
        """The counts of all tokens, or of the last `window`, and the facts beside them, with their moment.

        A source that is gone leaves its last picture, with state "closed".
        """
        with self._lock:
            source = self._source()
            moment = self._moment(source, window)
            if source is None:
                if self._last.facts["state"] == "running":
                    self._last = Snapshot(self._last.planes, {**self._last.facts, "state": "closed"})
                return moment, self._last
            planes = {phase: source.counts(phase, window) for phase in get_args(Phase)}
            if window is not None:  # The last N tokens are not the last N of each phase together.
                planes["both"] = source.counts(None, window)
            stats = self._stats
            facts = {
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
            self._last = Snapshot(planes, facts)
            return moment, self._last

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
        told = (self._stats.get(key) for key in ("dropped_tokens", "missing_tokens", "lost_tokens", "state", "error"))
        return (seen, *told, window)
