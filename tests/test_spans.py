"""The spans of a batch, as Python states them."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from expert_lens._core import Writer
from expert_lens.errors import OptionError


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer("spans", layers=[0], num_experts=8, top_k=2)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("spans", "error", "says"),
    [
        ([(1, "a", 0, 1, 1)], ValueError, "a span of 5 values, and it has 6"),
        ([[1, "a", 0, 1, 1, "decode"]], TypeError, "'list' object is not an instance of 'tuple'"),
        ([(1, 2, 0, 1, 1, "decode")], TypeError, "'int' object is not an instance of 'str'"),
        ([(1, "a", -1, 1, 1, "decode")], OverflowError, "out of range"),
        ([(1, "a", 0, 1.5, 1, "decode")], TypeError, "'float' object"),
        ([(1, "a", 0, 1, 1, "dec")], OptionError, "phase is 'dec'; it is 'prefill' or 'decode'"),
        (
            [(1, "a", 0, 2, 1, "decode"), (2, "b", 1, 1, 1, "decode")],
            OptionError,
            "before row 2 where the last one ends",
        ),
    ],
)
def test_what_is_no_span_is_refused_and_the_batch_before_stays(
    writer: Writer, spans: Any, error: type[Exception], says: str
) -> None:
    writer.set_batch(((1, "a", 0, 2, 1, "decode"),))  # any sequence will do
    with pytest.raises(error, match=re.escape(says)):
        writer.set_batch(spans)
    with pytest.raises(OptionError, match="the batch's spans end at row 2, and the step has 1"):
        writer.publish(np.zeros((1, 1, 2), np.uint8), None, np.zeros(1, np.uint32))
