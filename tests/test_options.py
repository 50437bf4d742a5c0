import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_lens.errors import OptionError
from expert_lens.options import parse_bytes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        ("17", 17),
        ("64 B", 64),
        ("1KiB", 1024),
        ("1kb", 1000),
        ("1.5 MiB", 1572864),
        ("2GB", 2 * 10**9),
        (" 1GiB ", 2**30),
    ],
)
def test_sizes_in_the_words_of_users(size: int | str, expected: int) -> None:
    assert parse_bytes("memory", size) == expected


@pytest.mark.parametrize(
    "size", [0, -1, True, 1.5, None, "", "lots", "1 parsec", "-1GiB", "0", "1GiB2", "0.4", "9" * 400]
)
def test_what_is_no_size_is_refused_by_name(size: Any) -> None:
    with pytest.raises(OptionError, match="memory is "):
        parse_bytes("memory", size)


@given(st.text())
def test_any_text_is_a_size_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(OptionError):
        assert parse_bytes("memory", text) > 0
