"""Following continuous batching (`generate_batch`): whose tokens a packed forward holds, and which requests have ended.

A forward gets one row [1, T] of many requests' tokens, one after another, and padding behind them. Which, is read from
the engine's own list of the batch (`inputs_and_outputs.requests_in_batch`), positions from its states. With CUDA graphs
the engine keeps a graph for each shape of a batch: captured with our publishing in it, which reads positions where the
engine puts them, and replayed through it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import numpy as np

from expert_lens.engines.names import RequestNames, next_number
from expert_lens.errors import EngineHookError
from expert_lens.graphs import GraphStep, ReplayRows, record
from expert_lens.steps import U32, Rows, Step
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens.types import EndState, Phase, Span

__all__ = ["ContinuousBatches"]


class _Request:
    """A request of which rows were published and whose end was not."""

    __slots__ = ("id", "next_position", "number")

    def __init__(self, request_id: str) -> None:
        self.number = next_number()
        self.id = request_id
        self.next_position = 0


class _Manager:
    """One continuous batching manager of the model: its live requests, by the engine's ids."""

    def __init__(self, manager: Any, name: str | None) -> None:
        self.ref = weakref.ref(manager)
        self.prefix = "" if name is None else f"{name}."
        self.requests: dict[str, _Request] = {}
        self.followed: weakref.WeakSet[Any] = weakref.WeakSet()
        self.recorded: GraphStep | None = None
        """What was recorded in the graph that is just being captured."""
        self.decoding: _Decoding | None = None
        """The batch of the last forward, if each of its requests decoded one token in it."""

    def give_up_recorded(self) -> None:
        """What was recorded last is on no graph, and will be on none: its capture has failed."""
        recorded, self.recorded = self.recorded, None
        if recorded is not None:
            recorded.give_up()

    def settle(self) -> None:
        """Note how far the requests of the last forward have come."""
        decoding, self.decoding = self.decoding, None
        if decoding is not None:
            for request, position in zip(decoding.requests, decoding.ends().tolist(), strict=True):
                request.next_position = position


class _Decoding:
    """A batch whose requests each decode one token: as long as it stays the same, so do its spans."""

    __slots__ = ("num_more", "replayed", "requests", "spans", "start", "states")

    def __init__(self, states: list[Any], requests: list[_Request], spans: list[Span], start: U32) -> None:
        self.states = states
        self.requests = requests
        self.spans = spans
        self.start = start
        """Positions of the first step; `num_more` steps came behind it."""
        self.num_more = 0
        self.replayed = ReplayRows(spans, len(spans))

    def goes_on(self, batch: list[Any], num_tokens: int) -> bool:
        """Whether the batch that is prepared, of so many tokens, is one more of each request, and nothing else."""
        states = self.states
        return num_tokens == len(batch) == len(states) and all(map(is_, map(_state, batch), states))

    def advance(self) -> U32 | None:
        """The positions of the next tokens, if the engine has counted just those."""
        positions = self.ends()
        counted = np.fromiter(map(_position_offset, self.states), np.uint32, len(self.states))
        if not np.array_equal(counted, positions + np.uint32(1)):
            return None
        self.num_more += 1
        return positions

    def ends(self) -> U32:
        """Behind the position of each request's last token."""
        return self.start + np.uint32(self.num_more + 1)


_state, _position_offset = attrgetter("state"), attrgetter("position_offset")


class ContinuousBatches:
    """The continuous batching managers of one model.

    `names` keeps the ids of requests apart: the engine begins its own anew with every manager. `patch` wraps a
    method of an engine's object for as long as the capture is attached.
    """

    def __init__(self, tap: Tap, names: RequestNames, patch: Callable[[Any, str, Callable[..., Any]], None]) -> None:
        self._tap = tap
        self._names = names
        self._patch = patch
        self._managers: list[_Manager] = []

    def add(self, manager: Any, name: str | None) -> None:
        """Follow a manager; its requests are `"{name}.{id}"` if it was made under a name, else the engine's own ids.

        An id that an earlier request has gets `#2`, `#3`, ... appended.

        Raises EngineHookError if its parts are not where they are looked for.
        """
        for gone in (each for each in self._managers if each.ref() is None):
            gone.give_up_recorded()
        self._managers = [known for known in self._managers if known.ref() is not None]
        known = next((known for known in self._managers if known.ref() is manager), None)
        if known is None:
            known = _Manager(manager, name)
            self._managers.append(known)
            self._follow_results(known, manager)
            self._follow_processors(known, manager)
        else:
            known.prefix = "" if name is None else f"{name}."

    def publish(self, model: Any, inputs: dict[str, Any], step: Step) -> None:
        """Publish the rows of a packed forward with these keyword arguments.

        Raises EngineHookError if the batch is of no manager known here, or is not laid out as expected.
        """
        known, processor = self._find(model, inputs["cache"])
        tokens = inputs["input_ids"]
        rows = self._rows(known, processor, tokens)
        if rows is not None:
            self._tap.publish(*self._tap.pack(step, tokens.shape[1]), rows)

    def record(self, model: Any, inputs: dict[str, Any], step: Step) -> None:
        """Record the publishing of a packed forward that is being captured in a CUDA graph.

        Raises EngineHookError as `publish`, and what `graphs.record` raises.
        """
        known, _ = self._find(model, inputs["cache"])
        tokens, positions = inputs["input_ids"], inputs["position_ids"]
        known.give_up_recorded()
        known.recorded = record(self._tap, step, tokens.shape[1], token_ids=tokens, positions=positions)

    def _rows(self, known: _Manager, processor: Any, tokens: Any) -> Rows | None:
        """The rows of the coming forward; None if none belong to a request (a warm-up).

        `tokens`: what it runs over, [1, T] with padding; None if that stands elsewhere.
        """
        io = _current_inputs(processor)
        batch = io.requests_in_batch
        decoding = known.decoding
        if decoding is not None and decoding.goes_on(batch, io.total_seqlen_q):
            next_positions = decoding.advance()
            if next_positions is not None:
                self._check_layout(io, tokens, len(batch))
                return Rows(decoding.spans, next_positions, tokens)
        known.settle()
        active = processor.scheduler.active_requests
        states: list[Any] = []
        requests: list[_Request] = []
        spans: list[Span] = []
        positions: list[range] = []
        kept: list[range] = []
        start = first_row = 0
        for future in batch:
            state, length = future.state, future.query_length
            if active.get(state.request_id) is state:  # a warm-up's requests are not active
                request = known.requests.get(state.request_id)
                if request is None:
                    request = _Request(self._names.unique(known.prefix + state.request_id))
                    known.requests[state.request_id] = request
                prompt_tokens = state._true_initial_tokens or len(state.initial_tokens)
                end = state.position_offset  # the engine has counted the batch already
                phase: Phase = "prefill" if end - length < prompt_tokens else "decode"
                spans.append((request.number, request.id, first_row, length, prompt_tokens, phase))
                request.next_position = end
                states.append(state)
                requests.append(request)
                positions.append(range(end - length, end))
                kept.append(range(start, start + length))
                first_row += length
            start += length
        self._check_layout(io, tokens, start)
        if not spans:
            return None
        whole = first_row == start
        columns = _join(positions, np.uint32)
        if whole and all(span[3] == 1 and span[5] == "decode" for span in spans):
            known.decoding = _Decoding(states, requests, spans, columns)
        return Rows(spans, columns, tokens, None if whole else _join(kept, np.intp))

    def _check_layout(self, io: Any, tokens: Any, num_tokens: int) -> None:
        if io.total_seqlen_q != num_tokens or (tokens is not None and tokens.shape[1] < num_tokens):
            raise EngineHookError(
                f"a continuous batching forward holds {io.total_seqlen_q} tokens in "
                f"{'?' if tokens is None else tokens.shape[1]} places, but its list of requests says {num_tokens}: "
                "this release of transformers is not known to expert_lens."
            )

    def close(self) -> None:
        """State the end of what is still running."""
        for known in self._managers:
            known.settle()
            for request_id in list(known.requests):
                self._finish(known, request_id, "aborted")

    def _find(self, model: Any, cache: Any) -> tuple[_Manager, Any]:
        """The manager, and its batch processor, whose cache this is."""
        kept = vars(model).get("_cached_continuous_batching_manager")  # made before we were attached
        if kept is not None and all(known.ref() is not kept for known in self._managers):
            self.add(kept, None)
        for known in self._managers:
            processor = getattr(known.ref(), "batch_processor", None)
            if processor is not None and processor.cache is cache:
                return known, processor
        raise EngineHookError(
            "a continuous batching forward came from no manager made while expert_lens was attached. Attach before "
            "the call of generate_batch or init_continuous_batching."
        )

    def _follow_processors(self, known: _Manager, manager: Any) -> None:
        """The manager makes its batch processor, which owns scheduler and graphs, when it starts."""

        def create(original: Callable[[], Any]) -> Any:
            processor = original()
            self._tap.guard(self._follow_processor, known, processor)
            return processor

        self._patch(manager, "_create_batch_processor", create)
        if getattr(manager, "batch_processor", None) is not None:
            self._follow_processor(known, manager.batch_processor)

    def _follow_processor(self, known: _Manager, processor: Any) -> None:
        if processor in known.followed:
            return
        known.followed.add(processor)
        self._follow_scheduler(known, processor.scheduler)
        self._follow_graphs(known, processor)

    def _follow_graphs(self, known: _Manager, processor: Any) -> None:
        """Have graphs captured with our publishing in them, and replayed through it."""

        def get_graph(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            graph = original(*args, **kwargs)
            if graph is None or not self._tap.active:
                return graph
            recorded = getattr(graph, "expert_lens", None)
            if recorded is None or not recorded.belongs_to(self._tap):
                return None  # captured before we were attached: its replays could not be seen, so have it captured anew
            return _Replay(self, known, processor, graph, recorded)

        def set_graph(original: Callable[..., Any], graph: Any, *args: Any, **kwargs: Any) -> Any:
            recorded, known.recorded = known.recorded, None
            if recorded is not None:
                self._tap.guard(lambda _, step: step.attach_to(graph), known, recorded)
            return original(graph, *args, **kwargs)

        io = processor.inputs_and_outputs
        self._patch(io, "get_graph", get_graph)
        self._patch(io, "set_graph", set_graph)

    def replay(self, known: _Manager, processor: Any, graph: Any, recorded: GraphStep) -> None:
        """Launch a replay of one of the engine's graphs, for the batch that it has prepared."""
        rows = None
        try:
            rows = self._rows_of_replay(known, processor)
        except Exception as error:
            self._tap.fail(error)
        recorded.replay(graph.replay, rows)

    def _rows_of_replay(self, known: _Manager, processor: Any) -> ReplayRows | None:
        """As `_rows`, of a graph, which finds their positions itself: a batch that goes on has nothing new to say."""
        io = _current_inputs(processor)
        decoding = known.decoding
        if decoding is not None and decoding.goes_on(io.requests_in_batch, io.total_seqlen_q):
            decoding.num_more += 1
            return decoding.replayed
        rows = self._rows(known, processor, None)
        if rows is None:
            return None
        if rows.kept is not None:  # a graph's rows cannot be picked
            self._tap.lose(len(rows.positions))
            return None
        return ReplayRows(rows.spans, len(rows.positions)) if known.decoding is None else known.decoding.replayed

    def _follow_results(self, known: _Manager, manager: Any) -> None:
        def deliver(original: Callable[[Any], Any], output: Any) -> Any:
            self._tap.guard(self._ended, known, [output])
            return original(output)

        def deliver_batch(original: Callable[[Any], Any], outputs: list[Any]) -> Any:
            self._tap.guard(self._ended, known, outputs)
            return original(outputs)

        self._patch(manager.output_router, "deliver", deliver)
        self._patch(manager.output_router, "deliver_batch", deliver_batch)

    def _follow_scheduler(self, known: _Manager, scheduler: Any) -> None:
        """A cancelled request gives no result; only the scheduler knows."""

        def clear_cancelled_requests(original: Callable[[], Any]) -> Any:
            states = original()
            self._tap.guard(self._cancelled, known, states)
            return states

        self._patch(scheduler, "clear_cancelled_requests", clear_cancelled_requests)

    def _ended(self, known: _Manager, outputs: list[Any]) -> None:
        for output in outputs:
            if not output.is_finished() or (request := known.requests.get(output.request_id)) is None:
                continue
            if output.error is not None:
                known.settle()
            else:
                # An asynchronous batch may have run one token past the end.
                request.next_position = len(output.prompt_ids) + len(output.generated_tokens) - 1
            self._finish(known, output.request_id, "finished" if output.error is None else "aborted")

    def _cancelled(self, known: _Manager, states: list[Any]) -> None:
        if not states:  # the engine asks before each step
            return
        known.settle()
        for state in states:
            self._finish(known, state.request_id, "aborted")

    def _finish(self, known: _Manager, request_id: str, state: EndState) -> None:
        """State a request's end, unless it is no request known here, or another thread has come to the same end."""
        request = known.requests.pop(request_id, None)
        if request is not None:
            self._tap.finish(request.number, request.id, request.next_position, state)


class _Replay:
    """Given to the engine in place of its graph, for one step."""

    def __init__(
        self, batches: ContinuousBatches, known: _Manager, processor: Any, graph: Any, recorded: GraphStep
    ) -> None:
        self._of = (known, processor, graph, recorded)
        self._batches = batches

    def replay(self) -> None:
        """Replay the graph, and publish its rows."""
        self._batches.replay(*self._of)


def _current_inputs(processor: Any) -> Any:
    """The inputs of the batch that is prepared, as the host has them."""
    io = processor.inputs_and_outputs
    return io.io_pairs[io.current_pair].host_io if hasattr(io, "io_pairs") else io  # two batches take turns


def _join(ranges: list[range], dtype: Any) -> np.ndarray[Any, Any]:
    """The numbers of all ranges, one behind the other."""
    if all(len(one) == 1 for one in ranges):
        return np.array([one.start for one in ranges], dtype)
    return np.concatenate([np.arange(one.start, one.stop, dtype=dtype) for one in ranges])
