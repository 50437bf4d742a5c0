"""Writing a capture's rows to part files, for as long as it runs."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import polars as pl

from expert_lens import trace
from expert_lens._core import RowStream
from expert_lens.errors import RecordingError
from expert_lens.types import RecordingStats

if TYPE_CHECKING:
    from expert_lens.types import ArenaKey, RowBlock

__all__ = ["Recording"]

PART_ROWS = 1 << 17
"""Rows of a full part."""
PART_SECONDS = 5.0
"""Longest time that rows wait for their part to fill."""
EXIT_SECONDS = 10.0
"""Longest time that an interpreter that ends waits for its recordings."""

_running: weakref.WeakSet[Recording] = weakref.WeakSet()


class Recording:
    """Writes every row of a capture to part files of the trace in `folder`, in a thread of its own.

    Reading is lossless: the publisher's space is given back when the rows in it are durable. A part names the records
    whose rows it holds, so a recording of the same capture in the same folder goes on behind the last durable part.
    `wait` and `close` raise RecordingError if it failed; what was written before stays readable.

    Raises CaptureNotFoundError for an unknown capture, OptionError if `folder` is no folder, or holds another
    model's trace.
    """

    def __init__(self, capture: str, folder: str | os.PathLike[str], *, directory: str | None = None) -> None:
        self._capture = capture
        self._folder = trace.check_folder(folder)
        self._stream = RowStream(capture, directory=directory, resume=_durable(trace.part_infos(self._folder)))
        self._facts = self._stream.facts
        self._state: Literal["running", "ended", "failed"] = "running"
        self._error: Exception | None = None
        self._tokens = self._parts = self._bytes = self._unattributed = self._corrupt = self._dropped = 0
        self._left_out = 0
        try:
            trace.check_folder(folder, self._facts)
            self._folder.mkdir(parents=True, exist_ok=True)
            trace.remove_unfinished(self._folder)
            self._skipped = self._stream.skipped_records
        except BaseException:
            self._stream.close()
            raise
        # A daemon: an interpreter that ends must not wait for a capture that does not. `_close_running` asks the
        # thread to write what there is by then.
        _running.add(self)
        self._thread = threading.Thread(target=self._run, name="expert-lens-recording", daemon=True)
        self._thread.start()

    @property
    def folder(self) -> str:
        """Where the parts are; `expert_lens.scan` reads them."""
        return str(self._folder)

    @property
    def stats(self) -> RecordingStats:
        """What is durable, and what is not there and why."""
        return {
            "folder": self.folder,
            "state": self._state,
            "tokens": self._tokens,
            "parts": self._parts,
            "bytes": self._bytes,
            "unattributed_tokens": self._unattributed,
            "dropped_tokens": self._dropped,
            "left_out_tokens": self._left_out,
            "corrupt_records": self._corrupt,
            "skipped_records": self._skipped,
            "error": None if self._error is None else f"{type(self._error).__name__}: {self._error}",
        }

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the capture has ended and all of it is durable; False if that takes more than `timeout` seconds.

        Raises RecordingError if the recording failed.
        """
        self._thread.join(timeout)
        if self._error is not None:
            raise RecordingError(
                f"The recording of capture {self._capture!r} to {self._folder} failed after {self._tokens} rows in "
                f"{self._parts} parts, which stay readable. {type(self._error).__name__}: {self._error}"
            ) from self._error
        return not self._thread.is_alive()

    def close(self) -> None:
        """Make everything that is published by now durable, and stop; safe to call twice.

        Raises RecordingError if the recording failed.
        """
        self._stream.stop()
        self.wait()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recording of {self._capture!r} to {self.folder} ({self._state}): {self._tokens} tokens>"

    def _run(self) -> None:
        try:
            over = False
            while not over:
                block = self._stream.take(PART_ROWS, PART_SECONDS)
                # Asked before the block is written: what is published meanwhile belongs to the next one.
                over = self._stream.is_over
                if block["ranges"]:
                    self._write(block)
                self._stream.release()
                self._dropped = self._stream.dropped_tokens
                self._left_out = self._stream.left_out_tokens
            self._state = "ended"
        except Exception as error:  # raised by `wait` and `close`, shown in `stats`
            self._error = error
            self._state = "failed"
        finally:
            self._stream.close()
            _running.discard(self)

    def _write(self, block: RowBlock) -> None:
        """Make a block durable, also one without rows: its part says which records are done."""
        arenas: list[ArenaKey] = [(rank, pid, start, created) for rank, pid, start, created, _, _ in block["ranges"]]
        requests = pl.Series(block["ids"], dtype=pl.String).gather(block["requests"])
        sources = pl.Series([trace.source_name(self._capture, arena) for arena in arenas]).gather(block["arenas"])
        rows = trace.frame(self._facts, requests, block).insert_column(0, sources.alias("source"))
        _, _, _, created, first, _ = block["ranges"][0]
        name = f"record-{created}-{first:012}-{trace.timestamp()}"
        path = trace.write_part(self._folder, name, rows, self._capture, self._facts, block["ranges"], block["ends"])
        self._tokens += len(rows)
        self._parts += 1
        self._bytes += path.stat().st_size
        self._unattributed += block["unattributed"]
        self._corrupt += block["corrupt"]


@atexit.register
def _close_running() -> None:
    """Make what is published by now durable: a script that ends without `close` loses nothing either."""
    deadline = time.monotonic() + EXIT_SECONDS
    left = list(_running)
    for recording in left:
        recording._stream.stop()
    for recording in left:
        recording._thread.join(max(0.0, deadline - time.monotonic()))
        stats = recording.stats
        if recording._thread.is_alive() or stats["error"] is not None:
            warnings.warn(
                f"The recording to {recording.folder} did not end: {stats['tokens']} rows are durable, later ones are "
                f"not. {stats['error'] or f'It was still writing after {EXIT_SECONDS:.0f} s.'}",
                RuntimeWarning,
                stacklevel=2,
            )


def _durable(infos: list[trace.PartInfo]) -> list[tuple[int, int, int, int, int]]:
    """The last record, of each arena of this machine, that a part holds."""
    last: dict[ArenaKey, int] = {}
    for info in infos:
        if info["host"] == trace.host():
            for arena, record in trace.recorded(info):
                last[arena] = max(last.get(arena, 0), record)
    return [(*key, record) for key, record in last.items()]
