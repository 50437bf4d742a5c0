"""Following one `generate` call: which rows of each forward belong to which sequence, and when each has ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteriaList

from expert_lens.engines.names import RequestNames
from expert_lens.engines.transformers.requests import Sequences, join_rows, real_tokens
from expert_lens.errors import EngineHookError
from expert_lens.steps import Rows, Step
from expert_lens.streams import relaxed_capture
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens.types import EndState, Phase

__all__ = ["Columns", "FollowedCriteria", "GenerateCall"]

Values = npt.NDArray[np.uint8]
Mode = Literal["unknown", "rows", "assisted", "anonymous", "draft"]

UNKNOWN_RELEASE = (
    "this release of transformers is not known to expert_lens. Use one from 5.16 to 5.23, or a newer expert_lens."
)


@dataclass(slots=True)
class Columns:
    """What one forward ran over: `batch` rows by `width` columns, after `past` columns held by the cache.

    `tokens`: their ids [batch, width], or None if the model was given embeddings.
    """

    batch: int
    width: int
    past: int
    has_cache: bool
    tokens: torch.Tensor | None


@dataclass(slots=True)
class _Held:
    """A packed forward of assisted generation that waits to hear which of its tokens are accepted."""

    experts: torch.Tensor
    weights: torch.Tensor | None
    columns: Columns
    real: npt.NDArray[np.bool_]
    offset: int
    """What must be added to an index into `input_ids` to get a column of the cache."""


class _Done:
    """Which sequences have ended, on its way from the device where the engine found it.

    The engine itself waits for that answer before its next forward, so by then the copy has come, and nobody waits for
    it a second time.
    """

    NOT_COME = 2

    def __init__(self) -> None:
        self._host: torch.Tensor | None = None
        """Pinned, bool [B]."""
        self._values: Values = np.empty(0, np.uint8)
        """The same memory, which has `NOT_COME` until the answer is there."""
        self._device: torch.device | None = None
        self._pending: Values | None = None

    def tell(self, done: torch.Tensor) -> None:
        """The answer [B], of whatever type: its copy to the host is enqueued."""
        if self._host is None or len(self._host) != len(done):
            with relaxed_capture():
                self._host = torch.empty(len(done), dtype=torch.bool, pin_memory=True)
            self._values = self._host.numpy().view(np.uint8)
        self._device = done.device
        self._values.fill(self.NOT_COME)
        self._host.copy_(done, non_blocking=True)
        self._pending = self._values

    def hear(self) -> list[bool] | None:
        """The answer that was told last, once; None if there is none."""
        values, self._pending = self._pending, None
        if values is None:
            return None
        answer = values.tolist()
        if self.NOT_COME in answer:  # an engine that does not wait, after all
            # The stream alone, and relaxed: else it would end a graph's capture in another thread.
            with relaxed_capture():
                torch.cuda.current_stream(self._device).synchronize()
            answer = values.tolist()
        return [bool(one) for one in answer]


class GenerateCall:
    """One `generate` call of the model, in one thread.

    Its mode is known when the engine makes the stopping criteria, just before the first forward:
    `rows` (greedy, sampling): a row of the batch is a sequence; `assisted`: one sequence, of whose forwards the last
    tokens may be rejected; `anonymous` (beam search, and what else moves sequences between rows): counted, kept for
    no request; `draft` (the model drafts for itself): no rows.
    """

    def __init__(self, tap: Tap, names: RequestNames, arguments: dict[str, Any]) -> None:
        self.mode: Mode = "unknown"
        self.num_forwards = 0
        self.sequences: Sequences | None = None
        self.mask: Any = None
        """The attention mask [B, columns] of the coming forward."""
        self.prepared_tokens: Any = None
        """The token ids [B, width] of the coming forward."""
        self.steady = False
        """Whether the call has come to decode one token a forward for each row, over a cache."""
        self._step_shape = (0, 1)
        self._step_tokens: Any = None
        self._tap = tap
        self._names = names
        self._assistant = arguments.get("assistant_model")
        self._custom = arguments.get("custom_generate") is not None
        self._prompt: Any = arguments.get("inputs", arguments.get("input_ids"))
        self._prompt_mask: Any = arguments.get("attention_mask")
        self._total = 0
        self._prepared = False
        self._may_compile = False
        self._chooses = False
        self._decoding = False
        self._checked = False
        self._held: _Held | None = None
        self._first = True
        self._done = _Done()

    @property
    def needs_past(self) -> bool:
        """Whether where the coming forward stands must be read from the cache."""
        return self.sequences is None or self.mode == "assisted"

    def set_mode(self, generation_config: Any) -> None:
        """Learn from the prepared generation config what kind of generation this is."""
        mode = generation_config.get_generation_mode(self._assistant)
        if getattr(generation_config, "is_assistant", False):
            self.mode = "draft"
        elif not self._custom and mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            self.mode = "rows"
        elif not self._custom and mode is GenerationMode.ASSISTED_GENERATION:
            self.mode = "assisted"
        else:
            self.mode = "anonymous"

    def prepared(self, input_ids: Any, mask: Any, inputs: dict[str, Any]) -> bool:
        """A forward is prepared: all ids so far, the mask over all columns, and what the model is to be called with.

        Gives whether that is a decoding step that may be compiled, of which all is known for `decoded_as_prepared`.
        """
        if self._chooses and not (self.sequences is not None and self.sequences.all_done()):
            return False  # by a logits processor, for itself
        self._prepared = True
        tokens = self.prepared_tokens = inputs.get("input_ids")
        if not self.steady:
            self._total = input_ids.shape[1] if input_ids is not None else 0
            self.mask = mask
            cache = inputs.get("past_key_values")
            self._may_compile = self.mode == "rows" and bool(getattr(cache, "is_compileable", False))
        return self._may_compile and self._decoding and tokens is not None and tokens.shape[1] == 1

    def chooses(self) -> None:
        """The engine has its forward, and goes on to choose tokens, until it asks the stopping criteria."""
        self._chooses = self.mode == "rows"

    def forwarded(self, step: Step, columns: Columns) -> None:
        """Publish a forward's rows, or hold them until it is known which count.

        Raises EngineHookError when the engine does not go the way that is followed here.
        """
        self.num_forwards += 1
        if self.mode == "draft":
            return
        if self.mode == "unknown" and not self._custom:
            raise EngineHookError(
                f"generate reached its first forward without calling _get_stopping_criteria: {UNKNOWN_RELEASE}"
            )
        if self.mode == "assisted":
            self._hold(step, columns)
        elif (rows := self._rows(columns)) is not None:
            self._tap.publish(*self._tap.pack(step, columns.batch * columns.width), rows)

    def criteria_called(self, length: int, done: torch.Tensor) -> None:
        """The engine has chosen tokens, `length` in each sequence by now, and found which sequences end with them."""
        if self._prepared and self.mode == "rows" and self.num_forwards:
            raise EngineHookError(
                "generate has chosen tokens, and its forward was not seen: something runs past the model's decoder, as "
                f"a forward of your own in its place; attach to what is really run. If there is none, {UNKNOWN_RELEASE}"
            )
        self._chooses = False
        self._decoding = True
        self._checked = True
        if self.mode == "assisted":
            held, self._held = self._held, None
            if held is None:
                return  # asked of drafts, as transformers did up to 5.17, which end nothing
            self._publish_accepted(held, length)
        if self.sequences is not None and self.mode in ("rows", "assisted"):
            if done.is_cuda:
                self._done.tell(done)
            else:
                self.sequences.mark_done([bool(one) for one in done.tolist()])

    def finish(self, state: "EndState") -> None:
        """The call is over: so are its sequences."""
        if self.sequences is not None:
            self._hear_done(self.sequences)
            self.sequences.finish(self._tap, state)

    def takes_forward(self) -> bool:
        """Whether the forward that begins now is the one that the engine prepared last.

        What else runs the model during the call (a logits processor, classifier-free guidance) does so for itself.
        """
        prepared, self._prepared = self._prepared, False
        return prepared or self.mode not in ("rows", "assisted")

    def decodes(self, token_ids: Any) -> bool:
        """Whether a forward of these ids is a usual decoding step: one token for each row, over a cache.

        If so, `decoded` is all that it needs.
        """
        if not self.steady or token_ids is None or token_ids.shape != self._step_shape:
            return False
        self._step_tokens = token_ids
        return True

    def decoded_as_prepared(self, step: Step) -> None:
        """Publish the rows of the decoding step that was prepared last, and has run without a word of its own."""
        self._prepared = False
        tokens = self.prepared_tokens
        if self.decodes(tokens):
            self.decoded(step)
        else:
            self.forwarded(step, Columns(len(tokens), 1, 0, True, tokens))

    def decoded(self, step: Step) -> None:
        """Publish the rows of a usual decoding step."""
        self.num_forwards += 1
        sequences = self.sequences
        assert sequences is not None
        if self._expects_token(sequences):
            self._tap.publish_next(step, self._step_shape[0], self._step_tokens, sequences.run())

    def _expects_token(self, sequences: Sequences) -> bool:
        """Whether any row does, in a forward after the engine has asked the stopping criteria."""
        self._hear_done(sequences)
        if sequences.all_done():
            return False
        if not self._checked:
            raise EngineHookError(
                f"generate forwarded twice without asking which sequences have ended: {UNKNOWN_RELEASE}"
            )
        self._checked = False
        return True

    def _hear_done(self, sequences: Sequences) -> None:
        if (done := self._done.hear()) is not None:
            sequences.mark_done(done)

    def _rows(self, columns: Columns) -> Rows | None:
        sequences = self.sequences if self.sequences is not None else self._start(columns)
        skip = 0 if columns.has_cache else sequences.columns
        width = columns.width - skip
        phase: Phase = "prefill"
        real = None
        if self._decoding:
            phase = "decode"
            if not self._expects_token(sequences):
                return None
            if columns.width == 1:
                self.steady = columns.has_cache and self.mode == "rows" and columns.tokens is not None
                self._step_shape = (columns.batch, 1)
                return sequences.take_next(columns.tokens)
        if phase == "prefill" or width > 1:
            real = self._real(sequences.columns, width)
        return sequences.take(real, columns.tokens, width, phase, skip=skip)

    def _start(self, columns: Columns) -> Sequences:
        told = real_tokens(self.mask, columns.past, columns.width)
        before = None if told is None else told[0]
        first_position = np.full(columns.batch, columns.past) if before is None else before
        ids = None if self.mode == "anonymous" else self._names.make(columns.batch)
        sequences = self.sequences = Sequences(ids, first_position, columns.past)
        if columns.past == 0:
            sequences.expect_prompt(self._expected_prompt(columns.batch))
        return sequences

    def _expected_prompt(self, batch: int) -> npt.NDArray[np.int64] | None:
        """How many tokens each prompt has, as far as the call's arguments say; a chunk of it does not."""
        prompt, mask = self._prompt, self._prompt_mask
        if getattr(prompt, "ndim", 0) != 2 or batch % prompt.shape[0]:
            return None
        if mask is not None and tuple(mask.shape) == tuple(prompt.shape):
            with relaxed_capture():
                there = mask.detach().cpu().numpy()
            return np.repeat((there != 0).sum(1), batch // prompt.shape[0])
        return np.full(batch, prompt.shape[1]) if mask is None and self.mask is None else None

    def _real(self, past: int, width: int) -> npt.NDArray[np.bool_] | None:
        told = real_tokens(self.mask, past, width)
        if told is None:
            raise EngineHookError(
                f"generate forwarded columns {past} to {past + width} under an attention mask of shape "
                f"{tuple(getattr(self.mask, 'shape', ()))}, which does not say which of them are padding."
            )
        return told[1]

    def _hold(self, step: Step, columns: Columns) -> None:
        sequences = self.sequences if self.sequences is not None else self._start(columns)
        if columns.past != sequences.columns:
            raise EngineHookError(
                f"assisted generation forwarded from column {columns.past}, expected {sequences.columns}: "
                f"{UNKNOWN_RELEASE}"
            )
        real = self._real(columns.past, columns.width)
        if real is None:
            real = np.ones((columns.batch, columns.width), dtype=np.bool_)
        experts, weights = self._tap.pack(step, columns.batch * columns.width)
        offset = columns.past + columns.width - self._total
        self._held = _Held(experts, weights, columns, real, offset)

    def _publish_accepted(self, held: _Held, length: int) -> None:
        """Publish the rows of the tokens that are in the sequence now; the last of these is still to be forwarded."""
        sequences, columns = self.sequences, held.columns
        assert sequences is not None
        accepted = length - 1 + held.offset - columns.past
        prompt = 0
        if self._first:
            self._first = False
            known = getattr(self._prompt, "ndim", 0) == 2
            prompt = self._prompt.shape[1] + held.offset - columns.past if known else accepted
        index = np.arange(columns.width)
        first = sequences.take(held.real & (index < prompt), columns.tokens, columns.width, "prefill")
        second = sequences.take(
            held.real & (index >= prompt) & (index < accepted), columns.tokens, columns.width, "decode"
        )
        sequences.move(columns.past + accepted)
        self._tap.publish(held.experts, held.weights, join_rows(first, second))


class FollowedCriteria(StoppingCriteriaList):  # type: ignore[misc]
    """The same stopping criteria, telling what they found each time they are asked: see `criteria_called`."""

    def __init__(self, criteria: Any, called: Callable[[int, torch.Tensor], None]) -> None:
        super().__init__(criteria)
        self._called = called

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Which sequences end, bool [B]."""
        done = super().__call__(input_ids, scores, **kwargs)
        self._called(input_ids.shape[1], done)
        return done
