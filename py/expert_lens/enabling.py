"""Enabling engines that run their model in processes of their own: what those processes inherit of the user's options.

The options travel as JSON in the environment variable EXPERT_LENS_ENABLE; "1" there stands for the defaults.
"""

import json
import os
from typing import Any, Literal

from expert_lens.errors import OptionError
from expert_lens.options import check_capture_name, check_folder_path, check_seconds, parse_bytes

__all__ = ["ENVIRONMENT", "enable", "enabled", "enabled_directory", "remember_name"]

ENVIRONMENT = "EXPERT_LENS_ENABLE"


def enable(
    name: str | None = None,
    *,
    arena: int | str = "256MiB",
    on_full: Literal["drop", "wait"] = "drop",
    wait_timeout: float = 1.0,
    directory: str | os.PathLike[str] | None = None,
) -> None:
    """Have engines that are started from now on publish their routed experts: call it before `sglang.Engine(...)`.

    It sets an environment variable that the engine's processes inherit, and does nothing else. `name` of the capture,
    `"sglang-<pid>"` if None; an engine more in this process, or in one that it has started by multiprocessing, needs a
    name of its own. `arena`, `on_full`, `wait_timeout`, `directory`: as for `attach`.

    Raises OptionError for an option that cannot be used.
    """
    options: dict[str, Any] = {"arena": arena, "on_full": on_full, "wait_timeout": wait_timeout}
    if name is not None:
        options["name"] = name
    if directory is not None:
        options["directory"] = os.path.abspath(check_folder_path("directory", directory))
    _check(options)
    os.environ[ENVIRONMENT] = json.dumps(options)


def enabled() -> dict[str, Any] | None:
    """The options of `_core.Writer` that this process's engine is to publish with, and its `name` or None.

    None: it is not enabled. Raises OptionError for what the environment variable cannot mean.
    """
    value = os.environ.get(ENVIRONMENT, "").strip()
    if value in ("", "0"):
        return None
    if value == "1":
        return _check({})
    try:
        options = json.loads(value)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise OptionError(
            f"{ENVIRONMENT} is {value!r}; set it to 1, or to options as JSON, such as "
            '\'{"name": "server", "arena": "1GiB"}\'.'
        )
    return _check(options)


def enabled_directory() -> str | None:
    """Where engines that were enabled here publish, if that was chosen."""
    options = enabled()
    return None if options is None else options["directory"]


def remember_name(name: str) -> None:
    """Let the processes that this one starts use this name, unless the user has chosen one.

    It takes the place of one that this process has inherited so, from a server that it runs beside.
    """
    value = os.environ.get(ENVIRONMENT, "1").strip()
    options = {} if value == "1" else json.loads(value)
    options["default_name"] = name
    os.environ[ENVIRONMENT] = json.dumps(options)


def _check(options: dict[str, Any]) -> dict[str, Any]:
    known = {"name", "arena", "on_full", "wait_timeout", "directory"}
    if unknown := options.keys() - known - {"default_name"}:
        raise OptionError(f"there is no option {', '.join(sorted(unknown))}; enable knows {', '.join(sorted(known))}.")
    on_full = options.get("on_full", "drop")
    if on_full not in ("drop", "wait"):
        raise OptionError(f"on_full is {on_full!r}; give 'drop' or 'wait'.")
    name, directory = options.get("name", options.get("default_name")), options.get("directory")
    return {
        "name": None if name is None else check_capture_name(name),
        "arena_bytes": parse_bytes("arena", options.get("arena", "256MiB")),
        "on_full": on_full,
        "wait_timeout": check_seconds("wait_timeout", options.get("wait_timeout", 1.0)),
        "directory": None if directory is None else check_folder_path("directory", directory),
    }
