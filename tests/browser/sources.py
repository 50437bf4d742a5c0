"""Sources for heatmaps that need no model: made-up tokens that are kept, so that every count can be checked."""

import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Phase = Literal["prefill", "decode"]


class Router:
    """Routes made-up tokens to the k best of E experts, in L layers that have favourites; in a thread once started.

    last N means: the last N tokens of both phases, and of those the ones of the phase that is asked for.
    """

    def __init__(
        self,
        layers: int = 24,
        experts: int = 64,
        top_k: int = 8,
        rate: float = 1000,
        title: str = "Router-64x24 · made-up · capture “test”",
        seed: int = 0,
        first_layer: int = 1,
        history: int = 16384,
    ) -> None:
        self.layers = list(range(first_layer, first_layer + layers))
        self.num_experts = experts
        self.top_k = top_k
        self.title = title
        self.rate = rate
        self.history = history
        self.dropped = 0
        self.state = "running"
        self.failure: Exception | None = None
        self.asked = 0
        self.chosen: list[npt.NDArray[np.intp]] = []
        self.phases: list[Phase] = []
        self._lock = threading.Lock()
        self._random = np.random.default_rng(seed)
        self._taste = self._random.gumbel(0, 1, (layers, experts)) * 0.45
        self._taste[:, experts // 3] -= 6
        self._totals = {phase: np.zeros((layers, experts), np.uint64) for phase in ("prefill", "decode")}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def route(self, tokens: int, phase: Phase = "decode") -> None:
        """Route `tokens` more."""
        for _ in range(tokens):
            noise = self._random.gumbel(0, 1, self._taste.shape)
            chosen = np.argpartition(self._taste + noise, -self.top_k, axis=1)[:, -self.top_k :]
            with self._lock:
                self._totals[phase][np.arange(len(self.layers))[:, None], chosen] += np.uint64(1)
                self.chosen.append(chosen)
                self.phases.append(phase)

    def start(self) -> "Router":
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        due = 0.0
        while not self._stop.wait(0.02):
            due += self.rate * 0.02
            self.route(int(due))
            due -= int(due)

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def end(self, state: str = "ended") -> None:
        self.stop()
        self.state = state

    def tokens_seen(self) -> int:
        self.asked += 1
        return len(self.chosen)

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        if self.failure:
            raise self.failure
        if last is None:
            with self._lock:
                return self._totals["prefill"] + self._totals["decode"] if phase is None else self._totals[phase].copy()
        if last > self.history:
            raise ValueError(f"counts of the last {last} tokens, and this source keeps the last {self.history}")
        return self.recount(phase, last)

    def recount(self, phase: Phase | None, last: int | None) -> npt.NDArray[np.uint64]:
        """[L, E], counted anew from the tokens themselves: what every picture is checked against."""
        with self._lock:
            chosen, phases = list(self.chosen), list(self.phases)
        begin = 0 if last is None else max(0, len(chosen) - last)
        counts = np.zeros((len(self.layers), self.num_experts), np.uint64)
        for experts, kind in zip(chosen[begin:], phases[begin:], strict=True):
            if phase in (None, kind):
                counts[np.arange(len(self.layers))[:, None], experts] += np.uint64(1)
        return counts

    @property
    def stats(self) -> Mapping[str, Any]:
        return {
            "tokens": len(self.chosen),
            "steps": len(self.chosen),
            "dropped_tokens": self.dropped,
            "missing_tokens": 0,
            "lag_s": 0.00042,
            "state": self.state,
        }


class Replay:
    """The cheapest source there is, to measure the frames alone: each look finds a new token and some new counts."""

    def __init__(self, layers: int = 94, experts: int = 384) -> None:
        self.layers = list(range(layers))
        self.num_experts = experts
        self.top_k = 8
        self.title = f"Replay · {layers} layers · {experts} experts"
        self.state = "running"
        random = np.random.default_rng(0)
        taste = random.gamma(3, 100, (layers, experts)) * random.gamma(6, 1 / 6, (layers, 1))
        prefill, decode = (random.poisson(taste).astype(np.uint64) for _ in range(2))
        self._counts = {None: prefill + decode, "prefill": prefill, "decode": decode}
        self._began = time.monotonic()

    def tokens_seen(self) -> int:
        return int((time.monotonic() - self._began) * 1e4)

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        del last
        counts = self._counts[phase].copy()
        counts[:, self.tokens_seen() // 100 % self.num_experts] += np.uint64(2000)
        return counts

    @property
    def stats(self) -> Mapping[str, Any]:
        tokens = self.tokens_seen()
        return {
            "tokens": tokens,
            "steps": tokens,
            "dropped_tokens": 0,
            "missing_tokens": 0,
            "lag_s": 0.0003,
            "state": self.state,
        }
