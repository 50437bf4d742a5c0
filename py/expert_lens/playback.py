"""A trace as a running capture: its rows are published again, at their own pace or another; every view shows them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from expert_lens import trace
from expert_lens._core import NO_TOKEN, Writer
from expert_lens.errors import OptionError

if TYPE_CHECKING:
    from expert_lens.types import EndState, Span

__all__ = ["Playback"]

WAIT_SECONDS = 10.0
"""How long the writer waits for readers that are behind, before it drops a step."""
REQUEST = ("source", "request")


class Playback:
    """Publishes the rows of a trace from a thread, a step at a time: what a lens takes for the tap of an engine.

    `speed`: how much faster than it was recorded; None: as fast as it is read. All rows are held in memory.

    Raises OptionError as `expert_lens.scan`, and what `Writer` raises.
    """

    lost_tokens = 0

    def __init__(
        self,
        folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        capture: str,
        *,
        speed: float | None,
        arena_bytes: int,
        directory: str | None,
    ) -> None:
        folders = [folder] if isinstance(folder, str | os.PathLike) else list(folder)
        rows = trace.scan(folders).collect()
        infos = [info for one in folders for info in trace.part_infos(Path(one))]
        facts = infos[0]["model"]
        self.error: Exception | None = None
        """Why it stopped before its end; None while all is well."""
        self._name = capture
        self._speed = speed
        self._requests = _requests(rows, infos)
        self._rows = (
            rows.filter(pl.col("experts").is_not_null())
            .join(self._requests.select(*REQUEST, "index"), on=REQUEST, how="left")
            .sort("time", "source", "step", "index", "position")
        )
        self._writer = Writer(
            capture,
            layers=list(facts["layers"]),
            num_experts=facts["num_experts"],
            top_k=facts["top_k"],
            weights=facts["weights"],
            engine=facts["engine"],
            engine_version=facts["engine_version"],
            model=facts["model"],
            arena_bytes=arena_bytes,
            on_full="wait",
            wait_timeout=WAIT_SECONDS,
            directory=directory,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expert-lens-playback", daemon=True)

    def start(self) -> None:
        """Begin to publish. Whoever is to see all of it has attached by now."""
        self._thread.start()

    def request(self, name: str) -> AbstractContextManager[None]:
        """Raises OptionError: the requests of a trace have their names."""
        raise OptionError(f"{name!r} can name no request here: capture {self._name!r} plays a trace, with its own.")

    def close(self) -> None:
        """Stop, and end the capture. Safe to call twice."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._writer.close()

    def _run(self) -> None:
        try:
            self._publish()
        except Exception as error:
            self.error = error
        self._writer.close()

    def _publish(self) -> None:
        rows = self._rows
        times = rows["time"].to_physical().to_numpy()
        index = rows["index"].to_numpy()
        requests = self._requests.to_dicts()
        last_rows = rows.with_row_index("row").group_by("index").agg(pl.col("row").max())
        ends: dict[int, int] = dict(last_rows.select("row", "index").iter_rows())
        changes = rows.select((pl.struct("source", "step") != pl.struct("source", "step").shift()).fill_null(True))
        starts = np.flatnonzero(changes.to_series().to_numpy()).tolist()
        batch: list[Span] = []
        began = time.monotonic()
        for first, end in zip(starts, [*starts[1:], len(rows)], strict=True):
            if self._speed is not None:
                due = began + float(times[first] - times[0]) * 1e-9 / self._speed
                self._stop.wait(max(0.0, due - time.monotonic()))
            step = rows[first:end]
            spans = _spans(requests, index[first:end], step["phase"].to_physical().to_numpy())
            if spans != batch:
                self._writer.set_batch(spans)
                batch = spans
            if self._stop.is_set():
                return
            self._write(step)
            for row in range(first, end):
                if (which := ends.get(row)) is not None and (length := requests[which]["num_positions"]) is not None:
                    self._writer.finish(which + 1, requests[which]["id"], length, requests[which]["state"])

    def _write(self, step: pl.DataFrame) -> None:
        experts = np.ascontiguousarray(step["experts"].to_numpy())
        token_ids = step["token_id"].fill_null(NO_TOKEN).to_numpy()
        weights: Any = step["weights"].to_numpy().astype(np.float16) if "weights" in step.columns else None
        positions = np.ascontiguousarray(step["position"].to_numpy())
        self._writer.publish(experts, np.ascontiguousarray(token_ids), positions, weights)


def _spans(requests: list[dict[str, Any]], index: Any, phases: Any) -> list[Span]:
    """Whose the rows of a step are: a span for each run of one request and phase."""
    starts = np.flatnonzero(np.r_[True, (index[1:] != index[:-1]) | (phases[1:] != phases[:-1])]).tolist()
    spans: list[Span] = []
    for start, end in zip(starts, [*starts[1:], len(index)], strict=True):
        request = requests[index[start]]
        phase: Literal["prefill", "decode"] = "prefill" if phases[start] == 0 else "decode"
        number = request["index"] + 1
        spans.append((number, request["id"], start, end - start, request["prompt_tokens"], phase))
    return spans


def _requests(rows: pl.DataFrame, infos: list[trace.PartInfo]) -> pl.DataFrame:
    """The trace's requests: source, request, index, id (an id that other sources have too gets `#2`, `#3`, ...),
    prompt_tokens, num_positions: how many count, null if a recording does not say that it has ended; and state: how it
    has.
    """
    requests = (
        rows.group_by(*REQUEST, maintain_order=True)
        .agg(
            begin=pl.col("time").min(),
            prompt_tokens=(pl.col("position").filter(pl.col("phase") == "prefill").max() + 1).fill_null(0),
            length=pl.col("position").max() + 1,
        )
        .sort("begin", *REQUEST, nulls_last=True)
    )
    ends = {
        (trace.source_name(info["capture"], info["arenas"][arena][:4], info["host"]), request): (num_positions, state)
        for info in infos
        for arena, request, num_positions, state in info["ends"]
    }
    recorded = {
        trace.source_name(info["capture"], arena, info["host"]) for info in infos for arena, _ in trace.recorded(info)
    }
    times_used: dict[str, int] = {}
    ids: list[str] = []
    told: list[tuple[int | None, EndState]] = []
    for source, request, length in requests.select(*REQUEST, "length").iter_rows():
        times_used[request] = times_used.get(request, 0) + 1
        ids.append(request if times_used[request] == 1 else f"{request}#{times_used[request]}")
        # An export says how long each request is, a recording only when it has ended.
        told.append(ends.get((source, request), (None if source in recorded else length, "aborted")))
    return requests.with_columns(
        id=pl.Series(ids, dtype=pl.String),
        num_positions=pl.Series([length for length, _ in told], dtype=pl.UInt32),
        state=pl.Series([state for _, state in told], dtype=pl.String),
    ).with_row_index("index")
