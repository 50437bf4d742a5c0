"""transformers on a GPU at the shape of Qwen3-30B-A3B, cut to 12 layers: `python benchmarks/gpu_batching.py`.

`generate_batch` with CUDA graphs and two batches in turn (its overlapped scheduler), 64 requests of 64 + 128 tokens,
dummy weights: tokens a second relative to the same without anything in the same round. `deferred copy by torch`:
`peers.DeferredCopy`. Hooks with `.cpu()` cannot be captured in a graph; `gpu_generate.py` has them.

Prefill: one forward of 8192 tokens, with and without the lens, from events, in turn.
"""

import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from figures import show
from peers import DeferredCopy
from transformers.generation.continuous_batching.model_runner import ModelRunner

from expert_lens._core import Collector
from expert_lens.engines import transformers as engine

LAYERS, TOP_K = 12, 8
NAME = f"bench-{os.getpid()}"
REQUESTS, PROMPT, OUTPUT, ROUNDS = 64, 64, 128, 6
PREFILL, PREFILL_ROUNDS = 8192, 20
GRAPHS = {"use_cuda_graph": True, "use_async_batching": True}


def make_model() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32768,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=TOP_K,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = -1
    return model


@contextmanager
def nothing(_: Any) -> Iterator[None]:
    yield


OURS: list[float] = []
"""Microseconds of ours around each replay: whose rows they are, the post, and what comes after the launch."""


def time_ours(tap: Any) -> None:
    """Have the capture note what it takes around each replay of a graph."""
    batches = tap._continuous
    replay = batches.replay

    def timed(known: Any, processor: Any, graph: Any, recorded: Any) -> None:
        launched = 0

        class Launch:
            """The graph, with a clock around its launch."""

            def replay(self) -> None:
                nonlocal launched
                began = time.perf_counter_ns()
                graph.replay()
                launched = time.perf_counter_ns() - began

        began = time.perf_counter_ns()
        replay(known, processor, Launch(), recorded)
        OURS.append((time.perf_counter_ns() - began - launched) / 1e3)

    batches.replay = timed


@contextmanager
def lens(model: Any) -> Iterator[None]:
    """Every row published by the GPU, collected, counted and kept by request."""
    tap = engine.attach(model, NAME)
    time_ours(tap)
    collector = Collector(NAME)
    try:
        yield
    finally:
        assert tap.error is None, tap.error
        assert collector.sync(10.0)
        assert collector.stats()["dropped_tokens"] == 0
        tap.close()
        collector.close()


@contextmanager
def deferred_copy(model: Any) -> Iterator[None]:
    """What SGLang's deferred copy does, by hand."""
    experts = [layer.mlp.experts for layer in model.model.layers]
    slots = {id(module): slot for slot, module in enumerate(experts)}
    copy = DeferredCopy(8192, LAYERS, TOP_K)
    forward, compute = type(experts[0]).forward, ModelRunner.compute_batch

    def kept(module: Any, hidden_states: Any, ids: Any, weights: Any) -> Any:
        copy.keep(slots[id(module)], ids)
        return forward(module, hidden_states, ids, weights)

    def computed(runner: Any, model: Any, batch_data: Any) -> None:
        compute(runner, model, batch_data)
        with torch.cuda.stream(runner.inputs_and_outputs.compute_stream):
            copy.defer(batch_data["input_ids"].shape[1])

    type(experts[0]).forward, ModelRunner.compute_batch = kept, computed
    try:
        yield
    finally:
        type(experts[0]).forward, ModelRunner.compute_batch = forward, compute


def batch_seconds(model: Any, way: Callable[[Any], Any]) -> float:
    """Time of one `generate_batch`; an earlier one has captured the graphs."""
    prompts = [[1 + (i * 37 + j * 11) % 32_000 for j in range(PROMPT)] for i in range(REQUESTS)]
    config = transformers.ContinuousBatchingConfig(num_blocks=128, max_batch_tokens=1024, **GRAPHS)
    options = {"continuous_batching_config": config, "persistent_manager": True, "progress_bar": False}
    with way(model):
        for _ in range(2):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate_batch(prompts, max_new_tokens=OUTPUT, **options)
            torch.cuda.synchronize()
            took = time.perf_counter() - began
        model.destroy_cached_continuous_batching_manager()
    return took


def measure_batches(model: Any) -> None:
    ways: dict[str, Callable[[Any], Any]] = {"lens": lens, "deferred copy by torch": deferred_copy}
    speeds: list[float] = []
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        order: list[tuple[str, Callable[[Any], Any]]] = [*ways.items(), ("", nothing), ("", nothing)]
        took: dict[str, list[float]] = {}
        for way, context in random.sample(order, len(order)):
            took.setdefault(way, []).append(batch_seconds(model, context))
        without = statistics.mean(took[""])
        speeds.append(REQUESTS * OUTPUT / without)
        for way in ways:
            ratios[way].append(without / took[way][0])
    show("generate_batch: nothing", "tokens/s", speeds)
    for way, values in ratios.items():
        bar = {"bar": ">= 0.99"} if way == "lens" else {}
        show(f"generate_batch: {way} : nothing", "throughput ratio", values, **bar)
    show(f"generate_batch, n = {REQUESTS}: ours on the engine's thread around a replay", "µs", OURS)


def measure_prefill(model: Any) -> None:
    ids = torch.randint(1, 32_000, (1, PREFILL), device="cuda")
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def milliseconds() -> float:
        torch.cuda.synchronize()
        begin.record()
        with torch.no_grad():
            model.model(ids, use_cache=False)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    base, added = [], []
    for round_ in range(PREFILL_ROUNDS + 2):
        before = milliseconds()
        with lens(model):
            milliseconds()
            attached = milliseconds()
        after = milliseconds()
        if round_ >= 2:
            base.append((before + after) / 2)
            added.append((attached / base[-1] - 1) * 100)
    show(f"prefill of {PREFILL} tokens: nothing", "ms", base)
    show(f"prefill of {PREFILL} tokens: lens added", "%", added, bar="<= 0.5")


def main() -> None:
    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    model = make_model()
    model.set_attn_implementation("sdpa")
    measure_prefill(model)
    measure_batches(model)


if __name__ == "__main__":
    main()
