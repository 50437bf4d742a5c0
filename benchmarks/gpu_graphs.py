"""What publishing adds to a decode step that is a CUDA graph: `python benchmarks/gpu_graphs.py`.

The step: 6 matrix products, 48 layers' top-k ids [n, 8], computed anew in each replay, and 2 products more, about as
long as what an engine computes behind its last router. Ways, each a graph of its own: nothing; `lens`: kernels in the
graph publish rows, token ids, positions and KV slots, beside those 2 products; `lens, at the end`: behind them; `lens,
stream` and `lens, event`: the graph packs, and the stream copies and publishes behind each replay, by itself or by an
event that a thread of ours looks at; `deferred copy by torch`: `peers.DeferredCopy`.

Stream: the time a step takes, from events around blocks of 100 steps, less that of the same block without anything.
CPU: what it takes on the engine's thread beside the launch, of a batch that goes on; `a new batch`: of one whose rows
are stated anew in every step; `a replay of nobody's`: what it takes to launch the larger graph, and to pass over the
replay; `the writer's post alone`: without the tap. Ways take turns in a new order each round. Counted: how long after a
record's number can be seen in this process a reader process without CUDA has counted its rows, published by each way.
"""

import ctypes
import itertools
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import show
from peers import DeferredCopy

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "gpu"))
from watching import Watch

from expert_lens import graphs
from expert_lens._core import Writer, default_directory
from expert_lens.tap import Tap

LAYERS, EXPERTS, TOP_K = 48, 128, 8
STEPS, ROUNDS, CPU_ROUNDS, MATMULS, MATMULS_BEHIND = 100, 40, 12, 6, 2
FACTS: dict[str, Any] = {"layers": list(range(LAYERS)), "num_experts": EXPERTS, "top_k": TOP_K}

NUMBERS = itertools.count()
POLL_SECONDS = 20e-6
PR_SET_TIMERSLACK = 29

READER = """
import sys, time
from expert_lens._core import Collector
collector = Collector(f"gpu-latency-{sys.argv[1]}")
print("ready", flush=True)
for line in sys.stdin:
    target = int(line)
    while collector.tokens < target:
        pass
    print(time.monotonic_ns(), flush=True)
"""


class Step:
    """A decode step of n rows in a graph, with a tap, or with `collect` called at its end, inside the capture."""

    def __init__(
        self,
        rows: int,
        tap: Tap | None = None,
        collect: Callable[[list[torch.Tensor]], None] | None = None,
        *,
        beside: bool = True,
    ) -> None:
        self.x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
        self.y = torch.empty_like(self.x)
        self.step = torch.zeros((), dtype=torch.int64, device="cuda")
        row, choice = torch.arange(rows, device="cuda"), torch.arange(TOP_K, device="cuda")
        self.offsets = torch.arange(LAYERS, device="cuda")[:, None, None] + row[:, None] + choice * 5
        self.columns = {
            "token_ids": torch.zeros(rows, dtype=torch.int64, device="cuda"),
            "positions": torch.arange(rows, device="cuda"),
            "kv_slots": torch.arange(rows, device="cuda"),
        }
        self.graph = torch.cuda.CUDAGraph()
        self.run()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            begun = tap.begin() if tap else None
            if begun is not None and beside:
                begun.mark_beginning()
            ids = self.run(tap)
            if collect:
                collect(ids)
            if tap is not None:
                held = tap.end()
                assert held is not None
                self.recorded = graphs.record(tap, held, rows, **self.columns)

    def run(self, tap: Tap | None = None) -> list[torch.Tensor]:
        """The forward."""
        self.step.add_(1)
        for _ in range(MATMULS):
            torch.mm(self.x, self.x, out=self.y)
        ids = list((self.offsets + self.step).remainder(EXPERTS).to(torch.int32).unbind(0))
        if tap is not None:
            for slot, layer in enumerate(ids):
                tap.layer(slot, layer)
        for _ in range(MATMULS_BEHIND):
            torch.mm(self.x, self.x, out=self.y)
        return ids


def make_tap(rows: int, way: str, capture: str) -> Tap:
    os.environ["EXPERT_LENS_PUBLISHER"] = way
    room = (1 << 24) + 2 * STEPS * rows * LAYERS * TOP_K  # a block of steps that the CPU launches ahead
    return Tap(Writer(capture, **FACTS, kv_slots=rows, arena_bytes=room), **FACTS)


def lens(
    rows: int, way: str, *, nobody: bool = False, beside: bool = True, anew: bool = False
) -> tuple[Callable[[], None], Tap]:
    """The step with a lens: what runs it, for `nobody` if its kernels shall find nothing to write, and its tap.

    `anew`: each step is of another batch than the one before.
    """
    tap = make_tap(rows, way, f"gpu-graphs-{way}-{next(NUMBERS)}")
    step = Step(rows, tap, beside=beside)
    batches: list[Any] = [
        [(row + 1, f"{batch}{row}", row, 1, 1, "decode") for row in range(rows)] for batch in ("ab" if anew else "a")
    ]
    replayed = itertools.cycle([None] if nobody else [graphs.ReplayRows(spans, rows) for spans in batches])
    return lambda: step.recorded.replay(step.graph.replay, next(replayed)), tap


def deferred_copy(rows: int) -> Callable[[], None]:
    """The step with the deferred copy that SGLang has."""
    copy = DeferredCopy(rows, LAYERS, TOP_K)

    def collect(ids: list[torch.Tensor]) -> None:
        for slot, layer in enumerate(ids):
            copy.keep(slot, layer)

    step = Step(rows, collect=collect)

    def run() -> None:
        step.graph.replay()
        copy.defer(rows)

    return run


def measure_stream(rows: int) -> None:
    """GPU time that each way adds to a step."""
    ways: dict[str, Callable[[], None]] = {"nothing": Step(rows).graph.replay}
    ways["lens"], tap = lens(rows, "graph")
    ways["lens, a replay of nobody's"], nobodys_tap = lens(rows, "graph", nobody=True)
    ways["lens, at the end"], end_tap = lens(rows, "graph", beside=False)
    ways["lens, stream"], other_tap = lens(rows, "stream")
    ways["lens, event"], event_tap = lens(rows, "event")
    ways["deferred copy by torch"] = deferred_copy(rows)
    took: dict[str, list[float]] = {name: [] for name in ways}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for round_ in range(ROUNDS + 3):
        for name in random.sample(list(ways), len(ways)):
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # the launches run ahead, so that only the device's time is measured
            begin.record()
            for _ in range(STEPS):
                ways[name]()
            end.record()
            end.synchronize()
            if round_ >= 3:
                took[name].append(begin.elapsed_time(end) * 1e3 / STEPS)
    all_published(tap, end_tap, other_tap, event_tap, nobodys_tap)
    assert nobodys_tap.writer.steps == 0
    nothing = took.pop("nothing")
    show(f"decode graph, n = {rows}: nothing", "µs a step", nothing, digits=2)
    for name, values in took.items():
        added = [value - base for value, base in zip(values, nothing, strict=True)]
        bar = {"bar": "<= 6"} if name == "lens" and rows <= 256 else {}
        show(f"decode graph, n = {rows}: {name}, stream time added", "µs a step", added, digits=2, **bar)


def all_published(*taps: Tap) -> None:
    """What was measured is what it is called: no capture has ended, and no row was dropped."""
    assert [(tap.error, tap.writer.dropped_tokens) for tap in taps] == [(None, 0)] * len(taps)


class TimedWriter:
    """A writer whose posts are timed."""

    def __init__(self, writer: Any) -> None:
        self.posts: list[float] = []
        self._writer = writer

    def publish_graph(self, mailbox: Any) -> None:
        """As the writer does."""
        began = time.perf_counter_ns()
        self._writer.publish_graph(mailbox)
        self.posts.append((time.perf_counter_ns() - began) / 1e3)


def measure_cpu(rows: int) -> None:
    """Time of ours on the engine's thread."""
    ways: dict[str, Callable[[], None]] = {"nothing": Step(rows).graph.replay}
    ways["lens"], tap = lens(rows, "graph")
    ways["lens, a new batch"], new_tap = lens(rows, "graph", anew=True)
    ways["lens, a replay of nobody's"], nobodys_tap = lens(rows, "graph", nobody=True)
    ways["lens, stream"], other_tap = lens(rows, "stream")
    ways["lens, event"], event_tap = lens(rows, "event")
    ways["deferred copy by torch"] = deferred_copy(rows)
    writer: Any = tap.writer
    timed: Any = TimedWriter(writer)

    def block(run: Callable[[], None]) -> float:
        took = []
        for _ in range(STEPS):
            began = time.perf_counter_ns()
            run()
            took.append((time.perf_counter_ns() - began) / 1e3)
        torch.cuda.synchronize()
        return statistics.median(took)

    def post_alone() -> float:
        tap.writer = timed
        timed.posts.clear()
        block(ways["lens"])
        tap.writer = writer
        return statistics.median(timed.posts)

    for run in ways.values():  # a batch is stated by now
        run()
    alone = "lens, the writer's post alone"
    ours: dict[str, list[float]] = {name: [] for name in (*ways, alone)}
    for round_ in range(CPU_ROUNDS + 3):
        for name in random.sample(list(ours), len(ours)):
            took = post_alone() if name == alone else block(ways[name])
            if round_ >= 3:
                ours[name].append(took)
    launches = ours.pop("nothing")
    for name in ways.keys() & ours.keys():
        ours[name] = [took - launch for took, launch in zip(ours[name], launches, strict=True)]
    bars = {"lens": "<= 2", "lens, a new batch": "<= 5"}
    all_published(tap, new_tap, nobodys_tap, other_tap, event_tap)
    for name, values in ours.items():
        bar = {"bar": bars[name]} if name in bars else {}
        show(f"decode graph, n = {rows}: {name}, CPU added", "µs a step", values, digits=2, **bar)


def measure_latency(way: str) -> None:
    """From the moment that a record's number can be seen here to the rows' being counted in another process."""
    tap = make_tap(64, way, f"gpu-latency-{way}")
    step = Step(64, tap)
    spans: Any = [(1, "a", 0, 64, 1, "decode")]
    replayed = graphs.ReplayRows(spans, 64)
    watch = Watch(Path(default_directory()), f"gpu-latency-{way}")
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    took, sleeps = [], []
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)  # as the reader's thread has it
    with subprocess.Popen([sys.executable, "-c", READER, way], env=env, **pipes) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdout.readline()
        for count in range(1, 3001):
            began = time.perf_counter_ns()
            time.sleep(POLL_SECONDS)
            sleeps.append((time.perf_counter_ns() - began) / 1e3)
            reader.stdin.write(f"{64 * count}\n")
            reader.stdin.flush()
            time.sleep(0.001)
            step.recorded.replay(step.graph.replay, replayed)
            watch.newest()
            published = time.monotonic_ns()
            seen = int(reader.stdout.readline())
            if count > 200:
                took.append((seen - published) / 1e3)
        reader.stdin.close()
    all_published(tap)
    show("what a sleep of 20 µs takes, by which the reader looks again", "µs", sleeps, digits=2)
    ordered = sorted(took)
    more = {"p99": round(ordered[len(ordered) * 99 // 100], 2), "max": round(ordered[-1], 2), "n": len(ordered)}
    bar = "median <= 50, p99 <= 1000"
    show(f"n = 64, {way}: published to counted in another process", "µs", took, digits=2, **more, bar=bar)
    tap.close()


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, numpy {np.__version__}", flush=True)
    for rows in (1, 64, 256):
        measure_stream(rows)
        measure_cpu(rows)
    measure_stream(8192)
    for way in ("graph", "stream", "event"):
        measure_latency(way)


if __name__ == "__main__":
    main()
