import base64
import gc
import json
import signal
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import polars as pl
import pytest
from nbclient import NotebookClient

import expert_lens
import publishing
from children import hear, say, start
from expert_lens import errors, types
from publishing import count, make_writer, publish, rows
from serving import SERVER

PROMPTS = {"a": 4, "b": 3}
VIEW = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def published() -> Iterator[expert_lens.Lens]:
    """A lens on three steps: prefills of a and b, then a decode of both; b has finished."""
    writer = make_writer("known")
    lens = expert_lens.attach("known", lossless=True)
    publish(writer, [(1, "a", range(4))], PROMPTS)
    publish(writer, [(2, "b", range(3))], PROMPTS)
    publish(writer, [(1, "a", [4]), (2, "b", [3])], PROMPTS)
    writer.finish(2, "b", 4)
    yield lens
    lens.close()
    writer.close()


ALL = [("a", p) for p in range(5)] + [("b", p) for p in range(4)]


def test_counts_of_all_of_a_phase_and_of_the_last(published: expert_lens.Lens) -> None:
    np.testing.assert_array_equal(published.counts(), count(ALL))
    np.testing.assert_array_equal(published.counts("decode"), count([("a", 4), ("b", 3)]))
    np.testing.assert_array_equal(published.counts("prefill"), count([w for w in ALL if w not in [("a", 4), ("b", 3)]]))
    np.testing.assert_array_equal(published.counts(last=1), count([("b", 3)]))
    np.testing.assert_array_equal(published.counts("prefill", last=4), count([("a", 3), ("b", 0), ("b", 1), ("b", 2)]))
    assert published.counts().dtype == np.uint64


@pytest.mark.parametrize("last", [0, -1, 16385, True, 1.5, "9", 2**70])
def test_counts_refuses_what_it_cannot_count(published: expert_lens.Lens, last: Any) -> None:
    with pytest.raises(errors.OptionError, match=r"last"):
        published.counts(last=last)


def test_counts_refuses_an_unknown_phase(published: expert_lens.Lens) -> None:
    with pytest.raises(errors.OptionError, match="phase is 'warmup'"):
        published.counts("warmup")  # type: ignore[arg-type]


def test_requests(published: expert_lens.Lens) -> None:
    assert published.requests().rows() == [("a", "running", 4, 5, 0), ("b", "finished", 3, 4, 0)]
    assert published.requests().columns == ["request", "state", "prompt_tokens", "tokens", "missing"]


def test_routed_experts_are_exact(published: expert_lens.Lens) -> None:
    for request, n in (("a", 5), ("b", 4)):
        experts = published.routed_experts(request)
        assert experts.dtype == np.uint8
        np.testing.assert_array_equal(experts, rows(request, range(n)))


def test_missing_rows_are_an_error_that_lists_them_or_filled() -> None:
    with make_writer_and_lens("holes") as (writer, lens):
        publish(writer, [(1, "late", range(3, 6))], {"late": 5})
        with pytest.raises(errors.MissingRowsError, match=r"lacks 3 of its 6 rows, at position 0, 1, 2:") as raised:
            lens.routed_experts("late")
        assert raised.value.positions == (0, 1, 2)
        filled = lens.routed_experts("late", fill=-1)
        assert filled.dtype == np.int32
        assert (filled[:3] == -1).all()
        np.testing.assert_array_equal(filled[3:], rows("late", range(3, 6)))
        assert lens.routed_experts("late", fill=255).dtype == np.uint8
        frame = lens.frame()
        assert frame["experts"].null_count() == 3
        assert frame["position"].to_list() == list(range(6))
        assert frame["step"].to_list() == [None] * 3 + [0] * 3
        assert lens.stats["missing_tokens"] == 3
        assert lens.stats["publisher"] == "host"
        assert lens.requests()["missing"].item() == 3


def test_an_unknown_request(published: expert_lens.Lens) -> None:
    with pytest.raises(errors.UnknownRequestError, match="No request 'c' in capture 'known'"):
        published.routed_experts("c")
    with pytest.raises(errors.UnknownRequestError):
        published.frame("c")


def test_requests_beyond_the_memory_make_room_and_say_so() -> None:
    with make_writer_and_lens("small", memory=4096) as (writer, lens):
        for number in range(1, 200):
            publish(writer, [(number, f"r{number}", range(8))], {f"r{number}": 8})
            writer.finish(number, f"r{number}", 8)
        stats = lens.stats
        assert 0 < stats["memory_bytes"] <= 4096 == stats["memory_limit_bytes"]
        assert stats["evicted_requests"] == 199 - len(lens.requests()) > 0
        np.testing.assert_array_equal(lens.routed_experts("r199"), rows("r199", range(8)))
        with pytest.raises(errors.UnknownRequestError, match="make room"):
            lens.routed_experts("r1")
        assert lens.counts().sum() == 199 * 8 * publishing.L * publishing.K


def test_frame_has_one_row_a_token(published: expert_lens.Lens) -> None:
    frame = published.frame()
    assert list(zip(frame["request"], frame["position"], strict=True)) == ALL
    assert frame["token_id"].to_list() == [publishing.token(*which) for which in ALL]
    assert frame["phase"].to_list() == ["prefill"] * 4 + ["decode"] + ["prefill"] * 3 + ["decode"]
    assert frame["step"].to_list() == [0, 0, 0, 0, 2, 1, 1, 1, 2]
    np.testing.assert_array_equal(frame["experts"].to_numpy(), np.stack([publishing.row(*which) for which in ALL]))
    assert published.frame("b")["request"].to_list() == ["b"] * 4


def test_frame_with_a_tokenizer_has_text() -> None:
    class Letters:
        def decode(self, token_ids: list[int]) -> str:
            return "".join(map(chr, token_ids))

    with make_writer_and_lens("text", tokenizer=Letters()) as (writer, lens):
        publish(writer, [(1, "a", range(4))], {"a": 4})
        frame = lens.frame()
        assert frame.columns[:4] == ["request", "position", "token_id", "token"]
        assert frame["token"].to_list() == [chr(publishing.token("a", p)) for p in range(4)]


def test_an_empty_lens_answers() -> None:
    with make_writer_and_lens("empty") as (_, lens):
        assert lens.counts().shape == (publishing.L, publishing.E)
        assert not lens.counts().any()
        assert lens.frame().is_empty()
        assert lens.requests().is_empty()


def test_weights() -> None:
    writer = make_writer("weighted", weights=True)
    weights = np.linspace(0, 1, 2 * publishing.L * publishing.K, dtype=np.float16).reshape(
        2, publishing.L, publishing.K
    )
    with expert_lens.attach("weighted", lossless=True) as lens:
        writer.set_batch([(1, "a", 0, 2, 2, "prefill")])
        writer.publish(rows("a", range(1, 3)), None, np.arange(1, 3, dtype=np.uint32), weights)
        got = lens.routing_weights("a")
        assert np.isnan(got[0]).all()
        np.testing.assert_array_equal(got[1:], weights.astype(np.float32))
        frame = lens.frame()
        assert frame["token_id"].null_count() == 3
        assert frame["weights"].dtype == pl.Array(pl.Float32, (publishing.L, publishing.K))
        np.testing.assert_array_equal(frame["weights"].slice(1).to_numpy(), weights.astype(np.float32))
    writer.close()


def test_without_weights_asking_for_them_says_how(published: expert_lens.Lens) -> None:
    with pytest.raises(errors.OptionError, match="weights=True"):
        published.routing_weights("a")


def test_parquet_holds_what_the_frame_holds(published: expert_lens.Lens, tmp_path: Path) -> None:
    path = published.to_parquet(tmp_path / "run")
    assert Path(path).parent == tmp_path / "run"
    read = expert_lens.scan(tmp_path / "run").collect()
    assert read["source"].unique().len() == 1
    assert read.drop("source").equals(published.frame())


def test_an_export_of_nothing_is_read_back_empty(tmp_path: Path) -> None:
    with make_writer_and_lens("empty") as (_, lens):
        lens.to_parquet(tmp_path)
        assert expert_lens.scan(tmp_path).collect().is_empty()


def test_export_and_recording_of_one_capture_are_one_trace(published: expert_lens.Lens, tmp_path: Path) -> None:
    with published.record(tmp_path):
        pass
    published.to_parquet(tmp_path)
    read = expert_lens.scan(tmp_path).collect()
    assert read.drop("source").equals(published.frame())
    (stats,) = published.stats["recordings"]
    assert (stats["state"], stats["tokens"]) == ("ended", 9)


def test_a_closed_lens_still_answers(published: expert_lens.Lens) -> None:
    published.close()
    published.close()
    np.testing.assert_array_equal(published.counts(), count(ALL))
    np.testing.assert_array_equal(published.routed_experts("a"), rows("a", range(5)))
    assert published.stats["state"] == "ended"
    assert "closed" in repr(published)
    with pytest.raises(errors.ExpertLensError, match="closed"):
        published.record("nowhere")
    assert not Path("nowhere").exists()


def test_captures_lists_the_running_ones(captures_directory: Path, tmp_path: Path) -> None:
    assert expert_lens.captures() == []
    first, second = make_writer("one"), make_writer("two")
    assert expert_lens.captures() == ["one", "two"] == expert_lens.captures(captures_directory)
    assert expert_lens.captures(tmp_path / "elsewhere") == []
    first.close()
    assert expert_lens.captures() == ["two"]
    second.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory": "lots"}, "memory is 'lots'"),
        ({"memory": 0}, "memory is 0"),
        ({"memory": True}, "memory is True"),
        ({"arena": "1 parsec"}, "arena is '1 parsec'"),
        ({"on_full": "panic"}, "on_full is 'panic'"),
        ({"history": 0}, "history is 0"),
        ({"history": 10**12}, "a history of 1000000000000 rows"),
        ({"wait_timeout": float("nan")}, "wait_timeout is nan"),
        ({"lossless": "x"}, "lossless is 'x'"),
        ({"directory": 5}, "directory is 5"),
        ({"name": "a/b"}, "'a/b' cannot name a capture"),
        ({"name": "other"}, "name cannot be chosen"),
        ({"weights": True}, "weights cannot be chosen"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], says: str) -> None:
    writer = make_writer("known")
    with pytest.raises(errors.OptionError, match=says):
        expert_lens.attach("known", **options)
    writer.close()


def test_what_cannot_be_attached_to() -> None:
    with pytest.raises(errors.UnsupportedModelError, match=r"cannot attach to a builtins\.dict"):
        expert_lens.attach({})
    with pytest.raises(errors.CaptureNotFoundError, match="nobody"):
        expert_lens.attach("nobody")
    with pytest.raises(TypeError, match="wieghts"):
        expert_lens.attach("nobody", wieghts=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["", "a/b", "\ud800"])
def test_a_name_that_no_capture_can_have(name: str) -> None:
    with pytest.raises(errors.OptionError, match="cannot name a capture"):
        expert_lens.attach(name)


def test_files_cannot_go_below_a_file(published: expert_lens.Lens, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for write in (published.to_parquet, published.record):
        with pytest.raises(errors.OptionError, match=r"notes\.txt is not a folder"):
            write(tmp_path / "notes.txt" / "run")


def test_stats_are_those_that_are_described(published: expert_lens.Lens, tmp_path: Path) -> None:
    with published.record(tmp_path / "run"):
        stats = published.stats
    assert stats.keys() == types.Stats.__annotations__.keys() | types.CollectorStats.__annotations__.keys()
    assert stats["recordings"][0].keys() == types.RecordingStats.__annotations__.keys()


def test_closing_is_whole_even_where_warnings_are_errors() -> None:
    writer = make_writer("known")
    lens = expert_lens.attach("known")

    class OffTap:
        error = RuntimeError("switched off")
        lost_tokens = 0

        def close(self) -> None:
            raise OSError("the engine is gone")

    lens._tap = OffTap()  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="switched off"):
            lens.close()
    assert lens.stats["state"] == "ended"
    lens.close()
    writer.close()


def test_two_threads_may_close_at_once() -> None:
    writer = make_writer("known")
    lens = expert_lens.attach("known")
    publish(writer, [(1, "a", range(4))])
    with ThreadPoolExecutor(8) as threads:
        for closed in [threads.submit(lens.close) for _ in range(8)]:
            closed.result()
    assert lens.counts().sum() == count([("a", p) for p in range(4)]).sum()
    writer.close()


FORKED = """
import os, signal, sys
import expert_lens
from publishing import make_writer, publish
writer = make_writer("known")
publish(writer, [(1, "a", range(4))])
lens = expert_lens.attach("known")
recording = lens.record(sys.argv[1])
lens.counts()
if (child := os.fork()) == 0:
    signal.alarm(20)
    asks = lens.counts, lens.requests, lambda: lens.stats, lens.frame, lambda: recording._stream.is_over
    for ask in asks:
        try:
            ask()
            print("no error", flush=True)
        except expert_lens.ExpertLensError as error:
            print(error, flush=True)
    with expert_lens.attach("known") as own:
        print(own.tokens_seen() or own.counts().sum() // 15, flush=True)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), lens.counts().sum() // 15, flush=True)
lens.close()
"""


def test_a_fork_is_told_to_attach_by_name(tmp_path: Path) -> None:
    with start(FORKED, str(tmp_path / "run")) as process:
        said = [hear(process) for _ in range(7)]
    assert all("attach to 'known' by name" in line for line in said[:5]), said
    assert said[5:] == ["4", "0 4"]


def test_a_lens_by_name_cannot_name_requests(published: expert_lens.Lens) -> None:
    with pytest.raises(errors.OptionError, match="another process"):
        published.request("mine")


# ---- a model in this process ----


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    from expert_lens import demo

    return demo.load()


def test_a_model_seen_through_the_whole_face(demo: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = demo
    before = dict(vars(model))
    inputs = tokenizer(["def main(", "Le chat"], return_tensors="pt", padding=True)
    with expert_lens.attach(model, tokenizer, name="seen") as lens:
        assert expert_lens.captures() == ["seen"]
        with lens.request("talk"):
            output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert lens.requests()["request"].to_list() == ["talk.0", "talk.1"]
        text = "".join(lens.frame("talk.0")["token"])
        prompt_and_more = [i for i in output[0].tolist() if i != tokenizer.pad_token_id]
        assert text == tokenizer.decode(prompt_and_more[:-1])
        assert lens.counts().sum() == len(lens.frame()) * 8 * 2
        with lens.record(tmp_path):
            pass
        assert lens.title == f"byte-moe · transformers {lens.facts['engine_version']} · seen"
    assert expert_lens.captures() == []
    assert dict(vars(model)) == before
    assert expert_lens.scan(tmp_path).collect().drop("source").equals(lens.frame().drop("token"))


def test_a_notebook_that_ran_without_a_browser_keeps_the_last_picture() -> None:
    cells = [
        "from publishing import make_writer, publish\nimport expert_lens\nwriter = make_writer('shown')\n"
        "lens = expert_lens.attach('shown')\nlens",
        "publish(writer, [(1, 'a', range(9))], {'a': 9})\nwhile lens.tokens_seen() < 9: pass\nlens",
        "publish(writer, [(1, 'a', range(9, 20))], {'a': 9})\nlens.close()",
        "import base64\nfrom expert_lens.widgets import Heatmap\n"
        "print(base64.b64encode(Heatmap(lens).picture).decode())",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(Path(__file__).parent)}}).execute()
    shown = [output for cell in notebook.cells[:2] for output in cell.outputs]
    pictures = [output.data["image/png"] for output in shown if "image/png" in output.data]
    now = notebook.cells[-1].outputs[0].text

    def pixels(picture: str) -> bytes:
        """What follows the mark of whose picture it is."""
        png = base64.b64decode(picture)
        return png[png.index(b"PLTE") :]

    assert [pixels(picture) for picture in pictures] == [pixels(now)] * 2
    views = {output.data[VIEW]["model_id"] for output in shown if VIEW in output.data}
    assert len(views) == 1, "every cell shows the one heatmap of the lens"


def test_a_lens_that_nobody_holds_detaches(demo: tuple[Any, Any]) -> None:
    model, _ = demo
    before = dict(vars(model))
    lens = expert_lens.attach(model, name="forgotten")
    assert expert_lens.captures() == ["forgotten"]
    del lens
    gc.collect()
    assert expert_lens.captures() == []
    assert dict(vars(model)) == before


def test_a_capture_that_switched_itself_off_is_told_once(demo: tuple[Any, Any]) -> None:
    import torch

    model, _ = demo
    with expert_lens.attach(model) as lens:
        model(torch.tensor([[1, 2, 3]]))
        lens._tap._tap.fail(ValueError("the engine changed under us"))  # type: ignore[union-attr]
        with pytest.warns(RuntimeWarning, match="switched itself off.*ValueError: the engine changed under us"):
            lens.counts()
        lens.counts()
        assert lens.stats["error"] == "ValueError: the engine changed under us"


# ---- other processes ----


def test_a_model_in_another_process_is_watched_by_name() -> None:
    with start(SERVER, "24", "french", "json", "c") as process:
        assert hear(process) == "ready"
        with expert_lens.attach("served", lossless=True) as lens:
            assert lens.facts["model"].endswith("byte-moe")
            say(process)
            seen = set()
            while lens.requests().filter(state="finished").height < 3:
                seen.add(lens.tokens_seen())
                time.sleep(0.005)
            theirs = json.loads(hear(process))
            assert len(seen) > 3, "the lens saw nothing while the model ran"
            np.testing.assert_array_equal(lens.counts(), theirs["counts"])
            assert lens.requests()["request"].to_list() == ["french", "json", "c"]
            for request, experts in theirs["requests"].items():
                np.testing.assert_array_equal(lens.routed_experts(request), experts)
            assert lens.stats["state"] == "running"
            say(process)
            process.wait(30)
            deadline = time.monotonic() + 10
            while lens.stats["state"] != "ended" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert lens.stats["state"] == "ended"


KNOWN_PUBLISHER = """
import sys
from publishing import make_writer, publish
writer = make_writer("known")
publish(writer, [(1, "a", range(50))], {"a": 50})
for position in range(50, 60):
    publish(writer, [(1, "a", [position])], {"a": 50})
print("published", flush=True)
sys.stdin.readline()
"""


def test_why_a_capture_of_another_process_went_off_is_told_here() -> None:
    code = """
    import warnings
    warnings.simplefilter("ignore")
    from publishing import make_writer
    from expert_lens.errors import EngineHookError
    from expert_lens.tap import Tap
    writer = make_writer("elsewhere")
    tap = Tap(writer, layers=[0], num_experts=4, top_k=1)
    print("ready", flush=True)
    input()
    tap.fail(EngineHookError("the engine's " + "very " * 60 + "changed batch, \u4e2d"))
    print("off", flush=True)
    input()
    """.replace(
        "from hand import *", "import warnings; warnings.simplefilter('ignore'); from publishing import make_writer"
    )
    with start(code) as process:
        assert hear(process) == "ready"
        with expert_lens.attach("elsewhere") as lens:
            assert lens.stats["error"] is None
            say(process)
            assert hear(process) == "off"
            with pytest.warns(
                RuntimeWarning, match="'elsewhere' has switched itself off; .* EngineHookError: the engine's"
            ):
                lens.requests()
            error = str(lens.stats["error"])
            assert error.startswith("EngineHookError: the engine's very very")
            assert 250 <= len(error.encode()) <= 255
        assert lens.stats["error"] == error
        say(process)


def test_what_a_killed_publisher_published_stays_readable() -> None:
    with start(KNOWN_PUBLISHER) as process:
        assert hear(process) == "published"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert expert_lens.captures() == []
        with expert_lens.attach("known") as lens:
            np.testing.assert_array_equal(lens.routed_experts("a"), rows("a", range(60)))
            deadline = time.monotonic() + 10
            while lens.stats["state"] != "ended" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert lens.requests().rows() == [("a", "aborted", 50, 60, 0)]


def test_the_engine_side_imports_neither_polars_nor_the_notebook() -> None:
    code = """
        import sys
        import expert_lens
        from expert_lens import demo
        model, tokenizer = demo.load()
        with expert_lens.attach(model) as lens:
            model.generate(**tokenizer("x", return_tensors="pt"), max_new_tokens=2)
            lens.counts()
        print([name for name in ("polars", "anywidget", "ipywidgets", "IPython", "pandas") if name in sys.modules])
    """
    with start(code) as process:
        assert hear(process) == "[]"


def test_importing_expert_lens_imports_numpy_and_little_else() -> None:
    code = """
        import sys
        import expert_lens
        print([name for name in ("torch", "transformers", "polars", "anywidget") if name in sys.modules])
    """
    with start(code) as process:
        assert hear(process) == "[]"


class make_writer_and_lens:  # noqa: N801
    """A writer and a lossless lens on it, closed in the end."""

    def __init__(self, name: str, **options: Any) -> None:
        self.writer = make_writer(name)
        self.lens = expert_lens.attach(name, lossless=True, **options)

    def __enter__(self) -> tuple[Any, expert_lens.Lens]:
        return self.writer, self.lens

    def __exit__(self, *_: object) -> None:
        self.lens.close()
        self.writer.close()
