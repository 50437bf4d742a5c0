"""The Rust side of expert_lens: arenas, the writer's and the reader's end of the handoff, and the collector."""

from collections.abc import Sequence
from typing import Final, Literal, final

import numpy as np
import numpy.typing as npt

from expert_lens.types import (
    ArenaKey,
    CaptureFacts,
    CollectorStats,
    EndState,
    ModelFacts,
    Phase,
    Publisher,
    RequestColumns,
    RequestRows,
    RowBlock,
    Span,
)

__all__ = [
    "DEBUG_BUILD",
    "LAYOUT_VERSION",
    "MISSING",
    "NO_SLOT",
    "NO_TOKEN",
    "ArenaCorruptError",
    "ArenaError",
    "ArenaPermissionError",
    "ArenaSpaceError",
    "ArenaVersionError",
    "CaptureInUseError",
    "CaptureNotFoundError",
    "Collector",
    "CudaError",
    "ExpertLensError",
    "Mailbox",
    "ReaderTableFullError",
    "RowStream",
    "Turn",
    "Writer",
    "__version__",
    "captures",
    "clean",
    "default_directory",
    "exchange_capture_mode",
]

__version__: Final[str]
LAYOUT_VERSION: Final[int]
"""Version of the arena's memory layout; independent of the package's version."""
DEBUG_BUILD: Final[bool]

class ExpertLensError(Exception):
    """Base class of every error that expert_lens raises."""

class ArenaError(ExpertLensError):
    """Something about an arena or a capture is not as it must be."""

class CaptureNotFoundError(ArenaError):
    """No capture of that name."""

class CaptureInUseError(ArenaError):
    """A live process already publishes under that name."""

class ArenaSpaceError(ArenaError):
    """The shared memory has no room for the arena."""

class ArenaCorruptError(ArenaError):
    """The arena's contents contradict themselves."""

class ArenaVersionError(ArenaError):
    """The arena's layout version is not the one that this build knows."""

class ArenaPermissionError(ArenaError):
    """The arena or its folder belongs to someone else or is open to others."""

class CudaError(ExpertLensError):
    """The CUDA driver refused a call, or is not there."""

class ReaderTableFullError(ArenaError):
    """Every reader entry of the arena is taken."""

@final
class Writer:
    """The publishing end of one arena: one for a process, used by one thread at a time.

    other_stages: how many pipeline stages there are beside this one; each publishes its own layers under a rank of its
    own, and must see the same forwards in the same order.

    Raises CaptureInUseError, ArenaSpaceError, ArenaPermissionError when the arena cannot be created, and
    OptionError for a name, facts or options outside the layout's limits.
    """

    def __new__(
        cls,
        capture: str,
        *,
        layers: Sequence[int],
        num_experts: int,
        top_k: int,
        rank: int = 0,
        other_stages: int = 0,
        weights: bool = False,
        kv_slots: int = 0,
        arena_bytes: int = 268435456,
        on_full: Literal["drop", "wait"] = "drop",
        wait_timeout: float = 1.0,
        engine: str = "",
        engine_version: str = "",
        model: str = "",
        directory: str | None = None,
    ) -> Writer: ...
    def set_batch(self, spans: Sequence[Span]) -> None:
        """State whose rows the next steps hold, until the next call.

        Raises OptionError when spans overlap, or when an id is longer than 255 bytes.
        """

    def publish(
        self,
        experts: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
        token_ids: npt.NDArray[np.uint32] | None,
        positions: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.float16] | None = None,
        *,
        kv_slots: npt.NDArray[np.uint32] | None = None,
    ) -> bool:
        """Publish one step: experts [n, L, K], u8 if the model has at most 256 experts, else u16; token_ids
        [n] or None; positions [n], 2^32 - 1 for a row that is none (a drafted token that was rejected); weights
        [n, L, K] if the writer was made with weights; kv_slots [n], below what the writer was made for, where the
        engine's cache has such. C-contiguous.

        Returns False if any of the step's rows had to be dropped (they are counted). Never blocks unless
        on_full="wait". Raises ValueError when shapes or dtypes are not these, or the batch's spans end past n.
        """

    def publish_next(self, experts: npt.NDArray[np.int64], token_ids: npt.NDArray[np.int64] | None) -> bool:
        """Publish one more token of each row of the last step: the same batch, each position one further.

        experts: n * L * K ids in the order of [n, L, K], of any shape, checked and narrowed here; token_ids: n ids.
        C-contiguous. The short way for decoding; for writers without weights.

        Returns as `publish`. Raises ValueError when the last step had another number of rows, or an id is no expert's.
        """

    def prepare(self, device: int) -> None:
        """Pin the arena and make it known to a CUDA device, before its first step has to: that takes some milliseconds
        for each 100 MB, in which the engine would wait.

        Raises CudaError when the driver refuses, or there is none.
        """

    def stream(self, device: int) -> int:
        """A raw stream on a CUDA device that is expert_lens's own, so that nobody captures a graph on it: the same for
        all writers, as long as the process runs and nobody resets the device.

        Raises CudaError as `prepare`.
        """

    def publish_device(
        self,
        experts: int,
        num_rows: int,
        positions: npt.NDArray[np.uint32] | int,
        *,
        device: int,
        stream: int,
        token_ids: int | None = None,
        kv_slots: int | None = None,
        weights: int | None = None,
    ) -> bool:
        """Publish one step that a CUDA device holds, on the raw stream that computed it; returns when that is enqueued.

        experts: address of u8 or u16 [n, L, K] on the device, as in `publish`; positions [n], or the address of u32
        [n]; token_ids, kv_slots: addresses of u32 [n]; weights: address of f16 [n, L, K] if the writer was made with
        weights. All C-contiguous, and left as they are until the stream has come so far: memory that torch's allocator
        gave to that stream, also if it was freed there since. The stream must not be in a capture.

        Returns as `publish`. Raises CudaError when the driver refuses; nothing more is published then.
        """

    def drop_step(self, num_rows: int) -> None:
        """A forward of so many rows that are not published: they count as dropped, and readers know of it. Of none:
        nothing happens.
        """

    def fail(self, reason: str) -> None:
        """Tell readers that the capture has switched itself off, and why; at most 255 bytes are kept."""

    def publish_prefix(
        self,
        spans: Sequence[Span],
        kv_slots: npt.NDArray[np.uint32] | int,
        *,
        device: int | None = None,
        stream: int = 0,
    ) -> bool:
        """Publish where in the engine's cache the beginnings of requests stand that it does not compute again.

        Row i of a span is position i of its request. Readers that saw these slots filled know their rows; others are
        missing.

        kv_slots: [n]; or with `device` the address of u32 [n] there, as in `publish_device` on that raw stream.

        Returns as `publish`. Raises OptionError as `set_batch`, and when there are not n of them.
        """

    def mailbox(self, device: int, table: Sequence[int], *, entries: int = 512) -> Mailbox | None:
        """A mailbox for a CUDA graph of that device, with `table` (64-bit values) behind its state; before or while the
        graph is captured. None if EXPERT_LENS_PUBLISHER asks for another way to publish.

        entries: replays that may be on their way at once; what goes beyond gives no rows, and they count as dropped.

        Raises CudaError when the driver refuses, OptionError for no entries, or more than 65 536.
        """

    def publish_graph(self, mailbox: Mailbox) -> bool:
        """Publish the rows that the next replay of the mailbox's graph writes; that replay must be launched next.

        They are those of `Mailbox.set_rows`: the same as in the last replay, or stated anew. No call of the driver. The
        replay is counted in every case, also if this raises: it writes nothing then.

        Returns as `publish`; a step larger than a quarter of the ring is dropped. Raises ValueError as `publish`, or
        when no rows are stated, and CudaError when replays passed by the mailbox.
        """

    def void(self, record: int, device: int, stream: int) -> None:
        """Make a record of nothing of one whose replay has failed: what `Mailbox.retract` gave.

        Its rows count as dropped. stream: the raw stream of that device that the replay was for.

        Raises CudaError when the driver refuses; nothing more is published then.
        """

    def finish(
        self,
        number: int,
        request: str,
        num_positions: int,
        state: EndState = "finished",
    ) -> None:
        """State that a request has ended and that its first num_positions positions count; rows past them are void.

        An event that does not fit is kept and published with the next call.
        """

    def close(self) -> None:
        """Mark the capture as ended and remove its file; readers that hold it keep what it holds."""

    @property
    def path(self) -> str: ...
    @property
    def publisher(self) -> Publisher: ...
    @property
    def steps(self) -> int: ...
    @property
    def dropped_tokens(self) -> int: ...

@final
class Mailbox:
    """Where the kernels of one CUDA graph look, at each replay, for what they are to write.

    The graph's memory in a sense: keep it for as long as the graph can be replayed. Addresses are the device's.
    """

    def set_rows(
        self, num_rows: int, *, token_ids: bool, positions: npt.NDArray[np.uint32] | None, kv_slots: bool
    ) -> None:
        """State what replays write from now on.

        token_ids, kv_slots: whether the graph writes them; positions: u32 [n], or None if the graph writes them. Its
        kernels must write these sections, as `expert_lens.kernels` does, for num_rows rows.

        Raises ValueError for positions that are not C-contiguous, or not as many as the rows.
        """

    def pass_over(self) -> None:
        """The next replay has no rows to publish; it is counted, and writes nothing."""

    def retract(self, stream: int) -> int | None:
        """The newest replay has failed, or was never launched: take its post out, and match the replays after it again.

        Gives the record that was posted for it, if one was; `Writer.void` is next. stream: the raw stream of the
        replays. Raises CudaError when the driver refuses.
        """

    @property
    def device(self) -> int:
        """Ordinal of its device."""

    @property
    def stream(self) -> int:
        """A raw stream of its own, on which nothing else runs."""

    @property
    def num_entries(self) -> int:
        """How many entries it has."""

    @property
    def entries(self) -> int:
        """Address of its entries, of 64 bytes each, in host memory."""

    @property
    def taken(self) -> int:
        """Address of the word in host memory where the device tells how many replays' posts it has read."""

    @property
    def state(self) -> int:
        """Address of the state, 128 bytes of device memory."""

    @property
    def table(self) -> int:
        """Address of the table, in device memory."""

@final
class Turn:
    """Had by one thread at a time, in a `with` block; whoever comes meanwhile does not wait: `with turn as held` says
    by `held` whether it is ours. It is False in a block inside of one of the same thread that has it.

    No interrupt comes between taking it and what gives it back: CPython looks for none there up to 3.13.
    """

    def __init__(self) -> None: ...
    @property
    def is_mine(self) -> bool:
        """Whether the thread that asks has it."""

    def __enter__(self) -> bool: ...
    def __exit__(self, kind: object, error: object, trace: object, /) -> None: ...

@final
class Collector:
    """Reads every arena of a capture in a thread of its own, into counts and requests.

    lossless: the writers keep what is not read yet. memory_bytes: what the requests' rows may take; the oldest make
    way. history: rows kept for counts over the last N. prompt: look for records every 20 us while they come, instead
    of every 4 ms.

    Of several pipeline stages a position is missing until each has published its part of the forward that computed it.

    Raises CaptureNotFoundError, and the other ArenaErrors when an arena cannot be opened; OptionError while a pipeline
    stage is not there yet.
    """

    def __new__(
        cls,
        capture: str,
        *,
        directory: str | None = None,
        lossless: bool = True,
        memory_bytes: int = 1073741824,
        history: int = 16384,
        prompt: bool = True,
    ) -> Collector: ...
    @property
    def facts(self) -> ModelFacts:
        """What the first rank says of the model; with the layers of all pipeline stages, if it is one of several."""

    @property
    def tokens(self) -> int:
        """Rows read so far; cheap."""

    @property
    def failure(self) -> str | None:
        """Why a publisher has switched its capture off, if one did."""

    def sync(self, timeout: float = 1.0) -> bool:
        """Read everything that was reserved before this call; False if not all of it landed within timeout seconds."""

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        """Counts [L, E] of all rows or of the last `last`; OptionError if last is 0 or exceeds the history."""

    def requests(self) -> RequestColumns: ...
    def rows(self, request: str) -> RequestRows | None:
        """A request's rows; None if it is not held."""

    def was_evicted(self, request: str) -> bool:
        """Whether the request was held and had to make room."""

    def stats(self) -> CollectorStats: ...
    def arenas(self) -> list[ArenaKey]:
        """The arenas read, one a rank."""

    def close(self) -> None:
        """Stop reading and let go of the arenas; what was collected stays readable."""

@final
class RowStream:
    """A lossless reader for a recorder: space is released only when the recorder says that the rows are durable.

    resume: (rank, pid, start time, creation time, record) of arenas read before; reading goes on after that record.
    """

    def __new__(
        cls,
        capture: str,
        *,
        directory: str | None = None,
        resume: Sequence[tuple[int, int, int, int, int]] | None = None,
    ) -> RowStream: ...
    def take(self, rows: int, timeout: float) -> RowBlock:
        """Wait until there are `rows` rows, or `timeout` seconds are over, or a quarter of an arena is held."""

    def release(self) -> None:
        """Everything taken so far is durable: the writers may reuse its space."""

    def stop(self) -> None:
        """Have the stream end at what is published by now; `take` gives the rest. For use from another thread."""

    @property
    def facts(self) -> ModelFacts: ...
    @property
    def skipped_records(self) -> int:
        """Records that were gone when the stream resumed."""

    @property
    def left_out_tokens(self) -> int:
        """Rows that not all pipeline stages told of, and that were left out."""

    @property
    def dropped_tokens(self) -> int:
        """Rows that the writers dropped since the stream began."""

    @property
    def is_over(self) -> bool:
        """Whether every publisher has ended or the stream was stopped, and everything published by then was taken."""

    def close(self) -> None: ...

def captures(directory: str | None = None) -> list[CaptureFacts]:
    """The arenas of this user, those of dead processes included."""

def clean(directory: str | None = None) -> int:
    """Remove the captures whose processes all died, and give how many; what they published is gone with them."""

def default_directory() -> str:
    """$EXPERT_LENS_DIR, or /dev/shm/expert-lens-<uid>."""

MISSING: Final[int]
"""Phase of a position whose row is missing."""
NO_SLOT: Final[int]
"""In RowBlock.kv_slots: the engine did not tell."""
NO_TOKEN: Final[int]
"""Token id of a row whose engine did not tell it."""

def exchange_capture_mode(mode: int) -> int:
    """Set how this thread's CUDA calls stand to stream captures (0 global, 1 thread-local, 2 relaxed: they end none);
    gives how they stood. Raises CudaError without a driver.
    """
