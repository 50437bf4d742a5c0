"""Whose rows a batch of SGLang holds: which positions of which requests, and where a request begins from the cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from expert_lens.engines.names import RequestNames, next_number

if TYPE_CHECKING:
    from expert_lens.tap import Tap
    from expert_lens.types import EndState, Phase, Span

__all__ = ["Requests"]


HEALTH_CHECK = "HEALTH_CHECK"
"""How the ids of requests begin that a server sends to itself to see whether it lives: they are nobody's."""


class _Request:
    __slots__ = ("end", "id", "number", "prompt_tokens", "req", "running")

    def __init__(self, request_id: str, number: int, prompt_tokens: int, req: Any) -> None:
        self.number = number
        self.id = request_id
        self.req = None if req is None else weakref.ref(req)
        """SGLang's own, where it was seen: an id may come again while the one before was never said to have ended."""
        self.prompt_tokens = prompt_tokens
        self.end = 0
        """How many positions its extends have reached, or it had when it was retracted."""
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
        self._retracted: set[str] = set()
        self._ended: set[str] = set()
        """Those that have ended since the last forward: the next one may have been put together before, and run over
        them once more, which gives rows of nobody.
        """
        self.decoding: list[str] | None = None
        """The rids of the last decode batch, if nothing has changed since."""
        self._width = 1
        self.spans: list[Span] = []
        """Of that batch, whose requests have `_width` rows each."""

    def admit(self, reqs: Iterable[Any]) -> None:
        """Learn how long the prompts of a batch's requests are."""
        for req in reqs:
            known = self._live.get(req.rid)
            if known is not None and known.req is not None and known.req() is not req:
                self._end(req.rid, known.end, "aborted")
                known = None
            if known is None:
                self._add(req.rid, len(req.origin_input_ids), req)
        self._sweep()

    def _sweep(self) -> None:
        """End requests that were retracted and then given up while they waited, of which SGLang says no more."""
        for rid in [rid for rid in self._retracted if (req := self._live[rid].req) is not None and req() is None]:
            self._end(rid, self._live[rid].end, "aborted")

    def decode(self, batch: Any, width: int = 1) -> list[Span]:
        """The spans of a decode step, `width` rows a request; the same list as long as the batch stays the same."""
        if batch.rids != self.decoding or width != self._width:
            live = self._live
            self.spans = [
                self._span(live.get(rid) or self._unknown(rid, batch, at), at * width, width, "decode")
                for at, rid in enumerate(batch.rids)
            ]
            self.decoding, self._width = list(batch.rids), width
            self._ended.clear()
        return self.spans

    def extend(self, batch: Any) -> list[Span]:
        """The spans of a forward of prompts or parts of them; requests that decode in it have one row."""
        spans: list[Span] = []
        row = 0
        for rid, start, length in zip(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True):
            request = self._live.get(rid) or self._nobody(rid) or self._add(rid, start + length)
            if not request.running:
                request.running = True
                self._retracted.discard(rid)
            request.end = start + length
            if length:
                phase: Phase = "prefill" if start < request.prompt_tokens else "decode"
                spans.append(self._span(request, row, length, phase))
            row += length
        self._ended.clear()
        return spans

    def from_cache(self, batch: Any) -> list[tuple[int, Span]]:
        """Of requests that begin, or begin again, in this forward with a prefix from the cache: their place in the
        batch, and the span of that prefix, one behind the other.
        """
        found: list[tuple[int, Span]] = []
        row = 0
        for index, (rid, start) in enumerate(zip(batch.rids, batch.extend_prefix_lens_cpu, strict=True)):
            request = self._live.get(rid)
            if request is not None and request.number and not request.running and start:
                found.append((index, self._span(request, row, start, "prefill")))
                row += start
        return found

    def release(self, req: Any) -> None:
        """A request gave its KV slots back: it has ended, or was retracted and will begin again."""
        self._sweep()
        request = self._live.get(req.rid)
        if request is None or (request.req is not None and request.req() is not req):
            return
        reason = req.finished_reason
        if reason is None:
            # Be it that it will be aborted: it may wait for another turn before that, or be dropped without a word.
            request.running = False
            if req.output_ids:
                request.end = len(req.origin_input_ids) + len(req.output_ids) - 1
            self._retracted.add(req.rid)
            return
        # A step that overlapped the end may have run past it, and one over drafted tokens may have given more of them.
        positions = len(req.origin_input_ids) + max(len(req.output_ids_through_stop), 1) - 1
        aborted = type(reason).__name__ == "FINISH_ABORT"
        if aborted and not req.output_ids:
            positions = request.end
        self._end(req.rid, positions, "aborted" if aborted else "finished")

    def _end(self, rid: str, positions: int, state: EndState) -> None:
        request = self._live.pop(rid)
        if self._tap.active:  # else no forward comes by any more that would clear it
            self._ended.add(rid)
        self._retracted.discard(rid)
        self.decoding = None
        if request.number:
            self._tap.finish(request.number, request.id, positions, state)

    def _nobody(self, rid: str) -> _Request | None:
        """Whose a row of a request is that has ended already; None if it has not."""
        return _Request("", 0, 0, None) if rid in self._ended else None

    def _unknown(self, rid: str, batch: Any, at: int) -> _Request:
        """The request at that place of a decode step of which nothing was said before, as where prompts are computed
        elsewhere: what it had then was its prompt, where the engine's CPU knows how much that is.
        """
        lengths = batch.seq_lens_cpu
        return self._nobody(rid) or self._add(rid, 0 if lengths is None else int(lengths[at]) - 1)

    def _add(self, rid: str, prompt_tokens: int, req: Any = None) -> _Request:
        nobody = rid.startswith(HEALTH_CHECK)
        name, number = ("", 0) if nobody else (self._names.unique(rid), next_number())
        request = self._live[rid] = _Request(name, number, prompt_tokens, req)
        self.decoding = None  # the id may be in it, of a request before
        return request

    def _span(self, request: _Request, row: int, rows: int, phase: Phase) -> Span:
        return (request.number, request.id, row, rows, request.prompt_tokens, phase)
