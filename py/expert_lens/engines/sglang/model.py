"""What a model runner of SGLang says of its model, and of its place among the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expert_lens.errors import UnsupportedModelError

__all__ = ["eager_rows", "facts", "graph_rows", "publishing_rank", "routed_layers"]

EXPERT_COUNTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
"""What configurations call the number of routed experts."""


def routed_layers(model: Any) -> list[int]:
    """The indices of the model's layers that choose experts by a `TopK`, ascending; empty for a dense model."""
    from sglang.srt.layers.moe.topk import TopK

    return sorted({module.layer_id for module in model.modules() if isinstance(module, TopK)})


def facts(runner: Any) -> dict[str, Any]:
    """The facts of `_core.Writer` about this runner's model; no KV slots where they tell nothing of a prefix.

    Raises UnsupportedModelError if the configuration does not say how many experts there are.
    """
    import sglang

    config = runner.model_config.hf_text_config
    num_experts = next((getattr(config, name) for name in EXPERT_COUNTS if getattr(config, name, None)), None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if num_experts is None or top_k is None:
        raise UnsupportedModelError(
            f"the configuration of {runner.model_config.model_path} says neither of {', '.join(EXPERT_COUNTS)} and "
            "num_experts_per_tok, so the number of experts and of those chosen is unknown."
        )
    return {
        "layers": routed_layers(runner.model),
        "num_experts": int(num_experts),
        "top_k": int(top_k),
        "kv_slots": _num_slots(runner) if _slots_are_lasting(runner) else 0,
        "engine": "sglang",
        "engine_version": sglang.__version__,
        "model": str(runner.model_config.model_path),
    }


def _num_slots(runner: Any) -> int:
    """One more than the largest KV slot."""
    translator = getattr(runner, "kv_index_translator", None)
    if translator is not None:
        return int(translator.capture_token_capacity(runner.max_token_pool_size))
    return int(runner.max_total_num_tokens + runner.page_size)


def _slots_are_lasting(runner: Any) -> bool:
    """Whether a KV slot keeps the token that a forward here wrote there, until another forward here writes it.

    Not where KV comes from elsewhere (the host's or a remote cache, a prefill server), or where pages move, so that
    slots have other numbers in forwards than in `req_to_token`.
    """
    args = runner.server_args
    return (
        not getattr(getattr(runner, "kv_index_translator", None), "is_translating", False)
        and not getattr(args, "enable_hierarchical_cache", False)
        and not getattr(args, "enable_lmcache", False)
        and getattr(args, "disaggregation_mode", "null") in (None, "null")
    )


def publishing_rank(runner: Any) -> int | None:
    """The rank under which this process publishes: its data-parallel rank; None if another process publishes the same.

    Tensor-parallel ranks route alike, so the first of each data-parallel rank publishes.

    Raises UnsupportedModelError for layouts in which no process sees whole rows.
    """
    from sglang.srt.layers.moe import get_moe_a2a_backend

    here = _parallel(runner)
    if here.pp_size > 1:
        raise UnsupportedModelError(
            f"{here.pp_size} pipeline stages: each has a part of the layers, and expert_lens does not join them yet. "
            "Start with --pp-size 1."
        )
    if here.attn_tp_size > 1 and "deepep" in str(get_moe_a2a_backend()).lower():
        raise UnsupportedModelError(
            f"--moe-a2a-backend {get_moe_a2a_backend()} scatters tokens over {here.attn_tp_size} attention ranks, and "
            "expert_lens does not gather them yet. Start with as many data-parallel as tensor-parallel ranks."
        )
    return None if here.attn_tp_rank else here.dp_rank


@dataclass(frozen=True, slots=True)
class _Parallel:
    """This process's place. `dp_rank`: of data-parallel attention, or of the replica."""

    pp_size: int
    attn_tp_size: int
    attn_tp_rank: int
    attn_dp_rank: int
    dp_rank: int


def _parallel(runner: Any) -> _Parallel:
    from sglang.srt.layers import dp_attention

    try:
        from sglang.srt.runtime_context import get_parallel

        here = get_parallel()
        pp_size, tp_size, tp_rank, dp_rank = here.pp_size, here.attn_tp_size, here.attn_tp_rank, here.attn_dp_rank
    except ImportError:  # before 0.5.15
        pp_size = runner.pp_size
        tp_size, tp_rank = dp_attention.get_attention_tp_size(), dp_attention.get_attention_tp_rank()
        dp_rank = dp_attention.get_attention_dp_rank()
    replica = getattr(runner, "dp_rank", None) or 0
    return _Parallel(pp_size, tp_size, tp_rank, dp_rank, dp_rank if dp_attention.is_dp_attention_enabled() else replica)


def eager_rows(runner: Any, batch: Any, num_rows: int) -> int:
    """The first of this rank's rows among the `num_rows` that a MoE layer saw in an eager forward.

    With data-parallel attention a layer sees the rows of all ranks, one behind the other, unless the tokens go from
    rank to rank by themselves.
    """
    from sglang.srt.layers import dp_attention

    if not dp_attention.is_dp_attention_enabled() or num_rows < sum(batch.global_num_tokens_cpu):
        return 0
    return int(sum(batch.global_num_tokens_cpu[: _parallel(runner).attn_dp_rank]))


def graph_rows(runner: Any, num_rows: int) -> slice:
    """This rank's rows among the `num_rows` that a MoE layer sees in a decode graph: there, all ranks have as many."""
    from sglang.srt.layers import dp_attention
    from sglang.srt.layers.moe import get_moe_a2a_backend

    if not dp_attention.is_dp_attention_enabled() or not get_moe_a2a_backend().is_none():
        return slice(0, num_rows)
    size = num_rows // runner.server_args.dp_size
    begin = _parallel(runner).attn_dp_rank * size
    return slice(begin, begin + size)
