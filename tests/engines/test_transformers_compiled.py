"""Models that torch compiles, whole, by layers or by `generate`: exact, and cut no more than need be."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import oracle
import tiny_models
from oracle import Oracle
from support import Attach, Capture, compiling, in_threads, padded, running
from tiny_models import EOS, FAMILIES


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_compiled_model_is_captured_whether_it_was_attached_before_or_after(attached: str, attach: Attach) -> None:
    model = tiny_models.mixtral()
    ids = torch.tensor([[5, 6, 7]])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        capture = attach(model) if attached == "before" else None
        if capture is None:
            compiled(ids)
            capture = attach(compiled)
        with Oracle(model).watching() as truth:
            compiled(ids)
            compiled(ids + 1)
            model.generate(ids, max_new_tokens=2, do_sample=False)
    assert capture.tap.error is None
    for call in range(2):
        np.testing.assert_array_equal(capture.experts(f"{call}.0"), truth.ids[call])
    np.testing.assert_array_equal(capture.experts("2.0"), np.concatenate(truth.ids[2:]))


@pytest.mark.parametrize("parts", ["the whole model", "each layer"])
def test_compiled_code_is_cut_where_the_decoder_ends_and_nowhere_else(parts: str, attach: Attach) -> None:
    """Layers that are compiled one by one are whole, but no two share what was compiled."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    graphs = CompileCounter()

    def compiled(model: Any) -> Any:
        torch.compiler.reset()
        graphs.clear()
        if parts == "the whole model":
            return torch.compile(model, backend=graphs)
        for layer in model.model.layers:
            layer.compile(backend=graphs, fullgraph=True)
        return model

    def forward(model: Any) -> None:
        with torch.no_grad():
            for call in range(3):
                model(ids + call, use_cache=False)

    changes = {"num_hidden_layers": 4, "experts_implementation": "batched_mm", "mlp_only_layers": []}
    forward(compiled(tiny_models.qwen3_moe(**changes)))
    assert graphs.frame_count == 1
    model = tiny_models.qwen3_moe(**changes)
    capture = attach(model, weights=True)
    forward(compiled(model))
    assert graphs.frame_count == (2 if parts == "the whole model" else 4)
    twin = tiny_models.qwen3_moe(**changes)
    for call in range(3):
        for row in range(2):
            experts, weights = oracle.replayed_with_weights(twin, (ids[row] + call).tolist())
            np.testing.assert_array_equal(capture.experts(f"{call}.{row}"), experts)
            np.testing.assert_allclose(capture.rows(f"{call}.{row}")["weights"], weights, rtol=2**-10, atol=1e-6)


def test_two_threads_in_the_same_compiled_code_have_their_own_rows(attach: Attach) -> None:
    changes = {"mlp_only_layers": [], "experts_implementation": "batched_mm"}
    model = tiny_models.qwen3_moe(**changes)
    meet = threading.Barrier(2)

    @torch.compiler.disable
    def wait(*_: Any) -> None:
        meet.wait(20)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(wait)
    capture = attach(model)
    compiled = torch.compile(model, backend="eager")

    def run(first: int) -> None:
        with torch.no_grad(), capture.tap.request(f"from {first}"):
            for call in range(4):
                compiled(torch.tensor([[first + call, first + 5, first]]), use_cache=False)

    in_threads(run, (5, 25))
    assert capture.tap.error is None
    twin = tiny_models.qwen3_moe(**changes)
    names = list(capture.requests())
    assert len(names) == 8
    for name in names:
        rows = capture.rows(name)
        np.testing.assert_array_equal(rows["experts"], oracle.replayed(twin, rows["token_ids"].tolist()))


def failing_behind_the_layers(model: Any) -> threading.Event:
    """While it is set, the model's forwards raise where all of its layers have run, compiled or not."""
    failing = threading.Event()

    @torch.compiler.disable
    def fail(*_: Any) -> None:
        if failing.is_set():
            raise RuntimeError("stop here")

    model.model.norm.register_forward_hook(fail)
    return failing


def test_compiled_layers_of_a_failed_forward_or_of_none_give_no_rows(attach: Attach) -> None:
    model = tiny_models.mixtral(experts_implementation="batched_mm")
    capture = attach(model)
    failing = failing_behind_the_layers(model)
    failing.set()
    compiled = torch.compile(model, backend="eager")
    block = torch.compile(model.model.layers[0].mlp, backend="eager")
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="stop here"):
            compiled(torch.tensor([[5, 6, 7]]), use_cache=False)
        block(torch.randn(1, 4, 32))
        failing.clear()
        compiled(torch.tensor([[8, 9]]), use_cache=False)
        block(torch.randn(1, 4, 32))
        compiled(torch.tensor([[10, 11, 12]]), use_cache=False)
    assert capture.tap.error is None
    assert [capture.rows(name)["token_ids"].tolist() for name in ("0.0", "1.0")] == [[8, 9], [10, 11, 12]]
    assert capture.stats()["tokens"] == 5
    twin = tiny_models.mixtral(experts_implementation="batched_mm")
    np.testing.assert_array_equal(capture.experts("1.0"), oracle.replayed(twin, [10, 11, 12]))


@pytest.mark.filterwarnings("ignore")  # of the compiler, which looks at what it traces
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_compiled_layers_that_are_computed_again_for_the_backward_pass(
    family: str, weights: bool, attach: Attach
) -> None:
    """By a compiler that chooses what to keep for it, which must be the same both times; and they give no rows."""
    model, alone = (FAMILIES[family](experts_implementation="batched_mm").train() for _ in range(2))
    capture = attach(model, weights=weights)
    ids, _ = padded([5, 5])
    for layer in model.model.layers:
        layer.compile(backend="aot_eager_decomp_partition")
        layer._compiled_call_impl = partial(checkpoint, layer._compiled_call_impl, use_reentrant=False)
    for _ in range(2):
        for one in (model, alone):
            one(ids, labels=ids, use_cache=False).loss.backward()
    assert capture.tap.error is None
    assert capture.stats()["tokens"] == 20
    for parameter, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    for row in range(2):
        np.testing.assert_array_equal(capture.experts(f"1.{row}"), oracle.replayed(alone, ids[row].tolist()))


@pytest.mark.filterwarnings("ignore")  # of the compiler, which looks at what it traces
def test_a_compiled_forward_that_failed_takes_nothing_that_is_computed_again_later(attach: Attach) -> None:
    model = tiny_models.mixtral(experts_implementation="batched_mm").train()
    capture = attach(model)
    failing = failing_behind_the_layers(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend="eager")
    ids, _ = padded([5, 5])
    losses = [compiled(ids, labels=ids, use_cache=False).loss for _ in range(2)]
    failing.set()
    with pytest.raises(RuntimeError, match="stop here"):
        compiled(ids, labels=ids, use_cache=False)
    failing.clear()
    sum(losses).backward()
    compiled(ids, labels=ids, use_cache=False)
    assert capture.tap.error is None
    assert capture.stats()["tokens"] == 30


def check_replayed(capture: Capture, name: str, tokens: list[int], twin: Any) -> None:
    """The request has the rows that these tokens have in the same model alone."""
    assert capture.rows(name)["token_ids"].tolist() == tokens
    np.testing.assert_array_equal(np.sort(capture.experts(name), -1), np.sort(oracle.replayed(twin, tokens), -1))


class OutputCounter(CompileCounter):  # type: ignore[misc]
    """Compiles nothing, and counts the tensors that each graph gives."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: Any) -> Any:
        self.outputs.append(len(graph.graph.output_node().args[0]))
        return super().__call__(graph, examples)


@pytest.mark.parametrize("weights", [False, True])
def test_the_steps_of_generate_are_one_graph_as_without_a_capture(weights: bool, attach: Attach) -> None:
    """Which gives all layers' ids as one tensor, as a replay on a GPU pays for each."""
    ids, mask = padded([4, 9, 7])
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))

    def generate(model: Any, graphs: OutputCounter) -> torch.Tensor:
        torch.compiler.reset()
        sequences: torch.Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, **compiling(graphs, fullgraph=True)
        )
        return sequences

    alone, captured = OutputCounter(), OutputCounter()
    expected = generate(twin, alone)
    capture = attach(model, weights=weights)
    sequences = generate(model, captured)
    assert capture.tap.error is None
    assert torch.equal(sequences, expected)
    assert captured.frame_count == alone.frame_count == 1
    assert captured.outputs == [alone.outputs[0] + 1 + weights]
    lengths = oracle.output_lengths(sequences, 9, [EOS])
    for row, tokens in enumerate(oracle.request_tokens(sequences, mask, lengths)):
        check_replayed(capture, f"0.{row}", tokens, twin)
        assert capture.requests()[f"0.{row}"]["tokens"] == len(tokens)
        if weights:
            found, expected_weights = capture.rows(f"0.{row}")["weights"], oracle.replayed_with_weights(twin, tokens)[1]
            np.testing.assert_allclose(np.sort(found, -1), np.sort(expected_weights, -1), rtol=2**-10, atol=1e-6)


def test_layers_that_the_compiler_leaves_out_of_a_step_have_their_rows(attach: Attach) -> None:
    """Whose experts are looked up one by one, which breaks the graph inside of each."""
    model, twin = (tiny_models.qwen3_moe(experts_implementation="eager") for _ in range(2))
    model.generation_config.eos_token_id = None
    graphs = CompileCounter()
    capture = attach(model)
    [tokens] = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, **compiling(graphs)).tolist()
    assert capture.tap.error is None
    assert graphs.frame_count > 3
    check_replayed(capture, "0.0", tokens[:-1], twin)


def test_a_layer_that_runs_once_more_in_a_step_leaves_nothing_behind(attach: Attach) -> None:
    """Behind the decoder, where it is nobody's."""
    changes = {"experts_implementation": "batched_mm", "mlp_only_layers": []}
    model, twin = (tiny_models.qwen3_moe(**changes) for _ in range(2))
    model.generation_config.eos_token_id = None
    first, second, *_ = model.model.layers
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: (first.mlp(args[0]) * 0 + args[0],))
    capture, graphs = attach(model), CompileCounter()
    [tokens] = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, **compiling(graphs)).tolist()
    hook.remove()
    second.compile(backend=graphs)
    with torch.no_grad():
        model(torch.tensor([[8, 9]]), use_cache=False)
    assert capture.tap.error is None
    check_replayed(capture, "0.0", tokens[:-1], twin)
    check_replayed(capture, "1.0", [8, 9], twin)


@pytest.mark.parametrize(
    "how", ["as it is", "compiled", "in a generate of its own", "as it prepares it", "a layer", "a compiled layer"]
)
def test_what_runs_behind_a_compiled_step_takes_nothing_of_it(how: str, attach: Attach) -> None:
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))
    model.generation_config.eos_token_id = None
    graphs = CompileCounter()
    other, hidden = torch.tensor([[9, 9, 9]]), torch.randn(1, 3, 32)
    compiled = torch.compile(model, backend="eager")
    layer = model.model.layers[0].mlp
    compiled_layer = torch.compile(layer, backend="eager")
    run, theirs = {
        "as it is": (lambda ids: model(ids, use_cache=False), [3, 4, 5, 6, 7, 8]),
        "compiled": (lambda _: compiled(other, use_cache=False), [3] * 6),
        "in a generate of its own": (lambda _: model.generate(other, max_new_tokens=3, **compiling(graphs)), [5] * 6),
        "as it prepares it": (lambda _: model(**model.prepare_inputs_for_generation(other, use_cache=False)), [3] * 6),
        "a layer": (lambda _: layer(hidden), []),
        "a compiled layer": (lambda _: compiled_layer(hidden), []),
    }[how]
    capture = attach(model)
    options = {**compiling(graphs), "logits_processor": running(run)}
    [tokens] = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, **options).tolist()
    assert capture.tap.error is None
    assert graphs.frame_count > 0
    check_replayed(capture, "0.0", tokens[:-1], twin)
    table = capture.requests()
    assert table.pop("0.0") == {"state": "finished", "prompt_tokens": 3, "tokens": 8, "missing": 0}
    assert [entry["tokens"] for entry in table.values()] == theirs
    for name in table:
        check_replayed(capture, name, capture.rows(name)["token_ids"].tolist(), twin)


@pytest.mark.parametrize(("where", "rows"), [("first step", 3), ("third step", 5), ("behind the third step", 6)])
def test_a_call_that_fails_has_the_rows_of_the_steps_that_did_not(where: str, rows: int, attach: Attach) -> None:
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))
    model.generation_config.eos_token_id = None
    capture = attach(model)
    failing = threading.Event()

    def failing_graph(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if failing.is_set():
                raise RuntimeError("stop here")
            return graph(*args)

        return run

    def fail(input_ids: torch.Tensor) -> None:
        if where == "behind the third step" and input_ids.shape[1] == 6:
            raise RuntimeError("stop here")
        if where == {3: "first step", 5: "third step"}.get(input_ids.shape[1]):
            failing.set()

    options = compiling(failing_graph)
    prompt = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(prompt, max_new_tokens=6, **options, logits_processor=running(fail))
    failing.clear()
    assert capture.tap._tap.end() is None, "layers that are run alone would be held"
    with torch.no_grad():
        torch.compile(model, backend="eager")(torch.tensor([[9, 8]]), use_cache=False)
    [tokens] = model.generate(prompt, max_new_tokens=6, **options).tolist()
    assert capture.tap.error is None
    ends = {name: (entry["state"], entry["tokens"]) for name, entry in capture.requests().items()}
    assert ends == {"0.0": ("aborted", rows), "1.0": ("finished", 2), "2.0": ("finished", 8)}
    for name, of_it in (("0.0", tokens[:rows]), ("1.0", [9, 8]), ("2.0", tokens[:8])):
        check_replayed(capture, name, of_it, twin)


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_a_capture_that_ends_between_compiled_steps_leaves_the_call_alone(
    how: str, attach: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))
    for each in (model, twin):
        each.generation_config.eos_token_id = None
    ids, graphs = torch.tensor([[5, 6, 7]]), CompileCounter()
    expected = twin.generate(ids, max_new_tokens=8, **compiling(graphs))
    capture = attach(model)

    def broken(*_: Any) -> None:
        raise ValueError("ours")

    def end(input_ids: torch.Tensor) -> None:  # behind the step of the sixth position
        if input_ids.shape[1] == 6 and how == "closed":
            capture.tap.close()
        elif input_ids.shape[1] == 6:
            monkeypatch.setattr(capture.tap._tap, "publish_next", broken)

    warned = pytest.warns(RuntimeWarning, match="ours") if how == "failed" else nullcontext()
    with warned:
        sequences = model.generate(ids, max_new_tokens=8, **compiling(graphs), logits_processor=running(end))
    assert torch.equal(sequences, expected)
    check_replayed(capture, "0.0", sequences[0, :6].tolist(), twin)


def test_two_threads_that_generate_in_the_same_compiled_code_have_their_own_rows(attach: Attach) -> None:
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))
    model.generation_config.eos_token_id = None
    capture, graphs, meet = attach(model), CompileCounter(), threading.Barrier(2)
    found: dict[str, list[int]] = {}

    def run(first: int) -> None:
        processors = running(lambda _: meet.wait(60))
        with capture.tap.request(f"from {first}"):
            ids = torch.tensor([[first, first + 5, first]])
            options = {**compiling(graphs), "logits_processor": processors}
            [found[f"from {first}"]] = model.generate(ids, max_new_tokens=8, **options).tolist()

    in_threads(run, (5, 25))
    assert capture.tap.error is None
    assert set(capture.requests()) == set(found) == {"from 5", "from 25"}
    for name, tokens in found.items():
        check_replayed(capture, name, tokens[:-1], twin)


def test_compiling_into_one_graph_says_what_stands_in_the_way(attach: Attach) -> None:
    model = tiny_models.mixtral()
    attach(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expert_lens captures here"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.tensor([[5, 6, 7]]))
