"""Jobs of `sglang_engine.py`, each in a process of its own, and what must be true of what they found."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "sglang_engine.py"
ENGINE_SECONDS = 420
"""After which an engine is killed; its log tells what it was doing."""

ALWAYS = {
    "PYTHONUNBUFFERED": "1",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",  # engines of other tests may be on one of the GPUs alone
}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "OLMoE": {
        "model_architectures": ["OlmoeForCausalLM"],
        "model_model_type": "olmoe",
        "model_hidden_size": 512,
        "model_intermediate_size": 128,  # of an expert, here
        "model_num_key_value_heads": 8,
        "model_pad_token_id": 1,
    },
    "Mixtral": {
        "model_architectures": ["MixtralForCausalLM"],
        "model_model_type": "mixtral",
        "model_hidden_size": 512,
        "model_intermediate_size": 128,
        "model_num_experts": 8,
        "model_num_local_experts": 8,
        "model_num_experts_per_tok": 2,
    },
}
"""Whose layers SGLang does not number in some releases: `numbered` of `sglang_spy` sees whether we do so rightly."""


def run(
    job: str, options: dict[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], str]:
    """What the job printed last, and its whole log; `environment`: variables beside those of this process."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = subprocess.run(
                [sys.executable, str(SCRIPT), job, json.dumps(options or {})],
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=ENGINE_SECONDS,
                cwd=SCRIPT.parent,
                env={**os.environ, **ALWAYS, **(environment or {})},
            ).returncode
        file.seek(0)
        log = file.read()
    results = [line for line in log.splitlines() if line.startswith('{"')]
    assert code == 0, log[-6000:]
    print(job, options, results[-1], *(line for line in log.splitlines() if "expert_lens" in line), sep="\n")
    return json.loads(results[-1]), log


def agrees(
    found: dict[str, Any],
    *,
    requests: int,
    ids: int,
    layers: int = 48,
    alike: float = 0.01,
    alike_layers: float = 0.01,
    overlap: bool | None = True,
) -> None:
    """Each id of every layer of so many requests was compared, at least `ids`, and is SGLang's own; none was dropped.

    `alike`, `alike_layers`: how many of the rows may be as the one before, and of a row's layers, which would agree in
    the wrong places too. `overlap`: whether a step may have run past each request's end; beside those rows nothing was
    counted but what was computed. None: it may have been computed several times.
    """
    assert (found["requests"], found["different"], found["missing"], found["wrong_length"]) == (requests, 0, 0, 0)
    assert found["layers"] == layers
    assert found["ids"] >= ids
    assert found["dropped_tokens"] == 0
    if overlap is not None:
        assert (found["uncounted"], found["overcounted"]) == (0, found["extra"])
        assert 0 <= found["extra"] <= (requests if overlap else 0)
    assert found["alike"] <= found["positions"] * alike
    assert found["alike_layers"] <= found["positions"] * layers * alike_layers


def is_as_consumed(found: dict[str, Any], *, ids: int, publisher: str) -> None:
    """What `alone` found: rows are what the experts were given, and as another engine's capture gave them."""
    assert found["ids"] > ids
    assert (found["not_as_consumed"], found["outputs_differ"], found["not_as_native"]) == (0, 0, 0)
    assert found["alike_layers"] < found["ids"] / 8 * 0.01
    assert (found["publisher"], found["dropped_tokens"]) == (publisher, 0)


def hooked(log: str) -> str:
    """What `loaded` of `sglang_spy` saw in the scheduler."""
    [said] = set(re.findall(r"of expert_lens: (.*)", log))
    return str(said)


def ended_as_asked(found: dict[str, Any]) -> None:
    """What `abort` found: all have the rows of what was computed; of a request that only waited nothing was."""
    aborted = dict.fromkeys(["r1", "r2", "long"], "aborted")
    assert found["state"] == {"r0": "finished", "r3": "finished", **aborted}
    assert found["outputs"].keys() == found["state"].keys() | {"waits"}
    assert found["outputs"]["waits"] == found["outputs"]["long"] == 0
    assert found["rows"].pop("long") in range(64, 2500, 64)
    for request, rows in found["rows"].items():
        assert rows == 50 + found["outputs"][request] - 1


def nothing_is_captured(found: dict[str, Any], log: str) -> None:
    """What `off` found: nothing of ours has hooked anything or ran, and `attach` says what to do."""
    assert hooked(log) == "[]"
    assert "expert_lens.enable()" in found["message"]
    assert found["captures"] == []
    assert found["tokens"] == 4
    assert "expert_lens publishes" not in log


def prompts_ran_in_graphs(log: str) -> bool:
    return re.search("Prefill batch.*graph: True", log) is not None
