"""The kernels by which a CUDA graph publishes: recorded beside a forward, replayed with it.

`take_post` reads, in one warp, where this replay is to write: reads of one host address are served one after another,
so that no more threads than needed may read it; then it tells the CPU that it has. `publish_rows` packs the rows of all
layers and writes them straight into the arena; its last block stores the sequence number.

*Why a reader that sees the number sees the rows.* Every block stores its part, waits for all of its threads
(`bar.sync`), and adds one to the count of finished blocks with acquire-release semantics at GPU scope. The block that
finds all others finished has thereby synchronised with each of them, and stores the sequence number with release
semantics at system scope. Causality is transitive in the PTX memory model ("Memory Consistency Model": release pattern,
causality order, both cumulative), so all parts precede the number for any observer in the system. The reader's acquire
load of the number, and its loads after it, are then ordered by its own processor's model; the bus keeps the order of
posted writes.

Imported where a graph is captured, and nowhere else: it needs Triton, which comes with CUDA builds of torch.
"""

import triton
import triton.language as tl

__all__ = ["BLOCK_WORDS", "publish_rows", "take_post"]

BLOCK_WORDS = 128
"""Words of 8 bytes that one block of `publish_rows` writes in each section of its kind."""


@triton.jit
def _store_release(address, value):
    """Store 8 bytes with release semantics at system scope, by the block's first thread."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred first;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 first, thread, 0;
            @first st.release.sys.global.u64 [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,l",
        [address, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def take_post(entries, state, taken, NUM_ENTRIES: tl.constexpr):
    """Count this replay, and copy its post into the state; without one, state it to have no rows. One warp.

    `entries`, `state`, `taken`: addresses; an entry is [replay, rows, payload, sequence, value, ...], words of 8 bytes,
    and so is the beginning of the state. The count is told at `taken`: whoever sees it may fill the entry again.
    """
    begin = state.to(tl.pointer_type(tl.int64))
    replay = tl.load(begin) + 1
    lane = tl.arange(0, 8)
    entry = (entries + (replay % NUM_ENTRIES) * 64).to(tl.pointer_type(tl.int64))
    words = tl.load(entry + lane, volatile=True)
    posted = tl.sum(tl.where(lane == 0, words, 0), axis=0)
    words = tl.where((lane == 1) & (posted != replay), 0, words)
    tl.store(begin + lane, tl.where(lane == 0, replay, words))
    tl.debug_barrier()  # every lane has read its word
    _store_release(taken, replay)


@triton.jit
def _gather(table, word, num_ids, LAYERS: tl.constexpr, TOP_K: tl.constexpr, TYPE: tl.constexpr, STRIDE: tl.constexpr,
            PER_WORD: tl.constexpr):  # fmt: skip
    """The values [BLOCK_WORDS, PER_WORD] that belong into these words of [n, L, K], of one tensor [n, K] a layer."""
    at = word[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
    there = at < num_ids
    row = at // (LAYERS * TOP_K)
    in_row = at % (LAYERS * TOP_K)
    address = tl.load(table.to(tl.pointer_type(tl.int64)) + in_row // TOP_K, mask=there, other=0)
    source = address.to(tl.pointer_type(TYPE)) + (row.to(tl.int64) * STRIDE + in_row % TOP_K)
    return tl.load(source, mask=there, other=0)


@triton.jit
def _join(values, PER_WORD: tl.constexpr):
    """Words of 8 bytes from PER_WORD values each, the first one lowest."""
    bits: tl.constexpr = 64 // PER_WORD
    shift = (tl.arange(0, PER_WORD) * bits).to(tl.int64)
    low = values.to(tl.int64) & ((1 << bits) - 1)
    return tl.sum(low << shift[None, :], axis=1)


@triton.jit
def _column(source, word, num_rows):
    """Words of a u32 column: two values each."""
    at = word[:, None] * 2 + tl.arange(0, 2)[None, :]
    return _join(tl.load(source + at, mask=at < num_rows, other=0), 2)


@triton.jit(do_not_specialize=["id_blocks", "column_blocks"])
def publish_rows(
    state,
    id_table,
    weight_table,
    token_ids,
    positions,
    kv_slots,
    id_blocks,
    column_blocks,
    LAYERS: tl.constexpr,
    TOP_K: tl.constexpr,
    IDS_PER_WORD: tl.constexpr,
    ID_TYPE: tl.constexpr,
    ID_STRIDE: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    WEIGHT_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the sections of the rows that the state says, and the sequence number behind them.

    `state`, `id_table`, `weight_table`: addresses; a table holds the address of one tensor [n, K] a layer.
    `weight_table`, `token_ids`, `positions`, `kv_slots`: None where this graph does not write that section; positions
    have their place all the same. Blocks: the first `id_blocks` write ids, the next `column_blocks` columns, the others
    weights.
    """
    block = tl.program_id(0)
    begin = state.to(tl.pointer_type(tl.int64))
    num_rows = tl.load(begin + 1).to(tl.int32)
    if num_rows > 0:
        payload = tl.load(begin + 2).to(tl.pointer_type(tl.int64))
        num_ids = num_rows * (LAYERS * TOP_K)
        id_words = (num_ids + IDS_PER_WORD - 1) // IDS_PER_WORD
        column_words = (num_rows + 1) // 2
        if block < id_blocks:
            word = block * BLOCK + tl.arange(0, BLOCK)
            ids = _gather(id_table, word, num_ids, LAYERS, TOP_K, ID_TYPE, ID_STRIDE, IDS_PER_WORD)
            tl.store(payload + word, _join(ids, IDS_PER_WORD), mask=word < id_words)
        elif block < id_blocks + column_blocks:
            word = (block - id_blocks) * BLOCK + tl.arange(0, BLOCK)
            there = word < column_words
            column = payload + id_words
            if token_ids is not None:
                tl.store(column + word, _column(token_ids, word, num_rows), mask=there)
                column += column_words
            if positions is not None:
                tl.store(column + word, _column(positions, word, num_rows), mask=there)
            if kv_slots is not None:
                tl.store(column + column_words + word, _column(kv_slots, word, num_rows), mask=there)
        elif weight_table is not None:
            word = (block - id_blocks - column_blocks) * BLOCK + tl.arange(0, BLOCK)
            values = _gather(weight_table, word, num_ids, LAYERS, TOP_K, WEIGHT_TYPE, WEIGHT_STRIDE, 4)
            halves = values.to(tl.float16).to(tl.int16, bitcast=True)
            columns = 1 + (token_ids is not None) + (kv_slots is not None)
            weights = payload + id_words + column_words * columns
            tl.store(weights + word, _join(halves, 4), mask=word < (num_ids + 3) // 4)
        tl.debug_barrier()
        finished = (state + 64).to(tl.pointer_type(tl.int32))
        if tl.atomic_add(finished, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            _store_release(tl.load(begin + 3), tl.load(begin + 4))
