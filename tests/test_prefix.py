"""Rows of a request's beginning that the engine had in its cache, from the writer to a lens."""

import numpy as np
import pytest

import expert_lens
from expert_lens._core import NO_SLOT, Collector, RowStream, Writer
from expert_lens.errors import MissingRowsError, OptionError

EXPERTS = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2) % 8


def make_writer(**options: int) -> Writer:
    """Of an engine that has computed four tokens of request a, into slots 5, 3, 9 and 6 if it has some."""
    writer = Writer("cached", layers=[0, 1], num_experts=8, top_k=2, engine="test", arena_bytes=1 << 20, **options)
    writer.set_batch([(1, "a", 0, 4, 4, "prefill")])
    slots = np.array([5, 3, 9, 6], np.uint32) if options else None
    writer.publish(EXPERTS, np.arange(4, dtype=np.uint32) + 50, np.arange(4, dtype=np.uint32), kv_slots=slots)
    return writer


def go_on(writer: Writer) -> None:
    """Request b has a's first tokens in the cache, one that nobody saw computed, and computes its fourth."""
    assert writer.publish_prefix([(2, "b", 0, 3, 9, "prefill")], np.array([5, 3, 7], np.uint32))
    writer.set_batch([(2, "b", 0, 1, 9, "prefill")])
    writer.publish(EXPERTS[3:], np.array([77], np.uint32), np.array([3], np.uint32), kv_slots=np.array([8], np.uint32))


def test_rows_from_the_cache_are_those_that_were_computed() -> None:
    writer = make_writer(kv_slots=16)
    with expert_lens.attach("cached") as lens:
        go_on(writer)
        table = lens.requests()
        assert table["request"].to_list() == ["a", "b"]
        assert table["missing"].to_list() == [0, 1]
        assert lens.routed_experts("b", fill=255).tolist() == [
            *EXPERTS[:2].tolist(), np.full((2, 2), 255).tolist(), EXPERTS[3].tolist(),
        ]  # fmt: skip
        with pytest.raises(MissingRowsError, match="2"):
            lens.routed_experts("b")
        assert lens.frame("b")["token_id"].to_list() == [50, 51, None, 77]
        assert int(lens.counts().sum()) == 5 * 4, "each token is counted once, when it was computed"
        assert lens.stats["unslotted_tokens"] == 0
    writer.close()


def test_a_recorder_gets_rows_from_the_cache_too() -> None:
    writer = make_writer(kv_slots=16)
    stream = RowStream("cached")
    go_on(writer)
    block = stream.take(7, 5.0)
    assert [block["ids"][request] for request in block["requests"]] == ["a"] * 4 + ["b"] * 3
    assert block["positions"].tolist() == [0, 1, 2, 3, 0, 1, 3]
    assert block["kv_slots"].tolist() == [5, 3, 9, 6, 5, 3, 8]
    np.testing.assert_array_equal(block["experts"], EXPERTS[[0, 1, 2, 3, 0, 1, 3]])
    writer.close()
    stream.close()


def test_after_a_gap_nothing_in_the_cache_is_sure() -> None:
    writer = make_writer(kv_slots=16)
    collector = Collector("cached")
    writer.drop_step(2)
    go_on(writer)
    assert collector.sync()
    assert collector.requests()["missing"] == [0, 3]
    assert collector.stats()["dropped_tokens"] == 2
    writer.close()
    collector.close()


def test_an_engine_that_tells_no_slots() -> None:
    writer = make_writer()
    stream = RowStream("cached")
    assert stream.take(4, 5.0)["kv_slots"].tolist() == [NO_SLOT] * 4
    writer.close()
    stream.close()


@pytest.mark.parametrize(
    ("options", "slots", "words"),
    [
        ({}, [1, 2, 3], "made for an engine without"),
        ({"kv_slots": 16}, [1, 2], "2 KV slots, and 3 rows need 3"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(options: dict[str, int], slots: list[int], words: str) -> None:
    writer = make_writer(**options)
    with pytest.raises(OptionError, match=words):
        writer.publish_prefix([(2, "b", 0, 3, 9, "prefill")], np.array(slots, np.uint32))
    with pytest.raises(TypeError, match="kv_slots is an array"):
        writer.publish_prefix([(2, "b", 0, 3, 9, "prefill")], 77)
    writer.close()
