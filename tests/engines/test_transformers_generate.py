"""`generate`: every sequence has exactly the rows that the experts received for it."""

import gc
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounter
from transformers import DynamicCache
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import oracle
import tiny_models
from expert_lens.errors import (
    OptionError,
)
from oracle import Oracle
from support import MISSING, Array, Attach, check_generated, compiling, padded, running
from tiny_models import EOS, FAMILIES, PAD, VOCAB


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_batches_with_left_padding_give_the_rows_that_the_experts_received(family: str, attach: Attach) -> None:
    model = FAMILIES[family]()
    capture = attach(model)
    ids, mask = padded([4, 9, 7, 1])
    with Oracle(model).watching() as truth:
        sequences = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    check_generated(capture, truth, sequences, mask, ["0.0", "0.1", "0.2", "0.3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_with_return_sequences_gives_the_rows_that_the_experts_received(family: str, attach: Attach) -> None:
    model = FAMILIES[family]()
    capture = attach(model)
    ids, mask = padded([4, 6])
    torch.manual_seed(1)
    with Oracle(model).watching() as truth:
        sequences = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=20,
            do_sample=True,
            top_k=0,
            temperature=9.0,
            num_return_sequences=4,
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
    check_generated(capture, grid, sequences, mask, ["0.0", "0.1"])
    grid[1, 7, 1, 0] += 1
    with pytest.raises(AssertionError):
        check_generated(capture, grid, sequences, mask, ["0.0", "0.1"])


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

    def __init__(self, lengths: Sequence[int], dtype: torch.dtype) -> None:
        self.lengths = torch.tensor(lengths)
        self.dtype = dtype

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ARG002
        return (input_ids.shape[1] >= self.lengths).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("eos", [None, EOS])
def test_rows_of_sequences_that_a_criterion_of_the_user_has_ended_are_left_out(
    eos: int | None, dtype: torch.dtype, attach: Attach, model: Any
) -> None:
    model.generation_config.eos_token_id = eos
    capture = attach(model)
    ids, mask = padded([4, 6, 2])
    stops = StoppingCriteriaList([StopAt([8, 12, 9], dtype)])
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
    check_generated(capture, grid, sequences, mask, ["0.0", "0.1"])
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


def test_no_two_requests_get_one_id(attach: Attach, model: Any) -> None:
    capture = attach(model)
    for name in ["a#2", "a", "a", "a", "a#2"]:
        with capture.tap.request(name):
            model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=PAD)
    assert list(capture.requests()) == ["a#2", "a", "a#3", "a#4", "a#2#2"]


@pytest.mark.parametrize(
    "how", ["its ids", "another prompt", "one token", "in a generate of its own", "as it prepares it"]
)
def test_what_runs_the_model_during_a_call_gives_no_rows_to_its_requests(how: str, attach: Attach, model: Any) -> None:
    prompt = torch.tensor([[5, 6, 7]])
    other = torch.tensor([[9, 9, 9]])
    run: Callable[[torch.Tensor], Any] = {
        "its ids": lambda ids: model(ids),
        "another prompt": lambda ids: model(other, past_key_values=DynamicCache()),  # noqa: ARG005
        "one token": lambda ids: model(ids[:, -1:]),
        "in a generate of its own": lambda ids: model.generate(other, max_new_tokens=2, pad_token_id=PAD),  # noqa: ARG005
        "as it prepares it": lambda ids: model(**model.prepare_inputs_for_generation(other, use_cache=False)),  # noqa: ARG005
    }[how]
    model.generation_config.eos_token_id = None
    capture = attach(model)
    options = {"do_sample": False, "logits_processor": running(run), "pad_token_id": PAD}
    sequences = model.generate(prompt, max_new_tokens=5, **options)
    assert capture.tap.error is None
    tokens = sequences[0, :-1].tolist()
    rows = capture.rows("0.0")
    assert rows["token_ids"].tolist() == tokens
    np.testing.assert_array_equal(capture.experts("0.0"), oracle.replayed(model, tokens))
    assert capture.requests()["0.0"] == {"state": "finished", "prompt_tokens": 3, "tokens": 7, "missing": 0}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_decoder_that_is_given_embeddings_has_the_token_ids_of_the_call(cache: str, attach: Attach) -> None:
    model, twin = tiny_models.qwen3_vl_moe(), tiny_models.qwen3_vl_moe()
    model.generation_config.eos_token_id = None
    capture = attach(model)
    options = {"do_sample": False, "pad_token_id": PAD, "cache_implementation": cache, "disable_compile": True}
    sequences = model.generate(torch.tensor([[5, 6, 7], [8, 9, 10]]), max_new_tokens=7, **options)
    assert capture.tap.error is None
    for row, tokens in enumerate(sequences[:, :-1].tolist()):
        assert capture.rows(f"0.{row}")["token_ids"].tolist() == tokens
        np.testing.assert_array_equal(capture.experts(f"0.{row}"), oracle.replayed(twin, tokens))


@pytest.mark.parametrize("negative", [None, [[9, 9, 9, 9, 9, 9]]])
def test_classifier_free_guidance_leaves_the_requests_rows_alone(
    negative: list[list[int]] | None, attach: Attach, model: Any
) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {} if negative is None else {"negative_prompt_ids": torch.tensor(negative)}
    sequences = model.generate(ids, max_new_tokens=5, guidance_scale=1.5, pad_token_id=PAD, **options)
    assert capture.tap.error is None
    tokens = sequences[0, :-1].tolist()
    assert capture.rows("0.0")["token_ids"].tolist() == tokens
    np.testing.assert_array_equal(capture.experts("0.0"), oracle.replayed(model, tokens))


@pytest.mark.parametrize("name", ["", "0.3", "x" * 201, "\ud800", 5, None])
def test_a_name_that_cannot_be_told_from_a_made_one_is_refused(name: Any, attach: Attach, model: Any) -> None:
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
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            stopping_criteria=StoppingCriteriaList([Fails()]),
            pad_token_id=0,
        )
    assert {name: entry["state"] for name, entry in capture.requests().items()} == {"0.0": "aborted", "0.1": "aborted"}
    assert len(capture.experts("0.1")) == 8
    model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    assert capture.requests()["1.1"]["state"] == "finished"


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


def test_what_the_engine_asks_of_drafts_ends_nothing(
    attach: Attach, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Assisted generation asked the stopping criteria of drafts, too, up to transformers 5.17: here it does in any."""
    model.generation_config.eos_token_id = None
    capture = attach(model)
    criteria: list[Any] = []
    get_criteria = model._get_stopping_criteria

    def kept(*args: Any, **kwargs: Any) -> Any:
        criteria.append(get_criteria(*args, **kwargs))
        return criteria[0]

    get_candidates = PromptLookupCandidateGenerator.get_candidates
    ended = []

    def asking(generator: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        ids, logits = get_candidates(generator, input_ids, *args, **kwargs)
        ended.extend(criteria[0](ids, None).tolist())
        return ids, logits

    monkeypatch.setattr(model, "_get_stopping_criteria", kept)
    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", asking)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    sequences = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=PAD, prompt_lookup_num_tokens=3)
    assert any(ended), "no draft went past the end, so the test shows nothing"
    assert capture.rows("0.0")["token_ids"].tolist() == sequences[0, :-1].tolist()
    assert capture.requests()["0.0"]["state"] == "finished"


def assisted_starts(truth: Oracle, steps: Array) -> list[tuple[int, int]]:
    """Where each verifying forward's accepted rows lie: its step's rows are next to each other."""
    bounds = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(steps)]
    assert len(bounds) - 1 == len(truth.ids)
    return list(itertools.pairwise(bounds))


def test_the_drafts_of_another_attached_model_are_its_own(attach: Attach, model: Any) -> None:
    helper = tiny_models.qwen3_moe(num_hidden_layers=1, mlp_only_layers=[])
    capture, drafts = attach(model), attach(helper)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, assistant_model=helper, do_sample=False)
    assert list(capture.requests()) == ["0.0"]
    assert drafts.requests() == {}, "drafting is no request"


@pytest.mark.parametrize("way", ["greedy", "in compiled steps", "assisted", "beams"])
def test_what_a_call_was_given_is_let_go_of_with_it(way: str, attach: Attach) -> None:
    """At once, and not when Python collects garbage: it is a device's memory, where compiled graphs know addresses."""
    model, assistant = (tiny_models.mixtral(experts_implementation="batched_mm") for _ in range(2))
    attach(model)
    options: dict[str, Any] = {
        "greedy": {},
        "in compiled steps": compiling(CompileCounter()),
        "assisted": {"assistant_model": assistant},
        "beams": {"num_beams": 2},
    }[way]
    ids, mask = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.int64)
    model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)  # what compiles keeps its first arguments
    ids, mask = ids + 1, mask + 0
    given = [weakref.ref(ids), weakref.ref(mask)]
    gc.disable()
    try:
        model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
        del ids, mask
        assert [one() for one in given] == [None, None]
    finally:
        gc.enable()
