"""What every test gets: captures in a folder of its own."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("batches", "sglang_runs")  # whose assertions are to say what they saw


@pytest.fixture(autouse=True)
def captures_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that captures go to during this test, in child processes too."""
    directory = tmp_path / "captures"
    monkeypatch.setenv("EXPERT_LENS_DIR", str(directory))
    return directory
