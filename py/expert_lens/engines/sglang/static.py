"""Experts of forwards in which no Python runs: a buffer that graphs and compiled code write, for the forward's end."""

from __future__ import annotations

import torch

from expert_lens.errors import EngineHookError, SilentTapError
from expert_lens.steps import Step
from expert_lens.tap import Tap

__all__ = ["StaticExperts", "silence"]


def silence(layers: tuple[int, ...], where: str) -> SilentTapError:
    """The error about layers that have handed over nothing in `where`."""
    return SilentTapError(
        f"layers {layers} handed over no experts in {where}: SGLang chooses them where its capturer does not see it, a "
        "fused kernel, say. Try another --moe-runner-backend, such as triton.",
        layers,
    )


class StaticExperts:
    """One row of the buffer for each row of a forward, of at most `max_rows`; -1 where nothing was written."""

    def __init__(self, tap: Tap, max_rows: int, device: torch.device | str) -> None:
        self._tap = tap
        self._ids = torch.full((max_rows, len(tap.layers), tap.top_k), -1, dtype=torch.int32, device=device)
        self.cut_modes: set[str] = set()
        """Modes of forwards whose graphs write the rows of this data-parallel rank alone."""
        self._checked: set[str] = set()
        """Modes of forwards of which one was looked at."""

    def write(self, slot: int, ids: torch.Tensor) -> None:
        """Copy one layer's ids [n, K], as a part of code that is being compiled."""
        if ids.shape[0] <= self._ids.shape[0]:  # else these rows are missing
            self._ids[: ids.shape[0], slot] = ids

    def record(self, step: Step) -> None:
        """Copy all layers' ids, as a part of a graph that is being captured."""
        first = step.experts[0]
        num_rows = 0 if first is None else len(first)
        self._tap.check_shape(step, num_rows)
        self._ids[:num_rows].copy_(torch.stack(step.experts, dim=1))  # type: ignore[arg-type]

    def take(self, num_rows: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What the forward that is enqueued writes: packed experts [n, L, K], and bool [n], whether a row is there.

        Raises SilentTapError for the first one of its mode, if a layer has written nothing; of later ones such rows are
        not there. Raises EngineHookError if it has more rows than there are.
        """
        ids = self._ids[:num_rows]
        if len(ids) < num_rows:
            raise EngineHookError(
                f"a forward in mode {mode} of {num_rows} tokens, where {len(ids)} were thought to be the most. With "
                "--chunked-prefill-size they would be."
            )
        there = (ids >= 0).flatten(1).all(dim=1)
        if mode not in self._checked:
            self._check(ids, num_rows, mode)
        return ids.to(torch.uint8 if self._tap.num_experts <= 256 else torch.int16), there

    def empty(self) -> None:
        """Take out what was written, so that a forward that writes nothing gives no rows of the one before."""
        self._ids.fill_(-1)

    def _check(self, ids: torch.Tensor, num_rows: int, mode: str) -> None:
        missing = (ids < 0).any(dim=2).any(dim=0).tolist()
        if any(missing):
            layers = tuple(layer for layer, none in zip(self._tap.layers, missing, strict=True) if none)
            raise silence(layers, f"a forward in mode {mode} of {num_rows} tokens")
        self._checked.add(mode)
