"""Runs the kernels of `expert_lens.kernels` in Triton's interpreter, on the CPU, against rows that numpy lays out.

A process of its own, with TRITON_INTERPRET=1: Triton decides when it is imported. Prints how many records it compared.
"""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from expert_lens import graphs, kernels

ENTRIES = 8
PAYLOAD, SEQUENCE, FREE = 100, 3, -1
TYPES = [torch.int64, torch.int32]
WEIGHT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


arenas_at_release: list[Any] = []


def store_plainly(address: Any, value: Any) -> None:
    """The interpreter knows no assembly; and what it stores, others see in order. Keeps what they see behind this."""
    tl.store(address.to(tl.pointer_type(tl.int64)), value)
    if address.handle.data.item() != Graph.current.taken.ctypes.data:
        arenas_at_release.append(Graph.current.arena.copy())


kernels.__dict__["_store_release"] = store_plainly


def words(array: Any) -> Any:
    """The array's bytes as words, the last one filled up with zeros."""
    data = np.ascontiguousarray(array).tobytes()
    return np.frombuffer(data + bytes(-len(data) % 8), np.int64)


class Graph:
    """What a captured graph of one shape holds, with the memory that its kernels know."""

    current: "Graph"
    """The one that is being replayed."""

    def __init__(self, rng: random.Random) -> None:
        self.num_experts = rng.choice([8, 256, 257, 60000])
        self.layers, self.top_k = rng.choice([(3, 2), (1, 1), (5, 3), (4, 8)])
        self.max_rows = rng.choice([1, 2, 7, 40, 300])
        self.entries = np.zeros((ENTRIES, 8), np.int64)
        self.state = np.zeros(16, np.int64)
        self.taken = np.zeros(1, np.int64)
        self.arena = np.zeros(PAYLOAD + 4 * self.max_rows * self.layers * self.top_k + 2000, np.int64)
        stride = self.top_k + rng.choice([0, 1])
        kind = rng.choice(TYPES)
        self.ids = [torch.zeros((self.max_rows, stride), dtype=kind)[:, : self.top_k] for _ in range(self.layers)]
        weight_kind = rng.choice(WEIGHT_TYPES)
        self.weights = [torch.zeros((self.max_rows, self.top_k), dtype=weight_kind) for _ in range(self.layers)]
        if rng.random() < 0.5:
            self.weights = []
        self.table = np.array([one.data_ptr() for one in (*self.ids, *self.weights)], np.int64)
        self.token_ids, self.positions, self.kv_slots = (
            rng.choice([None, torch.zeros(self.max_rows, dtype=rng.choice(TYPES))]) for _ in range(3)
        )

    def fill(self, rng: random.Random) -> None:
        """Other values, in every tensor that the graph reads."""
        for one in self.ids:
            one.copy_(torch.tensor([[rng.randrange(self.num_experts) for _ in row] for row in one]))
        for one in self.weights:
            one.copy_(torch.rand(one.shape))
        for column in (self.token_ids, self.positions, self.kv_slots):
            if column is not None:
                column.copy_(torch.tensor([rng.randrange(1 << 31) for _ in column]))

    def replay(self) -> None:
        Graph.current = self
        state, table = self.state.ctypes.data, self.table.ctypes.data
        kernels.take_post[(1,)](self.entries.ctypes.data, state, self.taken.ctypes.data, ENTRIES)
        assert self.taken[0] == self.state[0], "told as soon as the post is taken"
        columns = graphs._Columns(self.token_ids, self.positions, self.kv_slots)
        inputs = graphs._Inputs(self.max_rows, self.ids, self.weights, columns)
        tap: Any = SimpleNamespace(num_experts=self.num_experts, top_k=self.top_k)
        mailbox: Any = SimpleNamespace(state=state, table=table)
        graphs._publish(tap, inputs, mailbox)

    def expected(self, rows: int) -> list[Any]:
        """The words of each section in order; None for positions that the CPU writes: their place, untouched."""
        narrow = np.uint8 if self.num_experts <= 256 else np.uint16
        sections: list[Any] = [words(torch.stack([one[:rows] for one in self.ids], 1).numpy().astype(narrow))]

        def column(values: torch.Tensor | None) -> Any:
            return None if values is None else words(values[:rows].numpy().astype(np.uint32))

        if self.token_ids is not None:
            sections.append(column(self.token_ids))
        place = np.full((rows + 1) // 2, FREE, np.int64)
        sections.append(place if self.positions is None else column(self.positions))
        if self.kv_slots is not None:
            sections.append(column(self.kv_slots))
        if self.weights:
            sections.append(words(torch.stack([one[:rows] for one in self.weights], 1).to(torch.float16).numpy()))
        return sections


def main() -> None:
    rng = random.Random(5)
    compared = 0
    for _ in range(40):
        graph = Graph(rng)
        for replay in range(1, 2 * ENTRIES):
            graph.fill(rng)
            graph.arena[:] = FREE
            posted = rng.random() < 0.7
            rows = rng.choice([1, graph.max_rows, max(1, graph.max_rows - 3)])
            if posted:
                base = graph.arena.ctypes.data
                post = [replay, rows, base + PAYLOAD * 8, base + SEQUENCE * 8, 1000 + replay, 0, 0, 0]
                graph.entries[replay % ENTRIES] = post
            arenas_at_release.clear()
            graph.replay()
            assert graph.taken[0] == replay
            assert len(arenas_at_release) == posted
            wanted = np.full(len(graph.arena), FREE, np.int64)
            if posted:
                wanted[SEQUENCE] = 1000 + replay
                payload = np.concatenate(graph.expected(rows))
                wanted[PAYLOAD : PAYLOAD + len(payload)] = payload
                compared += 1
            for arena in (graph.arena, *arenas_at_release):
                np.testing.assert_array_equal(arena, wanted)
    print(compared)


if __name__ == "__main__":
    main()
