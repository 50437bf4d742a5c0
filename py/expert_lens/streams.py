"""What is asked of CUDA streams through torch: nothing here waits, and nothing ends a capture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from expert_lens._core import exchange_capture_mode
from expert_lens.steps import Indices

__all__ = ["follow", "own", "relaxed_capture", "sent"]

RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED."""


@contextlib.contextmanager
def relaxed_capture() -> Iterator[None]:
    """Calls of this thread to CUDA in the block end no stream capture, be it another thread's or its own."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # then nobody captures
        yield
        return
    before = exchange_capture_mode(RELAXED)
    try:
        yield
    finally:
        exchange_capture_mode(before)


def sent(indices: Indices, device: torch.device) -> torch.Tensor:
    """The indices on that device, from now on in the order of the current stream; nothing is waited for."""
    there = torch.from_numpy(indices)
    if device.type != "cuda":
        return there.to(device)
    with relaxed_capture():
        # Pinned: a copy from other memory may wait for the stream ("API synchronization behavior", CUDA driver API).
        return there.pin_memory().to(device, non_blocking=True)


def own(column: Any) -> Any:
    """The column, if it is a tensor in memory of its own: the engine goes on to write into the one that it gave."""
    return column.clone() if isinstance(column, torch.Tensor) else column


def follow(late: torch.cuda.Stream, stream: torch.cuda.Stream, tensors: Iterable[Any]) -> None:
    """Have `late` go on behind what `stream` has been given so far, and know these tensors of it."""
    with relaxed_capture():
        late.wait_stream(stream)
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            tensor.record_stream(late)
