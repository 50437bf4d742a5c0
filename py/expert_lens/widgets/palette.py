"""The colours of the heatmap, one table for the page and for the picture in a saved notebook.

The scale is the base-2 logarithm of a cell's load relative to uniform load, from 1/4 to 4 times. Its stops are spaced
evenly in that logarithm and were chosen in OKLCH: lightness runs one way on each side of 1, and the two sides (blue
and orange) stay apart for people who see no red or no green. No tokens is a grey of its own, off the scale.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SPAN", "STATIC", "balance", "colours", "load", "relative_load", "rgb"]

STATIC = Path(__file__).parent / "static"


@cache
def load() -> dict[str, Any]:
    """The table of `static/palette.json`."""
    table: dict[str, Any] = json.loads((STATIC / "palette.json").read_text(encoding="utf-8"))
    return table


SPAN = float(load()["span"])
"""Powers of two on each side of uniform load."""


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0 to 255, of "#rrggbb"."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def colours(theme: str, steps: int) -> npt.NDArray[np.uint8]:
    """[steps, 3]: the scale of "light" or "dark", from the lowest load to the highest."""
    stops = np.array([rgb(stop) for stop in load()[theme]["stops"]], float)
    at = np.linspace(0, len(stops) - 1, steps)
    channels = [np.interp(at, np.arange(len(stops)), stops[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def relative_load(counts: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """[L, E]: each expert's share of its layer's choices, times E. 1 is uniform; a layer without tokens has zeros."""
    total = counts.sum(axis=1, keepdims=True, dtype=np.float64)
    relative = np.zeros(counts.shape)
    np.divide(counts * float(counts.shape[1]), total, out=relative, where=total > 0)
    return relative


def balance(counts: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """[L]: exp(H) / E, with H the entropy of a layer's shares: the effective number of experts as part of all.

    1 when all experts get the same, 1/E when one gets all, 0 for a layer without tokens.
    """
    shares = relative_load(counts) / counts.shape[1]
    entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=1)
    effective: npt.NDArray[np.float64] = np.where(counts.any(axis=1), np.exp(entropy) / counts.shape[1], 0.0)
    return effective
