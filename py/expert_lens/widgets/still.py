"""The picture that stays in a saved notebook: the heatmap as PNG, with its axes, scale and facts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.palette import SPAN, balance, relative_load
from expert_lens.widgets.png import (
    BAR,
    DIM,
    EMPTY,
    EMPTY_LINE,
    LINE,
    PAPER,
    STEPS,
    TRACK,
    Image,
    mark,
    png,
    shorten,
    write,
)

__all__ = ["Still", "draw", "mark"]

SCALE: Final = 2
"""Pixels of the picture for one pixel of the page."""
BALANCE_WIDTH: Final = 110


@dataclass(frozen=True)
class Still:
    """A PNG file and the size, in pixels of the page, at which it is meant to be shown."""

    png: bytes
    width: int
    height: int


def draw(snapshot: Snapshot, *, title: str, layers: Sequence[int], phase: str = "both", identity: str = "") -> Still:
    """Draw the counts of one phase with axes, colour bar and each layer's balance, or say that there are none."""
    counts = snapshot.planes[phase]
    image = plot(counts, layers) if counts.any() else np.full((70, 900), PAPER, np.uint8)
    if not counts.any():
        write(image, nothing(snapshot, phase), 24, 20)
    image = np.pad(image, ((104, 74), (0, 0)), constant_values=PAPER)
    write(image, shorten(title, image.shape[1] - 60, "bold"), 24, 20, "bold")
    write(image, description(snapshot, phase), 24, 58, ink=DIM)
    write(image, status(snapshot), 24, len(image) - 46, ink=DIM)
    return Still(png(image, identity), image.shape[1] // SCALE, len(image) // SCALE)


def description(snapshot: Snapshot, phase: str) -> str:
    """Which tokens are counted."""
    window = snapshot.facts.get("window")
    phases = {"both": "prefill and decode", "prefill": "prefill", "decode": "decode"}[phase]
    return f"{phases}, {f'last {window:,} tokens' if window else 'all tokens'}"


def nothing(snapshot: Snapshot, phase: str) -> str:
    """What is said in place of a map without tokens; `static/status.js` says the same."""
    kind = "tokens" if phase == "both" or not snapshot.facts.get("tokens") else f"{phase} tokens"
    return f"No {kind} yet" if snapshot.facts.get("state") == "running" else f"No {kind}"


def status(snapshot: Snapshot) -> str:
    """How many tokens, what was lost, and whether more may come."""
    facts = snapshot.facts
    parts = [f"{int(facts.get('tokens', 0)):,} tokens"]
    parts += [f"{int(facts[key]):,} {key}" for key in ("dropped", "lost", "missing") if facts.get(key)]
    return " · ".join([*parts, str(facts.get("state", ""))]).rstrip(" ·")


def plot(counts: npt.NDArray[np.uint64], layers: Sequence[int]) -> Image:
    """The map with all that stands around it."""
    num_layers, num_experts = counts.shape
    cell_height = int(np.clip(840 // num_layers, 6, 44))
    cell_width = int(np.clip(1400 // num_experts, 2, 3 * cell_height))
    left, top = 100, 42
    width, height = cell_width * num_experts, cell_height * num_layers
    bars = left + width + 28
    legend = bars + BALANCE_WIDTH + 44
    image = np.full((top + max(height + 76, 262), max(legend + 150, 900)), PAPER, np.uint8)

    draw_cells(image, counts, left, top, cell_width, cell_height)
    for index in ticks(num_layers, 32 / cell_height):
        middle = top + index * cell_height + cell_height // 2
        write(image, str(layers[index]), left - 14, middle - 13, align="right", ink=DIM)
    for index in ticks(num_experts, 80 / cell_width):
        middle = left + index * cell_width + cell_width // 2
        image[top + height + 3 : top + height + 9, middle - 1 : middle + 1] = LINE
        write(image, str(index), middle, top + height + 12, align="centre", ink=DIM)
    write(image, "expert", left + width // 2, top + height + 42, align="centre", ink=DIM)
    write(image, "layer", left - 14, top - 34, align="right", ink=DIM)
    write(image, "balance", bars, top - 34, ink=DIM)
    draw_balance(image, counts, bars, top, cell_height)
    draw_legend(image, legend, top + 12)
    return image


def ticks(count: int, least: float) -> range:
    """Indices to label: the roundest step that is at least `least` cells."""
    step = 1
    while step < least:
        step *= 2
    return range(0, count, step)


def draw_cells(image: Image, counts: npt.NDArray[np.uint64], left: int, top: int, width: int, height: int) -> None:
    """Colour every cell, hatch those without tokens, and part them by a gap where there is room."""
    relative = relative_load(counts)
    with np.errstate(divide="ignore"):
        at = np.clip((np.log2(relative) + SPAN) / (2 * SPAN), 0, 1)
    cells = np.where(relative > 0, (at * (STEPS - 1)).round(), EMPTY).astype(np.uint8)
    block = cells.repeat(height, axis=0).repeat(width, axis=1)
    rows, columns = np.ogrid[: block.shape[0], : block.shape[1]]
    block[(block == EMPTY) & ((rows + columns) % 10 < 2)] = EMPTY_LINE
    if width >= 12 and height >= 12:
        for gap in (1, 2):
            block[height - gap :: height] = PAPER
            block[:, width - gap :: width] = PAPER
    image[top : top + block.shape[0], left : left + block.shape[1]] = block


def draw_balance(image: Image, counts: npt.NDArray[np.uint64], left: int, top: int, height: int) -> None:
    """One bar a layer: the effective number of experts, exp(entropy of the shares), as part of all experts."""
    gap = 2 if height >= 8 else 1
    for row, share in enumerate(balance(counts)):
        at = slice(top + row * height, top + (row + 1) * height - gap)
        image[at, left : left + BALANCE_WIDTH] = TRACK
        image[at, left : left + round(BALANCE_WIDTH * share)] = BAR


def draw_legend(image: Image, left: int, top: int) -> None:
    """The scale with its units."""
    write(image, "\N{MULTIPLICATION SIGN} uniform load", left, top - 46, ink=DIM)
    bar = np.linspace(STEPS - 1, 0, 180).round().astype(np.uint8)
    image[top : top + 180, left : left + 24] = bar[:, None]
    for at, label in zip((0, 45, 90, 135, 180), ("≥4", "2", "1", "½", "≤¼"), strict=True):
        write(image, label, left + 36, top + at - 13, ink=DIM)
    swatch = image[top + 212 : top + 236, left : left + 24]
    rows, columns = np.ogrid[: swatch.shape[0], : swatch.shape[1]]
    swatch[:] = np.where((rows + columns) % 10 < 2, EMPTY_LINE, EMPTY)
    write(image, "no tokens", left + 36, top + 211, ink=DIM)
