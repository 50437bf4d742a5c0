"""Tests that need a CUDA device: `make test-gpu`, with the engine side alone installed."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support import Attach, attaching

HERE = Path(__file__).parent
NO_DEVICE = pytest.mark.skip(reason="no CUDA device here; `make test-gpu` on a machine with one runs this")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(NO_DEVICE)


@pytest.fixture(autouse=True)
def captures_directory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As everywhere, but on a tmpfs: pages of other files cannot be pinned for a device."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm"))
    monkeypatch.setenv("EXPERT_LENS_DIR", str(directory))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def unpinnable(tmp_path: Path) -> str:
    """A folder for captures on a disk, of which no device can be given a page."""
    if Path("/proc/mounts").read_text().count(f" {tmp_path.parts[1]} tmpfs "):
        pytest.skip("the folder of this test is a tmpfs")
    return str(tmp_path / "captures")


@pytest.fixture
def attach(captures_directory: Path) -> Iterator[Attach]:
    captures_directory.chmod(0o700)
    yield from attaching(captures_directory)
