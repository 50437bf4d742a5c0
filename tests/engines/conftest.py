"""Fixtures of the engines' tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_models
from support import Attach, attaching


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    yield from attaching(tmp_path)


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen3_moe()
