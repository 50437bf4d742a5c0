"""CUDA graphs publish: each replay's rows, whole and no other's, whatever happens between them."""

import gc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capturing import another_thread_captures
from graph_forward import GraphForward, make_tap
from patterns import SIZES, STEPS, K, L, OnDevice, expected, publish
from reader_process import report, start_reader
from watching import Watch

from expert_lens import graphs, kernels
from expert_lens._core import RowStream
from expert_lens.errors import CudaError, UnsupportedModelError
from expert_lens.steps import Rows
from expert_lens.tap import Tap
from support import somebody_publishes

GRAPH = "graph"


@pytest.fixture(params=[GRAPH, "stream", "event"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", request.param)
    return str(request.param)


NewTap = Callable[..., Tap]
Opened = Callable[..., tuple[Tap, RowStream]]


@pytest.fixture
def new_tap() -> Iterator[NewTap]:
    """As `make_tap`; it is closed at the end."""
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Tap:
            tap = make_tap(*args, **options)
            stack.callback(tap.close)
            return tap

        yield make


@pytest.fixture
def opened(new_tap: NewTap) -> Opened:
    """A tap, as `new_tap`, and a stream of its rows."""

    def make(capture: str, *args: Any, **options: Any) -> tuple[Tap, RowStream]:
        return new_tap(capture, *args, **options), RowStream(capture)

    return make


def read(stream: RowStream, rows: int) -> dict[str, Any]:
    """The next `rows` rows; they may come in several blocks."""
    torch.cuda.synchronize()
    blocks: list[Any] = []
    missing, deadline = rows, time.monotonic() + 10
    while missing > 0 and time.monotonic() < deadline:
        blocks.append(stream.take(missing, 0.5))
        assert blocks[-1]["corrupt"] == blocks[-1]["unattributed"] == 0
        missing -= len(blocks[-1]["steps"])
    assert missing == 0
    arrays = (name for name, value in blocks[0].items() if isinstance(value, np.ndarray))
    return {name: np.concatenate([block[name] for block in blocks]) for name in arrays}


def check(
    block: dict[str, Any],
    num_experts: int,
    layers: int = L,
    top_k: int = K,
    *,
    columns: bool = True,
    weights: bool = False,
) -> None:
    """Every row is what its step and position say."""
    steps, positions = block["steps"].astype(np.int64), block["positions"].astype(np.int64)
    ids = expected(steps, positions, num_experts, layers, top_k)
    np.testing.assert_array_equal(block["experts"], ids)
    np.testing.assert_array_equal(block["token_ids"], positions + steps % 1000)
    if columns:
        np.testing.assert_array_equal(block["kv_slots"], positions * 3 + steps)
    if weights:
        np.testing.assert_array_equal(block["weights"], (ids.astype(np.float32) / 1024).astype(np.float16))


SHAPES = [(128, 48, 8), (256, 48, 8), (1024, 7, 3), (8, 3, 2), (300, 1, 1), (60, 5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize(("dtype", "columns", "strided"), [(torch.int64, True, False), (torch.int32, False, True)])
def test_every_row_of_batches_smaller_than_the_graph(
    way: str,
    opened: Opened,
    shape: tuple[int, int, int],
    weights: bool,
    dtype: torch.dtype,
    columns: bool,
    strided: bool,
) -> None:
    num_experts, layers, top_k = shape
    tap, stream = opened("seen", num_experts, layers=layers, top_k=top_k, weights=weights)
    forward = GraphForward(tap, 70, dtype=dtype, columns=columns, strided=strided, beside=columns)
    assert tap.writer.steps == 0
    sizes = [1, 2, 3, 70, 8, 69]
    for rows in sizes:
        forward.replay(rows, first=5)
    block = read(stream, sum(sizes))
    check(block, num_experts, layers, top_k, columns=columns, weights=weights)
    assert block["positions"].tolist() == [5 + row for rows in sizes for row in range(rows)]
    assert tap.error is None
    assert tap.writer.publisher == way


def test_weights_of_all_experts_are_gathered(way: str, opened: Opened) -> None:
    """What has to be computed first is not there when the last layer has chosen."""
    tap, stream = opened("gathered", weights=True)
    forward = GraphForward(tap, 70, scores=True)
    sizes = [1, 70, 8]
    for rows in sizes:
        forward.replay(rows)
    check(read(stream, sum(sizes)), 128, weights=True)
    assert tap.error is None
    assert tap.writer.publisher == way


@pytest.mark.usefixtures("way")
def test_warm_ups_captures_and_idle_replays_give_no_rows_and_shift_none(opened: Opened) -> None:
    tap, stream = opened("idle")
    forward = GraphForward(tap, 16)
    forward.replay(None)
    with torch.cuda.stream(forward.stream):
        torch.cuda._sleep(200_000_000)  # the CPU runs ahead from here on
    expected = []
    for rows in (3, None, 1, None, None, 16, None, 2):
        step = forward.replay(rows, request=f"r{rows}")
        expected += [step] * (rows or 0)
    block = read(stream, 22)
    check(block, 128)
    assert block["steps"].tolist() == expected == [0] * 3 + [1] + [2] * 16 + [3] * 2
    assert tap.error is None


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_replay_that_fails_after_its_record_was_reserved_is_void(
    way: str, opened: Opened, launched: bool, ahead: bool
) -> None:
    tap, stream = opened("failing")
    forward = GraphForward(tap, 16)

    def fail() -> None:
        if launched:
            forward.graph.replay()
        raise KeyboardInterrupt("in the engine")

    forward.replay(4)
    if ahead:
        with torch.cuda.stream(forward.stream):
            torch.cuda._sleep(200_000_000)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="in the engine"):
            forward.replay(5, request="failed", launch=fail)
        forward.replay(6)
    with pytest.raises(KeyboardInterrupt):
        forward.replay(None, launch=fail)
    forward.replay(7)
    torch.cuda.synchronize()
    stream.stop()
    block: Any = stream.take(1000, 5.0)
    check(block, 128)
    found = [int((block["steps"] == step).sum()) for step in range(tap.writer.steps)]
    failed = [rows for rows in found if rows not in (4, 6, 7)]
    assert tap.writer.dropped_tokens == 10
    assert [rows for rows in found if rows in (4, 6, 7)] == [4, 6, 6, 7]
    assert set(failed) <= ({0, 5} if launched and way == GRAPH else {0}), "rows of the failed replay, or none"
    assert tap.error is None
    assert stream.is_over


@pytest.mark.usefixtures("way")
def test_graphs_captured_anew_at_run_time_and_graphs_in_turn(opened: Opened) -> None:
    tap, stream = opened("anew")
    forwards = [GraphForward(tap, 8), GraphForward(tap, 64)]
    sent = 0
    for turn in range(60):
        forwards[turn % 2].replay(turn % 8 + 1)
        sent += turn % 8 + 1
        if turn % 20 == 19:
            forwards[turn // 20 % 2] = GraphForward(tap, 64, warm_up=False)
    check(read(stream, sent), 128)
    assert tap.error is None


@pytest.mark.usefixtures("way")
def test_eager_steps_and_replays_are_read_in_their_order(opened: Opened) -> None:
    tap, stream = opened("both")
    forward = GraphForward(tap, 64)
    source = OnDevice(128, 64)
    torch.cuda.synchronize()
    sent = 0
    for turn in range(200):
        rows = turn % 64 + 1
        if turn % 3:
            forward.replay(rows)
        else:
            with torch.cuda.stream(forward.stream):
                publish(tap.writer, source, tap.writer.steps, rows)
            tap._batch = None  # stated behind the tap's back
        sent += rows
    block = read(stream, sent)
    check({**block, "kv_slots": block["positions"] * 3 + block["steps"]}, 128)
    assert (np.diff(block["steps"].astype(np.int64)) >= 0).all()


def test_what_does_not_fit_is_dropped_and_counted(way: str, opened: Opened) -> None:
    tap, stream = opened("small", arena_bytes=1 << 17)
    forward = GraphForward(tap, 256)
    for _ in range(40):
        forward.replay(16)
    torch.cuda.synchronize()
    dropped = tap.writer.dropped_tokens
    assert 0 < dropped < 40 * 16
    check(read(stream, 40 * 16 - dropped), 128)
    stream.release()
    forward.replay(3)
    check(read(stream, 3), 128)
    if way == GRAPH:
        before = tap.writer.dropped_tokens
        forward.replay(256)  # more than a quarter of the ring: a graph's step is one record
        forward.replay(2)
        assert tap.writer.dropped_tokens == before + 256
        check(read(stream, 2), 128)
    assert tap.error is None


def test_the_cpu_may_run_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("ahead")
    entries, replays = 8, 12
    monkeypatch.setattr(tap, "mailbox", partial(tap.writer.mailbox, entries=entries))
    forward = GraphForward(tap, 4, counting=True)
    forward.step.fill_(-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(forward.stream):
        torch.cuda._sleep(3_000_000_000)
        for _ in range(replays):
            forward.recorded.replay(forward.graph.replay, graphs.ReplayRows([(1, "a", 0, 2, 0, "decode")], 2))
    torch.cuda.synchronize()
    assert tap.writer.dropped_tokens == (replays - entries) * 2
    check(read(stream, entries * 2), 128)
    assert tap.error is None
    forward.recorded.replay(forward.graph.replay, graphs.ReplayRows([(1, "a", 0, 3, 0, "decode")], 3))
    check(read(stream, 3), 128)


def test_space_of_records_made_void_is_used_again(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("voids", arena_bytes=1 << 17)
    forward = GraphForward(tap, 16)

    def fail() -> None:
        raise RuntimeError("in the engine")

    for turn in range(300):
        with pytest.raises(RuntimeError, match="in the engine"):
            forward.replay(16, launch=fail)
        if turn % 5 == 4:
            forward.replay(9)
            check(read(stream, 9), 128)
            stream.release()
    assert tap.writer.dropped_tokens == 300 * 16
    assert tap.error is None


def test_more_graphs_than_torch_has_streams(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("many", layers=3, top_k=2)
    captured_on = torch.cuda.Stream()
    forwards = [GraphForward(tap, 4, warm_up=False, stream=captured_on) for _ in range(70)]
    for forward in forwards:
        forward.replay(3)
    check(read(stream, 210), 128, 3, 2)
    assert tap.error is None


def test_a_graph_that_nobody_tells_us_of_keeps_its_memory() -> None:
    tap = make_tap("untold")
    forward = GraphForward(tap, 8, attach=False)
    del forward.recorded
    gc.collect()
    tap.close()
    for step in range(5):
        forward.step.fill_(step)
        forward.graph.replay()
    torch.cuda.synchronize()
    assert forward.seen.item() == 4


def test_a_mailbox_that_the_driver_refuses_is_an_error_for_whoever_records(new_tap: NewTap) -> None:
    """Engines record inside of `Tap.guard`, so that their captures go on."""
    tap = new_tap("refusing")
    writer = tap.writer

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            return getattr(writer, name)

        def mailbox(self, *_: Any) -> Any:
            raise CudaError("no memory")

    tap.writer = Refusing()  # type: ignore[assignment]
    with pytest.raises(CudaError, match="no memory"):
        GraphForward(tap, 8)
    tap.writer = writer


def test_without_a_compiler_the_stream_publishes(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    tap, stream = opened("refusing")

    class Broken:
        def __getitem__(self, _: Any) -> Any:
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(kernels, "publish_rows", Broken())
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        forward = GraphForward(tap, 8)
    forward.replay(5)
    check(read(stream, 5), 128)
    assert tap.writer.publisher == "stream"
    forward.step.fill_(7)
    forward.graph.replay()
    torch.cuda.synchronize()
    assert forward.seen.item() == 7
    assert tap.error is None


def test_an_error_while_kernels_are_recorded_does_not_spoil_the_capture(
    monkeypatch: pytest.MonkeyPatch, new_tap: NewTap
) -> None:
    tap = new_tap("spoilt")
    publish_rows: Any = kernels.publish_rows

    class BreaksInCapture:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any) -> None:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError("a hook of Triton's")
                publish_rows[grid](*arguments)

            return launch

    x, graph, errors = torch.ones(8, device="cuda"), torch.cuda.CUDAGraph(), []
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    monkeypatch.setattr(kernels, "publish_rows", BreaksInCapture())
    ids = torch.zeros((4, K), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step = tap.begin()
        assert step is not None
        step.mark_beginning()
        for slot in range(L):
            tap.layer(slot, ids)
        x.mul_(2)
        try:
            graphs.record(tap, step, 4, positions=torch.zeros(4, dtype=torch.int64, device="cuda"))
        except RuntimeError as error:
            errors.append(str(error))
    graph.replay()
    assert (x.sum().item(), errors) == (16, ["a hook of Triton's"])


def test_columns_of_another_length_or_type_are_refused(new_tap: NewTap) -> None:
    tap = new_tap("columns", layers=1, top_k=2)
    ids = torch.zeros((4, 2), dtype=torch.int64, device="cuda")
    wrong = {"short": torch.zeros(3, dtype=torch.int64, device="cuda"), "real": torch.zeros(4, device="cuda")}
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tap.begin()
        tap.layer(0, ids)
        held = tap.end()
        assert held is not None
        for column in wrong.values():
            with pytest.raises(UnsupportedModelError, match="positions of shape"):
                graphs.record(tap, held, 4, positions=column)
        torch.zeros(1, device="cuda")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_leaves_its_parents_graphs_alone(opened: Opened) -> None:
    tap, stream = opened("forked")
    forward = GraphForward(tap, 8)
    forward.replay(8)
    torch.cuda.synchronize()
    child = os.fork()
    if not child:
        try:
            forward.recorded.replay(lambda: None, graphs.ReplayRows([(1, "a", 0, 2, 0, "decode")], 2))
            del forward.graph.expert_lens, forward.recorded
            gc.collect()
        finally:
            os._exit(0 if not hasattr(forward, "recorded") else 1)
    assert os.waitpid(child, 0)[1] == 0
    forward.replay(5)
    check(read(stream, 13), 128)
    assert tap.error is None


def test_a_reader_that_is_killed_holds_no_graph_up(new_tap: NewTap) -> None:
    tap = new_tap("killed", arena_bytes=1 << 20, on_full="wait", wait_timeout=30.0)
    first = start_reader("killed")
    forward = GraphForward(tap, 64)
    forward.replay(64)
    with first:
        first.send_signal(signal.SIGKILL)
    time.sleep(0.3)
    for _ in range(2000):
        forward.replay(64)
    second = start_reader("killed")
    for _ in range(10):
        forward.replay(64)
    tap.close()
    found = report(second)
    assert (found["wrong"], found["wrong_tokens"], found["corrupt"]) == (0, 0, 0)
    first, last, rows = found["last"]  # it may begin with what the ring still held
    assert first <= 2001
    assert (last, rows) == (2010, 64 * (2011 - first))
    assert tap.writer.dropped_tokens == 0


def test_another_threads_capture_goes_on_beside_replays(opened: Opened) -> None:
    tap, stream = opened("beside")
    forward = GraphForward(tap, 8)
    rows = graphs.ReplayRows([(1, "a", 0, 8, 0, "decode")], 8)

    def fail() -> None:
        raise RuntimeError("in the engine")

    with another_thread_captures(), torch.cuda.stream(forward.stream):
        forward.recorded.replay(forward.graph.replay, rows)
        with pytest.raises(RuntimeError, match="in the engine"):
            forward.recorded.replay(fail, rows)
        forward.recorded.replay(forward.graph.replay, rows)
        block: Any = stream.take(16, 10.0)
    assert len(block["steps"]) == 16
    assert tap.error is None


@pytest.mark.parametrize("publisher", ["stream", "event"])
def test_replays_that_wait_for_another_thread_have_the_rows_that_they_wrote(
    publisher: str, monkeypatch: pytest.MonkeyPatch, opened: Opened
) -> None:
    """Though the next replay writes into the same memory."""
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", publisher)
    tap, stream = opened("kept-waiting")
    tap.prepare(0)
    forward = GraphForward(tap, 8)

    def replay(step: int) -> None:
        with torch.cuda.stream(forward.stream):
            forward.step.fill_(step)
            forward.positions.copy_(torch.arange(10 * step, 10 * step + 8))
            forward.recorded.replay(forward.graph.replay, graphs.ReplayRows([(1, "a", 0, 8, 0, "decode")], 8))

    replay(0)
    with somebody_publishes(tap):
        for step in (1, 2, 3):
            replay(step)
    replay(4)
    block = read(stream, 5 * 8)
    check(block, 128)
    assert block["positions"].tolist() == [10 * step + row for step in range(5) for row in range(8)]
    assert tap.error is None
    assert tap.writer.dropped_tokens == 0


@pytest.mark.parametrize("publisher", [GRAPH, "event"])
@pytest.mark.parametrize("refused", [False, True])
def test_another_threads_capture_goes_on_while_a_tap_begins_and_ends(
    refused: bool, publisher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", publisher)
    packed, positions = OnDevice(128, 8).experts(0, 8), np.arange(8, dtype=np.uint32)
    stream = torch.cuda.Stream().cuda_stream
    with another_thread_captures():
        tap = make_tap("passing-by")
        mailbox = tap.mailbox(0, [0])
        assert tap.writer.publish_device(packed.data_ptr(), 8, positions, device=0, stream=stream)
        if refused:
            with pytest.raises(CudaError, match="cuMemcpyDtoHAsync failed"):
                tap.writer.publish_device(64, 8, positions, device=0, stream=stream)  # 64 is no address
        tap.close()
        assert (mailbox is None) == (publisher == "event")
        del mailbox


class Long(GraphForward):
    """Goes on for seconds once its layers have chosen."""

    def run_on(self) -> None:
        torch.cuda._sleep(4_000_000_000)


def test_rows_are_there_while_the_forward_goes_on(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("going-on")
    forward = Long(tap, 8)
    forward.replay(8)
    block: Any = stream.take(8, 10.0)
    assert len(block["steps"]) == 8
    assert not forward.stream.query(), "the forward is over"
    forward.stream.synchronize()


def test_a_step_that_was_left_does_not_become_part_of_a_graph(new_tap: NewTap) -> None:
    tap = new_tap("left")
    stream, reading = torch.cuda.Stream(), RowStream("left")
    x, graph = torch.ones(64, device="cuda"), torch.cuda.CUDAGraph()
    experts = torch.zeros((4, L, K), dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    def publish(first: int) -> None:
        positions = np.arange(first, first + 4, dtype=np.uint32)
        tap.publish(experts, None, Rows([(1, "a", 0, 4, 0, "decode")], positions, None))

    blocks: list[Any] = []
    tap.prepare(0)
    with torch.cuda.stream(stream):
        publish(0)
        blocks.append(reading.take(4, 10.0))
        another = ExitStack()
        assert another.enter_context(tap._turn), "as in another thread"
        publish(4)
        with torch.cuda.graph(graph, stream=stream):
            x.mul_(2)
            another.close()
            tap._run_jobs()
            blocks.append(reading.take(4, 10.0))
        publish(8)
    blocks.append(reading.take(4, 10.0))
    assert [block["positions"].tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert (tap.error, tap.writer.steps, tap.writer.dropped_tokens) == (None, 3, 0)
    graph.replay()
    assert x.sum().item() == 128


def test_without_triton_the_stream_publishes(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    tap, stream = opened("plain")
    forward = GraphForward(tap, 16)
    forward.replay(9)
    check(read(stream, 9), 128)
    assert tap.writer.publisher == "stream"


@pytest.mark.parametrize("ahead", [False, True])
def test_replays_that_pass_by_switch_the_capture_off(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, ahead: bool
) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("unseen")
    forward = GraphForward(tap, 8)
    forward.replay(8)
    check(read(stream, 8), 128)
    with torch.cuda.stream(forward.stream):
        if ahead:
            torch.cuda._sleep(200_000_000)
        forward.graph.replay()
    if ahead:
        forward.replay(8)  # the one that nobody counted takes its post
    torch.cuda.synchronize()
    with pytest.warns(RuntimeWarning, match="1 passed by the capture"):
        forward.replay(8)
    assert isinstance(tap.error, CudaError)
    forward.replay(None)
    torch.cuda.synchronize()
    assert forward.seen.item() == 12_345, "the graph runs on"


def test_a_replay_that_passes_by_is_noticed_while_it_runs(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    """As an engine would that launches the next step while one runs."""
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)

    class Slow(GraphForward):
        def run_before(self) -> None:
            torch.cuda._sleep(4_000_000_000)

    tap, stream = opened("running")
    forward = Slow(tap, 8)
    forward.replay(8)
    check(read(stream, 8), 128)
    with torch.cuda.stream(forward.stream):
        forward.graph.replay()
    time.sleep(0.3)
    assert not forward.stream.query(), "it is over"
    with pytest.warns(RuntimeWarning, match="1 passed by the capture"):
        forward.replay(8)
    assert isinstance(tap.error, CudaError)


def test_a_post_that_is_refused_is_counted(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("counted")
    forward = GraphForward(tap, 8)
    with pytest.raises(ValueError, match="no rows are stated"):
        tap.writer.publish_graph(forward.recorded._mailbox)  # type: ignore[attr-defined]
    with torch.cuda.stream(forward.stream):
        forward.graph.replay()
    forward.replay(5)
    check(read(stream, 5), 128)
    assert tap.error is None


@pytest.mark.parametrize("mixed", [False, True])
def test_drops_under_load_are_counted_and_what_comes_is_whole(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, new_tap: NewTap
) -> None:
    """Through a ring made too small; mixed: every other step by stream."""
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap = new_tap("load", arena_bytes=1 << 20)
    reader = start_reader("load", rows_a_block=512)
    forward, source = GraphForward(tap, 256), OnDevice(128, 256)
    torch.cuda.synchronize()
    rng, sent = random.Random(0), 0
    for step in range(20_000):
        rows = rng.choice([1, 16, 256])
        if mixed and step % 2:
            with torch.cuda.stream(forward.stream):
                publish(tap.writer, source, step, rows)
            tap._batch = None  # stated behind the tap's back
        else:
            assert forward.replay(rows) == step
        sent += rows
    torch.cuda.synchronize()
    dropped = tap.writer.dropped_tokens
    tap.close()
    found = report(reader)
    assert dropped > 0
    assert (found["wrong"], found["wrong_tokens"], found["wrong_slots"], found["corrupt"]) == (0, 0, 0, 0)
    assert found["rows"] == sent - dropped
    assert 0 < found["slots"] < found["rows"] if mixed else found["slots"] == found["rows"]
    assert tap.error is None


@pytest.mark.usefixtures("way")
def test_a_graph_outlives_its_capture(opened: Opened) -> None:
    tap = make_tap("first")
    forward = GraphForward(tap, 8)
    forward.replay(8)
    tap.close()
    for step in range(5):
        forward.step.fill_(step)
        forward.graph.replay()
    torch.cuda.synchronize()
    assert forward.seen.item() == 4
    again, stream = opened("second")
    forward.recorded.replay(forward.graph.replay, graphs.ReplayRows([(1, "a", 0, 2, 0, "decode")], 2))
    other = GraphForward(again, 8)
    del forward
    other.replay(5)
    check(read(stream, 5), 128)
    assert again.error is None


def test_a_layer_that_is_silent_inside_a_capture_is_named(new_tap: NewTap) -> None:
    tap = new_tap("silent", layers=3, top_k=2)
    ids = torch.zeros((4, 2), dtype=torch.int64, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        tap.begin()
        tap.layer(0, ids)
        tap.layer(2, ids)
        held = tap.end()
        assert held is not None
        with pytest.raises(UnsupportedModelError, match=r"layers \(1,\) gave no experts"):
            graphs.record(tap, held, 4)
        torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="no CUDA graph is being captured"):
        graphs.record(tap, held, 4)


def test_rows_are_there_when_their_number_is(
    monkeypatch: pytest.MonkeyPatch, opened: Opened, captures_directory: Path
) -> None:
    """The last bytes of a record, read as soon as its number can be seen, are those that stay there."""
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap, stream = opened("edge")
    sizes = [64, 1, 4096, 300] * 5 + [65536]  # the last one has more blocks than run at a time
    forwards = {rows: GraphForward(tap, rows) for rows in set(sizes)}
    watch = Watch(captures_directory, "edge")
    waited = 0
    for step in range(600):
        rows = sizes[step % len(sizes)]
        assert forwards[rows].replay(rows) == step
        early, at_once, later = watch.newest()
        waited += early
        check(read(stream, rows), 128)
        np.testing.assert_array_equal(at_once, later)
        stream.release()
    assert waited > 100
    assert tap.error is None


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mixed", [False, True])
def test_stress(monkeypatch: pytest.MonkeyPatch, mixed: bool, new_tap: NewTap) -> None:
    """Every row of 200 000 replays of mixed sizes, up to 16384 rows; mixed: every other step by stream."""
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", GRAPH)
    tap = new_tap("stress", arena_bytes=512 << 20, on_full="wait", wait_timeout=60.0)
    reader = start_reader("stress")
    forwards = [GraphForward(tap, rows) for rows in (1, 16, 64, 256, 4096, 16384)]
    stream = forwards[0].stream
    for forward in forwards:
        forward.stream = stream
    source = OnDevice(128, 16384)
    torch.cuda.synchronize()
    rng = random.Random(1)
    sent = by_graph = 0
    for step in range(STEPS):
        rows = 16384 if step % 10_000 == 5_000 else rng.choice(SIZES)
        if mixed and step % 2:
            with torch.cuda.stream(stream):
                publish(tap.writer, source, step, rows)
            tap._batch = None
        else:
            forward = next(one for one in forwards if one.max_rows >= rows)
            with torch.cuda.stream(stream):
                forward.step.fill_(step)
                forward.recorded.replay(forward.graph.replay, graphs.ReplayRows([(1, "a", 0, rows, 0, "decode")], rows))
            by_graph += rows
        sent += rows
    torch.cuda.synchronize()
    tap.writer.close()
    assert report(reader) == {
        "rows": sent, "slots": by_graph, "steps": STEPS, "wrong": 0, "wrong_tokens": 0, "wrong_slots": 0, "corrupt": 0,
        "dropped": 0, "last": [0, STEPS - 1, sent],
    }  # fmt: skip
    assert tap.error is None
    assert tap.writer.publisher == GRAPH
    assert tap.writer.dropped_tokens == 0
