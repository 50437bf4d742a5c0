"""CUDA graphs that publish: what is recorded with a captured forward, and what is done around each replay.

To capture a forward runs none, so it gives no rows; every *replay* is a forward. `record` is called once, while the
graph is captured, in place of `Tap.publish`; from then on each replay is launched through `GraphStep.replay`, which
says whose rows it computes, or that it computes nobody's (a warm-up, an idle replay).

Where Triton is at hand, two kernels in the graph publish by themselves (`expert_lens.kernels`): the CPU only stores
where to into the graph's mailbox. Elsewhere, or where EXPERT_LENS_PUBLISHER asks, the graph packs into a buffer, and
each replay is followed by copies on its stream.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from expert_lens.errors import UnsupportedModelError
from expert_lens.steps import U32, Rows, Step
from expert_lens.streams import relaxed_capture
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens._core import Mailbox
    from expert_lens.types import Span

__all__ = ["GraphStep", "ReplayRows", "record"]


@dataclass(frozen=True, slots=True)
class ReplayRows:
    """Whose rows one replay computes: the first `num_rows` of those that the graph was captured with.

    `spans`: as in `Writer.set_batch`. `positions`: u32 [n]; None where the graph was recorded with its own.
    """

    spans: Sequence[Span]
    num_rows: int
    positions: U32 | None = None


_unclaimed: set[GraphStep] = set()
"""What was recorded and is on no graph yet: a graph whose kernels lose their memory breaks the device's context."""


class GraphStep(ABC):
    """The publishing part of one captured graph, of at most `max_rows` rows a replay."""

    def __init__(self, tap: Tap, max_rows: int, columns: _Columns) -> None:
        self.max_rows = max_rows
        self._columns = columns
        self._tap = weakref.ref(tap)
        _unclaimed.add(self)

    def attach_to(self, graph: Any) -> None:
        """Live as long as this graph, which was captured: its kernels use what this holds, be the capture on or off."""
        graph.expert_lens = self
        _unclaimed.discard(self)

    def give_up(self) -> None:
        """The capture that this was recorded in has failed: no graph will ever run it."""
        _unclaimed.discard(self)

    def belongs_to(self, tap: Tap) -> bool:
        """Whether the graph was captured for this tap."""
        return self._tap() is tap

    @abstractmethod
    def replay(self, launch: Callable[[], Any], rows: ReplayRows | None) -> None:
        """Launch one replay, by `launch()` on the current stream, and publish its rows; None: it has none.

        `launch` leaves the stream as the current one, also where it raises.

        Every replay must come by here while the capture is on, in the order of the launches: one that does not may be
        taken for another, until the capture notices, at the first replay before which all others have begun, and
        switches itself off. What `launch` raises is passed on; if the replay ran all the same its rows may be there,
        whole, or not, and count as dropped.
        """

    def _active_tap(self, rows: ReplayRows | None) -> Tap | None:
        """The tap, if this replay has rows to publish."""
        tap = self._tap()
        if rows is None or rows.num_rows == 0 or tap is None or not tap.active:
            return None
        if rows.num_rows > self.max_rows:
            tap.fail(ValueError(f"a replay of {rows.num_rows} rows, of a graph captured with {self.max_rows}"))
            return None
        if rows.positions is None and self._columns.positions is None:
            tap.fail(ValueError("a replay without positions, of a graph that was recorded without them"))
            return None
        return tap


def record(
    tap: Tap,
    step: Step,
    num_rows: int,
    *,
    token_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    kv_slots: torch.Tensor | None = None,
) -> GraphStep:
    """Record the publishing of a forward of `num_rows` rows, on the current stream, which is being captured.

    `token_ids`, `positions`, `kv_slots`: integers [num_rows], of any shape, where the graph finds them at each replay;
    of a static input its memory is read again each time.

    The kernels run beside what comes behind `Step.mark_chosen`, such as the last layer's experts and the model's head,
    and the forward is over when both are: the step's ids are held up to here. Of a step that was marked so, the columns
    must have been computed by then too, and stay as they are until here; `Tap.layer` marks it when the last layer has
    chosen, if its beginning was marked. Another step is published here, where it ends.

    Raises UnsupportedModelError when a layer is silent or its ids have another shape, CudaError when the driver
    refuses, TimeoutError as `Tap.mailbox`.
    """
    if not torch.cuda.is_current_stream_capturing():
        raise RuntimeError("no CUDA graph is being captured on the current stream; use Tap.publish")
    tap.check_shape(step, num_rows)
    given = [token_ids, positions, kv_slots]
    names = ["token ids", "positions", "KV slots"]
    columns = _Columns(*(_column(name, one, num_rows) for name, one in zip(names, given, strict=True)))
    device = tap.device(step)
    with torch.cuda.device(device):
        ids = _alike(step.experts, num_rows, tap.top_k)
        weights = _alike(tap.chosen_weights(step), num_rows, tap.top_k)
        inputs = _Inputs(num_rows, ids, weights, columns)
        by_kernels = _prepare_kernels(tap, inputs, device)
        if by_kernels is None:
            return _OnStream(tap, num_rows, step, columns)
        are_there = inputs.addresses() == _addresses([*step.experts, *step.weights, *given])
        # What had to be copied first is there only now.
        by_kernels.record(step.begun, step.chosen if are_there else None)
        return by_kernels


def _column(name: str, column: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
    """The column as [num_rows], contiguous."""
    if column is None:
        return None
    if column.numel() != num_rows or column.dtype not in (torch.int32, torch.int64):
        raise UnsupportedModelError(
            f"{name} of shape {tuple(column.shape)} and type {column.dtype} in a forward of {num_rows} tokens; one "
            "int32 or int64 a token is needed."
        )
    return column.reshape(-1).contiguous()


def _prepare_kernels(tap: Tap, inputs: _Inputs, device: torch.device) -> _ByKernels | None:
    """The kernels, ready to be recorded; None where Triton is missing or fails, or another way was asked for."""
    if importlib.util.find_spec("triton") is None:
        return None
    with relaxed_capture():
        mailbox = tap.mailbox(device.index, _addresses([*inputs.ids, *inputs.weights]))
    if mailbox is None:
        return None
    try:
        return _ByKernels(tap, inputs, mailbox)
    except Exception as error:
        with contextlib.suppress(Warning):
            warnings.warn(
                f"expert_lens cannot use Triton in CUDA graphs ({type(error).__name__}: {error}); their streams "
                "publish instead, which costs more.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


@dataclass(frozen=True, slots=True)
class _Columns:
    """What a graph finds beside the experts, each [num_rows]."""

    token_ids: torch.Tensor | None
    positions: torch.Tensor | None
    kv_slots: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the kernels read. `ids`, `weights`: a layer each, all alike; weights are empty unless captured."""

    num_rows: int
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    columns: _Columns

    def addresses(self) -> list[int]:
        """Where all of it lies."""
        columns = self.columns
        return _addresses([*self.ids, *self.weights, columns.token_ids, columns.positions, columns.kv_slots])


class _ByKernels(GraphStep):
    """Kernels in the graph publish.

    Made ready by running once for nobody, on a stream of its own: a kernel is compiled and loaded when it is first
    launched, which is nothing to do inside a capture. Raises what Triton raises then.
    """

    def __init__(self, tap: Tap, inputs: _Inputs, mailbox: Mailbox) -> None:
        from expert_lens import kernels

        self._mailbox = mailbox
        self._beside = torch.cuda.ExternalStream(mailbox.stream)  # type: ignore[no-untyped-call]
        addresses = (mailbox.entries, mailbox.state, mailbox.taken)
        self._take = partial(kernels.take_post[(1,)], *addresses, mailbox.num_entries, num_warps=1)
        self._publish: Callable[[], Any] | None = partial(_publish, tap, inputs, mailbox)
        with relaxed_capture(), torch.cuda.stream(self._beside):
            self._take()
            self._publish()
            self._beside.synchronize()
        mailbox.pass_over()
        self._rows: ReplayRows | None = None
        """Of the last replay, as stated to the mailbox."""
        super().__init__(tap, inputs.num_rows, inputs.columns)

    def record(self, begun: torch.cuda.Event | None, chosen: torch.cuda.Event | None) -> None:
        """Record the kernels beside a forward that ends here; None: from here on.

        `begun`, `chosen`: from where on a replay's post is there, and what the kernels read. If it fails, the engine's
        graph may have one of them all the same, so that this stays among the unclaimed.
        """
        assert self._publish is not None
        stream = torch.cuda.current_stream()
        self._beside.wait_event(begun or stream.record_event())
        try:
            with torch.cuda.stream(self._beside):
                self._take()
                self._beside.wait_event(chosen or stream.record_event())
                self._publish()
        finally:
            self._publish = None  # with it go the layers' ids, which the graph alone needs from now on
            stream.wait_stream(self._beside)  # else the engine's capture, which goes on, could not end

    def replay(self, launch: Callable[[], Any], rows: ReplayRows | None) -> None:
        tap = self._tap()
        if tap is None:
            self._mailbox.pass_over()
            launch()
            return
        if rows is not self._rows:
            self._set_rows(rows)
        tap.launch(self._mailbox, launch, self._rows)

    def _set_rows(self, rows: ReplayRows | None) -> None:
        """State these rows to the mailbox: the same for each replay of a batch that goes on."""
        self._rows = None
        tap, columns = self._active_tap(rows), self._columns
        if tap is None or rows is None:
            return
        try:
            self._mailbox.set_rows(
                rows.num_rows,
                token_ids=columns.token_ids is not None,
                positions=rows.positions if columns.positions is None else None,
                kv_slots=columns.kv_slots is not None,
            )
        except Exception as error:
            tap.fail(error)
        else:
            self._rows = rows


class _OnStream(GraphStep):
    """The graph packs; behind each replay, its stream copies and publishes."""

    def __init__(self, tap: Tap, num_rows: int, step: Step, columns: _Columns) -> None:
        def kept(column: torch.Tensor | None) -> torch.Tensor | None:
            return None if column is None else column.to(torch.int32, copy=True)

        columns = _Columns(kept(columns.token_ids), kept(columns.positions), kept(columns.kv_slots))
        super().__init__(tap, num_rows, columns)
        # These lie in the graph's own memory: as long as they are referenced, no other tensor of its pool lies there.
        self._experts, self._weights = tap.join(step, num_rows)

    def replay(self, launch: Callable[[], Any], rows: ReplayRows | None) -> None:
        tap = self._active_tap(rows)
        try:
            launch()
        except BaseException:
            if tap is not None and rows is not None:
                tap.lose(rows.num_rows)
            raise
        if tap is None or rows is None:
            return
        columns = self._columns
        positions = rows.positions if columns.positions is None else columns.positions[: rows.num_rows]
        assert positions is not None, "_active_tap has looked"
        tap.publish(
            self._experts[: rows.num_rows],
            None if self._weights is None else self._weights[: rows.num_rows],
            Rows(rows.spans, positions, columns.token_ids, kv_slots=columns.kv_slots),
        )


def _publish(tap: Tap, inputs: _Inputs, mailbox: Mailbox) -> None:
    """Launch `publish_rows` on the current stream."""
    from expert_lens import kernels

    def blocks(values: int, per_word: int) -> int:
        per_block: int = per_word * kernels.BLOCK_WORDS
        return -(-values // per_block)

    ids, weights, columns = inputs.ids, inputs.weights, inputs.columns
    ids_per_word = 8 if tap.num_experts <= 256 else 4
    num_ids = inputs.num_rows * len(ids) * tap.top_k
    some_column = any(column is not None for column in (columns.token_ids, columns.positions, columns.kv_slots))
    id_blocks = blocks(num_ids, ids_per_word)
    column_blocks = blocks(inputs.num_rows, 2) if some_column else 0
    weight_blocks = blocks(num_ids, 4) if weights else 0
    kernels.publish_rows[(id_blocks + column_blocks + weight_blocks,)](
        mailbox.state,
        mailbox.table,
        mailbox.table + 8 * len(ids) if weights else None,
        columns.token_ids,
        columns.positions,
        columns.kv_slots,
        id_blocks,
        column_blocks,
        len(ids),
        tap.top_k,
        ids_per_word,
        _triton_type(ids[0]),
        ids[0].stride(0),
        _triton_type(weights[0]) if weights else None,
        weights[0].stride(0) if weights else 0,
        kernels.BLOCK_WORDS,
    )


def _alike(tensors: Sequence[torch.Tensor | None], num_rows: int, top_k: int) -> list[torch.Tensor]:
    """The tensors as [num_rows, top_k], all of one type and stride."""
    rows = [one.reshape(num_rows, top_k) for one in tensors if one is not None]
    if len({(one.dtype, one.stride()) for one in rows}) > 1 or any(one.stride(1) != 1 for one in rows):
        rows = [one.to(rows[0].dtype).contiguous() for one in rows]
    return rows


def _addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [one.data_ptr() for one in tensors if one is not None]


def _triton_type(tensor: torch.Tensor) -> Any:
    import triton.language

    return getattr(triton.language, str(tensor.dtype).removeprefix("torch."))
