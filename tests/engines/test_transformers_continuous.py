"""Continuous batching: `generate_batch`."""

import copy
import types
import warnings
from typing import Any

import numpy as np
import pytest

from batches import Batches, check_batches, generate_batch, small_batches
from expert_lens._core import Writer
from expert_lens.engines.names import RequestNames
from expert_lens.engines.transformers import continuous
from expert_lens.engines.transformers.continuous import ContinuousBatches, _Manager, _Request
from expert_lens.errors import EngineHookError
from expert_lens.tap import Tap
from oracle import Oracle, replayed
from support import Attach
from tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_gives_the_rows_that_the_experts_received(family: str, attach: Attach) -> None:
    changes = {"gpt_oss": {"attn_implementation": "eager"}, "deepseek_v3": {"v_head_dim": 16}}.get(family, {})
    model = FAMILIES[family](**changes)
    if family == "deepseek_v3":
        model.config.head_dim = 16  # the paged cache of transformers 5.23 takes the rotary part's size for the whole
    capture = attach(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19], [20, 21]]
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, prompts, max_new_tokens=9)
    assert len(results) == 5
    check_batches(capture, batches.rows(truth), results)
    assert {entry["missing"] for entry in capture.requests().values()} == {0}
    assert capture.stats()["tokens"] == sum(len(ids) for ids in truth.ids)


def test_prompts_that_are_cut_into_chunks_are_put_together_again(attach: Attach, model: Any) -> None:
    capture = attach(model)
    config = small_batches(max_batch_tokens=8)
    prompts = [list(range(3, 33)), [40, 41, 42], list(range(20, 45))]
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, prompts, max_new_tokens=5, continuous_batching_config=config)
    check_batches(capture, batches.rows(truth), results)
    assert len(batches.batches) > 7


def test_a_batch_that_decodes_on_is_gone_through_once(
    attach: Attach, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step costs the engine's thread does not grow with the requests in it."""
    tap = attach(model).tap._tap
    stated: list[Any] = []
    set_batch = tap.set_batch

    def watched(spans: Any) -> None:
        stated.append(spans)
        set_batch(spans)

    monkeypatch.setattr(tap, "set_batch", watched)
    generate_batch(model, [[5, 6, 7], [8, 9], [10, 11, 12]], max_new_tokens=20)
    assert len(stated) == 20
    assert len({id(spans) for spans in stated}) == 2  # the prefill's, and those of all nineteen steps behind it


def test_a_prefix_that_another_request_computed_is_missing(attach: Attach, model: Any) -> None:
    capture = attach(model)
    config = small_batches(allow_block_sharing=True)
    shared = list(range(3, 15))
    with (
        Oracle(model).watching() as truth,
        Batches().watching() as batches,
        model.continuous_batching_context_manager(continuous_batching_config=config) as manager,
    ):
        results = {}
        for prompt in ([*shared, 50], [*shared, 51, 52]):
            request = manager.add_request(prompt, max_new_tokens=4)
            results[request] = next(iter(manager.request_id_iter(request)))
    check_batches(capture, batches.rows(truth), results)
    assert [entry["missing"] for entry in capture.requests().values()] == [0, 12]


def test_sequences_that_part_from_one_prompt_have_their_own_rows(attach: Attach, model: Any) -> None:
    capture = attach(model)
    generation = copy.deepcopy(model.generation_config)
    generation.num_return_sequences = 3
    generation.do_sample = True
    generation.max_new_tokens = 6
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, [[5, 6, 7, 8, 9]], generation_config=generation)
    assert len(results) == 3
    check_batches(capture, batches.rows(truth), results)
    assert [capture.requests()[name]["missing"] for name in sorted(results)] == [0, 4, 4]


def test_a_cancelled_request_is_aborted(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = -1
    capture = attach(model)
    with model.continuous_batching_context_manager(continuous_batching_config=small_batches()) as manager:
        request = manager.add_request([5, 6, 7], max_new_tokens=100_000, request_id="long", streaming=True)
        next(iter(manager.request_id_iter(request)))
        manager.cancel_request(request)
        other = manager.add_request([8, 9], max_new_tokens=3, request_id="short")
        next(iter(manager.request_id_iter(other)))
        assert capture.requests()["long"]["state"] == "aborted"
        assert capture.requests()["short"]["state"] == "finished"
    assert capture.tap.error is None


def test_an_id_that_no_record_could_hold_becomes_one_that_it_can(attach: Attach, model: Any) -> None:
    capture = attach(model)
    long = ["ä" * 300 + "1", "ä" * 300 + "2", "\ud800"]
    with model.continuous_batching_context_manager(continuous_batching_config=small_batches()) as manager:
        for request in long:
            manager.add_request([5, 6, 7], max_new_tokens=3, request_id=request)
            next(iter(manager.request_id_iter(request)))
    assert capture.tap.error is None
    known = list(capture.requests())
    assert len(set(known)) == 3
    assert all(len(request.encode()) <= 200 for request in known)
    assert known[0].startswith("ä" * 90)
    assert {request["missing"] for request in capture.requests().values()} == {0}


def test_continuous_batching_can_be_named(attach: Attach, model: Any) -> None:
    capture = attach(model)
    with capture.tap.request("run"):
        generate_batch(model, [[5, 6, 7]], max_new_tokens=3)
    generate_batch(model, [[5, 6, 7]], max_new_tokens=3)
    assert list(capture.requests()) == ["run.req_0", "req_0"]


def test_calls_one_after_another_keep_their_requests_apart(attach: Attach, model: Any) -> None:
    capture = attach(model)
    prompts = [[5, 6, 7], [9, 8], [4, 4, 4, 4]]
    results = [next(iter(generate_batch(model, [prompt], max_new_tokens=3).values())) for prompt in prompts]
    assert list(capture.requests()) == ["req_0", "req_0#2", "req_0#3"]
    for request, result in zip(capture.requests(), results, strict=True):
        tokens = (result.prompt_ids + result.generated_tokens)[:-1]
        assert capture.rows(request)["token_ids"].tolist() == tokens
        np.testing.assert_array_equal(capture.experts(request), replayed(model, tokens))


def test_a_batching_manager_made_before_attaching_is_not_guessed_at(attach: Attach, model: Any) -> None:
    with model.continuous_batching_context_manager(continuous_batching_config=small_batches()) as manager:
        capture = attach(model)
        with pytest.warns(RuntimeWarning, match="Attach before"):
            request = manager.add_request([5, 6, 7], max_new_tokens=3)
            result = next(iter(manager.request_id_iter(request)))
            warnings.warn(str(capture.tap.error), RuntimeWarning, stacklevel=1)
    assert len(result.generated_tokens) == 3
    assert isinstance(capture.tap.error, EngineHookError)
    assert capture.stats()["tokens"] == 0


class Recorded:
    """The publishing part of a graph whose capture has failed."""

    def __init__(self) -> None:
        self.given_up = 0

    def give_up(self) -> None:
        self.given_up += 1


def test_what_was_recorded_in_a_capture_that_failed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, first, second = Recorded(), Recorded(), Recorded()  # a manager is anything that can be weakly referenced
    batches = ContinuousBatches(None, RequestNames(), lambda *_: None)  # type: ignore[arg-type]
    known = _Manager(manager, None)
    batches._managers.append(known)
    recorded = iter([first, second])
    monkeypatch.setattr(continuous, "record", lambda *_, **__: next(recorded))
    monkeypatch.setattr(batches, "_find", lambda *_: (known, None))
    inputs = {"input_ids": np.zeros((1, 4)), "position_ids": np.zeros((1, 4)), "cache": None}
    for given_up in (0, 1):  # the second capture tells of the first one's end
        batches.record(None, inputs, None)  # type: ignore[arg-type]
        assert (first.given_up, second.given_up) == (given_up, 0)
    del manager
    for what in ("_follow_results", "_follow_processors"):
        monkeypatch.setattr(batches, what, lambda *_: None)
    batches.add(Recorded(), None)
    assert (first.given_up, second.given_up) == (1, 1)


def test_a_request_may_end_while_the_capture_closes() -> None:
    """The engine's thread tells of the second one's end while the first one's is stated."""
    facts: dict[str, Any] = {"layers": [0], "num_experts": 4, "top_k": 1}
    tap = Tap(Writer("closing", **facts), **facts)
    batches = ContinuousBatches(tap, RequestNames(), lambda *_: None)
    known = _Manager(tap, None)
    batches._managers.append(known)
    known.requests.update({name: _Request(name) for name in ("r0", "r1")})
    ended: list[str] = []

    def finish(_: int, request: str, *__: Any) -> None:
        ended.append(request)
        if request == "r0":
            batches._finish(known, "r1", "finished")

    tap.finish = finish  # type: ignore[method-assign]
    batches.close()
    assert ended == ["r0", "r1"]
    tap.close()


class Future:
    """A request's part of a batch, as transformers has it."""

    def __init__(self, state: Any, query_length: int = 1) -> None:
        self.state, self.query_length = state, query_length


def test_a_graphs_replay_has_the_rows_of_its_own_batch() -> None:
    """What is asked of a batch before its graph is replayed, without a GPU."""
    facts: dict[str, Any] = {"layers": [0], "num_experts": 4, "top_k": 1}
    tap = Tap(Writer("replays", **facts), **facts)
    batches = ContinuousBatches(tap, RequestNames(), lambda *_: None)
    states = [types.SimpleNamespace(request_id=f"r{i}", position_offset=5, _true_initial_tokens=4) for i in range(3)]
    io = types.SimpleNamespace(requests_in_batch=[], total_seqlen_q=0)
    scheduler = types.SimpleNamespace(active_requests={state.request_id: state for state in states})
    processor: Any = types.SimpleNamespace(scheduler=scheduler, inputs_and_outputs=io)
    known = _Manager(tap, None)  # anything that can be weakly referenced

    def rows(*parts: tuple[Any, int]) -> Any:
        io.requests_in_batch = [Future(state, length) for state, length in parts]
        io.total_seqlen_q = sum(length for _, length in parts)
        return batches._rows_of_replay(known, processor)

    def shape(found: Any) -> Any:
        return [(span[1], span[2], span[3], span[5]) for span in found.spans], found.num_rows

    first = rows((states[0], 1), (states[1], 1))
    assert shape(first) == ([("r0", 0, 1, "decode"), ("r1", 1, 1, "decode")], 2)
    for state in states[:2]:
        state.position_offset += 1
    assert rows((states[0], 1), (states[1], 1)) is first
    assert first.positions is None  # the graph reads them
    for state in states[:2]:
        state.position_offset += 2
    prompt = rows((states[0], 1), (states[1], 2))
    assert shape(prompt) == ([("r0", 0, 1, "decode"), ("r1", 1, 2, "decode")], 3)
    other = rows((states[1], 1), (states[0], 1))
    assert shape(other) == ([("r1", 0, 1, "decode"), ("r0", 1, 1, "decode")], 2)
    assert shape(rows((states[1], 1), (states[2], 1)))[0][1][0] == "r2"
    stranger = types.SimpleNamespace(request_id="r0", position_offset=5, _true_initial_tokens=4)  # a warm-up's
    assert rows((stranger, 1)) is None
    tap.close()
