"""Modules of an engine that is not installed here."""

import sys
from types import ModuleType
from typing import Any

import pytest


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Have `import name` give a module of this content, and the packages around it."""
    parts = name.split(".")
    modules = [ModuleType(".".join(parts[: depth + 1])) for depth in range(len(parts))]
    for package, part, module in zip(modules, parts[1:], modules[1:], strict=False):
        setattr(package, part, module)
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    modules[-1].__dict__.update(content)
