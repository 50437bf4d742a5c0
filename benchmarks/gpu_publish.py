"""What one publish costs when a GPU publishes: `python benchmarks/gpu_publish.py`.

48 layers' top-k ids [n, 8] stand on the GPU, as a decode step or a prefill leaves them. `lens`: the tap joins and
narrows them, and the GPU publishes them with their token ids; `event`: the same by the fallback. Peers: SGLang's
deferred copy (`peers.DeferredCopy`), and a hook a layer with `.cpu()`. Of the lens: `handing over`: each layer's ids to
the tap, and nothing else; `torch's part`: the joining and narrowing alone; `the writer's part`: the call that has the
stream copy and publish.
CPU: time on the engine's thread, in blocks of 20 steps. GPU: time that the stream takes, from events around such blocks
that are launched behind something long, so that only the device's time counts; the peers wait for the device, so of
them it is what a step takes. Ways take turns in a new order each round.
"""

import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from figures import show
from peers import DeferredCopy

from expert_lens._core import Writer
from expert_lens.steps import DecodeRun, Step
from expert_lens.tap import Tap

LAYERS, EXPERTS, TOP_K = 48, 128, 8
STEPS, ROUNDS = 20, 60
NUMBERS = itertools.count()
FACTS: dict[str, Any] = {"layers": list(range(LAYERS)), "num_experts": EXPERTS, "top_k": TOP_K}


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for rows in (1, 64, 256, 8192):
        measure(rows)


def tap_of(way: str, rows: int) -> Tap:
    os.environ["EXPERT_LENS_PUBLISHER"] = way
    return Tap(Writer(f"gpu-{way}-{rows}-{next(NUMBERS)}", **FACTS), **FACTS)


def measure(rows: int) -> None:
    ids = [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)]).cuda() for _ in range(LAYERS)]
    column = torch.zeros((rows, 1), dtype=torch.int64, device="cuda")
    spans = [(row + 1, f"r{row}", row, 1, 1, "decode") for row in range(rows)]

    def lens(way: str) -> Callable[[], None]:
        tap, run = tap_of(way, rows), DecodeRun(spans, np.zeros(rows, np.uint32), None)

        def step() -> None:
            tap.begin()
            for slot, layer in enumerate(ids):
                tap.layer(slot, layer)
            held = tap.end()
            assert held is not None
            tap.publish_next(held, rows, column, run)

        step()  # pins the arena
        return step

    copy = DeferredCopy(rows, LAYERS, TOP_K)

    def deferred_copy() -> None:
        for slot, layer in enumerate(ids):
            copy.keep(slot, layer)
        copy.defer(rows)

    def hooks() -> None:
        [layer.cpu() for layer in ids]

    packer = tap_of("stream", rows)

    def handing_over() -> None:
        packer.begin()
        for slot, layer in enumerate(ids):
            packer.layer(slot, layer)
        packer.end()

    packed, narrow = torch.zeros((rows, LAYERS, TOP_K), dtype=torch.uint8, device="cuda"), column.to(torch.int32)
    experts, tokens, stream = packed.data_ptr(), narrow.data_ptr(), torch.cuda.current_stream().cuda_stream
    positions = np.zeros(rows, np.uint32)

    def writers_part() -> None:
        packer.writer.publish_device(experts, rows, positions, device=0, stream=stream, token_ids=tokens)

    def torchs_part() -> None:
        held = Step(LAYERS)
        held.experts = list(ids)
        packer.pack(held, rows)
        column.reshape(-1).to(torch.int32, copy=True)

    ways: dict[str, Callable[[], None]] = {
        "lens": lens("stream"),
        "lens, event": lens("event"),
        "lens, handing over": handing_over,
        "lens, torch's part": torchs_part,
        "lens, the writer's part": writers_part,
        "deferred copy by torch": deferred_copy,
        "hooks with .cpu()": hooks,
    }
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    gpu: dict[str, list[float]] = {name: [] for name in ways}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def block(step: Callable[[], None], ahead: int) -> tuple[float, float]:
        """Microseconds a step: on this thread, and on the stream, behind so many cycles of something else."""
        torch.cuda.synchronize()
        torch.cuda._sleep(ahead)
        begin.record()
        began = time.perf_counter_ns()
        for _ in range(STEPS):
            step()
        took = (time.perf_counter_ns() - began) / 1e3 / STEPS
        end.record()
        end.synchronize()
        return took, begin.elapsed_time(end) * 1e3 / STEPS

    for round_ in range(ROUNDS + 3):
        for name in random.sample(list(ways), len(ways)):
            on_thread, on_stream = block(ways[name], 0)[0], block(ways[name], 20_000_000)[1]
            if round_ >= 3:
                cpu[name].append(on_thread)
                gpu[name].append(on_stream)
    for name in ways:
        bar = {"bar": "<= 15"} if name == "lens" and rows == 1 else {}
        show(f"[{rows}, 48, 8], {name}: CPU", "µs a step", cpu[name], digits=2, **bar)
        show(f"[{rows}, 48, 8], {name}: GPU", "µs a step", gpu[name], digits=2)


if __name__ == "__main__":
    main()
