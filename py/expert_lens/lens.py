"""The lens: everything that a person asks of a capture."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from expert_lens import _core
from expert_lens.enabling import enabled_directory
from expert_lens.engines import find_engine
from expert_lens.errors import (
    ExpertLensError,
    MissingRowsError,
    OptionError,
    UnknownRequestError,
    UnsupportedModelError,
)
from expert_lens.options import (
    check_capture_name,
    check_count,
    check_flag,
    check_folder_path,
    check_seconds,
    parse_bytes,
)
from expert_lens.types import CaptureFacts, ModelFacts, Phase, RequestRows, Stats

if TYPE_CHECKING:
    import polars as pl

    from expert_lens.recording import Recording
    from expert_lens.trace import Columns
    from expert_lens.widgets import Heatmap

__all__ = ["Lens", "attach", "captures", "open_trace"]

SYNC_TIMEOUT = 1.0
"""Seconds that a question waits for rows that were reserved before it and have not landed."""
NAMED_POSITIONS = 8
"""How many missing positions a message spells out."""

_attached = itertools.count()


class EngineTap(Protocol):
    """What an engine's `attach` gives for an engine in this process."""

    @property
    def error(self) -> Exception | None:
        """Why the capture switched itself off, or None."""

    @property
    def lost_tokens(self) -> int:
        """Rows lost on the way to the writer."""

    def request(self, name: str) -> AbstractContextManager[None]:
        """Name the requests of the calls in this block."""

    def close(self) -> None:
        """Detach, and end the capture."""


class Tokenizer(Protocol):
    """What a lens needs of a tokenizer; those of transformers have it."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of these tokens."""


def captures(directory: str | os.PathLike[str] | None = None) -> list[str]:
    """Names of this user's running captures, sorted; each can be given to `attach`.

    `directory`: where captures are, $EXPERT_LENS_DIR or /dev/shm/expert-lens-<uid> if None.
    """
    return sorted({facts["capture"] for facts in _found(directory) if facts["alive"]})


def attach(
    engine: Any,
    tokenizer: Tokenizer | None = None,
    weights: bool = False,
    memory: int | str = "1GiB",
    *,
    name: str | None = None,
    arena: int | str = "256MiB",
    on_full: Literal["drop", "wait"] = "drop",
    wait_timeout: float = 1.0,
    history: int = 16384,
    lossless: bool | None = None,
    directory: str | os.PathLike[str] | None = None,
) -> Lens:
    """See the routed experts of a model in this process, of an engine's, or of a running capture by its name.

    `engine`: a transformers model, an `sglang.Engine` started behind `enable()`, or the name of a capture (see
    `captures`). `tokenizer`: gives `frame` a column of text. `weights`: also capture the routing weights. `memory`:
    what the requests' rows may take here; the oldest requests make way. `history`: rows kept for `counts(last=...)`.

    For a model: `name` of the capture (made from the process id if None), `arena` size of its shared memory,
    `on_full` what happens to a step for which there is no room: "drop" it and count it, or "wait" up to
    `wait_timeout` seconds. For an engine and a name, the publishing process decides all of these.

    `lossless`: have the publisher keep what this lens has not read. By default true for a model or an engine, and false
    for a name: a notebook that somebody stopped must not take the room of a running server. `directory`: where captures
    are, $EXPERT_LENS_DIR or /dev/shm/expert-lens-<uid> if None.

    Raises NotMoEError and UnsupportedModelError for what cannot be seen into, EngineHookError for an engine that was
    not enabled or is not known, CaptureNotFoundError for an unknown name, CaptureInUseError for a name that is taken,
    ArenaSpaceError when the arena does not fit, OptionError for an option that cannot be used.
    """
    where = None if directory is None else check_folder_path("directory", directory)
    memory_bytes, arena_bytes = parse_bytes("memory", memory), parse_bytes("arena", arena)
    if on_full not in ("drop", "wait"):
        raise OptionError(f"on_full is {on_full!r}; give 'drop' or 'wait'.")
    history = check_count("history", history, "the number of rows to keep for counts(last=...)")
    wait_timeout = check_seconds("wait_timeout", wait_timeout)
    weights = check_flag("weights", weights)
    lossless = None if lossless is None else check_flag("lossless", lossless)
    if name is not None:
        check_capture_name(name)
    found = None if isinstance(engine, str) else find_engine(engine)
    if isinstance(engine, str) or hasattr(found, "find_capture"):
        options = {"name": name, "arena": arena, "on_full": on_full, "wait_timeout": wait_timeout, "weights": weights}
        _refuse_publishers_options(options)
        if found is None:
            capture = check_capture_name(engine)
        else:
            where = where or enabled_directory()
            capture = found.find_capture(engine, where)
        collector = _core.Collector(
            capture,
            directory=where,
            # What a notebook does to an engine of its own is its own affair.
            lossless=found is not None if lossless is None else lossless,
            memory_bytes=memory_bytes,
            history=history,
            prompt=True,
        )
        return Lens(collector, tokenizer, directory=where, memory_bytes=memory_bytes)
    if found is None:
        raise UnsupportedModelError(
            f"expert_lens cannot attach to a {type(engine).__module__}.{type(engine).__qualname__}. Give a "
            "transformers model (PreTrainedModel), an sglang.Engine, or the name of a running capture; "
            "expert_lens.captures() lists them."
        )
    engine_name = found.__name__.rpartition(".")[2]
    capture = f"{engine_name}-{os.getpid()}-{next(_attached)}" if name is None else name
    tap: EngineTap = found.attach(
        engine,
        capture,
        weights=weights,
        arena_bytes=arena_bytes,
        on_full=on_full,
        wait_timeout=wait_timeout,
        directory=where,
    )
    try:
        collector = _core.Collector(
            capture,
            directory=where,
            lossless=lossless is not False,
            memory_bytes=memory_bytes,
            history=history,
            # The model has these cores too, and every question is answered up to date anyway.
            prompt=False,
        )
    except BaseException:
        tap.close()
        raise
    return Lens(collector, tokenizer, tap=tap, directory=where, memory_bytes=memory_bytes)


def _refuse_publishers_options(given: dict[str, Any]) -> None:
    defaults = {"name": None, "arena": "256MiB", "on_full": "drop", "wait_timeout": 1.0, "weights": False}
    if ours := [option for option, value in given.items() if value != defaults[option]]:
        raise OptionError(
            f"{', '.join(ours)} cannot be chosen when attaching to a capture that another process publishes: that "
            "process has decided. Leave it out; expert_lens.enable takes such options."
        )


def open_trace(
    folder: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Tokenizer | None = None,
    memory: int | str = "1GiB",
    *,
    speed: float | None = 1.0,
    name: str | None = None,
    arena: int | str = "64MiB",
    history: int = 16384,
    directory: str | os.PathLike[str] | None = None,
) -> Lens:
    """See a trace as if its engine ran now: a lens whose capture publishes the trace's rows again, step by step.

    `folder`: one or several, as for `scan`; all of it is read into memory. `speed`: 1.0 is the pace at which it was
    recorded, 10 ten times that, None as fast as it is read. A request whose id other sources of the trace have too gets
    `#2`, `#3`, ...; one whose end the trace does not tell ends as aborted. Steps and times are those of now. The other
    options are as for `attach`; other processes can attach by name.

    Raises OptionError for a folder without a trace, traces of different models, and options that cannot be used.
    """
    from expert_lens.playback import Playback

    if speed is not None and not (check_seconds("speed", speed) > 0):
        raise OptionError(f"speed is {speed!r}; give how much faster than recorded, above 0, or None for no waiting.")
    memory_bytes, arena_bytes = parse_bytes("memory", memory), parse_bytes("arena", arena)
    history = check_count("history", history, "the number of rows to keep for counts(last=...)")
    where = None if directory is None else check_folder_path("directory", directory)
    capture = f"trace-{os.getpid()}-{next(_attached)}" if name is None else check_capture_name(name)
    playback = Playback(folder, capture, speed=speed, arena_bytes=arena_bytes, directory=where)
    try:
        collector = _core.Collector(
            capture, directory=where, lossless=True, memory_bytes=memory_bytes, history=history, prompt=False
        )
    except BaseException:
        playback.close()
        raise
    playback.start()
    return Lens(collector, tokenizer, tap=playback, directory=where, memory_bytes=memory_bytes)


class Lens:
    """What one capture shows: counts, requests, their routed experts, frames, files; in a notebook, the heatmap.

    `attach` makes one. Every question is answered with all that was published before it was asked. Used as a context
    manager, or closed, it leaves the engine as it was; what was collected can still be asked for.
    """

    def __init__(
        self,
        collector: _core.Collector,
        tokenizer: Tokenizer | None = None,
        *,
        tap: EngineTap | None = None,
        directory: str | None = None,
        memory_bytes: int,
    ) -> None:
        self._collector = collector
        self._tokenizer = tokenizer
        self._tap = tap
        self._directory = directory
        self._memory_bytes = memory_bytes
        self._facts = collector.facts
        self._recordings: list[Recording] = []
        self._closed = False
        self._closing = threading.RLock()
        self._heatmap: Heatmap | None = None
        """What shows this lens in a notebook, in as many cells as display it, and goes on showing a closed one."""
        self._told_error: str | None = None
        self._pieces: dict[int, str] = {}

    # ---- what the model is ----

    @property
    def name(self) -> str:
        """The capture's name: what another process gives to `attach`."""
        return self._facts["capture"]

    @property
    def facts(self) -> ModelFacts:
        """What the publishing process says of its model and itself."""
        return self._facts

    @property
    def layers(self) -> Sequence[int]:
        """The model's indices of its L routed layers, in order."""
        return self._facts["layers"]

    @property
    def num_experts(self) -> int:
        """E, experts a layer."""
        return self._facts["num_experts"]

    @property
    def top_k(self) -> int:
        """K, experts chosen for one token in one layer."""
        return self._facts["top_k"]

    @property
    def title(self) -> str:
        """One line: model, engine and its version, capture."""
        facts = self._facts
        return f"{short_model_name(facts['model'])} · {facts['engine']} {facts['engine_version']} · {self.name}"

    # ---- what it did ----

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        """How many tokens each expert got, u64 [L, E]: of all tokens or the last `last`, of one phase or both.

        With both, it is the last so many tokens of that phase. Raises OptionError for an unknown phase, and for a
        `last` that is not between 1 and the history.
        """
        if phase not in (None, "prefill", "decode"):
            raise OptionError(f"phase is {phase!r}; give 'prefill', 'decode', or None for both.")
        newest = None if last is None else check_count("last", last, "None for all tokens, or a number of them")
        self._look()
        return self._collector.counts(phase, newest)

    def requests(self) -> pl.DataFrame:
        """The requests that are held, in the order of their coming.

        request; state ("running", "finished", "aborted"); prompt_tokens; tokens: positions whose forward ran;
        missing: those of them whose row was dropped, or computed before attaching.
        """
        import polars as pl

        self._look()
        columns = self._collector.requests()
        return pl.DataFrame(
            {
                "request": pl.Series(columns["request"], dtype=pl.String),
                "state": pl.Series(columns["state"], dtype=pl.Enum(["running", "finished", "aborted"])),
                "prompt_tokens": pl.Series(columns["prompt_tokens"], dtype=pl.UInt32),
                "tokens": pl.Series(columns["tokens"], dtype=pl.UInt32),
                "missing": pl.Series(columns["missing"], dtype=pl.UInt32),
            }
        )

    def routed_experts(self, request: str, fill: int | None = None) -> npt.NDArray[Any]:
        """The experts of each of a request's tokens, [n, L, K], in the order that the router gave them.

        n: positions whose forward ran; the last token that was generated went through no forward. u8 if the model has
        at most 256 experts, else u16; int32 if `fill` is not in that type's range (-1, say).

        Raises UnknownRequestError for a request that is not held, and MissingRowsError, with the positions, when
        rows are missing and `fill` is None.
        """
        rows = self._rows(request)
        missing = np.flatnonzero(rows["phases"] == _core.MISSING)
        experts: npt.NDArray[Any] = rows["experts"]
        if not missing.size:
            return experts
        if fill is None:
            first = ", ".join(map(str, missing[:NAMED_POSITIONS]))
            more = f" and {missing.size - NAMED_POSITIONS} more" if missing.size > NAMED_POSITIONS else ""
            raise MissingRowsError(
                f"Request {request!r} of capture {self.name!r} lacks {missing.size} of its {len(experts)} rows, at "
                f"position {first}{more}: they were dropped, or computed before attaching. Pass fill=-1 to mark them; "
                "lens.stats says what was dropped.",
                tuple(missing.tolist()),
            )
        limits = np.iinfo(experts.dtype)
        if not limits.min <= fill <= limits.max:
            experts = experts.astype(np.int32)
        experts[missing] = fill
        return experts

    def routing_weights(self, request: str) -> npt.NDArray[np.float32]:
        """The weights that the chosen experts got, float32 [n, L, K], NaN where the row is missing.

        Raises OptionError if the capture has no weights, and UnknownRequestError.
        """
        if not self._facts["weights"]:
            raise OptionError(
                f"Capture {self.name!r} has no routing weights; attach with weights=True where the model runs."
            )
        rows = self._rows(request)
        assert rows["weights"] is not None
        weights = rows["weights"].astype(np.float32)
        weights[rows["phases"] == _core.MISSING] = np.nan
        return weights

    def frame(self, request: str | None = None) -> pl.DataFrame:
        """One row a token, of every request that is held, or of one.

        request; position; token_id; token (its text, if the lens has a tokenizer); phase; step; time; experts
        Array(u8 or u16, (L, K)); weights Array(f32, (L, K)) if captured. A missing row has nulls.
        """
        frame = self._frame(self._request_ids() if request is None else [request], strict=request is not None)
        if self._tokenizer is None:
            return frame
        import polars as pl

        ids = frame["token_id"]
        for token_id in ids.drop_nulls().unique():
            if token_id not in self._pieces:
                self._pieces[token_id] = self._tokenizer.decode([token_id])
        text = pl.Series("token", [None if i is None else self._pieces[i] for i in ids], dtype=pl.String)
        return frame.insert_column(3, text)

    @property
    def stats(self) -> Stats:
        """What was seen, what was lost and why, and what it takes; `expert_lens.types.Stats` says what each means."""
        if not self._closed:
            self._collector.sync(SYNC_TIMEOUT)
        stats = self._collector.stats()
        if self._tap is not None:
            stats["dropped_tokens"] += self._tap.lost_tokens
        return {
            **stats,
            "memory_limit_bytes": self._memory_bytes,
            "recordings": [recording.stats for recording in self._recordings],
            "error": self._error,
        }

    def tokens_seen(self) -> int:
        """Tokens read so far: cheap, and a little behind `stats`."""
        return self._collector.tokens

    # ---- files ----

    def to_parquet(self, folder: str | os.PathLike[str]) -> str:
        """Write what is held as one more part file of the trace in `folder`, and give the file's path.

        `expert_lens.scan(folder)` reads it. Raises OptionError if `folder` is no folder, or holds another model's
        trace.
        """
        from expert_lens import trace

        path = trace.check_folder(folder, self._facts)
        self._look()
        columns, arenas = self._collector.requests(), self._collector.arenas()
        requests = list(zip(columns["request"], columns["arena"], columns["tokens"], columns["state"], strict=True))
        by_request = {request: trace.source_name(self.name, arenas[arena]) for request, arena, _, _ in requests}
        # One that was aborted may have been so by the end of its engine, of which nobody told how many positions count.
        ends = [(arena, request, tokens, state) for request, arena, tokens, state in requests if state == "finished"]
        rows = trace.with_sources(self._frame(list(by_request)), by_request)
        no_records = [(*arena, 1, 0) for arena in arenas]
        name = f"export-{trace.timestamp()}"
        return str(trace.write_part(path, name, rows, self.name, self._facts, no_records, ends))

    def record(self, folder: str | os.PathLike[str]) -> Recording:
        """Go on writing every row, from the oldest that the arena still has, as part files of a trace in `folder`.

        A thread writes until the recording is closed (it is a context manager), the lens is closed, or the capture
        ends. Until a row is durable the publisher keeps it. A recording of the same capture in the same folder goes
        on where the last one ended, also after it was killed. `expert-lens record` does the same in a process of its
        own. Raises OptionError if `folder` is no folder, or holds another model's trace.
        """
        from expert_lens.recording import Recording

        if self._closed:
            raise ExpertLensError(f"This lens on capture {self.name!r} is closed; attach again to record.")
        recording = Recording(self.name, folder, directory=self._directory)
        self._recordings.append(recording)
        return recording

    # ---- naming, closing, showing ----

    def request(self, name: str) -> AbstractContextManager[None]:
        """Name the requests of the calls in this block: `name`, or `name.0`, `name.1`, ... for a batch.

        A name used before gets `#2`, `#3`, ... appended. Raises OptionError for a name that cannot be used, and on a
        lens that was attached by name: there, the engine's own request ids count.
        """
        if self._tap is None:
            raise OptionError(
                f"This lens watches capture {self.name!r} of another process, whose engine names its requests."
            )
        return self._tap.request(name)

    def close(self) -> None:
        """Detach from the engine and end the capture, or stop watching it; safe to call twice.

        What was collected can still be asked for; its memory is freed with the lens. Raises RecordingError if a
        recording failed.
        """
        with self._closing, contextlib.ExitStack() as steps:
            if self._closed:
                return
            # In reverse order, each of them even if one before has raised.
            steps.callback(self._end)
            steps.callback(self._look)
            for recording in reversed(self._recordings):
                steps.callback(recording.close)
            if self._tap is not None:
                steps.callback(self._tap.close)

    def __enter__(self) -> Lens:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A lens that nobody holds watches nothing; the engine must not go on paying for it.
        if hasattr(self, "_closed") and not self._closed and self._tap is not None:
            self._tap.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        shape = f"{len(self.layers)} layers x {self.num_experts} experts, top-{self.top_k}"
        return f"<Lens on {self.name!r} ({state}): {self._facts['model']}, {shape}, {self.tokens_seen()} tokens>"

    def _ipython_display_(self, **options: Any) -> None:
        from expert_lens.widgets import Heatmap

        if self._heatmap is None:
            self._heatmap = Heatmap(self)
        self._heatmap._ipython_display_(**options)

    # ---- inside ----

    def _end(self) -> None:
        self._closed = True
        self._collector.close()

    @property
    def _error(self) -> str | None:
        """Why the capture has switched itself off, as its tap here or its publisher elsewhere says."""
        if self._tap is not None and self._tap.error is not None:
            return f"{type(self._tap.error).__name__}: {self._tap.error}"
        return self._collector.failure

    def _look(self) -> None:
        """Read all that was published before now, and say once if the capture has switched itself off."""
        if not self._closed:
            self._collector.sync(SYNC_TIMEOUT)
        error = self._error
        if error is not None and error != self._told_error:
            self._told_error = error
            warnings.warn(
                f"Capture {self.name!r} has switched itself off; rows from there on are missing. {error}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _request_ids(self) -> list[str]:
        self._look()
        # A capture whose engine uses an id twice gives the newest request's rows for it, once.
        return list(dict.fromkeys(self._collector.requests()["request"]))

    def _rows(self, request: str) -> RequestRows:
        self._look()
        rows = self._collector.rows(request)
        if rows is None:
            raise self._unknown(request)
        return rows

    def _unknown(self, request: str) -> ExpertLensError:
        if request in self._collector.requests()["request"]:
            return MissingRowsError(
                f"Request {request!r} of capture {self.name!r} lacks so many rows that to fill them up would take more "
                f"than the {self._memory_bytes} bytes of this lens. Attach with more memory, or record to files."
            )
        if self._collector.was_evicted(request):
            return UnknownRequestError(
                f"Request {request!r} of capture {self.name!r} had to make room for newer ones: this lens keeps "
                f"{self._memory_bytes} bytes of rows. Attach with more memory, or record to files."
            )
        return UnknownRequestError(
            f"No request {request!r} in capture {self.name!r}; lens.requests() lists those that are held."
        )

    def _frame(self, requests: Sequence[str], strict: bool = False) -> pl.DataFrame:
        import polars as pl

        from expert_lens import trace

        self._look()
        ids, parts = [], []
        for request in requests:
            rows = self._collector.rows(request)
            if rows is not None:
                ids.append(request)
                parts.append(rows)
            elif strict:
                raise self._unknown(request)
        columns = _join(parts, self._facts)
        lengths = [len(rows["phases"]) for rows in parts]
        names = pl.Series(ids, dtype=pl.String).gather(np.repeat(np.arange(len(ids), dtype=np.uint32), lengths))
        return trace.frame(self._facts, names, columns)


def short_model_name(name: str) -> str:
    """The last part of a model's path or hub name."""
    return re.sub(r"/+$", "", name).rsplit("/", 1)[-1]


def _join(parts: list[RequestRows], facts: ModelFacts) -> Columns:
    """Rows of several requests below each other, each with its positions."""
    shape = (0, len(facts["layers"]), facts["top_k"])
    dtype = np.uint8 if facts["num_experts"] <= 256 else np.uint16

    def join(name: str, empty: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.concatenate([empty, *(rows[name] for rows in parts)])  # type: ignore[literal-required]

    positions = [np.arange(len(rows["phases"]), dtype=np.uint32) for rows in parts]
    return {
        "positions": np.concatenate([np.empty(0, np.uint32), *positions]),
        "token_ids": join("token_ids", np.empty(0, np.uint32)),
        "phases": join("phases", np.empty(0, np.uint8)),
        "steps": join("steps", np.empty(0, np.uint64)),
        "times": join("times", np.empty(0, np.int64)),
        "experts": join("experts", np.empty(shape, dtype)),
        "weights": join("weights", np.empty(shape, np.float16)) if facts["weights"] else None,
    }


def _found(directory: str | os.PathLike[str] | None) -> list[CaptureFacts]:
    return _core.captures(None if directory is None else check_folder_path("directory", directory))
