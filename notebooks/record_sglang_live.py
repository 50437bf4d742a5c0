"""Record what `sglang_live.ipynb` plays where there is no GPU: `python notebooks/record_sglang_live.py FOLDER`.

Runs the demo model in SGLang, with CUDA graphs and overlap on, under a load of texts of its eleven domains. FOLDER gets
the arena as it stands in the end, for which nothing is needed but what the engine needs; anywhere else,

    EXPERT_LENS_DIR=FOLDER expert-lens record sglang-live notebooks/traces/sglang_live

makes Parquet of it.
"""

import random
import shutil
import sys
import time
from pathlib import Path

import expert_lens
from expert_lens import _core, demo

NAME, WAVES, PAUSE = "sglang-live", 30, 0.3


def main(folder: Path) -> None:
    """Start the engine, give it one wave of requests after the other, and keep the arena."""
    expert_lens.enable(NAME, arena="12MiB")
    import sglang

    engine = sglang.Engine(
        model_path=str(demo.MODEL_PATH),
        served_model_name="byte-moe",
        skip_tokenizer_init=True,
        attention_backend="triton",
        sampling_backend="pytorch",
        grammar_backend="none",
        moe_runner_backend="triton",
        disable_prefill_cuda_graph=True,
        disable_flashinfer_autotune=True,
        mem_fraction_static=0.3,
        max_total_tokens=60_000,
        random_seed=1,
    )
    rng = random.Random(1)
    texts = [(domain, text) for domain, some in demo.prompts().items() for text in some]
    number = 0
    for _ in range(WAVES):
        wave = rng.sample(texts, rng.choice([1, 2, 4, 8]))
        rids = [f"{domain}-{number + i}" for i, (domain, _) in enumerate(wave)]
        number += len(wave)
        chosen = {"max_new_tokens": 160, "temperature": 0.8}
        engine.generate(input_ids=[list(text.encode()) for _, text in wave], sampling_params=chosen, rid=rids)
        time.sleep(PAUSE)
    with expert_lens.attach(engine) as lens:
        print(f"{lens.stats['tokens']} tokens of {number} requests, published by {lens.stats['publisher']}")
    arena = Path(_core.default_directory()) / NAME / "0.arena"
    target = folder / NAME / arena.name
    for parent in (folder, target.parent):
        parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(arena, target)
    target.chmod(0o600)
    engine.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
