"""Which rows of a MoE layer are this process's, for any number of processes, without SGLang."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from expert_lens.engines.sglang.layout import Layout, eager_rows, graph_rows, graphs_fork, refuse_unknown
from expert_lens.errors import EngineHookError, UnsupportedModelError
from stand_ins import stand_in


def layout(**changes: int) -> Layout:
    one = {
        "pp_size": 1, "pp_rank": 0, "attn_tp_size": 1, "attn_tp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
        "attn_cp_size": 1, "replica": 0,
    }  # fmt: skip
    return Layout(**{**one, **changes})


def publishing_ranks(*, attn_dp: int = 1, stages: int = 1) -> list[int | None]:
    """Of 2 replicas; in each so many ranks of data-parallel attention and stages; in each 2 of tensor parallelism."""
    return [
        layout(
            pp_size=stages,
            pp_rank=stage,
            attn_tp_size=2,
            attn_tp_rank=tp,
            attn_dp_size=attn_dp,
            attn_dp_rank=dp,
            replica=replica,
        ).publishing_rank
        for replica, dp, stage, tp in itertools.product(range(2), range(attn_dp), range(stages), range(2))
    ]


PARALLEL: dict[str, int] = {
    "pp_size": 2, "pp_rank": 1, "attn_tp_size": 2, "attn_tp_rank": 0, "attn_dp_size": 1, "attn_dp_rank": 0,
    "attn_cp_size": 1,
}  # fmt: skip
"""What SGLang says of the second stage of an engine without data-parallel attention."""


@pytest.mark.parametrize("told", ["by the runner", "in its ps", "beside the other ranks", "nowhere"])
def test_a_process_knows_which_replica_it_is_of(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases say it in three places; without replicas they say None."""
    here = SimpleNamespace(**PARALLEL, **({"dp_rank": 3} if told == "beside the other ranks" else {}))
    runner = SimpleNamespace(server_args=SimpleNamespace(dp_size=1 if told == "nowhere" else 4))
    if told == "by the runner":
        runner.dp_rank = 3
    elif told == "in its ps":
        runner.ps = SimpleNamespace(dp_rank=3)
    stand_in(monkeypatch, "sglang.srt.runtime_context", get_parallel=lambda: here)
    replica = 0 if told == "nowhere" else 3
    assert Layout.of(runner) == layout(pp_size=2, pp_rank=1, attn_tp_size=2, replica=replica)


def test_the_ranks_of_data_parallel_attention_are_no_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    here = SimpleNamespace(**{**PARALLEL, "attn_dp_size": 2, "attn_dp_rank": 1}, dp_rank=1)
    stand_in(monkeypatch, "sglang.srt.runtime_context", get_parallel=lambda: here)
    runner = SimpleNamespace(server_args=SimpleNamespace(dp_size=2))
    assert Layout.of(runner).publishing_rank == 1 * 2 + 1  # the second rank's second stage


def test_a_replica_that_nobody_tells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all of them would publish as the first one."""
    stand_in(monkeypatch, "sglang.srt.runtime_context", get_parallel=lambda: SimpleNamespace(**PARALLEL))
    with pytest.raises(UnsupportedModelError, match="2 data-parallel replicas, and this release of SGLang does not"):
        Layout.of(SimpleNamespace(server_args=SimpleNamespace(dp_size=2)))


@pytest.mark.parametrize("by_attention", [True, False])
def test_releases_that_do_not_tell_of_replicas(by_attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch,
        "sglang.srt.layers.dp_attention",
        is_dp_attention_enabled=lambda: by_attention,
        get_attention_tp_size=lambda: 1,
        get_attention_tp_rank=lambda: 0,
        get_attention_dp_rank=lambda: 1,
    )
    runner = SimpleNamespace(pp_size=1, pp_rank=0, server_args=SimpleNamespace(dp_size=2))
    if by_attention:
        assert Layout.of(runner) == layout(attn_dp_size=2, attn_dp_rank=1)
    else:
        with pytest.raises(UnsupportedModelError, match=r"2 data-parallel replicas, .* that does: 0\.5\.15 to "):
            Layout.of(runner)


def test_one_process_of_each_data_parallel_rank_publishes() -> None:
    assert publishing_ranks(attn_dp=2) == [0, None, 1, None, 2, None, 3, None]


def test_every_pipeline_stage_of_each_data_parallel_rank_publishes() -> None:
    assert publishing_ranks(stages=3) == [0, None, 1, None, 2, None, 3, None, 4, None, 5, None]


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_graphs_rows_stand_behind_those_of_the_ranks_before(rank: int) -> None:
    ranks = layout(attn_dp_size=4, attn_dp_rank=rank)
    seen = [(owner, row) for owner in range(4) for row in range(16)]
    assert seen[graph_rows(64, 16, ranks)] == [(rank, row) for row in range(16)]
    assert graph_rows(16, 16, ranks) == slice(0, 16)  # each rank routes its own
    with pytest.raises(EngineHookError, match="saw 32 tokens in a graph of 16, of 4 data-parallel ranks"):
        graph_rows(32, 16, ranks)


def test_without_data_parallel_attention_every_row_of_a_graph_is_ones_own() -> None:
    assert graph_rows(8, 8, layout()) == slice(0, 8)
    with pytest.raises(EngineHookError, match="saw 16 tokens"):
        graph_rows(16, 8, layout())


def group(world_size: int = 2, disabled: bool | None = False) -> Any:
    """A group of ranks as SGLang has it; `disabled`: its own all-reduce, None: it has none."""
    own = None if disabled is None else SimpleNamespace(disabled=disabled)
    return SimpleNamespace(world_size=world_size, ca_comm=own)


@pytest.mark.parametrize(
    ("ranks", "groups", "symmetric", "forks"),
    [
        ({}, None, False, False),
        ({"attn_dp_size": 2}, None, False, True),
        ({"attn_tp_size": 2}, [group(), group(1, None), group()], False, False),
        ({"attn_tp_size": 2}, [group(), group(), group(1, None)], False, False),
        ({"attn_tp_size": 2}, [group(disabled=True), group(1), group(disabled=True)], False, True),
        ({"attn_tp_size": 2}, [group(disabled=None), group(1), group(disabled=None)], False, True),
        ({"attn_tp_size": 4}, [group(4), group(2, None), group(2, None)], False, True),
        ({"attn_tp_size": 2}, [group(), group(1), group()], True, True),
        ({"attn_tp_size": 2}, [], False, True),
    ],
)
def test_graphs_fork_where_ranks_talk_by_nccl(
    ranks: dict[str, int], groups: list[Any] | None, symmetric: bool, forks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what was asked has another name: the capture does not depend on it."""
    if groups is not None:
        names = ("get_tp_group", "get_moe_ep_group", "get_moe_tp_group")
        state = {name: lambda found=found: found for name, found in zip(names, groups, strict=False)}
        stand_in(monkeypatch, "sglang.srt.distributed.parallel_state", **state)
    assert graphs_fork(layout(**ranks), SimpleNamespace(enable_symm_mem=symmetric)) == forks


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_eager_forwards_rows_stand_behind_those_of_the_ranks_before(rank: int) -> None:
    counts, ranks = [5, 0, 7], layout(attn_dp_size=3, attn_dp_rank=rank)
    seen = [owner for owner, count in enumerate(counts) for _ in range(count)]
    begin = eager_rows(12, counts[rank], counts, ranks)
    assert seen[begin : begin + counts[rank]] == [rank] * counts[rank]
    if counts[rank]:
        assert eager_rows(counts[rank], counts[rank], counts, ranks) == 0  # each rank routes its own
    with pytest.raises(EngineHookError, match="saw 11 tokens"):
        eager_rows(11, counts[rank], counts, ranks)
    # Where each rank routes its own, SGLang tells of no other's.
    assert eager_rows(5, 5, [5], ranks) == eager_rows(5, 8, [5], ranks) == eager_rows(8, 8, [5], ranks) == 0
    with pytest.raises(EngineHookError, match="saw 6 tokens"):
        eager_rows(6, 8, [5], ranks)


def test_a_padded_forward_of_one_rank_begins_with_its_rows() -> None:
    assert eager_rows(16, 16, None, layout()) == 0
    assert eager_rows(16, 13, [13], layout()) == 0


@pytest.mark.parametrize(
    ("ranks", "options", "backend", "message"),
    [
        ({"attn_cp_size": 2}, {}, "none", "context-parallel ranks"),
        ({}, {"device": "npu"}, "none", "--device npu"),
        ({"attn_tp_size": 2}, {}, "deepep", "--moe-a2a-backend deepep over 2 attention ranks"),
        ({"attn_tp_size": 4}, {}, "mooncake", "--moe-a2a-backend mooncake over 4 attention ranks"),
        ({}, {"enable_two_batch_overlap": True}, "none", "--enable-two-batch-overlap"),
        ({}, {"enable_pdmux": True}, "none", "--enable-pdmux"),
        ({}, {"elastic_ep_backend": "mooncake"}, "none", "--elastic-ep-backend, which may run a forward twice"),
        ({}, {"kt_weight_path": "weights/"}, "none", "--kt-weight-path"),
        ({}, {"disaggregation_decode_enable_offload_kvcache": True}, "none", "requests end where nobody is told"),
        ({"pp_size": 2}, {"enable_dynamic_chunking": True}, "none", "--enable-dynamic-chunking with pipeline stages"),
    ],
)
def test_what_gives_no_whole_rows_is_refused_by_name(
    ranks: dict[str, int], options: dict[str, Any], backend: str, message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        refuse_unknown(layout(**ranks), SimpleNamespace(**options), backend)


def test_what_gives_whole_rows_is_not_refused() -> None:
    refuse_unknown(layout(attn_tp_size=4), SimpleNamespace(), "none")
    refuse_unknown(layout(), SimpleNamespace(device="cpu"), "none")
    refuse_unknown(layout(), SimpleNamespace(enable_dynamic_chunking=True), "none")
    refuse_unknown(layout(attn_dp_size=4), SimpleNamespace(enable_pdmux=False, kt_weight_path=None), "deepep")
