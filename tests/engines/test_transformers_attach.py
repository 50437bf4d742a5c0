"""Attaching and closing: the model does not notice, and what cannot be captured is refused."""

import copy
import gc
import itertools
import os
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

import oracle
import tiny_models
from batches import generate_batch
from expert_lens.engines import find_engine
from expert_lens.engines import transformers as engine
from expert_lens.errors import (
    EngineHookError,
    NotMoEError,
    SilentTapError,
    UnsupportedModelError,
)
from oracle import Oracle
from support import Attach, Capture, hooks_of, in_threads, padded
from tiny_models import EOS, FAMILIES, PAD, VOCAB


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


@pytest.mark.parametrize("forwards_before", [0, 1, 3])
def test_closing_in_the_middle_of_a_forward_is_no_error(forwards_before: int, attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    forwards = itertools.count()

    def closes(*_: Any) -> None:
        if next(forwards) == forwards_before:
            closer = threading.Thread(target=capture.tap.close)
            closer.start()
            closer.join()

    with oracle.experts_modules(model)[1].register_forward_pre_hook(closes), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=6, pad_token_id=PAD)
    assert output.shape == (1, 9)
    assert capture.tap.error is None
    assert capture.stats()["tokens"] == (0 if forwards_before == 0 else 2 + forwards_before)


def test_a_forked_child_leaves_the_parents_arena_alone(attach: Attach, model: Any) -> None:
    model.generation_config.eos_token_id = None
    capture = attach(model)
    prompt = torch.tensor([[5, 6, 7]])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a child has no thread but the one that forked
    try:
        cache = model(prompt, use_cache=True).past_key_values
        child = os.fork()
        if child == 0:
            try:
                del cache
                model.generate(prompt, max_new_tokens=4, pad_token_id=PAD)
                capture.tap.close()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        sequences = model.generate(prompt, max_new_tokens=6, pad_token_id=PAD)
    finally:
        torch.set_num_threads(threads)
    tokens = sequences[0, :-1].tolist()
    assert {name: each["tokens"] for name, each in capture.requests().items()} == {"0.0": 3, "1.0": len(tokens)}
    assert capture.rows("1.0")["token_ids"].tolist() == tokens
    assert capture.requests()["0.0"]["state"] == "running"
    assert capture.stats()["corrupt_records"] == 0
    del cache


def test_an_error_of_ours_switches_the_capture_off_and_not_the_model(attach: Attach, model: Any) -> None:
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    capture = attach(model)
    tap: Any = capture.tap._tap
    pack = tap._cat

    def fails(*args: Any) -> Any:
        if capture.stats()["tokens"] >= 4:
            raise RuntimeError("ours")
        return pack(*args)

    tap._cat = fails
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

    weakref.finalize(model, gone.set)
    capture.tap = engine_stub = type("Closed", (), {"close": lambda _: None})()
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

    in_threads(work, prompts)
    assert capture.tap.error is None
    assert capture.tap.lost_tokens == 0
    for name, output in outputs.items():
        expected = oracle.replayed(model, output[0, :-1].tolist())
        length = oracle.output_lengths(output, prompts[name].shape[1], [EOS])[0] + prompts[name].shape[1] - 1
        for suffix in ("", *(f"#{use}" for use in range(2, 11))):
            rows = capture.rows(name + suffix)
            assert rows["token_ids"].tolist() == output[0, :length].tolist()
            np.testing.assert_array_equal(np.sort(rows["experts"], -1), np.sort(expected[:length], -1))


def test_a_dense_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotMoEError, match=r"Qwen3ForCausalLM has no routed experts.*Attach to a mixture-of-experts"):
        Capture(tiny_models.dense(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model_class", "config", "says"),
    [
        (
            transformers.JetMoeForCausalLM,
            lambda: transformers.JetMoeConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=8,
                num_hidden_layers=1,
                kv_channels=8,
                num_local_experts=4,
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
                vocab_size=32,
                d_model=16,
                d_ff=8,
                d_kv=4,
                num_layers=1,
                num_decoder_layers=1,
                num_heads=2,
                num_experts=4,
                num_sparse_encoder_layers=1,
                num_sparse_decoder_layers=1,
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


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_that_run_past_the_decoder_are_noticed(cache: str, attach: Attach) -> None:
    model, other = tiny_models.qwen3_moe(), tiny_models.qwen3_moe()
    model.generation_config.eos_token_id = None
    capture = attach(model)
    forward = model.forward

    def run(input_ids: Any, **kwargs: Any) -> Any:
        return (forward if input_ids.shape[1] > 1 else other)(input_ids=input_ids, **kwargs)

    model.forward = run
    options = {"cache_implementation": cache, "disable_compile": True, "pad_token_id": PAD}
    with pytest.warns(RuntimeWarning, match="its forward was not seen"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, **options)
    assert isinstance(capture.tap.error, EngineHookError)
    assert capture.stats()["tokens"] == 3


def test_a_generation_function_of_the_users_own_is_counted_and_kept_for_no_request(
    attach: Attach,
    model: Any,
) -> None:
    capture = attach(model)

    def own(model: Any, input_ids: Any, **_: Any) -> Any:
        model(input_ids)
        return input_ids

    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, custom_generate=own)
    assert capture.tap.error is None
    assert capture.requests() == {}
    assert capture.stats()["unattributed_tokens"] == 3


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
