"""Pipeline stages, each published by a writer of its own, in one lens."""

from pathlib import Path

import numpy as np
import pytest

import expert_lens
from expert_lens._core import Writer
from expert_lens.errors import MissingRowsError, OptionError


def stage(rank: int, layers: list[int]) -> Writer:
    return Writer("staged", rank=rank, other_stages=1, layers=layers, num_experts=8, top_k=2)


def test_a_lens_joins_the_layers_of_all_stages(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 8, (5, 3, 2), dtype=np.uint8)
    positions, spans = np.arange(5, dtype=np.uint32), [(1, "a", 0, 5, 5, "prefill")]
    first = stage(0, [0, 4])
    with pytest.raises(OptionError, match="1 of 2 pipeline stages so far"):
        expert_lens.attach("staged")
    second = stage(1, [7])
    with expert_lens.attach("staged") as lens:
        assert lens.facts["layers"] == [0, 4, 7]
        first.set_batch(spans)
        first.publish(np.ascontiguousarray(rows[:, :2]), None, positions)
        with pytest.raises(MissingRowsError):
            lens.routed_experts("a")
        second.set_batch(spans)
        second.publish(np.ascontiguousarray(rows[:, 2:]), None, positions)
        np.testing.assert_array_equal(lens.routed_experts("a"), rows)
        counts = [[np.count_nonzero(rows[:, layer] == expert) for expert in range(8)] for layer in range(3)]
        np.testing.assert_array_equal(lens.counts(), counts)
        assert (lens.stats["tokens"], lens.stats["arenas"]) == (5, 2)
        lens.to_parquet(tmp_path / "run")
        exported = expert_lens.scan(tmp_path / "run").sort("position").collect()["experts"].to_numpy()
        np.testing.assert_array_equal(exported, rows)
        recording = lens.record(tmp_path / "recorded")
        first.close()
        second.close()
        assert recording.wait(20)
    recorded = expert_lens.scan(tmp_path / "recorded").sort("position").collect()
    np.testing.assert_array_equal(recorded["experts"].to_numpy(), rows)
    assert recorded["request"].cast(str).to_list() == ["a"] * 5
