"""Rows whose content follows from step and position: the GPU computes them one way, a reader checks them another."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from expert_lens._core import Writer

L, K = 48, 8
PRIME = 7919
STEPS = 200_000
"""Of a stress test."""
SIZES = [1] * 60 + [2, 7, 16, 33, 64, 64, 64, 100, 256] * 4 + [1000, 2048, 4096]
"""Rows of its steps, to choose from."""


def make_writer(capture: str, num_experts: int = 128, **options: Any) -> Writer:
    facts = {"layers": list(range(L)), "num_experts": num_experts, "top_k": K, "engine": "test"}
    return Writer(capture, **{**facts, **options})


def expected(
    steps: npt.NDArray[Any], positions: npt.NDArray[Any], num_experts: int, layers: int = L, top_k: int = K
) -> npt.NDArray[Any]:
    """[n, layers, top_k] of rows with these step numbers and positions [n], by numpy."""
    first = (steps.astype(np.int64) * PRIME + positions.astype(np.int64) * 11) % num_experts
    return _by_first(num_experts, layers, top_k)[first]


@cache
def _by_first(num_experts: int, layers: int, top_k: int) -> npt.NDArray[Any]:
    first = np.arange(num_experts)[:, None, None]
    ids = (first + np.arange(layers)[:, None] * 3 + np.arange(top_k) * 5) % num_experts
    return ids.astype(np.uint8 if num_experts <= 256 else np.uint16)


class OnDevice:
    """The same rows and token ids, computed by the GPU on the current stream."""

    def __init__(self, num_experts: int, max_rows: int, device: str = "cuda") -> None:
        import torch

        self.num_experts = num_experts
        self.dtype = torch.uint8 if num_experts <= 256 else torch.int16
        position = torch.arange(max_rows, device=device)[:, None, None] * 11
        layer = torch.arange(L, device=device)[:, None] * 3
        self.offsets = position + layer + torch.arange(K, device=device) * 5
        self.positions = torch.arange(max_rows, device=device, dtype=torch.int32)

    def experts(self, step: int, rows: int) -> Any:
        return (self.offsets[:rows] + step * PRIME).remainder(self.num_experts).to(self.dtype)

    def token_ids(self, step: int, rows: int) -> Any:
        return self.positions[:rows] + step % 1000

    def weights(self, step: int, rows: int) -> Any:
        import torch

        return (self.experts(step, rows).to(torch.float32) / 1024).to(torch.float16)


def publish(
    writer: Writer,
    source: OnDevice,
    step: int,
    rows: int,
    *,
    spans: Sequence[tuple[int, str]] = ((1, "a"),),
    weights: bool = False,
    positions_there: bool = False,
) -> bool:
    """One step of `rows` rows of one request, positions from 0, on the current stream; `positions_there`: the GPU
    publishes those, too, so that there is nothing behind the spans that the CPU writes.
    """
    import torch

    (number, request) = spans[0]
    writer.set_batch([(number, request, 0, rows, 0, "decode")])
    packed = source.experts(step, rows)
    tokens = source.token_ids(step, rows)
    scores = source.weights(step, rows) if weights else None
    return writer.publish_device(
        packed.data_ptr(),
        rows,
        source.positions.data_ptr() if positions_there else np.arange(rows, dtype=np.uint32),
        device=packed.device.index,
        stream=torch.cuda.current_stream().cuda_stream,
        token_ids=tokens.data_ptr(),
        weights=None if scores is None else scores.data_ptr(),
    )
