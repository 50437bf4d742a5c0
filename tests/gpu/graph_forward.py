"""A forward in a CUDA graph whose rows follow from step and position, and that publishes by itself."""

import gc
from typing import Any
from zlib import crc32

import numpy as np
import torch
from patterns import PRIME, K, L

from expert_lens import graphs
from expert_lens._core import Writer
from expert_lens.tap import Tap


def make_tap(capture: str, num_experts: int = 128, *, layers: int = L, top_k: int = K, **options: Any) -> Tap:
    weights = options.pop("weights", False)
    facts: dict[str, Any] = {"layers": list(range(layers)), "num_experts": num_experts, "top_k": top_k}
    return Tap(Writer(capture, **facts, weights=weights, kv_slots=1 << 20, **options), **facts, weights=weights)


class GraphForward:
    """Captured for `max_rows` rows; each replay computes the rows of one step, at the positions of its static input.

    Row r of step s, at position p: expert ids (s * PRIME + 11 p + 3 layer + 5 k) mod E, token id p + s mod 1000, KV
    slot 3 p + s, weights ids / 1024. `counting`: each replay computes the step after the last one's, by itself.
    `scores`: the layers hand over weights of all experts.
    """

    def __init__(
        self,
        tap: Tap,
        max_rows: int,
        *,
        dtype: torch.dtype = torch.int64,
        columns: bool = True,
        strided: bool = False,
        scores: bool = False,
        warm_up: bool = True,
        beside: bool = True,
        counting: bool = False,
        attach: bool = True,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.tap = tap
        self.dtype = dtype
        self.columns = columns
        self.strided = strided
        self.scores = scores
        self.beside = beside
        self.counting = counting
        device = torch.device("cuda", torch.cuda.current_device())
        layer, choice = torch.arange(len(tap.layers), device=device), torch.arange(tap.top_k, device=device)
        self.offsets = layer[:, None] * 3 + choice * 5
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.positions = torch.arange(max_rows, device=device)
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.stream = stream or torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        if warm_up:
            with torch.cuda.stream(self.stream):
                self.run()
                tap.end()
        self.stream.synchronize()
        gc.collect()  # a graph that is freed while another one is captured spoils the capture
        with torch.cuda.graph(self.graph, stream=self.stream):
            columns_in_graph = self.run()
            held = tap.end()
            assert held is not None
            self.recorded = graphs.record(tap, held, max_rows, **columns_in_graph)
        if attach:
            self.recorded.attach_to(self.graph)
        self.max_rows = max_rows

    def run(self) -> dict[str, torch.Tensor]:
        """The forward: hands each layer's ids to the tap, and gives the columns that go with them."""
        tap, step = self.tap, self.step
        begun = tap.begin()
        if self.beside and begun is not None and torch.cuda.is_current_stream_capturing():
            begun.mark_beginning()
        self.run_before()
        if self.counting:
            step.add_(1)
        first = step * PRIME + self.positions * 11
        tokens = (self.positions + step % 1000).to(torch.int32)
        slots = self.positions * 3 + step
        if self.strided:
            ids = (first[:, None, None] + self.offsets).remainder(tap.num_experts).to(self.dtype).unbind(1)
        else:
            ids = (first[:, None] + self.offsets[:, None]).remainder(tap.num_experts).to(self.dtype).unbind(0)
        for slot, one in enumerate(ids):
            tap.layer(slot, one, self.weights(one) if tap.weights else None)
        self.seen.copy_(step)
        self.run_on()
        if not self.columns:
            return {"token_ids": tokens}
        return {"token_ids": tokens, "positions": self.positions, "kv_slots": slots}

    def weights(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the chosen experts, or of all of them."""
        if self.scores:
            each = torch.arange(self.tap.num_experts, dtype=torch.float32, device=ids.device) / 1024
            return each.expand(len(ids), -1)
        return ids.to(torch.float32) / 1024

    def run_before(self) -> None:
        """What the forward computes before its layers choose."""

    def run_on(self) -> None:
        """What comes behind the last choice, taking memory as the forward did: it must not be that of what is held."""
        for _ in range(8):
            for dtype in (self.dtype, torch.float32, torch.int32):
                like = (len(self.offsets), len(self.positions), self.tap.top_k)
                torch.full(like, 77, dtype=dtype, device=self.positions.device)
                torch.full(like[1:], 77, dtype=dtype, device=self.positions.device)

    def replay(self, rows: int | None, *, request: str = "a", first: int = 0, launch: Any = None) -> int:
        """Replay step `writer.steps` for `rows` rows from position `first`, or for nobody; gives the step."""
        step = self.tap.writer.steps
        with torch.cuda.stream(self.stream):
            self.step.fill_(step if rows is not None else 12_345)
            self.positions.copy_(torch.arange(first, first + self.max_rows), non_blocking=True)
            replayed = None
            if rows is not None:
                spans: Any = [(crc32(request.encode()), request, 0, rows, 0, "decode")]
                positions = None if self.columns else np.arange(first, first + rows, dtype=np.uint32)
                replayed = graphs.ReplayRows(spans, rows, positions)
            self.recorded.replay(launch or self.graph.replay, replayed)
        return step
