"""Attaching to a transformers model: the hooks, and what each forward of it was."""

import inspect
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import transformers
from torch import nn
from torch.compiler import is_compiling

from expert_lens._core import Writer
from expert_lens.engines.names import RequestNames
from expert_lens.engines.transformers.continuous import ContinuousBatches
from expert_lens.engines.transformers.generate import Columns, FollowedCriteria, GenerateCall
from expert_lens.engines.transformers.layers import RoutedLayer, RoutedModel, find_routed_layers
from expert_lens.engines.transformers.patch import MISSING, Patch, StandIn, forget_compiled_code, uncompiled
from expert_lens.engines.transformers.plain import PlainForwards
from expert_lens.errors import EngineHookError, SilentTapError, UnsupportedModelError
from expert_lens.steps import Joined, Step
from expert_lens.streams import relaxed_capture
from expert_lens.tap import Tap

if TYPE_CHECKING:
    from expert_lens.types import EndState

__all__ = ["TransformersTap"]

DEVICES = ("cpu", "cuda", "meta")

AT_END, MAY_WAIT, WAITS = range(3)
"""When the ids of a compiled forward are taken: as the decoder's forward ends, for which its graph is cut. Or, if it is
a decoding step of `generate`, which may be compiled as a whole, right behind it; and that it has run, and waits."""


@dataclass(slots=True)
class _Inputs:
    """What the decoder was called with, as far as it tells whose rows the forward has."""

    call: GenerateCall | None = None
    packed: dict[str, Any] | None = None
    """The keyword arguments, if this is a forward of continuous batching."""
    in_graph: bool = False
    """Whether the forward is being captured in a CUDA graph: it is not run now."""
    token_ids: Any = None
    shape: tuple[int, int] = (0, 0)
    mask: Any = None
    cache: Any = None
    past: int = 0


class _Local(threading.local):
    """What one thread is in the midst of."""

    def __init__(self, num_layers: int) -> None:
        self.call: GenerateCall | None = None
        self.compiled: list[tuple[Any, Any] | None] = [None] * num_layers
        """What compiled code has called each layer with: ids, and weights if they are captured."""
        self.joined: list[Joined | None] = [None]
        """The same joined, in its place, if the compiled code could."""
        self.has_compiled = [False]
        """Whether it has; a list, as torch.compile loses what it sets on an object such as this one."""
        self.taken = [AT_END]
        """When what the coming forward calls them with is taken."""

    def take_compiled(self) -> tuple[Joined | None, list[tuple[Any, Any] | None]]:
        """What compiled code has called the layers with, joined or each, which is forgotten with that."""
        self.has_compiled[0] = False
        joined, self.joined[0] = self.joined[0], None
        each = self.compiled[:]
        self.compiled[:] = [None] * len(each)
        return joined, [] if joined is not None else each  # behind the decoder, a layer may have run once more

    def forget_compiled(self) -> None:
        """Let go of what is nobody's: of a forward that has failed, or of layers that were run alone."""
        if self.has_compiled[0]:
            self.take_compiled()


class TransformersTap:
    """A capture of a transformers model; `attach` makes one, `close` ends it.

    `writer`: the writer that the rows go to. `facts`: what the writer was told of the model. `skipped_forwards`: how
    many forwards gave no rows because their attention mask did not say which tokens are padding.
    """

    def __init__(
        self,
        model: Any,
        capture: str,
        *,
        weights: bool,
        arena_bytes: int,
        on_full: Literal["drop", "wait"],
        wait_timeout: float,
        directory: str | None,
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        routed = _attachable(model)
        self.facts: dict[str, Any] = {
            "layers": [layer.index for layer in routed.layers],
            "num_experts": routed.num_experts,
            "top_k": routed.top_k,
            "weights": weights,
            "engine": "transformers",
            "engine_version": transformers.__version__,
            "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        }
        self.writer = Writer(
            capture,
            arena_bytes=arena_bytes,
            on_full=on_full,
            wait_timeout=wait_timeout,
            directory=directory,
            **self.facts,
        )
        self.path = self.writer.path
        """Kept here: a writer that waits for room can be asked nothing."""
        self.skipped_forwards = 0
        self._tap = Tap(
            self.writer,
            layers=self.facts["layers"],
            num_experts=routed.num_experts,
            top_k=routed.top_k,
            weights=weights,
        )
        self._model = model
        self._layers = routed.layers
        self._decoder_arguments = list(inspect.signature(routed.decoder.forward).parameters)
        self._names = RequestNames()
        self._local = _Local(len(routed.layers))
        self._calls: set[GenerateCall] = set()
        self._plain = PlainForwards(self._tap, self._names)
        self._continuous = ContinuousBatches(self._tap, self._names, self._patch)
        self._checked = False
        self._closed = False
        self._patches: list[Patch] = []
        try:
            if model.device.type == "cuda":
                self._tap.prepare(model.device.index)
            self._hold_on(model, routed)
        except BaseException:
            self.close()
            raise

    @property
    def error(self) -> Exception | None:
        """Why the capture switched itself off, or None. The model goes on; rows from there on are missing."""
        return self._tap.error

    @property
    def lost_tokens(self) -> int:
        """Rows lost while another thread published that the writer has not been told of yet."""
        return self._tap.lost_tokens

    def request(self, name: str) -> AbstractContextManager[None]:
        """Name the requests of the calls in this block: `name`, or `name.0`, `name.1`, ... for a batch.

        A name used before gets `#2`, `#3`, ... appended. Raises OptionError for a name that cannot be used.
        """
        return self._names.named(name)

    def close(self) -> None:
        """Detach: remove every hook, state the end of what is running, close the writer. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._tap.active = False
        self._local.forget_compiled()
        try:
            for patch in self._patches:
                patch.remove()
            for call in list(self._calls):
                call.finish("aborted")
            self._plain.close()
            self._continuous.close()
        finally:
            self._tap.close()

    def _hold_on(self, model: Any, routed: RoutedModel) -> None:
        for slot, layer in enumerate(routed.layers):
            self._stand(_ExpertsForward(self._tap, self._local, slot, layer))
        self._stand(_DecoderForward(self, routed.decoder))
        if hasattr(model, "generate"):
            self._generate_arguments = list(inspect.signature(model.generate).parameters)
            self._patch(model, "generate", self._generate)
            self._patch(model, "_get_stopping_criteria", self._get_stopping_criteria)
            self._patch(model, "prepare_inputs_for_generation", self._prepare_inputs_for_generation)
            self._patch(model, "_update_model_kwargs_for_generation", self._update_model_kwargs_for_generation)
            self._patch(model, "init_continuous_batching", self._init_continuous_batching)
        forget_compiled_code()

    def _patch(self, owner: Any, name: str, handler: Callable[..., Any]) -> None:
        self._stand(_FollowedMethod(owner, name, handler))

    def _stand(self, stand_in: StandIn) -> None:
        self._patches = [patch for patch in self._patches if patch.alive]
        self._patches.append(Patch(stand_in))

    # ---- what the model's methods do while attached ----

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._tap.active:
            return original(*args, **kwargs)
        arguments = {**kwargs, **dict(zip(self._generate_arguments, args, strict=False))}
        call = GenerateCall(self._tap, self._names, arguments)
        outer, self._local.call = self._local.call, call
        self._calls.add(call)
        state: EndState = "aborted"
        try:
            result = original(*args, **kwargs)
            if self._tap.active:
                state = "finished"
                self._check_seen(call)
            return result
        finally:
            self._take_waiting()
            self._local.call = outer
            self._calls.discard(call)
            call.finish(state)

    def _get_stopping_criteria(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        criteria = original(*args, **kwargs)
        call = self._local.call
        if call is None or not self._tap.active:
            return criteria
        try:
            call.set_mode(kwargs["generation_config"] if "generation_config" in kwargs else args[0])
            return FollowedCriteria(criteria, partial(self._tap.guard, call.criteria_called))
        except Exception as error:
            self._tap.fail(error)
            return criteria

    def _prepare_inputs_for_generation(
        self, original: Callable[..., Any], input_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prepared = original(input_ids, *args, **kwargs)
        call = self._local.call
        if call is not None:
            try:
                if call.prepared(input_ids, kwargs.get("attention_mask"), prepared):
                    self._local.forget_compiled()
                    self._tap.begin()  # for layers that run uncompiled within a compiled forward
                    self._local.taken[0] = MAY_WAIT
            except Exception as error:
                self._tap.fail(error)
        return prepared

    def _update_model_kwargs_for_generation(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `generate` does first with what a forward of its own gave."""
        call = self._local.call
        if call is not None:
            self._take_waiting()
            call.chooses()
        return original(*args, **kwargs)

    def _init_continuous_batching(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        manager = original(*args, **kwargs)
        if self._tap.active:
            try:
                self._continuous.add(manager, self._names.current())
            except Exception as error:
                self._tap.fail(error)
        return manager

    # ---- what a forward of the decoder does while attached ----

    def forward_starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder is about to run with these arguments."""
        local = self._local
        if local.taken[0] != AT_END:
            self._take_waiting()
        local.forget_compiled()
        step = self._tap.begin()
        if step is None:
            return
        try:
            call = local.call
            if call is not None and not call.takes_forward():
                call = None
            if call is None or not call.decodes(kwargs.get("input_ids")):
                step.inputs = self._read(call, args, kwargs)
                if step.inputs.in_graph:
                    step.mark_beginning()
        except Exception as error:
            self._tap.fail(error)

    def forward_failed(self) -> None:
        """The decoder has raised: what its layers handed over gives no rows."""
        self._tap.end()

    def forward_ends(self, output: Any) -> None:
        """The decoder has run.

        Raises SilentTapError or UnsupportedModelError, after detaching, if the first forward shows that the layers
        do not give what they were taken to give.
        """
        step = self._end()
        if step is None:
            return
        if step.inputs is None:
            self._tap.guard(self._local.call.decoded, step)  # type: ignore[union-attr]
            return
        inputs: _Inputs = step.inputs
        try:
            if not self._checked and not (inputs.call is not None and inputs.call.mode == "draft"):
                self._check_layers(step)
            self._publish(step, inputs, output)
            self._checked = True
        except (SilentTapError, UnsupportedModelError) as error:
            if self._checked or inputs.packed is not None:  # the engine's own thread must not die of it
                self._tap.fail(error)
                return
            self._tap.error = error
            self.close()
            raise
        except Exception as error:
            self._tap.fail(error)

    def _take_waiting(self) -> None:
        """Publish the decoding step that has run as a whole and waits for it, if there is one."""
        local = self._local
        taken, local.taken[0] = local.taken[0], AT_END
        if taken == MAY_WAIT:  # it has failed, or is not compiled
            local.forget_compiled()
            self._tap.end()
        elif taken == WAITS and (step := self._end()) is not None:
            self._tap.guard(local.call.decoded_as_prepared, step)  # type: ignore[union-attr]

    def _end(self) -> Step | None:
        """This thread's step, with what its layers were called with; None if there is none, or the capture is off."""
        local, joined = self._local, None
        if local.has_compiled[0]:
            joined, each = local.take_compiled()
            for slot, called in enumerate(each):
                if called is not None:
                    self._tap.layer(slot, *called)
        step = self._tap.end()
        if step is not None:
            step.joined = joined
        return step if self._tap.active else None  # closed meanwhile, and with that some layers let go

    def _read(self, call: GenerateCall | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Inputs:
        named = {**dict(zip(self._decoder_arguments, args, strict=False)), **kwargs} if args else kwargs
        in_graph = _is_being_captured()
        if named.get("cache") is not None and "cu_seq_lens_q" in named:
            return _Inputs(packed=named, in_graph=in_graph)
        if in_graph:
            raise UnsupportedModelError(
                "a forward is being captured in a CUDA graph of your own, whose replays cannot be seen; rows from here "
                "on are missing. Run the model without that, or by generate_batch, whose graphs publish by themselves."
            )
        inputs = _Inputs(call=call, token_ids=named.get("input_ids"), mask=named.get("attention_mask"))
        tokens = inputs.token_ids if inputs.token_ids is not None else named["inputs_embeds"]
        inputs.shape = (tokens.shape[0], tokens.shape[1])
        cache = named.get("past_key_values")
        inputs.cache = cache if cache is not None else named.get("cache_params")
        if inputs.cache is not None and (call is None or call.needs_past):
            with relaxed_capture():  # a static cache has it on the device
                inputs.past = int(inputs.cache.get_seq_length())
        return inputs

    def _publish(self, step: Step, inputs: _Inputs, output: Any) -> None:
        if inputs.packed is not None:
            publish = self._continuous.record if inputs.in_graph else self._continuous.publish
            publish(self._model, inputs.packed, step)
            return
        batch, width = inputs.shape
        call = inputs.call
        token_ids = inputs.token_ids
        if token_ids is None and call is not None and call.prepared_tokens is not None:
            token_ids = call.prepared_tokens if tuple(call.prepared_tokens.shape) == inputs.shape else None
        columns = Columns(batch, width, inputs.past, inputs.cache is not None, token_ids)
        if call is not None:
            starts = call.sequences is None
            call.forwarded(step, columns)
            if starts and call.sequences is not None and inputs.cache is not None:
                self._plain.hold(inputs.cache, call.sequences, goes_on=False)
        elif not self._plain.forwarded(step, columns, inputs.mask, inputs.cache, _returned_cache(output)):
            self._skip(inputs.mask)

    def _check_layers(self, step: Step) -> None:
        silent = self._tap.silent_layers(step)
        if silent:
            names = ", ".join(f"{layer.index} ({layer.name})" for layer in self._layers if layer.index in silent)
            raise SilentTapError(
                f"{len(silent)} of {len(self._layers)} routed layers of {self.facts['model']} did not call their "
                f"experts module in the first forward after attaching: {names}. Something replaces it (a fused "
                "kernel, a compiled model); load the model without that. expert_lens has detached itself.",
                silent,
            )

    def _check_seen(self, call: GenerateCall) -> None:
        """After a generate call: its forwards must have come by here."""
        if call.mode not in ("unknown", "draft") and call.num_forwards == 0:
            layers = tuple(layer.index for layer in self._layers)
            error = SilentTapError(
                f"generate ran, but the decoder of {self.facts['model']} was not seen to run: routed layers {layers} "
                "gave nothing. A model compiled before attaching runs past module hooks; attach first. "
                "expert_lens has detached itself.",
                layers,
            )
            self._tap.error = error
            self.close()
            raise error

    def _skip(self, mask: Any) -> None:
        self.skipped_forwards += 1
        if self.skipped_forwards == 1:
            with suppress(Warning):
                warnings.warn(
                    "expert_lens gives no rows for a forward whose attention mask "
                    f"({getattr(mask, 'shape', type(mask).__name__)}) does not say which tokens are padding. "
                    "Pass a mask of shape [batch, cached + new tokens], or none.",
                    RuntimeWarning,
                    stacklevel=2,
                )


class _FollowedMethod(StandIn):
    """A method whose calls go through `handler(original, *args, **kwargs)`."""

    def __init__(self, owner: Any, name: str, handler: Callable[..., Any]) -> None:
        super().__init__(owner, name)
        self.handler = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed:
            return self.call_original(*args, **kwargs)
        return self.handler(self.call_original, *args, **kwargs)


class _ExpertsForward(StandIn):
    """The forward of a routed layer's experts: hands what it is called with to the tap.

    Compiled code keeps that in a list instead, an effect that torch.compile defers to behind the graph, of which the
    ids are outputs then: to call the tap would break the graph at each layer. It does so wherever the layer is run, and
    whatever the list holds: a recomputation for the backward pass must have the graph that the forward had.
    """

    def __init__(self, tap: Tap, local: _Local, slot: int, layer: RoutedLayer) -> None:
        super().__init__(layer.experts, "forward")
        self.local = local
        self.slot = slot
        self.id_name = layer.id_name
        self.weight_name = layer.weight_name
        self.weights = tap.weights
        self.hand_over = tap.layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            self.local.compiled[self.slot] = self.passed(args, kwargs)
            self.local.has_compiled[0] = True
        elif len(args) > 2:
            self.hand_over(self.slot, args[1], args[2])
        else:
            self.hand_over(self.slot, *self.passed(args, kwargs))
        if self.replaced is not MISSING:
            return self.replaced(*args, **kwargs)
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def passed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """The ids, and the weights if they are captured, however they are passed; None for what is not."""
        ids = args[1] if len(args) > 1 else kwargs.get(self.id_name)
        if not self.weights:
            return ids, None
        return ids, args[2] if len(args) > 2 else kwargs.get(self.weight_name)


class _DecoderForward(StandIn):
    """The forward of the text decoder: begins a step, and publishes it when all has gone well.

    Both break the graph of compiled code, so they are left out of a decoding step that `generate` tells of by itself.
    """

    def __init__(self, capture: TransformersTap, decoder: nn.Module) -> None:
        super().__init__(decoder, "forward")
        self.capture = capture
        self.local = capture._local
        self.join = capture._tap.join_compiled
        self.starts_uncompiled = uncompiled(capture.forward_starts)
        self.ends_uncompiled = uncompiled(capture.forward_ends)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            if self.local.taken[0] == MAY_WAIT:
                output = self.call_original(*args, **kwargs)
                self.local.joined[0] = joined = self.join(self.local.compiled, kwargs.get("input_ids"))
                if joined is not None:
                    self.local.compiled[:] = [None] * len(self.local.compiled)
                self.local.taken[0] = WAITS
                return output
            self.starts_uncompiled(args, kwargs)
            output = self.call_original(*args, **kwargs)
            self.ends_uncompiled(output)
            return output
        self.capture.forward_starts(args, kwargs)
        try:
            output = self.call_original(*args, **kwargs)
        except BaseException:
            self.capture.forward_failed()
            raise
        self.capture.forward_ends(output)
        return output


def _attachable(model: Any) -> RoutedModel:
    """The model's routed layers, if this model can be attached to now."""
    routed = find_routed_layers(model)
    taken = vars(routed.decoder).get("forward")
    if isinstance(taken, _DecoderForward) and not taken.removed:
        raise EngineHookError(
            f"this {type(model).__name__} is already attached, and published to {taken.capture.path}. "
            "Close that capture first."
        )
    devices = {parameter.device for layer in routed.layers for parameter in layer.experts.parameters()}
    if len(devices - {torch.device("meta")}) > 1 or any(one.type not in DEVICES for one in devices):
        names = ", ".join(sorted(map(str, devices)))
        raise UnsupportedModelError(
            f"the routed layers of {type(model).__name__} are on {names}; this version captures models whose "
            "layers are all on the CPU, or all on one CUDA device."
        )
    return routed


def _is_being_captured() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_initialized() and bool(torch.cuda.is_current_stream_capturing())  # type: ignore[no-untyped-call]


def _returned_cache(output: Any) -> Any:
    """The cache that a forward returned, if any."""
    cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return cache
