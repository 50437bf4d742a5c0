"""Which position of which request each row of a forward is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expert_lens.engines.names import next_number
from expert_lens.steps import DecodeRun, Rows
from expert_lens.streams import relaxed_capture
from expert_lens.tap import Tap

if TYPE_CHECKING:
    import torch

    from expert_lens.types import EndState, Phase, Span

__all__ = ["Sequences", "join_rows", "real_tokens"]

Mask = npt.NDArray[np.bool_]


def real_tokens(mask: Any, past: int, width: int) -> tuple[npt.NDArray[np.int64] | None, Mask | None] | None:
    """What an attention mask says of the columns [past, past + width).

    Gives the number of real tokens before them, [B], or None if the mask does not reach back so far, and which of
    them are real, [B, width], or None if there is no padding. The whole is None if the mask (4-D, a dict, another
    width) does not tell.
    """
    if mask is None:
        return None, None
    if getattr(mask, "ndim", 0) != 2:
        return None
    columns = mask.shape[1]
    if columns == past + width:
        flags = _on_host(mask)
        return flags[:, :past].sum(1), flags[:, past:]
    if columns == width:
        return None, _on_host(mask)
    return None


def _on_host(mask: torch.Tensor) -> Mask:
    """A GPU's is waited for."""
    with relaxed_capture():
        flags: Mask = mask.detach().cpu().numpy() != 0
    return flags


class Sequences:
    """The sequences of one call, a row of the batch each, and how far each has come.

    `first_position` [B] is where each one starts: what a cache held before is not ours, and missing. Anonymous
    sequences are counted and kept for no request.
    """

    def __init__(self, ids: list[str] | None, first_position: npt.NDArray[np.int64], columns: int) -> None:
        self.ids = ids
        self.numbers = [next_number() for _ in ids] if ids is not None else []
        self._next_position = first_position.astype(np.int64)
        self._columns = columns
        self.prompt_tokens = self._next_position.copy()
        self.ended = False
        self._done = np.zeros(len(self._next_position), dtype=np.bool_)
        self._num_done = 0
        self._run: DecodeRun | None = None
        self._alive: npt.NDArray[np.intp] | None = None

    def __len__(self) -> int:
        return len(self._done)

    @property
    def next_position(self) -> npt.NDArray[np.int64]:
        """Where each row's next token comes, [B]."""
        self._settle()
        return self._next_position

    @property
    def columns(self) -> int:
        """Columns of the batch that have been forwarded, padding included."""
        self._settle()
        return self._columns

    def move(self, columns: int, next_position: npt.NDArray[np.int64] | None = None) -> None:
        """Go on from this column, and position in each row: what comes after was cut from the cache."""
        self._settle()
        self._columns = columns
        if next_position is not None:
            self._next_position[:] = next_position

    @property
    def padding(self) -> npt.NDArray[np.int64]:
        """Columns of each row that held no token of it."""
        return self.columns - self.next_position

    def expect_prompt(self, tokens: npt.NDArray[np.int64] | None) -> None:
        """Each prompt will have so many tokens; without this, what was prefilled so far is taken for the prompt."""
        if tokens is not None:
            self.prompt_tokens = tokens.astype(np.int64)

    def all_done(self) -> bool:
        """Whether no row expects a token."""
        return self._num_done == len(self._done)

    def mark_done(self, done: list[bool]) -> None:
        """These rows have their last token: what is fed to them from now on is padding."""
        if True not in done:
            return
        all_done = self._done | np.array(done)
        if (num_done := int(all_done.sum())) != self._num_done:
            self._settle()
            self._done = all_done
            self._num_done = num_done

    def take(self, real: Mask | None, tokens: torch.Tensor | None, width: int, phase: Phase, *, skip: int = 0) -> Rows:
        """The rows of a forward over [B, skip + width] columns, of which the first `skip` were seen before.

        `real` [B, width]: which are tokens; None: all. `tokens` [B, skip + width].
        """
        batch = len(self)
        self._settle()
        if real is None:
            real = np.ones((batch, width), dtype=np.bool_)
        if self._num_done:
            real = real & ~self._done[:, None]
        counts = real.sum(1)
        positions = (self._next_position[:, None] + real.cumsum(1) - 1)[real]
        self._next_position += counts
        self._columns += width
        if phase == "prefill":
            np.maximum(self.prompt_tokens, self._next_position, out=self.prompt_tokens, where=counts > 0)
        everything = skip == 0 and positions.size == batch * width
        kept = None if everything else _flat_index(real, skip)
        return Rows(
            self._spans(counts, phase),
            positions.astype(np.uint32),
            tokens,
            kept,
        )

    def take_next(self, tokens: torch.Tensor | None) -> Rows:
        """The rows of a forward over one column, [B, 1]: one token of each row that is not done."""
        return self.run().take(tokens)

    def run(self) -> DecodeRun:
        """The run of forwards over one column each, as long as the same rows are not done."""
        if self._run is None:
            self._alive = np.flatnonzero(~self._done)
            spans = self._spans((~self._done).astype(np.int64), "decode")
            kept = self._alive if self._num_done else None
            self._run = DecodeRun(spans, self._next_position[self._alive].astype(np.uint32), kept)
        return self._run

    def _settle(self) -> None:
        """Count what the run has taken, and end it."""
        run, self._run = self._run, None
        if run is not None:
            self._next_position[self._alive] += run.num_taken
            self._columns += run.num_taken

    def finish(self, tap: Tap, state: EndState) -> None:
        """State the end of each sequence, once; those that had their last token have finished in any case.

        Once the capture has switched itself off it no longer knows their ends: all are aborted where it lost them.
        """
        if self.ended:
            return
        self.ended = True
        lost = tap.error is not None
        next_position = self.next_position
        for row, (number, request) in enumerate(zip(self.numbers, self.ids or (), strict=True)):
            row_state = "aborted" if lost else "finished" if self._done[row] else state
            tap.finish(number, request, int(next_position[row]), row_state)

    def _spans(self, counts: npt.NDArray[np.int64], phase: Phase) -> list[Span]:
        if self.ids is None:
            return [(0, "", 0, int(counts.sum()), 0, phase)]
        spans: list[Span] = []
        first_row = 0
        for row, count in enumerate(counts.tolist()):
            if count:
                prompt_tokens = int(self.prompt_tokens[row])
                spans.append((self.numbers[row], self.ids[row], first_row, count, prompt_tokens, phase))
                first_row += count
        return spans


def join_rows(first: Rows, second: Rows) -> Rows:
    """The rows of one forward, taken in two parts of different phases."""
    if not len(second.positions):
        return first
    if not len(first.positions):
        return second
    assert first.kept is not None
    assert second.kept is not None
    shift = len(first.positions)
    later: list[Span] = [(span[0], span[1], span[2] + shift, *span[3:]) for span in second.spans]
    spans = [*first.spans, *later]
    positions = np.concatenate([first.positions, second.positions])
    return Rows(spans, positions, first.token_ids, np.concatenate([first.kept, second.kept]))


def _flat_index(real: Mask, skip: int) -> npt.NDArray[np.intp]:
    """Where the real tokens of columns [skip, skip + width) lie in the flattened batch."""
    rows, columns = np.nonzero(real)
    flat: npt.NDArray[np.intp] = rows * (skip + real.shape[1]) + skip + columns
    return flat
