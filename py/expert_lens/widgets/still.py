"""The picture that stays in a saved notebook: the heatmap as PNG, drawn by numpy alone."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.palette import SPAN, STATIC, colours, load, relative_load, rgb

__all__ = ["Still", "draw"]

SCALE = 2
"""Pixels of the picture for one pixel of the page."""
STEPS = 160
EMPTY, EMPTY_LINE, LINE, BAR, TRACK = range(STEPS, STEPS + 5)
INK, DIM = STEPS + 16, STEPS + 48
SHADES = 32
PAPER = 255

Font = Literal["regular", "bold"]
Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Still:
    """A PNG file and the size, in pixels of the page, at which it is meant to be shown."""

    png: bytes
    width: int
    height: int


def draw(
    snapshot: Snapshot,
    *,
    title: str,
    layers: Sequence[int],
    phase: str = "both",
    compression: int = 6,
) -> Still:
    """Draw the counts of one phase, with axes, colour bar, each layer's balance and the state of the source."""
    counts = snapshot.counts(phase)
    num_layers, num_experts = counts.shape
    cell_height = int(np.clip(840 // num_layers, 6, 44))
    cell_width = int(np.clip(1400 // num_experts, 2, 3 * cell_height))
    left, top = 100, 142
    map_width, map_height = cell_width * num_experts, cell_height * num_layers
    bars, legend = left + map_width + 28, left + map_width + 28 + 110 + 44
    height = top + max(map_height, 250) + 112
    image = np.full((height, max(legend + 150, 900)), PAPER, np.uint8)

    write(image, shorten(title, image.shape[1] - 60, "bold"), 24, 20, "bold")
    write(image, description(snapshot, phase), 24, 58, ink=DIM)
    draw_cells(image, counts, left, top, cell_width, cell_height)
    for index in ticks(num_layers, 32 / cell_height):
        at = top + index * cell_height + cell_height // 2
        write(image, str(layers[index]), left - 14, at - 13, align="right", ink=DIM)
    for index in ticks(num_experts, 80 / cell_width):
        at = left + index * cell_width + cell_width // 2
        image[top + map_height + 3 : top + map_height + 9, at - 1 : at + 1] = LINE
        write(image, str(index), at, top + map_height + 12, align="centre", ink=DIM)
    write(image, "expert", left + map_width // 2, top + map_height + 42, align="centre", ink=DIM)
    write(image, "layer", left - 14, top - 34, align="right", ink=DIM)
    write(image, "balance", bars, top - 34, ink=DIM)
    draw_balance(image, counts, bars, top, cell_height)
    draw_legend(image, legend, top)
    write(image, status(snapshot), 24, height - 40, ink=DIM)
    return Still(png(image, compression), image.shape[1] // SCALE, height // SCALE)


def description(snapshot: Snapshot, phase: str) -> str:
    window = snapshot.facts.get("window")
    phases = {"both": "prefill and decode", "prefill": "prefill", "decode": "decode"}[phase]
    return f"{phases}, {f'last {window:,} tokens' if window else 'all tokens'}"


def status(snapshot: Snapshot) -> str:
    facts = snapshot.facts
    parts = [f"{int(facts.get('tokens', 0)):,} tokens"]
    parts += [f"{int(facts[key]):,} {key}" for key in ("dropped", "missing") if facts.get(key)]
    return " · ".join([*parts, str(facts.get("state", ""))]).rstrip(" ·")


def ticks(count: int, least: float) -> range:
    """Indices to label: the roundest step that is at least `least` cells."""
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 30) if step >= least)
    return range(0, count, step)


def draw_cells(image: Image, counts: npt.NDArray[np.uint64], left: int, top: int, width: int, height: int) -> None:
    relative = relative_load(counts)
    with np.errstate(divide="ignore"):
        at = np.clip((np.log2(relative) + SPAN) / (2 * SPAN), 0, 1)
    cells = np.where(relative > 0, (at * (STEPS - 1)).round(), EMPTY).astype(np.uint8)
    block = cells.repeat(height, axis=0).repeat(width, axis=1)
    rows, columns = np.indices(block.shape, sparse=True)
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
        image[at, left : left + 110] = TRACK
        image[at, left : left + round(110 * share)] = BAR


def balance(counts: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """[L]: exp(H) / E, with H the entropy of the layer's shares: 1 when all experts get the same, 1/E when one gets all.

    0 for a layer without tokens.
    """
    shares = relative_load(counts) / counts.shape[1]
    entropy = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1)), 0).sum(axis=1)
    return np.where(counts.any(axis=1), np.exp(entropy) / counts.shape[1], 0)


def draw_legend(image: Image, left: int, top: int) -> None:
    write(image, "× uniform load", left, top - 34, ink=DIM)
    bar = np.linspace(STEPS - 1, 0, 180).round().astype(np.uint8)
    image[top : top + 180, left : left + 24] = bar[:, None]
    for at, label in zip((0, 45, 90, 135, 180), ("≥4", "2", "1", "½", "≤¼"), strict=True):
        write(image, label, left + 36, top + at - 13, ink=DIM)
    swatch = image[top + 212 : top + 236, left : left + 24]
    rows, columns = np.indices(swatch.shape, sparse=True)
    swatch[:] = np.where((rows + columns) % 10 < 2, EMPTY_LINE, EMPTY)
    write(image, "no tokens", left + 36, top + 211, ink=DIM)


@cache
def glyphs() -> dict[str, npt.NDArray[np.generic]]:
    """The letters, drawn once from Liberation Sans: alpha [characters, height, width] and advances, for each font."""
    with np.load(STATIC / "glyphs.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def letters(text: str) -> npt.NDArray[np.intp]:
    """Indices of the text's characters in the glyph table; a question mark for what it lacks."""
    known = glyphs()["characters"].tolist()
    return np.array([known.index(ord(c)) if ord(c) in known else known.index(ord("?")) for c in text], np.intp)


def length(text: str, font: Font = "regular") -> float:
    return float(glyphs()[f"{font}_advance"][letters(text)].sum()) if text else 0.0


def shorten(text: str, room: float, font: Font) -> str:
    """The text, cut at its end with an ellipsis if it is longer than room."""
    if length(text, font) <= room:
        return text
    while text and length(text + "…", font) > room:
        text = text[:-1]
    return text + "…"


def write(
    image: Image,
    text: str,
    x: float,
    y: int,
    font: Font = "regular",
    *,
    align: Literal["left", "centre", "right"] = "left",
    ink: int = INK,
) -> None:
    """Draw text on paper, its upper edge at y; what lies outside the image is left away."""
    x -= {"left": 0.0, "centre": 0.5, "right": 1.0}[align] * length(text, font)
    table = glyphs()
    for letter in letters(text):
        shape = table[font][letter].astype(np.uint8) >> 3
        at, from_y = round(x) - 2, max(0, -y)
        x += float(table[f"{font}_advance"][letter])
        target = image[y + from_y : y + shape.shape[0], at : at + shape.shape[1]] if at >= 0 else image[:0, :0]
        shape = shape[from_y : from_y + target.shape[0], : target.shape[1]]
        darker = (shape > 0) & ((target == PAPER) | (target < ink + shape))
        target[darker] = ink + shape[darker]


@cache
def colour_table() -> bytes:
    """The 256 colours of the picture: the scale, the greys, two inks with 32 shades each, paper."""
    table = np.full((256, 3), 255, np.uint8)
    table[:STEPS] = colours("light", STEPS)
    table[EMPTY], table[EMPTY_LINE] = rgb(load()["light"]["empty"]), rgb(load()["light"]["emptyLine"])
    table[LINE], table[BAR], table[TRACK] = (150, 154, 160), (118, 124, 134), (233, 234, 237)
    shades = np.arange(SHADES)[:, None] / (SHADES - 1)
    for first, dark in ((INK, (26, 28, 32)), (DIM, (92, 97, 106))):
        table[first : first + SHADES] = (255 + shades * (np.array(dark) - 255)).round()
    return table.tobytes()


def png(image: Image, compression: int = 6) -> bytes:
    """[height, width] u8 indices into the colour table as a PNG file."""
    height, width = image.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"PLTE", colour_table()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), compression)),
            chunk(b"IEND", b""),
        ]
    )
