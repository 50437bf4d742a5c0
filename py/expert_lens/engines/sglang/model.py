"""What a model runner of SGLang says of its model."""

from __future__ import annotations

import re
from typing import Any

from expert_lens.errors import UnsupportedModelError

__all__ = ["facts", "largest_forward"]

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""What configurations call the number of routed experts."""
CACHES_ELSEWHERE = (
    "enable_hierarchical_cache",
    "enable_lmcache",
    "enable_flexkv",
    "enable_unified_cache_external_linker",
    "enable_hisparse",
    "radix_cache_backend",
)
"""Options of SGLang by which KV comes, or may come, from where no forward here has written it."""


def _routed_layers(model: Any) -> dict[int, int]:
    """The indices of the model's layers that choose experts by a `TopK`, ascending, and how many each chooses a token;
    empty for a dense model.

    Many models of older releases do not tell a `TopK` which layer it is of. It is told so here, by its name in the
    model, as newer releases do: what it tells a capturer follows from that, and of what it computes the experts that
    SGLANG_SIMULATE_ROUND_ROBIN_EXPERTS has it pretend to choose.

    Raises UnsupportedModelError if that tells nothing.
    """
    from sglang.srt.layers.moe.topk import TopK

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, TopK)]
    told = {module.layer_id for _, module in found if module.layer_id is not None}
    for name, module in found:
        if module.layer_id is None:
            place = re.search(r"\b(?:layers|blocks)\.(\d+)\.", name)
            if place is None or int(place[1]) in told:
                raise UnsupportedModelError(
                    f"{name} of {type(model).__name__} chooses experts and does not tell of which layer; in newer "
                    "releases of SGLang it does."
                )
            module.layer_id = int(place[1])
            told.add(module.layer_id)
    return dict(sorted((module.layer_id, _routed_k(module)) for _, module in found))


def _routed_k(topk: Any) -> int:
    """Experts that it chooses for a token, without the shared ones that some models add to them."""
    config = topk.topk_config
    shared = getattr(config, "num_shared_topk_slots", None)  # in newer releases
    return int(config.top_k - (config.num_fused_shared_experts if shared is None else shared))


def facts(runner: Any) -> dict[str, Any]:
    """The facts of `_core.Writer` about this runner's model; no KV slots where they tell nothing of a prefix.

    Raises UnsupportedModelError if the configuration does not say how many experts there are, nothing which layer one
    is, or layers choose unlike numbers of experts.
    """
    import sglang

    config = runner.model_config.hf_text_config
    num_experts = next((getattr(config, name) for name in EXPERT_COUNTS if getattr(config, name, None)), None)
    if num_experts is None:
        raise UnsupportedModelError(
            f"the configuration of {runner.model_config.model_path} says none of {', '.join(EXPERT_COUNTS)}, so the "
            "number of experts is unknown."
        )
    layers = _routed_layers(runner.model)
    if len(set(layers.values())) > 1:
        raise UnsupportedModelError(
            f"the layers of {runner.model_config.model_path} choose unlike numbers of experts a token: {layers}."
        )
    return {
        "layers": list(layers),
        "num_experts": int(num_experts),
        "top_k": max(layers.values(), default=0),
        "kv_slots": _num_slots(runner) if _slots_are_lasting(runner) else 0,
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": str(getattr(runner.server_args, "served_model_name", None) or runner.model_config.model_path),
    }


def _num_slots(runner: Any) -> int:
    """One more than the largest KV slot."""
    size = getattr(runner, "max_token_pool_size", None) or runner.max_total_num_tokens  # 0.5.16 and 0.5.17
    translator = getattr(runner, "kv_index_translator", None)
    capacity = getattr(translator, "capture_token_capacity", None)  # before 0.5.21 there is none
    return int(size + runner.page_size if capacity is None else capacity(size))


def _slots_are_lasting(runner: Any) -> bool:
    """Whether a KV slot keeps the token that a forward here wrote there, until another forward here writes it.

    Not where KV comes from elsewhere (the host's or a remote cache, a prefill server), or where pages move, so that
    slots have other numbers in forwards than in `req_to_token`.
    """
    args = runner.server_args
    return (
        not getattr(getattr(runner, "kv_index_translator", None), "is_translating", False)
        and not any(getattr(args, name, False) for name in CACHES_ELSEWHERE)
        and getattr(args, "disaggregation_mode", "null") in (None, "null")
    )


def largest_forward(runner: Any) -> int:
    """Rows of the largest forward: a chunk of prompts, or the largest graph, beside all that decode or verify."""
    args = runner.server_args
    chunk = getattr(args, "chunked_prefill_size", None) or 0
    prefill = chunk if chunk > 0 else getattr(args, "max_prefill_tokens", 0) or 16384
    drafted = getattr(args, "speculative_num_draft_tokens", None) or 1
    return int(max(prefill, 4096) + runner.max_running_requests * drafted)
