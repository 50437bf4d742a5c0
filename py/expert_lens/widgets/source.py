"""What a heatmap needs to know of the thing it shows."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expert_lens.types import Phase

__all__ = ["HeatmapSource"]


class HeatmapSource(Protocol):
    """Counts that grow while somebody looks. `expert_lens.Lens` is one; tests bring their own.

    Every member may be used from any thread, and goes on answering after the source has ended or was closed. The
    widget holds its source by a weak reference.
    """

    @property
    def layers(self) -> Sequence[int]:
        """The model's indices of its MoE layers, in order: L of them."""

    @property
    def num_experts(self) -> int:
        """E, experts a layer."""

    @property
    def top_k(self) -> int:
        """K, experts chosen for one token in one layer."""

    @property
    def title(self) -> str:
        """One line: model, engine, capture."""

    @property
    def stats(self) -> Mapping[str, Any]:
        """At least tokens, steps, dropped_tokens, missing_tokens, lag_s (seconds) and state.

        state is "running", or one word for why no token will come any more: "ended", "closed". Shown too if they are
        there: lost_tokens, and error, None or words for a person.
        """

    def tokens_seen(self) -> int:
        """A number that grows with every token seen; asked up to 60 times a second, so cheap."""

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        """[L, E], how many tokens each expert got: of all tokens or the last so many, of one phase or both.

        Raises ValueError, with words for a person, when it cannot look back that far.
        """
