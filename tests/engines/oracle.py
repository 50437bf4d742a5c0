"""The truth about a run, taken another way than the engine side takes it.

`Oracle` replaces the forward of the experts' *class* for the time of a run and copies the ids and weights that each
routed layer really received. Whose rows they are is then worked out from what the run gave back, the finished
sequences, and not from what the model was called with on the way. Nothing here is imported from expert_lens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def experts_modules(model: Any) -> list[Any]:
    """The modules that hold routed experts, in the order of their layers."""
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


class Oracle:
    """What every routed layer received while the block ran: `ids[f]` [n, L, K] in forward `f`, and `weights[f]`."""

    def __init__(self, model: Any) -> None:
        self._modules = experts_modules(model)
        self._ids: list[list[Array]] = [[] for _ in self._modules]
        self._weights: list[list[Array]] = [[] for _ in self._modules]

    @property
    def ids(self) -> list[Array]:
        return [np.stack(layers, axis=1) for layers in zip(*self._ids, strict=True)]

    @property
    def weights(self) -> list[Array]:
        return [np.stack(layers, axis=1) for layers in zip(*self._weights, strict=True)]

    @contextmanager
    def watching(self) -> Iterator["Oracle"]:
        expert_class = type(self._modules[0])
        original = expert_class.forward
        slots = {id(module): slot for slot, module in enumerate(self._modules)}

        def forward(module: Any, hidden_states: Any, ids: Any, weights: Any) -> Any:
            slot = slots.get(id(module))
            if slot is not None:
                self._ids[slot].append(ids.detach().clone().cpu().numpy())
                self._weights[slot].append(weights.detach().clone().float().cpu().numpy())
            return original(module, hidden_states, ids, weights)

        expert_class.forward = forward
        try:
            yield self
        finally:
            expert_class.forward = original


def columns(forwards: Sequence[Array], batch: int) -> Array:
    """The forwards of a batch beside each other: [B, columns, L, K]; each forward holds [B * width, L, K]."""
    return np.concatenate([rows.reshape(batch, -1, *rows.shape[1:]) for rows in forwards], axis=1)


def columns_of_refeeding(forwards: Sequence[Array], batch: int) -> Array:
    """As `columns`, for a run without a cache: each forward holds all columns so far; only its last ones are new."""
    seen, new = 0, []
    for rows in forwards:
        grid = rows.reshape(batch, -1, *rows.shape[1:])
        new.append(grid[:, seen:])
        seen = grid.shape[1]
    return np.concatenate(new, axis=1)


def output_lengths(sequences: torch.Tensor, prompt_columns: int, ends: Sequence[int]) -> list[int]:
    """How many tokens each sequence got after its prompt, the first token of `ends` included."""
    lengths = []
    for row in sequences[:, prompt_columns:].tolist():
        stop = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
        lengths.append(stop + 1)
    return lengths


def request_rows(grid: Array, prompt_mask: torch.Tensor, lengths: Sequence[int]) -> list[Array]:
    """The rows of each request: its prompt's, without padding, then one a generated token but for the last."""
    prompt_columns = prompt_mask.shape[1]
    result = []
    for row, length in enumerate(lengths):
        prompt = grid[row, :prompt_columns][prompt_mask[row].numpy() != 0]
        generated = grid[row, prompt_columns : prompt_columns + length - 1]
        assert len(generated) == length - 1
        result.append(np.concatenate([prompt, generated]))
    return result


def request_tokens(sequences: torch.Tensor, prompt_mask: torch.Tensor, lengths: Sequence[int]) -> list[list[int]]:
    """The token ids of each request's rows: all of it but the last token, which is never fed."""
    prompt_columns = prompt_mask.shape[1]
    result = []
    for row, length in enumerate(lengths):
        prompt = sequences[row, :prompt_columns][prompt_mask[row] != 0].tolist()
        result.append(prompt + sequences[row, prompt_columns : prompt_columns + length - 1].tolist())
    return result


def replayed(model: Any, tokens: Sequence[int]) -> Array:
    """The rows [n, L, K] of one sequence forwarded alone, whole, and without padding."""
    return replayed_with_weights(model, tokens)[0]


def replayed_with_weights(model: Any, tokens: Sequence[int]) -> tuple[Array, Array]:
    """As `replayed`, and the weights [n, L, K] with them."""
    oracle = Oracle(model)
    with oracle.watching(), torch.no_grad():
        model(torch.tensor([list(tokens)], device=model.device), use_cache=False)
    return oracle.ids[0], oracle.weights[0]
