"""The live heatmap in JupyterLab, 94 layers by 384 experts, while a cell keeps the kernel busy.

`python benchmarks/heatmap.py`: frames a second that the browser draws, and the time that the kernel spends on them
(the pushing thread, and ipykernel's thread that sends for it), as a part of one core. Needs Chromium.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "browser"))

from laboratory import CHROMIUM_FLAGS, Lab, Notebook, find_chromium, running_lab

ROUNDS = 9
SECONDS = 4.0

SETUP = """
import json, threading, time
from expert_lens import demo
from expert_lens.widgets import Heatmap
from sources import Replay

model, tokenizer = demo.load()
inputs = tokenizer(demo.prompts()["english"][0], return_tensors="pt")

def spent():
    names = {thread.name: thread.ident for thread in threading.enumerate()}
    clocks = [time.pthread_getcpuclockid(names[name]) for name in ("expert-lens-heatmap", "IOPub")]
    return [time.monotonic(), *map(time.clock_gettime, clocks)]

def during(work, seconds):
    before = spent()
    while time.monotonic() < before[0] + seconds:
        work()
    wall, pushing, sending = (after - began for after, began in zip(spent(), before))
    print(json.dumps({"pushing": pushing / wall, "sending": sending / wall}))

works = {
    "generate": lambda: model.generate(**inputs, max_new_tokens=16, min_new_tokens=16),
    "sleep": lambda: time.sleep(0.1),
    "pure Python": lambda: sum(range(100_000)),
}
replay = Replay(94, 384)
"""

DRAWN = """async (milliseconds) => {
    const canvas = document.querySelector(".xl-map canvas");
    const [began, drawn] = [performance.now(), Number(canvas.dataset.drawn ?? 0)];
    await new Promise(resolve => setTimeout(resolve, milliseconds));
    return 1000 * (Number(canvas.dataset.drawn) - drawn) / (performance.now() - began);
}"""


def measure(notebook: Notebook, cell: int) -> tuple[float, float, float]:
    """Frames a second and the parts of a core of both threads, over one run of a cell."""
    notebook.run(cell, wait=False)
    notebook.page.wait_for_timeout(500)
    frames = float(notebook.page.evaluate(DRAWN, 1000 * (SECONDS - 1)))
    while notebook.runs(cell):
        notebook.page.wait_for_timeout(50)
    spent = json.loads(notebook.output(cell))
    return frames, spent["pushing"], spent["sending"]


def report(name: str, unit: str, values: list[float], **more: object) -> None:
    """One line for people, and one for the runner."""
    low, median, high = statistics.quantiles(values, n=4)
    print(f"{name:<56} {median:8.2f} {unit:<10} ({low:.2f} … {high:.2f})")
    spread = [round(low, 2), round(high, 2)]
    print(json.dumps({"name": name, "unit": unit, "median": round(median, 2), "spread": spread, **more}))


def run(lab: Lab) -> None:
    works = ("generate", "sleep", "pure Python")
    cells = [SETUP, *(f"during(works[{work!r}], {SECONDS})" for work in works), "heatmap = Heatmap(replay)\nheatmap"]
    # The map comes last, so that it is in view whichever cell runs.
    notebook = lab.open(lab.write(cells), height=1200)
    notebook.run(0)
    notebook.run(len(cells) - 1)
    notebook.page.wait_for_selector(".xl-map canvas[data-drawn]")
    values: dict[str, list[tuple[float, float, float]]] = {work: [] for work in works}
    for _ in range(ROUNDS):
        for cell, work in enumerate(works, 1):
            values[work].append(measure(notebook, cell))
    for work, rounds in values.items():
        frames = [frames for frames, _, _ in rounds]
        bars = ("at least 30", "at most 3") if work == "generate" else (None, None)
        load = [100 * (pushing + sending) for _, pushing, sending in rounds]
        for name, unit, figures, bar in (
            (f"frames drawn of 94 x 384 while a cell runs {work}", "frames/s", frames, bars[0]),
            (f"kernel time of the frames while a cell runs {work}", "% of a core", load, bars[1]),
        ):
            report(name, unit, figures, **({"bar": bar} if bar else {}))


def main() -> None:
    base = Path(tempfile.mkdtemp(prefix="expert-lens-benchmark-"))
    root = base / "notebooks"
    root.mkdir()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CHROMIUM_FLAGS)
        with running_lab(base, root) as (url, token):
            run(Lab(url, token, root, browser))
        browser.close()


if __name__ == "__main__":
    main()
