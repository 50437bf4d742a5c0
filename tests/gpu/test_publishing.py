"""The GPU publishes: what readers without CUDA see is what the GPU computed, whole or not at all."""

import random
import signal
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from capturing import another_thread_captures
from graph_forward import GraphForward, make_tap
from patterns import SIZES, STEPS, OnDevice, expected, make_writer, publish
from pinning import mapped, pinned
from reader_process import report, start_reader
from watching import Watch

from children import hear, start
from expert_lens._core import Collector, RowStream, Writer
from expert_lens.errors import CudaError, OptionError

WAYS = ["stream", "event"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", request.param)
    return str(request.param)


@pytest.mark.parametrize(("num_experts", "weights"), [(128, False), (256, True), (384, False), (1024, True)])
def test_rows_token_ids_and_weights_come_as_the_gpu_computed_them(way: str, num_experts: int, weights: bool) -> None:
    writer = make_writer("seen", num_experts, weights=weights)
    source = OnDevice(num_experts, 300)
    reader = Collector("seen")
    for step, rows in enumerate([1, 3, 300, 7]):
        assert publish(writer, source, step, rows, spans=[(step + 1, f"r{step}")], weights=weights)
    assert writer.publisher == way
    assert reader.sync(10.0)
    for step, rows in enumerate([1, 3, 300, 7]):
        found = reader.rows(f"r{step}")
        assert found is not None
        wanted = expected(np.full(rows, step), np.arange(rows), num_experts)
        np.testing.assert_array_equal(found["experts"], wanted)
        np.testing.assert_array_equal(found["token_ids"], np.arange(rows) + step)
        if weights:
            np.testing.assert_array_equal(found["weights"], (wanted.astype(np.float32) / 1024).astype(np.float16))
    writer.close()
    reader.close()


def test_a_step_larger_than_a_quarter_of_the_ring_is_put_together_again(way: str) -> None:
    writer = make_writer("large", arena_bytes=8 << 20)
    reader = Collector("large")
    assert publish(writer, OnDevice(128, 9000), 5, 9000)
    assert writer.publisher == way
    assert reader.sync(10.0)
    found = reader.rows("a")
    assert found is not None
    np.testing.assert_array_equal(found["experts"], expected(np.full(9000, 5), np.arange(9000), 128))
    writer.close()


def test_close_waits_for_what_is_on_its_way(way: str) -> None:
    writer = make_writer("closing")
    source = OnDevice(128, 4096)
    reader = Collector("closing")
    publish(writer, source, 0, 1)
    torch.cuda._sleep(500_000_000)
    publish(writer, source, 1, 4096)
    assert reader.tokens <= 1
    writer.close()
    assert reader.sync(10.0)
    assert reader.tokens == 4097
    assert writer.publisher == way


def test_a_record_of_the_host_behind_one_of_the_gpu_is_read_behind_it() -> None:
    writer = make_writer("both")
    source = OnDevice(128, 64)
    reader = Collector("both")
    publish(writer, source, 0, 1)
    torch.cuda._sleep(300_000_000)
    publish(writer, source, 1, 64)
    host = expected(np.full(2, 2), np.arange(2), 128).astype(np.uint8)
    writer.set_batch([(2, "b", 0, 2, 0, "decode")])
    writer.publish(host, None, np.arange(2, dtype=np.uint32))
    writer.finish(2, "b", 2)
    assert not reader.sync(0.01)
    assert reader.rows("b") is None
    assert reader.sync(10.0)
    found = reader.rows("b")
    assert found is not None
    np.testing.assert_array_equal(found["experts"], host)
    writer.close()


def test_another_threads_stream_capture_goes_on(way: str) -> None:
    source = OnDevice(128, 64)
    source.experts(0, 64)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        packed, tokens = source.experts(3, 64), source.token_ids(3, 64)
    torch.cuda.synchronize()
    writer = make_writer("beside")
    reader = Collector("beside")
    writer.set_batch([(1, "a", 0, 64, 0, "decode")])
    with another_thread_captures():
        for _ in range(3):  # the first one pins the arena, too
            writer.publish_device(
                packed.data_ptr(),
                64,
                np.arange(64, dtype=np.uint32),
                device=0,
                stream=side.cuda_stream,
                token_ids=tokens.data_ptr(),
            )
        deadline = time.monotonic() + 10
        while reader.tokens < 192 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert reader.tokens == 192
    assert writer.publisher == way
    writer.close()


def test_drops_are_counted_and_what_comes_is_whole(way: str) -> None:
    writer = make_writer("small", arena_bytes=1 << 20)
    reader = start_reader("small", rows_a_block=512)
    source = OnDevice(128, 256)
    rng = random.Random(0)
    sent = 0
    for step in range(20_000):
        rows = rng.choice([1, 16, 256])
        publish(writer, source, step, rows)
        sent += rows
    dropped = writer.dropped_tokens
    writer.close()
    found = report(reader)
    assert dropped > 0
    assert (found["wrong"], found["wrong_tokens"], found["corrupt"]) == (0, 0, 0)
    assert found["rows"] == sent - dropped
    assert writer.publisher == way


EDGE_STEPS = 2000


@pytest.mark.timeout(600)
def test_stress(way: str) -> None:
    """Every row of 200 000 steps of mixed sizes, up to 16384 rows, from two streams in turn."""
    writer = make_writer("stress", arena_bytes=512 << 20, on_full="wait", wait_timeout=60.0)
    reader = start_reader("stress")
    source = OnDevice(128, 16384)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    rng = random.Random(1)
    sent = 0
    for step in range(STEPS):
        rows = 16384 if step % 10_000 == 5_000 else rng.choice(SIZES)
        with torch.cuda.stream(streams[step // 100 % 2]):
            assert publish(writer, source, step, rows)
        sent += rows
    writer.close()
    found = report(reader)
    assert found == {
        "rows": sent, "slots": 0, "steps": STEPS, "wrong": 0, "wrong_tokens": 0, "wrong_slots": 0, "corrupt": 0,
        "dropped": 0, "last": [0, STEPS - 1, sent],
    }  # fmt: skip
    assert writer.publisher == way


def test_rows_are_there_when_their_number_is(way: str, captures_directory: Path) -> None:
    """The last bytes of a record, read as soon as its number can be seen, are those that stay there."""
    writer = make_writer("edge")
    source = OnDevice(128, 4096)
    stream = RowStream("edge")
    publish(writer, source, 0, 1)  # pins the arena
    watch = Watch(captures_directory, "edge")
    watch.newest()
    stream.take(1, 5.0)
    stream.release()
    sent = seen = waited = 0
    for step in range(1, EDGE_STEPS):
        rows = (64, 1, 4096, 300)[step % 4]
        torch.cuda._sleep(1_000_000)  # longer than it takes to publish, so that the number is waited for
        assert publish(writer, source, step, rows, positions_there=True)
        early, at_once, later = watch.newest()
        waited += early
        block = stream.take(rows, 5.0)
        np.testing.assert_array_equal(at_once, later)
        np.testing.assert_array_equal(block["experts"], expected(block["steps"], block["positions"], 128))
        stream.release()
        sent += rows
        seen += len(block["steps"])
    assert seen == sent
    assert waited > EDGE_STEPS * 0.9
    assert writer.publisher == way
    writer.close()


def test_a_reader_that_is_killed_holds_nothing_up(way: str) -> None:
    writer = make_writer("killed", arena_bytes=1 << 20, on_full="wait", wait_timeout=30.0)
    source = OnDevice(128, 64)
    first = start_reader("killed")
    publish(writer, source, 0, 64)
    with first:
        first.send_signal(signal.SIGKILL)
    time.sleep(0.3)
    for step in range(1, 2000):
        assert publish(writer, source, step, 64)
    second = start_reader("killed")
    for step in range(2000, 2010):
        assert publish(writer, source, step, 64)
    writer.close()
    found = report(second)
    assert (found["wrong"], found["wrong_tokens"], found["corrupt"]) == (0, 0, 0)
    first, last, rows = found["last"]  # it may begin with what the ring still held
    assert first <= 2000
    assert (last, rows) == (2009, 64 * (2010 - first))
    assert writer.publisher == way


STREAM_WRITER = """
import sys
import torch
from patterns import OnDevice, make_writer, publish
writer, source = make_writer("dying"), OnDevice(128, 64)
for step in range(100):
    publish(writer, source, step, 64)
torch.cuda.synchronize()
print("published", flush=True)
torch.cuda._sleep(20_000_000_000)
publish(writer, source, 100, 64)
print("on its way", flush=True)
sys.stdin.readline()
"""
GRAPH_WRITER = """
import sys
import torch
from graph_forward import GraphForward, make_tap
forward = GraphForward(make_tap("dying"), 64)
for step in range(100):
    forward.replay(64)
torch.cuda.synchronize()
print("published", flush=True)
with torch.cuda.stream(forward.stream):
    torch.cuda._sleep(20_000_000_000)
forward.replay(64)
print("on its way", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("killed", ["stream", "event", "graph"])
def test_what_a_killed_writer_published_is_readable(killed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", killed)
    writer = GRAPH_WRITER if killed == "graph" else STREAM_WRITER
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{writer}"
    with start(code) as process:
        assert [hear(process), hear(process)] == ["published", "on its way"]
        reader = start_reader("dying")
        process.send_signal(signal.SIGKILL)
    found = report(reader)
    assert (found["steps"], found["rows"], found["wrong"], found["wrong_tokens"]) == (100, 6400, 0, 0)


def test_an_arena_that_cannot_be_pinned_says_where_it_must_lie(unpinnable: str) -> None:
    writer = make_writer("elsewhere", directory=unpinnable)
    with pytest.raises(CudaError, match=r"it must lie on a tmpfs"):
        publish(writer, OnDevice(128, 8), 0, 8)
    writer.close()


def test_a_driver_that_refuses_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = make_writer("refused")
    with pytest.raises(CudaError, match=r"cuDeviceGet failed: CUDA_ERROR_INVALID_DEVICE"):
        writer.publish_device(0, 1, np.zeros(1, np.uint32), device=99, stream=0)
    writer.close()
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", "pigeon")
    other = make_writer("other")
    with pytest.raises(OptionError, match="EXPERT_LENS_PUBLISHER is 'pigeon'"):
        other.publish_device(0, 1, np.zeros(1, np.uint32), device=0, stream=0)
    other.close()


def test_lengths_that_do_not_agree_publish_nothing() -> None:
    writer: Writer = make_writer("unequal", weights=True)
    source = OnDevice(128, 8)
    with pytest.raises(OptionError, match="router weights"):
        publish(writer, source, 0, 8)
    writer.set_batch([(1, "a", 0, 8, 0, "decode")])
    packed = source.experts(0, 8)
    with pytest.raises(OptionError, match="7 positions, and 8 rows need 8"):
        writer.publish_device(
            packed.data_ptr(), 8, np.arange(7, dtype=np.uint32), device=0, stream=0, weights=packed.data_ptr()
        )
    writer.set_batch([(1, "a", 0, 9, 0, "decode")])
    packed = source.experts(0, 8)
    with pytest.raises(OptionError, match="spans end at row 9"):
        writer.publish_device(
            packed.data_ptr(), 8, np.arange(8, dtype=np.uint32), device=0, stream=0, weights=packed.data_ptr()
        )
    assert writer.steps == 0
    writer.close()


def test_a_closed_arena_is_pinned_no_longer(way: str) -> None:
    source = OnDevice(128, 8)
    for number in range(3):
        writer = make_writer(f"closed-{number}")
        places = mapped(writer.path)
        assert len(places) == 1
        assert not pinned(places)
        assert publish(writer, source, 0, 8)
        assert writer.publisher == way
        assert pinned(places) == places
        path = writer.path
        writer.close()
        assert not pinned(places)
        assert not mapped(path)


def test_a_refusal_behind_rows_that_landed_keeps_nobody_from_closing(way: str) -> None:
    """What was published is there; close does not wait for what never comes, and gives the memory back."""
    writer = make_writer("refusing")
    [place] = mapped(writer.path)
    reader = Collector("refusing")
    source = OnDevice(128, 64)
    assert publish(writer, source, 0, 64)
    writer.set_batch([(1, "a", 0, 64, 0, "decode")])
    with pytest.raises(CudaError, match="cuMemcpyDtoHAsync failed: CUDA_ERROR"):
        writer.publish_device(64, 64, np.arange(64, dtype=np.uint32), device=0, stream=0)  # 64 is no address
    assert writer.publisher == way
    while reader.tokens < 64:
        time.sleep(0.01)
    assert pinned([place])
    began, path = time.monotonic(), writer.path
    writer.close()
    assert time.monotonic() - began < 3
    assert not pinned([place])
    assert place not in mapped(path)
    reader.close()


CLOSING = {
    "whose context is gone": """
        cuda = ctypes.CDLL("libcuda.so.1")
        assert cuda.cuDevicePrimaryCtxReset_v2(0) == 0
    """,
    "whose context is gone, and another one there": """
        cuda = ctypes.CDLL("libcuda.so.1")
        assert cuda.cuDevicePrimaryCtxReset_v2(0) == 0
        assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0) == 0
    """,
    "whose context is gone while it captures": """
        cuda = ctypes.CDLL("libcuda.so.1")
        assert cuda.cuDevicePrimaryCtxReset_v2(0) == 0
        tap.guard(publish_again)
        assert isinstance(tap.error, CudaError), tap.error
        assert not tap.active
    """,
    "whose context is broken": """
        with contextlib.suppress(torch.AcceleratorError):
            torch.ones(4, device="cuda")[torch.tensor([9], device="cuda")]
            torch.cuda.synchronize()
        try:
            publish_again()
        except CudaError as error:
            assert "CUDA_ERROR" in str(error)
        else:
            raise SystemExit("no error")
    """,
}
TWO_DEVICES = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here; this needs two")


PUBLISHED = """
import contextlib, ctypes, os
import numpy as np
import torch
from graph_forward import GraphForward, make_tap
from patterns import OnDevice
from expert_lens.errors import CudaError
from pinning import mapped, pinned
tap = make_tap("closing")
places = mapped(tap.writer.path)
forward = GraphForward(tap, 64)
forward.replay(64)
packed = OnDevice(128, 64).experts(0, 64)
def publish_again():
    tap.writer.publish_device(packed.data_ptr(), 64, np.arange(64, dtype=np.uint32), device=0, stream=0)
publish_again()
torch.cuda.synchronize()
assert pinned(places) == places != set()
"""
CLOSED = """
tap.close()
del forward.graph.expert_lens, forward.recorded
print("closed", flush=True)
"""
UNPINNED = """
assert not pinned(places)
print("given back", flush=True)
"""
ENDED = """
os._exit(0)
"""


def printed(*parts: str) -> list[str]:
    """By a process that runs these parts one after the other."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    with start("\n".join([path, *map(textwrap.dedent, parts)])) as process:
        return process.communicate()[0].split("\n")[:-1]


@pytest.mark.parametrize("what", CLOSING)
def test_a_writer_can_be_closed_in_a_process(what: str) -> None:
    """Where its context is gone, its pages are pinned no longer; a driver whose context is broken cannot be asked."""
    if "broken" in what:
        assert printed(PUBLISHED, CLOSING[what], CLOSED, ENDED) == ["closed"]
    else:
        assert printed(PUBLISHED, CLOSING[what], CLOSED, UNPINNED, ENDED) == ["closed", "given back"]


@TWO_DEVICES
@pytest.mark.parametrize("device", [0, 1])
def test_what_two_devices_know_is_given_back_when_one_of_them_is_reset(device: int) -> None:
    reset = f'assert ctypes.CDLL("libcuda.so.1").cuDevicePrimaryCtxReset_v2({device}) == 0'
    beside = "assert not pinned(places, 1)"
    assert printed(PUBLISHED, "tap.prepare(1)", reset, CLOSED, beside, UNPINNED, ENDED) == ["closed", "given back"]


@TWO_DEVICES
def test_two_devices_publish_into_one_arena() -> None:
    tap = make_tap("two", arena_bytes=64 << 20)
    reader = start_reader("two")
    forwards, sources = [], []
    for device in range(2):
        with torch.cuda.device(device):
            forwards.append(GraphForward(tap, 64))
            sources.append(OnDevice(128, 64, f"cuda:{device}"))
    sent = by_graph = 0
    for step in range(2000):
        rows, device = step % 64 + 1, step // 2 % 2
        if step % 2:
            forwards[device].replay(rows)
            by_graph += rows
        else:
            packed, tokens = sources[device].experts(step, rows), sources[device].token_ids(step, rows)
            tap.writer.set_batch([(1, "a", 0, rows, 0, "decode")])
            tap.writer.publish_device(
                packed.data_ptr(),
                rows,
                np.arange(rows, dtype=np.uint32),
                device=device,
                stream=torch.cuda.current_stream(device).cuda_stream,
                token_ids=tokens.data_ptr(),
            )
            tap._batch = None
        sent += rows
    tap.close()
    found = report(reader)
    assert found == {
        "rows": sent, "slots": by_graph, "steps": 2000, "wrong": 0, "wrong_tokens": 0, "wrong_slots": 0, "corrupt": 0,
        "dropped": 0, "last": [0, 1999, sent],
    }  # fmt: skip
