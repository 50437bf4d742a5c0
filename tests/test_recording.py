"""Every row of a capture is in exactly one part, whoever is killed and whatever fails meanwhile."""

import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import expert_lens
from children import hear, start
from expert_lens import recording
from expert_lens.errors import CaptureNotFoundError, OptionError, RecordingError
from expert_lens.recording import Recording
from publishing import make_writer, publish, rows


def raw(folder: Path) -> pl.DataFrame:
    """All rows as they stand in the parts: no duplicates resolved."""
    parts = [pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))]
    return pl.concat(parts).sort("request", "position")


def check(folder: Path, published: dict[str, Sequence[int]]) -> None:
    """The parts hold each row that was published, once and exactly."""
    found = raw(folder)
    assert found.select("request", "position").rows() == [
        (request, position) for request in sorted(published) for position in published[request]
    ]
    for request, positions in published.items():
        np.testing.assert_array_equal(
            found.filter(request=request)["experts"].to_numpy(), rows(request, positions), err_msg=request
        )


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PART_ROWS", 50)
    monkeypatch.setattr(recording, "PART_SECONDS", 0.02)


@pytest.mark.usefixtures("small_parts")
def test_parts_are_cut_by_rows_and_by_time(tmp_path: Path) -> None:
    writer = make_writer("served")
    with Recording("served", tmp_path / "run") as running:
        for position in range(0, 200, 20):
            publish(writer, [(1, "a", range(position, position + 20)), (2, "b", range(position, position + 20))])
        deadline = time.monotonic() + 10
        while running.stats["tokens"] < 400 and time.monotonic() < deadline:
            time.sleep(0.01)
        publish(writer, [(1, "a", [200])])
        writer.finish(1, "a", 201)
    stats = running.stats
    assert (stats["state"], stats["tokens"], stats["dropped_tokens"], stats["error"]) == ("ended", 401, 0, None)
    assert stats["parts"] == len(list((tmp_path / "run").glob("*.parquet"))) > 4
    assert stats["bytes"] == sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    check(tmp_path / "run", {"a": range(201), "b": range(200)})
    writer.close()


RECORDER = """
import os, signal, sys
from expert_lens import recording, trace

folder, death = sys.argv[1:]
recording.PART_ROWS, recording.PART_SECONDS = 40, 0.01

def dying(function, before):
    calls = 0
    def wrapped(*arguments):
        nonlocal calls
        calls += 1
        result = None if before else function(*arguments)
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments) if before else result
    return wrapped

if death == "before its part is whole":
    os.fsync = dying(os.fsync, before=True)
elif death == "when its part is durable, before the space is given back":
    trace.write_part = dying(trace.write_part, before=False)
with recording.Recording("served", folder) as running:
    print("recording", running.stats["skipped_records"], flush=True)
    sys.stdin.readline()
"""
DEATHS = [
    "before its part is whole",
    "when its part is durable, before the space is given back",
    "at any moment",
]


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_recorder_has_a_successor_without_gap_or_duplicate(tmp_path: Path, death: str) -> None:
    writer = make_writer("served", arena_bytes=1 << 23)
    over = threading.Event()
    published = 0

    def engine() -> None:
        nonlocal published
        while not over.is_set():
            publish(writer, [(1, "a", [published]), (2, "b", [published])])
            published += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=engine)
    thread.start()
    try:
        for _ in range(4):
            with start(RECORDER, str(tmp_path / "run"), death) as process:
                assert hear(process) == "recording 0"
                if death == "at any moment":
                    time.sleep(random.uniform(0.05, 0.3))
                    process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            if death == DEATHS[0]:
                assert len(list((tmp_path / "run").glob(".*.unfinished"))) == 1
    finally:
        over.set()
        thread.join()
    with Recording("served", tmp_path / "run") as last:
        assert last.stats["skipped_records"] == 0
    assert list((tmp_path / "run").glob(".*")) == []
    check(tmp_path / "run", {"a": range(published), "b": range(published)})
    writer.close()


ENDING = """
import sys
import expert_lens
from expert_lens import recording
from publishing import make_writer, publish

folder, how = sys.argv[1:]
recording.PART_SECONDS = 60.0
writer = make_writer("served")
lens = expert_lens.attach("served", lossless=True)
running = lens.record(folder)
publish(writer, [(1, "a", range(50))])
if how == "an exception":
    raise SystemExit("over")
"""


@pytest.mark.parametrize("how", ["the last line", "an exception"])
def test_a_script_that_ends_without_closing_loses_nothing(tmp_path: Path, how: str) -> None:
    with start(ENDING, str(tmp_path / "run"), how) as process:
        pass
    assert process.returncode == (how == "an exception")
    check(tmp_path / "run", {"a": range(50)})


PUBLISHER = """
import sys
from publishing import make_writer, publish
writer = make_writer("served")
publish(writer, [(1, "a", range(50))], {"a": 50})
print("published", flush=True)
sys.stdin.readline()
"""


def test_what_a_killed_publisher_published_is_recorded(tmp_path: Path) -> None:
    with start(PUBLISHER) as process:
        assert hear(process) == "published"
        with Recording("served", tmp_path) as running:
            assert not running.wait(0.1)
            process.send_signal(signal.SIGKILL)
            assert running.wait(10)
    assert running.stats["state"] == "ended"
    check(tmp_path, {"a": range(50)})


@pytest.mark.parametrize("asks", [signal.SIGTERM, signal.SIGINT])
def test_the_command_makes_everything_durable_when_asked_to_stop(tmp_path: Path, asks: signal.Signals) -> None:
    writer = make_writer("served")
    command = [str(Path(sys.executable).parent / "expert-lens"), "record", "served", str(tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "run").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        publish(writer, [(1, "a", range(30))])
        process.send_signal(asks)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert "30 tokens in 1 parts" in said
    check(tmp_path / "run", {"a": range(30)})
    writer.close()


@pytest.fixture
def files_end() -> Iterator[list[int]]:
    """Append a size: from then on, as on a full disk, writing past it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Sizes(list[int]):
        def append(self, size: int) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield Sizes()
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_parts")
def test_a_recording_that_cannot_write_says_so_and_loses_nothing(tmp_path: Path, files_end: list[int]) -> None:
    writer = make_writer("served")
    running = Recording("served", tmp_path)
    publish(writer, [(1, "a", range(60))])
    deadline = time.monotonic() + 10
    while running.stats["tokens"] < 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    files_end.append(100)
    publish(writer, [(1, "a", range(60, 120))])
    with pytest.raises(RecordingError, match=r"after 60 rows in 1 parts, which stay readable\. OSError: .*too large"):
        running.wait(10)
    with pytest.raises(RecordingError):
        running.close()
    assert running.stats["state"] == "failed"
    assert "too large" in str(running.stats["error"])
    check(tmp_path, {"a": range(60)})
    files_end.append(1 << 30)
    with Recording("served", tmp_path) as successor:
        pass
    assert successor.stats["skipped_records"] == 0
    check(tmp_path, {"a": range(120)})
    writer.close()


def test_records_that_are_gone_before_resuming_are_counted(tmp_path: Path) -> None:
    writer = make_writer("served", arena_bytes=1 << 16)
    publish(writer, [(1, "a", range(10))])
    with Recording("served", tmp_path):
        pass
    for position in range(10, 3000):
        publish(writer, [(1, "a", [position])])
    with Recording("served", tmp_path) as successor:
        pass
    found = raw(tmp_path).filter(request="a")["position"].to_list()
    assert successor.stats["skipped_records"] >= 2990 - len(found) + 10 > 0
    assert found == [*range(10), *range(3000 - len(found) + 10, 3000)]
    writer.close()


@pytest.mark.usefixtures("small_parts")
def test_space_is_given_back_once_its_rows_are_durable(tmp_path: Path) -> None:
    writer = make_writer("served", arena_bytes=1 << 16, on_full="wait", wait_timeout=10.0)
    with Recording("served", tmp_path / "run") as running:
        assert all(publish(writer, [(1, "a", [position])]) for position in range(3000))
    assert running.stats["dropped_tokens"] == 0
    check(tmp_path / "run", {"a": range(3000)})
    writer.close()


def test_all_ranks_are_recorded_and_told_apart(tmp_path: Path) -> None:
    writers = [make_writer("served", rank=rank) for rank in range(2)]
    with Recording("served", tmp_path):
        for rank, writer in enumerate(writers):
            publish(writer, [(1, f"r{rank}", range(5 + rank))])
    check(tmp_path, {"r0": range(5), "r1": range(6)})
    sources = expert_lens.scan(tmp_path).collect()["source"].unique().sort().to_list()
    assert [source.split("@")[0] for source in sources] == ["served/0", "served/1"]
    for writer in writers:
        writer.close()


def test_rows_of_no_request_are_counted_and_not_written(tmp_path: Path) -> None:
    writer = make_writer("served")
    publish(writer, [(0, "", range(7)), (1, "a", range(3))])
    with Recording("served", tmp_path) as running:
        pass
    assert (running.stats["tokens"], running.stats["unattributed_tokens"]) == (3, 7)
    check(tmp_path, {"a": range(3)})
    writer.close()


def test_rows_past_the_end_of_their_request_are_void(tmp_path: Path) -> None:
    writer = make_writer("served")
    publish(writer, [(1, "a", range(9)), (2, "b", range(9))])
    with Recording("served", tmp_path):
        pass
    writer.finish(1, "a", 6)
    with Recording("served", tmp_path):
        pass
    scanned = expert_lens.scan(tmp_path).collect()
    assert scanned.group_by("request").len().sort("request").rows() == [("a", 6), ("b", 9)]
    writer.close()


def test_what_cannot_be_recorded(tmp_path: Path) -> None:
    with pytest.raises(CaptureNotFoundError, match="nobody"):
        Recording("nobody", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    writer = make_writer("served")
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="not a folder"):
        Recording("served", tmp_path / "file")
    publish(writer, [(1, "a", range(3))])
    with Recording("served", tmp_path / "run"):
        pass
    other = make_writer("other", num_experts=64)
    with pytest.raises(OptionError, match="64 experts"):
        Recording("other", tmp_path / "run")
    writer.close()
    other.close()
