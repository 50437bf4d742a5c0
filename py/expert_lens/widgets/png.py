"""A paletted image that numpy alone draws on and writes as PNG: the scale's colours, greys, and text."""

import base64
import struct
import zlib
from functools import cache
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from expert_lens.widgets.palette import STATIC, colours, load, rgb

__all__ = [
    "BAR",
    "DIM",
    "EMPTY",
    "EMPTY_LINE",
    "INK",
    "LINE",
    "PAPER",
    "STEPS",
    "TRACK",
    "Image",
    "length",
    "mark",
    "png",
    "shorten",
    "write",
]

STEPS: Final = 160
"""Colours 0 to STEPS - 1 are the scale, from the lowest load to the highest."""
EMPTY, EMPTY_LINE, LINE, BAR, TRACK = range(STEPS, STEPS + 5)
INK, DIM = STEPS + 16, STEPS + 48
"""First of the SHADES, from paper to full, of each ink."""
SHADES: Final = 32
PAPER: Final = 255
KEYWORD: Final = b"expert_lens\0"
IDENTITY_BYTES: Final = 32

Font = Literal["regular", "bold"]
Image = npt.NDArray[np.uint8]
"""[height, width] indices into the colour table."""


@cache
def glyphs() -> dict[str, npt.NDArray[np.generic]]:
    """Letters of Liberation Sans, drawn by tests/browser/draw_glyphs.py, which says what the arrays are."""
    with np.load(STATIC / "glyphs.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def letters(text: str) -> npt.NDArray[np.intp]:
    """Indices of the text's characters in the glyph table; a question mark for what it lacks."""
    known = glyphs()["characters"].tolist()
    return np.array([known.index(ord(c)) if ord(c) in known else known.index(ord("?")) for c in text], np.intp)


def length(text: str, font: Font = "regular") -> float:
    """Pixels that the text is wide."""
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
    for index, name in ((EMPTY, "empty"), (EMPTY_LINE, "emptyLine"), (BAR, "bar"), (TRACK, "track")):
        table[index] = rgb(load()["light"][name])
    table[LINE] = (150, 154, 160)
    shades = np.arange(SHADES)[:, None] / (SHADES - 1)
    for first, dark in ((INK, (26, 28, 32)), (DIM, (92, 97, 106))):
        table[first : first + SHADES] = (255 + shades * (np.array(dark) - 255)).round()
    return table.tobytes()


def png(image: Image, identity: str = "") -> bytes:
    """The image as a PNG file, which says whose picture it is."""
    height, width = image.shape
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = image
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", header),
            chunk(b"tEXt", KEYWORD + identity.encode().ljust(IDENTITY_BYTES)[:IDENTITY_BYTES]),
            chunk(b"PLTE", colour_table()),
            chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)),
            chunk(b"IEND", b""),
        ]
    )


def mark(identity: str = "") -> str:
    """What the base64 of a file made for this identity contains, and of any of ours without one: pages look for it.

    The text stands 33 bytes after the beginning, so base64 shows whole groups of three bytes of it.
    """
    text = b"\0\0\0" + bytes([len(KEYWORD) + IDENTITY_BYTES]) + b"tEXt" + KEYWORD + identity.encode()
    return base64.b64encode(text[: len(text) // 3 * 3]).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
