"""Tiny random models: the five families that the transformers engine is held to, and others that it must refuse."""

from typing import Any

import torch
import transformers

VOCAB = 64
PAD, EOS, BOS = 0, 1, 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": BOS,
}


def qwen3_moe(**changes: Any) -> Any:
    """Three layers, the middle one dense; 8 experts, 2 a token."""
    options = {
        "num_hidden_layers": 3,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    }
    return _build(transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, options, changes)


def mixtral(**changes: Any) -> Any:
    """Two layers; 4 experts, 2 a token."""
    options = {"num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    return _build(transformers.MixtralForCausalLM, transformers.MixtralConfig, options, changes)


def olmoe(**changes: Any) -> Any:
    """Two layers; 8 experts, 3 a token."""
    options = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 3}
    return _build(transformers.OlmoeForCausalLM, transformers.OlmoeConfig, options, changes)


def deepseek_v3(**changes: Any) -> Any:
    """Three layers, the first dense; 8 experts in 2 groups, 3 a token, and a shared one that does not count."""
    options = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    }
    return _build(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config, options, changes)


def gpt_oss(**changes: Any) -> Any:
    """Two layers, one with a sliding window; 6 experts, 2 a token."""
    options = {"num_hidden_layers": 2, "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2}
    options |= {"sliding_window": 8}
    return _build(transformers.GptOssForCausalLM, transformers.GptOssConfig, options, changes)


def qwen3_vl_moe() -> Any:
    """Two layers of 8 experts, 2 a token; its decoder is given embeddings, into which images could be mixed."""
    text = {
        **COMMON,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    model_class, config_class = transformers.Qwen3VLMoeForConditionalGeneration, transformers.Qwen3VLMoeConfig
    return _build(model_class, config_class, {"text_config": text, "vision_config": vision, **tokens}, {})


def many_experts() -> Any:
    """More experts than a byte can number."""
    return mixtral(num_local_experts=300, num_experts_per_tok=5, intermediate_size=4)


def dense() -> Any:
    return _build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {"num_hidden_layers": 2, "head_dim": 8}, {})


FAMILIES = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}


def _build(model_class: Any, config_class: Any, options: dict[str, Any], changes: dict[str, Any]) -> Any:
    torch.manual_seed(7)
    model = model_class(config_class(**{**COMMON, **options, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # wider than the default init, so that routing and outputs vary with the input
                parameter.normal_(0.0, 0.4)
            elif "bias" in name:
                parameter.normal_(0.0, 0.1)
    return model
