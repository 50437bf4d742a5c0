"""The tap alone: what it packs, what it refuses, and how little it asks of the writer."""

import contextlib
import subprocess
import sys
import threading
import types
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from expert_lens import graphs
from expert_lens.errors import CudaError, UnsupportedModelError
from expert_lens.graphs import ReplayRows
from expert_lens.steps import Rows, Step
from expert_lens.tap import MAX_WAITING_JOBS, MAX_WAITING_STEPS, Tap
from support import somebody_publishes


class NotingWriter:
    """Stands in for the writer where a test asks what is called on it, and how often."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def set_batch(self, spans: Any) -> None:
        self.calls.append(("set_batch", list(spans)))

    def publish(
        self, experts: Any, token_ids: Any, positions: Any, weights: Any = None, *, kv_slots: Any = None
    ) -> bool:
        self.calls.append(("publish", experts, token_ids, positions, weights, kv_slots))
        return False  # dropped: nothing else may happen

    def fail(self, reason: str) -> None:
        self.calls.append(("fail", reason))

    def publish_graph(self, mailbox: Any) -> None:
        mailbox.replays += 1
        self.calls.append(("post", mailbox.rows))

    def void(self, record: int, device: int, stream: int) -> None:
        self.calls.append(("void", record, device, stream))

    def drop_step(self, num_rows: int) -> None:
        self.calls.append(("drop", num_rows))

    def finish(self, number: int, request: str, num_positions: int, state: str = "finished") -> None:
        self.calls.append(("finish", number, request, num_positions, state))

    def close(self) -> None:
        self.calls.append(("close",))

    @property
    def names(self) -> list[str]:
        return [call[0] for call in self.calls]


def make_tap(**options: Any) -> tuple[Any, NotingWriter]:
    writer: Any = NotingWriter()
    return Tap(writer, **{"layers": [1, 4], "num_experts": 8, "top_k": 2, **options}), writer


def held(tap: Tap, *layers: list[list[int]], weights: Any = None) -> Step:
    """A step that holds these ids, a list of rows a layer."""
    step = tap.begin()
    assert step is not None
    for slot, ids in enumerate(layers):
        tap.layer(slot, torch.tensor(ids), None if weights is None else weights[slot])
    assert tap.end() is step
    return step


def rows(count: int, spans: Any = None, kept: Any = None) -> Rows:
    positions = np.arange(count, dtype=np.uint32)
    token_ids = torch.arange(count if kept is None else max(kept, default=-1) + 1) * 7
    return Rows(spans or [(1, "a", 0, count, count, "prefill")], positions, token_ids, kept)


FIRST, SECOND = [[0, 1], [2, 3], [4, 5]], [[7, 6], [5, 4], [3, 2]]
PACKED = [[[0, 1], [7, 6]], [[2, 3], [5, 4]], [[4, 5], [3, 2]]]


@pytest.mark.parametrize(("num_experts", "dtype"), [(8, "uint8"), (256, "uint8"), (257, "int16"), (60000, "int16")])
def test_a_step_is_packed_in_the_narrowest_type_that_holds_all_experts(num_experts: int, dtype: str) -> None:
    tap, writer = make_tap(num_experts=num_experts)
    experts, weights = tap.pack(held(tap, FIRST, [[num_experts - 1, 6], [5, 4], [3, 2]]), 3)
    assert (experts.dtype, experts.shape, weights) == (getattr(torch, dtype), (3, 2, 2), None)
    assert experts.is_contiguous()
    tap.publish(experts, weights, rows(3))
    assert writer.calls[-1][1].dtype == np.dtype("uint8" if num_experts <= 256 else "uint16")
    assert writer.calls[-1][1][0, 1, 0] == num_experts - 1


def test_ids_of_a_batch_are_flattened_row_by_row() -> None:
    tap, _ = make_tap()
    step = tap.begin()
    for slot, ids in enumerate([FIRST, SECOND]):
        tap.layer(slot, torch.tensor(ids)[None])
    tap.end()
    np.testing.assert_array_equal(tap.pack(step, 3)[0], PACKED)


def test_rows_that_are_not_kept_are_dropped_from_all_parts() -> None:
    tap, writer = make_tap(weights=True)
    scores = torch.rand(2, 3, 2)
    experts, weights = tap.pack(held(tap, FIRST, SECOND, weights=scores), 3)
    tap.publish(experts, weights, rows(2, kept=np.array([0, 2])))
    _, published, token_ids, _, published_weights, _ = writer.calls[1]
    assert token_ids.tolist() == [0, 14]
    np.testing.assert_array_equal(published, [PACKED[0], PACKED[2]])
    np.testing.assert_array_equal(published_weights, scores.transpose(0, 1)[[0, 2]].half().numpy())
    assert published.flags["C_CONTIGUOUS"]
    assert published_weights.flags["C_CONTIGUOUS"]


def test_weights_given_for_every_expert_are_looked_up_at_the_chosen_ones() -> None:
    tap, _ = make_tap(weights=True)
    scores = torch.rand(2, 3, 8)
    _, weights = tap.pack(held(tap, FIRST, SECOND, weights=scores), 3)
    for row in range(3):
        for slot, ids in enumerate([FIRST, SECOND]):
            expected = scores[slot, row, ids[row]].half().numpy()
            np.testing.assert_array_equal(weights[row, slot].numpy(), expected)


def test_weights_that_need_a_gradient_are_read_without_one() -> None:
    tap, _ = make_tap(weights=True)
    scores = torch.rand(2, 3, 2, requires_grad=True)
    _, weights = tap.pack(held(tap, FIRST, SECOND, weights=scores), 3)
    assert (weights.dtype, weights.requires_grad) == (torch.float16, False)


@pytest.mark.parametrize("wrong", [8, 255, 256, -1, 1000])
def test_an_id_that_is_no_experts_is_refused_in_the_first_step(wrong: int) -> None:
    tap, _ = make_tap()
    with pytest.raises(UnsupportedModelError, match="model has 8 experts"):
        tap.pack(held(tap, FIRST, [[wrong, 6], [5, 4], [3, 2]]), 3)


@pytest.mark.parametrize(("num_experts", "wrong"), [(256, 256), (256, -1), (65536, 65536), (65536, -1)])
def test_an_id_that_packing_would_turn_into_another_is_refused_in_later_steps(num_experts: int, wrong: int) -> None:
    tap, _ = make_tap(num_experts=num_experts)
    tap.pack(held(tap, FIRST, SECOND), 3)
    with pytest.raises(UnsupportedModelError, match=f"model has {num_experts} experts"):
        tap.pack(held(tap, FIRST, [[wrong, 6], [5, 4], [3, 2]]), 3)


def test_ids_of_another_width_or_number_of_tokens_are_refused() -> None:
    tap, _ = make_tap()
    with pytest.raises(UnsupportedModelError, match=r"shape \(3, 2\) in a forward of 4 tokens, expected \(4, 2\)"):
        tap.pack(held(tap, FIRST, SECOND), 4)
    with pytest.raises(UnsupportedModelError, match=r"shape \(1, 6\) in a forward of 3 tokens"):
        tap.pack(held(tap, [[0, 1, 2, 3, 4, 5]], [[0, 1, 2, 3, 4, 5]]), 3)


def test_what_compiled_code_gave_is_joined_there() -> None:
    tap, _ = make_tap(weights=True)
    ids = [torch.tensor(layer) for layer in (FIRST, SECOND)]
    called = [(ids[0], torch.ones(3, 2)), (ids[1], torch.arange(8.0).expand(3, 8))]
    assert tap.join_compiled(called, None) is None, "no step was looked at yet"
    tap.pack(held(tap, FIRST, SECOND, weights=[one[1] for one in called]), 3)
    step = tap.begin()
    step.joined = tap.join_compiled(called, None)
    experts, weights = tap.pack(tap.end(), 3)
    assert experts.tolist() == PACKED
    assert weights.dtype == torch.float16
    assert weights.tolist() == [[[1, 1], row[1]] for row in PACKED]


@pytest.mark.parametrize(
    "called",
    [
        None,
        (None, torch.ones(3, 2)),
        (torch.tensor(SECOND[:2]), torch.ones(2, 2)),
        (torch.tensor(SECOND), None),
        (torch.tensor(SECOND), torch.ones(2, 8)),
    ],
)
@pytest.mark.parametrize("slot", [0, 1])
def test_what_compiled_code_gave_otherwise_is_left_to_be_looked_at(called: Any, slot: int) -> None:
    """It is the user's code, in which nothing of ours may fail."""
    tap, _ = make_tap(weights=True)
    tap.pack(held(tap, FIRST, SECOND, weights=[torch.ones(3, 2)] * 2), 3)
    usual = (torch.tensor(FIRST), torch.ones(3, 2))
    assert tap.join_compiled([usual, usual], None) is not None
    assert tap.join_compiled([called, usual] if slot == 0 else [usual, called], None) is None


def test_layers_that_gave_nothing_are_named() -> None:
    tap, _ = make_tap()
    step = held(tap, FIRST)
    assert tap.silent_layers(step) == (4,)
    with pytest.raises(UnsupportedModelError, match=r"layers \(4,\) gave no experts"):
        tap.pack(step, 3)


def test_a_layer_outside_a_forward_is_not_held() -> None:
    tap, _ = make_tap()
    tap.layer(0, torch.tensor(FIRST))
    assert tap.end() is None
    assert tap.silent_layers(tap.begin()) == (1, 4)


def test_a_forward_that_was_left_behind_leaves_nothing_in_the_next() -> None:
    tap, _ = make_tap()
    tap.begin()
    tap.layer(0, torch.tensor(FIRST))
    assert tap.silent_layers(held(tap, SECOND)) == (4,)


def test_a_layer_that_comes_twice_in_one_forward_ends_the_capture() -> None:
    tap, _ = make_tap()
    tap.begin()
    tap.layer(0, torch.tensor(FIRST))
    tap.layer(0, torch.tensor(FIRST))
    assert tap.error is None  # a forward that fails is none
    with pytest.warns(RuntimeWarning, match="layer 1 called its experts twice"):
        assert tap.end() is None
    assert isinstance(tap.error, UnsupportedModelError)
    assert tap.begin() is None


def test_spans_are_set_only_when_they_change() -> None:
    tap, writer = make_tap()
    packed = tap.pack(held(tap, FIRST, SECOND), 3)
    same = [(1, "a", 0, 3, 3, "prefill")]
    for spans in (same, same, list(same), [(2, "b", 0, 3, 3, "prefill")], same):
        tap.publish(*packed, rows(3, spans))
    assert writer.names == ["set_batch", *["publish"] * 3, "set_batch", "publish", "set_batch", "publish"]


def test_a_step_without_rows_is_not_published() -> None:
    tap, writer = make_tap()
    tap.publish(*tap.pack(held(tap, FIRST, SECOND), 3), rows(0, kept=np.array([], dtype=np.intp)))
    assert writer.calls == []


def test_an_error_of_the_writer_is_kept_and_said_once() -> None:
    tap, writer = make_tap()
    packed = tap.pack(held(tap, FIRST, SECOND), 3)
    writer.set_batch = lambda spans: (_ for _ in ()).throw(ValueError(f"no {spans}"))  # type: ignore[method-assign]
    with pytest.warns(RuntimeWarning, match="stopped capturing: no") as said:
        tap.publish(*packed, rows(3))
        tap.publish(*packed, rows(3))
    assert len(said) == 1
    assert str(tap.error).startswith("no ")
    assert not tap.active


def test_where_warnings_are_errors_a_failure_still_does_not_reach_the_model() -> None:
    tap, _ = make_tap()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tap.fail(RuntimeError("ours"))
    assert str(tap.error) == "ours"


def test_a_thread_that_finds_another_one_publishing_does_not_wait() -> None:
    tap, writer = make_tap()
    packed = tap.pack(held(tap, FIRST, SECOND), 3)
    inside, go_on = threading.Event(), threading.Event()
    publish = writer.publish

    def slow(*args: Any, **more: Any) -> bool:
        inside.set()
        assert go_on.wait(10)
        return publish(*args, **more)

    writer.publish = slow  # type: ignore[method-assign]
    other = threading.Thread(target=lambda: tap.publish(*packed, rows(3, [(1, "other", 0, 3, 3, "prefill")])))
    other.start()
    assert inside.wait(10)
    for number in range(MAX_WAITING_STEPS + 5):
        tap.publish(*packed, rows(3, [(number, "mine", 0, 3, 3, "prefill")]))  # would hang if it waited
    tap.finish(2, "mine", 3, "finished")
    go_on.set()
    other.join()
    assert writer.names == [*["set_batch", "publish"] * (1 + MAX_WAITING_STEPS), *["drop"] * 5, "finish"]
    assert {call for call in writer.calls if call[0] == "drop"} == {("drop", 3)}
    assert tap.lost_tokens == 0
    owners = [call[1][0][1] for call in writer.calls if call[0] == "set_batch"]
    assert owners == ["other", *["mine"] * MAX_WAITING_STEPS], "spans and rows of two threads were mixed"


@pytest.mark.parametrize("waits", [False, True])
def test_what_the_engine_gave_is_published_as_it_was_given(waits: bool) -> None:
    """Of a step that waits, too, though the engine goes on to write into it."""
    tap, writer = make_tap(weights=True)
    experts = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2) % 8
    weights = torch.arange(12, dtype=torch.float16).reshape(3, 2, 2)
    token_ids, positions, slots = (torch.arange(first, first + 3, dtype=torch.int32) for first in (70, 0, 50))
    given = [experts, token_ids, positions, weights, slots]
    expected = [one.tolist() for one in given]
    with somebody_publishes(tap) if waits else contextlib.nullcontext():
        tap.publish(experts, weights, Rows([(1, "a", 0, 3, 3, "prefill")], positions, token_ids, kv_slots=slots))
        if waits:
            for one in given:
                one += 100
    tap.finish(1, "a", 3, "finished")
    _, *published = writer.calls[1]
    assert [one.tolist() for one in published] == expected
    assert [one.dtype for one in published] == [np.uint8, np.uint32, np.uint32, np.float16, np.uint32]
    assert tap.error is None


def test_prefixes_on_a_cpu_wait_for_who_publishes_and_not_without_bound() -> None:
    tap, writer = make_tap()
    writer.publish_prefix = lambda *what: writer.calls.append(("prefix", *what))  # type: ignore[attr-defined]
    with somebody_publishes(tap):
        for first in range(MAX_WAITING_STEPS + 3):
            tap.publish_prefix([(1, "a", 0, 2, 9, "prefill")], torch.tensor([first, 7], dtype=torch.int32))
        assert writer.calls == []
    tap.finish(1, "a", 3, "finished")
    assert writer.names == [*["prefix"] * MAX_WAITING_STEPS, "finish"]
    assert [call[2].tolist() for call in writer.calls[:2]] == [[0, 7], [1, 7]]
    assert writer.calls[0][2].dtype == np.uint32


def test_many_threads_never_mix_spans_and_rows() -> None:
    tap, writer = make_tap()
    packed = tap.pack(held(tap, FIRST, SECOND), 3)

    def work(number: int) -> None:
        for _ in range(200):
            tap.publish(*packed, Rows([(number, "x", 0, 3, 3, "prefill")], np.full(3, number, np.uint32), None))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    current, published = None, 0
    for call in writer.calls:
        if call[0] == "set_batch":
            current = call[1][0][0]
        elif call[0] == "publish":
            published += 1
            assert call[3].tolist() == [current] * 3
    assert published + writer.names.count("drop") + tap.lost_tokens // 3 == 800


def test_closing_comes_after_what_was_published() -> None:
    tap, writer = make_tap()
    tap.publish(*tap.pack(held(tap, FIRST, SECOND), 3), rows(3))
    tap.close()
    assert writer.names == ["set_batch", "publish", "close"]
    assert tap.begin() is None


def test_closing_where_this_thread_publishes_waits_for_nobody(
    launching: tuple[Any, NotingWriter, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the finalizer of a lens that nobody holds, or a signal's handler: what is on its way is published first."""
    tap, writer, mailbox = launching

    def wait(_: float) -> None:
        raise AssertionError("it waits")

    monkeypatch.setattr("expert_lens.tap.time.sleep", wait)
    writer.mailbox = wait  # type: ignore[attr-defined]

    def replay() -> None:
        tap.close()
        writer.calls.append(("launch",))
        with pytest.raises(TimeoutError, match="while rows are published"):
            tap.mailbox(0, [])

    tap.launch(mailbox, replay, FOUR_ROWS)
    assert writer.names == ["set_batch", "post", "launch", "close"]


def test_what_is_left_while_another_thread_closes_is_not_kept() -> None:
    tap, writer = make_tap()

    def close() -> None:
        writer.calls.append(("close",))
        thread = threading.Thread(target=tap.lose, args=(3,))
        thread.start()
        thread.join()

    writer.close = close  # type: ignore[method-assign]
    tap.close()
    assert not tap._jobs


def test_where_no_mark_can_be_made_the_forward_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Step) -> None:
        raise RuntimeError("the driver refuses")

    monkeypatch.setattr(Step, "mark_chosen", refuse)
    tap, _ = make_tap()
    step = tap.begin()
    assert step is not None
    step.begun = torch.cuda.Event.__new__(torch.cuda.Event)
    tap.layer(0, FIRST)
    with pytest.warns(RuntimeWarning, match="the driver refuses"):
        tap.layer(1, SECOND)
    assert not tap.active


@pytest.mark.parametrize("module", ["expert_lens.tap", "expert_lens.engines", "expert_lens.engines.transformers"])
def test_the_engines_process_imports_nothing_heavy(module: str) -> None:
    heavy = ["polars", "IPython", "anywidget", "ipywidgets", "pandas", "pyarrow", "transformers"]
    heavy += [] if module == "expert_lens.tap" else ["torch"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


FOUR_ROWS = ReplayRows([(1, "a", 0, 4, 0, "decode")], 4)


class NotingMailbox:
    """Stands in for a graph's mailbox, which no machine without a GPU has."""

    device = 0

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.calls = calls
        self.replays = 0
        self.rows: dict[str, Any] | None = None

    def set_rows(self, num_rows: int, **what: Any) -> None:
        if len(what["positions"]) != num_rows:
            raise ValueError(f"{len(what['positions'])} positions, and {num_rows} rows need {num_rows}")
        self.rows = {"num_rows": num_rows, **what}

    def pass_over(self) -> None:
        self.replays += 1
        self.calls.append(("pass over",))

    def retract(self, stream: int) -> int:
        self.calls.append(("retract", stream))
        return 3


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, NotingWriter, Any]:
    """A tap, its writer, and a mailbox that note what is called in one list."""
    tap, writer = make_tap()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=77))
    return tap, writer, NotingMailbox(writer.calls)


def test_a_replay_is_posted_for_and_launched_and_nobody_comes_between(launching: tuple[Any, NotingWriter, Any]) -> None:
    tap, writer, mailbox = launching

    def replay() -> None:
        others = [threading.Thread(target=tap.finish, args=(1, "a", 5, "finished")), threading.Thread(target=tap.close)]
        for other in others:
            other.start()
        others[0].join()
        writer.calls.append(("launch",))

    tap.launch(mailbox, replay, FOUR_ROWS)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    assert writer.names == ["set_batch", "post", "launch", "finish", "close"]
    tap.launch(mailbox, lambda: None, FOUR_ROWS)
    assert writer.names[5:] == ["pass over"], "the capture is off"


def test_replays_of_a_batch_that_goes_on_state_it_once(launching: tuple[Any, NotingWriter, Any]) -> None:
    tap, writer, mailbox = launching
    for _ in range(2):
        tap.launch(mailbox, lambda: None, FOUR_ROWS)
    tap.launch(mailbox, lambda: None, None)
    tap.launch(mailbox, lambda: None, ReplayRows([(2, "b", 0, 4, 0, "decode")], 4))
    assert writer.names == ["set_batch", "post", "post", "pass over", "set_batch", "post"]


@pytest.mark.parametrize("where", ["posting", "launching"])
def test_a_replay_that_fails_takes_its_post_back(launching: tuple[Any, NotingWriter, Any], where: str) -> None:
    tap, writer, mailbox = launching

    def interrupt(*_: Any) -> None:
        if where == "posting":
            NotingWriter.publish_graph(writer, mailbox)
        raise KeyboardInterrupt

    if where == "posting":
        writer.publish_graph = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        tap.launch(mailbox, interrupt, FOUR_ROWS)
    assert writer.calls[1:] == [("post", None), ("retract", 77), ("void", 3, 0, 77)]
    assert tap.error is None
    tap.finish(1, "a", 5, "finished")
    assert writer.names[-1] == "finish", "the turn was given back"


def test_rows_of_a_replay_are_lost_and_counted_while_another_thread_publishes(
    launching: tuple[Any, NotingWriter, Any],
) -> None:
    tap, writer, mailbox = launching
    with somebody_publishes(tap):
        tap.launch(mailbox, lambda: writer.calls.append(("launch",)), FOUR_ROWS)
        tap.finish(1, "a", 5, "finished")
        assert writer.names == ["pass over", "launch"]
    tap.finish(2, "b", 5, "finished")
    assert writer.names == ["pass over", "launch", "drop", "finish", "finish"]


def test_a_mailbox_is_made_once_nobody_publishes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer lends itself to one at a time: whoever captures a graph waits for whoever publishes."""
    tap, writer = make_tap()
    writer.mailbox = lambda *asked: writer.calls.append(("mailbox", *asked))  # type: ignore[attr-defined]
    monkeypatch.setattr("expert_lens.tap.TURN_TIMEOUT", 0.05)
    with somebody_publishes(tap):
        tap.finish(1, "a", 5, "finished")
        with pytest.raises(TimeoutError):
            tap.mailbox(0, [1, 2])
        assert writer.calls == []
        monkeypatch.setattr("expert_lens.tap.TURN_TIMEOUT", 30.0)
        capturing = threading.Thread(target=tap.mailbox, args=(0, [1, 2]))
        capturing.start()
    capturing.join()
    assert writer.names == ["mailbox", "finish"]
    assert writer.calls[0] == ("mailbox", 0, [1, 2])


def test_rows_that_are_lost_while_very_much_waits_are_told_with_the_next_step() -> None:
    tap, writer = make_tap()
    with somebody_publishes(tap):
        for _ in range(MAX_WAITING_JOBS):
            tap.finish(1, "a", 5, "finished")
        tap.lose(7)
    assert tap.lost_tokens == 7
    tap.publish(*tap.pack(held(tap, FIRST, SECOND), 3), rows(3))
    assert writer.names[MAX_WAITING_JOBS:] == ["drop", "set_batch", "publish"]
    assert tap.lost_tokens == 0


def kernels_of_a_graph(tap: Any, mailbox: Any) -> Any:
    """The kernels' part of a graph of 4 rows with token ids, without a device."""
    step = object.__new__(graphs._ByKernels)
    step.max_rows, step._tap, step._mailbox = 4, weakref.ref(tap), mailbox
    step._columns, step._rows = graphs._Columns(torch.zeros(4), None, None), None
    return step


POSITIONS = np.arange(4, dtype=np.uint32)


def test_what_posts_for_a_batch_is_made_ready_once() -> None:
    tap, writer = make_tap()
    mailbox = NotingMailbox(writer.calls)
    step = kernels_of_a_graph(tap, mailbox)
    four_rows = ReplayRows(FOUR_ROWS.spans, 4, POSITIONS)
    fewer = ReplayRows([(1, "a", 0, 2, 0, "decode")], 2, POSITIONS[:2])
    for rows in (four_rows, four_rows, None, fewer, four_rows):
        step.replay(lambda: writer.calls.append(("launch",)), rows)
    posted = [call[1] for call in writer.calls if call[0] == "post"]
    assert [(rows["num_rows"], len(rows["positions"])) for rows in posted] == [(4, 4), (4, 4), (2, 2), (4, 4)]
    assert posted[0] is posted[1], "stated once"
    assert all((rows["token_ids"], rows["kv_slots"]) == (True, False) for rows in posted)
    assert mailbox.replays == 5
    four, again = ["set_batch", "post", "launch"], ["post", "launch"]
    assert writer.names == [*four, *again, "pass over", "launch", *four, *four]
    del tap
    step.replay(lambda: None, four_rows)
    assert mailbox.replays == 6


def test_a_post_that_is_refused_ends_the_capture_and_its_replay_is_counted_once() -> None:
    tap, writer = make_tap()
    mailbox = NotingMailbox(writer.calls)

    def refuse(mailbox: Any) -> None:
        mailbox.replays += 1  # as the writer does in every case
        raise CudaError("replays passed by")

    writer.publish_graph = refuse  # type: ignore[method-assign]
    step = kernels_of_a_graph(tap, mailbox)
    with pytest.warns(RuntimeWarning, match="replays passed by"):
        step.replay(lambda: writer.calls.append(("launch",)), ReplayRows(FOUR_ROWS.spans, 4, POSITIONS))
    assert mailbox.replays == 1
    assert writer.names == ["set_batch", "launch", "fail"]


def test_a_second_interrupt_while_a_replay_is_taken_back_ends_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, writer = make_tap()
    mailbox = NotingMailbox(writer.calls)
    step = kernels_of_a_graph(tap, mailbox)

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "current_stream", interrupt)
    with pytest.warns(RuntimeWarning, match="KeyboardInterrupt while a replay"), pytest.raises(KeyboardInterrupt):
        step.replay(interrupt, ReplayRows(FOUR_ROWS.spans, 4, POSITIONS))
    assert not tap.active
    step.replay(lambda: None, ReplayRows(FOUR_ROWS.spans, 4, POSITIONS))
    assert writer.names == ["set_batch", "post", "fail", "pass over"]


def fails() -> None:
    raise RuntimeError("in the engine")


@pytest.mark.filterwarnings("ignore:expert_lens stopped capturing:RuntimeWarning")
@pytest.mark.parametrize("meanwhile", ["close", "fail"])
def test_a_capture_that_ends_while_a_replay_is_taken_back_has_ended(
    launching: tuple[Any, NotingWriter, Any], monkeypatch: pytest.MonkeyPatch, meanwhile: str
) -> None:
    tap, writer, mailbox = launching
    monkeypatch.setattr("expert_lens.tap.TURN_TIMEOUT", 0.01)
    ends = {"close": tap.close, "fail": lambda: tap.fail(CudaError("something else"))}

    def retract(_: int) -> int:
        other = threading.Thread(target=ends[meanwhile])
        other.start()
        other.join()
        return 3

    mailbox.retract = retract
    with pytest.raises(RuntimeError, match="in the engine"):
        tap.launch(mailbox, fails, FOUR_ROWS)
    assert not tap.active
    assert (tap.error is None) == (meanwhile == "close")
    assert writer.names == ["set_batch", "post", "void", meanwhile]
    tap.launch(mailbox, lambda: None, FOUR_ROWS)
    assert writer.names[4:] == ["pass over"]


def test_rows_of_a_graphs_replays_are_lost_and_counted_while_one_is_taken_back(
    launching: tuple[Any, NotingWriter, Any],
) -> None:
    tap, writer, mailbox = launching
    somebody = contextlib.ExitStack()
    somebody.enter_context(somebody_publishes(tap))

    def retract(_: int) -> None:
        somebody.close()  # nobody has the turn from here on
        other = threading.Thread(target=tap.launch, args=(mailbox, lambda: None, FOUR_ROWS))
        other.start()
        other.join()

    mailbox.retract = retract
    with pytest.raises(RuntimeError, match="in the engine"):
        tap.launch(mailbox, fails, None)
    assert writer.names == ["pass over", "pass over", "drop"]
    tap.launch(mailbox, lambda: None, FOUR_ROWS)
    assert writer.names[3:] == ["set_batch", "post"]


def test_a_replay_that_was_never_taken_back_is_not_by_another_graphs(
    launching: tuple[Any, NotingWriter, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tap, writer, mailbox = launching
    other = NotingMailbox(writer.calls)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tap, "_take_back", interrupt)  # before it has done anything
        with pytest.raises(KeyboardInterrupt):
            tap.launch(mailbox, fails, FOUR_ROWS)
    with pytest.raises(RuntimeError, match="in the engine"):
        tap.launch(other, fails, FOUR_ROWS)
    del writer.calls[:]
    tap.launch(mailbox, lambda: None, FOUR_ROWS)
    assert writer.names == ["pass over", "drop"]
    tap.launch(other, lambda: None, FOUR_ROWS)
    assert writer.names[2:] == ["post"]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (ReplayRows(FOUR_ROWS.spans, 5, POSITIONS), "a replay of 5 rows, of a graph captured with 4"),
        (ReplayRows(FOUR_ROWS.spans, 4), "a replay without positions, of a graph that was recorded without them"),
        (ReplayRows(FOUR_ROWS.spans, 4, POSITIONS[:3]), "3 positions"),
    ],
)
def test_rows_that_a_graph_cannot_publish_end_the_capture_and_the_replay_runs(rows: ReplayRows, says: str) -> None:
    tap, writer = make_tap()
    mailbox = NotingMailbox(writer.calls)
    step = kernels_of_a_graph(tap, mailbox)
    step.replay(lambda: None, ReplayRows([(1, "a", 0, 2, 0, "decode")], 2, POSITIONS[:2]))
    for warns in (pytest.warns(RuntimeWarning, match=says), contextlib.nullcontext()):
        with warns:
            step.replay(lambda: writer.calls.append(("launch",)), rows)
    assert writer.names == ["set_batch", "post", "fail", "pass over", "launch", "pass over", "launch"]
    assert mailbox.replays == 3
