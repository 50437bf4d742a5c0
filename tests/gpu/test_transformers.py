"""transformers on CUDA: every sequence has exactly the rows that the experts received for it, published by the GPU."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from compiled_oracle import CompiledOracle
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import LogitsProcessor, LogitsProcessorList

import oracle
import tiny_models
from expert_lens.engines import transformers as engine
from expert_lens.errors import CudaError, UnsupportedModelError
from oracle import Oracle
from support import (
    Attach,
    Capture,
    check_generated,
    check_token_ids_wherever_they_lie,
    hooks_of,
    padded,
    running,
    somebody_publishes,
)
from tiny_models import EOS, FAMILIES


@pytest.fixture(params=["stream", "event"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", request.param)
    return str(request.param)


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = padded(lengths)
    return ids.cuda(), mask.cuda()


class Compiled:
    """What the compiler has made since, and how often a graph of anybody was replayed."""

    def __init__(self) -> None:
        self.replays = 0

    @property
    def graphs(self) -> int:
        return int(counters["stats"]["unique_graphs"])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    found, replay = Compiled(), torch.cuda.CUDAGraph.replay

    def counted(graph: torch.cuda.CUDAGraph) -> None:
        found.replays += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    torch.compiler.reset()
    counters.clear()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batches_with_left_padding_give_the_rows_that_the_experts_received(
    family: str, way: str, attach: Attach
) -> None:
    model = FAMILIES[family]().cuda()
    capture = attach(model)
    ids, mask = prompts([4, 9, 7, 1])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    check_generated(capture, truth, sequences.cpu(), mask.cpu(), ["0.0", "0.1", "0.2", "0.3"])
    assert capture.tap.writer.publisher == way


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here; this needs two")
def test_a_model_on_another_device_than_the_current_one(way: str, attach: Attach) -> None:
    model = FAMILIES["qwen3_moe"]().to("cuda:1")
    capture = attach(model)
    ids, mask = (tensor.to("cuda:1") for tensor in padded([4, 9, 7, 1]))
    assert torch.cuda.current_device() == 0
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    check_generated(capture, truth, sequences.cpu(), mask.cpu(), ["0.0", "0.1", "0.2", "0.3"])
    assert (capture.tap.error, capture.tap.writer.publisher) == (None, way)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_return_sequences_gives_the_rows_that_the_experts_received(family: str, attach: Attach) -> None:
    model = FAMILIES[family]().cuda()
    capture = attach(model)
    ids, mask = prompts([4, 6])
    torch.manual_seed(1)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 9.0, "num_return_sequences": 4}
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=80, **options)
    names = [f"0.{row}" for row in range(8)]
    lengths = check_generated(capture, truth, sequences.cpu(), mask.cpu().repeat_interleave(4, 0), names)
    assert min(lengths) < 80, "no sequence ended early, so the test shows less than it should"


def test_more_than_256_experts_and_weights(attach: Attach) -> None:
    model = tiny_models.many_experts().cuda()
    capture = attach(model, weights=True)
    ids, mask = prompts([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False).cpu()
    lengths = check_generated(capture, truth, sequences, mask.cpu(), ["0.0", "0.1"])
    expected = oracle.request_rows(oracle.columns(truth.weights, 2), mask.cpu(), lengths)
    for row in range(2):
        np.testing.assert_array_equal(capture.rows(f"0.{row}")["weights"], expected[row].astype(np.float16))
    assert max(ids.max() for ids in truth.ids) > 255


def test_five_million_ids(attach: Attach) -> None:
    model = tiny_models.qwen3_moe(num_hidden_layers=24, mlp_only_layers=[], num_experts=128, num_experts_per_tok=8)
    model = model.cuda().to(torch.bfloat16)
    model.generation_config.eos_token_id = -1
    capture = attach(model, arena_bytes=1 << 26)
    compared = 0
    for call in range(4):
        ids, mask = prompts([32 - row % 16 for row in range(64)])
        with Oracle(model).watching() as truth:
            sequences = model.generate(ids, attention_mask=mask, max_new_tokens=112, do_sample=False)
        names = [f"{call}.{row}" for row in range(64)]
        check_generated(capture, truth, sequences.cpu(), mask.cpu(), names, lengths=[112] * 64)
        compared += sum(capture.experts(name).size for name in names)
    print(f"{compared} ids compared")
    assert compared > 5_000_000


def large_model() -> Any:
    """Of 24 layers and 128 experts."""
    shape = {"num_hidden_layers": 24, "mlp_only_layers": [], "num_experts": 128, "num_experts_per_tok": 8}
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm", **shape).cuda().to(torch.bfloat16)
    model.generation_config.eos_token_id = -1
    return model


def compare_prompts(capture: Capture, call: int, ids: torch.Tensor, grid: Any) -> int:
    """Each prompt of a batch has the rows that the experts received, [B, n, L, K]; gives how many ids these are."""
    assert capture.tap.error is None
    for row, tokens in enumerate(ids.tolist()):
        assert capture.rows(f"{call}.{row}")["token_ids"].tolist() == tokens
        np.testing.assert_array_equal(capture.experts(f"{call}.{row}"), grid[row])
    return int(grid.size)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_five_million_ids_of_a_static_cache_which_compiles_by_itself(attach: Attach, made: Compiled) -> None:
    model = large_model()
    capture, compared = attach(model, arena_bytes=1 << 26), 0
    options: dict[str, Any] = {"max_new_tokens": 112, "do_sample": False, "cache_implementation": "static"}
    with CompiledOracle(model).watching() as truth:
        for call in range(4):
            ids, mask = padded([32 - row % 16 for row in range(64)], seed=call)
            sequences = model.generate(ids.cuda(), attention_mask=mask.cuda(), **options)
            names = [f"{call}.{row}" for row in range(64)]
            grid = oracle.columns(truth.forwards([64 * 32] + [64] * 111), 64)
            check_generated(capture, grid, sequences.cpu(), mask, names, lengths=[112] * 64)
            compared += sum(capture.experts(name).size for name in names)
    print(f"{compared} ids compared, {made.graphs} graphs, {made.replays} replays")
    assert compared > 5_000_000
    assert made.replays > 4 * 100


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_five_million_ids_of_compiled_prompts(mode: str, attach: Attach, made: Compiled) -> None:
    model = large_model()
    capture, compared = attach(model, arena_bytes=1 << 26), 0
    compiled = torch.compile(model, mode=mode)
    with CompiledOracle(model).watching() as truth, torch.no_grad():
        for call in range(7):
            ids, _ = padded([128] * 32, seed=call)
            compiled(ids.cuda(), use_cache=False)
            compared += compare_prompts(capture, call, ids, oracle.columns(truth.forwards([32 * 128]), 32))
    print(f"{compared} ids compared, {made.graphs} graphs, {made.replays} replays")
    assert compared > 5_000_000
    assert (made.replays > 0) == (mode == "reduce-overhead")


def test_plain_forwards_and_a_loop_over_a_cache(attach: Attach) -> None:
    model = tiny_models.qwen3_moe().cuda()
    capture = attach(model)
    ids, mask = prompts([5, 8])
    with Oracle(model).watching() as truth, torch.no_grad():
        first = model(ids, attention_mask=mask, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        model(token, attention_mask=mask, past_key_values=first.past_key_values)
    grid = oracle.columns(truth.ids, 2)
    for row, real in enumerate(mask.cpu().numpy() != 0):
        np.testing.assert_array_equal(capture.experts(f"0.{row}"), grid[row][real])
        np.testing.assert_array_equal(
            capture.rows(f"0.{row}")["token_ids"], torch.cat([ids, token], 1).cpu().numpy()[row][real]
        )


def test_token_ids_are_those_of_the_forward_wherever_they_lie(attach: Attach) -> None:
    check_token_ids_wherever_they_lie(attach, tiny_models.qwen3_moe().cuda())


def test_assisted_generation_keeps_accepted_tokens_only(attach: Attach) -> None:
    model = tiny_models.qwen3_moe().cuda()
    model.generation_config.eos_token_id = None
    capture = attach(model)
    for call in range(8):
        ids = torch.tensor([[5 + call, 6, 7, 8] * 2 + [5 + call, 6]], device="cuda")
        sequences = model.generate(ids, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=3).cpu()
        assert capture.tap.error is None
        assert sequences.shape == (1, 30)
        assert capture.rows(f"{call}.0")["token_ids"].tolist() == sequences[0, :-1].tolist()


def test_attaching_changes_no_output_and_closing_leaves_nothing(attach: Attach) -> None:
    model = tiny_models.qwen3_moe().cuda()
    ids, mask = prompts([4, 9])
    before, hooks = model(ids, attention_mask=mask).logits, hooks_of(model)
    capture = attach(model)
    attached = model(ids, attention_mask=mask).logits
    capture.close()
    assert torch.equal(before, attached)
    assert hooks_of(model) == hooks


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_static_cache_which_compiles_by_itself(attach: Attach, made: Compiled) -> None:
    # So fine that neither batching nor compiling turns a choice.
    model = tiny_models.qwen3_moe(experts_implementation="eager").cuda().double()
    capture = attach(model, weights=True)
    ids, mask = prompts([4, 9, 7, 1, 5, 8, 2, 6])
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "cache_implementation": "static"}
    sequences = model.generate(ids, attention_mask=mask, **options).cpu()
    assert capture.tap.error is None
    assert min(made.graphs, made.replays) > 0
    lengths = oracle.output_lengths(sequences, 9, [EOS])
    for row, tokens in enumerate(oracle.request_tokens(sequences, mask.cpu(), lengths)):
        rows = capture.rows(f"0.{row}")
        assert rows["token_ids"].tolist() == tokens
        experts, weights = oracle.replayed_with_weights(model, tokens)
        np.testing.assert_array_equal(rows["experts"], experts)
        np.testing.assert_allclose(rows["weights"], weights, rtol=2**-10, atol=1e-6)  # see `test_a_compiled_model`


class Doubles(LogitsProcessor):  # type: ignore[misc]
    """In a CUDA graph of the compiler, which may take over the memory of those before it."""

    def __init__(self) -> None:
        self.double = torch.compile(lambda scores: scores + scores, mode="reduce-overhead")

    def __call__(self, input_ids: Any, scores: Any) -> Any:  # noqa: ARG002
        return self.double(scores).clone()


def check_static_cache(attach: Attach, processors: Callable[[Capture], Any]) -> None:
    """Three prompts decoded in compiled steps, with these in each: every row is what the experts received."""
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm").cuda()
    model.generation_config.eos_token_id = -1
    capture = attach(model)
    ids, mask = prompts([4, 9, 7])
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "cache_implementation": "static"}
    with CompiledOracle(model).watching() as truth:
        options["logits_processor"] = processors(capture)
        sequences = model.generate(ids, attention_mask=mask, **options).cpu()
        grid = oracle.columns(truth.forwards([3 * 9] + [3] * 19), 3)
    check_generated(capture, grid, sequences, mask.cpu(), ["0.0", "0.1", "0.2"], lengths=[20] * 3)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_what_runs_in_graphs_of_the_compiler_behind_a_step_takes_nothing_of_it(attach: Attach, made: Compiled) -> None:
    check_static_cache(attach, lambda _: LogitsProcessorList([Doubles()]))
    assert made.replays > 2 * 10


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_steps_that_wait_have_what_their_graphs_gave(attach: Attach, made: Compiled) -> None:
    """Though the graph goes on to write into the same memory."""
    with ExitStack() as publishing:

        def somebody_else_publishes(capture: Capture) -> Any:
            def meanwhile(input_ids: torch.Tensor) -> None:
                if input_ids.shape[1] == 9 + 10:
                    publishing.enter_context(somebody_publishes(capture.tap._tap))
                elif input_ids.shape[1] == 9 + 16:
                    publishing.close()

            return running(meanwhile)

        check_static_cache(attach, somebody_else_publishes)
    assert made.replays > 10


def test_a_forward_that_is_captured_switches_the_capture_off_and_says_why(attach: Attach) -> None:
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm").cuda()
    capture = attach(model)
    ids = torch.arange(3, 9, device="cuda")[None]
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            model(ids, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.warns(RuntimeWarning, match="captured in a CUDA graph of your own"), torch.cuda.graph(graph):
            model(ids, use_cache=False)
    graph.replay()
    torch.cuda.synchronize()
    assert isinstance(capture.tap.error, UnsupportedModelError)
    assert len(capture.experts("0.0")) == 6
    assert list(capture.requests()) == ["0.0"]


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model(mode: str, attach: Attach, made: Compiled) -> None:
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm").cuda().double()
    capture = attach(model, weights=True)
    compiled = torch.compile(model, mode=mode)
    with torch.no_grad():
        for call in range(6):
            ids, mask = prompts([7, 7])
            ids = (ids + call) % 60 + 3
            compiled(ids, attention_mask=mask, use_cache=False)
            assert capture.tap.error is None
            for row in range(2):
                tokens = ids[row].tolist()
                rows = capture.rows(f"{call}.{row}")
                assert rows["token_ids"].tolist() == tokens
            capture.tap._tap.active = False  # the oracle's own forwards are not asked for
            alone = [oracle.replayed_with_weights(model, ids[row].tolist()) for row in range(2)]
            capture.tap._tap.active = True
            for row, (experts, weights) in enumerate(alone):
                np.testing.assert_array_equal(capture.experts(f"{call}.{row}"), experts)
                # Whose last bits the compiler may turn, before they are narrowed to 16.
                np.testing.assert_allclose(capture.rows(f"{call}.{row}")["weights"], weights, rtol=2**-10, atol=1e-6)
    assert made.graphs > 0
    assert (made.replays > 0) == (mode == "reduce-overhead")


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_layers_compiled_one_by_one(mode: str, attach: Attach, made: Compiled) -> None:
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm").cuda()
    capture = attach(model)
    for layer in model.model.layers:
        layer.compile(mode=mode)
    with CompiledOracle(model).watching() as truth, torch.no_grad():
        for call in range(6):
            ids, _ = padded([7, 7], seed=call)
            torch.compiler.cudagraph_mark_step_begin()  # or a layer's graph overwrites what the one before it gave
            model(ids.cuda(), use_cache=False)
            compare_prompts(capture, call, ids, oracle.columns(truth.forwards([2 * 7]), 2))
    assert made.graphs > 0
    assert (made.replays > 0) == (mode == "reduce-overhead")


def test_a_driver_that_refuses_switches_the_capture_off_and_the_model_goes_on(unpinnable: str) -> None:
    model = tiny_models.qwen3_moe()
    hooks = hooks_of(model)
    tap = engine.attach(model, "refused", directory=unpinnable)
    model.cuda()
    ids, mask = prompts([4, 9])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with pytest.warns(RuntimeWarning, match="it must lie on a tmpfs"):
        attached = model.generate(ids, **options)
    assert isinstance(tap.error, CudaError)
    tap.close()
    assert torch.equal(attached, model.generate(ids, **options))
    with pytest.raises(CudaError, match="it must lie on a tmpfs"):
        engine.attach(model, "refused", directory=unpinnable)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(
    ("lengths", "weights", "most"),
    [([9, 9], False, 3), ([9, 4], False, 3 + 2), ([9, 9], True, 3 + 2)],
    ids=["whole", "padded", "with weights"],
)
def test_how_many_kernels_a_forward_takes(lengths: list[int], weights: bool, most: int, attach: Attach) -> None:
    """Besides its own: what joins the layers' ids, narrows them, and narrows the token ids. Where padding is taken out,
    one more for ids and token ids each; and what joins weights, and narrows them.
    """
    model = tiny_models.qwen3_moe(experts_implementation="batched_mm").cuda()
    ids, mask = prompts(lengths)

    def forward() -> None:
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)

    def kernels() -> int:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            forward()
            torch.cuda.synchronize()
        on_device = [event.name for event in seen.events() if event.device_type == DeviceType.CUDA]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)

    forward()
    alone = kernels()
    capture = attach(model, weights=weights)
    forward()  # the first one's ids are looked at
    assert 0 < kernels() - alone <= most
    assert capture.tap.error is None
