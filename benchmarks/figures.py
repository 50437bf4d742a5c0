"""How a benchmark prints what it has found: a JSON object a figure, which `run.py` reads."""

import json
import statistics
from typing import Any

__all__ = ["show"]


def show(name: str, unit: str, values: list[float], *, digits: int = 4, **more: Any) -> None:
    """One figure: quartiles around its median, or of less than four values the least and the most."""
    low, median, high = min(values), statistics.median(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4)
    spread = [round(low, digits), round(high, digits)]
    line = {"name": name, "unit": unit, "median": round(median, digits), "spread": spread, **more}
    print(json.dumps(line, ensure_ascii=False), flush=True)
