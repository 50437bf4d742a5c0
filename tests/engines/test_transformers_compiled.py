"""Models that torch compiles, whole, by layers or by `generate`: exact, and cut no more than need be."""

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import oracle
import tiny_models
from oracle import Oracle
from support import Attach, padded
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

    threads = [threading.Thread(target=run, args=(first,)) for first in (5, 25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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


def test_a_static_cache_whose_steps_are_compiled(attach: Attach) -> None:
    model, twin = (tiny_models.qwen3_moe(experts_implementation="batched_mm") for _ in range(2))
    graphs = CompileCounter()
    compiling = transformers.CompileConfig(
        backend=lambda *graph: graphs(*graph), mode=None
    )  # it copies what it is given
    compiling._compile_all_devices = True
    capture = attach(model)
    ids, mask = padded([4, 9, 7])
    options = {"do_sample": False, "cache_implementation": "static", "compile_config": compiling}
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    assert capture.tap.error is None
    assert graphs.frame_count > 0
    lengths = oracle.output_lengths(sequences, 9, [EOS])
    for row, tokens in enumerate(oracle.request_tokens(sequences, mask, lengths)):
        rows = capture.rows(f"0.{row}")
        assert rows["token_ids"].tolist() == tokens
        np.testing.assert_array_equal(np.sort(rows["experts"], -1), np.sort(oracle.replayed(twin, tokens), -1))


def test_compiling_into_one_graph_says_what_stands_in_the_way(attach: Attach) -> None:
    model = tiny_models.mixtral()
    attach(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expert_lens captures here"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.tensor([[5, 6, 7]]))
