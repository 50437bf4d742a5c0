"""What a runner says of its model: which layers route, and how large a forward may be."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expert_lens.engines.sglang import model
from expert_lens.errors import UnsupportedModelError
from stand_ins import stand_in


class TopK(torch.nn.Module):
    """SGLang's: told which layer it is of, or not; with `shared` experts behind the `top_k` that it chooses."""

    def __init__(self, layer_id: int | None = None, top_k: int = 8, shared: int = 0) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.topk_config = SimpleNamespace(top_k=top_k + shared, num_fused_shared_experts=shared)


@pytest.fixture
def model_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    stand_in(monkeypatch, "sglang.srt.layers.moe.topk", TopK=TopK)

    def make(*layers: Any) -> Any:
        """A decoder of these layers: None for a dense one, or what its `TopK` is told."""
        decoder = torch.nn.Module()
        decoder.layers = torch.nn.ModuleList()
        for told in layers:
            layer = torch.nn.Module()
            layer.mlp = torch.nn.Module()
            if told is not None:
                layer.mlp.topk = TopK(*told)
            decoder.layers.append(layer)
        whole = torch.nn.Module()
        whole.model = decoder
        return whole

    return make


def test_the_number_of_kv_slots_is_told_in_three_ways() -> None:
    pool = {"page_size": 64, "max_total_num_tokens": 1000}
    translator = SimpleNamespace(capture_token_capacity=lambda size: size + 64)
    for told in (
        pool,
        {**pool, "max_total_num_tokens": 1, "max_token_pool_size": 1000, "kv_index_translator": SimpleNamespace()},
        {**pool, "max_total_num_tokens": 1, "max_token_pool_size": 1000, "kv_index_translator": translator},
    ):
        assert model._num_slots(SimpleNamespace(**told)) == 1064


def test_layers_tell_which_they_are(model_of: Callable[..., Any]) -> None:
    assert model._routed_layers(model_of(None, [1], None, [3])) == {1: 8, 3: 8}
    assert model._routed_layers(model_of(None, None)) == {}


def test_layers_that_do_not_tell_are_told_by_their_place(model_of: Callable[..., Any]) -> None:
    made = model_of([], None, [], [])
    assert list(model._routed_layers(made)) == [0, 2, 3]
    assert [layer.mlp.topk.layer_id for layer in made.model.layers if hasattr(layer.mlp, "topk")] == [0, 2, 3]


def test_a_model_may_call_its_layers_blocks(model_of: Callable[..., Any]) -> None:
    made = model_of([], [])
    made.transformer = torch.nn.Module()
    made.transformer.blocks = made.model.layers
    del made.model
    assert list(model._routed_layers(made)) == [0, 1]


def test_a_place_that_tells_nothing_is_refused(model_of: Callable[..., Any]) -> None:
    made = model_of([0])
    made.model.layers[0].other = TopK()
    with pytest.raises(
        UnsupportedModelError, match=r"model.layers.0.other of Module chooses experts and does not tell"
    ):
        model._routed_layers(made)
    made = model_of([0])
    made.router = TopK()
    with pytest.raises(UnsupportedModelError, match="router of Module"):
        model._routed_layers(made)


def test_shared_experts_are_none_of_those_chosen(model_of: Callable[..., Any]) -> None:
    assert model._routed_layers(model_of([0, 6, 1], [1, 6])) == {0: 6, 1: 6}
    made = model_of([0, 6])
    made.model.layers[0].mlp.topk.topk_config = SimpleNamespace(top_k=6, num_shared_topk_slots=2)
    assert model._routed_layers(made) == {0: 4}


@pytest.mark.parametrize(
    ("layers", "says"), [(([0, 4], [1, 6]), r"unlike numbers of experts a token: \{0: 4, 1: 6\}"), (([0],), None)]
)
def test_what_a_runner_says(
    model_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, layers: Any, says: str | None
) -> None:
    stand_in(monkeypatch, "sglang", __version__="0")
    runner = SimpleNamespace(
        model=model_of(*layers),
        model_config=SimpleNamespace(model_path="here", hf_text_config=SimpleNamespace(moe_num_experts=64)),
        server_args=SimpleNamespace(),
        max_total_num_tokens=100,
        page_size=1,
    )
    if says is None:
        facts = model.facts(runner)
        assert (facts["layers"], facts["top_k"], facts["num_experts"], facts["model"]) == ([0], 8, 64, "here")
        return
    with pytest.raises(UnsupportedModelError, match=says):
        model.facts(runner)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"chunked_prefill_size": 8192}, 8192 + 256),
        ({"chunked_prefill_size": 128}, 4096 + 256),
        ({"chunked_prefill_size": -1, "max_prefill_tokens": 30_000}, 30_000 + 256),
        ({"chunked_prefill_size": 8192, "speculative_num_draft_tokens": 64}, 8192 + 256 * 64),
    ],
)
def test_the_largest_forward_has_room(options: dict[str, int], rows: int) -> None:
    runner = SimpleNamespace(server_args=SimpleNamespace(**options), max_running_requests=256)
    assert model.largest_forward(runner) == rows
