"""Run every benchmark and write what they print to docs/performance.md: `python benchmarks/run.py [NAME ...]`.

A benchmark prints one JSON object a figure: name, unit, median, spread (quartiles), and, where the project promises
one, a bar; what else is in it is shown as it is. Names choose single benchmarks; their part of the page alone is made
anew. Those named gpu_... need a CUDA device, and are run only when named. `gpu_sglang.py` and `gpu_collectives.py` are
none of them, as they need SGLang: what the page has of them are several runs, with options of their own.
"""

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
CARGO = ["cargo", "run", "--quiet", "--release", "-p", "expert-lens-arena", "--example"]
BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "handoff": ("Handoff and collector", [*CARGO, "handoff"]),
    "publish": ("What a publish costs the engine's thread", [sys.executable, "benchmarks/publish.py"]),
    "generate": ("transformers `generate`", [sys.executable, "benchmarks/generate.py"]),
    "compiled": ("transformers `generate`, compiled", [sys.executable, "benchmarks/compiled.py"]),
    "parquet": ("Parquet", [sys.executable, "benchmarks/parquet.py"]),
    "heatmap": ("The heatmap in JupyterLab", [sys.executable, "benchmarks/heatmap.py"]),
    "gpu_graphs": ("On a GPU: decode steps in CUDA graphs", [sys.executable, "benchmarks/gpu_graphs.py"]),
    "gpu_batching": ("On a GPU: `generate_batch` and prefill", [sys.executable, "benchmarks/gpu_batching.py"]),
    "gpu_publish": ("On a GPU: what an eager publish costs", [sys.executable, "benchmarks/gpu_publish.py"]),
    "gpu_generate": ("On a GPU: `generate`", [sys.executable, "benchmarks/gpu_generate.py"]),
    "gpu_compiled": ("On a GPU: compiled `generate`", [sys.executable, "benchmarks/compiled.py"]),
}
SHOWN = ("name", "unit", "median", "spread", "bar")


def machine() -> str:
    """Processor, cores, memory and system of this machine."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    cores = len(os.sched_getaffinity(0))
    name = model[1] if model else platform.machine()
    return f"{name}, {cores} cores, {round(pages * size / 2**30)} GiB, {platform.system()} {platform.release()}"


def table(figures: list[dict[str, object]]) -> str:
    """A Markdown table, one figure a row."""
    lines = ["| what | median | quartiles | unit | bar |", "| --- | ---: | ---: | --- | --- |"]
    for figure in figures:
        spread = figure.get("spread")
        quartiles = " … ".join(map(str, spread)) if isinstance(spread, list) else ""
        more = ", ".join(f"{key} {value}" for key, value in figure.items() if key not in SHOWN)
        name = f"{figure['name']} ({more})" if more else figure["name"]
        lines.append(f"| {name} | {figure['median']} | {quartiles} | {figure['unit']} | {figure.get('bar', '')} |")
    return "\n".join(lines)


def measure(name: str) -> str:
    """The part of the page that one benchmark makes."""
    title, command = BENCHMARKS[name]
    print(f"== {name}", flush=True)
    figures, device = [], ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("{"):
                figures.append(json.loads(line))
            elif line.startswith("# "):
                device = f"{line[2:].strip()}; "
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    run = " ".join("python" if part == sys.executable else part for part in command)
    when = f"{datetime.date.today():%Y-%m-%d}"
    return f"## {title}\n\n{device}{machine()}; {when}; `{run}`\n\n{table(figures)}\n"


def main() -> None:
    names = sys.argv[1:] or [name for name in BENCHMARKS if not name.startswith("gpu_")]
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    page = PAGE.read_text(encoding="utf-8")
    for name in names:
        part = f"<!-- {name} -->\n{measure(name)}<!-- /{name} -->"
        page = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, part=part: part, page, flags=re.DOTALL)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
