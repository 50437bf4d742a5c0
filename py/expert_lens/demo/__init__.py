"""A small mixture-of-experts model that has really learnt something, shipped with the package.

    from expert_lens import demo

    model, tokenizer = demo.load()
    text = demo.prompts()["french"][0]

8 layers of 16 experts, 2 a token, over bytes: eleven domains (five languages, the Bible, Python, C, JSON, tables,
HTML) that use different experts. Nothing is fetched. `README.md` in this folder says what it was trained on, how,
and how well it does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["MODEL_PATH", "load", "passages", "prompts"]

MODEL_PATH = Path(__file__).parent / "byte-moe"
"""The checkpoint's folder, for engines that load a model by its path."""


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The demo model, in evaluation mode on `device`, and its tokenizer; offline.

    `dtype` None means float32 on the CPU, where that is faster, and the checkpoint's own bfloat16 elsewhere. The
    tokenizer's ids are the UTF-8 bytes of the text; 256 ends a document and 257 pads (on the left).
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(
            "expert_lens.demo.load needs torch and transformers: pip install 'expert_lens[transformers]'"
        ) from error
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    shows_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype, local_files_only=True)
    finally:
        if shows_progress:
            logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH, local_files_only=True)
    return model.to(device).eval(), tokenizer


def prompts() -> dict[str, list[str]]:
    """Short texts by domain, from documents that training never saw: {"english": [...], "python": [...], ...}."""
    return {domain: [prompt for prompt, _ in pairs] for domain, pairs in passages().items()}


def passages() -> dict[str, list[tuple[str, str]]]:
    """The prompts with the text that follows each in its document: {domain: [(prompt, continuation), ...]}."""
    text = (Path(__file__).parent / "prompts.json").read_text(encoding="utf-8")
    return {domain: [(prompt, rest) for prompt, rest in pairs] for domain, pairs in json.loads(text).items()}
