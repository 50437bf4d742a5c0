"""A model attached, with a reader at the other end of its arena; and what tests of engines ask of both."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

import oracle
from expert_lens._core import Collector
from expert_lens.engines import transformers as engine
from expert_lens.tap import Tap
from oracle import Oracle
from tiny_models import EOS, PAD, VOCAB

MISSING = 255
Array = np.ndarray[Any, Any]


class Capture:
    """A model attached, and a reader at the other end of its arena."""

    _count = 0

    def __init__(self, model: Any, directory: Path, **options: Any) -> None:
        Capture._count += 1
        name = f"test-{Capture._count}"
        self.tap = engine.attach(model, name, directory=str(directory), **{"arena_bytes": 1 << 22, **options})
        self.collector = Collector(name, directory=str(directory))

    def requests(self) -> dict[str, dict[str, Any]]:
        assert self.collector.sync()
        table = self.collector.requests()
        keys = ("state", "prompt_tokens", "tokens", "missing")
        return {name: {key: table[key][row] for key in keys} for row, name in enumerate(table["request"])}

    def rows(self, request: str) -> Any:
        assert self.collector.sync()
        rows = self.collector.rows(request)
        assert rows is not None, f"no request {request} among {list(self.requests())}"
        return rows

    def experts(self, request: str) -> Array:
        """The request's experts, all of which must be there."""
        rows = self.rows(request)
        assert not (rows["phases"] == MISSING).any()
        return rows["experts"]

    def stats(self) -> Any:
        assert self.collector.sync()
        return self.collector.stats()

    def close(self) -> None:
        self.collector.close()
        self.tap.close()


Attach = Callable[..., Capture]


def attaching(directory: Path) -> Iterator[Attach]:
    """Gives what attaches to models, and closes them all."""
    captures: list[Capture] = []

    def make(model: Any, **options: Any) -> Capture:
        captures.append(Capture(model, directory, **options))
        return captures[-1]

    yield make
    for capture in captures:
        capture.close()


def padded(lengths: Sequence[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random prompts of these lengths, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), width), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids * mask + PAD * (1 - mask), mask


def hooks_of(model: Any) -> list[Any]:
    """Everything that stands on the model's modules or instead of their methods."""
    return [
        (name, dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ] + [
        (name, key) for name, module in model.named_modules() for key, value in vars(module).items() if callable(value)
    ]


class Runs(LogitsProcessor):  # type: ignore[misc]
    """Runs something between a forward and the stopping criteria, as a critic or a contrastive decoder would."""

    def __init__(self, run: Callable[[torch.Tensor], Any]) -> None:
        self.run = run

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        self.run(input_ids)
        return scores


def running(run: Callable[[torch.Tensor], Any]) -> Any:
    """What `generate` takes as its logits processors, to run this in each step."""
    return LogitsProcessorList([Runs(run)])


def compiling(backend: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """What has `generate` compile its steps, on a CPU too."""
    config = CompileConfig(backend=lambda *one: backend(*one), mode=None, **options)  # it copies this
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config, "do_sample": False, "pad_token_id": PAD}


@contextmanager
def somebody_publishes(tap: Tap) -> Iterator[None]:
    """Another thread has the turn meanwhile."""
    has_turn, over = threading.Event(), threading.Event()

    def publish() -> None:
        with tap._turn as held:
            assert held
            has_turn.set()
            assert over.wait(30)

    thread = threading.Thread(target=publish)
    thread.start()
    assert has_turn.wait(30)
    try:
        yield
    finally:
        over.set()
        thread.join()


def in_threads(run: Callable[[Any], None], arguments: Iterable[Any]) -> None:
    """Run it with each of them at once, a thread each; raises what one of them raises."""
    arguments = list(arguments)
    with ThreadPoolExecutor(len(arguments)) as threads:
        list(threads.map(run, arguments))


def check_token_ids_wherever_they_lie(attach: Attach, model: Any) -> None:
    """Of forwards over ids of the type that is published, side by side with others."""
    capture = attach(model)
    ids = padded([5, 5])[0].to(model.device, torch.int32)
    with torch.no_grad():
        for column in range(5):
            model(ids[:, column : column + 1], use_cache=False)
    assert capture.tap.error is None
    found = [[capture.rows(f"{column}.{row}")["token_ids"].tolist() for column in range(5)] for row in range(2)]
    assert found == ids[:, :, None].tolist()


def check_generated(
    capture: Capture,
    truth: Oracle | Array,
    sequences: torch.Tensor,
    mask: torch.Tensor,
    names: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
) -> list[int]:
    """Each request has exactly the rows that the experts received for it; gives the outputs' lengths.

    `truth`: who watched the run, or what all columns of the sequences received, [B, columns, L, K].
    """
    lengths = lengths or oracle.output_lengths(sequences, mask.shape[1], [EOS])
    grid = oracle.columns(truth.ids, len(sequences)) if isinstance(truth, Oracle) else truth
    expected = oracle.request_rows(grid, mask, lengths)
    tokens = oracle.request_tokens(sequences, mask, lengths)
    table = capture.requests()
    assert capture.tap.error is None
    for row, name in enumerate(names):
        rows = capture.rows(name)
        prompt = int(mask[row].sum())
        np.testing.assert_array_equal(rows["experts"], expected[row])
        np.testing.assert_array_equal(rows["token_ids"], tokens[row])
        np.testing.assert_array_equal(rows["phases"], [0] * prompt + [1] * (lengths[row] - 1))
        assert table[name] == {
            "state": "finished",
            "prompt_tokens": prompt,
            "tokens": prompt + lengths[row] - 1,
            "missing": 0,
        }
    return list(lengths)
