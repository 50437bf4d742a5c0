"""Rows as polars frames and Parquet files.

One row a token: `request`, `position`, `token_id`, `phase`, `step`, `time`, `experts`, and `weights` if they were
asked for; files have `source` before them, which names the arena that the row came from, so that files of any
number of ranks, runs and machines can lie in one folder. `docs/trace_format.md` describes the format.
"""

import json
import os
import secrets
import socket
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import polars as pl

from expert_lens._core import MISSING, NO_TOKEN
from expert_lens.errors import OptionError
from expert_lens.options import check_folder_path
from expert_lens.types import ArenaKey, EndState, ModelFacts, RowBlock

__all__ = ["METADATA_KEY", "PHASES", "PartInfo", "frame", "part_infos", "scan", "source_name", "write_part"]

METADATA_KEY = "expert_lens"
"""Key of a part's own description in the Parquet file's metadata; the value is JSON, see `PartInfo`."""
TRACE_VERSION = 1
PHASES = pl.Enum(["prefill", "decode"])
PART_SUFFIX = ".parquet"
UNFINISHED_SUFFIX = ".unfinished"
KEY = ("source", "request", "position")
ROW = "_row"
ROW_GROUP_ROWS = 8192
"""Row groups are encoded side by side: small ones keep every core busy."""
COMPRESSION_LEVEL = 3


class PartInfo(TypedDict):
    """What a part file says of itself.

    `arenas`: for each arena, (rank, pid, start time, creation time in ns, first record, last record); of an export,
    whose rows are not tied to records, the last is before the first. `ends`: for each request that ended, (index into
    `arenas`, request id, positions that count, how it ended).
    """

    trace_version: int
    capture: str
    host: str
    model: ModelFacts
    arenas: list[tuple[int, int, int, int, int, int]]
    ends: list[tuple[int, str, int, EndState]]


class Columns(TypedDict):
    """Columns of `frame`, n rows each; as in `_core.RequestRows`, with their positions."""

    positions: npt.NDArray[np.uint32]
    token_ids: npt.NDArray[np.uint32]
    phases: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.uint64]
    times: npt.NDArray[np.int64]
    experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16] | None


def schema(facts: ModelFacts) -> dict[str, pl.DataType | type[pl.DataType]]:
    """Columns and types of a frame of that model's rows."""
    shape = (len(facts["layers"]), facts["top_k"])
    columns: dict[str, pl.DataType | type[pl.DataType]] = {
        "request": pl.String,
        "position": pl.UInt32,
        "token_id": pl.UInt32,
        "phase": PHASES,
        "step": pl.UInt64,
        "time": pl.Datetime("ns", "UTC"),
        "experts": pl.Array(pl.UInt8 if facts["num_experts"] <= 256 else pl.UInt16, shape),
    }
    if facts["weights"]:
        columns["weights"] = pl.Array(pl.Float32, shape)
    return columns


def _nullable(values: npt.NDArray[Any], null: npt.NDArray[np.bool_]) -> pl.Series:
    series = pl.Series(values)
    return series.set(pl.Series(null), None) if null.any() else series


def frame(facts: ModelFacts, requests: pl.Series, columns: Columns | RowBlock) -> pl.DataFrame:
    """One row a token. Where a row is missing, all but `request` and `position` is null."""
    missing = columns["phases"] == MISSING
    phases = np.where(missing, 0, columns["phases"])
    types = schema(facts)
    series = {
        "request": requests,
        "position": pl.Series(columns["positions"]),
        "token_id": _nullable(columns["token_ids"], missing | (columns["token_ids"] == NO_TOKEN)),
        "phase": pl.Series(PHASES.categories, dtype=PHASES).gather(_nullable(phases, missing)),
        "step": _nullable(columns["steps"], missing),
        "time": _nullable(columns["times"], missing).cast(types["time"]),
        "experts": _array_series(columns["experts"], missing),
    }
    if columns["weights"] is not None:
        series["weights"] = _array_series(columns["weights"].astype(np.float32), missing)
    return pl.DataFrame([values.alias(name) for name, values in series.items()])


def _array_series(values: npt.NDArray[Any], missing: npt.NDArray[np.bool_]) -> pl.Series:
    """A series of [L, K] arrays; missing ones are null."""
    series = pl.Series(values.reshape(-1), dtype=None).reshape(values.shape)
    if missing.any():
        series = pl.select(pl.when(pl.lit(pl.Series(~missing))).then(pl.lit(series))).to_series()
    return series


def host() -> str:
    """This machine's name."""
    return socket.gethostname()


def source_name(capture: str, arena: ArenaKey, on: str | None = None) -> str:
    """Name of an arena that no other arena has, on any machine: capture/rank@host:creation time in ns."""
    rank, _, _, created_ns = arena
    return f"{capture}/{rank}@{on or host()}:{created_ns}"


def check_folder(folder: str | os.PathLike[str], facts: ModelFacts | None = None) -> Path:
    """The path of a folder that can hold a trace, whether it is there or not.

    Raises OptionError if something else stands there, or, given `facts`, if it holds the trace of a model of another
    shape: they could not be scanned together.
    """
    path = Path(check_folder_path("folder", folder))
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if not there.is_dir():
        raise OptionError(
            f"Cannot write a trace to {path}: {there} is not a folder. Name a folder; parts are files in it."
        )
    if facts is not None:
        for info in part_infos(path):
            if _shape(info["model"]) != _shape(facts):
                raise OptionError(
                    f"{path} holds a trace of {_described(info['model'])}, and this is {_described(facts)}. "
                    "Use another folder."
                )
    return path


def _shape(model: ModelFacts) -> tuple[list[int], int, int, bool]:
    return model["layers"], model["num_experts"], model["top_k"], model["weights"]


def _described(model: ModelFacts) -> str:
    layers, weights = len(model["layers"]), "with" if model["weights"] else "without"
    return (
        f"{model['model'] or 'a model'} ({layers} MoE layers, {model['num_experts']} experts, top-{model['top_k']}, "
        f"{weights} weights)"
    )


def recorded(info: PartInfo) -> list[tuple[ArenaKey, int]]:
    """The arenas of which a part holds records, and the last one of each; none of an export."""
    return [
        ((rank, pid, start, created), last)
        for rank, pid, start, created, first, last in info["arenas"]
        if first <= last
    ]


def with_sources(rows: pl.DataFrame, sources: Mapping[str, str]) -> pl.DataFrame:
    """A frame with the column `source` before the others; `sources` gives each request's."""
    names = rows["request"].replace_strict(sources, return_dtype=pl.String) if len(rows) else rows["request"]
    return rows.insert_column(0, names.alias("source"))


def write_part(
    folder: Path,
    name: str,
    rows: pl.DataFrame,
    capture: str,
    facts: ModelFacts,
    arenas: Sequence[tuple[int, int, int, int, int, int]] = (),
    ends: Sequence[tuple[int, str, int, EndState]] = (),
) -> Path:
    """Write `<folder>/<name>.parquet` so that it appears whole or not at all: write, fsync, rename, fsync the folder.

    The folder is made if need be. `arenas`, `ends`: see `PartInfo`. Raises OSError, and leaves nothing, if it cannot
    be written.
    """
    info: PartInfo = {
        "trace_version": TRACE_VERSION,
        "capture": capture,
        "host": host(),
        "model": facts,
        "arenas": list(arenas),
        "ends": list(ends),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{PART_SUFFIX}"
    # A name that `scan` passes over, and that two processes never share.
    unfinished = folder / f".{name}.{host()}.{os.getpid()}{UNFINISHED_SUFFIX}"
    try:
        with unfinished.open("wb") as file:
            rows.write_parquet(
                file,
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                row_group_size=ROW_GROUP_ROWS,
                metadata={METADATA_KEY: json.dumps(info)},
            )
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(f"Cannot write {path}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def remove_unfinished(folder: Path) -> None:
    """Remove what writers of this machine that were killed have left behind."""
    for path in folder.glob(f".*.{host()}.*{UNFINISHED_SUFFIX}"):
        if not Path("/proc", path.name.removesuffix(UNFINISHED_SUFFIX).rpartition(".")[2]).exists():
            path.unlink(missing_ok=True)


def _part_info(path: Path) -> PartInfo | None:
    """What a Parquet file says of itself; None if it is no part of ours."""
    try:
        text = pl.read_parquet_metadata(path).get(METADATA_KEY)
    except pl.exceptions.PolarsError as error:
        raise OptionError(f"Cannot read {path} as Parquet: {error}. Move it out of the trace's folder.") from error
    if text is None:
        return None
    info: PartInfo = json.loads(text)
    if info["trace_version"] != TRACE_VERSION:
        raise OptionError(
            f"{path} is of trace version {info['trace_version']}, and this expert_lens reads version {TRACE_VERSION}. "
            "Read it with the expert_lens that wrote it."
        )
    return info


def _parts(folder: Path) -> dict[Path, PartInfo]:
    """The parts of a trace, in the order of their names."""
    paths = sorted(path for path in folder.glob(f"*{PART_SUFFIX}") if not path.name.startswith("."))
    infos = ((path, _part_info(path)) for path in paths)
    return {path: info for path, info in infos if info is not None}


def part_infos(folder: Path) -> list[PartInfo]:
    """What the parts of a trace say of themselves.

    Parquet files without our metadata are passed over. Raises OptionError for a file that is no Parquet, or a part of
    another trace version.
    """
    return list(_parts(folder).values())


def scan(folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> pl.LazyFrame:
    """The rows of all parts in one folder, or in several, as a LazyFrame in the order of source, request, position.

    A row that stands in several parts (exported twice, or exported and recorded) is given once. A position that was
    computed twice gives its last row; positions past a request's end give none. Parquet files that are no parts are
    passed over. Raises OptionError when there are no parts, when they are of different models, or cannot be read.
    """
    folders = [folder] if isinstance(folder, str | os.PathLike) else list(folder)
    parts = {path: info for one in folders for path, info in _parts(Path(one)).items()}
    if not parts:
        where = ", ".join(str(Path(one)) for one in folders) or "no folder"
        raise OptionError(
            f"No trace in {where}: there is no part, a *{PART_SUFFIX} file. Record or export one there first."
        )
    (first_path, first), *others = parts.items()
    for path, info in others:
        if _shape(info["model"]) != _shape(first["model"]):
            raise OptionError(
                f"Cannot scan {first_path} and {path} together: they are of {_described(first['model'])} and "
                f"{_described(info['model'])}. Scan them one by one."
            )
    rows = pl.scan_parquet(list(parts), hive_partitioning=False, glob=False, row_index_name=ROW)
    # Which rows stay is found on few columns: the experts, most of the bytes, are gathered once, in the end.
    keys = _void_rows_removed(rows.select(ROW, *KEY, "step"), parts.values())
    # Of equal keys the last step is the one that the request went on from; a null, which is first, says least.
    kept = keys.sort(*KEY, "step", nulls_last=False).unique(KEY, keep="last", maintain_order=True).select(ROW)
    return kept.join(rows, on=ROW, how="left", maintain_order="left").drop(ROW)


def _void_rows_removed(keys: pl.LazyFrame, infos: Iterable[PartInfo]) -> pl.LazyFrame:
    """Without the rows past the end of their request."""
    ends = [
        (source_name(info["capture"], info["arenas"][arena][:4], info["host"]), request, num_positions)
        for info in infos
        for arena, request, num_positions, _ in info["ends"]
    ]
    if not ends:
        return keys
    columns = {"source": pl.String, "request": pl.String, "num_positions": pl.UInt32}
    lengths = pl.LazyFrame(ends, schema=columns, orient="row").unique(["source", "request"])
    known = keys.join(lengths, on=["source", "request"], how="left", maintain_order="left")
    return known.filter(pl.col("num_positions").is_null() | (pl.col("position") < pl.col("num_positions"))).drop(
        "num_positions"
    )


def timestamp() -> str:
    """The time now and something random, for a part's name: sorts as text, and no two are the same."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{secrets.token_hex(4)}"
