"""Kernels that choose: pages for a query to visit, pages to evict, and what is remembered of each.

Shape letters as in `pikv_ds.ops.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pikv_ds.ops.triton_kernels.pages import row_address

LOWEST = tl.constexpr(-(2**31))
NOBODY = tl.constexpr(2**63 - 1)
"""Key of a slot that must not be evicted: after all others."""


@triton.jit
def _sortable(x):
    """int32 in the order of float32 x: the bits, with negative numbers' magnitudes turned around. -0 is 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


# -- lookup ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["slab_rows", "width"])
def page_scores_kernel(
    query,  # [R, H, D]
    pointers,  # int64, see Slabs; rows [2, K, D] of STORED
    table,  # int32 [R, P]
    counts,  # int32 [R]
    out,  # float32 [R, K, P]
    slab_rows,
    width,  # P
    ROW_BYTES: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    STORED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Upper bounds for a block of pages; grid (blocks of pages, K, R).

    The sum of max(q_i lo_i, q_i hi_i) splits by the sign of q into two matrix products. They are exact
    but for the order of the sums: products of 16-bit numbers fit into float32.
    """
    k, r = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    place = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    slot = tl.load(table + r * width + place, mask=place < tl.load(counts + r), other=0)
    there = slot > 0
    rows = row_address(pointers, slot, slab_rows, ROW_BYTES)
    low_at = rows[:, None].to(tl.pointer_type(STORED)) + (k * D + d)[None, :]
    HEAD_BYTES: tl.constexpr = D * STORED.primitive_bitwidth // 8
    if HEAD_BYTES % 16 == 0:  # an address from an integer has no known alignment
        low_at = tl.max_contiguous(tl.multiple_of(low_at, (1, 16)), (1, BLOCK_D))
    mask = there[:, None] & (d < D)[None, :]
    low = tl.load(low_at, mask=mask, other=0.0).to(DOT)
    high = tl.load(low_at + K * D, mask=mask, other=0.0).to(DOT)
    q_at = query + ((r * K + k) * GROUP + g)[:, None] * D + d[None, :]
    q = tl.load(q_at, mask=(g < GROUP)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    scores = tl.dot(tl.maximum(q, 0.0).to(DOT), tl.trans(high), input_precision="ieee")
    scores = tl.dot(tl.minimum(q, 0.0).to(DOT), tl.trans(low), scores, input_precision="ieee")
    best = tl.max(tl.where((g < GROUP)[:, None], scores, float("-inf")), 0)
    tl.store(out + (r * K + k) * width + place, tl.where(there, best, float("-inf")), mask=place < width)


@triton.jit(do_not_specialize=["width"])
def subpage_scores_kernel(
    query,  # [R, H, D]
    pointers,  # int64, see Slabs; rows of codes [2, K, COUNT, D] and float16 scales [2, K, COUNT]
    table,  # int32 [R, P]
    counts,  # int32 [R]
    out,  # float32 [R, H, P]
    scale,
    slab_rows,
    width,  # P
    ROW_BYTES: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PAGES: tl.constexpr,
):
    """Log-sum-exps over the sub-pages of a block of pages; grid (blocks of pages, K, R).

    ``q . centre + |q| . spread``: two matrix products of the codes per channel in a byte, scaled afterwards. Codes of
    eight bits are exact in 16-bit types.
    """
    PARTS: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = D // PARTS
    MIDDLE: tl.constexpr = (2**BITS - 1) // 2
    k, r = tl.program_id(1), tl.program_id(2).to(tl.int64)
    g, b = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_B)
    place = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    slot = tl.load(table + r * width + place, mask=place < tl.load(counts + r), other=0)
    there = slot > 0
    rows = row_address(pointers, slot, slab_rows, ROW_BYTES)
    mask = there[:, None] & (b < BYTES)[None, :]
    head = (r * K + k) * GROUP + g
    highest = tl.full((BLOCK_G, PAGES), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G, PAGES), tl.float32)
    for sub in range(COUNT):
        vector = k * COUNT + sub
        codes_at = rows[:, None].to(tl.pointer_type(tl.uint8)) + (vector * BYTES + b)[None, :]
        centres = tl.load(codes_at, mask=mask, other=0).to(tl.int32)
        spreads = tl.load(codes_at + K * COUNT * BYTES, mask=mask, other=0).to(tl.int32)
        scales_at = (rows + 2 * K * COUNT * BYTES).to(tl.pointer_type(tl.float16)) + vector
        centre_scale = tl.load(scales_at, mask=there, other=0.0).to(tl.float32)
        spread_scale = tl.load(scales_at + K * COUNT, mask=there, other=0.0).to(tl.float32)
        near = tl.zeros((BLOCK_G, PAGES), tl.float32)
        far = tl.zeros((BLOCK_G, PAGES), tl.float32)
        for part in tl.static_range(PARTS):
            q_at = query + head[:, None] * D + (part * BYTES + b)[None, :]
            q = tl.load(q_at, mask=(g < GROUP)[:, None] & (b < BYTES)[None, :], other=0.0).to(tl.float32)
            centre = (((centres >> (BITS * part)) & (2**BITS - 1)) - MIDDLE).to(tl.float32).to(DOT)
            spread = ((spreads >> (BITS * part)) & (2**BITS - 1)).to(tl.float32).to(DOT)
            near = tl.dot(q.to(DOT), tl.trans(centre), near, input_precision="ieee")
            far = tl.dot(tl.abs(q).to(DOT), tl.trans(spread), far, input_precision="ieee")
        score = (near * centre_scale[None, :] + far * spread_scale[None, :]) * scale
        above = tl.maximum(highest, score)
        total = total * tl.exp(highest - above) + tl.exp(score - above)
        highest = above
    found = tl.where(there[None, :], highest + tl.log(total), float("-inf"))
    mask = (g < GROUP)[:, None] & (place < width)[None, :]
    tl.store(out + head[:, None] * width + place[None, :], found, mask=mask)


@triton.jit
def _rank(scores, pinned, place, count):
    """Order of the pages at some places as uint32, larger is better; and which of them exist."""
    there = place < count
    key = _sortable(tl.load(scores + place, mask=there, other=0.0))
    key = tl.where(tl.load(pinned + place, mask=there, other=0) != 0, 0x7F800000, key)  # as a score of inf
    return (key ^ LOWEST).to(tl.uint32, bitcast=True), there


@triton.jit(do_not_specialize=["width"])
def select_kernel(
    table,  # int32 [R, P]
    counts,  # int32 [R]
    scores,  # float32 [R, K, P]
    pinned,  # bool [R, P]
    budget,  # int32 [R]
    out,  # int32 [R, K, P]
    width,  # P
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The best pages of one row and KV head; grid (R * K).

    Radix selection: four passes each fix eight bits of the worst rank that is kept, by a histogram of
    the ranks that agree with the bits fixed so far. The last pass keeps what is above, and of what is
    equal as many as are wanted, from the front.
    """
    row = tl.program_id(0).to(tl.int64)
    r = row // K
    scores += row * width
    table += r * width
    pinned += r * width
    out += row * width
    count = tl.load(counts + r)
    pins = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        pins += tl.sum((tl.load(pinned + place, mask=place < count, other=0) != 0).to(tl.int32))
    keep = tl.minimum(tl.maximum(tl.load(budget + r), pins), count)

    digit = tl.arange(0, 256)
    worst = tl.zeros((), tl.uint32)  # rank of the last page kept, from the highest bits down
    wanted = keep  # of the pages that agree with it
    for shift in tl.static_range(24, -1, -8):
        histogram = tl.zeros((256,), tl.int32)
        for start in range(0, count, BLOCK):
            rank, there = _rank(scores, pinned, start + tl.arange(0, BLOCK), count)
            if shift < 24:
                there &= (rank >> (shift + 8)) == (worst >> (shift + 8))
            histogram += tl.histogram(((rank >> shift) & 255).to(tl.int32), 256, mask=there)
        above = tl.sum(histogram) - tl.cumsum(histogram, 0)  # pages of larger digits
        here = (above < wanted) & (above + histogram >= wanted)  # one digit, or none where none is wanted
        worst |= tl.sum(tl.where(here, digit, 0)).to(tl.uint32) << shift
        wanted -= tl.sum(tl.where(here, above, 0))

    equal = 0  # pages of the worst rank so far
    for start in range(0, width, BLOCK):
        place = start + tl.arange(0, BLOCK)
        rank, there = _rank(scores, pinned, place, count)
        tie = there & (rank == worst)
        at = equal + tl.cumsum(tie.to(tl.int32), 0)
        kept = there & ((rank > worst) | (tie & (at <= wanted))) & (keep > 0)
        equal += tl.sum(tie.to(tl.int32))
        tl.store(out + place, tl.load(table + place, mask=kept, other=0), mask=place < width)


# -- retention ---------------------------------------------------------------------------------


@triton.jit
def _faded(mass, age, decay_log2):
    """mass * decay^age; decay 0 has the logarithm -inf, and -inf * 0 would be NaN."""
    return mass * tl.where(age == 0, 1.0, tl.exp2(age * decay_log2))


@triton.jit(do_not_specialize=["n", "step"])
def update_kernel(slots, new_mass, mass, last_step, visits, n, step, decay, decay_log2, BLOCK: tl.constexpr):
    """Notes a visit of the slots ``[N]``; grid (blocks of N)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < n, other=0)
    seen = slot > 0
    age = (step - tl.load(last_step + slot, mask=seen, other=0)).to(tl.float32)
    faded = _faded(tl.load(mass + slot, mask=seen, other=0.0), age, decay_log2)
    tl.store(mass + slot, faded + (1 - decay) * tl.load(new_mass + i, mask=seen, other=0.0), mask=seen)
    tl.store(last_step + slot, step, mask=seen)
    tl.store(visits + slot, tl.load(visits + slot, mask=seen, other=0) + 1, mask=seen)


@triton.jit(do_not_specialize=["n", "step"])
def utility_kernel(
    mass, last_step, visits, evictable, keys, n, step, decay_log2, w_mass, w_recency, w_frequency, BLOCK: tl.constexpr
):
    """int64 keys ``[N]`` in order of (utility, slot), which the low half of a key is; grid (blocks of N)."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = slot < n
    age = (step - tl.load(last_step + slot, mask=mask, other=0)).to(tl.float32)
    utility = w_mass * _faded(tl.load(mass + slot, mask=mask, other=0.0), age, decay_log2)
    utility += w_recency / (1 + age)
    utility += w_frequency * tl.log(1.0 + tl.load(visits + slot, mask=mask, other=0).to(tl.float32))
    key = (_sortable(utility).to(tl.int64) << 32) | slot.to(tl.int64)
    may = tl.load(evictable + slot, mask=mask, other=0) != 0
    tl.store(keys + slot, tl.where(may, key, NOBODY), mask=mask)
