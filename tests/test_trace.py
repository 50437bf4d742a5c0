"""Files are read back by polars, pyarrow and DuckDB; what they must hold comes from plain Python lists."""

import json
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expert_lens
from expert_lens import trace
from expert_lens._core import MISSING, NO_TOKEN
from expert_lens.errors import OptionError
from expert_lens.types import ModelFacts

L, K = 3, 2
START = 1_700_000_000_000_000_000
ARENA = (0, 77, 5, START)


def facts(**other: Any) -> ModelFacts:
    known: dict[str, Any] = {
        "layers": [0, 1, 3],
        "num_experts": 16,
        "top_k": K,
        "weights": False,
        "engine": "test",
        "engine_version": "1",
        "model": "known",
    }
    return {"capture": "c", **known, **other}  # type: ignore[typeddict-item]


def columns(n: int, *, dtype: Any = np.uint8, weights: bool = False, missing: tuple[int, ...] = ()) -> trace.Columns:
    """n rows of one request; row i's experts count up from i."""
    generator = np.random.default_rng(n)
    experts = (np.arange(n)[:, None, None] + np.arange(L * K).reshape(1, L, K)).astype(dtype)
    phases = np.array([0 if i < n // 2 else 1 for i in range(n)], np.uint8)
    phases[list(missing)] = MISSING
    experts[list(missing)] = 0
    token_ids = np.arange(100, 100 + n, dtype=np.uint32)
    token_ids[:1] = NO_TOKEN
    return {
        "positions": np.arange(n, dtype=np.uint32),
        "token_ids": token_ids,
        "phases": phases,
        "steps": np.arange(n, dtype=np.uint64) // 2,
        "times": START + np.arange(n, dtype=np.int64),
        "experts": experts,
        "weights": generator.random((n, L, K)).astype(np.float16) if weights else None,
    }


def write(
    folder: Path, name: str, rows: pl.DataFrame, *, source: str = "s", model: ModelFacts | None = None, **more: Any
) -> Path:
    rows = trace.with_sources(rows, dict.fromkeys(rows["request"].unique(), source))
    return trace.write_part(folder, name, rows, "c", model or facts(), **more)


def one_request(n: int, *, request: str = "r", model: ModelFacts | None = None, **more: Any) -> pl.DataFrame:
    return trace.frame(model or facts(), pl.Series([request] * n, dtype=pl.String), columns(n, **more))


WIDE = facts(num_experts=300, weights=True)


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, trace.Columns]:
    """A part of six rows with u16 ids and weights, the fourth missing, and what it was made of."""
    made = {"dtype": np.uint16, "weights": True, "missing": (3,)}
    made_of = columns(6, **made)
    made_of["experts"][5, 2, 1] = 299
    rows = trace.frame(WIDE, pl.Series(["r"] * 6), made_of)
    return str(write(tmp_path / "run", "a", rows, model=WIDE)), made_of


def expected(made_of: trace.Columns) -> list[dict[str, Any]]:
    """The rows as plain values, times in nanoseconds since the epoch."""
    assert made_of["weights"] is not None
    rows = []
    for i in range(len(made_of["positions"])):
        missing = made_of["phases"][i] == MISSING
        values = {
            "token_id": None if made_of["token_ids"][i] == NO_TOKEN else int(made_of["token_ids"][i]),
            "phase": ["prefill", "decode"][made_of["phases"][i] % 2],
            "step": int(made_of["steps"][i]),
            "time": int(made_of["times"][i]),
            "experts": made_of["experts"][i].tolist(),
            "weights": made_of["weights"][i].astype(np.float32).tolist(),
        }
        row = {"source": "s", "request": "r", "position": i}
        rows.append(row | (dict.fromkeys(values) if missing else values))
    return rows


def test_polars_reads_what_was_written(written: tuple[str, trace.Columns]) -> None:
    path, made_of = written
    rows = pl.read_parquet(path)
    assert rows.schema == {
        "source": pl.String,
        "request": pl.String,
        "position": pl.UInt32,
        "token_id": pl.UInt32,
        "phase": pl.Enum(["prefill", "decode"]),
        "step": pl.UInt64,
        "time": pl.Datetime("ns", "UTC"),
        "experts": pl.Array(pl.UInt16, (L, K)),
        "weights": pl.Array(pl.Float32, (L, K)),
    }
    assert rows.with_columns(pl.col("time").to_physical()).to_dicts() == expected(made_of)
    present = rows.drop_nulls("experts")["experts"].to_numpy()
    assert present.shape == (5, L, K)
    assert present.dtype == np.uint16


def test_pyarrow_reads_what_was_written(written: tuple[str, trace.Columns]) -> None:
    path, made_of = written
    table = pq.read_table(path)
    rows = table.set_column(6, "time", table["time"].cast("int64")).to_pylist()
    assert rows == expected(made_of)


def test_duckdb_reads_what_was_written(written: tuple[str, trace.Columns]) -> None:
    path, made_of = written
    query = "select request, position, token_id, phase, step, epoch_ns(time), experts, weights from read_parquet(?)"
    rows = duckdb.execute(query, [path]).fetchall()
    for row, known in zip(rows, expected(made_of), strict=True):
        values = dict(zip(("request", "position", "token_id", "phase", "step", "time"), row, strict=False))
        values |= {"experts": row[6], "weights": row[7]}
        assert json.loads(json.dumps(values)) == {key: known[key] for key in values}
    # DuckDB's lists begin at 1: layer 2, rank 1 of position 5.
    assert duckdb.execute("select experts[3][2] from read_parquet(?) where position = 5", [path]).fetchone() == (299,)


def test_without_weights_and_with_few_experts_ids_are_bytes(tmp_path: Path) -> None:
    rows = pl.read_parquet(write(tmp_path, "a", one_request(4)))
    assert rows.schema["experts"] == pl.Array(pl.UInt8, (L, K))
    assert "weights" not in rows.columns
    assert np.array_equal(rows["experts"].to_numpy(), columns(4)["experts"])


def test_a_part_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path, "a", one_request(4), arenas=[(*ARENA, 3, 9)], ends=[(0, "r", 4, "aborted")])
    (info,) = trace.part_infos(tmp_path)
    assert info["trace_version"] == 1
    assert (info["capture"], info["host"], info["model"]) == ("c", trace.host(), facts())
    assert (info["arenas"], info["ends"]) == ([[*ARENA, 3, 9]], [[0, "r", 4, "aborted"]])


# A part: rows (source, request, position, step).
PARTS = st.lists(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["0.0", "0.1"]), st.integers(0, 5), st.integers(0, 9)),
        max_size=12,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(PARTS)
def test_scan_gives_each_position_once_and_its_last_row(parts: list[list[tuple[str, str, int, int]]]) -> None:
    last: dict[tuple[str, str, int], int] = {}
    for source, request, position, step in (row for part in parts for row in part):
        last[source, request, position] = max(step, last.get((source, request, position), 0))
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        for number, part in enumerate(parts):
            n = len(part)
            made_of = columns(n)
            made_of["positions"] = np.array([position for _, _, position, _ in part], np.uint32)
            made_of["steps"] = np.array([step for *_, step in part], np.uint64)
            # A step decides a row, here as in an engine.
            experts = [[[(position + step + i) % 16] * K for i in range(L)] for _, _, position, step in part]
            made_of["experts"] = np.array(experts, np.uint8).reshape(n, L, K)
            rows = trace.frame(facts(), pl.Series([request for _, request, _, _ in part], dtype=pl.String), made_of)
            rows.insert_column(0, pl.Series("source", [source for source, *_ in part], dtype=pl.String))
            trace.write_part(run, f"part-{number}", rows, "c", facts())
        scanned = expert_lens.scan(run).collect()
    keys = list(zip(scanned["source"], scanned["request"], scanned["position"], strict=True))
    assert keys == sorted(last)
    for key, step, experts in zip(keys, scanned["step"], scanned["experts"].to_numpy(), strict=True):
        assert step == last[key]
        assert experts.tolist() == [[(key[2] + step + i) % 16] * K for i in range(L)]


def test_a_row_found_in_another_part_replaces_a_null(tmp_path: Path) -> None:
    write(tmp_path, "z", one_request(4, missing=(1, 2)))
    write(tmp_path, "a", one_request(4))
    scanned = expert_lens.scan(tmp_path).collect()
    assert scanned["experts"].null_count() == 0
    assert np.array_equal(scanned["experts"].to_numpy(), columns(4)["experts"])


def test_folders_of_several_ranks_and_machines_are_scanned_together(tmp_path: Path) -> None:
    write(tmp_path / "one", "a", one_request(4), source="c/0@left:1")
    write(tmp_path / "two", "a", one_request(6), source="c/1@right:1")
    scanned = expert_lens.scan([tmp_path / "one", tmp_path / "two"]).collect()
    lengths = dict(scanned.group_by("source").len().iter_rows())
    assert lengths == {"c/0@left:1": 4, "c/1@right:1": 6}
    assert "_row" not in scanned.columns


def test_positions_past_the_end_of_their_request_are_void(tmp_path: Path) -> None:
    source, other = trace.source_name("c", ARENA), trace.source_name("c", (1, *ARENA[1:]))
    write(tmp_path, "a", one_request(6), source=source, arenas=[(*ARENA, 1, 6)])
    # The end comes in a later part, in an arena that is not the first there.
    ends = [(1, "r", 4, "finished")]
    write(tmp_path, "b", one_request(0), arenas=[(1, *ARENA[1:], 1, 1), (*ARENA, 7, 7)], ends=ends)
    write(tmp_path, "c", one_request(6), source=other, arenas=[(1, *ARENA[1:], 2, 8)])
    scanned = expert_lens.scan(tmp_path).collect()
    assert scanned.filter(source=source)["position"].to_list() == [0, 1, 2, 3]
    assert scanned.filter(source=other)["position"].to_list() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (facts(num_experts=8), "8 experts"),
        (facts(layers=[0, 1]), "2 MoE layers"),
        (facts(weights=True), "with weights"),
    ],
)
def test_traces_of_different_models_are_not_mixed(tmp_path: Path, other: ModelFacts, says: str) -> None:
    write(tmp_path / "one", "a", one_request(4))
    write(tmp_path / "two", "a", one_request(4, model=other, weights=other["weights"]), model=other)
    with pytest.raises(OptionError, match=says):
        expert_lens.scan([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(OptionError, match=says):
        trace.check_folder(tmp_path / "one", other)


def test_scanning_nothing_says_where(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=str(tmp_path)):
        expert_lens.scan(tmp_path)
    with pytest.raises(OptionError, match="nowhere"):
        expert_lens.scan([tmp_path / "nowhere"])
    with pytest.raises(OptionError, match="no folder"):
        expert_lens.scan([])


def test_what_is_no_part_is_passed_over_or_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a", one_request(4))
    (tmp_path / ".b.123.unfinished").write_bytes(path.read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("mine")
    pl.DataFrame({"mine": [1]}).write_parquet(tmp_path / "mine.parquet")
    assert len(expert_lens.scan(tmp_path).collect()) == 4
    (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:100])
    with pytest.raises(OptionError, match=r"torn\.parquet"):
        expert_lens.scan(tmp_path)


def test_a_part_of_another_trace_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(trace, "TRACE_VERSION", 2)
        write(tmp_path, "a", one_request(4))
    with pytest.raises(OptionError, match="trace version 2"):
        expert_lens.scan(tmp_path)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """As on a disk that is full: a write past `size` bytes fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_part_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with files_end_at(100), pytest.raises(OSError, match=r"[Ff]ile too large"):
        write(tmp_path, "a", one_request(400))
    assert list(tmp_path.iterdir()) == []


def test_a_trace_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="not a folder"):
        trace.check_folder(tmp_path / "file")
