"""Steps: what one forward hands over, and whose rows it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from expert_lens.types import Span

__all__ = ["U32", "DecodeRun", "Indices", "Joined", "Rows", "Step"]

Indices = npt.NDArray[np.intp]
U32 = npt.NDArray[np.uint32]


class Joined(NamedTuple):
    """What a forward's compiled code has joined by itself.

    `experts`: all layers' ids side by side, [n, L * K] or [B, S, L * K]; on a GPU of the packed type. `weights`: as
    many, f16, if they are captured. `token_ids`: what the decoder ran over by its `input_ids`, an int32 for each row;
    None on the CPU, or where it was given something else.
    """

    experts: torch.Tensor
    weights: torch.Tensor | None
    token_ids: torch.Tensor | None


class Step:
    """What one forward has handed over: references to its top-k tensors, a slot a routed layer."""

    __slots__ = ("begun", "chosen", "experts", "inputs", "joined", "repeated", "weights")

    def __init__(self, num_layers: int) -> None:
        self.experts: list[torch.Tensor | None] = [None] * num_layers
        self.weights: list[torch.Tensor | None] = []
        """As `experts`; empty unless weights are captured."""
        self.joined: Joined | None = None
        """What all of them gave, if compiled code has joined it: `experts` and `weights` have no layer's then."""
        self.begun: torch.cuda.Event | None = None
        """Of a forward that is captured in a CUDA graph: where it began, see `mark_beginning`."""
        self.chosen: torch.cuda.Event | None = None
        """Where all its layers had chosen, see `mark_chosen`."""
        self.repeated: int | None = None
        """The slot of a layer that has handed over twice."""
        self.inputs: Any = None
        """What the engine's side needs to know again at the end of the forward; the tap does not look at it."""

    def mark_beginning(self) -> None:
        """Note, in a capture, that the forward begins here, or has not chosen yet: its post is read from here on.

        That goes on beside the forward, and so does publishing once all layers have chosen.
        """
        self.begun = torch.cuda.current_stream().record_event()

    def mark_chosen(self) -> None:
        """Note, in a capture, that all layers have chosen; what the graph finds beside their ids must be there too."""
        self.chosen = torch.cuda.current_stream().record_event()


class Rows:
    """Whose rows a step holds: what `publish` needs besides the experts.

    `spans`: as in `Writer.set_batch`, over the kept rows. `positions`: u32 [n], of the kept rows; or a tensor of int32
    on the step's device. `token_ids`: what the forward ran over, an id for each of its rows, where the model has it; or
    None. `kept`: indices of the kept rows among the forward's rows, in order; None: the first n, which are all but for
    padding behind them. `kv_slots`: int32 [n] on the step's device, where the engine has such slots.
    """

    __slots__ = ("kept", "kv_slots", "positions", "spans", "token_ids")

    def __init__(
        self,
        spans: Sequence[Span],
        positions: U32 | torch.Tensor,
        token_ids: torch.Tensor | None,
        kept: Indices | None = None,
        kv_slots: torch.Tensor | None = None,
    ) -> None:
        self.spans = spans
        self.positions = positions
        self.token_ids = token_ids
        self.kept = kept
        self.kv_slots = kv_slots


class DecodeRun:
    """Steps of the same batch that follow each other, each with one more token of every row.

    `spans` and `kept`: as in `Rows`, of every step. `num_taken`: how many steps there were.
    """

    __slots__ = ("kept", "num_taken", "spans", "start")

    def __init__(self, spans: Sequence[Span], start: U32, kept: Indices | None) -> None:
        self.spans = spans
        self.start = start
        self.kept = kept
        self.num_taken = 0

    def take(self, token_ids: torch.Tensor | None) -> Rows:
        """The rows of the next step, whose forward ran over these ids [B, 1]."""
        positions = self.start + np.uint32(self.num_taken)
        self.num_taken += 1
        return Rows(self.spans, positions, token_ids, self.kept)
