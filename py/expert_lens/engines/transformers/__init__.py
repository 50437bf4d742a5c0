"""Hugging Face transformers: attach to a model, and see the experts that its tokens go to.

`layers` finds the routed layers, `attachment` holds the hooks and decides what each forward was, `generate` follows
a `generate` call, `continuous` follows continuous batching, `requests` tells the positions of rows.
"""

import sys
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from expert_lens.engines.transformers.attachment import TransformersTap

__all__ = ["attach", "matches"]


def matches(obj: object) -> bool:
    """Whether the object is a transformers model. Imports nothing: without transformers there is no such model."""
    transformers = sys.modules.get("transformers.modeling_utils")
    model_class = getattr(transformers, "PreTrainedModel", None)
    return model_class is not None and isinstance(getattr(obj, "_orig_mod", obj), model_class)


def attach(
    model: Any,
    capture: str,
    *,
    weights: bool = False,
    arena_bytes: int = 268435456,
    on_full: Literal["drop", "wait"] = "drop",
    wait_timeout: float = 1.0,
    directory: str | None = None,
) -> "TransformersTap":
    """Publish the routed experts of every forward of `model` under the name `capture`, until `close()`.

    `weights`: also publish the routing weights, as float16. The other options are those of `_core.Writer`.

    Raises NotMoEError for a dense model, UnsupportedModelError for a model that this version cannot capture exactly,
    EngineHookError when the model is already attached or this release of transformers lacks a place to hold on to.
    SilentTapError is raised by the first forward, after detaching, if a routed layer's experts did not show up in it.
    """
    from expert_lens.engines.transformers.attachment import TransformersTap

    return TransformersTap(
        model,
        capture,
        weights=weights,
        arena_bytes=arena_bytes,
        on_full=on_full,
        wait_timeout=wait_timeout,
        directory=directory,
    )
