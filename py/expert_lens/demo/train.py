"""Trains the demo model on a corpus folder, for a given time, and saves it as a Hugging Face checkpoint.

    python -m expert_lens.demo.train corpus/ --out model/ --minutes 6

The model is `Qwen3MoeForCausalLM` itself. Only its forward is written anew here (`loss_terms`): with experts this
small it is fastest to compute all of them in two wide matrix products and to weight the unchosen ones with zero.
That gives the same output, which `check_forward` asserts before the first step.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from expert_lens.demo.corpus import DOMAINS, read_documents

EOS, PAD = 256, 257
"""Ids of the two special tokens; ids below 256 are byte values."""
MUON_LR, ADAM_LR = 0.02, 3e-3
BALANCE, SPECIALISE = 0.01, 0.02
"""Weights of the two router losses (see `router_losses`)."""
NUM_HELD_OUT_WINDOWS = 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are the bytes of the text: byte-level BPE with no merges."""
    # The tokenizers library writes each byte as a visible character; the printable ones stand for themselves.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    alphabet = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def build_config() -> Qwen3MoeConfig:
    """8 layers of 16 experts, 2 a token: 7.97 million parameters, of which 2.5 million work on each byte."""
    return Qwen3MoeConfig(
        vocab_size=258,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        intermediate_size=512,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        router_aux_loss_coef=BALANCE,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


class Batches:
    """Draws windows of `length` + 1 tokens; a domain's share grows with the square root of its size."""

    def __init__(self, folder: Path, split: str, length: int, device: torch.device) -> None:
        streams = [token_stream(read_documents(folder, domain, split)) for domain in DOMAINS]
        self.sizes = torch.tensor([len(stream) for stream in streams], device=device)
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.tokens = torch.cat(streams).to(device)
        self.window = torch.arange(length + 1, device=device)

    def draw(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Random windows: tokens [num_rows, length + 1] and their domains [num_rows]."""
        domains = torch.multinomial(self.sizes.float().sqrt(), num_rows, replacement=True)
        room = (self.sizes[domains] - len(self.window)).float()
        offsets = self.starts[domains] + (torch.rand_like(room) * room).long()
        return self.tokens[offsets[:, None] + self.window].long(), domains

    def in_order(self, domain: int, num_rows: int) -> Tensor:
        """The domain's first windows, side by side: [at most num_rows, length + 1]."""
        length = len(self.window) - 1
        num_rows = min(num_rows, int(self.sizes[domain] - 1) // length)
        offsets = self.starts[domain] + torch.arange(num_rows, device=self.tokens.device) * length
        return self.tokens[offsets[:, None] + self.window].long()


def token_stream(documents: list[str]) -> Tensor:
    """Documents one after the other, each closed by `EOS`: int16 [tokens]."""
    pieces = [(*document.encode(), EOS) for document in documents]
    return torch.cat([torch.tensor(piece, dtype=torch.int16) for piece in pieces])


def moe(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A sparse block's output [rows, length, hidden], its router's probabilities and choices [rows, length, E]."""
    experts: Any = block.experts
    router: Any = block.gate
    probabilities = functional.linear(x, router.weight).float().softmax(-1)
    top, chosen = probabilities.topk(router.top_k, dim=-1)
    choices = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
    weights = probabilities * choices / top.sum(-1, keepdim=True)
    both = functional.linear(x, experts.gate_up_proj.flatten(0, 1))
    gate, up = both.view(*both.shape[:-1], router.num_experts, -1).chunk(2, -1)
    hidden = functional.silu(gate) * up * weights[..., None].to(gate.dtype)
    down = experts.down_proj.transpose(1, 2).flatten(0, 1)  # [E * intermediate, hidden]
    return hidden.flatten(-2) @ down.to(hidden.dtype), probabilities, choices


def router_losses(probabilities: Tensor, choices: Tensor, domain_rows: Tensor) -> tuple[Tensor, Tensor]:
    """(imbalance, specialisation) of one layer over the whole batch, which holds all domains.

    Imbalance is the Switch Transformer's loss, E · Σ_e f_e P_e (Fedus et al. 2021, equation 4; 1 when balanced).
    Specialisation is the mutual information of domain and expert in nats, under the router's mean probabilities.
    `domain_rows` [domains, rows] averages a batch's rows by domain.
    """
    num_experts = probabilities.shape[-1]
    mean = probabilities.mean((0, 1))
    load = choices.mean((0, 1)) / choices.sum(-1).mean()
    imbalance = num_experts * (load * mean).sum()
    by_domain = domain_rows @ probabilities.mean(1)  # [domains, E]
    share = (domain_rows > 0).float().sum(1, keepdim=True) / domain_rows.shape[1]
    overall = (share * by_domain).sum(0)
    information = share * by_domain * (by_domain.clamp_min(1e-9) / overall).log()
    return imbalance, information.sum()


def loss_terms(
    model: Qwen3MoeForCausalLM, tokens: Tensor, domain_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(cross entropy in nats, imbalance, specialisation, load [layers, domains, E]) of windows [rows, length + 1]."""
    inner: Any = model.model
    x = inner.embed_tokens(tokens[:, :-1])
    positions = torch.arange(x.shape[1], device=x.device)[None]
    rotary = inner.rotary_emb(x, positions)
    imbalance = specialisation = torch.zeros((), device=x.device)
    loads = []
    for layer in inner.layers:
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(x), position_embeddings=rotary, attention_mask=None
        )
        x = x + attended
        mixed, probabilities, choices = moe(layer.mlp, layer.post_attention_layernorm(x))
        x = x + mixed
        terms = router_losses(probabilities, choices, domain_rows)
        imbalance, specialisation = imbalance + terms[0], specialisation + terms[1]
        loads.append(domain_rows @ choices.mean(1))
    logits = model.lm_head(inner.norm(x)).float()
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, imbalance / len(loads), specialisation / len(loads), torch.stack(loads).detach()


def domain_averages(domains: Tensor) -> Tensor:
    """[domains, rows]: row-normalised membership, so that a product with it averages rows by domain."""
    member = functional.one_hot(domains, len(DOMAINS)).float().T
    return member / member.sum(1, keepdim=True).clamp_min(1)


def check_forward(model: Qwen3MoeForCausalLM, tokens: Tensor) -> None:
    """Asserts that this file's forward is the model's own."""
    model.eval()
    with torch.no_grad():
        expected = model(tokens[:, :-1]).logits
        expected = functional.cross_entropy(expected.flatten(0, 1).float(), tokens[:, 1:].flatten())
        ours = loss_terms(model, tokens, torch.ones(1, len(tokens), device=tokens.device) / len(tokens))[0]
    model.train()
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


class Muon:
    """Momentum whose update is made orthogonal (Jordan et al. 2024), for stacks of matrices [..., rows, columns]."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95, decay: float = 0.01) -> None:
        self.parameters, self.momentum, self.decay = parameters, momentum, decay
        self.averages = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which it clears."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            assert parameter.grad is not None
            average.lerp_(parameter.grad, 1 - self.momentum)
            update = orthogonal(parameter.grad.lerp(average, self.momentum))
            scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
            parameter.mul_(1 - lr * self.decay).add_(update.to(parameter.dtype), alpha=-lr * scale)
            parameter.grad = None


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly, by five Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT.bfloat16() if tall else matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def parameter_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(matrices for Muon, the rest for Adam: embeddings, norms, routers)."""
    named = list(model.named_parameters())
    is_matrix = [p.ndim >= 2 and "embed" not in name and ".gate.weight" not in name for name, p in named]
    muon = [p for (_, p), matrix in zip(named, is_matrix, strict=True) if matrix]
    return muon, [p for (_, p), matrix in zip(named, is_matrix, strict=True) if not matrix]


def schedule(progress: float) -> float:
    """Learning rate's factor at a share of the time: 2 % warm-up, then a cosine to zero."""
    return min(1.0, progress / 0.02) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def held_out_bits(
    terms: Any, model: Qwen3MoeForCausalLM, batches: Batches, num_rows: int
) -> Iterator[tuple[float, Tensor]]:
    """By domain: bits per byte, and the experts' load [layers, E], over the first held-out windows."""
    for domain in range(len(DOMAINS)):
        tokens = batches.in_order(domain, NUM_HELD_OUT_WINDOWS)
        losses, loads = [], []
        for rows in torch.split(tokens, num_rows):
            average = domain_averages(torch.full((len(rows),), domain, device=rows.device))
            with torch.no_grad(), torch.autocast(rows.device.type, torch.bfloat16):
                loss, _, _, load = terms(model, rows, average)
            losses.append(loss.item() * len(rows))
            loads.append(load[:, domain] * len(rows))
        yield sum(losses) / len(tokens) / math.log(2), torch.stack(loads).sum(0) / len(tokens) / 2


def mean_divergence(loads: list[Tensor]) -> float:
    """Mean Jensen-Shannon divergence in bits over layers and pairs of domains; loads are [layers, E] by domain."""

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.clamp_min(1e-12).log2()).sum(-1)

    pairs = [(a, b) for i, a in enumerate(loads) for b in loads[:i]]
    values = [entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2 for a, b in pairs]
    return torch.stack(values).mean().item()


def save(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Writes weights (bf16), configuration and tokenizer, as `from_pretrained` wants them.

    The head, which is the embedding's while it is trained, is written as its own: not every engine would tie it.
    """
    config = Qwen3MoeConfig(**{**model.config.to_dict(), "tie_word_embeddings": False})
    copy = Qwen3MoeForCausalLM(config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    copy.to(torch.bfloat16).save_pretrained(out)
    build_tokenizer().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    written = json.loads((out / "config.json").read_text())
    written["num_experts"] = written["num_local_experts"]  # the name that transformers 4 reads
    (out / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")


def evaluate(terms: Any, model: Qwen3MoeForCausalLM, batches: Batches, num_rows: int) -> None:
    """Prints the held-out figures."""
    results = list(held_out_bits(terms, model, batches, num_rows))
    line = " ".join(f"{domain} {bits:.3f}" for domain, (bits, _) in zip(DOMAINS, results, strict=True))
    mean = sum(bits for bits, _ in results) / len(results)
    divergence = mean_divergence([load for _, load in results])
    print(f"held out, bits per byte: {line} | mean {mean:.4f} | divergence {divergence:.3f} bits", flush=True)


def train(options: argparse.Namespace) -> None:
    """Trains until the time is over; a checkpoint is written at each evaluation."""
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = Batches(options.corpus, "train", options.length, device)
    held_out = Batches(options.corpus, "heldout", options.length, device)
    model = Qwen3MoeForCausalLM(build_config()).to(device)
    check_forward(model, batches.draw(2)[0][:, :129])
    terms = torch.compile(loss_terms, dynamic=False) if options.compile else loss_terms
    matrices, others = parameter_groups(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{num_parameters:,} parameters, {len(batches.tokens):,} tokens, {device}", flush=True)

    start = last_evaluation = time.monotonic()
    step = 0
    while (progress := (time.monotonic() - start) / (60 * options.minutes)) < 1:
        tokens, domains = batches.draw(options.rows)
        with torch.autocast(device.type, torch.bfloat16):
            loss, imbalance, specialisation, _ = terms(model, tokens, domain_averages(domains))
        (loss + BALANCE * imbalance - options.specialise * specialisation).backward()
        factor = schedule(progress)
        for group in adam.param_groups:
            group["lr"] = ADAM_LR * factor
        adam.step()
        adam.zero_grad()
        muon.step(MUON_LR * factor)
        step += 1
        if step == 1:  # the clock starts once everything is compiled
            evaluate(terms, model, held_out, options.rows)
            start = last_evaluation = time.monotonic()
        if step % options.log_every == 0:
            bits, rate = loss.item() / math.log(2), step * tokens[:, 1:].numel() / (time.monotonic() - start)
            print(
                f"step {step} {progress:.0%} {bits:.3f} bits, imbalance {imbalance.item():.3f}, "
                f"specialisation {specialisation.item():.3f} nats, {rate / 1e6:.3f} M tokens/s",
                flush=True,
            )
        if time.monotonic() - last_evaluation > 90:
            evaluate(terms, model, held_out, options.rows)
            save(model, options.out)
            last_evaluation = time.monotonic()
    evaluate(terms, model, held_out, options.rows)
    save(model, options.out)
    print(f"{step} steps, {step * options.rows * options.length / 1e6:.0f} M tokens", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder made by expert_lens.demo.corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--minutes", type=float, default=6.0, help="time to train, compiling left out")
    parser.add_argument("--rows", type=int, default=64, help="windows a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens a window")
    parser.add_argument("--specialise", type=float, default=SPECIALISE, help="weight of the specialisation term")
    parser.add_argument("--log-every", type=int, default=100, help="steps between progress lines")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
