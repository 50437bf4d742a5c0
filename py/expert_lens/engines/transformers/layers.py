"""Which modules of a transformers model route tokens to experts, and where their calls carry the ids.

A routed layer is a module of the text decoder whose forward takes the hidden states, the chosen experts' ids [n, K]
and their weights, in that order; 59 of the model files of transformers 5.23 have one. What such a module is called
with is what the tokens go to, so nothing has to be computed again.
"""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from expert_lens.errors import NotMoEError, UnsupportedModelError

__all__ = ["RoutedLayer", "RoutedModel", "find_routed_layers"]

ID_NAMES = ("top_k_index", "router_indices", "selected_experts")
WEIGHT_NAMES = ("top_k_weights", "routing_weights")

# Modules that take ids, but not the ones that the router chose.
MASKED_FAMILIES = {"ZayaExperts": "its router sends skipped tokens to expert 0, which cannot be told from a choice"}

ROUTED_WORDS = re.compile(r"MoE|Moe|Experts?(?!LM)|SparseMLP|Router")

TOP_K_NAMES = ("num_experts_per_tok", "top_k", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True)
class RoutedLayer:
    """One routed layer: its index in the model, its name, its experts module, and how that is called."""

    index: int
    name: str
    experts: nn.Module
    id_name: str
    weight_name: str


@dataclass(frozen=True)
class RoutedModel:
    """The routed layers of a model in the order of their indices, and what they have in common."""

    decoder: nn.Module
    layers: tuple[RoutedLayer, ...]
    num_experts: int
    top_k: int


def find_routed_layers(model: Any) -> RoutedModel:
    """The routed layers of the model's text decoder.

    Raises NotMoEError if the model is dense, UnsupportedModelError if it routes in a way that is not known here, or
    its layers disagree in their number of experts.
    """
    name = type(model).__name__
    decoder = _decoder(model)
    layers = tuple(_routed_layers(decoder))
    if not layers:
        raise _no_layers_error(model, decoder)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; its encoder and decoder route different tokens. "
            "Only decoder-only models are supported."
        )
    for layer in layers:
        family = type(layer.experts).__name__
        if family in MASKED_FAMILIES:
            raise UnsupportedModelError(f"{name} is not supported ({family}): {MASKED_FAMILIES[family]}.")
        if getattr(layer.experts, "_is_expert_parallel", False):
            raise UnsupportedModelError(
                f"{name} spreads its experts over several processes (expert parallelism), so {layer.name} sees only "
                "the ids of its own. Load the model without expert parallelism."
            )
    return RoutedModel(
        decoder=decoder,
        layers=layers,
        num_experts=_same_for_all(name, layers, "num_experts", [_num_experts(layer) for layer in layers]),
        top_k=_same_for_all(name, layers, "top_k", [_top_k(model, decoder, layer) for layer in layers]),
    )


def _decoder(model: Any) -> nn.Module:
    """The innermost text decoder: the module that both `model(...)` and `model.model(...)` run."""
    decoder = model.get_decoder()
    if decoder is model and isinstance(inner := getattr(model, "model", None), nn.Module):
        decoder = inner  # Llama4ForCausalLM, whose prefix names another class's attribute
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__}.get_decoder() gave {decoder!r}, expected a module.")
    return decoder


def _routed_layers(decoder: nn.Module) -> list[RoutedLayer]:
    found: dict[int, RoutedLayer] = {}
    for name, module in decoder.named_modules():
        names = _call_names(module)
        if names is None:
            continue
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if number is None:
            raise UnsupportedModelError(f"the routed module {name} ({type(module).__name__}) is in no numbered layer.")
        index = int(number[1])
        if index in found:
            raise UnsupportedModelError(
                f"layer {index} has two routed modules, {found[index].name} and {name} ({type(module).__name__}); "
                "only one a layer is supported."
            )
        found[index] = RoutedLayer(index, name, module, *names)
    return [found[index] for index in sorted(found)]


def _call_names(module: nn.Module) -> tuple[str, str] | None:
    """The names of the ids' and the weights' parameters, if the module's forward is that of routed experts."""
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    if len(parameters) == 3 and parameters[1] in ID_NAMES and parameters[2] in WEIGHT_NAMES:
        return parameters[1], parameters[2]
    return None


def _num_experts(layer: RoutedLayer) -> int | None:
    for name in ("total_experts", "num_experts"):  # total_experts: LongCat-Flash, with its zero-compute experts
        if isinstance(value := getattr(layer.experts, name, None), int):
            return value
    return None


def _top_k(model: Any, decoder: nn.Module, layer: RoutedLayer) -> int | None:
    """How many experts a token goes to: the router says so, or the config. The first forward checks it."""
    block = decoder.get_submodule(layer.name.rpartition(".")[0])
    config = model.config.get_text_config(decoder=True)
    for owner in (*(child for child in block.children() if child is not layer.experts), block, config):
        for name in TOP_K_NAMES:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return None


def _same_for_all(model: str, layers: tuple[RoutedLayer, ...], what: str, values: list[int | None]) -> int:
    value = values[0]
    if value is None:
        raise UnsupportedModelError(
            f"{model}: {what} of {layers[0].name} ({type(layers[0].experts).__name__}) could not be found."
        )
    for layer, other in zip(layers, values, strict=True):
        if other != value:
            raise UnsupportedModelError(
                f"{model}: {what} is {value} in {layers[0].name} but {other} in {layer.name}; "
                "layers that differ are not supported."
            )
    return value


def _no_layers_error(model: Any, decoder: nn.Module) -> NotMoEError | UnsupportedModelError:
    name = type(model).__name__
    for part_name, part in decoder.named_modules():
        if part_name and ROUTED_WORDS.search(type(part).__name__) and _looks_routed(part):
            return UnsupportedModelError(
                f"{name} is not supported: {part_name} ({type(part).__name__}) seems to route tokens to experts, but "
                f"its parts have no forward(hidden_states, {'|'.join(ID_NAMES)}, {'|'.join(WEIGHT_NAMES)})."
            )
    return NotMoEError(
        f"{name} has no routed experts in {type(decoder).__name__}: it is a dense model, so there is nothing to "
        "capture. Attach to a mixture-of-experts model, such as Qwen3MoeForCausalLM or MixtralForCausalLM."
    )


def _looks_routed(module: nn.Module) -> bool:
    """Whether a module named like a routed one has experts: some families name their norms so, too."""
    return any(hasattr(module, attribute) for attribute in ("experts", "router", "gate", "input_linear", "num_experts"))
