"""Rows as polars frames and Parquet files.

One row a token: `request`, `position`, `token_id`, `phase`, `step`, `time`, `experts`, and `weights` if they were
asked for; files have `source` before them, which names the arena that the row came from, so that files of any
number of ranks, runs and machines can lie in one folder. `docs/trace_format.md` describes the format.
"""

import json
import os
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
from expert_lens.types import ArenaKey, ModelFacts, RowBlock

__all__ = ["METADATA_KEY", "PHASES", "PartInfo", "frame", "part_infos", "scan", "source_name", "write_part"]

METADATA_KEY = "expert_lens"
"""Key of a part's own description in the Parquet file's metadata; the value is JSON, see `PartInfo`."""
TRACE_VERSION = 1
PHASES = pl.Enum(["prefill", "decode"])
PART_SUFFIX = ".parquet"


class PartInfo(TypedDict):
    """What a part file says of itself.

    `arenas`: for each arena, (rank, pid, start time, creation time in ns, first record, last record); empty for an
    export, whose rows are not tied to records.
    """

    trace_version: int
    capture: str
    host: str
    model: ModelFacts
    arenas: list[tuple[int, int, int, int, int, int]]


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


def source_name(capture: str, arena: ArenaKey) -> str:
    """Name of an arena that no other arena has, on any machine: capture/rank@host:creation time in ns."""
    rank, _, _, created_ns = arena
    return f"{capture}/{rank}@{host()}:{created_ns}"


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of a trace, made if need be. Raises OptionError if something else stands there."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise OptionError(
            f"Cannot write a trace to {path}: it is not a folder. Name a folder; parts are files in it."
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def check_same_model(folder: Path, facts: ModelFacts) -> None:
    """Raise OptionError if a part in the folder is of a model of another shape: they could not be scanned together."""

    def shape(model: ModelFacts) -> tuple[list[int], int, int, bool]:
        return model["layers"], model["num_experts"], model["top_k"], model["weights"]

    for info in part_infos(folder):
        if shape(info["model"]) != shape(facts):
            raise OptionError(
                f"{folder} holds a trace of {info['model']['model']} (layers, experts, top-k, weights: "
                f"{shape(info['model'])}), and this is {facts['model']} {shape(facts)}. Use another folder."
            )


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
    arenas: Sequence[Sequence[int]] = (),
) -> Path:
    """Write `<folder>/<name>.parquet` so that it appears whole or not at all: write, fsync, rename, fsync the folder."""
    info = {
        "trace_version": TRACE_VERSION,
        "capture": capture,
        "host": host(),
        "model": facts,
        "arenas": [list(arena) for arena in arenas],
    }
    path = folder / f"{name}{PART_SUFFIX}"
    # A name that `scan` passes over, and that two processes never share.
    unfinished = folder / f".{name}.{os.getpid()}.unfinished"
    try:
        with unfinished.open("wb") as file:
            rows.write_parquet(
                file, compression="zstd", compression_level=1, metadata={METADATA_KEY: json.dumps(info)}
            )
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"*{PART_SUFFIX}") if not path.name.startswith("."))


def part_infos(folder: Path) -> list[PartInfo]:
    """What the parts of a trace say of themselves. Files that are no parts of ours are passed over."""
    infos = (pl.read_parquet_metadata(path).get(METADATA_KEY) for path in _parts(folder))
    return [json.loads(info) for info in infos if info is not None]


def scan(folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> pl.LazyFrame:
    """The rows of all parts in one folder, or in several, as a LazyFrame in the order of source, request, position.

    A row that stands in several parts (exported twice, or exported and recorded) is given once. A position that was
    computed twice gives its last row. Raises OptionError when there are no parts, or when they are of different
    models.
    """
    folders = [folder] if isinstance(folder, str | os.PathLike) else list(folder)
    paths = [path for one in folders for path in _parts(Path(one))]
    if not paths:
        where = ", ".join(str(Path(one)) for one in folders) or "no folder"
        raise OptionError(
            f"No trace in {where}: there is no *{PART_SUFFIX} file. Record or export one there first."
        )
    first, *rest = (pl.read_parquet_schema(path)["experts"] for path in paths)
    for path, experts in zip(paths[1:], rest, strict=True):
        if experts != first:
            raise OptionError(
                f"Cannot scan {paths[0]} and {path} together: their experts are {first} and {experts}, of different "
                "models. Scan them one by one."
            )
    rows = pl.scan_parquet(paths, hive_partitioning=False, glob=False)
    key = ["source", "request", "position"]
    # Of equal keys the last step is the one that the request went on from.
    return rows.sort([*key, "step"]).unique(key, keep="last", maintain_order=True)


def timestamp() -> str:
    """The time now, for a part's name: sorts as text, and no two are the same."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
