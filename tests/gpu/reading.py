"""A reader in a process of its own, without CUDA and without torch: checks every row against what numpy expects.

`python reading.py CAPTURE NUM_EXPERTS ROWS_A_BLOCK`; prints "ready", and at the end one JSON object. `slots`: how many
rows came with a KV slot. `last`: the last steps that came without a gap, of which the first, the last, and their rows.
"""

import json
import sys
from collections import Counter

import numpy as np
from patterns import expected

from expert_lens._core import NO_SLOT, RowStream


def last_of(rows_of: Counter[int]) -> list[int]:
    """The first and the last of the last steps without a gap, and how many rows they have; nothing if there is none."""
    if not rows_of:
        return []
    first = last = max(rows_of)
    while first - 1 in rows_of:
        first -= 1
    return [first, last, sum(rows_of[step] for step in range(first, last + 1))]


def main(capture: str, num_experts: int, rows_a_block: int) -> None:
    stream = RowStream(capture)
    print("ready", flush=True)
    rows = wrong = wrong_tokens = told_slots = wrong_slots = corrupt = 0
    rows_of: Counter[int] = Counter()
    over = False
    while not over:
        block = stream.take(rows_a_block, 0.05)
        over = stream.is_over
        wrong += int(
            (block["experts"] != expected(block["steps"], block["positions"], num_experts)).any(axis=(1, 2)).sum()
        )
        wrong_tokens += int((block["token_ids"] != block["positions"] + block["steps"] % 1000).sum())
        slots, told = block["kv_slots"], block["kv_slots"] != NO_SLOT
        told_slots += int(told.sum())
        wrong_slots += int((slots != block["positions"] * 3 + block["steps"])[told].sum())
        rows += len(block["steps"])
        corrupt += block["corrupt"]
        of_block = np.unique(block["steps"], return_counts=True)
        rows_of.update(dict(zip(*(column.tolist() for column in of_block), strict=True)))
        stream.release()
    assert "torch" not in sys.modules
    wrongs = {"wrong": wrong, "wrong_tokens": wrong_tokens, "wrong_slots": wrong_slots, "corrupt": corrupt}
    found = {
        "rows": rows,
        "slots": told_slots,
        "steps": len(rows_of),
        "last": last_of(rows_of),
        **wrongs,
        "dropped": stream.dropped_tokens,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
