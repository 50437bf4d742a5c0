"""Real SGLang engines of several releases, on the CPU: rows as SGLang's own capture has them, exactly.

All that is not a CUDA graph, with overlap scheduling on. The same and more on GPUs: `tests/gpu/test_sglang.py`. Whether
what is held on to is in releases that are newer than the newest one here, `test_sglang_contract` sees.
"""

import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expert_lens.engines.sglang.contract import NEWEST, OLDEST
from sglang_releases import environment
from sglang_runs import OTHER_MODELS, agrees, ended_as_asked, hooked, is_as_consumed, nothing_is_captured, run

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere SGLang needs kernels of its own on a CPU"),
    pytest.mark.timeout(600),
]

BETWEEN = "0.5.20"
"""The last release before KV slots and ranks are told in other places; 0.5.15 runs on GPUs."""
LAYERS = 4
CPU: dict[str, Any] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "moe_runner_backend": "auto",
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.1,
    "max_total_tokens": 20_000,
    "model_num_hidden_layers": LAYERS,
    "model_hidden_size": 128,
}
FEW = {**CPU, "wave": "few"}


@pytest.fixture(autouse=True)
def captures_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As everywhere, but nothing of it stays: an engine that is killed leaves its arena, and much else."""
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("EXPERT_LENS_DIR", str(folder / "captures"))
    yield folder / "captures"
    shutil.rmtree(folder, ignore_errors=True)


def check_few(found: dict[str, Any], *, layers: int = LAYERS, top_k: int = 8, overlap: bool | None = True) -> None:
    shape: dict[str, Any] = {"requests": 17, "ids": 3400 * layers * top_k, "layers": layers}
    # Of 8 experts two are often the same two.
    agrees(found, **shape, alike_layers=0.01 if top_k == 8 else 0.03, overlap=overlap)
    assert (found["control"], found["states"], found["publisher"]) == (1, ["finished"], "host")
    late = found["late"]
    assert (late["requests"], late["different"], late["missing"]) == (3, 0, 0)
    assert late["ids"] > 0


def runs_without_overlap(log: str) -> bool:
    """As its log says at the start."""
    [said] = set(re.findall(r"'disable_overlap_schedule': (True|False)", log))
    return bool(said == "True")


@pytest.mark.parametrize(("version", "model"), [(OLDEST, "OLMoE"), (BETWEEN, "Mixtral")])
def test_older_releases_and_models_whose_layers_they_do_not_number(version: str, model: str) -> None:
    found, log = run("check", {**FEW, **OTHER_MODELS[model], "spy": "numbered"}, environment(version))
    check_few(found, top_k=OTHER_MODELS[model].get("model_num_experts_per_tok", 8))
    assert f"{LAYERS} layers are numbered as their experts" in log
    assert found["cached"] > 1000


def test_the_newest_release_with_many_requests() -> None:
    found, log = run("check", {**CPU, "max_total_tokens": 60_000}, environment(NEWEST))
    agrees(found, requests=159, ids=450_000 * LAYERS, layers=LAYERS)
    assert found["cached"] > 10_000
    assert found["steps"] > 400
    assert found["mixed"] == 0
    assert not runs_without_overlap(log)


WAYS: dict[str, dict[str, Any]] = {
    "mixed chunks of 64": {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
    "no radix cache, no overlap": {"disable_radix_cache": True, "disable_overlap_schedule": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_run(way: str) -> None:
    found, log = run("check", {**FEW, **WAYS[way]}, environment(NEWEST))
    overlap = "disable_overlap_schedule" not in WAYS[way]
    check_few(found, overlap=overlap)
    assert runs_without_overlap(log) == (not overlap)
    assert (found["mixed"] > 0) == ("enable_mixed_chunk" in WAYS[way])
    assert (found["cached"] > 1000) == ("disable_radix_cache" not in WAYS[way])


RANKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tensor parallel 4": (4, 1, {"tp_size": 4}),
    "data-parallel attention": (2, 2, {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}),
    "data-parallel engines": (2, 2, {"dp_size": 2}),
    "pipeline stages": (2, 2, {"pp_size": 2}),
}
"""Processes that compute, those of them that publish, and options."""


@pytest.mark.parametrize("way", RANKS)
def test_ranks(way: str) -> None:
    """Of pipeline stages SGLang's own capture gives the layers of one."""
    ranks, publishers, options = RANKS[way]
    found, log = run("check", {**FEW, **options}, environment(NEWEST, ranks=ranks))
    stages = options.get("pp_size", 1)
    check_few(found, layers=LAYERS // stages, overlap=stages == 1)
    assert log.count("expert_lens publishes as capture") == found["arenas"] == publishers


def test_rows_are_what_the_experts_were_given() -> None:
    """With SGLang's capture off; and what another engine's capture gave for the same prompts, and the same outputs."""
    found, _ = run("alone", CPU, environment(NEWEST))
    is_as_consumed(found, ids=30_000 * LAYERS, publisher="host")


def test_retracted_requests_begin_again() -> None:
    """Every few steps SGLang takes requests out, as when its KV pool is full: of the newest releases it seldom is."""
    retracting = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    found, log = run("check", FEW, {**environment(NEWEST), **retracting})
    assert re.search(r"Testing retraction. #retracted_reqs: [1-9]", log)
    check_few(found, overlap=None)


def test_aborted_requests_end() -> None:
    found, log = run("abort", {**CPU, "max_new_tokens": 300}, environment(NEWEST))
    ended_as_asked(found)
    assert "expert_lens.tap" in hooked(log)


def test_a_server_that_only_the_environment_enables() -> None:
    """Asked by HTTP, read by name, and killed before its rows are compared."""
    found, _ = run("server", CPU, environment(NEWEST))
    agrees(found, requests=40, ids=8900 * LAYERS * 8, layers=LAYERS, overlap=None)
    assert (found["states"], found["of nobody"], found["publisher"]) == (["finished"], [], "host")


def test_a_release_that_has_moved_what_we_hold_on_to_serves_on() -> None:
    found, log = run("moved", CPU, environment(NEWEST))
    assert f"SGLang {NEWEST} has moved what it holds on to" in log
    assert "a request gives its KV slots back: no sglang.srt.mem_cache.common:release_kv_cache with req" in log
    assert (found["tokens"], found["captures"]) == (4, [])
    assert "Their log says why" in found["message"]


def test_an_engine_that_was_not_enabled() -> None:
    found, log = run("off", CPU, environment(NEWEST))
    nothing_is_captured(found, log)
