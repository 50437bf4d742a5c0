"""`generate_batch` on CUDA: eager and in CUDA graphs, one batch at a time and two in turn."""

import gc
import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from graph_oracle import GraphOracle
from transformers.generation.continuous_batching import input_outputs

from batches import check_batches, generate_batch, small_batches
from expert_lens import graphs
from expert_lens.engines import transformers as engine
from expert_lens.errors import CudaError
from oracle import replayed
from support import Attach
from tiny_models import FAMILIES

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19], [20, 21]]
GRAPHS = {"use_cuda_graph": True, "q_padding_interval_size": 8, "kv_padding_interval_size": 32}
MODES: dict[str, dict[str, Any]] = {
    "eager": {"use_cuda_graph": False, "use_async_batching": False},
    "graphs": {**GRAPHS, "use_async_batching": False},
    "eager, asynchronous": {"use_cuda_graph": False, "use_async_batching": True},
    "graphs, asynchronous": {**GRAPHS, "use_async_batching": True},
}


@pytest.fixture(params=["graph", "stream", "event"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def filled_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers 5.17 fills for asynchronous batches at the start, it has other streams than those write into;
    without this, now and then a run with nothing attached gives other tokens from the first one on.
    """
    inputs = input_outputs.ContinuousBatchingAsyncIOs

    def waiting(fill: Callable[..., None]) -> Callable[..., None]:
        def filled(*args: Any, **kwargs: Any) -> None:
            fill(*args, **kwargs)
            torch.cuda.synchronize()

        return filled

    for name in ("__init__", "reset"):
        monkeypatch.setattr(inputs, name, waiting(getattr(inputs, name)))


def make_model(family: str = "qwen3_moe", **changes: Any) -> Any:
    """Its experts run without a look at the ids by the CPU, as a capture asks."""
    model = FAMILIES[family](experts_implementation="batched_mm", **changes).cuda()
    model.generation_config.eos_token_id = -1
    return model


Tokens = list[list[int]]


def tokens_of(results: dict[str, Any]) -> Tokens:
    return [one.generated_tokens for one in results.values()]


def usual_tokens(run: Callable[[], dict[str, Any]]) -> Tokens:
    """What two of three runs give each request.

    Asynchronous batching of transformers 5.17 gives other tokens in 2 runs of 100 on a busy GPU, from the first one on,
    with nothing attached.
    """
    first, second = tokens_of(run()), tokens_of(run())
    if first != second:
        third = tokens_of(run())
        assert third in (first, second)
        return third
    return first


def check_outputs(mode: str, run: Callable[[], dict[str, Any]], usual: Tokens) -> None:
    """That a run, with asynchronous batching two of three, gives each request the tokens that it usually has."""
    assert (usual_tokens(run) if "asynchronous" in mode else tokens_of(run())) == usual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_every_request_has_the_rows_that_the_experts_received(mode: str, family: str, way: str, attach: Attach) -> None:
    model = make_model(family)
    capture = attach(model)
    with GraphOracle(model).watching() as truth:
        config = small_batches(max_batch_tokens=32, **MODES[mode])
        results = generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    assert len(results) == 5
    check_batches(capture, truth.rows(), results)
    assert {entry["missing"] for entry in capture.requests().values()} == {0}
    tokens = sum(len(prompt) + 19 for prompt in PROMPTS)
    assert tokens <= capture.stats()["tokens"] <= tokens + len(PROMPTS) * ("asynchronous" in mode)
    if "graphs" in mode:
        assert truth.num_replays > 10
        assert capture.stats()["publisher"] == capture.tap.writer.publisher == way


@pytest.mark.parametrize("asynchronous", [False, True])
def test_prompts_in_chunks_and_batches_that_grow_and_shrink(asynchronous: bool, attach: Attach) -> None:
    model = make_model()
    capture = attach(model, weights=True)
    prompts = [list(range(3, 33)), [40, 41, 42], list(range(20, 45)), *([7 + i, 8, 9] for i in range(9))]
    config = small_batches(max_batch_tokens=16, **GRAPHS, use_async_batching=asynchronous, num_blocks=256)
    with (
        GraphOracle(model).watching() as truth,
        model.continuous_batching_context_manager(continuous_batching_config=config) as manager,
    ):
        requests = [manager.add_request(prompt, max_new_tokens=3 + 2 * index) for index, prompt in enumerate(prompts)]
        results = {}
        while len(results) < len(requests):
            result = manager.get_result(timeout=60)
            assert result is not None
            if result.is_finished():
                results[result.request_id] = result
    check_batches(capture, truth.rows(), results)
    expected_weights = truth.weights()  # of the engine's own warm-up, too
    for request in results:
        weights, expected = capture.rows(request)["weights"], expected_weights[request]
        assert set(range(len(weights))) <= set(expected)
        for position, row in enumerate(weights):
            np.testing.assert_array_equal(row, expected[position])
    assert truth.num_replays > 10


def test_asynchronous_graphs_give_what_each_sequence_gives_alone(attach: Attach) -> None:
    # So fine that neither batching nor padding turns a choice.
    model = make_model().double()
    capture = attach(model)
    config = small_batches(max_batch_tokens=32, **MODES["graphs, asynchronous"])
    results = generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    assert capture.tap.error is None
    assert capture.tap.writer.publisher == "graph"
    for name, result in results.items():
        tokens = (result.prompt_ids + result.generated_tokens)[:-1]
        assert capture.rows(name)["token_ids"].tolist() == tokens
        alone = replayed(model, tokens)
        np.testing.assert_array_equal(np.sort(capture.experts(name), -1), np.sort(alone, -1))


@pytest.mark.parametrize("mode", ["graphs", "graphs, asynchronous"])
def test_graphs_that_were_captured_before_attaching_are_captured_anew(mode: str, attach: Attach) -> None:
    model = make_model()
    config = small_batches(max_batch_tokens=32, **MODES[mode])

    def run() -> dict[str, Any]:
        options = {"continuous_batching_config": config, "persistent_manager": True, "max_new_tokens": 12}
        return dict(generate_batch(model, PROMPTS, **options))

    before = usual_tokens(run)
    for _ in range(2):  # the second capture finds the graphs of the first
        capture = attach(model)
        with GraphOracle(model).watching() as truth:
            results = run()
        check_batches(capture, truth.rows(), results)
        check_outputs(mode, run, before)
        assert truth.num_replays > 5
        assert capture.tap.writer.publisher == "graph"
        capture.tap.close()
        check_outputs(mode, run, before)
    model.destroy_cached_continuous_batching_manager()


def test_a_driver_that_refuses_while_graphs_are_captured_switches_the_capture_off(unpinnable: str) -> None:
    model = FAMILIES["qwen3_moe"](experts_implementation="batched_mm")
    model.generation_config.eos_token_id = -1
    tap = engine.attach(model, "refused", directory=unpinnable)
    model.cuda()  # where attaching would have been refused
    options = {"continuous_batching_config": small_batches(max_batch_tokens=32, **MODES["graphs"])}
    with pytest.warns(RuntimeWarning, match="it must lie on a tmpfs"):
        results = generate_batch(model, PROMPTS, max_new_tokens=12, **options)
    assert isinstance(tap.error, CudaError)
    assert tap.writer.steps == 0
    tap.close()
    assert tokens_of(results) == tokens_of(generate_batch(model, PROMPTS, max_new_tokens=12, **options))


def test_a_cancelled_request_is_aborted_and_others_go_on(attach: Attach) -> None:
    model = make_model()
    capture = attach(model)
    config = small_batches(max_batch_tokens=32, num_blocks=512, **MODES["graphs, asynchronous"])
    with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
        request = manager.add_request([5, 6, 7], max_new_tokens=1000, request_id="long", streaming=True)
        next(iter(manager.request_id_iter(request)))
        manager.cancel_request(request)
        other = manager.add_request([8, 9], max_new_tokens=3, request_id="short")
        next(iter(manager.request_id_iter(other)))
        assert capture.requests()["long"]["state"] == "aborted"
        assert capture.requests()["short"]["state"] == "finished"
    assert capture.tap.error is None


@pytest.mark.parametrize("mode", ["graphs", "graphs, asynchronous"])
def test_a_capture_may_be_closed_while_the_engine_runs(mode: str, attach: Attach) -> None:
    model = make_model()
    config = small_batches(max_batch_tokens=32, num_blocks=512, **MODES[mode])
    options = {"continuous_batching_config": config, "max_new_tokens": 150}
    alone = usual_tokens(lambda: dict(generate_batch(model, PROMPTS, **options)))

    def run(turn: int) -> dict[str, Any]:
        capture = attach(model)
        closing = threading.Timer(0.1 + 0.15 * turn, capture.tap.close)
        closing.start()
        results = generate_batch(model, PROMPTS, **options)
        closing.join()
        assert capture.tap.error is None
        return dict(results)

    for turn in range(4):
        check_outputs(mode, partial(run, turn), alone)
        gc.collect()
        torch.cuda.synchronize()


def test_a_replay_that_fails_inside_the_engine(attach: Attach, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    capture = attach(model)
    config = small_batches(max_batch_tokens=32, **MODES["graphs, asynchronous"])
    replay, calls = torch.cuda.CUDAGraph.replay, itertools.count(1)

    def failing(graph: Any) -> None:
        if next(calls) == 9:
            raise RuntimeError("in the engine")
        replay(graph)

    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda.CUDAGraph, "replay", failing)
        generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    assert next(calls) > 9
    assert capture.tap.error is None
    with capture.tap.request("again"), GraphOracle(model).watching() as truth:
        results = generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    expected = {f"again.{name}": rows for name, rows in truth.rows().items()}
    check_batches(capture, expected, {f"again.{name}": result for name, result in results.items()})
    assert capture.tap.writer.dropped_tokens > 0


def test_a_capture_that_fails_inside_the_engine_leaves_nothing(attach: Attach) -> None:
    model = make_model()
    capture = attach(model)
    config = small_batches(max_batch_tokens=32, **MODES["graphs, asynchronous"])
    before, calls = set(graphs._unclaimed), itertools.count(1)

    def fail(*_: Any) -> None:
        if torch.cuda.is_current_stream_capturing() and next(calls) == 1:
            raise RuntimeError("out of memory")

    hook = model.lm_head.register_forward_pre_hook(fail)
    generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    hook.remove()
    assert next(calls) > 1
    gc.collect()  # the manager
    with capture.tap.request("again"), GraphOracle(model).watching() as truth:
        results = generate_batch(model, PROMPTS, max_new_tokens=20, continuous_batching_config=config)
    expected = {f"again.{name}": rows for name, rows in truth.rows().items()}
    check_batches(capture, expected, {f"again.{name}": result for name, result in results.items()})
    assert graphs._unclaimed == before


@pytest.mark.timeout(600)
def test_five_million_ids(attach: Attach) -> None:
    changes = {"num_hidden_layers": 24, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8}
    model = make_model(max_position_embeddings=1024, **changes).to(torch.bfloat16)
    capture = attach(model, arena_bytes=1 << 28)
    config = small_batches(page=16, num_blocks=2048, max_batch_tokens=256, use_cuda_graph=True, use_async_batching=True)
    prompts = [[3 + (i * 7 + j) % 60 for j in range(8 + i % 24)] for i in range(64)]
    with GraphOracle(model).watching() as truth:
        results = generate_batch(model, prompts, max_new_tokens=420, continuous_batching_config=config)
    compared = check_batches(capture, truth.rows(), results)
    print(f"{compared} ids compared, {truth.num_replays} replays")
    assert compared > 5_000_000
    assert truth.num_replays > 400
    assert capture.tap.writer.publisher == "graph"
