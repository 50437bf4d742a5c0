"""The transformers engine: what arrives in a reader is what the experts received, and the model does not notice."""

import copy
import gc
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny_models
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle
from tiny_models import EOS, FAMILIES, PAD, VOCAB
from transformers.generation.continuous_batching import input_outputs
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from expert_lens._core import Collector
from expert_lens.engines import find_engine
from expert_lens.engines import transformers as engine
from expert_lens.errors import (
    EngineHookError,
    NotMoEError,
    OptionError,
    SilentTapError,
    UnsupportedModelError,
)

MISSING = 255
Array = np.ndarray[Any, Any]


class Capture:
    """A model attached, and a reader at the other end of its arena."""

    _count = 0

    def __init__(self, model: Any, directory: Path, **options: Any) -> None:
        Capture._count += 1
        name = f"test-{Capture._count}"
        self.tap = engine.attach(model, name, directory=str(directory), arena_bytes=1 << 22, **options)
        self.collector = Collector(name, directory=str(directory))

    def requests(self) -> dict[str, dict[str, Any]]:
        assert self.collector.sync()
        table = self.collector.requests()
        keys = ("state", "prompt_tokens", "tokens", "missing")
        return {
            name: {key: table[key][row] for key in keys} for row, name in enumerate(table["request"])
        }

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


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Attach]:
    captures: list[Capture] = []

    def make(model: Any, **options: Any) -> Capture:
        captures.append(Capture(model, tmp_path, **options))
        return captures[-1]

    yield make
    for capture in captures:
        capture.close()


@pytest.fixture
def model() -> Any:
    return tiny_models.qwen3_moe()


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
    ] + [(name, key) for name, module in model.named_modules() for key, value in vars(module).items() if callable(value)]


def check_generated(
    capture: Capture,
    truth: Oracle,
    sequences: torch.Tensor,
    mask: torch.Tensor,
    names: Sequence[str],
    *,
    lengths: Sequence[int] | None = None,
    grid: Array | None = None,
) -> list[int]:
    """Each request has exactly the rows that the experts received for it; gives the outputs' lengths."""
    lengths = lengths or oracle.output_lengths(sequences, mask.shape[1], [EOS])
    grid = oracle.columns(truth.ids, len(sequences)) if grid is None else grid
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


# ---- generate: greedy, sampling, batches with padding, return sequences ----


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batches_with_left_padding_give_the_rows_that_the_experts_received(
    family: str, attach: Attach
) -> None:
    model = FAMILIES[family]()
    capture = attach(model)
    ids, mask = padded([4, 9, 7, 1])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1", "0.2", "0.3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_return_sequences_gives_the_rows_that_the_experts_received(
    family: str, attach: Attach
) -> None:
    model = FAMILIES[family]()
    capture = attach(model)
    ids, mask = padded([4, 6])
    torch.manual_seed(1)
    with Oracle(model).watching() as truth:
        sequences = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=True, top_k=0, temperature=9.0, num_return_sequences=4
        )
    names = [f"0.{row}" for row in range(8)]
    lengths = check_generated(capture, truth, sequences, mask.repeat_interleave(4, 0), names)
    assert min(lengths) < 20, "no sequence ended early, so the test shows less than it should"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_are_those_of_each_finished_sequence_replayed_alone(family: str, attach: Attach) -> None:
    model = FAMILIES[family](experts_implementation="eager").double()  # so fine that batching does not turn a choice
    capture = attach(model)
    ids, mask = padded([3, 8, 5])
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    lengths = oracle.output_lengths(sequences, mask.shape[1], [EOS])
    for row, tokens in enumerate(oracle.request_tokens(sequences, mask, lengths)):
        np.testing.assert_array_equal(
            np.sort(capture.experts(f"0.{row}"), -1), np.sort(oracle.replayed(model, tokens), -1)
        )


def test_one_altered_id_is_found(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    grid = oracle.columns(truth.ids, 2)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"], grid=grid)
    grid[1, 7, 1, 0] += 1
    with pytest.raises(AssertionError):
        check_generated(capture, truth, sequences, mask, ["0.0", "0.1"], grid=grid)


def test_models_with_more_than_256_experts_are_captured(attach: Attach) -> None:
    model = tiny_models.many_experts()
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"])
    assert capture.experts("0.0").dtype == np.uint16
    assert max(ids.max() for ids in truth.ids) > 255


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_that_the_experts_received(family: str, attach: Attach) -> None:
    model = FAMILIES[family]()
    capture = attach(model, weights=True)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    lengths = oracle.output_lengths(sequences, mask.shape[1], [EOS])
    expected = oracle.request_rows(oracle.columns(truth.weights, 2), mask, lengths)
    for row in range(2):
        weights = capture.rows(f"0.{row}")["weights"]
        assert weights.dtype == np.float16
        np.testing.assert_array_equal(weights, expected[row].astype(np.float16))


class StopAt(StoppingCriteria):
    """Ends row r of the batch when its sequence has `lengths[r]` columns."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("eos", [None, EOS])
def test_rows_of_sequences_that_a_criterion_of_the_user_has_ended_are_left_out(
    eos: int | None, attach: Attach, model: Any
) -> None:
    model.generation_config.eos_token_id = eos
    capture = attach(model)
    ids, mask = padded([4, 6, 2])
    stops = StoppingCriteriaList([StopAt([8, 12, 9])])
    with Oracle(model).watching() as truth:
        sequences = model.generate(
            ids, attention_mask=mask, max_new_tokens=20, do_sample=False, stopping_criteria=stops, pad_token_id=PAD
        )
    ends = [EOS] if eos is not None else []
    lengths = [
        min(stop, found) for stop, found in zip([2, 6, 3], oracle.output_lengths(sequences, 6, ends), strict=True)
    ]
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1", "0.2"], lengths=lengths)


def test_rows_after_a_stop_string_are_left_out(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    tokenizer = letter_tokenizer()
    capture = attach(model)
    ids, mask = padded([4, 6, 3])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    text = tokenizer.decode(plain[1, 6:])
    options = {"stop_strings": [text[2:4]], "tokenizer": tokenizer, "pad_token_id": PAD}
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
    found = [tokenizer.decode(row[6:]).find(text[2:4]) for row in plain]
    lengths = [8 if index < 0 else index + 2 for index in found]
    assert lengths[1] < 8
    check_generated(capture, truth, sequences, mask, ["1.0", "1.1", "1.2"], lengths=lengths)


def letter_tokenizer() -> Any:
    """One letter a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    letters = Tokenizer(models.BPE({letter: token for token, letter in enumerate(alphabet)}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=letters)


def test_a_length_limit_ends_all_sequences(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    ids, mask = padded([5, 3])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_length=9, do_sample=False, pad_token_id=PAD)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"], lengths=[4, 4])


def test_padding_that_generate_finds_by_itself_gives_no_rows(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, max_new_tokens=5, do_sample=False)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"])


@pytest.mark.parametrize("chunk", [1, 3, 4, 64])
def test_a_prefill_in_chunks_gives_the_same_rows(chunk: int, attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([2, 9])
    with Oracle(model).watching() as truth:
        sequences = model.generate(
            ids, attention_mask=mask, max_new_tokens=5, do_sample=False, prefill_chunk_size=chunk
        )
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"])


@pytest.mark.parametrize("given_mask", [True, False])
def test_a_static_cache_gives_the_same_rows(given_mask: bool, attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 9, 9] if given_mask else [9, 9, 9])
    options = {"attention_mask": mask} if given_mask else {}
    with Oracle(model).watching() as truth:
        sequences = model.generate(
            ids, max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True, **options
        )
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1", "0.2"])


def test_without_a_cache_each_position_counts_once(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    grid = oracle.columns_of_refeeding(truth.ids, 2)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1"], grid=grid)
    assert capture.stats()["tokens"] == sum(len(capture.experts(f"0.{row}")) for row in range(2))


def test_a_prompt_of_embeddings_gives_rows_without_token_ids(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        outputs = model.generate(
            inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask, max_new_tokens=4, do_sample=False
        )
    lengths = oracle.output_lengths(outputs, 0, [EOS])
    expected = oracle.request_rows(oracle.columns(truth.ids, 2), mask, lengths)
    for row in range(2):
        np.testing.assert_array_equal(capture.experts(f"0.{row}"), expected[row])
        generated = outputs[row, : lengths[row] - 1].tolist()
        assert capture.rows(f"0.{row}")["token_ids"].tolist()[int(mask[row].sum()) :] == generated


def test_generating_on_from_a_cache_leaves_what_it_held_missing(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    ids, _ = padded([5])
    options = {"do_sample": False, "return_dict_in_generate": True, "pad_token_id": PAD}
    first = model.generate(ids, max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], 1)
    with Oracle(model).watching() as truth:
        second = model.generate(longer, past_key_values=first.past_key_values, max_new_tokens=4, **options)
    rows = capture.rows("1.0")
    assert (rows["phases"] == MISSING).tolist() == [True] * 7 + [False] * 7
    np.testing.assert_array_equal(rows["experts"][7:], np.concatenate(truth.ids))
    assert rows["token_ids"][7:].tolist() == second.sequences[0, 7:-1].tolist()
    assert capture.requests()["1.0"] == {"state": "finished", "prompt_tokens": 11, "tokens": 14, "missing": 7}


def test_calls_are_numbered_and_can_be_named(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    options = {"attention_mask": mask, "max_new_tokens": 2, "do_sample": False}
    model.generate(ids, **options)
    with capture.tap.request("poem"):
        model.generate(ids, **options)
        model.generate(ids[1:], max_new_tokens=2, do_sample=False)
        model.generate(ids[1:], max_new_tokens=2, do_sample=False)
    model.generate(ids, **options)
    assert list(capture.requests()) == [
        *("0.0", "0.1"),
        *("poem.0", "poem.1"),
        "poem",
        "poem#2",
        *("1.0", "1.1"),
    ]


@pytest.mark.parametrize("name", ["", "0.3", "x" * 201])
def test_a_name_that_cannot_be_told_from_a_made_one_is_refused(name: str, attach: Attach, model: Any) -> None:
    capture = attach(model)
    with pytest.raises(OptionError, match="cannot be named"), capture.tap.request(name):
        pass


def test_a_generate_call_that_fails_aborts_its_requests(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])

    class Fails(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
            if input_ids.shape[1] == 9:
                raise RuntimeError("no more")
            return torch.zeros(2, dtype=torch.bool)

    model.generation_config.eos_token_id = None
    with pytest.raises(RuntimeError, match="no more"):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([Fails()]), pad_token_id=0
        )
    assert {name: entry["state"] for name, entry in capture.requests().items()} == {"0.0": "aborted", "0.1": "aborted"}
    assert len(capture.experts("0.1")) == 8
    model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    assert capture.requests()["1.1"]["state"] == "finished"


# ---- generation whose rows move between sequences ----


def test_beam_search_is_counted_and_kept_for_no_request(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    with Oracle(model).watching() as truth:
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=3)
    assert capture.tap.error is None
    assert capture.requests() == {}
    real = [truth.ids[0][mask.repeat_interleave(3, 0).reshape(-1).bool().numpy()], *truth.ids[1:]]
    expected = np.stack([np.bincount(np.concatenate(real)[:, layer].reshape(-1), minlength=8) for layer in range(2)])
    np.testing.assert_array_equal(capture.collector.counts(), expected)
    assert capture.stats()["unattributed_tokens"] == sum(len(rows) for rows in real)


@pytest.mark.parametrize("drafts", ["another model", "itself", "prompt lookup"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_generation_leaves_no_rejected_token_behind(
    drafts: str, do_sample: bool, attach: Attach, model: Any
) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    model.generation_config.eos_token_id = None
    helper = tiny_models.qwen3_moe(num_hidden_layers=1, mlp_only_layers=[])
    helper.generation_config.eos_token_id = None
    options: dict[str, Any] = {
        "another model": {"assistant_model": helper},
        "itself": {"assistant_model": model},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[drafts]
    capture = attach(model)
    torch.manual_seed(2)
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, max_new_tokens=12, do_sample=do_sample, pad_token_id=PAD, **options)
    assert capture.tap.error is None
    rows = capture.rows("0.0")
    length = sequences.shape[1] - 1
    assert capture.requests()["0.0"] == {"state": "finished", "prompt_tokens": 10, "tokens": length, "missing": 0}
    assert rows["token_ids"].tolist() == sequences[0, :-1].tolist()
    assert rows["phases"].tolist() == [0] * 10 + [1] * (length - 10)
    assert capture.stats()["tokens"] == length, "rejected tokens were counted"
    assert capture.stats()["tokens"] < sum(len(rows) for rows in truth.ids), "nothing was rejected or drafted"
    if drafts != "itself":
        # A verifying forward starts one token before the end of the sequence at that time; later ones win.
        expected = np.zeros((length, 2, 2), dtype=np.int64)
        start = 0
        lengths = assisted_starts(truth, rows["steps"])
        for forward, (start, stop) in zip(truth.ids, lengths, strict=True):
            expected[start:stop] = forward[: stop - start]
        np.testing.assert_array_equal(rows["experts"], expected)
    np.testing.assert_array_equal(np.sort(rows["experts"], -1), np.sort(oracle.replayed(model, sequences[0, :-1]), -1))


def assisted_starts(truth: Oracle, steps: Array) -> list[tuple[int, int]]:
    """Where each verifying forward's accepted rows lie: its step's rows are next to each other."""
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    assert len(bounds) - 1 == len(truth.ids)
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def test_the_drafts_of_another_attached_model_are_its_own(attach: Attach, model: Any) -> None:
    helper = tiny_models.qwen3_moe(num_hidden_layers=1, mlp_only_layers=[])
    capture, drafts = attach(model), attach(helper)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, assistant_model=helper, do_sample=False)
    assert list(capture.requests()) == ["0.0"]
    assert drafts.requests() == {}, "drafting is no request"


# ---- plain forwards ----


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(data=st.data())
def test_plain_forwards_give_the_rows_of_their_tokens_under_any_padding(data: st.DataObject, plain: Any) -> None:
    model, capture = plain
    batch = data.draw(st.integers(1, 4))
    width = data.draw(st.integers(1, 9))
    flags = data.draw(st.none() | st.lists(st.booleans(), min_size=batch * width, max_size=batch * width))
    ids = torch.randint(3, VOCAB, (batch, width))
    mask = None if flags is None else torch.tensor(flags).reshape(batch, width).long()
    use_cache = data.draw(st.booleans())
    capture.calls += 1
    with Oracle(model).watching() as truth, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=use_cache)
    grid = oracle.columns(truth.ids, batch)
    for row in range(batch):
        kept = np.ones(width, dtype=bool) if mask is None else mask[row].numpy() != 0
        if not kept.any():
            assert capture.collector.rows(f"{capture.calls}.{row}") is None
            continue
        rows = capture.rows(f"{capture.calls}.{row}")
        np.testing.assert_array_equal(rows["experts"], grid[row][kept])
        np.testing.assert_array_equal(rows["token_ids"], ids[row].numpy()[kept])
        assert not rows["phases"].any()


@pytest.fixture
def plain(attach: Attach, model: Any) -> Any:
    capture: Any = attach(model)
    capture.calls = -1
    return model, capture


def test_a_decode_loop_of_the_users_own_goes_on_with_its_requests(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, mask = padded([4, 6])
    cache = None
    with Oracle(model).watching() as truth, torch.no_grad():
        tokens, total = ids, mask
        for _ in range(5):
            output = model(tokens, attention_mask=total, past_key_values=cache)
            cache = output.past_key_values
            tokens = output.logits[:, -1:].argmax(-1)
            total = torch.cat([total, torch.ones(2, 1, dtype=torch.long)], 1)
    assert {entry["state"] for entry in capture.requests().values()} == {"running"}
    grid = oracle.columns(truth.ids, 2)
    for row, padding in enumerate([2, 0]):
        rows = capture.rows(f"0.{row}")
        np.testing.assert_array_equal(rows["experts"], grid[row, padding:])
        assert rows["phases"].tolist() == [0] * (6 - padding) + [1] * 4
        assert capture.requests()[f"0.{row}"]["prompt_tokens"] == 6 - padding
    del cache, output
    gc.collect()
    assert {entry["state"] for entry in capture.requests().values()} == {"finished"}


@pytest.mark.parametrize("static", [False, True])
def test_a_decode_loop_without_masks_goes_on_too(static: bool, attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, _ = padded([5, 5])
    cache = transformers.StaticCache(config=model.config, max_cache_len=16) if static else transformers.DynamicCache()
    with Oracle(model).watching() as truth, torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :2], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
    grid = oracle.columns(truth.ids, 2)
    for row in range(2):
        rows = capture.rows(f"0.{row}")
        np.testing.assert_array_equal(rows["experts"], grid[row])
        assert rows["phases"].tolist() == [0] * 7 + [1]
    assert list(capture.requests()) == ["0.0", "0.1"]


def test_tokens_that_are_cut_from_a_cache_and_fed_anew_take_their_place(attach: Attach, model: Any) -> None:
    capture = attach(model)
    cache = transformers.DynamicCache()
    with Oracle(model).watching() as truth, torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8, 9]]), past_key_values=cache)
        cache.crop(-2)
        model(torch.tensor([[11]]), past_key_values=cache)
    del cache
    gc.collect()
    rows = capture.rows("0.0")
    assert rows["token_ids"].tolist() == [5, 6, 7, 11]
    np.testing.assert_array_equal(rows["experts"], np.concatenate([truth.ids[0][:3], truth.ids[1]]))


def test_what_a_cache_held_before_attaching_is_missing(attach: Attach, model: Any) -> None:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
        capture = attach(model)
        model(torch.tensor([[9]]), past_key_values=cache)
        model(torch.tensor([[10]]), past_key_values=cache)
    rows = capture.rows("0.0")
    assert (rows["phases"] == MISSING).tolist() == [True] * 4 + [False] * 2
    assert rows["token_ids"][4:].tolist() == [9, 10]


def test_going_on_by_hand_after_generate_is_a_new_call_at_the_right_positions(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    ids, mask = padded([2, 5])
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=PAD
    )
    with torch.no_grad():
        model(output.sequences[:, -1:], past_key_values=output.past_key_values)
    assert [len(capture.rows(f"1.{row}")["phases"]) for row in range(2)] == [6, 9]
    assert [capture.requests()[f"1.{row}"]["missing"] for row in range(2)] == [5, 8]


@pytest.mark.parametrize(
    "call",
    [
        lambda model, ids: model.model(ids),
        lambda model, ids: model.model(ids, torch.ones_like(ids)),
        lambda model, ids: model(input_ids=ids, return_dict=False),
        lambda model, ids: model.model(ids, return_dict=False),
        lambda model, ids: model(ids, labels=ids),
        lambda model, ids: model.eval()(ids, output_router_logits=True, output_hidden_states=True),
        lambda model, ids: model.train()(ids, use_cache=False),
    ],
)
def test_every_way_of_calling_the_model_is_seen(
    call: Callable[[Any, torch.Tensor], Any], attach: Attach, model: Any
) -> None:
    capture = attach(model)
    ids, _ = padded([5, 5])
    with Oracle(model).watching() as truth:
        call(model, ids)
    assert capture.tap.error is None
    for row in range(2):
        np.testing.assert_array_equal(capture.experts(f"0.{row}"), oracle.columns(truth.ids, 2)[row])
        assert capture.rows(f"0.{row}")["token_ids"].tolist() == ids[row].tolist()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_grad_modes_make_no_difference(mode: Callable[[], Any], attach: Attach, model: Any) -> None:
    capture = attach(model, weights=True)
    with mode():
        model(torch.tensor([[5, 6, 7]]))
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert capture.tap.error is None
    np.testing.assert_array_equal(capture.experts("0.0"), capture.experts("1.0")[:3])


def test_embeddings_give_rows_without_token_ids(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ids, _ = padded([5])
    with Oracle(model).watching() as truth, torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids))
    rows = capture.rows("0.0")
    np.testing.assert_array_equal(rows["experts"], truth.ids[0])
    assert (rows["token_ids"] == 0xFFFFFFFF).all()


def test_a_mask_that_hides_the_padding_gives_no_rows_and_says_so(attach: Attach, model: Any) -> None:
    capture = attach(model)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    with pytest.warns(RuntimeWarning, match="does not say which tokens are padding"), torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]), attention_mask=mask)
    assert capture.stats()["tokens"] == 0
    assert capture.tap.skipped_forwards == 1
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7, 8]]))
    assert len(capture.experts("0.0")) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_for_the_backward_pass_give_no_rows(
    reentrant: bool, attach: Attach, model: Any
) -> None:
    capture = attach(model, weights=True)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    ids, _ = padded([5, 5])
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert capture.tap.error is None
    assert capture.stats()["tokens"] == 10


def test_a_forward_that_raises_gives_no_rows(attach: Attach, model: Any) -> None:
    capture = attach(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("stop here")

    handle = model.model.layers[2].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="stop here"):
        model(torch.tensor([[5, 6, 7]]))
    handle.remove()
    model(torch.tensor([[8, 9]]))
    assert capture.stats()["tokens"] == 2
    assert capture.rows("0.0")["token_ids"].tolist() == [8, 9]


# ---- continuous batching ----


def small_batches(**changes: Any) -> Any:
    """A cache of 64 pages; the default takes nearly all memory that there is."""
    return transformers.ContinuousBatchingConfig(**{"num_blocks": 64, "page_size": 4, **changes})


def generate_batch(model: Any, prompts: list[list[int]], **options: Any) -> Any:
    return model.generate_batch(prompts, **{"continuous_batching_config": small_batches(), **options})


class Batches:
    """What each packed forward held, noted where the engine writes its tensors: [(request, tokens)]."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[str, int, int]]] = []

    @contextmanager
    def watching(self) -> Iterator["Batches"]:
        original = input_outputs.ContinuousBatchingIOs.prepare_batch_tensors

        def prepare(io: Any, requests_in_batch: Any, *args: Any, **kwargs: Any) -> Any:
            self.batches.append(
                [(each.state.request_id, each.state.position_offset, each.query_length) for each in requests_in_batch]
            )
            return original(io, requests_in_batch, *args, **kwargs)

        input_outputs.ContinuousBatchingIOs.prepare_batch_tensors = prepare
        try:
            yield self
        finally:
            input_outputs.ContinuousBatchingIOs.prepare_batch_tensors = original

    def rows(self, truth: Oracle) -> dict[str, dict[int, Array]]:
        """Of each request, the experts by position; the last forward over a position counts."""
        result: dict[str, dict[int, Array]] = {}
        for batch, ids in zip(self.batches, truth.ids, strict=True):
            start = 0
            for request, position, length in batch:
                held = result.setdefault(request, {})
                held.update({position + i: ids[start + i] for i in range(length)})
                start += length
            assert start == len(ids)
        return result


def check_batches(capture: Capture, truth: Oracle, batches: Batches, results: dict[str, Any]) -> None:
    expected = batches.rows(truth)
    assert capture.tap.error is None
    for request, result in results.items():
        rows = capture.rows(request)
        tokens = (result.prompt_ids + result.generated_tokens)[:-1]
        prompt = len(result.prompt_ids)
        assert len(rows["phases"]) == len(tokens)
        for position, phase in enumerate(rows["phases"]):
            if position not in expected[request]:
                assert phase == MISSING
                continue
            np.testing.assert_array_equal(rows["experts"][position], expected[request][position])
            assert rows["token_ids"][position] == tokens[position]
            assert phase == (0 if position < prompt else 1)
        entry = capture.requests()[request]
        assert (entry["state"], entry["prompt_tokens"]) == ("finished", prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_continuous_batching_gives_the_rows_that_the_experts_received(family: str, attach: Attach) -> None:
    changes = {"gpt_oss": {"attn_implementation": "eager"}, "deepseek_v3": {"v_head_dim": 16}}.get(family, {})
    model = FAMILIES[family](**changes)
    if family == "deepseek_v3":
        model.config.head_dim = 16  # the paged cache of transformers 5.23 takes the rotary part's size for the whole
    capture = attach(model)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19], [20, 21]]
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, prompts, max_new_tokens=9)
    assert len(results) == 5
    check_batches(capture, truth, batches, results)
    assert {entry["missing"] for entry in capture.requests().values()} == {0}
    assert capture.stats()["tokens"] == sum(len(ids) for ids in truth.ids)


def test_prompts_that_are_cut_into_chunks_are_put_together_again(attach: Attach, model: Any) -> None:
    capture = attach(model)
    config = small_batches(max_batch_tokens=8)
    prompts = [list(range(3, 33)), [40, 41, 42], list(range(20, 45))]
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, prompts, max_new_tokens=5, continuous_batching_config=config)
    check_batches(capture, truth, batches, results)
    assert len(batches.batches) > 7


def test_a_prefix_that_another_request_computed_is_missing(attach: Attach, model: Any) -> None:
    capture = attach(model)
    config = small_batches(allow_block_sharing=True)
    shared = list(range(3, 15))
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        with model.continuous_batching_context_manager(continuous_batching_config=config) as manager:
            results = {}
            for prompt in ([*shared, 50], [*shared, 51, 52]):
                request = manager.add_request(prompt, max_new_tokens=4)
                results[request] = next(iter(manager.request_id_iter(request)))
    check_batches(capture, truth, batches, results)
    assert [entry["missing"] for entry in capture.requests().values()] == [0, 12]


def test_sequences_that_part_from_one_prompt_have_their_own_rows(attach: Attach, model: Any) -> None:
    capture = attach(model)
    generation = copy.deepcopy(model.generation_config)
    generation.num_return_sequences = 3
    generation.do_sample = True
    generation.max_new_tokens = 6
    with Oracle(model).watching() as truth, Batches().watching() as batches:
        results = generate_batch(model, [[5, 6, 7, 8, 9]], generation_config=generation)
    assert len(results) == 3
    check_batches(capture, truth, batches, results)
    assert [capture.requests()[name]["missing"] for name in sorted(results)] == [0, 4, 4]


def test_a_cancelled_request_is_aborted(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = -1
    capture = attach(model)
    with model.continuous_batching_context_manager(continuous_batching_config=small_batches()) as manager:
        request = manager.add_request([5, 6, 7], max_new_tokens=100_000, request_id="long", streaming=True)
        next(iter(manager.request_id_iter(request)))
        manager.cancel_request(request)
        other = manager.add_request([8, 9], max_new_tokens=3, request_id="short")
        next(iter(manager.request_id_iter(other)))
        assert capture.requests()["long"]["state"] == "aborted"
        assert capture.requests()["short"]["state"] == "finished"
    assert capture.tap.error is None


def test_continuous_batching_can_be_named(attach: Attach, model: Any) -> None:
    capture = attach(model)
    with capture.tap.request("run"):
        generate_batch(model, [[5, 6, 7]], max_new_tokens=3)
    generate_batch(model, [[5, 6, 7]], max_new_tokens=3)
    assert list(capture.requests()) == ["run.req_0", "req_0"]


def test_a_batching_manager_made_before_attaching_is_not_guessed_at(attach: Attach, model: Any) -> None:
    with model.continuous_batching_context_manager(continuous_batching_config=small_batches()) as manager:
        capture = attach(model)
        with pytest.warns(RuntimeWarning, match="Attach before"):
            request = manager.add_request([5, 6, 7], max_new_tokens=3)
            result = next(iter(manager.request_id_iter(request)))
            warnings.warn(str(capture.tap.error), RuntimeWarning, stacklevel=1)
    assert len(result.generated_tokens) == 3
    assert isinstance(capture.tap.error, EngineHookError)
    assert capture.stats()["tokens"] == 0


# ---- the model does not notice ----


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_bit_equal_with_and_without(family: str, attach: Attach) -> None:
    model = FAMILIES[family]()
    ids, mask = padded([4, 9, 7])
    options = {"attention_mask": mask, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}

    def run() -> list[torch.Tensor]:
        torch.manual_seed(3)
        generated = [model.generate(ids, do_sample=sample, **options) for sample in (False, True)]
        with torch.no_grad():
            plain = model(ids, attention_mask=mask).logits
        return [plain, *(tensor for each in generated for tensor in (each.sequences, *each.logits))]

    before = run()
    hooks = hooks_of(model)
    capture = attach(model, weights=True)
    during = run()
    capture.tap.close()
    after = run()
    assert capture.stats()["tokens"] > 0
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(before, during, after, strict=True))
    assert hooks_of(model) == hooks


def test_closing_twice_is_safe_and_leaves_nothing_behind(attach: Attach, model: Any) -> None:
    before = hooks_of(model)
    attributes = set(vars(model))
    capture = attach(model)
    assert hooks_of(model) != before
    generate_batch(model, [[5, 6, 7]], max_new_tokens=3)
    capture.tap.close()
    capture.tap.close()
    assert hooks_of(model) == before
    assert set(vars(model)) == attributes
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    while capture.stats()["state"] != "ended":  # pytest's time limit ends this
        pass


def test_a_closed_model_can_be_attached_again(attach: Attach, model: Any) -> None:
    attach(model).tap.close()
    capture = attach(model)
    model(torch.tensor([[5, 6]]))
    assert len(capture.experts("0.0")) == 2


def test_closing_in_the_middle_of_a_generate_call_aborts_it(attach: Attach, model: Any) -> None:
    capture = attach(model)
    model.generation_config.eos_token_id = None

    class Closes(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
            if input_ids.shape[1] == 5:
                capture.tap.close()
            return torch.zeros(1, dtype=torch.bool)

    stops = StoppingCriteriaList([Closes()])
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, stopping_criteria=stops, pad_token_id=PAD)
    assert output.shape == (1, 9)
    assert capture.requests()["0.0"]["state"] == "aborted"
    assert len(capture.experts("0.0")) == 4


def test_an_error_of_ours_switches_the_capture_off_and_not_the_model(attach: Attach, model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    capture = attach(model)
    tap: Any = capture.tap._tap
    pack = tap.pack

    def fails(*args: Any) -> Any:
        if capture.stats()["tokens"] >= 4:
            raise RuntimeError("ours")
        return pack(*args)

    tap.pack = fails
    with pytest.warns(RuntimeWarning, match="stopped capturing: ours"):
        output = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(output, expected)
    assert str(capture.tap.error) == "ours"
    assert capture.requests()["0.0"] == {"state": "aborted", "prompt_tokens": 3, "tokens": 5, "missing": 1}


def test_other_peoples_hooks_stand_beside_ours_in_any_order(attach: Attach, model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    seen: list[torch.Tensor] = []

    def steer(_: Any, args: Any) -> Any:
        return (args[0], (args[1] + 1) % 8, args[2])

    before = experts.register_forward_pre_hook(lambda *_: seen.append(torch.zeros(1)))
    capture = attach(model)
    after = experts.register_forward_pre_hook(steer)
    with Oracle(model).watching() as truth:
        model(torch.tensor([[5, 6, 7]]))
    np.testing.assert_array_equal(capture.experts("0.0"), truth.ids[0])
    capture.tap.close()
    assert list(experts._forward_pre_hooks) == [before.id, after.id]
    model(torch.tensor([[5, 6, 7]]))
    assert len(seen) == 2


def test_a_method_that_someone_wraps_after_us_stays_theirs(attach: Attach, model: Any) -> None:
    capture = attach(model)
    ours = model.generate
    calls = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return ours(*args, **kwargs)

    model.generate = theirs
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert list(capture.requests()) == ["0.0"]
    capture.tap.close()
    assert model.generate is theirs
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    assert len(calls) == 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_is_a_model_of_its_own(
    duplicate: Callable[[Any], Any], attach: Attach, model: Any
) -> None:
    capture = attach(model)
    twin = duplicate(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ids = torch.tensor([[5, 6, 7]])
    output = twin.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert output[0, 3:].tolist() == [0, 0, 0], "the copy generated with the original's weights"
    twin(ids)
    assert capture.stats()["tokens"] == 0
    model(ids)
    assert capture.stats()["tokens"] == 3
    attach(twin)
    twin(ids)
    assert capture.stats()["tokens"] == 3


def test_a_second_attach_to_one_model_is_refused(attach: Attach, model: Any) -> None:
    capture = attach(model)
    with pytest.raises(EngineHookError, match="already attached"):
        attach(model)
    model(torch.tensor([[5, 6]]))
    assert capture.stats()["tokens"] == 2


def test_a_model_that_is_no_longer_used_is_freed_while_attached(attach: Attach) -> None:
    model = tiny_models.mixtral()
    capture = attach(model)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    generate_batch(model, [[5, 6]], max_new_tokens=2)
    gone = threading.Event()
    import weakref

    weakref.finalize(model, gone.set)
    capture.tap = engine_stub = type("Closed", (), {"close": lambda self: None})()
    del model, engine_stub
    gc.collect()
    assert gone.is_set()


def test_two_threads_may_run_one_model(attach: Attach, model: Any) -> None:
    capture = attach(model)
    prompts = {f"thread{index}": torch.randint(3, VOCAB, (1, 4 + index)) for index in range(2)}
    outputs: dict[str, torch.Tensor] = {}

    def work(name: str) -> None:
        for _ in range(10):
            with capture.tap.request(name):
                outputs[name] = model.generate(prompts[name], max_new_tokens=8, do_sample=False)

    threads = [threading.Thread(target=work, args=(name,)) for name in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capture.tap.error is None
    assert capture.tap.lost_tokens == 0
    for name, output in outputs.items():
        expected = oracle.replayed(model, output[0, :-1].tolist())
        length = oracle.output_lengths(output, prompts[name].shape[1], [EOS])[0] + prompts[name].shape[1] - 1
        for suffix in ("", *(f"#{use}" for use in range(2, 11))):
            rows = capture.rows(name + suffix)
            assert rows["token_ids"].tolist() == output[0, :length].tolist()
            np.testing.assert_array_equal(np.sort(rows["experts"], -1), np.sort(expected[:length], -1))


# ---- what cannot be captured is refused ----


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotMoEError, match="Qwen3ForCausalLM has no routed experts.*Attach to a mixture-of-experts"):
        Capture(tiny_models.dense(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_class", "config", "says"),
    [
        (
            transformers.JetMoeForCausalLM,
            lambda: transformers.JetMoeConfig(
                vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, kv_channels=8, num_local_experts=4
            ),
            "JetMoeMoE",
        ),
        (
            transformers.Llama4ForCausalLM,
            lambda: transformers.Llama4TextConfig(
                vocab_size=32, hidden_size=16, intermediate_size=8, intermediate_size_mlp=8, num_hidden_layers=1
            ),
            "Llama4TextMoe",
        ),
        (
            transformers.SwitchTransformersForConditionalGeneration,
            lambda: transformers.SwitchTransformersConfig(
                vocab_size=32, d_model=16, d_ff=8, d_kv=4, num_layers=1, num_decoder_layers=1, num_heads=2, num_experts=4,
                num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
            ),
            "encoder-decoder",
        ),
        (
            transformers.NllbMoeForConditionalGeneration,
            lambda: transformers.NllbMoeConfig(
                vocab_size=32,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                num_experts=4,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_sparse_step=1,
                decoder_sparse_step=1,
            ),
            "NllbMoe",
        ),
        (transformers.ZayaForCausalLM, lambda: transformers.ZayaConfig(num_hidden_layers=2), "ZayaExperts"),
    ],
)
def test_families_that_route_otherwise_are_refused_by_name(
    model_class: Any, config: Callable[[], Any], says: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        model = model_class(config())
    with pytest.raises(UnsupportedModelError, match=says):
        Capture(model, tmp_path)


def test_a_layer_that_does_not_call_its_experts_is_an_error_that_names_it(attach: Attach, model: Any) -> None:
    block = model.model.layers[2].mlp

    def fused(hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, ids = block.gate(hidden_states.flatten(0, 1))
        return type(block.experts).forward(block.experts, hidden_states.flatten(0, 1), ids, weights)[None]

    block.forward = fused
    before = hooks_of(model)
    capture = attach(model)
    with pytest.raises(SilentTapError, match=r"1 of 2 routed layers.*2 \(layers\.2\.mlp\.experts\)") as caught:
        model(torch.tensor([[5, 6, 7]]))
    assert caught.value.layers == (2,)
    assert capture.tap.error is caught.value
    assert hooks_of(model) == before, "it did not detach itself"
    model(torch.tensor([[5, 6, 7]]))
    assert capture.stats()["tokens"] == 0


def test_a_top_k_that_is_not_what_the_config_says_is_an_error(attach: Attach, model: Any) -> None:
    for layer in (0, 2):
        model.model.layers[layer].mlp.gate.top_k = 3
    capture = attach(model)
    for layer in (0, 2):
        model.model.layers[layer].mlp.gate.top_k = 2
    with pytest.raises(UnsupportedModelError, match=r"shape \(3, 2\) in a forward of 3 tokens, expected \(3, 3\)"):
        model(torch.tensor([[5, 6, 7]]))
    assert isinstance(capture.tap.error, UnsupportedModelError)


def test_an_engine_without_a_place_to_hold_on_to_is_an_error(attach: Attach, model: Any) -> None:
    model._get_stopping_criteria = None
    before = hooks_of(model)
    with pytest.raises(EngineHookError, match="'_get_stopping_criteria'"):
        attach(model)
    assert hooks_of(model) == before


def test_an_engine_that_stops_asking_the_criteria_is_noticed(attach: Attach, model: Any) -> None:
    capture = attach(model)

    def sample(self: Any, input_ids: Any, **kwargs: Any) -> Any:
        cache = transformers.DynamicCache()
        self(**self.prepare_inputs_for_generation(input_ids, past_key_values=cache))
        kwargs["stopping_criteria"](input_ids, None)
        for _ in range(2):
            self(**self.prepare_inputs_for_generation(input_ids, past_key_values=cache, next_sequence_length=1))
        return input_ids

    original = type(model)._sample
    type(model)._sample = sample
    try:
        with pytest.warns(RuntimeWarning, match="without asking which sequences have ended"):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    finally:
        type(model)._sample = original
    assert isinstance(capture.tap.error, EngineHookError)


@pytest.mark.parametrize("custom", ["callable"])
def test_a_generation_function_of_the_users_own_is_counted_and_kept_for_no_request(
    custom: str, attach: Attach, model: Any  # noqa: ARG001
) -> None:
    capture = attach(model)

    def own(model: Any, input_ids: Any, **_: Any) -> Any:
        model(input_ids)
        return input_ids

    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, custom_generate=own)
    assert capture.tap.error is None
    assert capture.requests() == {}
    assert capture.stats()["unattributed_tokens"] == 3


# ---- compiled models, other tools ----


@pytest.mark.parametrize("attached", ["before", "after"])
def test_a_compiled_model_is_captured_whether_it_was_attached_before_or_after(attached: str, attach: Attach) -> None:
    model = tiny_models.mixtral()
    ids = torch.tensor([[5, 6, 7]])
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        capture = attach(model) if attached == "before" else None
        if capture is None:
            compiled(ids)
            capture = attach(compiled)
        with Oracle(model).watching() as truth:
            compiled(ids)
            compiled(ids + 1)
            model.generate(ids, max_new_tokens=2, do_sample=False)
    assert capture.tap.error is None
    for call in range(2):
        np.testing.assert_array_equal(capture.experts(f"{call}.0"), truth.ids[call])
    np.testing.assert_array_equal(capture.experts("2.0"), np.concatenate(truth.ids[2:]))


def test_compiling_into_one_graph_says_what_stands_in_the_way(attach: Attach) -> None:
    model = tiny_models.mixtral()
    attach(model)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="expert_lens captures here"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.tensor([[5, 6, 7]]))


def test_only_models_of_transformers_match() -> None:
    assert find_engine(tiny_models.mixtral()) is engine
    assert find_engine(torch.nn.Linear(2, 2)) is None
    assert find_engine("a running capture") is None


def test_the_facts_name_the_engine_and_the_model(attach: Attach, model: Any) -> None:
    model.config.name_or_path = "tiny/qwen"
    facts = attach(model).collector.facts
    assert facts["layers"] == [0, 2]
    assert (facts["num_experts"], facts["top_k"], facts["weights"]) == (8, 2, False)
    assert (facts["engine"], facts["engine_version"]) == ("transformers", transformers.__version__)
    assert facts["model"] == "tiny/qwen"
