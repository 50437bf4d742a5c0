"""The capturer, called as SGLang's scheduler calls it, over CPU tensors: what a reader gets of each kind of forward.

What needs a GPU (graphs, streams) is in tests/gpu/test_sglang.py, with the real engine.
"""

import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expert_lens import graphs
from expert_lens._core import Collector, Writer
from expert_lens.engines.sglang.capturer import Capturer
from expert_lens.engines.sglang.layout import Layout
from expert_lens.errors import EngineHookError, SilentTapError
from expert_lens.steps import Step
from expert_lens.tap import Tap
from stand_ins import stand_in

LAYERS, EXPERTS, TOP_K = [1, 2, 5], 256, 2
FACTS: dict[str, Any] = {"layers": LAYERS, "num_experts": EXPERTS, "top_k": TOP_K}
ONE = Layout(1, 0, 1, 0, 1, 0, 1, 0)


class Mode(SimpleNamespace):
    def is_decode(self) -> bool:
        return bool(self.name == "DECODE")


class Native:
    """SGLang's own capturer."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.ends = 0

    def capture(self, layer_id: int, _: torch.Tensor) -> None:
        self.layers.append(layer_id)

    def on_forward_end(self, **_: Any) -> str:
        self.ends += 1
        return "as it was"


class Engine:
    """Runs forwards of known experts through the capturer."""

    def __init__(self, layout: Layout = ONE) -> None:
        self.tap = Tap(Writer("scheduler", **FACTS, kv_slots=1000), **FACTS)
        self.native = Native()
        table = torch.arange(40 * 100, dtype=torch.int32).reshape(40, 100) % 1000
        runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), server_args=SimpleNamespace()
        )
        self.capturer = Capturer(runner, self.native, self.tap, layout, max_rows=64, slots=True)
        self.capturer._on_gpu = True  # as far as captures of graphs go, which tests pretend
        self.collector = Collector("scheduler")
        self.rng = np.random.default_rng(0)
        self.slot = 100

    def batch(
        self, mode: str, rids: list[str], starts: list[int], lengths: list[int], pad: int = 0, **more: Any
    ) -> Any:
        n = sum(lengths)
        positions = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
        slots = torch.arange(self.slot, self.slot + n + pad)
        self.slot += n
        extends = mode in ("EXTEND", "MIXED")
        made = {
            "forward_mode": Mode(name=mode),
            "rids": rids,
            "batch_size": len(rids),
            "positions": torch.tensor(positions + [0] * pad),
            "input_ids": torch.tensor([position + 7 for position in positions] + [0] * pad),
            "out_cache_loc": slots,
            "seq_lens_cpu": torch.tensor([start + length for start, length in zip(starts, lengths, strict=True)]),
            "extend_prefix_lens_cpu": starts if extends else None,
            "extend_seq_lens_cpu": lengths if extends else None,
            "req_pool_indices": torch.arange(len(rids)),
            "global_num_tokens_cpu": None,
            "spec_info": None,
        }
        return SimpleNamespace(**{**made, **more})

    def experts(self, rows: int) -> torch.Tensor:
        return torch.tensor(self.rng.integers(0, EXPERTS, (rows, len(LAYERS), TOP_K)), dtype=torch.int32)

    def begin(self, batch: Any) -> None:
        """One forward, up to its first layer."""
        self.capturer.run(lambda _: None, batch)

    def forward(
        self, batch: Any, experts: torch.Tensor | None, layers: list[int] | None = None, *, in_graph: bool = False
    ) -> Any:
        """One forward; `experts` None: without Python."""
        self.begin(batch)
        if experts is not None:
            self.hand_over(experts, layers or LAYERS)
        return self.capturer.on_forward_end(batch, can_run_graph=in_graph, cuda_graph_batch=None, no_copy_to_cpu=True)

    def hand_over(self, experts: torch.Tensor, layers: list[int]) -> None:
        for layer in layers:
            ids = experts[:, LAYERS.index(layer)]
            shared = torch.full((len(ids), 1), EXPERTS, dtype=torch.int32)  # a shared expert's column
            self.capturer.capture(layer_id=layer, topk_indices=torch.cat([ids, shared], 1))

    def rows(self, request: str) -> Any:
        assert self.collector.sync(5.0)
        return self.collector.rows(request)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Whether a graph is being captured: there is no driver here to ask."""
    state = SimpleNamespace(on=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.on)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs))  # noqa: ARG005
    return state


@pytest.fixture
def engine(capturing: SimpleNamespace) -> Iterator[Engine]:
    assert not capturing.on
    made = Engine()
    yield made
    made.collector.close()
    made.tap.close()


def test_prompts_and_decodes_beside_them(engine: Engine) -> None:
    first, second = engine.experts(5), engine.experts(4)
    result = engine.forward(engine.batch("EXTEND", ["a", "b"], [0, 0], [3, 2]), first)
    assert result == "as it was"
    engine.forward(engine.batch("MIXED", ["c", "a"], [0, 3], [3, 1]), second)
    np.testing.assert_array_equal(engine.rows("a")["experts"], torch.cat([first[:3], second[3:]]).numpy())
    np.testing.assert_array_equal(engine.rows("b")["experts"], first[3:].numpy())
    np.testing.assert_array_equal(engine.rows("c")["experts"], second[:3].numpy())
    np.testing.assert_array_equal(engine.rows("a")["token_ids"], [7, 8, 9, 10])
    assert engine.native.layers == LAYERS * 2
    assert engine.native.ends == 2


def test_padded_forwards_give_the_rows_of_their_requests_alone(engine: Engine) -> None:
    prompt, step = engine.experts(8), engine.experts(4)
    engine.forward(engine.batch("EXTEND", ["a", "b"], [0, 0], [3, 2], pad=3), prompt)
    engine.forward(engine.batch("DECODE", ["a", "b"], [3, 2], [1, 1], pad=2), step)
    np.testing.assert_array_equal(engine.rows("a")["experts"], torch.cat([prompt[:3], step[:1]]).numpy())
    np.testing.assert_array_equal(engine.rows("b")["experts"], torch.cat([prompt[3:5], step[1:2]]).numpy())
    assert engine.collector.stats()["tokens"] == 7


def test_a_prefix_from_the_cache_has_the_rows_that_stand_in_its_slots(engine: Engine) -> None:
    first, second = engine.experts(4), engine.experts(2)
    engine.slot = 0
    engine.forward(engine.batch("EXTEND", ["a"], [0], [4]), first)  # slots 0 to 3: row 0 of the table
    batch = engine.batch("EXTEND", ["b"], [3], [2])
    engine.capturer.requests.admit([Req("b", 5)])
    engine.forward(batch, second)
    np.testing.assert_array_equal(engine.rows("b")["experts"], torch.cat([first[:3], second]).numpy())


def test_a_rank_that_is_idle_in_a_decode_graph_forgets_no_slots(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """With data-parallel attention a rank without requests replays the others' graph, for nobody: nothing is lost."""
    replayed = []
    recorded = SimpleNamespace(replay=lambda launch, rows: replayed.append(rows) or launch())
    first, second = engine.experts(4), engine.experts(2)
    engine.slot = 0
    engine.forward(engine.batch("EXTEND", ["a"], [0], [4]), first)
    idle = engine.batch("IDLE", [], [], [])
    engine.begin(idle)
    engine.capturer._replay(recorded, lambda: None)  # type: ignore[arg-type]
    engine.capturer.on_forward_end(idle, can_run_graph=True, cuda_graph_batch=8)
    engine.capturer.requests.admit([Req("b", 5)])
    engine.forward(engine.batch("EXTEND", ["b"], [3], [2]), second)
    assert replayed == [None]
    assert caplog.messages == []
    np.testing.assert_array_equal(engine.rows("b")["experts"], torch.cat([first[:3], second]).numpy())


class Req(SimpleNamespace):
    def __init__(self, rid: str, prompt: int) -> None:
        super().__init__(
            rid=rid,
            origin_input_ids=[0] * prompt,
            output_ids=[1, 2],
            output_ids_through_stop=[1, 2],
            finished_reason=object(),
        )


class Recorded:
    """Stands in for what was recorded in a decode graph: notes whose rows each replay has."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.launches = 0

    def replay(self, launch: Any, rows: Any) -> None:
        self.rows = rows
        launch()

    def launch(self) -> None:
        self.launches += 1

    def step(self, rids: list[str], **more: Any) -> Any:
        """The spans of a replay's rows by number, id and row; None if it has none."""
        n = len(rids)
        batch = self.engine.batch("DECODE", rids, [4] * n, [1] * n, **more)
        self.engine.begin(batch)
        self.engine.capturer._replay(self, self.launch)  # type: ignore[arg-type]
        self.engine.capturer.on_forward_end(batch, can_run_graph=True, cuda_graph_batch=n)
        return None if self.rows is None else [span[:3] for span in self.rows.spans]


def test_a_replay_has_the_rows_of_its_own_batch(engine: Engine) -> None:
    recorded, requests = Recorded(engine), engine.capturer.requests
    first, second = Req("a", 3), Req("b", 3)
    requests.admit([first, second])
    both = recorded.step(["a", "b"])
    numbers = [number for number, _, _ in both]
    assert both == [(numbers[0], "a", 0), (numbers[1], "b", 1)]
    known = recorded.rows
    assert recorded.step(["a", "b"]) == both
    assert recorded.rows is known  # nothing was made anew
    assert recorded.step(["b", "a"]) == [(numbers[1], "b", 0), (numbers[0], "a", 1)]
    assert recorded.step(["b"]) == [(numbers[1], "b", 0)]
    assert recorded.step(["b"], batch_size=3) is None  # a beam search: one name for three sequences
    assert recorded.step(["b"]) == [(numbers[1], "b", 0)]
    requests.release(second)
    again = Req("b", 3)
    requests.admit([again])
    requests.release(second)  # its end is told late: it is not the new one's
    [(number, name, _)] = recorded.step(["b"])
    assert (number not in numbers, name) == (True, "b#2")
    drafted = engine.batch("TARGET_VERIFY", ["b"], [4], [2], spec_info=SimpleNamespace(draft_token_num=2))
    engine.forward(drafted, engine.experts(2))
    engine.capturer.accept(torch.tensor([[0, 1]], dtype=torch.int32))
    assert recorded.step(["b"]) == [(number, "b#2", 0)]
    assert recorded.step([], batch_size=0) is None
    assert recorded.launches == 9
    assert engine.tap.error is None
    engine.tap.close()
    recorded.step(["a"])
    assert recorded.launches == 10


def test_a_forward_that_raised_leaves_nothing_to_the_next(engine: Engine) -> None:
    engine.begin(engine.batch("EXTEND", ["a"], [0], [2]))
    engine.hand_over(engine.experts(2), LAYERS)  # and then it raises: no end is told
    with pytest.warns(RuntimeWarning, match="handed over no experts"):
        engine.forward(engine.batch("EXTEND", ["b"], [0], [2]), None)
    assert engine.rows("b") is None


def test_a_forward_is_run_with_what_it_is_called_with(engine: Engine) -> None:
    batch = engine.batch("DECODE", ["a"], [0], [1])
    run = partial(engine.capturer.run, lambda forward_batch, scale, *, offset: (forward_batch, scale, offset))
    assert run(batch, 2, offset=3) == (batch, 2, 3)
    assert run(forward_batch=batch, scale=4, offset=5) == (batch, 4, 5)


def test_an_engine_that_is_not_as_known_ends_the_capture_alone(engine: Engine) -> None:
    with pytest.warns(RuntimeWarning, match="extend_prefix_lens_cpu"):
        engine.begin(SimpleNamespace())
    assert engine.capturer.on_forward_end(None, can_run_graph=True, cuda_graph_batch=1) == "as it was"


def test_what_a_graph_leaves_is_published_once(engine: Engine, capturing: SimpleNamespace) -> None:
    """The copy that is recorded while a graph is captured runs at once here, as in a replay."""
    experts = engine.experts(6)
    batch = engine.batch("EXTEND", ["a"], [0], [4])
    engine.begin(batch)
    capturing.on = True
    engine.hand_over(experts, LAYERS)
    capturing.on = False
    engine.capturer.on_forward_end(batch, can_run_graph=True, cuda_graph_batch=6)
    np.testing.assert_array_equal(engine.rows("a")["experts"], experts[:4].numpy())
    engine.forward(engine.batch("EXTEND", ["a"], [4], [1]), None)  # writes nothing: no row of the one before
    rows = engine.rows("a")
    assert len(rows["phases"]) == 4
    assert engine.collector.stats()["tokens"] == 4
    assert engine.tap.error is None
    with pytest.warns(RuntimeWarning, match=r"layers \(1, 2, 5\) handed over no experts in a forward in mode DECODE"):
        engine.forward(engine.batch("DECODE", ["a"], [5], [1]), None)


def test_a_forward_of_more_tokens_than_were_thought_to_be_the_most_is_told(engine: Engine) -> None:
    with pytest.warns(RuntimeWarning, match="mode EXTEND of 65 tokens, where 64 were thought to be the most"):
        engine.forward(engine.batch("EXTEND", ["a"], [0], [65]), None, in_graph=True)
    assert isinstance(engine.tap.error, EngineHookError)


def test_a_layer_that_chooses_twice_in_a_graph_ends_the_capture_by_its_number(
    engine: Engine, capturing: SimpleNamespace
) -> None:
    capturing.on = True
    with pytest.warns(RuntimeWarning, match="layer 2 has chosen twice in a graph that is captured"):
        engine.hand_over(engine.experts(4), [1, 2, 2, 5])
    assert isinstance(engine.tap.error, EngineHookError)


@pytest.mark.parametrize(
    ("handed_over", "said"),
    [([1, 5], r"layers \(2,\) gave no experts"), ([2, 5], r"layers \(1,\) handed over no experts in a forward")],
)
def test_a_layer_that_hands_over_nothing_ends_the_capture_by_its_number(
    engine: Engine, handed_over: list[int], said: str
) -> None:
    engine.forward(engine.batch("EXTEND", ["z"], [0], [2]), engine.experts(2))  # one of its mode that was all there
    with pytest.warns(RuntimeWarning, match=said):
        result = engine.forward(engine.batch("EXTEND", ["a"], [0], [2]), engine.experts(2), handed_over)
    assert result == "as it was"
    assert engine.collector.failure is not None
    assert engine.forward(engine.batch("EXTEND", ["b"], [0], [2]), engine.experts(2)) == "as it was"


def test_no_layer_at_all_ends_the_capture(engine: Engine) -> None:
    with pytest.warns(
        RuntimeWarning, match=r"layers \(1, 2, 5\) handed over no experts in a forward in mode EXTEND of 2"
    ):
        engine.forward(engine.batch("EXTEND", ["a"], [0], [2]), None)
    assert isinstance(engine.tap.error, SilentTapError)


def test_rejected_tokens_leave_no_rows(engine: Engine) -> None:
    """Two requests of four drafted tokens each, as a chain and as a tree: 2 and 3 are accepted."""
    prompt, drafted = engine.experts(4), engine.experts(8)
    engine.forward(engine.batch("EXTEND", ["a", "b"], [0, 0], [2, 2]), prompt)
    batch = engine.batch("TARGET_VERIFY", ["a", "b"], [2, 2], [4, 4], spec_info=SimpleNamespace(draft_token_num=4))
    batch.positions = torch.tensor([2, 3, 4, 5, 2, 3, 3, 4])  # b: a tree whose second branch is taken
    engine.forward(batch, drafted)
    engine.capturer.accept(torch.tensor([[0, 1, -1], [4, 6, 7]], dtype=torch.int32))
    np.testing.assert_array_equal(engine.rows("a")["experts"], torch.cat([prompt[:2], drafted[:2]]).numpy())
    np.testing.assert_array_equal(engine.rows("b")["experts"], torch.cat([prompt[2:], drafted[[4, 6, 7]]]).numpy())
    assert engine.collector.stats()["tokens"] == 9


def test_accepted_tokens_stand_in_the_slots_that_they_are_moved_to(engine: Engine) -> None:
    engine.slot = 0
    engine.forward(engine.batch("EXTEND", ["a"], [0], [1]), engine.experts(1))
    batch = engine.batch("TARGET_VERIFY", ["a"], [1], [4], spec_info=SimpleNamespace(draft_token_num=4))
    batch.positions = torch.tensor([1, 2, 2, 3])
    drafted = engine.experts(4)
    engine.forward(batch, drafted)
    engine.capturer.accept(torch.tensor([[0, 2, 3]], dtype=torch.int32))  # slots 1, 2 and 3 hold them now
    engine.capturer.requests.admit([Req("b", 5)])
    engine.forward(engine.batch("EXTEND", ["b"], [4], [1]), engine.experts(1))
    np.testing.assert_array_equal(engine.rows("b")["experts"][1:4], drafted[[0, 2, 3]].numpy())


def test_drafted_tokens_that_nobody_judges_count_as_dropped(engine: Engine) -> None:
    more = {"spec_info": SimpleNamespace(draft_token_num=4)}
    engine.forward(engine.batch("TARGET_VERIFY", ["a"], [2], [4], **more), engine.experts(4))
    engine.forward(engine.batch("EXTEND", ["b"], [0], [2]), engine.experts(2))
    assert engine.rows("b") is not None
    assert engine.collector.stats()["dropped_tokens"] == 4
    engine.capturer.accept(torch.tensor([[0, 1]]))  # too late
    assert engine.collector.stats()["tokens"] == 2


def test_sequences_without_names_count_as_dropped(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """Those of a beam search, behind the one that has the request's name; and forwards of modes that are not known."""
    for _ in range(2):
        engine.forward(engine.batch("DECODE", ["a"], [2], [1], batch_size=3, pad=2), engine.experts(3))
        engine.forward(engine.batch("SPLIT_PREFILL", ["a"], [2], [2]), engine.experts(2))
    said = [record.getMessage().partition(" of forwards ")[2] for record in caplog.records]
    assert said == [
        "of sequences that are no requests by name, as in a beam search.",
        "in mode SPLIT_PREFILL, which it does not know.",
    ]
    engine.forward(engine.batch("IDLE", [], [], []), None)
    assert engine.rows("a") is None
    stats = engine.collector.stats()
    assert (stats["tokens"], stats["dropped_tokens"]) == (0, 10)
    assert engine.tap.error is None


@pytest.mark.usefixtures("capturing")
def test_data_parallel_ranks_have_their_own_rows() -> None:
    engine = Engine(Layout(1, 0, 1, 0, 3, 1, 1, 0))
    experts = engine.experts(9)
    engine.forward(engine.batch("EXTEND", ["a"], [0], [2], global_num_tokens_cpu=[4, 2, 3]), experts)
    np.testing.assert_array_equal(engine.rows("a")["experts"], experts[4:6].numpy())
    with pytest.warns(RuntimeWarning, match="saw 8 tokens"):
        engine.forward(engine.batch("DECODE", ["a"], [2], [1], global_num_tokens_cpu=[4, 2, 3]), engine.experts(8))
    assert isinstance(engine.tap.error, EngineHookError)
    engine.collector.close()
    engine.tap.close()


@pytest.mark.usefixtures("capturing")
def test_rows_that_pad_may_hold_what_is_no_expert() -> None:
    """SGLang masks them by -1, and where there are 256 experts each forward's ids are looked at."""
    assert EXPERTS == 256
    engine = Engine(Layout(1, 0, 1, 0, 2, 1, 1, 0))
    for start in range(3):
        experts = engine.experts(8)
        experts[[1, 2, 3, 5, 6, 7]] = -1
        batch = engine.batch("DECODE", ["a"], [start], [1], pad=3, global_num_tokens_cpu=[4, 4])
        engine.forward(batch, experts)
        np.testing.assert_array_equal(engine.rows("a")["experts"][start:], experts[4:5].numpy())
    assert engine.tap.error is None
    engine.collector.close()
    engine.tap.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What SGLang says of data-parallel ranks in the forward that is being captured."""
    state = SimpleNamespace(rows=4, alike=True)
    told = {"get_local_dp_buffer_len": lambda: state.rows, "is_dp_max_padding": lambda: state.alike}
    stand_in(monkeypatch, "sglang.srt.layers.dp_attention", **told)
    return state


def test_a_data_parallel_rank_has_its_own_rows_of_graphs_of_prompts(
    capturing: SimpleNamespace, ranks: SimpleNamespace
) -> None:
    """Cut out while they are captured; what was recorded runs at once here, as in a replay."""
    engine = Engine(Layout(1, 0, 1, 0, 3, 1, 1, 0))
    counts = {"global_num_tokens_cpu": [4, 3, 2]}
    expected = []
    for mode, rids, starts, lengths in (("EXTEND", ["a"], [0], [3]), ("MIXED", ["b", "a"], [0, 3], [2, 1])):
        batch, experts = engine.batch(mode, rids, starts, lengths, **counts), engine.experts(3 * ranks.rows)
        engine.begin(batch)
        capturing.on = True
        engine.hand_over(experts, LAYERS)
        capturing.on = False
        engine.capturer.on_forward_end(batch, can_run_graph=True, cuda_graph_batch=None)
        expected.append(experts[4:7])
    np.testing.assert_array_equal(engine.rows("a")["experts"], torch.cat([expected[0], expected[1][2:]]).numpy())
    np.testing.assert_array_equal(engine.rows("b")["experts"], expected[1][:2].numpy())
    assert (engine.collector.stats()["dropped_tokens"], engine.tap.error) == (0, None)
    capturing.on = True
    with pytest.warns(RuntimeWarning, match="saw 11 tokens in a graph of 4, of 3 data-parallel ranks"):
        engine.hand_over(engine.experts(11), LAYERS)
    engine.collector.close()
    engine.tap.close()


def test_rows_of_data_parallel_ranks_that_cannot_be_told_apart_count_as_dropped(
    capturing: SimpleNamespace,
    ranks: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In graphs of ranks with unlike rows, and in compiled code; what runs otherwise goes on to have its rows."""
    engine = Engine(Layout(1, 0, 1, 0, 3, 1, 1, 0))
    ranks.alike = False
    counts = {"global_num_tokens_cpu": [4, 2, 3]}
    for how in ("captured", "compiled"):
        capturing.on = how == "captured"
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda how=how: how == "compiled")
            engine.hand_over(engine.experts(9), LAYERS)
        capturing.on = False
        assert (engine.capturer._static._ids == -1).all()
        engine.forward(engine.batch("EXTEND", ["a"], [0], [2], **counts), None, in_graph=True)
    experts = engine.experts(9)
    engine.forward(engine.batch("EXTEND", ["b"], [0], [2], **counts), experts)
    np.testing.assert_array_equal(engine.rows("b")["experts"], experts[4:6].numpy())
    assert engine.rows("a") is None
    assert engine.collector.stats()["dropped_tokens"] == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert engine.tap.error is None
    engine.collector.close()
    engine.tap.close()


@pytest.mark.usefixtures("capturing")
def test_a_data_parallel_rank_whose_layers_are_silent_ends_the_capture() -> None:
    engine = Engine(Layout(1, 0, 1, 0, 3, 1, 1, 0))
    with pytest.warns(RuntimeWarning, match=r"layers \(1, 2, 5\) handed over no experts in a forward in mode EXTEND"):
        engine.forward(engine.batch("EXTEND", ["a"], [0], [2], global_num_tokens_cpu=[4, 2, 3]), None)
    engine.collector.close()
    engine.tap.close()


def test_a_data_parallel_rank_has_its_own_rows_of_graphs_that_verify(
    capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their rows are cut out while they are captured; what was recorded runs at once here, as in a replay."""
    engine = Engine(Layout(1, 0, 1, 0, 2, 1, 1, 0))
    engine.forward(engine.batch("EXTEND", ["a"], [0], [2], global_num_tokens_cpu=[2, 2]), engine.experts(4))
    runner = DecodeCapture(engine, monkeypatch)
    runner.capture_forward_mode = Mode(name="TARGET_VERIFY")
    runner.num_tokens_per_bs = 4
    drafted = engine.experts(8)
    more = {"spec_info": SimpleNamespace(draft_token_num=4), "global_num_tokens_cpu": [4, 4]}
    batch = engine.batch("TARGET_VERIFY", ["a"], [2], [4], **more)
    batch.positions = torch.tensor([2, 3, 3, 4])
    engine.begin(batch)
    with engine.capturer.capturing(runner, 1, runner.forward):
        capturing.on = True
        engine.hand_over(drafted, LAYERS)
    capturing.on = False
    engine.capturer.on_forward_end(batch, can_run_graph=True, cuda_graph_batch=1)
    engine.capturer.accept(torch.tensor([[0, 2]], dtype=torch.int32))
    np.testing.assert_array_equal(engine.rows("a")["experts"][2:], drafted[[4, 6]].numpy())
    assert (engine.collector.stats()["dropped_tokens"], engine.tap.error) == (0, None)
    engine.collector.close()
    engine.tap.close()


def test_rows_that_are_lost_are_not_the_next_forwards(engine: Engine, capturing: SimpleNamespace) -> None:
    """A graph that ran for a beam search has left its rows; the forward behind it leaves none."""
    batch = engine.batch("EXTEND", ["a"], [0], [4], batch_size=3)
    engine.begin(batch)
    capturing.on = True
    engine.hand_over(engine.experts(4), LAYERS)
    capturing.on = False
    engine.capturer.on_forward_end(batch, can_run_graph=True, cuda_graph_batch=4)
    with pytest.warns(RuntimeWarning, match="handed over no experts in a forward in mode DECODE"):
        engine.forward(engine.batch("DECODE", ["b"], [4], [1]), None)
    assert engine.rows("b") is None


def test_drafted_tokens_of_unlike_number_count_as_dropped(engine: Engine) -> None:
    batch = engine.batch("TARGET_VERIFY", ["a", "b"], [2, 2], [1, 2], spec_info=SimpleNamespace(draft_token_num=4))
    engine.forward(batch, engine.experts(3))
    engine.capturer.accept(torch.tensor([[0, -1], [1, 2]]))
    engine.forward(engine.batch("EXTEND", ["c"], [0], [2]), engine.experts(2))
    assert engine.rows("c") is not None
    stats = engine.collector.stats()
    assert (stats["tokens"], stats["dropped_tokens"], engine.tap.error) == (2, 3, None)


def test_a_draft_models_layers_are_not_the_targets(engine: Engine) -> None:
    """Called outside of the target's forward, or of a layer that it does not have."""
    engine.hand_over(engine.experts(4), LAYERS)
    engine.capturer.capture(layer_id=99, topk_indices=torch.zeros((4, TOP_K), dtype=torch.int32))
    prompt = engine.experts(2)
    engine.forward(engine.batch("EXTEND", ["a"], [0], [2]), prompt)
    np.testing.assert_array_equal(engine.rows("a")["experts"], prompt.numpy())


def test_without_sglangs_own_capture_there_is_nothing_to_return(engine: Engine) -> None:
    engine.capturer.native = None
    assert engine.forward(engine.batch("EXTEND", ["a"], [0], [2]), engine.experts(2)) is None
    assert engine.capturer.get_topk(req_pool_idx=0, seqlen=3, req_to_token_pool=None) is None
    with pytest.raises(AttributeError, match="SGLang's own capture is off"):
        _ = engine.capturer.host_cache
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.capturer.destroy()


class DecodeCapture:
    """SGLang's runner of decode graphs, and a forward of it whose graph would be captured."""

    backend = type("FullCudaGraphBackend", (), {})()
    capture_forward_mode = Mode(name="DECODE")
    num_tokens_per_bs = 1

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.buffers = SimpleNamespace(
            **{name: torch.arange(8) for name in ("input_ids", "positions", "out_cache_loc")}
        )
        self.engine = engine
        self.happened: list[str] = []
        self.recorded: list[Any] = []
        self.fails = False
        self.layers = LAYERS
        for mark in ("mark_beginning", "mark_chosen"):
            monkeypatch.setattr(Step, mark, lambda _, mark=mark: self.happened.append(mark))
        monkeypatch.setattr(graphs, "record", self.record)

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any, pp_proxy_tensors: Any = None) -> Any:
        del input_ids, positions, forward_batch, pp_proxy_tensors
        self.engine.hand_over(self.engine.experts(4), self.layers)
        if self.fails:
            raise RuntimeError("out of memory")
        self.happened.append("head")
        return "logits"

    def record(self, tap: Tap, step: Step, num_rows: int, **columns: torch.Tensor) -> Any:
        assert tap is self.engine.tap
        self.happened.append("record")
        self.recorded.append((step, num_rows, columns))
        return SimpleNamespace(give_up=lambda: self.happened.append("give up"))


def test_a_decode_graph_is_recorded_once_where_its_forward_ends(
    engine: Engine, capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DecodeCapture(engine, monkeypatch)
    with engine.capturer.capturing(runner, 4, runner.forward) as forward:
        assert "pp_proxy_tensors" in inspect.signature(forward).parameters, "SGLang looks whether the model takes them"
        assert forward(None, None, None) == "logits"
        assert runner.happened == ["head"], "a warm-up"
        capturing.on = True
        assert forward(None, None, None, pp_proxy_tensors=None) == "logits"
    assert runner.happened[1:] == ["mark_beginning", "mark_chosen", "head", "record"]
    [(step, num_rows, columns)] = runner.recorded
    assert (num_rows, [ids.shape for ids in step.experts]) == (4, [(4, TOP_K)] * len(LAYERS))
    assert [*columns] == ["token_ids", "positions", "kv_slots"]
    assert all(column.tolist() == [0, 1, 2, 3] for column in columns.values())
    assert engine.tap.active


def test_a_decode_graph_of_ranks_that_talk_publishes_behind_their_collectives(
    capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch beside the forward would make each collective slower."""
    engine = Engine(Layout(1, 0, 1, 0, 2, 1, 1, 0))
    runner = DecodeCapture(engine, monkeypatch)
    capturing.on = True
    with engine.capturer.capturing(runner, 2, runner.forward) as forward:
        forward(None, None, None)
    assert runner.happened == ["head", "record"]
    [(step, num_rows, _)] = runner.recorded
    assert (num_rows, [ids.shape for ids in step.experts]) == (2, [(2, TOP_K)] * len(LAYERS))
    engine.collector.close()
    engine.tap.close()


def test_of_a_decode_graph_that_cannot_be_captured_nothing_is_recorded(
    engine: Engine, capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DecodeCapture(engine, monkeypatch)
    capturing.on = runner.fails = True
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        engine.capturer.capturing(runner, 4, runner.forward) as forward,
    ):
        forward(None, None, None)
    assert runner.recorded == []
    with engine.capturer.capturing(runner, 2, runner.forward):
        engine.capturer.follow(object())  # nothing of it was recorded
    runner.fails = False

    def capture() -> None:
        with engine.capturer.capturing(runner, 4, runner.forward) as forward:
            forward(None, None, None)
            raise RuntimeError("at its end")

    with pytest.raises(RuntimeError, match="at its end"):
        capture()
    assert runner.happened[-2:] == ["record", "give up"]
    assert engine.tap.error is None


def test_a_decode_graph_whose_last_layer_is_silent_ends_the_capture_by_its_number(
    engine: Engine, capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DecodeCapture(engine, monkeypatch)
    capturing.on = True
    runner.layers = LAYERS[:2]
    with (
        pytest.warns(RuntimeWarning, match=r"layers \(5,\) handed over no experts in a forward that was captured"),
        engine.capturer.capturing(runner, 4, runner.forward) as forward,
    ):
        forward(None, None, None)
    assert runner.recorded == []


def test_a_decode_graph_that_is_kept_elsewhere_is_an_error(
    engine: Engine, capturing: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = DecodeCapture(engine, monkeypatch)
    capturing.on = True
    with engine.capturer.capturing(runner, 4, runner.forward) as forward:
        forward(None, None, None)
        with pytest.raises(EngineHookError, match="there is object, and no CUDAGraph"):
            engine.capturer.follow(object())
