"""Following continuous batching (`generate_batch`): whose tokens a packed forward holds, and which requests have ended.

A forward gets one row [1, T] of many requests' tokens, one after another. Which, is read from the engine's own list
of the batch (`inputs_and_outputs.requests_in_batch`), positions and ids from the tensors that the model gets.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from expert_lens.engines.transformers.requests import RequestNames, next_number
from expert_lens.errors import EngineHookError
from expert_lens.tap import Rows, Tap

if TYPE_CHECKING:
    from expert_lens.types import Phase, Span

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
        self.patched: set[int] = set()


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
        self._managers = [known for known in self._managers if known.ref() is not None]
        known = next((known for known in self._managers if known.ref() is manager), None)
        if known is None:
            known = _Manager(manager, name)
            self._managers.append(known)
            self._follow_results(known, manager)
        else:
            known.prefix = "" if name is None else f"{name}."

    def rows(self, model: Any, inputs: dict[str, Any]) -> Rows | None:
        """The rows of a packed forward with these keyword arguments; None if none belong to a request (a warm-up).

        Raises EngineHookError if the batch is of no manager known here, or is not laid out as expected.
        """
        known, processor = self._find(model, inputs["cache"])
        self._follow_scheduler(known, processor.scheduler)
        io = processor.inputs_and_outputs
        if hasattr(io, "io_pairs"):  # asynchronous batching: two batches take turns
            io = io.io_pairs[io.current_pair].host_io
        active = processor.scheduler.active_requests
        positions = inputs["position_ids"].numpy().reshape(-1)
        spans: list[Span] = []
        kept: list[np.ndarray[Any, Any]] = []
        start = first_row = 0
        for future in io.requests_in_batch:
            state, length = future.state, future.query_length
            if active.get(state.request_id) is state:  # a warm-up's requests are not active
                request = known.requests.get(state.request_id)
                if request is None:
                    request = _Request(self._names.unique(known.prefix + state.request_id))
                    known.requests[state.request_id] = request
                prompt_tokens = state._true_initial_tokens or len(state.initial_tokens)
                phase: Phase = "prefill" if positions[start] < prompt_tokens else "decode"
                spans.append((request.number, request.id, first_row, length, prompt_tokens, phase))
                request.next_position = int(positions[start + length - 1]) + 1
                kept.append(np.arange(start, start + length))
                first_row += length
            start += length
        self._check_layout(io.requests_in_batch, inputs, start)
        if not spans:
            return None
        index = np.concatenate(kept)
        whole = len(index) == len(positions)
        return Rows(spans, positions[index].astype(np.uint32), inputs["input_ids"], None if whole else index)

    def close(self) -> None:
        """State the end of what is still running."""
        for known in self._managers:
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

    def _check_layout(self, batch: list[Any], inputs: dict[str, Any], num_tokens: int) -> None:
        ends = inputs["cu_seq_lens_q"]
        if len(ends) <= len(batch) or int(ends[len(batch)]) != num_tokens:
            raise EngineHookError(
                f"a continuous batching forward holds {ends.tolist()} (cumulated tokens), but its list of requests "
                f"says {num_tokens}: this release of transformers is not known to expert_lens."
            )

    def _follow_results(self, known: _Manager, manager: Any) -> None:
        def deliver(original: Callable[[Any], Any], output: Any) -> Any:
            self._guard(self._ended, known, [output])
            return original(output)

        def deliver_batch(original: Callable[[Any], Any], outputs: list[Any]) -> Any:
            self._guard(self._ended, known, outputs)
            return original(outputs)

        self._patch(manager.output_router, "deliver", deliver)
        self._patch(manager.output_router, "deliver_batch", deliver_batch)

    def _follow_scheduler(self, known: _Manager, scheduler: Any) -> None:
        """A cancelled request gives no result; only the scheduler knows."""
        if id(scheduler) in known.patched:
            return

        def clear_cancelled_requests(original: Callable[[], Any]) -> Any:
            states = original()
            self._guard(self._cancelled, known, states)
            return states

        self._patch(scheduler, "clear_cancelled_requests", clear_cancelled_requests)
        known.patched.add(id(scheduler))

    def _ended(self, known: _Manager, outputs: list[Any]) -> None:
        for output in outputs:
            if not output.is_finished() or (request := known.requests.get(output.request_id)) is None:
                continue
            if output.error is None:
                # An asynchronous batch may have run one token past the end.
                request.next_position = len(output.prompt_ids) + len(output.generated_tokens) - 1
            self._finish(known, output.request_id, "finished" if output.error is None else "aborted")

    def _cancelled(self, known: _Manager, states: list[Any]) -> None:
        for state in states:
            if state.request_id in known.requests:
                self._finish(known, state.request_id, "aborted")

    def _finish(self, known: _Manager, request_id: str, state: Literal["finished", "aborted"]) -> None:
        request = known.requests.pop(request_id)
        self._tap.finish(request.number, request.id, request.next_position, state)

    def _guard(self, function: Callable[[_Manager, list[Any]], None], known: _Manager, values: list[Any]) -> None:
        """Call ours inside the engine's thread: an error of ours must not become one of the engine's."""
        try:
            function(known, values)
        except Exception as error:
            self._tap.fail(error)
