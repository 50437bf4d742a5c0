import threading
from pathlib import Path

import pytest

import expert_lens
from children import start
from expert_lens import cli
from publishing import make_writer, publish


def test_captures_names_each_arena(capsys: pytest.CaptureFixture[str]) -> None:
    writer = make_writer("served")
    assert cli.main(["captures"]) == 0
    line = capsys.readouterr().out
    assert line.startswith("served\trank 0\tpid ")
    assert "known (test 1), 5 layers x 12 experts, top-3\t1 MiB" in line
    writer.close()
    assert cli.main(["captures"]) == 0
    assert capsys.readouterr().out == ""


def test_record_writes_until_the_capture_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = make_writer("served")
    publish(writer, [(1, "a", range(7))], {"a": 7})
    ends = threading.Timer(0.5, writer.close)
    ends.start()
    assert cli.main(["record", "served", str(tmp_path / "run")]) == 0
    ends.join()
    assert "7 tokens in 1 parts" in capsys.readouterr().err
    assert expert_lens.scan(tmp_path / "run").collect()["position"].to_list() == list(range(7))


def test_an_unknown_capture_is_said_on_stderr_and_in_the_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["record", "nobody", str(tmp_path / "run")]) == 1
    assert "nobody" in capsys.readouterr().err


KILLED = """
import os, signal
from publishing import make_writer, publish
writer = make_writer("killed")
publish(writer, [(1, "a", range(3))])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clean_removes_what_dead_processes_left_and_nothing_else(
    captures_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["clean"]) == 0
    with start(KILLED):
        pass
    writer = make_writer("served")
    assert {path.name for path in captures_directory.iterdir()} == {"killed", "served"}
    assert cli.main(["clean"]) == 0
    assert capsys.readouterr().out == "0 removed\n1 removed\n"
    assert [path.name for path in captures_directory.iterdir()] == ["served"]
    publish(writer, [(1, "a", range(3))])
    with expert_lens.attach("served") as lens:
        assert lens.counts().sum() == 3 * 5 * 3
    writer.close()


@pytest.mark.parametrize(
    ("name", "folder", "says"),
    [
        ("a/b", "run", "'a/b' cannot name a capture"),
        ("served", "file/run", "file is not a folder"),
        ("served", "/proc/run", "/proc/run"),
    ],
)
def test_what_cannot_be_recorded_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, folder: str, says: str
) -> None:
    (tmp_path / "file").touch()
    writer = make_writer("served")
    assert cli.main(["record", name, str(tmp_path / folder)]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    writer.close()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"expert_lens {expert_lens.__version__}"
