"""Real SGLang engines with random weights, in a process of their own: `python sglang_engine.py JOB '{"option": ...}'`.

Prints one JSON object. `check`: many requests, what the lens has of each beside SGLang's own `return_routed_experts`;
other jobs are below. Options: those of `sglang.Engine`, and `model_...` for the model's configuration.
"""

import asyncio
import base64
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sglang
from sglang.srt.server_args import ServerArgs

import expert_lens
from expert_lens.errors import MissingRowsError
from sglang_spy import install, read_consumed

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
    "mem_fraction_static": 0.6,
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


OLDER_NAMES = {
    "cuda_graph_max_bs_decode": "cuda_graph_max_bs",
    "disable_prefill_cuda_graph": "disable_piecewise_cuda_graph",
}


class Shape(NamedTuple):
    """What the rows of a model look like, and how many tokens it knows."""

    layers: int
    top_k: int
    vocabulary: int

    def rows(self, encoded: str) -> Any:
        """SGLang's own rows of a request, [n, L, K]."""
        return np.frombuffer(base64.b64decode(encoded), np.int32).reshape(-1, self.layers, self.top_k)


def prepare(options: dict[str, Any]) -> tuple[dict[str, Any], Shape]:
    """The engine's arguments, its model written to a folder, and the shape of that."""
    model = {**MODEL, **{key[6:]: value for key, value in options.items() if key.startswith("model_")}}
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(model))
    chosen = {**ENGINE, **{key: value for key, value in options.items() if not key.startswith("model_")}}
    known = set(inspect.signature(ServerArgs).parameters)
    chosen = {key if key in known else OLDER_NAMES[key]: value for key, value in chosen.items() if value is not None}
    if chosen.get("speculative_algorithm") == "NEXTN":
        chosen["speculative_draft_model_path"] = folder
    shape = Shape(model["num_hidden_layers"], model["num_experts_per_tok"], model["vocab_size"])
    port = 20_000 + os.getpid() % 1000 * 30  # engines beside one another count up from theirs, and from 10 000 above
    return {"model_path": folder, "port": port, **chosen}, shape


@cache
def spy_folder() -> Path:
    """Where `sglang_spy` is installed, for processes that are started from now on."""
    folder = Path(tempfile.mkdtemp())
    install(folder)
    sys.path.insert(0, str(folder))  # processes that are spawned get this path, whatever PYTHONPATH says
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return folder


def load_spy(options: dict[str, Any]) -> None:
    """Have the engine of these options that is started next load `sglang_spy`."""
    spy_folder()
    layers = options.get("model_num_hidden_layers", MODEL["num_hidden_layers"]) // options.get("pp_size", 1)
    os.environ["SGLANG_SPY_LAYERS"] = str(layers)


def start(options: dict[str, Any]) -> tuple[Any, Shape]:
    load_spy(options)
    arguments, shape = prepare(options)
    return sglang.Engine(**arguments), shape


class Waves:
    """Requests that go through the engine, several at once, and SGLang's own rows of each."""

    def __init__(self, engine: Any, shape: Shape) -> None:
        self.engine = engine
        self.shape = shape
        self.rng = np.random.default_rng(7)
        self.native: dict[str, Any] = {}
        self.chosen = np.zeros((shape.layers, 65536), np.int64)
        """How often each layer chose each expert in rows that were computed: those that are not from the cache."""
        self.cached: dict[str, int] = {}
        """How many of each request's first rows are from the radix cache, computed for an earlier one."""
        self.accepted = 0
        self.rejected = 0

    @property
    def num_cached(self) -> int:
        """Rows of all requests that are from the radix cache."""
        return sum(self.cached.values())

    def new(self, length: int) -> list[int]:
        return [int(token) for token in self.rng.integers(10, self.shape.vocabulary, int(length))]

    def run(self, prompts: list[list[int]], outputs: Any, temperature: float = 0.8) -> list[Any]:
        chosen = [{"max_new_tokens": int(output), "ignore_eos": True, "temperature": temperature} for output in outputs]
        results = self.engine.generate(input_ids=prompts, sampling_params=chosen, return_routed_experts=True)
        for prompt, result in zip(prompts, results, strict=True):
            meta = result["meta_info"]
            rows = self.shape.rows(meta["routed_experts"])
            assert len(rows) == len(prompt) + len(result["output_ids"]) - 1
            self.native[meta["id"]] = rows
            cached = self.cached[meta["id"]] = meta.get("cached_tokens", 0)
            for layer in range(self.shape.layers):
                ids = rows[cached:, layer].ravel()
                self.chosen[layer] += np.bincount(ids, minlength=65536) if ids.any() else 0
            accepted = meta.get("spec_num_correct_drafts", 0)
            self.accepted += accepted
            self.rejected += meta.get("spec_num_proposed_drafts", 0) - accepted
        return results

    def mixed(self) -> None:
        """Prompts and outputs of many lengths; shared beginnings, second turns, repeats; long ones beside decodes."""
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

    def few(self) -> None:
        """A few of such requests: lengths, a shared beginning, second turns, and a long one beside decodes."""
        rng = self.rng
        shared = self.new(150)
        prompts = [self.new(3), self.new(40), *(shared + self.new(k) for k in rng.integers(1, 90, 6))]
        results = self.run(prompts, rng.integers(1, 24, 8))
        turns = [p + r["output_ids"] + self.new(7) for p, r in zip(prompts, results, strict=True)]
        self.run([*turns, self.new(700)], rng.integers(4, 24, 9))

    def repeating(self) -> None:
        """Prompts that repeat themselves, one request at a time and several, so that drafts by n-grams are accepted."""
        for requests in (1, 12):
            phrases = [self.new(7) for _ in range(requests)]
            self.run([phrase * 12 for phrase in phrases], [200] * requests, temperature=0.0)

    def many_at_once(self) -> None:
        """More than a small pool has room for, so that requests are retracted and begin again."""
        self.run([self.new(k) for k in self.rng.integers(20, 60, 24)], [250] * 24)


def compare(lens: Any, native: dict[str, Any]) -> dict[str, int]:
    """How many ids were compared and are different, and how many positions the lens lacks.

    Of several pipeline stages, SGLang gives the layers of one, and zeros for the others: `layers` that it gives of each
    request, at the least. `alike`, `alike_layers`: pairs of rows in a row, and of layers of a row, that are the same:
    those would agree in the wrong places too.
    """
    counted = ("ids", "different", "missing", "wrong_length", "alike", "alike_layers")
    found = {"requests": len(native), **dict.fromkeys(counted, 0)}
    layers = []
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
        given = rows.any(axis=(0, 2))
        layers.append(int(given.sum()))
        found["missing"] += int((~there).sum())
        found["ids"] += rows[there][:, given].size
        found["different"] += int((ours[there] != rows[there])[:, given].sum())
        found["alike"] += int((rows[1:] == rows[:-1])[:, given].all(axis=(1, 2)).sum())
        found["alike_layers"] += alike_layers(rows[:, given])
    return {**found, "layers": min(layers, default=0), "positions": sum(map(len, native.values()))}


def alike_layers(rows: Any) -> int:
    """Pairs of neighbouring layers that chose the same, of rows [n, L, K]."""
    return int((rows[:, 1:] == rows[:, :-1]).all(axis=2).sum())


def altered(lens: Any, native: dict[str, Any]) -> int:
    """How many ids are different when one of SGLang's is altered: the control of `compare`."""
    request = next(iter(native))
    rows = native[request].copy()
    layer = rows.any(axis=(0, 2)).argmax()
    rows[len(rows) // 2, layer, 0] += 1
    return compare(lens, {request: rows})["different"]


def totals(lens: Any, waves: Waves) -> dict[str, int]:
    """What the lens counted beside what was computed: `uncounted` and `overcounted` choices of experts, in the layers
    whose ids SGLang gives; `extra` rows, of which a step that overlaps the end of a request gives one each.
    """
    counts = lens.counts().astype(np.int64)
    chosen = waves.chosen[:, : counts.shape[1]]
    more = (counts - chosen)[chosen.any(axis=1)]
    computed = sum(map(len, waves.native.values())) - waves.num_cached
    return {
        "uncounted": int(-more[more < 0].sum()),
        "overcounted": int(more[more > 0].sum()) // len(more) // waves.shape.top_k,
        "extra": lens.stats["tokens"] - computed,
    }


def kinds_of_forwards(lens: Any, cached: dict[str, int]) -> dict[str, Any]:
    """`mixed`: forwards with rows of prompts and of requests that decode. `padded`: decode steps of 5 to 7 rows, for
    which no graph was captured but one of 8. Without each request's rows from the cache, which may be of decode steps.
    """
    phases: dict[int, list[int]] = {}
    for request, start in cached.items():
        rows = lens._collector.rows(request)
        for step, phase in zip(rows["steps"][start:].tolist(), rows["phases"][start:].tolist(), strict=True):
            phases.setdefault(step, []).append(phase)
    mixed = sum({0, 1} <= set(found) for found in phases.values())
    return {"mixed": mixed, "padded": sum(set(found) == {1} and 5 <= len(found) <= 7 for found in phases.values())}


def told(lens: Any) -> dict[str, Any]:
    stats = lens._collector.stats()
    chosen = {key: stats[key] for key in ("steps", "tokens", "dropped_tokens", "publisher")}
    return {**chosen, "failure": lens._collector.failure}


def check(options: dict[str, Any]) -> dict[str, Any]:
    repeats, wave, spying = options.pop("repeats", 1), options.pop("wave", "mixed"), options.pop("spy", None)
    if spying is not None:
        os.environ["SGLANG_SPY"] = spying
    expert_lens.enable()
    engine, shape = start(options)
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)
    for _ in range(repeats):
        getattr(waves, wave)()
    found: dict[str, Any] = {
        **compare(lens, waves.native),
        "cached": waves.num_cached,
        **{what: getattr(waves, what) for what in ("accepted", "rejected")},
        "arenas": len(lens._collector.arenas()),
        **told(lens),
        **totals(lens, waves),
        **kinds_of_forwards(lens, waves.cached),
    }
    found["control"] = altered(lens, waves.native)
    found["states"] = sorted(set(lens._collector.requests()["state"]))
    with expert_lens.attach(lens.name) as late:  # sees what the ring still holds; of the rest it lacks rows
        wave = [waves.new(k) for k in (5, 60, 300)]
        before = len(waves.native)
        waves.run(wave, [4, 30, 8])
        newest = dict(list(waves.native.items())[before:])
        found["late"] = compare(late, newest)
    lens.close()
    engine.shutdown()
    return found


class Single(NamedTuple):
    """A request that ran alone, and what SGLang's own capture gave of it."""

    prompt: list[int]
    output: list[int]
    rows: Any


SINGLY = {"max_new_tokens": 60, "ignore_eos": True, "temperature": 0.0}


def without_us(options: dict[str, Any]) -> list[Single]:
    """Requests one after another through an engine that was not enabled; the last one begins as one before."""
    engine, shape = start(options)
    waves = Waves(engine, shape)
    prompts = [waves.new(length) for length in (3, 40, 700, 2500, 17)]
    singles = []
    for prompt in [*prompts, prompts[2] + waves.new(30)]:
        result = engine.generate(input_ids=prompt, sampling_params=SINGLY, return_routed_experts=True)
        singles.append(Single(prompt, result["output_ids"], shape.rows(result["meta_info"]["routed_experts"])))
    engine.shutdown()
    return singles


def with_the_lens_alone(options: dict[str, Any]) -> dict[str, Any]:
    """The same requests through an engine without us, and through one with the lens and without SGLang's own capture.

    Gives how many ids and outputs are different.
    """
    singles = without_us(options)
    expert_lens.enable()
    engine, _ = start({**options, "enable_return_routed_experts": False})
    lens = expert_lens.attach(engine)
    found: dict[str, Any] = {"ids": 0, "different": 0, "outputs_differ": 0}
    for prompt, output, rows in singles:
        result = engine.generate(input_ids=prompt, sampling_params=SINGLY)
        ours = lens.routed_experts(result["meta_info"]["id"])
        found["ids"] += ours.size
        found["different"] += int((ours != rows).sum())
        found["outputs_differ"] += result["output_ids"] != output
    found.update(told(lens))
    lens.close()
    engine.shutdown()
    return found


def late(options: dict[str, Any]) -> dict[str, Any]:
    """A lens that is attached when the ring has forgotten what stands in the radix cache: what it has of a request that
    begins with that, and how many tokens those are.
    """
    expert_lens.enable(arena="1MiB")
    engine, shape = start(options)
    waves = Waves(engine, shape)
    beginning = waves.new(300)
    waves.run([beginning], [4])
    waves.run([waves.new(700) for _ in range(24)], [4] * 24)
    waves.native.clear()
    waves.cached.clear()
    with expert_lens.attach(engine) as lens:
        waves.run([beginning + waves.new(20)], [8])
        [request] = waves.native
        try:
            lens.routed_experts(request)
            missing = []
        except MissingRowsError as error:
            missing = [int(position) for position in error.positions]
        found = {**compare(lens, waves.native), "positions missing": missing, "cached": waves.num_cached}
    engine.shutdown()
    return found


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """Single requests, one after another, with SGLang's own capture off: what the lens has of each beside what the MoE
    kernel consumed; and, by an engine of its own, what SGLang's capture gives (see `compare`).
    """
    quiet = {"disable_radix_cache": True, **options}
    counted = ("ids", "not_as_consumed", "not_as_native", "outputs_differ", "alike_layers")
    found: dict[str, Any] = dict.fromkeys(counted, 0)
    singles = without_us(quiet)

    file = tempfile.mktemp()
    stages = [Path(f"{file}.{stage}") for stage in range(options.get("pp_size", 1))]
    os.environ["SGLANG_SPY"] = f"consumed:{file}"
    expert_lens.enable()
    engine, _ = start({**quiet, "enable_return_routed_experts": False})
    lens = expert_lens.attach(engine)
    for prompt, output, rows in singles:
        for written in stages:
            written.write_bytes(b"")
        result = engine.generate(input_ids=prompt, sampling_params=SINGLY)
        ours = lens.routed_experts(result["meta_info"]["id"])
        time.sleep(0.5)  # a step that overlapped the end
        consumed = np.concatenate([read_consumed(written)[: len(ours)] for written in stages], axis=1)
        given = rows.any(axis=(0, 2))
        assert ours.shape == rows.shape == consumed.shape
        found["ids"] += ours.size
        found["not_as_consumed"] += int((ours != consumed).sum())
        found["outputs_differ"] += result["output_ids"] != output
        found["not_as_native"] += int((ours != rows)[:, given].sum())
        found["alike_layers"] += alike_layers(consumed)
    found.update(told(lens))
    lens.close()
    engine.shutdown()
    return found


def control(options: dict[str, Any]) -> dict[str, Any]:
    """As `check`, small, with ids altered on their way to the lens: one, or one in every step of a decode graph."""
    os.environ["SGLANG_SPY"] = options.pop("spy")
    expert_lens.enable()
    engine, shape = start(options)
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)
    for _ in range(4):
        waves.run([waves.new(20)], [5])
    found = compare(lens, waves.native)
    lens.close()
    engine.shutdown()
    return found


def timing(options: dict[str, Any]) -> dict[str, Any]:
    """What expert_lens takes of the scheduler's thread in a decode step, in microseconds, by the number of rows.

    With the clocks that tell it, and what those take alone.
    """
    file = tempfile.mktemp()
    os.environ["SGLANG_SPY"] = f"timed:{file}"
    expert_lens.enable()
    engine, shape = start({**options, "enable_return_routed_experts": False})
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)
    chosen = {"max_new_tokens": 600, "ignore_eos": True, "temperature": 0.0}
    for rows in (1, 64, 1, 64):
        engine.generate(input_ids=[waves.new(20) for _ in range(rows)], sampling_params=chosen)
    lens.close()
    engine.shutdown()
    lines = [line.split() for line in Path(file).read_text().splitlines()]
    found: dict[str, Any] = {}
    for rows in (1, 64):
        for what, mark in (("with clocks", []), ("clocks alone", ["clocks"])):
            took = [float(spent) for of, spent, *rest in lines if int(of) == rows and rest == mark]
            quartiles = [round(float(np.percentile(took, q)), 2) for q in (25, 50, 75, 99)]
            found[f"n = {rows}, {what}"] = {"steps": len(took), "quartiles and p99": quartiles}
    return found


def abort(options: dict[str, Any]) -> dict[str, Any]:
    """Requests that are aborted beside others: while they decode, in the midst of a prompt, and while they wait."""
    chosen = {"max_new_tokens": options.pop("max_new_tokens", 3000), "ignore_eos": True, "temperature": 0.8}
    expert_lens.enable(name="aborted-ones")
    os.environ["SGLANG_SPY"] = "loaded"
    engine, shape = start({"chunked_prefill_size": 64, "max_running_requests": 5, **options})
    lens = expert_lens.attach(engine)
    waves = Waves(engine, shape)

    def begin(rid: str, length: int) -> asyncio.Task[Any]:
        return asyncio.create_task(engine.async_generate(input_ids=waves.new(length), sampling_params=chosen, rid=rid))

    async def reach(tokens: dict[str, int]) -> None:
        while True:
            requests = lens._collector.requests()
            seen = dict(zip(requests["request"], requests["tokens"], strict=True))
            if all(seen.get(rid, 0) >= number for rid, number in tokens.items()):
                return
            await asyncio.sleep(0.001)

    async def run() -> dict[str, Any]:
        tasks = {f"r{i}": begin(f"r{i}", 50) for i in range(4)}
        await reach(dict.fromkeys(tasks, 60))
        tasks |= {"long": begin("long", 2500), "waits": begin("waits", 20)}
        await reach({"long": 64})
        for rid in ("r1", "r2", "long", "waits"):
            engine.tokenizer_manager.abort_request(rid=rid)
        return {rid: await task for rid, task in tasks.items()}

    results = engine.loop.run_until_complete(run())
    states = lens._collector.requests()
    found = {
        "outputs": {rid: len(result["output_ids"]) for rid, result in results.items()},
        "rows": {rid: len(lens.routed_experts(rid)) for rid in states["request"]},
        "state": dict(zip(states["request"], states["state"], strict=True)),
    }
    lens.close()
    engine.shutdown()
    return found


def server(options: dict[str, Any]) -> dict[str, Any]:
    """`python -m sglang.launch_server` with the environment alone, requests by HTTP, and a lens by name; the server is
    killed before the rows are compared.
    """
    load_spy(options)
    arguments, shape = prepare(options)
    command = [sys.executable, "-m", "sglang.launch_server"]
    for key, value in arguments.items():
        command += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])

    def ask(path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{arguments['port']}{path}", data, headers), timeout=100
        ) as reply:
            text = reply.read()
        return json.loads(text) if text else None

    def request(number: int) -> tuple[str, Any]:
        rid = f"asked-{number}"
        prompt = [int(token) for token in np.random.default_rng(number).integers(10, shape.vocabulary, 20 + 9 * number)]
        chosen = {"max_new_tokens": 10 + number, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": chosen, "rid": rid, "return_routed_experts": True}
        meta = ask("/generate", body)["meta_info"]
        rows = shape.rows(meta["routed_experts"])
        assert (meta["id"], len(rows)) == (rid, len(prompt) + meta["completion_tokens"] - 1)
        return rid, rows

    process = subprocess.Popen(command, env={**os.environ, "EXPERT_LENS_ENABLE": "1"})
    try:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            try:
                ask("/health_generate")
                break
            except OSError:  # not there yet, or still starting
                time.sleep(0.5)
        lens = expert_lens.attach(f"sglang-{process.pid}")
        with ThreadPoolExecutor(8) as pool:
            native = dict(pool.map(request, np.random.default_rng(7).permutation(40).tolist()))
        ask("/health_generate")
    finally:
        process.kill()
        process.wait()
    states = lens._collector.requests()
    found = {**compare(lens, native), **told(lens), "states": sorted(set(states["state"]))}
    found["of nobody"] = [name for name in states["request"] if "HEALTH" in name]
    lens.close()
    return found


def uncaptured(options: dict[str, Any]) -> dict[str, Any]:
    """How an engine answers of which nothing is captured, and what `attach` says."""
    engine, shape = start({**options, "enable_return_routed_experts": False})
    chosen = {"max_new_tokens": 4, "ignore_eos": True}
    answer = engine.generate(input_ids=Waves(engine, shape).new(20), sampling_params=chosen)
    try:
        expert_lens.attach(engine)
        message = ""
    except (expert_lens.errors.EngineHookError, expert_lens.errors.CaptureNotFoundError) as error:
        message = str(error)
    engine.shutdown()
    return {"tokens": len(answer["output_ids"]), "message": message, "captures": expert_lens.captures()}


def off(options: dict[str, Any]) -> dict[str, Any]:
    """Not enabled: nothing of ours is loaded that publishes, and `attach` says what to do."""
    os.environ.pop("EXPERT_LENS_ENABLE", None)
    os.environ["SGLANG_SPY"] = "loaded"
    return uncaptured(options)


def moved(options: dict[str, Any]) -> dict[str, Any]:
    """Enabled, in a release that has moved what we hold on to."""
    expert_lens.enable()
    os.environ["SGLANG_SPY"] = "moved"
    return uncaptured(options)


JOBS = {
    job.__name__: job for job in (check, late, alone, with_the_lens_alone, control, abort, server, off, moved, timing)
}

if __name__ == "__main__":
    began = time.monotonic()
    result = JOBS[sys.argv[1]](json.loads(sys.argv[2]))
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}), flush=True)
