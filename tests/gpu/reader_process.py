"""Starts `reading.py`, and hears what it found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from children import hear

READING = Path(__file__).parent / "reading.py"


def start_reader(capture: str, num_experts: int = 128, rows_a_block: int = 8192) -> subprocess.Popen[str]:
    reader = subprocess.Popen(
        [sys.executable, str(READING), capture, str(num_experts), str(rows_a_block)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert hear(reader) == "ready"
    return reader


def report(reader: subprocess.Popen[str]) -> dict[str, Any]:
    with reader:
        found: dict[str, Any] = json.loads(hear(reader))
    return found
