"""Continuous batching in tests: what each packed forward held, and whether each request has its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import transformers
from transformers.generation.continuous_batching import input_outputs

from oracle import Oracle
from support import MISSING, Array, Capture


class Batches:
    """What each packed forward held, noted where the engine writes its tensors: [(request, tokens)]."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int, int]]] = []

    @contextmanager
    def watching(self) -> Iterator["Batches"]:
        original = input_outputs.ContinuousBatchingIOs.prepare_batch_tensors

        def prepare(io: Any, requests_in_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.batches.append(
                [(each.state.request_id, each.state.position_offset, each.query_length) for each in requests_in_batch]
            )
            return original(io, requests_in_batch, *args, **kwargs)

        input_outputs.ContinuousBatchingIOs.prepare_batch_tensors = prepare
        try:
            yield self
        finally:
            input_outputs.ContinuousBatchingIOs.prepare_batch_tensors = original

    def rows(self, truth: Oracle) -> dict[str, dict[int, Array]]:
        """Of each request, the experts by position; the last forward over a position counts."""
        result: dict[str, dict[int, Array]] = {}
        for batch, ids in zip(self.batches, truth.ids, strict=True):
            start = 0
            for request, position, length in batch:
                held = result.setdefault(request, {})
                held.update({position + i: ids[start + i] for i in range(length)})
                start += length
            assert start == len(ids)
        return result


def check_batches(capture: Capture, expected: dict[str, dict[int, Array]], results: dict[str, Any]) -> int:
    """Each request has exactly the rows that are expected of it, by position; gives how many ids were compared."""
    compared = 0
    assert capture.tap.error is None
    for request, result in results.items():
        rows = capture.rows(request)
        tokens = (result.prompt_ids + result.generated_tokens)[:-1]
        prompt = len(result.prompt_ids)
        assert len(rows["phases"]) == len(tokens)
        for position, phase in enumerate(rows["phases"]):
            if position not in expected[request]:
                assert phase == MISSING
                continue
            np.testing.assert_array_equal(rows["experts"][position], expected[request][position])
            compared += expected[request][position].size
            assert rows["token_ids"][position] == tokens[position]
            assert phase == (0 if position < prompt else 1)
        entry = capture.requests()[request]
        assert (entry["state"], entry["prompt_tokens"]) == ("finished", prompt)
    return compared


def small_batches(**changes: Any) -> Any:
    """A cache of 64 pages of 4 tokens; the default takes nearly all memory that there is."""
    config = transformers.ContinuousBatchingConfig
    page = "page_size" if hasattr(config(), "page_size") else "block_size"  # as it was called before
    return config(**{"num_blocks": 64, page: changes.pop("page", 4), **changes})


def generate_batch(model: Any, prompts: list[list[int]], **options: Any) -> Any:
    return model.generate_batch(prompts, **{"continuous_batching_config": small_batches(), **options})
