"""The widget's JavaScript as the one module that anywidget wants, made of small ones that tests import singly."""

import re
from functools import cache

from expert_lens.widgets.palette import STATIC

__all__ = ["javascript"]

MODULES = ("codec", "scale", "store", "theme", "draw", "cursor", "controls", "status", "view", "heatmap")
"""Every module after those that it imports."""


@cache
def javascript() -> str:
    """The modules one after the other in one scope, without their imports and exports, behind the palette.

    They import only names from one another, never renamed, and no two of them use one name at their top level.
    """
    parts = [f"const PALETTE = {(STATIC / 'palette.json').read_text(encoding='utf-8')};\n"]
    for name in MODULES:
        text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
        text = re.sub(r"^import\b[^;]*;\n", "", text, flags=re.MULTILINE)
        parts.append(re.sub(r"^export (?!default)", "", text, flags=re.MULTILINE))
    return "\n".join(parts)
