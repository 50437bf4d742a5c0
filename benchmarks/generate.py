"""`generate` with and without the lens, beside what people do by hand: `python benchmarks/generate.py`.

Every round runs each way once, in an order of its own, on the same prompts and the same number of greedy tokens; a
figure is the throughput relative to the mean of the round's two runs without anything.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from figures import show

import expert_lens
from expert_lens import demo

BATCHES = (1, 8)


@contextmanager
def nothing(_: Any) -> Iterator[None]:
    """The model as it is."""
    yield


@contextmanager
def lens(model: Any) -> Iterator[None]:
    """Every row published, collected, counted and kept by request."""
    with expert_lens.attach(model) as attached:
        yield
        assert attached.stats["error"] is None
        assert attached.stats["tokens"] > 0


@contextmanager
def hooks_with_cpu(model: Any) -> Iterator[None]:
    """A forward hook on each router that copies its ids, as notebooks do; whose rows they are is not known."""
    held: list[torch.Tensor] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _, __, output: held.append(output[2].cpu().clone()))
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def router_logits(model: Any) -> Iterator[None]:
    """`output_router_logits=True`, and the top-k of what it returns; `generate` itself drops them."""
    held: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        held.append(torch.stack(output.router_logits).topk(model.config.num_experts_per_tok).indices.cpu())

    model.config.output_router_logits = True
    handle = model.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        model.config.output_router_logits = False


WAYS: dict[str, Callable[[Any], Any]] = {
    "lens": lens,
    "hooks with .cpu()": hooks_with_cpu,
    "output_router_logits": router_logits,
}


def seconds(model: Any, inputs: Any, tokens: int, way: Callable[[Any], Any]) -> float:
    """Of one generate call; attaching and detaching are not counted."""
    with way(model):
        began = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return time.perf_counter() - began


def measure(name: str, model: Any, inputs: Any, tokens: int, rounds: int, ways: dict[str, Any]) -> None:
    """Print the figures of one model and batch."""
    for way in (nothing, *ways.values()):
        seconds(model, inputs, tokens, way)
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    plain: list[float] = []
    for _ in range(rounds):
        order = [*ways, "none", "none"]
        random.shuffle(order)
        took = [(way, seconds(model, inputs, tokens, ways.get(way, nothing))) for way in order]
        base = statistics.mean(spent for way, spent in took if way == "none")
        plain.append(base / tokens * 1e3)
        for way, spent in took:
            if way != "none":
                ratios[way].append(base / spent)
    show(f"{name}: a step without anything", "ms", plain)
    for way, values in ratios.items():
        bar = {"bar": ">= 0.99"} if way == "lens" else {}
        show(f"{name}: {way} : nothing", "throughput ratio", values, **bar)


def mid_size() -> Any:
    """24 layers, 0.4 billion parameters, random: a step takes as long as on a small model that people use."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=768,
        moe_intermediate_size=384,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    texts = [text for texts in demo.prompts().values() for text in texts]
    for batch in BATCHES:
        inputs = tokenizer(texts[:batch], return_tensors="pt", padding=True)
        # With a padded batch, output_router_logits fails in transformers 5.23 as soon as a cache is used.
        ways = WAYS if batch == 1 else {name: way for name, way in WAYS.items() if way is not router_logits}
        measure(f"demo model, 8 layers, batch {batch}", model, inputs, 128, 15, ways)
    inputs = {"input_ids": torch.arange(32)[None]}
    measure("24 layers, 0.4 B, batch 1", mid_size(), inputs, 32, 9, WAYS)


if __name__ == "__main__":
    main()
