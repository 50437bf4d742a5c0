"""What people use in place of the lens, by hand, for benchmarks that need it beside ours on a GPU."""

from collections import deque

import torch

__all__ = ["DeferredCopy"]

SLOTS = 100_000


class DeferredCopy:
    """As SGLang does with overlap: each layer's ids into a static buffer, and the copy to the host one step late.

    `keep` a layer's ids [n, K] as its forward gives them, then `defer(n)` behind the forward: clone, copy to the host
    without blocking, an event; and, for the step before, wait for its event and scatter its rows into a host buffer.
    """

    def __init__(self, max_rows: int, num_layers: int, top_k: int) -> None:
        self._static = torch.zeros((max_rows, num_layers, top_k), dtype=torch.int32, device="cuda")
        self._slots = torch.randperm(SLOTS, device="cuda")[:max_rows]
        self._buffer = torch.zeros((SLOTS, num_layers, top_k), dtype=torch.int32)
        self._waiting: deque[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = deque()

    def keep(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Copy one layer's ids; inside a CUDA graph too."""
        self._static[: len(topk_ids), layer].copy_(topk_ids)

    def defer(self, num_rows: int) -> None:
        """Enqueue the copy of a forward's rows on the current stream, and finish the one before."""
        rows = self._static[:num_rows].clone().to("cpu", non_blocking=True)
        slots = self._slots[:num_rows].clone().to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._waiting.append((rows, slots, copied))
        if len(self._waiting) > 1:
            rows, slots, copied = self._waiting.popleft()
            copied.synchronize()
            self._buffer[slots] = rows
