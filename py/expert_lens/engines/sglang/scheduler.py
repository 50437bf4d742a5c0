"""The hooks in a scheduler's process, and the capture that they feed."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from expert_lens._core import Writer
from expert_lens.engines.sglang import contract, model
from expert_lens.engines.sglang.capturer import Capturer
from expert_lens.engines.sglang.layout import Layout, refuse_unknown
from expert_lens.errors import NotMoEError
from expert_lens.tap import Tap

__all__ = ["SchedulerHooks"]

log = logging.getLogger(__name__)


class SchedulerHooks:
    """What runs at the places of `contract`; `options` are those of `enabling.enabled`."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._runner: Any = None
        self._capturer: Capturer | None = None

    def register(self) -> None:
        """Have SGLang call them."""
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        for place, hook, kind in [
            (contract.INIT, self.after_init, HookType.AFTER),
            (contract.PROMPTS, self.after_prompts, HookType.AFTER),
            (contract.DECODE_CAPTURE, self.around_decode_capture, HookType.AROUND),
            (contract.RELEASE, self.before_release, HookType.BEFORE),
            (contract.VERIFY, self.after_verify, HookType.AFTER),
        ]:
            path = place.find()
            if path is None:
                assert place is contract.VERIFY, "contract.problems() would have named it"
                continue
            HookRegistry.register(path.replace(":", "."), hook, kind)

    def after_init(self, _: Any, runner: Any) -> None:
        """The model is loaded and the KV pool made; no graph is captured yet.

        A draft model's runner comes by here too, behind its target's: in some releases it sets a capturer of its own.
        """
        if runner.is_draft_worker:
            if self._capturer is not None:
                self._set(self._capturer)
            return
        try:
            self._attach(runner)
        except Exception as error:
            log.error("expert_lens captures nothing: %s: %s", type(error).__name__, error)

    def _attach(self, runner: Any) -> None:
        from sglang.srt.layers.moe import get_moe_a2a_backend

        layout = Layout.of(runner)
        refuse_unknown(layout, runner.server_args, get_moe_a2a_backend().value)
        facts = model.facts(runner)  # on every rank, whose layers are told their number alike
        rank = layout.publishing_rank
        if rank is None:
            return
        if not facts["layers"]:
            here = f"stage {layout.pp_rank} of {facts['model']}" if layout.pp_size > 1 else facts["model"]
            raise NotMoEError(
                f"{here} has no layer that chooses experts by SGLang's TopK: it is dense, or routes in a way of its "
                "own, which expert_lens does not know yet"
            )
        options = dict(self._options)
        name = options.pop("name") or f"sglang-{os.getppid()}"
        writer = Writer(name, rank=rank, other_stages=layout.pp_size - 1, **facts, **options)
        tap = Tap(writer, layers=facts["layers"], num_experts=facts["num_experts"], top_k=facts["top_k"])
        if runner.device == "cuda":
            tap.prepare(runner.gpu_id)
        self._capturer = Capturer(
            runner,
            self._get(),
            tap,
            layout,
            max_rows=model.largest_forward(runner),
            slots=facts["kv_slots"] > 0,
        )
        self._set(self._capturer)
        self._runner = runner
        # This runner's alone, and by no hook of SGLang's registry, which costs more than what it would call, and this
        # comes by in every step.
        runner.forward = partial(self._capturer.run, runner.forward)
        if contract.VERIFY.find() is None and not runner.spec_algorithm.is_none():
            log.warning(
                "expert_lens: rows of drafted tokens count as dropped, as this SGLang has no %s", contract.VERIFY.paths
            )
        log.info("expert_lens publishes as capture %s, rank %d", name, rank)

    def after_prompts(self, _: Any, batch: Any) -> None:
        """Prompts, or parts of them, were put together."""
        if (capturer := self._capturer) is not None:
            capturer.tap.guard(lambda: capturer.requests.admit(batch.reqs))

    def around_decode_capture(self, capture: Callable[..., Any], graph_runner: Any, *args: Any, **kwargs: Any) -> Any:
        """A decode graph is captured; of how many requests is the first of the arguments, one is the `forward`."""
        if self._capturer is None or graph_runner.model_runner is not self._runner:
            return capture(graph_runner, *args, **kwargs)
        call = inspect.signature(capture).bind(graph_runner, *args, **kwargs)
        _, size, *_ = call.arguments.values()
        with self._capturer.capturing(graph_runner, size, call.arguments["forward"]) as forward:
            call.arguments["forward"] = forward
            result = capture(*call.args, **call.kwargs)
            self._capturer.tap.guard(self._follow, graph_runner, result)
        return result

    def _follow(self, graph_runner: Any, result: Any) -> None:
        backend = getattr(graph_runner, "backend", None)
        graph = result[0] if backend is None else next(reversed(getattr(backend, "_graphs", {}).values()), None)
        if self._capturer is not None:
            self._capturer.follow(graph)

    def after_verify(self, result: Any, *_: Any, **__: Any) -> None:
        """The target model has judged drafted tokens: what was predicted, how many and which of them it accepts."""
        if (capturer := self._capturer) is not None:
            capturer.tap.guard(lambda: capturer.accept(result[2]))

    def before_release(self, req: Any, *_: Any, **__: Any) -> None:
        """A request gives its KV slots back."""
        if self._capturer is not None:
            self._capturer.tap.guard(self._capturer.requests.release, req)

    @staticmethod
    def _get() -> Any:
        return _capturer_module().get_global_experts_capturer()

    @staticmethod
    def _set(capturer: Any) -> None:
        _capturer_module().set_global_experts_capturer(capturer)


def _capturer_module() -> Any:
    path = contract.CAPTURER.find()
    assert path is not None, "contract.problems() would have named it"
    return importlib.import_module(path.partition(":")[0])
