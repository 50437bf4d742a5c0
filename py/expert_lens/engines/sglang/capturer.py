"""The capturer: stands in for SGLang's own, which every MoE layer calls, and goes on calling it.

Where the ids of a forward come from depends on how SGLang runs it:

* eager: each layer hands over its ids; they are packed when the forward ends (`tap`).
* a decode CUDA graph: captured once a batch size with our kernels beside what comes behind the last layer's choice, or
  behind the forward (`graphs_fork`); each replay publishes by itself (`graphs`).
* other graphs and compiled code, mostly of prefill: no line of Python runs in them, so while they are captured or
  traced the ids' copy into a static buffer becomes part of them, and the forward's end publishes from there.

All of it is called on the scheduler's thread, with the forward's stream as the current one.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from expert_lens import graphs
from expert_lens.engines.sglang.layout import Layout, captured_rows, eager_rows, graph_rows, graphs_fork
from expert_lens.engines.sglang.requests import Requests
from expert_lens.engines.sglang.static import StaticExperts, silence
from expert_lens.errors import EngineHookError
from expert_lens.graphs import GraphStep, ReplayRows
from expert_lens.steps import Rows, Step
from expert_lens.streams import sent
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens.types import Span

__all__ = ["Capturer"]

log = logging.getLogger(__name__)

UNTOLD = "of sequences that are no requests by name, as in a beam search"


class Capturer:
    """In place of the capturer `native`, which may be None; for the target model that `runner` runs.

    `max_rows`: of the largest forward that is no decode graph. `slots`: whether to tell KV slots, and of requests that
    begin from the cache where.
    """

    def __init__(self, runner: Any, native: Any, tap: Tap, layout: Layout, *, max_rows: int, slots: bool) -> None:
        self.native = native
        self.requests = Requests(tap)
        self.tap = tap
        self._layout = layout
        self._runner = runner
        self._slots = slots
        self._on_gpu = runner.device == "cuda"
        self._layer_slots = {layer: slot for slot, layer in enumerate(tap.layers)}
        self._static = StaticExperts(tap, max_rows, runner.device)
        self._batch: Any = None
        """The batch whose forward is running, until its rows are published."""
        self._begun = False
        """Whether a layer has handed over ids of it."""
        self._drafted: _Drafted | None = None
        """A forward over drafted tokens that are not judged yet."""
        self._replayed: ReplayRows | None = None
        self._decode_graph: _DecodeGraph | None = None
        """The decode graph that is just being captured."""
        self._recording = _Layers(tap)
        """Of another graph that is just being captured."""
        self._serves = False
        """Whether the first prompt has come."""
        self._said: set[str] = set()
        """Why rows of some forwards are lost, as the log has it."""

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
        if ids.shape[1] != self.tap.top_k:
            ids = ids[:, : self.tap.top_k]
        if torch.compiler.is_compiling():  # nothing may be asked here that changes: it would be compiled anew
            if self._layout.attn_dp_size == 1:
                self._static.write(slot, ids)
        elif not self.tap.active:
            return
        elif self._decode_graph is not None:
            if torch.cuda.is_current_stream_capturing():  # else it warms up
                self.tap.guard(self._decode_graph.take, slot, ids)
        elif self._on_gpu and torch.cuda.is_current_stream_capturing():
            self.tap.guard(self._record_static, slot, ids)
        elif self._batch is not None:
            if not self._begun:
                self._begun = True
                self.tap.begin()
            self.tap.layer(slot, ids)

    def on_forward_end(
        self, forward_batch: Any, can_run_graph: bool, cuda_graph_batch: int | None, no_copy_to_cpu: bool = False
    ) -> Any:
        """The target model's forward is enqueued: publish its rows, if it was no decode graph, which does by itself."""
        if self._batch is not None:
            self._end(can_run_graph)
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
        self.tap.close()
        if self.native is not None:
            self.native.destroy()

    def __getattr__(self, name: str) -> Any:
        native = self.__dict__.get("native")
        if native is None:
            raise AttributeError(f"SGLang's own capture is off, so there is no {name!r}")
        return getattr(native, name)

    # ---- what the hooks call ----

    def run(self, forward: Callable[..., Any], forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the target model's forward over this batch.

        What is called between two steps of an engine finds nothing of it in the processor's caches, and each function
        more takes a microsecond there: so this one, `_replay` and `on_forward_end` call none that a step by graph, of
        a batch that goes on, can do without.
        """
        if self._begun:  # a forward before it has raised
            self._begun = False
            self.tap.end()
        self._batch = forward_batch
        try:
            if forward_batch.extend_prefix_lens_cpu is not None or self._drafted is not None:
                self._begin_prompts(forward_batch)
        except Exception as error:
            self.tap.fail(error)
        return forward(forward_batch, *args, **kwargs)

    def _begin_prompts(self, batch: Any) -> None:
        if not self._serves:  # what was compiled or captured has run, for nobody
            self._serves = True
            self._static.empty()
        if self._drafted is not None:  # nobody has judged them
            self.tap.lose(len(self._drafted.experts))
            self._drafted = None
        if self._slots and self.tap.active and batch.forward_mode.name in ("EXTEND", "MIXED") and _is_told(batch):
            self._publish_prefixes(batch)

    def accept(self, accepted: torch.Tensor) -> None:
        """Drafted tokens are judged: publish the rows of the accepted ones.

        `accepted`: which of the batch's rows, [B, width], -1 behind those that a request has. Accepted or not is known
        to the GPU alone, so all have a place, and those that were rejected get no position.
        """
        drafted, self._drafted = self._drafted, None
        if drafted is None or not accepted.numel():
            return
        width = accepted.shape[1]
        flat = accepted.flatten().to(torch.int64)
        rows = flat.clamp(min=0)
        # Accepted tokens are moved to the front of their request's slots.
        slots = drafted.slots.view(len(accepted), -1)[:, :width].flatten()
        self._publish_rows(
            drafted.experts.index_select(0, rows),
            self.requests.decode(drafted.batch, width),
            torch.where(flat < 0, -1, drafted.positions.index_select(0, rows)),
            drafted.batch.input_ids.index_select(0, rows),
            slots,
        )

    @contextmanager
    def capturing(self, runner: Any, size: int, forward: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
        """Around the warm-ups and the capture of a decode graph of `size` requests by SGLang's `runner`.

        Gives what is to be run in place of `forward`, the model's.
        """

        @wraps(forward)  # SGLang looks at its signature, for what to call it with
        def run(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if self._decode_graph is not None:
                self.tap.guard(self._decode_graph.end)
            return result

        self.tap.guard(self._begin_capture, runner, size)
        try:
            yield run
        except BaseException:
            if self._decode_graph is not None and self._decode_graph.recorded is not None:
                self._decode_graph.recorded.give_up()
            raise
        finally:
            self._decode_graph = None

    def _begin_capture(self, runner: Any, size: int) -> None:
        args = self._runner.server_args
        self._decode_graph = _DecodeGraph(self.tap, runner, args, size, self._layout, self._slots, self._static)

    def follow(self, graph: Any) -> None:
        """Have replays of the decode graph that was captured publish; inside of `capturing`.

        Raises EngineHookError if `graph` is none: what was recorded would publish where nobody counts it.
        """
        recorded = None if self._decode_graph is None else self._decode_graph.recorded
        if recorded is None:
            return
        if not isinstance(graph, torch.cuda.CUDAGraph):
            raise EngineHookError(
                f"where SGLang keeps its decode graphs there is {type(graph).__name__}, and no CUDAGraph"
            )
        recorded.attach_to(graph)
        reference: Callable[[], Any] = weakref.ref(graph)  # what hangs on the graph must not keep it
        original = type(graph).replay

        def launch() -> None:
            original(reference())

        graph.replay = partial(self._replay, recorded, launch)  # type: ignore[method-assign]

    # ---- the rest ----

    def _replay(self, recorded: GraphStep, launch: Callable[[], None]) -> None:
        batch, rows, requests = self._batch, self._replayed, self.requests
        self._batch = None
        try:
            if batch is None:
                rows = None
            elif (
                rows is None
                or rows.spans is not requests.spans
                or batch.rids is None
                or batch.rids != requests.decoding
                or batch.batch_size != rows.num_rows
            ):
                rows = self._replayed = self._rows_of_replay(batch)
        except Exception as error:
            rows = None
            self.tap.fail(error)
        recorded.replay(launch, rows)

    def _rows_of_replay(self, batch: Any) -> ReplayRows | None:
        if not self.tap.active or not batch.batch_size:  # a rank that is idle replays the others' graph
            return None
        if not _is_told(batch):
            self._lose(batch.batch_size, UNTOLD)
            return None
        spans = self.requests.decode(batch)
        return ReplayRows(spans, len(spans))

    def _record_static(self, slot: int, ids: torch.Tensor) -> None:
        """Record, in a graph of prompts that is being captured, what the forward's end is to find."""
        num_rows = len(ids) if self._layout.attn_dp_size == 1 else captured_rows()
        if num_rows is None:
            return
        step = self._recording.add(slot, ids[graph_rows(len(ids), num_rows, self._layout)])
        if step is not None:
            self._static.record(step)
            self._static.cut_modes.update(("EXTEND", "MIXED"))

    def _end(self, in_graph: bool) -> None:
        """Publish the rows of the forward that has run, which no graph has published."""
        batch, self._batch = self._batch, None
        step = self.tap.end() if self._begun else None
        self._begun = False
        if self.tap.active:
            self.tap.guard(self._publish, batch, step, in_graph)
            if step is None:  # be its rows published or lost: they are none of the next forward's
                self.tap.guard(self._static.empty)

    def _publish(self, batch: Any, step: Step | None, in_graph: bool) -> None:
        mode = batch.forward_mode.name
        if mode == "IDLE" or not batch.batch_size:
            return
        num_slots = batch.out_cache_loc.shape[0]
        if mode not in ("DECODE", "EXTEND", "MIXED", "TARGET_VERIFY"):
            self._lose(num_slots, f"in mode {mode}, which it does not know")
            return
        if not _is_told(batch):
            self._lose(num_slots, UNTOLD)
            return
        if step is None and self._layout.attn_dp_size > 1 and mode not in self._static.cut_modes:
            if not in_graph:
                raise silence(self.tap.layers, f"a forward in mode {mode} that ran in no graph")
            self._lose(
                num_slots,
                f"in mode {mode} that ran in compiled code, or in a graph of ranks with unlike rows, where the rows of "
                f"{self._layout.attn_dp_size} data-parallel ranks cannot be told apart. Start without graphs of "
                "prefill, and without --enable-torch-compile",
            )
            return
        if mode == "TARGET_VERIFY":
            num_rows = len(batch.rids) * int(batch.spec_info.draft_token_num)
            if len(batch.positions) < num_rows:
                self._lose(num_slots, "over drafted tokens, of which some requests have fewer than others, or none")
                return
            experts, positions = self._experts(batch, step, num_rows)
            self._drafted = _Drafted(batch, experts, positions, batch.out_cache_loc[:num_rows])
            return
        spans = self.requests.decode(batch) if mode == "DECODE" else self.requests.extend(batch)
        if not spans:
            return
        num_rows = spans[-1][2] + spans[-1][3]  # what is behind them pads
        experts, positions = self._experts(batch, step, num_rows)
        self._publish_rows(experts, spans, positions, batch.input_ids[:num_rows], batch.out_cache_loc[:num_rows])

    def _lose(self, num_rows: int, which: str) -> None:
        """Count the rows of such a forward as dropped, and say so once."""
        if which not in self._said:
            self._said.add(which)
            log.warning("expert_lens: these rows count as dropped: of forwards %s.", which)
        self.tap.lose(num_rows)

    def _publish_rows(
        self,
        experts: torch.Tensor,
        spans: list[Span],
        positions: torch.Tensor,
        token_ids: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        kv_slots = slots.to(torch.int32) if self._slots else None
        self.tap.publish(experts, None, Rows(spans, positions.to(torch.int32), token_ids, kv_slots=kv_slots))

    def _experts(self, batch: Any, step: Step | None, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed experts [n, L, K] and positions [n] of this process's rows of the forward that has just run."""
        positions = batch.positions[:num_rows]
        if step is not None:
            first = step.experts[0]
            if first is None:
                raise silence(self.tap.silent_layers(step), f"a forward in mode {batch.forward_mode.name}")
            begin = eager_rows(len(first), len(batch.input_ids), batch.global_num_tokens_cpu, self._layout)
            experts, _ = self.tap.pack(step, len(first), slice(begin, begin + num_rows))  # others may hold anything
        else:
            experts, there = self._static.take(num_rows, batch.forward_mode.name)
            if len(positions) == num_rows:
                positions = torch.where(there, positions, -1)
        if len(experts) != num_rows or len(positions) != num_rows:
            raise EngineHookError(
                f"a forward in mode {batch.forward_mode.name} of {num_rows} tokens gave experts of {len(experts)} and "
                f"{len(positions)} positions"
            )
        return experts, positions

    def _publish_prefixes(self, batch: Any) -> None:
        """Tell where the beginnings of requests stand in the cache, which this forward does not compute again.

        Before the forward: behind it, the scheduler may already have given `req_to_token` other slots.
        """
        if not (found := self.requests.from_cache(batch)):
            return
        table = self._runner.req_to_token_pool.req_to_token
        places = sent(np.array([place for place, _ in found], np.intp), table.device)
        rows = batch.req_pool_indices.index_select(0, places)
        longest = max(span[3] for _, span in found)
        slots = table[:, :longest].index_select(0, rows)
        joined = torch.cat([slots[i, : span[3]] for i, (_, span) in enumerate(found)])
        self.tap.publish_prefix([span for _, span in found], joined.to(torch.int32))


def _is_told(batch: Any) -> bool:
    """Whether each sequence of the batch is a request by name."""
    return bool(batch.rids) and len(batch.rids) == batch.batch_size


class _Drafted(NamedTuple):
    """A forward over drafted tokens: experts [n, L, K], positions [n] and KV slots [n]."""

    batch: Any
    experts: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor


class _Layers:
    """What the layers of a graph hand over while it is captured, the first one first."""

    def __init__(self, tap: Tap, *, marks: bool = False) -> None:
        self._layers = tap.layers
        self._marks = marks
        self._step: Step | None = None

    def add(self, slot: int, ids: torch.Tensor) -> Step | None:
        """The whole step, if this was the last layer of it."""
        if slot == 0:
            self._step = Step(len(self._layers))
            if self._marks:
                self._step.mark_beginning()
        step = self._step
        if step is None:
            raise EngineHookError(f"layer {self._layers[slot]} is the first of a graph that is captured")
        if step.experts[slot] is not None:
            raise EngineHookError(f"layer {self._layers[slot]} has chosen twice in a graph that is captured")
        step.experts[slot] = ids
        if slot < len(self._layers) - 1:
            return None
        if self._marks:
            step.mark_chosen()
        self._step = None
        return step

    def unfinished(self) -> Step | None:
        """What was handed over of a forward whose last layer has handed over nothing."""
        step, self._step = self._step, None
        return step


class _DecodeGraph:
    """A decode graph while it is captured, of `size` requests."""

    def __init__(
        self, tap: Tap, runner: Any, args: Any, size: int, layout: Layout, slots: bool, static: StaticExperts
    ) -> None:
        self.recorded: GraphStep | None = None
        self._tap = tap
        self._buffers = runner.buffers
        width = getattr(runner, "num_tokens_per_bs", None) or getattr(runner, "captured_req_width", None) or 1
        self._num_rows = size * int(width)
        self._layout = layout
        self._slots = slots
        self._static = static
        self._mode: str = runner.capture_forward_mode.name
        self._publishes = _is_one_graph(runner) and runner.capture_forward_mode.is_decode()
        # A branch of ours among many others would make all of them slower, by more than it hides.
        self._layers = _Layers(tap, marks=self._publishes and not graphs_fork(layout, args))
        self._step: Step | None = None
        """All layers' ids, to be published beside the rest of the forward."""

    def take(self, slot: int, ids: torch.Tensor) -> None:
        """Hold a layer's ids; where several graphs make a forward, record a copy behind the last one."""
        step = self._layers.add(slot, ids[graph_rows(len(ids), self._num_rows, self._layout)])
        if self._publishes:
            self._step = step
        elif step is not None:
            self._static.record(step)
            self._static.cut_modes.add(self._mode)

    def end(self) -> None:
        """The forward is over: record its publishing, if it was one that is captured.

        Raises SilentTapError if some layers have handed over their ids, and the last one has not.
        """
        if (unfinished := self._layers.unfinished()) is not None:
            raise silence(self._tap.silent_layers(unfinished), "a forward that was captured in a decode graph")
        step, self._step = self._step, None
        if step is None:
            return
        buffers, num_rows = self._buffers, self._num_rows
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
