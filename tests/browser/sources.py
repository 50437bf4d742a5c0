"""A source for heatmaps that needs no model: a thread routes made-up tokens, with favourites, until it is stopped."""

import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np


class Router:
    """Routes about `rate` tokens a second to k of E experts, in L layers; prefill first, then decode."""

    def __init__(
        self,
        layers: int = 24,
        experts: int = 64,
        top_k: int = 8,
        rate: float = 2000,
        title: str = "Router-64x24 · made-up · capture “test”",
        seed: int = 0,
        first_layer: int = 1,
    ) -> None:
        self.layers = list(range(first_layer, first_layer + layers))
        self.num_experts = experts
        self.top_k = top_k
        self.title = title
        self.rate = rate
        self.dropped = 0
        self.state = "running"
        self._lock = threading.Lock()
        self._random = np.random.default_rng(seed)
        self._taste = self._random.gumbel(0, 1, (layers, experts)) * 0.45
        self._taste[:, experts // 3] -= 6
        self._counts = {name: np.zeros((layers, experts), np.uint64) for name in ("prefill", "decode")}
        self._tokens = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def route(self, tokens: int, phase: str = "decode") -> None:
        """Count `tokens` more: the k best of taste plus noise, in every layer."""
        for _ in range(tokens):
            noise = self._random.gumbel(0, 1, self._taste.shape)
            chosen = np.argpartition(self._taste + noise, -self.top_k, axis=1)[:, -self.top_k :]
            with self._lock:
                np.add.at(self._counts[phase], (np.arange(len(self.layers))[:, None], chosen), 1)
                self._tokens += 1

    def start(self) -> "Router":
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.01):
            for _ in range(max(1, round(self.rate / 100))):
                self._taste += self._random.normal(0, 0.002, self._taste.shape)
            self.route(max(1, round(self.rate / 100)))

    def stop(self) -> None:
        self._stop.set()
        if self._thread:
            self._thread.join()

    def end(self) -> None:
        self.stop()
        self.state = "ended"

    def tokens_seen(self) -> int:
        return self._tokens

    def counts(self, phase: str | None = None, last: int | None = None) -> np.ndarray:
        with self._lock:
            if phase is None:
                counts = self._counts["prefill"] + self._counts["decode"]
            else:
                counts = self._counts[phase].copy()
        return counts if last is None else np.minimum(counts, np.uint64(last))

    @property
    def stats(self) -> Mapping[str, Any]:
        return {
            "tokens": self._tokens,
            "steps": self._tokens,
            "dropped_tokens": self.dropped,
            "missing_tokens": 0,
            "lag_s": 0.00042,
            "state": self.state,
        }


class Replay:
    """The fastest source there is, to measure the frames alone: it only bumps a number and a few cells."""

    def __init__(self, layers: int = 94, experts: int = 384) -> None:
        self.layers = list(range(layers))
        self.num_experts = experts
        self.top_k = 8
        self.title = f"Replay {layers} x {experts}"
        random = np.random.default_rng(0)
        self._counts = random.poisson(random.gamma(2, 300, (layers, experts))).astype(np.uint64)
        self._began = time.monotonic()

    def tokens_seen(self) -> int:
        return int((time.monotonic() - self._began) * 1e4)

    def counts(self, phase: str | None = None, last: int | None = None) -> np.ndarray:
        counts = self._counts.copy()
        counts[:, self.tokens_seen() % self.num_experts] += np.uint64(500)
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
            "state": "running",
        }
