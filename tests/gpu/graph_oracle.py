"""The truth about continuous batching on a GPU, graphs included, taken another way than the engine side takes it.

The experts' *class* gets another forward, which clones the ids and weights it receives. Inside a capture the clone
becomes part of the graph; behind each step of the engine, what the clones hold is cloned again on the engine's stream.
Nothing waits, so that asynchronous batching stays asynchronous. Nothing here is imported from expert_lens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.generation.continuous_batching.model_runner import ModelRunner

from batches import Batches
from oracle import experts_modules
from support import Array


class GraphOracle:
    """What every routed layer received in each step while the block ran."""

    def __init__(self, model: Any) -> None:
        self._modules = experts_modules(model)
        self._batches = Batches()
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        """A layer's ids and weights, one layer behind the other."""
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._of_graph: dict[Any, list[Any]] = {}
        self._captured: Any = None
        self._replayed: Any = None
        self.num_replays = 0

    @contextmanager
    def watching(self) -> Iterator["GraphOracle"]:
        experts, graphs = type(self._modules[0]), torch.cuda.CUDAGraph
        forward, compute = experts.forward, ModelRunner.compute_batch
        begin, replay = graphs.capture_begin, graphs.replay
        known = {id(module) for module in self._modules}

        def watched_forward(module: Any, hidden_states: Any, ids: Any, weights: Any) -> Any:
            if id(module) in known:
                self._seen.append((ids.detach().clone(), weights.detach().clone()))
            return forward(module, hidden_states, ids, weights)

        def watched_begin(graph: Any, *args: Any, **kwargs: Any) -> Any:
            self._captured = graph
            return begin(graph, *args, **kwargs)

        def watched_replay(graph: Any) -> None:
            self._replayed = graph
            self.num_replays += 1
            replay(graph)

        def watched_compute(runner: Any, model: Any, batch_data: Any) -> None:
            self._seen, self._captured, self._replayed = [], None, None
            compute(runner, model, batch_data)
            count = len(self._modules)
            if self._captured is not None:
                self._of_graph[self._captured] = self._seen[count:]
                assert len(self._seen) == 2 * count
            seen = self._seen[:count] if self._replayed is None else self._of_graph[self._replayed]
            ids, weights = zip(*seen, strict=True)
            with torch.cuda.stream(runner.inputs_and_outputs.compute_stream):
                self._steps.append((torch.stack(ids, 1), torch.stack(weights, 1)))

        experts.forward = watched_forward
        graphs.capture_begin, graphs.replay = watched_begin, watched_replay  # type: ignore[method-assign]
        ModelRunner.compute_batch = watched_compute
        try:
            with self._batches.watching():
                yield self
        finally:
            experts.forward, ModelRunner.compute_batch = forward, compute
            graphs.capture_begin, graphs.replay = begin, replay  # type: ignore[method-assign]

    def rows(self) -> dict[str, dict[int, Array]]:
        """Of each request, the experts by position."""
        return self._by_position([ids for ids, _ in self._steps])

    def weights(self) -> dict[str, dict[int, Array]]:
        """Of each request, the weights by position, as f16."""
        return self._by_position([weights.to(torch.float16) for _, weights in self._steps])

    def _by_position(self, steps: list[torch.Tensor]) -> dict[str, dict[int, Array]]:
        torch.cuda.synchronize()
        result: dict[str, dict[int, Array]] = {}
        for batch, step in zip(self._batches.batches, steps, strict=True):
            rows, start = step.cpu().numpy(), 0
            for request, position, length in batch:
                held = result.setdefault(request, {})
                held.update({position + i: rows[start + i] for i in range(length)})
                start += length
        return result
