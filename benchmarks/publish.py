"""What one publish costs the engine's thread: `python benchmarks/publish.py`.

The tap joins 48 layers' top-k ids, and the writer narrows and copies them into the arena: for a step that goes on with
the batch before (`decoding`, what nearly all steps are), and for one whose rows have to be stated (`a new batch`).
Beside them, what a recorder written by hand does: a copy to the host for each layer. And what it takes to state whose
rows they are anew, as when a request has ended.
"""

import itertools
import random
import time
from collections.abc import Callable

import numpy as np
import torch
from figures import show

from expert_lens._core import Writer
from expert_lens.steps import DecodeRun, Rows, Step
from expert_lens.tap import Tap

LAYERS, EXPERTS, TOP_K = 48, 128, 8
ROUNDS = 3000


def main() -> None:
    torch.set_num_threads(1)
    for rows in (1, 64):
        measure(rows)
    for requests in (1, 64, 256):
        measure_batch(requests)


def measure(rows: int) -> None:
    facts = {"layers": list(range(LAYERS)), "num_experts": EXPERTS, "top_k": TOP_K}
    writer = Writer(f"publish-{rows}", **facts)
    tap = Tap(writer, **facts)
    ids = [torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(rows)]) for _ in range(LAYERS)]
    spans = [(row + 1, f"r{row}", row, 1, 1, "decode") for row in range(rows)]
    positions = np.zeros(rows, np.uint32)
    tokens = np.zeros(rows, np.uint32)

    run = DecodeRun(spans, positions, None)
    column = torch.zeros((rows, 1), dtype=torch.int64)

    def hand_over() -> Step:
        tap.begin()
        for slot, layer in enumerate(ids):
            tap.layer(slot, layer)
        step = tap.end()
        assert step is not None
        return step

    def decoding() -> None:
        tap.publish_next(hand_over(), rows, column, run)

    def new_batch() -> None:
        tap.publish(*tap.pack(hand_over(), rows), Rows(spans, positions, column))

    packed = np.zeros((rows, LAYERS, TOP_K), np.uint8)

    def writer_alone() -> None:
        writer.publish(packed, tokens, positions)

    def by_hand() -> None:
        [layer.cpu().clone() for layer in ids]

    ways: dict[str, Callable[[], None]] = {
        "tap and writer, decoding": decoding,
        "tap and writer, a new batch": new_batch,
        "writer alone": writer_alone,
        "a clone a layer": by_hand,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        for _ in range(200):
            way()
    for _ in range(ROUNDS):
        for name in random.sample(list(ways), len(ways)):
            if name == "tap and writer, decoding":
                decoding()  # another way came between: only the second step follows one of its own run
            began = time.perf_counter_ns()
            ways[name]()
            times[name].append((time.perf_counter_ns() - began) / 1e3)
    tap.close()
    for name, values in times.items():
        bar = {"bar": "<= 15"} if name.startswith("tap") else {}
        show(f"publish [{rows}, 48, 8]: {name}", "µs", values, digits=2, **bar)


def measure_batch(requests: int) -> None:
    writer = Writer(f"batch-{requests}", layers=list(range(LAYERS)), num_experts=EXPERTS, top_k=TOP_K)
    batches = itertools.cycle(
        [(row + first, f"{row + first:032x}", row, 1, 1024, "decode") for row in range(requests)] for first in (1, 2)
    )
    times = []
    for spans in itertools.islice(batches, ROUNDS):
        began = time.perf_counter_ns()
        writer.set_batch(spans)
        times.append((time.perf_counter_ns() - began) / 1e3)
    writer.close()
    show(f"a batch of {requests} requests stated anew, by the writer", "µs", times, digits=2)


if __name__ == "__main__":
    main()
