"""The places of SGLang that expert_lens holds on to, and whether this release has them.

They are data, so that a test can look for them in the sources of releases that it cannot import.
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from typing import Any

__all__ = [
    "CAPTURER",
    "DECODE_CAPTURE",
    "INIT",
    "NEWEST",
    "OLDEST",
    "PLACES",
    "PROMPTS",
    "RELEASE",
    "RELEASES",
    "VERIFY",
    "Place",
    "knows",
    "problems",
]

OLDEST, NEWEST = "0.5.11", "0.5.23"
RELEASES = f"{OLDEST} to {NEWEST}"
"""Releases that the places were looked up in; the tests look into each of them."""


@dataclass(frozen=True)
class Place:
    """A function or method that is hooked or called.

    `paths`: `module:name`, as releases have called it, newest first. `parameters`: those that are relied on.
    """

    purpose: str
    paths: tuple[str, ...]
    parameters: tuple[str, ...]

    def find(self) -> str | None:
        """The path that this release has, with those parameters; None if it has none."""
        for path in self.paths:
            try:
                there = set(inspect.signature(_resolve(path)).parameters)
            except Exception:  # what a module of SGLang raises that cannot be imported here may be anything
                continue
            if set(self.parameters) <= there:
                return path
        return None


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"

INIT = Place(
    "the capturer of routed experts is made",
    (f"{_RUNNER}.init_routed_experts_capturer",),
    ("self",),
)
PROMPTS = Place(
    "prompts are put together",
    ("sglang.srt.managers.schedule_batch:ScheduleBatch.prepare_for_extend",),
    ("self",),
)
DECODE_CAPTURE = Place(
    "a decode step is captured in a CUDA graph",
    (
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.capture_one_shape",
        "sglang.srt.model_executor.cuda_graph_runner:CudaGraphRunner.capture_one_batch_size",
    ),
    ("self", "forward"),
)
RELEASE = Place(
    "a request gives its KV slots back",
    ("sglang.srt.mem_cache.common:release_kv_cache",),
    ("req", "tree_cache"),
)
VERIFY = Place(
    "drafted tokens are accepted or rejected",
    ("sglang.srt.speculative.eagle_utils:eagle_sample",),
    ("verify_input", "batch"),
)
"""Releases that lack it are known all the same: rows of drafted tokens count as dropped there."""
CAPTURER = Place(
    "the capturer that every MoE layer calls is set",
    (
        "sglang.srt.state_capturer.routed_experts:set_global_experts_capturer",
        "sglang.srt.layers.moe.routed_experts_capturer:set_global_experts_capturer",
    ),
    ("capturer",),
)
PLACES = (
    INIT,
    Place("a forward begins", (f"{_RUNNER}.forward",), ("self", "forward_batch")),
    PROMPTS,
    DECODE_CAPTURE,
    RELEASE,
    CAPTURER,
    Place(
        "the capturer is asked for",
        (
            "sglang.srt.state_capturer.routed_experts:get_global_experts_capturer",
            "sglang.srt.layers.moe.routed_experts_capturer:get_global_experts_capturer",
        ),
        (),
    ),
    Place("a routed layer says which it is", ("sglang.srt.layers.moe.topk:TopK.__init__",), ("layer_id",)),
    Place("a hook is registered", ("sglang.srt.plugins.hook_registry:HookRegistry.register",), ("target", "hook")),
)


def knows(version: str) -> bool:
    """Whether the places were looked up in that release, or in one before and one behind it."""

    def numbers(release: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", release)[:3]]

    return numbers(OLDEST) <= numbers(version) <= numbers(NEWEST)


def problems() -> list[str]:
    """What this release of SGLang lacks, a sentence each; empty if expert_lens can hold on to it.

    Imports the model's side of SGLang.
    """
    return [
        f"{place.purpose}: no {' or '.join(place.paths)} with {', '.join(place.parameters) or 'no parameters'}"
        for place in PLACES
        if place.find() is None
    ]
