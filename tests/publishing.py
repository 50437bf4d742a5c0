"""A publisher of known content: whoever knows request and position knows the row, without asking our code."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expert_lens._core import Writer

L, E, K = 5, 12, 3
LAYERS = [1, 2, 4, 5, 7]


def row(request: str, position: int) -> npt.NDArray[np.uint8]:
    """[L, K] of one token: K different experts a layer, from a hash of what it is."""
    seed = int.from_bytes(hashlib.sha256(f"{request}/{position}".encode()).digest()[:8], "little")
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(E)[:K] for _ in range(L)]).astype(np.uint8)


def rows(request: str, positions: Sequence[int]) -> npt.NDArray[np.uint8]:
    """[n, L, K]."""
    return np.stack([row(request, position) for position in positions])


def token(request: str, position: int) -> int:
    return (sum(request.encode()) * 31 + position * 7) % 250


def count(published: Sequence[tuple[str, int]]) -> npt.NDArray[np.uint64]:
    """[L, E], counted one by one."""
    counts = np.zeros((L, E), np.uint64)
    for request, position in published:
        for layer, experts in enumerate(row(request, position)):
            for expert in experts:
                counts[layer, expert] += 1
    return counts


def make_writer(capture: str, **options: object) -> Writer:
    facts = {"layers": LAYERS, "num_experts": E, "top_k": K, "engine": "test", "engine_version": "1", "model": "known"}
    return Writer(capture, **{"arena_bytes": 1 << 20, **facts, **options})  # type: ignore[arg-type]


def publish(
    writer: Writer, batch: Sequence[tuple[int, str, Sequence[int]]], prompts: dict[str, int] | None = None
) -> bool:
    """One step: (number, request, positions) each; a position below the request's prompt length is prefill."""
    spans, first = [], 0
    for number, request, positions in batch:
        prompt = (prompts or {}).get(request, 0)
        phase = "prefill" if positions[0] < prompt else "decode"
        spans.append((number, request, first, len(positions), prompt, phase))
        first += len(positions)
    writer.set_batch(spans)  # type: ignore[arg-type]
    flat = [(request, position) for _, request, positions in batch for position in positions]
    return writer.publish(
        np.stack([row(*which) for which in flat]),
        np.array([token(*which) for which in flat], np.uint32),
        np.array([position for _, position in flat], np.uint32),
    )
