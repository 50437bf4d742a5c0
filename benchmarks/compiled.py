"""`generate` with a static cache, whose steps are compiled, with and without the lens: `python benchmarks/compiled.py`.

On a GPU, where transformers compiles them into CUDA graphs, or else on one core. The demo model; each way in a process
of its own, as models that share their code share what torch.compile has given up on; two of them without anything,
which tells how much the figures scatter by themselves. They take turns: every round each generates once, in a new
order, and a figure is the throughput relative to the round's one without anything.
"""

import random
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
import transformers
from figures import show
from generate import hooks_with_cpu, lens, nothing

from expert_lens import demo

TOKENS, WARM_UPS, ROUNDS = 128, 3, 15
BATCHES = (1, 8)
WAYS = {"nothing": nothing, "nothing, again": nothing, "lens": lens, "hooks with .cpu()": hooks_with_cpu}


def seconds(model: Any, inputs: Any) -> float:
    """Of one generate call, which waits for its last token."""
    compiling = transformers.CompileConfig()
    if model.device.type == "cpu":
        compiling.mode, compiling._compile_all_devices = "default", True
    tokens = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    began = time.perf_counter()
    model.generate(**inputs, **tokens, cache_implementation="static", compile_config=compiling)
    return time.perf_counter() - began


def take_turns(way: str) -> None:
    """Generate with as many sequences as each line asks for, and answer how many seconds it took."""
    torch.set_num_threads(1)
    model, tokenizer = demo.load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    texts = [text for texts in demo.prompts().values() for text in texts]
    with WAYS[way](model):
        for line in sys.stdin:
            inputs = tokenizer(texts[: int(line)], return_tensors="pt", padding=True).to(model.device)
            print(seconds(model, inputs), flush=True)


class Process:
    """One way, which answers when asked."""

    def __init__(self, way: str) -> None:
        self.way = way
        command = [sys.executable, __file__, way]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, batch: int) -> None:
        """Have it generate once."""
        assert self.process.stdin is not None
        print(batch, file=self.process.stdin, flush=True)

    def answer(self) -> float:
        """How many seconds that took, once it is done."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return float(line) if line else sys.exit(f"{self.way!r} failed, as its log above tells")

    def generate(self, batch: int) -> float:
        """Generate once, while the others wait: how many seconds it took."""
        self.ask(batch)
        return self.answer()

    def end(self) -> None:
        """Wait for its end, which must be a good one."""
        self.process.communicate()
        assert self.process.returncode == 0, self.way


def main() -> None:
    if torch.cuda.is_available():
        print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    with ExitStack() as stack:
        processes = {way: Process(way) for way in WAYS}
        for process in processes.values():
            stack.callback(process.end)
        for batch in BATCHES:
            for _ in range(WARM_UPS):  # all at once: they compile
                for process in processes.values():
                    process.ask(batch)
                for process in processes.values():
                    process.answer()
            rounds = []
            for _ in range(ROUNDS):
                order = random.sample(list(WAYS), len(WAYS))
                rounds.append({way: processes[way].generate(batch) for way in order})
            name = f"8 layers, batch {batch}"
            show(f"{name}: a step without anything", "ms", [one["nothing"] / TOKENS * 1e3 for one in rounds])
            for way in list(WAYS)[1:]:
                show(f"{name}: {way} : nothing", "throughput ratio", [one["nothing"] / one[way] for one in rounds])


if __name__ == "__main__":
    take_turns(sys.argv[1]) if len(sys.argv) > 1 else main()
