"""A trace played again shows what was recorded: compared with the rows that are known, not with what was read."""

import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import expert_lens
from expert_lens import Lens, trace
from expert_lens._core import Writer
from expert_lens.errors import OptionError
from expert_lens.recording import Recording
from publishing import count, make_writer, publish, rows, token

PROMPTS = {"a": 3, "b": 2}


def wait_for_end(lens: Lens) -> None:
    deadline = time.monotonic() + 30
    while lens.stats["state"] != "ended":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def run(writer: Writer) -> None:
    """Two requests, of which one ends; the other one decodes on."""
    publish(writer, [(1, "a", range(3))], PROMPTS)
    publish(writer, [(1, "a", [3]), (2, "b", range(2))], PROMPTS)
    publish(writer, [(1, "a", [4]), (2, "b", [2])], PROMPTS)
    writer.finish(1, "a", 5)
    publish(writer, [(2, "b", [3])], PROMPTS)
    publish(writer, [(2, "b", [4])], PROMPTS)


ALL = [("a", position) for position in range(5)] + [("b", position) for position in range(5)]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    writer = make_writer("served")
    with Recording("served", tmp_path / "run"):
        run(writer)
    writer.close()
    return tmp_path / "run"


def test_all_that_can_be_asked_of_a_recording_is_as_it_was(recorded: Path) -> None:
    with expert_lens.open_trace(recorded, speed=None) as lens:
        wait_for_end(lens)
        np.testing.assert_array_equal(lens.counts(), count(ALL))
        decoded = [(request, position) for request, position in ALL if position >= PROMPTS[request]]
        np.testing.assert_array_equal(lens.counts(phase="decode"), count(decoded))
        table = lens.requests()
        assert table.rows() == [("a", "finished", 3, 5, 0), ("b", "aborted", 2, 5, 0)]
        for request in "ab":
            np.testing.assert_array_equal(lens.routed_experts(request), rows(request, range(5)))
            tokens = lens.frame(request)["token_id"].to_list()
            assert tokens == [token(request, position) for position in range(5)]
        facts = lens.facts
        assert (facts["engine"], facts["model"], facts["layers"]) == ("test", "known", [1, 2, 4, 5, 7])
        assert lens.stats["error"] is None
        assert lens.stats["dropped_tokens"] == 0
        assert lens.stats["steps"] == 5
        with pytest.raises(OptionError, match="plays a trace"):
            lens.request("mine")


def test_a_request_that_was_aborted_ends_so_again(tmp_path: Path) -> None:
    writer = make_writer("served")
    with Recording("served", tmp_path / "run"):
        publish(writer, [(1, "a", range(3)), (2, "b", range(2))], PROMPTS)
        writer.finish(1, "a", 3, "aborted")
        writer.finish(2, "b", 2)
    writer.close()
    with expert_lens.open_trace(tmp_path / "run", speed=None) as lens:
        wait_for_end(lens)
        assert lens.requests().rows() == [("a", "aborted", 3, 3, 0), ("b", "finished", 2, 2, 0)]


def test_an_export_tells_how_requests_have_ended(tmp_path: Path) -> None:
    """One that still ran is played as aborted; and a recording in the same folder goes on as if there were none."""
    writer = make_writer("exported")
    with expert_lens.attach("exported", lossless=True) as lens:
        publish(writer, [(1, "a", range(3)), (2, "b", range(2)), (3, "c", range(4))], {"a": 3, "b": 2, "c": 4})
        writer.finish(1, "a", 3)
        writer.finish(2, "b", 2, "aborted")
        lens.to_parquet(tmp_path)
        with lens.record(tmp_path):
            pass
    writer.close()
    rows = expert_lens.scan(tmp_path).collect()
    assert len(rows) == 9
    [record] = tmp_path.glob("record-*.parquet")
    assert len(pl.read_parquet(record)) == 9
    record.unlink()
    with expert_lens.open_trace(tmp_path, speed=None) as played:
        wait_for_end(played)
        assert sorted(played.requests().rows()) == [
            ("a", "finished", 3, 3, 0), ("b", "aborted", 2, 2, 0), ("c", "aborted", 4, 4, 0)
        ]  # fmt: skip


def test_an_export_with_missing_rows_and_weights(tmp_path: Path) -> None:
    facts = {"layers": list(range(300)), "num_experts": 300, "top_k": 1, "weights": True, "engine": "x"}
    writer = make_writer("wide", **facts, arena_bytes=1 << 22)
    experts = np.arange(4 * 300, dtype=np.uint16).reshape(4, 300, 1) % 300
    weights = (np.arange(4 * 300).reshape(4, 300, 1) / 1024).astype(np.float16)
    writer.set_batch([(1, "w", 0, 4, 6, "prefill")])
    with expert_lens.attach("wide") as lens:
        writer.publish(experts, None, np.array([0, 1, 3, 5], np.uint32), weights)
        writer.finish(1, "w", 7)
        lens.to_parquet(tmp_path)
    writer.close()
    with expert_lens.open_trace(tmp_path, speed=1e6) as played:
        wait_for_end(played)
        assert played.requests().rows() == [("w", "finished", 6, 7, 3)]
        found = played.routed_experts("w", fill=9999)
        np.testing.assert_array_equal(found[[0, 1, 3, 5]], experts)
        assert (found[[2, 4, 6]] == 9999).all()
        np.testing.assert_array_equal(played.routing_weights("w")[[0, 1, 3, 5]], weights.astype(np.float32))
        assert played.frame("w")["token_id"].to_list() == [None] * 7


def test_it_goes_at_its_own_pace_and_can_be_closed_at_any_time(tmp_path: Path, recorded: Path) -> None:
    part = pl.read_parquet(next(recorded.glob("*.parquet")))
    late = part.with_columns(time=pl.col("time") + pl.duration(hours=(pl.col("step") >= 2).cast(pl.Int64)))
    info = trace.part_infos(recorded)[0]
    trace.write_part(tmp_path / "slow", "part", late, info["capture"], info["model"], info["arenas"], info["ends"])
    lens = expert_lens.open_trace(tmp_path / "slow", speed=2.0)
    deadline = time.monotonic() + 30
    while lens.tokens_seen() < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lens.requests()["tokens"].to_list() == [4, 2], "the third step is half an hour away"
    assert lens.name in expert_lens.captures()
    lens.close()
    assert lens.name not in expert_lens.captures()
    assert lens.tokens_seen() == 6
    lens.close()
    with expert_lens.open_trace(tmp_path / "slow", speed=1e5) as fast:  # an hour takes 36 ms
        wait_for_end(fast)
        assert fast.tokens_seen() == len(part)


def test_requests_of_one_id_from_several_runs_are_kept_apart(tmp_path: Path) -> None:
    for _ in range(2):
        writer = make_writer("served")
        with Recording("served", tmp_path / "run"):
            run(writer)
        writer.close()
    with expert_lens.open_trace([tmp_path / "run"], speed=None) as lens:
        wait_for_end(lens)
        assert lens.requests()["request"].to_list() == ["a", "b", "a#2", "b#2"]
        np.testing.assert_array_equal(lens.routed_experts("b#2"), rows("b", range(5)))
        np.testing.assert_array_equal(lens.counts(), count(ALL + ALL))


def test_another_process_would_find_it_by_name(recorded: Path) -> None:
    with expert_lens.open_trace(recorded, name="played", speed=1.0), expert_lens.attach("played") as other:
        wait_for_end(other)
        assert other.counts().sum() <= count(ALL).sum()


@pytest.mark.parametrize("speed", [0, -1.0, float("nan"), "fast", True])
def test_a_speed_that_cannot_be_is_refused(recorded: Path, speed: object) -> None:
    with pytest.raises(OptionError, match="speed is"):
        expert_lens.open_trace(recorded, speed=speed)  # type: ignore[arg-type]


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="No trace in"):
        expert_lens.open_trace(tmp_path)
    assert expert_lens.captures() == []
