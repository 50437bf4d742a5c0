"""Looks at an arena as it stands, without a reader: at a record's last bytes the moment its number is there."""

import time
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTORS, HEAD, FIRST_DESCRIPTOR = 3, 256, 1024
SEQUENCE, POSITION, PAYLOAD_WORDS = 0, 4, 5


class Watch:
    """Words of the arena of a capture; the numbers above are those of its layout."""

    def __init__(self, directory: Path, capture: str) -> None:
        self.words = np.memmap(directory / capture / "0.arena", np.uint64, "r")
        self.descriptors = int(self.words[DESCRIPTORS])
        self.ring = self.words[FIRST_DESCRIPTOR + 8 * self.descriptors :]

    def newest(self) -> tuple[bool, Any, Any]:
        """Waits for the number of the newest reserved record.

        Whether it had to wait, what then stood at the end of its payload (the last 64 words at most, copied at once),
        and that end itself, which goes on changing with the arena; both u64.
        """
        number = int(self.words[HEAD])
        at = FIRST_DESCRIPTOR + 8 * ((number - 1) % self.descriptors)
        record = self.words[at : at + 8]
        begin = int(record[POSITION]) % len(self.ring)
        payload = self.ring[begin : begin + int(record[PAYLOAD_WORDS])]
        end = payload[-64:]
        deadline = time.monotonic() + 10
        early = record[SEQUENCE] != number
        while record[SEQUENCE] != number:
            assert time.monotonic() < deadline, f"record {number - 1} is not published"
        return bool(early), end.copy(), end
