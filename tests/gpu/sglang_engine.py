"""Real SGLang engines with random weights, in a process of their own: `python sglang_engine.py JOB '{"option": ...}'`.

Prints one JSON object. `check`: many requests, what the lens has of each beside SGLang's own `return_routed_experts`;
other jobs are below. Options: those of `sglang.Engine`, and `model_...` for the model's configuration.
"""

import asyncio
import base64
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import sglang

import expert_lens
from expert_lens.errors import MissingRowsError

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_sparse_step": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 512,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "moe_runner_backend": "triton",
    "mem_fraction_static": 0.2,
    "max_total_tokens": 60_000,
    "cuda_graph_max_bs_decode": 64,
    "disable_prefill_cuda_graph": True,
    "disable_flashinfer_autotune": True,
    "max_running_requests": 64,
    "chunked_prefill_size": 2048,
    "random_seed": 1,
    "log_level": "info",
    "enable_return_routed_experts": True,
}


def start(options: dict[str, Any]) -> tuple[Any, tuple[int, int]]:
    """The engine, and L and K of its model."""
    model = {**MODEL, **{key[6:]: value for key, value in options.items() if key.startswith("model_")}}
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(model))
    chosen = {**ENGINE, **{key: value for key, value in options.items() if not key.startswith("model_")}}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    engine = sglang.Engine(model_path=folder, **chosen)
    return engine, (model["num_hidden_layers"], model["num_experts_per_tok"])


class Waves:
    """Requests that go through the engine, several at once, and SGLang's own rows of each."""

    def __init__(self, engine: Any, shape: tuple[int, int]) -> None:
        self.engine = engine
        self.shape = shape
        self.rng = np.random.default_rng(7)
        self.native: dict[str, Any] = {}
        self.cached = 0

    def new(self, length: int) -> list[int]:
        return [int(token) for token in self.rng.integers(10, 31_000, int(length))]

    def run(self, prompts: list[list[int]], outputs: Any, temperature: float = 0.8) -> list[Any]:
        chosen = [{"max_new_tokens": int(output), "ignore_eos": True, "temperature": temperature} for output in outputs]
        results = self.engine.generate(input_ids=prompts, sampling_params=chosen, return_routed_experts=True)
        for prompt, result in zip(prompts, results, strict=True):
            meta = result["meta_info"]
            rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32).reshape(-1, *self.shape)
            assert len(rows) == len(prompt) + len(result["output_ids"]) - 1
            self.native[meta["id"]] = rows
            self.cached += meta.get("cached_tokens", 0)
        return results

    def mixed(self) -> None:
        """Prompts and outputs of many lengths; shared beginnings, second turns, repeats; long prompts beside decodes."""
        rng = self.rng
        self.run([self.new(k) for k in rng.integers(3, 900, 24)], rng.integers(1, 120, 24))
        shared = [self.new(k) for k in (64, 200, 333, 517)]
        prompts = [shared[i % 4] + self.new(k) for i, k in enumerate(rng.integers(1, 300, 24))]
        results = self.run(prompts, rng.integers(2, 90, 24))
        turns = [p + r["output_ids"] + self.new(rng.integers(1, 40)) for p, r in zip(prompts, results, strict=True)]
        self.run(turns, rng.integers(2, 60, 24))
        self.run(turns[:12] + [self.new(k) for k in rng.integers(3, 500, 12)], rng.integers(2, 60, 24))
        long = [self.new(2500), self.new(40), self.new(1200)] + [self.new(k) for k in rng.integers(3, 60, 60)]
        self.run(long, [30, 200, 40, *rng.integers(20, 150, 60)])


def compare(lens: Any, native: dict[str, Any]) -> dict[str, int]:
    """How many ids were compared and are different, and how many positions the lens lacks."""
    found = {"requests": len(native), "ids": 0, "different": 0, "missing": 0, "wrong_length": 0}
    for request, rows in native.items():
        try:
            ours = lens.routed_experts(request)
            there = np.ones(len(ours), np.bool_)
        except MissingRowsError as error:
            ours = lens.routed_experts(request, fill=0)
            there = np.ones(len(ours), np.bool_)
            there[list(error.positions)] = False
        if len(ours) != len(rows):
            found["wrong_length"] += 1
            continue
        found["missing"] += int((~there).sum())
        found["ids"] += rows[there].size
        found["different"] += int((ours[there] != rows[there]).sum())
    return found


def altered(lens: Any, native: dict[str, Any]) -> int:
    """How many ids are different when one of SGLang's is altered: the control of `compare`."""
    request = next(iter(native))
    rows = native[request].copy()
    rows[len(rows) // 2, 0, 0] += 1
    return compare(lens, {request: rows})["different"]


def told(lens: Any) -> dict[str, Any]:
    stats = lens._collector.stats()
    return {key: stats[key] for key in ("steps", "tokens", "dropped_tokens") if key in stats}


def check(options: dict[str, Any]) -> dict[str, Any]:
    repeats = options.pop("repeats", 1)
    expert_lens.enable()
    engine, shape = start(options)
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)
    for _ in range(repeats):
        waves.mixed()
    found: dict[str, Any] = {**compare(lens, waves.native), "cached": waves.cached, **told(lens)}
    found["control"] = altered(lens, waves.native)
    found["states"] = sorted(set(lens._collector.requests()["state"]))
    found["distinct"] = len(np.unique(np.concatenate([rows[:64] for rows in waves.native.values()])))
    with expert_lens.attach(lens.name) as late:  # sees what the ring still holds; of the rest it lacks rows
        wave = [waves.new(k) for k in (5, 60, 300)]
        before = len(waves.native)
        waves.run(wave, [4, 30, 8])
        newest = dict(list(waves.native.items())[before:])
        found["late"] = compare(late, newest)
    lens.close()
    engine.shutdown()
    return found


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """Single requests, one after another: what the lens has of each, into a file; SGLang's own rows if it has them."""
    keep = options.pop("keep")
    use_lens = options.pop("lens")
    if use_lens:
        expert_lens.enable()
    engine, shape = start(options)
    lens = expert_lens.attach(engine) if use_lens else None
    waves = Waves(engine, shape)
    prompts = [waves.new(k) for k in (3, 40, 700, 2500, 17)]
    rows, outputs = [], []
    for prompt in prompts:
        chosen = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.0}
        more = {"return_routed_experts": True} if options.get("enable_return_routed_experts", True) else {}
        result = engine.generate(input_ids=prompt, sampling_params=chosen, **more)
        outputs.append(result["output_ids"])
        if lens is not None:
            rows.append(lens.routed_experts(result["meta_info"]["id"]))
        else:
            native = np.frombuffer(base64.b64decode(result["meta_info"]["routed_experts"]), np.int32)
            rows.append(native.reshape(-1, *shape))
    np.savez(keep, *rows, outputs=np.array(outputs))
    if lens is not None:
        lens.close()
    engine.shutdown()
    return {"rows": sum(map(len, rows)), "ids": sum(one.size for one in rows)}


def abort(options: dict[str, Any]) -> dict[str, Any]:
    """Requests that are aborted while they decode, beside others."""
    expert_lens.enable(name="aborted-ones")
    engine, shape = start(options)
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)

    async def run() -> list[Any]:
        chosen = {"max_new_tokens": 3000, "ignore_eos": True, "temperature": 0.8}
        tasks = [
            asyncio.create_task(engine.async_generate(input_ids=waves.new(50), sampling_params=chosen, rid=f"r{i}"))
            for i in range(4)
        ]
        await asyncio.sleep(1.5)
        for rid in ("r1", "r2"):
            engine.tokenizer_manager.abort_request(rid=rid)
        return await asyncio.gather(*tasks)

    results = engine.loop.run_until_complete(run())
    counts = [len(result["output_ids"]) for result in results]
    states = lens._collector.requests()
    rows = [len(lens.routed_experts(f"r{i}")) for i in range(4)]
    lens.close()
    engine.shutdown()
    return {
        "outputs": counts,
        "rows": rows,
        "requests": {key: [str(x) for x in value] for key, value in states.items()},
    }


def off(options: dict[str, Any]) -> dict[str, Any]:
    """Not enabled: no module of ours in the scheduler, and `attach` says what to do."""
    os.environ.pop("EXPERT_LENS_ENABLE", None)
    engine, _ = start(options)
    maps = [Path(f"/proc/{pid}/maps").read_text() for pid in engine.get_all_child_pids()]
    try:
        expert_lens.attach(engine)
        message = ""
    except expert_lens.errors.EngineHookError as error:
        message = str(error)
    engine.shutdown()
    return {"message": message, "captures": expert_lens.captures(), "mapped": sum("fused" in one for one in maps)}


JOBS = {"check": check, "alone": alone, "abort": abort, "off": off}

if __name__ == "__main__":
    began = time.monotonic()
    result = JOBS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}), flush=True)
