"""Releases of SGLang, installed beside this environment, to run real engines on the CPU.

A release asks for its own torch and for much that only a GPU has a use for. Here torch is this environment's, and in
place of `sgl_kernel`, which is nowhere to be had for a CPU, there is a module of functions that fail when called.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from sglang_sources import FOLDER, download

HERE = Path(__file__).parent
NEEDS = (
    "aiohttp", "apache-tvm-ffi", "compressed-tensors", "dill", "einops", "fastapi", "gguf", "loguru", "msgspec",
    "openai", "orjson", "partial-json-parser", "pybase64", "sentencepiece", "setproctitle", "torchvision",
    "transformers", "uvicorn", "uvloop", "xgrammar",
)  # fmt: skip
"""What an engine imports; in the version that the release asks for, if it asks for one."""
OWN_VERSIONS = {"apache-tvm-ffi", "huggingface-hub", "openai", "tokenizers", "transformers", "xgrammar"}
"""What releases have in versions of their own, or what these bring with them."""


def environment(version: str | None, *, ranks: int = 1) -> dict[str, str]:
    """Variables for a process that starts this release, as so many ranks; None: the newest one."""
    cores = sorted(os.sched_getaffinity(0))
    several = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))}
    return {
        "PYTHONPATH": str(_installed(version)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_NCCL_SO_PATH": "/there/is/none",  # torch brings one, which wants a GPU
        **(several if ranks > 1 else {}),
    }


def _installed(version: str | None) -> Path:
    version = version or download(None).version
    folder = FOLDER / f"cpu-{version}-python{sys.version_info.minor}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    _install(part, "--no-deps", f"sglang=={version}")
    [metadata] = part.glob("sglang-*.dist-info/METADATA")
    pins = dict(re.findall(r"^Requires-Dist: ([\w-]+)==([\w.]+)$", metadata.read_text(), re.MULTILINE))
    constraints = (HERE.parents[1] / "constraints.txt").read_text().splitlines()
    (FOLDER / "constraints.txt").write_text(
        "\n".join(line for line in constraints if line.partition("==")[0] not in OWN_VERSIONS)
    )
    (FOLDER / "overrides.txt").write_text('torch; sys_platform == "never"\n')
    files = ("--constraint", str(FOLDER / "constraints.txt"), "--override", str(FOLDER / "overrides.txt"))
    _install(part, *files, *(f"{name}=={pins[name]}" if name in pins else name for name in NEEDS))
    (part / "sgl_kernel").mkdir()
    for module in ("__init__", "kvcacheio"):
        shutil.copy(HERE / "no_sgl_kernel.py", part / "sgl_kernel" / f"{module}.py")
    part.rename(folder)
    return folder


def _install(folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--target", str(folder)]
    done = subprocess.run([*command, *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
