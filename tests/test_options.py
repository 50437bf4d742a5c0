import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_lens.errors import OptionError
from expert_lens.options import (
    check_capture_name,
    check_count,
    check_flag,
    check_folder_path,
    check_seconds,
    parse_bytes,
)


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
    "size", [0, -1, True, 1.5, None, "", "lots", "1 parsec", "-1GiB", "0", "1GiB2", "0.4", "9" * 400, 2**70]
)
def test_what_is_no_size_is_refused_by_name(size: Any) -> None:
    with pytest.raises(OptionError, match="memory is "):
        parse_bytes("memory", size)


@given(st.text())
def test_any_text_is_a_size_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(OptionError):
        assert parse_bytes("memory", text) > 0


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "9", None, 2**70])
def test_what_is_no_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(OptionError, match=r"history is .*; give rows, at least 1"):
        check_count("history", value, "rows")


@pytest.mark.parametrize("value", [-1, True, float("nan"), float("inf"), "1", None])
def test_what_is_no_time_is_refused_by_name(value: Any) -> None:
    with pytest.raises(OptionError, match="wait_timeout is "):
        check_seconds("wait_timeout", value)


@pytest.mark.parametrize("value", [0, 1, "x", None])
def test_what_is_no_flag_is_refused_by_name(value: Any) -> None:
    with pytest.raises(OptionError, match="lossless is "):
        check_flag("lossless", value)


@pytest.mark.parametrize("value", ["", 5, b"run", "a\0b", None])
def test_what_is_no_path_is_refused_by_name(value: Any) -> None:
    with pytest.raises(OptionError, match="folder is "):
        check_folder_path("folder", value)


@pytest.mark.parametrize("value", ["", "a/b", "../a", ".a", "a" * 65, "é", "\ud800", "a\n", 5, None])
def test_what_cannot_name_a_capture(value: Any) -> None:
    with pytest.raises(OptionError, match="cannot name a capture"):
        check_capture_name(value)


def test_what_can_be_used_is_given_back(tmp_path: Path) -> None:
    assert (check_count("n", np.int64(3), "rows"), check_count("n", 2**62, "rows")) == (3, 2**62)
    assert (check_seconds("t", 0), check_flag("f", False), check_capture_name("a-1_b.c")) == (0.0, False, "a-1_b.c")
    assert check_folder_path("folder", tmp_path) == str(tmp_path)
