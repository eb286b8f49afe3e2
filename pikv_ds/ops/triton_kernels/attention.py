"""Kernels of partial attention, and the merge of partials.

Scores are kept in units of log2 within a kernel (hardware has exp2); a log-sum-exp that leaves one
is a natural logarithm. Shape letters as in `pikv_ds.ops.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pikv_ds.ops.triton_kernels.pages import channel_of, row_address

LN2 = tl.constexpr(0.6931471805599453)
LEAST_HALF = tl.constexpr(2.0**-24)


@triton.jit
def _halves(codes, OFFSET: tl.constexpr):
    """Codes below 256, less OFFSET, as float16: 0x6400 | c is the half 1024 + c, and subtracting is exact.

    An or and a subtraction at full rate, where a conversion runs at a quarter of it.
    """
    return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + OFFSET)


@triton.jit
def _load_elements(
    section,  # int64 address of [S, D] elements
    token,  # [N]
    mask,  # bool [N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STORED: tl.constexpr,  # type of plain elements
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    DOT: tl.constexpr,
):
    """Elements ``[N, BLOCK_D]`` as DOT, in the order of `channel_of`, without their scales.

    Integers come centered (less half their range: smaller terms, smaller errors), fp8 divided by 256.
    """
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    POINTEE: tl.constexpr = STORED if BITS >= 16 else tl.uint8
    COLUMNS: tl.constexpr = BLOCK_D // PARTS
    column = tl.arange(0, COLUMNS)
    # Sections start at multiples of 16 bytes, rows where the head size lets them. An address made from an
    # integer shows the compiler nothing of this: without hints it loads element by element.
    ROW: tl.constexpr = D * BITS // 8
    ALIGNED: tl.constexpr = 16 if ROW % 16 == 0 else ROW & -ROW
    at = (section + token * ROW)[:, None].to(tl.pointer_type(POINTEE)) + column[None, :]
    at = tl.max_contiguous(tl.multiple_of(at, (1, ALIGNED)), (1, COLUMNS))
    x = tl.load(at, mask=mask[:, None] & (column < D // PARTS)[None, :], other=0)
    if BITS >= 16:
        return x.to(DOT)
    elif FP8:
        # Exponent and mantissa moved into a half's places: exact, subnormals included, but for the exponents' biases.
        return (((x.to(tl.int8, bitcast=True).to(tl.int16) << 8) >> 1) & -16385).to(tl.float16, bitcast=True).to(DOT)
    elif BITS == 8:
        return _halves(x, 128).to(DOT)
    elif BITS == 4:
        return tl.interleave(_halves(x & 15, 8), _halves(x >> 4, 8)).to(DOT)
    else:
        even = tl.interleave(_halves(x & 3, 2), _halves((x >> 4) & 3, 2))  # parts 0 and 2
        odd = tl.interleave(_halves((x >> 2) & 3, 2), _halves(x >> 6, 2))  # parts 1 and 3
        return tl.interleave(even, odd).to(DOT)


@triton.jit
def _finite(peak):
    """A finite maximum to subtract where nothing has been seen: -inf - -inf would be NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


# -- attention over pages ----------------------------------------------------------------------


@triton.jit(do_not_specialize=["width"])
def compact_kernel(table, counts, slots, places, filled, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """Moves the pages of a selection to the front; grid (B * K).

    table ``[B, K, P]`` mostly holds holes when pages were selected per head; slots and places
    ``[B, K, P]`` are its pages and where they stood, filled ``[B, K]`` how many.
    """
    row = tl.program_id(0)
    start_of_row = row.to(tl.int64) * width
    count = tl.load(counts + row // K)
    n = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        slot = tl.load(table + start_of_row + place, mask=place < count, other=0)
        there = slot > 0
        at = start_of_row + n + tl.cumsum(there.to(tl.int32), 0) - 1
        tl.store(slots + at, slot, mask=there)
        tl.store(places + at, place, mask=there)
        n += tl.sum(there.to(tl.int32))
    tl.store(filled + row, n)


@triton.jit(do_not_specialize=["slab_rows", "width", "num_queries", "num_rows", "num_splits"])
def paged_attention_kernel(
    query,  # [R, H, D]
    pointers,  # int64, see Slabs
    table,  # int32 [B, P], or [B, K, P]
    places,  # int32 [B, K, P], columns of page_lse; None: a page's place in the table
    counts,  # int32 [B], or [B, K] with places; None: all P
    out,  # float32 [splits, R, H, D]; None: only page_lse is wanted
    lse,  # float32 [splits, R, H]
    page_lse,  # float32 [R, H, P], or None
    scale_log2,  # factor on q . k, in units of log2
    slab_rows,
    width,  # P
    num_queries,  # T: query rows that share a table row
    num_rows,  # R
    num_splits,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    S: tl.constexpr,
    D: tl.constexpr,
    PER_HEAD: tl.constexpr,  # table and counts have an axis K
    STORED: tl.constexpr,
    BITS: tl.constexpr,
    FP8: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    KEY_SCALES: tl.constexpr,  # offsets in bytes, see PageLayout
    VALUES: tl.constexpr,
    VALUE_SCALES: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    DOT: tl.constexpr,  # type that products are taken in
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,  # tokens at a time, all of one page
    MIN_PAGES: tl.constexpr,  # in a split
    STAGES: tl.constexpr,
):
    """Attention of a block of (query, head of one group) pairs over a piece of a table row.

    Grid (blocks * splits, K, B). A KV head's query heads, and the queries that share a table row, are
    the rows of one matrix product, so that a key is loaded once for all of them. Scales never meet
    an element: a page's key scales go into the queries, key minima and value minima into sums
    beside the products, value scales into the weights.
    """
    block, split = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits
    k, b = tl.program_id(1), tl.program_id(2)
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    CHUNKS: tl.constexpr = (S + TILE - 1) // TILE  # tiles of a page
    ROW: tl.constexpr = D * BITS // 8
    # Half of an integer's range, which _load_elements takes off; what fp8 is divided by there.
    CENTER: tl.constexpr = 2 ** (BITS - 1) if SCALE_ROWS == 2 else 0
    UNIT: tl.constexpr = 256.0 if FP8 else 1.0
    # float16 has the bits for scaled queries and weights, but not the range: they are taken relative to the
    # largest scale, and up to this number, so that what is lost to underflow is below 2^-38 of it.
    TOP: tl.constexpr = 16384.0

    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_there = m < num_queries * GROUP
    # row of [R, H]: query m // GROUP of table row b, head m % GROUP of KV head k
    row = ((b * num_queries + m // GROUP) * K + k).to(tl.int64) * GROUP + m % GROUP
    column = tl.arange(0, BLOCK_D)
    channel = channel_of(column, D, PARTS)
    q_at = query + row[:, None] * D + channel[None, :]
    q = tl.load(q_at, mask=row_there[:, None] & (column < D)[None, :], other=0.0)
    row_scale = tl.full((BLOCK_M,), scale_log2, tl.float32)
    if SCALE_ROWS > 0:
        q = q.to(tl.float32)  # and divided by the largest of a row, for the same reason
        norm = tl.max(tl.abs(q), 1)
        norm = tl.where(norm == 0, 1.0, norm)
        q = q / norm[:, None]
        row_scale *= norm
    else:
        q = q.to(DOT)

    head = b * K + k if PER_HEAD else b
    table += head.to(tl.int64) * width
    count = width
    if counts is not None:
        count = tl.load(counts + head)
    per_split = tl.maximum(tl.cdiv(count, num_splits), MIN_PAGES)
    first = tl.minimum(split * per_split, count)
    last = tl.minimum(first + per_split, count)

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # of the scores
    total = tl.zeros((BLOCK_M,), tl.float32)  # of the weights
    shift = tl.zeros((BLOCK_M,), tl.float32)  # of weights times value minima
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)  # out, in units of unit / TOP
    unit = LEAST_HALF  # largest value scale so far
    page_peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    page_total = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.range(first * CHUNKS, last * CHUNKS, num_stages=STAGES):
        place, chunk = i // CHUNKS, i % CHUNKS
        slot = tl.load(table + place)
        page = row_address(pointers, slot, slab_rows, PAGE_BYTES)
        token = chunk * TILE + tl.arange(0, TILE)
        there = (token < S) & (slot > 0)

        x = _load_elements(page + k * (S * ROW), token, there, D, BLOCK_D, STORED, BITS, FP8, DOT)
        if SCALE_ROWS > 0:
            scales = (page + KEY_SCALES).to(tl.pointer_type(tl.float16)) + k * D + channel
            scale_there = (column < D) & (slot > 0)
            factor = tl.load(scales, mask=scale_there, other=0.0).to(tl.float32)
            largest = tl.maximum(tl.max(factor), LEAST_HALF)
            scores = tl.dot((q * (factor * (TOP / largest))[None, :]).to(DOT), tl.trans(x), input_precision="ieee")
            scores *= largest * (UNIT / TOP)
            if SCALE_ROWS == 2:
                middle = tl.load(scales + K * D, mask=scale_there, other=0.0).to(tl.float32) + CENTER * factor
                scores += tl.sum(q * middle[None, :], 1)[:, None]
        else:
            scores = tl.dot(q, tl.trans(x), input_precision="ieee")
        scores = tl.where(there[None, :], scores * row_scale[:, None], float("-inf"))

        tile_peak = tl.max(scores, 1)
        new_peak = tl.maximum(peak, tile_peak)
        if page_lse is not None:
            # Relative to its own maximum, or a page far below the others would be lost to underflow.
            weights = tl.exp2(scores - _finite(tile_peak)[:, None])
            is_first = chunk == 0
            old_peak = tl.where(is_first, float("-inf"), page_peak)
            page_peak = tl.maximum(old_peak, tile_peak)
            page_total = tl.where(is_first, 0.0, page_total) * tl.exp2(old_peak - _finite(page_peak))
            page_total += tl.sum(weights, 1) * tl.exp2(tile_peak - _finite(page_peak))
            at = place
            if places is not None:
                at = tl.load(places + head.to(tl.int64) * width + place)
            value = (_finite(page_peak) + tl.log2(page_total)) * LN2
            tl.store(page_lse + row * width + at, value, mask=row_there & (chunk == CHUNKS - 1))
            weights *= tl.exp2(tile_peak - _finite(new_peak))[:, None]
        else:
            weights = tl.exp2(scores - _finite(new_peak)[:, None])

        if out is not None:
            old = tl.exp2(peak - _finite(new_peak))
            peak = new_peak
            total = total * old + tl.sum(weights, 1)
            x = _load_elements(page + VALUES + k * (S * ROW), token, there, D, BLOCK_D, STORED, BITS, FP8, DOT)
            if SCALE_ROWS > 0:
                scales = (page + VALUE_SCALES).to(tl.pointer_type(tl.float16)) + k * S + token
                factor = tl.load(scales, mask=there, other=0.0).to(tl.float32)
                new_unit = tl.maximum(unit, tl.max(factor))
                acc *= (old * (unit / new_unit))[:, None]
                acc += tl.dot((weights * (factor * (TOP / new_unit))[None, :]).to(DOT), x, input_precision="ieee")
                unit = new_unit
                if SCALE_ROWS == 2:
                    middle = tl.load(scales + K * S, mask=there, other=0.0).to(tl.float32) + CENTER * factor
                    shift = shift * old + tl.sum(weights * middle[None, :], 1)
            else:
                acc = tl.dot(weights.to(DOT), x, acc * old[:, None], input_precision="ieee")

    if out is not None:
        divisor = tl.where(total == 0, 1.0, total)[:, None]
        if SCALE_ROWS > 0:
            acc = acc * (unit * (UNIT / TOP)) + shift[:, None]
        row += split.to(tl.int64) * num_rows * (K * GROUP)
        tl.store(lse + row, (_finite(peak) + tl.log2(total)) * LN2, mask=row_there)
        # nobody reads an empty partial among splits
        read = row_there & ((total > 0) | (total != total) | (num_splits == 1))
        tl.store(out + row[:, None] * D + channel[None, :], acc / divisor, mask=read[:, None] & (column < D)[None, :])


# -- attention over plain keys -----------------------------------------------------------------


@triton.jit(do_not_specialize=["num_queries", "num_keys", "first_query"])
def plain_attention_kernel(
    query,  # [B * T, H, D] by strides, channels contiguous, as are
    keys,  # [B, K, N, D]
    values,  # [B, K, N, D]
    lengths,  # int32 [B]: keys of each sequence; None: all N
    out,  # float32 [B * T, H, D]
    lse,  # float32 [B * T, H]
    scale_log2,
    num_queries,  # T
    num_keys,  # N
    first_query,  # query t sees keys up to first_query + t, if CAUSAL
    query_stride_t,
    query_stride_h,
    key_stride_b,
    key_stride_k,
    key_stride_n,
    value_stride_b,
    value_stride_k,
    value_stride_n,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attention of a block of (query, head of one group) pairs over all their keys; grid (blocks, K, B)."""
    k, b = tl.program_id(1), tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_there = m < num_queries * GROUP
    t = b.to(tl.int64) * num_queries + m // GROUP
    head = k * GROUP + m % GROUP
    column = tl.arange(0, BLOCK_D)
    q_at = query + t[:, None] * query_stride_t + head[:, None] * query_stride_h + column[None, :]
    q = tl.load(q_at, mask=row_there[:, None] & (column < D)[None, :], other=0.0).to(DOT)

    end = num_keys
    if lengths is not None:
        end = tl.load(lengths + b)
    limit = tl.zeros((BLOCK_M,), tl.int32) + end
    if CAUSAL:
        limit = tl.minimum(first_query + 1 + m // GROUP, end)
        end = tl.max(limit)
    key_at = keys + b.to(tl.int64) * key_stride_b + k.to(tl.int64) * key_stride_k + column[None, :]
    value_at = values + b.to(tl.int64) * value_stride_b + k.to(tl.int64) * value_stride_k + column[None, :]

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in tl.range(0, end, TILE, num_stages=STAGES):
        token = start + tl.arange(0, TILE)
        mask = (token < end)[:, None] & (column < D)[None, :]  # what lies beyond may be NaN, and 0 * NaN is NaN
        x = tl.load(key_at + token.to(tl.int64)[:, None] * key_stride_n, mask=mask, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(x), input_precision="ieee") * scale_log2
        scores = tl.where(token[None, :] < limit[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - _finite(new_peak)[:, None])
        old = tl.exp2(peak - _finite(new_peak))
        peak = new_peak
        total = total * old + tl.sum(weights, 1)
        x = tl.load(value_at + token.to(tl.int64)[:, None] * value_stride_n, mask=mask, other=0.0).to(DOT)
        acc = tl.dot(weights.to(DOT), x, acc * old[:, None], input_precision="ieee")

    row = t * (K * GROUP) + head
    acc /= tl.where(total == 0, 1.0, total)[:, None]
    tl.store(lse + row, (_finite(peak) + tl.log2(total)) * LN2, mask=row_there)
    tl.store(out + row[:, None] * D + column[None, :], acc, mask=row_there[:, None] & (column < D)[None, :])


# -- merging -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_partials", "num_rows"])
def merge_kernel(
    outs,  # float32 [P, N, D]
    lses,  # float32 [P, N]
    out,  # float32 [N, D]
    lse,  # float32 [N]
    num_partials,
    num_rows,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merges the partials of one row, blocks of partials in order; grid (N)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    peak = float("-inf")
    for start in range(0, num_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        x = tl.load(lses + p.to(tl.int64) * num_rows + row, mask=p < num_partials, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(x))
    peak = _finite(peak)
    total = tl.zeros((BLOCK_D,), tl.float32)
    divisor = 0.0
    for start in range(0, num_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = p.to(tl.int64) * num_rows + row
        weights = tl.exp(tl.load(lses + at, mask=p < num_partials, other=float("-inf")) - peak)
        weights = tl.where(p < num_partials, weights, 0.0)
        read = weights != 0  # a partial of no weight is not read; NaN is: it has to show
        part = tl.load(outs + at[:, None] * D + d[None, :], mask=read[:, None] & (d < D)[None, :], other=0.0)
        total += tl.sum(part * weights[:, None], 0)
        divisor += tl.sum(weights)
    tl.store(out + row * D + d, total / tl.where(divisor == 0, 1.0, divisor), mask=d < D)
    tl.store(lse + row, peak + tl.log(divisor), mask=divisor != 0)
    tl.store(lse + row, float("-inf"), mask=divisor == 0)
