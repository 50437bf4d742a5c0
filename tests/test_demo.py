"""The demo model: what is shipped loads offline, has learnt its domains, and routes them differently."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_lens import demo

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DOMAINS = [
    "english",
    "scripture",
    "french",
    "german",
    "spanish",
    "russian",
    "python",
    "c",
    "json",
    "table",
    "html",
]


@pytest.fixture(scope="module")
def loaded():
    return demo.load()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(demo.MODEL_PATH)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@contextmanager
def expert_counts(model) -> Iterator[np.ndarray]:
    counts = np.zeros((len(model.model.layers), model.config.num_experts))

    def hook(layer):
        def add(_module, inputs):
            counts[layer] += np.bincount(inputs[1].flatten().numpy(), minlength=counts.shape[1])

        return add

    handles = [m.mlp.experts.register_forward_pre_hook(hook(i)) for i, m in enumerate(model.model.layers)]
    yield counts
    for handle in handles:
        handle.remove()


def bits_per_byte(model, tokenizer, pairs) -> float:
    nats, num_bytes = 0.0, 0
    for prompt, continuation in pairs:
        ids = tokenizer(prompt + continuation, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits
        nats += torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        num_bytes += ids.shape[1] - 1
    return nats / num_bytes / math.log(2)


def unigram_bits(pairs) -> float:
    counts = np.array(list(Counter("".join(map("".join, pairs)).encode()).values()))
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def mean_divergence(model, tokenizer) -> float:
    """Mean Jensen-Shannon divergence in bits of the expert loads, over layers and pairs of domains."""
    shares = []
    for pairs in demo.passages().values():
        with expert_counts(model) as counts, torch.no_grad():
            for prompt, continuation in pairs:
                model(**tokenizer(prompt + continuation, return_tensors="pt"))
        shares.append(counts / counts.sum(1, keepdims=True))

    def entropy(p):
        return -(p * np.log2(np.maximum(p, 1e-12))).sum(-1)

    values = [entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 for p, q in combinations(shares, 2)]
    return float(np.mean(values))


def test_importing_the_demo_loads_neither_torch_nor_transformers():
    code = "import sys, expert_lens.demo; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'expert_lens\[transformers\]'"):
        demo.load()


def test_loads_without_a_network():
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from expert_lens import demo\n"
        "demo.load()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_size_and_shape(loaded):
    model, _ = loaded
    assert 6e6 <= model.num_parameters() <= 10e6
    assert sum(path.stat().st_size for path in demo.MODEL_PATH.iterdir()) <= 16 * 2**20
    config = model.config
    assert (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok) == (8, 16, 2)
    assert all(hasattr(layer.mlp, "experts") for layer in model.model.layers)


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_tokenizer_gives_back_any_text(text):
    tokenizer = cached_tokenizer()
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


@cache
def cached_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.MODEL_PATH)


def test_special_tokens(loaded):
    model, tokenizer = loaded
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (256, 257)


def test_prompts_are_short_and_of_every_domain():
    prompts = demo.prompts()
    assert list(prompts) == DOMAINS
    for texts in prompts.values():
        assert len(texts) >= 5
        assert all(60 <= len(text) <= 250 for text in texts)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_costs_less_than_half_of_its_unigram_entropy(loaded, domain):
    pairs = demo.passages()[domain]
    assert bits_per_byte(*loaded, pairs) < 0.5 * unigram_bits(pairs)


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_it_writes_resembles_its_own_domain_most(loaded, domain):
    model, tokenizer = loaded
    inputs = tokenizer(demo.prompts()[domain], return_tensors="pt", padding=True)
    outputs = model.generate(**inputs, max_length=None, max_new_tokens=60, do_sample=False)
    written = tokenizer.batch_decode(outputs[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    known = {name: trigrams(map("".join, pairs)) for name, pairs in demo.passages().items()}
    likeness = {name: cosine(trigrams(written), counts) for name, counts in known.items()}
    assert max(likeness, key=likeness.__getitem__) == domain, (likeness, written)


def trigrams(texts) -> Counter[str]:
    return Counter(text[i : i + 3] for text in texts for i in range(len(text) - 2))


def cosine(a: Counter[str], b: Counter[str]) -> float:
    product = sum(count * b[key] for key, count in a.items())
    return product / math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))


def test_generation_is_deterministic(loaded):
    model, tokenizer = loaded
    inputs = tokenizer(demo.prompts()["french"][0], return_tensors="pt")
    first, second = (model.generate(**inputs, max_length=None, max_new_tokens=30) for _ in range(2))
    assert torch.equal(first, second)


def test_domains_use_different_experts(loaded, untrained):
    model, tokenizer = loaded
    trained, random = mean_divergence(model, tokenizer), mean_divergence(untrained, tokenizer)
    assert trained > 0.42  # measured: 0.49
    assert random < 0.36  # measured: 0.31, from the bytes alone, which differ by domain


def test_every_expert_is_used(loaded):
    model, tokenizer = loaded
    with expert_counts(model) as counts, torch.no_grad():
        for texts in demo.prompts().values():
            for text in texts:
                model(**tokenizer(text, return_tensors="pt"))
    assert (counts > 0).all()


def test_the_head_is_there_for_engines_that_do_not_tie_it(loaded, tmp_path: Path) -> None:
    from expert_lens.demo import train

    model, _ = loaded
    assert not model.config.tie_word_embeddings
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is not embedding
    assert torch.equal(head, embedding)
    tied = transformers.Qwen3MoeForCausalLM(train.build_config())
    train.save(tied, tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert not saved.config.tie_word_embeddings
    written = saved.state_dict()
    assert all(torch.equal(written[name], value.to(torch.bfloat16)) for name, value in tied.state_dict().items())
