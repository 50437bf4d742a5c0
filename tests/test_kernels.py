"""The kernels that a CUDA graph publishes with: what they write, and where, and what they leave alone.

Triton's interpreter runs them on the CPU. That a GPU does the same, in order, the tests in tests/gpu show.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_records_are_laid_out_as_posted_and_nothing_else_is_written() -> None:
    script = Path(__file__).parent / "interpreted_kernels.py"
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 300
