"""transformers `generate` on a GPU, with and without the lens: `python benchmarks/gpu_generate.py`.

Random Qwen3-MoEs of 24 layers, alike, in eager mode, one for each way; two of them without anything, which tells how
much the figures scatter by themselves. They decode at once, each in a thread of its own, and take turns, a step each,
in a new order each round: what else the machine does then befalls them alike. A step is what `generate` takes from one
token to the next, which waits for the GPU; figures are of each round, relative to the step without anything in it.

And, since these steps scatter by far more than the lens can take: how much of a step this thread runs code of the lens,
clocks included.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from figures import show
from peers import DeferredCopy

from expert_lens._core import Collector
from expert_lens.engines import transformers as engine
from expert_lens.engines.transformers import attachment, generate
from expert_lens.engines.transformers.patch import StandIn

STEPS, SKIPPED, CLOCKED_STEPS = 200, 20, 100
BATCHES, PROMPT, TOP_K = (1, 64), 32, 8
NAME = f"bench-{os.getpid()}"


def make_model() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        intermediate_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts=64,
        num_experts_per_tok=TOP_K,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(1)
    with torch.device("cuda"):
        return transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


@contextmanager
def lens(model: Any) -> Iterator[None]:
    """Every row published by the GPU, collected, counted and kept by request."""
    tap = engine.attach(model, NAME)
    collector = Collector(NAME, prompt=False)
    try:
        yield
    finally:
        tap.close()
        collector.close()
        assert tap.error is None


@contextmanager
def hooks_with_cpu(model: Any) -> Iterator[None]:
    """A hook on each experts module that copies the ids it is called with."""
    held: list[torch.Tensor] = []
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: held.append(args[1].cpu()))
        for layer in model.model.layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def deferred_copy(model: Any) -> Iterator[None]:
    """What SGLang's deferred copy does, by hand."""
    experts = [layer.mlp.experts for layer in model.model.layers]
    copy = DeferredCopy(max(BATCHES) * PROMPT, len(experts), TOP_K)

    def keep(slot: int, topk_ids: torch.Tensor) -> None:
        copy.keep(slot, topk_ids)
        if slot == len(experts) - 1:
            copy.defer(len(topk_ids))

    handles = [
        module.register_forward_pre_hook(lambda _, args, slot=slot: keep(slot, args[1]))
        for slot, module in enumerate(experts)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


WAYS = ("nothing", "nothing, again", "lens", "hooks with .cpu()", "deferred copy by torch")


class Turns:
    """Lets the ways' threads run one after the other, a step each, in an order that is new in each round."""

    def __init__(self) -> None:
        self._turns = {name: threading.Semaphore(0) for name in WAYS}
        self._there = list(WAYS)
        self._round: list[str] = []
        self.give()

    def wait(self, name: str) -> None:
        """Wait for this one's turn."""
        self._turns[name].acquire()

    def give(self) -> None:
        """Let the next one have the turn."""
        self._round = self._round or random.sample(self._there, len(self._there))
        if self._round:
            self._turns[self._round.pop()].release()

    def leave(self, name: str) -> None:
        """Have the turn no more: it is done, or has failed."""
        self._there.remove(name)
        self._round = [other for other in self._round if other != name]
        self.give()


class PerStep(transformers.StoppingCriteria):
    """Stops nothing; is asked once a step."""

    def ended(self) -> None:
        """A step is over, and the GPU has done it."""
        raise NotImplementedError

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Of no sequence [n] is it said that it is done."""
        going_on = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        torch.cuda.synchronize()
        self.ended()
        return going_on


class Clock(PerStep):
    """Notes how long each step took, in milliseconds, and lets the others do theirs."""

    def __init__(self, name: str, turns: Turns) -> None:
        self.steps: list[float] = []
        self._name, self._turns = name, turns
        turns.wait(name)
        self._began = time.perf_counter()

    def ended(self) -> None:
        """Its turn is over, and comes again."""
        self.steps.append((time.perf_counter() - self._began) * 1e3)
        self._turns.give()
        self._turns.wait(self._name)
        self._began = time.perf_counter()


def decode(models: dict[str, Any], inputs: dict[str, Any]) -> dict[str, list[float]]:
    """How long each way took for each step."""
    turns = Turns()

    def run(name: str) -> list[float]:
        try:
            with torch.inference_mode():
                clock = Clock(name, turns)
                models[name].generate(**inputs, max_new_tokens=STEPS, do_sample=False, stopping_criteria=[clock])
            return clock.steps[SKIPPED:]
        finally:
            turns.leave(name)

    with ThreadPoolExecutor(len(models)) as pool:
        return dict(zip(models, pool.map(run, models), strict=True))


class Share:
    """A clock that runs while one thread is in code of the lens: entered, and not in what the lens calls of others."""

    def __init__(self) -> None:
        self.spent = 0
        self._since: int | None = None

    def ours(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the clock running meanwhile."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self._since = self._since, time.perf_counter_ns()
            if outer is not None:
                self.spent += self._since - outer
            try:
                return function(*args, **kwargs)
            finally:
                now = time.perf_counter_ns()
                self.spent += now - self._since
                self._since = None if outer is None else now

        return timed

    def theirs(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with the clock standing meanwhile."""

        def untimed(*args: Any, **kwargs: Any) -> Any:
            if self._since is None:
                return function(*args, **kwargs)
            self.spent += time.perf_counter_ns() - self._since
            self._since = None
            try:
                return function(*args, **kwargs)
            finally:
                self._since = time.perf_counter_ns()

        return untimed


@contextmanager
def clocked(model: Any) -> Iterator[Share]:
    """The lens's code in the model's forwards and in `generate` goes by the clock."""
    share = Share()
    entered: list[tuple[type, str]] = [
        (attachment._ExpertsForward, "__call__"),
        (attachment._DecoderForward, "__call__"),
        (attachment._FollowedMethod, "__call__"),
        (generate.GenerateCall, "criteria_called"),
    ]
    left: list[tuple[type, str]] = [(StandIn, "call_original"), (type(model.model.layers[0].mlp.experts), "forward")]
    with ExitStack() as stack:
        for owner, name in entered:
            stack.enter_context(mock.patch.object(owner, name, share.ours(getattr(owner, name))))
        for owner, name in left:
            stack.enter_context(mock.patch.object(owner, name, share.theirs(getattr(owner, name))))
        yield share


class ShareClock(PerStep):
    """Notes how much of each step the lens's code took, in per cent."""

    def __init__(self, share: Share) -> None:
        self.steps: list[float] = []
        self._share = share
        self._before = (time.perf_counter_ns(), share.spent)

    def ended(self) -> None:
        """A step is over."""
        now = (time.perf_counter_ns(), self._share.spent)
        self.steps.append((now[1] - self._before[1]) / (now[0] - self._before[0]) * 100)
        self._before = now


def measure_share(model: Any, inputs: dict[str, Any]) -> list[float]:
    """How much of each step the lens's code takes of the thread, in per cent."""
    with clocked(model) as share, torch.inference_mode():
        clock = ShareClock(share)
        model.generate(**inputs, max_new_tokens=CLOCKED_STEPS, do_sample=False, stopping_criteria=[clock])
    return clock.steps[SKIPPED:]


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}")
    models = {name: make_model() for name in WAYS}
    with (
        lens(models["lens"]),
        hooks_with_cpu(models["hooks with .cpu()"]),
        deferred_copy(models["deferred copy by torch"]),
    ):
        for batch in BATCHES:
            ids = torch.randint(1, 4096, (batch, PROMPT), device="cuda")
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            share = measure_share(models["lens"], inputs)
            show(f"24 layers, batch {batch}: the lens's code, of a step", "% of the time", share, bar="<= 1")
            steps = decode(models, inputs)
            without = steps.pop("nothing")
            show(f"24 layers, batch {batch}: a step without anything", "ms", without)
            for name, values in steps.items():
                ratios = [alone / beside for alone, beside in zip(without, values, strict=True)]
                bar = {"bar": ">= 0.99"} if name == "lens" else {}
                show(f"24 layers, batch {batch}: {name} : nothing", "speed ratio", ratios, **bar)


if __name__ == "__main__":
    main()
