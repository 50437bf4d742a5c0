"""The capturer: stands in for SGLang's own, which every MoE layer calls, and goes on calling it.

Where the ids of a forward come from depends on how SGLang runs it:

* eager: each layer hands over its ids; they are packed when the forward ends (`tap`).
* a decode CUDA graph: captured once a batch size with our kernels behind the last layer; each replay publishes by
  itself (`graphs`).
* other graphs and compiled code, mostly of prefill: no line of Python runs in them, so while they are captured or
  traced the ids' copy into a static buffer becomes part of them, and the forward's end publishes from there.

All of it is called on the scheduler's thread, with the forward's stream as the current one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from expert_lens import graphs
from expert_lens.engines.sglang.model import eager_rows, graph_rows
from expert_lens.engines.sglang.requests import Requests
from expert_lens.errors import EngineHookError, SilentTapError
from expert_lens.graphs import GraphStep, ReplayRows
from expert_lens.tap import Rows, Step, Tap

__all__ = ["Capturer"]


class Capturer:
    """In place of the capturer `native`, which may be None; for the target model that `runner` runs.

    `static_rows`: rows of the largest forward that is no decode graph. `slots`: whether to tell KV slots, and of
    requests that begin from the cache where.
    """

    def __init__(self, runner: Any, native: Any, tap: Tap, *, static_rows: int, slots: bool) -> None:
        self.native = native
        self.requests = Requests(tap)
        self._tap = tap
        self._runner = runner
        self._slots = slots
        self._layer_slots = {layer: slot for slot, layer in enumerate(tap.layers)}
        self._batch: Any = None
        """The batch whose forward is running."""
        self._published = False
        """Whether a graph has published that forward's rows."""
        self._drafted: tuple[Any, torch.Tensor] | None = None
        """The batch and the experts [n, L, K] of drafted tokens that are not judged yet."""
        self._replayed_spans: tuple[Any, ReplayRows | None] = (None, None)
        self._decode_graph: _DecodeGraph | None = None
        """The decode graph that is just being captured."""
        self._recording: Step | None = None
        """What another graph that is just being captured has handed over."""
        self._static = torch.full(
            (static_rows, len(tap.layers), tap.top_k), -1, dtype=torch.int32, device=runner.device
        )
        """Experts of forwards without Python, by row; -1 where none was written since the last publish."""
        self._static_checked = False

    # ---- what SGLang calls ----

    def capture(
        self, layer_id: int, topk_indices: torch.Tensor | None = None, *, topk_ids: torch.Tensor | None = None
    ) -> None:
        """A MoE layer has chosen: ids [n, K], with columns of fused shared experts behind, which are not routed."""
        ids = topk_indices if topk_ids is None else topk_ids
        assert ids is not None
        if self.native is not None:
            self.native.capture(layer_id, ids)
        if (slot := self._layer_slots.get(layer_id)) is None:
            return
        if ids.shape[1] != self._tap.top_k:
            ids = ids[:, : self._tap.top_k]
        if torch.compiler.is_compiling():  # nothing may be asked here that changes: it would be compiled anew
            if ids.shape[0] <= self._static.shape[0]:
                self._static[: ids.shape[0], slot] = ids
        elif not self._tap.active:
            return
        elif self._decode_graph is not None:
            if torch.cuda.is_current_stream_capturing():  # else it warms up
                self._hand_over(self._decode_graph.take, slot, ids)
        elif torch.cuda.is_current_stream_capturing():
            self._hand_over(self._record_static, slot, ids)
        else:
            self._tap.layer(slot, ids)

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> Any:
        """The target model's forward is enqueued: publish its rows, if it was no decode graph, which does by itself."""
        batch, self._batch = self._batch, None
        if batch is not None:
            step = self._tap.end()
            if self._tap.active and not self._published:
                try:
                    self._publish(batch, step)
                except Exception as error:
                    self._tap.fail(error)
        if self.native is None:
            return None
        return self.native.on_forward_end(
            forward_batch=forward_batch,
            can_run_graph=can_run_graph,
            cuda_graph_batch=cuda_graph_batch,
            no_copy_to_cpu=no_copy_to_cpu,
        )

    def get_topk(self, *args: Any, **kwargs: Any) -> Any:
        """What SGLang itself returns to a request that asked for its experts: None unless its own capture is on."""
        return None if self.native is None else self.native.get_topk(*args, **kwargs)

    def destroy(self) -> None:
        """The scheduler ends."""
        self._tap.close()
        if self.native is not None:
            self.native.destroy()

    def __getattr__(self, name: str) -> Any:
        native = self.__dict__.get("native")
        if native is None:
            raise AttributeError(f"SGLang's own capture is off, so there is no {name!r}")
        return getattr(native, name)

    # ---- what the hooks call ----

    def begin(self, batch: Any) -> None:
        """The target model's forward over this batch begins."""
        self._batch = batch
        self._published = False
        if self._drafted is not None:  # nobody has judged them
            self._tap.lose(len(self._drafted[1]))
            self._drafted = None
        if self._tap.begin() is None or not self._slots or batch.extend_prefix_lens_cpu is None:
            return
        if batch.forward_mode.name in ("EXTEND", "MIXED") and batch.rids:
            self._publish_prefixes(batch)

    @contextmanager
    def capturing(self, runner: Any) -> Iterator[None]:
        """Around the warm-ups and the capture of a decode graph by SGLang's `runner`."""
        self._decode_graph = _DecodeGraph(self._tap, runner, self._slots, self._record_static)
        try:
            yield
        finally:
            self._decode_graph = None

    def follow(self, graph: Any) -> None:
        """Have replays of the decode graph that was captured publish; inside of `capturing`."""
        recorded = self._decode_graph.recorded if self._decode_graph is not None else None
        if recorded is None:
            return
        recorded.attach_to(graph)
        reference = weakref.ref(graph)  # what hangs on the graph must not keep it

        original = type(graph).replay

        def launch() -> None:
            original(reference())

        graph.replay = partial(self._replay, recorded, launch)

    # ---- the rest ----

    def _replay(self, recorded: GraphStep, launch: Callable[[], None]) -> None:
        rows = None
        batch = self._batch
        if batch is not None and self._tap.active:
            try:
                spans = self.requests.decode(batch)
                known, rows = self._replayed_spans
                if spans is not known:
                    rows = ReplayRows(spans, len(spans))
                    self._replayed_spans = spans, rows
            except Exception as error:
                self._tap.fail(error)
        self._published = True
        recorded.replay(launch, rows)

    def _hand_over(self, take: Callable[[int, torch.Tensor], None], slot: int, ids: torch.Tensor) -> None:
        try:
            take(slot, ids)
        except Exception as error:  # the engine's capture goes on
            self._tap.fail(error)

    def _record_static(self, slot: int, ids: torch.Tensor) -> None:
        """Record, in a graph that is being captured, the copy into the static buffer behind the last layer."""
        if slot == 0:
            self._recording = Step(len(self._tap.layers))
        step = self._recording
        if step is None:
            raise EngineHookError(f"layer {self._tap.layers[slot]} is the first of a graph that is captured")
        step.experts[slot] = ids
        if slot == len(self._tap.layers) - 1:
            self._recording = None
            num_rows = len(ids)
            self._tap.check_shape(step, num_rows)
            self._static[:num_rows].copy_(torch.stack(step.experts, dim=1))  # type: ignore[arg-type]

    def _publish(self, batch: Any, step: Step | None) -> None:
        num_rows = batch.out_cache_loc.shape[0]
        if not num_rows or not batch.rids or batch.forward_mode.is_idle():
            return
        mode = batch.forward_mode.name
        if mode == "TARGET_VERIFY":
            self._drafted = batch, self._experts(batch, step, num_rows)
            return
        if mode not in ("DECODE", "EXTEND", "MIXED"):
            self._tap.lose(num_rows)
            return
        spans = self.requests.decode(batch) if mode == "DECODE" else self.requests.extend(batch)
        if (rows := spans[-1][2] + spans[-1][3] if spans else 0) != num_rows:
            raise EngineHookError(f"a forward in mode {mode} of {num_rows} tokens, of which its requests have {rows}")
        experts = self._experts(batch, step, num_rows)
        self._hand_on(experts, spans, batch.positions[:num_rows], batch.input_ids[:num_rows], batch.out_cache_loc)

    def accept(self, accepted: torch.Tensor) -> None:
        """Drafted tokens are judged: publish the rows of the accepted ones.

        `accepted`: which of the batch's rows, [B, width], -1 behind those that a request has. Accepted or not is known
        to the GPU alone, so all have a place, and those that were rejected get no position.
        """
        drafted, self._drafted = self._drafted, None
        if drafted is None or not accepted.numel():
            return
        batch, experts = drafted
        requests, width = accepted.shape
        flat = accepted.flatten().to(torch.int64)
        rows = flat.clamp(min=0)
        positions = torch.where(flat < 0, -1, batch.positions.index_select(0, rows))
        # Accepted tokens are moved to the front of their request's slots.
        slots = batch.out_cache_loc.view(requests, -1)[:, :width].flatten()
        tokens = batch.input_ids.index_select(0, rows)
        self._hand_on(experts.index_select(0, rows), self.requests.decode(batch, width), positions, tokens, slots)

    def _hand_on(
        self, experts: torch.Tensor, spans: Any, positions: torch.Tensor, tokens: torch.Tensor, slots: torch.Tensor
    ) -> None:
        kv_slots = slots.to(torch.int32) if self._slots else None
        self._tap.publish(experts, None, Rows(spans, positions.to(torch.int32), tokens, kv_slots=kv_slots))

    def _experts(self, batch: Any, step: Step | None, num_rows: int) -> torch.Tensor:
        """The packed experts [n, L, K] of this rank's rows of the forward that has just run."""
        first = None if step is None else step.experts[0]
        if step is not None and first is not None:
            experts, _ = self._tap.pack(step, len(first))
            begin = eager_rows(self._runner, batch, len(first))
            return experts[begin : begin + num_rows]
        begin = eager_rows(self._runner, batch, len(self._static))
        wide = self._static[begin : begin + num_rows]
        if not self._static_checked:
            self._check_static(wide, num_rows)
        experts = wide.to(torch.uint8 if self._tap.num_experts <= 256 else torch.int16)
        wide.fill_(-1)
        return experts

    def _check_static(self, wide: torch.Tensor, num_rows: int) -> None:
        """Once: whether every layer has written its experts."""
        silent = (wide < 0).any(dim=2).any(dim=0).tolist() if len(wide) == num_rows else [True] * len(self._tap.layers)
        if any(silent):
            layers = tuple(layer for layer, none in zip(self._tap.layers, silent, strict=True) if none)
            raise SilentTapError(
                f"layers {layers} handed over no experts in a forward of {num_rows} tokens: SGLang chooses them where "
                "its capturer does not see it (a fused kernel of this moe_runner_backend, say 'triton').",
                layers,
            )
        self._static_checked = True

    def _publish_prefixes(self, batch: Any) -> None:
        """Tell where the beginnings of requests stand in the cache, which this forward does not compute again.

        Before the forward: behind it, the scheduler may already have given `req_to_token` other slots.
        """
        try:
            if not (found := self.requests.from_cache(batch)):
                return
            table = self._runner.req_to_token_pool.req_to_token
            # Pinned, so that the copy is not waited for.
            places = torch.tensor([place for place, _ in found], pin_memory=True).to(table.device, non_blocking=True)
            rows = batch.req_pool_indices.index_select(0, places)
            longest = max(span[3] for _, span in found)
            slots = table[:, :longest].index_select(0, rows)
            joined = torch.cat([slots[i, : span[3]] for i, (_, span) in enumerate(found)])
            self._tap.publish_prefix([span for _, span in found], joined.to(torch.int32))
        except Exception as error:
            self._tap.fail(error)


class _DecodeGraph:
    """A decode graph while it is captured."""

    def __init__(self, tap: Tap, runner: Any, slots: bool, elsewhere: Callable[[int, torch.Tensor], None]) -> None:
        self.recorded: GraphStep | None = None
        self._tap = tap
        self._slots = slots
        self._runner = runner
        self._elsewhere = elsewhere
        self._step: Step | None = None
        self._publishes = _is_one_graph(runner) and runner.capture_forward_mode.is_decode()

    def take(self, slot: int, ids: torch.Tensor) -> None:
        """Hold a layer's ids; behind the last one, record the publishing."""
        if not self._publishes:
            self._elsewhere(slot, ids)
            return
        if slot == 0:
            self._step = Step(len(self._tap.layers))
            graphs.mark_beginning(self._step)
        step = self._step
        if step is None:
            raise EngineHookError(f"layer {self._tap.layers[slot]} is the first of a decode graph")
        ids = ids[graph_rows(self._runner.model_runner, len(ids))]
        step.experts[slot] = ids
        if slot == len(self._tap.layers) - 1:
            buffers, num_rows = self._runner.buffers, len(ids)
            self._step = None
            self.recorded = graphs.record(
                self._tap,
                step,
                num_rows,
                token_ids=buffers.input_ids[:num_rows],
                positions=buffers.positions[:num_rows],
                kv_slots=buffers.out_cache_loc[:num_rows] if self._slots else None,
            )


def _is_one_graph(runner: Any) -> bool:
    """Whether a captured decode step is a single CUDA graph, rather than several with Python between them."""
    backend = getattr(runner, "backend", None)
    if backend is not None:
        return type(backend).__name__ == "FullCudaGraphBackend"
    return os.environ.get("SGLANG_USE_BREAKABLE_CUDA_GRAPH", "").lower() not in ("1", "true", "yes")
