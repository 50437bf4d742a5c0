"""The command line: what a person wants of a running capture without a notebook."""

import argparse
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from expert_lens import _core
from expert_lens.errors import ExpertLensError

if TYPE_CHECKING:
    from expert_lens.recording import Recording

__all__ = ["main"]

SHOW_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `expert-lens`; gives the exit status: 0, or 1 after an error, which is printed."""
    parser = argparse.ArgumentParser(prog="expert-lens", description="Watch and record routed experts.")
    parser.add_argument("--version", action="version", version=f"expert_lens {_core.__version__}")
    parser.add_argument(
        "--directory", help="where captures are (default: $EXPERT_LENS_DIR or /dev/shm/expert-lens-<uid>)"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("captures", help="list this user's captures")
    listing.set_defaults(run=lambda options: show_captures(options.directory))
    record = commands.add_parser("record", help="write a running capture to Parquet until it ends, or Ctrl-C")
    record.add_argument("name", help="the capture's name")
    record.add_argument("folder", help="where the part files go; a folder used before is gone on with")
    record.set_defaults(run=lambda options: record_capture(options.name, options.folder, options.directory))
    clean = commands.add_parser("clean", help="remove what captures of dead processes take of the shared memory")
    clean.set_defaults(run=lambda options: clean_captures(options.directory))
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ExpertLensError, OSError) as error:
        print(f"expert-lens: {error}", file=sys.stderr)
        return 1
    return status


def show_captures(directory: str | None) -> int:
    """Print one line an arena, of ended processes too: what they published is still there."""
    for facts in _core.captures(directory):
        state = f"pid {facts['pid']}" if facts["alive"] else "ended"
        print(
            f"{facts['capture']}\trank {facts['rank']}\t{state}\t{facts['model']} ({facts['engine']} "
            f"{facts['engine_version']}), {len(facts['layers'])} layers x {facts['num_experts']} experts, "
            f"top-{facts['top_k']}\t{facts['arena_bytes'] >> 20} MiB"
        )
    return 0


def clean_captures(directory: str | None) -> int:
    """Remove the captures of dead processes; those of live ones stay."""
    print(f"{_core.clean(directory)} removed")
    return 0


def record_capture(name: str, folder: str, directory: str | None) -> int:
    """Record until the capture ends, or SIGINT or SIGTERM asks to stop; then all that was published is durable."""
    from expert_lens.recording import Recording

    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    with Recording(name, folder, directory=directory) as recording:
        shown = 0.0
        while not asked.is_set() and not recording.wait(0.1):
            if sys.stderr.isatty() and time.monotonic() - shown >= SHOW_SECONDS:
                shown = time.monotonic()
                print(f"\r{_line(recording)}", end="", file=sys.stderr, flush=True)
    print(f"{chr(13) if sys.stderr.isatty() else ''}{_line(recording)}", file=sys.stderr)
    return 0


def _line(recording: "Recording") -> str:
    stats = recording.stats
    left_out = f"{stats['left_out_tokens']} not told by all stages, " if stats["left_out_tokens"] else ""
    return (
        f"{stats['tokens']} tokens in {stats['parts']} parts, {stats['bytes'] / 2**20:.1f} MiB, "
        f"{stats['dropped_tokens']} dropped, {left_out}{stats['skipped_records']} records gone before resuming"
    )
