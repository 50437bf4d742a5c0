"""transformers `generate` on a GPU, with and without the lens: `python benchmarks/gpu_generate.py`.

A random Qwen3-MoE of 24 layers, in eager mode: every round runs each way once, in an order of its own, and of each the
median step counts; a figure is relative to the mean of the round's two runs without anything.
"""

import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from expert_lens._core import Collector
from expert_lens.engines import transformers as engine

TOKENS, ROUNDS = 24, 8
NAME = f"bench-{os.getpid()}"


def make_model() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=8,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"):
        return transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


@contextmanager
def nothing(_: Any) -> Iterator[None]:
    yield


@contextmanager
def lens(model: Any) -> Iterator[None]:
    """Every row published by the GPU, collected, counted and kept by request."""
    tap = engine.attach(model, NAME)
    collector = Collector(NAME, prompt=False)
    try:
        yield
    finally:
        tap.close()
        collector.close()
        assert tap.error is None


@contextmanager
def hooks_with_cpu(model: Any) -> Iterator[None]:
    """A hook on each experts module that copies the ids it is called with."""
    held: list[torch.Tensor] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: held.append(args[1].cpu()))
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


WAYS: dict[str, Callable[[Any], Any]] = {"lens": lens, "hooks with .cpu()": hooks_with_cpu}


class Clock(transformers.StoppingCriteria):
    """Stops nothing, and notes when it is asked: once a step."""

    def __init__(self) -> None:
        self.asked: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Of no sequence [n] is it said that it is done."""
        self.asked.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def step(model: Any, inputs: dict[str, Any], way: Callable[[Any], Any]) -> float:
    """The median decode step, in milliseconds; `generate` waits for the GPU in each."""
    clock = Clock()
    with way(model):
        model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, stopping_criteria=[clock])
        torch.cuda.synchronize()
    steps = [(after - before) * 1e3 for before, after in itertools.pairwise(clock.asked)]
    return statistics.median(steps[2:])


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    model = make_model()
    for batch in (1, 64):
        ids = torch.randint(1, 4096, (batch, 32), device="cuda")
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        step(model, inputs, nothing)
        steps: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in range(ROUNDS):
            order: list[tuple[str, Callable[[Any], Any]]] = [*WAYS.items(), ("", nothing), ("", nothing)]
            took: dict[str, list[float]] = {}
            for name, way in random.sample(order, len(order)):
                took.setdefault(name, []).append(step(model, inputs, way))
            without = statistics.mean(took[""])
            steps.append(without)
            for name in WAYS:
                ratios[name].append(without / took[name][0])
        show(f"24 layers, batch {batch}: a step without anything", "ms", steps)
        for name, values in ratios.items():
            show(f"24 layers, batch {batch}: {name} : nothing", "speed ratio", values)


def show(name: str, unit: str, values: list[float]) -> None:
    low, median, high = statistics.quantiles(values, n=4)
    line = {"name": name, "unit": unit, "median": round(median, 4), "spread": [round(low, 4), round(high, 4)]}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
