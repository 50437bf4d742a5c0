"""Fixtures of the engines' tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from support import Attach, Capture


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    captures: list[Capture] = []

    def make(model: Any, **options: Any) -> Capture:
        captures.append(Capture(model, tmp_path, **options))
        return captures[-1]

    yield make
    for capture in captures:
        capture.close()


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen3_moe()
