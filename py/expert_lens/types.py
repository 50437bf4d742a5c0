"""The shapes of what crosses between Python and the extension."""

from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

__all__ = [
    "ArenaKey",
    "CaptureFacts",
    "CollectorStats",
    "EndState",
    "ModelFacts",
    "Phase",
    "Publisher",
    "RecordingStats",
    "RequestColumns",
    "RequestRows",
    "RequestState",
    "RowBlock",
    "Span",
    "Stats",
]

Phase = Literal["prefill", "decode"]
RequestState = Literal["running", "finished", "aborted"]
EndState = Literal["finished", "aborted"]
Publisher = Literal["host", "graph", "graph and event", "stream", "event"]
"""What publishes: the engine's own stores; or, once a CUDA device did, its CUDA graphs, and its stream behind what runs
in none; or an event of the stream where that cannot store by itself.
"""
Span = tuple[int, str, int, int, int, Phase]
"""(request number, request id, first row, rows, prompt tokens, phase): whose rows a step holds.

The number tells two requests of the same id apart and is unique in the publishing process; number 0 with
an empty id marks rows of no request, which are counted and not kept.
"""

ArenaKey = tuple[int, int, int, int]
"""(rank, process id, process start time, creation time in ns): one arena, told from every other, ever."""


class ModelFacts(TypedDict):
    """What the publishing process says of its model."""

    capture: str
    rank: int
    layers: list[int]
    num_experts: int
    top_k: int
    weights: bool
    engine: str
    engine_version: str
    model: str


class CaptureFacts(ModelFacts):
    """An arena that was found, and the process that publishes it."""

    pid: int
    alive: bool
    arena_bytes: int


class RequestColumns(TypedDict):
    """One entry a request, in the order of their coming."""

    request: list[str]
    state: list[RequestState]
    prompt_tokens: list[int]
    tokens: list[int]
    missing: list[int]
    arena: list[int]
    """Index into `Collector.arenas()`."""


class RequestRows(TypedDict):
    """The rows of one request; index is the position.

    experts u8 or u16 [n, L, K]; weights f16 [n, L, K] or None; token_ids u32 [n], NO_TOKEN where the engine did not
    tell; phases u8 [n], 0 prefill, 1 decode, MISSING where the row is missing (experts are then 0 there);
    steps u64 [n]; times i64 [n], nanoseconds since the Unix epoch.
    """

    experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16] | None
    token_ids: npt.NDArray[np.uint32]
    phases: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.uint64]
    times: npt.NDArray[np.int64]


class CollectorStats(TypedDict):
    """Figures of a collector."""

    state: Literal["running", "ended"]
    """"ended" once every publisher has ended or died and all was read, or the collector was closed."""
    steps: int
    """Forwards that gave rows."""
    tokens: int
    """Rows read."""
    dropped_tokens: int
    """Rows that the publishers dropped for want of room since this reader came."""
    lost_tokens: int
    """Rows that were overwritten before they were read: only where the reader is not lossless."""
    lost_ends: int
    """Ends of requests that the publishers gave up for want of room: those requests stay running."""
    unattributed_tokens: int
    """Rows of no request (beam search, say): counted, not kept."""
    unkept_tokens: int
    """Rows that came for requests which had made room by then."""
    unslotted_tokens: int
    """Rows whose KV slot lay past what the memory holds: requests that begin with them from the cache lack them."""
    missing_tokens: int
    """Positions, of the requests that are held, whose row is missing."""
    evicted_requests: int
    """Requests that made room for newer ones."""
    corrupt_records: int
    """Records that contradicted themselves and were left out."""
    corrupt: str | None
    """What the last of those said."""
    publisher: Publisher
    lag_s: float
    """Seconds from the publishing of the newest record read until it was read; of the oldest unread one, if longer."""
    memory_bytes: int
    """What the requests' rows take."""
    arenas: int
    """Arenas read, one a rank."""


class RecordingStats(TypedDict):
    """Figures of a recording."""

    folder: str
    state: Literal["running", "ended", "failed"]
    tokens: int
    """Rows that are durable in files."""
    parts: int
    """Files written."""
    bytes: int
    """What those files take."""
    unattributed_tokens: int
    """Rows of no request: not written."""
    dropped_tokens: int
    """Rows that the publishers dropped since the recording began."""
    left_out_tokens: int
    """Rows that not all pipeline stages told of (one had dropped them, say), and that are not written."""
    corrupt_records: int
    """Records that contradicted themselves and were left out."""
    skipped_records: int
    """Records that were gone when the recording went on where an earlier one had ended."""
    error: str | None
    """Why the recording failed."""


class Stats(CollectorStats):
    """Figures of a lens."""

    memory_limit_bytes: int
    """What the requests' rows may take."""
    recordings: list[RecordingStats]
    error: str | None
    """Why the capture switched itself off, if it did."""


class RowBlock(TypedDict):
    """Rows in the order of their records: the columns of RequestRows, with `requests` u32 [n], indices into `ids`,
    `arenas` u32 [n], indices into `ranges`, and `kv_slots` u32 [n], NO_SLOT where the engine did not tell.

    ends: (index into `ranges`, request id, positions that count, state). ranges: (rank, pid, start time, creation time,
    first record, last record) of each arena. unattributed, corrupt: rows of no request and broken records, both left
    out.
    """

    ids: list[str]
    requests: npt.NDArray[np.uint32]
    arenas: npt.NDArray[np.uint32]
    positions: npt.NDArray[np.uint32]
    token_ids: npt.NDArray[np.uint32]
    kv_slots: npt.NDArray[np.uint32]
    phases: npt.NDArray[np.uint8]
    steps: npt.NDArray[np.uint64]
    times: npt.NDArray[np.int64]
    experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    weights: npt.NDArray[np.float16] | None
    ends: list[tuple[int, str, int, EndState]]
    ranges: list[tuple[int, int, int, int, int, int]]
    unattributed: int
    corrupt: int
