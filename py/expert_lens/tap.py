"""The tap: holds one forward's top-k tensors and hands them, packed once, to the writer.

A forward goes `begin` → `layer` for each routed layer → `end` → `publish`. `layer` keeps a reference, and in a capture
marks where all have chosen; `pack` makes the one concatenation and cast. What is held belongs to the thread that runs
the forward, so several threads may run the model at once. Nothing here waits: a thread that finds another one
publishing leaves its step in a short queue, and that other thread publishes it.

This module is imported into the engine's process and imports nothing but torch, numpy and the extension.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch

from expert_lens._core import Turn
from expert_lens.errors import CudaError, UnsupportedModelError
from expert_lens.steps import U32, DecodeRun, Indices, Joined, Rows, Step
from expert_lens.streams import follow, own, relaxed_capture, sent

if TYPE_CHECKING:
    from expert_lens._core import Mailbox, Writer
    from expert_lens.graphs import ReplayRows
    from expert_lens.types import EndState, Span

__all__ = ["Tap"]

T = TypeVar("T")

MAX_WAITING_STEPS = 64
"""Steps that wait at most while another thread publishes; further ones are lost, and counted."""
MAX_WAITING_JOBS = 4096
"""As many small things, such as the end of a request, wait before rows that are lost are told late."""
TURN_TIMEOUT = 5.0
"""Seconds that `close` and `mailbox` wait for a thread that is publishing."""
TURN_PERIOD = 0.001
"""Seconds after which they look again."""


def _of_chosen(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The weights of the chosen experts alone."""
    return scores if scores.shape == ids.shape else scores.gather(-1, ids)


def _joined_weights(weights: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(weights, dim=-1).detach().to(torch.float16) if weights else None


def _silence(layers: tuple[int, ...]) -> UnsupportedModelError:
    return UnsupportedModelError(f"layers {layers} gave no experts in this forward; rows from here on are missing.")


class _Current(threading.local):
    step: Step | None = None


class _Packed(NamedTuple):
    """A step for the writer: experts [n, L, K], weights f16 like them, token ids int32 [n]; and whose rows."""

    experts: torch.Tensor
    weights: torch.Tensor | None
    token_ids: torch.Tensor | None
    rows: Rows

    def own(self) -> _Packed:
        """The same in memory of its own, on the current stream."""
        rows = Rows(self.rows.spans, own(self.rows.positions), None, kv_slots=own(self.rows.kv_slots))
        return _Packed(own(self.experts), own(self.weights), own(self.token_ids), rows)


class Tap:
    """Packs forwards and publishes them through a writer.

    `layers`: the model's indices of the routed layers, ascending; slot `i` of a step belongs to `layers[i]`.
    """

    def __init__(
        self, writer: Writer, *, layers: Sequence[int], num_experts: int, top_k: int, weights: bool = False
    ) -> None:
        self.writer = writer
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.top_k = top_k
        self.weights = weights
        self.active = True
        """False once the capture has switched itself off, or was closed."""
        self.error: Exception | None = None
        """Why the capture switched itself off; None while all is well."""
        self.lost_tokens = 0
        """Rows lost while another thread was publishing that the writer has not heard of yet: see `lose`."""
        self._dtype = torch.uint8 if num_experts <= 256 else torch.int16
        self._kept: tuple[Indices | None, torch.Tensor | None] = (None, None)
        """The kept rows of the last step, and the same on its device."""
        self._narrow = num_experts not in (256, 65536)
        self._checked = False
        self._current = _Current()
        self._batch: Sequence[Span] | None = None
        self._next: tuple[DecodeRun, int] | None = None
        """The run that the last step was of, and how many steps of it that made."""
        self._late: dict[int, torch.cuda.Stream] = {}
        """By device, a stream of ours for what another thread has left: that one may capture a graph on its own by the
        time it is written, and what is enqueued there would become a part of it."""
        self._jobs: deque[Callable[[], Any]] = deque()
        self._unmatched: set[Mailbox] = set()
        """Of graphs a replay of which has failed and is not taken back yet: what is posted there may be another
        replay's until then, so that rows of their replays are lost, and counted."""
        self._turn = Turn()
        """Who has it may use the writer."""
        _taps.add(self)

    def prepare(self, device: int) -> None:
        """Make the arena known to a CUDA device, before the first step has to: `Writer.prepare`.

        Raises what that raises.
        """
        self.writer.prepare(device)
        with contextlib.suppress(CudaError):  # what is left to another thread is lost then, and counted
            self._late[device] = torch.cuda.ExternalStream(self.writer.stream(device), device)  # type: ignore[no-untyped-call]

    def begin(self) -> Step | None:
        """Start to hold a forward of this thread; None if the capture is off. A forward left behind is dropped."""
        step = None
        if self.active:
            step = Step(len(self.layers))
            if self.weights:
                step.weights = [None] * len(self.layers)
        self._current.step = step
        return step

    def layer(self, slot: int, topk_ids: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Keep a reference to one layer's ids [n, K] and, if captured, weights [n, K] or [n, E].

        Outside a forward (another model's, or a recomputation in the backward pass) this does nothing.
        """
        step = self._current.step
        if step is None:
            return
        if step.experts[slot] is not None:
            step.repeated = slot
            return
        step.experts[slot] = topk_ids
        if step.weights:
            step.weights[slot] = weights
        if step.begun is not None and not self.silent_layers(step):
            self.guard(step.mark_chosen)

    def end(self) -> Step | None:
        """Stop holding: this thread's step, or None if there is none (capture off, or not begun).

        A layer that was called twice ends the capture: here, as the forward may have failed without a word, and what
        runs of its layers since, to compute them again for the backward pass, is nobody's.
        """
        current = self._current
        step = current.step
        if step is not None:
            current.step = None
            if step.repeated is not None:
                self._refuse_second_call(step.repeated)
                return None
        return step

    def _refuse_second_call(self, slot: int) -> None:
        self.fail(
            UnsupportedModelError(
                f"layer {self.layers[slot]} called its experts twice in one forward, so rows cannot be told "
                "apart; rows from here on are missing. Please report the model's class."
            )
        )

    def silent_layers(self, step: Step) -> tuple[int, ...]:
        """The layers that did not hand over anything in this step."""
        return tuple(layer for layer, ids in zip(self.layers, step.experts, strict=True) if ids is None)

    def pack(self, step: Step, num_rows: int, own: slice | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The step's experts [num_rows, L, K] and weights f16 of the same shape or None, on the device of the model.

        Experts are u8, or i16 with the bits of u16, of which torch can do little. `own`: these of the rows alone, where
        a step [n, K] has others that hold anything.

        Raises UnsupportedModelError when ids have another shape, or lie outside 0 .. num_experts - 1.
        """
        wide = self._cat(step) if own is None else self._cat(step)[own]
        if not self._checked or not (self._narrow or wide.is_cuda):
            if step.joined is None:
                self.check_shape(step, num_rows)
            self._check_range(wide)
        return self._narrowed(step, wide, num_rows, own)

    def join(self, step: Step, num_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `pack`, without a look at the values: inside a CUDA graph there are none yet."""
        return self._narrowed(step, self._cat(step), num_rows)

    def join_compiled(self, called: Sequence[tuple[Any, Any] | None], token_ids: Any) -> Joined | None:
        """What compiled code has called the decoder and its layers with, for `Step.joined`; a part of that code.

        A replay of a CUDA graph of the compiler pays for each of its outputs, and joins them in no time. It must not
        fail in here, which is the user's code: None where each has to be looked at first, before a step has shown that
        the layers give what they were taken to give, or where one gives something else, or did not run in that code.
        """
        if not self._checked:
            return None
        ids: list[torch.Tensor] = []
        weights: list[torch.Tensor] = []
        for one in called:
            if one is None or one[0] is None or (ids and one[0].shape != ids[0].shape):
                return None
            ids.append(one[0])
            if self.weights:
                if one[1] is None or one[1].shape[:-1] != one[0].shape[:-1]:
                    return None
                weights.append(_of_chosen(*one))
        experts = torch.cat(ids, dim=-1)
        if not experts.is_cuda:  # narrowed with their range looked at
            return Joined(experts, _joined_weights(weights), None)
        if token_ids is not None:
            token_ids = token_ids.to(torch.int32) if token_ids.numel() * self.top_k == ids[0].numel() else None
        return Joined(experts.to(self._dtype), _joined_weights(weights), token_ids)

    def _narrowed(
        self, step: Step, wide: torch.Tensor, num_rows: int, own: slice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (num_rows if own is None else len(wide), len(self.layers), self.top_k)
        if step.joined is not None:
            weights = step.joined.weights
        else:
            weights = _joined_weights([one if own is None else one[own] for one in self.chosen_weights(step)])
        return wide.to(self._dtype).reshape(shape), None if weights is None else weights.reshape(shape)

    def device(self, step: Step) -> torch.device:
        """Where the step's ids are."""
        first = step.experts[0]
        assert first is not None
        return first.device

    def _cat(self, step: Step) -> torch.Tensor:
        """All layers' ids side by side: [n, L * K], or [B, S, L * K]."""
        if step.joined is not None:
            return step.joined.experts
        try:
            return torch.cat(step.experts, dim=-1)  # type: ignore[arg-type]
        except TypeError:
            if not (silent := self.silent_layers(step)):
                raise
            raise _silence(silent) from None

    def check_shape(self, step: Step, num_rows: int) -> None:
        """Refuse a step whose layers did not each give ids of num_rows * K values.

        Raises UnsupportedModelError.
        """
        if silent := self.silent_layers(step):
            raise _silence(silent)
        for ids in step.experts:
            assert ids is not None
            if ids.shape[-1] != self.top_k or ids.numel() != num_rows * self.top_k:
                raise UnsupportedModelError(
                    f"the routed layers gave expert ids of shape {tuple(ids.shape)} in a forward of {num_rows} tokens, "
                    f"expected {(num_rows, self.top_k)}."
                )

    def _check_range(self, wide: torch.Tensor) -> None:
        """Refuse ids that are no expert's.

        Ids are places in the router's E logits, so the first step tells whether the layers give such. Later on the
        reader refuses what the packed type can show past the last expert; where 256 or 65536 experts fill the type it
        can show nothing of that, and every step is looked at here, unless it is a GPU's: to look would be to wait.
        """
        if wide.numel():
            with relaxed_capture():
                least, most = int(wide.min()), int(wide.max())
            if most >= self.num_experts or least < 0:
                raise UnsupportedModelError(
                    f"the routed layers gave expert ids from {least} to {most}, "
                    f"but the model has {self.num_experts} experts."
                )
        self._checked = True

    def chosen_weights(self, step: Step) -> list[torch.Tensor]:
        """Each layer's weights of the chosen experts, of the shape of its ids; empty unless weights are captured.

        Raises UnsupportedModelError when a layer gave none.
        """
        chosen = []
        for ids, scores in zip(step.experts, step.weights, strict=bool(step.weights)):
            if scores is None or ids is None:
                raise UnsupportedModelError("weights were asked for, but a routed layer gave none.")
            chosen.append(_of_chosen(ids, scores))
        return chosen

    def publish_next(self, step: Step, num_rows: int, token_ids: torch.Tensor, run: DecodeRun) -> None:
        """Publish the next step of a run, which ran over these ids [num_rows, 1].

        Right behind the one before, the writer does all of it in one call: that is most of what decoding costs.
        """
        if not self.active:
            return
        if not token_ids.is_cuda:
            follows = False
            with self._turn as held:
                if held:
                    if self._jobs:
                        self._drain()
                    try:
                        if follows := self._next == (run, run.num_taken):
                            run.num_taken += 1
                            self._next = (run, run.num_taken)
                            self.writer.publish_next(self._cat(step).numpy(), token_ids.numpy())
                    except Exception as error:
                        self.fail(error)
            if self._jobs:
                self._run_jobs()
            if follows:
                return
        if step.joined is not None and step.joined.token_ids is not None:
            token_ids = step.joined.token_ids
        rows = run.take(token_ids)  # first: its position was forwarded even if packing it fails
        self.publish(*self.pack(step, num_rows), rows, run)

    def publish(
        self,
        experts: torch.Tensor,
        weights: torch.Tensor | None,
        rows: Rows,
        run: DecodeRun | None = None,
    ) -> None:
        """Publish a packed step: leave out the rows that are not kept, and hand the rest to the writer.

        `run`: the run whose step this is, if others will follow by `publish_next`.
        """
        if not self.active:
            return
        on_device = experts.is_cuda
        fits_next = run is not None and rows.kept is None and not self.weights and not on_device
        next_step = (run, run.num_taken) if fits_next and run is not None else None
        token_ids = rows.token_ids
        if token_ids is not None:
            token_ids = token_ids.reshape(-1).to(torch.int32).contiguous()
        if rows.kept is not None:
            kept = self._kept_on(rows.kept, experts.device)
            experts = experts[kept]
            weights = weights[kept] if weights is not None else None
            token_ids = token_ids[kept] if token_ids is not None else None
        elif len(rows.positions) < len(experts):
            experts = experts[: len(rows.positions)]
            weights = weights[: len(experts)] if weights is not None else None
            token_ids = token_ids[: len(experts)] if token_ids is not None else None
        if not len(experts):
            return
        packed = _Packed(experts, weights, token_ids, rows)
        stream = torch.cuda.current_stream(experts.device) if on_device else None
        write: Callable[[], None]
        if stream is None:
            write = partial(self._write, packed, next_step)
        else:
            write = partial(self._write_device, packed, stream)
        if not self._in_turn(write):
            self.guard(self._leave, packed, next_step, stream)

    def _leave(
        self, packed: _Packed, next_step: tuple[DecodeRun, int] | None, stream: torch.cuda.Stream | None
    ) -> None:
        """Leave a step to the thread that has the turn; `stream`: the one that it is on, if it is on a device.

        It waits in memory of its own: the engine, or a graph, goes on to write into what it gave.
        """
        late = None if stream is None else self._late.get(stream.device_index)
        if len(self._jobs) >= MAX_WAITING_STEPS or (stream is not None and late is None):
            self.lose(len(packed.experts))
            return
        with relaxed_capture():  # for memory that torch has to ask the device for
            packed = packed.own()
        if stream is None or late is None:
            self._submit(partial(self._write, packed, next_step))
            return
        follow(late, stream, (*packed[:3], packed.rows.positions, packed.rows.kv_slots))
        self._submit(partial(self._write_device, packed, late))

    def _kept_on(self, kept: Indices, device: torch.device) -> torch.Tensor:
        """The indices there: the same tensor as for the step before as long as a batch goes on."""
        known, there = self._kept
        if known is kept and there is not None and there.device == device:
            return there
        there = sent(kept, device)
        self._kept = (kept, there)
        return there

    def launch(self, mailbox: Mailbox, replay: Callable[[], Any], rows: ReplayRows | None) -> None:
        """Launch a replay of a CUDA graph, and publish the rows that it writes.

        `rows`: as stated to the mailbox; None: it has none. Posting and launching go together: nobody else publishes
        between them. They cannot be left to another thread, as `publish` can: if one is just publishing, the rows are
        lost and counted. What `replay` raises is passed on; the rows are then all there or, if the replay did not run,
        void; they count as dropped.

        It runs between two steps of an engine, when nothing of it is in the processor's caches: what it calls, it pays
        for several times over.
        """
        counted = False
        try:
            with self._turn as held:
                if held and self._jobs:
                    self._drain()
                if rows is not None and self.active and (not held or (self._unmatched and mailbox in self._unmatched)):
                    self.lose(rows.num_rows)
                    rows = None
                try:
                    if rows is not None and self.active:
                        try:
                            if rows.spans is not self._batch or self.lost_tokens:
                                self.set_batch(rows.spans)
                            self._next = None
                            counted = True  # whatever comes of it
                            self.writer.publish_graph(mailbox)
                        except Exception as error:
                            self.fail(error)
                    if not counted:
                        counted = True
                        mailbox.pass_over()
                    replay()
                except BaseException:
                    if counted:
                        self._unmatched.add(mailbox)  # for good if what follows is interrupted, at whatever place
                        self._take_back(mailbox)
                    raise
        finally:
            if self._jobs:
                self._run_jobs()

    def _take_back(self, mailbox: Mailbox) -> None:
        """Match posts and replays again behind a replay that has failed, and make its record void.

        What prevents it ends the capture.
        """
        try:
            stream = torch.cuda.current_stream(mailbox.device).cuda_stream
            record = mailbox.retract(stream)
            if record is not None:  # posted, so that the turn is held
                self.writer.void(record, mailbox.device, stream)
            self._unmatched.discard(mailbox)
        except Exception as error:
            self.fail(error)
        except BaseException as error:
            self.fail(RuntimeError(f"{type(error).__name__} while a replay that had failed was taken back"))
            raise

    def mailbox(self, device: int, table: Sequence[int]) -> Mailbox | None:
        """`Writer.mailbox`, once whoever publishes just now is done: while a graph is captured there is time to wait.

        Raises TimeoutError if that takes too long, and what the writer raises.
        """
        try:
            return self._in_time(self.writer.mailbox, device, table)
        except TimeoutError:
            raise TimeoutError(
                "a CUDA graph is captured while rows are published, by this thread, or by another one for "
                f'{TURN_TIMEOUT} s. Capture graphs while nothing else runs the model, or attach with on_full="drop".'
            ) from None
        finally:
            self._run_jobs()

    def guard(self, work: Callable[..., Any], *args: Any) -> None:
        """Do something of ours: an error of it ends the capture, and is not the engine's."""
        try:
            work(*args)
        except Exception as error:
            self.fail(error)

    def lose(self, num_rows: int) -> None:
        """Rows of a forward that cannot be published: the writer counts them as dropped, in their place."""
        if len(self._jobs) < MAX_WAITING_JOBS:
            self._submit(partial(self.writer.drop_step, num_rows))
        else:
            self.lost_tokens += num_rows

    def publish_prefix(self, spans: Sequence[Span], kv_slots: torch.Tensor) -> None:
        """State where in the engine's cache the beginnings of requests stand: `Writer.publish_prefix`.

        `kv_slots`: int32 [n]; on a GPU computed on the current stream. It is left out, and those rows are missing, if
        another thread is just publishing and too many steps wait for it already, or the device was not prepared.
        """
        if not self.active:
            return
        if not kv_slots.is_cuda:
            if len(self._jobs) < MAX_WAITING_STEPS:
                self._submit(partial(self.writer.publish_prefix, spans, _u32(kv_slots)))
            return
        stream = torch.cuda.current_stream(kv_slots.device)
        if self._in_turn(self._write_prefix, spans, kv_slots, stream):
            return
        if len(self._jobs) < MAX_WAITING_STEPS and (late := self._late.get(stream.device_index)) is not None:
            follow(late, stream, (kv_slots,))
            self._submit(partial(self._write_prefix, spans, kv_slots, late))

    def finish(self, number: int, request: str, num_positions: int, state: EndState) -> None:
        """State that a request has ended, after all that was published before."""
        self._submit(lambda: self.writer.finish(number, request, num_positions, state))

    def fail(self, error: Exception) -> None:
        """Switch the capture off and keep the error: the model's forward goes on as if nothing had happened.

        Once it is off, what a forward still on its way runs into is no error.
        """
        if not self.active:
            return
        self.active = False
        self.error = error
        self._submit(lambda: self.writer.fail(f"{type(error).__name__}: {error}"))
        with contextlib.suppress(Warning):  # where warnings are errors, the forward must still go on
            warnings.warn(f"expert_lens stopped capturing: {error}", RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Switch off and close the writer, once whoever publishes just now is done, or let that thread close it.

        That may be this one: what closes may run wherever Python lets it, a finalizer or a signal's handler.
        """
        self.active = False
        try:
            self._in_time(self._close)
        except TimeoutError:
            self._submit(self.writer.close)
        finally:
            self._run_jobs()

    def _close(self) -> None:
        self._drain()
        self.writer.close()

    def abandon(self) -> None:
        """Never touch the writer again: this process is a fork, and the arena belongs to its parent."""
        self.active = False
        self._jobs = deque(maxlen=0)  # takes no job
        self._turn = Turn()  # a thread that had the other one is not in this process

    def _write(self, packed: _Packed, next_step: tuple[DecodeRun, int] | None) -> None:
        experts, weights, token_ids, rows = packed
        positions = rows.positions
        self.set_batch(rows.spans)
        self.writer.publish(
            experts.numpy() if experts.dtype == torch.uint8 else experts.numpy().view(np.uint16),
            None if token_ids is None else _u32(token_ids),
            _u32(positions) if isinstance(positions, torch.Tensor) else positions,
            None if weights is None else weights.numpy(),
            kv_slots=None if rows.kv_slots is None else _u32(rows.kv_slots),
        )
        self._next = next_step

    def _write_device(self, packed: _Packed, stream: torch.cuda.Stream) -> None:
        """Have the GPU publish: the tensors are known to `stream`, so their memory outlives the copies there."""
        experts, weights, token_ids, rows = packed
        self.set_batch(rows.spans)
        positions, device = rows.positions, experts.get_device()
        self.writer.publish_device(
            experts.data_ptr(),
            len(experts),
            positions.data_ptr() if isinstance(positions, torch.Tensor) else positions,
            device=device,
            stream=stream.cuda_stream,
            token_ids=None if token_ids is None else token_ids.data_ptr(),
            kv_slots=None if rows.kv_slots is None else rows.kv_slots.data_ptr(),
            weights=None if weights is None else weights.data_ptr(),
        )

    def _write_prefix(self, spans: Sequence[Span], kv_slots: torch.Tensor, stream: torch.cuda.Stream) -> None:
        address, device = kv_slots.data_ptr(), kv_slots.get_device()
        self.writer.publish_prefix(spans, address, device=device, stream=stream.cuda_stream)

    def set_batch(self, spans: Sequence[Span]) -> None:
        """State whose rows the next record holds, unless the last one did; for who has the turn."""
        if self.lost_tokens:
            lost, self.lost_tokens = self.lost_tokens, 0
            self.writer.drop_step(lost)
        self._next = None
        if spans is not self._batch:
            if spans != self._batch:
                self.writer.set_batch(spans)
            self._batch = spans

    def _in_turn(self, work: Callable[..., None], *args: Any) -> bool:
        """Do it, as `guard` does, and behind what others have left; False if somebody else is publishing."""
        with self._turn as held:
            if held:
                self._drain()
                self.guard(work, *args)
        self._run_jobs()
        return held

    def _in_time(self, work: Callable[..., T], *args: Any) -> T:
        """Do it in turn, waiting for who publishes: for what happens seldom.

        Raises TimeoutError if that takes too long, or would for ever, as this thread has the turn already; and what the
        work raises.
        """
        deadline = time.monotonic() + TURN_TIMEOUT
        while True:
            with self._turn as held:
                if held:
                    return work(*args)
            if self._turn.is_mine or time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(TURN_PERIOD)

    def _submit(self, job: Callable[[], Any]) -> None:
        """Run the job, or leave it to the thread that has the turn: never wait for it."""
        self._jobs.append(job)
        self._run_jobs()

    def _run_jobs(self) -> None:
        while self._jobs:
            with self._turn as held:
                if not held:
                    return
                self._drain()

    def _drain(self) -> None:
        """Do what others have left, having the turn."""
        while self._jobs:
            self.guard(self._jobs.popleft())


def _u32(column: torch.Tensor) -> U32:
    """An int32 column of the CPU, as the writer takes it: the same memory."""
    return column.numpy().view(np.uint32)


_taps: weakref.WeakSet[Tap] = weakref.WeakSet()


def _abandon_all() -> None:
    for tap in _taps:
        tap.abandon()


os.register_at_fork(after_in_child=_abandon_all)
