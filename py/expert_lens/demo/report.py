"""Measures the demo model on the held-out documents and writes the figures into `README.md`.

    python -m expert_lens.demo.report corpus/

It also draws `prompts.json`, the package's held-out prompts, from the corpus folder.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from expert_lens import demo
from expert_lens.demo.corpus import DOMAINS, read_documents

FOLDER = Path(__file__).parent
MAX_DOCUMENTS = 64
MAX_BYTES = 1024
"""Bytes read of each held-out document, from its beginning."""
NUM_PROMPTS = 6
PROMPT_CHARS, CONTINUATION_CHARS = 110, 240
SAMPLE_BYTES = 240
STYLES: dict[str, dict[str, Any]] = {
    "Greedy": {"do_sample": False},
    "Temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
}
ANCHORS = {
    "python": r"^def \w",
    "c": r"^(?:static |int |void )",
    "html": r"(?<=</p>)<(?:p|div|pre|dl|ul)\b",
    "scripture": r"^And ",
}
"""Where a prompt begins, by domain; elsewhere at the document's beginning."""


def choose_prompts(documents: list[str], anchor: str) -> list[tuple[str, str]]:
    """(prompt, continuation) from documents spread over the list, the prompt ending at a word's end."""
    pairs: list[tuple[str, str]] = []
    for document in documents[:: max(1, len(documents) // (3 * NUM_PROMPTS))]:
        start = re.search(anchor, document, re.M)
        text = document[start.start() :] if start else ""
        prompt = re.match(rf"(?s).{{{PROMPT_CHARS}}}\S*", text)
        if prompt is None or len(prompt[0].encode()) > 250 or len(text) < PROMPT_CHARS + CONTINUATION_CHARS:
            continue
        pairs.append((prompt[0], text[prompt.end() :][:CONTINUATION_CHARS]))
    return pairs[:NUM_PROMPTS]


@contextmanager
def expert_counts(model: Any) -> Iterator[NDArray[np.int64]]:
    """Counts each expert's tokens while the context is open: an array [layers, experts] that fills up."""
    layers = model.model.layers
    counts = np.zeros((len(layers), model.config.num_experts), np.int64)

    def hook(index: int) -> Any:
        def add(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            counts[index] += np.bincount(inputs[1].flatten().numpy(), minlength=counts.shape[1])

        return add

    handles = [layer.mlp.experts.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def held_out(model: Any, tokenizer: Any, documents: list[str]) -> tuple[float, int, NDArray[np.float64]]:
    """(bits per byte, bytes predicted, the experts' shares of the tokens [layers, experts]) over documents."""
    nats, num_bytes = 0.0, 0
    with expert_counts(model) as counts, torch.no_grad():
        for document in documents[:MAX_DOCUMENTS]:
            ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=MAX_BYTES).input_ids
            logits = model(ids[:, :-1]).logits
            nats += torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:], reduction="sum").item()
            num_bytes += ids.shape[1] - 1
    return nats / num_bytes / math.log(2), num_bytes, counts / counts.sum(1, keepdims=True)


def unigram_bits(documents: list[str]) -> float:
    """Entropy in bits of a byte of the same text: no guess that ignores the context does better."""
    counts = np.array(list(Counter(b"".join(d.encode()[:MAX_BYTES] for d in documents[:MAX_DOCUMENTS])).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in bits between distributions along the last axis, between 0 and 1.

    JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 with H the entropy in bits (Lin 1991, "Divergence Measures Based
    on the Shannon Entropy", equation 4.1 with equal weights).
    """

    def entropy(r: NDArray[np.float64]) -> NDArray[np.float64]:
        logs = np.log2(r, where=r > 0, out=np.zeros_like(r))
        result: NDArray[np.float64] = -(r * logs).sum(-1)
        return result

    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def figures(model: Any, tokenizer: Any, corpus: Path) -> str:
    """The tables of held-out loss, of divergence by pair and by layer, and of each domain's chief experts."""
    losses, shares = [], {}
    for domain in DOMAINS:
        documents = read_documents(corpus, domain, "heldout")
        bits, num_bytes, shares[domain] = held_out(model, tokenizer, documents)
        num_documents = min(MAX_DOCUMENTS, len(documents))
        losses.append([domain, f"{bits:.2f}", f"{unigram_bits(documents):.2f}", str(num_documents), f"{num_bytes:,}"])
    mean = sum(float(row[1]) for row in losses) / len(losses)
    pairs = {(a, b): divergence(shares[a], shares[b]) for a in DOMAINS for b in DOMAINS}
    by_layer = np.mean([pairs[a, b] for i, a in enumerate(DOMAINS) for b in DOMAINS[:i]], axis=0)
    matrix = [[a, *(f"{pairs[a, b].mean():.2f}" if a != b else "" for b in DOMAINS)] for a in DOMAINS]
    chief = [[d, *(f"{s.argmax()} ({s.max():.0%})" for s in shares[d])] for d in DOMAINS]
    layers = [str(i) for i in range(len(by_layer))]
    return "\n\n".join(
        [
            "Held-out loss in bits per byte (a uniform guess costs 8; *unigram* is the entropy of the same bytes "
            f"without context). Mean of the domains: **{mean:.2f}**.",
            table(["domain", "model", "unigram", "documents", "bytes"], losses),
            "Jensen-Shannon divergence in bits between the loads of two domains, averaged over the layers (0: the "
            f"same experts; 1: none in common). Mean of all pairs: **{by_layer.mean():.2f}**.",
            table(["", *DOMAINS], matrix),
            "The same by layer, averaged over all pairs:",
            table(["layer", *layers], [["divergence", *(f"{x:.2f}" for x in by_layer)]]),
            "The busiest expert of each domain in each layer, and its share of the load (uniform: 6 %):",
            table(["layer", *layers], chief),
        ]
    )


def samples(model: Any, tokenizer: Any) -> str:
    """For the first prompt of each domain, what the model writes: greedily, and sampled at temperature 0.7."""
    torch.manual_seed(0)
    sections = []
    for domain, texts in demo.prompts().items():
        inputs = tokenizer(texts[0], return_tensors="pt")
        parts = [f"### {domain}", _fenced(texts[0])]
        for title, options in STYLES.items():
            out = model.generate(**inputs, max_new_tokens=SAMPLE_BYTES, **options)
            new = tokenizer.decode(out[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            parts += [f"{title}:", _fenced(new)]
        sections.append("\n\n".join(parts))
    return "\n\n".join(sections)


def _fenced(text: str) -> str:
    return "```text\n" + text.strip("\n") + "\n```"


def sources(corpus: Path) -> str:
    """The table of packages behind each domain."""
    rows = []
    for line in json.loads((corpus / "manifest.json").read_text()):
        documents = line["documents"]["train"] + line["documents"]["heldout"]
        size = f"{line['bytes'] / 1e6:.1f}"
        rows.append([line["domain"], line["package"], line["version"], line["licence"], str(documents), size])
    return table(["domain", "Debian package", "version", "licence", "documents", "MB"], rows)


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers `<!-- name -->` and `<!-- /name -->`."""
    page = path.read_text(encoding="utf-8")
    before, rest = page.split(f"<!-- {name} -->", 1)
    _, after = rest.split(f"<!-- /{name} -->", 1)
    path.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder made by expert_lens.demo.corpus")
    corpus = parser.parse_args().corpus
    chosen = {d: choose_prompts(read_documents(corpus, d, "heldout"), ANCHORS.get(d, r"\A")) for d in DOMAINS}
    (FOLDER / "prompts.json").write_text(json.dumps(chosen, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    model, tokenizer = demo.load()
    readme = FOLDER / "README.md"
    write_between(readme, "sources", sources(corpus))
    write_between(readme, "figures", figures(model, tokenizer, corpus))
    write_between(readme, "samples", samples(model, tokenizer))


if __name__ == "__main__":
    main()
