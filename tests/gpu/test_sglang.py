"""Real SGLang engines, in the ways in which it runs a model on one GPU: rows as its own capture has them, exactly."""

import importlib.util
from typing import Any

import pytest
import torch

from sglang_runs import (
    OTHER_MODELS,
    agrees,
    ended_as_asked,
    hooked,
    is_as_consumed,
    nothing_is_captured,
    prompts_ran_in_graphs,
    run,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed here"),
    pytest.mark.timeout(600),
]


WAYS: dict[str, dict[str, Any]] = {
    "radix cache": {"repeats": 2},
    "no radix cache": {"disable_radix_cache": True, "repeats": 2},
    "chunks of 128": {"chunked_prefill_size": 128, "repeats": 2},
    "mixed chunks of 128": {"chunked_prefill_size": 128, "enable_mixed_chunk": True},
    "no overlap": {"disable_overlap_schedule": True},
    "no graphs": {"disable_cuda_graph": True},
    "breakable graphs of prefill": {"disable_prefill_cuda_graph": None, "cuda_graph_backend_prefill": "breakable"},
    "compiled prefill": {"disable_prefill_cuda_graph": None, "cuda_graph_backend_prefill": "tc_piecewise"},
    "288 experts": {"model_num_experts": 288, "model_num_hidden_layers": 12},
    # Whose layers we number, and what SGLang's own capture has follows from that.
    "OLMoE": {**OTHER_MODELS["OLMoE"], "spy": "numbered"},
    "256 experts, breakable graphs of prefill": {
        "model_num_experts": 256,
        "disable_prefill_cuda_graph": None,
        "cuda_graph_backend_prefill": "breakable",
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_sglangs_own_capture(way: str) -> None:
    options = WAYS[way]
    found, log = run("check", dict(options))
    layers, repeats = options.get("model_num_hidden_layers", 48), options.get("repeats", 1)
    overlap = "disable_overlap_schedule" not in options
    agrees(found, requests=159 * repeats, ids=450_000 * repeats * layers, layers=layers, overlap=overlap)
    assert (found["mixed"] > 0) == ("enable_mixed_chunk" in options)
    assert (found["extra"] > 0) == overlap
    assert found["padded"] > 0
    assert (found["control"], found["states"]) == (1, ["finished"])
    assert prompts_ran_in_graphs(log) == ("cuda_graph_backend_prefill" in options)
    assert ("48 layers are numbered as their experts" in log) == ("spy" in options)
    assert found["publisher"] == ("stream" if "disable_cuda_graph" in options else "graph")
    assert (found["cached"] > 10_000) == ("disable_radix_cache" not in options)
    late = found["late"]
    assert late["ids"] > 0
    assert (late["requests"], late["different"], late["missing"]) == (3, 0, 0)


NEXTN = {
    "speculative_algorithm": "NEXTN",  # a MoE layer that drafts, whose experts are nobody's
    "speculative_num_steps": 3,
    "model_num_hidden_layers": 12,
    "cuda_graph_max_bs_decode": 16,
    "max_running_requests": 16,
    "model_vocab_size": 64,  # so few that drafts by random weights are accepted now and then
}
TREE = {"speculative_num_draft_tokens": 8, "spy": "followed"}
DRAFTED: dict[str, dict[str, Any]] = {
    "by a layer, in a row": {**NEXTN, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4},
    "by a layer, in a tree": {**NEXTN, **TREE, "speculative_eagle_topk": 4},
    "by n-grams": {**TREE, "speculative_algorithm": "NGRAM", "max_running_requests": 16, "wave": "repeating"},
}


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("drafted", DRAFTED)
def test_rejected_tokens_leave_no_rows(drafted: str, graphs: bool) -> None:
    """Of what is drafted, some is accepted and some is not."""
    found, _ = run("check", {**DRAFTED[drafted], **({} if graphs else {"disable_cuda_graph": True})})
    by_ngrams = "wave" in DRAFTED[drafted]
    shape = {"requests": 13, "layers": 48} if by_ngrams else {"requests": 159, "layers": 12}
    agrees(found, **shape, ids=1_400_000, alike=1, overlap=None)  # of few tokens one often follows itself
    assert min(found["accepted"], found["rejected"]) > 0
    # Of each request, what its last two steps have accepted beyond its end; and nothing of what was rejected.
    width = DRAFTED[drafted].get("speculative_num_draft_tokens", 8)
    assert (found["uncounted"], found["overcounted"]) == (0, found["extra"])
    assert found["extra"] <= 2 * width * shape["requests"] < found["rejected"]
    assert found["late"]["different"] == found["late"]["missing"] == 0


@pytest.mark.parametrize("publisher", ["stream", "event"])
def test_other_ways_to_publish(publisher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_LENS_PUBLISHER", publisher)
    found, _ = run("check")
    agrees(found, requests=159, ids=20_000_000)
    assert found["publisher"] == publisher


def test_retracted_requests_begin_again() -> None:
    found, log = run("check", {"max_total_tokens": 3000, "schedule_conservativeness": 0.05, "wave": "many_at_once"})
    assert "Retract requests" in log
    agrees(found, requests=24, ids=2_500_000, overlap=None)


def test_what_was_computed_before_attaching_is_missing() -> None:
    """The beginning of a request that stands in the radix cache, and in the ring no longer."""
    found, _ = run("late", {"model_num_hidden_layers": 12})
    assert found["cached"] > 250
    assert found["positions missing"] == list(range(found["cached"]))
    assert (found["missing"], found["different"], found["wrong_length"]) == (found["cached"], 0, 0)


TWO_GPUS, FOUR_GPUS = (
    pytest.mark.skipif(torch.cuda.device_count() < gpus, reason=f"needs {gpus} GPUs") for gpus in (2, 4)
)


@pytest.mark.parametrize(("stages", "graphs"), [(1, False), (1, True), pytest.param(2, False, marks=TWO_GPUS)])
def test_rows_are_what_the_moe_kernel_consumed(stages: int, graphs: bool) -> None:
    """With SGLang's capture off; and what another engine's capture gave for the same prompts."""
    found, _ = run("alone", {"pp_size": stages, "disable_cuda_graph": not graphs})
    is_as_consumed(found, ids=1_000_000, publisher="graph" if graphs else "stream")


def test_an_engine_with_the_lens_alone_gives_what_one_without_it_gives() -> None:
    """Outputs; and rows, of decode graphs and from the radix cache, as SGLang's capture gave them in another engine."""
    found, _ = run("with_the_lens_alone")
    assert found["ids"] > 1_000_000
    assert (found["different"], found["outputs_differ"], found["dropped_tokens"]) == (0, 0, 0)
    assert (found["publisher"], found["failure"]) == ("graph", None)


@pytest.mark.parametrize(("spy", "different"), [("altered", 1), ("altered_in_graphs", 4 * 4)])
def test_altered_ids_are_found(spy: str, different: int) -> None:
    """One of a prompt; and one of each step that a graph computes, four for each of four requests."""
    found, _ = run("control", {"disable_radix_cache": True, "spy": spy})
    assert (found["different"], found["missing"]) == (different, 0)


def test_aborted_requests_end() -> None:
    found, log = run("abort", {"model_num_hidden_layers": 8})
    ended_as_asked(found)
    assert "expert_lens.tap" in hooked(log)


def test_a_server_that_only_the_environment_enables() -> None:
    found, _ = run("server", {"model_num_hidden_layers": 12})
    agrees(found, requests=40, ids=800_000, layers=12, overlap=None)
    assert (found["states"], found["of nobody"]) == (["finished"], [])


RANKS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp_size": 2},
    "tensor parallel of four": {"tp_size": 4},
    "data-parallel attention of four": {"tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True},
    "tensor and expert parallel": {"tp_size": 2, "ep_size": 2},
    "data-parallel attention": {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
    "data-parallel attention, no graphs": {
        "tp_size": 2,
        "dp_size": 2,
        "enable_dp_attention": True,
        "disable_cuda_graph": True,
        "chunked_prefill_size": 256,
    },
    "data-parallel attention, breakable graphs of prefill": {
        "tp_size": 2,
        "dp_size": 2,
        "enable_dp_attention": True,
        "disable_prefill_cuda_graph": None,
        "cuda_graph_backend_prefill": "breakable",
        "cuda_graph_bs_prefill": [256],  # of several sizes the ranks may each take another one, and never meet
        "chunked_prefill_size": 512,  # of both ranks
        "spy": "in_graphs_of:256",
    },
    "data-parallel engines": {"dp_size": 2},
    "pipeline stages": {"pp_size": 2},
}


@pytest.mark.parametrize("way", [pytest.param(way, marks=FOUR_GPUS if "four" in way else TWO_GPUS) for way in RANKS])
def test_rows_of_several_gpus_are_those_of_sglangs_own_capture(way: str) -> None:
    found, log = run("check", dict(RANKS[way]))
    stages = RANKS[way].get("pp_size", 1)
    assert found["publisher"] == ("stream" if "disable_cuda_graph" in RANKS[way] else "graph")
    agrees(found, requests=159, ids=20_000_000 // stages, layers=48 // stages, overlap=stages == 1)
    assert found["control"] == 1
    assert prompts_ran_in_graphs(log) == ("cuda_graph_backend_prefill" in RANKS[way])
    assert "count as dropped" not in log
    assert log.count("expert_lens publishes as capture") == found["arenas"] == RANKS[way].get("dp_size", 1) * stages


def test_an_engine_that_was_not_enabled() -> None:
    found, log = run("off", {"model_num_hidden_layers": 4})
    nothing_is_captured(found, log)
