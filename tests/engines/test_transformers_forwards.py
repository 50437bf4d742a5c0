"""Plain forwards, under any padding and over any cache."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import oracle
from oracle import Oracle
from support import MISSING, Attach, check_token_ids_wherever_they_lie, padded
from tiny_models import PAD, VOCAB


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
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


def test_token_ids_are_those_of_the_forward_wherever_they_lie(attach: Attach, model: Any) -> None:
    check_token_ids_wherever_they_lie(attach, model)


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
