"""The truth about forwards that torch compiles, graphs included, taken another way than the engine side takes it.

The experts' *class* gets another forward, in which an operator that the compiler cannot look into notes the ids that
come. It does so on the device, behind what it noted before, so that a replay of a graph of it does as well.
Nothing here is imported from expert_lens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from oracle import Array, experts_modules

MOST_ROWS = 1 << 14


class Notes:
    """What one routed layer received; all of it stays where it is, as graphs know it by its address."""

    def __init__(self, top_k: int, device: torch.device) -> None:
        self.ids = torch.zeros(MOST_ROWS, top_k, dtype=torch.int64, device=device)
        self.rows = torch.zeros((), dtype=torch.int64, device=device)

    def take(self) -> torch.Tensor:
        """The rows noted since the last time."""
        ids = self.ids[: self.rows.item()].clone()
        self.rows.zero_()
        return ids


NOTES: list[Notes] = []


@torch.library.custom_op("oracle::note", mutates_args=())
def note(ids: torch.Tensor, number: int) -> torch.Tensor:
    """The same ids [n, K], once they are in `NOTES[number]`."""
    notes = NOTES[number]
    notes.ids.index_copy_(0, notes.rows + torch.arange(len(ids), device=ids.device), ids)
    notes.rows.add_(len(ids))
    return ids.clone()


@note.register_fake
def _(ids: torch.Tensor, _number: int) -> torch.Tensor:
    return torch.empty_like(ids)


class CompiledOracle:
    """What every routed layer received while the block ran. One block for all forwards, as another compiles anew."""

    def __init__(self, model: Any) -> None:
        self._modules = experts_modules(model)
        self._notes = [Notes(model.config.num_experts_per_tok, model.device) for _ in self._modules]

    @contextmanager
    def watching(self) -> Iterator["CompiledOracle"]:
        experts = type(self._modules[0])
        forward = experts.forward
        for module, notes in zip(self._modules, self._notes, strict=True):
            module.number_of_notes = len(NOTES)
            NOTES.append(notes)

        def noting(module: Any, hidden_states: Any, ids: Any, weights: Any) -> Any:
            return forward(module, hidden_states, note(ids, module.number_of_notes), weights)

        experts.forward = noting
        try:
            yield self
        finally:
            experts.forward = forward

    def forwards(self, rows: Sequence[int]) -> list[Array]:
        """Of each forward since the last time, which had so many rows, the ids [n, L, K]; there must be no others."""
        ids = torch.stack([notes.take() for notes in self._notes], 1).cpu()
        return [forward.numpy() for forward in ids.split_with_sizes(list(rows))]
