"""Whose rows a batch of SGLang holds: which positions of which requests, and where a request begins from the cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from expert_lens.engines.names import RequestNames, next_number

if TYPE_CHECKING:
    from expert_lens.tap import Tap
    from expert_lens.types import Phase, Span

__all__ = ["Requests"]


class _Request:
    __slots__ = ("end", "id", "number", "prompt_tokens", "running")

    def __init__(self, request_id: str, prompt_tokens: int) -> None:
        self.number = next_number()
        self.id = request_id
        self.prompt_tokens = prompt_tokens
        self.end = 0
        """How many positions its extends have reached."""
        self.running = False
        """Whether it has KV slots of its own: from its first extend on, until it ends or is retracted."""


class Requests:
    """The live requests of one scheduler, by SGLang's `rid`.

    An id that an earlier request had gets `#2`, `#3`, ... appended.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._names = RequestNames()
        self._live: dict[str, _Request] = {}
        self._decoding: tuple[list[str], int] | None = None
        self._spans: list[Span] = []
        """Of the last decode batch, whose rids and rows a request are `_decoding`."""

    def admit(self, reqs: Iterable[Any]) -> None:
        """Learn how long the prompts of a batch's requests are."""
        for req in reqs:
            if req.rid not in self._live:
                self._add(req.rid, len(req.origin_input_ids))

    def decode(self, batch: Any, width: int = 1) -> list[Span]:
        """The spans of a decode step, `width` rows a request; the same list as long as the batch stays the same."""
        if self._decoding is None or batch.rids != self._decoding[0] or width != self._decoding[1]:
            lengths = batch.seq_lens_cpu
            self._spans = [
                self._span(self._live.get(rid) or self._add(rid, int(lengths[at]) - 1), at * width, width, "decode")
                for at, rid in enumerate(batch.rids)
            ]
            self._decoding = list(batch.rids), width
        return self._spans

    def extend(self, batch: Any) -> list[Span]:
        """The spans of a forward of prompts or parts of them; requests that decode in it have one row."""
        spans: list[Span] = []
        row = 0
        for rid, start, length in zip(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True):
            request = self._live.get(rid) or self._add(rid, start + length)
            request.running = True
            request.end = start + length
            if length:
                phase: Phase = "prefill" if start < request.prompt_tokens else "decode"
                spans.append(self._span(request, row, length, phase))
            row += length
        return spans

    def from_cache(self, batch: Any) -> list[tuple[int, Span]]:
        """Of requests that begin, or begin again, in this forward with a prefix from the cache: their place in the
        batch, and the span of that prefix, one behind the other.
        """
        found: list[tuple[int, Span]] = []
        row = 0
        for index, (rid, start) in enumerate(zip(batch.rids, batch.extend_prefix_lens_cpu, strict=True)):
            request = self._live.get(rid)
            if request is not None and not request.running and start:
                found.append((index, self._span(request, row, start, "prefill")))
                row += start
        return found

    def release(self, req: Any) -> None:
        """A request gave its KV slots back: it has ended, or was retracted and will begin again."""
        request = self._live.get(req.rid)
        if request is None:
            return
        if not req.finished():
            request.running = False
            return
        del self._live[req.rid]
        self._decoding = None
        # A step that overlapped the end may have run one token past it.
        positions = len(req.origin_input_ids) + max(len(req.output_ids), 1) - 1
        aborted = type(req.finished_reason).__name__ == "FINISH_ABORT"
        if aborted and not req.output_ids:
            positions = request.end
        self._tap.finish(request.number, request.id, positions, "aborted" if aborted else "finished")

    def _add(self, rid: str, prompt_tokens: int) -> _Request:
        request = self._live[rid] = _Request(self._names.unique(rid), prompt_tokens)
        return request

    def _span(self, request: _Request, row: int, rows: int, phase: Phase) -> Span:
        return (request.number, request.id, row, rows, request.prompt_tokens, phase)
