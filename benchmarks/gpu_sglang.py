"""SGLang's own experiment on one GPU, Qwen3-30B-A3B's shape with dummy weights: `python benchmarks/gpu_sglang.py`.

Modes, each an engine of its own, started in turn and two of them twice; MODES="off;lens", say, in the environment asks
for others than ORDER. Where there is memory for several engines, MODES="off|lens;native" has the first
two stand side by side: they are started at once, and take turns by the run, the other way around each time.

* `off`: the plugin is installed, and not enabled, so that it returns before it imports what would hook.
* `off, a reader beside it`: the same, and a lens looks at a capture of something else, so that what a busy reader
  changes on a machine is not taken for what the plugin does.
* `lens`: a lens attached in the process of the engine, which counts and keeps every row.
* `lens, nobody reads`: the plugin alone.
* `lens, recorded`: and `expert-lens record` in a process of its own writes Parquet; needs polars.
* `native` and `native, no overlap`: SGLang's `return_routed_experts`, with and without overlap scheduling.
* `timing`: what the lens takes of the scheduler's thread in a step, launch left out (tests/engines/sglang_spy.py); by a
  model of small layers.

The same prompts in every run: 1 request of 1024 + 1024 tokens, 64 of 1024 + 512, each several times after a warm-up.
A run ends with the last answer. SGLang's own capture brings each request's experts with it; of the lens they are asked
for behind it, and what that takes is in the throughput with `rows in hand`.
OPTIONS='{"tp_size": 2}' gives engines more options, RUNS=3 each of them so many runs. A decode step: the time between
two tokens of one request as they arrive, once all requests decode, and before the last one, with which comes what is
done when requests end. A figure of the lens or of SGLang's capture is relative to the median of the runs with `off`.
"""

import asyncio
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from figures import show

ORDER = ("off", "lens", "lens, recorded", "native", "native, no overlap", "off", "lens", "timing")
EXPERIMENTS = ((1, 1024), (64, 512))
PROMPT, SKIPPED = 1024, 48
BEHIND = 0.05
"""Seconds, far less than the prompts of the others take."""
RUNS = int(os.environ.get("RUNS", "2"))
READY = "READY"
TESTS = Path(__file__).parent.parent / "tests" / "engines"
MODEL: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
ENGINE: dict[str, Any] = {
    "mem_fraction_static": 0.9,
    "max_total_tokens": None,
    "disable_radix_cache": True,
    "chunked_prefill_size": 8192,
    "log_level": "warning",
}


@contextmanager
def recorder(lens: Any) -> Iterator[None]:
    """`expert-lens record` of the lens's capture; at the end every row must be in the Parquet."""
    import polars as pl

    with tempfile.TemporaryDirectory() as folder:
        command = "import sys; from expert_lens.cli import main; sys.exit(main())"  # where a wheel lies unpacked
        process = subprocess.Popen([sys.executable, "-c", command, "record", lens.name, folder])
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()
        rows = pl.scan_parquet(f"{folder}/*.parquet").select(pl.len()).collect().item()
        stats = lens.stats
        print(f"recorded: {rows} rows of {stats['tokens']}, {stats['unattributed_tokens']} of nobody", flush=True)
        assert process.returncode == 0
        assert rows == stats["tokens"] - stats["unattributed_tokens"]


@contextmanager
def reader_beside() -> Iterator[None]:
    """A lens on a capture of this process that gets a row every 5 ms, as a decoding engine would give it."""
    from expert_lens._core import Collector, Writer

    facts: dict[str, Any] = {"layers": list(range(48)), "num_experts": 128, "top_k": 8}
    writer, over = Writer("beside", **facts), threading.Event()
    row, position = np.zeros((1, 48, 8), np.uint8), np.zeros(1, np.uint32)

    def write() -> None:
        while not over.wait(0.005):
            writer.publish(row, None, position)

    thread, collector = threading.Thread(target=write), Collector("beside")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        collector.close()
        writer.close()


def run_mode(mode: str) -> None:
    """Start an engine, say that it is ready, and for each line of input run the experiments and print their figures."""
    sys.path.insert(0, str(TESTS))
    import sglang

    import expert_lens
    import sglang_engine

    native = mode.startswith("native")
    os.environ.pop("EXPERT_LENS_ENABLE", None)
    if mode.startswith("lens"):
        expert_lens.enable()
    options = {f"model_{key}": value for key, value in MODEL.items()}
    overlap = {"disable_overlap_schedule": True} if mode.endswith("no overlap") else {}
    asked = {**overlap, **json.loads(os.environ.get("OPTIONS", "{}"))}
    arguments, _ = sglang_engine.prepare({**options, **ENGINE, **asked, "enable_return_routed_experts": native})
    engine = sglang.Engine(**arguments)
    lens = expert_lens.attach(engine) if mode in ("lens", "lens, recorded") else None
    more = {"return_routed_experts": True} if native else {}
    runs = itertools.count()

    async def all_of_them(prompts: list[list[int]], output: int, rids: list[str]) -> list[tuple[float, int]]:
        """When tokens of the last one arrived, and how many had by then: of those that had to wait several at once.

        The others are sent in one message, and the last one behind them: sent one by one, as many as happen to be
        there get into the first forward, and a run with a forward more takes longer by what is looked for.
        """
        chosen = {"max_new_tokens": output, "ignore_eos": True, "temperature": 0.0}
        *before, last = ({"input_ids": prompt, "rid": rid} for prompt, rid in zip(prompts, rids, strict=True))

        async def watched() -> list[tuple[float, int]]:
            await asyncio.sleep(BEHIND if before else 0)
            tokens = await engine.async_generate(**last, sampling_params=chosen, stream=True, **more)
            return [(time.perf_counter(), token["meta_info"]["completion_tokens"]) async for token in tokens]

        async def others() -> None:
            if before:
                asked = {key: [request[key] for request in before] for key in last}
                await engine.async_generate(**asked, sampling_params=chosen, **more)

        _, arrived = await asyncio.gather(others(), watched())
        return arrived

    def fetch(rids: list[str], length: int) -> None:
        """Each request's rows, once the last one is there."""
        for rid in rids:
            while len(lens.routed_experts(rid)) < length:
                time.sleep(0.001)

    def experiment(requests: int, output: int) -> dict[str, Any]:
        rng = np.random.default_rng(requests)
        prompts = [rng.integers(1000, 100_000, PROMPT).tolist() for _ in range(requests)]
        run = next(runs)
        rids = [f"{run}-{number}" for number in range(requests)]
        began = time.perf_counter()
        arrived = engine.loop.run_until_complete(all_of_them(prompts, output, rids))
        took = time.perf_counter() - began
        if lens is not None:
            fetch(rids, PROMPT + output - 1)
        in_hand = time.perf_counter() - began
        times, tokens = np.transpose([(at, number) for at, number in arrived if SKIPPED <= number < output])
        steps = np.diff(times) / np.diff(tokens) * 1e6
        return {
            "mode": mode,
            "n": requests,
            "tokens/s": requests * output / took,
            "tokens/s, rows in hand": requests * output / in_hand,
            "mean": float(np.ptp(times) / np.ptp(tokens) * 1e6),
            "median": float(np.median(steps)),
            "p99": float(np.percentile(steps, 99)),
        }

    beside: dict[str, Callable[[], Any]] = {
        "off, a reader beside it": reader_beside,
        "lens, recorded": lambda: recorder(lens),
    }
    with beside.get(mode, nullcontext)():
        for requests, _ in EXPERIMENTS:
            experiment(requests, SKIPPED + 16)
        print(READY, flush=True)
        for _ in sys.stdin:
            for requests, output in EXPERIMENTS:
                print("RUN " + json.dumps(experiment(requests, output)), flush=True)
            print(READY, flush=True)
    if lens is not None:
        stats = lens.stats
        print(f"lens: {stats['tokens']} rows, {stats['dropped_tokens']} dropped", file=sys.stderr)
        assert stats["dropped_tokens"] == 0
        lens.close()
    engine.shutdown()


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, of Python; what it writes to stderr is shown if it fails."""
    with tempfile.TemporaryFile("w+") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen([sys.executable, *arguments], text=True, cwd=TESTS, **pipes)
        try:
            yield process
        finally:
            process.kill()
            if process.wait():
                log.seek(0)
                print(log.read()[-2000:], file=sys.stderr)


def until_ready(engine: subprocess.Popen[str]) -> list[str]:
    """The lines that it prints until it is ready, or has failed; shown as they come, should this be cut off."""
    assert engine.stdout is not None
    lines = []
    for line in itertools.takewhile(lambda line: line != f"{READY}\n", engine.stdout):
        print(line, end="", file=sys.stderr, flush=True)
        lines.append(line)
    return lines


def ask(engine: subprocess.Popen[str]) -> None:
    """Have it run the experiments once; of one that has failed its end tells."""
    assert engine.stdin is not None
    with suppress(BrokenPipeError):
        engine.stdin.write("run\n")
        engine.stdin.flush()


def until_end(process: subprocess.Popen[str]) -> str:
    """What it prints when nothing more is asked of it."""
    printed: str = process.communicate()[0]
    return printed


def run_beside(modes: list[str], failed: list[str]) -> list[dict[str, Any]]:
    """What the runs of these modes gave, whose engines stand side by side and take turns; notes those that failed."""
    with ExitStack() as stack:
        engines = [stack.enter_context(started(__file__, mode)) for mode in modes]
        lines = [line for engine in engines for line in until_ready(engine)]
        for run in range(RUNS):
            for engine in engines if run % 2 == 0 else reversed(engines):
                ask(engine)
                lines += until_ready(engine)
        for mode, engine in zip(modes, engines, strict=True):
            print(until_end(engine), end="", file=sys.stderr, flush=True)
            if engine.returncode:
                failed.append(mode)
    return [json.loads(line[4:]) for line in lines if line.startswith("RUN ")]


def report(runs: list[dict[str, Any]]) -> None:
    """One figure a mode, experiment and measure."""
    bars = {(1, "step"): "<= 0.15", (64, "step"): "<= 0.1", (1, "speed"): ">= 0.998", (64, "speed"): ">= 0.998"}
    modes = dict.fromkeys(run["mode"] for run in runs)
    for n, output in EXPERIMENTS:
        what = f"n = {n}, {PROMPT} + {output} tokens"
        of = {mode: [run for run in runs if run["mode"] == mode and run["n"] == n] for mode in modes}
        if not of.get("off"):
            continue
        step = statistics.median(run["mean"] for run in of["off"])
        speed = statistics.median(run["tokens/s"] for run in of["off"])
        show(f"{what}: decode step, off", "µs, mean of a run", [run["mean"] for run in of["off"]])
        show(f"{what}: throughput, off", "tokens/s", [run["tokens/s"] for run in of["off"]])
        ratios = [run["tokens/s"] / speed for run in of["off"]]
        show(f"{what}: throughput, off : its median", "throughput ratio", ratios)
        for mode in of:
            if mode == "off" or not of[mode]:
                continue
            bar = {"bar": bars[n, "step"]} if mode.startswith("lens") else {}
            show(f"{what}: decode step, {mode} : off", "%", [(run["mean"] / step - 1) * 100 for run in of[mode]], **bar)
            bar = {"bar": bars[n, "speed"]} if mode.startswith("lens") else {}
            ratios = [run["tokens/s"] / speed for run in of[mode]]
            show(f"{what}: throughput, {mode} : off", "throughput ratio", ratios, **bar)
            if mode.startswith("lens"):
                ratios = [run["tokens/s, rows in hand"] / speed for run in of[mode]]
                show(f"{what}: throughput, {mode}, rows in hand : off", "throughput ratio", ratios)
        for mode in of:
            if of[mode]:
                show(f"{what}: decode step, {mode}, median", "µs", [run["median"] for run in of[mode]])
                show(f"{what}: decode step, {mode}, p99", "µs", [run["p99"] for run in of[mode]])


def report_timing(failed: list[str]) -> None:
    """What expert_lens takes of the scheduler's thread in a decode step; notes if it failed."""
    with started(str(TESTS / "sglang_engine.py"), "timing", "{}") as process:
        printed = until_end(process)
    if process.returncode:
        failed.append("timing")
    for line in printed.splitlines():
        if line.startswith('{"n'):
            for rows, found in json.loads(line).items():
                if rows.startswith("n = "):
                    low, median, high, p99 = found["quartiles and p99"]
                    figure = {"median": median, "spread": [low, high], "p99": p99, "n": found["steps"]}
                    if "with" in rows:
                        figure["bar"] = "<= 5, without clocks"
                    name = f"ours on the scheduler's thread a decode step, {rows}"
                    print(json.dumps({"name": name, "unit": "µs", **figure}, ensure_ascii=False), flush=True)


def main() -> None:
    import sglang
    import torch

    print(f"# {torch.cuda.get_device_name()}, SGLang {sglang.__version__}, torch {torch.__version__}", flush=True)
    runs: list[dict[str, Any]] = []
    failed: list[str] = []
    modes = os.environ.get("MODES", ";".join(ORDER)).split(";")
    for beside in modes:
        if beside != "timing":
            runs += run_beside(beside.split("|"), failed)
    report(runs)
    if "timing" in modes:
        report_timing(failed)
    if failed:
        sys.exit(f"not all is there: {', '.join(failed)} failed, as the log above tells")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_mode(sys.argv[1])
    else:
        main()
