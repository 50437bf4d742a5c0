"""The bytes that carry one picture from the kernel to the page. `static/codec.js` is the other side.

| bytes  | what                                                                                                    |
| ------ | ------------------------------------------------------------------------------------------------------- |
| 4      | magic "XLF1"                                                                                            |
| 4      | length of the header, u32 little-endian; padded so that the counts begin at a multiple of 8             |
| header | JSON: dtype ("u2", "u4" or "f8"), planes (names), shape [planes, L, E], and the facts of the moment      |
| rest   | counts, little-endian, C order: one [L, E] for each plane                                               |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAGIC", "Snapshot"]

MAGIC = b"XLF1"
JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

Counts = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Snapshot:
    """The counts of one moment, and what was true of the source then.

    planes: name ("both", "prefill", "decode") to u64 [L, E]; frames in motion carry only the one that is looked at.
    facts: what the status line shows; only what JSON can carry.
    """

    planes: Mapping[str, Counts]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def encode(self) -> npt.NDArray[np.uint8]:
        """The snapshot as bytes, u8 [length], in the smallest number format that keeps every count exact.

        Raises ValueError when the planes differ in shape.
        """
        planes = list(self.planes.values())
        shape = planes[0].shape
        if len(shape) != 2 or any(plane.shape != shape for plane in planes):
            shapes = ", ".join(f"{name} {plane.shape}" for name, plane in self.planes.items())
            raise ValueError(f"A frame's planes must all be [layers, experts], but they are {shapes}")
        highest = max(int(plane.max(initial=0)) for plane in planes)
        dtype = np.dtype("<u2" if highest < 1 << 16 else "<u4" if highest < 1 << 32 else "<f8")
        header = {"dtype": dtype.str[1:], "planes": list(self.planes), "shape": [len(planes), *shape], **self.facts}
        text = JSON.encode(header).encode()
        text += b" " * (-len(text) % 8)
        head = np.frombuffer(MAGIC + len(text).to_bytes(4, "little") + text, np.uint8)
        frame = np.empty(head.size + len(planes) * planes[0].size * dtype.itemsize, np.uint8)
        frame[: head.size] = head
        for target, plane in zip(frame[head.size :].view(dtype).reshape(-1, *shape), planes, strict=True):
            np.copyto(target, plane, casting="unsafe")
        return frame
