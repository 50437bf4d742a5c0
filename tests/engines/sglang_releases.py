"""Releases of SGLang, installed beside this environment, to run real engines on the CPU.

A release asks for its own torch and for much that only a GPU has a use for. Here torch is this environment's, and in
place of `sgl_kernel`, of which the package registry has no build for a CPU, there is a module of functions that fail.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from sglang_sources import FOLDER

HERE = Path(__file__).parent
NEEDS = (
    "aiohttp", "apache-tvm-ffi", "compressed-tensors", "dill", "einops", "fastapi", "gguf", "loguru", "msgspec",
    "openai", "orjson", "partial-json-parser", "pybase64", "python-multipart", "sentencepiece", "setproctitle",
    "soundfile", "torchvision", "transformers", "uvicorn", "uvloop", "xgrammar",
)  # fmt: skip
"""What an engine and a server import: in versions that the release asks for, else in those of constraints.txt."""
OF_TRANSFORMERS = {"huggingface-hub", "tokenizers"}
"""What its versions have in versions of their own."""


def environment(version: str, *, ranks: int = 1) -> dict[str, str]:
    """Variables for a process that starts this release, as so many ranks."""
    cores = sorted(os.sched_getaffinity(0))
    several = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))}
    return {
        "PYTHONPATH": str(_installed(version)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SGLANG_NCCL_SO_PATH": "/there/is/none",  # torch brings one, which wants a GPU
        **(several if ranks > 1 else {}),
    }


@cache
def _installed(version: str) -> Path:
    folder = FOLDER / f"cpu-{version}-python3.{sys.version_info.minor}"
    if folder.exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    _install(part, "--no-deps", f"sglang=={version}")
    asked = _asked(part)
    constraints = (HERE.parents[1] / "constraints.txt").read_text().splitlines()
    (part / "constraints.txt").write_text(
        "\n".join(line for line in constraints if line.partition("==")[0] not in OF_TRANSFORMERS | asked.keys())
    )
    (part / "overrides.txt").write_text('torch; sys_platform == "never"\n')
    files = ("--constraint", str(part / "constraints.txt"), "--override", str(part / "overrides.txt"))
    compiled = "--compile-bytecode"  # once, and not in each of an engine's processes
    _install(part, compiled, *files, *(name + asked.get(name, "") for name in NEEDS))
    (part / "sgl_kernel").mkdir()
    for module in ("__init__", "kvcacheio"):
        shutil.copy(HERE / "no_sgl_kernel.py", part / "sgl_kernel" / f"{module}.py")
    part.rename(folder)
    return folder


def _asked(folder: Path) -> dict[str, str]:
    """The versions that the release in this folder asks for, by the names of packages."""
    [metadata] = folder.glob("sglang-*.dist-info/METADATA")
    found = re.findall(r"^Requires-Dist: ([\w.-]+)([<>=!~][^;\s]*)$", metadata.read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): versions for name, versions in found}


def _install(folder: Path, *what: str) -> None:
    command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--target", str(folder)]
    done = subprocess.run([*command, *what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
