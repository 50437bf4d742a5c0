"""Whose rows a batch of SGLang holds, and where a request begins from the cache, without SGLang."""

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expert_lens._core import Collector, Writer
from expert_lens.engines.sglang.requests import Requests
from expert_lens.tap import Tap

LAYERS, EXPERTS, TOP_K = 3, 16, 2
SLOTS = 4096


class FINISH_ABORT:  # noqa: N801
    """Of the name that SGLang's has."""


class Req(SimpleNamespace):
    """A request, as SGLang's scheduler has it."""

    def __init__(self, rid: str, prompt: int, outputs: int) -> None:
        super().__init__(
            rid=rid, origin_input_ids=[0] * prompt, output_ids=[], finished_reason=None, outputs=outputs, computed=0,
            slots=[],
        )  # fmt: skip

    @property
    def output_ids_through_stop(self) -> list[int]:
        return self.output_ids[: self.outputs]

    def finished(self) -> bool:
        return self.finished_reason is not None

    @property
    def length(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)


def experts_of(request: str, position: int, time: int) -> Any:
    """What the model chose: another choice each time that a position is computed."""
    return np.random.default_rng([hash(request) % 2**31, position, time]).integers(0, EXPERTS, (LAYERS, TOP_K))


class Scheduler:
    """Puts requests together as SGLang does: prompts in chunks, decodes beside them, prefixes from the cache,
    retraction, ends that are seen when the next step is put together already. It tells expert_lens through the same
    calls as the hooks, and keeps itself what each KV slot holds.
    """

    def __init__(self, tap: Tap, seed: int) -> None:
        self.tap = tap
        self.requests = Requests(tap)
        self.rng = random.Random(seed)
        self.slots = np.zeros((SLOTS, LAYERS, TOP_K), np.int64)
        self.free = list(range(SLOTS))
        self.cached: list[int] = []
        """KV slots of a sequence that the cache has, from its beginning."""
        self.time = 0
        self.live: list[Req] = []
        self.ending: list[Req] = []
        """Those that have ended, with nobody told yet."""
        self.truth: dict[str, Any] = {}

    def add(self, req: Req) -> None:
        self.live.append(req)

    def step(self) -> None:
        """One forward: of all that decode, or of prompts, or of both."""
        waiting = [req for req in self.live if req.computed < req.length - bool(req.output_ids)]
        decoding = [req for req in self.live if req not in waiting]
        if waiting:
            chosen = self.rng.sample(waiting, self.rng.randint(1, len(waiting)))
            self._extend(chosen, self.rng.sample(decoding, self.rng.randint(0, len(decoding))))
        elif decoding:
            self._decode(decoding)
        for req in list(self.live):
            if len(req.output_ids) >= req.outputs:
                if self.rng.random() < 0.3:
                    self.ending.append(req)
                else:
                    self._end(req, object())
            elif req.output_ids and self.rng.random() < 0.02:
                self._retract(req)
            elif self.rng.random() < 0.01:
                self._end(req, FINISH_ABORT())

    def _extend(self, prompts: list[Req], decodes: list[Req]) -> None:
        starts, lengths = [], []
        for req in prompts:
            if not req.computed and self.cached and self.rng.random() < 0.5:
                req.slots = self.cached[: min(len(self.cached), req.length - 1)]
                req.computed = len(req.slots)
            starts.append(req.computed)
            lengths.append(min(self.rng.randint(1, 20), req.length - req.computed))
        starts += [req.length - 1 for req in decodes]
        lengths += [1] * len(decodes)
        batch = SimpleNamespace(
            rids=[req.rid for req in (*prompts, *decodes)], extend_prefix_lens_cpu=starts, extend_seq_lens_cpu=lengths
        )
        self.requests.admit([*prompts, *decodes])
        if found := self.requests.from_cache(batch):
            places = [slot for place, span in found for slot in (*prompts, *decodes)[place].slots[: span[3]]]
            self.tap.writer.publish_prefix([span for _, span in found], np.array(places, np.uint32))
        self._see_ends()
        self._forward([*prompts, *decodes], starts, lengths, self.requests.extend(batch))

    def _decode(self, decodes: list[Req]) -> None:
        batch = SimpleNamespace(
            rids=[req.rid for req in decodes], seq_lens_cpu=torch.tensor([req.length for req in decodes])
        )
        self._see_ends()
        spans = self.requests.decode(batch)
        assert spans is self.requests.decode(batch)
        self._forward(decodes, [req.length - 1 for req in decodes], [1] * len(decodes), spans)

    def _forward(self, reqs: list[Req], starts: list[int], lengths: list[int], spans: Any) -> None:
        self.time += 1
        rows, positions, slots = [], [], []
        for req, start, length in zip(reqs, starts, lengths, strict=True):
            for position in range(start, start + length):
                slot = self.free.pop()
                row = experts_of(req.rid, position, self.time)
                self.slots[slot] = row
                req.slots.append(slot)
                rows.append(row)
                positions.append(position)
                slots.append(slot)
            req.computed = start + length
            if req.computed == req.length:
                req.output_ids.append(0)
            if len(self.cached) < 30 and self.rng.random() < 0.2:
                self.cached = list(req.slots)
        packed = np.stack(rows).astype(np.uint8)
        self.tap.set_batch(spans)
        self.tap.writer.publish(
            packed,
            np.zeros(len(rows), np.uint32),
            np.array(positions, np.uint32),
            kv_slots=np.array(slots, np.uint32),
        )

    def _see_ends(self) -> None:
        """The step before this one is processed now: this one runs over requests that have ended."""
        while self.ending:
            self._end(self.ending.pop(), object())

    def _retract(self, req: Req) -> None:
        self.requests.release(req)
        req.computed, req.slots = 0, []

    def _end(self, req: Req, reason: object) -> None:
        req.finished_reason = reason
        if len(req.output_ids) == req.outputs:
            req.output_ids += [0] * self.rng.randint(0, 3)  # a step over drafted tokens gave more than were asked for
        self.live.remove(req)
        self.truth[req.rid] = (self.slots[req.slots].copy(), reason, req)
        self.requests.release(req)


@pytest.mark.parametrize("seed", range(12))
def test_every_request_has_the_rows_that_its_slots_hold(seed: int) -> None:
    facts: dict[str, Any] = {"layers": list(range(LAYERS)), "num_experts": EXPERTS, "top_k": TOP_K}
    writer = Writer("sglang-like", **facts, kv_slots=SLOTS)
    tap = Tap(writer, **facts)
    collector = Collector("sglang-like")
    scheduler = Scheduler(tap, seed)
    rng = random.Random(seed)
    for number in range(14):
        scheduler.add(Req(f"r{number}", rng.randint(1, 50), rng.randint(1, 25)))
        for _ in range(rng.randint(0, 12)):
            scheduler.step()
    while scheduler.live and len(scheduler.free) > 600:
        scheduler.step()
    assert tap.error is None
    assert collector.sync(5.0)
    assert len(scheduler.truth) >= 8
    told = collector.requests()
    states = dict(zip(told["request"], told["state"], strict=True))
    assert set(states) <= {f"r{number}" for number in range(14)}
    aborted = 0
    for rid, (slots, reason, req) in scheduler.truth.items():
        if rid not in states:
            assert not req.slots
            continue
        rows = collector.rows(rid)
        assert rows is not None
        expected = len(req.origin_input_ids) + max(min(len(req.output_ids), req.outputs), 1) - 1
        if isinstance(reason, FINISH_ABORT):
            aborted += 1
            assert states[rid] == "aborted"
            expected = min(expected, len(slots)) if not req.output_ids else expected
        else:
            assert states[rid] == "finished"
        there = rows["phases"][: len(slots)] != 255
        np.testing.assert_array_equal(rows["experts"][: len(slots)][there], slots[: len(rows["phases"])][there])
        if not isinstance(reason, FINISH_ABORT):
            assert len(rows["phases"]) == expected
            assert there[:expected].all()
    writer.close()
    collector.close()


def test_an_id_that_comes_again_is_another_request() -> None:
    facts: dict[str, Any] = {"layers": [0], "num_experts": 4, "top_k": 1}
    writer = Writer("again", **facts)
    requests = Requests(Tap(writer, **facts))
    numbers = set()
    for expected in ("same", "same#2"):
        req = Req("same", 3, 1)
        requests.admit([req])
        batch = SimpleNamespace(rids=["same"], extend_prefix_lens_cpu=[0], extend_seq_lens_cpu=[3])
        assert requests.extend(batch)[0][1] == expected
        decode = SimpleNamespace(rids=["same"], seq_lens_cpu=torch.tensor([4]))
        ((number, request, *rest),) = requests.decode(decode)
        assert (request, rest) == (expected, [0, 1, 3, "decode"])
        numbers.add(number)
        req.finished_reason = object()
        requests.release(req)
    assert len(numbers) == 2
    writer.close()


class Known:
    """Requests of a small model, and what a collector hears of them."""

    def __init__(self) -> None:
        facts: dict[str, Any] = {"layers": [0], "num_experts": 4, "top_k": 1}
        self.writer = Writer("known", **facts)
        self.tap = Tap(self.writer, **facts)
        self.requests = Requests(self.tap)
        self.collector = Collector("known")

    def forward(self, req: Req, start: int, length: int) -> None:
        self.requests.admit([req])
        batch = SimpleNamespace(rids=[req.rid], extend_prefix_lens_cpu=[start], extend_seq_lens_cpu=[length])
        self.tap.set_batch(self.requests.extend(batch))
        positions = np.arange(start, start + length, dtype=np.uint32)
        self.writer.publish(np.zeros((length, 1, 1), np.uint8), None, positions)

    def decode(self, req: Req, position: int) -> None:
        batch = SimpleNamespace(rids=[req.rid], seq_lens_cpu=torch.tensor([position + 1]))
        self.tap.set_batch(self.requests.decode(batch))
        self.writer.publish(np.zeros((1, 1, 1), np.uint8), None, np.array([position], np.uint32))

    def states(self) -> dict[str, tuple[str, int, int]]:
        assert self.collector.sync(5.0)
        told = self.collector.requests()
        columns = zip(told["request"], told["state"], told["tokens"], told["missing"], strict=True)
        return {request: (state, tokens, missing) for request, state, tokens, missing in columns}


@pytest.fixture
def known() -> Iterator[Known]:
    made = Known()
    yield made
    made.collector.close()
    made.writer.close()


def test_a_retracted_request_that_is_given_up_while_it_waits_has_ended(known: Known) -> None:
    """SGLang drops it without another word; that it is gone shows when the next prompts come."""
    lost, other = Req("lost", 4, 9), Req("other", 2, 9)
    known.forward(lost, 0, 4)
    known.requests.release(lost)
    known.forward(other, 0, 2)
    assert known.states()["lost"] == ("running", 4, 0)
    del lost
    known.forward(Req("next", 2, 9), 0, 2)
    assert known.states()["lost"] == ("aborted", 4, 0)
    assert known.states()["other"] == ("running", 2, 0)


def test_an_id_that_comes_again_before_its_end_was_told_is_another_request(known: Known) -> None:
    known.forward(Req("same", 4, 9), 0, 4)
    known.forward(Req("same", 3, 9), 0, 3)
    assert known.states() == {"same": ("aborted", 4, 0), "same#2": ("running", 3, 0)}


def test_a_retracted_request_keeps_what_it_had_decoded_when_it_is_given_up(known: Known) -> None:
    lost = Req("lost", 4, 9)
    known.forward(lost, 0, 4)
    for position in range(4, 7):
        lost.output_ids.append(0)
        known.decode(lost, position)
    lost.output_ids.append(0)
    known.requests.release(lost)
    del lost
    known.forward(Req("next", 2, 9), 0, 2)
    assert known.states()["lost"] == ("aborted", 7, 0)


def test_a_request_that_is_about_to_be_aborted_and_is_retracted_is_the_same_when_it_comes_again(known: Known) -> None:
    req = Req("late", 4, 9)
    known.forward(req, 0, 4)
    req.to_finish = FINISH_ABORT()
    known.requests.release(req)
    known.forward(req, 0, 4)
    req.finished_reason = req.to_finish
    known.requests.release(req)
    assert known.states() == {"late": ("aborted", 4, 0)}


def test_the_last_request_for_which_there_is_no_room_even_so_has_ended(known: Known) -> None:
    """It is retracted and aborted at once; that it is gone shows when the next request comes or goes."""
    req = Req("last", 4, 9)
    known.forward(req, 0, 4)
    req.to_finish = FINISH_ABORT()
    known.requests.release(req)
    del req
    known.forward(Req("next", 2, 9), 0, 2)
    assert known.states()["last"] == ("aborted", 4, 0)


def test_lengths_that_the_engines_cpu_does_not_know_are_not_asked_for(known: Known) -> None:
    req = Req("drafted", 4, 9)
    known.forward(req, 0, 4)
    batch = SimpleNamespace(rids=["drafted", "elsewhere"], seq_lens_cpu=None)
    spans = known.requests.decode(batch, width=3)
    assert [span[1:] for span in spans] == [("drafted", 0, 3, 4, "decode"), ("elsewhere", 3, 3, 0, "decode")]


def test_a_servers_health_checks_are_nobodys(known: Known) -> None:
    req = Req("HEALTH_CHECK_1732500000", 1, 1)
    known.forward(req, 0, 1)
    req.finished_reason = object()
    known.requests.release(req)
    known.forward(Req("mine", 2, 9), 0, 2)
    assert known.states() == {"mine": ("running", 2, 0)}


def test_a_request_that_comes_from_elsewhere_decodes_behind_a_prompt() -> None:
    """As on a decode server, whose prompts another server has computed."""
    facts: dict[str, Any] = {"layers": [0], "num_experts": 4, "top_k": 1}
    writer = Writer("elsewhere", **facts)
    requests = Requests(Tap(writer, **facts))
    ((_, request, *rest),) = requests.decode(SimpleNamespace(rids=["far"], seq_lens_cpu=torch.tensor([31])))
    assert (request, rest) == ("far", [0, 1, 30, "decode"])
    writer.close()
