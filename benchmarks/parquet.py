"""Tokens a second and bytes a token of Parquet, [48, 8] of 128 experts: `python benchmarks/parquet.py`.

The ids are uniform, which no compression helps: 7 bits each, 336 bytes a token, is the least that any file can take.
Beside it, what a recorder written by hand does: torch.save of the same rows, as int32.
"""

import io
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import torch

import expert_lens
from expert_lens import trace
from expert_lens.types import ModelFacts

LAYERS, EXPERTS, TOP_K = 48, 128, 8
TOKENS, REQUEST_TOKENS = 1 << 17, 512
ROUNDS = 7


def main() -> None:
    facts: ModelFacts = {
        "capture": "benchmark",
        "layers": list(range(LAYERS)),
        "num_experts": EXPERTS,
        "top_k": TOP_K,
        "weights": False,
        "engine": "none",
        "engine_version": "0",
        "model": "none",
    }
    generator = np.random.default_rng(0)
    experts = generator.integers(0, EXPERTS, (TOKENS, LAYERS, TOP_K), np.uint8)
    columns: trace.Columns = {
        "positions": np.arange(TOKENS, dtype=np.uint32) % REQUEST_TOKENS,
        "token_ids": generator.integers(0, 100_000, TOKENS).astype(np.uint32),
        "phases": np.ones(TOKENS, np.uint8),
        "steps": np.arange(TOKENS, dtype=np.uint64),
        "times": 1_700_000_000_000_000_000 + 5_000_000 * np.arange(TOKENS, dtype=np.int64),
        "experts": experts,
        "weights": None,
    }
    requests = pl.Series([f"0.{i}" for i in range(TOKENS // REQUEST_TOKENS)]).gather(
        np.arange(TOKENS) // REQUEST_TOKENS
    )
    folder = Path(tempfile.mkdtemp())

    def write() -> int:
        rows = trace.frame(facts, requests, columns)
        rows.insert_column(0, pl.repeat("benchmark/0", TOKENS, eager=True).alias("source"))
        return trace.write_part(folder, "part", rows, "benchmark", facts).stat().st_size

    def scan() -> int:
        assert len(expert_lens.scan(folder).collect()) == TOKENS
        return (folder / "part.parquet").stat().st_size

    def by_hand() -> int:
        torch.save(torch.from_numpy(experts.astype(np.int32)), file := io.BytesIO())
        return len(file.getvalue())

    ways: dict[str, Callable[[], int]] = {"write a part": write, "scan it": scan, "torch.save of int32": by_hand}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    sizes = {name: way() / TOKENS for name, way in ways.items()}
    for _ in range(ROUNDS):
        for name in random.sample(list(ways), len(ways)):
            began = time.perf_counter()
            ways[name]()
            rates[name].append(TOKENS / (time.perf_counter() - began))
    shutil.rmtree(folder)
    for name, values in rates.items():
        low, median, high = (round(value) for value in statistics.quantiles(values, n=4))
        line = {"name": name, "unit": "tokens/s", "median": median, "spread": [low, high]}
        print(json.dumps(line | ({"bar": ">= 200000"} if name == "write a part" else {})), flush=True)
    for name in ("write a part", "torch.save of int32"):
        line = {"name": f"{name}: size", "unit": "bytes/token", "median": round(sizes[name], 1)}
        print(json.dumps(line | ({"bar": "<= 384"} if name == "write a part" else {})), flush=True)


if __name__ == "__main__":
    main()
